"""Print tokens: from MusicXML and back, plain LMX without them, slurs on their staff, old weights that grow."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from lmx.linearization.Linearizer import Linearizer
from lmx.symbolic.Pruner import Pruner
from safetensors.torch import load_file

from vitomr.data.signs import add_signs, in_random_clef, under_clef
from vitomr.decoder import READERS, Reader, load_reader, save_reader, wake
from vitomr.notation.analysis import analyse
from vitomr.notation.engrave import render_svg
from vitomr.notation.grammar import Grammar
from vitomr.notation.lmx import N_PLAIN, VOCABULARY, encode, linearise
from vitomr.notation.marks import KIND_OF, PRINT_TOKENS, plain
from vitomr.notation.musicxml import to_musicxml
from vitomr.notation.score import parts, root_of
from vitomr.notation.tedn import tedn
from vitomr.page.assemble import Line, assemble

SIGNS = """<score-partwise version="4.0"><part-list><score-part id="P1"><part-name/></score-part></part-list><part id="P1">
<measure number="1"><barline location="left"><bar-style>heavy-light</bar-style><repeat direction="forward"/></barline>
<attributes><divisions>2</divisions><key><fifths>0</fifths></key><time symbol="common"><beats>4</beats><beat-type>4</beat-type></time>
<staves>2</staves><clef number="1"><sign>G</sign><line>2</line><clef-octave-change>-1</clef-octave-change></clef>
<clef number="2"><sign>F</sign><line>4</line></clef></attributes>
<direction><direction-type><dynamics><mf/></dynamics></direction-type><staff>1</staff></direction>
<direction><direction-type><octave-shift type="down" size="8" number="1"/></direction-type><staff>1</staff></direction>
<direction><direction-type><pedal type="start"/></direction-type><staff>2</staff></direction>
<note><pitch><step>C</step><octave>5</octave></pitch><duration>4</duration><voice>1</voice><type>half</type><staff>1</staff>
<notations><ornaments><turn/></ornaments></notations></note>
<direction><direction-type><wedge type="crescendo" number="1"/></direction-type><staff>1</staff></direction>
<note><pitch><step>D</step><octave>5</octave></pitch><duration>4</duration><voice>1</voice><type>half</type><staff>1</staff><notations><articulations><breath-mark/></articulations></notations></note>
<direction><direction-type><wedge type="stop" number="1"/></direction-type><staff>1</staff></direction>
<direction><direction-type><octave-shift type="stop" size="8" number="1"/></direction-type><staff>1</staff></direction>
<backup><duration>8</duration></backup>
<note><pitch><step>C</step><octave>3</octave></pitch><duration>8</duration><voice>5</voice><type>whole</type><staff>2</staff></note></measure>
<measure number="2"><barline location="left"><ending number="1" type="start"/></barline>
<direction><direction-type><pedal type="stop"/></direction-type><staff>2</staff></direction>
<note><pitch><step>E</step><octave>5</octave></pitch><duration>8</duration><voice>1</voice><type>whole</type><staff>1</staff></note>
<backup><duration>8</duration></backup>
<note><pitch><step>C</step><octave>3</octave></pitch><duration>8</duration><voice>5</voice><type>whole</type><staff>2</staff></note>
<barline location="right"><bar-style>light-heavy</bar-style><ending number="1" type="stop"/><repeat direction="backward"/></barline></measure>
</part></score-partwise>"""  # noqa: E501
TOKENS = """measure repeat:start key:fifths:0 time beats:4 beat-type:4 common clef:G2 clef-octave:-1 staff:1
 clef:F4 staff:2
 octave:8va staff:1 dynamics:mf staff:1 pedal:start staff:2 C5 voice:1 half staff:1 turn
 wedge:crescendo staff:1 D5 half breath backup whole C3 voice:5 whole staff:2
 wedge:stop staff:1 octave:stop staff:1
 measure ending:1 pedal:stop staff:2 E5 voice:1 whole staff:1 backup whole C3 voice:5 whole staff:2
 ending:stop repeat:end""".split()  # written by hand from the score above


@pytest.fixture(scope="module")
def signs():
    return parts(root_of(SIGNS.encode()))[0].element


def test_every_sign_becomes_its_token(signs):
    assert linearise(signs, printed=True).tokens == TOKENS
    assert linearise(signs).tokens == plain(TOKENS)


def test_tokens_become_the_signs_again(signs):
    again = to_musicxml(TOKENS).find("part")
    assert linearise(again, printed=True).tokens == TOKENS
    for path in (
        "barline[@location='left']/repeat[@direction='forward']",
        "direction/direction-type/octave-shift[@type='down']",
        "direction/direction-type/dynamics/mf", "direction/direction-type/pedal[@type='start']",
        "note/notations/ornaments/turn", "note/notations/articulations/breath-mark", "barline/ending[@type='start']",
        "attributes/time[@symbol='common']", "attributes/clef/clef-octave-change",
    ):  # fmt: skip
        assert again.find(f"measure/{path}") is not None, path
    assert not analyse(TOKENS).minor and Grammar().legal(TOKENS) is None
    drawn = render_svg(to_musicxml(TOKENS))
    assert all(f'class="{what}"' in drawn for what in ("dynam", "hairpin", "octave", "turn", "pedal", "voltaBracket"))


def test_dynamics_stand_below_also_under_an_octave_line():
    score = to_musicxml("measure octave:8va dynamics:f D6 half B5 half octave:stop".split())
    placed = {d.find("direction-type")[0].tag: d.get("placement") for d in score.iter("direction")}
    assert placed == {"octave-shift": "above", "dynamics": "below"}


def test_lines_open_at_the_edge_of_a_line_meet_in_the_document(signs):
    first = "measure clef:G2 wedge:crescendo C4 whole".split()
    second = "measure clef:G2 D4 whole wedge:stop".split()
    wedges = lambda score: [w.get("type") for w in score.iter("wedge")]
    assert wedges(to_musicxml(first)) == [] == wedges(to_musicxml(second))
    assert wedges(assemble([[Line(first)], [Line(second)]]).score) == ["crescendo", "stop"]


def test_dropping_print_tokens_gives_what_the_package_writes(excerpts):
    "On excerpts with signs written in; the package's own linearizer is the oracle."
    n = 0
    for seed, excerpt in enumerate(excerpts * 5):
        part = ET.fromstring(ET.tostring(excerpt))
        rng = np.random.default_rng(seed)
        add_signs(part, rng)
        printed = linearise(part, printed=True).tokens
        reference = ET.fromstring(ET.tostring(part))
        Pruner().process_part(reference)
        linearizer = Linearizer()
        linearizer.process_part(reference)
        assert plain(printed) == linearizer.output_tokens
        assert linearise(to_musicxml(printed).find("part"), printed=True).tokens == printed
        n += any(t in KIND_OF for t in printed)
    assert n > 100


def test_the_tree_distance_is_of_plain_lmx():
    for given in (TOKENS, encode(TOKENS)):
        assert tedn(given, plain(TOKENS)).edit_cost == 0 == tedn(plain(TOKENS), given).edit_cost
    assert tedn(TOKENS, plain(TOKENS)).gold_cost == tedn(TOKENS, TOKENS).gold_cost


def test_print_tokens_are_no_errors_and_change_none(excerpts):
    for seed, excerpt in enumerate(excerpts):
        part = ET.fromstring(ET.tostring(excerpt))
        add_signs(part, np.random.default_rng(seed))
        tokens = linearise(part, printed=True).tokens
        assert [e.kind for e in analyse(tokens).minor] == [e.kind for e in analyse(plain(tokens)).minor]


@pytest.mark.parametrize(
    "tokens, ends",
    [  # notes joined, counted in the order of the sequence
        ("C5 half staff:1 slur:start backup half C3 voice:5 half staff:2 slur:stop", []),
        ("C5 quarter staff:1 slur:start D5 quarter slur:stop backup half C3 voice:5 quarter staff:2 slur:start "
         "D3 quarter slur:stop", [(0, 1), (2, 3)]),
        ("C5 voice:1 quarter staff:1 slur:start D5 quarter slur:stop backup half A4 voice:2 quarter staff:1 slur:start "
         "G4 quarter slur:stop", [(0, 1), (2, 3)]),
        ("C5 quarter slur:start slur:start D5 quarter slur:stop E5 quarter slur:stop", [(0, 2), (0, 1)]),
    ],
)  # fmt: skip
def test_a_slur_ends_on_its_own_staff(tokens, ends):
    "As a program that reads the file pairs them: by number, in the order of the file."
    score = to_musicxml(f"measure time beats:3 beat-type:4 clef:G2 staff:1 clef:F4 staff:2 {tokens}".split())
    open_slurs, found = {}, []
    for i, note in enumerate(n for n in score.iter("note") if n.get("color") is None):
        slurs = sorted(note.iterfind("notations/slur"), key=lambda s: s.get("type") == "start")
        for slur in slurs:
            if slur.get("type") == "start":
                assert slur.get("number") not in open_slurs
                open_slurs[slur.get("number")] = i
            elif slur.get("number") in open_slurs:
                found.append((open_slurs.pop(slur.get("number")), i))
    assert sorted(found) == sorted(ends)


def test_weights_of_plain_lmx_load_and_write_what_they_wrote(tmp_path):
    torch.manual_seed(0)
    old = Reader(READERS["smoke"]).eval()
    with torch.no_grad():
        for name, p in old.named_parameters():  # as such weights were: 227 rows
            if name.split(".")[0] in ("embed", "head", "symbol_head"):
                p.data = p.data[:N_PLAIN].clone()
    save_reader(old, tmp_path, dtype=torch.float32)
    (tmp_path / "vocabulary.txt").write_text("\n".join(VOCABULARY[:N_PLAIN]) + "\n")
    config = json.loads((tmp_path / "config.json").read_text()) | {"vocabulary_size": N_PLAIN}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(load_file(tmp_path / "model.safetensors")["head.bias"]) == N_PLAIN

    new = load_reader(tmp_path)
    img, mask = torch.full((1, 1, 96, 160), 200, dtype=torch.uint8), torch.ones(1, 6, 10, dtype=torch.bool)
    tokens = torch.tensor([[0, *encode("measure clef:G2 C4 quarter D4 half".split())]])
    with torch.no_grad():
        before = old.decode_guided(tokens, old.encode(img, mask))[0]
        after = new.decode_guided(tokens, new.encode(img, mask))[0]
    assert after.shape[-1] == len(VOCABULARY)
    assert torch.allclose(before.log_softmax(-1), after.log_softmax(-1)[..., :N_PLAIN], atol=1e-5)
    assert after[..., N_PLAIN:].max() < -20
    wake(new)
    assert new.head.bias[N_PLAIN:].eq(-8).all() and new.head.bias[:N_PLAIN].eq(old.head.bias).all()


def test_a_clef_moves_names_and_not_places(excerpts):
    part = ET.fromstring(ET.tostring(excerpts[0]))
    before = linearise(part).tokens
    assert under_clef(part, "C", 3)
    after = linearise(part).tokens
    assert "clef:C3" in after and len(after) == len(before)
    steps = "CDEFGAB"
    height = lambda t: steps.index(t[0]) + 7 * int(t[1])
    moved = {height(b) - height(a) for a, b in zip(before, after) if len(a) == 2 and a[1].isdigit()}
    assert moved == {-6}  # the bottom line is E4 under a treble clef, F3 under an alto clef
    in_random_clef(part, np.random.default_rng(0))
    assert any(t.startswith("clef:") for t in linearise(part).tokens)


def test_random_print_tokens_never_break_a_score():
    rng = np.random.default_rng(0)
    words = [*PRINT_TOKENS, *"measure C4 D4 quarter half rest staff:1 staff:2 chord backup clef:G2 time".split()]
    for _ in range(300):
        tokens = ["measure", *rng.choice(words, rng.integers(0, 40))]
        score = to_musicxml(tokens)
        assert len(analyse(tokens).bars) == len(score.findall("part/measure"))
        assert all(m.bar < len(analyse(tokens).bars) for m in analyse(tokens).marks)
