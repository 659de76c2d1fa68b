"""Kill training runs and data builds at random moments, start them again, and compare with one that was left alone.

`python tests/fuzz/kills.py --count 100 --seed 0`: the history must be the same line for line, the weights and shards
the same bit for bit, and no process may outlive a killed one.
"""

import argparse
import filecmp
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch: children are forked from a process that has no threads

import psutil  # noqa: E402
import torch  # noqa: E402

from vitomr import decoder, grpo, mae  # noqa: E402
from vitomr.data.synthesis import build  # noqa: E402
from vitomr.reading.settings import with_settings  # noqa: E402
from vitomr.train.runs import load_checkpoint, read_history  # noqa: E402

KILLS = 3  # of one run, before it is left to end
ORPHANS = 20.0  # seconds that a child of a killed process has to end
MOST_SECONDS = 900.0  # of a run that is left alone


def _shards(folder: Path) -> Path:
    return folder / "shards"


def build_shards(folder: Path, run: Path) -> None:
    build("music21", run, 24, seed=11)


def train_reader(folder: Path, run: Path) -> None:
    cfg = decoder.TRAINING["smoke"]
    loop = replace(cfg.loop, steps=24, log_every=3, checkpoint_minutes=0)
    decoder.train(replace(cfg, loop=loop, degradation="mix", workers=1), _shards(folder), run)


def train_mae(folder: Path, run: Path) -> None:
    cfg = mae.TRAINING["smoke"]
    loop = replace(cfg.loop, steps=24, log_every=3, checkpoint_minutes=0)
    mae.train(replace(cfg, loop=loop), _shards(folder), run)


def fine_tune(folder: Path, run: Path) -> None:
    given = {"steps": 6, "checkpoint_minutes": 0, "reward_workers": 1, "samples_every": 2, "max_actions": 16}
    given |= {"per_device_batch_size": 8, "rollout_batch": 8, "micro_batch": 8}
    grpo.train(with_settings(grpo.PRACTICE["smoke"], given), _shards(folder), run, init=folder / "init")


RUNS: dict[str, Callable[[Path, Path], None]] = {
    "build": build_shards, "reader": train_reader, "mae": train_mae, "grpo": fine_tune,
}  # fmt: skip


def start(work: Callable[[Path, Path], None], folder: Path, run: Path) -> int:
    "Do the work in a process of its own; what it says goes to run.log."
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        work(folder, run)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def finish(pid: int, seconds: float = MOST_SECONDS) -> int | None:
    "The exit status of a process; None when it had to be ended."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if (done := os.waitpid(pid, os.WNOHANG))[0]:
            return os.waitstatus_to_exitcode(done[1])
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def kill_after(pid: int, seconds: float) -> list[str]:
    "Kill a process; which of its children were still there later."
    time.sleep(seconds)
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        children = []
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _, alive = psutil.wait_procs(children, timeout=ORPHANS)
    left = [f"{p.pid} {' '.join(p.cmdline())[:80]}" for p in alive if p.is_running()]
    for p in alive:
        p.kill()
    return left


def differences(name: str, whole: Path, again: Path) -> list[str]:
    "In what a run that was killed ended otherwise than one that was not."
    if name == "build":
        files = sorted(p.name for p in whole.iterdir())
        if files != sorted(p.name for p in again.iterdir()):
            return [f"other files: {sorted(p.name for p in again.iterdir())} for {files}"]
        same, other, bad = filecmp.cmpfiles(whole, again, files, shallow=False)
        return [f"other bytes: {other + bad}"] if other or bad else []
    timeless = lambda run: [{k: v for k, v in line.items() if k != "seconds"} for line in read_history(run)]
    one, two = timeless(whole), timeless(again)
    wrong = [f"line {i} of the history: {b} for {a}" for i, (a, b) in enumerate(zip(one, two)) if a != b][:1]
    wrong += [f"{len(two)} lines of history for {len(one)}"] if len(one) != len(two) else []
    a, b = (load_checkpoint(run / "checkpoint.pt") for run in (whole, again))
    for part in ("model", "ema"):
        if a[part].keys() != b[part].keys():
            wrong.append(f"other {part} weights")
        changed = [k for k, v in a[part].items() if k in b[part] and not torch.equal(v, b[part][k])]
        wrong += [f"other {part} weights: {changed[0]} and {len(changed) - 1} more"] if changed else []
    temporary = [p.name for p in again.rglob("*") if p.suffix in (".tmp", ".part", ".new")]
    return wrong + ([f"left behind: {temporary}"] if temporary else [])


def try_run(name: str, folder: Path, run: Path, seconds: float, moments: list[float]) -> list[str]:
    "Kill a run at these shares of its time, let it end, and say what is wrong."
    wrong = []
    for share in moments:
        left = kill_after(start(RUNS[name], folder, run), share * seconds)
        wrong += [f"outlived its run: {p}" for p in left]
    if (status := finish(start(RUNS[name], folder, run))) != 0:
        said = run.with_suffix(".log").read_text(errors="replace").strip().splitlines()
        return [*wrong, f"ended with {status}: {' / '.join(said[-2:])}"]
    return wrong + differences(name, folder / name, run)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill runs at random moments; the figures come last.")
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--only", choices=[*RUNS], action="append", help="of these runs; all when left out")
    args = parser.parse_args(arguments)
    rng, kills, defects, n_runs = random.Random(args.seed), Counter(), 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "build").mkdir()
        (folder / "shards").symlink_to(folder / "build")
        torch.manual_seed(0)
        decoder.save_reader(decoder.Reader(decoder.READERS["smoke"]), folder / "init", dtype=torch.float32)
        names, seconds = args.only or [*RUNS], {}
        for name, work in RUNS.items():  # each left alone: what the others are compared with, and how long it takes
            if name not in names and name != "build":  # which makes the shards of all
                continue
            begun = time.monotonic()
            if (status := finish(start(work, folder, folder / name))) != 0:
                print((folder / name).with_suffix(".log").read_text())
                raise SystemExit(f"{name} ended with {status} when it was left alone")
            seconds[name] = time.monotonic() - begun
        while kills.total() < args.count:
            name, n_runs = names[n_runs % len(names)], n_runs + 1
            moments = [rng.uniform(0.02, 0.9) for _ in range(min(KILLS, args.count - kills.total()))]
            wrong = try_run(name, folder, folder / f"{name}-{n_runs}", seconds[name], moments)
            kills[name] += len(moments)
            defects += bool(wrong)
            for line in wrong:
                print(f"run {n_runs}, {name}, killed at {[round(m, 2) for m in moments]}: {line}", flush=True)
    of = ", ".join(f"{n} of {name}" for name, n in kills.items())
    print(f"kills: {kills.total()} ({of}) in {n_runs} runs, {defects} defects")
    return int(defects > 0)


if __name__ == "__main__":
    raise SystemExit(main())
