"""Fine-tuning: what learns and how fast, scheduled sampling, accumulation, patience; and all of it together resumes."""

import copy
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from vitomr import mae
from vitomr.cli import main
from vitomr.data.batches import Batches, BatchPlan, collate, pad_pictures, prepare
from vitomr.decoder import (
    READERS,
    TRAINING,
    Losses,
    Reader,
    WeightsError,
    export_run,
    grow,
    load_reader,
    mixed_input,
    own_embeddings,
    sampling_at,
    save_reader,
    train,
    tune,
)
from vitomr.evaluate import dev_error
from vitomr.nn.decoding import greedy, without_control
from vitomr.nn.kernels import Int8Linear, quantise
from vitomr.notation.lmx import decode
from vitomr.notation.metrics import token_distance
from vitomr.train.loop import Ema, LoopConfig, Optimizers, fit, groups_of
from vitomr.train.runs import CheckpointError, load_checkpoint, read_history

SMALL = replace(
    TRAINING["smoke"],
    loop=replace(TRAINING["smoke"].loop, steps=8, log_every=1),
    plan=BatchPlan(budget=700),
)


@pytest.fixture
def batch(shards):
    return Batches(shards, BatchPlan(budget=1500), steps=3)[0]


def losses_of(folder) -> dict[int, float]:
    return {h["step"]: h["loss"] for h in read_history(folder)}


def test_averaged_weights_by_hand():
    "From the first weights on, with a decay that rises to its own as steps go by."
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(model.weight, 8.0)
    ema, expected = Ema(model, decay=0.4), 8.0
    for step, value in enumerate((4.0, 6.0, -1.0, 3.0)):
        torch.nn.init.constant_(model.weight, value)
        ema.update(model, step)
        decay = min(0.4, (1 + step) / (10 + step))  # .1, .18, .25, .31: still below .4
        expected = decay * expected + (1 - decay) * value
        assert float(ema.shadow["weight"]) == pytest.approx(expected, abs=1e-6)
    assert model.weight.item() == 3.0
    for step in range(100, 140):
        ema.update(model, step)
    assert float(ema.shadow["weight"]) == pytest.approx(3.0, abs=1e-6)


# what learns, and how fast


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("layers", [None, 0, 2, 5])
def test_each_parameter_that_learns_is_in_exactly_one_group(optimizer, layers):
    with torch.device("meta"):
        model = Reader(READERS["tiny"])
    tune(model, layers)
    cfg = LoopConfig(optimizer=optimizer, layer_decay=0.5)
    groups = groups_of(model, cfg)
    names = [n for g in groups for n in g.names]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    share = {n: g.share for g in groups for n in g.names}
    assert share["blocks.0.mlp.fc1.weight"] == share["head.bias"] == share["symbol_head.weight"] == 1
    if layers is None:
        assert share["encoder.blocks.4.mlp.fc1.weight"] == 0.5 and share["encoder.stem.conv4.weight"] == 0.5**6
    learning = {n.split(".")[2] for n in names if n.startswith("encoder.blocks.")}
    assert learning == {str(i) for i in range(5 - (5 if layers is None else layers), 5)}
    assert all((g.optimizer == "muon") <= (optimizer == "muon") for g in groups)


def test_a_layer_moves_by_its_share(batch):
    "One step of AdamW from rest moves every weight by the rate, so the rates can be read off the weights."
    torch.manual_seed(0)
    model = Reader(replace(READERS["smoke"], encoder_layers=2))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizers = Optimizers(model, LoopConfig(layer_decay=0.1, weight_decay=0.0))
    Losses()(model, batch)[0].backward()
    optimizers.step(1e-2)
    moved = {n: (p - before[n]).abs().max().item() for n, p in model.named_parameters()}
    expected = {"head.weight": 1e-2, "encoder.blocks.1.mlp.fc1.weight": 1e-3, "encoder.blocks.0.mlp.fc1.weight": 1e-4}
    assert {n: moved[n] for n in expected} == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("layers", [0, 1])
def test_frozen_layers_stay_as_they_are(shards, tmp_path, layers):
    cfg = replace(SMALL, reader=replace(SMALL.reader, encoder_layers=2), tuned=layers)
    torch.manual_seed(cfg.loop.seed)
    fresh = Reader(cfg.reader).state_dict()
    after = train(cfg, shards.folder, tmp_path).state_dict()
    same = {k for k in fresh if torch.equal(fresh[k], after[k])}
    assert all(k in same for k in fresh if k.startswith(("encoder.stem", "encoder.blocks.0")))
    assert ("encoder.blocks.1.attn.qkv.weight" in same) == (layers == 0)
    assert "blocks.0.self_attention.qkv.weight" not in same


def test_more_layers_than_there_are():
    with pytest.raises(ValueError, match="0 to 1"):
        tune(Reader(READERS["smoke"]), 2)


def test_an_encoder_that_was_trained_elsewhere(shards, tmp_path):
    torch.manual_seed(3)
    eye = mae.MAE(replace(mae.TRAINING["smoke"].mae, d_encoder=32, encoder_layers=1, encoder_heads=2))
    mae.save_mae(eye, tmp_path / "mae", dtype=torch.float32)
    model = train(replace(SMALL, tuned=0), shards.folder, tmp_path / "run", encoder=tmp_path / "mae", stop_at=1)
    theirs = {k.removeprefix("encoder."): v for k, v in eye.state_dict().items() if k.startswith("encoder.")}
    assert theirs and all(torch.equal(v, theirs[k]) for k, v in model.encoder.state_dict().items())


# scheduled sampling


def test_schedules_begin_and_end_exactly():
    first, last = sampling_at(0, 500), sampling_at(499, 500)
    assert first == {"gold": 1.0, "temperature": 5.0, "hard": False}
    assert last["gold"] == 0.0 and last["temperature"] == pytest.approx(0.1) and last["hard"]
    assert sampling_at(10_000, 500) == last


def test_probability_1_is_teacher_forcing(batch):
    torch.manual_seed(0)
    model = Reader(READERS["smoke"])
    losses = [Losses(scheduled=n)(model, batch, step=0)[0] for n in (0, 100)]
    assert torch.equal(*losses)


def test_probability_0_hard_and_without_noise_feeds_the_most_likely(batch):
    torch.manual_seed(0)
    model = Reader(READERS["smoke"])
    tokens = batch.tokens[:, :-1]
    with torch.no_grad():
        memory = model.encode(batch.img, batch.mask)
        said = without_control(model.decode(tokens, memory)).argmax(-1)
        fed = torch.cat([tokens[:, :1], said[:, :-1]], 1)
        mixed = mixed_input(model, memory, tokens, gold=0.0, temperature=0.5, hard=True, noise=False)
        torch.testing.assert_close(model.decode(mixed, memory), model.decode(fed, memory), atol=1e-5, rtol=1e-5)
        assert not torch.equal(fed, tokens)


def test_own_embeddings_follow_the_readers_distribution():
    logits = torch.full((1, 1, 227), -torch.inf)
    logits[..., 5:8] = torch.tensor([0.6, 0.3, 0.1]).log()
    torch.manual_seed(0)
    drawn = own_embeddings(logits.expand(1, 20_000, 227), torch.eye(227), 0.3, hard=True)[0].mean(0)
    torch.testing.assert_close(drawn[5:8], torch.tensor([0.6, 0.3, 0.1]), atol=0.015, rtol=0)
    soft = own_embeddings(logits, torch.eye(227), 1.0, noise=False)[0, 0]
    torch.testing.assert_close(soft[5:8], torch.tensor([0.6, 0.3, 0.1]))


@pytest.mark.parametrize("hard", [False, True])
def test_the_gradient_goes_through_both_passes(batch, hard):
    torch.manual_seed(0)
    model = Reader(READERS["smoke"])
    memory = model.encode(batch.img, batch.mask)
    fed = mixed_input(model, memory, batch.tokens[:, :-1], gold=0.5, temperature=1.0, hard=hard)
    fed.square().sum().backward()
    grads = [p.grad for n, p in model.named_parameters() if n in ("head.weight", "encoder.stem.conv4.weight")]
    assert len(grads) == 2 and all(g.isfinite().all() and g.abs().max() > 0 for g in grads)


# accumulation


def parts_of(shards, numbers, cuts):
    "Samples as one batch, and the same cut into several."
    samples = [shards[i] for i in numbers]
    ready = [prepare(s, np.random.default_rng(0), "clean", 6.0) for s in samples]
    return [collate(samples[a:b], *zip(*ready[a:b], strict=True)) for a, b in cuts]


def test_accumulated_gradients_are_those_of_the_large_batch(shards, tmp_path):
    "Batches of different numbers of tokens, symbols and pictures; losses and weights after three updates agree."
    cuts = [(0, 5), (5, 6), (6, 9)]
    whole, *parts = parts_of(shards, range(9), [(0, 9), *cuts])
    assert len({Losses.counts(p)["ce"] for p in parts}) == 3

    def run(folder, batches, k):
        torch.manual_seed(0)
        model = Reader(READERS["smoke"])
        cfg = LoopConfig(steps=3, lr=1e-3, warmup=0, log_every=1, bf16=False, accumulate=k)
        fit(model, lambda start: iter((batches * 3)[start:]), Losses(), cfg, folder)
        return model.state_dict(), read_history(folder)

    (a, one), (b, several) = run(tmp_path / "whole", [whole], 1), run(tmp_path / "parts", parts, 3)
    for x, y in zip(one, several, strict=True):
        assert {k: y[k] for k in ("loss", "ce", "symbols", "gaze", "grad_norm", "tokens", "samples")} == pytest.approx(
            {k: x[k] for k in ("loss", "ce", "symbols", "gaze", "grad_norm", "tokens", "samples")}, rel=2e-5
        )
    assert all(torch.allclose(a[k], b[k], atol=3e-4) for k in a)
    assert one[0]["loss"] != one[-1]["loss"]


def test_a_loss_that_does_not_count_is_named(tmp_path):
    model = torch.nn.Linear(2, 1)
    cfg = LoopConfig(steps=1, accumulate=2, bf16=False)
    with pytest.raises(ValueError, match="counts"):
        fit(model, lambda start: [torch.ones(1, 2)] * 2, lambda m, b, s: (m(b).sum(), {}), cfg, tmp_path)


# patience and resuming


@pytest.mark.parametrize("chapter", [[], ["mae"], ["grpo"]], ids=["decoder", "mae", "grpo"])
def test_a_run_folder_is_for_one_process_at_a_time(chapter, shards, tmp_path, capsys):
    "A second one gets a line and changes nothing; when the first is killed, the folder is free."
    torch.manual_seed(0)
    save_reader(Reader(SMALL.reader), tmp_path / "init")
    run = tmp_path / "run"
    run.mkdir()
    call = ["train", *chapter, "--preset", "smoke", "--steps", "1", "--data", str(shards.folder), "--out", str(run)]
    call += [] if chapter == ["mae"] else ["--init", str(tmp_path / "init")]
    held = "import sys; from vitomr.train.runs import alone_in\nwith alone_in(sys.argv[1]): print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", held, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"\n"
        assert main(call) == 2
        said = capsys.readouterr().err
        assert f"another process is training in {run}" in said and said.count("\n") == 1
        assert not (run / "history.jsonl").exists() and not (run / "config.json").exists()
    finally:
        other.kill()
        other.wait()
    assert main(call) == 0 and [h["step"] for h in read_history(run)] == [1]


def worsening(best_at: int):
    "A dev figure that falls up to a step and rises from there on."
    return lambda model, step: {"dev_ser": abs(step - best_at) / 10}


def test_patience_ends_the_run_with_the_best_weights(shards, tmp_path):
    cfg = replace(SMALL, loop=replace(SMALL.loop, steps=50, patience=2))
    options = {"evaluate": worsening(3), "evaluate_every": 1}
    model = train(cfg, shards.folder, tmp_path / "a", **options)
    history = read_history(tmp_path / "a")
    assert [h["step"] for h in history] == [1, 2, 3, 4, 5]
    train(cfg, shards.folder, tmp_path / "b", stop_at=3, **options)
    best = load_checkpoint(tmp_path / "b" / "checkpoint.pt")["ema"]
    assert all(torch.equal(v, best[k]) for k, v in model.state_dict().items())
    train(cfg, shards.folder, tmp_path / "b", stop_at=4, **options)  # killed while it waits
    again = train(cfg, shards.folder, tmp_path / "b", **options)
    assert losses_of(tmp_path / "b") == losses_of(tmp_path / "a")
    over = train(cfg, shards.folder, tmp_path / "b", **options)  # it is over, and stays so
    assert losses_of(tmp_path / "b") == losses_of(tmp_path / "a")
    for other in (again, over, export_run(tmp_path / "b", tmp_path / "weights")):
        assert all(torch.equal(v, best[k]) for k, v in other.state_dict().items())


def test_weights_can_be_the_mean_of_a_run_and_what_it_began_with(shards, tmp_path):
    torch.manual_seed(5)
    begun = Reader(SMALL.reader)
    save_reader(begun, tmp_path / "begun", dtype=torch.float32)
    after = train(SMALL, shards.folder, tmp_path / "run", init=tmp_path / "begun").state_dict()
    with_begun = ["--mean-with", str(tmp_path / "begun")]
    for name, given in {"mean": with_begun, "mostly": 3 * with_begun, "plain": []}.items():
        assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / name), *given]) == 0
    mean, mostly, plain = (load_reader(tmp_path / name).state_dict() for name in ("mean", "mostly", "plain"))
    for k, v in begun.state_dict().items():
        torch.testing.assert_close(mean[k], (v + after[k]) / 2, rtol=0.01, atol=1e-3)  # kept in bfloat16
        torch.testing.assert_close(mostly[k], (3 * v + after[k]) / 4, rtol=0.01, atol=1e-3)
        torch.testing.assert_close(plain[k], after[k], rtol=0.01, atol=1e-3)
    assert any(not torch.equal(mean[k], plain[k]) for k in mean)
    save_reader(Reader(replace(SMALL.reader, d_decoder=64)), tmp_path / "other")
    with pytest.raises(WeightsError, match="another shape"):
        export_run(tmp_path / "run", tmp_path / "x", [tmp_path / "other"])


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_a_grown_reader_sees_what_it_saw_and_every_layer_learns(batch, layers):
    torch.manual_seed(5)
    small = Reader(READERS["smoke"]).eval()
    deep = grow(small, replace(small.cfg, encoder_layers=layers, staff_space=8.0))
    assert len(deep.encoder.blocks) == layers and deep.cfg.staff_space == 8.0 and not deep.training
    with torch.no_grad():
        assert torch.equal(deep.see(batch.img, batch.mask), small.see(batch.img, batch.mask))
    old = copy.deepcopy(deep)
    Losses()(deep.train(), batch, 0)[0].backward()
    torch.optim.SGD(deep.parameters(), lr=1.0).step()
    moved = {n for (n, a), b in zip(deep.named_parameters(), old.parameters(), strict=True) if not torch.equal(a, b)}
    assert {f"encoder.blocks.{i}.mlp.fc2.weight" for i in range(layers)} <= moved


def test_a_reader_grows_in_two_ways_only():
    two = Reader(replace(READERS["smoke"], encoder_layers=2))
    with pytest.raises(ValueError, match="1 encoder layers for a reader of 2: layers can be added"):
        grow(two, READERS["smoke"])
    with pytest.raises(ValueError, match="d_decoder, vocabulary_size differ"):
        grow(two, replace(two.cfg, d_decoder=64, vocabulary_size=9, staff_space=7.0))


def test_training_goes_on_with_a_grown_reader(shards, tmp_path, capsys):
    torch.manual_seed(5)
    save_reader(Reader(SMALL.reader), tmp_path / "begun", dtype=torch.float32)
    call = ["train", "--preset", "smoke", "--data", str(shards.folder), "--steps", "3", "--init"]
    from_begun = [*call, str(tmp_path / "begun")]
    given = ["--encoder-layers", "3", "--staff-space", "8"]
    assert main([*from_begun, *given, "--out", str(tmp_path / "run")]) == 0
    assert main(["export", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "weights")]) == 0
    cfg = load_reader(tmp_path / "weights").cfg
    assert (cfg.encoder_layers, cfg.staff_space) == (3, 8.0)
    call += [str(tmp_path / "weights")]
    assert main([*call, "--out", str(tmp_path / "on")]) == 0  # the shape is that of --init
    assert json.loads((tmp_path / "on" / "config.json").read_text())["reader"]["encoder_layers"] == 3
    capsys.readouterr()
    for name, value, said in (
        ("--encoder-layers", "2", "2 encoder layers for a reader of 3"),
        ("--encoder-layers", "0", "1 to 48"),
        ("--staff-space", "nan", "4 to 16 px"),
    ):
        assert main([*call, name, value, "--out", str(tmp_path / "no")]) == 2
        assert said in capsys.readouterr().err


def test_patience_without_the_figure_it_watches_is_named(shards, tmp_path):
    cfg = replace(SMALL, loop=replace(SMALL.loop, patience=1))
    with pytest.raises(ValueError, match="needs an evaluation"):
        train(cfg, shards.folder, tmp_path)
    with pytest.raises(ValueError, match="watches dev_ser"):
        train(cfg, shards.folder, tmp_path, evaluate=lambda m, s: {"accuracy": 1.0}, evaluate_every=1)


def test_everything_at_once_resumes_to_identical_losses(shards, tmp_path):
    loop = replace(
        SMALL.loop, steps=6, optimizer="muon", accumulate=2, layer_decay=0.8, patience=9, ema=0.9, checkpoint_minutes=60
    )
    cfg = replace(
        SMALL,
        reader=replace(SMALL.reader, encoder_layers=2),
        loop=loop,
        losses=Losses(scheduled=6),
        tuned=1,
        degradation="mix",
    )
    options = {"evaluate": dev_error(shards.folder, space=6.0, n=2, max_tokens=20), "evaluate_every": 2}
    whole = train(cfg, shards.folder, tmp_path / "whole", **options)
    for stop in (1, 3, 4, None):
        again = train(cfg, shards.folder, tmp_path / "stopped", stop_at=stop, **options)
    one, two = (read_history(tmp_path / f) for f in ("whole", "stopped"))
    timeless = [[{k: v for k, v in h.items() if k != "seconds"} for h in hs] for hs in (one, two)]
    assert timeless[0] == timeless[1] and [h["step"] for h in one if "dev_ser" in h] == [2, 4, 6]
    assert all(torch.equal(x, y) for x, y in zip(whole.parameters(), again.parameters(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_on_a_gpu_goes_on_there(shards, tmp_path):
    for stop in (3, None):
        again = train(SMALL, shards.folder, tmp_path / "stopped", stop_at=stop, device="cuda:0")
    train(SMALL, shards.folder, tmp_path / "whole", device="cuda:0")
    one, two = (losses_of(tmp_path / f) for f in ("whole", "stopped"))
    assert one == pytest.approx(two, rel=1e-3) and next(again.parameters()).is_cuda


def test_checkpoints_from_before_these_settings_go_on(shards, tmp_path):
    train(SMALL, shards.folder, tmp_path / "whole")
    train(SMALL, shards.folder, tmp_path / "old", stop_at=3)
    path = tmp_path / "old" / "checkpoint.pt"
    state = load_checkpoint(path)
    del state["patience"], state["config"]["losses"]["scheduled"]
    for name in ("accumulate", "layer_decay", "patience", "watch"):
        del state["config"]["loop"][name]
    torch.save(state, path)
    train(SMALL, shards.folder, tmp_path / "old")
    assert losses_of(tmp_path / "old") == losses_of(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"layer_decay": 0.5}, {"optimizer": "muon"}])
def test_a_checkpoint_of_other_groups_is_named(shards, tmp_path, change):
    train(SMALL, shards.folder, tmp_path, stop_at=1)
    with pytest.raises(CheckpointError, match="layer_decay") as e:
        train(replace(SMALL, loop=replace(SMALL.loop, **change)), shards.folder, tmp_path)
    assert "\n" not in str(e.value)


def test_dev_error_is_that_of_free_running_reading(shards, smoke, tmp_path):
    look = dev_error(shards.folder, space=6.0, n=3, max_tokens=30)(smoke, 0)["dev_ser"]
    wrong = total = 0
    for i in range(3):
        img = prepare(shards[i], np.random.default_rng(0), "clean", 6.0)[0]
        read = greedy(smoke, *pad_pictures([img]), max_tokens=30)
        wrong += token_distance(decode(read.ids(0)), decode(shards[i].ids))
        total += len(shards[i].ids)
    assert look == pytest.approx(wrong / total)


def test_int8_weights_read_the_same_cached_and_uncached(smoke, tmp_path):
    model = quantise(copy.deepcopy(smoke))
    assert sum(isinstance(m, Int8Linear) for m in model.modules()) == sum(
        isinstance(m, torch.nn.Linear) for m in smoke.modules()
    )
    g = torch.Generator().manual_seed(0)
    sizes = ((64, 96), (48, 160))
    img, mask = pad_pictures([torch.randint(0, 256, s, generator=g, dtype=torch.uint8).numpy() for s in sizes])
    fast, slow = (greedy(model, img, mask, max_tokens=30, cached=c) for c in (True, False))
    assert torch.equal(fast.tokens, slow.tokens)
    torch.testing.assert_close(fast.logp, slow.logp, atol=1e-4, rtol=0)
    plain = greedy(smoke, img, mask, max_tokens=30)
    assert not torch.equal(fast.logp, plain.logp) and (fast.logp[:, 0] - plain.logp[:, 0]).abs().max() < 0.2
