"""Figures against values worked out by hand; every dataset and every way of choosing tokens; readings that are kept."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitomr.cli import main
from vitomr.data.batches import pad_pictures
from vitomr.data.datasets import DatasetError
from vitomr.decoder import READERS, Reader
from vitomr.evaluate import (
    Calibration,
    Piece,
    Reading,
    calibration,
    errors_by_token,
    figures_of,
    is_right,
    load_readings,
    ranked,
    read_pairs,
    read_pieces,
    report,
    save_readings,
    ser,
    ser_by_length,
)  # fmt: skip
from vitomr.nn.decoding import beam
from vitomr.notation.analysis import analyse
from vitomr.notation.grammar import Grammar
from vitomr.notation.lmx import EOS_ID, encode
from vitomr.reading.choices import Decoding
from vitomr.reading.lines import BATCH_PATCHES, write_pictures
from vitomr.transcribe import Transcriber

ROOT = Path(__file__).resolve().parents[1]
SCAN = ROOT / "examples" / "bach-invention-1-scan-1.png"
TRUE = "measure key:fifths:0 time beats:4 beat-type:4 clef:G2 C4 voice:1 half stem:up D4 half".split()


def of(pred: str, true: str = " ".join(TRUE), **more) -> Reading:
    return Reading("x", "single", pred.split(), true.split(), **more)


@pytest.fixture(scope="module")
def transcriber():
    return Transcriber.from_pretrained()


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    return Transcriber(Reader(READERS["smoke"]))


@pytest.fixture(scope="module")
def imgs():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (96, w), np.uint8) for w in (200, 333, 64)]


# figures


def test_symbol_error_rate_is_micro():
    readings = [of("measure", "measure C4 quarter"), of("measure", "measure")]
    assert ser(readings).value == 2 / 4
    assert figures_of(readings, ["exactly right"])["exactly right"].value == 1 / 2


def test_every_figure_of_a_perfect_reading_and_of_an_empty_one():
    best, worst = (figures_of([of(" ".join(TRUE))]), figures_of([of("")]))
    for name in ("SER", "TEDn", "MCR"):
        assert best[name].value == 0 and worst[name].value >= 0.5, name
    for name in ("note F1, pitch", "note F1, pitch and onset", "note F1, pitch, onset and duration", "exactly right"):
        assert best[name].value == 1 and worst[name].value == 0, name
    assert best["bars that add up"].value == 1 and "bars that add up" not in worst  # no bar, nothing to count


def test_one_wrong_note_of_two_is_half_of_the_notes_and_one_token():
    wrong = figures_of([of(" ".join(TRUE).replace("D4", "E4"))])
    assert wrong["SER"].value == 1 / len(TRUE) and wrong["note F1, pitch"].value == 1 / 2


def test_a_reference_of_rests_has_no_correction_cost_but_is_counted_elsewhere():
    rests = of("measure rest rest:measure", "measure rest rest:measure")
    assert "MCR" not in figures_of([rests]) and figures_of([rests])["SER"].value == 0


def test_an_unknown_figure_is_named():
    with pytest.raises(ValueError, match="'WER'.*SER, TEDn"):
        figures_of([of("measure")], ["WER"])


def test_the_table_has_a_column_for_each_kind_and_degradation():
    readings = [of("measure"), of("measure", degradation="photo")]
    text, marked = report(readings, ["SER"]), report(readings, ["SER"], markdown=True)
    assert "single, photo" in text.splitlines()[0] and len({len(x.split("|")) for x in marked.splitlines()}) == 1
    assert f"{100 * (1 - 1 / len(TRUE)):.1f} %" in text


# where the errors are


def test_errors_by_token_by_hand():
    found = errors_by_token([of("measure C4 half C4 half", "measure D4 half")])
    assert (found["D4"].n_true, found["D4"].n_missed, found["D4"].n_put_in) == (1, 1, 0)
    assert found["C4"].n_put_in == 2 and found["half"].n_put_in == 1 and found["half"].n_missed == 0
    total = sum(max(e.n_missed, e.n_put_in) for e in found.values())
    assert total >= of("measure C4 half C4 half", "measure D4 half").errors


def test_lengths_split_the_readings_without_losing_any():
    readings = [of("measure", " ".join(["measure"] * n)) for n in (1, 99, 100, 449, 1024)]
    assert sum(r.n for r in ser_by_length(readings).values()) == len(readings)
    assert list(ser_by_length(readings)) == ["0 to 99", "100 to 149", "350 to 449", "450 to 1024"]


def test_calibration_by_hand():
    r = of("measure C4 half", "measure D4 half", logp=[math.log(0.95), math.log(0.55), math.log(0.95)])
    assert is_right(r).tolist() == [True, False, True]
    c = calibration([r])
    np.testing.assert_allclose((c.confidence, c.right, c.count), ([0.55, 0.95], [0, 1], [1, 2]))
    assert c.error == pytest.approx((0.55 + 2 * 0.05) / 3)
    assert Calibration(np.array([0.3]), np.array([0.3]), np.array([7])).error == 0
    with pytest.raises(ValueError, match="no reading has log-probabilities"):
        calibration([of("measure")])


def test_worst_is_last():
    readings = [of(""), of(" ".join(TRUE)), of("measure")]
    assert [r.errors for r in ranked(readings)] == [0, len(TRUE) - 1, len(TRUE)]


# ways of choosing tokens


def test_a_beam_of_one_draws_and_the_default_agree_with_themselves(untrained, imgs):
    short = {"max_tokens": 12}
    said = lambda **way: [(x.tokens, x.logp) for x in write_pictures(untrained, imgs, Decoding(**short, **way))]
    greedy = said()
    assert greedy == said(temperature=0, seed=5)
    hot = [said(temperature=2, seed=s) for s in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]
    narrow = said(temperature=2, top_k=1, seed=3)  # the likeliest of one
    assert [t for t, _ in narrow] == [t for t, _ in greedy] and said(temperature=2, top_p=1e-6, seed=3) == narrow
    assert all(len(t) == len(p) for t, p in greedy + hot[0] + said(beam=3))


@pytest.mark.parametrize("grammar", ["none", "time"])
def test_a_beam_tells_how_likely_its_tokens_are(untrained, imgs, grammar):
    "Their sum is what the search itself found, so a beam that ended is no less likely than the greedy reading."
    how = Decoding(beam=3, grammar=grammar, max_tokens=30, shifts=1)
    pixels, mask = pad_pictures(imgs)
    rules = Grammar(time=True).tracker(9, budget=30) if grammar == "time" else None
    found = beam(untrained.model, pixels, mask, width=3, max_tokens=30, rules=rules)
    for line, (ids, logp) in zip(write_pictures(untrained, imgs, how), found, strict=True):
        assert encode(line.tokens) == ids and len(line.logp) == len(ids) and max(line.logp) <= 0
        assert line.truncated == (len(ids) == 30) and EOS_ID not in ids
        assert sum(line.logp) >= logp - 1e-3  # the end counts in the search
        assert grammar == "time" or not line.truncated or sum(line.logp) == pytest.approx(logp, abs=1e-3)


@pytest.mark.parametrize("how", [{}, {"temperature": 1.5}, {"beam": 3}], ids=["greedy", "drawn", "beam"])
def test_with_the_grammar_an_untrained_reader_writes_without_error(untrained, imgs, how):
    "Rows end at different times, so the rules must follow rows that leave and rows that a beam doubles."
    for line in write_pictures(untrained, imgs, Decoding(**how, grammar="time", max_tokens=40)):
        found = analyse(line.tokens)
        assert found.n_minor == 0 and not found.fatal, line.tokens


@pytest.mark.parametrize(
    "how, says",
    [
        ({"grammar": "lmx"}, "'lmx'.*shape"),
        ({"beam": 0}, "beam 0"),
        ({"beam": 2, "temperature": 1}, "choose beam search or sampling"),
        ({"temperature": -1}, "temperature -1"),
        ({"top_k": 5}, "top_k 5.*temperature"),
        ({"max_tokens": 0}, "max_tokens 0"),
        ({"second_look": -1}, "second_look -1"),
        ({"shifts": 0}, "shifts 0.*1 .*4"),
        ({"shifts": 5}, "shifts 5"),
    ],
)
def test_bad_ways_are_one_line(how, says):
    with pytest.raises(ValueError, match=says) as e:
        Decoding(**how)
    assert "\n" not in str(e.value)


# datasets


def test_a_folder_of_pictures_is_read_with_its_reference(transcriber, tmp_path):
    for suffix in (".png", ".lmx"):
        (tmp_path / f"x{suffix}").write_bytes(SCAN.with_suffix(suffix).read_bytes())
    (tmp_path / "untold.png").write_bytes(SCAN.read_bytes())
    Image.new("L", (300, 100), 255).save(tmp_path / "blank.png")
    (tmp_path / "blank.lmx").write_text("measure rest rest:measure")
    blank, read = sorted(read_pairs(transcriber, tmp_path), key=lambda r: r.name)
    assert read.true == SCAN.with_suffix(".lmx").read_text().split() and len(read.logp) == len(read.pred)
    assert (blank.name, blank.pred, blank.errors) == ("blank", [], 3)  # no staff to be found: read empty, not left out
    assert read.pred == transcriber.transcribe(SCAN).tokens


def test_a_reference_may_be_a_score(untrained, tmp_path):
    (tmp_path / "x.png").write_bytes(SCAN.read_bytes())
    (tmp_path / "x.musicxml").write_bytes(SCAN.with_suffix(".musicxml").read_bytes())
    (only,) = read_pairs(untrained, tmp_path, how=Decoding(max_tokens=3))
    assert only.true == SCAN.with_suffix(".lmx").read_text().split()


def test_a_broken_picture_of_a_dataset_is_named(untrained, tmp_path):
    (tmp_path / "x.png").write_bytes(SCAN.read_bytes()[:500])
    (tmp_path / "x.lmx").write_text("measure")
    with pytest.raises(DatasetError, match=r"x\.png"):
        list(read_pairs(untrained, tmp_path))


def test_batches_hold_every_piece_once_and_keep_their_budget(untrained, monkeypatch):
    sizes = [(96, w) for w in range(100, 1000, 37)] + [(2000, 1500)]
    pieces = [Piece(str(i), "x", np.full(s, 255, np.uint8), ["measure"]) for i, s in enumerate(sizes)]
    pieces.insert(3, Piece("blank", "x", None, ["measure"]))
    seen = []

    def read(_, lines, how):
        seen.append([x.picture.shape for x in lines])
        for x in lines:
            x.tokens = [f"{x.picture.shape[1]}"]
            yield "line", x

    monkeypatch.setattr("vitomr.reading.lines.write_lines", read)
    readings = list(read_pieces(untrained, pieces, batch_size=8))
    assert [r.name for r in readings] == [p.name for p in pieces]  # in their order, each with its own reading
    assert [r.pred for r in readings] == [[f"{p.img.shape[1]}"] if p.img is not None else [] for p in pieces]
    assert all(len(b) == 1 or len(b) * max(h * w for h, w in b) <= BATCH_PATCHES * 256 for b in seen)
    assert len(seen) < len(sizes) / 3 and max(map(len, seen)) == 8


# kept readings and the command line


def test_kept_readings_come_back(tmp_path):
    readings = [of("measure C4", logp=[-0.12345, -2.0], degradation="scan", seconds=1.23456), of("")]
    save_readings(readings, tmp_path / "r.json")
    back = load_readings(tmp_path / "r.json")
    assert back[0].logp == [-0.123, -2.0] and back[0].seconds == 1.235
    key = lambda r: (r.name, r.pred, r.true, r.kind, r.degradation)
    assert list(map(key, back)) == list(map(key, readings))


@pytest.mark.parametrize("text", ["{}", "[1]", '[{"name": "x"}]', "not json"])
def test_another_file_is_no_readings(text, tmp_path, capsys):
    (tmp_path / "r.json").write_text(text)
    assert main(["evaluate", "--data", str(tmp_path / "r.json")]) == 2
    err = capsys.readouterr().err
    assert "no readings" in err and len(err.splitlines()) == 1


def test_the_packaged_readings_give_the_tables_and_plots(tmp_path, capsys):
    "Kept readings of the packaged weights: far better than chance, and the figures agree with each other."
    args = ["evaluate", "--data", str(ROOT / "examples" / "readings.json"), "--figures", "SER,TEDn", "--markdown"]
    assert main([*args, "--plots", str(tmp_path / "plots")]) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:4]] == ["SER", "TEDn"]
    assert Image.open(tmp_path / "plots" / "errors.png").size[0] > 1000
    assert main([*args[:-3], "--figures", "WER"]) == 2 and "WER" in capsys.readouterr().err
