"""Bars in the order of playing; music21's own expansion is the oracle."""

import random
import xml.etree.ElementTree as ET

import music21
import pytest

from vitomr.notation.engrave import midi_bytes
from vitomr.notation.repeats import MOST_BARS, Signs, playing_order, unrolled

NAMES = [f"{step}{octave}" for octave in range(2, 7) for step in "CDEFGAB"]  # a pitch of its own for each bar


def bar(number: int, left: str = "", right: str = "") -> str:
    step, octave = NAMES[number]
    head = "<attributes><divisions>1</divisions></attributes>" if number == 0 else ""
    note = f"<note><pitch><step>{step}</step><octave>{octave}</octave></pitch><duration>4</duration></note>"
    left = f'<barline location="left">{left}</barline>' if left else ""
    right = f'<barline location="right">{right}</barline>' if right else ""
    return f'<measure number="{number + 1}">{left}{head}{note}{right}</measure>'


def score(bars: list[str]) -> ET.Element:
    listed = '<part-list><score-part id="P1"><part-name/></score-part></part-list>'
    return ET.fromstring(f'<score-partwise version="4.0">{listed}<part id="P1">{"".join(bars)}</part></score-partwise>')


def heard(root: ET.Element) -> list[str]:
    return [p.findtext("step") + p.findtext("octave") for p in root.iter("pitch")]


def expanded(root: ET.Element) -> list[str]:
    parsed = music21.converter.parseData(ET.tostring(root, encoding="unicode"), format="musicxml")
    return [n.nameWithOctave for n in parsed.parts[0].expandRepeats().recurse().notes]


FORWARD, BACKWARD = '<repeat direction="forward"/>', '<repeat direction="backward"/>'


def random_bars(rng: random.Random) -> list[str]:
    "Sections played once, twice, or with two or three endings."
    bars = []
    for section in range(rng.randint(1, 3)):
        kind, n = rng.choice(["plain", "twice", "endings"]), rng.randint(1, 3)
        left = FORWARD if kind != "plain" and (section or rng.random() < 0.5) else ""
        for i in range(n):
            closes = BACKWARD if kind == "twice" and i == n - 1 else ""
            bars.append(bar(len(bars), left if i == 0 else "", closes))
        n_endings = rng.choice([2, 3]) if kind == "endings" else 0
        for k in range(1, n_endings + 1):
            end = f'<ending number="{k}" type="{"stop" if k < n_endings else "discontinue"}"/>'
            end += BACKWARD if k < n_endings else ""
            bars.append(bar(len(bars), f'<ending number="{k}" type="start"/>', end))
    return bars


@pytest.mark.parametrize("seed", range(12))
def test_bars_are_played_as_music21_plays_them(seed):
    root = score(random_bars(random.Random(seed)))
    assert heard(unrolled(root)) == expanded(root)


def test_what_is_written_out_has_no_signs_and_the_rest_stays():
    root = score([bar(0, FORWARD), bar(1, "", BACKWARD), bar(2)])
    played = unrolled(root)
    assert heard(played) == ["C2", "D2", "C2", "D2", "E2"] and not list(played.iter("repeat"))
    assert [m.findtext("attributes/divisions") for m in played.iter("measure")] == ["1"] * 5
    assert [m.get("number") for m in played.iter("measure")] == ["1", "2", "3", "4", "5"]
    assert len(list(root.iter("repeat"))) == 2  # the score given is not touched
    plain = score([bar(0), bar(1)])
    assert unrolled(plain) is plain


def test_times_and_endings_of_several_passes():
    assert playing_order([Signs(backward=True, times=3), Signs()]) == [0, 0, 0, 1]
    endings = [Signs(forward=True), Signs(backward=True, passes=(1, 2)), Signs(passes=(3,)), Signs()]
    assert playing_order(endings) == [0, 1, 0, 1, 0, 2, 3]


def test_too_many_repeats_are_told():
    with pytest.raises(ValueError, match=f"more than {MOST_BARS} bars"):
        playing_order([Signs(backward=True, times=99)] * (MOST_BARS // 98))


def test_a_midi_file_plays_repeats(tmp_path):
    root = score([bar(0, FORWARD), bar(1, "", BACKWARD), bar(2)])
    (tmp_path / "a.mid").write_bytes(midi_bytes(root))
    notes = music21.converter.parse(tmp_path / "a.mid").recurse().notes
    assert [n.pitch.name for n in notes] == ["C", "D", "C", "D", "E"]
