"""Scans with a reference, read as whole pictures: systems found, parts grouped, lines read, free-running.

    python benchmarks/scans.py --data FOLDER        # NAME.png beside NAME.lmx, each picture one part of one system

Prints SER and TEDn with 95 % intervals, the median system, the worst ones, and SER by the first word of the names.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np

from vitomr import Transcriber
from vitomr.notation.marks import plain
from vitomr.notation.metrics import micro_rate, token_distance
from vitomr.notation.tedn import tedn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", help="a weights folder; the packaged ones when left out")
    args = parser.parse_args()
    transcriber = Transcriber.from_pretrained(args.weights)
    rows, by_source = [], defaultdict(list)
    for path in sorted(args.data.rglob("*.png")):
        true = plain(path.with_suffix(".lmx").read_text(encoding="utf-8").split())
        try:
            document = transcriber.transcribe(path, words=False)
            pred = plain(document.tokens)
        except ValueError:  # nothing was read
            pred = []
        tree = tedn(pred, true)
        row = (token_distance(pred, true), len(true), tree.edit_cost, tree.gold_cost, path.stem)
        rows.append(row)
        by_source[path.stem.split("-")[0]].append(row)
    if not rows:
        raise SystemExit(f"{args.data} holds no PNG; give a folder of NAME.png beside NAME.lmx")
    edits, sizes, costs, golds, _ = zip(*rows)
    print(f"SER {micro_rate(edits, sizes)}, TEDn {micro_rate(costs, golds)}")
    print(f"median system {np.median([e / n for e, n, *_ in rows]):.1%}")
    for name, own in by_source.items():
        print(f"{name}: SER {sum(r[0] for r in own) / sum(r[1] for r in own):.1%} of {len(own)}")
    for e, n, *_, name in sorted(rows, key=lambda r: -r[0] / r[1])[:10]:
        print(f"  {e / n:.0%} {name}")


if __name__ == "__main__":
    main()
