"Pairs, labels, Bradley and Terry, and the reward model."

import itertools
import math

import choix
import numpy as np
import pytest
import torch

from vitomr.audio.cqt_policy import Clip, CQTViTModel
from vitomr.audio.preference import (
    FAULTS,
    Pair,
    RewardModel,
    accuracy,
    bradley_terry_loss,
    calibration,
    dual_temperature,
    error_of,
    fit_reward_model,
    graded,
    labelled,
    load_pairs,
    predicted,
    save_pairs,
    single_temperature,
    strengths,
    training_pairs,
)


def clips(n, seed, frames=16, bins=16):
    "Device d follows the level of rows 4d to 4d + 3."
    g = torch.Generator().manual_seed(seed)
    target = torch.nn.functional.interpolate(torch.rand(n, 4, 4, generator=g), frames, mode="linear")
    level = 0.1 * target.repeat_interleave(bins // 4, 1)
    cqt = torch.stack([level, torch.zeros_like(level)], 1)
    return [Clip(c, t, f"clip {i}") for i, (c, t) in enumerate(zip(cqt, target))]


@pytest.fixture(scope="module")
def policy():
    model = CQTViTModel.create_model((2, 16, 16), 4, 8, 8, "cpu", width=16, depth=1, heads=2)
    torch.nn.init.normal_(model.head.bias, generator=torch.Generator().manual_seed(0))
    return model


def test_pairs_of_two_temperatures(policy):
    some = clips(4, 0)
    pairs, again = (dual_temperature(policy, some, 3, low=0.0, high=3.0, seed=1) for _ in range(2))
    assert len(pairs) == 12 and all(p.first.equal(q.first) and p.second.equal(q.second) for p, q in zip(pairs, again))
    (greedy,) = policy.generate_actions(some[:1], 1, temperature=0)[0]
    places = [[p.first.equal(greedy), p.second.equal(greedy)] for p in pairs[:3]]
    assert all(sum(x) == 1 for x in places)
    sides = {p.first.var(-1).mean().item() < p.second.var(-1).mean().item() for p in pairs}
    assert sides == {True, False}  # the cold one comes first, and second


def test_pairs_of_least_and_most_variance(policy):
    some = clips(3, 0)
    pairs = single_temperature(policy, some, temperature=1.0, candidates=6, seed=2)
    seed = int(np.random.default_rng([2, 2]).integers(2**62))
    groups = policy.generate_actions(some, 6, temperature=1.0, seed=seed)
    for p, group in zip(pairs, groups):
        spread = sorted(a.var(-1).mean().item() for a in group)
        assert sorted(x.var(-1).mean().item() for x in (p.first, p.second)) == [spread[0], spread[-1]]


def test_graded_faults_start_at_the_reference_and_get_worse():
    target, rng = clips(1, 0)[0].target, lambda: np.random.default_rng(0)
    for name, fault in FAULTS.items():
        errors = [error_of(fault(target, g, rng()).clamp(0, 1), target) for g in (0.0, 0.3, 0.6, 1.0)]
        assert errors[0] < 1e-6 and errors == sorted(errors) and errors[-1] > 0.02, name
    with pytest.raises(ValueError, match="no target"):
        graded([Clip(torch.zeros(2, 16, 16))])


def test_the_rule_prefers_the_nearer_and_knows_ties():
    clip = clips(1, 0)[0]
    near, far = clip.target * 0.9, clip.target * 0.5
    pairs = labelled([Pair(clip, near, far), Pair(clip, far, near), Pair(clip, near, near.clone())])
    assert [p.label for p in pairs] == [1.0, 0.0, 0.5]
    own = labelled([Pair(clip, near, far)], lambda clip, action: -action.mean().item())
    assert own[0].label == 0.0
    ahead = error_of(far, clip.target) - error_of(near, clip.target)
    noisy = labelled([Pair(clip, near, far)] * 2000, noise=ahead, seed=3)
    assert abs(np.mean([p.label for p in noisy]) - 1 / (1 + math.exp(-1))) < 0.03


def test_pairs_are_saved_and_loaded(tmp_path):
    pairs = labelled(graded(clips(2, 0), 3, seed=1))
    pairs[0] = Pair(pairs[0].clip, pairs[0].first, pairs[0].second, "by hand")
    save_pairs(tmp_path / "pairs", pairs)
    back = load_pairs(tmp_path / "pairs")
    assert [(p.source, p.label, p.clip.name) for p in back] == [(p.source, p.label, p.clip.name) for p in pairs]
    assert all(p.first.equal(q.first) and p.clip.cqt.equal(q.clip.cqt) for p, q in zip(pairs, back))
    assert back[0].clip is back[2].clip and back[0].label is None
    sound, first, second, label = training_pairs(back)
    assert sound.shape == (5, 2, 16, 16) and first.shape == second.shape == (5, 4, 16) and len(label) == 5
    with pytest.raises(ValueError, match="pairs.jsonl is missing"):
        load_pairs(tmp_path)
    (tmp_path / "pairs" / "pairs.npz").write_bytes(b"no arrays")
    with pytest.raises(ValueError, match="cannot be read"):
        load_pairs(tmp_path / "pairs")
    with pytest.raises(ValueError, match="label some first"):
        training_pairs(back[:1])
    with pytest.raises(ValueError, match="0 to 1"):
        Pair(pairs[0].clip, pairs[0].first, pairs[0].first, label=2.0)


def test_the_loss_is_the_likelihood_worked_out_by_hand():
    first, second, label = torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 3.0, 1.0]), torch.tensor([1.0, 1.0, 0.5])
    p = [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(3)), 0.5]
    by_hand = -(math.log(p[0]) + math.log(p[1]) + math.log(0.5)) / 3
    assert bradley_terry_loss(first, second, label).item() == pytest.approx(by_hand, rel=1e-6)


def test_strengths_are_those_of_choix():
    rng, true = np.random.default_rng(0), np.array([0.0, 0.5, -0.7, 1.2, 0.1])
    wins = []
    for a, b in itertools.combinations(range(5), 2):
        for _ in range(60):
            wins.append((a, b) if rng.random() < 1 / (1 + math.exp(true[b] - true[a])) else (b, a))
    theirs = choix.opt_pairwise(5, wins, alpha=0.0)
    np.testing.assert_allclose(strengths(5, wins, prior=0.0), theirs - theirs.mean(), atol=1e-4)
    assert np.isfinite(strengths(3, [(0, 1)])).all()


@pytest.fixture(scope="module")
def trained():
    pairs = labelled(graded(clips(160, 0), 6, seed=0))
    losses = []
    fresh = RewardModel(16, 4, width=48, depth=1)
    model = fit_reward_model(pairs, fresh, steps=400, on_step=lambda step, loss: losses.append(loss))
    return model, losses


def test_held_out_pairs_are_judged_right_nine_times_of_ten(trained):
    model, losses = trained
    held_out = labelled(graded(clips(60, 1), 5, seed=1))
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:10])
    assert accuracy(model, held_out) >= 0.9
    c = calibration(model, held_out)
    assert c.counts.sum() == sum(p.label != 0.5 for p in held_out) and c.error < 0.08
    p, reference = predicted(model, held_out)
    assert accuracy(model, held_out) == np.mean((p > 0.5) == reference)


def test_calibration_counts_what_it_is_given():
    class Sure(RewardModel):
        def forward(self, cqt, action):
            return action.mean((1, 2)) * 4

    clip, a = clips(1, 0)[0], torch.zeros(4, 16)
    said = (0.5, 1.0), (0.5, 0.0), (0.5, 1.0), (0.5, 1.0), (0.0, 0.5)
    pairs = [Pair(clip, a + d, a, label=label) for d, label in said]
    c = calibration(Sure(16, 4), pairs)
    stated = 1 / (1 + math.exp(-2))
    assert c.counts.tolist() == [4] and c.found.tolist() == [0.75]
    assert c.stated[0] == pytest.approx(stated) and c.error == pytest.approx(stated - 0.75)


def test_the_reward_needs_the_sound(trained):
    "The same actions for another clip are liked differently, and time matters."
    model, _ = trained
    some = clips(20, 3)
    own = model.reward(some, [c.target for c in some])
    other = model.reward(some, [c.target for c in some[1:] + some[:1]])
    turned = model.reward(some, [c.target.flip(1) for c in some])
    assert np.mean(np.array(own) > other) > 0.9 and np.mean(np.array(own) > turned) > 0.9


def test_a_reward_model_is_seeded_and_refuses_other_shapes():
    a, b = RewardModel(16, 4, seed=1), RewardModel(16, 4, seed=1)
    cqt, action = torch.randn(3, 2, 16, 18), torch.rand(3, 4, 18)
    assert a(cqt, action).shape == (3,) and a(cqt, action).equal(b(cqt, action))
    torch.testing.assert_close(a(cqt, action)[1:2], a(cqt[1:2], action[1:2]))
    with pytest.raises(ValueError, match="this model wants"):
        a(cqt, action[:, :3])
