"""The parts of a system have the same bars, and a score has a time, whether it is printed or not."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from vitomr.data.corpora import open_corpus
from vitomr.data.pages import random_sheet, wear
from vitomr.notation.finish import finish_score
from vitomr.notation.lmx import VOCABULARY
from vitomr.notation.musicxml import MARK_COLOUR
from vitomr.page.assemble import Line, agree_on_bars, assemble, fit_bars, infer_time, without_courtesy
from vitomr.page.systems import find_systems, n_bars_printed
from vitomr.reading.bars import BarCount, agree
from vitomr.reading.choices import Decoding
from vitomr.reading.transcription import SystemReading, Transcription
from vitomr.transcribe import Transcriber

ROOT = Path(__file__).resolve().parents[1]
BAR = "measure key:fifths:0 clef:G2 time beats:4 beat-type:4 C4 whole".split()
MORE = "measure D4 whole measure E4 whole".split()


def pitches(part) -> list[list[str]]:
    return [[p.text for p in measure.iterfind("note/pitch/step")] for measure in part.iterfind("measure")]


def test_a_surplus_bar_is_joined_and_pads_no_other_part():
    split = "measure key:fifths:0 clef:G2 time beats:4 beat-type:4 C4 half measure C4 half measure D4 whole".split()
    score = assemble([[Line(split), Line(BAR + MORE[:3]), Line(BAR + MORE[:3])]]).score
    assert [pitches(p) for p in score.findall("part")] == [[["C", "C"], ["D"]], [["C"], ["D"]], [["C"], ["D"]]]


def test_a_missing_bar_is_put_where_it_is_missing():
    two = "measure key:fifths:0 clef:F4 time beats:4 beat-type:4 F3 whole measure B3 half measure A3 whole".split()
    lost = "measure key:fifths:0 clef:F4 time beats:4 beat-type:4 F3 whole measure A3 whole".split()
    made = assemble([[Line(two), Line(two), Line(lost)]])
    third = made.score.findall("part")[2]
    assert pitches(third) == [["F"], [], ["A"]]
    assert [m.find("note").get("color") for m in third.iterfind("measure")] == [None, MARK_COLOUR, None]
    assert {made.notes[n.get("id")][2] for n in third.iter("note") if n.get("id") in made.notes} == {7, 10}


def test_the_picture_decides_between_two_parts():
    split = "measure C4 half measure C4 half measure D4 whole".split()
    right = "measure C4 whole measure D4 whole".split()
    assert agree_on_bars([Line(split), Line(right)]) == 3
    assert agree_on_bars([Line(split), Line(right)], printed=2) == 2
    assert agree_on_bars([Line(split), Line(right)], printed=7) == 3  # neither part has so many
    score = assemble([[Line(split), Line(right)]], printed=[2]).score
    assert [len(p) for p in score.findall("part")] == [2, 2]


def test_joined_and_added_bars_keep_every_token():
    rng = np.random.default_rng(3)
    for _ in range(50):
        bars = [["measure", *["C4", "quarter"] * rng.integers(0, 5)] for _ in range(rng.integers(1, 7))]
        tokens = [t for bar in bars for t in bar]
        spans = fit_bars(tokens, [Fraction(int(x)) for x in rng.integers(1, 5, rng.integers(1, 7))])
        assert [t for a, b in spans for t in tokens[a:b]] == tokens


@pytest.mark.parametrize("sign", ["key:fifths:2", "clef:F4 staff:1", "time beats:3 beat-type:4"])
def test_a_courtesy_change_at_the_end_is_no_bar(sign):
    line = [*BAR, "measure", *sign.split()]
    assert without_courtesy(line) == BAR
    assert without_courtesy(["measure", *sign.split()]) == ["measure", *sign.split()]  # all that there is
    assert without_courtesy([*line, "rest", "rest:measure"]) == [*line, "rest", "rest:measure"]
    made = assemble([[Line(line)], [Line(["measure", *sign.split()[:1], "D4", "half", "D4", "half"])]])
    assert len(made.score.find("part")) == 2


@pytest.mark.parametrize(
    "time, bar",
    [
        ("2/4", "C4 half"),
        ("3/4", "C4 eighth beam:begin D4 eighth beam:end C4 quarter C4 quarter"),
        ("6/8", "C4 eighth beam:begin D4 eighth beam:continue E4 eighth beam:end C4 quarter dot"),
        ("4/4", "C4 whole"),
        ("12/8", "C4 eighth beam:begin D4 eighth beam:continue E4 eighth beam:end C4 half dot C4 quarter dot"),
        ("3/8", "C4 quarter dot"),
        ("5/4", "C4 whole C4 quarter"),
    ],
)
def test_a_time_that_is_not_printed_is_inferred_and_marked(time, bar):
    beats, kind = time.split("/")
    tokens = f"measure clef:G2 {bar} measure {bar} measure {bar} measure C4 quarter".split()
    assert infer_time([Line(tokens)]) == (f"beats:{beats}", f"beat-type:{kind}")
    made = assemble([[Line(tokens)]])
    (signature,) = made.score.iter("time")
    assert (signature.findtext("beats"), signature.findtext("beat-type")) == (beats, kind)
    assert signature.get("color") == MARK_COLOUR and made.inferred
    assert made.tokens == [tokens]  # LMX says what is printed
    (clean,) = finish_score(made.score).iter("time")
    assert clean.get("print-object") == "no" and clean.get("color") is None


def test_no_time_is_inferred_without_evidence_or_over_a_printed_one():
    assert infer_time([Line("measure C4 half measure C4 whole measure C4 quarter".split())]) == ()
    assert infer_time([Line("measure C4 whole".split())]) == ()
    made = assemble([[Line(BAR + MORE)]])
    assert not made.inferred and next(made.score.iter("time")).get("color") is None


@pytest.mark.parametrize("preset", ["clean", "scan"])
def test_bar_lines_of_a_page_are_counted(preset):
    songs = [s for s in open_corpus("music21", split="dev") if "bwv" in s.id]
    sheet = random_sheet(songs, 4, kind="voice and piano", n_systems=3)
    sheet = sheet if preset == "clean" else wear(sheet, np.random.default_rng(0), preset)
    page = find_systems(sheet.img)
    assert [n_bars_printed(page, s) for s in page.systems] == [s.tokens[0].count("measure") for s in sheet.systems]


def test_a_row_has_as_many_bars_as_it_must():
    rules = BarCount([2, 0])
    measure, end = VOCABULARY.index("measure"), VOCABULARY.index("<eos>")
    assert rules.mask()[:, [measure, end]].tolist() == [[True, False], [False, True]]
    rules.advance([measure, 7])
    rules.keep([0, 0])
    rules.advance([measure, measure])
    assert rules.mask()[:, [measure, end]].tolist() == [[False, True]] * 2


def test_the_line_that_disagrees_is_read_again():
    transcriber = Transcriber.from_pretrained()
    whole = transcriber.transcribe(ROOT / "examples" / "bach-invention-1-scan-1.png", words=False)
    n_bars = whole.tokens.count("measure")
    line = lambda tokens: Transcription(tokens, [0.0] * len(tokens), whole.picture, n_staves=2)
    cut = [t for i, t in enumerate(whole.tokens) if t != "measure" or i == 0]  # its bars read as one
    system = SystemReading((0, 0, 1, 1), np.zeros((4, 2)), [line(whole.tokens), line(cut)], n_bars)
    assert [x is system.lines[1] for x in agree(transcriber, system, Decoding(shifts=1))] == [True]
    assert system.lines[1].tokens.count("measure") == n_bars
    assert list(agree(transcriber, system, Decoding(shifts=1))) == []
