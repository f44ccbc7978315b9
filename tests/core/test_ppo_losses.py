"""The losses of PPO: truth tables by hand and expected gradients by enumeration."""

from dataclasses import replace

import pytest
import torch
from fakes import every_answer, fake_rollout, tiny_model
from torch import Tensor

from minirlhf.advantages import gae, grpo_advantages, rloo_advantages
from minirlhf.kl import exact_kl
from minirlhf.model import response_logprobs, response_outputs
from minirlhf.ppo import (
    PPO,
    PPOConfig,
    aggregate,
    ppo_policy_loss,
    price_and_credit,
    treat_missing_eos,
    value_loss,
)
from minirlhf.rollout import Rollout

# --- the clipped surrogate --------------------------------------------------------------------

RATIOS = (0.5, 0.9, 1.1, 2.0)
# objective and its derivative by log pi, at clip .2, for A = +1 then A = -1
TABLE = {
    "schulman": {
        +1: [(0.5, 0.5), (0.9, 0.9), (1.1, 1.1), (1.2, 0.0)],
        -1: [(-0.8, 0.0), (-0.9, -0.9), (-1.1, -1.1), (-2.0, -2.0)],
    },
    "book": {
        +1: [(0.5, 0.5), (0.9, 0.9), (1.1, 1.1), (1.2, 0.0)],
        -1: [(-0.5, -0.5), (-0.9, -0.9), (-1.1, -1.1), (-1.2, 0.0)],
    },
    "none": {
        +1: [(r, r) for r in RATIOS],
        -1: [(-r, -r) for r in RATIOS],
    },
}
CASES = [
    (style, sign, ratio, *cell)
    for style, signs in TABLE.items()
    for sign, cells in signs.items()
    for ratio, cell in zip(RATIOS, cells, strict=True)
]


@pytest.mark.parametrize("style, sign, ratio, objective, slope", CASES)
def test_clip_truth_table(style, sign, ratio, objective, slope):
    old = torch.tensor([[-1.3]], dtype=torch.float64)
    new = (old + torch.tensor(ratio).double().log()).requires_grad_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    advantage = torch.full((1, 1), float(sign), dtype=torch.float64)
    loss = ppo_policy_loss(new, old, advantage, mask, clip=0.2, style=style)
    assert loss.item() == pytest.approx(-objective, abs=1e-7)
    loss.backward()
    assert new.grad is not None and new.grad.item() == pytest.approx(-slope, abs=1e-7)


def test_at_ratio_one_the_clip_is_vacuous():
    r = fake_rollout(0)
    gradients = []
    for style in TABLE:
        logprobs = r.logprobs.clone().requires_grad_()
        ppo_policy_loss(logprobs, r.logprobs, r.values, r.mask, style=style).backward()
        gradients.append(logprobs.grad)
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    expected = -r.values * r.mask / r.mask.sum()
    torch.testing.assert_close(gradients[0], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("unchecked")
def test_unknown_styles_are_named():
    x, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="'shulman': use schulman, book or none"):
        ppo_policy_loss(x, x, x, mask, style="shulman")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no aggregation 'mean'"):
        aggregate(x, mask, "mean")


# --- aggregation ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how, short, long",
    [
        ("token_mean", 1 / 5, 1 / 5),  # every token alike
        ("sequence_mean", 1 / 2, 1 / 8),  # a long answer's tokens count less: 1 / (B |y|)
        ("sequence_sum", 1 / 2, 1 / 2),  # every token in full
    ],
)
def test_gradient_per_token_against_length(how, short, long):
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    aggregate(x, mask, how).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[short, 0, 0, 0], [long] * 4]
    wide = torch.nn.functional.pad(x.detach(), (0, 3), value=1e30)
    wider = aggregate(wide, torch.nn.functional.pad(mask, (0, 3)), how)
    assert wider.item() == aggregate(x, mask, how).item()


@pytest.mark.parametrize("how", ["token_mean", "sequence_mean", "sequence_sum"])
def test_a_batch_without_tokens_has_no_loss(how):
    x = torch.ones(2, 3)
    assert aggregate(x, torch.zeros(2, 3, dtype=torch.bool), how) == 0


# --- value loss -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, clip, loss, slope",
    [
        (0.5, None, 0.125, -0.5),
        (0.1, 0.2, 0.405, -0.9),  # inside the band: as without a clip
        (0.5, 0.2, 0.32, 0.0),  # past the band towards the return 1: earns no more
        (-0.5, 0.2, 1.125, -1.5),  # past it the wrong way: the full error pulls back
    ],
)
def test_value_loss_by_hand(value, clip, loss, slope):
    v = torch.tensor([[value, 9.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False]])
    found = value_loss(v, torch.zeros(1, 2), torch.ones(1, 2), mask, clip=clip)
    found.backward()
    assert found.item() == pytest.approx(loss, abs=1e-7)
    assert v.grad is not None
    assert v.grad[0].tolist() == [pytest.approx(slope, abs=1e-7), 0.0]


def test_value_loss_counts_the_tokens_of_the_mask_only():
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    zeros = torch.zeros(2, 4)
    assert value_loss(zeros + 2, zeros, torch.where(mask, 0.0, 99.0), mask).item() == 2.0


# --- missing EOS ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, expected", [("subtract", [2.0, 1.5]), ("replace", [2.0, -0.5]), ("none", [2.0, 2.0])]
)
def test_missing_eos(mode, expected):
    config = PPOConfig(missing_eos=mode, missing_eos_penalty=0.5)
    finished = torch.tensor([True, False])
    assert treat_missing_eos(torch.tensor([2.0, 2.0]), finished, config).tolist() == expected


# --- price and credit -------------------------------------------------------------------------

PLAIN = PPOConfig(whiten_advantages="none", gamma=0.9, lam=0.8)


def credit(rollout: Rollout, config: PPOConfig, beta: float = 0.5) -> dict[str, Tensor]:
    return price_and_credit(rollout, config, beta)


def test_drift_costs_and_agreement_pays_nothing():
    r = fake_rollout(0)
    likes_more = replace(r, ref_logprobs=torch.where(r.mask, r.logprobs - 2.0, 0.0))
    found = credit(likes_more, PLAIN)
    torch.testing.assert_close(found["kl"], 2.0 * r.mask.double())
    lengths = r.mask.sum(1)
    torch.testing.assert_close(found["rewards"].sum(1), r.scores - 0.5 * 2.0 * lengths)
    same = credit(replace(r, ref_logprobs=r.logprobs), PLAIN)
    assert not same["kl"].any()
    torch.testing.assert_close(same["rewards"].sum(1), r.scores)


@pytest.mark.parametrize("place", ["loss", "book_literal", "none"])
def test_kl_elsewhere_is_measured_but_not_charged(place):
    r = fake_rollout(0)
    found = credit(r, replace(PLAIN, kl_place=place))
    assert torch.equal(found["rewards"], credit(r, PLAIN, 0.0)["rewards"])
    torch.testing.assert_close(found["kl"], r.logprobs - r.ref_logprobs)


@pytest.mark.parametrize("whitening", ["none", "scale", "shift_scale"])
def test_returns_are_never_whitened(whitening):
    r = fake_rollout(0)
    found = credit(r, replace(PLAIN, whiten_advantages=whitening))
    raw = gae(found["rewards"], r.values, r.mask, gamma=0.9, lam=0.8)
    torch.testing.assert_close(found["returns"], raw + r.values)
    inside = raw[r.mask]
    shift = inside.mean() if whitening == "shift_scale" else 0.0
    sd = 1.0 if whitening == "none" else inside.std()
    torch.testing.assert_close(found["advantages"][r.mask], (inside - shift) / sd)


def test_whitening_scores_rescales_beta_and_whitening_rewards_does_not():
    r = fake_rollout(0)
    sd = r.scores.std()
    kl = credit(r, PLAIN)["kl"]
    for mode, divisor in (("scores", sd), ("none", torch.tensor(1.0).double())):
        found = credit(r, replace(PLAIN, whiten_rewards=mode))["rewards"]
        # in units of the raw score the price of a nat is beta * sd: with sd .2, a fifth of beta
        torch.testing.assert_close(found.sum(1) * divisor, r.scores - 0.5 * divisor * kl.sum(1))
    plain = credit(r, PLAIN)["rewards"]
    after = credit(r, replace(PLAIN, whiten_rewards="rewards"))["rewards"]
    torch.testing.assert_close(after, torch.where(r.mask, plain / plain[r.mask].std(), 0.0))


def test_whitening_the_score_of_a_single_answer_is_harmless():
    r = fake_rollout(0).select(torch.tensor([1]))
    config = replace(PLAIN, whiten_rewards="scores")
    assert torch.equal(credit(r, config)["rewards"], credit(r, PLAIN)["rewards"])


@pytest.mark.parametrize("kind, baseline", [("rloo", rloo_advantages), ("grpo", grpo_advantages)])
def test_group_baselines_give_every_token_its_answers_advantage(kind, baseline):
    r = fake_rollout(0)
    found = credit(r, replace(PLAIN, advantage=kind, group=2, batch=6, minibatches=1))
    net = r.scores - 0.5 * (r.logprobs - r.ref_logprobs).sum(1)
    expected = torch.where(r.mask, baseline(net, 2)[:, None], 0.0)
    torch.testing.assert_close(found["advantages"], expected)


# --- what each placement of the penalty does to the expected gradient -------------------------

PROMPT = torch.tensor([[0, 3, 2]])


def enumerated(policy, reference, steps: int) -> tuple[Rollout, Tensor]:
    """Every answer of at most `steps` tokens with score and value 0, and its probability."""
    responses, mask = every_answer(4, steps)
    prompts = PROMPT.expand(len(mask), -1)
    with torch.no_grad():
        logprobs, _ = response_logprobs(policy, prompts, responses, mask)
        ref_logprobs, _ = response_logprobs(reference, prompts, responses, mask)
    zeros = torch.zeros_like(logprobs)
    fields = (prompts, responses, mask, logprobs, ref_logprobs, zeros, zeros[:, 0])
    return Rollout(*fields), logprobs.sum(1).exp()


def gradient(loss: Tensor, policy) -> Tensor:
    found = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    pairs = zip(found, policy.parameters(), strict=True)
    return torch.cat([(p * 0 if g is None else g).flatten() for g, p in pairs])


def expected_gradient(policy, reference, steps: int, place: str, estimator: str) -> Tensor:
    """E over answers of the library's own loss gradient, at beta = 1 and score = 0."""
    config = PPOConfig(
        kl_place=place,
        kl_estimator=estimator,
        beta=1.0,
        lam=1.0,
        value_coef=0.0,
        whiten_advantages="none",
        loss_aggregation="sequence_sum",
    )
    rollout, p = enumerated(policy, reference, steps)
    whole = replace(rollout, **price_and_credit(rollout, config, 1.0))
    run = PPO(policy, reference, lambda *given: torch.zeros(1), PROMPT, config)
    losses = [run.loss(whole.select(torch.tensor([i])))[0] for i in range(len(p))]
    return gradient((p * torch.stack(losses)).sum(), policy)


def theory(policy, reference, steps: int, kind: str) -> Tensor:
    """Gradients of the true divergences, by enumeration and nothing of the library's KL code."""
    rollout, p = enumerated(policy, reference, steps)
    given = (rollout.prompts, rollout.responses, rollout.mask)
    if kind == "whole answers":
        logp = response_logprobs(policy, *given)[0].sum(1)
        return gradient((logp.exp() * (logp - rollout.ref_logprobs.sum(1))).sum(), policy)
    logits, ref = response_outputs(policy, *given)[0], response_outputs(reference, *given)[0]
    per_state = (
        exact_kl(logits, ref.detach()) if kind == "reverse" else exact_kl(ref.detach(), logits)
    )
    return gradient((p[:, None] * per_state * rollout.mask).sum(), policy)


PLACEMENTS = [
    ("loss", "k1", None),
    ("book_literal", "k1", None),
    ("none", "k1", None),
    ("loss", "k2", "reverse"),
    ("loss", "k3", "forward"),
    ("reward", "k1", "whole answers"),
]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("place, estimator, kind", PLACEMENTS)
def test_expected_gradient_of_each_placement(place, estimator, kind, steps):
    """A k1 penalty in the loss pushes nowhere; k2 pulls to the reference, k3 by the forward KL.

    In the loss the penalty acts state by state: it does not see that a token leads to states of
    larger KL. In the reward it does, and gives the gradient of the KL of whole answers.
    """
    policy, reference = (tiny_model(s, vocab=4, n_layer=1) for s in (1, 2))
    found = expected_gradient(policy, reference, steps, place, estimator)
    if kind is None:
        assert found.abs().max() < 1e-12
    else:
        expected = theory(policy, reference, steps, kind)
        assert expected.abs().max() > 0.01
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-11)


def test_in_the_loss_and_in_the_reward_differ_beyond_one_token():
    policy, reference = (tiny_model(s, vocab=4, n_layer=1) for s in (1, 2))
    one, two = (
        [theory(policy, reference, steps, kind) for kind in ("reverse", "whole answers")]
        for steps in (1, 2)
    )
    torch.testing.assert_close(one[0], one[1], rtol=1e-8, atol=1e-11)
    assert (two[0] - two[1]).abs().max() > 0.01
