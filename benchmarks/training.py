"""Where a training step goes, and how much of this CPU's matrix peak it reaches.

    python benchmarks/training.py --preset tiny --threads 2

The peak is that of 2048 x 2048 products in the type that is trained in, bfloat16 where the processor has instructions
for it and float32 elsewhere, measured in the same run before and after. The step's work is counted as PyTorch counts
it (matrix products and convolutions, forward and backward, and the optimiser's own); everything else a step does
(norms, softmax, copies, the update) counts as time without work. Real batches of the preset's size, engraved and
degraded beforehand from 64 excerpts of music21's corpus. With MALLOC_* as in the Makefile it is quicker.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitomr.data.batches import Batches
from vitomr.data.synthesis import Shards, build
from vitomr.decoder import TRAINING, Reader
from vitomr.train.loop import Ema, Optimizers, multiplies_bf16

TYPE = torch.bfloat16 if multiplies_bf16("cpu") else torch.float32


def peak(n: int = 2048, repeats: int = 8) -> float:
    "FLOP/s of large products."
    a, b = torch.randn(2, n, n, dtype=TYPE)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


class Clock:
    "Seconds by part."

    def __init__(self):
        self.seconds = defaultdict(float)

    @contextmanager
    def __call__(self, part: str):
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start


def timed(clock: Clock, part: str, model: nn.Module, name: str) -> None:
    "Let a method of the model count its time."
    method = getattr(model, name)

    def counted(*args, **options):
        with clock(part):
            return method(*args, **options)

    setattr(model, name, counted)


def step(model, batch, cfg, optimizers, ema, clock) -> None:
    with clock("forward"), torch.autocast("cpu", TYPE, enabled=TYPE == torch.bfloat16):
        loss, _ = cfg.losses(model, batch)
    with clock("backward"):
        loss.backward()
    with clock("clipping"):
        nn.utils.clip_grad_norm_(model.parameters(), cfg.loop.clip)
    with clock("optimiser"):
        optimizers.step(1e-6)
    with clock("average"):
        ema.update(model, 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny", choices=TRAINING)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=8, help="of different batches")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    cfg = TRAINING[args.preset]
    plan = replace(cfg.plan, lengths=((0, cfg.plan.lengths[-1][1]),))
    with tempfile.TemporaryDirectory() as folder:
        build("music21", folder, 64, seed=1)
        batches = Batches(Shards(folder), plan, mix=cfg.mix, space=cfg.reader.staff_space, steps=args.steps)
        start = time.perf_counter()
        ready = [batches[i] for i in range(len(batches))]
        data = (time.perf_counter() - start) / len(ready)
    model = Reader(cfg.reader).train()
    optimizers, ema = Optimizers(model, cfg.loop), Ema(model, cfg.loop.ema)
    work = []
    for batch in ready:  # counted, which also warms everything
        with FlopCounterMode(display=False) as flops:
            step(model, batch, cfg, optimizers, ema, Clock())
        work.append(flops.get_total_flops())
    clock, before = Clock(), peak()
    timed(clock, "of which stem", model.encoder.stem, "forward")
    timed(clock, "of which encoder", model, "see")  # the stem is part of it
    timed(clock, "of which decoder", model, "decode_guided")
    start = time.perf_counter()
    for batch in ready:
        step(model, batch, cfg, optimizers, ema, clock)
    seconds = time.perf_counter() - start
    report(clock, sum(work), seconds, max(before, peak()), data, ready)


def report(clock: Clock, work: int, seconds: float, top: float, data: float, batches: list) -> None:
    n = len(batches)
    pictures = sum(map(len, batches)) / n
    print(f"{pictures:.0f} excerpts a step, {work / n / 1e9:.0f} GFLOP, {seconds / n:.2f} s")
    share = f"{100 * work / seconds / top:.0f} % of the peak of {top / 1e9:.0f}"
    print(f"{work / seconds / 1e9:.0f} GFLOP/s, {share} in {TYPE}")
    print(f"{'part':24} {'ms a step':>9} {'share':>6}")
    took = clock.seconds
    took["of which heads, losses"] = took["forward"] - took["of which encoder"] - took["of which decoder"]
    inner = ("of which stem", "of which encoder", "of which decoder", "of which heads, losses")
    for part in ("forward", *inner, "backward", "clipping", "optimiser", "average"):
        print(f"{part:24} {1000 * took[part] / n:9.0f} {100 * took[part] / seconds:5.0f} %")
    print(f"{'data (another process)':24} {1000 * data:9.0f}")


if __name__ == "__main__":
    main()
