"""Corpora, synthesis and batches: splits that keep songs apart, builds that repeat, positions that follow."""

import copy
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
import zipfile
from collections import Counter, deque
from dataclasses import replace
from itertools import product

import music21
import numpy as np
import pytest
import torch
from lmx.linearization.Delinearizer import Delinearizer

from vitomr.data.batches import (
    PATCH,
    PICTURE_MIX,
    Batches,
    BatchPlan,
    collate,
    loader,
    pad_pictures,
    prepare,
    repeats,
)
from vitomr.data.corpora import SPLITS, open_corpus, split_of
from vitomr.data.datasets import open_dataset
from vitomr.data.hands import bar_lengths, lines_together, other_hand, piano_reduction
from vitomr.data.synthesis import AS_WRITTEN, SHARD_SIZE, Mix, Shards, build, random_layout, song_samples
from vitomr.data.tuplets import add_tuplets
from vitomr.data.vary import (
    add_marks,
    add_neighbour,
    double_values,
    ledger_lines,
    mixed_bars,
    rarity,
    say_voices_and_stems,
    transpose,
)
from vitomr.files import replace_file
from vitomr.notation.analysis import analyse
from vitomr.notation.engrave import engrave
from vitomr.notation.lmx import BOS_ID, EOS_ID, PAD_ID, TOKEN_ID, VOCABULARY, decode, linearise
from vitomr.notation.musicxml import to_musicxml
from vitomr.notation.score import (
    ScoreError,
    as_score,
    cut_excerpt,
    drop_dangling,
    header_states,
    join_bars,
    music21_to_xml,
    musicxml_bytes,
    mxl_bytes,
    parse_xml,
    parts,
    placed_notes,
)
from vitomr.sandbox import pool


@pytest.fixture
def folder(tmp_path, piano):
    "A corpus folder of three songs in published splits."
    score = to_musicxml(linearise(piano).tokens)
    for split, name in (("train", "a"), ("train", "b"), ("dev", "c")):
        (tmp_path / "songs" / split).mkdir(parents=True, exist_ok=True)
        (tmp_path / "songs" / split / f"{name}.mxl").write_bytes(mxl_bytes(score))
    return tmp_path / "songs"


# corpora


def test_folders_decide_the_split(folder):
    assert [(s.id, s.split) for s in open_corpus(folder)] == [("c", "dev"), ("a", "train"), ("b", "train")]
    assert [s.id for s in open_corpus(folder, split="dev")] == ["c"]


def test_songs_that_olimpic_measures_on_are_held_back_wherever_they_lie():
    assert split_of("openscore/train/lc6586696.mxl") == "test" and split_of("6491377.musicxml") == "dev"
    assert split_of("openscore/train/lc1.mxl") == "train"


def test_zip_and_folder_give_the_same_songs(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "songs.zip", "w") as z:
        for p in folder.rglob("*.mxl"):
            z.write(p, p.relative_to(tmp_path))
    a, b = open_corpus(folder), open_corpus(tmp_path / "songs.zip")
    assert [(s.id, s.split) for s in a] == [(s.id, s.split) for s in b]
    assert musicxml_bytes(a[0].load()) == musicxml_bytes(b[0].load())


def test_hash_split_is_stable_and_in_proportion():
    counts = Counter(split_of(f"x/song{i}.xml") for i in range(4000))
    assert counts["train"] > 0.87 * 4000 and min(counts[s] for s in SPLITS) > 0.03 * 4000
    assert split_of("x/song1.xml") == split_of("elsewhere/song1.mxl"), "a song stays where it is when its file moves"


def test_music21_songs_are_in_one_split_each():
    songs = open_corpus("music21")
    assert len({s.id for s in songs}) == len(songs)
    by_stem = {}
    for s in songs:
        by_stem.setdefault(s.id.split("/")[-1], set()).add(s.split)
    assert all(len(v) == 1 for v in by_stem.values())


@pytest.mark.parametrize("source", ["nowhere", "empty"])
def test_a_corpus_without_songs_says_what_was_expected(tmp_path, source):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScoreError, match=source):
        open_corpus(tmp_path / source)


def test_not_a_zip(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"hello")
    with pytest.raises(ScoreError, match="zip"):
        open_corpus(tmp_path / "a.zip")


# synthesis


def same(a: Shards, b: Shards) -> bool:
    return len(a) == len(b) and all(
        np.array_equal(x.img, y.img)
        and np.array_equal(x.ids, y.ids)
        and np.array_equal(x.heads, y.heads)
        and x.song == y.song
        for x, y in ((a[i], b[i]) for i in range(len(a)))
    )


def test_building_repeats_whatever_the_number_of_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("vitomr.data.synthesis.SHARD_SIZE", 5)
    build(folder, tmp_path / "one", 10, seed=4)
    build(folder, tmp_path / "two", 10, seed=4)
    build(folder, tmp_path / "other", 10, seed=5)
    assert same(Shards(tmp_path / "one"), Shards(tmp_path / "two"))
    assert not same(Shards(tmp_path / "one"), Shards(tmp_path / "other"))


@pytest.fixture
def deadly(folder):
    "A song of the corpus folder that ends the engraver's process: a beam over a long note."
    tokens = "measure clef:G2 time beats:4 beat-type:4 voice:1 C5 16th beam:begin D5 maxima beam:end E5 quarter"
    score = as_score(Delinearizer().process_text(tokens))  # `to_musicxml` leaves such a beam out
    code = f"import verovio; verovio.toolkit().loadData({ET.tostring(score, encoding='unicode')!r})"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGSEGV, "it no longer ends Verovio"
    (folder / "train" / "deadly.musicxml").write_bytes(musicxml_bytes(score))
    return "deadly"


def test_two_processes_give_what_one_gives_without_a_score_that_ends_the_engraver(folder, deadly, tmp_path):
    for jobs in (1, 2):
        bad: list[tuple[str, str]] = []
        name_it = lambda *fault, bad=bad: bad.append(fault)
        options = {"seed": 4, "jobs": jobs, "mix": Mix(bars=(1.0,)), "on_fault": name_it}
        assert build(folder, tmp_path / str(jobs), SHARD_SIZE + 10, **options) == SHARD_SIZE + 10
        assert [song for song, _ in bad] == [deadly], "named once, whatever the number of shards"
        assert "SIGSEGV" in bad[0][1] and len(bad[0][1]) <= 200
    one, two = Shards(tmp_path / "1"), Shards(tmp_path / "2")
    assert same(one, two) and {one[i].song for i in range(len(one))} == {"a", "b"}


def test_an_engraving_is_the_same_text_in_every_process(excerpts, piano):
    scores = [as_score(copy.deepcopy(e)) for e in (*excerpts[:8], piano)]
    layouts = [random_layout(np.random.default_rng(i)) for i in range(len(scores))]
    first = [engrave(s, **layout).svg for s, layout in zip(scores, layouts, strict=True)]
    pool().close()  # the next worker is a new process, and engraves them the other way round
    again = [engrave(s, **layout).svg for s, layout in zip(scores[::-1], layouts[::-1], strict=True)][::-1]
    assert first == again and len(set(first)) == len(first)


def test_a_stopped_build_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("vitomr.data.synthesis.SHARD_SIZE", 5)
    build(folder, tmp_path / "whole", 20, seed=4)
    seen = []

    def stop(done, count):
        seen.append(done)
        if done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(folder, tmp_path / "part", 20, seed=4, progress=stop)
    (tmp_path / "part" / "00002.images.npy").write_bytes(b"half a shard")
    before = (tmp_path / "part" / "00000.index.npy").stat().st_mtime_ns
    build(folder, tmp_path / "part", 20, seed=4)
    assert same(Shards(tmp_path / "whole"), Shards(tmp_path / "part"))
    assert (tmp_path / "part" / "00000.index.npy").stat().st_mtime_ns == before, "what was there was kept"


def test_two_builds_do_not_mix(folder, tmp_path):
    build(folder, tmp_path / "x", 3, seed=1)
    with pytest.raises(ScoreError, match="another build"):
        build(folder, tmp_path / "x", 3, seed=2)


BAD_SONGS = {  # a song → what is done to its MusicXML
    "no-octave": lambda text: text.replace("<octave>", "<!-- <octave>").replace("</octave>", "</octave> -->"),
    "far-octave": lambda text: re.sub("<octave>.*?</octave>", "<octave>1000000000</octave>", text),
    "nested": lambda text: text.replace("<note ", "<x>" * 990 + "</x>" * 990 + "<note ", 1),
    "cut": lambda text: text[: len(text) // 2],
    "no-number": lambda text: re.sub("<duration>.*?</duration>", "<duration>x</duration>", text, count=3),
    "no-beats": lambda text: re.sub("<divisions>.*?</divisions>", "<divisions>0</divisions>", text),
}


@pytest.mark.parametrize("kind", BAD_SONGS)
def test_a_bad_song_does_not_stop_a_build_and_is_named(folder, tmp_path, kind):
    good = musicxml_bytes(open_corpus(folder, split="train")[0].load()).decode()
    assert BAD_SONGS[kind](good) != good
    (folder / "train" / f"{kind}.musicxml").write_text(BAD_SONGS[kind](good))
    bad: list[tuple[str, str]] = []
    assert build(folder, tmp_path / "x", 24, seed=1, on_fault=lambda *fault: bad.append(fault)) == 24
    assert [song for song, _ in bad] == [kind], "bad songs are named once each"
    assert all(0 < len(why) <= 200 and "\n" not in why for _, why in bad)
    shards = Shards(tmp_path / "x")
    songs = {shards[i].song for i in range(len(shards))}
    assert songs >= {"a", "b"} and (kind not in songs or kind in ("nested", "no-number"))  # its other bars are music


def test_a_corpus_of_bad_songs_ends_in_one_line_that_names_one(folder, tmp_path):
    for path in folder.rglob("*.mxl"):
        path.write_bytes(b"no zip")
    with pytest.raises(ScoreError, match="bad songs, as [ab]: ") as e:
        build(folder, tmp_path / "x", 4)
    assert len(str(e.value)) <= 200 and "\n" not in str(e.value)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"mix": 3}', b"[" * 100_000])
def test_a_damaged_record_of_a_build_does_not_block_its_folder(folder, tmp_path, damage):
    out, said = tmp_path / "x", []
    build(folder, out, 3, seed=1)
    before = (out / "build.json").read_bytes()
    (out / "build.json").write_bytes(damage)
    with pytest.warns(UserWarning, match="build.json in x is damaged"):
        assert len(open_dataset(out)) == 3
    assert build(folder, out, 3, seed=1, on_fault=lambda *fault: said.append(": ".join(fault))) == 3
    assert len(said) == 1 and said[0].startswith("build.json: ") and len(said[0]) <= 200
    assert (out / "build.json").read_bytes() == before
    with pytest.raises(ScoreError, match="another build .seed differ"):
        build(folder, out, 3, seed=2)


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_file_replaced_while_the_process_dies_is_whole(tmp_path, moment):
    code = f"""
import os, signal
from vitomr import files
die = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
class Half:
    def __init__(self, f): self.f = f
    def __enter__(self): return self
    def __exit__(self, *args): self.f.close()
    def write(self, data): self.f.write(data[:5]); self.f.flush(); die()
if "{moment}" == "write":
    files.open = lambda *args: Half(open(*args))
else:
    setattr(os, "{moment}", die)
files.replace_file({str(tmp_path / "history.jsonl")!r}, "x" * 100_000)
"""
    (tmp_path / "history.jsonl").write_text("all that was there")
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / "history.jsonl").read_text() == "all that was there"
    replace_file(tmp_path / "history.jsonl", "ä")
    assert (tmp_path / "history.jsonl").read_bytes() == "ä".encode()


def test_a_build_whose_process_is_killed_says_so_and_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    (tmp_path / "sitecustomize.py").write_text(
        "import multiprocessing, os, threading, time\n"
        "def end():\n"
        "    while not multiprocessing.parent_process(): time.sleep(.05)\n"
        "    os.kill(os.getpid(), 9)\n"
        "threading.Timer(2, end).start()\n"
    )
    count = 3 * SHARD_SIZE
    with pytest.raises(ScoreError, match="one of 2 processes ended without a word"):
        build(folder, tmp_path / "x", count, jobs=2, mix=Mix(bars=(1.0,)))
    assert not [p for p in (tmp_path / "x").iterdir() if p.name.endswith(".new")]


def test_only_songs_of_the_split_are_used(folder, tmp_path):
    build(folder, tmp_path / "dev", 4, split="dev")
    assert {Shards(tmp_path / "dev")[i].song for i in range(4)} == {"c"}


def test_no_shards_says_how_to_make_some(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="vitomr data build"):
        Shards(tmp_path)
    build(folder, tmp_path / "one", 1)
    with pytest.raises(FileNotFoundError, match=f"no shards in {tmp_path / 'two'}"):
        Shards([tmp_path / "one", tmp_path / "two"])


def test_several_folders_are_one_sequence(folder, tmp_path):
    for n, (name, seed) in enumerate((("b", 1), ("a", 2))):
        build(folder, tmp_path / name, 3 + n, seed=seed)
    both = Shards([tmp_path / "b", str(tmp_path / "a")])
    apart = [s[i] for s in (Shards(tmp_path / "b"), Shards(tmp_path / "a")) for i in range(len(s))]
    assert len(both) == len(apart) == len(both.index) == 7
    assert all(np.array_equal(both[i].img, x.img) and np.array_equal(both[i].ids, x.ids) for i, x in enumerate(apart))


EXTRAS = {  # what is printed and not read: where it stands in the first bar, and its MusicXML
    "fingering": ("note", "<notations><technical><fingering>3</fingering></technical></notations>"),
    "lyrics": ("note", "<lyric number='1'><syllabic>single</syllabic><text>Rose</text></lyric>"),
    "chord": ("bar", "<harmony><root><root-step>C</root-step></root><kind text='m7'>minor-seventh</kind></harmony>"),
    "tempo": ("direction", "<words>Allegro</words>"),
    "dynamics": ("direction", "<dynamics><ff/></dynamics>"),
    "hairpin": ("direction", "<wedge type='crescendo'/>"),
}  # fmt: skip


@pytest.mark.parametrize("what", EXTRAS)
def test_what_is_printed_and_not_read_stays_in_the_picture_only(piano, what):
    where, xml = EXTRAS[what]
    if where == "direction":
        xml = f"<direction placement='above'><direction-type>{xml}</direction-type></direction>"
    part, extra = copy.deepcopy(piano), ET.fromstring(xml)
    bar = part.find("measure")
    first = bar.find("note")
    if where == "note":
        first.append(extra)
    else:
        bar.insert(list(bar).index(first), extra)
    if what == "hairpin":
        end = ET.fromstring(xml)
        end.find("direction-type/wedge").set("type", "stop")
        part.findall("measure")[1].append(end)
    assert linearise(part).tokens == linearise(piano).tokens
    ink = [float((255 - engrave(p).img.astype(float)).sum()) for p in (piano, part)]
    assert ink[1] > ink[0] + 2_000


def test_samples_are_true(shards):
    "Tokens without errors, and every symbol of a note on ink."
    n = on_ink = 0
    for i in range(len(shards)):
        s = shards[i]
        assert analyse(decode(s.ids)).fatal is None
        assert len(s.token_head) == len(s.ids) and s.token_head.max() < len(s.heads)
        for x, y in s.heads:
            on_ink += s.img[int(y) - 3 : int(y) + 4, int(x) - 4 : int(x) + 5].min() < 160
            n += 1
    assert on_ink / n > 0.99


# variations

SIGNS = ("sharp", "flat", "natural", "double-sharp", "flat-flat")


def semitones(part):
    "Sounding pitch of every note, and the interval classes between neighbours on the staff."
    classes = dict(zip("CDEFGAB", (0, 2, 4, 5, 7, 9, 11), strict=True))
    return [
        12 * int(p.findtext("octave")) + classes[p.findtext("step")] + int(p.findtext("alter", "0"))
        for p in part.iter("pitch")
    ]


def moved(part, *how):
    try:
        return transpose(part, *how)
    except ScoreError:
        return None


@pytest.mark.parametrize("fifths", [-7, -6, -3, -1, 1, 2, 5])
def test_transposing_moves_every_note_alike_and_back(excerpts, fifths):
    tried = 0
    for part in excerpts:
        there = moved(part, fifths)
        if there is None:
            continue
        tried += 1
        gaps = {b - a for a, b in zip(semitones(part), semitones(there), strict=True)}
        assert len(gaps) <= 1 and all((g - 7 * fifths) % 12 == 0 and abs(g) <= 6 for g in gaps)
        assert linearise(transpose(there, -fifths)).tokens == linearise(part).tokens
        a, b = linearise(part).tokens, linearise(there).tokens
        assert [t in SIGNS for t in a] == [t in SIGNS for t in b], "signs are printed where they were"
    assert tried > 10


def test_transposing_respells_the_signs(piano):
    there = linearise(transpose(piano, 2)).tokens  # B flat to C major: F sharp becomes G sharp, B flat C
    assert "key:fifths:0" in there and "G5" in there and "sharp" in there
    there = linearise(transpose(piano, -5)).tokens  # to seven flats: F sharp becomes F natural over F flat
    assert "key:fifths:-7" in there and "natural" in there and "sharp" not in there


def test_a_key_that_is_not_printed_is_refused(piano):
    before = musicxml_bytes(as_score(piano))
    with pytest.raises(ScoreError, match="key"):
        transpose(piano, -6)
    assert musicxml_bytes(as_score(piano)) == before


def test_ledger_lines(piano):
    assert ledger_lines(piano) == 0
    assert ledger_lines(transpose(piano, 0, 1)) == 4 and ledger_lines(transpose(piano, 0, -1)) == 3


def test_rare_bars_weigh_more(piano):
    plain, rare = copy.deepcopy(piano), copy.deepcopy(piano)
    for e in rare.iter("accidental"):
        e.text = "double-sharp"
    assert rarity(rare[0]) > rarity(plain[0])


def test_mixed_bars_stand_in_the_same_key_and_clefs(excerpts):
    for part in excerpts:
        states = header_states(part)
        bars = mixed_bars(states, np.ones(len(states)), 3, np.random.default_rng(0))
        assert len(set(bars)) == len(bars) >= 1
        assert analyse(linearise(join_bars(part, bars)).tokens).fatal is None


def test_marks_are_drawn_and_said(excerpts):
    for part in excerpts[:10]:
        marked = copy.deepcopy(part)
        add_marks(marked, np.random.default_rng(0), share=1.0)
        if linearise(marked).tokens != linearise(part).tokens:
            a = analyse(linearise(marked).tokens)
            assert a.fatal is None and a.n_minor == analyse(linearise(part).tokens).n_minor
            assert not np.array_equal(engrave(marked).img, engrave(part).img)


def test_beats_made_over_into_tuplets_last_as_long_and_stay_right(excerpts):
    written = Counter()
    for k, part in enumerate(excerpts):
        before, plain = analyse(linearise(part).tokens), linearise(part).tokens
        for seed in range(3):
            made = copy.deepcopy(part)
            n = add_tuplets(made, header_states(part)[0], np.random.default_rng([k, seed]))
            tokens = linearise(made).tokens
            after = analyse(tokens)
            assert [e.kind for e in after.minor] == [e.kind for e in before.minor], (k, seed)
            assert [b.adds_up for b in after.bars] == [b.adds_up for b in before.bars]
            assert tokens.count("tuplet:start") - plain.count("tuplet:start") == n
            assert n or tokens == plain
            assert set(engrave(made).positions) >= {x for x in linearise(made).note if x}, "every head can be found"
            assert len({x.get("id") for x in made.iter("note")}) == len(list(made.iter("note")))
            written += Counter(t for t in tokens if re.fullmatch("[0-9]+in[0-9]+", t)) - Counter(plain)
    assert len(written) >= 4 and written["3in2"], written


def test_no_beat_is_made_over_where_something_hangs_on_it():
    note = "<note><pitch><step>{}</step><octave>4</octave></pitch><duration>1</duration>{}<type>quarter</type></note>"
    tie, tied = '<tie type="{}"/>', '<notations><tied type="{}"/></notations>'
    notes = [note.format("A", tie.format("start")), note.format("A", tie.format("stop")), note.format("B", "")]
    ends = tied.format("start"), tied.format("stop"), ""
    notes = [n.replace("</type>", f"</type>{t}") for n, t in zip(notes, ends, strict=True)]
    head = "<attributes><divisions>1</divisions><time><beats>3</beats><beat-type>4</beat-type></time></attributes>"
    for seed in range(20):
        part = ET.fromstring(f"<part id='P1'><measure number='1'>{head}{''.join(notes)}</measure></part>")
        add_tuplets(part, header_states(part)[0], np.random.default_rng(seed))
        kept = [n for n in part.iter("note") if n.find("tie") is not None]
        assert len(kept) == 2 and all(n.find("time-modification") is None for n in kept)


def test_voices_and_stems_that_a_file_leaves_unsaid_are_said_as_they_are_printed():
    head = "<attributes><divisions>2</divisions><clef><sign>{}</sign><line>{}</line></clef></attributes>"
    note = "<note>{}<pitch><step>{}</step><octave>{}</octave></pitch><duration>1</duration><type>{}</type>{}</note>"
    beam, clef = '<beam number="1">{}</beam>'.format, head.format("F", 4)
    notes = [
        note.format("", "A", 4, "quarter", ""), note.format("", "B", 4, "quarter", ""),
        note.format("", "E", 4, "quarter", ""), note.format("<chord/>", "E", 5, "quarter", ""),  # E4 is the farther one
        note.format("", "C", 5, "eighth", beam("begin")), note.format("", "D", 4, "eighth", beam("end")),
        note.format("<grace/>", "G", 5, "eighth", "").replace("<duration>1</duration>", ""),
        note.format("", "G", 5, "whole", ""), clef, note.format("", "E", 3, "quarter", ""),
    ]  # fmt: skip
    part = ET.fromstring(f"<part id='P1'><measure number='1'>{head.format('G', 2)}{''.join(notes)}</measure></part>")
    say_voices_and_stems(part)
    stems = [n.findtext("stem") for n in part.iter("note")]
    assert stems == ["up", "down", "up", "up", "up", "up", "up", None, "down"]
    assert all(n.findtext("voice") == "1" for n in part.iter("note"))
    two = ET.fromstring(ET.tostring(part))
    for n in two.iter("note"):
        n.find("voice").text = "2"
        n[:] = [e for e in n if e.tag != "stem"]
    two.find("measure").extend([ET.fromstring("<backup><duration>1</duration></backup>"), part[0].findall("note")[1]])
    before = ET.tostring(two)
    say_voices_and_stems(two)
    assert ET.tostring(two) == before, "one stem is said, so the others are left out on purpose"
    two.find("measure/note[last()]").remove(two.find("measure/note[last()]/stem"))
    say_voices_and_stems(two)
    assert [n.findtext("stem") for n in two.iter("note")] == [*["down"] * 7, None, "down", "up"]


def test_a_chorale_for_two_hands_sounds_as_before():
    voices = parts(music21_to_xml(music21.corpus.parse("bach/bwv66.6")))
    for seed in range(4):
        cuts = [cut_excerpt(p.element, 1, 4) for p in voices]
        sounding = Counter(n for c in cuts for n in semitones(c))
        piano = piano_reduction(cuts, np.random.default_rng(seed))
        tokens = linearise(piano).tokens
        found = Counter(semitones(piano))
        assert not found - sounding and sum((sounding - found).values()) <= 3, "but for unisons"
        assert {"clef:G2", "clef:F4", "staff:1", "staff:2"} <= set(tokens) and analyse(tokens).n_minor == 0
        assert len(engrave(piano).positions) == len(list(piano.iter("note")))


def test_voices_that_do_not_fit_are_refused(piano, excerpts):
    with pytest.raises(ScoreError):
        piano_reduction([copy.deepcopy(excerpts[0])] * 2, np.random.default_rng(0))
    with pytest.raises(ScoreError):
        piano_reduction([copy.deepcopy(piano) for _ in range(4)], np.random.default_rng(0))
    voices = [copy.deepcopy(excerpts[0]) for _ in range(3)]
    next(voices[1].iter("duration")).text = None
    with pytest.raises(ScoreError, match="a duration that is n"):
        piano_reduction(voices, np.random.default_rng(0))
    with pytest.raises(ScoreError, match="a duration that is n"):
        double_values(voices[1])


def piano_of(name):
    return next(p for p in parts(music21_to_xml(music21.corpus.parse(name))) if p.n_staves == 2).element


def on_staff(part, staff):
    "Bar, onset, end and pitch of each note of one staff."
    pitch = lambda note: tuple(note.findtext(f"pitch/{t}", "0") for t in ("step", "alter", "octave"))
    return [(*at, pitch(note)) for note, *at in placed_notes(part) if note.findtext("staff") == staff]


def hidden(part):
    return len(list(part.iter("note"))) - len(engrave(copy.deepcopy(part)).positions)


def test_an_excerpt_with_its_own_left_hand_stays_as_it_is():
    tried = 0
    for name in ("schumann_clara/polonaise_op1n1", "schumann_clara/polonaise_op1n3"):
        part = piano_of(name)
        for start in range(0, len(part.findall("measure")) - 3, 3):
            excerpt = cut_excerpt(part, start, 3)
            made = copy.deepcopy(excerpt)
            try:
                other_hand(made, copy.deepcopy(excerpt))
            except ScoreError:
                continue
            tried += 1
            assert [on_staff(made, s) for s in "12"] == [on_staff(excerpt, s) for s in "12"]
            if not any(m.findall("attributes")[1:] for m in excerpt):  # a clef that is said again is left out
                assert linearise(made).tokens == linearise(excerpt).tokens
    assert tried > 8


def test_the_left_hand_of_another_song_in_the_key_of_the_first():
    first, second = piano_of("schumann_clara/polonaise_op1n1"), piano_of("schumann_clara/polonaise_op1n3")
    tried = 0
    for i, j in product((6, 8, 9, 21), (6, 8, 20)):
        a, b = cut_excerpt(first, i, 2), cut_excerpt(second, j, 2)
        made = copy.deepcopy(a)
        try:
            other_hand(made, copy.deepcopy(b))
        except ScoreError:
            continue
        tried += 1
        keys = [int(e.findtext("measure/attributes/key/fifths")) for e in (a, b)]
        moved = transpose(b, keys[0] - keys[1])
        assert on_staff(made, "1") == on_staff(a, "1")
        assert on_staff(made, "2") == on_staff(moved, "2") != on_staff(a, "2")
        assert analyse(linearise(made).tokens).n_minor == 0
        assert hidden(made) <= hidden(a) + hidden(b)
    assert tried >= 4


def test_hands_that_do_not_fit_are_refused(piano, excerpts):
    single = next(e for e in excerpts if e.findtext("measure/attributes/staves") != "2")
    shorter, wandering = copy.deepcopy(piano), copy.deepcopy(piano)
    shorter.remove(shorter[-1])
    wandering[0].find("note/staff").text = "2"
    for other, why in ((single, "piano"), (shorter, "length"), (wandering, "moves")):
        with pytest.raises(ScoreError, match=why):
            other_hand(copy.deepcopy(piano), copy.deepcopy(other))


def test_hands_of_two_songs_are_built_and_repeat():
    mix = Mix(piano=1, hands=1, bars=(0, 1), rare=0, mixed=0)
    one, two = (songs_with_hands(mix) for _ in range(2))
    assert len(one) > 6 and all(np.array_equal(a.ids, b.ids) for a, b in zip(one, two, strict=True))
    plain = songs_with_hands(replace(mix, hands=0))
    assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(one, plain, strict=False))


def songs_with_hands(mix):
    songs = [s for s in open_corpus("music21", split="train") if s.id.startswith("schumann_clara/polonaise")]
    partners = deque(maxlen=4)
    return [
        s for k, song in enumerate(songs) for s in song_samples(song, np.random.default_rng(k), mix, partners=partners)
    ]


def test_twice_as_long_is_the_same_music_in_other_notes(excerpts, piano):
    flags = {"eighth": 0, "16th": 1, "32nd": 2}
    for excerpt in (*excerpts, piano, cut_excerpt(piano_of("schumann_clara/polonaise_op1n1"), 8, 3)):
        made = copy.deepcopy(excerpt)
        double_values(made)
        times = [[(onset, end) for _, _, onset, end in placed_notes(e)] for e in (excerpt, made)]
        assert times[1] == [(2 * a, 2 * b) for a, b in times[0]]
        assert semitones(made) == semitones(excerpt) and hidden(made) == hidden(excerpt)
        tokens = linearise(made).tokens
        assert analyse(tokens).n_minor == analyse(linearise(excerpt).tokens).n_minor == 0
        for old, new in zip(excerpt.iter("note"), made.iter("note"), strict=True):
            if old.find("grace") is None and old.find("beam") is not None:
                assert len(new.findall("beam")) <= flags[old.findtext("type")]
            assert new.findtext("type") not in ("whole", "breve") or new.find("stem") is None
        for old, new in zip(excerpt.iter("time"), made.iter("time"), strict=True):
            assert int(old.findtext("beat-type")) == 2 * int(new.findtext("beat-type"))


def test_the_beams_that_are_left_begin_and_end():
    excerpt = cut_excerpt(piano_of("schumann_clara/polonaise_op1n3"), 8, 8)
    double_values(excerpt)
    seen, open_beams = 0, {}
    for note in excerpt.iter("note"):
        for beam in note.findall("beam"):
            at = note.findtext("voice"), beam.get("number")
            assert beam.text in ("begin", "forward hook", "backward hook") or open_beams[at]
            open_beams[at] = beam.text in ("begin", "continue") or (beam.text.endswith("hook") and open_beams.get(at))
            assert beam.get("number") != "1" or not beam.text.endswith("hook")
            seen += 1
    assert seen > 8 and not any(open_beams.values())


@pytest.mark.parametrize("what", ["<type>long</type>", "<beat-type>2</beat-type>", '<tremolo type="start">2</tremolo>'])
def test_what_has_no_sign_twice_as_long_is_refused(what):
    note = f"<type>half</type><notations><ornaments>{what if 'trem' in what else ''}</ornaments></notations>"
    note = what if what.startswith("<type") else note
    time = f"<attributes><time><beats>2</beats>{what}</time></attributes>" if "beat" in what else ""
    part = ET.fromstring(f"<part><measure>{time}<note><duration>4</duration>{note}</note></measure></part>")
    with pytest.raises(ScoreError):
        double_values(part)


def lines_of(*names, bars=(1, 2)):
    songs = [parts(music21_to_xml(music21.corpus.parse(f"bach/{name}")))[0] for name in names]
    return [cut_excerpt(p.element, *bars) for p in songs]


def test_lines_of_several_songs_keep_their_tunes_in_one_key():
    tried = 0
    for seed in range(6):
        lines = lines_of("bwv10.7", "bwv104.6", "bwv102.7", "bwv108.6")
        key = lines[0].findtext("measure/attributes/key/fifths")
        tunes = [semitones(line) for line in lines]
        made = lines_together(lines, np.random.default_rng(seed))
        tokens = linearise(made).tokens
        assert made.findtext("measure/attributes/key/fifths") == key and analyse(tokens).n_minor == 0
        assert all(bar.adds_up for bar in analyse(tokens).bars) and ledger_lines(made) <= 6
        assert len(engrave(copy.deepcopy(made)).positions) == len(list(made.iter("note")))
        voices = {n.findtext("voice"): ET.Element("voice") for n in made.iter("note")}
        if len(semitones(made)) < sum(map(len, tunes)) or made.find(".//chord") is not None:
            continue  # two of them as chords, or on one note
        tried += 1
        for note in made.iter("note"):
            voices[note.findtext("voice")].append(note)
        for tune, voice in zip(tunes, "1256", strict=True):
            sung = semitones(voices[voice])
            assert len({a - b for a, b in zip(sung, tune, strict=True)}) == 1
    assert tried


@pytest.mark.parametrize("what", ["two", "silent", "lengths", "voices"])
def test_lines_that_do_not_fit_are_refused(what, piano):
    lines = lines_of("bwv10.7", "bwv104.6", "bwv102.7")
    if what == "silent":
        for note in lines[1].iter("note"):
            note.remove(note.find("pitch"))
            note.insert(0, ET.Element("rest"))
    lines[2] = {"lengths": lines_of("bwv66.6", bars=(0, 2))[0], "voices": copy.deepcopy(piano)}.get(what, lines[2])
    assert what != "lengths" or bar_lengths(lines[2]) != bar_lengths(lines[0])
    with pytest.raises(ScoreError):
        lines_together(lines[:2] if what == "two" else lines, np.random.default_rng(0))


def test_lines_and_long_values_are_built_and_repeat():
    song = next(s for s in open_corpus("music21", split="train") if s.id == "schubert/Lindenbaum")

    def built(**shares):
        mix, partners = Mix(piano=1, bars=(0, 1), rare=0, mixed=0, silent=0, **shares), deque(maxlen=4)
        made = [list(song_samples(song, np.random.default_rng(k), mix, partners=partners)) for k in range(4)]
        return [decode(s.ids) for samples in made for s in samples]

    plain, doubled, lines = built(), built(doubled=1), built(lines=1)
    assert built(doubled=1) == doubled and built(lines=1) == lines
    values = ["32nd", "16th", "eighth", "quarter", "half", "whole", "breve"]
    before, after = ([sum(t.count(v) for t in tokens) for v in values] for tokens in (plain, doubled))
    graces = 2 * sum(t.startswith("grace") for tokens in plain for t in tokens)  # they keep their values
    assert sum(before) == sum(after) > 100 and after[0] == 0
    assert sum(abs(a - b) for a, b in zip(after[1:], before, strict=False)) <= graces < sum(before) / 50
    assert lines != plain and sum("clef:F4" in t and "voice:2" in t for t in lines) > len(lines) // 3
    assert all(bar.adds_up for t in doubled + lines for bar in analyse(t).bars)


@pytest.mark.parametrize("is_above", [True, False])
def test_a_neighbour_never_touches_the_music(shards, is_above):
    added = 0
    for seed in range(20):
        img, other = shards[seed].img, shards[seed + 1].img
        out, down = add_neighbour(img, other, np.random.default_rng(seed), is_above=is_above)
        own = out[down : down + len(img)]
        assert out.shape[1] == img.shape[1] and (down == 0 or is_above)
        assert (own <= img).all()
        added += (out < 200).sum() > (img < 200).sum()
        fresh = (own < 200) & (img >= 200)
        near = np.zeros_like(fresh)
        near[:, 1:] |= img[:, :-1] < 200
        near[1:] |= img[:-1] < 200
        assert not (fresh & near).any()
    assert added >= 15


def test_the_same_seed_gives_the_same_variations(folder):
    song = open_corpus(folder)[1]
    mix = Mix(transposed=1, marked=1, timed=1, named=1, neighbour=1, mixed=0.5, rare=0.5)
    runs = [list(song_samples(song, np.random.default_rng(2), mix)) for _ in range(2)]
    assert len(runs[0]) > 2
    for a, b in zip(*runs, strict=True):
        assert np.array_equal(a.img, b.img) and np.array_equal(a.ids, b.ids) and np.array_equal(a.heads, b.heads)
    assert random_layout(np.random.default_rng(1)) == random_layout(np.random.default_rng(1))


def test_songs_held_back_are_read_as_they_are_written(folder, tmp_path):
    build(folder, tmp_path / "dev", 4, split="dev", seed=2)
    build(folder, tmp_path / "written", 4, split="dev", seed=2, mix=AS_WRITTEN)
    assert same(Shards(tmp_path / "dev"), Shards(tmp_path / "written"))
    keys = {t for i in range(4) for t in decode(Shards(tmp_path / "dev")[i].ids) if t.startswith("key")}
    assert keys == {"key:fifths:-2"}


def test_ties_are_paired_by_time_not_by_place_in_the_file():
    "Voice 1 ends a tie on beat 2 that voice 2, written after it, starts on beat 1."
    note = "<note><pitch><step>G</step><octave>4</octave></pitch><duration>{}</duration><voice>{}</voice>{}</note>"
    tied = "<notations><tied type='{}'/></notations>"
    rest = "<note><rest/><duration>1</duration><voice>1</voice></note>"
    bar = f"{rest}{note.format(1, 1, tied.format('stop'))}<backup><duration>2</duration></backup>"
    bar += note.format(1, 2, tied.format("start"))
    head = "<attributes><divisions>1</divisions></attributes>"
    part = parse_xml(f"<part id='P1'><measure number='1'>{head}{bar}</measure></part>".encode())
    drop_dangling(part)
    assert sorted(t.get("type") for t in part.iter("tied")) == ["start", "stop"]


def test_half_an_octave_line_is_no_line():
    shift = "<direction><direction-type><octave-shift type='{}' size='8'/></direction-type></direction>"
    note = "<note><pitch><step>C</step><octave>6</octave></pitch><duration>4</duration><type>whole</type></note>"
    head = "<attributes><divisions>1</divisions><clef><sign>G</sign><line>2</line></clef></attributes>"
    bars = [head + shift.format("down") + note, note + shift.format("stop"), note]
    bars = "".join(f"<measure number='{i}'>{b}</measure>" for i, b in enumerate(bars))
    part = parse_xml(f"<part id='P1'>{bars}</part>".encode())
    assert len(list(cut_excerpt(part, 0, 2).iter("octave-shift"))) == 2
    for start, n in ((0, 1), (1, 2)):
        assert not list(cut_excerpt(part, start, n).iter("direction"))


# batches


def test_pictures_pad_with_white_and_masks_tell():
    img, mask = pad_pictures([np.zeros((20, 40), np.uint8), np.zeros((48, 33), np.uint8)])
    assert img.shape == (2, 1, 48, 48) and mask.shape == (2, 3, 3)
    assert mask[0].sum() == 2 * 3 and mask[1].all()
    assert (img[0, 0, 20:] == 255).all() and (img[0, 0, :20, :40] == 0).all()


def test_batches_are_a_function_of_seed_and_step(shards):
    a, b = (Batches(shards, BatchPlan(budget=1500, seed=3), mix=PICTURE_MIX, steps=9) for _ in range(2))
    for step in (0, 4, 8):
        x, y = a[step], b[step]
        assert all(torch.equal(getattr(x, k), getattr(y, k)) for k in vars(x))
    other = Batches(shards, BatchPlan(budget=1500, seed=4), steps=9)
    assert any(not np.array_equal(a.indices(s), other.indices(s)) for s in range(9))


def test_what_is_hard_is_drawn_more_often(shards):
    held = {w: np.array([TOKEN_ID[w] in s.ids for s in shards]) for w in ("natural", "tied:start", "dot")}
    word, asked = next((w, x) for w, x in held.items() if 0 < x.sum() < len(shards))
    plain, often = (
        Batches(shards, BatchPlan(budget=1500, seed=1, often=o), steps=300) for o in ((), ((word, 4), ("rest", 1)))
    )
    assert (repeats(shards, often.plan.often) == np.where(asked, 4, 1)).all()
    drawn = [[b.indices(s) for s in range(300)] for b in (plain, often)]
    share = [asked[np.concatenate(d)].mean() for d in drawn]
    assert share[1] > share[0] + 0.1
    assert all(len(set(x.tolist())) == len(x) for x in drawn[1])
    for wrong in (("no such token", 2), (word, 0)):
        with pytest.raises(ValueError, match="often"):
            repeats(shards, (wrong,))


def test_a_loader_started_late_goes_on_with_the_same_batches(shards):
    batches = Batches(shards, BatchPlan(budget=1200), mix="scan", steps=6)
    whole = [b.img for b in loader(batches, workers=0)]
    late = [b.img for b in loader(batches, 4, workers=1)]
    assert len(late) == 2 and all(torch.equal(x, y) for x, y in zip(whole[4:], late, strict=True))


def test_lengths_and_budget_are_kept(shards):
    batches = Batches(shards, BatchPlan(budget=1500, lengths=((0, 40), (10, 40), (20, 400))), steps=40)
    for step in range(0, 40, 3):
        limit = 40 if step < 10 else 400
        chosen = batches.indices(step)
        assert len(set(chosen)) == len(chosen) >= 1
        assert batches.n_tokens[chosen].max() <= max(limit, batches.n_tokens.min())
        size = (batches.n_tokens + batches.n_patches)[chosen].max() * len(chosen)
        assert len(chosen) == 1 or size <= 1.2 * 1500


def test_every_sample_is_seen(shards):
    batches = Batches(shards, BatchPlan(budget=3000), steps=300)
    seen = Counter(int(i) for s in range(300) for i in batches.indices(s))
    assert len(seen) == len(shards)


def test_targets_point_at_patches_that_hold_the_symbol(shards):
    rng = np.random.default_rng(0)
    samples = [shards[i] for i in range(6)]
    ready = [prepare(s, rng, "clean") for s in samples]
    batch = collate(samples, [r[0] for r in ready], [r[1] for r in ready])
    assert (batch.tokens[:, 0] == BOS_ID).all() and ((batch.tokens == EOS_ID).sum(1) == 1).all()
    table = {tuple(r) for r in batch.symbols.tolist()}
    for b, s in enumerate(samples):
        assert batch.tokens[b, 1 : len(s.ids) + 1].tolist() == s.ids.tolist()
        assert (batch.tokens[b, len(s.ids) + 2 :] == PAD_ID).all()
        for t, token in enumerate(s.ids.tolist()):
            p = int(batch.patch[b, t])
            if p >= 0:
                row, col = divmod(p, batch.mask.shape[2])
                assert batch.mask[b, row, col]
                tile = batch.img[
                    b,
                    0,
                    max(0, row * PATCH - 2) : row * PATCH + PATCH + 2,
                    max(0, col * PATCH - 2) : col * PATCH + PATCH + 2,
                ]
                assert tile.min() < 160, "a symbol's patch holds ink"
                if len(VOCABULARY[token]) == 2:
                    assert (b, p, token) in table


@pytest.mark.parametrize("preset", ["clean", "light", "scan", "photo"])
def test_prepared_pictures_are_in_normal_form(shards, preset):
    from vitomr.page.staves import estimate_staff_space

    spaces = []
    for i in range(12):
        img, heads = prepare(shards[i], np.random.default_rng(i), preset, space=8.0)
        assert img.dtype == np.uint8 and np.median(img) > 200
        spaces.append(estimate_staff_space(img).space)
        assert ((heads > -8) & (heads < np.array(img.shape[::-1]) + 8)).all()
    assert np.mean(np.abs(np.array(spaces) - 8) < 0.4) >= 0.9
