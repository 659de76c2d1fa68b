"""The normal form of a picture: whatever its type, size, angle and light, the staff comes out level at 8 px a space."""

import cv2
import numpy as np
import pytest
from PIL import Image

from vitomr.notation.engrave import engrave
from vitomr.page.staves import (
    MAX_PIXELS,
    UP,
    Normalised,
    NoStaffError,
    comb_score,
    estimate_staff_space,
    estimate_tilt,
    flatten_ground,
    map_points,
    normalise,
    to_gray,
)

SPACE = 9  # px, staff space of the engravings (a whole percentage in Verovio: 50)


def staff_xml(bars, n_staves=1):
    "MusicXML of quarter notes; a bar is one string of pitches per staff, such as 'C5 E5 G5 E5'."
    body = ""
    for i, bar in enumerate(bars, 1):
        clefs = [f"<clef number='{n}'><sign>{sign}</sign></clef>" for n, sign in ((1, "G"), (2, "F"))]
        body += f"<measure number='{i}'>"
        if i == 1:
            body += f"<attributes><divisions>1</divisions><staves>{n_staves}</staves>"
            body += "".join(clefs[:n_staves]) + "</attributes>"
        for staff in range(1, n_staves + 1):
            body += "<backup><duration>4</duration></backup>" if staff > 1 else ""
            for pitch in bar[staff - 1].split():
                body += (f"<note><pitch><step>{pitch[0]}</step><octave>{pitch[1]}</octave></pitch>"
                         f"<duration>1</duration><voice>{staff}</voice><type>quarter</type><staff>{staff}</staff></note>")
        body += "</measure>"
    part_list = "<part-list><score-part id='P1'><part-name/></score-part></part-list>"
    return f"<score-partwise>{part_list}<part id='P1'>{body}</part></score-partwise>"


VOICE = [("E5 D5 C5 D5",), ("A4 E5 G5 F5",), ("D5 F5 A4 B4",), ("C5 A5 G5 C6",)]
PIANO = [("E5 D5 C5 D5", "C3 E3 G3 C3"), ("A4 E5 G5 F5", "F2 A2 C3 D3"), ("D5 F5 A4 B4", "G2 B2 D3 F3"),
         ("C5 A5 G5 C6", "C3 G2 E2 C2")]


def draw(kind="piano", **layout):
    bars, n_staves = (PIANO, 2) if kind == "piano" else (VOICE, 1)
    return engrave(staff_xml(bars, n_staves), **{"staff_space": SPACE, **layout}).img


def turn(img, degrees, pad=60):
    "Rotate about the middle: lines sink to the right by this angle."
    img = cv2.copyMakeBorder(img, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=255)
    m = cv2.getRotationMatrix2D((img.shape[1] / 2, img.shape[0] / 2), -degrees, 1)
    return cv2.warpAffine(img, m, img.shape[::-1], flags=cv2.INTER_LINEAR, borderValue=255)


def heads(img, space):
    "Centres of filled noteheads (N, 2): what is left of the ink once lines and stems are opened away."
    size = 2 * round(0.3 * space) + 1  # odd: an even kernel would shift
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    ink = cv2.morphologyEx((img < 110).astype(np.uint8), cv2.MORPH_OPEN, kernel)
    _, _, stats, centres = cv2.connectedComponentsWithStats(ink)
    w, h = stats[:, 2] / space, stats[:, 3] / space
    return centres[(w > 0.9) & (w < 1.7) & (h > 0.6) & (h < 1.4)]


def staff_rows(img):
    "Rows that are dark in most columns."
    return np.flatnonzero((img < 200).mean(1) > 0.6)


# --- any picture in


def test_every_way_to_write_a_picture_is_the_same():
    img = draw()
    clear = np.dstack([np.zeros((*img.shape, 3), np.uint8), 255 - img])
    ways = {
        "float": img / 255,
        "float32": (img / 255).astype(np.float32),
        "16 bit": img.astype(np.uint16) * 257,
        "rgb": np.dstack([img] * 3),
        "opaque": np.dstack([img] * 3 + [np.full_like(img, 255)]),
        "transparent": clear,
        "one channel": img[..., None],
        "strided": np.repeat(img, 2, 1)[:, ::2],
        "PIL L": Image.fromarray(img),
        "PIL RGB": Image.fromarray(img).convert("RGB"),
        "PIL RGBA": Image.fromarray(clear),
        "PIL LA": Image.fromarray(clear).convert("LA"),
        "PIL palette": Image.fromarray(img).convert("P"),
    }
    for name, way in ways.items():
        gray = to_gray(way)
        assert gray.dtype == np.uint8 and gray.shape == img.shape, name
        assert abs(gray.astype(int) - img).max() <= 1, name
    black = img < 128
    assert (to_gray(~black) == np.where(black, 0, 255)).all()
    assert (to_gray(Image.fromarray(~black)) == np.where(black, 0, 255)).all()


@pytest.mark.parametrize(
    "bad, word",
    [
        (None, "NoneType"),
        ("page.png", "str"),
        ([[0, 255]], "list"),
        (np.zeros((0, 0), np.uint8), "0 x 0"),
        (np.zeros(100, np.uint8), "shape"),
        (np.zeros((40, 40, 2), np.uint8), "shape"),
        (np.zeros((2, 40, 40, 3), np.uint8), "shape"),
        (np.zeros((15, 400), np.uint8), "at least 16"),
        (np.full((40, 40), np.nan), "NaN"),
        (np.full((40, 40), 200.0), "0 to 1"),
        (np.zeros((40, 40), np.int64), "int64"),
        (np.zeros((40, 40), complex), "complex"),
        (np.broadcast_to(np.uint8(255), (MAX_PIXELS // 7000, 7001)), "megapixels"),
        (np.broadcast_to(np.uint8(255), (16, 40_000)), "a side"),
        (Image.new("F", (40, 40)), "mode F"),
    ],
)
def test_no_picture_is_one_clear_line(bad, word):
    for function in (to_gray, normalise, estimate_staff_space, estimate_tilt, flatten_ground):
        with pytest.raises(ValueError, match=word) as e:
            function(bad)
        assert "\n" not in str(e.value) and not isinstance(e.value, NoStaffError)


# --- even light


def test_white_paper_is_left_alone():
    img = draw()
    assert (flatten_ground(img) == img).all()


def test_shadow_goes_and_ink_stays():
    img = draw()
    x = np.linspace(0.35, 0.85, img.shape[1])
    flat = flatten_ground((img * x).astype(np.uint8))
    assert flat[img == 255].min() > 235
    assert flat[img == 0].max() < 60


# --- measures


@pytest.mark.parametrize("kind", ["voice", "piano"])
@pytest.mark.parametrize("space", [5, 6.5, 8, 11, 16, 24, 40])
def test_space_is_measured_at_every_size(kind, space):
    img = draw(kind, staff_space=45)
    img = cv2.resize(img, None, fx=space / 45, fy=space / 45, interpolation=cv2.INTER_AREA)
    found = estimate_staff_space(img)
    assert found.space == pytest.approx(space, rel=0.02)
    assert found.confidence > 0.4


@pytest.mark.parametrize("font", ["Bravura", "Petaluma"])
@pytest.mark.parametrize("wear", ["blur", "grain", "faint", "bilevel", "broken"])
def test_space_is_measured_on_worn_pictures(font, wear):
    img, rng = draw(font=font), np.random.default_rng(1)
    if wear == "blur":
        img = cv2.GaussianBlur(img, (0, 0), 1.8)
    elif wear == "grain":
        img = np.clip(img * 0.7 + rng.normal(0, 15, img.shape), 0, 255).astype(np.uint8)
    elif wear == "faint":
        img = (200 + img * 0.1).astype(np.uint8)
    elif wear == "bilevel":
        img = np.where(img < 200, 0, 255).astype(np.uint8)
    else:
        img = np.where(rng.random(img.shape) < 0.3, 255, img).astype(np.uint8)
    assert estimate_staff_space(img).space == pytest.approx(SPACE, rel=0.03)
    assert normalise(img).space_in == pytest.approx(SPACE, rel=0.03)


def test_thickness():
    thin, thick = (estimate_staff_space(draw(options={"staffLineWidth": w}, staff_space=36)) for w in (0.15, 0.3))
    assert thin.thickness == pytest.approx(0.15 * 18, abs=0.8)  # Verovio counts in half spaces
    assert thick.thickness == pytest.approx(0.3 * 18, abs=0.8)


@pytest.mark.parametrize("degrees", [-6, -3.3, -0.7, 0, 0.2, 1.9, 6])
@pytest.mark.parametrize("kind", ["voice", "piano"])
def test_tilt(kind, degrees):
    img = turn(draw(kind), degrees)
    assert estimate_tilt(img) == pytest.approx(degrees, abs=0.1)
    assert estimate_tilt(img, space=SPACE) == pytest.approx(degrees, abs=0.1)
    done = normalise(img)
    assert done.tilt == pytest.approx(degrees, abs=0.1)
    assert done.space_in == pytest.approx(SPACE, rel=0.02)
    assert len(staff_rows(done.img)) >= (5 if kind == "voice" else 10)  # lines lie in rows again


# --- no staff


def words(n, pitch=18, thick=1):
    img = np.full((n * pitch + 30, 700), 255, np.uint8)
    for i in range(n):
        text = "it was the best of times it was the worst of times it was the age"[i:]
        cv2.putText(img, text, (10, 20 + i * pitch), cv2.FONT_HERSHEY_COMPLEX, 0.5, 0, thick, cv2.LINE_AA)
    return img


NOISE = np.random.default_rng(0).integers(0, 256, (200, 700), dtype=np.uint8)


@pytest.mark.parametrize(
    "img",
    [
        np.full((200, 700), 255, np.uint8),
        np.zeros((200, 700), np.uint8),
        np.full((200, 700), 128, np.uint8),
        NOISE,
        cv2.GaussianBlur(NOISE, (0, 0), 5),
        np.tile(np.linspace(0, 255, 700), (200, 1)).astype(np.uint8),
        np.tile(np.linspace(0, 255, 200)[:, None], (1, 700)).astype(np.uint8),
        (np.indices((200, 700)).sum(0) // 9 % 2 * 255).astype(np.uint8),
        np.tile((np.arange(700) % 9 > 0) * 255, (200, 1)).astype(np.uint8),
        words(12),
        words(5),
        words(1),
        words(12, thick=2),
        np.full((16, 16), 255, np.uint8),
    ],
    ids="white black gray noise smooth across down checks upright text five one bold tiny".split(),
)
def test_without_staff_lines_it_says_so(img):
    with pytest.raises(NoStaffError, match="no staff lines found") as e:
        normalise(img)
    assert "\n" not in str(e.value) and f"{img.shape[1]} x {img.shape[0]}" in str(e.value)


def test_random_pictures_end_in_a_picture_or_a_value_error():
    rng = np.random.default_rng(5)
    for _ in range(150):
        h, w = rng.integers(16, 120, 2) if rng.random() < 0.8 else (16, 3000)
        img = rng.integers(0, 256, (h, w), dtype=np.uint8)
        img = cv2.resize(img[: max(1, h // 8), : max(1, w // 8)], (w, h)) if rng.random() < 0.5 else img
        try:
            done = normalise(img)
        except ValueError:
            continue
        assert done.img.dtype == np.uint8 and np.isfinite(done.matrix).all()


# --- the normal form


@pytest.mark.parametrize("space", [6.5, 9, 14, 22, 40])
@pytest.mark.parametrize("degrees", [0, 2.5])
def test_noteheads_land_where_the_matrix_says(space, degrees):
    img = turn(draw(staff_space=45), degrees)
    img = cv2.resize(img, None, fx=space / 45, fy=space / 45, interpolation=cv2.INTER_AREA)
    done = normalise(img)
    before, after = heads(img, space), heads(done.img, 8)
    assert len(before) >= 20
    gap = np.linalg.norm(map_points(before, done.matrix)[:, None] - after, axis=2).min(1)
    assert np.median(gap) < 0.5 and np.quantile(gap, 0.9) < 1


def test_form_is_black_on_white_cut_to_the_ink():
    shade = turn((draw() * 0.5 + 60).astype(np.uint8), 0)
    done = normalise(shade)
    assert done.img.dtype == np.uint8 and done.img.ndim == 2
    assert np.median(done.img) == 255 and np.quantile(done.img, 0.01) == 0
    rows, columns = np.flatnonzero((done.img < 128).any(1)), np.flatnonzero((done.img < 128).any(0))
    margins = rows[0], columns[0], done.img.shape[0] - 1 - rows[-1], done.img.shape[1] - 1 - columns[-1]
    assert all(6 <= m <= 11 for m in margins), margins


def test_twice_is_once():
    done = normalise(turn(draw(), 1.3))
    again = normalise(done.img)
    assert again.space_in == pytest.approx(8, rel=0.02) and abs(again.tilt) < 0.05
    assert abs(np.subtract(again.img.shape, done.img.shape)).max() <= 12


def test_strong_reduction_keeps_every_line():
    done = normalise(draw(staff_space=72))
    rows = staff_rows(done.img)
    assert len(np.split(rows, np.flatnonzero(np.diff(rows) > 3) + 1)) == 10


def test_dust_does_not_move_the_crop():
    img = cv2.copyMakeBorder(draw(), 80, 80, 80, 80, cv2.BORDER_CONSTANT, value=255)
    dusty, rng = img.copy(), np.random.default_rng(0)
    dusty[rng.integers(0, 40, 12), rng.integers(0, img.shape[1], 12)] = 0
    assert abs(np.subtract(normalise(dusty).img.shape, normalise(img).img.shape)).max() <= 2


def test_settings():
    img = turn(draw(), 2)
    small, wide = normalise(img, space=6), normalise(img, margin=3)
    assert estimate_staff_space(small.img).space == pytest.approx(6, rel=0.02)
    assert wide.img.shape[0] == normalise(img).img.shape[0] + 4 * 8
    known = normalise(img, space_in=SPACE, tilt=2)
    assert known.confidence == 1 and (known.space_in, known.tilt) == (SPACE, 2)
    assert abs(np.subtract(known.img.shape, normalise(img).img.shape)).max() <= 3
    assert normalise(img, space_in=SPACE).tilt == pytest.approx(2, abs=0.1)
    assert normalise(np.full((50, 90), 255, np.uint8), space_in=8, tilt=0).img.min() == 255


def test_max_height_keeps_the_staff():
    img = cv2.copyMakeBorder(draw("voice"), 150, 150, 0, 0, cv2.BORDER_CONSTANT, value=255)
    img[20:32, 300:340] = 0  # a blot far above
    whole, cut = normalise(img), normalise(img, max_height=100)
    assert whole.img.shape[0] > 200 and cut.img.shape[0] == 100
    assert len(staff_rows(cut.img)) == len(staff_rows(whole.img)) >= 5
    point = [[200, 220]]
    (x, y), = np.round(map_points(point, whole.matrix)).astype(int)
    (u, v), = np.round(map_points(point, cut.matrix)).astype(int)
    assert (whole.img[y - 9 : y + 9, x - 9 : x + 9] == cut.img[v - 9 : v + 9, u - 9 : u + 9]).all()


@pytest.mark.parametrize("bad", [
    dict(space=0), dict(space=-8), dict(space=float("nan")), dict(space=1e6), dict(margin=-1), dict(tilt=80),
    dict(space_in=0), dict(space_in=0.001, tilt=0), dict(max_height=0)])
def test_senseless_settings_are_refused(bad):
    with pytest.raises(ValueError) as e:
        normalise(draw("voice"), **bad)
    assert "\n" not in str(e.value)


def test_map_points():
    m = np.array([[2, 0, 1], [0, 3, -1.0]])
    assert (map_points([(1, 1), (0, 2)], m) == [(3, 2), (1, 5)]).all()
    for points, matrix in (([1, 2], m), ([(1, 2, 3)], m), ([(1, 2)], np.eye(3))):
        with pytest.raises(ValueError, match="expected"):
            map_points(points, matrix)


def test_input_is_not_written_to():
    img = draw("voice")
    before = img.copy()
    assert isinstance(normalise(img), Normalised)
    assert (img == before).all()


def test_half_a_staff_space_is_no_staff_space():
    "Half of it meets lines at its second and fourth step, but not at its first and third."
    lag, space = np.arange(0, 200 * UP) / UP, 12.0
    corr = sum((5 - k) * np.exp(-(((lag - k * space) / 1.5) ** 2)) for k in range(5)) - 0.5  # paper between the lines
    whole, half = comb_score(corr, np.array([space, space / 2]))
    assert half < 0.2 * whole
