"""Draw the two figures of README.md from nbs/results: python lab/practice/plots.py"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from practice_plots import plot_line, plot_results  # noqa: E402

FILES = {
    "8 × 8, T 0.8, lr 3e-5": "grpo_line_natural.json",
    "8 × 16, T 0.4, lr 1e-4": "grpo_line_groups.json",
    "64 × 8, T 1, lr 4e-5, GPU": "grpo_line_gpu.json",
}


def read(name: str) -> dict:
    return json.loads((ROOT / "nbs" / "results" / name).read_text())


if __name__ == "__main__":
    plot_line({label: read(name) for label, name in FILES.items()}).savefig(HERE / "line.png", dpi=80)
    plot_results(read("grpo_other.json")).savefig(HERE / "arms.png", dpi=80)
