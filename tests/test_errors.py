"""The errors of a sequence: each kind counted where it is, nothing counted that music may do, nothing raised."""

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vitomr.notation.analysis import ERROR_KINDS, analyse, bar_sums
from vitomr.notation.lmx import BOS, EOS, PAD, TOKEN_ID, VOCABULARY, encode, linearise
from vitomr.notation.musicxml import to_musicxml

WRONG = [  # tokens, then kind @ position of each error
    ("measure C4 quarter wibble D4 half", "unknown-token@3"),
    ("C4 measure D4 quarter", "before-first-measure@0"),
    ("measure C4 quarter D4", "dangling-prefix@3"),
    ("measure C4 D4 quarter", "dangling-prefix@2"),
    ("measure voice:1 clef:G2 C4 quarter", "dangling-prefix@1"),
    ("measure grace rest quarter C4 quarter", "dangling-prefix@1"),
    ("measure C4 quarter voice:2 backup quarter D4 quarter", "dangling-prefix@3"),
    ("measure C4 rest:measure", "dangling-prefix@1"),
    ("measure dot C4 quarter", "dangling-suffix@1"),
    ("measure C4 dot quarter", "dangling-suffix@2"),
    ("measure clef:G2 dot C4 quarter", "dangling-suffix@2"),
    ("measure C4 quarter beats:3", "dangling-suffix@3"),
    ("measure rest rest:measure dot", "dangling-suffix@3"),
    ("measure C4 quarter stem:up stem:up", "repeated-suffix@4"),
    ("measure C4 quarter sharp flat", "repeated-suffix@4"),
    ("measure time beats:4 beats:3 beat-type:4 C4 whole", "repeated-suffix@3"),
    ("measure time beat-type:4 C4 whole", "missing-beats@1"),
    ("measure time beats:4 C4 whole", "missing-beat-type@1"),
    ("measure time C4 whole", "missing-beats@1 missing-beat-type@1"),
    ("measure chord C4 quarter", "orphan-chord@1"),
    ("measure C4 quarter rest quarter chord E4 quarter", "orphan-chord@5"),
    ("measure C4 quarter backup quarter chord E4 quarter", "orphan-chord@5"),
    ("measure voice:1 quarter", "kindless-note@2"),
    ("measure C4 quarter backup half D4 quarter", "backup-past-start@4"),
    ("measure C4 quarter tied:start D4 quarter", "unclosed-tie@2"),
    ("measure D4 quarter C4 quarter tied:stop", "unclosed-tie@4"),
    ("measure C4 quarter tied:start measure D4 quarter measure C4 quarter tied:stop", "unclosed-tie@2 unclosed-tie@9"),
    ("measure C4 half tied:start measure C5 half tied:stop measure D4 half", "unclosed-tie@2 unclosed-tie@6"),
    ("measure C4 eighth 3in2 tuplet:start C4 eighth 3in2 C4 eighth 3in2", "unclosed-tuplet@2"),
    ("measure C4 eighth 3in2 C4 eighth 3in2 C4 eighth 3in2 tuplet:stop", "unclosed-tuplet@8"),
    (
        "measure C4 voice:1 half 3in2 tuplet:start C4 half 3in2 C4 half 3in2 backup whole"
        " E4 voice:2 half 3in2 E4 half 3in2 E4 half 3in2 tuplet:stop",
        "unclosed-tuplet@3 unclosed-tuplet@22",
    ),
    ("measure C4 eighth beam:begin D4 eighth", "unclosed-beam@2"),
    ("measure C4 eighth D4 eighth beam:end", "unclosed-beam@4"),
    ("measure C4 16th beam:begin beam:begin D4 16th", "unclosed-beam@2"),
    ("measure C4 eighth beam:begin D4 eighth measure C4 quarter measure C4 eighth D4 eighth beam:end",
     "unclosed-beam@2 unclosed-beam@13"),
    ("measure time beats:4 beat-type:4 C4 whole measure C4 half", "unfilled-measure@6"),
    ("measure time beats:2 beat-type:4 C4 whole", "unfilled-measure@0"),
    ("measure time beats:4 beat-type:4 C4 whole measure C4 half measure D4 whole", "unfilled-measure@6"),
    ("measure C4 whole measure C4 half measure D4 whole", "unfilled-measure@3"),
    ("measure C4 whole measure D4 whole measure E4 breve", "unfilled-measure@6"),
    ("measure C4 half staff:1 backup half C3 quarter staff:2", "unfilled-measure@0"),
    ("measure C4 quarter 3in2", "unfilled-measure@0"),
    ("measure measure C4 quarter", "unfilled-measure@0"),
    ("measure grace C4 quarter", "unfilled-measure@0"),
    ("measure C4 whole repeat:start", "misplaced-bar-line@3"),
    ("measure repeat:end C4 whole", "misplaced-bar-line@1"),
    ("dynamics:p measure C4 whole", "before-first-measure@0"),
    ("measure turn C4 whole", "dangling-suffix@1"),
    ("measure C4 whole turn turn", "repeated-suffix@4"),
    ("measure key:fifths:1 cut C4 whole", "dangling-suffix@2"),
]  # fmt: skip


@pytest.mark.parametrize(("tokens", "errors"), WRONG)
def test_each_error_is_counted_where_it_is(tokens, errors):
    found = analyse(tokens.split())
    assert [f"{e.kind}@{e.position}" for e in found.minor] == errors.split()
    assert found.fatal is None and found.n_minor == len(errors.split())


def test_every_kind_has_a_case():
    assert {e.split("@")[0] for _, errors in WRONG for e in errors.split()} == ERROR_KINDS.keys()


RIGHT = {
    "a pick-up": "measure time beats:3 beat-type:4 G4 quarter measure C5 half dot",
    "a pick-up over whole-bar rests":
        "measure time beats:3 beat-type:4 G4 quarter staff:1 backup quarter rest rest:measure staff:2"
        " measure C5 half dot staff:1 backup half backup quarter rest rest:measure staff:2",
    "a last bar that completes the pick-up":
        "measure time beats:3 beat-type:4 G4 quarter measure C5 half dot measure C5 half",
    "a line that ends in mid-bar": "measure C4 whole measure D4 whole measure E4 half",
    "a bar cut in two by a repeat": "measure C4 whole measure D4 half dot measure G4 quarter measure E4 whole",
    "a new signature": "measure C4 whole measure D4 whole measure time beats:3 beat-type:4 E4 half dot",
    "two bars that say nothing of each other": "measure C4 whole measure D4 half dot",
    "a voice that ends early": "measure C5 voice:1 whole backup whole G4 voice:2 half",
    "a voice on both staves":
        "measure C3 half staff:2 C4 half staff:1 backup whole C3 whole staff:2 backup whole E5 half staff:1",
    "a whole-bar rest that opens a long bar":
        "measure rest rest:measure staff:1 backup whole backup half C3 whole dot staff:2",
    "whole-bar rests alone": "measure rest rest:measure staff:1 backup whole rest rest:measure staff:2",
    "a tie between voices, its end written first":
        "measure C5 voice:1 half A4 half tied:stop backup whole A4 voice:2 half tied:start A4 half",
    "ties of one pitch in two voices":
        "measure A4 voice:1 half tied:start A4 half tied:stop backup whole"
        " A4 voice:2 half tied:start A4 half tied:stop",
    "a tie from the line before, one to the next":
        "measure C4 half tied:stop D4 half measure D4 half E4 half tied:start",
    "a tie from a grace note": "measure grace C4 eighth tied:start C4 whole tied:stop",
    "a beam across the bar line":
        "measure C4 half D4 voice:1 eighth beam:begin measure E4 voice:1 eighth beam:end D4 half",
    "a beam under another voice":
        "measure C5 voice:1 eighth beam:begin D5 eighth beam:end backup quarter"
        " C4 voice:2 eighth beam:begin D4 eighth beam:end",
    "a beamed grace group in a beam":
        "measure C5 eighth beam:begin grace D5 16th beam:begin grace E5 16th beam:end D5 eighth beam:end",
    "tuplets in two voices":
        "measure C5 voice:1 eighth 3in2 tuplet:start C5 eighth 3in2 C5 eighth 3in2 tuplet:stop backup quarter"
        " C4 voice:2 eighth 3in2 tuplet:start C4 eighth 3in2 C4 eighth 3in2 tuplet:stop",
}  # fmt: skip


@pytest.mark.parametrize("what", RIGHT)
def test_what_music_does_is_no_error(what):
    tokens = RIGHT[what].split()
    found = analyse(tokens)
    assert found.minor == [] and found.fatal is None and found.tokens == tokens


def test_true_music_with_and_without_its_signatures(excerpts, piano):
    "No line has an error, whether the time signature is printed or not."
    lines = [linearise(p).tokens for p in [*excerpts, piano]]
    lines += [[t for t in line if t != "time" and not t.startswith("beat")] for line in lines]
    assert [e for line in lines for e in analyse(line).minor] == []


def test_fatal():
    assert analyse([]).fatal == analyse([BOS, EOS]).fatal == analyse([PAD, PAD]).fatal == "empty"
    assert analyse(["C4", "quarter"]).fatal == analyse(["wibble"]).fatal == "no-measure"
    assert analyse(["measure"]).fatal is None


def test_control_tokens_and_ids_change_nothing():
    tokens = "measure C4 quarter tied:start D4 quarter".split()
    plain = analyse(tokens)
    assert analyse(encode(tokens)) == plain
    assert analyse([*tokens, EOS, "wibble"]) == plain
    assert [e.kind for e in analyse([BOS, *tokens, PAD]).minor] == [e.kind for e in plain.minor]


# sums of bars


def q(bar) -> dict[str, Fraction]:
    return {staff[-1]: length for staff, length in bar.lengths.items()}


def test_sums_by_the_signature():
    tokens = "measure time beats:6 beat-type:8 C4 half dot measure C4 quarter dot C4 quarter measure C4 half dot"
    bars = bar_sums(tokens.split())
    assert [(b.expected, b.source, b.adds_up) for b in bars] == [
        (3, "signature", True), (3, "signature", False), (3, "signature", True)
    ]  # fmt: skip
    assert q(bars[1]) == {"1": Fraction(5, 2)}


def test_sums_by_the_other_bars_up_to_the_signature():
    tokens = "measure C4 whole measure C4 whole measure time beats:2 beat-type:4 C4 half measure C4 whole"
    bars = bar_sums(tokens.split())
    assert [(b.expected, b.source, b.adds_up) for b in bars] == [
        (4, "other bars", True), (4, "other bars", True), (2, "signature", True), (2, "signature", False)
    ]  # fmt: skip


def test_sums_by_the_other_staff():
    (bar,) = bar_sums("measure C4 half staff:1 backup half C3 half dot staff:2".split())
    assert (bar.expected, bar.source, bar.adds_up) == (3, "other staff", False) and q(bar) == {"1": 2, "2": 3}


def test_sums_by_nothing():
    (bar,) = bar_sums("measure C4 half dot".split())
    assert (bar.expected, bar.source, bar.adds_up) == (None, "none", True)


def test_runs_between_backups():
    (bar,) = bar_sums("measure C4 half 3in2 C4 half 3in2 C4 half 3in2 backup half forward quarter E4 quarter".split())
    assert [(r.start, r.end) for r in bar.runs] == [(0, 4), (2, 4)]


def test_a_whole_bar_rest_lasts_as_long_as_its_backup():
    (bar,) = bar_sums("measure rest rest:measure staff:1 backup half backup quarter C3 half staff:2".split())
    assert q(bar) == {"1": 3, "2": 2} and not bar.adds_up


def backups_stay_inside(measure) -> bool:
    onset = 0
    for e in measure:
        moves = e.find("chord") is None
        onset += int(e.findtext("duration", "0")) * (-1 if e.tag == "backup" else 1) * moves
        if onset < 0:
            return False
    return True


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        ("measure rest rest:measure backup whole C4 quarter", [4, 1]),
        ("measure time beats:4 beat-type:4 rest rest:measure backup half C4 half", [2, 2]),
        ("measure time beats:3 beat-type:4 C4 half dot backup half backup quarter rest rest:measure", [3, 3]),
        ("measure rest rest:measure backup whole backup half C4 whole dot", [6, 6]),
    ],
)
def test_whole_bar_rests_are_written_as_they_are_read(tokens, lengths):
    "The score's backups never reach past the start of a bar."
    measure = to_musicxml(tokens.split()).find("part/measure")
    divisions = int(measure.findtext("attributes/divisions"))
    assert [Fraction(int(n.findtext("duration")), divisions) for n in measure.iterfind("note")][:2] == lengths
    assert backups_stay_inside(measure)


# whatever the tokens

MUSICAL = ["measure", "backup", "forward", "rest", "rest:measure", "chord", "C4", "D5", "quarter", "half", "eighth"]
MUSICAL += ["beam:begin", "beam:end", "tied:start", "tied:stop", "tuplet:start", "3in2", "voice:1", "staff:2", "grace"]
MUSICAL += ["time", "beats:3", "beat-type:4", "whole"]
any_tokens = st.lists(
    st.sampled_from([*VOCABULARY, *MUSICAL * 8]) | st.text(max_size=6),
    max_size=70,
)
MAY_REMAIN = {"unclosed-tie", "unclosed-tuplet", "unclosed-beam", "unfilled-measure"}


@settings(max_examples=200, deadline=None)
@given(any_tokens)
@example("measure time beats:3 beat-type:4 rest rest:measure backup half backup half C4 quarter".split())
@example("measure time beats:3 beat-type:4 rest rest:measure backup whole backup half C4 quarter".split())
@example("measure rest rest:measure backup rest:measure backup half C4 quarter".split())
@example("measure rest rest:measure backup key:fifths:1 backup half C4 quarter".split())
def test_repaired_sequences_have_no_error_of_grammar(tokens):
    "What the grammar forbids is mended; ties, tuplets, beams and bars stay as they were read."
    found = analyse(tokens)
    again = analyse(found.tokens)
    assert again.fatal is None and {e.kind for e in again.minor} <= MAY_REMAIN and again.tokens == found.tokens
    assert all(t in TOKEN_ID for t in found.tokens)
    if found.fatal is None:
        times = [[(e.kind, e.onset, e.length) for e in a.events] for a in (found, again)]
        assert times[0] == times[1]
        assert all(backups_stay_inside(m) for m in to_musicxml(tokens).iterfind("part/measure"))
        assert len(found.bars) == tokens[: (tokens + [EOS]).index(EOS)].count("measure")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-5, 300), max_size=60))
def test_ids_never_raise(ids):
    found = analyse(ids)
    assert all(e.kind in ERROR_KINDS for e in found.minor)
    assert [e.position for e in found.minor] == sorted(e.position for e in found.minor)


CUT = "C4 whole measure D4 half dot measure G4 quarter measure E4 whole"  # a bar cut in two


@pytest.mark.parametrize(
    ("tokens", "marked", "implicit"),
    [
        ("measure C4 whole measure D4 half measure E4 whole", [False, True, False], [None] * 3),
        (f"measure {CUT}", [False] * 4, [None] * 4),
        (f"measure time beats:4 beat-type:4 {CUT}", [False] * 4, [None, "yes", "yes", None]),
        ("measure time beats:4 beat-type:4 C4 whole measure D4 half dot", [False, True], [None] * 2),
    ],
)
def test_only_bars_that_do_not_add_up_are_filled(tokens, marked, implicit):
    bars = to_musicxml(tokens.split()).findall("part/measure")
    assert [b.find("note[@color]") is not None for b in bars] == marked
    assert [b.get("implicit") for b in bars] == implicit
