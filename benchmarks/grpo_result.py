"""What practice is worth: from the same weights, GRPO under two rewards against supervised training of equal compute.

    python benchmarks/grpo_result.py --data data/train --dev data/dev --work runs/grpo_result --steps 600

Arms, for each seed: `vitomr` and `notes` (rewards of preset `tiny`), then `supervised`, which goes on with teacher
forcing for as many CPU seconds as the `vitomr` arm of its seed took. With --control-data it goes on with those
excerpts, like those of its earlier training, and an arm `taught` is trained on the references of --data.
An arm `consensus` practises under `vitomr` without any reference: samples are scored against that of their group which
is nearest to all the others.
Each arm is evaluated on the same dev excerpts, free-running and greedy, and written to --out as soon as it is done.
Killed and started again it goes on, inside an arm too.
With --hard 1500 that many excerpts are read first, greedily, and practice keeps those read with some errors and not
with errors only: where all is right there is nothing to choose between. The supervised arm keeps all of --data.
Options of GRPO: --set num_generations=16 --set lr=1e-5, or --like the file of an earlier result.
Differences from the start are paired, over excerpts.
--along -1 0.5 also evaluates weights on the line through the start and each arm, at start + k (arm - start);
--noise 3 as many steps away from the start in random directions, each matrix as far as the arm moved it.
"""

import argparse
import copy
import hashlib
import json
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from vitomr.cli import _setting
from vitomr.data.batches import prepare
from vitomr.data.synthesis import Shards, write_shard
from vitomr.decoder import TRAINING, load_reader
from vitomr.decoder import train as teach
from vitomr.evaluate import GREEDY, choose
from vitomr.grpo import PACKAGED, PRACTICE, plot_kinds, train, with_settings
from vitomr.notation.lmx import decode
from vitomr.notation.metrics import METRICS, micro_rate, token_distance
from vitomr.notation.tedn import tedn
from vitomr.reading.lines import write_pictures
from vitomr.reading.policy import Picture
from vitomr.train.runs import read_history
from vitomr.transcribe import Transcriber


def tedn_counts(pred, true) -> tuple[int, int]:
    d = tedn(pred, true)
    return d.edit_cost, d.gold_cost


FIGURES = {
    "SER": METRICS["SER"],
    "TEDn": tedn_counts,
    "note F1": METRICS["note F1, pitch, onset and duration"],
    "bars that add up": METRICS["bars that add up"],
}
CONTROLS = "supervised", "taught"
PROBE = 12  # supervised steps that tell what one costs


def dev_pictures(args, folder: Path) -> list[Picture]:
    "The same for every arm."
    shards, low, high = Shards(folder), *(int(x) for x in args.bars.split("-"))
    space, found = load_reader(args.init).cfg.staff_space, []
    for i in choose(shards, range(low, high + 1), args.limit):
        s = shards[i]
        img, _ = prepare(s, np.random.default_rng([7, i]), args.degradation, space)
        found.append(Picture(img, s.ids.astype(int).tolist(), f"{s.song}:{s.start}+{s.n_measures}"))
    return found


def fingerprint(weights: Path) -> str:
    "What tells readers of one name apart."
    return hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()[:8]


def read_greedily(model, pictures: list[Picture]) -> list[tuple[list[str], list[str]]]:
    "Prediction and reference of each picture: one look, no second look, without the grammar."
    lines = write_pictures(Transcriber(model), [p.img for p in pictures], replace(GREEDY, max_tokens=768))
    return [(line.tokens, decode(p.ids)) for line, p in zip(lines, pictures, strict=True)]


def counts_of(model, pictures: list[Picture], cache: Path) -> dict[str, list[list[float]]]:
    "Figure → part and whole of each picture; readings are kept in `cache`."
    if cache.exists():
        read = [(a.split(), b.split()) for a, b in json.loads(cache.read_text())]
    else:
        read = read_greedily(model, pictures)
        cache.write_text(json.dumps([(" ".join(a), " ".join(b)) for a, b in read], indent=0))
    if [b for _, b in read] != [decode(p.ids) for p in pictures]:
        raise SystemExit(f"{cache} holds readings of other excerpts; delete it or use another --work")
    return {name: [[float(x) for x in figure(a, b)] for a, b in read] for name, figure in FIGURES.items()}


def change(mine: list[list[float]], other: list[list[float]], seed: int = 0) -> dict[str, float]:
    "Relative difference of two rates on the same excerpts, with a paired bootstrap interval."
    a, b = np.array(mine), np.array(other)
    draw = np.random.default_rng(seed).integers(len(a), size=(2000, len(a)))
    rate = lambda x, rows: x[rows, 0].sum(-1) / x[rows, 1].sum(-1)
    ratios = rate(a, draw) / rate(b, draw) - 1
    everything = np.arange(len(a))
    low, high = np.quantile(ratios, [0.025, 0.975])
    return {"value": rate(a, everything) / rate(b, everything) - 1, "low": low, "high": high}


def hard_excerpts(args) -> Path:
    "Shards of the training excerpts that the start reads with 2 to 50 % of errors."
    folder = args.work / "hard"
    if (folder / "picked.json").exists():
        return folder
    shards, model = Shards(args.data), load_reader(args.init)
    fits = np.flatnonzero((shards.index["n_tokens"] >= 80) & (shards.index["n_tokens"] <= 500))
    tried = np.random.default_rng(0).permutation(fits)[: args.hard]
    look = lambda i: prepare(shards[i], np.random.default_rng([9, i]), "clean", model.cfg.staff_space)[0]
    pictures = [Picture(look(i), shards[i].ids) for i in tried]
    wrong = [token_distance(a, b) / len(b) for a, b in read_greedily(model, pictures)]
    kept = [int(i) for i, e in zip(tried, wrong, strict=True) if 0.02 <= e <= 0.5]
    if not kept:
        raise SystemExit(f"--hard {args.hard}: none of {len(tried)} excerpts is read with 2 to 50 % of errors")
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(0, len(kept), 250):
        write_shard([shards[i] for i in kept[k : k + 250]], folder / f"{k // 250:05d}")
    about = {"read": len(tried), "kept": len(kept), "all right": float(np.mean([e == 0 for e in wrong]))}
    (folder / "picked.json").write_text(json.dumps(about))
    print(f"practice on excerpts that are hard: {about}", flush=True)
    return folder


def practised(args, reward: str, seed: int, folder: Path) -> tuple[object, float, int]:
    wanted = {"reward": "vitomr", "target": "consensus"} if reward == "consensus" else {"reward": reward}
    given = dict(_setting(s) for s in args.set) | wanted | {"seed": seed, "steps": args.steps}
    cfg, data = with_settings(PRACTICE["tiny"], given), hard_excerpts(args) if args.hard else args.data
    model = train(cfg, data, folder, init=args.init, on_log=lambda h: progress(folder, h, "reward"))
    return model, sum(h["seconds"]["cpu"] for h in read_history(folder)), args.steps


def supervised(args, data: list[Path], seed: int, folder: Path, budget: float) -> tuple[object, float, int]:
    "Teacher forcing for a number of CPU seconds, told from a few steps whose result is thrown away."
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "cost.json"

    def run(steps: int, where: Path):
        loop = replace(TRAINING["tiny"].loop, steps=steps, lr=args.control_lr, seed=seed, warmup=min(50, steps // 4))
        cfg = replace(TRAINING["tiny"], reader=load_reader(args.init).cfg, loop=loop, workers=0)
        return teach(cfg, data, where, init=args.init, on_log=lambda h: progress(folder, h, "ce"))

    if not known.exists():
        start = time.process_time()
        run(PROBE, folder / "probe")
        known.write_text(json.dumps((time.process_time() - start) / PROBE))
    cost = json.loads(known.read_text())
    steps = max(PROBE, round(budget / cost))
    return run(steps, folder / "run"), steps * cost, steps


def along(start, arm, k: float):
    "A reader on the line through both: 0 is the start, 1 the arm."
    found, there = copy.deepcopy(start), dict(arm.named_parameters())
    with torch.no_grad():
        for name, p in found.named_parameters():
            p += k * (there[name] - p)
    return found.eval()


def anywhere(start, arm, seed: int):
    "As far from the start as the arm is, each tensor by itself, in a random direction."
    found, there = copy.deepcopy(start), dict(arm.named_parameters())
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in found.named_parameters():
            step = torch.randn(p.shape, generator=rng)
            p += step * ((there[name] - p).norm() / step.norm())
    return found.eval()


def settings_of(result: Path) -> list[str]:
    "The settings of GRPO that an earlier result was made with."
    try:
        return [str(s) for s in json.loads(result.read_text())["settings"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise SystemExit(f"--like {result}: expected a file that --out wrote, with its settings") from None


def progress(folder: Path, line: dict, key: str) -> None:
    if line["step"] % 20 == 0:
        print(f"{folder.name}: step {line['step']}, {key} {line[key]:.3f}", flush=True)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, nargs="+", required=True, help="folders of training shards")
    p.add_argument("--dev", type=Path, nargs="+", required=True, help="folders of shards of dev songs; figures are of"
                   " all together, and with several of each beside")  # fmt: skip
    p.add_argument("--work", type=Path, required=True, help="a folder for runs and readings")
    p.add_argument("--out", type=Path, default=Path("nbs/results/grpo.json"))
    p.add_argument("--init", type=Path, default=PACKAGED, help="the weights that all arms start from")
    p.add_argument("--steps", type=int, default=600, help="of practice")
    p.add_argument("--seeds", default="0,1")
    p.add_argument("--arms", default="vitomr,notes,supervised", help="also consensus, taught")
    p.add_argument("--control-data", type=Path, nargs="+", help="shards for the supervised arm; --data when left out")
    p.add_argument("--bars", default="1-5", help="lengths of dev excerpts")
    p.add_argument("--limit", type=int, default=150, help="dev excerpts of each kind")
    p.add_argument("--degradation", default="clean", help="of dev pictures")
    p.add_argument("--control-lr", type=float, default=2e-4, help="peak learning rate of supervised training")
    p.add_argument("--along", type=float, nargs="+", default=[], metavar="K", help="as above")
    p.add_argument("--noise", type=int, default=0, help="random steps as long as an arm's")
    p.add_argument("--hard", type=int, default=0, help="excerpts to choose hard ones from; 0: practise on all")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of GRPO")
    p.add_argument("--like", type=Path, metavar="RESULT", help="a file that --out wrote: settings are its own")
    p.add_argument("--figure", type=Path, metavar="PNG", help="with two --dev: TEDn on both, and rewards, drawn")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = p.parse_args()
    names, kinds = [folder.name for folder in args.dev], args.arms.split(",")
    if len(set(names)) < len(names):
        p.error(f"--dev {', '.join(names)}: figures are kept by the folder's name; give each its own")
    if args.figure and len(names) != 2:
        p.error(f"--figure shows two sets of dev excerpts; --dev names {len(names)}")
    first = min((i for i, kind in enumerate(kinds) if kind in CONTROLS), default=None)
    if first is not None and "vitomr" not in kinds[:first]:
        p.error(f"--arms {args.arms}: a control takes as long as vitomr took; name vitomr before it")
    if args.like:
        args.set = [*settings_of(args.like), *args.set]
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    sets = {folder.name: dev_pictures(args, folder) for folder in args.dev}
    n = " + ".join(str(len(pictures)) for pictures in sets.values())
    about = f"{n} dev excerpts of {args.bars} bars, {args.degradation}, greedy"
    results = {"about": about, "settings": args.set, "control_lr": args.control_lr, "arms": {}}
    parts = {name: {"about": f"{len(pictures)} excerpts of {name}", "arms": {}} for name, pictures in sets.items()}
    if len(sets) > 1:
        results["parts"] = parts

    def read(model, cache: str) -> dict[str, dict]:
        "Counts of each set of dev excerpts, and of all."
        of = lambda name: args.work / f"{cache}{f'-{name}' if len(sets) > 1 else ''}.json"
        found = {name: counts_of(model, pictures, of(name)) for name, pictures in sets.items()}
        return found | {"": {k: sum((c[k] for c in found.values()), []) for k in FIGURES}}

    counts, cpu = {"start": read(load_reader(args.init), "start")}, {}

    def entry(arm: str, part: str) -> dict:
        mine = counts[arm][part]
        found = {"metrics": {k: vars(micro_rate(*zip(*v, strict=True))) for k, v in mine.items()}}
        found["TEDn_against_start"] = change(mine["TEDn"], counts["start"][part]["TEDn"])
        return found

    def keep(arm: str, seconds: float, steps: int) -> None:
        if empty := [k for c in counts[arm].values() for k, v in c.items() if not sum(whole for _, whole in v)]:
            raise SystemExit(
                f"{arm}: the readings hold nothing to count for: {', '.join(dict.fromkeys(empty))}; "
                "start from weights that read music, or read more with --limit"
            )
        results["arms"][arm] = entry(arm, "") | {"cpu_seconds": round(seconds), "steps": steps}
        for name, about in parts.items():
            about["arms"][arm] = entry(arm, name)
        of = arm.partition(" ")[2]  # the seed, or what else tells arms of a kind apart
        beside = [a for a in counts if a.partition(" ")[2] == of and not a.startswith(CONTROLS)]
        for control in (c for c in CONTROLS if f"{c} {of}" in counts):
            for mine, (name, about) in product(beside, [("", results), *parts.items()]):
                against = counts[f"{control} {of}"][name]["TEDn"]
                about["arms"][mine][f"TEDn_against_{control}"] = change(counts[mine][name]["TEDn"], against)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
        rates = {k: micro_rate(*zip(*v, strict=True)) for k, v in counts[arm][""].items()}
        print(f"{arm:14} " + "  ".join(f"{k} {r}" for k, r in rates.items()), flush=True)

    def keep_other(arm: str, model) -> None:
        counts[arm] = read(model, arm.replace(" ", "-"))
        keep(arm, 0, 0)

    keep("start", 0, 0)
    for seed in map(int, args.seeds.split(",")):
        for kind in kinds:
            arm, folder = f"{kind} {seed}", args.work / f"{kind}-{seed}"
            if kind in CONTROLS:
                told = args.control_data if kind == "supervised" and args.control_data else args.data
                model, cpu[arm], steps = supervised(args, told, seed, folder, cpu[f"vitomr {seed}"])
            else:
                model, cpu[arm], steps = practised(args, kind, seed, folder)
                results.setdefault("rewards", {})[arm] = [round(h["reward"], 4) for h in read_history(folder)]
            counts[arm] = read(model, f"{kind}-{seed}")
            keep(arm, cpu[arm], steps)
            start = load_reader(args.init)
            for k in args.along:
                keep_other(f"{kind}×{k:g} {seed}", along(start, model, k))
            for n in range(args.noise):
                keep_other(f"{kind}~{n} {seed}", anywhere(start, model, n))
    if args.figure:
        plot_kinds(results).savefig(args.figure, dpi=100)


if __name__ == "__main__":
    main()
