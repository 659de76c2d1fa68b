"A file is opened once, its systems are found once, a line is cropped and encoded once, whatever is asked of it later."

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitomr import transcribe, views
from vitomr.decoder import READERS, Reader
from vitomr.insight import look
from vitomr.page import documents, staves
from vitomr.page.documents import Pages
from vitomr.reading import weights
from vitomr.reading.choices import Decoding
from vitomr.reading.lines import write_pictures
from vitomr.transcribe import Transcriber

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PAGE, LINE = EXAMPLES / "pages" / "bach-invention-1.png", EXAMPLES / "schumann-rosen-voice.png"


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return Transcriber(Reader(READERS["smoke"]))


@pytest.fixture
def done(monkeypatch, untrained):
    "How often files were opened, systems found, lines cropped; and how many pictures the encoder saw."
    count = Counter()

    def counted(module, name: str, what: str) -> None:
        real = getattr(module, name)

        def call(*args, **kwargs):
            count[what] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module, name in (
        (staves, "_decoded"),
        (documents, "_n_frames"),
        (documents, "_n_pdf_pages"),
        (documents, "_drawn"),
    ):
        counted(module, name, "opened")
    counted(transcribe, "find_systems", "found")
    counted(transcribe, "crop", "cropped")
    counted(weights, "normalise", "normalised")
    hook = untrained.model.encoder.register_forward_hook(lambda _, args, out: count.update(encoded=len(args[0])))
    yield count
    hook.remove()


@pytest.mark.parametrize("shifts", [1, 2])
def test_a_page_is_opened_found_cropped_and_encoded_once(untrained, done, shifts):
    "Read with a second look, looked at, shown, sampled twice more, and its notes found for words."
    *_, last = untrained.read(PAGE, words=False, keep=True, max_tokens=30, shifts=shifts)
    document = last.document
    n = len(document.lines)
    assert n == 6 and done == {"opened": 1, "found": 1, "cropped": n, "encoded": n * shifts}
    first = views.seen_lines(untrained, document)
    for seed in (1, 2):
        *_, last = untrained.read(
            document, words=False, keep=True, max_tokens=30, shifts=shifts, temperature=1, seed=seed
        )
        views.seen_lines(untrained, last.document)
        assert [x.tokens for x in last.document.lines] != [x.tokens for x in document.lines]
    for line in document.lines:
        line.tokens = ["measure", "C4", "quarter"]
        assert len(transcribe._heads(untrained, line)) == 1
    assert done == {"opened": 1, "found": 1, "cropped": n, "encoded": n * shifts}
    assert [len(system) for system in first] == [1] * n
    document.forget()
    assert all(x.encoding is None for x in document.lines)


def test_what_is_kept_says_the_same_as_a_new_encoding(untrained):
    "Likelihoods and attention, from a batch padded to its widest line and from the line alone."
    *_, last = untrained.read(PAGE, words=False, keep=True, max_tokens=20, shifts=2)
    assert len({x.picture.shape for x in last.document.lines}) > 1
    for line in last.document.lines:
        for shifts in (1, 2):
            kept = look(untrained, line.picture, line.tokens, shifts, line.encoding)
            new = look(untrained, line.picture, line.tokens, shifts)
            np.testing.assert_allclose(kept.logp, new.logp, atol=1e-4)
            np.testing.assert_allclose(kept.attention, new.attention, atol=1e-4)
            assert kept.attention.shape == new.attention.shape


def test_a_line_goes_on_where_it_was_encoded(untrained, done):
    "A single line; another number of looks is another encoding; nothing is kept unless asked for."
    *_, last = untrained.read(LINE, words=False, keep=True, max_tokens=20, shifts=1)
    once = dict(done)
    assert once["opened"] == 1 and once["encoded"] == 1 and "cropped" not in once
    *_, again = untrained.read(last.document, words=False, max_tokens=20, shifts=1)
    assert again.document.lines[0].tokens == last.document.lines[0].tokens and done == once
    assert again.document.lines[0].encoding is None
    *_, wider = untrained.read(last.document, words=False, keep=True, max_tokens=20, shifts=2)
    assert done["encoded"] == 3 and len(wider.document.lines[0].encoding.features) == 2
    pictures = [last.document.lines[0].picture] * 2
    assert all(x.encoding is None for x in write_pictures(untrained, pictures, Decoding(max_tokens=5)))


def test_points_of_a_line_are_found_on_the_picture(untrained):
    "The corners of each crop, back on the page given, enclose the box of its part; of one line, on its own picture."
    *_, last = untrained.read(PAGE, words=False, max_tokens=5)
    (page,) = last.document.pages
    for system in page.systems:
        for line in system.lines:
            h, w = line.picture.shape
            x0, y0, x1, y1 = line.box
            corners = page.place(line, np.array([[0, 0], [w, 0], [w, h], [0, h]], float))
            box = page.page.level.to_picture(np.array([[x0, y0], [x1, y1]], float))
            assert (corners.min(0) <= box.min(0) + 3).all() and (corners.max(0) >= box.max(0) - 3).all()
    *_, last = untrained.read(LINE, words=False, max_tokens=5)
    (page,), (line,) = last.document.pages, last.document.lines
    found = page.place(line, np.array([[0, 0], line.picture.shape[::-1]], float))
    normal = untrained.normal_form(LINE)
    np.testing.assert_allclose(staves.map_points(found, normal.matrix), [[0, 0], normal.img.shape[::-1]], atol=1e-6)


def test_open_pages_are_not_opened_again(untrained, done, tmp_path):
    frames = [Image.open(LINE).convert("L")] * 2
    frames[0].save(tmp_path / "two.tif", save_all=True, append_images=frames[1:])
    opened = Pages(tmp_path / "two.tif")
    assert len(opened) == 2 and done["opened"] == 1  # counted; each page is drawn when its turn comes
    *_, last = untrained.read(opened, words=False, max_tokens=5)
    assert len(last.document.pages) == 2 and done["opened"] == 3
