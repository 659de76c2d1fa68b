"""Reward terms by hand, presets against attacks, and the breakdown that everyone uses."""

import json
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vitomr.figures import PALETTE
from vitomr.notation.judgements import agreement, agreement_interval, read_costs, read_judgements
from vitomr.notation.lmx import VOCABULARY, encode, linearise
from vitomr.notation.metrics import pair_parts
from vitomr.notation.mistakes import ATTACKS, CORRUPTIONS, corrupt, honest, is_attack, measures, note_spans
from vitomr.notation.musicxml import delinearise
from vitomr.notation.reference import tokens_of_parts
from vitomr.notation.tedn import tedn
from vitomr.page.assemble import join_parts
from vitomr.rewards import (
    PRESETS,
    TERMS,
    Preset,
    bars,
    consensus,
    f1,
    length,
    note,
    rep,
    reward,
    reward_group,
    reward_of_score,
    ted,
    tedn_score,
    wf,
)

ROOT = Path(__file__).resolve().parents[1]
BAR = "measure key:fifths:0 time beats:4 beat-type:4 clef:G2 C5 voice:1 quarter stem:down D5 quarter E5 half".split()
READINGS = [r["true"].split() for r in json.loads((ROOT / "examples" / "readings.json").read_text())]
PIECE = sorted(READINGS, key=len)[len(READINGS) // 2]
tokens = st.lists(st.sampled_from(VOCABULARY[3:]), max_size=40)


def test_the_reference_gets_the_most_of_every_term():
    for name, best in {"TED": 1, "TEDn": 1, "WF": 1, "F1": 1, "LEN": 0, "NOTE": 1, "BARS": 1}.items():
        assert TERMS[name](BAR, BAR) == best, name


def test_ted_is_the_exponential_of_the_edit_cost():
    wrong = [t.replace("D5", "F5") for t in BAR]
    d = tedn(wrong, BAR)
    assert d.edit_cost == 1
    assert ted(wrong, BAR) == exp(-0.01) and ted(wrong, BAR, alpha=0.5) == exp(-0.5)
    assert tedn_score(wrong, BAR) == 1 - 1 / d.gold_cost


def test_tedn_score_never_falls_below_nothing():
    assert tedn_score(BAR * 9, BAR) == 0


def test_wf_counts_minor_errors_and_prices_fatal_ones():
    assert wf([*BAR, "C5"]) == pytest.approx(exp(-0.2))  # a prefix that leads nowhere
    assert wf([]) == -3 and wf(["C5", "quarter"], gamma=1.5) == -1.5


@pytest.mark.parametrize(
    ("pred", "true", "mode", "value"),
    [
        ("a b c", "a b c", "aligned", 1),
        ("b c d", "a b c d", "aligned", 6 / 7),
        ("b c d", "a b c d", "positional", 0),
        ("a b d", "a b c d", "positional", 4 / 7),
        ("d c b a", "a b c d", "bag", 1),
        ("a a", "a", "bag", 2 / 3),
        ("", "a", "aligned", 0),
    ],
)
def test_f1_by_hand(pred, true, mode, value):
    assert f1(pred.split(), true.split(), mode=mode) == pytest.approx(value)


def test_rep_by_hand():
    # a b a b a b: ab|ab at 0 and 2, ba|ba at 1: three places for n = 2; no 3-gram or 4-gram is repeated
    assert rep("a b a b a b".split()) == pytest.approx(3 / (4 * 5))
    assert rep("a b c d".split()) == 0 and rep([]) == 0 and rep(["a"]) == 0
    # side by side: n = 1: 0 of 5; n = 2: ab|ab at 0 and 2, both of two
    assert rep("a b a b a b".split(), orders=(1, 2), blocks=True) == pytest.approx((0 + 1) / 2)


def test_length_by_hand():
    assert length([0] * 110, [0] * 100) == 0 and length([0] * 90, [0] * 100) == 0
    assert length([0] * 150, [0] * 100) == pytest.approx(exp(log(2) / 100 * 50) - 1)
    assert length([0] * 200, [0] * 100) == 1 and length([0] * 999, [0] * 100) == 1
    assert length([0] * 106, [0] * 100, delta=5, tau=50) == pytest.approx(2 ** (6 / 50) - 1)


def test_note_by_hand():
    pitch = [t.replace("D5", "F5") for t in BAR]
    rhythm = " ".join(BAR).replace("quarter", "half", 1).replace("E5 half", "E5 quarter").split()
    assert note(pitch, BAR) == pytest.approx(2 / 3)
    assert note(rhythm, BAR, by="pitch") == 1
    assert note(rhythm, BAR, by="onset") == pytest.approx(1 / 3)
    assert note(rhythm, BAR, by="duration") == 0


def test_bars_is_a_share():
    short = "measure C5 quarter".split()
    assert bars(BAR + BAR[:1] + BAR[6:]) == 1 and bars(BAR + short) == 0.5 and bars([]) == 0


@pytest.mark.parametrize("name", PRESETS)
def test_a_breakdown_adds_up(name):
    b = reward(corrupt(PIECE, "pitch", 0.3, np.random.default_rng(0)), PIECE, name)
    assert set(b.raw) == set(PRESETS[name].weights)
    assert b.total == pytest.approx(sum(PRESETS[name].weights[t] * v for t, v in b.raw.items()))
    again = b.reweighted({"F1": 0.0})
    assert again.raw == b.raw and again.total == pytest.approx(b.total - b.weighted["F1"])


def test_acai_presets_have_their_published_settings():
    pred, true = PIECE[:-30], PIECE
    b = reward(pred, true, "acai-code")
    assert b.raw["F1"] == f1(pred, true, mode="positional")
    assert b.raw["LEN"] == length(pred, true, delta=5, tau=50)
    at_delta = [reward(true[:-n], true, "acai-code").raw["LEN"] for n in (4, 5, 6)]
    assert at_delta == pytest.approx([0, 2 ** (5 / 50) - 1, 2 ** (6 / 50) - 1]) and round(at_delta[1], 4) == 0.0718
    assert reward(true[:-10], true, "notes").raw["LEN"] == 0
    assert b.raw["REP"] == rep(pred, orders=(1, 2, 3, 4), blocks=True)
    assert b.raw["WF"] == wf(pred, alpha=0.25)
    assert b.weights == {"TED": 7.0, "WF": 1.5, "F1": 2.5, "REP": -2.0, "LEN": -2.0}
    assert reward(pred, true, "notes").weights == {"TED": 0.35, "WF": 0.1, "F1": 0.25, "REP": -0.15, "LEN": -0.02}


def test_a_group_scores_as_its_members_do_and_ids_as_strings():
    true, rng = PIECE, np.random.default_rng(1)
    group = [corrupt(true, k, 0.3, rng) for k in CORRUPTIONS] + [true, true, []]
    together = reward_group(group, true, terms=TERMS)
    assert [b.raw for b in together] == [reward(p, true, terms=TERMS).raw for p in group]
    assert [b.total for b in reward_group([encode(p) for p in group], encode(true))] == [
        b.total for b in reward_group(group, true)
    ]


def test_the_consensus_is_the_reading_nearest_to_all_others():
    rng = np.random.default_rng(3)
    for _ in range(4):
        group = [corrupt(PIECE, str(rng.choice(list(CORRUPTIONS))), 0.2, rng) for _ in range(5)] + [[]]
        group.append(group[int(rng.integers(5))])
        summed = [sum(tedn(p, other).edit_cost for other in group) for p in group]
        assert consensus(group) == summed.index(min(summed)) == consensus([encode(p) for p in group])
    assert consensus([[]]) == 0 == consensus([PIECE] * 3)
    assert consensus([[], PIECE, [], PIECE, PIECE]) == 1, "what is drawn most often wins, were it alone right"


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match=r"unknown reward preset 'best'; choose from notes, acai-code, vitomr"):
        reward(BAR, BAR, "best")
    with pytest.raises(ValueError, match=r"unknown reward terms \['SER'\]"):
        reward(BAR, BAR, terms=["SER"])
    with pytest.raises(ValueError, match=r"unknown reward terms \['SER'\]"):
        Preset({"SER": 1.0})
    with pytest.raises(ValueError, match="were not measured"):
        reward(BAR, BAR, "notes").reweighted({"NOTE": 1.0})
    with pytest.raises(ValueError, match="unknown corruption 'fog'; choose from pitch"):
        corrupt(BAR, "fog", 0.5, np.random.default_rng(0))


@given(tokens, tokens)
@settings(max_examples=60, deadline=None)
def test_every_term_is_bounded_whatever_the_tokens(pred, true):
    b = reward(pred, true, "vitomr", terms=TERMS)
    for term, value in b.raw.items():
        assert (-3 if term == "WF" else 0) <= value <= 1, term


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corruption_hits_as_much_as_it_says(kind):
    true = PIECE
    assert corrupt(true, kind, 0.0, np.random.default_rng(0)) == true
    few, many = (tedn(corrupt(true, kind, v, np.random.default_rng(0)), true).edit_cost for v in (0.1, 0.8))
    assert 0 <= few < many
    if kind == "missing note":
        assert len(note_spans(corrupt(true, kind, 0.25, np.random.default_rng(0)))) == pytest.approx(
            0.75 * len(note_spans(true)), abs=1
        )


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_attack_beats_an_honest_reading_under_vitomr(attack, excerpts):
    pieces = READINGS + [linearise(e).tokens for e in excerpts]
    pieces = [t for t in pieces if len(measures(t)) > 1 and len(note_spans(t)) >= 10]
    assert len(pieces) > 40
    met = 0
    for i, true in enumerate(pieces):
        pred = ATTACKS[attack](true)
        if is_attack(pred, true):
            fair, cheat = reward_group([honest(true, np.random.default_rng(i)), pred], true)
            assert cheat.total < fair.total, (attack, i)
            met += 1
    assert met > 0.9 * len(pieces)


def test_judgements_are_read_and_counted(tmp_path):
    rows = "t\ta\tb\t-1\tA1\nt\ta\tb\t1\tA2\nt\tb\ta\t1\tA1\n"
    (tmp_path / "j.csv").write_text(rows)
    found = read_judgements(tmp_path / "j.csv")
    better_a = {("t", "a"): 0.9, ("t", "b"): 0.1}
    assert agreement(better_a, found).tolist() == [1, 0, 1]
    assert agreement({("t", "a"): 0.5, ("t", "b"): 0.5}, found).tolist() == [0.5, 0.5, 0.5]
    mean, low, high = agreement_interval(agreement(better_a, found), found)
    assert mean == pytest.approx(2 / 3) and low <= mean <= high
    (tmp_path / "bad.csv").write_text(rows + "t\ta\n")
    with pytest.raises(ValueError, match="line 4: expected reference, A, B"):
        read_judgements(tmp_path / "bad.csv")


def test_the_shipped_judgements_are_whole():
    folder = ROOT / "examples" / "omreval"
    found = read_judgements(folder / "annotations.csv")
    assert len(found) == 1538 and len({j.item for j in found}) == 100
    costs = read_costs(folder / "costs_treedist-zss-Levenshtein.csv")
    assert all((j.true, x) in costs or x == j.true for j in found for x in (j.a, j.b))


# whole scores

VOICE, PIANO = sorted(READINGS, key=len)[:: len(READINGS) - 1]
LOW = [t.replace("clef:G2", "clef:F4").replace("5", "3") if t[0] in "CDE" else t for t in BAR]


def test_a_score_of_one_part_is_rewarded_as_a_line():
    wrong = corrupt(PIECE, "pitch", 0.3, np.random.default_rng(0))
    assert reward_of_score([wrong], [PIECE], terms=TERMS).raw == reward(wrong, PIECE, terms=TERMS).raw
    assert reward_of_score([encode(wrong)], [encode(PIECE)]).total == reward_of_score([wrong], [PIECE]).total


def test_the_terms_of_a_score_are_the_mean_of_its_parts_by_length():
    wrong = corrupt(PIANO, "pitch", 0.3, np.random.default_rng(0))
    whole, sizes = reward_of_score([VOICE, wrong], [VOICE, PIANO]), (len(VOICE), len(PIANO))
    for t, value in whole.raw.items():
        each = reward(VOICE, VOICE).raw[t], reward(wrong, PIANO).raw[t]
        assert value == pytest.approx(np.average(each, weights=sizes)), t


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_part_that_is_missing_is_all_errors_and_the_others_keep_their_places(left):
    parts = [BAR, PIANO, LOW]
    read = [p for i, p in enumerate(parts) if i != left]
    assert pair_parts(read, parts) == [(p if i != left else [], p) for i, p in enumerate(parts)]
    raw = reward_of_score(read, parts).raw
    share = len(parts[left]) / sum(map(len, parts))
    assert raw["TEDn"] == raw["F1"] == pytest.approx(1 - share)
    assert reward_of_score(parts, read).raw["F1"] == pytest.approx(1 - share)  # one too many costs as much


def test_a_score_is_compared_with_its_musicxml():
    score = join_parts([delinearise(p) for p in (BAR, PIANO)])
    assert len(tokens_of_parts(score)) == 2
    assert reward_of_score(tokens_of_parts(score), score).raw["TEDn"] == 1
    assert reward_of_score([], score).raw["F1"] == 0


def test_a_reference_without_parts_is_refused():
    with pytest.raises(ValueError, match="without parts"):
        reward_of_score([BAR], [])
    with pytest.raises(ValueError, match="unknown reward preset"):
        reward_of_score([BAR], [BAR], "other")


def test_a_term_is_one_record_for_all():
    "Its sign is that of its weight in every preset; its colour is one that can be told apart, and no other term's."
    for preset in PRESETS.values():
        assert all(TERMS[t].sign * w > 0 for t, w in preset.weights.items())
    colours = [term.colour for term in TERMS.values()]
    assert len(set(colours)) == len(TERMS) and set(colours) <= set(PALETTE.values())
    assert all(term.name == t and 3 < len(term.meaning) < 30 for t, term in TERMS.items())
