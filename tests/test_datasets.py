"""Datasets: each published layout on a tiny tree, files missing or broken, splits, and downloads that are cut off."""

import hashlib
import io
import json
import re
import shutil
import tarfile
import threading
import xml.etree.ElementTree as ET
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitomr.cli import main
from vitomr.data import download as dl
from vitomr.data.corpora import OLIMPIC_DEV, OLIMPIC_TEST, SPLITS
from vitomr.data.datasets import (
    LAYOUTS,
    DatasetError,
    contact_sheet,
    faults,
    file_item,
    open_dataset,
    read_picture,
    statistics,
)
from vitomr.data.download import ARCHIVES, Archive, DownloadError, download, fetch, unpack
from vitomr.notation.lmx import decode
from vitomr.notation.score import mxl_bytes

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
BASE = EXAMPLES / "schumann-rosen-voice"
TRUTH = BASE.with_suffix(".lmx").read_text().split()


def put(path: Path, *suffixes: str) -> None:
    "Example files under a base name; .jpg is converted."
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in suffixes:
        target = path.with_name(path.name + suffix)
        if suffix.endswith(".jpg"):
            Image.open(BASE.with_suffix(".png")).convert("L").save(target)
        else:
            shutil.copy(BASE.with_suffix(suffix), target)


def olimpic(root: Path, name: str = "olimpic-1.0-synthetic") -> Path:
    root = root / name
    for split, song in zip(SPLITS, ("11", "22", "33"), strict=True):
        for base in ("p1-s1", "p1-s2"):
            put(root / "samples" / song / base, ".png", ".lmx", ".musicxml")
        (root / f"samples.{split}.txt").write_text(f"samples/{song}/p1-s1\nsamples/{song}/p1-s2\n")
    return root


def grandstaff(root: Path, pictures: str = "grandstaff-lmx/grandstaff") -> Path:
    base = "beethoven/piano-sonatas/sonata01-2/maj2_down_m-0-5"
    put(root / "grandstaff-lmx" / base, ".lmx", ".musicxml")
    put(root / pictures / base, ".jpg", "_distorted.jpg")
    (root / "grandstaff-lmx" / "samples.train.txt").write_text(base + "\n")
    return root / "grandstaff-lmx"


def primus(root: Path, folder: str = "package_aa", *suffixes: str) -> Path:
    for name in ("000051652-1_1_1", "000051652-1_2_1", "000100002-1_1_1"):
        put(root / "primus" / folder / name / name, ".png", *suffixes)
        for other in (".semantic", ".agnostic", ".mei"):
            (root / "primus" / folder / name / f"{name}{other}").write_text("clef-G2")
        (root / "primus" / folder / name / f"._{name}.semantic").write_bytes(b"macOS")
    return root / "primus"


def doremi(root: Path) -> Path:
    for page in ("Bartok - String Quartet 5 mvt 3-034", "Bartok - String Quartet 5 mvt 3-035", "Satie - No. 1-001"):
        put(root / "DoReMi_v1" / "Images" / page, ".png")
    (root / "DoReMi_v1" / "Parsed_by_page_omr_xml").mkdir()
    (root / "DoReMi_v1" / "Parsed_by_page_omr_xml" / "Parsed_x_Page_1.xml").write_text("<Pages/>")
    return root / "DoReMi_v1"


def openscore(root: Path) -> Path:
    for song in ("lc6491377", "lc6586696", "lc6477671"):
        put(root / "Lieder-main" / "scores" / "Schumann" / song, ".musicxml")
    return root / "Lieder-main"


def openscore_zip(root: Path) -> Path:
    with zipfile.ZipFile(root / "openscore.zip", "w") as z:
        z.write(BASE.with_suffix(".musicxml"), "openscore/train/lc6477671.musicxml")
    return root / "openscore.zip"


def pairs(root: Path) -> Path:
    put(root / "mine" / "a", ".png", ".lmx")
    put(root / "mine" / "b", ".jpg", ".musicxml")
    put(root / "mine" / "untold", ".png")
    return root / "mine"


RECORDS = [
    {"problem": "Write the music.", "solution": " ".join(TRUTH), "image": "a.png", "split": "dev"},
    {"problem": "How many bars?", "solution": 4, "image": "a.png"},
    {"image": "a.png", "lmx": " ".join(TRUTH), "musicxml": "a.musicxml", "name": "third", "licence": "CC0 1.0"},
]


def json_file(root: Path, suffix: str = ".json") -> Path:
    put(root / "tasks" / "a", ".png", ".musicxml")
    lines = [json.dumps(r) for r in RECORDS]
    text = "[" + ",".join(lines) + "]" if suffix == ".json" else "\n".join(lines) + "\n"
    (root / "tasks" / f"ocr{suffix}").write_text(text)
    return root / "tasks" / f"ocr{suffix}"


ALL = ("picture", "tokens", "musicxml")
TREES = {  # how to make it, its layout, what an item holds, how many items
    "olimpic": (olimpic, "olimpic", ALL, 6),
    "grandstaff inside": (grandstaff, "grandstaff", ALL, 2),
    "grandstaff in one": (lambda r: grandstaff(r, "grandstaff-lmx"), "grandstaff", ALL, 2),
    "grandstaff beside": (lambda r: grandstaff(r, "grandstaff-pictures"), "grandstaff", ALL, 2),
    "primus": (primus, "primus", ("picture",), 3),
    "primus, one package": (lambda r: primus(r, "."), "primus", ("picture",), 3),
    "camera-primus": (lambda r: primus(r, "Corpus", "_distorted.jpg"), "primus", ("picture",), 6),
    "doremi": (doremi, "doremi", ("picture",), 3),
    "openscore": (openscore, "scores", ("musicxml",), 3),
    "openscore zip": (openscore_zip, "scores", ("musicxml",), 1),
    "pairs": (pairs, "pairs", ("picture", "tokens"), 2),
    "json": (json_file, "json", ("picture", "tokens"), 3),
    "jsonl": (lambda r: json_file(r, ".jsonl"), "json", ("picture", "tokens"), 3),
}  # fmt: skip


@pytest.mark.parametrize("name", TREES)
def test_a_layout_is_recognised_and_read(tmp_path, name):
    make, kind, holds, count = TREES[name]
    path = make(tmp_path)
    items = open_dataset(path)
    assert len({i.name for i in items}) == len(items) == count and items[0].holds == holds
    assert [i.name for i in open_dataset(path, kind)] == [i.name for i in items]
    for item in items:
        assert item.split in SPLITS and item.source and item.licence and not faults(item)
        img, tokens, root = item.picture(), item.tokens(), item.musicxml()
        assert img is None or (img.dtype == np.uint8 and img.shape == read_picture(BASE.with_suffix(".png")).shape)
        assert tokens in (None, TRUTH) and (root is None or root.tag == "score-partwise")
        assert item.positions() is None


def test_shards_are_a_dataset_with_positions(shards):
    items = open_dataset(shards.folder)
    assert len(items) == len(shards) and {i.split for i in items} == {"train"}
    for item, i in zip(items, range(len(shards)), strict=True):
        heads, token_head = item.positions()
        assert item.tokens() == decode(shards[i].ids) and np.array_equal(item.picture(), shards[i].img)
        assert np.array_equal(heads, shards[i].heads) and np.array_equal(token_head, shards[i].token_head)
        assert not faults(item)


def test_music21s_corpus_is_a_dataset():
    items = open_dataset("music21", split="dev")
    assert len(items) > 5 and items[0].holds == ("musicxml",) and items[0].musicxml().find("part") is not None


def test_archives_with_a_folder_of_their_own_are_looked_into(tmp_path):
    olimpic(tmp_path / "download")
    assert len(open_dataset(tmp_path / "download")) == 6


def test_a_record_keeps_what_a_task_asks(tmp_path):
    ocr, count, third = open_dataset(json_file(tmp_path))
    assert ocr.split == "dev" and ocr.record["problem"] == "Write the music."
    assert count.tokens() is None and count.record["solution"] == 4
    assert third.name == "third" and third.licence == "CC0 1.0" and third.holds == ALL


# splits


def test_published_splits_are_kept(tmp_path):
    root = olimpic(tmp_path, "olimpic-1.0-scanned")
    assert [i.name for i in open_dataset(root, split="dev")] == ["samples/22/p1-s1", "samples/22/p1-s2"]
    (root / "samples.train.txt").unlink()
    assert {i.split for i in open_dataset(root)} == {"dev", "test"}
    assert {i.source for i in open_dataset(root)} == {"olimpic-scanned"}
    with pytest.raises(DatasetError, match="no train split; it has 2 dev, 2 test"):
        open_dataset(root, split="train")


def test_songs_that_olimpic_measures_on_are_held_back(tmp_path):
    assert len(OLIMPIC_DEV) == len(OLIMPIC_TEST) == 100 and not OLIMPIC_DEV & OLIMPIC_TEST
    split = {i.name: i.split for i in open_dataset(openscore(tmp_path))}
    assert split["lc6491377"] == "dev" and split["lc6586696"] == "test"
    put(tmp_path / "wrong" / "train" / "lc6586696", ".musicxml")
    assert open_dataset(tmp_path / "wrong")[0].split == "test"


def test_parts_of_one_work_are_on_one_side(tmp_path):
    pages = tmp_path / "Images"
    incipits = tmp_path / "incipits"
    for work in range(60):
        for part in (1, 2):
            put(pages / f"Score no. {work}-{part:03d}", ".png")
            put(incipits / "package_aa" / f"{work:09d}-1_{part}_1" / f"{work:09d}-1_{part}_1", ".png")
            (incipits / "package_aa" / f"{work:09d}-1_{part}_1" / f"{work:09d}-1_{part}_1.semantic").touch()
    for items, work_of in (
        (open_dataset(tmp_path, "doremi"), lambda n: n[:-4]),
        (open_dataset(incipits), lambda n: n[:9]),
    ):
        sides = {work_of(i.name): set() for i in items}
        for i in items:
            sides[work_of(i.name)].add(i.split)
        assert len(sides) == 60 and all(len(s) == 1 for s in sides.values())
        assert len(set.union(*sides.values())) > 1


# files that are missing or broken


@pytest.mark.parametrize("suffix", [".png", ".lmx", ".musicxml"])
def test_a_missing_file_names_itself(tmp_path, suffix):
    root = olimpic(tmp_path)
    lost = root / f"samples/22/p1-s2{suffix}"
    lost.unlink()
    items = open_dataset(root)  # opens all the same
    bad = {i.name: faults(i) for i in items if faults(i)}
    assert list(bad) == ["samples/22/p1-s2"] and len(bad["samples/22/p1-s2"]) == 1
    assert str(lost) in bad["samples/22/p1-s2"][0]
    read = {".png": "picture", ".lmx": "tokens", ".musicxml": "musicxml"}[suffix]
    with pytest.raises(ValueError, match=re.escape(str(lost))):
        getattr(next(i for i in items if i.name == "samples/22/p1-s2"), read)()


@pytest.mark.parametrize(
    ("name", "lost", "n_bad"),
    [
        ("grandstaff inside", "maj2_down_m-0-5.jpg", 1),
        ("grandstaff beside", "maj2_down_m-0-5_distorted.jpg", 1),
        ("grandstaff in one", "maj2_down_m-0-5.lmx", 2),
        ("grandstaff inside", "maj2_down_m-0-5.musicxml", 2),
        ("primus", "000051652-1_2_1.png", 1),
        ("primus, one package", "000051652-1_1_1.png", 1),
        ("json", "a.png", 3),
        ("jsonl", "a.musicxml", 1),
    ],
)
def test_a_missing_file_of_any_layout_names_itself(tmp_path, name, lost, n_bad):
    path = TREES[name][0](tmp_path)
    (gone,) = tmp_path.rglob(lost)
    gone.unlink()
    items = open_dataset(path, TREES[name][1])
    bad = [f for i in items for f in faults(i)]
    assert len(items) == TREES[name][3] and len(bad) == n_bad and all(str(gone) in f for f in bad)


def test_scores_come_compressed_too(tmp_path):
    put(tmp_path / "scores" / "lc6477671", ".musicxml")
    plain = tmp_path / "scores" / "lc6477671.musicxml"
    (tmp_path / "scores" / "lc6586696.mxl").write_bytes(mxl_bytes(ET.parse(plain).getroot()))
    one, other = sorted(open_dataset(tmp_path / "scores"), key=lambda i: i.name)
    assert (one.name, other.name, other.split) == ("lc6477671", "lc6586696", "test")
    assert len(list(one.musicxml().iter("note"))) == len(list(other.musicxml().iter("note"))) > 0


BROKEN = {  # file → what it says, and what of it is told
    "a.png": (b"no picture", "not a picture"),
    "b.png": (BASE.with_suffix(".png").read_bytes()[:2000], "cannot be decoded"),
    "c.lmx": (b"measure C4 quarter wibble wobble", "2 of 5 tokens outside the vocabulary; the first is 'wibble' at 3"),
    "d.lmx": (b" \n", "empty target"),
    "e.lmx": (b"measure <eos> C4 quarter", "'<eos>'"),
    "f.lmx": (b"\xff\xfe", "not text"),
    "g.lmx": (b"C4 quarter", "without a measure"),
    "h.musicxml": (b"<score-partwise><part", "well-formed"),
    "i.musicxml": (b"<score-partwise/>", "without a measure"),
    "j.lmx": (b"C4 " * 400_000, "larger than"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_check_names_the_file_and_what_is_wrong(tmp_path, capsys, name):
    data, says = BROKEN[name]
    stem = Path(name).stem
    put(tmp_path / "good", ".png", ".lmx", ".musicxml")
    put(tmp_path / stem, ".png", ".lmx", ".musicxml")
    (tmp_path / name).write_bytes(data)
    assert main(["data", "check", str(tmp_path)]) == 1
    line, last = capsys.readouterr().out.splitlines()
    assert str(tmp_path / name).split(".")[0] in line and name in line and says in line
    assert last.endswith("1 of 2 items are bad")


def test_check_finds_blank_and_huge_pictures(tmp_path):
    Image.new("L", (300, 100), 255).save(tmp_path / "blank.png")
    Image.new("1", (9_000, 9_000)).save(tmp_path / "huge.png")
    for name, says in (("blank", "blank picture"), ("huge", "megapixels")):
        (only,) = faults(file_item(name, "train", "x", "x", {"picture": tmp_path / f"{name}.png"}))
        assert says in only and f"{name}.png" in only


def test_check_finds_positions_that_do_not_fit(shards):
    item = open_dataset(shards.folder)[0]
    heads, token_head = item.positions()
    for wrong in ((heads + 10_000, token_head), (heads[:0], token_head), (heads, token_head[:-1])):
        (only,) = faults(type(item)(**{**vars(item), "positions": lambda w=wrong: w}))
        assert "position" in only and item.name in only


def test_a_whole_dataset_is_checked_in_silence(tmp_path, capsys):
    assert main(["data", "check", str(olimpic(tmp_path))]) == 0
    assert capsys.readouterr().out.endswith("0 of 6 items are bad\n")


def test_a_broken_shard_is_one_line(tmp_path, shards):
    shutil.copytree(shards.folder, tmp_path / "s")
    (tmp_path / "s" / "00000.images.npy").write_bytes(b"")
    with pytest.raises(DatasetError, match="broken shard"):
        open_dataset(tmp_path / "s")


@pytest.mark.parametrize("line", ["../../etc/passwd", "/etc/passwd", "samples/../../x"])
def test_a_list_does_not_lead_out_of_its_folder(tmp_path, line):
    root = olimpic(tmp_path)
    (root / "samples.test.txt").write_text(f"samples/33/p1-s1\n{line}\n")
    with pytest.raises(DatasetError, match="samples.test.txt, line 2"):
        open_dataset(root)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
        ('{"image": "a.png"}', "a list of records"),
        ("[3]", "record 1: the key 'image'"),
        ('[{"image": "a.png"}, {"problem": "?"}]', "record 2: the key 'image'"),
        ('[{"image": "a.png", "problem": "?"}]', "record 1: a problem without the key 'solution'"),
        ('[{"image": "a.png", "split": "tomorrow"}]', "train, dev, test"),
        ("[]", "holds nothing"),
    ],
)
def test_a_bad_record_is_named(tmp_path, text, says):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DatasetError, match=re.escape(says)) as e:
        open_dataset(tmp_path / "x.json")
    assert "x.json" in str(e.value) and "\n" not in str(e.value)


# command line


@pytest.mark.parametrize("name", ["olimpic", "grandstaff inside", "primus", "doremi", "openscore", "json"])
def test_inspect_and_stats(tmp_path, capsys, name):
    make, _, holds, count = TREES[name]
    path = str(make(tmp_path))
    assert main(["data", "inspect", path, "-o", str(tmp_path / "new" / "sheet.png"), "--count", "4"]) == 0
    assert f"{min(4, count)} of {count} items" in capsys.readouterr().out
    sheet = np.asarray(Image.open(tmp_path / "new" / "sheet.png").convert("L"))
    assert sheet.shape[1] > 1000 and 0.005 < (sheet < 128).mean() < 0.5
    assert main(["data", "stats", path, "-o", str(tmp_path / "plots")]) == 0
    told, plots = capsys.readouterr().out, {p.stem for p in (tmp_path / "plots").iterdir()}
    assert f"items       {count}:" in told
    shown = {"sizes": "picture" in holds, "tokens": "tokens" in holds, "lengths": {"tokens", "musicxml"} & set(holds)}
    assert plots == {k for k, v in shown.items() if v}


def test_statistics_count_what_is_there(tmp_path):
    s = statistics(open_dataset(olimpic(tmp_path)))
    h, w = read_picture(BASE.with_suffix(".png")).shape
    assert s.sizes.tolist() == [[w, h]] * 6 and s.lengths.tolist() == [len(TRUTH)] * 6
    assert s.tokens["measure"] == 6 * TRUTH.count("measure") == s.bars.sum() and s.unreadable == 0


def test_the_sheet_shows_other_items_for_another_seed(shards):
    items = open_dataset(shards.folder)
    titles = [[a.get_title(loc="left") for a in contact_sheet(items, 6, seed).axes] for seed in (0, 0, 1)]
    assert titles[0] == titles[1] != titles[2] and all("bar" in t for t in titles[0])


def test_the_list_tells_licence_and_source_of_each(capsys):
    assert main(["data", "list"]) == 0
    told = capsys.readouterr().out
    for name in (*ARCHIVES, "music21", "shards"):
        assert f"{name}\n" in told
    assert told.count("licence: ") == told.count("layout ") == told.count("from: ") and "CC BY-SA 4.0" in told
    assert {k for k in LAYOUTS if f"layout {k}:" in told} == set(LAYOUTS)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["stats", "nowhere"], "nowhere"),
        (["stats", "."], "samples.*.txt"),
        (["check", ".", "--kind", "wrong"], "olimpic"),
        (["check", ".", "--kind", "primus"], "holds nothing of the layout primus"),
        (["check", "music21", "--split", "half"], "train, dev, test"),
        (["inspect", "music21", "-o", "sheet.pdf"], ".png"),
        (["inspect", "music21", "-o", "a.png", "--count", "0"], "at least 1"),
        (["download", "music21", "--out", "."], "comes with the install"),
        (["download", "imslp", "--out", "."], "olimpic-scanned"),
        (["download", "doremi", "--out", ".", "--url", "file:///etc/passwd"], "http"),
    ],
)
def test_bad_arguments_are_one_line(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *args]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vitomr: ") and says in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


# download


class Server(ThreadingHTTPServer):
    "Serves one file; may cut the line after some bytes, lack ranges, announce no length, or change the file."

    data, etag, cut, ranges, length, status = b"", '"1"', None, True, True, 200

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.url = f"http://127.0.0.1:{self.server_port}/set.zip"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        s, wanted = self.server, self.headers.get("Range")
        start = int(wanted[6:-1]) if wanted and s.ranges and self.headers.get("If-Range") == s.etag else 0
        s.asked.append(start)
        if s.status != 200:
            return self.send_error(s.status)
        self.send_response(416 if start and start >= len(s.data) else 206 if start else 200)
        if start and start >= len(s.data):
            self.send_header("Content-Range", f"bytes */{len(s.data)}")
            return self.end_headers()
        if s.length:
            self.send_header("Content-Length", str(len(s.data) - start))
        self.send_header("ETag", s.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(s.data) - 1}/{len(s.data)}")
        self.end_headers()
        self.wfile.write(s.data[start : None if s.cut is None else start + s.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as s:
        threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        s.data = bytes(np.random.default_rng(0).integers(0, 256, 100_000, dtype=np.uint8))
        yield s
        s.shutdown()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_download_goes_on_where_the_line_was_cut(server, tmp_path):
    server.cut = 40_000
    told = []
    path = fetch(server.url, tmp_path / "new" / "a", sha256=sha(server.data), progress=lambda *a: told.append(a))
    assert path.read_bytes() == server.data and server.asked == [0, 40_000, 80_000]
    assert told[-1] == (100_000, 100_000) and [p.name for p in path.parent.iterdir()] == ["a"]


def test_a_later_call_goes_on(server, tmp_path):
    server.cut = 30_000
    with pytest.raises(DownloadError, match="60,000 bytes so far.*goes on"):
        fetch(server.url, tmp_path / "a", attempts=2)
    server.cut = None
    assert fetch(server.url, tmp_path / "a").read_bytes() == server.data and server.asked == [0, 30_000, 60_000]


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    server.cut = 30_000
    with pytest.raises(DownloadError):
        fetch(server.url, tmp_path / "a", attempts=1)
    server.cut, server.etag, server.data = None, '"2"', server.data[::-1][:90_000]
    assert fetch(server.url, tmp_path / "a").read_bytes() == server.data


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.cut, server.ranges = 30_000, False
    with pytest.raises(DownloadError):
        fetch(server.url, tmp_path / "a", attempts=2)
    server.cut = None
    assert fetch(server.url, tmp_path / "a").read_bytes() == server.data


def test_a_part_that_is_too_long_is_dropped(server, tmp_path):
    (tmp_path / "a.part").write_bytes(b"x" * 200_000)
    (tmp_path / "a.part.mark").write_text('"1"')
    assert fetch(server.url, tmp_path / "a").read_bytes() == server.data


def test_a_complete_part_needs_no_more_bytes(server, tmp_path):
    (tmp_path / "a.part").write_bytes(server.data)
    (tmp_path / "a.part.mark").write_text('"1"')
    assert fetch(server.url, tmp_path / "a", sha256=sha(server.data)).read_bytes() == server.data
    assert server.asked == [100_000] and [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("wrong", [{"sha256": "0" * 64}, {"size": 99_999}, {"size": 100_001}])
def test_another_file_than_expected_is_deleted(server, tmp_path, wrong, length):
    server.length = length
    with pytest.raises(DownloadError) as e:
        fetch(server.url, tmp_path / "a", **wrong)
    assert "\n" not in str(e.value) and server.url in str(e.value)
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.part").exists()


@pytest.mark.parametrize(("status", "says"), [(404, "404"), (403, "403"), (503, "503.*goes on")])
def test_what_the_server_answers_is_told(server, tmp_path, status, says):
    server.status = status
    with pytest.raises(DownloadError, match=says):
        fetch(server.url, tmp_path / "a")
    assert len(server.asked) == (4 if status == 503 else 1)


def test_nobody_there_is_told(tmp_path):
    with pytest.raises(DownloadError, match="refused"):
        fetch("http://127.0.0.1:1/x", tmp_path / "a", attempts=1)


def test_too_much_is_refused_before_it_is_fetched(server, tmp_path, monkeypatch):
    monkeypatch.setattr(dl, "MAX_DOWNLOAD", 50_000)
    with pytest.raises(DownloadError, match="room"):
        fetch(server.url, tmp_path / "a")
    server.length = False
    with pytest.raises(DownloadError, match="more bytes"):
        fetch(server.url, tmp_path / "a")
    assert not (tmp_path / "a.part").exists()


def packed(root: Path, kind: str) -> bytes:
    "An archive of a dataset, in a folder of its own."
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as z:
            for p in sorted(root.rglob("*")):
                z.write(p, p.relative_to(root.parent))
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as t:
            t.add(root, root.name)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_dataset_by_name(server, tmp_path, monkeypatch, capsys, kind):
    "Download, resume, check, unpack and open, from the command line; the second call asks nobody."
    server.data = packed(olimpic(tmp_path / "made", "olimpic-1.0-scanned"), kind)
    server.cut = len(server.data) // 2 + 1
    known = Archive("http://127.0.0.1:1/gone", 1, len(server.data), sha(server.data))
    monkeypatch.setitem(dl.ARCHIVES, "olimpic-scanned", known)
    args = ["data", "download", "olimpic-scanned", "--out", str(tmp_path / "out"), "--url", server.url]
    assert main(args) == main(args) == 0 and len(server.asked) == 2
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["olimpic-scanned"]
    capsys.readouterr()
    assert main(["data", "check", str(tmp_path / "out" / "olimpic-scanned")]) == 0
    assert open_dataset(tmp_path / "out" / "olimpic-scanned")[0].source == "olimpic-scanned"


def test_a_mirror_must_hold_the_same_file(server, tmp_path, monkeypatch):
    monkeypatch.setitem(dl.ARCHIVES, "olimpic-scanned", Archive("http://127.0.0.1:1/gone", sha256="0" * 64))
    with pytest.raises(DownloadError, match="another file"):
        download("olimpic-scanned", tmp_path / "out", url=server.url)
    assert not list((tmp_path / "out").iterdir())


def hostile(path: Path, kind: str, name: str) -> Path:
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("set/a.txt", "a")
            z.writestr(name, "evil")
    else:
        with tarfile.open(path, "w") as t:
            for n in ("set/a.txt", name):
                m = tarfile.TarInfo(n)
                m.size = 4
                t.addfile(m, io.BytesIO(b"evil"))
    return path


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["../evil", "set/../../evil", "/tmp/vitomr-evil", "C:/evil", "..\\evil"])
def test_archives_cannot_write_outside(tmp_path, kind, name):
    (tmp_path / "in").mkdir()
    with pytest.raises(DownloadError, match="leads out"):
        unpack(hostile(tmp_path / "in" / "x", kind, name), tmp_path / "in" / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "x"] and not Path("/tmp/vitomr-evil").exists()


def test_links_of_archives_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as t:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            m = tarfile.TarInfo(f"set/{kind.decode()}")
            m.type, m.linkname = kind, "/etc/passwd"
            t.addfile(m)
        m = tarfile.TarInfo("set/a.txt")
        t.addfile(m, io.BytesIO(b""))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        link = zipfile.ZipInfo("set/link")
        link.external_attr = 0o120777 << 16
        z.writestr(link, "/etc/passwd")
        z.writestr("set/a.txt", "")
    for suffix in ("tar", "zip"):
        assert [p.name for p in unpack(tmp_path / f"x.{suffix}", tmp_path / suffix).iterdir()] == ["a.txt"]


def test_archives_that_grow_without_end_are_stopped(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("set/zeros", bytes(3_000_000))
    monkeypatch.setattr(dl, "MIN_ROOM", 1_000_000)
    with pytest.raises(DownloadError, match="more than it may"):
        unpack(tmp_path / "x.zip", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>", b"PK\x03\x04 cut", b"\x1f\x8b\x08 cut"])
def test_what_is_no_archive_is_one_line_and_deleted(server, tmp_path, data, capsys):
    server.data = data
    assert main(["data", "download", "doremi", "--out", str(tmp_path / "out"), "--url", server.url]) == 2
    said = capsys.readouterr().err
    assert "not a readable zip or tar" in said and said.count("vitomr: ") == 1
    assert not list((tmp_path / "out").iterdir())
