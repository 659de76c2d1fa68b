"""Pages: systems found where they are known, files of every kind, and one score from lines."""

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

from vitomr.cli import main
from vitomr.data.corpora import open_corpus
from vitomr.data.engravers import ENGRAVERS, PageEngraving, engravers_here
from vitomr.data.pages import KINDS, cut_systems, random_sheet, wear
from vitomr.notation.analysis import bar_sums
from vitomr.notation.engrave import render_svg
from vitomr.notation.lmx import VOCABULARY, linearise
from vitomr.notation.musicxml import MARK_COLOUR
from vitomr.notation.score import musicxml_bytes, parts, root_of
from vitomr.page import joins, level
from vitomr.page.assemble import Line, assemble, match_parts
from vitomr.page.documents import Pages, files_in, page_numbers
from vitomr.page.staves import NoStaffError, PictureError, estimate_staff_space, open_picture
from vitomr.page.systems import crop, find_systems, match_outlines, with_boxes
from vitomr.sandbox import in_process
from vitomr.transcribe import Transcriber

ROOT = Path(__file__).resolve().parents[1]
SCAN = ROOT / "examples" / "pages" / "bach-invention-1.png"
LINE = ROOT / "examples" / "schumann-rosen-voice.png"


@pytest.fixture(scope="module")
def songs():
    return [s for s in open_corpus("music21", split="train") if "bwv" in s.id][:60]


@pytest.fixture(scope="module")
def sheet(songs):
    return random_sheet(songs, 12, kind="voice and piano", n_systems=3)


@pytest.fixture(scope="module")
def transcriber():
    return Transcriber.from_pretrained(device="cpu")


def turned(img, degrees):
    m = cv2.getRotationMatrix2D((img.shape[1] / 2, img.shape[0] / 2), -degrees, 1)
    return cv2.warpAffine(img, m, img.shape[::-1], borderValue=255)


def agree(page, sheet):
    return len(match_outlines([page.outline(s.box) for s in page.systems], [s.outline for s in sheet.systems]))


# systems


@pytest.mark.parametrize("preset", ["clean", "photo"])
@pytest.mark.parametrize("kind", KINDS)
def test_systems_are_found_on_made_pages(songs, kind, preset):
    sheet = wear(random_sheet(songs, 30 + KINDS.index(kind), kind=kind, n_systems=3), np.random.default_rng(4), preset)
    page = find_systems(sheet.img)
    assert len(page.systems) == agree(page, sheet) == len(sheet.systems)
    assert {tuple(p.n_staves for p in s.parts) for s in page.systems} == {sheet.staves_of_parts}
    assert page.space == pytest.approx(sheet.space, rel=0.03)
    assert all(a.box[1] < b.box[1] for a, b in zip(page.systems, page.systems[1:]))


@pytest.mark.parametrize("engraver", sorted(ENGRAVERS))
def test_systems_of_other_engravers_are_found(songs, engraver):
    if engraver not in engravers_here():
        pytest.skip(f"{engraver} is not installed")
    sheet = random_sheet(songs, 2, kind="two voices", n_systems=3, engraver=engraver)
    for i, s in enumerate(sheet.systems):  # what the engraver says of its bars fits what it drew
        bars = [len(bar_sums(tokens)) for tokens in s.tokens]
        assert len(bars) == len(s.staves) == 2 and bars[0] == bars[1] > 0
        (x0, y0), (x1, y1) = s.outline.min(0), s.outline.max(0)
        assert all(x0 - 1 <= x <= x1 + 1 and y0 - 1 <= y <= y1 + 1 for x, y in s.staves.reshape(-1, 2))
        assert i == 0 or sheet.systems[i - 1].outline[:, 1].max() <= y0
    worn = wear(sheet, np.random.default_rng(1), "scan")
    page = find_systems(worn.img)
    assert len(page.systems) == agree(page, worn) == 3 and page.space == pytest.approx(worn.space, rel=0.03)


def test_systems_are_cut_where_there_is_least_ink():
    img = np.full((100, 50), 255, np.uint8)
    img[[10, 14, 70, 74], 5:45], img[20:40, 20], img[60:66, 30] = 0, 0, 0  # a low stem above, an accent below
    staves = np.array([[[5, 10, 45, 14]], [[5, 70, 45, 74]]], float)
    (upper, *_), (lower, _, n_bars) = cut_systems(PageEngraving(img, staves, [3, 2]))
    assert (upper == 0).sum() == 100 and (lower == 0).sum() == 86 and n_bars == 2
    assert ((upper < 255) | (lower < 255)).sum() == (img < 255).sum()


def test_the_scan_of_1853_has_six_piano_systems():
    reference = json.loads((SCAN.parent / "systems.json").read_text())["boxes_xyxy"].values()
    page = find_systems(open_picture(SCAN))
    outlines = [np.array([[a, b], [c, b], [c, d], [a, d]], float) for a, b, c, d in reference]
    pairs = match_outlines([page.outline(s.box) for s in page.systems], outlines)
    assert sorted(i for i, *_ in pairs) == sorted(j for _, j, _ in pairs) == list(range(6)) and len(page.systems) == 6
    assert [[p.n_staves for p in s.parts] for s in page.systems] == [[2]] * 6


@pytest.mark.parametrize("degrees", [-5, 3])
def test_tilted_pages_are_levelled(sheet, degrees):
    img = np.pad(sheet.img, 80, constant_values=255)
    page = find_systems(turned(img, degrees))
    assert page.tilt == pytest.approx(degrees, abs=0.2)
    assert [len(s.staves) for s in page.systems] == [3] * 3


def fan(slopes, space=12, w=1400):
    "Staves of these slopes, px down per px right, with notes on them."
    img = np.full((200 + 160 * len(slopes), w), 255, np.uint8)
    for y, slope in zip(range(200, len(img), 160), slopes, strict=True):
        for line in range(y, y + 5 * space, space):
            ends = (100, round(line - slope * (w / 2 - 100))), (w - 100, round(line + slope * (w / 2 - 100)))
            cv2.line(img, *ends, 0, 2, cv2.LINE_AA)
        for x in range(200, w - 100, 90):
            head = x, round(y + space * (x // 90 % 4 + 0.5) + slope * (x - w / 2))
            cv2.ellipse(img, head, (8, 6), -20, 0, 360, 0, -1)
    return img


@pytest.mark.parametrize("low, high", [(0.03, 0.08), (-0.09, -0.04), (0.05, 0.11)])
def test_staves_that_fan_out_are_followed(low, high):
    slopes = np.linspace(low, high, 7)
    page = find_systems(fan(slopes))
    assert page.tilt == pytest.approx(np.degrees(np.arctan(slopes.mean())), abs=0.2) and len(page.systems) == 7
    for system, slope in zip(page.systems, slopes, strict=True):
        staff = system.staves[0]
        (x0, y0), (x1, y1) = page.level.to_picture([[staff.x0, staff.top], [staff.x1, staff.top]])
        assert (y1 - y0) / (x1 - x0) == pytest.approx(slope, abs=0.005)


@pytest.mark.parametrize(
    "usual, other, is_staff",  # answer, share of long strokes and staff space (px) of four staves, and of a fifth
    [((0.8, 1.0, 12), (0.2, 0.4, 9.5), False),  # two lines of words
     ((0.8, 1.0, 12), (0.2, 0.4, 12), False),
     ((0.8, 1.0, 12), (0.7, 0.9, 8.5), True),  # a voice printed small
     ((0.45, 0.1, 12), (0.28, 0.0, 12), True),  # lines that a scan has broken, one staff more than the others
     ((0.45, 0.3, 12), (0.27, 0.3, 9.8), False)],
)  # fmt: skip
def test_words_are_told_from_staves_by_the_other_staves(monkeypatch, usual, other, is_staff):
    kinds = [usual, usual, other, usual, usual]
    curves = [SimpleNamespace(strength=strength, strokes=strokes, space=space) for strength, strokes, space in kinds]

    def staff(_, curve, row):
        return level.Staff(100, 1300, row, row + 4 * curve.space), curve.strokes

    monkeypatch.setattr(level, "_staff", staff)
    found = level.staves_on_curves(None, curves, np.arange(5) * 150.0)
    assert [s.top for s in found] == [y for y in (0, 150, 300, 450, 600) if is_staff or y != 300]


def test_names_are_no_part_of_a_system(songs):
    sheets = [random_sheet(songs, seed, kind="single", n_systems=2) for seed in range(6)]
    named = 0
    for sheet in sheets:
        for system in sheet.systems:
            left, right = system.outline[:, 0].min(), system.staves[:, 0, 0].min()
            assert right - 2.5 * sheet.space - 1 <= left <= right + 1
            (y0, y1) = (round(v) for v in system.staves[0][[0, 2], 1])
            named += (sheet.img[y0:y1, : int(left) - 2] < 128).any()
    assert named


def test_crops_are_in_the_normal_form(sheet):
    page = find_systems(sheet.img)
    for part in page.systems[0].parts:
        done = crop(page, part)
        found = estimate_staff_space(done.img)
        assert found.space == pytest.approx(8, rel=0.03) and found.confidence > 0.4
        assert np.median(done.img) == 255 and done.img.shape[0] < 30 * 8


def test_points_of_the_level_page_lie_on_the_picture(sheet):
    worn = wear(sheet, np.random.default_rng(9), "photo")
    page = find_systems(worn.img)
    for found, true in zip(page.systems, worn.systems, strict=True):
        first, last = found.staves[0], found.staves[-1]
        corners = page.level.to_picture([[first.x0, first.top], [first.x1, first.top], [last.x1, last.bottom]])
        expected = np.array([true.staves[0, 0], true.staves[0, 1], true.staves[-1, 2]])
        assert np.abs(corners - expected).max() < 2.5 * worn.space


def test_boxes_drawn_by_hand(sheet):
    page = find_systems(sheet.img)
    x0, y0, x1, y1 = page.systems[1].box
    changed = with_boxes(page, [(x0, y0 - 5, x1, y1 + 5)])
    assert [p.n_staves for p in changed.systems[0].parts] == [1, 2]
    empty = with_boxes(page, [(0, 0, 200, 60)]).systems[0]
    assert [p.n_staves for p in empty.parts] == [1]
    for bad in ((5, 5, 1, 50), (0, 0, 3, 3), (1, 2, 3)):
        with pytest.raises(ValueError, match="expected"):
            with_boxes(page, [bad])


def words(n):
    img = np.full((1200, 900), 255, np.uint8)
    for i in range(n):
        cv2.putText(img, "it was the best of times it was the worst of times"[i % 9 :], (40, 60 + i * 26),
                    cv2.FONT_HERSHEY_COMPLEX, 0.7, 0, 1, cv2.LINE_AA)  # fmt: skip
    return img


RULED = np.full((1200, 900), 255, np.uint8)
RULED[60::30, 50:850] = 0
NOISE = np.random.default_rng(0).integers(0, 256, (1200, 900), dtype=np.uint8)


@pytest.mark.parametrize(
    "img", [np.full((1200, 900), 255, np.uint8), words(40), words(3), RULED, NOISE, cv2.GaussianBlur(NOISE, (0, 0), 4)],
    ids="blank text title ruled noise smooth".split(),
)  # fmt: skip
def test_pages_without_music_are_one_line(img):
    with pytest.raises(NoStaffError, match="no staff lines") as e:
        find_systems(img)
    assert "\n" not in str(e.value)


# parts


def spoilt(sheet, how):
    "The page with the marks left of its systems changed; `straight` draws a brace as Joplin's printers did."
    img, unit = sheet.img.copy(), sheet.space
    for system in sheet.systems:
        x, y0, y1 = system.staves[:, 0, 0].min(), system.staves[0, 0, 1], system.staves[-1, 2, 1]
        mark = img[int(y0 - unit) : int(y1 + unit), max(0, int(x - 2.4 * unit)) : int(x - 0.25 * unit)]
        if how == "thin":
            mark[:] = cv2.dilate(mark, np.ones((1, 3), np.uint8))
        elif how == "faded":
            mark[:] = 255 - (255 - mark) // 2
        elif how == "cut":
            mark[:, : -round(0.4 * unit)] = 255
        elif how in ("gone", "straight"):
            mark[:] = 255
        if how == "straight":
            right, left, middle = (round(x - v * unit) for v in (0.4, 0.9, 1.15))
            cv2.rectangle(img, (left, int(y0)), (right, int(y1)), 0, -1)
            cv2.circle(img, (middle, int((y0 + y1) / 2)), 2, 0, -1)
    return img


@pytest.mark.parametrize(
    "kind, bracket, how",
    [("piano", "none", how) for how in ("thin", "faded", "cut", "gone", "straight")]
    + [("voice and piano", "none", how) for how in ("thin", "faded", "cut", "gone")]
    + [("two voices", "through", how) for how in ("whole", "thin")]
    + [("four voices", "through", how) for how in ("whole", "faded", "gone")],
)
def test_parts_are_told_by_all_that_joins_their_staves(songs, kind, bracket, how):
    sheet = random_sheet(songs, 5, kind=kind, n_systems=1, bracket=bracket)
    page = find_systems(spoilt(sheet, how))
    assert [tuple(p.n_staves for p in s.parts) for s in page.systems] == [sheet.staves_of_parts]


def test_a_bracket_on_a_pale_scan_is_no_brace(songs):
    sheet = random_sheet(songs, 2, kind="two voices", n_systems=3, bracket="through")  # the second staff seems short
    page = find_systems(wear(sheet, np.random.default_rng(2), "scan").img)
    assert [[p.n_staves for p in s.parts] for s in page.systems] == [[1, 1]] * 3


def laid_out(*found, before=()):
    of_page, of_earlier = ([joins.one_part_evidence(js) for js in systems] for systems in (found, before))
    return joins.part_layouts(of_page, of_earlier)


def test_a_doubtful_system_follows_the_others_of_its_page():
    piano = joins.Join(line=1, brace=1, shown=1, bend=0.5, n_through=5, n_bars=5)
    doubtful = joins.Join(line=1, brace=1, shown=1, bend=0.1, n_through=5, n_bars=5)
    assert laid_out([doubtful]) == [[1, 1]]
    assert laid_out([piano], [doubtful], [piano]) == [[2]] * 3
    voice = joins.Join(line=1, n_bars=5)
    assert laid_out([voice, piano], [doubtful], [voice, doubtful]) == [[1, 2], [1, 1], [1, 2]]


def test_a_doubtful_page_follows_the_pages_before_it_and_a_clear_one_does_not():
    piano = joins.Join(line=1, brace=1, shown=1, bend=0.5, n_through=5, n_bars=5)
    doubtful, voice = joins.Join(line=1, n_through=5, n_bars=5), joins.Join(line=1, n_bars=5)
    assert laid_out([doubtful], [doubtful]) == [[2]] * 2
    assert laid_out([doubtful], [doubtful], before=[[voice]] * 5) == [[1, 1]] * 2
    assert laid_out([doubtful], before=[[voice, voice]] * 5) == [[2]]  # other staves, other parts
    assert laid_out(*[[piano]] * 4, before=[[voice]] * 50) == [[2]] * 4


def test_two_voices_stay_two_parts_on_a_page_without_their_bracket(songs):
    sheet = random_sheet(songs, 5, kind="two voices", n_systems=3, bracket="none")
    first, bare = find_systems(sheet.img), random_sheet(songs, 5, kind="two voices", n_systems=1, bracket="through")
    assert [len(s.parts) for s in first.systems] == [2] * 3
    bare = spoilt(bare, "gone")
    assert [len(s.parts) for s in find_systems(bare).systems] == [1]
    assert [len(s.parts) for s in find_systems(bare, first.systems).systems] == [2]



# files


def pdf(path, imgs):
    pages = [Image.fromarray(i) for i in imgs]
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=150)
    return path


ENCRYPTED = b"""%%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]>>endobj
4 0 obj<</Filter/Standard/V 1/R 2/Length 40/P -4/O<%s>/U<%s>>>endobj
trailer<</Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]>>
%%%%EOF""" % (b"ab" * 32, b"cd" * 32)


def test_pdf_pages_are_drawn(tmp_path):
    path = pdf(tmp_path / "a.pdf", [np.full((300, 200), v, np.uint8) for v in (255, 120)])
    with Pages(path) as pages:
        assert len(pages) == 2 and pages[0].shape == (600, 400) and abs(int(np.median(pages[1])) - 120) < 4
        with pytest.raises(IndexError):
            pages[2]


def test_the_pictures_of_a_tiff_are_pages_and_a_moving_picture_is_one(tmp_path):
    frames = [Image.new("L", (200 + 10 * v, 300), v) for v in (255, 120, 40)]
    for name, n in (("scan.tif", 3), ("moves.gif", 1)):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with Pages(tmp_path / name) as pages:
            assert len(pages) == n and int(np.median(pages[0])) == 255
            assert [pages[k].shape[1] for k in range(n)] == [2750, 1400, 600][:n]
    with Pages(tmp_path / "scan.tif") as pages:
        assert [int(np.median(pages[k])) for k in (2, 1)] == [40, 120]
        (tmp_path / "scan.tif").write_bytes((tmp_path / "scan.tif").read_bytes()[:1000])
        with pytest.raises(PictureError, match="scan.tif") as e:
            pages[2]
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name, data, says", [
    ("cut.pdf", None, "broken"), ("encrypted.pdf", ENCRYPTED, "encrypted"), ("text.pdf", b"hello", "no PDF"),
    ("empty.pdf", b"", "no PDF"), ("head.pdf", b"%PDF-1.7\n", "broken"), ("nothing.png", b"", "not a picture")])
def test_files_that_cannot_be_opened_are_one_line(tmp_path, name, data, says):
    if data is None:
        data = pdf(tmp_path / "whole.pdf", [np.full((300, 200), 255, np.uint8)]).read_bytes()[:700]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PictureError, match=says) as e:
        Pages(tmp_path / name)
    assert "\n" not in str(e.value) and name in str(e.value) and str(tmp_path) not in str(e.value)


def test_a_picture_too_large_inside_a_pdf_is_refused(tmp_path, monkeypatch):
    path = pdf(tmp_path / "a.pdf", [np.full((300, 200), 255, np.uint8)])
    monkeypatch.setattr("vitomr.page.documents.MAX_PIXELS", 1000)
    with in_process(), Pages(path) as pages, pytest.raises(PictureError, match="too large"):
        pages[0]


def test_page_numbers_and_folders(tmp_path):
    assert page_numbers("2, 4-5", 5) == [1, 3, 4] and page_numbers(None, 3) == [0, 1, 2]
    for bad in ("0", "3-2", "6", "x", "", "1-"):
        with pytest.raises(ValueError, match="1 to 5"):
            page_numbers(bad, 5)
    for name in ("b.png", "a.PDF", "c.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in files_in([tmp_path])] == ["a.PDF", "b.png"]
    (tmp_path / "none").mkdir()
    with pytest.raises(PictureError, match="holds no pictures"):
        list(files_in([tmp_path / "none"]))


# one score


def test_true_lines_become_the_song(sheet):
    systems = [[Line(t, n) for t, n in zip(s.tokens, sheet.staves_of_parts, strict=True)] for s in sheet.systems]
    made = assemble(systems, [0, 0, 1])
    score = root_of(musicxml_bytes(made.score))
    n_bars = sum(s[0].n_bars for s in systems)
    assert [(p.n_measures, p.n_staves) for p in parts(score)] == [(n_bars, 1), (n_bars, 2)]
    for i, part in enumerate(parts(score)):
        pitches = [t for s in systems for t in s[i].tokens if t in VOCABULARY and len(t) == 2 and t[1].isdigit()]
        assert [t for t in linearise(part.element, strict=False).tokens if len(t) == 2 and t[1].isdigit()] == pitches
        clefs = [e.findtext("sign") for e in part.element.iter("clef")]
        assert clefs[: part.n_staves] and len(part.element.findall("measure/attributes/key")) <= 3
    breaks = [m.find("print").attrib for m in score.find("part").iterfind("measure") if m.find("print") is not None]
    assert breaks == [{"new-system": "yes"}, {"new-page": "yes"}]
    for name, (system, line, at) in made.notes.items():
        note = made.score.find(f".//note[@id='{name}']")
        root = systems[system][line].tokens[at]
        assert root == note.findtext("type") or root == "rest:measure"
    assert len(made.notes) > 0.9 * len(made.score.findall(".//note"))


BAR = "measure key:fifths:0 clef:G2 time beats:4 beat-type:4 C4 whole".split()


def seconds(measure, divisions):
    return sum(Fraction(n.findtext("duration")) for n in measure.iterfind("note")) / divisions


def test_time_is_carried_and_short_bars_are_padded_and_marked():
    made = assemble([[Line(BAR)], [Line("measure key:fifths:0 clef:G2 C4 half measure D4 whole".split())]])
    bars = made.score.find("part")
    assert [seconds(m, int(bars.findtext("measure/attributes/divisions"))) for m in bars] == [4, 4, 4]
    assert [n.get("color") for n in bars[1].iterfind("note")] == [None, MARK_COLOUR]
    assert len(bars.findall("measure/attributes/key")) == len(bars.findall("measure/attributes/clef")) == 1


def test_a_pick_up_stays_in_all_parts():
    upper = "measure clef:G2 time beats:4 beat-type:4 G4 quarter measure C5 whole".split()
    lower = "measure clef:F4 time beats:4 beat-type:4 rest rest:measure measure C3 whole".split()
    score = assemble([[Line(upper), Line(lower)]]).score
    assert [m.get("number") for m in score.find("part")] == ["0", "1"]
    for part in score.findall("part"):
        assert part[0].get("implicit") == "yes"
        assert seconds(part[0], int(part.findtext("measure/attributes/divisions"))) == 1


def test_missing_bars_and_missing_parts_rest():
    voice = "measure clef:G2 time beats:4 beat-type:4 C5 whole".split()
    made = assemble([[Line(voice), Line([*BAR, *"measure C4 whole".split()], 2)], [Line(BAR, 2)]])
    first, second = made.score.findall("part")
    assert len(first) == len(second) == 3
    assert [first[i].find("note").get("color") for i in (1, 2)] == [MARK_COLOUR, None]
    assert [p.system for p in made.places] == [0, 0, 1]


def test_parts_are_matched_by_their_staves():
    assert match_parts([(1, 2), (2,)]) == [(0, 1), (1,)]
    assert match_parts([(2,), (1, 2), (1,)]) == [(1,), (0, 1), (0,)]
    assert match_parts([(1, 1), (2,)]) == [(0, 1), (0,)]


def test_any_lines_become_a_score_that_opens():
    rng = np.random.default_rng(0)
    likely = np.array(["measure", "C4", "quarter", "half", "rest", "voice:1", "staff:2", "backup", "chord", "time",
                       "beats:3", "beat-type:4", "key:fifths:2", "clef:F4", "rest:measure", "tied:start"])  # fmt: skip
    for _ in range(40):
        systems = [
            [Line([str(t) for t in rng.choice(likely if rng.random() < 0.7 else VOCABULARY[3:], rng.integers(0, 60))],
                  int(rng.integers(1, 3))) for _ in range(rng.integers(1, 4))]
            for _ in range(rng.integers(1, 4))
        ]  # fmt: skip
        score = assemble(systems).score
        assert len({len(p) for p in score.findall("part")}) == 1
        assert "<svg" in render_svg(root_of(musicxml_bytes(score)), options={"breaks": "encoded"})
    with pytest.raises(ValueError, match="no lines"):
        assemble([])


# the whole way


@pytest.fixture(scope="module")
def small(songs):
    "A page of two short systems of a voice."
    return random_sheet(songs, 3, kind="single", n_systems=2)


def test_a_document_is_read_and_a_page_without_music_passed_over(transcriber, small, tmp_path):
    path = pdf(tmp_path / "a.pdf", [np.full_like(small.img, 255), small.img])
    seen = list(transcriber.read(path, max_tokens=60))
    done = seen[-1].document
    assert [e.kind for e in seen if e.kind == "page"] == ["page"] * 2 and seen[-1].kind == "done"
    assert "no staff lines" in done.pages[0].fault and done.pages[1].fault is None
    assert len(done.systems) == 2 and sum(e.kind == "line" for e in seen) == 2
    assert [p.page for p in done.assembled.places] == [1] * done.n_bars
    for suffix in (".musicxml", ".mxl", ".mid", ".lmx", ".svg"):
        assert done.save(tmp_path / f"a{suffix}").stat().st_size > 50
    with pytest.raises(NoStaffError, match="none of"):
        transcriber.transcribe(pdf(tmp_path / "b.pdf", [np.full((400, 300), 255, np.uint8)] * 2))


def test_boxes_given_are_the_ones_read(transcriber, small):
    page = find_systems(small.img)
    done = transcriber.transcribe(small.img, boxes={0: [page.systems[1].box]}, max_tokens=8)
    assert len(done.systems) == 1 and done.systems[0].box == page.systems[1].box


def test_lines_of_a_batch_do_not_disturb_each_other(transcriber, small):
    page = find_systems(small.img)
    both = transcriber.transcribe(small.img, max_tokens=40)
    for k, system in enumerate(page.systems):
        alone = transcriber.transcribe(small.img, boxes={0: [system.box]}, max_tokens=40)
        same = sum(a == b for a, b in zip(both.lines[k].tokens, alone.lines[0].tokens, strict=False))
        assert same >= 0.9 * len(alone.lines[0].tokens)


def test_a_folder_is_read_and_a_bad_file_does_not_stop_it(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(LINE.read_bytes())
    (tmp_path / "in" / "b.png").write_text("no picture")
    assert main(["transcribe", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--format", "lmx,mid"]) == 1
    said = capsys.readouterr()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.lmx", "a.mid"]
    assert "1 of 2 files read, 1 failed" in said.out and "b.png" in said.err and "Traceback" not in said.err


@pytest.mark.parametrize("args, says", [
    (["a.png", "-o", "x", "--format", "docx"], ".musicxml"), (["a.png", "b.png", "-o", "x.mid"], "one file"),
    (["a.png", "-o", "x", "--jobs", "0"], "--jobs"), (["nowhere", "-o", "x.mid"], "nowhere"),
    ([str(LINE), "-o", "x.mid", "--pages", "2"], "1 to 1")])
def test_bad_arguments_are_one_line(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["transcribe", *args]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vitomr: ") and says in said and said.count("\n") == 1


def test_the_reader_is_at_hand():
    import vitomr

    assert vitomr.Transcriber is Transcriber
    with pytest.raises(AttributeError, match="Nothing"):
        _ = vitomr.Nothing
