"""What a step of practice spends on writing, rewards and the update; the same step with `zss` distances beside it.

    python benchmarks/grpo.py --data data/train --steps 3
    python benchmarks/grpo.py --data data/train --memory 8 32 128 --tokens 60 --threads 1

The packaged reader under preset `tiny`: 8 pictures × 16 readings, excerpts of up to --tokens tokens. Wall seconds of
each phase and CPU seconds of the reward on its own thread; "waited for" is the time in which nothing else went on. A
first step is a warm-up and left out. Then the tree distances of the last step's readings are measured on the same
pairs by both implementations, equal readings once, --zss of them, and the reward's share of the step is told for each.

With --memory, instead: the most memory that one process ever held over one step of one picture read G times, for each
G in a process of its own; 32 readings are written and 16 differentiated at once, whatever G is.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from vitomr.data.synthesis import Shards, build
from vitomr.decoder import load_reader
from vitomr.grpo import PACKAGED, PRACTICE, with_settings
from vitomr.notation.lmx import EOS_ID, decode
from vitomr.notation.tedn import tedn
from vitomr.reading.pictures import Excerpts
from vitomr.reading.policy import ReaderPolicy
from vitomr.train.loop import Optimizers
from vitomr.train.step import StepContext, collect
from vitomr.train.update import update

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_tedn import definition, part_of  # noqa: E402


def timed(f) -> tuple[float, object]:
    start = time.process_time()
    result = f()
    return time.process_time() - start, result


def context_of(args, **given) -> tuple[StepContext, Optimizers]:
    cfg = with_settings(PRACTICE["tiny"], {"lengths": [args.tokens], "dynamic_sampling": 0} | given)
    model = load_reader(PACKAGED)
    data = Excerpts(Shards(args.data), cfg, space=model.cfg.staff_space)
    ctx = StepContext(ReaderPolicy(model), data, cfg.music_reward, cfg, Accelerator(cpu=True))
    return ctx, Optimizers(ctx.weights, cfg.loop)


def peak(args, g: int) -> tuple[float, float, float]:
    "MiB held at most before a step of g readings and after it, and the tokens of a reading."
    torch.set_num_threads(args.threads)
    held = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ctx, optimizers = context_of(args, num_generations=g, per_device_batch_size=g, max_actions=2 * args.tokens)
    before = held()
    parts, table, _ = collect(ctx, 0)
    update(ctx, parts, table, 0, optimizers, 1e-6)
    return before, held(), float(table.lengths.mean())


def compare_memory(args) -> None:
    print(f"{'G':>4} {'loaded':>8} {'peak':>8} {'tokens':>8}")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for g, (before, after, tokens) in zip(args.memory, pool.map(partial(peak, args), args.memory)):
            print(f"{g:4} {before:4.0f} MiB {after:4.0f} MiB {tokens:8.0f}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="a folder of shards; without one, excerpts of music21's corpus are made")
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--tokens", type=int, default=120, help="of the longest excerpt")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--zss", type=int, default=8, help="pairs that zss measures; it takes seconds for each")
    p.add_argument("--memory", type=int, nargs="+", metavar="G", help="measure memory for these group sizes instead")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    if args.data is None:
        args.data = Path(tempfile.mkdtemp())
        build("music21", args.data, 200, seed=3)
    if args.memory:
        return compare_memory(args)
    ctx, optimizers = context_of(args, steps=args.steps + 1)
    rows = []
    for step in range(args.steps + 1):
        ctx.seconds.clear()
        with ctx.clock("step"):
            parts, table, _ = collect(ctx, step)
            with ctx.clock("update"):
                update(ctx, parts, table, step, optimizers, 1e-6)
        rows.append(dict(ctx.seconds) | {"tokens": float(table.lengths.mean())})
    mean = {k: float(np.mean([r[k] for r in rows[1:]])) for k in rows[0]}
    n = table.total.size
    print(f"{args.steps} steps of {n} readings, {mean['tokens']:.0f} tokens each, {args.threads} threads\n")
    for phase in ("rollout", "update", "data", "reward, waited for", "step"):
        print(f"{phase:20} {mean[phase]:7.2f} s {100 * mean[phase] / mean['step']:6.1f} %")
    print(f"{'reward, CPU':20} {mean['reward']:7.2f} s {100 * mean['reward'] / mean['step']:6.1f} %")

    pairs = {}
    for part in parts:
        for action in part.actions:
            read = decode([t for t in action if t != EOS_ID])
            pairs[tuple(read), part.slice.slot] = read, decode(part.state.ids)
    chosen = [list(pairs.values())[i] for i in np.random.default_rng(0).permutation(len(pairs))[: args.zss]]
    fast, mine = timed(lambda: [tedn(a, b) for a, b in chosen])
    slow, theirs = timed(lambda: [definition(part_of(a), part_of(b)) for a, b in chosen])
    if [(d.edit_cost, d.gold_cost) for d in mine] != theirs:
        raise SystemExit("the two distances differ")
    grown = (slow - fast) / len(chosen) * len(pairs)
    print(f"\ntree distance of {len(chosen)} of the last step's {len(pairs)} distinct readings, the same integers:")
    print(f"vitomr {1e3 * fast / len(chosen):9.2f} ms each\nzss    {1e3 * slow / len(chosen):9.2f} ms each")
    without = mean["step"] - mean["reward, waited for"]
    share = (mean["reward"] + grown) / (mean["reward"] + grown + without)
    print(f"with zss a step's rewards would take {mean['reward'] + grown:.1f} s of CPU, {100 * share:.0f} % of a step")


if __name__ == "__main__":
    main()
