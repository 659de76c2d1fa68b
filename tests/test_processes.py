"""Supervised training and pretraining by two processes: the losses of one, also after one of the two was killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vitomr import decoder, mae
from vitomr.data.batches import BatchPlan
from vitomr.train.runs import load_checkpoint, read_history

ROOT = Path(__file__).resolve().parents[1]
STEPS = 7


def both_loops(shards, folder, n_processes, killed_at=0):
    """Train an MAE and a reader; an update has two batches, however many processes share them.

    With `killed_at` the MAE stops in the middle of a window and goes on, and process 0 is killed while it trains the
    reader, once.
    """
    for chapter in (mae, decoder):
        cfg = chapter.TRAINING["smoke"]
        loop = {"steps": STEPS, "log_every": 3, "accumulate": 2 // n_processes, "checkpoint_minutes": 0}
        cfg = replace(cfg, loop=replace(cfg.loop, **loop), plan=BatchPlan(budget=500))
        run = Path(folder) / chapter.__name__.rpartition(".")[2]

        def die(line, run=run):
            if line["step"] > killed_at and not (run / "killed").exists():
                (run / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        if killed_at and chapter is mae:
            chapter.train(cfg, shards, run, stop_at=killed_at + 2)
        is_victim = killed_at and chapter is decoder and os.environ.get("RANK") == "0"
        chapter.train(cfg, shards, run, on_log=die if is_victim else None)


def in_processes(n, work):
    "Fork n processes that Accelerate takes for those of one run; their exit statuses, negative for a signal."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    world = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    children = []
    for rank in range(n):
        if not (child := os.fork()):
            os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank))
            try:
                work()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


SCENE = """
import json, sys
sys.path.insert(0, {tests!r})
import torch
from test_processes import both_loops, in_processes
torch.set_num_threads(1)
run = lambda name, n, killed_at: in_processes(n, lambda: both_loops({shards!r}, {folder!r} + name, n, killed_at))
codes = [run("/one", 1, 0), run("/two", 2, 3), run("/two", 2, 3)]
print(json.dumps(codes))
"""  # everything is imported once, before there are processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    "Folders of one process, and of two that were interrupted."
    folder = tmp_path_factory.mktemp("runs")
    code = SCENE.format(tests=str(ROOT / "tests"), shards=str(shards.folder), folder=str(folder))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    one, killed, again = json.loads(done.stdout.splitlines()[-1])
    assert one == [0] and again == [0, 0], done.stderr[-3000:]
    assert killed[0] == -signal.SIGKILL and killed[1] != 0 and (folder / "two" / "decoder" / "killed").exists()
    return folder


def lines(folder):
    return [{k: v for k, v in h.items() if k != "seconds"} for h in read_history(folder)]


@pytest.mark.parametrize("chapter", ["decoder", "mae"])
def test_two_interrupted_processes_make_the_history_of_one(runs, chapter):
    one, two = (lines(runs / name / chapter) for name in ("one", "two"))
    assert [h["step"] for h in one] == [3, 6, 7]
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    a, b = (load_checkpoint(runs / name / chapter / "checkpoint.pt")["ema"] for name in ("one", "two"))
    for k, v in a.items():
        torch.testing.assert_close(v, b[k], atol=1e-5, rtol=1e-4, msg=k)


def test_a_line_that_was_cut_short_is_written_again(shards, tmp_path):
    "Killed between checkpoint and history, or in the middle of a line: the history is that of a run in one piece."
    cfg = decoder.TRAINING["smoke"]
    cfg = replace(cfg, loop=replace(cfg.loop, steps=9, log_every=4), plan=BatchPlan(budget=500))
    decoder.train(cfg, shards.folder, tmp_path / "whole")
    for stop, left in ((3, ""), (6, json.dumps({"step": 8, "loss": 0.0}) + '\n{"step": 9, "lo')):
        decoder.train(cfg, shards.folder, tmp_path / "broken", stop_at=stop)
        with open(tmp_path / "broken" / "history.jsonl", "a") as f:
            f.write(left)
    decoder.train(cfg, shards.folder, tmp_path / "broken")
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")
    assert [h["step"] for h in lines(tmp_path / "whole")] == [4, 8, 9]
