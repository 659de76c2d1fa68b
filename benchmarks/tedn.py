"""TEDn side by side on the same pairs: zss, apted, vitomr from trees, vitomr from tokens end to end.

    python benchmarks/tedn.py --pairs 8 --source music21

References are 3 to 5 bars of piano music. Each has two predictions: one with a share of its tokens wrong (`misread`),
as a poor model writes them, and one with a kind of damage of the tests, in turn: tokens dropped, put in, swapped or
replaced, bars removed or doubled, junk, measures and backups put in, tokens repeated. Nothing is repaired. Each route
times what it needs to get from its input to the integer: zss and apted from two flattened trees, `trees` from two
prepared ones, `tokens` from two lists of token strings. zss, on the trees of the reference package's own
delinearizer, and both vitomr routes must give the same integer, or the run ends with an error; apted 1.0.3 is a
little off on some pairs (it is off on small random trees too, as soon as insertions cost more than 1), which is
shown. Costs and trees of zss and apted are those of the tests. zss takes seconds a pair; 8 references take some
minutes.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from apted import APTED, Config

from vitomr.data.corpora import open_corpus
from vitomr.notation.lmx import VOCABULARY, linearise
from vitomr.notation.score import ScoreError, cut_excerpt, parts
from vitomr.notation.tedn import prepare, tedn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_tedn import broken, flattened, insert, part_of, settled, update, zss_distance  # noqa: E402

FAST_RUNS = 7  # of which the median counts
KINDS = ("drop", "insertion", "swap", "substitution", "bars", "junk", "measures", "backups", "repeated", "far swap")


def piano_excerpts(source: str, n: int, rng: np.random.Generator) -> list[list[str]]:
    "Tokens of n excerpts of 3 to 5 bars on two staves, each from another song while there are songs."
    songs, found = open_corpus(source), []
    songs = [s for s in songs if not s.id.startswith(("bach/", "palestrina/", "josquin/"))] or songs  # no piano there
    for round_ in range(100):
        for k in rng.permutation(len(songs)):
            try:
                part = next(p for p in parts(songs[k].load()) if p.n_staves == 2)
                n_bars = int(rng.integers(3, 6))
                start = int(rng.integers(max(part.n_measures - n_bars, 1)))
                tokens = linearise(cut_excerpt(part.element, start, n_bars)).tokens
            except (ScoreError, StopIteration):
                continue
            if sum(t in VOCABULARY[60:130] for t in tokens) > 10:  # not only rests
                found.append(tokens)
            if len(found) == n:
                return found
        if round_ == 0 and not found:
            break
    raise SystemExit(f"{source} holds too few piano parts of 3 bars or more: {len(found)} excerpts, {n} asked for")


def misread(tokens: list[str], share: float, rng: np.random.Generator) -> list[str]:
    "About `share` of the tokens wrong: another pitch or token of the piece, one lost, one doubled."
    out = []
    for t in tokens:
        kind = rng.integers(4) if rng.random() < share and t != "measure" else -1
        if kind == 0:
            continue
        if kind == 1:
            out.append(t)
        if kind >= 2:
            pitches = [u for u in tokens if len(u) == 2]
            t = pitches[rng.integers(len(pitches))] if len(t) == 2 else tokens[rng.integers(len(tokens))]
        out.append(t)
    return out


def bars_of(tokens: list[str]) -> list[list[str]]:
    starts = [i for i, t in enumerate(tokens) if t == "measure"]
    return [tokens[i:j] for i, j in zip(starts, [*starts[1:], len(tokens)])]


class Costs(Config):
    "TEDn's costs for apted, which takes the same nodes."

    delete = staticmethod(lambda node: 1)
    insert = staticmethod(insert)
    rename = staticmethod(update)
    children = staticmethod(lambda node: node[2])


def timed(function, runs: int = 1) -> tuple[float, int]:
    "Median processor seconds (other programs on the machine do not count), and the result."
    seconds = []
    for _ in range(runs):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    return float(np.median(seconds)), result


def one_pair(pred: list[str], gold: list[str]) -> tuple[list[float], int, int, int]:
    "Seconds of the four routes, the distance, by how much apted is off, and the nodes of the reference."
    pitches: dict = {}
    b = flattened(settled(part_of(gold)), pitches)
    a = flattened(settled(part_of(pred)), pitches)
    trees = prepare(pred), prepare(gold)
    routes = [
        timed(lambda: zss_distance(a, b)),
        timed(lambda: int(APTED(a, b, Costs()).compute_edit_distance())),
        timed(lambda: tedn(*trees).edit_cost, FAST_RUNS),
        timed(lambda: tedn(pred, gold).edit_cost, FAST_RUNS),
    ]
    by_zss, by_apted, *by_vitomr = (result for _, result in routes)
    if by_vitomr != [by_zss, by_zss]:
        raise SystemExit(f"vitomr gives {by_vitomr} and zss {by_zss} for {' '.join(pred)} against {' '.join(gold)}")
    return [seconds for seconds, _ in routes], by_zss, by_apted - by_zss, trees[1].n_nodes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8, help="references; each has two predictions")
    parser.add_argument("--source", default="music21", help="music21, a zip of MusicXML files, or a folder of them")
    parser.add_argument("--share", type=float, default=0.25, help="of the tokens that are wrong")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    tedn(["measure", "C4", "quarter"], ["measure"])  # compiled before the clock starts
    table = []
    print("      damage  tokens  nodes  distance    zss s  apted s (off by)  trees ms  tokens ms  zss / tokens")
    for k, gold in enumerate(piano_excerpts(args.source, args.pairs, rng)):
        kind = KINDS[k % len(KINDS)]
        for name, pred in (("misread", misread(gold, args.share, rng)), (kind, broken(bars_of(gold), kind, rng))):
            seconds, distance, off, nodes = one_pair(pred, gold)
            table.append(seconds)
            zss_s, apted_s, trees, tokens = seconds
            print(f"{name:>12} {len(gold):7} {nodes:6} {distance:9} {zss_s:8.2f} {apted_s:8.2f} {off:8}", end=" ")
            print(f"{1e3 * trees:9.2f} {1e3 * tokens:10.2f} {zss_s / tokens:13,.0f}", flush=True)
    table = np.array(table)
    print(f"\n{'':24} {'median':>10} {'worst':>10} {'zss / this, median':>19} {'least':>8}")
    for name, column in zip(("zss", "apted", "vitomr, from trees", "vitomr, from tokens"), table.T):
        ratio = table[:, 0] / column
        figures = f"{1e3 * np.median(column):7.2f} ms {1e3 * column.max():7.2f} ms"
        print(f"{name:24} {figures} {np.median(ratio):19,.1f} {ratio.min():8,.1f}")


if __name__ == "__main__":
    main()
