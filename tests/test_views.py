"""Where the reader looked, and how it is shown: places against known heads, bars in order, strings that stay inside."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch

from vitomr import views
from vitomr.data.degrade import degrade
from vitomr.insight import bar_spans, locate, look, score_of, symbols
from vitomr.notation.engrave import engrave
from vitomr.notation.lmx import linearise
from vitomr.notation.metrics import errors_by_kind
from vitomr.notation.musicxml import to_musicxml
from vitomr.notation.score import parts, read_score
from vitomr.page.staves import map_points, open_picture
from vitomr.page.systems import find_systems
from vitomr.reading.transcription import Document, PageReading
from vitomr.reading.weights import PACKAGED
from vitomr.rewards import TERMS, Breakdown
from vitomr.train.groups import advantages
from vitomr.transcribe import Transcriber

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
VOICE = EXAMPLES / "schubert-fruehlingstraum-voice.png"
HOSTILE = ["<img src=x onerror=alert(1)>", '" onmouseover="alert(1)', "</span><script>alert(1)</script>", "'"]


@pytest.fixture(scope="module")
def transcriber():
    if not (PACKAGED / "model.safetensors").is_file():
        pytest.skip("no packaged weights")
    torch.set_num_threads(1)
    return Transcriber.from_pretrained()


@pytest.fixture(scope="module")
def sheet(transcriber):
    document = transcriber.transcribe(VOICE)
    return views.Sheet(document, views.seen_lines(transcriber, document))


@pytest.mark.parametrize("preset", ["clean", "photo"])
@pytest.mark.parametrize("name", ["beethoven-maigesang-piano", "schumann-rosen-voice"])
def test_located_symbols_stand_where_their_heads_are(transcriber, name, preset):
    (part,) = parts(read_score(EXAMPLES / f"{name}.musicxml"))
    for i, note in enumerate(part.element.iter("note")):
        note.set("id", f"n{i}")
    drawn, line = engrave(part.element), linearise(part.element)
    bad = degrade(drawn.img, np.random.default_rng(3), preset)
    normal = transcriber.normal_form(bad.img)
    heads = {k: map_points(bad.move(np.array([xy])), normal.matrix)[0] for k, xy in drawn.positions.items()}
    apart = [
        np.hypot(*(np.array(at) - heads[note]))
        for at, note in zip(locate(transcriber, normal.img, line.tokens), line.note, strict=True)
        if at is not None and note in heads
    ]
    assert len(apart) > 0.9 * sum(n in heads for n in line.note)
    assert np.mean(np.array(apart) < 16) > 0.85


def test_tokens_of_no_note_have_no_place(transcriber, sheet):
    tokens = ["measure", "key:fifths:0", "clef:G2", "C4", "quarter", "stem:up", "backup", "quarter", "rest", "half"]
    at = locate(transcriber, sheet.lines[0].img, tokens)
    assert [xy is not None for xy in at] == [False] * 3 + [True] * 3 + [False] * 2 + [True] * 2


def test_second_look_agrees_with_the_first(transcriber, sheet):
    line = sheet.document.lines[0]
    assert sheet.lines[0].look.logp[:-1] == pytest.approx(line.logp, abs=2e-3)
    assert look(transcriber, line.picture, []).logp.shape == (1,)


def test_bars_follow_each_other(sheet):
    found, width = symbols(sheet.lines[0].look), sheet.lines[0].img.shape[1]
    spans = bar_spans(found, 6, width)
    assert spans[4:] == [None, None] and spans[0][0] == 0 and spans[3][1] == width
    assert [a[1] for a in spans[:3]] == [b[0] for b in spans[1:4]]
    assert bar_spans([], 2, 100.0) == [None, None]


def test_draws_are_less_likely_than_what_was_searched_for(transcriber):
    scores = []
    for way in ({}, {"beam": 2}, {"temperature": 3.0, "top_k": 50, "seed": 4}):
        (line,) = transcriber.transcribe(VOICE, **way).lines
        assert len(line.tokens) == len(line.logp)
        scores.append(score_of([look(transcriber, line.picture, line.tokens)]))
    assert scores[1] >= scores[0] - 1e-3 and scores[2] < scores[0]


def test_outlines_lie_on_the_picture_in_order(sheet):
    h, w = sheet.document.pages[0].picture.shape
    outlines = views.bar_outlines(sheet)
    lefts = [o[:, 0].min() for o in outlines]
    assert len(outlines) == 4 and lefts == sorted(lefts)
    everywhere = np.concatenate(outlines)
    assert everywhere.min() > -0.05 * w and (everywhere < [1.05 * w, 1.05 * h]).all()


def test_bars_are_shown_and_counted_before_anything_is_read():
    "The page has 22 bars in 6 systems; a bar line that is not found costs one."
    picture = open_picture(EXAMPLES / "pages" / "bach-invention-1.png")
    page = find_systems(picture)
    shown = ET.fromstring(f"<div>{views.found_html(Document('page', [PageReading(1, picture, found=page)]))}</div>")
    bars = [e for e in shown.iter("polygon") if e.get("class") == "guess"]
    assert 20 <= len(bars) <= 22
    assert shown.findtext("p") == f"6 systems, about {len(bars)} bars by the bar lines in the picture"
    outlines = [np.array([xy.split(",") for xy in e.get("points").split()], float) for e in bars]
    assert all(o.max(0)[0] <= picture.shape[1] and o.min() >= 0 for o in outlines)
    centres = np.array([o.mean(0) for o in outlines])
    assert all(b[0] > a[0] or b[1] > a[1] + 50 for a, b in zip(centres, centres[1:]))  # in reading order


def test_a_single_staff_has_no_bars_before_it_is_read():
    picture = open_picture(EXAMPLES / "schubert-fruehlingstraum-voice.png")
    assert views.bars_in_picture(find_systems(picture)) == []


def test_doubtful_notes_are_coloured_and_named(sheet):
    name = "s1p1n3"
    svg = views.engraving(sheet.score, colours={name: "#123456"}, titles={name: HOSTILE[0]}, odd=[1])
    shown = ET.fromstring(svg)
    (note,) = (e for e in shown.iter() if e.get("id") == "s1p1n3")
    assert note.get("fill") == "#123456" and note[0].text == HOSTILE[0]
    bars = [e for e in shown.iter() if "measure" in (e.get("class") or "")]
    assert [b.get("data-bar") for b in bars] == ["0", "1", "2", "3"] and bars[1].get("class") == "measure odd"


def test_tied_notes_sound_once():
    tied = "measure time beats:4 beat-type:4 C4 half tied:start C4 half tied:stop measure D4 whole".split()
    score = to_musicxml(tied)
    notes = views.sounds(score)["notes"]
    assert [(start, length, pitch) for _, start, length, pitch in notes] == [(0, 2000, 60), (2000, 2000, 62)]
    assert views.sounds(score)["bars"] == [0, 2000]


def test_errors_of_notes_are_those_counted():
    true = "measure C4 quarter D4 quarter E4 quarter F4 quarter".split()
    pred = "measure C4 quarter D5 quarter E4 eighth".split()
    here, there = views.note_errors(pred, true)
    assert here == {4: "pitch", 6: "rhythm"} and there == {4: "pitch", 6: "rhythm", 8: "missing"}
    assert errors_by_kind(pred, true)["missing note"] == 1
    assert views.note_errors(true, true) == ({}, {})


def test_advantages_are_those_of_the_trainer():
    zero = dict.fromkeys(TERMS, 0.0)
    found = [Breakdown({**zero, "F1": r}, {**zero, "F1": 1.0}) for r in (0.25, 0.75, 0.5, 0.5)]
    table = ET.fromstring(f"<x>{views.group_html(found, 'abcd')}</x>")
    said = [row.findall("td")[2].text for row in table.iterfind("*/tbody/tr")]
    expected = advantages(np.array([[b.total for b in found]]))[0]  # the trainer's
    assert [float(s.replace("−", "-")) for s in said] == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize(
    "text, message",
    [
        ("measure C4 quarter nonsense", "unknown LMX token"),
        ("measure C4 quarter\n\nmeasure D4 quarter", "2 lines between empty rows"),
        ("", "0 lines"),
        ("C4 quarter", "no measure"),
        ("measure " + "C4 quarter " * 600, "at most 1024"),
    ],
)
def test_a_wrong_correction_is_one_line(transcriber, sheet, text, message):
    with pytest.raises(ValueError, match=message) as e:
        views.with_lmx(transcriber, sheet, text)
    assert "\n" not in str(e.value)


def test_a_corrected_score_keeps_its_doubts(transcriber, sheet, tmp_path):
    xml = ET.tostring(sheet.score, encoding="unicode")
    edited = views.with_musicxml(transcriber, sheet, xml.replace("<step>A</step>", "<step>B</step>", 1))
    assert edited.lmx != sheet.lmx and len(views.doubts(edited)) == len(views.doubts(sheet))
    assert b"<step>B</step>" in edited.save(tmp_path / "x.musicxml").read_bytes()
    assert edited.save(tmp_path / "x.pdf").read_bytes() != sheet.save(tmp_path / "y.pdf").read_bytes()
    for text in ("", "<score-partwise>", "<!DOCTYPE a [<!ENTITY b 'c'>]><score-partwise>&b;</score-partwise>"):
        with pytest.raises(ValueError) as e:
            views.with_musicxml(transcriber, sheet, text)
        assert "\n" not in str(e.value)


def test_looks_fit_into_a_page(sheet):
    seen = sheet.lines[0]
    shown = ET.fromstring(views.attention_html(seen.img, seen.look))
    data = json.loads(shown.get("data-gaze"))
    cells = seen.look.attention.shape[1] * seen.look.attention.shape[2]
    assert len(data["maps"]) == len(data["tokens"]) == len(seen.look.tokens)
    assert all(0 <= i < cells and 0.02 <= p <= 1 for m in data["maps"] for i, p in m)


def test_no_string_breaks_out(sheet):
    for text in HOSTILE:
        pieces = [
            views.hint_html("error", text),
            views.sheet_html(views.sheet_svg(sheet), text, sounds=[text]),
            views.token_diff_html(["measure", text], [text, "measure"]),
            views.panels_html({text: np.zeros((40, 40), np.uint8)}),
        ]
        shown = ET.fromstring(f"<div>{''.join(re.sub(r'^<[?].*?[?]>', '', p) for p in pieces)}</div>")
        assert not {"script", "img"} & {e.tag for e in shown.iter() if e.get("src") == "x" or e.tag == "script"}
        assert not any(k.startswith("on") for e in shown.iter() for k in e.keys())


def test_errors_of_several_parts_are_added_up():
    one, two = ["measure", "C4", "whole"], ["measure", "D4", "half", "D4", "half"]
    errors, engraved, by_token = views.compared_html([one, two], [one, [*two[:-1], "quarter"]])
    assert "12.5 %" in errors and "1 edit for 8 tokens" in errors
    assert engraved.count("<h3>Part ") == by_token.count("<h3>Part ") == 2 and engraved.count('class="sheet') == 4
    alone = views.compared_html([one], [one])
    assert "<h3>" not in "".join(alone) and "There is nothing to correct" in alone[0]
    assert views.compared_html([], [])[1:] == ("", "")  # no part on either side
