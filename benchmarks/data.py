"""How fast the data engine is: excerpts, shard reads and degraded crops a second, and how long training waits for data.

    python benchmarks/data.py --source music21

Rates are per second of processor time, so for one core whatever else the machine does; reading songs counts in with the
excerpts made of them. Most of music21's scores are converted to MusicXML first, once for each user: both rates are
shown. The share of waiting is taken from real steps of the tiny reader on the CPU, its batches prepared by other
processes: time in which the next batch was not there, over all time, the first steps left out. It is honest on an idle
machine only. Targets stand beside; nothing here fails when one is missed.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
import torch

from vitomr.data.batches import Batches, BatchPlan, loader
from vitomr.data.corpora import open_corpus
from vitomr.data.degrade import EFFECTS, PRESETS, degrade
from vitomr.data.synthesis import AS_WRITTEN, Mix, Sample, Shards, song_samples, write_shard
from vitomr.decoder import TRAINING, Reader

CROP = (180, 700)  # px
WARM_UP = 3  # steps not measured


def line(what: str, value: float, unit: str, target: str = "") -> None:
    print(f"{what:34} {value:10,.1f} {unit:12} {target}", flush=True)


def excerpts(source: str, count: int, mix: Mix) -> tuple[list[Sample], float]:
    "Samples of songs in random order, and how many came in a second of processor time."
    songs, found = open_corpus(source, split="train"), []
    start = time.process_time()
    for k in np.random.default_rng(0).permutation(len(songs)):
        found += song_samples(songs[k], np.random.default_rng([0, int(k)]), mix)
        if len(found) >= count:
            break
    return found, len(found) / (time.process_time() - start)


def read_rate(shards: Shards, count: int) -> float:
    "Samples a second, in random order, every pixel and token touched."
    order = np.random.default_rng(0).integers(len(shards), size=count)
    start = time.process_time()
    for i in order:
        s = shards[int(i)]
        np.add.reduce(s.img, axis=None, dtype=np.int64), s.ids.sum(), s.heads.sum()
    return count / (time.process_time() - start)


def crop_of(samples: list[Sample]) -> np.ndarray:
    "A picture of the size that the rate of degradation is given for."
    def distance(s: Sample) -> int:
        return abs(s.img.shape[0] - CROP[0]) + abs(s.img.shape[1] - CROP[1])

    img = min(samples, key=distance).img[: CROP[0], : CROP[1]]
    return cv2.copyMakeBorder(img, 0, CROP[0] - img.shape[0], 0, CROP[1] - img.shape[1], cv2.BORDER_CONSTANT, value=255)


def degrade_rate(img: np.ndarray, preset: str, count: int) -> float:
    start = time.process_time()
    for seed in range(count):
        degrade(img, np.random.default_rng(seed), preset)
    return count / (time.process_time() - start)


def waiting(shards: Shards, steps: int, workers: int) -> tuple[float, float]:
    "Share of the time of training steps spent waiting for a batch, and seconds a step."
    cfg = TRAINING["tiny"]
    torch.manual_seed(0)
    model = Reader(cfg.reader)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    plan = BatchPlan(budget=cfg.plan.budget)
    batches = Batches(shards, plan, mix=cfg.mix, space=cfg.reader.staff_space, steps=steps + WARM_UP)
    coming, waits, whole = iter(loader(batches, workers=workers)), [], []
    for step in range(len(batches)):
        start = time.perf_counter()
        batch = next(coming)
        waits.append(time.perf_counter() - start)
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = cfg.losses(model, batch, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole.append(time.perf_counter() - start)
    return sum(waits[WARM_UP:]) / sum(whole[WARM_UP:]), float(np.mean(whole[WARM_UP:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="music21", help="music21, a zip or a folder of MusicXML")
    parser.add_argument("--count", type=int, default=200, help="excerpts to synthesise")
    parser.add_argument("--steps", type=int, default=12, help="training steps; 0: leave the waiting out")
    parser.add_argument("--workers", type=int, default=1, help="processes that prepare batches")
    parser.add_argument("--effects", action="store_true", help="also each effect on its own")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    excerpts("music21", 1, AS_WRITTEN)  # imports and fonts
    with tempfile.TemporaryDirectory() as kept:
        os.environ["XDG_CACHE_HOME"] = kept  # so that no score was converted before
        samples, rate = excerpts(args.source, args.count, Mix())
        line("excerpts synthesised", rate, "/s a core", "target 25; scores read for the first time")
        if args.source == "music21":
            again = excerpts(args.source, args.count, Mix())[1]
            line("the same, converted before", again, "/s a core", "target 25")
        line("the same, as written", excerpts(args.source, args.count, AS_WRITTEN)[1], "/s a core")
    with tempfile.TemporaryDirectory() as folder:
        write_shard(samples, Path(folder, "00000"))
        shards = Shards(folder)
        line("shard reads", read_rate(shards, 5000), "/s a core", "target 2,000")
        img = crop_of(samples)
        for preset in (p for p in PRESETS if p != "clean"):
            line(f"degraded crops, {preset}", degrade_rate(img, preset, 300), "/s a core", "target 150 at 180 x 700")
        for name, effect in EFFECTS.items() if args.effects else ():
            start = time.process_time()
            for seed in range(50):
                effect(img, 0.6, np.random.default_rng(seed))
            line(f"  {name}", (time.process_time() - start) / 50 * 1e3, "ms")
        if args.steps:
            share, seconds = waiting(shards, args.steps, args.workers)
            line("waiting for data", 100 * share, "% of a step", f"target 3; a step takes {seconds:.1f} s")


if __name__ == "__main__":
    main()
