"""The contract of the practice engine: rewards, data and policies of one's own, right ones and wrong ones."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator

from vitomr.cli import main
from vitomr.train.groups import advantages
from vitomr.train.loop import LoopConfig, Optimizers
from vitomr.train.policy import Rollout, Sampling, Scored, restricted, rollout_of, score_of
from vitomr.train.practice import DivergedError, RewardTerms, group_reward, load_records, practise
from vitomr.train.reward_functions import compute_rewards, reward_functions
from vitomr.train.runs import Tracker, WeightsError, load_into, load_weights, processes_asked_for, read_history, tracker
from vitomr.train.schedules import Schedule
from vitomr.train.settings import PracticeConfig, settings_without_effect, with_settings
from vitomr.train.states import Deck
from vitomr.train.step import StepContext, collect
from vitomr.train.update import micro_batches, objective, update

ROOT = Path(__file__).resolve().parents[1]


class Table:
    "Three numbers to choose from in each of four states."

    def __init__(self):
        self.logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()

    def get_parameters(self):
        return {"logits": self.logits}

    def generate_actions(self, states, n, *, temperature=1.0):
        p = (self.logits.detach()[list(states)] / temperature).softmax(-1)
        return torch.multinomial(p, n, replacement=True).tolist()

    def get_log_probabilities(self, states, actions, *, temperature=1.0):
        logp = (self.logits / temperature).log_softmax(-1)
        return torch.stack([logp[s, a] for s, group in zip(states, actions, strict=True) for a in group])


class Flat(Table):
    "The same, with one flat list of actions; each is scored beside its state."

    def generate_actions(self, states, n, *, temperature=1.0):
        return torch.tensor(super().generate_actions(states, n, temperature=temperature)).flatten()

    def get_log_probabilities(self, states, actions, *, temperature=1.0):
        assert len(states) == len(actions)
        logp = (self.logits / temperature).log_softmax(-1)
        return torch.stack([logp[s, a] for s, a in zip(states, actions, strict=True)])


class Cold(Table):
    def get_log_probabilities(self, states, actions):
        return super().get_log_probabilities(states, actions)


def right(states, actions):
    return [float(a == s % 3) for s, a in zip(states, actions, strict=True)]


def config(**given):
    return with_settings(
        PracticeConfig(), {"num_generations": 4, "per_device_batch_size": 16, "steps": 6, "lr": 0.1} | given
    )


def context(policy, rewards=right, data=range(4), **given):
    return StepContext(policy, data, rewards, config(**given), Accelerator(cpu=True))


def gradient(ctx):
    groups, table, _ = collect(ctx, 0)
    for part in range(ctx.cfg.steps_per_generation):
        for m in micro_batches(ctx, groups, table, 0, part):
            objective(ctx, m, 0, None)[0].backward()
    grad = ctx.policy.logits.grad.clone()
    ctx.policy.logits.grad = None
    return grad, table


def timeless(folder):
    return [{k: v for k, v in h.items() if k != "seconds"} for h in read_history(folder)]


# Rewards


def test_several_rewards_are_weighted_and_logged_by_name(tmp_path):
    async def small(states, actions):
        await asyncio.sleep(0)
        return [-a for a in actions]

    practise(Table(), range(4), [right, small], reward_weights=[2, 0.5], cfg=config(), run_dir=tmp_path)
    for h in read_history(tmp_path):
        assert h["reward"] == pytest.approx(2 * h["term/right"] + 0.5 * h["term/small"], abs=1e-5)
    samples = read_history(tmp_path, "samples.jsonl")
    assert set(samples[0]["terms"]) == {"right", "small"}


def test_async_rewards_run_at_the_same_time():
    going, most = [], []

    def waits(name):
        async def reward(states, actions):
            going.append(name)
            await asyncio.sleep(0.05)
            most.append(len(going))
            going.remove(name)
            return [0.0] * len(actions)

        reward.__name__ = name
        return reward

    compute_rewards(reward_functions([waits("a"), waits("b"), waits("c")]), [0], [[1, 2]])
    assert max(most) == 3


@dataclass
class Question:
    text: str
    answer: int


def test_columns_are_keys_or_fields():
    def named(states, actions, answer):
        return [float(a == b) for a, b in zip(actions, answer, strict=True)]

    def every(states, actions, **columns):
        assert set(columns) == {"text", "answer"} and len(columns["text"]) == len(states) == len(actions)
        return [0.0] * len(actions)

    for make in (lambda n: {"text": "?", "answer": n}, lambda n: Question("?", n)):
        got = compute_rewards(reward_functions([named, every]), [make(1), make(2)], [[1, 2], [1, 2]])
        assert [[t.raw["named"] for t in g] for g in got] == [[1, 0], [0, 1]]


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_an_action_without_a_reward_is_left_out(nothing):
    "The gradient is that of the other actions alone, divided by how many they are; nothing becomes NaN."

    def some(states, actions):  # every second action of a group says nothing
        return [nothing if i % 2 else 1.0 + a for i, a in enumerate(actions)]

    grad, table = gradient(context(Table(), some))
    assert table.there.tolist() == [[True, False, True, False]] * 4 and grad.isfinite().all()
    logits = Table().logits
    groups, _, _ = collect(context(Table(), some), 0)
    loss, n = 0.0, 8
    for g in groups:
        rewards = np.array([[1.0 + g.actions[0], 1.0 + g.actions[2]]])
        logp = logits.log_softmax(-1)[g.state]
        for a, adv in zip((g.actions[0], g.actions[2]), advantages(rewards)[0], strict=True):
            loss = loss - adv / n * logp[a]
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, expected.to(grad), atol=1e-6, rtol=1e-5)


def test_missing_rewards_are_counted_and_training_goes_on(tmp_path):
    shy = lambda states, actions: [None if a == 2 else float(a) for a in actions]
    policy = practise(Table(), range(4), shy, cfg=config(steps=8), run_dir=tmp_path)
    history = read_history(tmp_path)
    assert sum(h["missing_rewards"] for h in history) > 0 and policy.logits.isfinite().all()
    nothing = practise(Table(), range(4), lambda s, a: [None] * len(a), cfg=config(steps=2), run_dir=tmp_path / "none")
    assert torch.equal(nothing.logits, Table().logits)
    last = read_history(tmp_path / "none")[-1]
    assert last["reward"] is None and last["missing_rewards"] == 16
    json.loads((tmp_path / "none" / "history.jsonl").read_text().splitlines()[0], parse_constant=pytest.fail)


def boom(states, actions):
    raise RuntimeError("no such price\nsecond line")


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda s, a: [1.0], "gave 1 values for 16 actions; expected one number or None for each"),
        (lambda s, a: 3, "returned int; expected a list of 16 numbers"),
        (lambda s, a: ["good"] * len(a), "gave 'good' (str); expected a number or None"),
        (lambda s, a: [[1.0]] * len(a), "expected a number or None"),
        (lambda s, a, price: a, "asks for price; the data has no columns"),
        (group_reward(lambda s, g: [[1.0]] * len(g)), "gave groups of [1, 1, 1, 1]; expected [4, 4, 4, 4]"),
        (boom, "reward boom failed: RuntimeError: no such price"),
    ],
)
def test_a_wrong_reward_is_one_line(reward, words, tmp_path):
    with pytest.raises(ValueError) as e:
        practise(Table(), range(4), reward, cfg=config(), run_dir=tmp_path)
    said = str(e.value).splitlines()[0]
    assert words in said and len(said) <= 200


@pytest.mark.parametrize(
    ("given", "weights", "words"),
    [
        ("nowhere:f", None, "nowhere:f: No module named 'nowhere'"),
        ("math:nothing", None, "math:nothing: math has no nothing"),
        ("no such reward", None, "unknown reward 'no such reward'; choose from"),
        ([], None, "0 reward functions"),
        ([right], [1, 2], "1 reward functions and 2 reward_weights"),
        ([right], [math.nan], "reward weight nan: expected a finite number"),
        ([right, right], None, "two reward functions are called right"),
        (7, None, "reward 7 is a int; expected a function or its name"),
    ],
)
def test_wrong_names_of_rewards(given, weights, words):
    with pytest.raises(ValueError) as e:
        reward_functions(given, weights)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_terms_of_a_group_reward_are_weighted_by_it_too():
    of = lambda a: RewardTerms({"x": a, "y": 1}, {"x": 1, "y": -1})
    two = group_reward(lambda s, groups: [[of(a) for a in g] for g in groups])
    ((a, b),) = compute_rewards(reward_functions([two, right], [3, 1]), [0], [[0, 2]])
    assert (dict(a.raw), a.weights) == ({"x": 0, "y": 1, "right": 1}, {"x": 3, "y": -3, "right": 1}) and b.raw["x"] == 2


# Data


def test_every_item_comes_once_before_any_twice():
    deck, again = (Deck("abcdefg", 3, seed=5) for _ in range(2))
    drawn = [deck(step, k) for step in range(7) for k in range(3)]
    assert all(sorted(drawn[i : i + 7]) == list("abcdefg") for i in (0, 7, 14)) and drawn[:7] != drawn[7:14]
    assert [again(step, k) for step in (6, 0, 3) for k in range(3)] == drawn[18:] + drawn[:3] + drawn[9:12]
    assert deck(0, 9) in "abcdefg" and deck(0, 9) == again(0, 9)


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1, 2]", "list of records"), ("{", "not JSON"), ("[]", "one at least"), (None, "no such file")],
)
def test_wrong_records_are_one_line(tmp_path, text, words):
    if text is not None:
        (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError) as e:
        load_records(tmp_path / "r.json")
    assert words in str(e.value) and "\n" not in str(e.value)


# Policies


def test_flat_actions_give_the_run_of_nested_ones(tmp_path):
    for make in (Table, Flat):
        cfg = config(temperature_func="linear", baseline="leave_one_out", micro_batch=3)
        practise(make(), range(4), right, cfg=cfg, run_dir=tmp_path / make.__name__)
    assert timeless(tmp_path / "Table") == timeless(tmp_path / "Flat")


def test_sampled_and_scored_at_one_temperature_or_refused(tmp_path):
    for temperature in (0.5, 1.7):
        got = rollout_of(Table(), [0, 1], 64, Sampling(temperature), 3)
        again = score_of(Table(), [0, 1], got.actions, Sampling(temperature))
        assert torch.equal(got.scored.logp, again.logp)
        p = (Table().logits[:2].detach() / temperature).log_softmax(-1)
        for s in range(2):
            assert got.scored.logp[64 * s : 64 * s + 64, 0].tolist() == pytest.approx(
                [float(p[s, a]) for a in got.actions[s]]
            )
    with pytest.raises(ValueError, match="temperature 0.5: Cold.get_log_probabilities takes no `temperature`"):
        practise(Cold(), range(4), right, cfg=config(temperature=0.5), run_dir=tmp_path)
    practise(Cold(), range(4), right, cfg=config(steps=1), run_dir=tmp_path)


class Short(Table):
    def get_log_probabilities(self, states, actions, *, temperature=1.0):
        return super().get_log_probabilities(states, actions)[:3]


class Few(Table):
    def generate_actions(self, states, n, *, temperature=1.0):
        return super().generate_actions(states, n)[:-1]


class Frozen(Table):
    def get_parameters(self):
        return {"logits": self.logits.detach()}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Short, r"Short.get_log_probabilities returned (3,); expected a tensor of shape (16,)"),
        (Few, "Few.generate_actions returned 3 items; expected 4 lists of 4 actions, or 16 actions"),
        (Frozen, "Frozen.get_parameters: expected a dict of tensors, one at least with requires_grad"),
        (object, "object is no PolicyModel; it needs generate_actions"),
    ],
)
def test_a_wrong_policy_is_one_line(make, words, tmp_path):
    with pytest.raises(ValueError) as e:
        practise(make(), range(4), right, cfg=config(), run_dir=tmp_path)
    assert words in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) <= 200


def test_weights_are_saved_and_loaded(tmp_path):
    policy = practise(Table(), range(4), right, cfg=config(), run_dir=tmp_path)
    fresh = Table()
    load_into(fresh.get_parameters(), tmp_path / "weights")
    assert torch.equal(fresh.logits, policy.logits) and not torch.equal(fresh.logits, Table().logits)
    assert load_weights(tmp_path / "weights")["logits"].shape == (4, 3)
    with pytest.raises(WeightsError, match="do not fit this policy: other, logits differ|logits, other"):
        load_into({"other": torch.zeros(2)}, tmp_path / "weights")
    assert torch.equal(practise(Table(), range(4), right, cfg=config(), run_dir=tmp_path).logits, policy.logits)


# Objectives in the engine


class Writer:
    "Two places of six tokens for each of four states."

    n_choices = 6

    def __init__(self):
        self.table = (2 * torch.randn(4, 2, 6, generator=torch.Generator().manual_seed(2))).requires_grad_()

    def get_parameters(self):
        return {"table": self.table}

    def rollout(self, states, n, how, seed):
        full = restricted(self.table.detach()[list(states)].repeat_interleave(n, 0), how)
        drawn = torch.multinomial(full.exp().flatten(0, 1), 1, generator=torch.Generator().manual_seed(seed))
        rows = drawn.view(-1, 2).tolist()
        actions = [rows[i : i + n] for i in range(0, len(rows), n)]
        return Rollout(actions, self.score(states, actions, how), torch.zeros(len(rows), dtype=torch.bool))

    def score(self, states, actions, how, *, full=False):
        everything = restricted(self.table[list(states)].repeat_interleave(len(actions[0]), 0), how)
        ids = torch.tensor([a for group in actions for a in group])
        logp = everything.gather(2, ids[..., None])[..., 0]
        p = everything.exp()
        entropy = -(p * everything.masked_fill(p == 0, 0.0)).sum(-1)
        there = logp > -torch.inf
        return Scored(logp.masked_fill(~there, 0.0), there, entropy, everything if full else None)

    def generate_actions(self, states, n, *, temperature=1.0):
        return self.rollout(states, n, Sampling(temperature), 0).actions

    def get_log_probabilities(self, states, actions):
        return self.score(states, actions, Sampling()).logp.sum(1)


class Ragged(Writer):
    def score(self, states, actions, how, *, full=False):
        s = super().score(states, actions, how, full=full)
        return Scored(s.logp, s.mask[:, :1])


class Fewer(Writer):
    def rollout(self, states, n, how, seed):
        got = super().rollout(states, n, how, seed)
        return Rollout(got.actions[1:], got.scored, got.truncated)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Ragged, "gave logp (16, 2) and mask (16, 1) of torch.bool; expected (16, T) for both"),
        (Fewer, "Fewer.rollout returned groups of [4, 4, 4]; expected 4 groups of 4"),
    ],
)
def test_wrong_shapes_of_tokens_are_one_line(make, words, tmp_path):
    with pytest.raises(ValueError) as e:
        practise(make(), range(4), token_sum, cfg=config(), run_dir=tmp_path)
    assert words in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) <= 200


def token_sum(states, actions):
    return [float(sum(a)) for a in actions]


@pytest.mark.parametrize("given", [{"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.3}], ids=str)
def test_the_full_kl_is_finite_under_every_cut(tmp_path, given):
    cfg = config(steps=12, lr=0.3, use_kl=True, kl_approximator="full", beta=0.5, log_kl=["all"], **given)
    policy = practise(Writer(), range(4), token_sum, cfg=cfg, run_dir=tmp_path)
    history = read_history(tmp_path)
    assert policy.table.isfinite().all() and all(h["bad_updates"] == 0 and h["ratio_off"] < 1e-5 for h in history)
    assert all(h[f"kl/{name}"] is not None for h in history for name in ("k1", "k3", "kimi", "full"))
    assert max(h["kl/full"] for h in history) > 0


@pytest.mark.parametrize(
    "given",
    [
        {"loss_type": "cispo", "epsilon_high": 2.0},
        {"loss_type": "sapo"},
        {"loss_type": "gspo"},
        {"loss_type": "bnpo", "delta": 1.5},
        {"top_entropy_quantile": 0.4},
        {"use_kl": True, "use_bias_correction_kl": True, "num_iterations": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 2])
def test_any_cut_of_a_step_gives_one_update(given, steps):
    "Also with two optimiser steps of a rollout, and two passes."
    after = {}
    for micro in (0, 3, 4):
        ctx = context(Writer(), token_sum, micro_batch=micro, steps_per_generation=steps, **given)
        optimizers = Optimizers(ctx.weights, LoopConfig(lr=0.1, weight_decay=0.0))
        groups, table, _ = collect(ctx, 0)
        sums = update(ctx, groups, table, 0, optimizers, 0.1)
        after[micro] = ctx.policy.table.detach().clone()
        assert sums["ratio_off"] < 1e-6
    for micro in (3, 4):
        torch.testing.assert_close(after[micro], after[0], atol=1e-5, rtol=1e-4)
    assert not torch.equal(after[0], Writer().table)


def test_optimiser_steps_of_a_rollout_clip_and_are_counted(tmp_path):
    cfg = config(steps_per_generation=4, num_iterations=2, lr=0.3, epsilon_low=0.05, epsilon_high=0.05)
    practise(Writer(), range(4), token_sum, cfg=cfg, run_dir=tmp_path)
    history = read_history(tmp_path)
    assert [h["updates"] for h in history] == [8 * n for n in range(1, 7)]
    assert max(h["clip_low"] + h["clip_high"] for h in history) > 0 and all(h["ratio_off"] < 1e-5 for h in history)
    with pytest.raises(ValueError, match="steps_per_generation 3: 4 groups a step, so it can be 1, 2, 4"):
        context(Writer(), token_sum, steps_per_generation=3)


def test_only_uncertain_tokens_are_trained():
    ctx = context(Writer(), token_sum, top_entropy_quantile=0.25)
    groups, table, _ = collect(ctx, 0)
    entropies = torch.cat([g.scored.entropy.flatten() for g in groups])
    (m,) = micro_batches(ctx, groups, table, 0)
    assert int(m.trained.sum()) == int((entropies >= entropies.quantile(0.75)).sum()) < entropies.numel()
    objective(ctx, m, 0, None)[0].backward()
    quiet = [(g.state, t) for g in groups for t in range(2) if not (g.scored.entropy[:, t] >= table.entropy_from).any()]
    assert quiet and all((ctx.policy.table.grad[s, t] == 0).all() for s, t in quiet)


class Broken(Writer):
    "Its gradient is not finite in some scores."

    def __init__(self, bad):
        super().__init__()
        self.bad, self.n = bad, 0

    def score(self, states, actions, how, *, full=False):
        s = super().score(states, actions, how, full=full)
        if s.logp.requires_grad and torch.is_grad_enabled() and how.temperature == 1.0:
            self.n += 1
            if self.bad(self.n):
                s.logp = s.logp * math.inf
        return s


def test_a_gradient_that_is_not_finite_skips_the_update(tmp_path):
    once = practise(
        Broken(lambda n: n == 4), range(4), token_sum, cfg=config(steps=5, micro_batch=0), run_dir=tmp_path / "once"
    )
    history = read_history(tmp_path / "once")
    assert sum(h["bad_updates"] for h in history) == 1 and once.table.isfinite().all()
    with pytest.raises(DivergedError, match="10 updates in a row .* not finite, the last in step 10"):
        practise(Broken(lambda n: True), range(4), token_sum, cfg=config(steps=50), run_dir=tmp_path / "always")
    assert len(read_history(tmp_path / "always")) == 9


def test_advantages_of_equal_and_of_greedy():
    r = np.array([[0.5] * 4, [0.2, 0.4, 0.6, 0.8], [0.0] * 4, [-0.3] * 4])
    a = advantages(r, no_mean_for_same_reward=True)
    np.testing.assert_allclose(a[[0, 2, 3]], [[1] * 4, [0] * 4, [-1] * 4])
    np.testing.assert_allclose(a[1], ((r[1] - 0.5) / (r[1].std(ddof=1) + 1e-4)).clip(-1, 1))
    a = advantages(r[:2], baseline="greedy", greedy=np.array([0.3, 0.4]))
    np.testing.assert_allclose(a[0], 0.2 / (0.2 + 1e-4))  # the spread around the baseline, not one of zero
    np.testing.assert_allclose(a[1], (r[1] - 0.4) / (math.sqrt(((r[1] - 0.4) ** 2).mean()) + 1e-4))
    assert (advantages(r[:1], baseline="greedy", greedy=np.array([0.5])) == 0).all()


# Settings


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("micro_batch", -1, "micro_batch -1: expected 0 or more"),
        ("rollout_batch", -1, "rollout_batch -1: expected 0 or more"),
        ("dynamic_sampling", -1, "dynamic_sampling -1: expected 0 or more"),
        ("reward_scale", math.nan, "reward_scale nan: expected 0 or more"),
        ("exploration", 2, "exploration 2: expected 0 or more and below 1"),
        ("ce_weight", -1, "ce_weight -1: expected 0 or more"),
        ("ce_weight", [0.1, math.inf], "ce_weight inf"),
        ("num_generations", 1, "num_generations 1: expected 2 or more"),
        ("per_device_batch_size", 0, "per_device_batch_size 0: expected 1 or more"),
        ("temperature_begin", 0.0, "temperature_begin 0: expected above 0"),
        ("top_p", 0.0, "top_p 0: expected above 0 and up to 1"),
        ("min_p", 1.0, "min_p 1: expected 0 or more and below 1"),
        ("top_k", [-3, 5], "top_k -3"),
        ("max_actions", [8, 0], "max_actions 0: expected 1 or more"),
        ("epsilon_low", 1.0, "epsilon_low 1"),
        ("epsilon_high", -0.1, "epsilon_high -0.1"),
        ("delta", 0.5, "delta 0.5: expected 1 or more"),
        ("beta", -0.1, "beta -0.1: expected 0 or more"),
        ("beta", "small", "beta cannot be 'small'"),
        ("entropy_weight", math.inf, "entropy_weight inf: expected a finite number"),
        ("top_entropy_quantile", 0.0, "top_entropy_quantile 0"),
        ("k1_threshold", 0.0, "k1_threshold 0: expected above 0"),
        ("reference_mix", 0.0, "reference_mix 0"),
        ("max_bad_steps", 0, "max_bad_steps 0"),
        ("steps_per_generation", 0, "steps_per_generation 0"),
        ("num_iterations", 0, "num_iterations 0"),
        ("loss_type", "cispo", "epsilon_high 0.2 with cispo: expected 1 or more"),
        ("log_kl", ["k7"], "unknown kl_approximator 'k7'"),
        ("steps", 0, "steps 0"),
    ],
)
def test_values_out_of_range_are_one_line(name, value, words):
    with pytest.raises(ValueError) as e:
        with_settings(PracticeConfig(), {name: value})
    assert words in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) <= 200


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"beta": 0.1, "kl_approximator": "k1"}, ["beta", "kl_approximator"]),
        ({"use_kl": True, "beta": 0.1, "k3_weight": 0.4}, ["k3_weight"]),
        ({"use_kl": True, "kl_approximator": "full", "use_bias_correction_kl": True}, ["use_bias_correction_kl"]),
        ({"entropy_weight": 0.3}, ["entropy_weight"]),
        ({"entropy_weight": 0.3, "entropy_reg": True}, []),
        ({"temperature_begin": 2.0}, ["temperature_begin"]),
        ({"loss_type": "sapo", "epsilon_low": 0.1, "delta": 2.0}, ["delta", "epsilon_low"]),
        ({"loss_type": "gspo", "importance_level": "sequence"}, ["importance_level"]),
        ({"dr_grpo_constant": 9, "kimi_tau": 0.3}, ["dr_grpo_constant", "kimi_tau"]),
        ({"reference_sync_steps": 3}, ["reference_sync_steps"]),
        ({"reference_sync_steps": 3, "log_kl": ["k1"]}, []),
        ({"num_generations_eval": 3}, ["num_generations_eval"]),
        ({}, []),
    ],
    ids=str,
)
def test_settings_without_effect_name_themselves(given, named, tmp_path, caplog):
    cfg = with_settings(PracticeConfig(), given)
    assert [line.split()[0] for line in settings_without_effect(cfg)] == named
    if given.get("beta") and not given.get("use_kl"):
        practise(Table(), range(4), right, cfg=config(**given, steps=1), run_dir=tmp_path)
        assert "beta has no effect: use_kl is off" in caplog.text


# Runs


def test_evaluation_has_its_own_number_of_generations(tmp_path):
    asked = []

    class Counting(Table):
        def generate_actions(self, states, n, *, temperature=1.0):
            asked.append((len(states), n))
            return super().generate_actions(states, n, temperature=temperature)

    cfg = config(evaluate_every=2, num_generations_eval=3, steps=5)
    practise(Counting(), range(4), right, cfg=cfg, run_dir=tmp_path, eval_data=[0, 1, 2])
    history = read_history(tmp_path)
    assert [h["step"] for h in history if "eval/reward" in h] == [2, 4, 5]
    assert {h.get("eval/generations") for h in history} == {None, 3} and (3, 3) in asked
    assert all(0 <= h["eval/term/right"] <= 1 for h in history if "eval/reward" in h)


def test_sampled_texts_reach_the_tracker(tmp_path):
    class Module:
        __name__ = "wandb"
        lines: list = []

        class Table:
            def __init__(self, columns, data):
                self.columns, self.data = columns, data

        def log(self, line, step):
            self.lines.append((step, line))

    log = Tracker(Module())
    cfg = config(steps=3, samples_every=2)
    practise(Table(), range(4), right, cfg=cfg, run_dir=tmp_path, on_log=log, on_samples=log.samples)
    tables = {step: line["samples"] for step, line in Module.lines if "samples" in line}
    assert set(tables) == {1, 3} and {"action", "reward", "advantage"} <= set(tables[1].columns)
    assert len(tables[1].data) == 8 and [step for step, line in Module.lines if "reward" in line] == [1, 2, 3]


def test_a_real_tracker_takes_the_table(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "t"))
    with tracker("trackio", "vitomr") as log:
        log({"step": 1, "reward": 0.5, "seconds": {}})
        log.samples([{"step": 1, "prediction": "measure C4", "terms": {"F1": 0.5}}])
    assert b"measure C4" in b"".join(p.read_bytes() for p in (tmp_path / "t").rglob("*") if p.is_file())


OWN_TRACKER = """
import json
from pathlib import Path
from accelerate.tracking import GeneralTracker, on_main_process

class Lines(GeneralTracker):
    name, requires_logging_directory, tracker = "lines", True, None

    def __init__(self, project, logging_dir):
        super().__init__()
        self.path = Path(logging_dir, project + ".txt")

    @on_main_process
    def start(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("begun\\n")

    @on_main_process
    def log(self, values, step=None, **kwargs):
        with self.path.open("a") as f:
            f.write(json.dumps([step, values]) + "\\n")

    @on_main_process
    def finish(self):
        with self.path.open("a") as f:
            f.write("finished\\n")
"""


def test_a_tracker_of_ones_own_gets_every_line_and_the_sampled_texts(tmp_path, monkeypatch):
    "A subclass of accelerate's GeneralTracker, by module:Class."
    (tmp_path / "trackers.py").write_text(OWN_TRACKER)
    monkeypatch.chdir(tmp_path)
    with tracker("trackers:Lines", "vitomr", folder="run") as log:
        practise(
            Table(), range(4), right, cfg=config(steps=3, samples_every=2), run_dir="run", on_log=log,
            on_samples=log.samples,
        )  # fmt: skip
    begun, *lines, finished = (tmp_path / "run" / "vitomr.txt").read_text().splitlines()
    lines = [json.loads(x) for x in lines]
    assert (begun, finished) == ("begun", "finished")
    assert [step for step, line in lines if "reward" in line] == [1, 2, 3]
    texts = {step: line["samples"] for step, line in lines if "samples" in line}
    wrote = read_history("run", "samples.jsonl")
    assert set(texts) == {1, 3} and wrote
    for line in wrote:
        assert f"| {line['action']} |" in texts[line["step"]] and str(line["advantage"]) in texts[line["step"]]


def test_tensorboard_gets_the_sampled_texts(tmp_path):
    pytest.importorskip("tensorboardX", reason="pip install tensorboardX")
    with tracker("tensorboard", "vitomr", folder=tmp_path) as log:
        log({"step": 1, "reward": 0.5, "grad_norm": None, "seconds": {}})
        log.samples([{"step": 1, "prediction": "measure C4", "terms": {"F1": 0.5}}])
    (file,) = (p for p in (tmp_path / "vitomr").rglob("*tfevents*"))
    assert b"| 1 | measure C4 |" in file.read_bytes() and b"reward" in file.read_bytes()


def test_a_class_that_is_no_tracker_is_one_line():
    with pytest.raises(ValueError, match="JSONDecoder is no tracker; expected a subclass"):
        tracker("json:JSONDecoder", "x").__enter__()


WORKER = """
import sys
sys.path.insert(0, {tests!r})
import time
from test_practice import Table, config
from vitomr.train.practice import practise

def slow(states, actions):
    print("working", flush=True)
    time.sleep(60)
    return [0.0] * len(actions)

practise(Table(), range(4), slow, cfg=config(reward_workers=2), run_dir={run!r})
"""


def test_no_reward_worker_outlives_its_run(tmp_path):
    code = WORKER.format(tests=str(ROOT / "tests"), run=str(tmp_path))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE) as p:
        assert p.stdout.readline().startswith(b"working")
        workers = psutil.Process(p.pid).children(recursive=True)
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert len(workers) >= 2
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, alive


def test_rewards_that_cannot_be_pickled_run_in_workers(tmp_path):
    offset = 0.25
    hidden = lambda states, actions: [a + offset for a in actions]
    for n in (0, 2):
        practise(Table(), range(4), hidden, cfg=config(steps=2, reward_workers=n), run_dir=tmp_path / str(n))
    assert timeless(tmp_path / "0") == timeless(tmp_path / "2")


def test_the_launcher_says_what_was_asked_for():
    asked = "python -m accelerate.commands.launch --num_processes=2 --cpu -m vitomr.cli train".split()
    assert processes_asked_for(asked) == 2 and processes_asked_for(["bash"]) is None
    assert processes_asked_for("accelerate launch --num_processes 4 x.py".split()) == 4


def test_fewer_processes_than_asked_for_are_told():
    "A process whose parent is a launcher that was asked for two; nothing is said when both are there."
    child = "from vitomr.train.runs import warn_of_missing_processes as warn; warn(2); warn(1)"
    parent = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', sys.argv[1]]).returncode)"
    call = [sys.executable, "-c", parent, child, "accelerate", "launch", "--cpu", "--num_processes", "2"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    assert "asked for 2 processes and started 1; on a CPU use ACCELERATE_USE_CPU=true" in done.stderr


MINE = """
from test_practice import Table
def make(): return Table()
def right(states, actions, n): return [float(a == i % 3) for a, i in zip(actions, n)]
"""


def test_the_command_line_trains_a_policy_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "own.py").write_text(MINE.replace("Table()", "Records()") + """
class Records(Table):
    def generate_actions(self, states, n, *, temperature=1.0):
        return super().generate_actions([s["n"] for s in states], n, temperature=temperature)
    def get_log_probabilities(self, states, actions, *, temperature=1.0):
        return super().get_log_probabilities([s["n"] for s in states], actions, temperature=temperature)
""")
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps({"n": n}) for n in range(4)))
    monkeypatch.chdir(tmp_path)
    call = ["train", "grpo", "--policy", "own:make", "--reward", "own:right", "--data", "d.jsonl", "--out", "run"]
    call += ["--steps", "3", "--set", "num_generations=4", "--set", "per_device_batch_size=16"]
    assert main(call) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines()]
    assert [h["step"] for h in lines] == [1, 2, 3] and "term/right" in lines[0]
    assert load_weights("run/weights")["logits"].shape == (4, 3)
    assert main([*call[:9], "again", *call[10:], "--init", "run/weights"]) == 0
    for wrong, words in (
        (["--reward", "own:wrong"], "own has no wrong"),
        (["--policy", "nowhere:make"], "No module named 'nowhere'"),
        (["--data", "other.json"], "--data was given 2 times"),
        (["--reward-weight", "2", "--reward-weight", "3"], "1 reward functions and 2 reward_weights"),
        (["--set", "steps_per_generation=3"], "4 groups a step"),
    ):
        assert main([*call, *wrong]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and len(err) <= 200, err


def test_schedules_of_terms_are_applied(tmp_path):
    of = lambda x: RewardTerms({"a": 1.0, "b": x}, {"a": 0.0, "b": 1.0})
    both = group_reward(lambda s, groups: [[of(x) for x in g] for g in groups])
    weights = lambda step: {"a": Schedule(0.0, 1.0)(step, 3)}
    practise(Table(), range(4), both, cfg=config(steps=3), run_dir=tmp_path, term_weights=weights)
    history = read_history(tmp_path)
    assert [h["weight/a"] for h in history] == [0, 0.5, 1]
    assert all(h["reward"] == pytest.approx(h["weight/a"] + h["term/b"], abs=1e-5) for h in history)

