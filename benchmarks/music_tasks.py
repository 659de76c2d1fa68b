"""What the reader answers about engraved systems of songs it was not trained on: counts, boxes, LMX.

    OMP_NUM_THREADS=1 python benchmarks/music_tasks.py --source openscore-lieder.zip --count 40 --out tasks_music.json
    OMP_NUM_THREADS=1 python benchmarks/music_tasks.py --scans FOLDER --draw second

Each system is asked for its bars, notes and staves, for the box of one bar, for the boxes of all, and for its LMX.
--scans holds pictures of scanned systems; benchmarks/scan_bars.json has the boxes of 60 of them, checked by eye.
"""

import argparse
import itertools
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from vitomr.tasks.datasets import Question
from vitomr.tasks.evaluate import answered, figures_of, report, save_answers
from vitomr.tasks.music import COUNTED, MusicAnswers, drawn_systems, music_question, written

CHECKED = Path(__file__).with_name("scan_bars.json")


def of_songs(args, rng) -> list[Question]:
    "Six questions about each engraved system."
    questions = []
    for s in itertools.islice(drawn_systems(args.source, args.split, seed=args.seed), args.count):
        for what, count in COUNTED.items():
            questions.append(Question(f"How many {what} are there?", count(s.tokens), (s.img,), "counting", s.name))
        questions += [music_question(s, task, rng) for task in ("grounding", "detection", "ocr")]
    return questions


def of_scans(args, rng) -> list[Question]:
    "Four questions about each scanned system."
    questions, boxes_of = [], json.loads(CHECKED.read_text())[args.draw]
    if missing := [n for n in boxes_of if not (args.scans / n).is_file()]:
        raise SystemExit(f"{args.scans} lacks {len(missing)} of {len(boxes_of)} pictures, as {missing[0]}")
    for name, boxes in boxes_of.items():
        picture, at = (str(args.scans / name),), int(rng.integers(len(boxes)))
        for what, n in (("bars", len(boxes)), ("staves", 2)):
            questions.append(Question(f"How many {what} are there?", n, picture, "counting", name))
        one = written(boxes[at : at + 1])[1:-1]
        questions.append(Question(f"Where is bar {at + 1}?", one, picture, "grounding", name))
        questions.append(Question("Where are the bars?", written(boxes), picture, "detection", name))
    return questions


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--source", help="a zip or folder of MusicXML files, or music21")
    where.add_argument("--scans", type=Path, help="a folder of pictures of scanned systems")
    p.add_argument("--split", default="dev", choices=("train", "dev", "test"))
    p.add_argument("--draw", default="second", choices=("first", "second"), help="which 30 scans")
    p.add_argument("--count", type=int, default=100, help="systems")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--weights", help="a weights folder; the packaged ones when left out")
    p.add_argument("--predictions", type=Path, help="a .jsonl for every answer")
    p.add_argument("--out", type=Path, help="the JSON to write")
    args = p.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(args.seed)
    questions = (of_scans if args.scans else of_songs)(args, rng)
    n_systems = len({q.name for q in questions})
    rows = list(answered(MusicAnswers.from_pretrained(args.weights), questions, batch_size=48))
    print(report(rows))
    figures = {t: {k: asdict(r) for k, r in of.items()} for t, of in figures_of(rows).items()}
    for what in COUNTED:
        if not (some := [r for r in rows if r.problem == f"How many {what} are there?"]):
            continue
        figures[f"counting {what}"] = {"accuracy": asdict(figures_of(some)["counting"]["accuracy"])}
    for name, r in ((t, r) for t, of in figures.items() for r in of.items()):
        print(name, r[0], {k: round(v, 4) for k, v in r[1].items()})
    if args.predictions:
        save_answers(rows, args.predictions)
    if args.out:
        round_all = {t: {k: {a: round(v, 4) for a, v in r.items()} for k, r in of.items()} for t, of in figures.items()}
        about = {"scans": args.draw} if args.scans else {"split": args.split}
        found = {"systems": n_systems, **about, "seed": args.seed, "figures": round_all}
        args.out.write_text(json.dumps(found, separators=(",", ":")) + "\n")
