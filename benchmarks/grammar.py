"""What the grammar costs: mask and advance for a step, beside one cached step of the packaged reader.

    python benchmarks/grammar.py

Rows follow true lines of music21's corpus. Both sides take the best of several runs over the same places of the
sequence, in turns, on one thread. `budget` adds a limit of 768 tokens, still far away; `near its end` is the worst
case, drawn at random, with the limit so close that every token has to be tried.
"""

import time
from pathlib import Path

import music21
import numpy as np
import torch

import vitomr
from vitomr.decoder import load_reader
from vitomr.notation.grammar import Grammar
from vitomr.notation.lmx import EOS_ID, encode, linearise
from vitomr.notation.score import music21_to_xml, parts

STEPS, RUNS = 100, 5


def lines(n: int) -> np.ndarray:  # int64 (n, STEPS)
    "The first tokens of chorale parts."
    found = []
    for name in ("bach/bwv66.6", "bach/bwv269", "bach/bwv347", "bach/bwv84.5"):
        found += [encode(linearise(p.element).tokens) for p in parts(music21_to_xml(music21.corpus.parse(name)))]
    found = [line[:STEPS] for line in found if Grammar().legal(line) is None]
    return np.array([found[i % len(found)] for i in range(n)])


def grammar_step(ids: np.ndarray, budget: int | None) -> float:  # seconds
    tracker = Grammar().tracker(len(ids), budget=budget)
    columns = [np.ascontiguousarray(ids[:, t]) for t in range(STEPS)]
    start = time.perf_counter()
    for column in columns:
        tracker.mask()
        tracker.advance(column)
    seconds = (time.perf_counter() - start) / STEPS
    assert not tracker.lost.any()
    return seconds


def last_steps(n: int) -> float:  # seconds
    "Random rows from 40 tokens before the limit to the end."
    rng, tracker, seconds = np.random.default_rng(0), Grammar().tracker(n, budget=STEPS), []
    while not tracker.done.all():
        chances = np.cumsum(tracker.mask() * (np.arange(tracker.mask().shape[1]) != EOS_ID) + 1e-9 * tracker.mask(), 1)
        ids = (chances > rng.random((n, 1)) * chances[:, -1:]).argmax(1)
        start = time.perf_counter()
        tracker.advance(ids)
        seconds.append(time.perf_counter() - start)
    return float(np.mean(seconds[-40:]))


@torch.no_grad()
def reader_step(model, ids: np.ndarray) -> float:  # seconds
    "One token for each row, with the cache; pictures of 180 × 700 px."
    n = len(ids)
    h, w = 12, 45
    img = torch.full((n, 1, 16 * h, 16 * w), 255, dtype=torch.uint8)
    memory = model.encode(img, torch.ones(n, h, w, dtype=torch.bool))
    cache, tokens = model.new_cache(memory, STEPS), torch.from_numpy(ids)
    start = time.perf_counter()
    for t in range(0, STEPS, 5):
        model.decode(tokens[:, t : t + 1], memory, t, cache)
    return (time.perf_counter() - start) / len(range(0, STEPS, 5))


def main() -> None:
    torch.set_num_threads(1)
    model = load_reader(Path(vitomr.__file__).parent / "weights" / "tiny")
    grammar_step(lines(1), 768)  # compiled
    print("microseconds a step; shares are of the reader's step")
    heads = ("   grammar", "    budget", "  near its end")
    print(f"{'rows':>5}{'reader':>10}" + "".join(f"{head}{'share':>8}" for head in heads))
    for n in (1, 8, 64):
        ids, best = lines(n), np.full(4, np.inf)
        for _ in range(RUNS):
            now = [reader_step(model, ids), grammar_step(ids, None), grammar_step(ids, 768), last_steps(n)]
            best = np.minimum(best, now)
        reader, *ours = best * 1e6
        print(f"{n:5}{reader:10.0f}" + "".join(f"{t:{w}.1f}{t / reader:8.2%}" for t, w in zip(ours, (10, 10, 14))))


if __name__ == "__main__":
    main()
