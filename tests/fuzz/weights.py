"""Hostile weights and checkpoints: each is loaded and reads a picture, or is refused in one line.

    python tests/fuzz/weights.py --count 10000 --seed 0

A reader, a masked autoencoder and a run of each get one fault: bytes cut, changed or exchanged; settings of other
values; tensors missing, of another shape or type, not finite; another object or code in a pickle; a file gone or
a folder. A defect is also what loads and then cannot read, code that runs, and 500 MB for a file of some kilobytes.
"""

import copy
import io
import json
import pickle
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from harness import Attempt, main, memory
from safetensors.torch import load_file, save_file

from vitomr import decoder, mae
from vitomr.data.batches import pad_pictures
from vitomr.nn.decoding import greedy

MOST_MEMORY = 500_000_000  # bytes for one input
NUMBERS = [0, -1, 1, 2, 3, 5, 6, 7, 64, 10**9, 10**30, 0.5, 6.0, 1e308, float("nan"), float("inf"), -float("inf")]
VALUES = [*NUMBERS, True, False, None, "", "4", "x" * 1000, [], [0], [10**9], [1.5], [[0]], {}, {"a": 1}]
PICTURE = pad_pictures([np.full((48, 96), 255, np.uint8)])


def flipped(data: bytes, rng: random.Random, low: int = 0, high: int | None = None) -> bytes:
    "Some bytes between two places changed."
    data, high = bytearray(data), min(high or len(data), len(data))
    for _ in range(rng.choice([1, 2, 20]) if high > low else 0):
        data[rng.randrange(low, high)] = rng.randrange(256)
    return bytes(data)


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    "A file that was cut, overwritten or exchanged."
    at = rng.randrange(len(data) + 1)
    return rng.choice([
        lambda: b"", lambda: data[:at], lambda: data[at:], lambda: flipped(data, rng),
        lambda: flipped(data, rng, 0, 64),
        lambda: data + data[:at], lambda: bytes(at), lambda: rng.randbytes(rng.randrange(2000)),
        lambda: b"[" * 100_000, lambda: b" " * 2_000_000, lambda: "ä\u2028\r\n".encode("utf-16") * 50,
    ])()  # fmt: skip


def damaged_settings(settings: dict, rng: random.Random) -> dict:
    "One to three fields with another value, none, or one too many."
    settings = copy.deepcopy(settings)
    inner = settings["mae"] if "mae" in settings and rng.random() < 0.9 else settings
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([*inner, "layers"])
        if rng.random() < 0.1:
            inner.pop(name, None)
        else:
            inner[name] = rng.choice(VALUES)
    return settings


def damaged_tensors(tensors: dict, rng: random.Random) -> dict:
    "A tensor that is missing, too many, of another shape or type, or not finite."
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    x, kind = tensors[name], rng.choice(["gone", "more", "less", "twice", "empty", "type", "value"])
    if kind == "gone":
        del tensors[name]
    elif kind == "more":
        tensors["more"] = x.clone()
    elif kind == "type":
        tensors[name] = x.to(rng.choice([torch.int64, torch.bool, torch.float64, torch.float16, torch.uint8]))
    else:
        value = rng.choice([float("nan"), float("inf"), 1e38])
        made = {"less": x[..., :-1].clone(), "twice": torch.cat([x, x]), "empty": x.flatten()[:0].clone()}
        tensors[name] = made.get(kind, torch.full_like(x, value))
    return tensors


class Code:
    "What a pickle can hold: a call."

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def damaged_state(state: dict, rng: random.Random, marker: Path) -> object:
    "A checkpoint that holds something else than its loop wrote."
    state = copy.deepcopy(state)
    section = next(k for k in ("reader", "mae") if k in state["config"])
    if rng.random() < 0.3:
        state["ema"] = damaged_tensors(state["ema"], rng)
    elif rng.random() < 0.4:
        state["config"][section] = damaged_settings(state["config"][section], rng)
    elif rng.random() < 0.5:
        state.pop(rng.choice(sorted(state)))
    elif rng.random() < 0.5:
        state[rng.choice(sorted(state))] = rng.choice([*VALUES, state["ema"], torch.zeros(3), {1: 2}, ["model"]])
    elif rng.random() < 0.5:
        state["config"] = rng.choice([{}, {section: None}, {section: []}, {section: {1: 2}}, {"x": state["config"]}])
    else:
        return rng.choice([Code(marker), [1, 2], 3, state["ema"], torch.zeros(2), None])
    return state


def damage(folder: Path, base: Path, rng: random.Random, marker: Path) -> str:
    "Make a folder from a good one with one fault; says which."
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder)
    path = rng.choice(sorted(p for p in folder.iterdir() if p.is_file()))
    how = rng.choice(["bytes", "bytes", "content", "content", "content", "place"])
    if how == "bytes":
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
    elif how == "place":
        path.unlink()
        if rng.random() < 0.6:
            rng.choice([path.mkdir, lambda: path.symlink_to("nowhere"), lambda: path.symlink_to("/dev/null")])()
    elif path.suffix == ".json":
        path.write_text(json.dumps(damaged_settings(json.loads(path.read_text()), rng)))
    elif path.suffix == ".safetensors" and rng.random() < 0.7:
        save_file({k: v.contiguous() for k, v in damaged_tensors(load_file(path), rng).items()}, path)
    elif path.suffix == ".safetensors":  # inside its header, or inside its numbers
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(flipped(data, rng, *rng.choice([(0, 8), (8, end), (end, len(data))])))
    elif path.suffix == ".pt":
        state = damaged_state(torch.load(path, weights_only=True), rng, marker)
        buffer = io.BytesIO()
        if rng.random() < 0.1:
            pickle.dump(state, buffer)
        else:
            torch.save(state, buffer)
        path.write_bytes(buffer.getvalue())
    else:
        words = path.read_text().split()
        rng.shuffle(words)
        path.write_text("\n".join(words[: rng.randrange(len(words) + 1)]))
    return f"{base.name}/{path.name}, {how}"


def bases(root: Path) -> dict[str, tuple[Path, Callable[[Path], None]]]:
    "Good folders by kind, and what is done with each."
    torch.manual_seed(0)
    reader, eye = decoder.Reader(decoder.READERS["smoke"]).eval(), mae.MAE(mae.MAES["smoke"]).eval()
    decoder.save_reader(reader, root / "reader")
    mae.save_mae(eye, root / "mae")
    for name, model in (("reader", reader), ("mae", eye)):
        run = root / f"{name}-run"
        run.mkdir()
        settings = vars(model.cfg) | ({"guided_layers": [1]} if name == "reader" else {})
        config = {name: settings, "loop": {}}
        state = {"model": model.state_dict(), "ema": model.state_dict(), "step": 3, "config": config}
        torch.save(state, run / "checkpoint.pt")
        (run / "config.json").write_text(json.dumps(state["config"]))

    def read(model) -> None:
        greedy(model, *PICTURE, max_tokens=3)

    def see(model) -> None:
        mae.reconstruct(model, np.full((48, 96), 255, np.uint8))

    def export(run: Path) -> None:
        (see if mae.is_mae_run(run) else read)((mae if mae.is_mae_run(run) else decoder).export_run(run, root / "out"))

    def begin(folder: Path) -> None:
        mae.load_encoder(decoder.Reader(decoder.READERS["smoke"]).encoder, folder)

    jobs = {
        "reader": [lambda f: read(decoder.load_reader(f)), begin],
        "mae": [lambda f: see(mae.load_mae(f)), begin],
        "reader-run": [export, begin],
        "mae-run": [export, begin],
    }
    return {name: (root / name, jobs[name]) for name in jobs}


@cache
def good() -> tuple[tempfile.TemporaryDirectory, dict]:
    "A folder for this process, and what `bases` wrote there; all of it is sound."
    folder = tempfile.TemporaryDirectory()
    kinds = bases(Path(folder.name))
    for base, jobs in kinds.values():
        for job in jobs:
            job(base)
    return folder, kinds


def check(seed: int, attempt: Attempt) -> None:
    folder, kinds = good()
    root, rng, marker = Path(folder.name), random.Random(seed), Path(folder.name, "marker")
    base, jobs = kinds[rng.choice(sorted(kinds))]
    torch.manual_seed(seed)
    what, before = damage(root / "input", base, rng, marker), memory()
    job = rng.choice(jobs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt(lambda: job(root / "input"))
    attempt.wrong = [f"{what}: {wrong}" for wrong in attempt.wrong]
    assert not marker.exists(), f"{what}: code in a pickle ran"
    assert memory() - before < MOST_MEMORY, f"{what}: took {(memory() - before) / 1e6:.0f} MB"


if __name__ == "__main__":
    raise SystemExit(main("damaged weights", check))
