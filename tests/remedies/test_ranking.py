"""Length taken out of the ranking: closed forms, an independent regression, and what is kept.

Bugs planted by hand that each fail here (the test in brackets): phi with the other sign in the
loss (share of labels), the Newton step downhill (share of labels), the covariate's sign from
rejected to chosen (regression), |corr(r_Q)| rewarded (float64 sum), corr(r_L) punished (float64
sum), the length head kept instead of the quality head (ODIN's training).
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from fakes import tiny_model
from torch import Tensor, nn

from minirlhf.model import Transformer, TransformerConfig
from minirlhf.remedies.ranking import (
    Covariates,
    Odin,
    UnitHeads,
    correlation,
    fit_odin,
    fit_with_covariates,
    length_difference,
)
from minirlhf.reward import RewardConfig, RewardModel, plain_ranking, score_pairs, train_reward

GOOD, BAD, FILLER = 3, 4, 5


@dataclass(frozen=True)
class Pairs:
    prompts: Tensor
    chosen: Tensor
    chosen_mask: Tensor
    rejected: Tensor
    rejected_mask: Tensor


def answers(good: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """One telling token and then filler: responses and mask [N, width]."""
    mask = torch.arange(width) < lengths[:, None]
    responses = torch.where(mask, FILLER, 0)
    responses[:, 0] = torch.where(good, GOOD, BAD)
    return responses, mask


def labelled(
    seed: int, count: int, *, quality: float, length, width: int = 8, skew: int = 1
) -> tuple[Pairs, np.ndarray, np.ndarray]:
    """Pairs ranked with probability sigmoid(quality dq + length(dlen)); dq, dlen of the winner."""
    g = torch.Generator().manual_seed(seed)
    good = torch.randint(0, 2, (2, count), generator=g).bool()
    lengths = 1 + (width * torch.rand(2, count, generator=g) ** skew).long()
    dq, dlen = (x[0].double() - x[1].double() for x in (good, lengths))
    wins = torch.rand(count, generator=g, dtype=torch.float64)
    wins = wins < (quality * dq + length(dlen)).sigmoid()
    first, second = (answers(good[i], lengths[i], width) for i in (0, 1))
    won, lost = zip(
        *((torch.where(wins[:, None], a, b), torch.where(wins[:, None], b, a))
          for a, b in zip(first, second, strict=True)), strict=True,
    )  # fmt: skip
    pairs = Pairs(torch.full((count, 1), 2), *won, *lost)
    sign = torch.where(wins, 1.0, -1.0).double()
    return pairs, (dq * sign).numpy(), (dlen * sign).numpy()


class Linear(RewardModel):
    """A reward model without a Transformer: w . (the good token, length in tokens / 10)."""

    def __init__(self):
        nn.Module.__init__(self)
        self.trunk = nn.Linear(2, 1, bias=False, device="meta").to_empty(device="cpu").double()
        nn.init.zeros_(self.trunk.weight)

    def forward(self, prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        seen = torch.stack([(responses[:, 0] == GOOD).double(), mask.sum(1).double() / 10], 1)
        return self.trunk(seen)[:, 0]


def logistic(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Newton's method on mean log(1 + exp(-x w)), all labels 1: w and its standard errors."""
    w = np.zeros(x.shape[1])
    for _ in range(30):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x
        w = w + np.linalg.solve(hessian, x.T @ (1 - p))
    return w, np.sqrt(np.diag(np.linalg.inv(hessian)))


# --- the covariate ----------------------------------------------------------------------------


def test_phi_is_the_log_odds_of_the_longer_one_where_nothing_else_differs():
    """All differences are +-3 tokens, so that s = 3, and r = 0: sigmoid(phi tanh 1) = share."""
    longer = torch.tensor([True] * 13 + [False] * 3)
    good = torch.ones(16, dtype=torch.bool)
    won, lost = (answers(good, torch.where(x, 5, 2), 8) for x in (longer, ~longer))
    pairs = Pairs(torch.full((16, 1), 2), *won, *lost)
    covariate, model, rows = Covariates(length_difference(pairs)), Linear(), torch.arange(16)
    best = math.log(13 / 3) / math.tanh(1)
    assert covariate.scale.item() == pytest.approx(3.0, rel=1e-6)
    assert covariate.phi.item() == pytest.approx(best, rel=1e-4)  # where it starts
    covariate.phi.zero_()
    first, _ = covariate(model, pairs, rows)  # type: ignore[arg-type]
    assert first.item() == pytest.approx(math.log(2), abs=1e-7) and covariate.phi > 0
    for _ in range(400):
        loss, gaps = covariate(model, pairs, rows)  # type: ignore[arg-type]
    assert covariate.phi.item() == pytest.approx(best, rel=1e-4)  # and where it goes
    entropy = -(13 * math.log(13 / 16) + 3 * math.log(3 / 16)) / 16
    assert loss.item() == pytest.approx(entropy, abs=1e-6) and not gaps.any()


def test_two_covariates_are_the_logistic_regression_of_two():
    """r = 0: phi is a float64 logistic regression on both differences, which are correlated."""
    rng = np.random.default_rng(0)
    d = rng.normal(size=(4000, 2)) @ np.array([[3.0, 1.0], [0.0, 1.0]])
    terms = np.tanh(d / np.sqrt((d**2).mean(0)))
    won = rng.random(4000) < 1 / (1 + np.exp(-terms @ [1.2, -0.7]))
    toward = np.where(won, 1, -1)[:, None] * d  # winner minus loser
    found = Covariates(torch.tensor(toward))
    expected, _ = logistic(np.tanh(toward / np.sqrt((d**2).mean(0))))
    np.testing.assert_allclose(found.phi.numpy(), expected, atol=2e-3)
    assert found.phi[0] > 0.9 and found.phi[1] < -0.5
    with pytest.raises(ValueError, match="covariate 1 is alike"):
        Covariates(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))


def test_the_joint_fit_is_the_logistic_regression_and_r_has_no_length_slope(monkeypatch):
    """Well specified: q + b tanh(dlen / s). An independent float64 regression finds the same."""
    monkeypatch.setattr(
        "minirlhf.remedies.ranking.NEWTON_RATE", 0.5
    )  # a batch is all pairs: no noise
    b, drawn = 1.5, {"count": 3000, "width": 30, "skew": 4}  # few answers are very long
    _, _, dlen = labelled(0, quality=1.0, length=lambda d: 0 * d, **drawn)
    s = math.sqrt(np.square(dlen).mean())
    pairs, dq, dlen = labelled(0, quality=1.0, length=lambda d: b * (d / s).tanh(), **drawn)
    config = RewardConfig(epochs=300, batch=3000, lr=0.1, weight_decay=0.0)
    model, plain = Linear(), Linear()
    g = torch.Generator()
    phi = fit_with_covariates(model, pairs, config, generator=g)  # type: ignore[arg-type]
    train_reward(plain, pairs, replace(config, epochs=200), generator=g)  # type: ignore[arg-type]
    x = np.stack([dq, dlen / 10, np.tanh(dlen / s)], 1)
    expected, se = logistic(x)
    found = np.array([*model.trunk.weight[0].tolist(), phi.item()])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (abs(found - [1.0, 0.0, b]) < 2.5 * se).all()
    without, without_se = logistic(x[:, :2])
    np.testing.assert_allclose(plain.trunk.weight[0].tolist(), without, atol=1e-3)
    assert without[1] > 10 * without_se[1]  # without the covariate r takes length in
    assert abs(found[1]) < 0.4 * without[1]


def test_without_a_difference_in_length_the_loss_is_the_plain_one_to_the_bit():
    pairs, _, _ = labelled(1, 128, quality=2.0, length=lambda d: 0 * d)
    config, models = RewardConfig(batch=32, lr=1e-2), [fresh(), fresh()]
    covariate = Covariates(length_difference(pairs))
    covariate.terms.zero_()
    covariate.phi.zero_()
    histories = [
        train_reward(m, pairs, config, generator=torch.Generator().manual_seed(0), objective=o)
        for m, o in zip(models, (plain_ranking, covariate), strict=True)
    ]
    assert histories[0] == histories[1] and covariate.phi == 0
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


def fresh(seed: int = 0) -> RewardModel:
    config = TransformerConfig(6, 24, d_model=16, n_layer=1, n_head=2)
    return RewardModel(Transformer(config, generator=torch.Generator().manual_seed(seed)))


CONFIG = RewardConfig(epochs=2, batch=64, lr=5e-3)


def matched_gap(model: RewardModel) -> float:
    """Mean score of an answer with six tokens of filler more, minus the same answer's."""
    good, lengths = torch.tensor([True, False] * 6), torch.arange(1, 13)
    prompts = torch.full((12, 1), 2)
    short, long = (answers(good, lengths + more, 20) for more in (0, 6))
    return (model.score(prompts, *long) - model.score(prompts, *short)).mean().item()


def test_filler_is_worth_much_less_to_a_transformer_fitted_with_the_covariate():
    pairs, _, dlen = labelled(
        2, 2048, quality=0.0, length=lambda d: 2 * (d / 7.85).tanh(), width=20, skew=3
    )
    assert np.square(dlen).mean() ** 0.5 == pytest.approx(7.85, abs=0.1)
    plain, model = fresh(), fresh()
    train_reward(plain, pairs, CONFIG, generator=torch.Generator().manual_seed(0))
    phi = fit_with_covariates(model, pairs, CONFIG, generator=torch.Generator().manual_seed(0))
    assert matched_gap(plain) > 0.6
    assert abs(matched_gap(model)) < 0.1 * matched_gap(plain)
    assert phi.item() == pytest.approx(2.0, abs=0.3)


def test_pairs_of_equal_lengths_leave_nothing_to_take_out():
    good = torch.tensor([True, False])
    same = answers(good, torch.tensor([3, 5]), 8)
    pairs = Pairs(torch.full((2, 1), 2), *same, *same)
    with pytest.raises(
        ValueError, match="alike in both answers of every pair: there is nothing to take out"
    ):
        Covariates(length_difference(pairs))


# --- ODIN -------------------------------------------------------------------------------------


def two_heads(seed: int = 0) -> RewardModel:
    trunk = tiny_model(seed, vocab=6, n_layer=1)
    g = torch.Generator().manual_seed(seed)
    trunk.scalar.weight = nn.Parameter(torch.randn(2, 8, generator=g, dtype=torch.float64))
    trunk.scalar.bias = nn.Parameter(torch.randn(2, generator=g, dtype=torch.float64))
    return RewardModel(trunk)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 0.0), (0.7, 0.0), (0.0, 0.3)])
@pytest.mark.parametrize("seed", [0, 4])
def test_odins_loss_is_the_sum_of_its_parts_in_float64(weights, seed):
    pairs, _, _ = labelled(3, 40, quality=1.0, length=lambda d: 0.3 * d)
    model, rows = two_heads(seed), torch.arange(5, 37)
    loss, gaps = Odin(length_weight=weights[0], orthogonal_weight=weights[1])(model, pairs, rows)
    parts = [(pairs.chosen, pairs.chosen_mask), (pairs.rejected, pairs.rejected_mask)]
    won, lost = (model.score(pairs.prompts[rows], a[rows], m[rows]).numpy() for a, m in parts)
    lengths = np.concatenate([m[rows].sum(1).numpy() for _, m in parts])
    scores = np.concatenate([won, lost])
    quality, length = (np.corrcoef(scores[:, i], lengths)[0, 1] for i in (0, 1))
    w_q, w_l = model.trunk.scalar.weight.detach().numpy()
    cosine = w_q @ w_l / np.sqrt((w_q @ w_q) * (w_l @ w_l))
    expected = np.log1p(np.exp(-(won - lost).sum(1))).mean()
    expected += weights[0] * (abs(quality) - length) + weights[1] * abs(cosine)
    assert min(abs(quality), abs(length), abs(cosine)) > 0.02  # every part can be seen
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    assert gaps.tolist() == pytest.approx((won - lost)[:, 0], abs=1e-12)


def test_correlation_is_zero_and_its_gradient_finite_where_nothing_varies():
    scores = torch.ones(6, 2, requires_grad=True)
    for x, lengths in ((scores, torch.arange(6)), (scores + torch.randn(
        6, 2, generator=torch.Generator().manual_seed(0)), torch.full((6,), 4))):  # fmt: skip
        found = correlation(x, lengths)
        assert not found.any()
        (grad,) = torch.autograd.grad(found.sum(), scores)
        assert torch.isfinite(grad).all()


def test_heads_are_read_at_length_one_however_large_their_weights_are():
    g = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 16, generator=g, dtype=torch.float64) for n in (2, 5))
    expected = x.numpy() @ (weight / weight.square().sum(1, keepdim=True).sqrt()).numpy().T
    for scale in (1.0, 0.01, 300.0):
        np.testing.assert_allclose(UnitHeads(weight * scale)(x).detach(), expected, rtol=1e-10)


def test_odin_takes_length_out_of_the_head_it_keeps_and_into_the_other():
    pairs, _, _ = labelled(4, 2048, quality=2.0, length=lambda d: 0.5 * d)
    new, dq, _ = labelled(5, 600, quality=2.0, length=lambda d: 0.5 * d)
    plain, model, seen = fresh(), fresh(), []
    train_reward(plain, pairs, CONFIG, generator=torch.Generator().manual_seed(0))
    both = torch.cat([new.chosen_mask, new.rejected_mask]).sum(1)

    def look(step: int, total: int, metrics: dict[str, float]) -> None:
        if step == total:  # both heads are still there
            with torch.no_grad():
                seen.append(correlation(torch.cat(score_pairs(model, new)), both).tolist())

    before = {name: x.shape for name, x in model.state_dict().items()}
    fit_odin(model, pairs, CONFIG, generator=torch.Generator().manual_seed(0), progress=look)
    assert {name: x.shape for name, x in model.state_dict().items()} == before
    with torch.no_grad():
        kept, usual = (torch.cat(score_pairs(m, new))[:, None] for m in (model, plain))
        gaps = torch.sub(*score_pairs(model, new)).numpy()
    quality, length = seen[0]
    assert correlation(kept, both).item() == pytest.approx(quality, abs=1e-5)
    assert abs(quality) < 0.1 and length > 0.95
    assert correlation(usual, both).item() > 0.5
    assert (gaps * dq > 0)[dq != 0].mean() > 0.95  # the telling token, whoever won the label


def test_odin_leaves_one_head_even_if_training_fails():
    pairs, _, _ = labelled(6, 64, quality=1.0, length=lambda d: d)
    model = fresh()
    with torch.no_grad():
        model.trunk.tokens.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"lower reward\.lr"):
        fit_odin(model, pairs, CONFIG, generator=torch.Generator().manual_seed(0))
    assert model.trunk.scalar.weight.shape == (1, 16)
    assert model(pairs.prompts, pairs.chosen, pairs.chosen_mask).shape == (64,)


@pytest.mark.parametrize("name", ["length_weight", "orthogonal_weight"])
def test_a_negative_weight_is_refused(name):
    with pytest.raises(ValueError, match=rf"odin.{name} is -1.0; it must be at least 0"):
        Odin(**{name: -1.0})
