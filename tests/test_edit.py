"""One note changed by a click: what else belongs to it follows, and nothing more changes, as MusicXML shows."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from vitomr.notation.analysis import analyse
from vitomr.notation.edit import EDITS, EditError, Line, edit
from vitomr.notation.musicxml import to_musicxml

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LINES = {p.stem: p.read_text().split() for p in sorted(EXAMPLES.glob("*.lmx"))}
TWO_VOICES = (
    "measure time beats:2 beat-type:4 C4 voice:1 eighth stem:up staff:1 beam:begin D4 eighth beam:end E4 quarter "
    "backup half C3 voice:5 half stem:down staff:2 measure F4 voice:1 half stem:up staff:1 backup half C3 voice:5 half "
    "stem:down staff:2"
).split()


def sounding(tokens: list[str]) -> list[tuple]:
    "Bar, onset in quarters, staff, pitch or rest, alteration, and length of every note, in the order of the MusicXML."
    found, divisions = [], 1
    for bar, measure in enumerate(to_musicxml(tokens).find("part")):
        now = last = Fraction(0)
        for e in measure:
            divisions = int(e.findtext("divisions") or divisions) if e.tag == "attributes" else divisions
            length = Fraction(int(e.findtext("duration") or 0), divisions)
            if e.tag in ("backup", "forward"):
                now += length if e.tag == "forward" else -length
            elif e.tag == "note":
                at = last if e.find("chord") is not None else now
                pitch = e.findtext("pitch/step", "rest") + e.findtext("pitch/octave", "")
                found.append((bar, at, e.findtext("staff", "1"), pitch, e.findtext("pitch/alter", "0"), length))
                if e.find("chord") is None:
                    last, now = now, now + length
    return found


def at(tokens: list[str], pitch: str) -> int:
    "Position of the type of the first note of that pitch."
    start = tokens.index(pitch)
    return next(i for i in range(start, len(tokens)) if tokens[i] in ("eighth", "quarter", "half"))


@pytest.mark.parametrize("name", LINES)
def test_a_line_put_together_is_the_same_line(name):
    assert Line.of(LINES[name]).tokens == LINES[name]


def test_junk_put_together_is_the_same_junk():
    rng, vocabulary = np.random.default_rng(0), sorted({t for x in LINES.values() for t in x})
    for _ in range(200):
        junk = [str(t) for t in rng.choice(vocabulary, 40)]
        assert Line.of(junk).tokens == junk


@pytest.mark.parametrize("name", LINES)
def test_a_step_moves_one_note_and_back(name):
    tokens = LINES[name]
    note = next(n for n in Line.of(tokens).notes if n.kind != "rest" and not {"tied:start", "tied:stop"} & {*n.after})
    up, position = edit(tokens, note.event.position, "pitch", 1)
    before, after = sounding(tokens), sounding(up)
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a[:4] + a[5:] != b[:4] + b[5:]]
    ((a, b),) = changed
    steps = "CDEFGAB"
    assert 7 * int(b[3][1]) + steps.index(b[3][0]) == 7 * int(a[3][1]) + steps.index(a[3][0]) + 1
    assert edit(up, position, "pitch", -1) == (tokens, position)


def test_the_other_voice_stays_in_its_place():
    "Longer, dotted, put in, closed up: what stands on the second staff begins where it began."
    left = [n for n in sounding(TWO_VOICES) if n[2] == "2"]
    first = at(TWO_VOICES, "C4")
    changes = [("length", "half"), ("length", "16th"), ("dot", None), ("insert", None), ("chord", 2)]
    for what, value in changes:
        new, _ = edit(TWO_VOICES, first, what, value)
        assert [n for n in sounding(new) if n[2] == "2"][:2] == left, what
    rest, position = edit(TWO_VOICES, first, "delete")
    gone, _ = edit(rest, position, "delete")
    for new in (rest, gone):
        assert [n for n in sounding(new) if n[2] == "2"][:2] == left
    assert sounding(rest)[0][3] == "rest" and sounding(gone)[0][3] == "D4"


def test_beams_follow():
    new, _ = edit(TWO_VOICES, at(TWO_VOICES, "C4"), "length", "quarter")
    assert not {"beam:begin", "beam:end"} & {*new}
    new, _ = edit(TWO_VOICES, at(TWO_VOICES, "D4"), "length", "16th")
    notes = Line.of(new).notes
    assert notes[0].after.count("beam:begin") == 1 and {"beam:end", "beam:backward-hook"} <= {*notes[1].after}


def test_a_chord_loses_a_note_and_keeps_the_others():
    tokens = "measure C4 voice:1 quarter stem:up chord E4 quarter chord G4 quarter D4 quarter".split()
    new, position = edit(tokens, tokens.index("quarter"), "delete")
    assert new == "measure E4 voice:1 quarter stem:up chord G4 quarter D4 quarter".split()
    assert new[position] == "quarter" and position == 3
    assert edit(tokens, 7, "delete")[0] == "measure C4 voice:1 quarter stem:up chord G4 quarter D4 quarter".split()
    longer, _ = edit(tokens, 7, "length", "half")
    assert longer.count("half") == 3 and longer.count("quarter") == 1


def test_a_tie_has_two_ends():
    tokens = "measure C4 half D4 half measure D4 whole".split()
    tied, position = edit(tokens, 4, "tie")
    assert tied == "measure C4 half D4 half tied:start measure D4 whole tied:stop".split()
    assert edit(tied, position, "tie")[0] == tokens
    for change in (("pitch", 1), ("delete",)):
        assert "tied:stop" not in edit(tied, position, *change)[0]


def test_a_rest_becomes_a_note_of_its_clef():
    for clef, pitch in (("clef:G2", "B4"), ("clef:F4", "D3"), ("clef:C3", "C4"), ("clef:C4", "A3")):
        tokens = ["measure", clef, "rest", "quarter"]
        assert edit(tokens, 3, "pitch", 0)[0] == ["measure", clef, pitch, "quarter"]


@pytest.mark.parametrize(
    ("position", "what", "value", "says"),
    [
        (7, "louder", None, "choose from pitch"),
        (7, "pitch", "up", "whole number"),
        (7, "pitch", 69, "no pitch"),
        (7, "length", "long-ago", "unknown length"),
        (7, "accidental", "loud", "choose from sharp"),
        (7, "tie", None, "no C4 follows"),
        (0, "pitch", 1, "not read"),
    ],
)
def test_a_change_that_cannot_be_made_is_one_line(position, what, value, says):
    with pytest.raises(EditError, match=says) as e:
        edit(TWO_VOICES, position if position == 0 else at(TWO_VOICES, "C4"), what, value)
    assert "\n" not in str(e.value)


def test_many_changes_break_nothing():
    "Random changes of the examples, one after the other: no open beam, no backup past a bar's start, no stray token."
    rng = np.random.default_rng(5)
    values = {"pitch": [-3, -1, 1, 2], "length": ["half", "quarter", "eighth", "16th"], "accidental": ["sharp", "flat"]}
    never = {"unclosed-beam", "backup-past-start", "orphan-chord", "repeated-suffix"}
    never |= {"dangling-suffix", "dangling-prefix"}
    for tokens in LINES.values():
        had = Counter(e.kind for e in analyse(tokens).minor)
        for _ in range(25):
            note = rng.choice([n.event.position for n in Line.of(tokens).notes])
            what = str(rng.choice(list(EDITS)))
            value = values.get(what) and rng.choice(np.array(values[what], object))
            try:
                tokens, chosen = edit(tokens, int(note), what, value)
            except EditError:
                continue
            now = Counter(e.kind for e in analyse(tokens).minor)
            assert not {k for k in never if now[k] > had[k]}, (what, value, now - had)
            assert chosen is None or chosen < len(tokens)
