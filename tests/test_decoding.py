"""Sampling, scoring, beams and compaction give what the plain loop gives."""

import copy
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from vitomr.data.batches import pad_pictures, prepare
from vitomr.decoder import READERS, Reader
from vitomr.nn.decoding import (
    SHIFTS,
    Averaged,
    Decoded,
    Sampler,
    Session,
    StillSession,
    beam,
    entropy_of,
    finish,
    greedy,
    likeliest,
    moved,
    score,
    still_step,
    stream,
    without_control,
    write,
)
from vitomr.nn.vit import Encoder
from vitomr.notation.grammar import Grammar
from vitomr.notation.lmx import BOS_ID, EOS_ID, PAD_ID, VOCABULARY

ROOT = Path(__file__).resolve().parents[1]
SAMPLERS = [Sampler(0.0), Sampler(), Sampler(0.7), Sampler(1.3, top_k=5), Sampler(1.0, top_p=0.8), Sampler(2.0, 9, 0.9)]


@pytest.fixture(scope="module")
def pictures(shards):
    imgs = [prepare(shards[i], np.random.default_rng(0), "clean", 6.0)[0] for i in range(5)]
    return pad_pictures(imgs)


def small_reader(seed: int, end: float) -> Reader:
    "Untrained, with an opinion; the larger `end`, the sooner it ends."
    torch.manual_seed(seed)
    model = Reader(READERS["smoke"]).eval()
    with torch.no_grad():
        model.head.weight.mul_(5)
        model.head.bias[EOS_ID] += end
        model.embed.weight.mul_(10)
        for block in model.blocks:
            block.cross_attention.kv.weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def reader(pictures):
    "A small reader whose rows end at different times, greedily too; fresh weights differ between processors."
    for seed, end in itertools.product(range(8), (1.0, 1.5, 0.5, 2.0)):
        model = small_reader(seed, end)
        lengths = [n_written(model, pictures, s) for s in (Sampler(0.0), Sampler(), Sampler(0.7))]
        if all(len(n) > 1 for n in lengths):
            return model
    raise AssertionError("no such reader among 32")


def n_written(model: Reader, pictures, sampler: Sampler) -> set[int]:
    "How many tokens rows have."
    read = write(model, *pictures, sampler, copies=3, max_tokens=90, generator=rng())
    return {len(read.ids(r)) for r in range(15)}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a: Decoded, b: Decoded, atol: float = 1e-4) -> None:
    assert torch.equal(a.tokens, b.tokens)
    torch.testing.assert_close(a.logp, b.logp, atol=atol, rtol=0)
    torch.testing.assert_close(a.entropy, b.entropy, atol=atol, rtol=0)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_cached_equals_uncached_and_compacted_equals_whole(reader, pictures, sampler):
    options = {"copies": 3, "max_tokens": 90}
    plain = write(reader, *pictures, sampler, **options, generator=rng(), cached=False, compact=False)
    assert 1 < len({len(plain.ids(r)) for r in range(15)}), "all rows ended together; the test would show nothing"
    for cached, compact in ((True, False), (True, True), (False, True)):
        same(write(reader, *pictures, sampler, **options, generator=rng(), cached=cached, compact=compact), plain)


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_where_nothing_moves_the_same_is_written(reader, pictures, sampler, compact):
    options = {"copies": 3, "max_tokens": 91}  # no multiple of the steps between two looks
    plain = write(reader, *pictures, sampler, **options, generator=rng())
    same(write(reader, *pictures, sampler, **options, generator=rng(), still=True, compact=compact), plain)


def test_where_nothing_moves_rows_may_end_early_and_rules_are_kept(reader, pictures):
    with torch.no_grad():
        reader.head.bias[EOS_ID] += 6.0  # all end within a few tokens
    try:
        plain, still = (write(reader, *pictures, Sampler(), max_tokens=60, generator=rng(), still=s) for s in (0, 1))
    finally:
        with torch.no_grad():
            reader.head.bias[EOS_ID] -= 6.0
    assert plain.tokens.shape[1] < 30
    same(still, plain)
    ruled = [
        write(reader, *pictures, Sampler(1.5), copies=2, max_tokens=50, generator=rng(), still=s,
              rules=Grammar().tracker(10))
        for s in (False, True)
    ]  # fmt: skip
    same(*ruled)
    assert all(Grammar().legal([*ruled[1].ids(r), EOS_ID]) is None for r in range(10) if not ruled[1].truncated[r])
    with pytest.raises(ValueError, match="max_tokens 0"):
        write(reader, *pictures, max_tokens=0, still=True)


def test_a_compiled_step_writes_the_same(reader, pictures):
    options = {"copies": 3, "max_tokens": 30, "compact": False}  # one shape, one compilation
    plain, fused = (
        write(reader, *pictures, Sampler(1.3, top_k=5), **options, generator=rng(), compile=c) for c in (False, True)
    )
    same(fused, plain)


def on_a_device_that_is_not_there(sampler: Sampler, grammar: bool) -> StillSession:
    "Encode pictures and write three tokens on a GPU of shapes without numbers."
    with torch.device("cuda:0"):
        model = Reader(READERS["smoke"]).eval()
    img = torch.zeros(2, 1, 64, 96, dtype=torch.uint8, device="cuda:0")
    memory = model.remember(model.see(img, mask := torch.ones(2, 4, 6, dtype=torch.bool, device="cuda:0")), mask)
    s = StillSession(model, memory, 2, copies=3, max_tokens=9, every=4, device=img.device)
    s.legal = torch.ones(6, len(VOCABULARY), dtype=torch.bool, device="cuda:0") if grammar else None
    for _ in range(3):
        still_step(sampler, s)
    return s


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_step_asks_nothing_of_the_device_and_stays_on_it(sampler, monkeypatch):
    """Fake tensors know their device and have no numbers: a tensor of the wrong device is an error, and so is
    whatever would make the host wait (`.item()`, `if tensor`, an index made of a mask)."""
    monkeypatch.setattr(Encoder, "forward", lambda self, img, mask: img.new_zeros(2, 24, self.d, dtype=torch.float32))
    with FakeTensorMode(), torch.no_grad():
        s = on_a_device_that_is_not_there(sampler, grammar=sampler.top_k == 5)
        assert {t.device.type for t in (s.tokens, s.logp, s.entropy, s.last, s.ended, s.place)} == {"cuda"}
        assert s.tokens.shape == (4, 6) and s.last.shape == (6, 1)
        with pytest.raises(DataDependentOutputException):
            bool(s.ended.all())  # the test would notice


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_a_gpu_writes_what_a_cpu_writes(reader, pictures, sampler):
    "Step by step, fused and recorded, and with a grammar; draws that fall on an edge may differ."
    options = {"copies": 3, "max_tokens": 91}
    plain = write(reader, *pictures, sampler, **options, generator=rng())
    there, (img, mask) = copy.deepcopy(reader).cuda(), (x.cuda() for x in pictures)
    for how in ({}, {"compact": False}, {"still": False}, {"compile": True}):
        got = write(there, img, mask, sampler, **options, generator=rng(), **how)
        n = min(got.tokens.shape[1], plain.tokens.shape[1])
        alike = (got.tokens[:, :n].cpu() == plain.tokens[:, :n]).long().cumprod(1).bool()
        assert alike.float().mean() > 0.97, how
        assert ((got.logp[:, :n].cpu() - plain.logp[:, :n]).abs() * alike).max() < 1e-3, how
    ruled = write(there, img, mask, sampler, **options, generator=rng(), rules=Grammar().tracker(15))
    assert all(Grammar().legal([*ruled.ids(r), EOS_ID]) is None for r in range(15) if not ruled.truncated[r])


@pytest.mark.parametrize("sampler", SAMPLERS[1:], ids=str)
def test_what_is_sampled_is_what_is_scored(reader, pictures, sampler):
    read = write(reader, *pictures, sampler, copies=4, max_tokens=60, generator=rng(1))
    with torch.no_grad():
        logp, entropy, written = score(reader, reader.encode(*pictures), read.tokens, sampler)
    assert (logp - read.logp).exp().sub(1).abs().max() < 1e-4  # the ratio of the first inner step
    torch.testing.assert_close(entropy, read.entropy, atol=1e-4, rtol=0)
    assert torch.equal(written, read.tokens != PAD_ID)
    assert all(PAD_ID not in ids and BOS_ID not in ids for ids in map(read.ids, range(len(read.tokens))))


def test_scores_have_gradients_that_are_finite(reader, pictures):
    read = write(reader, *pictures, Sampler(1.3, 5, 0.9), max_tokens=30, generator=rng(1))
    logp, entropy, written = score(reader, reader.encode(*pictures), read.tokens, Sampler(1.3, 5, 0.9))
    (logp.sum() + entropy.sum()).backward()
    grads = [p.grad for p in reader.parameters() if p.grad is not None]
    assert grads and all(g.isfinite().all() for g in grads) and any(g.abs().max() > 0 for g in grads)
    reader.zero_grad(set_to_none=True)


def test_copies_share_what_the_picture_gives(reader, pictures):
    "Rows about one picture read as rows about the same picture repeated."
    img, mask = pictures
    shared = write(reader, img, mask, Sampler(), copies=3, max_tokens=40, generator=rng(2))
    apart = write(reader, *(x.repeat_interleave(3, 0) for x in (img, mask)), Sampler(), max_tokens=40, generator=rng(2))
    same(shared, apart)


def test_a_row_does_not_depend_on_its_neighbours_or_on_chance_elsewhere(reader, pictures):
    img, mask = pictures
    together = write(reader, img, mask, Sampler(0.0), max_tokens=50)
    for b in range(len(img)):
        alone = write(reader, img[b : b + 1], mask[b : b + 1], Sampler(0.0), max_tokens=50)
        assert alone.ids(0) == together.ids(b)
    a, b = (write(reader, img, mask, Sampler(), max_tokens=30, generator=rng(s)).tokens for s in (4, 4))
    assert torch.equal(a, b)
    other = write(reader, img, mask, Sampler(), max_tokens=30, generator=rng(5)).tokens
    assert not torch.equal(a, other)


def test_pieces_of_a_stream_are_the_whole(reader, pictures):
    whole = write(reader, *pictures, Sampler(), copies=2, max_tokens=40, generator=rng(6))
    columns = list(stream(reader, *pictures, Sampler(), copies=2, max_tokens=40, generator=rng(6)))
    same(Decoded(*(torch.stack(c, 1) for c in zip(*columns, strict=True))), whole, atol=0)


def test_samplers_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    p = logits.softmax(-1)
    torch.testing.assert_close(Sampler(2.0).distribution(logits), (logits / 2).log_softmax(-1))
    kept = Sampler(top_k=2).distribution(logits).exp()
    torch.testing.assert_close(kept, torch.tensor([[*(p[0, :2] / p[0, :2].sum()), 0, 0]]))
    assert (Sampler(top_p=0.6).distribution(logits) > -torch.inf).tolist() == [[True, False, False, False]]
    assert (Sampler(top_p=0.65).distribution(logits) > -torch.inf).tolist() == [[True, True, False, False]]
    legal = torch.tensor([[False, True, False, True]])
    assert (Sampler(top_k=2).distribution(logits, legal) > -torch.inf).tolist() == legal.tolist()
    assert entropy_of(torch.full((1, 8), 1 / 8).log()).item() == pytest.approx(np.log(8))
    torch.testing.assert_close(Sampler(0.0).distribution(logits), logits.log_softmax(-1))


def test_draws_follow_the_distribution():
    logp = Sampler(top_k=3).distribution(torch.tensor([1.0, 0.5, 0.0, -1.0])).expand(40_000, 4)
    drawn = Sampler().draw(logp, 1 - torch.rand(40_000, generator=rng())).bincount(minlength=4) / 40_000
    assert drawn[3] == 0 and (drawn - logp[0].exp()).abs().max() < 0.01
    ends = Sampler().draw(torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(2, 3), torch.tensor([1e-30, 1.0]))
    assert ends.tolist() == [1, 1]  # never a token of probability 0, at either end


class Table:
    "A toy whose next token depends on the last one only, over five ids: 2 ends, 0 begins, 1 pads."

    def __init__(self, seed: int):
        self.logits = torch.randn(5, 5, generator=rng(seed)) * 2
        self.logits[:, :2] = -50.0

    def encode(self, img, mask):
        return torch.zeros(len(img))

    def take(self, memory, pictures):
        return memory[pictures]

    def new_cache(self, memory, length, copies=1):
        return []

    def decode(self, tokens, memory, start=0, cache=None):
        return self.logits[tokens]


def every_reading(table: Table, most: int):
    "All sequences that end within `most` tokens, with their log-probability."
    logp = table.logits.log_softmax(-1)
    for n in range(1, most + 1):
        for body in itertools.product((3, 4), repeat=n - 1):
            path = (0, *body, 2)
            yield list(body), float(sum(logp[a, b] for a, b in itertools.pairwise(path)))


@pytest.mark.parametrize("seed", range(8))
def test_a_wide_beam_finds_the_best_of_all_readings(seed):
    table, img, mask = Table(seed), torch.zeros(2, 1, 16, 16), torch.ones(2, 1, 1, dtype=torch.bool)
    best, logp = max(every_reading(table, 6), key=lambda r: r[1] / (len(r[0]) + 1))
    for ids, found in beam(table, img, mask, width=64, max_tokens=6):
        assert found / (len(ids) + 1) >= logp / (len(best) + 1) - 1e-5
        if len(ids) < 6:  # a reading that was cut off may beat all that ended
            assert ids == best and found == pytest.approx(logp, abs=1e-4)


def test_a_beam_of_one_is_greedy_and_cached_beams_are_uncached_ones(reader, pictures):
    read = greedy(reader, *pictures, max_tokens=60)
    for b, (ids, logp) in enumerate(beam(reader, *pictures, width=1, max_tokens=60)):
        assert ids == read.ids(b) and logp == pytest.approx(float(read.logp[b].sum()), abs=1e-3)
    fast, slow = (beam(reader, *pictures, width=3, max_tokens=40, cached=c) for c in (True, False))
    assert [ids for ids, _ in fast] == [ids for ids, _ in slow]
    assert np.allclose([x for _, x in fast], [x for _, x in slow], atol=1e-3)


def test_a_wider_beam_is_no_less_likely(reader, pictures):
    "With alpha 0 the beam looks for the likeliest reading; on average wider finds likelier."
    narrow, wide = (beam(reader, *pictures, width=w, alpha=0.0, max_tokens=40) for w in (1, 6))
    assert sum(x for _, x in wide) >= sum(x for _, x in narrow)


@pytest.mark.parametrize("begun", [[], [3], [4, 3]])
@pytest.mark.parametrize("seed", range(6))
def test_the_likeliest_continuation_is_the_best_of_all_that_are_accepted(seed, begun):
    table, fits = Table(seed), lambda ids: ids.count(4) == 2 and ids[-1] == 2
    logp, first = table.logits.log_softmax(-1), (begun or [0])[-1]
    ways = [[*body, 2] for n in range(7) for body in itertools.product((3, 4), repeat=n)]
    worth = lambda ids: float(sum(logp[a, b] for a, b in itertools.pairwise([first, *ids])))
    best = max(filter(fits, ways), key=worth)
    found, steps = likeliest(table, torch.zeros(1), begun, fits, ends=(2,), width=64, max_tokens=7)
    assert found == best and sum(steps) == pytest.approx(worth(best), abs=1e-4) and len(steps) == len(found)
    assert likeliest(table, torch.zeros(1), begun, fits, ends=(2,), width=64, least=worth(best) + 0.01) is None
    assert likeliest(table, torch.zeros(1), begun, lambda ids: False, ends=(2,), max_tokens=9) is None


def test_a_reading_goes_on_from_any_of_its_tokens(reader, pictures):
    img, mask = pictures
    read, memory = greedy(reader, *pictures, max_tokens=70), reader.encode(*pictures)
    for b in range(len(img)):
        whole, only = read.ids(b), reader.take(memory, torch.tensor([b]))
        logp = read.logp[b, : len(whole) + (not read.truncated[b])].tolist()
        for k in {0, 1, 2, len(whole) // 2, len(whole) - 1}:
            ids, steps = finish(reader, only, whole[:k], max_tokens=70)
            assert ids == whole[k:] and np.allclose(steps, logp[k:], atol=1e-4)
        if not read.truncated[b]:  # nothing that ends is likelier than the likeliest
            _, steps = likeliest(reader, only, whole[:1], lambda ids: True, width=4, max_tokens=69)
            assert sum(steps) >= sum(logp[len(whole[:1]) :]) - 1e-3


def test_settings_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="temperature -1"):
        Sampler(-1.0)
    with pytest.raises(ValueError, match=r"top_p 0\.0"):
        Sampler(top_p=0.0)
    with pytest.raises(ValueError, match="max_tokens 0"):
        Session(Table(0), torch.zeros(1), 1, max_tokens=0)


# several looks at one picture


def test_a_moved_picture_is_the_same_further_down_and_right(pictures):
    img, mask = pictures
    for down, right in SHIFTS:
        there, seen = moved(img, mask, down, right)
        h, w = img.shape[2:]
        assert there.shape[2:] == (16 * seen.shape[1], 16 * seen.shape[2])
        assert torch.equal(there[:, :, down : down + h, right : right + w], img)
        assert (there[:, :, :down] == 255).all() and (there[:, :, :, :right] == 255).all()
        grown = torch.zeros(len(img), *there.shape[2:], dtype=torch.bool)  # pixels of patches that count
        grown[:, down : down + h, right : right + w] = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)
        by_patch = grown.unflatten(1, (-1, 16)).unflatten(3, (-1, 16)).any(4).any(2)
        assert torch.equal(by_patch, seen)


def test_one_look_where_it_stands_is_the_reader_itself(reader, pictures):
    for sampler in SAMPLERS[:4]:
        a, b = (
            write(m, *pictures, sampler, copies=2, max_tokens=60, generator=rng())
            for m in (reader, Averaged(reader, SHIFTS[:1]))
        )
        same(a, b, atol=1e-5)


def test_several_looks_write_by_the_mean_of_what_each_would_say(reader, pictures):
    "By an independent way: the tokens given, each place scored by itself."
    both = Averaged(reader, SHIFTS[:3])
    read = greedy(both, *pictures, max_tokens=60)
    before = torch.cat([torch.full_like(read.tokens[:, :1], BOS_ID), read.tokens[:, :-1]], 1)
    told = [reader.decode(before, reader.encode(*moved(*pictures, *s))) for s in SHIFTS[:3]]
    mean = without_control(torch.stack([x.float().log_softmax(-1) for x in told]).mean(0)).log_softmax(-1)
    was = read.tokens != PAD_ID
    assert torch.equal(mean.argmax(-1)[was], read.tokens[was])
    chosen = mean.gather(2, read.tokens[..., None])[..., 0]
    torch.testing.assert_close(chosen[was], read.logp[was], atol=1e-4, rtol=0)
    alone = greedy(reader, *pictures, max_tokens=60)
    assert [alone.ids(i) for i in range(5)] != [read.ids(i) for i in range(5)], "the test would show nothing"


@pytest.mark.parametrize("sampler", SAMPLERS[:4], ids=str)
def test_several_looks_in_every_loop(reader, pictures, sampler):
    both, options = Averaged(reader), {"copies": 3, "max_tokens": 60}
    plain = write(both, *pictures, sampler, **options, generator=rng(), cached=False, compact=False)
    for how in ({}, {"compact": False}, {"still": True}):
        same(write(both, *pictures, sampler, **options, generator=rng(), **how), plain)


def test_several_looks_and_a_beam_or_a_beginning(reader, pictures):
    both = Averaged(reader)
    plain = greedy(both, *pictures, max_tokens=60)
    for i, (ids, logp) in enumerate(beam(both, *pictures, width=1, max_tokens=60)):
        assert ids == plain.ids(i) and logp == pytest.approx(float(plain.logp[i].sum()), abs=1e-3)
    wide = [beam(both, *pictures, width=4, max_tokens=60, cached=cached) for cached in (True, False)]
    assert [ids for ids, _ in wide[0]] == [ids for ids, _ in wide[1]]
    memory = both.take(both.encode(*pictures), torch.tensor([2]))
    begun = plain.ids(2)[:5]
    rest, _ = finish(both, memory, begun, max_tokens=60)
    assert begun + rest == plain.ids(2)


def test_a_step_that_was_just_compiled_and_one_from_the_cache_give_the_same_bits(tmp_path):
    code = """
import torch
from vitomr.decoder import READERS, Reader
torch.manual_seed(0)
model = Reader(READERS["smoke"]).eval()
with torch.no_grad():
    pictures = torch.randint(256, (2, 1, 64, 160), dtype=torch.uint8)
    memory = model.encode(pictures, torch.ones(2, 4, 10, dtype=torch.bool))
    cache = model.new_cache(memory, 6, 4)
    steps = [model.decode(torch.arange(8)[:, None] + 10 + t, memory, t, cache) for t in range(6)]
print(torch.cat(steps, 1).numpy().tobytes().hex())
"""
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    fresh, cached = (subprocess.check_output([sys.executable, "-c", code], env=env, cwd=ROOT) for _ in range(2))
    assert any(tmp_path.rglob("*.nbc")), "nothing was cached"
    assert len(fresh) > 1000 and fresh == cached
