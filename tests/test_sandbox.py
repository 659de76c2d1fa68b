"""What comes from outside ends in one line: whatever it does to the library that reads it, this process lives on."""

import io
import os
import struct
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitomr.notation.engrave import engrave, midi_bytes, render_svg
from vitomr.notation.pdf import pdf_bytes
from vitomr.notation.score import ScoreError, read_score, root_of
from vitomr.page.documents import Pages, n_pages
from vitomr.page.staves import PictureError, open_picture
from vitomr.sandbox import Limits, Pool, SandboxError, _Ended, call, in_process, one_line, pack, short_name, unpack
from vitomr.transcribe import Transcriber, _open_page

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

SCORE = (
    '<score-partwise version="4.0"><part-list><score-part id="P1"><part-name/></score-part></part-list><part id="P1">'
    '<measure number="1"><attributes><divisions>{divisions}</divisions><time><beats>4</beats><beat-type>{beat_type}'
    "</beat-type></time><staves>{staves}</staves><clef><sign>G</sign><line>2</line></clef></attributes>{music}"
    "</measure></part></score-partwise>"
)
NOTE = "<note><pitch><step>C</step><octave>5</octave></pitch><duration>{}</duration><type>{}</type>{}</note>"


def score(music: str = NOTE.format(4, "whole", ""), divisions="1", beat_type="4", staves="1") -> str:
    return SCORE.format(music=music, divisions=divisions, beat_type=beat_type, staves=staves)


@pytest.mark.parametrize(
    ("job", "args", "says"),
    [
        ("time:sleep", (60,), "more than 0.4 s"),
        ("os:abort", (), "SIGABRT"),
        ("os:_exit", (3,), "ended its worker"),
        ("builtins:bytearray", (10**11,), "more than 0.2 GB of memory"),
        ("builtins:bytes", (3 * 10**7,), "gives more than 10 MB"),
        ("re:fullmatch", ("(a+)+$", "a" * 40 + "b"), "more than 0.4 s"),
        ("math:sqrt", (-1.0,), "math domain error"),
        ("builtins:object", (), "object"),
    ],
)
def test_a_worker_that_fails_costs_one_line_and_is_replaced(job, args, says):
    limits = Limits(seconds=0.4 if "0.4" in says else 20, memory=200_000_000, output=10_000_000)
    with pytest.raises(SandboxError, match=says) as e:
        call(job, *args, what="counting", limits=limits)
    assert "\n" not in str(e.value) and len(str(e.value)) <= 200
    assert call("math:sqrt", 4.0) == 2.0


def test_an_answer_is_data_and_never_code():
    sent = {"a": [1, 2.5, None, "x" * 5000, "\ud800"], "b": b"\x00\xff", "c": np.arange(6, dtype="<f4").reshape(2, 3)}
    _, head, *rest = pack(sent)
    back = unpack(head, bytearray(b"".join(rest)))
    assert (back["c"] == sent["c"]).all() and back["c"].dtype == "<f4"
    assert back["a"] == sent["a"] and back["b"] == sent["b"]
    for hostile in ('{"~":"O","shape":[1],"size":8}', '{"~":"|u1","shape":[9],"size":8}', '{"~":"bytes","size":99}'):
        with pytest.raises(ValueError):
            unpack(hostile.encode(), bytearray(8))
    with pytest.raises(TypeError):
        pack(ET.Element("a"))


def test_workers_are_used_again_and_wait_their_turn():
    pool = Pool(1)
    try:
        first = [pool.ask("os:getpid", (), Limits())["value"] for _ in range(3)]
        assert len(set(first)) == 1 and first[0] != os.getpid()
        with pytest.raises(_Ended):
            pool.ask("os:abort", (), Limits())
        assert pool.ask("os:getpid", (), Limits())["value"] != first[0]
    finally:
        pool.close()


def test_a_worker_ends_with_its_parent():
    "Whatever threads its libraries have started; the parent is killed, so it says no goodbye."
    code = (
        "import os, signal; from vitomr.notation.engrave import engrave; from vitomr.sandbox import call, pool\n"
        f"engrave({score()!r})\n"
        "print(pool()._idle[0].process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    worker = int(done.stdout)
    for _ in range(600):
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(worker)], capture_output=True, text=True).stdout.strip()
        if not state or state.startswith("Z"):  # gone, or waiting for init to take note
            return
        time.sleep(0.05)
    raise AssertionError(f"worker {worker} outlives its parent")


def test_a_worker_sees_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    pool = Pool(1)
    try:
        assert pool.ask("os:getenv", ("HF_TOKEN",), Limits())["value"] is None
        assert pool.ask("os:getenv", ("PATH",), Limits())["value"] == os.environ["PATH"]
    finally:
        pool.close()


def test_in_process_is_this_process():
    from vitomr.sandbox import sandboxed

    here = sandboxed("asking")(os.getpid)
    assert here() != os.getpid()
    with in_process():
        assert here() == os.getpid()


LONG = "<forward><duration>999999999</duration></forward>"
REPEAT = "<barline><repeat direction='backward' times='999999999'/></barline>"
TUPLET = "<time-modification><actual-notes>0</actual-notes><normal-notes>2</normal-notes></time-modification>"
WORDS = f"<direction><direction-type><words>{'x' * 20000}</words></direction-type></direction>"
HOSTILE = {
    "beat type 0": (score(beat_type="0"), "beat-type"),
    "beat type 3": (score(beat_type="3"), "power of two"),
    "no staves": (score(staves="0"), "staves"),
    "a staff that is none": (score(NOTE.format(4, "whole", "<staff> </staff>")), "staff"),
    "no divisions": (score(divisions=""), "<divisions> holds ''"),
    "half a division": (score(divisions="1e400"), "divisions"),
    "a move of a million bars": (score(LONG), "quarters"),
    "a number of 100 MB": (score(NOTE.format("1e100000000", "whole", "")), "duration"),
    "a repeat without end": (score(REPEAT), "repeat of times"),
    "a tuplet of nothing": (score(NOTE.format(4, "whole", TUPLET)), "actual-notes"),
    "a pitch without octave": (score("<note><pitch><step>C</step></pitch><duration>4</duration></note>"), "octave"),
    "an octave far away": (score(NOTE.format(4, "whole", "").replace("<octave>5", "<octave>1000000000")), "octave"),
    "nested": (score("<note>" * 990 + "</note>" * 990), "deep"),
    "many dots": (score(NOTE.format(4, "whole", "<dot/>" * 999)), "dots"),
    "many notes": (score(NOTE.format(1, "quarter", "") * 3000), "notes in a bar"),
    "a long text": (score(WORDS), "text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_score_beyond_the_limits_names_the_limit(name):
    text, says = HOSTILE[name]
    for read in (lambda: root_of(text.encode(), "song.musicxml"), lambda: render_svg(text)):
        with pytest.raises(ScoreError, match=says) as e:
            read()
        assert "\n" not in str(e.value) and len(str(e.value)) <= 200


def test_a_score_that_ends_the_engraver_is_one_line():
    "A maxima under a beam: within all limits, and a segmentation fault in Verovio."
    beam = '<beam number="1">{}</beam>'
    music = "".join(
        NOTE.format(n, kind, beam.format(said))
        for n, kind, said in ((1, "eighth", "begin"), (64, "maxima", "continue"), (1, "eighth", "end"))
    )
    text = score(music, divisions="2")
    root = root_of(text.encode())
    for make in (render_svg, engrave, midi_bytes, pdf_bytes):
        with pytest.raises(ScoreError, match="ended its worker") as e:
            make(root)
        assert len(str(e.value)) <= 200
    assert "<svg" in render_svg(score())


def test_both_ways_make_the_same():
    root = root_of(score().encode())
    root.find("part/measure/note").set("id", "n0")  # Verovio gives random names to notes without one
    there = engrave(root), midi_bytes(root)
    with in_process():
        here = engrave(root), midi_bytes(root)
    assert (there[0].img == here[0].img).all() and there[0].positions == here[0].positions != {}
    assert there[1] == here[1]


def pdf(content: bytes, *objects: bytes, n_pages: int = 1) -> bytes:
    "A page of A4 that draws `content`, with the form /F; objects count from 5, and the last ones are further pages."
    more = b"".join(b" %d 0 R" % (5 + len(objects) - k) for k in range(1, n_pages))
    bodies = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R%s]/Count %d>>" % (more, n_pages),
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Contents 4 0 R/Resources<</XObject<</F 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(content), content),
        *objects,
    ]
    data, at = b"%PDF-1.4\n", []
    for i, body in enumerate(bodies, 1):
        at.append(len(data))
        data += b"%d 0 obj%sendobj\n" % (i, body)
    table = b"".join(b"%010d 00000 n \n" % a for a in at)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(at) + 1)
    return data + head + table + b"trailer<</Root 1 0 R/Size %d>>startxref\n%d\n%%%%EOF" % (len(at) + 1, len(data))


def form(content: bytes, draws: int) -> bytes:
    head = b"<</Type/XObject/Subtype/Form/BBox[0 0 595 842]/Resources<</XObject<</F %d 0 R>>>>/Length %d>>stream\n"
    return head % (draws, len(content)) + content + b"\nendstream"


def test_a_pdf_that_draws_itself_without_end_is_one_line(tmp_path, monkeypatch):
    "Each form draws the next one ten times: 10^12 drawings from a few hundred bytes."
    monkeypatch.setenv("VITOMR_SECONDS", "2")
    path = tmp_path / "bomb.pdf"
    forms = (form(b"/F Do " * 10 + b"0 0 m 9 9 l S", 6 + i) for i in range(12))
    path.write_bytes(pdf(b"/F Do " * 10, *forms, form(b"", 5)))
    assert n_pages(path) == 1
    start = time.monotonic()
    with pytest.raises(PictureError) as e, Pages(path) as pages:
        pages[0]
    assert "\n" not in str(e.value) and len(str(e.value)) <= 200
    assert time.monotonic() - start < 20, "the limit of time did not hold"


def test_a_pdf_that_draws_itself_is_a_page_or_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("VITOMR_SECONDS", "2")
    path = tmp_path / "self.pdf"
    path.write_bytes(pdf(b"/F Do", form(b"/F Do /F Do", 5)))
    try:
        with Pages(path) as pages:
            assert pages[0].ndim == 2
    except PictureError as e:
        assert len(str(e)) <= 200


def tiff(n: int) -> bytes:
    rng, file = np.random.default_rng(0), io.BytesIO()
    pages = [Image.fromarray(rng.integers(0, 255, (40, 60), np.uint8)) for _ in range(n)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:], compression="tiff_lzw")
    return file.getvalue()


def test_a_tiff_cut_anywhere_is_one_line_or_its_pages(tmp_path):
    data, n_refused = tiff(3), 0
    for size in range(0, len(data), len(data) // 60):
        path = tmp_path / "cut.tif"
        path.write_bytes(data[:size])
        try:
            with Pages(path) as pages:
                for i in range(len(pages)):
                    assert pages[i].ndim == 2
        except PictureError as e:
            n_refused += 1
            assert "\n" not in str(e) and len(str(e)) <= 200 and "cut.tif" in str(e)
    assert n_refused > 30


def test_a_jpeg_with_damaged_exif_is_read_as_it_lies(tmp_path):
    picture, path = Image.new("L", (60, 40), 200), tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(path, exif=exif)
    data = path.read_bytes()
    assert open_picture(path).shape == (60, 40)  # turned
    at = data.index(b"Exif\0\0") + 6
    path.write_bytes(data[: at + 4] + struct.pack(">I", 7) + data[at + 8 :])  # its table lies in the middle of nowhere
    assert open_picture(path).shape in ((40, 60), (60, 40))
    for cut in range(at, at + 40):
        path.write_bytes(data[:cut] + bytes(len(data) - cut))
        try:
            open_picture(path)
        except PictureError as e:
            assert len(str(e)) <= 200


def test_one_impossible_page_leaves_the_others(tmp_path, smoke):
    "The first page is a few dots, the others are a line of music."
    with Image.open(EXAMPLES / "schumann-rosen-voice.png") as img:
        line = img.convert("L")
    Image.new("L", (3, 2)).save(tmp_path / "all.tif", save_all=True, append_images=[line, line])
    pages = [_open_page(Transcriber(smoke), Pages(tmp_path / "all.tif"), n, None) for n in range(3)]
    assert "page 1" in pages[0].fault and len(pages[0].fault) <= 200 and not pages[0].systems
    assert [p.fault for p in pages[1:]] == [None, None] and all(p.systems for p in pages[1:])


def test_a_page_that_ends_its_worker_leaves_the_others(tmp_path, smoke, monkeypatch):
    "A PDF of two pages: one draws itself without end, the other is empty."
    monkeypatch.setenv("VITOMR_SECONDS", "2")
    forms = (form(b"/F Do " * 10 + b"0 0 m 9 9 l S", 6 + i) for i in range(12))
    empty = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]>>"
    (tmp_path / "two.pdf").write_bytes(pdf(b"/F Do " * 10, *forms, form(b"", 5), empty, n_pages=2))
    with Pages(tmp_path / "two.pdf") as pages:
        found = [_open_page(Transcriber(smoke), pages, n, None) for n in range(2)]
        assert pages[1].min() == 255
    assert "more than 2 s" in found[0].fault and "staff" in found[1].fault


def test_a_name_is_shortened_in_its_middle():
    name = "a" * 250 + ".musicxml"
    with pytest.raises(ScoreError) as e:
        root_of(b"<nothing/>", name)
    assert len(str(e.value)) <= 200 and ".musicxml" in str(e.value) and "…" in str(e.value)
    assert short_name("b.png") == "b.png" and len(short_name(name)) <= 60
    assert one_line(KeyError()) == "KeyError" and one_line("") == ""
    assert one_line("first\nsecond") == "first" and len(one_line("x" * 999)) == 200


def test_a_foreign_format_is_read_in_a_worker(tmp_path):
    path = tmp_path / "scale.abc"
    path.write_text("X:1\nT:a\nM:4/4\nL:1/4\nK:C\nCDEF|GABc|\n")
    assert len(list(read_score(path).iter("note"))) == 8
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ScoreError) as e:
        read_score(path)
    assert len(str(e.value)) <= 200


def test_a_damaged_archive_is_one_line():
    box = io.BytesIO()
    with zipfile.ZipFile(box, "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.xml", score())
    data = box.getvalue()
    assert root_of(data).tag == "score-partwise"
    for cut in range(10, len(data), 7):
        with pytest.raises(ScoreError) as e:
            root_of(data[:cut], "a.mxl")
        assert len(str(e.value)) <= 200
