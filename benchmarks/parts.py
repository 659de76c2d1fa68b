"""Which staves are one part: systems of made pages laid out as they were engraved, and grand staves of scans.

    python benchmarks/parts.py --source music21 --count 40
    python benchmarks/parts.py --scans FOLDER        # pictures of one grand staff each, a folder or a zip of PNG
    python benchmarks/parts.py --spoilt 3            # pages of Bach whose braces are thin, faded, cut or gone

Pages hold a voice above a piano, piano alone, single staves, two voices, or more, some of them in a bracket with bar
lines through it. A system counts as right when all its staves are found and divided into the right parts.
"""

import argparse
import io
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from vitomr.data.corpora import open_corpus
from vitomr.data.pages import KINDS, Sheet, random_sheet, wear
from vitomr.notation.score import ScoreError
from vitomr.page.staves import NoStaffError, open_picture
from vitomr.page.systems import find_systems

PAGES = {  # name → kind and bracket
    "piano": ("piano", "none"),
    "voice and piano": ("voice and piano", "none"),
    "duo, bar lines between": ("two voices", "none"),
    "duo, bracket": ("two voices", "through"),
    "trio, bracket": ("three voices", "through"),
    "quartet, bracket": ("four voices", "through"),
    "quartet, bar lines between": ("four voices", "between"),
}
SPOILT = ("whole", "thin", "faded", "cut", "gone")
PRESETS = ("clean", "scan", "photo")


def spoil(sheet: Sheet, how: str) -> Sheet:
    "The page with what stands left of its systems made thin, faded, cut in half or taken away."
    img = sheet.img.copy()
    for system in sheet.systems:
        x, y0, y1 = system.staves[:, 0, 0].min(), system.staves[0, 0, 1], system.staves[-1, 2, 1]
        a, b, unit = max(0, int(x - 2.4 * sheet.space)), int(x - 0.25 * sheet.space), int(sheet.space)
        mark = img[int(y0) - unit : int(y1) + unit, a:b]
        if how == "thin":
            mark[:] = cv2.dilate(mark, np.ones((1, 3), np.uint8))
        elif how == "faded":
            mark[:] = 255 - (255 - mark) // 2
        elif how == "cut":  # the paper ends here
            mark[:, : -max(1, round(0.4 * sheet.space))] = 255
        elif how == "gone":
            mark[:] = 255
    return Sheet(img, sheet.systems, sheet.space, sheet.staves_of_parts)


def layouts(img: np.ndarray) -> list[tuple[int, ...]]:
    "Staves of each part, system by system."
    try:
        return [tuple(p.n_staves for p in s.parts) for s in find_systems(img).systems]
    except NoStaffError:
        return []


def scans(source: Path):
    "Name and picture, from a folder or a zip."
    if source.is_dir():
        yield from ((p.stem, open_picture(p)) for p in sorted(source.rglob("*.png")))
        return
    with zipfile.ZipFile(source) as z:
        for name in sorted(n for n in z.namelist() if n.endswith(".png")):
            yield Path(name).stem, np.asarray(Image.open(io.BytesIO(z.read(name))).convert("L"))


def report_spoilt(count: int, seed: int) -> None:
    "Systems divided right, for each kind of page and of damage."
    songs = [s for s in open_corpus("music21", split="train") if "bwv" in s.id]
    for name, (kind, bracket) in PAGES.items():
        sheets = [random_sheet(songs, 1000 * seed + i, kind=kind, n_systems=3, bracket=bracket) for i in range(count)]
        for how in SPOILT:
            right, total, wrong = Counter(), Counter(), Counter()
            for i, preset in ((i, preset) for i in range(count) for preset in PRESETS):
                sheet = wear(spoil(sheets[i], how), np.random.default_rng(i), preset)
                found = layouts(sheet.img)
                total[preset] += len(sheet.systems)
                right[preset] += min(found.count(sheet.staves_of_parts), len(sheet.systems))
                wrong.update(f for f in found if f != sheet.staves_of_parts)
            text = ", ".join(f"{preset} {right[preset]} of {total[preset]}" for preset in PRESETS)
            print(f"{name}, mark {how}: {text}", f"  found instead: {dict(wrong)}" if wrong else "", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", help="a corpus with songs of three voices, see vitomr data build")
    parser.add_argument("--count", type=int, default=40, help="pages of each degradation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scans", type=Path, help="a folder or zip of PNG, each one grand staff")
    parser.add_argument("--spoilt", type=int, default=0, help="pages of each kind with spoilt braces, 3 systems each")
    args = parser.parse_args()
    if args.scans:
        seen = {name: layouts(img) for name, img in scans(args.scans)}
        wrong = [name for name, found in seen.items() if found != [(2,)]]
        print(f"grand staves read as one part: {len(seen) - len(wrong)} of {len(seen)}", *wrong[:20])
    if args.spoilt:
        report_spoilt(args.spoilt, args.seed)
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
