"""KL estimators against enumeration, far from zero, for values and for gradients.

Near zero every estimator looks right, whatever its sign or direction; so these tests use the
Bernoulli p = .3, p0 = .01, where KL = .7777 nats and each mistake has another number.
"""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirlhf.kl import ESTIMATORS, AdaptiveKL, FixedKL, exact_kl, kl_k1, kl_k2, kl_k3, kl_tokens

P, P0 = 0.3, 0.01
KL = P * math.log(P / P0) + (1 - P) * math.log((1 - P) / (1 - P0))  # .7777
LOGIT = math.log(P / (1 - P))
# d/dlogit KL(p || p0) = p (1 - p) (logit p - logit p0);  d/dlogit KL(p0 || p) = p - p0
REVERSE = P * (1 - P) * (LOGIT - math.log(P0 / (1 - P0)))  # .787
FORWARD = P - P0  # .290


def bernoulli() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logit, and the log-probs of both outcomes under policy and reference."""
    logit = torch.tensor(LOGIT, dtype=torch.float64, requires_grad=True)
    logp = torch.stack([logit, torch.zeros_like(logit)]).log_softmax(0)
    ref = torch.tensor([P0, 1 - P0], dtype=torch.float64).log()
    return logit, logp, ref


@pytest.mark.parametrize("name, mean", [("k1", KL), ("k2", 1.777), ("k3", KL)])
def test_means_by_enumeration(name, mean):
    _, logp, ref = bernoulli()
    found = (logp.exp() * ESTIMATORS[name](logp, ref)).sum().item()
    assert found == pytest.approx(mean, abs=1e-12 if name != "k2" else 5e-4)


def test_the_swapped_ratio_would_give_chi_squared_minus_kl():
    _, logp, ref = bernoulli()
    p, q = logp.exp(), ref.exp()
    chi_squared = ((p - q).square() / q).sum()
    swapped = (p * kl_k3(-logp, -ref)).sum()  # exp(l) - 1 - l: the frequent bug
    assert swapped.item() == pytest.approx(chi_squared.item() - KL, abs=1e-12)
    assert swapped.item() > 7  # .7777 is far away: enumeration would have caught it


@pytest.mark.parametrize(
    "name, place, gradient",
    [
        ("k1", "loss", 0.0),
        ("k2", "loss", REVERSE),
        ("k3", "loss", FORWARD),
        ("k1", "reward", REVERSE),
        ("k3", "reward", 0.497),
    ],
)
def test_expected_gradient_of_each_estimator_in_each_place(name, place, gradient):
    logit, logp, ref = bernoulli()
    k, p = ESTIMATORS[name](logp, ref), logp.exp().detach()
    # in the loss the estimate is differentiated; in the reward it multiplies grad log pi
    terms = k if place == "loss" else k.detach() * logp
    (found,) = torch.autograd.grad((p * terms).sum(), logit)
    assert found.item() == pytest.approx(gradient, abs=1e-12 if gradient != 0.497 else 5e-4)


def test_published_figures():
    assert [round(x, 4) for x in (KL, FORWARD)] == [0.7777, 0.29]
    assert round(REVERSE, 3) == 0.787


def test_sampled_mean_is_within_three_standard_errors(generator):
    _, logp, ref = bernoulli()
    pick = (torch.rand(40_000, generator=generator) >= P).long()
    for estimate in (kl_k1, kl_k3):
        k = estimate(logp, ref).detach()[pick]
        assert abs(k.mean().item() - KL) < 3 * k.std().item() / len(k) ** 0.5


finite = st.floats(-20, 0)


@given(finite, finite)
def test_k2_and_k3_are_never_negative_and_k1_is_odd(a, b):
    x, y = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert kl_k2(x, y) >= 0 and kl_k3(x, y) >= 0
    assert kl_k1(x, y) == -kl_k1(y, x)
    assert (kl_k1(x, x), kl_k2(x, x), kl_k3(x, x)) == (0, 0, 0)


def test_k3_keeps_its_digits_near_zero():
    # exp(-l) - 1 + l in float32 loses everything here; expm1 keeps the leading l^2 / 2 to 1e-3
    log_ratio = torch.tensor(2e-4)
    exact = math.expm1(-2e-4) + 2e-4
    assert kl_k3(log_ratio, torch.tensor(0.0)).item() == pytest.approx(exact, rel=2e-3)


def test_exact_kl_against_float64_sums_and_its_edges(generator):
    logits = torch.randn(3, 4, 7, generator=generator) * 3
    ref = torch.randn(3, 4, 7, generator=generator) * 3
    p, q = logits.double().softmax(-1), ref.double().softmax(-1)
    torch.testing.assert_close(
        exact_kl(logits, ref).double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-6
    )
    assert exact_kl(logits, ref + 5.0).sub(exact_kl(logits, ref)).abs().max() < 1e-5  # offsets
    assert torch.equal(exact_kl(logits, logits), torch.zeros(3, 4))


def test_exact_kl_of_a_forbidden_token_is_finite_in_value_and_gradient():
    logits = torch.tensor([0.0, 1.0, -math.inf], requires_grad=True)
    kl = exact_kl(logits, torch.zeros(3))
    p = torch.tensor([0.0, 1.0]).softmax(-1)
    assert kl.item() == pytest.approx((p * (3 * p).log()).sum().item(), abs=1e-6)
    (gradient,) = torch.autograd.grad(kl, logits)
    assert gradient.isfinite().all() and gradient[2] == 0
    assert exact_kl(torch.zeros(2), torch.tensor([0.0, -math.inf])).item() == math.inf


def test_sequence_sum_grows_with_length_and_token_mean_does_not():
    totals = {}
    for length in (10, 50, 200):
        logprobs, ref = torch.full((1, 200), -1.0), torch.full((1, 200), -1.15)
        mask = (torch.arange(200) < length)[None]
        for how in ("sequence_sum", "token_mean"):
            kl = kl_tokens(logprobs, ref, mask, aggregation=how)
            assert kl.shape == mask.shape and kl[~mask].eq(0).all()
            totals[how, length] = round(kl.sum().item(), 4)
    # .15 nats a token: the sum makes verbosity pay 1.5, 7.5, 30; the mean always .15
    assert [totals["sequence_sum", n] for n in (10, 50, 200)] == [1.5, 7.5, 30.0]
    assert [totals["token_mean", n] for n in (10, 50, 200)] == [0.15, 0.15, 0.15]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("aggregation", ["sequence_sum", "token_mean"])
def test_kl_tokens_ignores_padding_and_interior_holes(estimator, aggregation):
    logprobs = torch.tensor([[-1.0, 99.0, -3.0, -1e9]])
    ref = torch.tensor([[-2.0, -99.0, -1.0, 7.0]])
    mask = torch.tensor([[True, False, True, False]])
    how = {"estimator": estimator, "aggregation": aggregation}
    kl = kl_tokens(logprobs, ref, mask, **how)
    bare = kl_tokens(logprobs[:, ::2], ref[:, ::2], mask[:, ::2], **how)
    assert torch.equal(kl[:, ::2], bare) and kl[0, 1] == kl[0, 3] == 0
    empty = kl_tokens(logprobs, ref, torch.zeros_like(mask), **how)
    assert torch.equal(empty, torch.zeros_like(ref))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bad", [{"estimator": "k4"}, {"aggregation": "mean"}])
def test_unknown_options_are_named(bad):
    x, mask = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=next(iter(bad.values()))):
        kl_tokens(x, x, mask, **bad)


def test_fixed_beta_stays():
    controller = FixedKL(0.05)
    assert controller.update(1e9, 128) == controller.beta == 0.05


@pytest.mark.parametrize(
    "kl, error", [(6.0, 0.0), (6.6, 0.1), (5.7, -0.05), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)]
)
def test_adaptive_beta_in_closed_form(kl, error):
    controller = AdaptiveKL(beta=0.2, target=6.0, horizon=10_000.0)
    assert controller.update(kl, 256) == pytest.approx(0.2 * (1 + error * 256 / 10_000), rel=1e-12)
    assert controller.beta == controller.update(6.0, 256)  # on target: stays


def test_doubling_beta_takes_as_long_as_its_docstring_says():
    controller, needed = AdaptiveKL(0.2, 6.0, 10_000.0), 0
    while controller.beta < 0.4:
        controller.update(1e6, 256)
        needed += 1
    assert needed == math.ceil(math.log(2) / math.log(1 + 0.2 * 256 / 10_000)) == 136


def test_units_matter():
    # .1 nats a token over 30 tokens is 3 nats an answer: fed per token, a controller with its
    # target per answer would lower beta although the run is at three times the target
    per_answer, per_token = (AdaptiveKL(0.1, 1.0, 1000.0) for _ in range(2))
    assert per_answer.update(3.0, 100) > 0.1 > per_token.update(0.1, 100)


@pytest.mark.parametrize("bad", [(0.1, 0.0, 100.0), (0.1, -1.0, 100.0), (0.1, 6.0, 0.0)])
def test_adaptive_kl_says_which_unit_is_wrong(bad):
    with pytest.raises(ValueError, match=r"must be positive: target in nats per answer"):
        AdaptiveKL(*bad)


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_adaptive_kl_refuses_a_beta_that_it_could_never_move(beta):
    with pytest.raises(ValueError, match="beta"):
        AdaptiveKL(beta, 6.0, 1000.0)


def test_adaptive_beta_never_turns_into_a_bounty():
    controller = AdaptiveKL(0.1, 6.0, horizon=10.0)  # 0.2 * 100 / 10 = 2: the factor would be -1
    betas = [controller.update(0.0, 100) for _ in range(5)]
    assert all(b >= 0 for b in betas) and all(a >= b for a, b in pairwise(betas))
