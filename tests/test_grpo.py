"""Practice: numbers by hand, other people's formulas, one gradient however a step is cut, one history."""

import importlib.util
import json
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image

from vitomr.cli import _setting, main
from vitomr.data.batches import pad_pictures
from vitomr.data.synthesis import AS_WRITTEN, Shards, build
from vitomr.decoder import READERS, Reader, load_reader, save_reader
from vitomr.grpo import PACKAGED, PRACTICE, plot_kinds, train
from vitomr.notation.grammar import Grammar
from vitomr.notation.lmx import EOS_ID, VOCABULARY
from vitomr.reading.curves import watch
from vitomr.reading.pictures import Excerpts, Scans
from vitomr.reading.policy import Picture, ReaderPolicy, describe_reading
from vitomr.reading.reward import MusicReward
from vitomr.reading.settings import GRPOConfig, with_settings
from vitomr.rewards import Breakdown
from vitomr.train import policy as policy_module
from vitomr.train.groups import GroupSlice, advantages, group_slices, n_groups, normalised_sum, packed
from vitomr.train.objective import (
    Clip,
    full_kl,
    k1,
    k2,
    k3,
    kimi_objective,
    kl_name,
    kl_penalty,
    normalised_entropy,
    surrogate,
    token_weights,
)
from vitomr.train.policy import Rollout, Sampling, Scored
from vitomr.train.practice import group_reward
from vitomr.train.practice import practise as run_practice
from vitomr.train.runs import TRACKERS, CheckpointError, read_history, tracker
from vitomr.train.schedules import Schedule
from vitomr.train.settings import kl_in_use
from vitomr.train.step import Row, StepContext, collect, tabulate
from vitomr.train.update import micro_batches, objective
from vitomr.transcribe import Transcriber

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from practice_plots import changes, on_the_line, plot_line  # noqa: E402


def practise(policy, data, reward, cfg, folder, **options):
    "A run with a reward that sees whole groups."
    return run_practice(policy, data, group_reward(reward), cfg=cfg, run_dir=folder, **options)


class Bandit:
    "Three arms in each of four places, no tokens: what the trainer may know of any policy and no more."

    def __init__(self, seed=0):
        self.logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()

    def get_parameters(self):
        return {"logits": self.logits}

    def generate_actions(self, states, num_actions_per_state, *, temperature=1.0):
        p = (self.logits.detach()[list(states)] / temperature).softmax(-1)
        return torch.multinomial(p, num_actions_per_state, replacement=True).tolist()

    def get_log_probabilities(self, states, actions, *, temperature=1.0):
        logp = (self.logits / temperature).log_softmax(-1)
        return torch.stack([logp[s, a] for s, group in zip(states, actions, strict=True) for a in group])


def arm_reward(states, actions):
    return [[float(a == s % 3) + 0.1 * a for a in group] for s, group in zip(states, actions, strict=True)]


def settings(**given):
    base = {
        "num_generations": 4,
        "per_device_batch_size": 16,
        "micro_batch": 4,
        "rollout_batch": 4,
        "steps": 12,
        "lr": 0.1,
    }
    return with_settings(GRPOConfig(), base | given)


def context(policy, reward=arm_reward, data=lambda step, k: k % 4, **given):
    return StepContext(policy, data, group_reward(reward), settings(**given), Accelerator(cpu=True))


# Groups


def test_a_wrong_group_size_lists_those_that_are_right():
    with pytest.raises(ValueError, match=r"2 × 6 = 12 .* groups of 5; num_generations can be 2, 3, 4, 6, 12"):
        n_groups(6, 5, 2)
    with pytest.raises(ValueError, match="groups of 1"):
        n_groups(6, 1)
    assert n_groups(6, 4, 2) == 3


def test_processes_share_a_step_without_gap_or_overlap():
    slices = [s for rank in range(3) for s in group_slices(8 * rank, 8 * rank + 8, 12)]
    held = [(s.slot, i) for s in slices for i in range(s.first, s.end)]
    assert held == [(slot, i) for slot in range(2) for i in range(12)]


@pytest.mark.parametrize("limit", [1, 3, 5, 8, 100, 0])
def test_packing_keeps_every_reading_and_the_limit(limit):
    parts = [GroupSlice(0, 4, 8), GroupSlice(1, 0, 8), GroupSlice(2, 0, 8), GroupSlice(3, 0, 3)]
    batches = packed(parts, limit)
    assert [(s.slot, i) for b in batches for s in b for i in range(s.first, s.end)] == [
        (s.slot, i) for s in parts for i in range(s.first, s.end)
    ]
    assert all(len({len(s) for s in b}) == 1 and sum(map(len, b)) <= (limit or 100) for b in batches)


# Advantages


def test_advantages_by_hand():
    r = np.array([[1.0, 3.0], [0.0, 4.0]])
    std = math.sqrt(2), math.sqrt(8)  # of two numbers, n - 1
    got = advantages(r, eps=0)
    np.testing.assert_allclose(got, [[-1 / std[0], 1 / std[0]], [-2 / std[1], 2 / std[1]]])
    np.testing.assert_allclose(advantages(r, scale="none"), [[-1, 1], [-2, 2]])
    np.testing.assert_allclose(
        advantages(r, scale="batch", eps=0), np.array([[-1, 1], [-2, 2]]) / np.std([1, 3, 0, 4], ddof=1)
    )
    np.testing.assert_allclose(advantages(r, baseline="leave_one_out", scale="none"), [[-2, 2], [-4, 4]])
    np.testing.assert_allclose(advantages(r, baseline="greedy", scale="none", greedy=[1, 1]), [[0, 2], [-1, 3]])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_have_no_advantage_at_all(baseline, scale):
    r = np.array([[0.1 + 0.2] * 7, [0.7] * 7, np.arange(7) / 7])  # 0.1 + 0.2 is not its own mean in floating point
    a = advantages(r, baseline=baseline, scale=scale)
    assert (a[:2] == 0).all() and abs(a[2].sum()) < 1e-9 and (a[2] != 0).sum() >= 6


def test_no_mean_for_same_reward_confirms_what_all_got_right():
    a = advantages(np.array([[1.0, 1.0], [3.0, 3.0], [-0.5, -0.5], [0.0, 1.0]]), no_mean_for_same_reward=True)
    np.testing.assert_allclose(a[:3], [[1, 1], [1, 1], [-1, -1]])  # (r − 0) / (0 + 1e-4), cut at ±1
    std = math.sqrt(0.5)
    np.testing.assert_allclose(a[3], [-0.5 / (std + 1e-4), 0.5 / (std + 1e-4)])


def test_normalised_terms_do_not_drown_each_other():
    raw = {"big": np.array([[0.0, 100.0, 200.0]]), "small": np.array([[0.02, 0.01, 0.0]])}
    z = normalised_sum(raw, {"big": 1.0, "small": 1.0}, eps=0)
    np.testing.assert_allclose(z, 0, atol=1e-9)  # opposite orders of equal shape cancel, whatever the scale
    np.testing.assert_allclose(normalised_sum(raw, {"big": 1.0, "small": -1.0}, eps=0), [[-2, 0, 2]], atol=1e-9)


# The objective


def ragged(seed=0, n=6, t=5):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([5, 3, 1, 4, 2, 5])[:n]
    mask = torch.arange(t) < lengths[:, None]
    logp = -torch.rand(n, t, generator=g)
    old = logp + 0.4 * torch.randn(n, t, generator=g)
    return logp, old, torch.randn(n, generator=g), mask, lengths


def test_clipped_objective_by_hand():
    ratio = torch.tensor([[0.5, 1.0, 1.5], [0.5, 1.0, 1.5]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    j, low, high, _ = surrogate(ratio.log(), torch.zeros(2, 3), torch.tensor([1.0, -2.0]), mask, Clip(epsilon_high=0.3))
    torch.testing.assert_close(j[mask], torch.tensor([0.5, 1.0, 1.3, -1.6, -2.0]))
    assert low.tolist() == [[False] * 3, [True, False, False]] and high.tolist() == [[False, False, True], [False] * 3]


def trl(logp, old, adv, mask, loss_type, low, high, constant, level="token"):
    "The losses as TRL's documentation of GRPOTrainer gives them, row by row in plain numbers."
    total, tokens, n = 0.0, int(mask.sum()), len(logp)
    for i in range(n):
        places = [t for t in range(logp.shape[1]) if mask[i, t]]
        logs = {t: float(logp[i, t] - old[i, t]) for t in places}
        if level == "sequence":
            mean = sum(logs.values()) / len(logs)
            logs = dict.fromkeys(places, mean)
        row = 0.0
        for t in places:
            rho = math.exp(logs[t])
            row += -min(rho * float(adv[i]), min(max(rho, 1 - low), 1 + high) * float(adv[i]))
        total += (
            row / len(places) / n
            if loss_type == "grpo"
            else row / (n * constant)
            if loss_type == "dr_grpo"
            else row / tokens
        )
    return total


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_losses_are_the_published_ones(loss_type, level):
    logp, old, adv, mask, lengths = ragged()
    j, *_ = surrogate(logp, old, adv, mask, Clip(0.2, 0.28), level=level)
    w = token_weights(lengths.numpy()[None], np.ones((1, 6), bool), loss_type, constant=7, n=6)[0]
    mine = -(torch.from_numpy(w)[:, None] * mask * j).sum()
    assert float(mine) == pytest.approx(trl(logp, old, adv, mask, loss_type, 0.2, 0.28, 7, level), abs=1e-6)


def test_masked_places_have_no_gradient():
    logp, old, adv, mask, _ = ragged()
    logp.requires_grad_()
    for level in ("token", "sequence"):
        j, *_ = surrogate(logp, old, adv, mask, level=level)
        (grad,) = torch.autograd.grad((j * mask).sum(), logp)
        assert (grad[~mask] == 0).all() and (grad[mask] != 0).any()


def test_kimis_gradient_is_the_published_one():
    logp, ref, adv, mask, _ = ragged(1)
    logp.requires_grad_()
    (grad,) = torch.autograd.grad(kimi_objective(logp, ref, adv, mask, tau=0.3).mean(), logp)
    distance = ((logp - ref) * mask).sum(1).detach()  # log of π(y) / π_ref(y)
    by_hand = (adv - 0.3 * distance)[:, None] * mask / len(adv)  # ∇ of log π is 1 at every place
    torch.testing.assert_close(grad, by_hand)


# Divergence and entropy


def test_estimates_agree_with_the_exact_divergence():
    g = torch.Generator().manual_seed(0)
    p = torch.randn(30, generator=g).log_softmax(-1)
    q = (p + 0.4 * torch.randn(30, generator=g)).log_softmax(-1)
    exact = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist()))
    assert float(full_kl(p, q)) == pytest.approx(exact, abs=1e-6)
    y = torch.multinomial(p.exp(), 100_000, replacement=True, generator=g)
    for estimate in (k1, k3):
        x = estimate(p[y], q[y])
        assert abs(float(x.mean()) - exact) < 4 * float(x.std()) / 100_000**0.5
    assert (k3(p[y], q[y]) >= 0).all() and float(k3(p[y], p[y]).abs().max()) == 0
    assert k3(p[y], q[y]).std() < k1(p[y], q[y]).std()


def test_divergence_by_hand():
    a, b = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert float(k1(a, b)) == 0.5 and float(k2(a, b)) == 0.125
    assert float(k3(a, b)) == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    assert float(k1(torch.tensor([20.0]), b, threshold=10)) == 10
    full, ref = (
        torch.tensor([0.5, 0.5, 0.0]).log(),
        torch.tensor([0.25, 0.75, 0.0]).log(),
    )  # one token that nobody can draw
    assert float(full_kl(full, ref)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_entropy_takes_k3_down_and_masks_hold():
    mask = torch.tensor([[True, True, False]])
    s = Scored(torch.tensor([[-1.0, -2.0, 0.0]]), mask, entropy=torch.tensor([[math.log(4), 0.0, 9.0]]))
    ref = Scored(torch.tensor([[-2.0, -2.0, -5.0]]), mask)
    assert float(normalised_entropy(s, 4)) == pytest.approx(0.5)
    got = kl_penalty("k3", s, ref, adaptive_factor=0.5, n_choices=4)
    torch.testing.assert_close(got, torch.tensor([[math.exp(-1) * 0.75, 0.0, 0.0]]))


def test_names_of_the_divergence():
    assert [kl_name(n) for n in ("kimikl", "kimifull", "fullkimi", "k3")] == ["kimi", "full", "kimi_loss", "k3"]
    with pytest.raises(ValueError, match="unknown kl_approximator 'k9'; choose from k1, k3, kimi, full, kimi_loss"):
        GRPOConfig(kl_approximator="k9")
    weights = {"k1": 0.1, "k3": 0.2, "kimikl": 0.1, "kimifull": 0.05}
    assert {n: kl_in_use(GRPOConfig(use_kl=True, kl_approximator=n))[1] for n in weights} == weights
    assert kl_in_use(GRPOConfig(use_kl=True, beta=0.04)) == ("k3", 0.04) and kl_in_use(GRPOConfig()) is None
    assert GRPOConfig(use_kl=True, kl_approximator="fullkimi").is_kimi


# Schedules and settings


@pytest.mark.parametrize("func", ["linear", "cosine"])
@pytest.mark.parametrize("ends", [(1.2, 0.7), (0.02, 0.35)])
def test_schedules_hit_both_ends_either_way(ends, func):
    s = Schedule(*ends, func)
    values = [s(i, 50, hold=0.2) for i in range(50)]
    assert (values[0], values[9], values[49], s(80, 50)) == (ends[0], ends[0], ends[1], ends[1])
    steps = np.diff(values[10:])
    assert (steps > 0).all() if ends[1] > ends[0] else (steps < 0).all()
    assert Schedule(3.0)(49, 50) == 3.0 and Schedule(3.0, 9.0, "constant")(49, 50) == 3.0
    assert s(0, 1) == ends[0]


def test_settings_by_name():
    cfg = with_settings(
        GRPOConfig(), {"top_k": [50, 10], "steps": 30, "length_weight": 0.1, "kimikl_task_id": "grounding"}
    )
    assert (cfg.top_k, cfg.loop.steps, cfg.length_weight, cfg.kimikl_task_id) == (
        Schedule(50, 10),
        30,
        Schedule(0.1),
        ("grounding",),
    )
    assert with_settings(cfg, {"temperature_func": "linear", "temperature_end": 0.5}).sampling(29).temperature == 0.5
    for given, words in (
        ({"lr_rate": 1}, "unknown settings lr_rate"),
        ({"top_k": [50, 10, "zigzag"]}, "top_k"),
        ({"num_generations": "eight"}, "num_generations cannot be 'eight'"),
        ({"num_generations": 2.5}, "num_generations"),
        ({"use_kl": 1}, "use_kl"),
        ({"loss_type": "ppo"}, "unknown loss_type 'ppo'; choose from grpo, dr_grpo, dapo, bnpo, cispo, gspo, sapo"),
        ({"temperature": 0.0}, "above 0"),
        ({"target": "nothing"}, "unknown target 'nothing'; choose from reference, consensus"),
        ({"target": "consensus", "rollout_batch": 4}, "num_generations 8 must divide"),
        ({"target": "consensus", "per_device_batch_size": 12}, "num_generations 8 must divide"),
        ({"target": "consensus", "baseline": "greedy"}, "must not be greedy"),
        ({"credit": "token"}, "unknown credit 'token'; choose from reading, bar"),
        ({"credit": "bar", "loss_type": "kimi_loss"}, "choose credit 'reading'"),
        ({"credit": "bar", "advantage_scale": "batch"}, "choose credit 'reading'"),
        ({"credit": "bar", "no_mean_for_same_reward": True}, "choose credit 'reading'"),
    ):
        with pytest.raises(ValueError, match=words):
            with_settings(GRPOConfig(), given)


# The trainer


def test_a_policy_without_tokens_learns(tmp_path):
    policy = Bandit()
    practise(policy, lambda step, k: k % 4, arm_reward, settings(steps=60, lr=0.15, per_device_batch_size=64), tmp_path)
    assert [int(i) for i in policy.logits.argmax(1)] == [0, 1, 2, 0]
    history = read_history(tmp_path)
    assert history[-1]["reward"] > history[0]["reward"] + 0.3
    assert all(abs(h["objective"]) < 1e-6 and h["clip_low"] == h["clip_high"] == 0 for h in history)  # on-policy: zero
    assert {"term/arm_reward", "zero_spread", "grad_norm", "adv_abs", "best_of_group"} <= set(history[0])
    samples = [json.loads(x) for x in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {"action", "reward", "advantage", "terms", "step"} <= set(samples[0])
    assert watch(history).axes


def test_what_a_policy_lacks_is_said_in_one_line(tmp_path):
    for given, words in (
        ({"entropy_bonus": 0.1}, "entropy_bonus: Bandit has no tokens"),
        ({"use_kl": True, "kl_approximator": "full"}, "full KL: Bandit"),
        ({"ce_weight": [0.1, 0]}, "ce_weight: Bandit has no method `supervised`"),
    ):
        with pytest.raises(ValueError, match=words):
            context(Bandit(), **given)
    with pytest.raises(ValueError, match="object is no PolicyModel; it needs generate_actions"):
        context(object())


def gradient(t):
    "Of the first step, and what was drawn."
    parts, table, _ = collect(t, 0)
    for m in micro_batches(t, parts, table, 0):
        objective(t, m, 0, None)[0].backward()
    grad = torch.cat([p.grad.flatten() for p in t.weights.trained() if p.grad is not None])
    for p in t.weights.trained():
        p.grad = None
    return grad, table


@pytest.mark.parametrize(
    "given", [{}, {"loss_type": "dapo"}, {"advantage_scale": "none"}, {"importance_level": "sequence"}]
)
def test_equal_rewards_give_no_gradient(given):
    grad, table = gradient(context(Bandit(), lambda states, actions: [[0.3] * len(g) for g in actions], **given))
    assert (grad == 0).all() and not table.live.any()


def test_dynamic_sampling_never_dilutes():
    "One picture in two teaches nothing; the others weigh as much as if it had not been drawn."
    reward = lambda states, actions: [[float(a) if s % 2 else 0.5 for a in g] for s, g in zip(states, actions)]
    diluted, _ = gradient(context(Bandit(), reward))
    t = context(Bandit(), reward=reward, dynamic_sampling=1, data=lambda step, k: k % 4)  # the same places
    parts, table, dead = collect(t, 0)
    kept = table.live
    assert dead >= 0.5 and not kept[::2].any() and kept.any()
    for m in micro_batches(t, parts, table, 0):
        assert all(s % 2 for s in m.states)
        objective(t, m, 0, None)[0].backward()
    grad = t.policy.logits.grad.flatten()
    torch.testing.assert_close(grad, diluted * 4 / kept.sum(), atol=1e-6, rtol=1e-5)


def test_dynamic_sampling_draws_other_states():
    asked = []

    def data(step, k):
        asked.append(k)
        return k % 4

    reward = lambda states, actions: [
        [float(i) if s == 3 else 0.0 for i in range(len(g))] for s, g in zip(states, actions)
    ]
    t = context(Bandit(), reward=reward, data=data, dynamic_sampling=2)
    parts, table, dead = collect(t, 0)
    assert dead == 0.75 and table.live.tolist() == [False, False, False, True]
    assert asked == [0, 1, 2, 3, 4, 5, 6, 8, 9, 10] and len(parts) == 4


def test_greedy_baseline_asks_for_one_reading_more(smoke):
    pictures = [Picture(np.full((32, 64), 255, np.uint8), [3, 4, 5]) for _ in range(4)]
    reward = lambda states, actions: [[float(len(a)) for a in g] for g in actions]
    policy = ReaderPolicy(smoke)
    given = {"baseline": "greedy", "advantage_scale": "none", "max_actions": 9}
    t = context(policy, reward, lambda step, k: pictures[k % 4], **given)
    parts, table, _ = collect(t, 0)
    greedy = policy.rollout(pictures[:1], 1, Sampling(0.0, max_actions=9), 0).actions[0][0]
    np.testing.assert_allclose(table.adv, table.total - len(greedy))


def test_inner_epochs_leave_the_first_ratio_at_one_and_clip_later(tmp_path):
    cfg = settings(inner_epochs=6, lr=0.2, steps=3, epsilon_low=0.05, epsilon_high=0.05)
    practise(Bandit(), lambda step, k: k % 4, arm_reward, cfg, tmp_path)
    history = read_history(tmp_path)
    assert all(h["ratio_off"] == 0 for h in history) and max(h["clip_high"] + h["clip_low"] for h in history) > 0
    assert history[-1]["updates"] == 18


# The reader


@pytest.fixture(scope="module")
def pictures(shards):
    cfg = settings(degradation="clean", lengths=[90])
    return Excerpts(shards, cfg, space=6.0)


def reader_context(model, pictures, grammar=False, **given):
    policy = ReaderPolicy(model, grammar=Grammar() if grammar else None, bf16=given.pop("bf16", False))
    given = {"max_actions": 24, "per_device_batch_size": 8, **given}
    reward = MusicReward(credit=given.get("credit", "reading"), target=given.get("target", "reference"))
    return context(policy, reward, pictures, **given)


@pytest.fixture
def model():
    torch.manual_seed(5)
    return Reader(READERS["smoke"])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 5},
        {"grammar": True},
        {"grammar": True, "top_k": 12, "temperature": 1.4},
    ],
    ids=str,
)
def test_ratio_is_one_before_anything_moved(model, pictures, given):
    t = reader_context(model, pictures, **given)
    parts, table, _ = collect(t, 0)
    off = [objective(t, m, 0, None)[2]["ratio_off"] for m in micro_batches(t, parts, table, 0)]
    assert len(off) == 2 and max(float(x) for x in off) < 1e-4


def test_bf16_scores_against_itself(model, pictures):
    t = reader_context(model, pictures, bf16=True, rescore=True, loss_type="dapo")
    parts, table, _ = collect(t, 0)
    for m in micro_batches(t, parts, table, 0):
        _, _, sums = objective(t, m, 0, None)
        assert float(sums["objective"]) == pytest.approx(
            float((m.token_weight * m.adv * (m.logp_old != 0).sum(1)).sum()), abs=1e-5
        )
        assert sums["clip_low"] == sums["clip_high"] == 0


CUTS = [
    {"loss_type": "grpo"},
    {"loss_type": "dr_grpo"},
    {"loss_type": "dapo", "entropy_bonus": 0.2},
    {"loss_type": "kimi_loss"},
    {"use_kl": True, "kl_approximator": "full", "inner_epochs": 2},
    {"loss_type": "dapo", "credit": "bar", "max_actions": 48},
    {"target": "consensus", "credit": "bar", "max_actions": 48},
]


@pytest.mark.parametrize("given", CUTS, ids=str)
def test_any_cut_of_a_step_gives_one_gradient(model, pictures, given):
    whole, table = gradient(reader_context(model, pictures, micro_batch=8, **given))
    assert whole.abs().max() > 0
    for micro in (1, 3, 4):
        again, same = gradient(reader_context(model, pictures, micro_batch=micro, **given))
        np.testing.assert_array_equal(table.total, same.total)
        assert (again - whole).abs().max() < 1e-5 * max(1.0, float(whole.abs().max()))


def test_entropy_regularisation_has_the_sign_of_its_weight(model, pictures):
    "Positive weights spread the distribution, negative ones sharpen it."
    entropy = {}
    with torch.no_grad():
        model.head.weight *= 30  # a reader with opinions: an untrained one has none to sharpen
    for weight in (0.0, -1.0, 1.0):
        policy = ReaderPolicy(Reader(READERS["smoke"]))
        policy.model.load_state_dict(model.state_dict())
        given = {"entropy_reg": True, "entropy_weight": weight, "reward_scale": 0.0, "max_actions": 12}
        t = context(policy, MusicReward(), pictures, per_device_batch_size=8, **given)
        parts, table, _ = collect(t, 0)
        for _ in range(8):
            for m in micro_batches(t, parts, table, 0):
                objective(t, m, 0, None)[0].backward()
            with torch.no_grad():
                for p in t.weights.trained():
                    if p.grad is not None:
                        p -= 0.05 * p.grad
                        p.grad = None
        scored = policy.score([p.state for p in parts], [p.actions for p in parts], Sampling(max_actions=12))
        entropy[weight] = normalised_entropy(scored, policy.n_choices).mean().item()
        assert 0 <= entropy[weight] <= 1
    assert entropy[-1.0] < entropy[0.0] - 0.01 and entropy[0.0] + 0.01 < entropy[1.0]


def test_many_readings_fit_where_few_do(model, pictures):
    "G = 128: what is kept for the way back does not grow with G."
    kept = {}
    for g in (8, 128):
        t = reader_context(
            model, pictures, num_generations=g, per_device_batch_size=g, rollout_batch=32, micro_batch=8, max_actions=16
        )
        parts, table, _ = collect(t, 0)
        sizes = []
        for m in micro_batches(t, parts, table, 0):
            saved = []
            with torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.append(x.nbytes) or x, lambda x: x):
                objective(t, m, 0, None)[0].backward()
            sizes.append(sum(saved))
        kept[g] = max(sizes)
        assert table.total.shape == (1, g) and len(sizes) == g // 8
    assert kept[128] < 1.1 * kept[8]


def test_a_frozen_encoder_stays_as_it_was(model, pictures, tmp_path):
    policy = ReaderPolicy(model, train_encoder=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    practise(policy, pictures, MusicReward(), settings(steps=2, max_actions=12, per_device_batch_size=8), tmp_path)
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(k.startswith(("encoder", "symbol_head")) for k in moved)


def test_teaching_is_the_plain_cross_entropy(model, pictures):
    states = [pictures(0, k) for k in range(3)]
    policy = ReaderPolicy(model)
    got = policy.supervised(states)
    for s, ce in zip(states, got.tolist(), strict=True):
        img, mask = pad_pictures([s.img])
        ids = torch.tensor([[0, *s.ids, EOS_ID]])
        logits = model.decode(ids[:, :-1], model.encode(img, mask))
        assert ce == pytest.approx(F.cross_entropy(logits[0], ids[0, 1:]).item(), abs=1e-5)


def test_teaching_is_annealed_to_nothing(model, pictures, tmp_path):
    cfg = settings(steps=3, max_actions=12, per_device_batch_size=8, ce_weight=[1.0, 0.0], reward_scale=0.0)
    practise(ReaderPolicy(model), pictures, MusicReward(), cfg, tmp_path)
    history = read_history(tmp_path)
    assert [h["ce_weight"] for h in history] == [1.0, 0.5, 0.0]
    assert history[0]["ce"] > 1 and history[2]["ce"] == 0 and history[2]["grad_norm"] == 0


def test_the_reference_follows(tmp_path):
    runs = {}
    for every, mix in ((0, 1.0), (2, 1.0), (2, 0.5)):
        policy, folder = Bandit(), tmp_path / f"{every} {mix}"
        cfg = settings(
            steps=4,
            use_kl=True,
            kl_approximator="kimi",
            kimikl_task_id=[""],
            k3_adaptive_factor=0.0,
            reference_sync_steps=every,
            reference_mix=mix,
        )
        practise(policy, lambda step, k: k % 4, arm_reward, cfg, folder)
        state = torch.load(folder / "checkpoint.pt", weights_only=True)
        runs[every, mix] = (state["reference"]["logits"] - state["model"]["logits"]).abs().max()
        assert [h["kl/kimi"] > 0 for h in read_history(folder)] == [False, True, every == 0 or mix < 1, True]
    assert runs[2, 1.0] == 0 < runs[2, 0.5] < runs[0, 1.0]


def test_kimi_is_for_its_tasks_only():
    class Task(int):
        task = "counting"

    def pull(task_id):
        t = context(
            Bandit(),
            data=lambda step, k: Task(k % 4),
            use_kl=True,
            kl_approximator="kimikl",
            kimikl_task_id=task_id,
            k3_adaptive_factor=0.0,
        )
        with torch.no_grad():
            t.policy.logits += torch.arange(3.0)  # away from the reference
        return gradient(t)[0]

    plain, _ = gradient(context(Bandit()))
    assert not torch.allclose(pull(["counting"]), pull(["ocr"]))


def test_length_weight_is_scheduled(tmp_path):
    reward = lambda states, actions: [
        [Breakdown({"F1": 1.0, "LEN": 0.5}, {"F1": 1.0, "LEN": -0.02}) for _ in g] for g in actions
    ]
    cfg = settings(steps=3, length_weight=[0.02, 0.4])
    practise(Bandit(), lambda step, k: 0, reward, cfg, tmp_path, term_weights=cfg.term_weights)
    history = read_history(tmp_path)
    assert [h["reward"] for h in history] == pytest.approx([0.99, 0.895, 0.8])


# MMR1's controls, each with a value of its own: a control that is not connected fails here


def test_every_documented_control_is_a_setting_of_its_name():
    names = """use_kl kl_approximator beta k1_weight k1_threshold k3_weight k3_adaptive_factor kimikl_weight
        kimikl_task_id kimifull_weight entropy_reg entropy_weight temperature_func temperature_begin temperature_end
        reward_scale no_mean_for_same_reward per_device_batch_size num_generations gradient_checkpointing""".split()
    assert set(names) <= {f.name for f in fields(GRPOConfig)}
    for name in ("k1", "k3", "kimikl", "kimifull", "fullkimi"):
        assert with_settings(GRPOConfig(), {"use_kl": True, "kl_approximator": name}).kl_approximator == name


class Chooser:
    "Three places of four tokens for each of four states, the whole policy one table."

    n_choices = 4

    def __init__(self):
        self.table = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
        self.asked = []  # how readings were drawn and scored

    def get_parameters(self):
        return {"table": self.table}

    def everything(self, states, n, how):
        self.asked.append(how.temperature)
        return (self.table[list(states)].repeat_interleave(n, 0) / how.temperature).log_softmax(-1)  # (N, T, V)

    def rollout(self, states, n, how, seed):  # its log-probabilities have gradients; the trainer must not follow them
        full = self.everything(states, n, how).detach()
        drawn = torch.multinomial(full.exp().flatten(0, 1), 1, generator=torch.Generator().manual_seed(seed))
        rows = drawn.view(-1, 3).tolist()
        actions = [rows[i : i + n] for i in range(0, len(rows), n)]
        return Rollout(actions, self.score(states, actions, how), torch.zeros(len(rows), dtype=torch.bool))

    def score(self, states, actions, how, *, full=False):
        everything = self.everything(states, len(actions[0]), how)
        ids = torch.tensor([a for group in actions for a in group])
        logp = everything.gather(2, ids[..., None])[..., 0]
        entropy = -(everything.exp() * everything).sum(-1)
        return Scored(logp, torch.ones_like(logp, dtype=torch.bool), entropy, everything if full else None)

    def generate_actions(self, states, num_actions_per_state, *, temperature=1.0):
        return self.rollout(states, num_actions_per_state, Sampling(temperature), 0).actions

    def get_log_probabilities(self, states, actions):
        return self.score(states, actions, Sampling()).logp.sum(1)


def token_reward(states, actions):
    return [[float(sum(a)) for a in group] for group in actions]


def first_loss(**given):
    "The loss of a first step by a policy that has left its reference, what was drawn, and the team."
    t = context(Chooser(), token_reward, **given)
    with torch.no_grad():
        t.policy.table += torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(2))
    parts, table, _ = collect(t, 0)
    return sum(float(objective(t, m, 0, None)[0].detach()) for m in micro_batches(t, parts, table, 0)), parts, table, t


def distances(parts, t):
    "Of the same readings: log π, log π_ref, all of π and π_ref, entropy of a reading in nats."
    states, actions = [p.state for p in parts], [p.actions for p in parts]
    p, q = (x.score(states, actions, Sampling(), full=True) for x in (t.policy, Reference))
    return p.logp.detach(), q.logp.detach(), p.full.detach(), q.full.detach(), p.entropy.mean(1).detach()


Reference = Chooser()
KLS = {  # approximator → settings, the penalty by hand
    "k1": ({"k1_weight": 0.3, "k1_threshold": 0.4}, lambda p, q, P, Q, h: 0.3 * (p - q).clamp(-0.4, 0.4)),
    "k3": (
        {"k3_weight": 0.7, "k3_adaptive_factor": 0.9},
        lambda p, q, P, Q, h: 0.7 * ((q - p).exp() - (q - p) - 1) * (1 - 0.9 * h / math.log(4))[:, None],
    ),
    "kimikl": (
        {"kimikl_weight": 0.6, "kimikl_task_id": [""]},
        lambda p, q, P, Q, h: 0.6 * (p - q) ** 2 / 2,
    ),
    "kimifull": ({"kimifull_weight": 0.5}, lambda p, q, P, Q, h: 0.5 * (P.exp() * (P - Q)).sum(-1)),
}


@pytest.mark.parametrize("name", KLS)
def test_each_divergence_enters_the_loss_with_its_own_controls(name):
    given, by_hand = KLS[name]
    plain, parts, _, t = first_loss()
    expected = float(by_hand(*distances(parts, t)).mean())  # all readings are of one length
    assert abs(expected) > 1e-3
    assert first_loss(**given, kl_approximator=name)[0] == plain  # use_kl is off
    got = first_loss(**given, kl_approximator=name, use_kl=True)[0] - plain
    assert got == pytest.approx(expected, abs=1e-5)
    own = next(v for k, v in given.items() if k.endswith("_weight"))
    got = first_loss(**given, kl_approximator=name, use_kl=True, beta=0.25)[0] - plain
    assert got == pytest.approx(0.25 / own * expected, abs=1e-5)


def test_entropy_is_weighed_in_nats():
    plain, parts, _, t = first_loss()
    entropy = float(distances(parts, t)[4].mean())
    for weight in (0.4, -0.4):
        assert first_loss(entropy_weight=weight)[0] == plain
        got = first_loss(entropy_reg=True, entropy_weight=weight)[0]
        assert got - plain == pytest.approx(-weight * entropy, abs=1e-5)


def test_rewards_are_scaled_and_equal_ones_may_be_kept():
    plain, table = (first_loss(advantage_scale="none")[i] for i in (0, 2))
    thrice, scaled = (first_loss(advantage_scale="none", reward_scale=3.0)[i] for i in (0, 2))
    np.testing.assert_allclose(scaled.total, 3 * table.total)
    np.testing.assert_allclose(scaled.adv, 3 * table.adv)
    assert thrice == pytest.approx(3 * plain, abs=1e-5)
    alike = lambda states, actions: [[0.3] * len(g) for g in actions]
    for keep in (False, True):
        grad, table = gradient(context(Chooser(), alike, no_mean_for_same_reward=keep))
        assert (table.adv == float(keep)).all() and bool(grad.abs().max() > 0) == keep


@pytest.mark.parametrize("func", ["constant", "linear", "cosine"])
def test_temperature_goes_where_its_controls_say(tmp_path, func):
    policy = Chooser()
    cfg = settings(steps=5, temperature=0.9, temperature_func=func, temperature_begin=1.7, temperature_end=0.6)
    practise(policy, lambda step, k: k % 4, token_reward, cfg, tmp_path)
    half = 0.5 * (1.7 + 0.6)
    path = {"constant": [0.9] * 5, "linear": np.linspace(1.7, 0.6, 5).tolist()}
    path["cosine"] = [1.7, half + 0.55 * math.cos(math.pi / 4), half, half - 0.55 * math.cos(math.pi / 4), 0.6]
    assert [h["temperature"] for h in read_history(tmp_path)] == pytest.approx(path[func], abs=1e-6)
    calls = len(policy.asked) // 5  # of a step; drawn and scored alike
    assert policy.asked == pytest.approx(np.repeat(path[func], calls).tolist()) and calls > 8


@pytest.mark.parametrize(("g", "groups"), [(2, 8), (4, 4), (16, 1)])
def test_a_device_counts_generations_not_pictures(g, groups):
    asked = []
    t = context(Chooser(), token_reward, lambda step, k: asked.append(k) or k % 4, num_generations=g, rollout_batch=16)
    parts, table, _ = collect(t, 0)
    assert table.total.shape == (groups, g) and sum(len(p.actions) for p in parts) == 16
    assert sorted(asked) == list(range(groups))


def test_checkpointing_is_what_the_setting_asks_for(tmp_path, shards, model, monkeypatch):
    "Blocks are computed anew on the way back, and the weights after a step are the same."
    save_reader(model, tmp_path / "init", dtype=torch.float32)
    calls, plain = [], policy_module.checkpoint
    monkeypatch.setattr(policy_module, "checkpoint", lambda *a, **k: calls.append(1) or plain(*a, **k))
    weights = {}
    for saving in (False, True):
        calls.clear()
        cfg = settings(steps=1, max_actions=8, per_device_batch_size=4, lengths=[60], gradient_checkpointing=saving)
        weights[saving] = train(cfg, shards.folder, tmp_path / f"{saving}", init=tmp_path / "init").state_dict()
        assert bool(calls) == saving
    for k, v in weights[False].items():
        torch.testing.assert_close(v, weights[True][k], atol=1e-5, rtol=1e-4, msg=k)


# Resuming, many processes


TIMES = ("seconds",)


def without_times(history):
    return [{k: v for k, v in h.items() if k not in TIMES} for h in history]


@pytest.mark.parametrize("kills", [(1,), (3, 4, 7)])
def test_killed_at_any_step_it_writes_the_same_history(tmp_path, kills):
    given = {
        "steps": 8,
        "use_kl": True,
        "k3_adaptive_factor": 0.0,
        "reference_sync_steps": 3,
        "reference_mix": 0.5,
        "samples_every": 2,
        "inner_epochs": 2,
    }
    run = lambda folder, stop=None: practise(
        Bandit(), lambda step, k: k % 4, arm_reward, settings(**given), folder, stop_at=stop
    )
    run(tmp_path / "whole")
    for stop in kills:
        run(tmp_path / "broken", stop)
    with open(tmp_path / "broken" / "history.jsonl", "a") as f:  # what a kill after the checkpoint leaves behind
        f.write(json.dumps({"step": kills[-1] + 1, "reward": 99}) + "\n" + '{"step": 99, "rew')
    run(tmp_path / "broken")
    whole, broken = (without_times(read_history(tmp_path / f)) for f in ("whole", "broken"))
    assert len(whole) == 8 and whole == broken
    a, b = (torch.load(tmp_path / f / "checkpoint.pt", weights_only=True) for f in ("whole", "broken"))
    assert torch.equal(a["model"]["logits"], b["model"]["logits"]) and torch.equal(
        a["ema"]["logits"], b["ema"]["logits"]
    )
    steps = [json.loads(x)["step"] for x in (tmp_path / "broken" / "samples.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and set(steps) >= {1, 3, 5, 7, 8}


def test_a_reader_resumes_too(tmp_path, shards, model):
    save_reader(model, tmp_path / "init", dtype=torch.float32)
    cfg = settings(
        steps=4, max_actions=16, per_device_batch_size=8, lengths=[60, 120], dynamic_sampling=1, degradation="light"
    )
    run = lambda folder, stop=None: train(cfg, shards.folder, tmp_path / folder, init=tmp_path / "init", stop_at=stop)
    whole = run("whole")
    run("broken", 2)
    again = run("broken")
    one, two = (without_times(read_history(tmp_path / f)) for f in ("whole", "broken"))
    assert one == two and len(one) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    sample = json.loads((tmp_path / "whole" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["reference"].startswith("measure") and {"TEDn", "F1"} <= set(sample["terms"])


@pytest.mark.parametrize("rollout_batch", [4, 16])
def test_processes_mark_what_a_thread_marks(tmp_path, rollout_batch):
    given = {"steps": 3, "rollout_batch": rollout_batch}
    run = lambda n: practise(
        Bandit(), lambda step, k: k % 4, arm_reward, settings(**given, reward_workers=n), tmp_path / str(n)
    )
    run(0), run(3)
    one, many = (without_times(read_history(tmp_path / n)) for n in ("0", "3"))
    assert len(one) == 3 and one == many
    with pytest.raises(ValueError, match="reward_workers -1"):
        settings(reward_workers=-1)


def test_another_run_is_not_resumed(tmp_path):
    run = lambda **given: practise(Bandit(), lambda step, k: k % 4, arm_reward, settings(**given), tmp_path, stop_at=2)
    run()
    with pytest.raises(CheckpointError, match="other settings of epsilon_low; use another run folder"):
        run(epsilon_low=0.1)
    with pytest.raises(CheckpointError, match="other settings of steps"):
        run(steps=13)


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import torch
from test_grpo import two_runs
torch.set_num_threads(1)
two_runs({shards!r}, {folder!r}, {n})
"""


def two_runs(shards, folder, n):
    "Runs of a bandit and of a reader, by n processes that share each step; some groups lie across."
    tokenless = {"steps": 5, "num_generations": 8, "per_device_batch_size": 24 // n, "loss_type": "dapo"}
    tokenless |= {"dynamic_sampling": 1, "inner_epochs": 2, "temperature_func": "linear"}
    practise(Bandit(), lambda step, k: k % 4, arm_reward, settings(**tokenless), Path(folder) / "bandit")
    torch.manual_seed(5)
    policy = ReaderPolicy(Reader(READERS["smoke"]))
    given = {
        "steps": 2,
        "per_device_batch_size": 8 // n,
        "max_actions": 16,
        "degradation": "clean",
        "ce_weight": [0.5, 0.1],
    }
    cfg = settings(**given, lengths=[90], entropy_bonus=0.1, lr=1e-3)
    practise(policy, Excerpts(Shards(shards), cfg, space=6.0), MusicReward(), cfg, Path(folder) / "reader")


def launch(code, n):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    running = []
    for rank in range(n):
        env = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(n),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        }
        running.append(
            subprocess.Popen(
                [sys.executable, "-c", code],
                env=env,
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for p in running:
        out, _ = p.communicate(timeout=240)
        assert p.returncode == 0, out[-3000:]


def test_two_processes_make_the_history_of_one(tmp_path, shards):
    for n, name in ((1, "one"), (2, "two")):  # each with one thread: as many threads as cores add up in another order
        given = {"tests": str(ROOT / "tests"), "shards": str(shards.folder), "folder": str(tmp_path / name)}
        launch(WORKER.format(**given, n=n), n)
    for who in ("bandit", "reader"):
        a, b = (without_times(read_history(tmp_path / n / who)) for n in ("one", "two"))
        assert len(a) == len(b) > 0
        for x, y in zip(a, b, strict=True):
            assert x == pytest.approx(y, abs=1e-5)
        one, two = (
            torch.load(tmp_path / n / who / "checkpoint.pt", weights_only=True)["model"] for n in ("one", "two")
        )
        for name in one:
            torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-5)
    temperatures = [h["temperature"] for h in read_history(tmp_path / "two" / "bandit")]
    assert (temperatures[0], temperatures[-1]) == (1.2, 0.8)


def accelerate(shards, init, out, n, *given):
    """`vitomr train grpo` as `accelerate launch` starts it on n GPUs; ACCELERATE_USE_CPU keeps it off them.

    (`--cpu --num_processes n` starts one process only: for more, accelerate wants MPI.)
    """
    call = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(n)]
    call += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    call += ["--main_process_port", "0", "-m", "vitomr.cli", "train", "grpo", "--preset", "smoke"]
    call += ["--data", str(shards), "--init", str(init), "--out", str(out), "--steps", "4"]
    same = "num_generations=4", f"per_device_batch_size={8 // n}", "rollout_batch=4", "max_actions=12", "lr=0.001"
    for setting in (*same, *given):
        call += ["--set", setting]
    return call


def test_accelerate_launch_writes_the_history_of_one_process(tmp_path, shards, model):
    "One of two processes is killed and all are started again; the history is that of one process, undisturbed."
    save_reader(model, tmp_path / "init", dtype=torch.float32)
    given = {"num_generations": 4, "per_device_batch_size": 8, "rollout_batch": 4, "max_actions": 12}
    cfg = with_settings(PRACTICE["smoke"], {"steps": 4, "lr": 0.001} | given)
    train(cfg, shards.folder, tmp_path / "one", init=tmp_path / "init")
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    pipes = {"env": env, "cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    two = accelerate(shards.folder, tmp_path / "init", tmp_path / "two", 2, "checkpoint_minutes=0")
    with subprocess.Popen(two, **pipes) as first:
        workers = []
        for line in first.stdout:
            if line.startswith('{"step": 2'):
                workers = psutil.Process(first.pid).children()
                workers[-1].kill()
                break
        first.stdout.read()  # until all have left
    assert len(workers) == 2 and first.returncode != 0 and not any(w.is_running() for w in workers)
    assert 1 <= torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)["step"] < 4
    done = subprocess.run(two, **pipes, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:]
    one, again = (without_times(read_history(tmp_path / f)) for f in ("one", "two"))
    assert len(one) == len(again) == 4
    for x, y in zip(one, again, strict=True):
        assert x == pytest.approx(y, abs=1e-4)
    a, b = (load_reader(tmp_path / f / "weights").state_dict() for f in ("one", "two"))
    for name, v in a.items():
        torch.testing.assert_close(v, b[name], atol=1e-4, rtol=1e-4, msg=name)


# Around the loop


def test_the_preset_is_what_the_result_was_made_with():
    path = Path(__file__).parents[1] / "nbs" / "results" / "grpo_other.json"
    given = json.loads(path.read_text())["settings"]
    assert given and with_settings(PRACTICE["tiny"], dict(_setting(x) for x in given)) == PRACTICE["tiny"]


def test_excerpts_are_a_function_of_seed_and_step(shards):
    cfg = settings(lengths=[60, 400], shortest=20, steps=40)
    a, b = (Excerpts(shards, cfg, space=6.0, window=6) for _ in range(2))
    assert a(3, 1).ids == b(3, 1).ids and np.array_equal(a(3, 1).img, b(3, 1).img)
    lengths = shards.index["n_tokens"].astype(int)
    early, late = (
        [lengths[a.number(step, k)] for step in steps for k in range(6)] for steps in (range(3), range(37, 40))
    )
    assert max(early) <= 100 and min(early) >= 20 and max(late) > 100
    assert len({a.number(0, k) for k in range(6)}) == 6  # other pictures when drawn anew
    for given, said in ({"shortest": 9000}, "9000 to "), ({"lengths": [3, 5]}, "0 to 5 tokens"):
        with pytest.raises(ValueError, match=f"no excerpt of {said}.*change `shortest` and `lengths`"):
            Excerpts(shards, settings(**given), space=6.0)


def test_rewards_of_readings_ignore_the_end_token(shards):
    ids = shards[0].ids.astype(int).tolist()
    (got,) = MusicReward("vitomr")([Picture(np.zeros((16, 16), np.uint8), ids)], [[[*ids, EOS_ID], ids, ids[:5]]])
    assert got[0].total == got[1].total > got[2].total and got[0].raw["TEDn"] == 1
    about = describe_reading(Picture(np.zeros((1, 1), np.uint8), ids, "a song"), [*ids, EOS_ID])
    assert about["reference"] == about["prediction"] and about["name"] == "a song"


def test_without_the_reference_readings_are_marked_against_the_one_nearest_to_all(shards):
    ids = next(shards[i].ids.astype(int).tolist() for i in range(len(shards)) if shards[i].n_measures >= 3)
    most, other = [*ids, EOS_ID], [*ids[:-4], EOS_ID]
    group = [other, most, ids[:9], most]
    blank = Picture(np.zeros((16, 16), np.uint8))  # nobody wrote down what it says
    for credit in ("reading", "bar"):
        (mine,) = MusicReward("vitomr", credit, "consensus")([blank], [group])
        (told,) = MusicReward("vitomr", credit)([replace(blank, ids=ids)], [group])
        assert [b.raw for b in mine] == [b.raw for b in told] and [b.pieces for b in mine] == [b.pieces for b in told]
    assert mine[1].total == mine[3].total > mine[0].total > mine[2].total


def test_a_token_is_credited_with_what_its_bar_earned(shards):
    ids = next(shards[i].ids.astype(int).tolist() for i in range(len(shards)) if shards[i].n_measures >= 3)
    starts = [i for i, t in enumerate(ids) if VOCABULARY[t] == "measure"] + [len(ids)]
    second = slice(starts[1], starts[2])
    lost = ids[: starts[1]] + [ids[starts[1]]] + ids[starts[2] :]  # the second bar is empty
    early = ids[: starts[2]]  # ends before the third
    readings = [[*ids, EOS_ID], [*lost, EOS_ID], [*early, EOS_ID]]
    (marks,) = MusicReward("vitomr", "bar")([Picture(np.zeros((16, 16), np.uint8), ids)], [readings])
    n = len(starts) - 1
    assert all(len(m.pieces) == n and len(m.owner) == len(r) for m, r in zip(marks, readings, strict=True))
    assert marks[1].pieces[1] < marks[0].pieces[1] == marks[2].pieces[1] and marks[2].pieces[2] == 0
    rows = [Row(0, i, m.raw, m.weights, len(r), False, m.pieces) for i, (m, r) in enumerate(zip(marks, readings))]
    rows = {(r.slot, r.number): r for r in rows}
    cfg = replace(GRPOConfig(), num_generations=3, credit="bar", advantage_scale="none")
    table = tabulate(rows, cfg, 1)
    worth = np.array([m.pieces for m in marks])
    np.testing.assert_allclose(table.piece_adv[0], worth - worth.mean(0), atol=1e-12)
    right = table.of_tokens(0, 0, marks[0].owner, len(readings[0]))
    assert (right[: starts[1]] == 0).all() and (right[second] > 0).all(), "all read the first bar, one lost the second"
    assert right[-1] == table.adv[0, 0], "after the last bar the reading as a whole counts"
    assert table.of_tokens(0, 2, marks[2].owner, 400)[len(early)] < 0, "who ends too early answers for the bar left out"
    with pytest.raises(ValueError, match="tells what each part earns"):
        tabulate({k: replace(r, pieces=None if k[1] else r.pieces) for k, r in rows.items()}, cfg, 1)


def test_a_missing_tracker_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(ValueError, match="wandb is not installed; pip install wandb"), tracker("wandb", "x"):
        pass
    with (
        pytest.raises(ValueError, match="unknown tracker 'tensor'; choose from .*tensorboard, trackio, wandb"),
        tracker("tensor", "x"),
    ):
        pass


LINES = [{"step": n, "reward": n / 8, "seconds": {"rollout": 0.5 * n}} for n in (1, 2)]


def test_trackers_keep_every_line(tmp_path, monkeypatch):
    "The real ones, offline, where they are installed; of many processes the first alone has a run."
    there = [name for name in TRACKERS if importlib.util.find_spec(name)]
    if not there:
        pytest.skip("neither trackio nor wandb is installed")
    for variable, value in (("TRACKIO_DIR", tmp_path), ("WANDB_DIR", tmp_path), ("WANDB_MODE", "offline")):
        monkeypatch.setenv(variable, str(value))
    for name in there:
        monkeypatch.setenv("RANK", "1")
        with tracker(name, "vitomr", config={"steps": 2}) as log:
            log(LINES[0])
        assert name == "wandb" or not list(tmp_path.rglob("*.*"))
        monkeypatch.setenv("RANK", "0")
        with tracker(name, "vitomr", config={"steps": 2}) as log:
            for line in LINES:
                log(line)
    if "trackio" in there:
        (base,) = tmp_path.glob("*.db")
        with sqlite3.connect(base) as db:
            kept = [json.loads(m) for (m,) in db.execute("select metrics from metrics order by step")]
        assert [(h["reward"], h["seconds/rollout"]) for h in kept] == [(0.125, 0.5), (0.25, 1.0)]
    if "wandb" in there:
        (run,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
        assert all(x in run.read_bytes() for x in (b"reward", b"seconds/rollout", b"0.125", b"0.25"))


def test_the_command_line_practises(tmp_path, shards, model, capsys):
    save_reader(model, tmp_path / "init")
    call = ["train", "grpo", "--preset", "smoke", "--data", str(shards.folder), "--out", str(tmp_path / "run")]
    given = ["--init", str(tmp_path / "init"), "--steps", "2", "--set", "num_generations=4", "--set", "reward=notes"]
    given += ["--set", "per_device_batch_size=8", "--set", "max_actions=12", "--set", "top_k=[30,10]"]
    assert main([*call, *given]) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert [h["step"] for h in lines] == [1, 2] and [h["top_k"] for h in lines] == [30, 10]
    assert (
        "term/TED" in lines[0]
        and json.loads((tmp_path / "run" / "config.json").read_text())["grpo"]["reward"] == "notes"
    )
    assert load_reader(tmp_path / "run" / "weights").cfg == model.cfg
    for wrong, words in (
        (["--set", "num_generations"], "expected NAME=VALUE"),
        (["--set", "num_generations=5"], "num_generations can be 2, 4, 8, 16, 32"),
        (["--set", "g=5"], "unknown settings g; there are"),
        (["--tracker", "tensor"], "unknown tracker"),
        (["--preset", "huge"], "unknown preset"),
        (["--init", str(tmp_path)], "config.json"),
    ):
        assert main([*call, *wrong]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1, err


def test_practice_on_a_folder_of_pictures_and_lmx(tmp_path, shards, model, capsys, monkeypatch):
    "With a music reward and one's own beside it; a folder that holds neither says so."
    save_reader(model, tmp_path / "init")
    (tmp_path / "pairs").mkdir()
    for i in range(4):
        Image.fromarray(shards[i].img).save(tmp_path / "pairs" / f"{i}.png")
        (tmp_path / "pairs" / f"{i}.lmx").write_text(" ".join(VOCABULARY[t] for t in shards[i].ids))
    (tmp_path / "brief.py").write_text("def brief(pictures, readings): return [-len(r) / 100 for r in readings]")
    monkeypatch.chdir(tmp_path)
    call = ["train", "grpo", "--preset", "smoke", "--out", "run", "--init", "init", "--steps", "2"]
    call += ["--set", "num_generations=4", "--set", "per_device_batch_size=8", "--set", "max_actions=12"]
    rewards = ["--reward", "notes", "--reward", "brief:brief", "--reward-weight", "1", "--reward-weight", "0.5"]
    assert main([*call, *rewards, "--data", "pairs"]) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert len(lines) == 2 and {"term/TED", "term/LEN", "term/brief"} <= set(lines[0])
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {x["reference"] for x in samples} <= {p.read_text() for p in (tmp_path / "pairs").glob("*.lmx")}
    texts = [(tmp_path / "pairs" / f"{i}.lmx").read_text() for i in range(4)]
    records = [{"image": f"pairs/{i}.png", "lmx": text} for i, text in enumerate(texts)]
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    assert main([*call, *rewards, "--data", "pairs.json", "--out", "again", "--steps", "1"]) == 0
    (line,) = (json.loads(x) for x in capsys.readouterr().out.splitlines())
    assert {"term/TED", "term/brief"} <= set(line) and (tmp_path / "again" / "weights" / "model.safetensors").exists()
    (tmp_path / "nothing").mkdir()
    for data in ("nothing", "missing"):
        assert main([*call, "--data", data]) == 2
        err = capsys.readouterr().err
        assert data in err and err.count("\n") == 1, err


@pytest.fixture
def scans(tmp_path):
    "Two lines of a real scan, a file that is no picture, and a picture without music."
    folder = tmp_path / "scans"
    folder.mkdir()
    for n in (1, 3):
        shutil.copy(ROOT / "examples" / f"bach-invention-1-scan-{n}.png", folder)
    (folder / "letter.png").write_bytes(b"Dear reader")
    Image.new("L", (300, 200), 255).save(folder / "blank.png")
    return folder


def test_scans_are_practised_on_without_a_reference(tmp_path, scans, model, capsys):
    save_reader(model, tmp_path / "init")
    call = ["train", "grpo", "--preset", "smoke", "--data", str(scans), "--out", str(tmp_path / "run")]
    call += ["--init", str(tmp_path / "init"), "--steps", "2", "--set", "num_generations=4"]
    call += ["--set", "per_device_batch_size=8", "--set", "rollout_batch=8", "--set", "max_actions=12"]
    assert main([*call, "--set", "target=consensus", "--set", "samples_every=1"]) == 0
    said = capsys.readouterr().err
    assert said.count("vitomr: left out: ") == 2 and "letter.png" in said and "blank.png" in said
    samples = [json.loads(x) for x in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {x["name"].split(",")[0] for x in samples} == {f"bach-invention-1-scan-{n}.png" for n in (1, 3)}
    assert not any(x["reference"] for x in samples)
    for wrong in ("target=truth", "ce_weight=[0.1,0]"):
        assert main([*call, "--set", "target=consensus", "--set", wrong]) == 2
        err = capsys.readouterr().err
        assert "scans and no reference" in err and err.count("\n") == 1
    assert main([*call, "--set", "target=consensus", "--data", str(scans)]) == 2
    err = capsys.readouterr().err
    assert "put scans into one folder" in err and err.count("\n") == 1


def test_practice_on_two_folders_sees_both(tmp_path, shards, model):
    build("music21", tmp_path / "more", 6, seed=3)
    save_reader(model, tmp_path / "init")
    call = ["train", "grpo", "--preset", "smoke", "--data", str(shards.folder), "--data", str(tmp_path / "more")]
    call += ["--out", str(tmp_path / "run"), "--init", str(tmp_path / "init"), "--steps", "2", "--set", "shortest=0"]
    assert main(call) == 0
    cfg, both = settings(shortest=0), Shards([shards.folder, tmp_path / "more"])
    seen, data = set(), Excerpts(both, cfg, space=model.cfg.staff_space)
    for step in range(40):
        seen |= {data(step, k).name for k in range(2)}
    where = lambda s: {f"{s[i].song}:{s[i].start}+{s[i].n_measures}" for i in range(len(s))}
    assert seen & where(Shards(tmp_path / "more")) and seen & where(shards)


def test_scans_are_a_function_of_seed_and_step(scans, model):
    cfg = settings(target="consensus", num_generations=4, rollout_batch=8, per_device_batch_size=8)
    a, b = (Scans(scans, cfg, Transcriber(model)) for _ in range(2))
    drawn = [[data(step, k).name for step in range(6) for k in range(4)] for data in (a, b)]
    assert drawn[0] == drawn[1] and len(a.faults) == 2
    assert all(len(set(drawn[0][i : i + 2])) == 2 for i in range(0, 24, 2)), "each once before any twice"
    assert len({tuple(drawn[0][i : i + 4]) for i in range(0, 24, 4)}) == 2
    for p in scans.glob("bach*"):
        p.unlink()
    with pytest.raises(ValueError, match=r"no music was found; .*blank.png|no music was found; .*letter.png"):
        Scans(scans, cfg, Transcriber(model))


def the_benchmark():
    spec = importlib.util.spec_from_file_location("grpo_result", ROOT / "benchmarks" / "grpo_result.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    return benchmark


def test_practice_is_held_against_two_controls_on_two_kinds_of_music(tmp_path, shards, monkeypatch):
    for name in ("other", "songs"):
        shutil.copytree(shards.folder, tmp_path / name)
    where = {
        k: str(tmp_path / v) for k, v in (("other", "other"), ("songs", "songs"), ("work", "w"), ("out", "r.json"))
    }
    call = ["x", "--data", where["other"], "--control-data", where["songs"], "--dev", where["other"], where["songs"]]
    call += ["--work", where["work"], "--out", where["out"], "--steps", "1", "--seeds", "3", "--limit", "1"]
    call += ["--arms", "vitomr,consensus,supervised,taught", "--bars", "1-2"]
    small = ["num_generations=4", "per_device_batch_size=8", "max_actions=12", "lengths=[90]", "shortest=0"]
    (tmp_path / "like.json").write_text(json.dumps({"settings": small}))
    call += ["--like", str(tmp_path / "like.json"), "--set", "per_device_batch_size=4"]
    call += ["--figure", str(tmp_path / "practice.png")]
    benchmark, told = the_benchmark(), []
    teach = benchmark.teach
    monkeypatch.setattr(benchmark, "PROBE", 1)
    monkeypatch.setattr(
        benchmark, "teach", lambda cfg, data, *a, **k: told.append(data[0].name) or teach(cfg, data, *a, **k)
    )
    monkeypatch.setattr(sys, "argv", call)
    benchmark.main()
    assert told[0] == "songs" and told[-1] == "other" and told == sorted(told, reverse=True)
    results = json.loads((tmp_path / "r.json").read_text())
    assert list(results["arms"]) == ["start", "vitomr 3", "consensus 3", "supervised 3", "taught 3"]
    targets = [
        json.loads((tmp_path / "w" / f"{arm}-3" / "config.json").read_text())["grpo"] for arm in ("vitomr", "consensus")
    ]
    assert [(t["reward"], t["target"]) for t in targets] == [("vitomr", "reference"), ("vitomr", "consensus")]
    assert results["settings"] == [*small, "per_device_batch_size=4"]
    settings = json.loads((tmp_path / "w" / "vitomr-3" / "config.json").read_text())["grpo"]
    assert settings["per_device_batch_size"] == 4 and settings["max_actions"]["begin"] == 12
    for arm, whole in results["arms"].items():
        of = [results["parts"][name]["arms"][arm] for name in ("other", "songs")]
        assert of[0]["metrics"] == of[1]["metrics"]  # the same excerpts, twice
        for key, rate in whole["metrics"].items():
            assert rate["n"] == 2 * of[0]["metrics"][key]["n"]
            assert rate["value"] == pytest.approx(of[0]["metrics"][key]["value"])
        kinds = {k for k in whole if k.startswith("TEDn_against")}
        assert kinds == {"TEDn_against_start"} | (
            {"TEDn_against_supervised", "TEDn_against_taught"} if arm[0] in "vc" else set()
        )
    assert len(results["rewards"]["vitomr 3"]) == 1 and (tmp_path / "practice.png").exists()
    where, curves, none = plot_kinds(results).axes
    named = [t.get_text() for t in where.get_legend().get_texts()]
    assert named == ["start", "vitomr", "consensus", "supervised", "taught"]
    assert where.get_xlabel() == "TEDn on other, %" and where.get_ylabel() == "TEDn on songs, %"
    (line,) = curves.lines
    assert line.get_ydata() == pytest.approx(results["rewards"]["vitomr 3"]) and not none.lines
    said = changes(results)
    assert [line.split("TEDn")[1].split(":")[0].strip() for line in said if line.startswith("vitomr")] == [
        "against start", "against supervised", "against taught",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--dev", "a/dev", "b/dev"], "give each its own"),
        (["--dev", "a/dev", "--figure", "x.png"], "shows two sets"),
        (["--dev", "a/dev", "--arms", "notes,taught"], "name vitomr before it"),
        (["--dev", "a/dev", "--like", "README.md"], "expected a file that --out wrote"),
    ],
)
def test_the_benchmark_says_what_is_wrong_before_it_begins(monkeypatch, tmp_path, capsys, given, words):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["x", "--data", "a", "--work", str(tmp_path / "w"), *given])
    with pytest.raises(SystemExit) as stopped:
        the_benchmark().main()
    assert words in capsys.readouterr().err + str(stopped.value) and not (tmp_path / "w").exists()


def test_draws_are_told_apart(monkeypatch, tmp_path, shards):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("draws")
    call = ["x", "--dev", str(shards.folder), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "r.json")]
    monkeypatch.setattr(sys, "argv", [*call, "--bars", "1-2", "--limit", "3", "--draws", "3"])
    benchmark.main()
    first = (tmp_path / "r.json").read_text()
    (kept,) = (tmp_path / "w").glob("*.jsonl")
    whole = kept.read_text()
    kept.write_text(whole[: len(whole) // 2])  # killed while it wrote
    benchmark.main()
    assert (tmp_path / "r.json").read_text() == first and kept.read_text() == whole
    (found,) = json.loads(first)["sets"].values()
    rate = {kind: f["value"] for kind, f in found["TEDn"].items()}
    assert rate["best"] <= min(rate.values()) and 1 <= found["distinct"] <= 3
    ways = [f"measure clef:G2 C5 voice:1 quarter stem:down {pitch} quarter" for pitch in ("D5", "E5", "F5")]
    line = {"reference": ways[1], "read": [ways[1], ways[2], ways[1], ways[0]], "logp": [-2.0, -1.0, -2.0, -3.0]}
    edits = {kind: n for kind, (n, _) in benchmark.costs(line).items()}
    assert edits["best"] == edits["consensus"] == 0 < min(edits["greedy"], edits["likeliest"], edits["a draw"])


def test_errors_are_told_apart_by_what_the_music_holds(monkeypatch, tmp_path):
    pitch = "<pitch><step>{}</step><octave>4</octave></pitch>"
    note = "<note{}>{}<duration>{}</duration><voice>1</voice><type>{}</type>{}</note>"
    plain = [note.format("", pitch.format(s), 6, "quarter", "<stem>up</stem>") for s in "EFGA"]
    pause = note.format(' print-object="no"', "<rest/>", 6, "quarter", "")
    ratio = "<time-modification><actual-notes>3</actual-notes><normal-notes>2</normal-notes></time-modification>"
    mark = '<notations><tuplet type="{}" {}/></notations>'

    def triplet(said):
        marks = mark.format("start", said), "", mark.format("stop", "")
        return [note.format("", pitch.format("E"), 4, "quarter", ratio + m) for m in marks]

    bars = [*plain], [pause, *plain[1:]], [*triplet(""), *plain[:2]], [*triplet('show-number="none"'), *plain[:2]]
    head = "<attributes><divisions>6</divisions><clef><sign>G</sign><line>2</line></clef></attributes>"
    xml = [f'<measure number="{i}">{"" if i else head}{"".join(bar)}</measure>' for i, bar in enumerate(bars)]
    names = '<part-list><score-part id="P1"><part-name>V</part-name></score-part></part-list>'
    song = f'<score-partwise version="4.0">{names}<part id="P1">{"".join(xml)}</part></score-partwise>'
    (tmp_path / "songs" / "dev").mkdir(parents=True)
    (tmp_path / "songs" / "dev" / "a.musicxml").write_text(song)
    build(tmp_path / "songs", tmp_path / "dev", 16, split="dev", mix=replace(AS_WRITTEN, bars=(1.0,)))
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    benchmark = importlib.import_module("unprinted")
    call = ["x", "--data", str(tmp_path / "dev"), "--source", str(tmp_path / "songs"), "--work", str(tmp_path / "w")]
    monkeypatch.setattr(sys, "argv", [*call, "--out", str(tmp_path / "r.json"), "--bars", "1-1", "--limit", "16"])
    benchmark.main()
    found = json.loads((tmp_path / "r.json").read_text())["groups"]
    seen = Counter(Shards(tmp_path / "dev").index["start"].tolist())
    counted = {name: row["excerpts"] for name, row in found.items()}
    assert counted == {"all": 16} | {benchmark.GROUPS[i]: n for i, n in seen.items()} and len(seen) == 4
    assert sum(row["share of edits"] for name, row in found.items() if name != "all") in (0, pytest.approx(1))
    hidden, moved = "print-object:no rest voice:1 quarter F4 quarter", "forward quarter F4 voice:1 quarter"
    (edits, _), (alike, _) = benchmark.both_counts(tuple(["measure", *bar.split()] for bar in (moved, hidden)))
    assert edits > alike == 0
    monkeypatch.setattr(sys, "argv", [*call[:4], str(ROOT / "README.md"), *call[5:], "--out", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert "README.md" in str(stopped.value)


def test_the_line_through_start_and_arm(tmp_path, shards):
    "The benchmark, two steps of it: what it writes is what the chapter draws; steps have the length they claim."
    small = "num_generations=4", "per_device_batch_size=8", "max_actions=12", "lengths=[90]", "shortest=0", "lr=0.0001"
    small += ("temperature=2.0",)  # the packaged reader is sure of how most lines begin
    call = [sys.executable, "benchmarks/grpo_result.py", "--data", shards.folder, "--dev", shards.folder]
    call += ["--work", tmp_path / "work", "--out", tmp_path / "line.json", "--steps", "2"]
    call += ["--seeds", "0", "--arms", "vitomr", "--bars", "1-2", "--limit", "2", "--along", "-1", "--noise", "1"]
    for setting in small:
        call += ["--set", setting]
    done = subprocess.run(list(map(str, call)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "line.json").read_text())
    assert list(results["arms"]) == ["start", "vitomr 0", "vitomr×-1 0", "vitomr~0 0"]
    line = on_the_line(results)
    assert list(line) == [-1, 0, 1]
    assert line[0] == results["arms"]["start"]["metrics"] and line[1] == results["arms"]["vitomr 0"]["metrics"]
    axes = plot_line({"smoke": results}).axes
    assert [ax.get_title(loc="left") for ax in axes] == [f"{name}, %" for name in line[0]]
    assert list(axes[0].lines[0].get_xdata()) == [-1, 0, 1]

    benchmark = the_benchmark()
    start, arm = load_reader(PACKAGED), load_reader(tmp_path / "work" / "vitomr-0" / "weights")
    way = lambda other: {k: (p - dict(start.named_parameters())[k]).detach() for k, p in other.named_parameters()}
    there, back = way(benchmark.along(start, arm, 1)), way(benchmark.along(start, arm, -1))
    assert any(d.norm() > 1e-3 for d in there.values())
    for seed in (0, 1):
        luck = way(benchmark.anywhere(start, arm, seed))
        for k, d in way(arm).items():
            torch.testing.assert_close(there[k], d, atol=1e-6, rtol=0)
            torch.testing.assert_close(back[k], -d, atol=1e-6, rtol=0)
            assert float(luck[k].norm()) == pytest.approx(float(d.norm()), rel=1e-3, abs=1e-5)
