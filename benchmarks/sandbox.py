"""What a worker costs: engraving a page and opening a PDF and a picture, in this process and through the pool.

    python benchmarks/sandbox.py [--count 20]

Both ways are measured in turn in one run; a line gives the medians and their ratio.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import vitomr
from vitomr.notation.engrave import engrave, midi_bytes, render_svg
from vitomr.notation.pdf import pdf_bytes
from vitomr.notation.score import read_score, root_of
from vitomr.page.assemble import Line, assemble
from vitomr.page.documents import Pages
from vitomr.sandbox import in_process

EXAMPLES = Path(vitomr.__file__).parents[1] / "examples"
SHEET = {"breaks": "line", "adjustPageWidth": False, "pageWidth": 2100, "pageHeight": 60_000}


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def first_page(path: Path) -> None:
    with Pages(path) as pages:
        assert pages[0].size


def main() -> None:
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument("--count", type=int, default=20, help="of each way")
    count = args.parse_args().count
    page = assemble(
        [[Line(p.read_text().split(), 2)] for p in sorted((EXAMPLES / "bach-invention-1").glob("*.lmx"))]
    ).score
    line, song = EXAMPLES / "bach-invention-1-scan-1.musicxml", EXAMPLES / "pages" / "bach-invention-1.musicxml"
    with TemporaryDirectory() as folder:
        pdf = Path(folder, "page.pdf")
        pdf.write_bytes(pdf_bytes(page, lines=True))
        jobs = {
            "engrave a line, SVG and picture": lambda: engrave(read_score(line)),
            "engrave a page as SVG": lambda: render_svg(page, options=SHEET),
            "a page as MIDI": lambda: midi_bytes(page),
            "a page as PDF": lambda: pdf_bytes(page, lines=True),
            "open a page of MusicXML": lambda: root_of(song.read_bytes()),
            "open a PDF of one page": lambda: first_page(pdf),
            "open a PNG of a line": lambda: first_page(EXAMPLES / "bach-invention-1-scan-1.png"),
            "open a PNG of a page": lambda: first_page(EXAMPLES / "pages" / "bach-invention-1.png"),
        }
        for name, work in jobs.items():
            here, there = [], []
            for i in range(count + 1):
                with in_process():
                    here.append(seconds(work))
                there.append(seconds(work))
                if i == 0:  # fonts are read, the worker starts
                    here.clear(), there.clear()
            a, b = 1000 * median(here), 1000 * median(there)
            print(f"{name:32} in process {a:7.1f} ms   in a worker {b:7.1f} ms   ratio {b / a:.2f}", flush=True)


if __name__ == "__main__":
    main()
