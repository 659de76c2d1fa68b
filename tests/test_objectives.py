"""The objectives against TRL 1.16: its losses and gradients of one small batch, kept as literals."""

import numpy as np
import pytest
import torch

from vitomr.train.objective import Clip, entropy_threshold, full_kl, kl_penalty, surrogate, token_weights
from vitomr.train.policy import Scored

# GRPOTrainer._compute_loss of TRL 1.16.0 on this batch: epsilon 0.2 and 0.28 (cispo: 1.5), max_completion_length 7.
LOGP = [[-1.07, -0.398, -1.318, -1.314, -0.466], [-0.85, -0.414, -1.259, -0.731, -1.703],
        [-1.71, -1.102, -0.574, -0.413, -0.89], [-0.719, -1.441, -0.146, -1.94, -0.216]]  # fmt: skip
OLD = [[-0.611, -0.502, -1.009, -1.08, -0.441], [-0.738, 0.042, -1.105, -0.413, -2.167],
       [-1.283, -0.895, -0.422, -0.33, -0.598], [-0.168, -1.575, -0.48, -2.091, -0.582]]  # fmt: skip
REF = [[-0.829, -0.645, -1.585, -0.883, -0.008], [-0.792, -0.501, -1.324, -0.494, -2.17],
       [-2.119, -0.703, -0.08, -0.443, -1.285], [-0.705, -1.674, -0.147, -1.695, 0.005]]  # fmt: skip
ENTROPY = [[0.662, 0.833, 0.954, 0.162, 0.496], [0.779, 0.322, 0.422, 1.002, 1.182],
           [0.761, 0.458, 1.161, 0.339, 0.574], [1.458, 0.888, 0.803, 1.003, 0.567]]  # fmt: skip
LENGTHS, ADVANTAGES = [5, 3, 1, 4], [1.2, -0.7, 0.4, -0.9]
TRL = {  # loss, gradient on the log-probability of each token
    "grpo": (0.08232828, [-0.03791492, -0.06657603, -0.04405085, -0.04748171, -0.0585186, 0.05215258, 0.0, 0.05000753, -0.06524636, 0.0, 0.06431584, 0.07855555, 0.06541856]),  # noqa: E501
    "dr_grpo": (0.01738333, [-0.02708208, -0.04755431, -0.03146489, -0.03391551, -0.041799, 0.02235111, 0.0, 0.0214318, -0.00932091, 0.0, 0.03675191, 0.04488889, 0.03738203]),  # noqa: E501
    "dapo": (0.03744101, [-0.05833064, -0.10242466, -0.06777054, -0.07304879, -0.09002861, 0.04814084, 0.0, 0.0461608, -0.0200758, 0.0, 0.07915796, 0.09668375, 0.08051515]),  # noqa: E501
    "bnpo": (0.03744101, [-0.05833064, -0.10242466, -0.06777054, -0.07304879, -0.09002861, 0.04814084, 0.0, 0.0461608, -0.0200758, 0.0, 0.07915796, 0.09668375, 0.08051515]),  # noqa: E501
    "cispo": (-0.06146784, [-0.05833064, -0.10242466, -0.06777054, -0.07304879, -0.09002861, 0.04814084, 0.03412844, 0.0461608, -0.0200758, 0.03990276, 0.07915796, 0.09668375, 0.08051515]),  # noqa: E501
    "gspo": (0.05418029, [-0.04988621, -0.04988621, -0.04988621, -0.04988621, -0.04988621, 0.0, 0.0, 0.0, -0.06524636, 0.05721442, 0.05721442, 0.05721442, 0.05721442]),  # noqa: E501
    "sapo": (0.02154847, [-0.03665913, -0.0663765, -0.04328176, -0.04696872, -0.05850968, 0.05199154, 0.03563898, 0.0497278, -0.06331521, 0.03086877, 0.06395272, 0.07524688, 0.06494184]),  # noqa: E501
    "delta": (0.07689772, [-0.03791492, -0.06657603, -0.04405085, -0.04748171, -0.0585186, 0.05215258, 0.0, 0.05000753, -0.06524636, 0.0, 0.06431584, 0.0, 0.06541856]),  # noqa: E501
    "top_entropy_quantile": (0.19481566, [0.0, -0.06657603, -0.04405085, 0.0, -0.0, 0.05215258, 0.0, 0.0, 0.0, 0.0, 0.06431584, 0.07855555, 0.06541856]),  # noqa: E501
    "kl": (0.09394406, [-0.04200273, -0.06329314, -0.04053594, -0.05556364, -0.06723223, 0.05065971, 0.00208307, 0.05158085, -0.04006992, -0.00026435, 0.06821296, 0.07857429, 0.06021316]),  # noqa: E501
    "bias_corrected_kl": (0.09151315, [-0.04019929, -0.06246496, -0.04111045, -0.05259786, -0.06521898, 0.05085622, 0.00137855, 0.0514006, -0.04523204, -0.0001513, 0.06931104, 0.07858173, 0.06007604]),  # noqa: E501
    "gspo_bias_corrected_kl": (0.06304704, [-0.05247921, -0.04635093, -0.04615803, -0.05580007, -0.05632529, -0.00112469, 0.00168638, 0.00128565, -0.04523204, 0.05722148, 0.0614543, 0.05750942, 0.05219571]),  # noqa: E501
}  # fmt: skip
LOSSES = {"gspo_bias_corrected_kl": "gspo", "delta": "grpo", "top_entropy_quantile": "grpo", "kl": "grpo"}


@pytest.mark.parametrize("case", TRL)
def test_loss_and_gradient_are_those_of_trl(case):
    logp, old, ref, entropy = (torch.tensor(x, dtype=torch.float64) for x in (LOGP, OLD, REF, ENTROPY))
    lengths, adv = torch.tensor(LENGTHS), torch.tensor(ADVANTAGES, dtype=torch.float64)
    mask = torch.arange(5) < lengths[:, None]
    logp.requires_grad_()
    loss_type = LOSSES.get(case, "grpo" if case == "bias_corrected_kl" else case)
    clip = Clip(0.2, 1.5 if case == "cispo" else 0.28, 1.3 if case == "delta" else None)
    j, _, _, ratio = surrogate(logp, old, adv, mask, clip, loss_type=loss_type)
    if case == "top_entropy_quantile":
        j = j * (entropy >= entropy_threshold(entropy[mask].numpy(), 0.5))
    w = torch.from_numpy(token_weights(np.array([LENGTHS]), np.ones((1, 4), bool), loss_type, constant=7, n=4)[0])
    loss = -(w[:, None] * mask * j).sum()
    if "kl" in case:
        corrected = ratio if "bias" in case else None
        kl = kl_penalty("k3", Scored(logp, mask), Scored(ref, mask), ratio=corrected)
        loss = loss + 0.3 * (w[:, None] * kl).sum()
    (grad,) = torch.autograd.grad(loss, logp)
    expected, gradient = TRL[case]
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-6)
    np.testing.assert_allclose(grad[mask].numpy(), gradient, atol=1e-6)
    assert (grad[~mask] == 0).all()


def test_optimiser_steps_of_a_rollout_share_its_tokens():
    "dapo weights tokens by the whole rollout, bnpo by those of the step; two steps of dapo are one of bnpo and half."  # noqa: E501
    lengths = np.array([[4, 2], [3, 7]])
    first = np.array([[True, True], [False, False]])
    sizes = {"constant": 9, "n": 2}
    dapo = token_weights(lengths, first, "dapo", **sizes, rollout_tokens=16 / 2)
    bnpo = token_weights(lengths, first, "bnpo", **sizes, rollout_tokens=16 / 2)
    np.testing.assert_allclose(dapo, [[1 / 8, 1 / 8], [0, 0]])
    np.testing.assert_allclose(bnpo, [[1 / 6, 1 / 6], [0, 0]])


def test_the_full_divergence_is_finite_whatever_was_cut():
    g = torch.Generator().manual_seed(0)
    logits, other = torch.randn(20, 9, generator=g), torch.randn(20, 9, generator=g)
    cut = lambda x, k: x.masked_fill(x < x.topk(k).values[..., -1:], -torch.inf).log_softmax(-1)
    p, q = cut(logits, 4).requires_grad_(), cut(other, 4)
    kl = full_kl(p, q)
    (grad,) = torch.autograd.grad(kl.sum(), p)
    assert kl.isfinite().all() and (kl >= -1e-6).all() and grad.isfinite().all()
    for row, a, b in zip(kl.tolist(), p.detach(), q, strict=True):
        common = [v for v in range(9) if a[v] > -torch.inf and b[v] > -torch.inf]
        za, zb = (sum(np.exp(float(x[v])) for v in common) for x in (a, b))
        by_hand = sum(
            np.exp(float(a[v])) / za * (float(a[v]) - np.log(za) - float(b[v]) + np.log(zb)) for v in common
        )
        assert row == pytest.approx(by_hand, abs=1e-5)
    nothing = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    assert float(full_kl(*nothing)) == 0
