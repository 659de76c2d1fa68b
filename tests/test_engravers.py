"""Drawing and other engravers: the fast drawing shows what resvg shows, and an engraver draws what was written."""

import copy

import cv2
import music21
import numpy as np
import pytest

from vitomr.cli import main
from vitomr.data.engravers import ENGRAVERS, EngraverError, check_engraver, engrave_with, engravers_here, find_program
from vitomr.data.synthesis import Mix, Shards, _balanced, build, random_layout, sample_of
from vitomr.notation.draw import Unknown, draw, outline, style_rules
from vitomr.notation.engrave import engrave, rasterise, rasterise_any
from vitomr.notation.fonts import FONTS
from vitomr.notation.lmx import decode, linearise
from vitomr.notation.musicxml import to_musicxml
from vitomr.notation.score import ScoreError, cut_excerpt, header_states, mxl_bytes, parts, read_score
from vitomr.page.staves import estimate_staff_space

# drawing


def songs():
    "Excerpts that hold lyrics, dynamics, words, tuplets, tremolos, pedals, octave lines, grace notes and hairpins."
    for name in ("schubert/lindenbaum", "schumann_clara/polonaise_op1n1", "bach/bwv66.6"):
        for part in parts(read_score(music21.corpus.getWork(name)))[:3]:
            if part.n_staves <= 2:
                yield from (cut_excerpt(part.element, at, 4) for at in (0, 12) if part.n_measures > at + 4)


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    "Difference of two pictures, anti-aliasing aside."
    return np.abs(cv2.blur(a, (7, 7)).astype(int) - cv2.blur(b, (7, 7)))


@pytest.mark.parametrize("font", FONTS)
def test_drawing_shows_what_resvg_shows(font):
    rng, seen = np.random.default_rng(FONTS.index(font)), set()
    for excerpt in songs():
        svg = engrave(excerpt, **{**random_layout(rng), "font": font}).svg
        seen |= {t for t in ("<text", "<ellipse", "<polygon", "<polyline", "slur") if t in svg}
        drawn, known = draw(svg), rasterise_any(svg)
        assert drawn.shape == known.shape
        # text is set by letter, so a word may end a pixel or two from where resvg, which kerns, ends it
        assert (apart(drawn, known) > 60).mean() < 0.004 and np.abs(drawn.astype(int) - known).mean() < 4
        ink, known_ink = (float((255 - i.astype(float)).sum()) for i in (drawn, known))
        assert 0.97 < ink / known_ink < 1.04
    assert {"<text", "<ellipse", "<polygon", "slur"} <= seen


def test_thick_beams_and_hidden_numbers_are_drawn_as_styled(piano):
    plain, thick = (engrave(piano, thick=t).svg for t in (None, {"beam": 0.09, "notehead": 0.05}))
    assert (255 - draw(thick).astype(int)).sum() > 1.02 * (255 - draw(plain).astype(int)).sum()
    assert apart(draw(thick), rasterise_any(thick)).max() < 60
    sheets = "", "g.mNum{display:none}"
    numbered, hidden = (engrave(piano, options={"mnumInterval": 1, "svgCss": css}).svg for css in sheets)
    assert (draw(numbered) < 128).sum() > (draw(hidden) < 128).sum()


def test_what_verovio_does_not_write_is_left_to_resvg(piano):
    svg = engrave(piano).svg
    odd = svg.replace("</svg></svg>", '<path d="M0 0 A 90 90 0 0 1 900 900" stroke-width="30"/></svg></svg>')
    with pytest.raises(Unknown):
        draw(odd)
    assert np.array_equal(rasterise(odd), rasterise_any(odd)) and not np.array_equal(rasterise(odd), rasterise(svg))
    with pytest.raises(Unknown):
        style_rules("<style>g.note > use {fill:red}</style>")
    with pytest.raises(Unknown):
        outline("M0 0 A 1 1 0 0 1 2 2")


# other engravers


@pytest.fixture(params=sorted(ENGRAVERS))
def engraver(request):
    if request.param not in engravers_here():
        pytest.skip(f"{request.param} is not installed")
    return request.param


def test_an_engraver_that_is_not_here_says_what_was_looked_for(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(__import__("sys").modules, "lilypond", None)
    with pytest.raises(EngraverError, match="musescore3.*apt-get install"):
        find_program("musescore")
    with pytest.raises(EngraverError, match="pip install lilypond"):
        check_engraver("lilypond")
    with pytest.raises(EngraverError, match="verovio, musescore, lilypond"):
        check_engraver("finale")
    assert engravers_here() == ["verovio"]
    where = ["data", "build", "--source", "music21", "--out", str(tmp_path / "x"), "--count", "3"]
    assert main([*where, "--engraver", "musescore"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vitomr: musescore is not installed") and said.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_another_engraver_draws_the_same_music(engraver, piano):
    state = header_states(piano)
    for start, n in ((0, 2), (1, 1)):
        excerpt = cut_excerpt(piano, start, n)
        before = linearise(excerpt).tokens
        drawn = engrave_with(engraver, excerpt, state[start], np.random.default_rng(start))
        assert abs(estimate_staff_space(drawn.img).space - 8) < 0.3 and drawn.positions == {}
        edge = np.concatenate([drawn.img[:4].ravel(), drawn.img[-4:].ravel(), drawn.img[:, :4].ravel()])
        assert edge.min() == 255 and linearise(excerpt).tokens == before
        assert 0.5 < len(drawn.img) / len(engrave(excerpt).img) < 2


def test_what_an_engraver_would_change_is_refused(engraver, piano):
    "A note that sounds sharp and is written without the sign: both programs would print it."
    excerpt = copy.deepcopy(piano)
    for sign in list(excerpt.iter("accidental")):
        next(n for n in excerpt.iter("note") if sign in list(n)).remove(sign)  # an F sharp without its sign
    with pytest.raises(ScoreError, match="accidental"):
        engrave_with(engraver, excerpt, header_states(piano)[0], np.random.default_rng(0))


def test_samples_of_another_engraver_have_no_heads(engraver, piano, tmp_path):
    sample = sample_of(piano, np.random.default_rng(0), engraver=engraver, state=header_states(piano)[0])
    assert sample.heads.shape == (0, 2) and (sample.token_head == -1).all() and sample.kind == "piano"
    (tmp_path / "songs" / "dev").mkdir(parents=True)
    (tmp_path / "songs" / "dev" / "a.mxl").write_bytes(mxl_bytes(to_musicxml(linearise(piano).tokens)))
    build(tmp_path / "songs", tmp_path / "out", 2, split="dev", engraver=engraver)
    assert len(Shards(tmp_path / "out")[1].ids) and main(["data", "check", str(tmp_path / "out")]) == 0
    with pytest.raises(ScoreError, match="another build"):
        build(tmp_path / "songs", tmp_path / "out", 2, split="dev")


# the mix of a build


def test_a_shortage_of_one_kind_is_made_up_for(shards):
    samples = [shards[i] for i in range(len(shards))]
    single = [s for s in samples if s.kind == "single"][:6]
    assert _balanced(Mix(), []).piano == pytest.approx(2 / 3)
    assert _balanced(Mix(), single).piano == 1.0 and _balanced(Mix(piano=0.0), single).piano == 0.0


def test_a_mix_is_said_on_the_command_line(piano, tmp_path, capsys):
    (tmp_path / "songs" / "train").mkdir(parents=True)
    (tmp_path / "songs" / "train" / "a.mxl").write_bytes(mxl_bytes(to_musicxml(linearise(piano).tokens)))
    where = ["data", "build", "--source", str(tmp_path / "songs"), "--count", "4"]
    assert main([*where, "--out", str(tmp_path / "w"), "--mix", "as-written"]) == 0
    keys = {t for i in range(4) for t in decode(Shards(tmp_path / "w")[i].ids) if t.startswith("key")}
    assert keys == {"key:fifths:-2"}
    assert main([*where, "--out", str(tmp_path / "v"), "--mix", "as-written", "--doubled", "1"]) == 0
    values = [{t for i in range(4) for t in decode(Shards(tmp_path / f)[i].ids)} for f in "wv"]
    assert "eighth" in values[0] and "eighth" not in values[1]
    for name in ("piano", "reduced", "hands", "lines", "doubled"):
        assert main([*where, "--out", str(tmp_path / "x"), f"--{name}", "1.2"]) == 2
        assert f"{name} 1.2" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "staves"), [("0", 1), ("1", 2)])
def test_scores_without_a_piano_are_played_by_two_hands_when_asked(tmp_path, share, staves):
    (tmp_path / "songs" / "train").mkdir(parents=True)
    (tmp_path / "songs" / "train" / "a.mxl").write_bytes(mxl_bytes(read_score(music21.corpus.getWork("bach/bwv66.6"))))
    call = ["data", "build", "--source", str(tmp_path / "songs"), "--count", "6", "--mix", "as-written", "--piano", "1"]
    assert main([*call, "--reduced", share, "--out", str(tmp_path / "out")]) == 0
    shards = Shards(tmp_path / "out")
    assert {2 if s.kind == "piano" else 1 for s in (shards[i] for i in range(len(shards)))} == {staves}
