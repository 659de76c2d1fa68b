"""What is left to learn: the errors of a reader by what the music holds, and how many of them print cannot show.

    vitomr data build --source openscore-lieder.zip --split dev --mix as-written --count 2500 --seed 7 --out data/dev2
    python benchmarks/unprinted.py --data data/dev2 --source openscore-lieder.zip --work runs/unprinted \
        --out runs/unprinted.json

Excerpts are told apart by their reference: with hidden objects (`print-object:no`: rests that fill up a voice and are
not printed), with tuplets whose numbers are printed or not (looked up in --source, where the excerpts were cut), and
all others. Errors are counted as they are, and with `join_gaps`: a hidden rest, `<forward>` and `<backup>` look
alike, so between two notes of reading and reference they are made one move. Readings are kept in --work.
"""

import argparse
import json
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from grpo_result import PACKAGED, change, counts_of, dev_pictures, fingerprint, tedn_counts

from vitomr.data.corpora import open_corpus
from vitomr.decoder import load_reader
from vitomr.notation.lmx import linearise
from vitomr.notation.metrics import micro_rate
from vitomr.notation.musicxml import to_musicxml
from vitomr.notation.score import ScoreError, cut_excerpt, header_states, join_gaps, parts

GROUPS = (
    "neither", "hidden objects", "tuplets, numbers printed", "tuplets, numbers left out", "tuplets and hidden objects",
)  # fmt: skip


def joined(tokens: list[str]) -> list[str]:
    "The tokens with gaps made alike; as they are where that cannot be written."
    try:
        part = parts(to_musicxml(tokens))[0].element
        join_gaps(part)
        return list(linearise(part).tokens)
    except (ScoreError, IndexError):
        return tokens


def both_counts(pair: tuple[list[str], list[str]]) -> tuple[tuple[int, int], tuple[int, int]]:
    "TEDn edits and size, as it is and with gaps joined."
    return tedn_counts(*pair), tedn_counts(*map(joined, pair))


class Numbers:
    "Whether the tuplets of an excerpt have their numbers printed, as the file says that it was cut from."

    def __init__(self, source: str):
        try:
            self.songs, self.parts = {s.id: s for s in open_corpus(source)}, {}
        except ScoreError as e:
            raise SystemExit(f"--source {source}: {e}") from None

    def are_printed(self, song: str, start: int, n_measures: int, reference: list[str]) -> bool:
        if song not in self.songs:
            raise SystemExit(f"--source has no song {song}; expected the corpus that --data was cut from")
        if song not in self.parts:
            found = [p.element for p in parts(self.songs[song].load())]
            self.parts[song] = [(p, header_states(p)) for p in found]
        for part, states in self.parts[song]:
            try:
                cut = cut_excerpt(part, start, n_measures, states=states)
                if list(linearise(cut).tokens) == reference:
                    break
            except (ScoreError, IndexError):
                continue
        else:
            raise SystemExit(f"{song}, bar {start}: not found in --source as it is written; build --data as above")
        said = [e.get("show-number") != "none" for e in cut.iter("tuplet") if e.get("type") == "start"]
        return bool(said) and all(said)


def group_of(picture, reference: list[str], numbers: Numbers) -> str:
    hidden, tuplets = "print-object:no" in reference, any("in" in t and t[0].isdigit() for t in reference)
    if hidden:
        return GROUPS[4 if tuplets else 1]
    if not tuplets:
        return GROUPS[0]
    song, _, place = picture.name.rpartition(":")
    return GROUPS[2 if numbers.are_printed(song, *map(int, place.split("+")), reference) else 3]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="dev excerpts as they are written")
    p.add_argument("--source", required=True, help="the corpus that they were cut from")
    p.add_argument("--init", type=Path, default=PACKAGED, help="the reader")
    p.add_argument("--bars", default="3-5", help="lengths of the excerpts")
    p.add_argument("--limit", type=int, default=500, help="of excerpts, for each number of staves")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--work", type=Path, required=True, help="folder that keeps the readings")
    p.add_argument("--out", type=Path, required=True, help="JSON to write")
    args = p.parse_args()
    args.degradation, numbers = "clean", Numbers(args.source)
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / f"{args.data.name}-{fingerprint(args.init)}-{args.bars}-{args.limit}.json"
    pictures = dev_pictures(args, args.data)
    counts_of(load_reader(args.init), pictures, kept)
    pairs = [(a.split(), b.split()) for a, b in json.loads(kept.read_text())]
    with ProcessPoolExecutor(args.threads) as pool:
        counts = list(pool.map(both_counts, pairs, chunksize=8))
    rows = defaultdict(list)
    for picture, (_, reference), both in zip(pictures, pairs, counts, strict=True):
        for name in (group_of(picture, reference, numbers), "all"):
            rows[name].append(both)
    edits = [sum(both[k][0] for both in counts) for k in (0, 1)]
    found = {}
    for name in (*GROUPS, "all"):
        if not (own := rows[name]):
            continue
        as_is, alike = ([both[k] for both in own] for k in (0, 1))
        found[name] = {
            "excerpts": len(own),
            "without error": sum(e == 0 for e, _ in as_is),
            "share of edits": sum(e for e, _ in as_is) / max(edits[0], 1),
            "share with gaps joined": sum(e for e, _ in alike) / max(edits[1], 1),
            "TEDn": vars(micro_rate(*zip(*as_is, strict=True))),
            "TEDn with gaps joined": vars(micro_rate(*zip(*alike, strict=True))),
            "change": change(alike, as_is),
        }
        row, rates = found[name], (micro_rate(*zip(*c, strict=True)) for c in (as_is, alike))
        print(f"{name:27} {row['excerpts']:5}, {row['without error']:4} without error, {row['share of edits']:4.0%} of "
              f"edits; TEDn {' → '.join(f'{r.value:.1%}' for r in rates)} with gaps joined")  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"bars": args.bars, "groups": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
