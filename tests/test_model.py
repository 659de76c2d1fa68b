"""The reader: masks, caches, losses, training that resumes exactly, weights that round-trip."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vitomr.data.batches import Batches, BatchPlan, pad_pictures
from vitomr.decoder import (
    READERS,
    TRAINING,
    Losses,
    Reader,
    ReaderConfig,
    WeightsError,
    gaze_loss,
    load_reader,
    save_reader,
    symbol_loss,
    train,
)
from vitomr.nn.decoding import greedy
from vitomr.notation.lmx import EOS_ID, PAD_ID
from vitomr.train.loop import LoopConfig, fit
from vitomr.train.runs import CheckpointError, load_checkpoint, read_history


def pictures(sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, s, generator=g, dtype=torch.uint8).numpy() for s in sizes]


# the eye


def test_a_picture_in_a_batch_gives_what_it_gives_alone(smoke):
    imgs = pictures([(48, 96), (80, 160), (64, 320)])
    batch, mask = pad_pictures(imgs)
    with torch.no_grad():
        among = smoke.see(batch, mask)
        for b, img in enumerate(imgs):
            alone = smoke.see(*pad_pictures([img]))[0]
            torch.testing.assert_close(among[b][mask[b].flatten()], alone, atol=1e-5, rtol=1e-5)


def test_sizes_far_beyond_any_training_picture(smoke):
    with torch.no_grad():
        out = smoke.see(*pad_pictures(pictures([(400, 2400)])))
    assert out.shape == (1, 25 * 150, 32) and out.isfinite().all()


def test_sides_that_are_no_multiple_of_a_patch_are_named(smoke):
    with pytest.raises(ValueError, match="multiples of 16"):
        smoke.see(torch.zeros(1, 1, 50, 64, dtype=torch.uint8), torch.ones(1, 3, 4, dtype=torch.bool))


# writing


@pytest.mark.parametrize("name", ["smoke", "tiny"])
def test_cached_equals_uncached(name):
    torch.manual_seed(1)
    model = Reader(READERS[name]).eval()
    img, mask = pad_pictures(pictures([(64, 128), (96, 80), (48, 208)]))
    fast, slow = (greedy(model, img, mask, max_tokens=30, cached=c) for c in (True, False))
    assert torch.equal(fast.tokens, slow.tokens)
    torch.testing.assert_close(fast.logp, slow.logp, atol=1e-4, rtol=0)


def test_scoring_at_once_equals_writing_one_by_one(smoke):
    img, mask = pad_pictures(pictures([(64, 128), (64, 96)]))
    tokens = torch.randint(3, 227, (2, 25), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        memory = smoke.encode(img, mask)
        cache = smoke.new_cache(memory, 25)
        singly = torch.cat([smoke.decode(tokens[:, t : t + 1], memory, t, cache) for t in range(25)], 1)
        pieces = smoke.new_cache(memory, 25)
        chunks = torch.cat([smoke.decode(tokens[:, a:b], memory, a, pieces) for a, b in ((0, 7), (7, 8), (8, 25))], 1)
        torch.testing.assert_close(smoke.decode(tokens, memory), singly, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(singly, chunks, atol=1e-4, rtol=1e-4)


def test_the_future_does_not_leak(smoke):
    img, mask = pad_pictures(pictures([(64, 128)]))
    tokens = torch.randint(3, 227, (1, 20), generator=torch.Generator().manual_seed(3))
    changed = tokens.clone()
    changed[0, 12:] = 5
    with torch.no_grad():
        memory = smoke.encode(img, mask)
        a, b = smoke.decode(tokens, memory), smoke.decode(changed, memory)
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.allclose(a[:, 12:], b[:, 12:])


def test_rows_read_the_same_alone_and_together(smoke):
    imgs = pictures([(64, 128), (96, 80)])
    together = greedy(smoke, *pad_pictures(imgs), max_tokens=20)
    for b, img in enumerate(imgs):
        alone = greedy(smoke, *pad_pictures([img]), max_tokens=20)
        assert alone.ids(0) == together.ids(b)


def test_sizes_are_within_their_bounds():
    with torch.device("meta"):
        sizes = {k: sum(p.numel() for p in Reader(c).parameters()) for k, c in READERS.items()}
    assert sizes["tiny"] <= 12e6 and 270e6 < sizes["base"] < 340e6


# losses


def test_symbol_loss_is_binary_cross_entropy():
    logits = torch.randn(2, 6, 227, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]], dtype=torch.bool)
    symbols = torch.tensor([[0, 1, 50], [0, 1, 60], [1, 2, 50]])
    target = torch.zeros_like(logits)
    target[symbols[:, 0], symbols[:, 1], symbols[:, 2]] = 1
    by_hand = (F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(-1) * mask).sum() / 3
    torch.testing.assert_close(symbol_loss(logits, symbols, mask), by_hand)


def test_gaze_loss_counts_only_tokens_with_a_patch():
    maps = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    patch = torch.tensor([[2, -1, 0]])
    by_hand = -(maps[0, 0].log_softmax(-1)[2] + maps[0, 2].log_softmax(-1)[0]) / 2
    torch.testing.assert_close(gaze_loss([maps], patch), by_hand)
    assert gaze_loss([maps], torch.full((1, 3), -1)) == 0


def test_padding_does_not_change_the_loss(shards, smoke):
    batch = Batches(shards, BatchPlan(budget=1200), steps=3)[0]
    wide = replace(
        batch,
        img=F.pad(batch.img, (0, 32, 0, 16), value=255),
        mask=F.pad(batch.mask, (0, 2, 0, 1)),
        tokens=F.pad(batch.tokens, (0, 9), value=PAD_ID),
        patch=F.pad(
            torch.where(
                batch.patch >= 0,
                batch.patch // batch.mask.shape[2] * (batch.mask.shape[2] + 2) + batch.patch % batch.mask.shape[2],
                -1,
            ),
            (0, 9),
            value=-1,
        ),
        symbols=torch.stack(
            [
                batch.symbols[:, 0],
                batch.symbols[:, 1] // batch.mask.shape[2] * (batch.mask.shape[2] + 2)
                + batch.symbols[:, 1] % batch.mask.shape[2],
                batch.symbols[:, 2],
            ],
            1,
        ),
    )
    with torch.no_grad():
        a, b = (Losses()(smoke, x)[0] for x in (batch, wide))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)


def test_it_learns_eight_samples_by_heart(shards, tmp_path):
    "Reading them back free-running gives nearly every token: the whole way from pixels to tokens carries information."
    few = Batches(shards, BatchPlan(budget=10**6, max_batch=8, lengths=((0, 45),), window=1), steps=260)
    fixed = few[0]

    class Same(torch.utils.data.Dataset):
        def __len__(self):
            return 260

        def __getitem__(self, i):
            return fixed

    cfg = LoopConfig(steps=260, lr=4e-3, optimizer="muon", warmup=10, bf16=False, ema=0.9, log_every=20)
    torch.manual_seed(0)
    model = Reader(ReaderConfig(64, 2, 2, 1, 64, 2, 2, (0, 1)))
    ema = fit(model, lambda start: (Same()[i] for i in range(start, 260)), Losses(), cfg, tmp_path)
    model.load_state_dict(ema.shadow)
    read = greedy(model.eval(), fixed.img, fixed.mask, max_tokens=60)
    right = sum(
        read.ids(b) == [t for t in fixed.tokens[b, 1:].tolist() if t not in (PAD_ID, EOS_ID)] for b in range(len(fixed))
    )
    assert read_history(tmp_path)[-1]["ce"] < 0.05
    assert right == len(fixed)


# resuming

SMALL = replace(
    TRAINING["smoke"],
    loop=replace(TRAINING["smoke"].loop, steps=12, log_every=1),
    plan=BatchPlan(budget=900),
    degradation="mix",
)


def losses_of(folder) -> dict[int, float]:
    return {h["step"]: h["loss"] for h in read_history(folder)}


def test_resume_from_nothing_but_the_checkpoint(shards, tmp_path):
    train(SMALL, shards.folder, tmp_path / "whole")
    train(SMALL, shards.folder, tmp_path / "stopped", stop_at=5)
    for p in (tmp_path / "stopped").iterdir():
        if p.name != "checkpoint.pt":
            p.unlink()
    a = train(SMALL, shards.folder, tmp_path / "stopped")
    b = train(SMALL, shards.folder, tmp_path / "whole")  # finished: comes back as it is
    whole, again = losses_of(tmp_path / "whole"), losses_of(tmp_path / "stopped")
    assert set(again) == set(range(6, 13)) and all(whole[s] == again[s] for s in again)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_killed_at_any_moment(shards, tmp_path):
    "kill -9 in the middle, again and again, until it is done: the same losses as in one go."
    code = (
        "import sys; from dataclasses import replace\n"
        "from vitomr.decoder import *; from vitomr.data.batches import BatchPlan\n"
        "cfg = TRAINING['smoke']; loop = replace(cfg.loop, steps=12, log_every=1, checkpoint_minutes=0)\n"
        "cfg = replace(cfg, loop=loop, plan=BatchPlan(budget=900), degradation='mix')\n"
        "train(cfg, sys.argv[1], sys.argv[2])"
    )
    train(SMALL, shards.folder, tmp_path / "whole")
    run = tmp_path / "killed"
    for at in (3, 8):
        p = subprocess.Popen(
            [sys.executable, "-c", code, str(shards.folder), str(run)],
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        deadline = time.monotonic() + 120
        while p.poll() is None and time.monotonic() < deadline:
            if max(losses_of(run), default=0) >= at:
                p.send_signal(signal.SIGKILL)
                break
            time.sleep(0.01)
        p.wait()
    subprocess.run(
        [sys.executable, "-c", code, str(shards.folder), str(run)],
        check=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert losses_of(run) == losses_of(tmp_path / "whole")


def test_a_truncated_checkpoint_is_named_and_nothing_is_lost(shards, tmp_path):
    train(SMALL, shards.folder, tmp_path, stop_at=3)
    path = tmp_path / "checkpoint.pt"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="checkpoint.pt") as e:
        train(SMALL, shards.folder, tmp_path)
    assert "\n" not in str(e.value) and path.exists() and len(read_history(tmp_path)) == 3


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"model": Evil(), "step": 1, "config": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "checkpoint.pt")
    assert not (tmp_path / "owned").exists()


def test_another_model_in_the_run_folder_is_refused(shards, tmp_path):
    train(SMALL, shards.folder, tmp_path, stop_at=2)
    with pytest.raises(CheckpointError, match="reader"):
        train(replace(SMALL, reader=replace(SMALL.reader, decoder_layers=3)), shards.folder, tmp_path)


# weights


def test_weights_round_trip(smoke, tmp_path):
    save_reader(smoke, tmp_path)
    again = load_reader(tmp_path)
    assert again.cfg == smoke.cfg
    assert all(
        torch.equal(a.bfloat16().float(), b) for a, b in zip(smoke.parameters(), again.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("config.json", lambda p: p.unlink(), "config.json"),
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:100]), "cannot be read"),
        ("config.json", lambda p: p.write_text("{"), "cannot be loaded"),
        ("config.json", lambda p: p.write_text(json.dumps({"layers": 3})), "layers"),
        (
            "config.json",
            lambda p: p.write_text(p.read_text().replace('"d_decoder": 32', '"d_decoder": 64')),
            "cannot be loaded",
        ),
        ("vocabulary.txt", lambda p: p.write_text(p.read_text().replace("measure", "bar", 1)), "vocabulary"),
    ],
)
def test_damaged_weights_get_one_line(smoke, tmp_path, name, damage, says):
    save_reader(smoke, tmp_path)
    damage(tmp_path / name)
    with pytest.raises(WeightsError, match=says) as e:
        load_reader(tmp_path)
    assert "\n" not in str(e.value)
