"""A small vision-language model from scratch on drawn shapes: supervised start, GRPO with each seed, and a control.

    OMP_NUM_THREADS=1 python benchmarks/shapes.py --preset tiny --out nbs/results/tasks_shapes.json

One core; `--runs` keeps the runs, and a run that was stopped goes on where it was.
"""

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from vitomr.tasks.shapes import EXPERIMENTS, compare


def rounded(x):
    if isinstance(x, float):
        return round(x, 4)
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list | tuple) else x


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--preset", default="smoke", choices=EXPERIMENTS)
    p.add_argument("--runs", help="a folder for the runs; a temporary one when left out")
    p.add_argument("--out", type=Path, help="the JSON to write")
    args = p.parse_args()
    torch.set_num_threads(1)
    results, _ = compare(EXPERIMENTS[args.preset], args.runs or tempfile.mkdtemp(), lambda x: print(x, flush=True))
    if args.out:
        args.out.write_text(json.dumps(rounded(asdict(results)), separators=(",", ":")) + "\n")
