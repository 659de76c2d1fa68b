"""The curriculum of preset `notes` against constant settings, once, at a small size.

From the same weights, on the same new music (music21's corpus), as many rollouts each:

    python lab/practice/curriculum.py --work runs/curriculum --out lab/practice/curriculum.json

Three arms with reward `notes`: `constant` is the preset `tiny`, `curriculum` the preset `notes`, and `curriculum
without CE` the same with `ce_weight=0`, for teacher forcing tells the reference, which the constant arm never sees.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from grpo_result import FIGURES, change, read_greedily  # noqa: E402

from vitomr.data.batches import prepare  # noqa: E402
from vitomr.data.synthesis import MIXES, Shards, build  # noqa: E402
from vitomr.decoder import load_reader  # noqa: E402
from vitomr.grpo import PACKAGED, PRACTICE, train, with_settings  # noqa: E402
from vitomr.notation.metrics import micro_rate  # noqa: E402
from vitomr.reading.policy import Picture  # noqa: E402
from vitomr.train.runs import read_history  # noqa: E402

SMALL = {"num_generations": 8, "per_device_batch_size": 32, "rollout_batch": 32, "lengths": 100.0, "shortest": 20}
ARMS = {
    "constant": ("tiny", {"reward": "notes", "max_actions": 130}),
    "curriculum": ("notes", {"max_actions": [64, 130]}),
    "curriculum without CE": ("notes", {"max_actions": [64, 130], "ce_weight": 0.0}),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--steps", type=int, default=16)
    p.add_argument("--limit", type=int, default=100, help="dev excerpts")
    args = p.parse_args()
    torch.set_num_threads(1)
    for split, n, seed in (("train", 600, 1), ("dev", 200, 2)):
        if not (args.work / split / "build.json").exists():
            build("music21", args.work / split, n, split=split, seed=seed, mix=MIXES["as-written"])
    model = load_reader(PACKAGED)
    dev = Shards(args.work / "dev")
    fits = [i for i in range(len(dev)) if len(dev[i].ids) <= 130][: args.limit]
    look = lambda i: prepare(dev[i], np.random.default_rng([7, i]), "clean", model.cfg.staff_space)[0]
    pictures = [Picture(look(i), dev[i].ids.astype(int).tolist()) for i in fits]
    counts, rewards, seconds = {}, {}, {}
    for arm, (preset, given) in {"start": ("", {}), **ARMS}.items():
        if preset:
            cfg = with_settings(PRACTICE[preset], SMALL | given | {"steps": args.steps})
            run = args.work / arm.replace(" ", "-")
            model = train(cfg, args.work / "train", run)
            history = read_history(run)
            names = ("reward", "term/TED", "entropy", "clip_high", "length")
            rewards[arm] = {k: [h[k] for h in history] for k in names}
            seconds[arm] = round(sum(h["seconds"]["cpu"] for h in history))
        read = read_greedily(model, pictures)
        counts[arm] = {k: [[float(x) for x in f(a, b)] for a, b in read] for k, f in FIGURES.items()}
        found = {
            "excerpts": len(pictures),
            "steps": args.steps,
            "cpu seconds": seconds,
            "arms": {
                a: {k: round(100 * micro_rate(*zip(*c)).value, 2) for k, c in figures.items()}
                for a, figures in counts.items()
            },
            "TEDn against the start": {
                a: {k: round(100 * v, 1) for k, v in change(figures["TEDn"], counts["start"]["TEDn"]).items()}
                for a, figures in counts.items() if a != "start"
            },
            "history": rewards,
        }  # fmt: skip
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        print(arm, found["arms"][arm], found["TEDn against the start"].get(arm), flush=True)


if __name__ == "__main__":
    main()
