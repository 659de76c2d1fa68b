"""Metrics: every figure worked out by hand once, and what must hold for any reading."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitomr.notation.lmx import VOCABULARY, encode, linearise
from vitomr.notation.metrics import (
    ERROR_TYPES,
    METRICS,
    NOTE_KEYS,
    NOTE_KINDS,
    TOKEN_MODES,
    Overlap,
    align_bars,
    bars_that_add_up,
    errors_by_kind,
    mcr_counts,
    mcr_of_scores,
    micro_rate,
    note_f1,
    note_overlap,
    notes_of,
    summarise,
    symbol_error_rate,
    token_distance,
    token_f1,
    token_overlap,
)
from vitomr.notation.score import ScoreError, drop_dangling

MUSICAL = ["measure", "backup", "rest", "rest:measure", "chord", "C4", "D5", "quarter", "half", "tied:start", "sharp"]
any_tokens = st.lists(st.sampled_from([*VOCABULARY, *MUSICAL * 12, "not a token"]), max_size=60)


# tokens


def test_symbol_error_rate():
    true = "measure C4 half dot".split()
    assert symbol_error_rate(true, true) == 0
    assert token_distance("measure C4 quarter".split(), true) == 2
    assert symbol_error_rate("measure C4 quarter".split(), true) == 2 / 4
    assert symbol_error_rate([], true) == 1 and symbol_error_rate(true * 3, true) == 2
    assert symbol_error_rate(encode(true)[1:], encode(true)) == 1 / 4


@pytest.mark.parametrize(
    ("pred", "aligned", "positional", "bag"),
    [
        ("abcd", 4, 4, 4),
        ("bcd", 3, 0, 3),
        ("xbcd", 3, 3, 3),
        ("dcba", 1, 0, 4),
        ("aabbccdd", 4, 1, 4),
        ("", 0, 0, 0),
    ],
)
def test_token_f1(pred, aligned, positional, bag):
    for mode, matches in (("aligned", aligned), ("positional", positional), ("bag", bag)):
        assert token_overlap(list(pred), list("abcd"), mode) == Overlap(matches, len(pred), 4)
        assert token_f1(list(pred), list("abcd"), mode) == 2 * matches / (len(pred) + 4)
    assert token_f1([], []) == 1


def test_unknown_modes_name_the_valid_ones():
    with pytest.raises(ValueError, match="aligned, positional, bag"):
        token_f1([], [], "exact")
    with pytest.raises(ValueError, match="pitch, value, onset, duration"):
        note_f1([], [], "colour")


# the notes of a sequence


def sounding(tokens: str) -> list[int]:
    return [n.alter for n in notes_of(tokens.split())]


@pytest.mark.parametrize(
    ("tokens", "alters"),
    [
        ("measure key:fifths:2 F4 quarter C5 quarter G4 quarter", [1, 1, 0]),
        ("measure key:fifths:-3 B4 quarter E5 quarter A3 quarter D4 quarter", [-1, -1, -1, 0]),
        ("measure F4 quarter sharp F4 quarter measure F4 quarter", [1, 1, 0]),
        ("measure F4 quarter sharp F5 quarter", [1, 0]),
        ("measure F4 quarter sharp staff:1 backup quarter F4 quarter staff:2", [1, 0]),
        ("measure F4 half voice:1 backup half F4 voice:2 quarter F4 quarter natural F4 quarter sharp", [0, 0, 0, 1]),
        ("measure rest quarter F4 quarter backup half F4 quarter F4 quarter sharp", [0, 1, 1]),
        ("measure F4 quarter sharp tied:start measure F4 quarter tied:stop F4 quarter", [1, 1, 0]),
        ("measure F4 quarter tied:start measure F4 quarter sharp tied:stop", [0, 1]),
        ("measure key:fifths:1 F4 half natural grace F4 eighth sharp F4 half", [0, 1, 1]),
        ("measure F4 half grace F4 eighth F4 half sharp", [0, 0, 1]),
        ("measure F4 half flat-flat chord G4 half double-sharp", [-2, 2]),
        ("measure key:fifths:1 F4 half measure key:fifths:-1 F4 quarter B4 quarter", [1, 0, -1]),
    ],
)
def test_pitches_follow_from_the_printed_signs(tokens, alters):
    assert sounding(tokens) == alters


def test_notes_have_their_time_and_key_number():
    tokens = "measure C4 half 3in2 rest half 3in2 E4 half 3in2 sharp measure rest quarter B3 quarter flat"
    notes = notes_of(tokens.split())
    assert [(n.event.bar, n.onset, n.pitch, n.midi) for n in notes] == [
        (0, 0, ("C4", 0), 60), (0, Fraction(8, 3), ("E4", 1), 65), (1, 1, ("B3", -1), 58)
    ]  # fmt: skip


def test_chords_and_grace_notes_share_an_onset():
    notes = notes_of("measure C4 quarter grace D4 eighth E4 half chord G4 half A4 quarter".split())
    assert [(n.event.kind, n.onset) for n in notes] == [("C4", 0), ("D4", 1), ("E4", 1), ("G4", 1), ("A4", 3)]
    assert [n.event.length == 0 for n in notes] == [False, True, False, False, False]


def test_pitches_of_real_music(excerpts, piano):
    for part in [*excerpts, piano]:
        drop_dangling(part)
        pitches = [
            (m, e.findtext("step") + e.findtext("octave"), int(e.findtext("alter", "0")))
            for m, measure in enumerate(part.iterfind("measure"))
            for e in measure.iter("pitch")
        ]
        found = [(n.event.bar, *n.pitch) for n in notes_of(linearise(part).tokens)]
        assert Counter(found) == Counter(pitches)


# note F1

FOUR = "measure C4 half D4 half measure E4 quarter F4 half dot".split()


@pytest.mark.parametrize(
    ("pred", "n", "matches"),
    [
        ("measure C4 half D4 half measure E4 quarter F4 half dot", 4, (4, 4, 4)),
        ("measure C4 half D5 half measure E4 quarter F4 half dot", 4, (3, 3, 3)),
        ("measure C4 half D4 half measure E4 half F4 half", 4, (4, 3, 2)),
        ("measure C4 half D4 half sharp measure E4 quarter F4 half dot", 4, (3, 3, 3)),
        ("measure E4 quarter F4 half dot", 2, (2, 2, 2)),
        ("measure G4 whole measure C4 half D4 half measure E4 quarter F4 half dot", 5, (4, 4, 4)),
        ("measure E4 quarter F4 half dot measure C4 half D4 half", 4, (2, 2, 2)),
        ("measure C4 half D4 half E4 quarter F4 half dot", 4, (2, 2, 2)),
        ("measure measure", 0, (0, 0, 0)),
        ("", 0, (0, 0, 0)),
    ],
)
def test_note_f1(pred, n, matches):
    for by, m in zip(("pitch", "onset", "duration"), matches, strict=True):
        assert note_overlap(pred.split(), FOUR, by) == Overlap(m, n, 4)
        assert note_f1(pred.split(), FOUR, by) == 2 * m / (n + 4)
        assert note_f1(notes_of(pred.split()), notes_of(FOUR), by) == 2 * m / (n + 4)


def test_notes_that_repeat_are_counted_as_often_as_they_are_there():
    one, twice = "measure C4 quarter".split(), "measure C4 quarter chord C4 quarter".split()
    assert note_overlap(twice, one) == note_overlap(twice, one, "pitch") == Overlap(1, 2, 1)
    assert note_overlap(twice, twice) == Overlap(2, 2, 2)


def test_value_forgives_a_shift():
    pred = "measure C4 half dot D4 half measure E4 quarter F4 half dot".split()
    assert [note_overlap(pred, FOUR, by).matches for by in ("pitch", "value", "onset", "duration")] == [4, 3, 3, 2]


def test_a_tie_written_out_counts_as_two_notes():
    tied, plain = "measure C4 half tied:start C4 half tied:stop".split(), "measure C4 whole".split()
    assert note_overlap(tied, plain) == Overlap(0, 2, 1) and note_overlap(tied, plain, "onset") == Overlap(1, 2, 1)


def test_bars_are_aligned_in_order():
    a, b, c, d = (Counter(x) for x in ("aaa", "bb", "cc", "dd"))
    assert align_bars([a, b, c], [a, b, c]) == [(0, 0), (1, 1), (2, 2)]
    assert align_bars([a, c], [a, b, c]) == [(0, 0), (None, 1), (1, 2)]
    assert align_bars([a, b, c], [b, c]) == [(0, None), (1, 0), (2, 1)]
    assert align_bars([a, d, c], [a, b, c]) == [(0, 0), (1, 1), (2, 2)], "a misread bar is one bar, not two"
    assert align_bars([b, a], [a, b]) == [(0, None), (1, 0), (None, 1)], "the larger match wins"
    assert align_bars([], [a]) == [(None, 0)] and align_bars([], []) == []


def test_nothing_equals_nothing():
    assert note_f1([], []) == 1 and note_f1([], ["measure", "rest", "whole"]) == 1
    assert note_f1([], FOUR) == note_f1(FOUR, []) == 0


@settings(max_examples=100, deadline=None)
@given(any_tokens, any_tokens)
def test_what_holds_for_any_two_sequences(pred, true):
    f1 = {by: note_f1(pred, true, by) for by in NOTE_KEYS}
    for finer in ("onset", "value"):
        assert 1 >= f1["pitch"] >= f1[finer] >= f1["duration"] >= 0, "the more must agree, the less does"
    assert f1 == {by: note_f1(true, pred, by) for by in NOTE_KEYS}
    aligned, positional, bag = (token_f1(pred, true, mode) for mode in TOKEN_MODES)
    assert 0 <= positional <= aligned <= bag <= 1
    assert note_f1(pred, pred) == token_f1(pred, pred) == 1
    kinds = errors_by_kind(pred, true)
    assert kinds.keys() <= set(ERROR_TYPES) and all(n > 0 for n in kinds.values())
    assert errors_by_kind(pred, pred) == {}


# bars, MCR


def test_bars_that_add_up():
    assert bars_that_add_up(FOUR) == (2, 2)
    assert bars_that_add_up("measure C4 whole measure C4 half measure C4 whole".split()) == (2, 3)
    assert bars_that_add_up(["measure"] * 4) == (0, 4) and bars_that_add_up([]) == (0, 0)


@pytest.mark.parametrize(
    ("pred", "cost", "whole"),
    [
        ("measure time beats:4 beat-type:4 C4 half D4 half", 0, 2 * 1 + 2 * 2),
        ("measure time beats:4 beat-type:4 C4 half E4 half", 1, 2 * 1 + 2 * 2),  # one pitch
        ("measure time beats:4 beat-type:4 C4 half D4 quarter E4 quarter", 2, 3 + 2 * 2),  # one length, one to delete
        ("measure time beats:4 beat-type:4 C4 half D4 half measure E4 whole", 1, 3 * 1 + 2 * 2),  # one to delete
        ("", 4, 2 * 2),  # two to enter
    ],
)
def test_mcr_by_hand(pred, cost, whole):
    assert mcr_counts(pred.split(), "measure time beats:4 beat-type:4 C4 half D4 half".split()) == (cost, whole)


def test_mcr_reads_kern_and_says_what_it_cannot_read():
    kern = "**kern\n*clefG2\n*M4/4\n=1\n2c\n2d\n==\n*-\n"
    assert mcr_of_scores(kern, kern) == (0, 6)
    with pytest.raises(ScoreError, match="no notes in the reference"):
        mcr_of_scores(kern, "hello")
    with pytest.raises(ScoreError, match="the prediction is not well-formed") as e:
        mcr_of_scores('<?xml version="1.0"?><score-partwise><part>', kern)
    assert "\n" not in str(e.value)


# a test set


def test_a_rate_is_micro_averaged():
    rate = micro_rate([1, 0, 5], [10, 10, 80])
    assert rate.value == 6 / 100 and rate.low <= rate.value <= rate.high and rate.n == 3
    assert micro_rate([2], [8]) == micro_rate([2, 2], [8, 8]).__class__(0.25, 0.25, 0.25, 1)
    for errors, sizes in (([], []), ([1], [1, 2]), ([0], [0])):
        with pytest.raises(ValueError, match="pieces"):
            micro_rate(errors, sizes)


def test_a_test_set_in_one_table():
    lost = FOUR[:5]
    rates = summarise([(FOUR, FOUR), (lost, FOUR)], METRICS | {"half": lambda pred, true: (1, 2)})
    assert list(rates) == [*METRICS, "half"]
    values = {name: rate.value for name, rate in rates.items()}
    assert values["SER"] == 6 / 22 and values["exactly right"] == 1 / 2 and values["half"] == 1 / 2
    assert values["note F1, pitch"] == values["note F1, pitch, onset and duration"] == 2 * (4 + 2) / (8 + 6)
    assert values["bars that add up"] == 1 and all(rate.n == 2 for rate in rates.values())
    with pytest.raises(ValueError, match="0 pieces"):
        summarise([])


# kinds of error

TRUE = (
    "measure key:fifths:1 clef:G2 staff:1 clef:F4 staff:2 time beats:4 beat-type:4"
    " G4 voice:1 quarter stem:up staff:1 A4 eighth sharp beam:begin B4 eighth beam:end C5 half stem:down tied:start"
    " backup whole G2 voice:5 whole staff:2 fermata"
    " measure C5 voice:1 half stem:down staff:1 tied:stop D5 quarter 3in2 tuplet:start E5 quarter 3in2"
    " F5 quarter 3in2 tuplet:stop backup whole rest voice:5 rest:measure staff:2"
)


@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        ("A4", "B4", {"pitch": 1}),
        ("eighth sharp", "eighth", {"accidental": 1}),
        ("eighth sharp", "eighth natural", {"accidental": 1}),
        ("C5 half", "C5 half dot", {"rhythm": 1}),
        ("B4 eighth", "B4 quarter", {"rhythm": 1}),
        ("D5 quarter 3in2", "D5 quarter", {"rhythm": 1}),
        ("B4 eighth beam", "grace B4 eighth beam", {"rhythm": 1}),
        ("G2 voice:5", "G2 voice:6", {"voice": 1}),
        ("G4 voice:1", "G4 voice:2", {"voice": 4}),  # it holds for all four notes of the run
        ("rest:measure staff:2", "rest:measure staff:1", {"staff": 1}),
        ("half stem:down tied:start", "half tied:start", {"stem": 1}),
        ("tied:stop", "", {"tie": 1}),
        ("beam:begin", "", {"beam": 1}),
        ("tuplet:start", "", {"tuplet": 1}),
        ("fermata", "accent", {"marks": 1}),
        ("clef:F4", "clef:C4", {"clef": 1}),
        ("clef:F4 staff:2", "", {"clef": 1}),
        ("key:fifths:1", "key:fifths:2", {"key": 1}),
        ("beats:4 ", "beats:3 ", {"time": 1}),
        ("time beats:4 beat-type:4", "", {"time": 1}),
        ("D5 quarter 3in2 tuplet:start", "", {"missing note": 1}),  # though the backup is now too long
        ("E5 quarter", "A5 half", {"missing note": 1, "extra note": 1}),
        ("C5 half stem", "E4 half C5 half stem", {"extra note": 1}),
        ("G2 voice:5 whole", "rest voice:5 whole", {"missing note": 1, "extra note": 1}),
        ("backup whole G2", "backup half backup half G2", {"voice": 2}),
        ("backup whole rest", "rest", {"voice": 1}),
    ],
)
def test_each_change_is_counted_as_its_kind(old, new, kinds):
    assert TRUE.count(old) >= 1
    assert errors_by_kind(TRUE.replace(old, new, 1).split(), TRUE.split()) == kinds


def test_bars_missing_and_extra():
    one, two = TRUE.split(" measure")[0].split(), TRUE.split()
    assert errors_by_kind(one, two) == {"missing bar": 1, "missing note": 5, "voice": 1}
    assert errors_by_kind(two, one) == {"extra bar": 1, "extra note": 5, "voice": 1}


def test_kinds_add_up_over_pieces():
    one = errors_by_kind(TRUE.replace("A4", "B4").split(), TRUE.split())
    assert one + one == {"pitch": 2}
    assert set(NOTE_KINDS) < set(ERROR_TYPES)


def test_true_music_has_no_errors_of_any_kind(excerpts, piano):
    for part in [*excerpts[:12], piano]:
        tokens = linearise(part).tokens
        assert errors_by_kind(tokens, tokens) == {} and note_f1(tokens, tokens) == 1
