"""Which staves are one part: systems of made pages laid out as they were engraved, and grand staves of scans.

    python benchmarks/parts.py --source music21 --count 40
    python benchmarks/parts.py --scans FOLDER        # pictures of one grand staff each, as a folder of PNG

Pages hold a voice above a piano, piano alone, single staves, two voices, or more, some of them in a bracket with bar
lines through it. A system counts as right when all its staves are found and divided into the right parts.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import cv2
import numpy as np

from vitomr.data.corpora import open_corpus
from vitomr.data.pages import KINDS, random_sheet, wear
from vitomr.notation.score import ScoreError
from vitomr.page.staves import NoStaffError
from vitomr.page.systems import find_systems


def layouts(img: np.ndarray) -> list[tuple[int, ...]]:
    "Staves of each part, system by system."
    try:
        return [tuple(p.n_staves for p in s.parts) for s in find_systems(img).systems]
    except NoStaffError:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a corpus with songs of three voices, see vitomr data build")
    parser.add_argument("--count", type=int, default=40, help="pages of each degradation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scans", type=Path, help="a folder of PNG, each one grand staff")
    args = parser.parse_args()
    if args.scans:
        paths = sorted(args.scans.rglob("*.png"))
        wrong = [p.stem for p in paths if layouts(cv2.imread(str(p), cv2.IMREAD_GRAYSCALE)) != [(2,)]]
        print(f"grand staves read as one part: {len(paths) - len(wrong)} of {len(paths)}", *wrong[:20])
    if not args.source:
        return
    songs = open_corpus(args.source, split="dev")
    for degradation in ("clean", "scan", "photo"):
        right, total = defaultdict(int), defaultdict(int)
        for k in range(args.count):
            kind = KINDS[k % len(KINDS)]
            try:
                sheet = random_sheet(songs, 1000 * args.seed + k, kind=kind)
            except ScoreError:  # no song has such parts
                continue
            img = sheet.img if degradation == "clean" else wear(sheet, np.random.default_rng(k), degradation).img
            found, true = layouts(img), sheet.staves_of_parts
            total[kind] += len(sheet.systems)
            right[kind] += min(len(sheet.systems), sum(x == true for x in found))
        each = ", ".join(f"{kind} {right[kind]} of {total[kind]}" for kind in total)
        print(f"{degradation}: {sum(right.values())} of {sum(total.values())} systems divided right ({each})")


if __name__ == "__main__":
    main()
