"""Print tokens and slurs on real excerpts: to tokens and back, against the package's linearizer and the source.

    python benchmarks/print_tokens.py --source openscore-lieder.zip --split dev --count 1000

plain: excerpts whose tokens without print tokens are what the package's own linearizer writes.
back: print tokens that come back, at the same place, from the MusicXML made of the tokens.
slurs: ends of slurs that join the same two notes as in the source; those between staves are dropped on purpose.
"""

import argparse
import xml.etree.ElementTree as ET
from collections import Counter, defaultdict

import numpy as np
from lmx.linearization.Linearizer import Linearizer
from lmx.symbolic.Pruner import Pruner

from vitomr.data.corpora import open_corpus
from vitomr.notation.analysis import analyse
from vitomr.notation.lmx import linearise
from vitomr.notation.marks import KINDS, plain
from vitomr.notation.metrics import mark_overlap
from vitomr.notation.musicxml import to_musicxml
from vitomr.notation.score import ScoreError, cut_excerpt, header_states, parts


def reference(part: ET.Element) -> list[str]:
    "Tokens by the package's linearizer alone."
    part = ET.fromstring(ET.tostring(part))
    Pruner().process_part(part)
    linearizer = Linearizer()
    linearizer.process_part(part)
    return linearizer.output_tokens


def slurs(part: ET.Element) -> set[tuple[int, int, bool]]:
    "Pairs of notes, by their place in the file, and whether both are on one staff; ends are paired by number."
    found, begun = set(), defaultdict(list)
    notes = [n for n in part.iter("note") if n.get("color") is None]
    for i, note in enumerate(notes):
        for slur in sorted(note.iterfind("notations/slur"), key=lambda s: s.get("type") != "stop"):
            waiting = begun[slur.get("number", "1")]
            if slur.get("type") == "start":
                waiting.append(i)
            elif slur.get("type") == "stop" and waiting:
                start = waiting.pop()
                found.add((start, i, notes[start].findtext("staff", "1") == note.findtext("staff", "1")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="a zip or folder of scores, or music21")
    parser.add_argument("--split", help="train, dev or test; all when left out")
    parser.add_argument("--count", type=int, default=1000, help="excerpts of 1 to 5 bars")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    songs, rng = open_corpus(args.source, split=args.split), np.random.default_rng(args.seed)
    n = same = complaints = refused = 0
    marks: dict[str, list[int]] = {k: [0, 0] for k in KINDS}
    ends = Counter()
    while n < args.count:
        song = songs[rng.integers(len(songs))]
        try:
            staves = [p for p in parts(song.load()) if p.n_staves <= 2 and p.n_measures]
        except ScoreError:
            refused += 1
            continue
        for part in staves:
            states = header_states(part.element)
            for _ in range(min(10, args.count - n)):
                length = int(min(part.n_measures, rng.integers(1, 6)))
                start = int(rng.integers(part.n_measures - length + 1))
                excerpt = cut_excerpt(part.element, start, length, states=states)
                try:
                    line = linearise(excerpt, printed=True)
                except ScoreError:
                    refused += 1
                    continue
                n, complaints = n + 1, complaints + bool(line.complaints)
                same += plain(line.tokens) == reference(excerpt)
                if line.complaints or any(not b.adds_up for b in analyse(line.tokens).bars):
                    continue  # what is filled or mended has other places
                again = to_musicxml(line.tokens).find("part")
                back = linearise(again, printed=True, strict=False).tokens
                for kind, overlap in mark_overlap(back, line.tokens).items():
                    marks[kind][0] += overlap.matches
                    marks[kind][1] += overlap.n_true
                true, made = slurs(excerpt), slurs(again)
                ends["in the source"] += len(true)
                ends["in the tokens"] += line.tokens.count("slur:start")
                ends["on one staff"] += sum(s[2] for s in true)
                ends["kept"] += len({s for s in true if s[2]} & made)
                ends["between staves after"] += sum(not s[2] for s in made)
    print(f"plain: {same} of {n} excerpts ({refused} refused, {complaints} that contradict themselves)")
    print("back: " + ", ".join(f"{kind} {a} of {b}" for kind, (a, b) in marks.items() if b))
    print("slurs: " + ", ".join(f"{v} {k}" for k, v in ends.items()))
    raise SystemExit(same != n)


if __name__ == "__main__":
    main()
