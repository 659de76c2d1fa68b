"""A short run of each fuzzer in tests/fuzz/; `python tests/fuzz/scores.py --count 10000 --seed 1` makes a long one."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))
harness = importlib.import_module("harness")


@pytest.mark.parametrize(("name", "count"), [("tokens", 60), ("scores", 40), ("pictures", 20), ("weights", 60)])
def test_a_short_run_finds_nothing(name, count):
    report = harness.run(name, importlib.import_module(name).check, count, seed=7000)
    assert report.n == count and not report.defects, report.defects[:3]
    assert report.outcomes["done"] > 0, f"nothing was read: {report}"


def test_a_few_kills_leave_the_same_run_and_nothing_behind():
    "The run with processes of its own; tests of the loops kill the others."
    command = [sys.executable, FUZZ / "kills.py", "--count", "2", "--seed", "3", "--only", "grpo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "kills: 2 (2 of grpo) in 1 runs, 0 defects", done


def test_a_defect_is_found_and_told(tmp_path):
    "What hangs, raises another error or says nothing is a defect, and the command says so by its exit status."
    wrong = {0: "raise KeyError(3)", 1: "raise ValueError('')", 2: "raise ValueError('a' * 201)", 3: "pass"}
    (tmp_path / "bad.py").write_text(
        f"import sys; sys.path.insert(0, {str(FUZZ)!r})\nfrom harness import main\n"
        f"def check(seed, attempt): attempt(lambda: exec({wrong!r}[seed % 4]))\n"
        "raise SystemExit(main('things', check))\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "bad.py", "--count", "8"], capture_output=True, text=True)
    assert done.returncode == 1 and "8 inputs, 6 defects" in done.stdout.splitlines()[-1]
    good = subprocess.run([sys.executable, tmp_path / "bad.py", "--count", "1", "--seed", "3"], capture_output=True)
    assert good.returncode == 0
