"""Corpora, synthesis and batches: splits that keep songs apart, builds that repeat, positions that follow."""

import zipfile
from collections import Counter

import numpy as np
import pytest
import torch

from vitomr.data.batches import PATCH, PICTURE_MIX, Batches, BatchPlan, collate, loader, pad_pictures, prepare
from vitomr.data.corpora import SPLITS, open_corpus, split_of
from vitomr.data.synthesis import SHARD_SIZE, Mix, Shards, build
from vitomr.notation.lmx import BOS_ID, EOS_ID, PAD_ID, VOCABULARY, analyse, decode, linearise, to_musicxml
from vitomr.notation.score import ScoreError, musicxml_bytes, mxl_bytes


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


def test_two_processes_give_what_one_gives(folder, tmp_path):
    build(folder, tmp_path / "one", SHARD_SIZE + 10, seed=4, jobs=1, mix=Mix(bars=(1.0,)))
    build(folder, tmp_path / "two", SHARD_SIZE + 10, seed=4, jobs=2, mix=Mix(bars=(1.0,)))
    assert same(Shards(tmp_path / "one"), Shards(tmp_path / "two"))


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


def test_only_songs_of_the_split_are_used(folder, tmp_path):
    build(folder, tmp_path / "dev", 4, split="dev")
    assert {Shards(tmp_path / "dev")[i].song for i in range(4)} == {"c"}


def test_no_shards_says_how_to_make_some(tmp_path):
    with pytest.raises(FileNotFoundError, match="vitomr data build"):
        Shards(tmp_path)


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
