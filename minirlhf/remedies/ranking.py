"""Ranking losses that take a spurious axis out of the reward model: length, in two ways.

Both give length a place of its own in the model of the *labels*, fit it together with r, and
drop it afterwards: what PPO climbs is an ordinary RewardModel. Each is an objective for
train_reward, so the loop, the optimiser and the checkpoints are those of the plain fit.

A covariate is one number. It is right where the longer answer wins for its length alone; where
length goes with a quality that r is slow to see, it takes some of that too. ODIN asks for more:
r_Q may not correlate with length at all over a batch's answers, deserved length included.
Covariates may be any difference between two answers. Left out: fixes of the pairs, which need no
other loss.

Sources: Dubois et al. (2024, arXiv 2404.04475): the length term, there in a model of a judge.
Chen et al. (2024, arXiv 2402.07319) and its published code: both weights 1, heads of unit length;
left out are two things of the code, centred weights and a third term |corr(r_Q + r_L, length)|.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.reward import (
    Progress,
    RankedPairs,
    RewardConfig,
    RewardModel,
    bradley_terry_loss,
    score_pairs,
    train_reward,
)

NEWTON_RATE = 0.05  # of the way to a batch's own optimum: phi follows the last twenty or so


def _silent(step: int, total: int, metrics: dict[str, float]) -> None:
    """No progress is reported."""


def length_difference(pairs: RankedPairs) -> Tensor:
    """Winner's minus loser's length [N, 1], tokens."""
    return (pairs.chosen_mask.sum(1) - pairs.rejected_mask.sum(1))[:, None]


class Covariates:
    """-log sigmoid(r_w - r_l + sum_k phi_k tanh(d_k / s_k)), the phi fitted along with r.

    d_k is a difference between winner and loser (of length, say), s_k its standard deviation
    taken over both orders of every pair (a root mean square), so that it does not depend on who
    won. phi_k is in nats: how much surer a label is of the one of two answers that r finds equal
    which is far ahead in k.
    """

    def __init__(self, differences: Tensor):
        """differences [N, K]. Raises ValueError if one of them is 0 in every pair."""
        differences = differences.float()
        self.scale = differences.square().mean(0).sqrt()  # (K,)
        if not (self.scale > 0).all():
            raise ValueError(
                f"covariate {int(self.scale.argmin())} is alike in both answers of every pair: "
                "there is nothing to take out"
            )
        self.terms = (differences / self.scale).tanh()  # (N, K)
        self.phi = torch.zeros_like(self.scale)
        for _ in range(200):  # starts at its optimum for r = 0, or r would take length in first
            self._newton(torch.zeros_like(self.terms[:, 0]), self.terms)

    def __call__(
        self, model: RewardModel, pairs: RankedPairs, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss at the present phi and the gaps of r alone; then phi takes its own step."""
        chosen, rejected = score_pairs(model, pairs, rows)
        gaps = chosen - rejected
        terms = self.terms[rows].to(gaps)
        self.phi = self.phi.to(gaps)  # dtype and device of the model
        # phi takes out what length alone would win: as a margin it counts against the gap
        loss = bradley_terry_loss(chosen, rejected, margin=-(terms @ self.phi))
        self._newton(gaps.detach(), terms)
        return loss, gaps

    def _newton(self, gaps: Tensor, terms: Tensor) -> None:
        """A damped Newton step: at any learning rate of r, phi is where the labels put it."""
        p = (gaps + terms @ self.phi).sigmoid()
        slope = terms.T @ (1 - p) / len(p)
        curve = terms.T @ ((p * (1 - p))[:, None] * terms) / len(p)
        curve.diagonal().add_(1e-3)  # where every label is sure, the curve is flat
        self.phi = self.phi + NEWTON_RATE * torch.linalg.solve(curve, slope)


def fit_with_covariates(
    model: RewardModel,
    pairs: RankedPairs,
    config: RewardConfig,
    *,
    generator: torch.Generator,
    progress: Progress = _silent,
    differences: Callable[[Any], Tensor] = length_difference,
) -> Tensor:
    """Fit r with covariates (length alone, unless given) and drop them; phi [K], in nats.

    Raises as train_reward and Covariates do.
    """
    covariates = Covariates(differences(pairs))
    train_reward(model, pairs, config, generator=generator, progress=progress, objective=covariates)
    return covariates.phi


class UnitHeads(nn.Linear):
    """Linear heads without a bias whose weights are used at length 1.

    A correlation is blind to scale. A free head therefore answers the penalty by shrinking, and
    once r_Q is small the penalty's steep gradient keeps it where it is, if need be with the sign
    wrong: it then ranks good below bad, and r_L makes up for it.
    """

    def __init__(self, weight: Tensor):
        super().__init__(weight.shape[1], len(weight), bias=False, device="meta")
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """States [..., D] -> scores [..., K]."""
        return F.linear(x, F.normalize(self.weight))


class Odin:
    """The ranking loss of r_Q + r_L, with length pushed out of r_Q and into r_L.

    -log sigmoid(r_w - r_l) + l (|corr(r_Q, |y|)| - corr(r_L, |y|)) + o |cos(W_Q, W_L)|, the
    correlations over all answers of the batch. The model's scalar head must have two outputs,
    quality first: fit_odin gives it them and takes them away.
    """

    def __init__(self, *, length_weight: float = 1.0, orthogonal_weight: float = 1.0):
        """Raises ValueError for a weight below 0."""
        self.length_weight = length_weight
        self.orthogonal_weight = orthogonal_weight
        for name, weight in vars(self).items():
            if not weight >= 0:
                raise ValueError(f"odin.{name} is {weight}; it must be at least 0")

    def __call__(
        self, model: RewardModel, pairs: RankedPairs, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss, and the gaps of r_Q alone."""
        chosen, rejected = score_pairs(model, pairs, rows)  # (B, 2) each
        masks = torch.cat([pairs.chosen_mask[rows], pairs.rejected_mask[rows]])
        quality, length = correlation(torch.cat([chosen, rejected]), masks.sum(1))
        overlap = F.cosine_similarity(*model.trunk.scalar.weight, dim=0)
        # the labels are ranked by the sum of both heads
        loss = bradley_terry_loss(chosen.sum(1), rejected.sum(1))
        # length may not be read off r_Q in either direction; r_L is to hold it
        loss = loss + self.length_weight * (quality.abs() - length)
        loss = loss + self.orthogonal_weight * overlap.abs()
        return loss, (chosen - rejected)[:, 0]


def correlation(scores: Tensor, lengths: Tensor) -> Tensor:
    """Pearson's, over rows: scores [B, K] with lengths [B] -> [K]; 0 where nothing varies."""
    x = scores - scores.mean(0)
    y = (lengths - lengths.to(scores).mean()).to(scores)
    return y @ x / (x.norm(dim=0) * y.norm() + 1e-8)


def fit_odin(
    model: RewardModel,
    pairs: RankedPairs,
    config: RewardConfig,
    *,
    generator: torch.Generator,
    progress: Progress = _silent,
    odin: Odin | None = None,
) -> None:
    """Fit two heads, keep the quality head as the model's own. Raises as train_reward does."""
    trunk = model.trunk
    kept = trunk.scalar
    width = trunk.config.d_model
    start = torch.randn(2, width, generator=generator) * width**-0.5
    trunk.scalar = UnitHeads(start.to(kept.weight))
    objective = odin or Odin()
    try:
        train_reward(
            model, pairs, config, generator=generator, progress=progress, objective=objective
        )
    finally:  # also after an interrupt the model has its one head again
        with torch.no_grad():
            kept.weight.copy_(F.normalize(trunk.scalar.weight)[:1])
        trunk.scalar = kept
