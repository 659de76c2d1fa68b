"""Does learning to see first help to read? Symbol error rate against labelled samples seen, arm by arm.

    vitomr train mae --preset tiny --data data/train --out runs/mae
    python benchmarks/pretraining.py --data data/train --dev data/dev --mae runs/mae

Every arm trains the same reader on the same batches of short excerpts in the same order. They differ in where the
encoder starts (fresh weights, or an MAE's) and in which helper losses there are:

    scratch, mae                      the next token alone
    symbols, mae+symbols              and the symbols of each patch
    symbols+gaze, mae+symbols+gaze    and guided attention: the recipe of the packaged weights

and for the rest of the recipe, one thing changed at a time, from fresh weights with both helper losses:

    symbols+gaze                      as it is
    curriculum                        excerpts of a third of the length first, all of them from the half on
    smoothing, scheduled              label smoothing of .1; scheduled sampling over the whole run
    half lr, double lr, half batch, double batch
    encoder 7+3, decoder 3+6          layers of encoder and decoder, where the recipe has 5 and 4
    patch 8, patch 32                 px, where the recipe has 16; a batch holds as many patches and tokens as ever

At even intervals the averaged weights read the same dev excerpts, greedily and freely; a reading ends at half as many
tokens again as the longest reference may have. Every point goes into the JSON file that nbs/00_mae.ipynb draws. Arms
run one after the other, all of the first seed before the second. It may be stopped at any time: called again with the
same settings, it goes on where it stood, and arms whose run folders are gone keep their points. Without --data it
prints what was measured and trains nothing.
"""

import argparse
import json
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from vitomr.data import batches as batches_module
from vitomr.data.batches import PICTURE_MIX, Batches, BatchPlan, loader, prepare
from vitomr.data.synthesis import Shards
from vitomr.decoder import READERS, Losses, Reader
from vitomr.evaluate import greedy_ser
from vitomr.mae import load_encoder
from vitomr.nn import vit
from vitomr.nn.attention import compute_dtype
from vitomr.notation.lmx import decode
from vitomr.train.loop import LoopConfig, fit
from vitomr.train.runs import read_history

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Arm:
    "What differs between two runs."

    losses: Losses = Losses()
    is_pretrained: bool = False  # starts from the MAE
    is_curriculum: bool = False
    is_scheduled: bool = False
    lr: float = 1.0  # times --lr
    budget: float = 1.0  # times --budget
    layers: tuple[int, int] | None = None  # of encoder and decoder
    patch: int = batches_module.PATCH  # px


ARMS = {
    "scratch": Arm(Losses(0.0, 0.0)),
    "mae": Arm(Losses(0.0, 0.0), is_pretrained=True),
    "symbols": Arm(Losses(1.0, 0.0)),
    "mae+symbols": Arm(Losses(1.0, 0.0), is_pretrained=True),
    "symbols+gaze": Arm(),
    "mae+symbols+gaze": Arm(is_pretrained=True),
}
ALL = ARMS | {  # and the rest of the recipe
    "curriculum": Arm(is_curriculum=True),
    "smoothing": Arm(Losses(smoothing=0.1)),
    "scheduled": Arm(is_scheduled=True),
    "half lr": Arm(lr=0.5),
    "double lr": Arm(lr=2.0),
    "half batch": Arm(budget=0.5),
    "double batch": Arm(budget=2.0),
    "encoder 7+3": Arm(layers=(7, 3)),
    "decoder 3+6": Arm(layers=(3, 6)),
    "patch 8": Arm(patch=8),
    "patch 32": Arm(patch=32),
}


class OtherStem(vit.ConvStem):
    "The stem for patches of 8 or 32 px: its last convolution does not stride, or another follows that does."

    def __init__(self, d: int, n_residual: int, patch: int):
        super().__init__(d, n_residual)
        self.patch, self.conv32 = patch, torch.nn.Conv2d(d, d, 3, stride=2, padding=1) if patch == 32 else None
        self.conv16.stride = (1, 1) if patch == 8 else (2, 2)
        if self.conv32:
            torch.nn.init.kaiming_normal_(self.conv32.weight, nonlinearity="relu")

    def forward(self, ink: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ink = ink.to(compute_dtype(ink))
        at = lambda px: F.interpolate(mask[:, None].to(ink.dtype), scale_factor=self.patch // px, mode="nearest")
        x = F.relu(self.conv4(F.pixel_unshuffle(ink, 4).contiguous(memory_format=torch.channels_last))) * at(4)
        x = F.relu(self.conv8(x)) * at(8)
        for block in self.residual:
            x = block(x, at(8))
        x = self.conv16(x)
        if self.conv32:
            x = self.conv32(F.relu(x) * at(16))
        return x * at(self.patch)


@contextmanager
def patches_of(px: int):
    "Inside, pictures are cut into patches of this size."
    usual = batches_module.PATCH
    batches_module.PATCH = vit.PATCH = px
    try:
        yield
    finally:
        batches_module.PATCH = vit.PATCH = usual


def n_steps(batches: Batches, samples: int) -> int:
    "After how many steps that many samples were seen."
    seen, step = 0, 0
    while seen < samples:
        seen, step = seen + len(batches.indices(step)), step + 1
    return step


def dev_set(dev: Shards, args, space: float) -> tuple[list[np.ndarray], list[list[str]]]:
    "Pictures and their tokens: a fixed random choice of excerpts, none longer than those trained on."
    fits = np.flatnonzero(dev.index["n_tokens"] <= args.tokens)
    chosen = np.random.default_rng(0).permutation(fits)[: args.dev_count]
    if not len(chosen):
        raise ValueError(f"{args.dev} holds no excerpts of up to {args.tokens} tokens")
    chosen = sorted(chosen.tolist(), key=lambda i: int(dev.index["width"][i]))
    samples = [dev[i] for i in chosen]
    noise = [np.random.default_rng([7, i // 32 * 32, i % 32]) for i in range(len(samples))]
    pictures = [prepare(s, rng, "clean", space)[0] for s, rng in zip(samples, noise, strict=True)]
    return pictures, [decode(s.ids) for s in samples]


def run(arm: str, seed: int, args, train: Shards, dev: Shards) -> None:
    "Train one arm, or go on with it."
    with patches_of(ALL[arm].patch):
        train_arm(arm, seed, args, train, dev)


def train_arm(arm: str, seed: int, args, train: Shards, dev: Shards) -> None:
    a, cfg = ALL[arm], READERS[args.preset]
    if a.layers:
        cfg = replace(cfg, encoder_layers=a.layers[0], decoder_layers=a.layers[1])
    plan = BatchPlan(budget=int(a.budget * args.budget), lengths=((0, args.tokens),), seed=seed)
    batches = Batches(train, plan, mix=PICTURE_MIX, space=cfg.staff_space)
    batches.steps = n_steps(batches, args.samples)
    if a.is_curriculum:
        broken = (0, args.tokens // 3), (batches.steps // 2, args.tokens)
        batches = Batches(train, replace(plan, lengths=broken), mix=PICTURE_MIX, space=cfg.staff_space)
        batches.steps = n_steps(batches, args.samples)
    losses = replace(a.losses, scheduled=batches.steps if a.is_scheduled else 0)
    every = max(1, batches.steps // (args.points * args.log_every)) * args.log_every
    loop = LoopConfig(
        steps=batches.steps, lr=a.lr * args.lr, optimizer="muon", warmup=min(100, batches.steps // 10), ema=0.99,
        seed=seed, log_every=args.log_every, checkpoint_minutes=3, bf16=not args.fp32,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Reader(cfg)
    if a.patch != ARMS["scratch"].patch:
        model.encoder.stem = OtherStem(cfg.d_encoder, cfg.stem_blocks, a.patch)
    if a.is_pretrained:
        load_encoder(model.encoder, args.mae)
    held = dev_set(dev, args, cfg.staff_space)
    about = {"arm": arm, "seed": seed, "losses": vars(losses), "tokens": args.tokens, "samples": args.samples}
    fit(
        model, lambda start: loader(batches, start, workers=args.workers), losses, loop, args.runs / f"{arm}-{seed}",
        about=about,
        evaluate=lambda m, step: {"ser": greedy_ser(m, *held, max_tokens=args.tokens * 3 // 2)}, evaluate_every=every,
        on_log=lambda h: said(arm, seed, h, args),
    )  # fmt: skip


def said(arm: str, seed: int, h: dict, args) -> None:
    "Tell of a line of the history; a measured point is stored at once."
    ser = f"  dev SER {h['ser']:.3f}" if "ser" in h else ""
    print(f"{arm:16} seed {seed}  step {h['step']:5}  samples {h['samples']:6}  ce {h['ce']:.3f}{ser}", flush=True)
    if ser:
        store(args)


def store(args) -> None:
    "Write the points of all runs so far, beside those that stand in the file."
    points = []
    for folder in sorted(args.runs.glob("*-*/")):
        about = json.loads((folder / "config.json").read_text())
        keys = ("step", "samples", "ser", "ce")
        points += [
            {"arm": about["arm"], "seed": about["seed"], **{k: h[k] for k in keys}}
            for h in read_history(folder)
            if "ser" in h
        ]
    mae = args.mae / "history.jsonl"
    settings = {
        "preset": args.preset, "samples": args.samples, "tokens": args.tokens, "budget": args.budget, "lr": args.lr,
        "dev_excerpts": args.dev_count,
        "mae_pictures": read_history(args.mae)[-1]["samples"] if mae.is_file() else None,
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.out.is_file():  # what was measured elsewhere under the same settings stays
        old, here = json.loads(args.out.read_text()), {(p["arm"], p["seed"]) for p in points}
        if old["settings"] == settings:
            points = [p for p in old["points"] if (p["arm"], p["seed"]) not in here] + points
    new = args.out.with_suffix(".new")
    new.write_text(json.dumps({"settings": settings, "points": points}, indent=1) + "\n")
    new.replace(args.out)


def show(path: Path) -> None:
    "The last point of each run, an arm a line."
    if not path.is_file():
        print(f"nothing measured yet; for how to, see: python {Path(__file__).relative_to(ROOT)} --help")
        return
    stored = json.loads(path.read_text())
    print(json.dumps(stored["settings"]))
    for arm in ALL:
        last = {p["seed"]: p for p in stored["points"] if p["arm"] == arm}  # points come in order
        print(f"{arm:18}", "  ".join(f"{100 * p['ser']:5.1f} % at {p['samples']:,}" for p in last.values()) or "-")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, help="a folder of shards to train on")
    p.add_argument("--dev", type=Path, help="a folder of shards of songs held back")
    p.add_argument("--mae", type=Path, help="run or weights folder of the MAE")
    p.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ALL))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    p.add_argument("--samples", type=int, default=30_000, help="labelled samples an arm sees")
    p.add_argument("--tokens", type=int, default=120, help="longest excerpt")
    p.add_argument("--points", type=int, default=8, help="evaluations of an arm")
    p.add_argument("--dev-count", type=int, default=128, help="dev excerpts")
    p.add_argument("--preset", default="tiny", choices=list(READERS))
    p.add_argument("--budget", type=int, default=5000, help="patches and tokens of a batch")
    p.add_argument("--lr", type=float, default=1.5e-3)
    p.add_argument("--fp32", action="store_true", help="no bf16")
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--log-every", type=int, default=20, help="steps")
    p.add_argument("--runs", type=Path, default=Path("runs/pretraining"))
    p.add_argument("--out", type=Path, default=ROOT / "nbs" / "results" / "mae_ser.json")
    args = p.parse_args()
    if not args.data:
        show(args.out)
        return 0
    if not args.dev or (not args.mae and any(ALL[a].is_pretrained for a in args.arms)):
        p.error("--data needs --dev, and --mae for the arms that start from one")
    args.mae = args.mae or Path()
    try:
        train, dev = Shards(args.data), Shards(args.dev)
        for seed in args.seeds:
            for arm in args.arms:
                run(arm, seed, args, train, dev)
        store(args)
    except (ValueError, OSError) as e:
        print(f"{Path(__file__).name}: {str(e).splitlines()[0]}", file=sys.stderr)
        return 2
    show(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
