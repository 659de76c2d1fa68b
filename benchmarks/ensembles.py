"""Whole documents of several parts, engraved by MuseScore, read as pages: errors of each part, bars of each system.

    python benchmarks/ensembles.py --source openscore-quartets.zip --count 4 --bars 40

Each score is cut to its first bars, engraved on pages of A4, and read by the packaged weights. Printed are the symbol
error rate of each part, how many systems have as many bars in all parts before any are joined or added, how many have
as many as their bar lines show, and the number of parts found.
"""

import argparse
import copy
import os
import subprocess
import tempfile
from pathlib import Path

from vitomr import Transcriber
from vitomr.data.corpora import open_corpus
from vitomr.data.engravers import find_program
from vitomr.notation.lmx import linearise
from vitomr.notation.marks import plain
from vitomr.notation.metrics import micro_rate, token_distance
from vitomr.notation.score import musicxml_bytes, parts


def first_bars(score, n: int):
    "A copy with the first n bars of each part."
    cut = copy.deepcopy(score)
    for part in cut.findall("part"):
        for measure in part.findall("measure")[n:]:
            part.remove(measure)
    return cut


def pages_of(score, folder: Path) -> Path:
    "The score as a PDF that MuseScore engraved."
    (folder / "in.musicxml").write_bytes(musicxml_bytes(score))
    env = os.environ | {"HOME": str(folder), "XDG_RUNTIME_DIR": str(folder), "QT_QPA_PLATFORM": "offscreen"}
    command = [find_program("musescore"), "-o", folder / "score.pdf", folder / "in.musicxml"]
    subprocess.run(command, check=True, timeout=300, capture_output=True, env=env)
    return folder / "score.pdf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="a zip or folder of scores of several single staves")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--count", type=int, default=4, help="scores")
    parser.add_argument("--bars", type=int, default=40, help="of each score, from its beginning")
    parser.add_argument("--weights", help="a weights folder; the packaged ones when left out")
    args = parser.parse_args()
    transcriber = Transcriber.from_pretrained(args.weights)
    edits, sizes, equal, printed, n_systems, right_parts, n_pages = [], [], 0, 0, 0, 0, 0
    songs = list(open_corpus(args.source, split=args.split))[: args.count]
    for song in songs:
        score = first_bars(song.load(), args.bars)
        true = [plain(linearise(p.element, strict=False).tokens) for p in parts(score)]
        with tempfile.TemporaryDirectory() as folder:
            document = transcriber.transcribe(pages_of(score, Path(folder)), words=False)
        read = [plain(tokens) for tokens in document.assembled.tokens]
        counts = [[line.tokens.count("measure") for line in s.lines] for s in document.systems]
        n_systems, n_pages = n_systems + len(counts), n_pages + len(document.pages)
        equal += sum(len(set(c)) == 1 for c in counts)
        printed += sum(set(c) == {s.n_bars} for c, s in zip(counts, document.systems))
        right_parts += len(read) == len(true)
        own = []
        for pred, gold in zip(read, true):
            edits.append(token_distance(pred, gold)), sizes.append(len(gold))
            own.append(f"{edits[-1] / sizes[-1]:.1%}")
        print(f"{song.id}: {len(read)} of {len(true)} parts, {len(counts)} systems, SER {', '.join(own)}", flush=True)
    print(f"{len(songs)} scores, {n_pages} pages, {n_systems} systems: parts found in {right_parts} of {len(songs)}")
    print(f"SER of a part {micro_rate(edits, sizes)}")
    print(f"systems with equal bars in all parts {equal / n_systems:.1%}, as many as printed {printed / n_systems:.1%}")


if __name__ == "__main__":
    main()
