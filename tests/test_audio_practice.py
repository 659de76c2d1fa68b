"Devices that follow parts: rewards and errors by hand, and the engine unchanged from the library and the command line."

import json

import music21
import numpy as np
import pytest
import torch

from vitomr.audio.cqt_policy import Clip, CQTViTModel
from vitomr.audio.practice import (
    EXPERIMENTS,
    SOUND,
    LearnedReward,
    by_chorale,
    chorale_paths,
    clips_from,
    errors,
    follow,
    fresh_policy,
    loudness,
    owners,
    practice_config,
    relative_change,
    score_clips,
    supervised_steps,
)
from vitomr.audio.preference import RewardModel, graded, labelled, save_pairs
from vitomr.cli import main
from vitomr.train.practice import practise, reward_functions
from vitomr.train.runs import WeightsError, load_weights


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    "A folder with one score of four parts and one of two."
    folder = tmp_path_factory.mktemp("scores")
    for name, n in (("four", 4), ("two", 2)):
        score = music21.stream.Score()
        for k in range(n):
            part = music21.stream.Part()
            part.append([music21.note.Note(72 - 8 * k + i % 5, quarterLength=1) for i in range(16)])
            score.insert(0, part)
        score.write("musicxml", folder / f"{name}.musicxml")
    return folder


@pytest.fixture(scope="module")
def clips(scores):
    return clips_from(scores, EXPERIMENTS["smoke"])


def test_clips_hold_sound_transform_and_reference_of_one_length(clips, scores):
    assert [c.name for c in clips] == ["four:0", "four:1"]
    for c in clips:
        assert c.cqt.shape == (2, 84, 96) and c.target.shape == (4, 96) and c.audio.shape == (96 * SOUND.hop,)
        assert 0 <= c.target.min() and c.target.max() <= 1 and c.target.max() > 0.2
    again = score_clips(scores / "four.musicxml", name="x", seed=0, most=1)
    assert again[0].cqt.equal(clips[0].cqt) and again[0].target.equal(clips[0].target)
    other = score_clips(scores / "four.musicxml", name="x", seed=1, most=1)
    assert not other[0].target.equal(clips[0].target)


def test_held_out_chorales_are_never_trained_on():
    train, dev = set(chorale_paths("train")), set(chorale_paths("dev"))
    assert train and dev and not train & dev and len(dev) == pytest.approx(len(train | dev) / 5, abs=1)


def test_the_reward_is_the_error_of_the_action_and_of_its_parts():
    target = torch.zeros(4, 6)
    action = torch.zeros(4, 6)
    action[1, :2], action[3, 5] = 0.5, 1.0
    (told,) = loudness([Clip(torch.zeros(2, 84, 6), target)], [action], target=[target])
    assert told.raw["loudness"] == pytest.approx(-(2 * 0.5 + 1) / 24)
    pieces = [0, 0, -0.25, 0, 0, 0, 0, -0.25]  # devices after each other, four frames and two
    np.testing.assert_allclose(told.pieces, pieces)
    assert told.owner == owners(4, 6, True) and told.owner[6:12] == (2, 2, 2, 2, 3, 3) and len(told.owner) == 24


def test_a_learned_reward_has_the_models_number_and_credit_in_time():
    model, clip = RewardModel(84, 4, width=16, depth=1), Clip(torch.randn(2, 84, 10))
    actions = list(torch.rand(3, 4, 10, generator=torch.Generator().manual_seed(0)))
    told = LearnedReward(model)([clip] * 3, actions)
    assert [t.raw["learned"] for t in told] == pytest.approx(model.reward([clip] * 3, actions), rel=1e-4)
    assert len(told[0].pieces) == 3 and told[0].owner == owners(4, 10, False) == (0, 0, 0, 0, 1, 1, 1, 1, 2, 2) * 4
    assert reward_functions(LearnedReward(model))[0].name == "learned"


def test_errors_agree_with_sampling(clips):
    policy = fresh_policy(EXPERIMENTS["smoke"])
    torch.nn.init.normal_(policy.head.bias, generator=torch.Generator().manual_seed(0))
    sampled, greedy = errors(policy, clips).T
    for i, c in enumerate(clips):
        drawn = torch.stack(policy.generate_actions([c], 400, seed=1)[0])
        assert sampled[i] == pytest.approx((drawn - c.target).abs().mean().item(), abs=0.01)
        (likely,) = policy.generate_actions([c], 1, temperature=0)[0]
        assert greedy[i] == pytest.approx((likely - c.target).abs().mean().item(), abs=1e-6)
    assert by_chorale(np.array([1.0, 3.0]), clips).tolist() == [2.0]


def test_the_change_has_an_interval_that_covers_it():
    before = np.array([1.0, 2.0, 3.0, 2.0])
    assert relative_change(before, 0.7 * before) == pytest.approx((-0.3, -0.3, -0.3))
    change, low, high = relative_change(before, before * [0.5, 0.9, 0.6, 0.8])
    assert low < change < high and change == pytest.approx((0.5 + 1.8 + 1.8 + 1.6) / 8 - 1)


def test_supervised_steps_and_grpo_lower_the_error(clips, tmp_path):
    size = EXPERIMENTS["smoke"]
    policy = fresh_policy(size)
    before = errors(policy, clips)[:, 0].mean()
    taught = errors(supervised_steps(policy, clips, 15, lr=3e-3, seed=0), clips)[:, 0].mean()
    assert taught < before
    practise(policy, clips, loudness, cfg=practice_config(size, 25, 0), run_dir=tmp_path)
    assert errors(policy, clips)[:, 0].mean() < 0.95 * taught


def test_from_the_command_line_trained_resumed_and_loaded(scores, tmp_path, capsys):
    def run(out, *more):
        args = ["train", "audio", "--preset", "smoke", "--data", str(scores), "--lr", "1e-3"]
        code = main([*args, "--out", str(tmp_path / out), *more])
        return code, capsys.readouterr()

    code, said = run("run", "--steps", "3")
    assert code == 0
    history = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [h["step"] for h in history] == [1, 2, 3] and all(h["reward"] < 0 for h in history)
    weights = tmp_path / "run" / "weights"
    policy = CQTViTModel.load(weights, device="cpu")
    assert all(p.equal(load_weights(weights)[k]) for k, p in policy.get_parameters().items())
    moves = follow(policy, torch.zeros(70_000))
    assert moves.shape == (4, SOUND.n_frames(70_000))
    code, _ = run("more", "--steps", "1", "--init", str(weights), "--set", "num_generations=4")
    assert code == 0
    code, said = run("bad", "--preset", "tiny")
    assert code == 2 and "choose from smoke, chorales, one-round" in said.err and len(said.err.splitlines()) == 1


def test_from_the_command_line_with_pairs_for_a_reward(scores, clips, tmp_path, capsys):
    save_pairs(tmp_path / "pairs", labelled(graded(clips, 4)))
    args = ["train", "audio", "--preset", "smoke", "--data", str(scores)]
    args += ["--out", str(tmp_path / "run"), "--steps", "1"]
    assert main([*args, "--reward", str(tmp_path / "pairs")]) == 0
    assert '"term/learned"' in capsys.readouterr().out
    assert main([*args[:-3], str(tmp_path / "other"), "--reward", str(tmp_path)]) == 2
    assert "pairs.jsonl is missing" in capsys.readouterr().err
    assert main(["train", "audio", "--preset", "smoke", "--data", str(tmp_path), "--out", str(tmp_path / "x")]) == 2
    assert "none of four parts" in capsys.readouterr().err


def test_weights_are_refused_in_one_line(tmp_path):
    policy = CQTViTModel.create_model((2, 16, 16), width=16, depth=1, heads=2, use_8bit=True)
    with pytest.raises(ValueError, match="8-bit weights are not saved"):
        policy.save(tmp_path)
    with pytest.raises(WeightsError, match="no audio policy"):
        CQTViTModel.load(tmp_path)
    (tmp_path / "config.json").write_text('{"heads": 0, "width": 8, "depth": 1}')
    with pytest.raises(WeightsError, match="no audio policy"):
        CQTViTModel.load(tmp_path)
