"""Reading pictures as a user does: the library call, the command line, every format, and every kind of bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import cv2
import music21
import numpy as np
import pypdfium2
import pytest
import torch
from PIL import Image

from vitomr.cli import main
from vitomr.decoder import READERS, Reader, WeightsError, save_reader
from vitomr.insight import look
from vitomr.notation.analysis import analyse, bar_sums
from vitomr.notation.draw import Unknown
from vitomr.notation.engrave import engrave, rasterise_any
from vitomr.notation.finish import SUFFIXES
from vitomr.notation.lmx import BOS_ID, VOCABULARY, encode, linearise
from vitomr.notation.metrics import micro_rate, token_distance
from vitomr.notation.musicxml import to_musicxml
from vitomr.notation.pdf import page_svgs, pdf_bytes
from vitomr.notation.score import ScoreError, mxl_bytes, parts, read_score, root_of
from vitomr.page.assemble import Line, assemble
from vitomr.page.staves import NoStaffError, PictureError, open_picture
from vitomr.reading.choices import Decoding
from vitomr.reading.second_look import look_again
from vitomr.reading.transcription import Document, PageReading, SystemReading, Transcription
from vitomr.reading.weights import PACKAGED
from vitomr.transcribe import Transcriber, read_reference, read_references_of_parts

ROOT = Path(__file__).resolve().parents[1]
SCAN = ROOT / "examples" / "bach-invention-1-scan-1.png"
BLANK = np.full((9, 9), 255, np.uint8)


@pytest.fixture(scope="module")
def transcriber():
    return Transcriber.from_pretrained()


@pytest.fixture(scope="module")
def reading(transcriber):
    return transcriber.transcribe(SCAN)


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    save_reader(Reader(READERS["smoke"]), folder)
    return folder


def test_a_reader_in_eight_bits_reads_nearly_the_same(transcriber):
    small = Transcriber.from_pretrained(int8=True)
    assert small.device == "cpu"
    a, b = (t.transcribe(SCAN) for t in (transcriber, small))
    assert token_distance(a.tokens, b.tokens) < 0.2 * len(a.tokens)
    np.testing.assert_allclose(look(small, b.picture, b.tokens).logp[:-1], b.logp, atol=0.2)


def test_the_scan_becomes_a_score_that_music21_and_verovio_open(reading, tmp_path):
    path = reading.save(tmp_path / "scan.musicxml")
    score = music21.converter.parse(path)
    assert len(score.parts) == 2 and len(list(score.recurse().notes)) > 20
    assert engrave(read_score(path)).img.min() < 128


def test_the_packaged_reader_reads(transcriber):
    "The examples, engraved and scanned: far nearer to the reference than any music written without looking."
    rates = {}
    for reference in sorted((ROOT / "examples").glob("*.lmx")):
        true = reference.read_text().split()
        read = transcriber.transcribe(reference.with_suffix(".png")).tokens
        rates[reference.stem] = token_distance(read, true) / len(true)
    voices = [r for n, r in rates.items() if "voice" in n]
    assert np.mean(voices) < 0.25, rates
    assert np.median(list(rates.values())) < 0.5, rates


def test_every_format(reading, tmp_path):
    made = {s: reading.save(tmp_path / f"a{s}").read_bytes() for s in SUFFIXES}
    assert len(made) == len(list(tmp_path.iterdir())) == 6 and made[".pdf"].startswith(b"%PDF-")
    assert (
        made[".mid"][:4] == b"MThd" and made[".svg"].lstrip()[:4] == b"<svg" and zipfile.is_zipfile(tmp_path / "a.mxl")
    )
    assert made[".lmx"].decode().split() == reading.tokens
    plain, packed = (parts(root_of(made[s]))[0].element for s in (".musicxml", ".mxl"))
    assert linearise(plain).tokens == linearise(packed).tokens
    with pytest.raises(ValueError, match=".musicxml"):
        reading.to_bytes(".docx")


def test_a_file_is_whole_or_not_there(reading, tmp_path, monkeypatch):
    "What interrupts the writing of a file leaves the old one as it was, and nothing else."
    path = reading.save(tmp_path / "a.lmx")
    before, write = path.read_bytes(), Path.write_bytes

    def cut(self, data):
        write(self, data[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", cut)
    for name in ("a.lmx", "b.musicxml"):
        with pytest.raises(KeyboardInterrupt):
            reading.save(tmp_path / name)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


BARS = "measure C4 half D4 quarter E4 quarter ".split()


@pytest.mark.parametrize("lines", [False, True], ids=["filled", "as on the page"])
def test_a_pdf_shows_what_the_svgs_show(lines):
    "As many pages, the same ink at the same place, and what was mended in colour."
    head = "time beats:4 beat-type:4".split()
    systems = [[Line([*BARS[:1], *head, *BARS[1:], *BARS * 9], 1)], *[[Line(BARS * 10, 1)]] * 13]
    score = assemble([*systems, [Line(["measure", "C4", "half", *BARS], 1)]]).score
    svgs, pdf = page_svgs(score, lines=lines), pypdfium2.PdfDocument(pdf_bytes(score, lines=lines))
    assert len(pdf) == len(svgs) > 1
    for svg, page in zip(svgs, pdf, strict=True):
        drawn = page.render(scale=1).to_numpy()
        seen, true = cv2.cvtColor(drawn, cv2.COLOR_BGR2GRAY), rasterise_any(svg)
        assert seen.shape == true.shape and np.corrcoef(seen.ravel(), true.ravel())[0, 1] > 0.95
    colours = drawn[..., :3].astype(int)
    assert (colours.max(-1) - colours.min(-1)).max() > 60  # the rest that fills the bar, on the last page


def test_a_pdf_of_what_only_resvg_draws(monkeypatch):
    score = to_musicxml(BARS)
    outlines = pypdfium2.PdfDocument(pdf_bytes(score))[0].render(scale=1, grayscale=True).to_numpy()

    def unknown(svg):
        raise Unknown("an arc")

    monkeypatch.setattr("vitomr.notation.pdf.collect", unknown)
    picture = pypdfium2.PdfDocument(pdf_bytes(score))[0].render(scale=1, grayscale=True).to_numpy()
    assert np.corrcoef(outlines.ravel(), picture.ravel())[0, 1] > 0.9


def test_a_score_of_several_pages_is_written_whole():
    "As SVG all lines are on one sheet, wherever the pages of the source ended."
    line = Transcription(BARS * 2, [0.0] * 2 * len(BARS), np.zeros((9, 9), np.uint8))
    systems = [SystemReading((0, 0, 9, 9), np.zeros((4, 2)), [line])] * 2
    pages = [PageReading(n, np.zeros((9, 9), np.uint8), systems=systems) for n in (1, 2)]
    done = Document("book", pages)
    assert done.to_bytes(".svg").count(b'class="measure"') == done.n_bars == 8
    long = Document("book", [PageReading(1, pages[0].picture, systems=systems * 200)])
    with pytest.raises(ScoreError, match="choose .pdf"):
        long.to_bytes(".svg")


def test_a_reading_grows_bar_by_bar(transcriber, reading):
    seen, looks = [], 0
    for news in transcriber.read(SCAN):
        seen += [list(news.document.tokens)] if news.kind in ("bar", "line", "again") else []
        looks += news.kind == "again"
    assert seen[-1] == reading.tokens and len(seen) - looks == reading.tokens.count("measure")
    assert looks == any(line.n_again for line in reading.lines)
    first = seen[: len(seen) - looks]
    for a, b in zip(first, first[1:], strict=False):
        assert b[: len(a)] == a
    assert len(reading.logp) == len(reading.tokens) and max(reading.logp) <= 0


def test_lines_that_are_read_again_keep_their_tokens_apart(transcriber):
    names = ("schubert-fruehlingstraum-voice", "schumann-rosen-voice")
    voices = [transcriber.transcribe(ROOT / "examples" / f"{n}.png", keep=True, max_tokens=12) for n in names]
    systems = [s for voice in voices for s in voice.systems]
    both = replace(voices[0], pages=[replace(voices[0].pages[0], systems=systems)])
    again = transcriber.transcribe(both, max_tokens=12)
    assert [x.tokens for x in again.lines] == [x.tokens for voice in voices for x in voice.lines]


def test_a_beam_tells_its_likeliest_beginnings(transcriber):
    voice = ROOT / "examples" / "schubert-fruehlingstraum-voice.png"
    news = transcriber.read(voice, beam=3, second_look=0)
    seen = [list(n.document.tokens) for n in news if n.kind in ("bar", "line")]
    n_bars = [tokens.count("measure") for tokens in seen]
    assert n_bars == sorted(n_bars) and set(n_bars) == set(range(1, max(n_bars) + 1))
    assert seen[-1] == transcriber.transcribe(voice, beam=3, second_look=0).tokens


def test_size_and_light_do_not_matter_much(transcriber, reading):
    "The same scan at half the size, greyed and on a darker ground: the normal form takes it back."
    img = Image.open(SCAN).convert("L")
    small = np.asarray(img.resize((img.width // 2, img.height // 2), Image.Resampling.LANCZOS)) * 0.6 + 40
    other = transcriber.transcribe(small.astype(np.uint8))
    assert token_distance(other.tokens, reading.tokens) < 0.5 * len(reading.tokens)


def test_the_token_limit_is_told(transcriber):
    cut = transcriber.transcribe(SCAN, max_tokens=7)
    assert cut.truncated and len(cut.tokens) == 7 and cut.score.find("part/measure") is not None


# weights


def test_weights_by_folder(random_weights):
    assert Transcriber.from_pretrained(random_weights).model.cfg == READERS["smoke"]


@pytest.mark.parametrize("name", ["no/such-model", "nowhere", "/nowhere/at/all"])
def test_missing_weights_are_one_line(name):
    with pytest.raises(WeightsError) as e:
        Transcriber.from_pretrained(name)
    assert "\n" not in str(e.value) and name in str(e.value)


def test_packaged_weights_are_small():
    assert sum(p.stat().st_size for p in PACKAGED.iterdir()) < 30e6
    assert sum(p.numel() for p in Reader(READERS["tiny"]).parameters()) <= 12e6


# bad pictures


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)


BAD = {
    "blank.png": (lambda p: Image.new("L", (400, 120), 255).save(p), "no staff lines"),
    "black.png": (lambda p: Image.new("L", (400, 120), 0).save(p), "no staff lines"),
    "pixel.png": (lambda p: Image.new("L", (1, 1)).save(p), "1 x 1"),
    "text.png": (lambda p: p.write_text("not a picture"), "not a picture"),
    "empty.png": (lambda p: p.write_bytes(b""), "not a picture"),
    "cut.png": (lambda p: p.write_bytes(SCAN.read_bytes()[:3000]), "cannot be decoded"),
    "huge.png": (bomb, "megapixels"),
    "page.svg": (lambda p: p.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"), "not a picture"),
    "noise.png": (
        lambda p: Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 400), dtype=np.uint8)).save(p),
        "no staff lines",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_one_line(transcriber, tmp_path, name):
    make, says = BAD[name]
    make(tmp_path / name)
    with pytest.raises((PictureError, NoStaffError), match=says) as e:
        transcriber.transcribe(tmp_path / name)
    assert "\n" not in str(e.value)


def test_pictures_turned_by_exif_are_turned_back(tmp_path):
    img = Image.open(SCAN).convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    img.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert open_picture(tmp_path / "a.jpg").shape == (img.height, img.width)


# the reference beside a picture

TRUTH = SCAN.with_suffix(".musicxml").read_bytes()
PART = TRUTH[TRUTH.index(b"<part ") : TRUTH.index(b"</score-partwise>")]


def packed(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name in names:
            z.writestr(name, b"<a>" * 5_000_000)


BAD_TRUTHS = {
    "reference.pdf": (lambda p: p.write_bytes(TRUTH), "give one of .lmx"),
    "empty.lmx": (lambda p: p.write_bytes(b""), "0 tokens"),
    "only-controls.lmx": (lambda p: p.write_text("<bos> <eos>"), "0 tokens"),
    "words.lmx": (lambda p: p.write_text("measure of all things"), "unknown LMX token 'of'"),
    "bytes.lmx": (lambda p: p.write_bytes(b"\xff\xfe\x00"), "not text"),
    "one-word.lmx": (lambda p: p.write_text("x" * 1_000_000), "unknown LMX token"),
    "long.lmx": (lambda p: p.write_text("measure " * 2000), "2000 tokens"),
    "huge.lmx": (lambda p: p.write_text("measure " * 1_000_000), "larger than 4 MB"),
    "huge.musicxml": (lambda p: p.write_bytes(b"<a>" * 5_000_000), "larger than 4 MB"),
    "empty.musicxml": (lambda p: p.write_bytes(b""), "not well-formed"),
    "page.xml": (lambda p: p.write_text("<html/>"), "score-partwise"),
    "nothing.xml": (lambda p: p.write_text("<score-partwise/>"), "0 parts"),
    "two.xml": (lambda p: p.write_bytes(TRUTH.replace(b"</score-partwise>", PART + b"</score-partwise>")), "2 parts"),
    "bomb.mxl": (lambda p: packed(p, "score.musicxml"), "larger than 4 MB"),
    "no-score.mxl": (lambda p: packed(p, "picture.png"), "no MusicXML"),
    "cut.mxl": (lambda p: p.write_bytes(b"PK\3\4" + TRUTH), "not a readable .mxl"),
}


@pytest.mark.parametrize("name", BAD_TRUTHS)
def test_bad_references_are_one_line(tmp_path, name):
    make, says = BAD_TRUTHS[name]
    make(tmp_path / name)
    with pytest.raises(ScoreError, match=says) as e:
        read_reference(tmp_path / name)
    said = str(e.value)
    assert "\n" not in said and name in said and str(tmp_path) not in said and len(said) < 400


def test_reference_in_every_format(tmp_path):
    true = SCAN.with_suffix(".lmx").read_text().split()
    packed = tmp_path / "a.MXL"
    packed.write_bytes(mxl_bytes(root_of(TRUTH)))
    for path in (packed, SCAN.with_suffix(".musicxml"), SCAN.with_suffix(".lmx")):
        assert read_reference(path) == true
    with pytest.raises(ScoreError, match="no such file: b.lmx"):
        read_reference(tmp_path / "b.lmx")


def test_a_reference_of_several_parts_is_told_apart_by_its_lines(tmp_path):
    voice, piano = (
        (ROOT / "examples" / f"schubert-fruehlingstraum-{k}.lmx").read_text().split() for k in ("voice", "piano")
    )
    path = tmp_path / "song.lmx"
    path.write_text(f"{' '.join(voice)}\n\n{' '.join(piano)}\n")
    assert read_references_of_parts(path) == [voice, piano]
    rows = [" ".join(t).replace(" measure", "\nmeasure") for t in (voice, piano)]  # a bar to a row, as in the app
    path.write_text("\n".join(rows))
    assert read_references_of_parts(path) == [voice, piano]
    score = Document("song", [PageReading(1, BLANK, systems=[SystemReading((0, 0, 9, 9), BLANK, [
        Transcription(voice, [0.0] * len(voice), BLANK), Transcription(piano, [0.0] * len(piano), BLANK, n_staves=2),
    ])])])  # fmt: skip
    for suffix in (".lmx", ".musicxml", ".mxl"):
        found = read_references_of_parts(score.save(tmp_path / f"whole{suffix}"))
        assert [len(analyse(t).bars) for t in found] == [4, 4]
        assert suffix != ".lmx" or found == score.assembled.tokens
    with pytest.raises(ScoreError, match="song.lmx holds 2 parts"):
        read_reference(path)
    path.write_text("measure " * 6001)
    with pytest.raises(ScoreError, match="6001 tokens in 1 parts; give a page"):
        read_references_of_parts(path)


def test_broken_references_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    for name, data in {"a.mxl": mxl_bytes(root_of(TRUTH)), "a.musicxml": TRUTH}.items():
        for _ in range(60):
            broken = bytearray(data)
            for at in rng.integers(len(broken), size=3):
                broken[at] = rng.integers(256)
            (tmp_path / name).write_bytes(broken)
            try:
                assert read_reference(tmp_path / name)
            except ScoreError as e:
                assert "\n" not in str(e)


# command line


def start(*args) -> subprocess.Popen:
    "The command in a process group of its own, as a terminal starts it; one in the background would not hear Ctrl-C."
    return subprocess.Popen(
        [sys.executable, "-m", "vitomr.cli", *map(str, args)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"}, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def run(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vitomr.cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def test_command_line_transcribes(tmp_path):
    done = run("transcribe", SCAN, "-o", tmp_path / "new" / "out.mxl")
    assert done.returncode == 0 and "bars" in done.stdout, done.stderr
    assert len(music21.converter.parse(tmp_path / "new" / "out.mxl").parts) == 2


@pytest.fixture
def folder(tmp_path):
    "Three lines of music, one of them a TIFF, and a file that is no picture."
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [ROOT / "examples" / f"{n}-voice.png" for n in ("schubert-fruehlingstraum", "schumann-rosen")]
    for path in lines:
        (folder / path.name).write_bytes(path.read_bytes())
    Image.open(lines[0]).convert("1").save(folder / "scan.tif", compression="group4")
    (folder / "bad.png").write_text("not a picture")
    return folder


WAY = ["--max-tokens", "24"]  # enough for some bars


def test_two_jobs_read_a_folder_and_pass_over_what_is_bad(folder, tmp_path):
    done = run("transcribe", folder, "-o", tmp_path / "out", "--format", "lmx,pdf", "--jobs", "2", *WAY, "--beam", "2")
    assert done.returncode == 1 and "3 of 4 files read, 1 failed" in done.stdout, done.stdout + done.stderr
    said = [line for line in done.stderr.replace("\r", "\n").splitlines() if "vitomr:" in line]
    assert len(said) == 1 and "bad.png" in said[0]
    names = {"scan", *(p.stem for p in folder.glob("*voice.png"))}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {n + s for n in names for s in (".lmx", ".pdf")}


def test_stopped_by_hand_no_file_is_half_written(folder, tmp_path):
    "Ctrl-C reaches every process of a terminal: one line is said, what was written is whole."
    out = tmp_path / "out"
    for i in range(40):
        (folder / f"more-{i}.png").write_bytes((folder / "schumann-rosen-voice.png").read_bytes())
    going = start("transcribe", folder, "-o", out, "--format", "lmx,musicxml", "--jobs", "2", *WAY)
    try:
        while going.poll() is None and not (out.is_dir() and any(out.iterdir())):
            time.sleep(0.05)
        os.killpg(going.pid, signal.SIGINT)
        _, err = going.communicate(timeout=300)
    finally:
        if going.poll() is None:
            os.killpg(going.pid, signal.SIGKILL)
    assert going.returncode == 130 and "vitomr: stopped" in err and "Traceback" not in err, err
    written = list(out.iterdir())
    assert 0 < len(written) < 86 and all(p.suffix in (".lmx", ".musicxml") for p in written)
    for path in written:
        assert read_reference(path)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["transcribe", "nowhere.png", "-o", "a.mid"], "nowhere.png"),
        (["transcribe", str(SCAN), "-o", "a.mid", "--beam", "0"], "beam 0"),
        (["transcribe", str(SCAN), "-o", "a.mid", "--grammar", "strict"], "shape, time"),
        (["transcribe", str(SCAN), "-o", "a.mid", "--top-p", "0.5"], "temperature"),
        (["evaluate", "--data", "x", "--beam", "2", "--temperature", "1"], "or sampling"),
        (["transcribe", str(SCAN), "-o", "a.docx"], ".musicxml"),
        (["transcribe", str(SCAN), "-o", "a.mid", "--weights", "nowhere"], "nowhere"),
        (["transcribe", str(SCAN), "-o", "a.mid", "--device", "tpu"], "cpu, cuda"),
        (["transcribe", str(SCAN), "-o", "a.mid", "--device", "cuda:99"], "CUDA device"),
        (["transcribe", str(SCAN), "-o", "a.mid", "--device", "cuda", "--int8"], "for the CPU"),
        (["transcribe", str(SCAN), "-o", "a.mid", "--shifts", "5"], "from 1 to 4"),
        (["transcribe", str(SCAN), "-o", "-", "--format", "lmx,mid"], "one format"),
        (["transcribe", str(SCAN), "-o", "file.txt/a.mid"], "is a file"),
        (["transcribe", "song.pdf", "--format", "pdf"], "overwritten"),
        (["data", "build", "--source", "nowhere", "--out", "x", "--count", "3"], "nowhere"),
        (["data", "build", "--source", "music21", "--out", "x", "--count", "0"], "at least 1"),
        (["train", "--preset", "huge", "--data", "x", "--out", "y"], "smoke, tiny"),
        (["train", "--data", "nowhere", "--out", "y"], "vitomr data build"),
        (["export", "--run", "nowhere", "--out", "y"], "nowhere"),
        (["evaluate", "--data", "nowhere"], "nowhere"),
        (["evaluate", "--data", "x", "--bars", "many"], "3-5"),
    ],
)
def test_bad_arguments_are_one_line(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("file.txt", "song.pdf"):
        (tmp_path / name).write_text("%PDF-1.4 of no pages")
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.startswith("vitomr: ") and says in said and said.count("\n") == 1
    assert not list(tmp_path.glob("a.*"))


def test_what_cannot_be_written_is_said_before_torch_is_loaded(tmp_path):
    code = "import sys; from vitomr.cli import main; s = main(sys.argv[1:]); sys.exit(s + ('torch' in sys.modules))"
    for out, says in ((tmp_path / "a.docx", ".musicxml"), (tmp_path / "a.txt" / "b.mid", "is a file")):
        (tmp_path / "a.txt").write_text("")
        call = [sys.executable, "-c", code, "transcribe", str(SCAN), "-o", str(out)]
        done = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


@pytest.fixture
def quick(monkeypatch, smoke):
    "A reader that has learned nothing, for the command line."
    monkeypatch.setattr("vitomr.cli._reader", lambda *args: Transcriber(smoke))


def test_output_beside_the_input_and_on_standard_output(tmp_path, quick, capsysbinary):
    shutil.copy(SCAN, tmp_path / "song.png")
    assert main(["transcribe", str(tmp_path / "song.png"), *WAY]) == 0
    said = capsysbinary.readouterr().out.decode()
    assert read_references_of_parts(tmp_path / "song.musicxml")
    assert "1 page, 1 system, " in said and said.count("\n") == 1
    assert main(["transcribe", str(tmp_path / "song.png"), "-o", "-", "--format", "lmx", *WAY]) == 0
    written, said = capsysbinary.readouterr()
    assert encode(written.decode().split()) and written.count(b"\n") == 1 and b"1 page" in said
    assert {p.name for p in tmp_path.iterdir()} == {"song.png", "song.musicxml"}


def test_help_tells_versions_and_defaults(capsys):
    import vitomr

    of_jobs = "one process each (default: 1)"
    for args, says in ((["--version"], f"vitomr {vitomr.__version__}"), (["transcribe", "--help"], of_jobs)):
        with pytest.raises(SystemExit) as e:
            main(args)
        assert e.value.code == 0 and says in " ".join(capsys.readouterr().out.split())


def test_build_train_export_read_from_the_command_line(tmp_path, piano, capsys):
    "The whole way a user goes, at smoke size."
    from vitomr.notation.musicxml import to_musicxml

    (tmp_path / "songs" / "train").mkdir(parents=True)
    (tmp_path / "songs" / "train" / "a.mxl").write_bytes(mxl_bytes(to_musicxml(linearise(piano).tokens)))
    assert (
        main(["data", "build", "--source", str(tmp_path / "songs"), "--out", str(tmp_path / "shards"), "--count", "12"])
        == 0
    )
    assert (
        main(
            [
                "train",
                "--preset",
                "smoke",
                "--steps",
                "4",
                "--data",
                str(tmp_path / "shards"),
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "weights")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-2])["step"] == 4
    args = [
        "evaluate",
        "--data",
        str(tmp_path / "shards"),
        "--weights",
        str(tmp_path / "weights"),
        "--bars",
        "1-2",
        "--limit",
        "2",
        "--json",
        str(tmp_path / "r.json"),
    ]
    args += ["--max-tokens", "40"]
    assert main(args) == 0
    assert "piano" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())[0]["true"].startswith("measure ")


# figures


def test_intervals_hold_the_value_and_shrink():
    rng = np.random.default_rng(0)
    few, many = (micro_rate(rng.binomial(50, 0.2, n), np.full(n, 50)) for n in (10, 400))
    assert few.low < 0.2 < few.high and many.low < 0.2 < many.high and many.high - many.low < few.high - few.low
    with pytest.raises(ValueError, match="at least 1"):
        micro_rate([], [])


# a second look


class Script:
    "A reader that knows its text by place, but for some places, where it doubts: place, token before → odds."

    def __init__(self, text: str, doubts: dict):
        self.text, self.doubts = [*encode(text.split()), VOCABULARY.index("<eos>")], doubts

    def take(self, memory, pictures):
        return memory

    def new_cache(self, memory, length, copies=1):
        return []

    def decode(self, tokens, memory, start=0, cache=None):
        odds = torch.full((*tokens.shape, len(VOCABULARY)), 1e-9)
        for r, row in enumerate(tokens.tolist()):
            for t, last in enumerate(row):
                at = min(start + t, len(self.text) - 1)
                said = self.doubts.get((at, VOCABULARY[last])) or {VOCABULARY[self.text[at]]: 1.0}
                for token, p in said.items():
                    odds[r, t, VOCABULARY.index(token)] = p
        return odds.log()

    def line(self) -> Transcription:
        "What it writes at first."
        ids = [BOS_ID]
        while ids[-1] != self.text[-1]:
            ids.append(int(self.decode(torch.tensor([ids[-1:]]), None, len(ids) - 1)[0, 0].argmax()))
        return Transcription([VOCABULARY[i] for i in ids[1:-1]], [-0.5] * (len(ids) - 2), np.zeros((9, 9), np.uint8))


FOURS = "measure time beats:4 beat-type:4 C4 half D4 half measure C4 half D4 half measure E4 half F4 half"


def again(text: str, doubts: dict, **how) -> tuple[Transcription, Transcription]:
    "Before and after."
    script = Script(text, doubts)
    before, line = script.line(), script.line()
    look_again(script, None, line, Decoding(**how))
    return before, line


def test_a_bar_that_does_not_add_up_is_read_again():
    "The second bar, and the third, which the reader took for another one after the first reading."
    doubts = {(10, "C4"): {"quarter": 0.6, "half": 0.4}, (15, "quarter"): {"G4": 1.0}}
    before, line = again(FOURS, doubts)
    assert [b.adds_up for b in bar_sums(before.tokens)] == [True, False, True]
    assert line.tokens == FOURS.split() and line.n_again == 1 and not line.truncated
    assert line.logp[8:12] == pytest.approx([-0.5, 0.0, np.log(0.4), 0.0], abs=1e-3) and len(line.logp) == 18


@pytest.mark.parametrize("other, is_taken", [(0.6 * np.exp(-4.5), True), (0.6 * np.exp(-5.5), False)])
def test_what_is_far_less_likely_is_not_read_instead(other, is_taken):
    doubts = {(10, "C4"): {"quarter": 0.6, "half": other}}
    script = Script(FOURS, doubts)
    line = script.line()
    line.logp = [0.0] * len(line.tokens)
    line.logp[10] = float(np.log(0.6 / (0.6 + other)))
    look_again(script, None, line, Decoding())
    assert (line.tokens == FOURS.split()) == is_taken == bool(line.n_again)


def test_a_second_look_leaves_alone_what_it_cannot_mend():
    never = {(10, "C4"): {"quarter": 0.6, "eighth": 0.4}}  # neither adds up
    before, line = again(FOURS, never)
    assert line.tokens == before.tokens and line.logp == before.logp and line.n_again == 0
    ends = {
        (10, "C4"): {"quarter": 0.6, "whole": 0.4},
        (11, "whole"): {"<eos>": 1.0},
    }  # a reading cut short is no remedy
    before, line = again(FOURS, ends)
    assert line.tokens == before.tokens
    before, line = again(FOURS, {})
    assert line.tokens == before.tokens and line.logp == before.logp


def test_the_last_bar_can_be_read_again_and_draws_stay_as_they_were(transcriber):
    before, line = again(FOURS, {(15, "E4"): {"quarter": 0.6, "half": 0.4}})
    assert before.tokens[-3:] == ["quarter", "F4", "half"] and line.tokens == FOURS.split() and line.n_again == 1
    assert not Decoding(temperature=1.0).looks_twice and not Decoding(grammar="time").looks_twice
    assert not Decoding(second_look=0).looks_twice and Decoding().looks_twice and Decoding(beam=3).looks_twice


def test_a_second_look_at_real_music_leaves_fewer_bars_odd(transcriber):
    for path in sorted((ROOT / "examples").glob("*-[pv]*.png")):
        once, twice = (transcriber.transcribe(path, second_look=w) for w in (0, 8))
        odd = [sum(not b.adds_up for b in bar_sums(x.tokens)) for x in (once, twice)]
        changed = sum(line.n_again for line in twice.lines)
        assert odd[1] <= odd[0] and (changed > 0 or twice.tokens == once.tokens)
        assert len(twice.logp) == len(twice.tokens) and max(twice.logp) <= 0
