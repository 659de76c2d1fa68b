"The audio policy: shapes, exact levels, order of time, both temperatures, memory."

import numpy as np
import pytest
import torch

from vitomr.audio.cqt_policy import Clip, CQTViTModel, memory, peak_bytes, to_levels, to_values, weight_bytes
from vitomr.train.policy import PolicyModel, Sampling, SupervisedPolicy, TokenPolicy

SMALL = {"width": 16, "depth": 2, "heads": 2}


@pytest.fixture
def model():
    return CQTViTModel.create_model((2, 40, 48), 3, 5, 16, "cpu", **SMALL)


@pytest.fixture
def states():
    return torch.randn(4, 2, 40, 48, generator=torch.Generator().manual_seed(0))


def test_it_is_what_the_engine_wants(model):
    assert all(isinstance(model, p) for p in (PolicyModel, TokenPolicy, SupervisedPolicy))
    assert list(model.get_parameters()) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("size", [2, 3, 10, 32, 33, 255, 4096])
def test_levels_and_values_are_exact_both_ways(size):
    levels = torch.arange(size)
    values = to_values(levels, size)
    assert values[0] == 0 and values[-1] == 1 and to_levels(values, size).equal(levels)
    assert to_levels(values.numpy().astype(np.float64).tolist(), size).equal(levels)


@pytest.mark.parametrize("frames", [1, 15, 16, 48, 50])
def test_distributions_are_normalised_for_every_length(model, frames):
    logp = model(torch.randn(2, 2, 40, frames))
    assert logp.shape == (2, 3, frames, 5)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(2, 3, frames))


def test_actions_are_levels_and_seeded(model, states):
    one, again, other = (model.generate_actions(states, 2, seed=s) for s in (1, 1, 2))
    assert [len(g) for g in one] == [2] * 4 and one[0][0].shape == (3, 48)
    flat, flat2, flat3 = (torch.stack([a for g in x for a in g]) for x in (one, again, other))
    assert flat.equal(flat2) and not flat.equal(flat3)
    assert set(flat.unique().tolist()) <= {0.0, 0.25, 0.5, 0.75, 1.0}
    torch.manual_seed(7)
    drawn = model.generate_actions(states, 1)[0][0]
    torch.manual_seed(7)
    assert model.generate_actions(states, 1)[0][0].equal(drawn)


def test_log_probabilities_are_those_of_the_levels(model, states):
    "Worked out by hand from `forward`, with gradient."
    actions = model.generate_actions(states[:2], 3)
    logp = model.get_log_probabilities(states[:2], actions)
    by_hand = [
        sum(row[d, t, round(4 * float(actions[b][g][d, t]))] for d in range(3) for t in range(48))
        for b, row in enumerate(model(states[:2])) for g in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(logp, torch.stack(by_hand), rtol=1e-5, atol=1e-3)
    logp.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.get_parameters().values())
    assert sum(p.grad.abs().sum() for p in model.vit.parameters()) > 0


def test_batch_equals_single_and_states_and_actions_come_in_every_shape(model, states):
    actions = model.generate_actions(states, 2)
    logp = model.get_log_probabilities(states, actions)
    alone = torch.cat([model.get_log_probabilities(s[None], [g]) for s, g in zip(states, actions)])
    torch.testing.assert_close(logp, alone, rtol=1e-5, atol=1e-3)
    flat = [a for g in actions for a in g]
    for some in (list(states), states.numpy(), [s.numpy() for s in states], [Clip(s) for s in states], states.tolist()):
        for acts in (actions, flat, torch.stack(flat), np.stack(flat), torch.stack(flat).view(4, 2, 3, 48),
                     [[a.tolist() for a in g] for g in actions], [a.numpy() for a in flat]):  # fmt: skip
            torch.testing.assert_close(model.get_log_probabilities(some, acts), logp)
    torch.testing.assert_close(model.get_log_probabilities(states[0], actions[0]), logp[:2], rtol=1e-5, atol=1e-3)


def test_all_actions_of_all_states_take_one_forward_pass(model, states):
    seen = []
    model.stem.register_forward_hook(lambda _, x, y: seen.append(len(x[0])))
    actions = model.generate_actions(states, 6)
    model.get_log_probabilities(states, actions)
    assert seen == [4, 4]


def test_time_stays_in_order(model, states):
    changed = states.clone()
    changed[..., 32:] += 1
    a, b = model(states), model(changed)
    assert a[:, :, :32].equal(b[:, :, :32])
    assert (a[:, :, 32:] != b[:, :, 32:]).any(-1).all()


@pytest.mark.parametrize("temperature, top_k", [(0.3, 0), (1.0, 0), (2.5, 0), (1.0, 2), (0.7, 3)])
def test_what_is_sampled_is_what_is_scored(model, states, temperature, top_k):
    how = Sampling(temperature, top_k)
    drawn = model.rollout(states, 3, how, 5)
    scored = model.score(states, drawn.actions, how, full=True)
    torch.testing.assert_close(scored.logp, drawn.scored.logp, rtol=1e-5, atol=1e-5)
    assert scored.mask.all() and scored.logp.shape == (12, 144) and scored.full.shape == (12, 144, 5)
    expected = model.logits(states) / temperature
    if not top_k:
        torch.testing.assert_close(scored.full[0].view(3, 48, 5), expected[0].log_softmax(-1), rtol=1e-4, atol=1e-5)
        by_name = model.get_log_probabilities(states, drawn.actions, temperature=temperature)
        torch.testing.assert_close(by_name, scored.logp.sum(1))
    entropy = -(scored.full.exp() * scored.full.nan_to_num(neginf=0)).sum(-1)
    torch.testing.assert_close(scored.entropy, entropy)


def test_sampled_levels_have_the_models_frequencies():
    model = CQTViTModel.create_model((2, 16, 16), 1, 4, 16, "cpu", **SMALL)
    torch.nn.init.normal_(model.head.bias, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(1))
    actions = torch.stack(model.generate_actions(x, 8000, temperature=1.5, seed=0)[0])
    share = torch.nn.functional.one_hot((actions * 3).round().long(), 4).float().mean(0)
    assert (share - (model.logits(x)[0] / 1.5).softmax(-1)).abs().max() < 0.03


def test_temperature_zero_is_the_likeliest(model, states):
    (a, b), *_ = model.generate_actions(states, 2, temperature=0)
    assert a.equal(b) and a.equal(to_values(model(states[:1])[0].argmax(-1), 5))


def test_supervised_is_the_cross_entropy_of_the_targets(model, states):
    target = to_values(torch.randint(5, (4, 3, 48), generator=torch.Generator().manual_seed(2)), 5)
    clips = [Clip(s, t) for s, t in zip(states, target)]
    loss = model.supervised(clips)
    torch.testing.assert_close(loss, -model.get_log_probabilities(states, list(target)) / 144)
    with pytest.raises(ValueError, match="target"):
        model.supervised([Clip(states[0])])


@pytest.mark.parametrize("call, told", [
    (lambda m, s: m.get_log_probabilities(s, [[torch.full((3, 48), 1.5)]] * 4), "outside 0 to 1"),
    (lambda m, s: m.get_log_probabilities(s, [[torch.full((3, 48), torch.nan)]] * 4), "outside 0 to 1"),
    (lambda m, s: m.get_log_probabilities(s, [torch.zeros(3, 48)] * 3), "3 actions"),
    (lambda m, s: m.get_log_probabilities(s, [torch.zeros(3, 47)] * 4), "num_devices, T"),
    (lambda m, s: m.generate_actions(s[:, :, :20], 1), "2, 40, frames"),
    (lambda m, s: m.generate_actions([s[0], s[1][..., :9]], 1), "one shape"),
    (lambda m, s: m.generate_actions([], 1), "no states"),
    (lambda m, s: m.generate_actions(s, 0), "1 or more"),
    (lambda m, s: CQTViTModel.create_model((2, 40, 48), distribution_size=1), "2 levels"),
    (lambda m, s: CQTViTModel.create_model((3, 40, 48)), "2, bins, frames"),
])  # fmt: skip
def test_bad_input_is_one_clear_line(model, states, call, told):
    with pytest.raises(ValueError, match=told) as e:
        call(model, states)
    assert len(str(e.value)) <= 240 and "\n" not in str(e.value)


def test_memory_options_lower_memory_and_keep_outputs_close():
    size = {"cqt_shape": (2, 84, 384), "distribution_size": 4, "device": "cpu", "width": 96, "depth": 8, "heads": 3}
    x = torch.randn(2, 2, 84, 384, generator=torch.Generator().manual_seed(0))
    plain, eight, half, again = (
        CQTViTModel.create_model(**size, **{name: True for name in names})
        for names in ((), ("use_8bit",), ("use_half_precision",), ("gradient_checkpointing",))
    )
    exact = plain(x).exp().detach()
    for other, off in ((eight, 0.01), (half, 0.01), (again, 1e-6)):
        assert (other(x).exp() - exact).abs().max() < off
    assert weight_bytes(eight.vit) < 0.45 * weight_bytes(plain.vit)
    assert weight_bytes(half.vit) < 0.55 * weight_bytes(plain.vit)
    needed = memory(plain, x, train=True)
    assert memory(half, x, train=True) < 0.7 * needed and memory(again, x, train=True) < 0.7 * needed
    assert memory(eight, x, train=False) < 0.9 * memory(plain, x, train=False)
    for p, q in zip(plain.parameters(), again.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    eight(x).sum().backward()
    trained = {name for name, p in eight.named_parameters() if p.grad is not None}
    assert trained == {"head.weight", "head.bias"}


def test_peak_counts_what_is_held_at_the_same_time():
    assert peak_bytes(lambda: torch.zeros(1000) + torch.zeros(1000)) == 12_000


def test_fresh_weights_follow_the_seed_and_leave_the_global_draws_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    a, b, c = (CQTViTModel.create_model((2, 16, 16), seed=s, **SMALL) for s in (0, 0, 1))
    assert torch.rand(1) == expected
    assert a.head.weight.equal(b.head.weight) and not a.head.weight.equal(c.head.weight)


def test_example_basic_use():
    model = CQTViTModel.create_model(cqt_shape=(2, 84, 32), num_devices=4, distribution_size=32, **SMALL)
    states = [torch.randn(2, 84, 32) for _ in range(2)]
    actions = model.generate_actions(states, num_actions_per_state=3)
    log_probs = model.get_log_probabilities(states, actions)
    assert len(actions) == 2 and len(actions[0]) == 3 and log_probs.shape == (6,)


def test_example_training_integration():
    model = CQTViTModel.create_model(cqt_shape=(2, 84, 32), num_devices=2, distribution_size=8, **SMALL)
    states = torch.randn(2, 2, 84, 32, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.get_parameters().values(), lr=1e-2)
    means = []
    for step in range(15):
        actions = model.generate_actions(states, 8, seed=step)
        rewards = torch.stack([-a.mean() for group in actions for a in group])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        loss = -(advantages * model.get_log_probabilities(states, actions)).mean() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        means.append(rewards.mean().item())
    assert means[-1] > means[0] + 0.1


def test_example_several_temperatures():
    model = CQTViTModel.create_model(cqt_shape=(2, 84, 32), num_devices=4, distribution_size=32, **SMALL)
    state = torch.randn(1, 2, 84, 32, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(model.head.bias, generator=torch.Generator().manual_seed(0))
    spread = [
        torch.stack(model.generate_actions(state, 32, temperature=t, seed=0)[0]).std(0).mean() for t in (0.2, 1.0, 4.0)
    ]
    assert spread[0] < spread[1] < spread[2]
