"""Does Verovio draw the same score the same way in every process? Excerpts as a build engraves them, byte by byte.

    python benchmarks/repeats.py --count 200 --source music21

Each excerpt of the mix `broad` is engraved with the house style of the build in fresh processes: in order, the other
way round, shuffled, with a new toolkit for each, and with memory that was filled with other bytes before
(MALLOC_PERTURB_ of glibc), which shows what reads memory that nobody wrote. The SVGs, their ids included, must be the
same.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import deque
from pathlib import Path

import numpy as np

from vitomr.data import synthesis
from vitomr.data.corpora import open_corpus
from vitomr.notation import engrave
from vitomr.notation.score import ScoreError
from vitomr.sandbox import in_process

WAYS = {  # name → order, a new toolkit for each, fill of the memory
    "in order": ("forward", False, None),
    "in order again": ("forward", False, None),
    "the other way round": ("backward", False, None),
    "shuffled": ("shuffled", False, None),
    "a new toolkit for each": ("forward", True, None),
    "memory filled with 85": ("forward", False, "85"),
    "memory filled with 255": ("backward", False, "255"),
}


def collected(source: str, count: int) -> list[tuple[str, dict]]:
    "MusicXML and layout of what a build of this source would engrave."
    found: list[tuple[str, dict]] = []

    def note_down(score: ET.Element, **layout):
        found.append((ET.tostring(score, encoding="unicode"), layout))
        return engrave.Engraving("", np.full((64, 400), 255, np.uint8))

    synthesis.engrave, songs, partners = note_down, open_corpus(source), deque(maxlen=synthesis.PARTNERS)
    rng = np.random.default_rng(0)
    mix = synthesis.Mix(hands=0.3, lines=0.3, doubled=0.3, tuplets=0.3, marked=0.3)
    for k in rng.permutation(len(songs)):
        list(synthesis.song_samples(songs[k], rng, mix, partners=partners))
        if len(found) >= count:
            break
    return found[:count]


def engraved(path: str, order: str, renewed: bool) -> list[str]:
    "A digest of the SVG of each excerpt of a file."
    excerpts = json.loads(Path(path).read_text())
    turn = {"forward": range(len(excerpts)), "backward": range(len(excerpts))[::-1]}
    turn["shuffled"] = np.random.default_rng(1).permutation(len(excerpts))
    digests = [""] * len(excerpts)
    for i in turn[order]:
        if renewed:
            vars(engrave._of_thread).clear()
        score, layout = excerpts[i]
        options = {"svgFormatRaw": True, **layout["options"]}
        try:
            with in_process():
                svg = engrave.render_svg(score, font=layout["font"], options=options)
        except ScoreError as e:
            svg = str(e)
        digests[i] = hashlib.sha256(svg.encode()).hexdigest()
    return digests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="music21", help="music21, a zip of MusicXML files, or a folder of them")
    parser.add_argument("--count", type=int, default=200, help="excerpts")
    parser.add_argument("--work", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print(json.dumps(engraved(args.work[0], args.work[1], args.work[2] == "new")))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "excerpts.json")
        path.write_text(json.dumps(collected(args.source, args.count)))
        digests = {}
        for name, (order, renewed, fill) in WAYS.items():
            command = [sys.executable, __file__, "--work", str(path), order, "new" if renewed else "kept"]
            environment = os.environ | ({"MALLOC_PERTURB_": fill} if fill else {})
            digests[name] = json.loads(subprocess.check_output(command, env=environment))
            differ = sum(a != b for a, b in zip(digests[name], digests["in order"], strict=True))
            print(f"{name:24} {differ} of {len(digests[name])} differ", flush=True)
    return int(any(d != digests["in order"] for d in digests.values()))


if __name__ == "__main__":
    sys.exit(main())
