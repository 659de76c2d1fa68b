"""The masked autoencoder: nothing hidden leaks, padding changes nothing, worn and clean lie on each other."""

import json
import subprocess
import sys
from dataclasses import fields, replace

import cv2
import numpy as np
import pytest
import torch
from einops import repeat

from vitomr import cli
from vitomr.data.batches import BatchPlan, pad_pictures
from vitomr.data.datasets import DatasetError
from vitomr.data.degrade import Preset
from vitomr.data.masked import PictureBatch, PicturePlan, Pictures, hide, pair, real_pictures
from vitomr.decoder import READERS, Reader, save_reader
from vitomr.mae import (
    MAE,
    MAES,
    TRAINING,
    MaeWeightsError,
    attention_map,
    encoder_weights,
    feature_colours,
    load_encoder,
    load_mae,
    mae_loss,
    picture_of,
    reconstruct,
    save_mae,
    targets,
    train,
    unexplained,
)
from vitomr.train.loop import LoopConfig
from vitomr.train.runs import read_history

SMALL = replace(TRAINING["smoke"], loop=replace(TRAINING["smoke"].loop, steps=8, log_every=1))


@pytest.fixture(scope="module")
def model():
    "An untrained model that answers something: a fresh head says zero whatever it is asked."
    torch.manual_seed(0)
    model = MAE(MAES["smoke"]).eval()
    torch.nn.init.normal_(model.head.weight, std=0.02)
    return model


@pytest.fixture
def batch():
    "Three noisy pictures of different sizes, three quarters hidden."
    rng = np.random.default_rng(0)
    img, mask = pad_pictures([rng.integers(0, 256, s, dtype=np.uint8) for s in ((64, 200), (96, 100), (30, 333))])
    target = torch.from_numpy(rng.integers(0, 256, img.shape, dtype=np.uint8))
    return PictureBatch(img, target, mask, hide(mask, 0.75, rng))


def pixels_of(patches: torch.Tensor) -> torch.Tensor:
    return repeat(patches, "b h w -> b 1 (h p) (w q)", p=16, q=16)


def staff(width: int = 500) -> np.ndarray:
    "A staff at 8 px with noteheads, stems and beams in no regular order."
    rng, img = np.random.default_rng(3), np.full((130, width), 255, np.uint8)
    for k in range(5):
        img[45 + 8 * k, 10 : width - 10] = 0
    for x in range(40, width - 30, 23):
        y = 45 + 4 * int(rng.integers(-2, 11))
        cv2.ellipse(img, (x, y), (5, 4), -20, 0, 360, 0, -1)
        cv2.line(img, (x + 5, y), (x + 5, y - 28), 0, 1)
    return img


# What is hidden


@pytest.mark.parametrize("ratio", [0, 0.1, 0.5, 0.75, 0.9])
def test_each_picture_hides_its_own_share(batch, ratio):
    hidden = hide(batch.mask, ratio, np.random.default_rng(1))
    counts = batch.mask.sum((1, 2)).tolist()
    assert hidden.sum((1, 2)).tolist() == [round(ratio * n) for n in counts]
    assert not (hidden & ~batch.mask).any()


def test_one_patch_stays_visible():
    mask = torch.ones(2, 1, 2, dtype=torch.bool)
    assert hide(mask, 0.99, np.random.default_rng(0)).sum((1, 2)).tolist() == [1, 1]


@torch.no_grad()
def test_hidden_pixels_do_not_leak(model, batch):
    noise = torch.randint_like(batch.img, 256)
    changed = torch.where(pixels_of(batch.hidden), noise, batch.img)
    visible = batch.mask & ~batch.hidden
    assert not torch.equal(changed, batch.img)
    assert torch.equal(model.see(changed, visible)[0], model.see(batch.img, visible)[0])
    changed = torch.where(pixels_of(visible), noise, batch.img)
    assert not torch.equal(model.see(changed, visible)[0], model.see(batch.img, visible)[0])


@torch.no_grad()
def test_batch_equals_single(model, batch):
    visible = batch.mask & ~batch.hidden
    features, real = model.see(batch.img, visible)
    said = model(batch.img, batch.mask, batch.hidden)
    for b in range(len(batch)):
        h, w = batch.mask[b].any(1).sum(), batch.mask[b].any(0).sum()
        own = batch.img[b : b + 1, :, : h * 16, : w * 16]
        mask, hidden = (x[b : b + 1, :h, :w] for x in (batch.mask, batch.hidden))
        torch.testing.assert_close(features[b][real[b]], model.see(own, mask & ~hidden)[0][0], atol=1e-5, rtol=0)
        torch.testing.assert_close(said[b, :h, :w], model(own, mask, hidden)[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_nothing_hidden_is_the_readers_encoder(model, batch):
    features, real = model.see(batch.img, batch.mask)
    expected = model.encoder(batch.img, batch.mask)
    for b in range(len(batch)):
        torch.testing.assert_close(features[b][real[b]], expected[b][batch.mask[b].flatten()], atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_far_beyond_any_training_picture(model):
    img = torch.randint(0, 256, (1, 1, 16 * 12, 16 * 200), dtype=torch.uint8)
    mask = torch.ones(1, 12, 200, dtype=torch.bool)
    hidden = hide(mask, 0.75, np.random.default_rng(0))
    said = model(img, mask, hidden)
    assert said.isfinite().all()
    corner = said[0, -2:][hidden[0, -2:]]  # mask tokens that only their positions tell apart
    assert corner.std(0).min() > 1e-4


# The loss


def test_loss_counts_hidden_patches_of_pictures_only(model, batch):
    def loss(target):
        return mae_loss(model, replace(batch, target=target))[0].item()

    noise = torch.randint_like(batch.target, 256)
    elsewhere = torch.where(pixels_of(~batch.hidden), noise, batch.target)
    assert loss(elsewhere) == loss(batch.target)
    one = torch.zeros_like(batch.hidden).flatten()
    one[batch.hidden.flatten().nonzero()[0]] = True
    assert loss(torch.where(pixels_of(one.view_as(batch.hidden)), noise, batch.target)) != loss(batch.target)


def test_loss_is_one_for_knowing_nothing_and_zero_for_all(batch):
    answers = torch.cat(targets(batch.target), -1)
    means = torch.cat([torch.zeros_like(answers[..., :-2]), answers[..., -2:]], -1)
    for said, expected in ((answers, 0.0), (means, 1.0)):
        loss, parts = mae_loss(lambda *_, said=said: said, batch)
        assert loss.item() == pytest.approx(expected, abs=1e-6)
    assert parts["patches"] == int(batch.mask.sum())


def test_blank_paper_earns_nothing_and_its_grain_little():
    rng = np.random.default_rng(0)
    grain = np.clip(250 + rng.normal(0, 5, (16, 16)), 0, 255)  # 2 % of black, on scanned paper
    line = np.full((16, 16), 255.0)
    line[8] = 0
    img = np.concatenate([np.full((16, 16), 255.0), grain, line], 1).astype(np.uint8)
    weight = (targets(pad_pictures([img])[0])[0] ** 2).mean(-1)[0, 0]
    assert weight[0] == 0 and weight[1] < 0.05 and weight[2] > 0.8


def test_targets_turn_back_into_the_picture(batch):
    assert torch.equal(picture_of(*targets(batch.img)), batch.img)


def test_every_weight_learns(batch):
    torch.manual_seed(0)
    own = MAE(MAES["smoke"])
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for _ in range(3):  # the head and the residual convolutions start at zero, and hold back what is below
        optimizer.zero_grad()
        mae_loss(own, batch)[0].backward()
        optimizer.step()
    assert not [n for n, p in own.named_parameters() if p.grad is None or (p.grad == 0).all()]


def test_training_begins_at_knowing_nothing(batch):
    "Above 1, the way down would be to see less: the stem grows until it drowns everything else."
    assert mae_loss(MAE(MAES["smoke"]), batch)[1]["pixels"].item() == pytest.approx(1, abs=0.02)


# Degraded in, clean out

BENT = {"tilt": (1, 0.6, 0.6), "perspective": (1, 0.8, 0.8), "curl": (1, 0.9, 0.9), "scale": (1.2, 1.3)}


@pytest.mark.parametrize("how", [{}, {"tilt": BENT["tilt"]}, {k: v for k, v in BENT.items() if k != "curl"}, BENT])
def test_geometry_is_shared_exactly(how):
    bad, clean = pair(staff(), np.random.default_rng(4), Preset(**how))
    assert np.array_equal(bad, clean)


@pytest.mark.parametrize("preset", ["light", "scan", "photo"])
@pytest.mark.parametrize("seed", range(3))
def test_worn_and_clean_lie_on_each_other(preset, seed):
    bad, clean = pair(staff(), np.random.default_rng(seed), preset)
    assert bad.shape == clean.shape
    blurred = [cv2.GaussianBlur(255.0 - x, (0, 0), 1) for x in (bad, clean)]

    def overlap(dx, dy):
        return (blurred[0] * np.roll(blurred[1], (dy, dx), (0, 1))).sum()

    best = max(((dx, dy) for dx in range(-3, 4) for dy in range(-3, 4)), key=lambda d: overlap(*d))
    assert max(map(abs, best)) <= 1, best


def test_wear_stays_out_of_the_reference():
    clean = [pair(staff(), np.random.default_rng(s), Preset(effects={"pen": (1, 1, 1)}))[1] for s in range(2)]
    bad = [pair(staff(), np.random.default_rng(s), Preset(effects={"pen": (1, 1, 1)}))[0] for s in range(2)]
    ink = lambda x: int((x < 128).sum())
    assert ink(clean[0]) == ink(clean[1]) < min(map(ink, bad))


# Pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two pictures without reference, one in a folder of its own, and a file that is none."
    path = tmp_path_factory.mktemp("photos")
    (path / "deeper").mkdir()
    cv2.imwrite(str(path / "a.png"), staff())
    cv2.imwrite(str(path / "deeper" / "b.jpg"), cv2.resize(staff(), None, fx=1.5, fy=1.5))
    (path / "c.png").write_bytes(b"no picture")
    return path


def test_real_pictures_come_at_one_staff_space(folder):
    found = real_pictures(folder)
    assert len(found) == 2
    assert abs(found[0].shape[1] - found[1].shape[1]) < 12


def test_real_pictures_that_cannot_be_used(tmp_path):
    with pytest.raises(DatasetError, match="no dataset of a known layout"):
        real_pictures(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of the 1 pictures .*broken\.png") as e:
        real_pictures(tmp_path)
    assert "\n" not in str(e.value)


def test_held_back_pictures_of_a_dataset_are_not_taken(tmp_path):
    records = [{"image": f"{s}.png", "lmx": "measure", "split": s} for s in ("train", "test")]
    for s in ("train", "test"):
        cv2.imwrite(str(tmp_path / f"{s}.png"), staff(500 if s == "train" else 900))
    (tmp_path / "all.json").write_text(json.dumps(records))
    assert [x.shape[1] > 600 for x in real_pictures(tmp_path / "all.json")] == [False]
    (tmp_path / "test.json").write_text(json.dumps(records[1:]))
    with pytest.raises(DatasetError, match="none of them a train picture"):
        real_pictures(tmp_path / "test.json")


def test_batches_are_a_function_of_seed_and_step(shards):
    make = lambda seed: Pictures([shards], [staff()], BatchPlan(budget=900, seed=seed), steps=4)
    a, b = make(0)[2], make(0)[2]
    assert all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    assert any(not torch.equal(a.img, x.img) for x in (make(0)[3], make(1)[2]))
    assert a.img.shape == a.target.shape and not (a.hidden & ~a.mask).any()
    assert a.hidden.sum((1, 2)).tolist() == [round(0.75 * n) for n in a.mask.sum((1, 2)).tolist()]


def test_real_pictures_are_mixed_in_and_pages_cut(shards):
    page = np.tile(staff(900), (12, 2))  # some 73 x 42 patches
    plan = BatchPlan(budget=900)
    alone = Pictures([], [page], plan, how=PicturePlan(rows=10, columns=20), steps=2)[0]
    assert max(alone.mask.shape[1:]) <= 21
    counts = [
        sum(len(b.picture(int(i), np.random.default_rng([s, i]))) == len(page) for s in range(5) for i in range(40))
        for b in (Pictures([shards], [page], plan, how=PicturePlan(real=r)) for r in (0.0, 0.2, 1.0))
    ]
    assert counts[0] == 0 and 20 <= counts[1] <= 60 and counts[2] == 200


# Training


def test_resume_gives_identical_losses(shards, folder, tmp_path):
    train(SMALL, [shards.folder, folder], tmp_path / "whole")
    train(SMALL, [shards.folder, folder], tmp_path / "stopped", stop_at=5)
    b = train(SMALL, [shards.folder, folder], tmp_path / "stopped")
    whole, stopped = ([h | {"seconds": 0} for h in read_history(tmp_path / r)] for r in ("whole", "stopped"))
    assert whole == stopped and len(whole) == 8
    a = train(SMALL, [shards.folder, folder], tmp_path / "whole")  # finished: comes back as it is
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_batches_come_from_another_process(folder, tmp_path):
    "OpenCV's threads, once started, must not be forked along: the other process would wait for them for ever."
    code = (
        "import sys; from dataclasses import replace; from pathlib import Path; import cv2;"
        "cv2.setNumThreads(4);"
        "from vitomr.data.masked import real_pictures;"
        "from vitomr.mae import TRAINING, train; real_pictures(sys.argv[1]);"
        "cfg = TRAINING['smoke']; cfg = replace(cfg, workers=1, loop=replace(cfg.loop, steps=2));"
        "train(cfg, sys.argv[1], sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path)], check=True, timeout=120)
    assert read_history(tmp_path)[-1]["step"] == 2


def test_it_learns_a_handful_of_pictures(tmp_path):
    pictures = [staff(w)[20:110] for w in (180, 200, 220, 240)]
    cfg = replace(
        SMALL, plan=BatchPlan(budget=300),
        loop=LoopConfig(steps=90, lr=1e-2, optimizer="muon", warmup=10, bf16=False, ema=0.9, log_every=10),
        pictures=PicturePlan(degradation="clean", ratio=0.5),
    )  # fmt: skip
    for k, x in enumerate(pictures):
        cv2.imwrite(str(tmp_path / f"{k}.png"), x)
    model = train(cfg, tmp_path, tmp_path / "run")
    assert read_history(tmp_path / "run")[0]["pixels"] > 0.9
    seen = [pair(x, np.random.default_rng(0), space=6.0)[0] for x in real_pictures(tmp_path)]
    assert unexplained(model, seen, 0.5, seed=9) < 0.5


# Into a reader


def test_encoders_fit_the_readers():
    for name, cfg in MAES.items():
        with torch.device("meta"):
            own, reader = MAE(cfg).encoder.state_dict(), Reader(READERS[name]).encoder.state_dict()
        assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in reader.items()}, name
        assert cfg.staff_space == READERS[name].staff_space


def test_reader_starts_from_weights_or_run(model, shards, tmp_path):
    save_mae(model, tmp_path / "weights", dtype=torch.float32)
    trained = train(SMALL, shards.folder, tmp_path / "run", stop_at=2)
    save_reader(reader := Reader(READERS["smoke"]), tmp_path / "reader", dtype=torch.float32)
    for path, source in (("weights", model), ("run", trained), ("reader", reader)):
        fresh = Reader(READERS["smoke"])
        before = fresh.head.weight.clone()
        load_encoder(fresh.encoder, tmp_path / path)
        for a, b in zip(fresh.encoder.parameters(), source.encoder.parameters()):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
        assert torch.equal(fresh.head.weight, before)


def test_encoder_that_does_not_fit(model, tmp_path):
    save_mae(model, tmp_path / "weights")
    other = Reader(replace(READERS["smoke"], encoder_layers=2))
    before = [p.clone() for p in other.encoder.parameters()]
    with pytest.raises(MaeWeightsError, match=r"\(width 32, 1 layers\) does not fit this one \(width 32, 2 layers\)"):
        load_encoder(other.encoder, tmp_path / "weights")
    assert all(torch.equal(a, b) for a, b in zip(before, other.encoder.parameters()))
    with pytest.raises(MaeWeightsError, match="no encoder in"):
        encoder_weights(tmp_path)


def test_weights_round_trip_and_broken_ones_are_named(model, tmp_path):
    save_mae(model, tmp_path, dtype=torch.float32)
    again = load_mae(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    for broken in (lambda: load_mae(tmp_path), lambda: encoder_weights(tmp_path)):
        with pytest.raises(MaeWeightsError) as e:
            broken()
        assert "\n" not in str(e.value) and str(tmp_path) in str(e.value)
    with pytest.raises(MaeWeightsError, match="holds no config.json"):
        load_mae(tmp_path / "nowhere")


# Views


def test_panels_hide_and_complete(model):
    img = staff()[:, :333]
    a, b = reconstruct(model, img, 0.6, seed=5), reconstruct(model, img, 0.6, seed=5)
    assert all(x.shape == img.shape and np.array_equal(x, y) for x, y in zip(a, b))
    hidden = hide(pad_pictures([img])[1], 0.6, np.random.default_rng(5))
    under = pixels_of(hidden)[0, 0, : img.shape[0], : img.shape[1]].numpy()
    assert np.array_equal(a.completed, np.where(under, a.reconstruction, img))
    assert np.array_equal(a.masked, np.where(under, 190, img))
    other = np.where(under, 255 - img, img).astype(np.uint8)  # nothing hidden shows in what is drawn
    assert np.array_equal(reconstruct(model, other, 0.6, seed=5).completed, a.completed)


def test_attention_and_features(model, batch):
    maps = attention_map(model.encoder, batch.img, batch.mask)
    n = batch.mask[0].numel()
    assert maps.shape == (3, 2, n, n)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 2, n))
    assert (maps[1, :, :, ~batch.mask[1].flatten()] == 0).all()
    colours = feature_colours(model.encoder, staff())
    assert colours.shape == (9, 32, 3) and 0 <= colours.min() < colours.max() <= 1


# Bad input, one line


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.5, float("nan")])
def test_bad_ratio(model, ratio):
    with pytest.raises(ValueError, match="mask ratio"):
        reconstruct(model, staff(), ratio)
    with pytest.raises(ValueError, match="mask ratio"):
        PicturePlan(ratio=ratio)


def test_command_line(shards, folder, tmp_path, capsys):
    given = ["train", "mae", "--preset", "smoke", "--steps", "2", "--out", str(tmp_path / "run")]
    assert cli.main([*given, "--data", str(shards.folder), "--data", str(folder)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 2
    assert cli.main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "weights")]) == 0
    assert load_mae(tmp_path / "weights").cfg == MAES["smoke"]


def test_command_line_trains_a_reader_unless_told_otherwise(shards, tmp_path, capsys):
    given = ["--preset", "smoke", "--steps", "1", "--data", str(shards.folder)]
    assert cli.main(["train", *given, "--out", str(tmp_path / "a")]) == 0
    assert cli.main(["train", "decoder", *given, "--out", str(tmp_path / "b")]) == 0
    a, b = (json.loads(x) | {"seconds": 0} for x in capsys.readouterr().out.splitlines())
    assert a == b and "gaze" in a
    more = ["--budget", "6000", "--workers", "0"]
    assert cli.main(["train", *given, *more, "--out", str(tmp_path / "c")]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] > 2 * a["samples"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train oboe --data {0} --out {0}", "unknown chapter 'oboe'; choose from decoder, mae"),
        ("train mae --preset huge --data {0} --out {0}/run", "unknown preset 'huge'; choose from smoke, tiny, base"),
        ("train mae --preset smoke --data {0}/none --out {0}/run", "no dataset at"),
        ("train --data {0}/none --data {0} --out {0}/run", "no shards in"),
        ("train mae --preset smoke --data {0} --out {0}/run --init {0}", "holds no config.json"),
        ("train --data {0} --out {0}/run --budget 30", "--budget 30; at least 1000 is needed"),
        ("train --data {0} --out {0}/run --workers -1", "--workers -1; at least 0 is needed"),
    ],
)  # fmt: skip
def test_command_line_refuses(arguments, said, folder, tmp_path, capsys):
    assert cli.main(arguments.format(folder).split()) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
