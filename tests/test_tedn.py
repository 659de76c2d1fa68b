"""TEDn: the integers of the definition, on music and on anything else; trees from ids; bounds; groups; plain errors."""

import copy
import pickle
import xml.etree.ElementTree as ET
from fractions import Fraction

import music21
import numba
import numpy as np
import pytest
import zss
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmx.linearization.Delinearizer import Delinearizer
from lmx.symbolic.Pruner import Pruner
from rapidfuzz.distance import Levenshtein

from vitomr.notation import tedn as module
from vitomr.notation.lmx import EOS_ID, N_PLAIN, VOCABULARY, encode, linearise
from vitomr.notation.musicxml import delinearise
from vitomr.notation.part_tree import PartTree, compiled
from vitomr.notation.score import as_score, cut_excerpt, music21_to_xml, parts, root_of
from vitomr.notation.tedn import Tedn, prepare, tedn, tedn_group

# The definition, written from the publication's evaluation: a tree of (tag, text or code, children), and zss.

ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQSTUVWXYZ" + ".,!?:;/\\|-_=+><[]{}()*&^%$#@~`"
ALPHABET += "".join(chr(0x4E00 + i) for i in range(400))  # symbols that no text below uses
TYPES = "1024th 512th 256th 128th 64th 32nd 16th eighth quarter half whole breve long maxima".split()
TYPE_CODE = dict(zip(TYPES, "00001234567899"))
STEM_CODE = {"up": "U", "down": "D", "none": "N"}
LEFT_OUT = {"measure": ["print", "sound", "listening"], "note": ["duration", "listen", "play", "tie"]}
IN_CODE = ["pitch", "voice", "type", "stem"]


def settled(part: ET.Element, flavour: str = "lmx") -> ET.Element:
    "Durations in quarters, and what the flavour prunes gone."
    part, divisions = copy.deepcopy(part), 1
    for e in (e for measure in part for e in measure):
        if e.tag == "attributes" and e.find("divisions") is not None:
            divisions = int(e.findtext("divisions"))
            e.remove(e.find("divisions"))
        elif e.tag in ("backup", "forward") and e.find("duration") is not None:
            e.find("duration").text = str(Fraction(e.findtext("duration")) / divisions)
    if flavour == "lmx":
        Pruner().process_part(part)
    return part


def code_of(note: ET.Element, pitches: dict) -> str:
    "Pitch, voice, type and stem of a note."
    if note.find("rest") is not None:
        symbol = "R"
    elif (pitch := note.find("pitch")) is None:
        symbol = "~"
    else:
        key = pitch.findtext("step", "C"), pitch.findtext("alter", "0"), pitch.findtext("octave", "0")
        symbol = ALPHABET[pitches.setdefault(key, len(pitches))]
    type_code = TYPE_CODE[note.findtext("type") or "whole"]
    return symbol + (note.findtext("voice") or "1") + type_code + STEM_CODE.get(note.findtext("stem"), "-")


def flattened(e: ET.Element, pitches: dict) -> tuple:  # tag, text, children
    children = [c for c in e if c.tag not in LEFT_OUT.get(e.tag, []) and c.tag not in ("footnote", "level")]
    if e.tag == "note":
        children = [c for c in children if c.tag not in IN_CODE]
        return "note", code_of(e, pitches), [flattened(c, pitches) for c in children]
    return e.tag, (e.text or "").strip(), [flattened(c, pitches) for c in children]


def insert(node: tuple) -> int:
    return 1 + len(node[1]) if node[0] == "note" else 1


def update(a: tuple, b: tuple) -> int:
    texts = Levenshtein.distance(a[1], b[1]) if "note" in (a[0], b[0]) else a[1] != b[1]
    return (a[0] != b[0]) + texts


def zss_distance(a: tuple, b: tuple) -> int:
    return int(zss.distance(a, b, lambda n: n[2], insert, lambda n: 1, update))


def definition(pred: ET.Element, gold: ET.Element, flavour: str = "lmx") -> tuple[int, int]:
    "Edit cost and gold cost of two parts, by zss."
    pitches: dict = {}
    gold = flattened(settled(gold, flavour), pitches)
    pred = flattened(settled(pred, flavour), pitches)
    return zss_distance(pred, gold), zss_distance((gold[0], "", []), gold)


def part_of(tokens: list) -> ET.Element:
    "What the package's own delinearizer makes of a prediction up to its end; an exception means an empty part."
    names = [VOCABULARY[t] if isinstance(t, int) and 0 <= t < len(VOCABULARY) else str(t) for t in tokens]
    names = names[: names.index("<eos>")] if "<eos>" in names else names
    try:
        return Delinearizer(keep_fractional_durations=True).process_text(" ".join(names))
    except Exception:  # the chain takes whatever it is
        return ET.Element("part")


def assert_same(result: Tedn, expected: tuple[int, int]) -> None:
    assert (result.edit_cost, result.gold_cost, result.exact) == (*expected, True)


# Music


@pytest.fixture(scope="module")
def bars(excerpts):
    "Tokens and part of single bars: Bach chorales, and piano music on two staves."
    found = [cut_excerpt(e, 0, 1) for e in excerpts[:24]]
    for name in ("schumann_clara/polonaise_op1n1", "schumann_clara/polonaise_op1n3"):
        part = parts(music21_to_xml(music21.corpus.parse(name)))[0].element
        found += [cut_excerpt(part, i, 1) for i in (0, 1, 4, 6, 9, 13, 20, 25)]
    found = [(linearise(e).tokens, e) for e in found]
    return [(tokens, e) for tokens, e in found if len(tokens) < 100]


def corrupted(tokens: list[str], way: str, rng: np.random.Generator) -> list[str]:
    "A wrong reading of some tokens."
    n = len(tokens)
    i, j = sorted(rng.integers(n, size=2))
    hit = rng.random(n) < 0.25
    any_token = lambda: VOCABULARY[rng.integers(3, N_PLAIN)]
    match way:
        case "drop":
            return [t for t, h in zip(tokens, hit) if not h]
        case "insert":
            return [u for t, h in zip(tokens, hit) for u in ([t, any_token()] if h else [t])]
        case "swap":
            return [*tokens[:i], tokens[j], *tokens[i + 1 : j], tokens[i], *tokens[j + 1 :]] if i < j else tokens
        case "wrong":
            return [any_token() if h else t for t, h in zip(tokens, hit)]
        case "near":
            shift = lambda t: "CDEFGAB"[("CDEFGAB".index(t[0]) + 1) % 7] + t[1] if len(t) == 2 else t
            return [shift(t) if h else "half" if h and t == "quarter" else t for t, h in zip(tokens, hit)]
        case "types":
            return [TYPES[rng.integers(len(TYPES))] if t in TYPES and rng.random() < 0.5 else t for t in tokens]
        case "truncate":
            return tokens[:i]
        case "repeat":
            return [*tokens[:j], *tokens[i:]]
        case "shuffle":
            return [tokens[0], *rng.permutation(tokens[1:]).tolist()]
        case "empty":
            return []
        case "fatal":
            return [t for t in tokens if t != "measure"]
    raise ValueError(way)


WAYS = ("drop", "insert", "swap", "wrong", "near", "types", "truncate", "repeat", "shuffle", "empty", "fatal")


def test_the_integers_of_the_definition_on_music(bars):
    rng, n_pairs = np.random.default_rng(0), 0
    for tokens, gold in bars:
        assert tedn(tokens, gold).edit_cost == definition(part_of(tokens), gold)[0]
        for way in WAYS:
            pred = corrupted(tokens, way, rng)
            assert_same(tedn(pred, gold), definition(part_of(pred), gold))
            n_pairs += 1
    assert n_pairs >= 300 and sum("backup" in tokens for tokens, _ in bars) >= 5


def test_the_integers_of_the_definition_between_parts(bars, piano):
    for flavour in ("lmx", "full"):
        for i, (_, gold) in enumerate(bars[::4]):
            pred = bars[(4 * i + 7) % len(bars)][1]
            assert_same(tedn(pred, gold, flavour=flavour), definition(pred, gold, flavour))
    assert_same(tedn(bars[0][1], piano), definition(bars[0][1], piano))
    assert tedn(piano, piano) == Tedn(0, definition(piano, piano)[1])


def test_a_reference_in_tokens_and_its_part_give_the_same(bars):
    for tokens, _ in bars:
        wrong = tokens[: len(tokens) // 2]
        assert tedn(wrong, tokens) == tedn(wrong, part_of(tokens)) == tedn(part_of(wrong), encode(tokens))


def test_known_costs():
    one = "measure C4 quarter".split()
    assert_same(tedn(one, one), (0, 1 + 1 + 4))
    assert_same(tedn("measure D4 quarter".split(), one), (1, 6))
    assert_same(tedn("measure D4 eighth stem:up".split(), one), (3, 6))
    assert_same(tedn("measure C4".split(), one), (5, 6))
    assert_same(tedn("measure".split(), one), (6, 6))  # the reference leaves out an empty last measure
    assert_same(tedn("C4 quarter measure C4 quarter".split(), one), (6, 6))  # and raises before the first
    assert_same(tedn("measure C4 backup rest:measure backup half".split(), one), (6, 6))
    assert_same(tedn("measure C4 D4 rest voice:2 chord quarter".split(), one), (4, 6))  # chord, rest: R25-
    assert_same(tedn(one, "measure measure".split()), (1, 1))
    assert_same(tedn(one, "measure".split()), (2, 0))
    assert tedn("measure C4 quarter tied:start".split(), "measure C4 quarter tied:stop".split()).edit_cost == 0
    assert tedn([], one).normalised == 1 and tedn([], []).normalised == 0 and tedn(one, []).normalised == float("inf")


# Broken predictions, against the reference chain

JUNK = ["<unk>", "barline:final", "C10", "<pad>", "<bos>", "qüarter", "voice:99", "3in7"]


def broken(bars: list[list[str]], way: str, rng: np.random.Generator) -> list[str]:
    "Some bars of music with one kind of damage, tokens to put in being drawn from the whole vocabulary."
    tokens = [t for bar in bars for t in bar]
    hit = rng.random(len(tokens)) < rng.choice([0.03, 0.1, 0.3])
    some = lambda: VOCABULARY[rng.integers(3, N_PLAIN)]
    after = lambda what: [u for t, h in zip(tokens, hit) for u in ([t, *what()] if h else [t])]
    match way:
        case "drop":
            return [t for t, h in zip(tokens, hit) if not h]
        case "insertion":
            return after(lambda: [some()])
        case "substitution":
            return [some() if h else t for t, h in zip(tokens, hit)]
        case "swap":
            for i in np.flatnonzero(hit[:-1]):
                tokens[i], tokens[i + 1] = tokens[i + 1], tokens[i]
            return tokens
        case "far swap":
            for i in np.flatnonzero(hit):
                j = rng.integers(len(tokens))
                tokens[i], tokens[j] = tokens[j], tokens[i]
            return tokens
        case "bars":  # removed, twice, in another order
            return [t for i in rng.integers(len(bars), size=rng.integers(1, len(bars) + 2)) for t in bars[i]]
        case "junk":
            return after(lambda: [JUNK[rng.integers(len(JUNK))]])
        case "measures":
            return after(lambda: ["measure"] * rng.integers(1, 3))
        case "late":
            return [some() for _ in range(rng.integers(1, 3))] + tokens
        case "no measure":
            return tokens[1:]
        case "backups":
            roots = ["rest:measure", "half", "eighth 3in2", "quarter dot"]
            one = lambda: [["backup", "forward"][rng.integers(2)], *roots[rng.integers(4)].split()]
            return after(lambda: one() + one() * rng.integers(2))
        case "repeated":  # one token many times over: dots, beams, hooks, slurs
            return after(lambda: [some()] * rng.integers(2, 15))
        case "noise":
            return ["measure", *(some() for _ in range(rng.integers(60)))]
        case "cut":
            return tokens[: rng.integers(len(tokens))]
        case "empty":
            return [[], ["measure"], ["measure"] * 3, ["<eos>"], ["C4"], ["quarter", "measure"]][rng.integers(6)]
    raise ValueError(way)


BREAKS = "drop, insertion, substitution, swap, far swap, bars, junk, measures, late, no measure, backups, repeated"
BREAKS = [*BREAKS.split(", "), "noise", "cut", "empty"]


@pytest.mark.parametrize("way", BREAKS)
def test_broken_predictions_cost_what_the_reference_chain_says(bars, way):
    rng, short = np.random.default_rng(BREAKS.index(way)), [tokens for tokens, _ in bars if len(tokens) < 45]
    n_different = 0
    for _ in range(40):
        gold = [short[i] for i in rng.integers(len(short), size=rng.integers(1, 3))]
        pred, gold_part = broken(gold, way, rng), part_of([t for bar in gold for t in bar])
        result = tedn(pred, gold_part)
        assert_same(result, definition(part_of(pred), gold_part))
        assert tedn(encode([t for t in pred if t in VOCABULARY]), gold_part) == result
        n_different += result.edit_cost > 0
    assert n_different > 5 or way == "junk"  # unknown tokens cost nothing


def test_a_large_number_of_broken_predictions_has_the_trees_of_the_reference(bars):
    rng, n_empty, n_pairs = np.random.default_rng(5), 0, 0
    for _ in range(200):
        music = [tokens for tokens, _ in (bars[j] for j in rng.integers(len(bars), size=3))]
        for way in BREAKS:
            pred = broken(music, way, rng)
            for fast, slow in zip(prepare(pred), prepare(part_of(pred))):
                np.testing.assert_array_equal(fast, slow)
            n_pairs, n_empty = n_pairs + 1, n_empty + (prepare(pred).n_nodes == 1)
    assert n_pairs == 3000 and 200 < n_empty < 1500


@pytest.mark.parametrize("n_dots", [0, 4, 12, 13, 40])
def test_many_dots_are_exact(n_dots):
    dots = ["dot"] * n_dots
    back = f"backup half backup {'half' if n_dots else 'quarter'}".split()
    bar = ["measure", "C4", "quarter", *dots, "D4", "quarter", "sharp", *back, "rest", "half", "D4", "quarter", *dots]
    for pred in (bar, [*bar, *bar], [*bar, "chord", "D4", "half", "flat"]):
        for fast, slow in zip(prepare(pred), prepare(part_of(pred))):
            np.testing.assert_array_equal(fast, slow)


# Anything else

SMALL = ["measure", "C4", "D4", "rest", "backup", "forward", "chord", "grace", "voice:1", "voice:2", "quarter", "half"]
SMALL += ["whole", "rest:measure", "dot", "3in2", "sharp", "flat", "staff:2", "beam:begin", "beam:end", "tied:start"]
SMALL += ["tied:stop", "beam:forward-hook", "beam:backward-hook", "key:fifths:2", "time", "beats:3", "clef:F4"]
SMALL += ["stem:up", "clef:G2", "fermata", "slur:start", "tremolo:single", "tremolo:2", "staccato"]
sequences = st.one_of(
    st.lists(st.sampled_from(VOCABULARY[3:N_PLAIN]), max_size=60).map(lambda t: ["measure", *t]),
    st.lists(st.sampled_from(SMALL), max_size=80).map(lambda t: ["measure", *t]),
    st.lists(
        st.one_of(
            st.sampled_from(VOCABULARY[:N_PLAIN]),
            st.just("no-token"),
            st.integers(-3, N_PLAIN - 1),
            st.integers(400, 500),
        ),
        max_size=30,
    ),
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(sequences)
def test_the_tree_of_any_tokens_is_the_tree_of_their_part(tokens):
    for fast, slow in zip(prepare(tokens), prepare(part_of(tokens))):
        np.testing.assert_array_equal(fast, slow)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(*[st.lists(st.sampled_from(SMALL), min_size=4, max_size=30)] * 2)
def test_the_integers_of_the_definition_on_any_tokens(pred, gold):
    pred, gold = ["measure", *pred], ["measure", *gold]
    assert_same(tedn(pred, gold), definition(part_of(pred), part_of(gold)))


def element(tag: str, text: str, children: list) -> ET.Element:
    e = ET.Element(tag)
    e.text = text
    e.extend(children)
    return e


leaves = st.builds(
    element,
    st.sampled_from("dot beam staff direction words lyric footnote level accidental notehead chord print".split()),
    st.sampled_from(["", "1", "begin", " sharp ", "0U7", "\n", "R17-", "~"]),
    st.just([]),
)
inner = st.builds(
    element, st.sampled_from("notations attributes lyric direction".split()), st.just(""), st.lists(leaves, max_size=3)
)
pitches = st.builds(
    lambda step, alter, octave: element(
        "pitch", "", [element(t, x, []) for t, x in (("step", step), ("alter", alter), ("octave", octave)) if x]
    ),
    st.sampled_from(["C", "D", ""]),
    st.sampled_from(["", "1", "-1", "0.5", "0"]),
    st.sampled_from(["4", "5"]),
)
codes = st.tuples(
    st.one_of(pitches, st.builds(element, st.sampled_from(["rest", "unpitched"]), st.just(""), st.just([]))),
    st.builds(element, st.just("voice"), st.sampled_from(["1", "2", "10", "x"]), st.just([])),
    st.builds(element, st.just("type"), st.sampled_from(TYPES), st.just([])),
    st.builds(element, st.just("stem"), st.sampled_from(["up", "down", "none"]), st.just([])),
)
notes = st.builds(
    lambda code, kept, rest: element("note", "", [c for c, k in zip(code, kept) if k] + rest),
    codes,
    st.tuples(*[st.booleans()] * 4),
    st.lists(st.one_of(leaves, inner), max_size=3),
)
measures = st.builds(
    element, st.just("measure"), st.just(""), st.lists(st.one_of(notes, notes, inner, leaves), max_size=4)
)
random_parts = st.builds(element, st.just("part"), st.just(""), st.lists(measures, max_size=3))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_parts, random_parts, st.sampled_from(["lmx", "full"]))
def test_the_integers_of_the_definition_on_any_tree(pred, gold, flavour):
    assert_same(tedn(pred, gold, flavour=flavour), definition(pred, gold, flavour))


@pytest.mark.parametrize("n_pitches", [70, 100, 300])
def test_symbols_are_shared_as_in_the_definition_and_never_run_out(n_pitches):
    def tune(offset):
        tokens, names = ["measure"], "sharp flat natural double-sharp flat-flat".split()
        for i in range(n_pitches):
            k = (i * 37 + offset) % n_pitches
            tokens += ["measure"] * (i % 40 == 0) + [VOCABULARY[VOCABULARY.index("C0") + k % 70], "voice:5", "whole"]
            tokens += [names[k // 70 % 5]]
        return tokens

    gold, pred = prepare(tune(0)), prepare(tune(5))
    assert len(gold.pitches) > n_pitches * 0.6
    match, costs = module._costs(pred, gold)
    seen: dict = {}
    labels = []
    for tokens in (tune(0), tune(5)):
        notes = settled(part_of(tokens)).iter("note")
        labels.append(list(dict.fromkeys(code_of(note, seen) for note in notes)))
    own = lambda tree: [i for i, p in enumerate(tree.pitch) if p >= 0]
    for i, a in zip(own(pred), labels[1]):
        for j, b in zip(own(gold), labels[0]):
            assert 1 + costs[j] - match[i, j] == Levenshtein.distance(a, b)


# Sizes


def test_the_bound_is_never_below_the_distance(bars):
    rng = np.random.default_rng(1)
    for tokens, _ in bars[:12]:
        gold = prepare([*tokens, *tokens, *tokens])
        for way in WAYS:
            pred = prepare(corrupted([*tokens, *tokens], way, rng))
            exact = tedn(pred, gold)
            for max_nodes in (1, 60, 200):
                if pred.n_nodes * gold.n_nodes > max_nodes**2:
                    bound = tedn(pred, gold, max_nodes=max_nodes)
                    assert not bound.exact and bound.gold_cost == exact.gold_cost
                    assert exact.edit_cost <= bound.edit_cost <= pred.n_nodes + gold.n_nodes * 6
    assert module._bounded_distance(gold, gold, 10**6)[0] == 0


def test_a_sequence_that_never_stops_is_bounded(bars):
    tokens = bars[0][0]
    for endless in (tokens * 400, ["measure"] * 9000, ["measure", *["C4", "16th", *["beam:begin"] * 6] * 400]):
        result = tedn(endless, tokens * 4, max_nodes=500)
        assert not result.exact and 0 < result.edit_cost < 10**6


# Groups, preparation, input


def test_a_group_scores_like_its_members(bars):
    rng = np.random.default_rng(2)
    tokens, gold = bars[0]
    preds = [corrupted(tokens, way, rng) for way in WAYS]
    group = [*preds, *[encode(p) for p in preds], np.array(encode(preds[0])), gold, prepare(preds[1]), *preds]
    expected = [tedn(p, gold) for p in group]
    assert tedn_group(group, gold) == tedn_group(group, prepare(gold), jobs=1) == expected
    assert tedn_group([], gold) == []


def test_readings_that_are_the_same_are_scored_once(bars, monkeypatch):
    tokens, gold = bars[0]
    calls, real = [], module.tedn
    monkeypatch.setattr(module, "tedn", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    assert len(set(tedn_group([tokens[:9]] * 6 + [encode(tokens[:9])] + [tokens[:8]], gold))) == 2
    assert len(calls) == 2


def test_every_form_of_the_same_music_gives_the_same(bars):
    tokens, part = bars[0]
    ids = encode(tokens)
    score = root_of(ET.tostring(as_score(part)))
    forms = [tokens, tuple(tokens), ids, np.array(ids, np.uint16), [0, *ids, EOS_ID, 5, 5], delinearise(tokens)]
    for form in (*forms, part_of(tokens), prepare(tokens), pickle.loads(pickle.dumps(prepare(tokens)))):
        assert tedn(form, tokens).edit_cost == 0
    assert tedn(score, part).edit_cost == 0 and isinstance(prepare(score), PartTree)


def test_divisions_do_not_count_and_nothing_is_changed(piano):
    finer = copy.deepcopy(piano)
    for e in [*finer.iter("divisions"), *finer.iter("duration")]:
        e.text = str(3 * int(e.text))
    before = ET.tostring(piano)
    assert tedn(finer, piano).edit_cost == 0 and ET.tostring(piano) == before
    finer.find("measure/backup/duration").text = "1"
    assert tedn(finer, piano).edit_cost == 1


def test_stems_and_types_outside_the_tables_differ_from_the_others():
    def part(stem, type_):
        return ET.fromstring(f"<part><measure><note><type>{type_}</type><stem>{stem}</stem></note></measure></part>")

    assert tedn(part("double", "half"), part("up", "half")).edit_cost == 1
    assert tedn(part("up", "2048th"), part("up", "half")).edit_cost == 1
    assert tedn(part("", ""), part("", "whole")).edit_cost == 0


BAD = [
    ("measure C4 quarter", "split it"),
    (b"<part/>", "parse it"),
    (None, "give tokens"),
    (3, "give tokens"),
    ([None], "give tokens"),
    (ET.Element("measure"), "<measure>"),
    (ET.Element("score-partwise"), "without a <part>"),
    (ET.fromstring("<part><note/></part>"), "<note>"),
    (ET.fromstring("<part><measure><attributes><divisions>x</divisions></attributes></measure></part>"), "'x'"),
    (ET.fromstring("<part><measure><attributes><divisions>0</divisions></attributes></measure></part>"), "above 0"),
    (ET.fromstring("<part><measure><backup><duration/></backup></measure></part>"), "<duration>"),
]


@pytest.mark.parametrize("music,says", BAD, ids=[says for _, says in BAD])
def test_what_is_no_music_is_one_plain_line(music, says):
    for call in (lambda: tedn(music, ["measure"]), lambda: tedn(["measure"], music), lambda: tedn_group([music], [])):
        with pytest.raises(ValueError) as e:
            call()
        assert says in str(e.value) and "\n" not in str(e.value)


def test_options_out_of_range_name_the_choices():
    with pytest.raises(ValueError, match="lmx or full"):
        tedn([], [], flavour="LMX")
    with pytest.raises(ValueError, match="at least 1"):
        tedn_group([], [], jobs=0)


def test_no_folder_for_the_cache_is_no_fault(monkeypatch):
    real = numba.njit

    def refuses(**options):
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(numba, "njit", refuses)
    assert compiled(lambda x: x + 1)(1) == 2
