"""Devices that follow the loudness of parts: every arm of the audio chapter, with its error on held-out chorales.

python benchmarks/audio.py                                               smoke size, a minute
python benchmarks/audio.py --preset chorales --json nbs/results/audio.json   the measurement of the chapter
"""

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from vitomr.audio.practice import EXPERIMENTS, compare


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", default="smoke", choices=list(EXPERIMENTS))
    p.add_argument("--budget", type=float, help="processor seconds of an arm, instead of the preset's")
    p.add_argument("--json", type=Path, help="write the figures here")
    args = p.parse_args()
    torch.set_num_threads(1)
    size = EXPERIMENTS[args.preset]
    size = replace(size, budget=args.budget) if args.budget else size

    def keep(results: dict) -> None:
        if args.json:
            args.json.write_text(json.dumps(results) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        compare(size, folder, say=lambda line: print(line, flush=True), keep=keep)


if __name__ == "__main__":
    main()
