"""What the reader answers about engraved systems of songs it was not trained on: counts, boxes, LMX.

    OMP_NUM_THREADS=1 python benchmarks/music_tasks.py --source openscore-lieder.zip --count 40 --out tasks_music.json

Each system is asked for its bars, notes and staves, for the box of one bar, for the boxes of all, and for its LMX.
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
from vitomr.tasks.music import COUNTED, MusicAnswers, drawn_systems, music_question

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--source", required=True, help="a zip or folder of MusicXML files, or music21")
    p.add_argument("--split", default="dev", choices=("train", "dev", "test"))
    p.add_argument("--count", type=int, default=100, help="systems")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--weights", help="a weights folder; the packaged ones when left out")
    p.add_argument("--predictions", type=Path, help="a .jsonl for every answer")
    p.add_argument("--out", type=Path, help="the JSON to write")
    args = p.parse_args()
    torch.set_num_threads(1)
    rng, questions = np.random.default_rng(args.seed), []
    systems = list(itertools.islice(drawn_systems(args.source, args.split, seed=args.seed), args.count))
    for s in systems:
        for what, count in COUNTED.items():
            questions.append(Question(f"How many {what} are there?", count(s.tokens), (s.img,), "counting", s.name))
        questions += [music_question(s, task, rng) for task in ("grounding", "detection", "ocr")]
    rows = list(answered(MusicAnswers.from_pretrained(args.weights), questions, batch_size=48))
    print(report(rows))
    figures = {t: {k: asdict(r) for k, r in of.items()} for t, of in figures_of(rows).items()}
    for what in COUNTED:
        some = [r for r in rows if r.problem == f"How many {what} are there?"]
        figures[f"counting {what}"] = {"accuracy": asdict(figures_of(some)["counting"]["accuracy"])}
    for name, r in ((t, r) for t, of in figures.items() for r in of.items()):
        print(name, r[0], {k: round(v, 4) for k, v in r[1].items()})
    if args.predictions:
        save_answers(rows, args.predictions)
    if args.out:
        round_all = {t: {k: {a: round(v, 4) for a, v in r.items()} for k, r in of.items()} for t, of in figures.items()}
        found = {"systems": len(systems), "split": args.split, "seed": args.seed, "figures": round_all}
        args.out.write_text(json.dumps(found, separators=(",", ":")) + "\n")
