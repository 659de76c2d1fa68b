"""Scores, LMX and engraving: round trips, errors counted, nothing that raises, nothing broken that is written."""

import io
import subprocess
import sys
import xml.etree.ElementTree as ET
import zipfile
from fractions import Fraction

import music21
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmx.linearization.Linearizer import Linearizer
from lmx.linearization.vocabulary import ALL_TOKENS

from vitomr.notation.analysis import TICKS, analyse
from vitomr.notation.engrave import engrave, midi_bytes
from vitomr.notation.fonts import FONTS
from vitomr.notation.lmx import BOS_ID, EOS_ID, N_PLAIN, PAD_ID, VOCABULARY, decode, encode, linearise
from vitomr.notation.musicxml import delinearise, to_musicxml
from vitomr.notation.score import (
    MAX_BYTES,
    ScoreError,
    cut_excerpt,
    join_gaps,
    musicxml_bytes,
    mxl_bytes,
    parts,
    read_score,
    root_of,
    unzip_mxl,
)

NOTE_ORDER = [
    "grace", "chord", "pitch", "rest", "duration", "tie", "voice", "type", "dot", "accidental",
    "time-modification", "stem", "staff", "beam", "notations",
]  # fmt: skip
ATTRIBUTES_ORDER = ["divisions", "key", "time", "staves", "clef"]


def in_order(children: list[str], order: list[str]) -> bool:
    places = [order.index(c) for c in children]
    return places == sorted(places)


def check_valid(score: ET.Element) -> None:
    "The schema's order of elements, durations present, voices that never run before the bar's start."
    for measure in score.iterfind("part/measure"):
        assert measure.get("number", "").isdigit()
        onset = 0
        for e in measure:
            if e.tag == "note":
                tags = [c.tag for c in e]
                assert in_order(tags, NOTE_ORDER), tags
                assert sum(t in ("pitch", "rest") for t in tags) == 1
                assert ("duration" in tags) != ("grace" in tags)
                if "chord" not in tags:
                    onset += int(e.findtext("duration", "0"))
            elif e.tag == "backup":
                onset -= int(e.findtext("duration"))
            elif e.tag == "forward":
                onset += int(e.findtext("duration"))
            elif e.tag == "attributes":
                assert in_order([c.tag for c in e], ATTRIBUTES_ORDER)
            assert onset >= 0
    assert score.find("part/measure/attributes/divisions") is not None


def opens(score: ET.Element) -> None:
    "Both programs that users would open it with load it."
    check_valid(score)
    stream = music21.converter.parseData(musicxml_bytes(score).decode(), format="musicxml")
    assert 1 <= len(stream.parts) <= 3  # one a staff
    assert engrave(score).img.min() < 128


# vocabulary


def test_vocabulary_is_the_reference_behind_three_control_tokens():
    assert VOCABULARY[:N_PLAIN] == ("<bos>", "<pad>", "<eos>", *ALL_TOKENS) and (BOS_ID, PAD_ID, EOS_ID) == (0, 1, 2)


def test_unknown_tokens_and_ids_are_named():
    with pytest.raises(ValueError, match="'C44'"):
        encode(["C4", "C44"])
    with pytest.raises(ValueError, match=str(len(VOCABULARY))):
        decode([len(VOCABULARY)])
    with pytest.raises(ValueError, match="-1"):
        decode([-1])


# round trips


def test_tokens_equal_the_reference_linearizer(excerpts, piano):
    for part in [*excerpts, piano]:
        reference = Linearizer()
        reference.process_part(part)
        assert linearise(part).tokens == reference.output_tokens


def test_round_trip_gives_the_same_tokens(excerpts, piano):
    for part in [*excerpts, piano]:
        tokens = linearise(part).tokens
        score = to_musicxml(tokens)
        assert linearise(score.find("part")).tokens == tokens
        assert delinearise(encode(tokens)).find("measure") is not None


def test_true_music_has_no_errors(excerpts, piano):
    for part in [*excerpts, piano]:
        found = analyse(linearise(part).tokens)
        assert found.minor == [] and found.fatal is None and found.tokens == linearise(part).tokens


def test_true_music_opens(excerpts, piano):
    for part in [*excerpts[:6], piano]:
        opens(to_musicxml(linearise(part).tokens))


def test_pitches_survive(piano):
    "Alterations are not tokens: they follow from key and accidentals."
    again = to_musicxml(linearise(piano).tokens)
    sounding = lambda root: [tuple(p.findtext(t) for t in ("step", "alter", "octave")) for p in root.iter("pitch")]
    assert sounding(again) == sounding(piano)


def test_every_token_knows_its_note(piano):
    part = cut_excerpt(piano, 0, 2)
    line = linearise(part)
    names = [n.get("id") for n in part.iter("note")]
    assert [n for i, n in enumerate(line.note) if n and n != line.note[i - 1]] == names
    assert line.note[line.tokens.index("measure")] is None


# errors


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("unknown-token", "measure C4 quarter wibble"),
        ("dangling-prefix", "measure C4 quarter D4"),
        ("dangling-suffix", "measure dot C4 quarter"),
        ("repeated-suffix", "measure C4 quarter stem:up stem:up"),
        ("missing-beats", "measure time beat-type:4 C4 whole"),
        ("missing-beat-type", "measure time beats:4 C4 whole"),
        ("orphan-chord", "measure chord C4 quarter"),
        ("orphan-chord", "measure rest quarter chord C4 quarter"),
        ("kindless-note", "measure voice:1 quarter"),
        ("backup-past-start", "measure C4 quarter backup half D4 quarter"),
        ("unclosed-tie", "measure C4 quarter tied:start D4 quarter"),
        ("unclosed-tie", "measure D4 quarter C4 quarter tied:stop"),
        ("unclosed-tuplet", "measure C4 half 3in2 tuplet:start C4 half 3in2 C4 half 3in2"),
        ("unclosed-beam", "measure C4 eighth beam:begin D4 eighth"),
        ("unfilled-measure", "measure time beats:4 beat-type:4 C4 whole measure C4 half"),
        ("unfilled-measure", "measure time beats:2 beat-type:4 C4 whole"),
        ("before-first-measure", "C4 measure D4 quarter"),
    ],
)
def test_each_kind_of_error_is_counted_once_and_mended(kind, tokens):
    found = analyse(tokens.split())
    assert [e.kind for e in found.minor] == [kind] and found.fatal is None
    opens(to_musicxml(tokens.split()))


def test_fatal_errors():
    assert analyse([]).fatal == "empty"
    assert analyse(["C4", "quarter"]).fatal == "no-measure"
    for tokens in ([], ["C4"]):
        opens(to_musicxml(tokens))


@pytest.mark.parametrize(
    ("tokens", "onsets"),
    [
        # the right hand a quarter short: the backup would pass the bar line
        ("measure time beats:3 beat-type:4 C5 half staff:1 backup half backup quarter C3 half dot staff:2", [0, 0]),
        # a quarter long: the backup falls short of it
        ("measure time beats:2 beat-type:4 C5 half staff:1 D5 quarter backup half C3 half staff:2", [0, 2, 0]),
        # no signature: the bar before says how long a bar is
        ("measure C5 half measure C5 half staff:1 D5 quarter backup half C3 half staff:2", [0, 0, 2, 0]),
        # a right hand that ends where it should: a left hand may begin late
        ("measure time beats:4 beat-type:4 C5 whole staff:1 backup half C3 half staff:2", [0, 2]),
        # a second voice of the right hand may, too
        ("measure time beats:2 beat-type:4 C5 half staff:1 D5 quarter backup half C4 half voice:2 staff:1", [0, 2, 1]),
        # and so may a second voice of the left
        ("measure time beats:2 beat-type:4 C3 half staff:2 C3 quarter backup half E3 half staff:2", [0, 2, 1]),
    ],
)
def test_a_wrong_length_in_the_right_hand_leaves_the_left_hand_at_the_bar_line(tokens, onsets):
    notes = [e for e in analyse(tokens.split()).events if e.staff or e.voice or e.kind in ("C5", "D5")]
    assert [e.onset / TICKS for e in notes] == onsets


def test_pick_up_is_no_error():
    tokens = "measure time beats:3 beat-type:4 G4 quarter measure C5 half dot".split()
    assert analyse(tokens).minor == []
    assert to_musicxml(tokens).find("part/measure").get("implicit") == "yes"


def test_short_bars_are_filled_with_marked_rests():
    score = to_musicxml("measure time beats:4 beat-type:4 C4 whole measure D4 quarter dot measure E4 whole".split())
    bars = score.findall("part/measure")
    divisions = int(score.findtext("part/measure/attributes/divisions"))
    lengths = [Fraction(sum(int(n.findtext("duration")) for n in b.iterfind("note")), divisions) for b in bars]
    assert lengths == [4, 4, 4]
    assert [n.get("color") is not None for n in bars[1].iterfind("note")] == [False, True, True]


some_tokens = st.lists(
    st.sampled_from(
        [*VOCABULARY, *["measure", "backup", "rest:measure", "chord", "C4", "quarter"] * 12, "not a token"]
    ),
    max_size=70,
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(some_tokens)
def test_any_tokens_give_a_score_that_opens(tokens):
    found = analyse(tokens)
    assert analyse(found.tokens).fatal is None
    opens(to_musicxml(tokens))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-5, 400), max_size=60))
def test_any_ids_give_a_valid_score(ids):
    check_valid(to_musicxml(ids))


@settings(max_examples=60, deadline=None)
@given(some_tokens)
def test_repair_is_stable(tokens):
    "What was repaired needs no further repair of its grammar."
    once = analyse(tokens).tokens
    assert analyse(once).tokens == once


# reading


def test_mxl_and_musicxml_say_the_same(piano, tmp_path):
    score = to_musicxml(linearise(piano).tokens)
    for name, data in (("a.mxl", mxl_bytes(score)), ("a.musicxml", musicxml_bytes(score))):
        (tmp_path / name).write_bytes(data)
    a, b = (parts(read_score(tmp_path / n))[0] for n in ("a.mxl", "a.musicxml"))
    assert linearise(a.element).tokens == linearise(b.element).tokens and a.n_staves == 2


def test_other_formats_go_through_music21(tmp_path):
    (tmp_path / "tune.abc").write_text("X:1\nT:a\nM:4/4\nL:1/4\nK:G\nGABc|d4|\n")
    assert "G4" in linearise(parts(read_score(tmp_path / "tune.abc"))[0].element, strict=False).tokens


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        (
            "bomb.xml",
            b'<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;">]><score-partwise>&c;</score-partwise>',
            "entities",
        ),
        (
            "outside.xml",
            b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]><score-partwise>&b;</score-partwise>',
            "entities",
        ),
        ("cut.musicxml", b"<score-partwise><part>", "not well-formed"),
        ("empty.musicxml", b"", "not well-formed"),
        ("other.xml", b"<html/>", "score-partwise"),
        ("broken.mxl", b"PK\x03\x04 nothing", "archive"),
    ],
)
def test_bad_files_get_one_line(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ScoreError, match=says) as e:
        read_score(tmp_path / name)
    assert "\n" not in str(e.value) and name in str(e.value)


def test_a_zip_that_grows_is_bounded():
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("score.xml", b" " * (MAX_BYTES + 10))
    with pytest.raises(ScoreError, match="at most"):
        root_of(box.getvalue(), "big.mxl")
    assert len(unzip_mxl(box.getvalue())) == MAX_BYTES + 1


def test_missing_file_names_itself(tmp_path):
    with pytest.raises(ScoreError, match="nowhere.mxl"):
        read_score(tmp_path / "nowhere.mxl")


# excerpts


def test_excerpts_restate_key_clefs_and_staves_but_not_time(piano):
    head = cut_excerpt(piano, 1, 1).find("measure/attributes")
    assert [e.tag for e in head] == ["divisions", "key", "staves", "clef", "clef"]
    assert head.findtext("key/fifths") == "-2" and [c.get("number") for c in head.iterfind("clef")] == ["1", "2"]


def test_ties_across_the_cut_leave_the_excerpt(piano):
    whole = linearise(cut_excerpt(piano, 0, 2)).tokens
    assert "tied:start" in whole and "tied:stop" in whole
    for start in (0, 1):
        assert not {"tied:start", "tied:stop"} & set(linearise(cut_excerpt(piano, start, 1)).tokens)
    assert len(piano.findall(".//tied")) == 2, "the part itself is left alone"


def test_cutting_past_the_end_says_so(piano):
    with pytest.raises(ScoreError, match="has 2"):
        cut_excerpt(piano, 1, 2)


def gaps_of(*ways):
    "One bar, its second voice written in so many ways: the tokens that `join_gaps` leaves of each."
    note = "<note>{}<duration>{}</duration><voice>{}</voice><type>{}</type></note>"
    pitch = "<pitch><step>{}</step><octave>4</octave></pitch>"
    first = note.format(pitch.format("C"), 4, 1, "whole")
    second = note.format(pitch.format("A"), 1, 2, "quarter")
    found = []
    for before, after in ways:
        bar = f"<attributes><divisions>1</divisions></attributes>{first}{before}{second}{after}"
        part = ET.fromstring(f"<part id='P1'><measure number='1'>{bar}</measure></part>")
        join_gaps(part)
        found.append(list(linearise(part).tokens))
    return found


def test_pauses_that_are_not_printed_are_written_one_way():
    rest = '<note print-object="no"><rest/><duration>{}</duration><voice>2</voice><type>{}</type></note>'.format
    back, on = "<backup><duration>{}</duration></backup>".format, "<forward><duration>{}</duration></forward>".format
    alike = gaps_of(
        (back(4) + rest(1, "quarter"), rest(2, "half")),
        (back(4) + on(1), on(2)),
        (back(3), ""),
        (back(2) + back(2) + on(1), rest(1, "quarter") + on(1)),
    )
    assert alike == [alike[0]] * 4
    assert alike[0] == "measure C4 voice:1 whole backup half backup quarter A4 voice:2 quarter".split()
    shown = rest(1, "quarter").replace(' print-object="no"', "")
    printed, other = gaps_of((back(4) + shown, ""), (back(4) + rest(2, "half"), ""))
    assert "rest" in printed and other != alike[0]


# engraving


@pytest.mark.parametrize("font", FONTS)
def test_every_note_and_rest_is_found_on_ink(piano, font):
    part = cut_excerpt(piano, 0, 2)
    drawn = engrave(part, font=font)
    assert set(drawn.positions) == {n.get("id") for n in part.iter("note")}
    for name, (x, y) in drawn.positions.items():
        spot = drawn.img[int(y) - 3 : int(y) + 4, int(x) - 4 : int(x) + 5]
        assert spot.size and spot.min() < 128, name


def test_heads_stand_in_order_of_pitch(piano):
    drawn = engrave(cut_excerpt(piano, 0, 1))
    at = drawn.positions
    assert abs(at["n0"][0] - at["n1"][0]) < 2 and at["n1"][1] < at["n0"][1], (
        "the chord's upper note stands above its lower one"
    )
    assert at["n0"][0] < at["n2"][0] < at["n3"][0] < at["n4"][0] and at["n5"][1] > at["n0"][1] + 40


def test_engraving_is_the_same_twice(piano):
    assert np.array_equal(engrave(piano).img, engrave(piano).img)


def test_lyrics_are_drawn_without_system_fonts(piano):
    with_text = ET.fromstring(ET.tostring(piano))
    note = with_text.find("measure/note")
    lyric = ET.SubElement(note, "lyric")
    ET.SubElement(lyric, "text").text = "Wandern"
    a, b = engrave(piano).img, engrave(with_text).img
    assert (b < 128).sum() > (a < 128).sum() + 60


def test_midi_is_a_midi_file(piano):
    data = midi_bytes(to_musicxml(linearise(piano).tokens))
    assert data[:4] == b"MThd" and len(data) > 60


def test_engraving_nonsense_says_so():
    with pytest.raises(ScoreError, match="Verovio"):
        engrave("<nothing/>")
    with pytest.raises(ScoreError, match="Leipzig"):
        engrave("<nothing/>", font="Comic")


@pytest.mark.parametrize(
    "line",
    [
        "measure C4 eighth beam:begin D4 maxima E4 eighth beam:end",
        "measure rest half tremolo:start tremolo:3 clef:F4 D4 half tremolo:stop tremolo:2",
        "measure voice:2 B6 16th beam:begin measure voice:2 C5 maxima B1 64th beam:end",  # the beam crosses a bar line
        "measure D5 eighth tuplet:start beam:begin voice:2 C4 maxima",  # and here voices
        "measure maxima C4 voice:5 16th beam:begin measure C4 maxima A5 16th beam:end",
        "measure C4 16th beam:begin D5 voice:11 maxima C4 eighth beam:end",
        "measure C4 16th beam:begin C4 16th beam:end tuplet:start C4 maxima",  # the tuplet leaves the beam
        "measure D5 maxima tremolo:start D5 maxima tremolo:stop",
    ],
)
def test_what_ends_the_engravers_process_is_left_out(line):
    "Each ended Verovio with a segmentation fault; in a process of its own, so that the tests would live on."
    code = (
        "from vitomr.notation.engrave import render_svg\nfrom vitomr.notation.musicxml import to_musicxml\n"
        f"assert 'class=\"note' in render_svg(to_musicxml({line!r}.split()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_a_beam_stays_where_a_tuplet_of_longer_notes_begins_under_it():
    line = "measure voice:1 C5 eighth beam:begin B4 eighth 3in2 beam:end tuplet:start A4 quarter 3in2 tuplet:stop"
    assert [b.text for b in to_musicxml(line.split()).iter("beam")] == ["begin", "end"]


def test_a_beam_over_a_bar_line_stays_where_it_can_be_drawn():
    line = "measure voice:1 C5 quarter voice:1 B4 eighth beam:begin measure voice:1 A4 eighth beam:end voice:1 G4 half"
    beams = [b.text for b in to_musicxml(line.split()).iter("beam")]
    assert beams == ["begin", "end"]


@pytest.mark.parametrize(
    "line",
    [
        "measure grace C4 quarter measure grace D4 quarter",  # nothing in it lasts
        "measure grace C4 quarter measure grace D4 quarter measure",
        "measure measure",
    ],
)
def test_a_line_in_which_nothing_lasts_is_a_score(line):
    part = to_musicxml(line.split()).find("part")
    assert len(part) == line.split().count("measure")
    assert int(part.findtext("measure/attributes/divisions")) >= 1


def test_divisions_stay_within_what_musicxml_allows():
    line = "measure C4 1024th 3in2 C4 512th 5in4 C4 256th 7in4 C4 128th 11in8 C4 64th 13in8".split()
    assert 1 <= int(to_musicxml(line).findtext("part/measure/attributes/divisions")) <= 16383
