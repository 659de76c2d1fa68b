"""What a policy promises: drawn as scored, seeded, legal where it says so, cheap where it says so."""

import numpy as np
import pytest
import torch

from vitomr.decoder import READERS, Reader
from vitomr.notation.grammar import Grammar
from vitomr.notation.lmx import EOS_ID, PAD_ID
from vitomr.reading.policy import Picture, ReaderPolicy, padded
from vitomr.train.policy import (
    PolicyModel,
    Sampling,
    SupervisedPolicy,
    TokenPolicy,
    checkpointed,
    rollout_of,
    score_of,
)


@pytest.fixture
def reader():
    torch.manual_seed(1)
    return Reader(READERS["smoke"])


@pytest.fixture
def states():
    rng = np.random.default_rng(0)
    sizes = ((64, 96), (80, 160), (64, 128))
    return [Picture(rng.integers(0, 256, size, dtype=np.uint8), [5, 6, 7 + i]) for i, size in enumerate(sizes)]


class Switch:
    "The least that is a policy."

    def __init__(self):
        self.logit = torch.zeros((), requires_grad=True)

    def get_parameters(self):
        return {"logit": self.logit}

    def generate_actions(self, states, num_actions_per_state, *, temperature=1.0):
        return [(torch.rand(num_actions_per_state) < 0.5).tolist() for _ in states]

    def get_log_probabilities(self, states, actions):
        return torch.stack([self.logit * (1 if a else -1) for g in actions for a in g]).sigmoid().log()


def test_protocols_tell_policies_apart(reader):
    assert isinstance(ReaderPolicy(reader), PolicyModel | TokenPolicy | SupervisedPolicy)
    assert all(isinstance(ReaderPolicy(reader), p) for p in (PolicyModel, TokenPolicy, SupervisedPolicy))
    assert isinstance(Switch(), PolicyModel)
    assert not isinstance(Switch(), TokenPolicy) and not isinstance(Switch(), SupervisedPolicy)
    assert not isinstance(reader, PolicyModel)


def test_a_policy_without_tokens_has_one_place_and_leaves_the_global_draws_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first, again, other = (rollout_of(Switch(), [0, 1], 16, Sampling(), seed) for seed in (7, 7, 8))
    assert torch.equal(torch.rand(2), expected)
    assert first.actions == again.actions != other.actions
    assert first.scored.logp.shape == (32, 1) and first.scored.mask.all() and not first.truncated.any()
    assert score_of(Switch(), [0, 1], first.actions, Sampling()).logp.requires_grad


def test_the_interface_of_a_policy(reader, states):
    "Nested actions, a flat log-probability for each, with gradient; the sum of the tokens'."
    policy = ReaderPolicy(reader, max_actions=15)
    actions = policy.generate_actions(states, 4, temperature=0.9)
    assert [len(g) for g in actions] == [4, 4, 4] and all(1 <= len(a) <= 15 for g in actions for a in g)
    logp = policy.get_log_probabilities(states, actions)
    assert logp.shape == (12,) and logp.requires_grad
    tokens = policy.score(states, actions, Sampling())
    torch.testing.assert_close(logp, tokens.logp.sum(1))
    assert tokens.mask.sum(1).tolist() == [len(a) for g in actions for a in g]
    assert policy.get_parameters().keys() == dict(reader.named_parameters()).keys()


@pytest.mark.parametrize("copies", [1, 5])
def test_a_seed_is_a_rollout(reader, states, copies):
    policy, how = ReaderPolicy(reader), Sampling(1.2, 30, 20)
    a, b, c = (policy.rollout(states, copies, how, seed) for seed in (1, 1, 2))
    assert a.actions == b.actions and torch.equal(a.scored.logp, b.scored.logp)
    assert a.actions != c.actions


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.5), Sampling(1.5, 7), Sampling(2.0)], ids=str)
@pytest.mark.parametrize("rules", [None, Grammar(), Grammar(time=False)], ids=["free", "bars add up", "shape"])
def test_scored_as_drawn(reader, states, how, rules):
    policy = ReaderPolicy(reader, grammar=rules)
    drawn = policy.rollout(states, 6, Sampling(how.temperature, how.top_k, 48), 4)
    scored = policy.score(states, drawn.actions, how)
    assert torch.equal(scored.mask, drawn.scored.mask)
    assert (scored.logp - drawn.scored.logp).abs().max() < 1e-4
    assert (scored.entropy - drawn.scored.entropy).abs().max() < 1e-4


def test_the_grammar_is_kept_in_drawing_and_in_scoring(reader, states):
    policy = ReaderPolicy(reader, grammar=Grammar())
    drawn = policy.rollout(states, 8, Sampling(1.5, 0, 60), 0)
    ended = [a for g in drawn.actions for a in g if a[-1] == EOS_ID]
    assert all(Grammar().legal(a) is None for a in ended)
    masks = Grammar().masks_for(padded([a for g in drawn.actions for a in g]).numpy())
    full = policy.score(states, drawn.actions, Sampling(1.5), full=True)
    assert (full.full.exp().sum(-1) - 1).abs().max() < 1e-4
    written = full.mask[..., None] & ~torch.from_numpy(masks)
    assert (full.full[written] == -torch.inf).all()


def test_greedy_is_what_the_temperature_goes_to(reader, states):
    policy = ReaderPolicy(reader)
    greedy = policy.rollout(states, 1, Sampling(0.0, max_actions=12), 0).actions
    cold = policy.rollout(states, 2, Sampling(1e-4, max_actions=12), 5).actions
    assert all(g[0] == c[0] == c[1] for g, c in zip(greedy, cold, strict=True))


def test_truncated_readings_are_named(reader, states):
    drawn = ReaderPolicy(reader).rollout(states, 4, Sampling(1.0, 0, 6), 0)
    rows = [a for g in drawn.actions for a in g]
    assert drawn.truncated.tolist() == [a[-1] != EOS_ID for a in rows]
    assert all(PAD_ID not in a for a in rows)


def test_checkpointing_gives_the_same_gradient_and_leaves_no_trace(reader, states):
    actions = ReaderPolicy(reader).generate_actions(states, 2)
    grads = []
    for saving in (False, True):
        reader.zero_grad()
        ReaderPolicy(reader, gradient_checkpointing=saving, max_actions=20).get_log_probabilities(
            states, actions
        ).sum().backward()
        grads.append({k: p.grad.clone() for k, p in reader.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for k in grads[0]:
        torch.testing.assert_close(grads[0][k], grads[1][k], msg=k)
    with pytest.raises(RuntimeError), checkpointed(reader.blocks):
        raise RuntimeError
    assert not any("forward" in vars(b) for b in [*reader.blocks, *reader.encoder.blocks])
