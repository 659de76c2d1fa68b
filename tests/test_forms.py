"""Long bars and beams between the staves: the music is that of the bars they were made of, by music21's reading."""

import copy
import xml.etree.ElementTree as ET
from fractions import Fraction

import music21
import numpy as np
import pytest

from vitomr.data.corpora import open_corpus
from vitomr.data.forms import beams_across, long_bars
from vitomr.data.synthesis import MIXES, Mix, song_samples
from vitomr.notation.analysis import analyse
from vitomr.notation.lmx import decode, linearise
from vitomr.notation.score import ScoreError, as_score, cut_excerpt, header_states, parts

NAMES = ("schumann_clara/polonaise_op1n1", "schumann_clara/polonaise_op1n3", "bach/bwv10.7", "bach/bwv104.6")


@pytest.fixture(scope="module")
def songs():
    return {s.id: s for s in open_corpus("music21", split="train")}


@pytest.fixture(scope="module")
def excerpts(songs):
    "Excerpts of three bars that LMX can say, each with the state that it begins in."
    found = []
    for name in NAMES:
        whole = parts(songs[name].load())[0].element
        states = header_states(whole)
        for start in range(1, min(30, len(states) - 3)):
            piece = cut_excerpt(whole, start, 3, states=states)
            try:
                if not linearise(copy.deepcopy(piece)).complaints:
                    found.append((piece, states[start]))
            except ScoreError:
                continue
    assert len(found) > 40
    return found


def heard(part):
    "What music21 makes of an excerpt: per bar its length, and onset, pitch and length of every note."
    text = ET.tostring(as_score(copy.deepcopy(part)), encoding="unicode")
    score = music21.converter.parseData(text, format="musicxml")
    bars: dict[int, list] = {}
    lengths: dict[int, float] = {}
    for staff in score.parts:
        for k, measure in enumerate(staff.getElementsByClass("Measure")):
            lengths[k] = max(lengths.get(k, 0), float(measure.duration.quarterLength))
            for n in measure.recurse().notes:
                at = Fraction(n.getOffsetInHierarchy(measure))
                if not n.duration.isGrace:
                    bars.setdefault(k, []).extend((at, p.nameWithOctave, Fraction(n.quarterLength)) for p in n.pitches)
    return [(lengths[k], sorted(bars.get(k, []))) for k in sorted(lengths)]


def test_long_bars_hold_the_music_of_the_bars_they_are_made_of(excerpts):
    metres = set()
    for i, (piece, state) in enumerate(excerpts):
        made, rng = copy.deepcopy(piece), np.random.default_rng(i)
        try:
            new = long_bars(made, state, rng)
        except ScoreError:
            continue
        beats, unit = (int(new["time"].findtext(tag)) for tag in ("beats", "beat-type"))
        old = int(state["time"].findtext("beats"))
        metres.add(f"{beats}/{unit}")
        before, after = heard(piece), heard(made)
        n, length = -(-beats // old), Fraction(4 * beats, unit)
        want = []
        for k in range(n):
            shift = k * Fraction(4 * old, unit)
            want += [(at + shift, p, q) for at, p, q in before[k][1] if at + shift < length]
        assert after[0] == (float(length), sorted(want)), (i, set(after[0][1]) ^ set(want))
        assert len(after) == len(before) // n and not linearise(made).complaints
        assert int(state["time"].findtext("beats")) == old  # the given state is another excerpt's, too
    assert {"7/4", "9/4"} & metres and len(metres) >= 3, metres


def test_what_cannot_be_joined_is_refused_and_left(excerpts):
    piece, state = excerpts[0]
    for change in (
        lambda p: p.remove(p.findall("measure")[1]) or p.remove(p.findall("measure")[1]),  # one bar
        lambda p: p.find("measure").remove(p.find("measure/note")),  # a bar that is not full
        lambda p: ET.SubElement(ET.SubElement(p.findall("measure")[1], "attributes"), "time"),
    ):
        broken = copy.deepcopy(piece)
        change(broken)
        before = ET.tostring(broken)
        with pytest.raises(ScoreError):
            long_bars(broken, state, np.random.default_rng(0))
        assert ET.tostring(broken) == before
    with pytest.raises(ScoreError, match="without a metre"):
        long_bars(copy.deepcopy(piece), {k: v for k, v in state.items() if k != "time"}, np.random.default_rng(0))


def test_beams_cross_and_one_hand_plays(excerpts):
    crossed = 0
    for i, (piece, _) in enumerate(excerpts):
        made, rng = copy.deepcopy(piece), np.random.default_rng(i)
        try:
            n = beams_across(made, rng, share=0.8)
        except ScoreError:
            assert ET.tostring(made) == ET.tostring(piece)
            continue
        crossed += n
        names = lambda p: [(m.get("number"), x.findtext("voice"), x.findtext("pitch/step"), x.findtext("duration"))
                           for m in p.iterfind("measure") for x in m.iterfind("note")]  # fmt: skip
        left = names(piece)
        for name in names(made):  # nothing is new, and what is left is in its order
            del left[: left.index(name) + 1]
        for measure in made.iterfind("measure"):
            groups: dict[str, set] = {}
            stems: dict[str, set] = {}
            inside = False
            for note in measure.iterfind("note"):
                beam = note.findtext("beam[@number='1']")
                inside = beam in ("begin", "continue", "end") or (inside and note.find("chord") is not None)
                if beam == "begin":
                    groups, stems = {}, {}
                if inside:
                    groups.setdefault("staves", set()).add(note.findtext("staff"))
                    stems.setdefault(note.findtext("staff"), set()).add(note.findtext("stem"))
                if beam == "end" and len(groups["staves"]) == 2:
                    assert stems["1"] == {"down"} and stems["2"] == {"up"}
        line = linearise(made)
        assert not line.complaints and not analyse(line.tokens).minor
    assert crossed > 20


def test_a_voice_alone_has_no_beams_between_staves(songs):
    voice = cut_excerpt(parts(songs["bach/bwv10.7"].load())[0].element, 1, 2)
    before = ET.tostring(voice)
    with pytest.raises(ScoreError, match="two staves"):
        beams_across(voice, np.random.default_rng(0))
    assert ET.tostring(voice) == before


def test_the_wide_mix_has_both_and_the_others_have_none(songs):
    def tokens(mix, seed):
        return [decode(s.ids) for name in NAMES for s in song_samples(songs[name], np.random.default_rng(seed), mix)]

    wide = [t for seed in range(3) for t in tokens(Mix(long=0.8, crossed=0.8, per_song=6), seed)]
    assert any(f"beats:{n}" in t for t in wide for n in (7, 9, 12))
    assert any(("staff:2" in t) and any("staff:1" in b for b in " ".join(t).split("beam:begin")[1:]) for t in wide)
    assert MIXES["wide"].long and MIXES["wide"].crossed and len(MIXES["wide"].bars) == 8
    assert tokens(Mix(), 0) == tokens(Mix(long=0, crossed=0), 0)
    for mix in (Mix(), MIXES["as-written"]):
        assert not mix.long and not mix.crossed and len(mix.bars) == 6
