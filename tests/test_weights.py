"""Weights from elsewhere: settings out of range, tensors that do not fit and damaged checkpoints get one line."""

import json
import math
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitomr import cli
from vitomr.decoder import READERS, Reader, ReaderConfig, WeightsError, load_reader, save_reader
from vitomr.mae import MAE, MAES, MaeConfig, MaeWeightsError, load_mae, save_mae
from vitomr.train.runs import save_checkpoint

WRONG = [  # a field, what is given, what is expected
    ("encoder_heads", 0, "a whole number from 1 to 128"),
    ("decoder_layers", 10**9, "a whole number from 1 to 128"),
    ("encoder_layers", -1, "a whole number from 1"),
    ("encoder_layers", 2.0, "a whole number"),
    ("decoder_heads", True, "a whole number"),
    ("d_encoder", "32", "a multiple of 4 from 4 to 8192"),
    ("d_encoder", None, "a multiple of 4"),
    ("d_decoder", [32], "a multiple of 4"),
    ("d_decoder", 10**30, "a multiple of 4"),
    ("stem_blocks", {"a": 1}, "a whole number from 0 to 16"),
    ("staff_space", math.nan, "a number from 2 to 64"),
    ("staff_space", math.inf, "a number from 2 to 64"),
    ("staff_space", -6.0, "a number from 2 to 64"),
    ("encoder_heads", 3, "a divisor"),
]
READER_ONLY = [
    ("vocabulary_size", 10**9, "a whole number from 4"),
    ("guided_layers", [2], "a whole number from 0 to 1"),
    ("guided_layers", 1, "a list"),
    ("guided_layers", ["1"], "a list"),
    ("decoder_heads", 32, "an even width"),
]
LOADS = {"reader": (load_reader, WeightsError), "mae": (load_mae, MaeWeightsError)}


@pytest.fixture
def folders(tmp_path):
    "Sound weights of a reader and of a masked autoencoder."
    torch.manual_seed(0)
    save_reader(Reader(READERS["smoke"]), tmp_path / "reader")
    save_mae(MAE(MAES["smoke"]), tmp_path / "mae")
    return {name: tmp_path / name for name in LOADS}


def refused(kind: str, folder) -> str:
    load, error = LOADS[kind]
    with pytest.raises(error) as e:
        load(folder)
    assert "\n" not in str(e.value) and len(str(e.value)) <= 200
    return str(e.value)


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize(("name", "given", "expected"), [*WRONG, *READER_ONLY])
def test_a_setting_out_of_range_is_named_before_memory_is_taken(folders, kind, name, given, expected):
    if kind == "mae" and (name, given, expected) in READER_ONLY:
        pytest.skip("a reader's setting")
    path = folders[kind] / "config.json"
    settings = json.loads(path.read_text())
    (settings["mae"] if kind == "mae" else settings)[name] = given
    path.write_text(json.dumps(settings))
    tracemalloc.start()
    said = refused(kind, folders[kind])
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert f"{name} is " in said and expected in said
    with pytest.raises(ValueError, match=f"{name} is "):
        (MaeConfig if kind == "mae" else ReaderConfig).from_dict(settings.get("mae", settings))


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "[" * 100_000, "ä" * 10, " " * 2_000_000, '{"mae": []}'])
def test_settings_that_are_none_get_one_line(folders, kind, text):
    (folders[kind] / "config.json").write_text(text, encoding="latin-1")
    assert "cannot be loaded" in refused(kind, folders[kind])


@pytest.mark.parametrize("kind", LOADS)
def test_large_settings_do_not_take_the_memory_that_their_tensors_do_not_have(folders, kind):
    path = folders[kind] / "config.json"
    settings = json.loads(path.read_text())
    inner = settings["mae"] if kind == "mae" else settings
    inner |= {"d_encoder": 8192, "encoder_layers": 128, "encoder_heads": 64}  # 400 GB of weights
    path.write_text(json.dumps(settings))
    assert "tensors are missing" in refused(kind, folders[kind])


@pytest.mark.parametrize("kind", LOADS)
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: x[:-1], "has the shape"),
        (lambda x: torch.full_like(x, math.nan), "finite"),
        (lambda x: x.to(torch.int64), "finite"),
        (None, "1 tensors are missing, as encoder.norm.weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folders, kind, change, says):
    path = folders[kind] / "model.safetensors"
    tensors = load_file(path)
    x = tensors.pop("encoder.norm.weight")
    save_file(tensors if change is None else {**tensors, "encoder.norm.weight": change(x).contiguous()}, path)
    said = refused(kind, folders[kind])
    assert says in said and "encoder.norm.weight" in said


def change(state: dict, **what) -> dict:
    return {k: v for k, v in (state | what).items() if v is not ...}


DAMAGE = {  # what is done to a checkpoint
    "truncated": lambda path, state: path.write_bytes(path.read_bytes()[:5000]),
    "empty": lambda path, state: path.write_bytes(b""),
    "wrong type": lambda path, state: save_checkpoint(path, change(state, ema=[1, 2])),
    "no weights": lambda path, state: save_checkpoint(path, change(state, ema=...)),
    "no settings": lambda path, state: save_checkpoint(path, change(state, config={})),
    "wrong settings": lambda path, state: save_checkpoint(path, change(state, config={"reader": {"d_decoder": 0}})),
    "other settings": lambda path, state: save_checkpoint(path, change(state, config={"reader": 3})),
    "wrong shapes": lambda path, state: save_checkpoint(
        path, change(state, ema={k: torch.zeros(2, *v.shape) for k, v in state["ema"].items()})
    ),
    "fewer tensors": lambda path, state: save_checkpoint(path, change(state, ema=dict(list(state["ema"].items())[3:]))),
    "no checkpoint": lambda path, state: path.write_bytes(b"hello" * 1000),
    "a list": lambda path, state: torch.save([1, 2], path),
    "folder": lambda path, state: (path.unlink(), path.mkdir()),
    "gone": lambda path, state: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_export_of_a_damaged_checkpoint_is_one_line(tmp_path, capsys, damage):
    model = Reader(READERS["smoke"])
    settings = {"reader": vars(model.cfg) | {"guided_layers": [1]}, "loop": {}}
    state = {"model": model.state_dict(), "ema": model.state_dict(), "step": 1, "config": settings}
    run = tmp_path / "run"
    run.mkdir()
    save_checkpoint(run / "checkpoint.pt", state)
    given = ["export", "--run", str(run), "--out", str(tmp_path / "out")]
    assert cli.main(given) == 0 and load_reader(tmp_path / "out").cfg == model.cfg
    capsys.readouterr()
    DAMAGE[damage](run / "checkpoint.pt", state)
    assert cli.main([*given[:-1], str(tmp_path / "again")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "checkpoint" in said[0] and len(said[0]) <= 220
    assert not (tmp_path / "again").exists()
