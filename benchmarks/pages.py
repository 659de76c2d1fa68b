"""Pages: systems found, staff space and seconds by stage, on pages made here and, where a folder names one, on a scan.

    python benchmarks/pages.py [--count 60] [--others 20] [--read 1] [--scan FOLDER]

Pages of Verovio, and of MuseScore and LilyPond where they are installed. FOLDER holds systems.json with "image" and
"boxes_xyxy", as examples/pages does.
"""

import argparse
import json
import os
import time
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from vitomr.data.corpora import open_corpus
from vitomr.data.engravers import engravers_here
from vitomr.data.pages import random_sheet, wear
from vitomr.notation.fonts import FONTS
from vitomr.page import systems as page_systems
from vitomr.page.staves import NoStaffError, open_picture
from vitomr.page.systems import crop, find_systems, match_outlines

STAGES = ("roughly_level", "line_ridges", "staff_answers", "follow_staves", "lay_flat", "staves_on_curves", "_group")
seconds: dict[str, float] = defaultdict(float)


def timed(name: str, f):
    def call(*args, **options):
        start = time.process_time()
        try:
            return f(*args, **options)
        finally:
            seconds[name] += time.process_time() - start

    return call


def report(name: str, pages: list[tuple]) -> None:
    "One line for pages of (picture, true outlines, true staff space or None, staves of parts or None)."
    seconds.clear()
    n_found = n_true = n_hit = n_laid_out = n_parts = 0
    ious, errors = [], []
    for img, outlines, space, parts in pages:
        n_true += len(outlines)
        try:
            page = find_systems(img)
        except NoStaffError:
            continue
        for system in page.systems:
            for part in system.parts:
                timed("crops", crop)(page, part)
        pairs = match_outlines([page.outline(s.box) for s in page.systems], outlines)
        n_found, n_hit = n_found + len(page.systems), n_hit + len(pairs)
        ious += [iou for *_, iou in pairs]
        errors += [abs(page.space / space - 1)] if space else []
        n_parts += len(pairs) if parts else 0
        n_laid_out += sum(tuple(p.n_staves for p in page.systems[i].parts) == parts for i, _, _ in pairs)
    print(f"{name}: {len(pages)} pages, {n_true} systems, at IoU .8 precision {n_hit / max(1, n_found):.3f}, "
          f"recall {n_hit / n_true:.3f} (mean IoU {np.mean(ious or [0]):.3f})", end="")
    print(f", staff space wrong by {np.mean(errors):.2%}, at most {max(errors):.2%}" if errors else "", end="")
    print(f", parts right in {n_laid_out} of {n_parts}" if n_parts else "")
    print("   CPU seconds a page:", ", ".join(f"{k.strip('_')} {v / len(pages):.2f}" for k, v in seconds.items()),
          f"= {sum(seconds.values()) / len(pages):.2f}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--count", type=int, default=60, help="pages by Verovio")
    p.add_argument("--others", type=int, default=20, help="pages by each of the other engravers")
    p.add_argument("--scan", type=Path, default=Path(__file__).parents[1] / "examples" / "pages")
    p.add_argument("--read", type=int, default=1, help="times the scan is read by the packaged model, 0 or 1")
    args = p.parse_args()
    for stage in STAGES:
        setattr(page_systems, stage, timed(stage, getattr(page_systems, stage)))
    songs = [s for s in open_corpus("music21", split="train") if "bwv" in s.id]
    for engraver in engravers_here():
        n = args.count if engraver == "verovio" else args.others
        sheets = [random_sheet(songs, i, font=FONTS[i % len(FONTS)], engraver=engraver) for i in range(n)]
        for preset in ("clean", "scan", "photo") if sheets else ():
            worn = [wear(s, np.random.default_rng(i), preset) for i, s in enumerate(sheets)]
            pages = [(w.img, [s.outline for s in w.systems], w.space, w.staves_of_parts) for w in worn]
            report(f"{engraver}, {preset}", pages)
    reference = json.loads((args.scan / "systems.json").read_text())
    boxes = reference["boxes_xyxy"].values()
    outlines = [np.array([[a, b], [c, b], [c, d], [a, d]], float) for a, b, c, d in boxes]
    scan = args.scan / reference["image"]
    report(scan.name, [(open_picture(scan), outlines, None, (2,))])
    if args.read:
        from vitomr.transcribe import Transcriber

        reader, start = Transcriber.from_pretrained(device="cpu"), time.process_time()
        read = reader.transcribe(scan)
        print(f"   read as {read.n_bars} bars in {time.process_time() - start:.1f} CPU seconds")


if __name__ == "__main__":
    main()
