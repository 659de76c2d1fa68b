"""The grammar: whatever is drawn under its masks is music, and all true music is legal."""

import music21
import numba
import numpy as np
import pytest
import verovio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_errors import RIGHT

from vitomr.notation import grammar as module
from vitomr.notation import line_state as state
from vitomr.notation.analysis import Analysis, analyse, match_ties
from vitomr.notation.grammar import Grammar
from vitomr.notation.lmx import EOS_ID, PAD_ID, TOKEN_ID, VOCABULARY, decode, encode, linearise
from vitomr.notation.musicxml import to_musicxml
from vitomr.notation.score import musicxml_bytes

V = len(VOCABULARY)
STRUCTURE = Grammar(time=False)
TIME = Grammar()
PITCHES = [i for i, t in enumerate(VOCABULARY) if len(t) == 2 and t[0] in "ABCDEFG" and t[1].isdigit()]


def walk(grammar: Grammar, n: int, budget: int, rng: np.random.Generator, weight=1.0) -> list[list[int]]:
    "Sequences of tokens drawn among the legal ones."
    tracker, columns = grammar.tracker(n, budget=budget), []
    while not tracker.done.all():
        assert len(columns) < budget and tracker.mask().any(1).all(), "no end in reach"
        chances = np.cumsum(tracker.mask() * weight, 1)
        columns.append((chances > rng.random((n, 1)) * chances[:, -1:]).argmax(1))
        tracker.advance(columns[-1])
    return [row[: row.index(EOS_ID) + 1] for row in np.array(columns).T.tolist()]


def taste(rng: np.random.Generator) -> np.ndarray:
    "Some tokens are liked more than others, bar lines and what opens and closes things most: long, dense sequences."
    weight = np.exp(rng.normal(0, 2, V))
    weight[PITCHES] *= 0.05
    weight[EOS_ID] *= 0.03
    weight[TOKEN_ID["measure"]] *= rng.choice([3, 100, 3000])
    weight[encode(["C4", "D4"])] *= 30
    for token in "rest backup rest:measure forward chord tied:start tied:stop beam:begin tremolo:start time".split():
        weight[TOKEN_ID[token]] *= rng.choice([1, 6, 60])
    return weight


def errors(ids, grammar: Grammar) -> list[str]:
    found = analyse(ids)
    kinds = [e.kind for e in found.minor if grammar.time or e.kind != "unfilled-measure"]
    return [found.fatal] * (found.fatal is not None) + kinds


def test_an_untrained_model_writes_no_error():
    "1,000 sequences, every legal token equally likely, as at infinite temperature."
    rng = np.random.default_rng(0)
    sequences = walk(TIME, 800, 40, rng) + walk(TIME, 200, 200, rng)
    assert [ids for ids in sequences if errors(ids, TIME)] == []
    assert all(ids[-1] == EOS_ID for ids in sequences)


@pytest.mark.parametrize("grammar", [TIME, STRUCTURE], ids=["time", "structure"])
def test_nor_does_one_with_strange_habits(grammar):
    rng = np.random.default_rng(1)
    sequences = []
    for _ in range(25):
        sequences += walk(grammar, 12, int(rng.choice([9, 40, 150])), rng, taste(rng))
    assert [decode(ids) for ids in sequences if errors(ids, grammar)] == []
    assert sum(ids.count(TOKEN_ID["measure"]) > 2 for ids in sequences) > 30


def test_what_is_drawn_opens():
    rng, toolkit = np.random.default_rng(2), verovio.toolkit()
    for ids in walk(TIME, 20, 120, rng, taste(rng)):
        score = musicxml_bytes(to_musicxml(ids)).decode()
        assert music21.converter.parse(score, format="musicxml").parts
        assert toolkit.loadData(score) and "<svg" in toolkit.renderToSVG(1)


@pytest.mark.parametrize("budget", range(4, 40))
def test_every_budget_is_kept(budget):
    rng = np.random.default_rng(budget)
    sequences = walk(TIME, 8, budget, rng, taste(rng)) + walk(STRUCTURE, 8, budget, rng, taste(rng))
    assert max(len(ids) for ids in sequences) <= budget
    assert not any(errors(ids, TIME) for ids in sequences[:8]) and not any(errors(i, STRUCTURE) for i in sequences[8:])


def test_a_budget_too_small_for_music():
    with pytest.raises(ValueError, match="budget of 3 tokens; the shortest sequence has 4"):
        TIME.tracker(1, budget=3)
    assert [len(ids) for ids in walk(TIME, 1, 4, np.random.default_rng(0))] == [4]
    assert [len(ids) for ids in walk(STRUCTURE, 1, 2, np.random.default_rng(0))] == [2]


@numba.njit
def longest_jump(row, scratch, buffer, out, after) -> int:
    "By how much the worst legal token lengthens the way to the end."
    module._mask(row[0], scratch, out)
    now, worst = way(row[0], scratch, buffer), -1
    for token in range(len(out)):
        if out[token]:
            after[0] = row[0]
            state._advance(after[0], token)
            worst = max(worst, way(after[0], scratch, buffer) - now)
    return worst


@numba.njit
def way(s, scratch, buffer) -> int:
    n = module._way_out(s, scratch, buffer, module._FAR_OUT)[1]
    for i in range(s.n_ties):
        n += 0 if s.tie_stop[i] else 4
    return n


@pytest.mark.parametrize("grammar", [TIME, STRUCTURE], ids=["time", "structure"])
def test_a_token_lengthens_the_way_to_the_end_by_less_than_is_allowed_for(grammar):
    rng, worst = np.random.default_rng(3), 0
    scratch, after = np.zeros(4, state._ROW), np.zeros(1, state._ROW)
    for _ in range(12):
        tracker, weight = grammar.tracker(1), taste(rng) * (np.arange(V) != EOS_ID)
        for _ in range(100):
            worst = max(worst, longest_jump(tracker.rows, scratch, np.zeros(V, bool), np.zeros(V, bool), after))
            chances = np.cumsum(tracker.mask() * weight, 1)
            tracker.advance((chances > rng.random((1, 1)) * chances[:, -1:]).argmax(1))
    assert 8 < worst < module._JUMP


# a batch


def test_rows_are_independent(shards):
    "Finished, dropped, repeated and reordered rows; budgets too."
    lines = [[*shards[i].ids, EOS_ID] if EOS_ID not in shards[i].ids else list(shards[i].ids) for i in range(6)]
    lines = [[i for i in line if i != 0] for line in lines]
    ids = np.full((6, max(map(len, lines))), PAD_ID)
    for row, line in zip(ids, lines):
        row[: len(line)] = line
    masks = TIME.masks_for(ids)
    for i, line in enumerate(lines):
        assert (masks[i, : len(line)] == TIME.masks_for(line)).all()
        assert (masks[i, len(line) :].nonzero()[1] == PAD_ID).all()
    tracker = TIME.tracker(6)
    for t in range(20):
        tracker.advance(ids[:, t])
    order = np.array([4, 1, 1, 0])
    beams, other = tracker.select(order), tracker.copy()
    tracker.keep(np.arange(6) != 2)
    assert (beams.mask() == masks[order, 20]).all() and (tracker.mask() == masks[[0, 1, 3, 4, 5], 20]).all()
    beams.advance(ids[order, 20])
    assert (beams.mask() == masks[order, 21]).all() and (other.mask() == masks[:, 20]).all()


def test_an_illegal_token_frees_its_row_alone():
    tracker = TIME.tracker(3)
    tracker.advance(encode(["measure", "C4", "measure"]))
    assert tracker.lost.tolist() == [False, True, False] and not tracker.done.any()
    assert tracker.mask().all(1).tolist() == [False, True, False]
    tracker.advance([TOKEN_ID["C4"], 10**6, -1])
    assert tracker.lost.tolist() == [False, True, True]
    assert TIME.masks_for(encode(["C4", "quarter"]))[1].all()


def test_a_wrong_number_of_tokens():
    with pytest.raises(ValueError, match="token ids for 2 rows"):
        TIME.tracker(2).advance([3])


# true music


def test_true_music_is_legal(excerpts, piano, shards):
    "With and without its time signature."
    lines = [linearise(p).tokens for p in [*excerpts, piano]] + [decode(shards[i].ids) for i in range(len(shards))]
    lines += [[t for t in line if t != "time" and not t.startswith("beat")] for line in lines]
    clean = [line for line in lines if not errors(line, TIME)]
    assert len(clean) > 0.95 * len(lines)
    for line in clean:
        assert STRUCTURE.legal(line) is None, " ".join(line)
        bars = [length for b in analyse(line).bars for length in set(b.lengths.values())]
        is_cut = len(set(bars[1:-1])) > 1 or (bars and max(bars[:1] + bars[-1:]) > max(bars[1:-1] or bars))
        assert is_cut or TIME.legal(line) is None, " ".join(line)


# where it refuses what `analyse` lets pass: with bars that must add up, and without
STRICTER = {"a bar cut in two by a repeat": (7, None), "a tie between voices, its end written first": (6, 6)}


@pytest.mark.parametrize("what", RIGHT)
def test_what_music_does_is_legal(what):
    "The cases that `analyse` finds nothing wrong with; the grammar refuses two of them, and says where."
    tokens = RIGHT[what].split()
    assert (TIME.legal(tokens), STRUCTURE.legal(tokens)) == STRICTER.get(what, (None, None))


WRONG = {  # sequence: where it breaks the rules with bars adding up, and by structure
    "C4 quarter": (0, 0),
    "": (0, 0),
    "measure": (1, None),
    "measure C4 D4 quarter": (2, 2),
    "measure C4 quarter voice:2": (3, 3),
    "measure chord C4 quarter": (1, 1),
    "measure C4 quarter stem:up stem:up": (4, 4),
    "measure time beats:4 C4 whole": (3, 3),
    "measure C4 quarter backup half D4 quarter": (5, 5),  # a tuplet might have shortened it
    "measure C4 quarter wibble": (3, 3),
    "measure C4 whole measure D4 quarter tied:stop": (6, 6),
    "measure C4 eighth 3in2 tuplet:start C4 eighth 3in2 C4 eighth 3in2": (11, 11),
    "measure C4 eighth beam:begin D4 eighth": (6, 6),
    "measure C4 eighth 3in2 D4 eighth": (6, None),
    "measure time beats:4 beat-type:4 C4 whole measure C4 half measure D4 whole": (9, None),
    "measure time beats:2 beat-type:4 C4 whole D4 quarter": (6, None),
    "measure C4 half staff:1 backup half C3 quarter staff:2": (9, None),
    "measure C4 quarter rest rest:measure": (4, None),
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_where_a_sequence_breaks_the_rules(text):
    assert (TIME.legal(text.split()), STRUCTURE.legal(text.split())) == WRONG[text]


# beside analyse


def in_order(found: Analysis) -> list[str]:
    "Its tokens as the linearizer would put them."
    bars = [["measure"] for _ in found.bars]
    for e in found.events:
        bars[e.bar] += [*e.prefixes, e.root, *sorted(e.suffixes, key=lambda t: state._CLASS[TOKEN_ID[t]])]
    return sum(bars, [])


def is_barred_on_purpose(found: Analysis) -> bool:
    "Is something here that is no error and yet not legal?"
    written = {id(e): i for i, e in enumerate(found.events)}
    if any(written[id(start)] > written[id(stop)] for start, stop in match_ties(found.events)[0]):
        return True
    for e in found.events:
        tremolo = [t for t in e.suffixes if t.startswith("tremolo")]
        is_odd_tremolo = len(tremolo) == 1 or (tremolo and tremolo[0] != "tremolo:single") or e.root == "maxima"
        is_rest_tied = e.kind == "rest" and any(t.startswith("tied") for t in e.suffixes)
        is_chord_beamed = "chord" in e.prefixes and any(t.startswith("beam") for t in e.suffixes)
        if is_odd_tremolo or is_rest_tied or is_chord_beamed:
            return True
    voices = {e.voice for e in found.events if e.kind not in ("forward", "backup") and e.prefixes}
    return None in voices and len(voices) > 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_legal_means_no_error(excerpts, piano, data):
    "Real lines with a few tokens lost, doubled, swapped or replaced."
    tokens = linearise(data.draw(st.sampled_from([piano, *excerpts[:12]]))).tokens
    for _ in range(data.draw(st.integers(1, 3))):
        i = data.draw(st.integers(0, len(tokens) - 1))
        other = data.draw(st.sampled_from(VOCABULARY[3:]))
        tokens[i : i + 2] = data.draw(st.sampled_from([
            tokens[i + 1 : i + 2], tokens[i : i + 1] * 2 + tokens[i + 1 : i + 2], tokens[i : i + 2][::-1],
            [other, *tokens[i + 1 : i + 2]], [other, *tokens[i : i + 2]],
        ])) or ["measure"]  # fmt: skip
    for grammar in (TIME, STRUCTURE):
        if grammar.legal(tokens) is None:
            assert errors(tokens, grammar) == []
    found = analyse(tokens)
    if not errors(tokens, STRUCTURE) and not is_barred_on_purpose(found):
        assert STRUCTURE.legal(in_order(found)) is None, " ".join(tokens)
