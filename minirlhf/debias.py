"""Ranking losses that take a spurious axis out of the reward model: length, in two ways.

Both give length a place of its own in the model of the *labels*, fit it together with r, and
drop it afterwards: what PPO climbs is an ordinary RewardModel. Each is an objective for
train_reward, so the loop, the optimiser and the checkpoints are those of the plain fit.

The covariate is one number. It is right where the longer answer wins for its length alone; where
length goes with a quality that r is slow to see, it takes some of that too. ODIN asks for more:
r_Q may not correlate with length at all over a batch's answers, deserved length included.
Left out: fixes of the pairs (they need no other loss), spurious axes other than length.

Sources: Dubois et al. (2024, arXiv 2404.04475): the length term, there in a model of a judge.
Chen et al. (2024, arXiv 2402.07319) and its published code: both weights 1, heads of unit length;
left out are two things of the code, centred weights and a third term |corr(r_Q + r_L, length)|.
"""

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


class LengthCovariate:
    """-log sigmoid(r_w - r_l + phi tanh((|y_w| - |y_l|) / s)), phi fitted along with r.

    s is the standard deviation of the length differences, taken over both orders of every pair
    (a root mean square), so that it does not depend on who won. phi is in nats: how much surer
    a label is of the longer one of two answers that r finds equal and that differ far in length.
    """

    def __init__(self, pairs: RankedPairs):
        """Raises ValueError if all answers of a pair are equally long."""
        longer = (pairs.chosen_mask.sum(1) - pairs.rejected_mask.sum(1)).float()
        self.scale = longer.square().mean().sqrt().item()
        if self.scale == 0:
            raise ValueError(
                "every pair's answers are equally long: there is no length to take out"
            )
        self.term = (longer / self.scale).tanh()  # (N,)
        self.phi = 0.0
        for _ in range(200):  # starts at its optimum for r = 0, or r would take length in first
            self._newton(torch.zeros_like(self.term), self.term)

    def __call__(
        self, model: RewardModel, pairs: RankedPairs, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss at the present phi and the gaps of r alone; then phi takes its own step."""
        chosen, rejected = score_pairs(model, pairs, rows)
        term, gaps = self.term[rows], chosen - rejected
        loss = bradley_terry_loss(chosen, rejected, margin=-self.phi * term)
        self._newton(gaps.detach(), term)
        return loss, gaps

    def _newton(self, gaps: Tensor, term: Tensor) -> None:
        """A damped Newton step: at any learning rate of r, phi is where the labels put it."""
        p = (gaps + self.phi * term).sigmoid()
        slope, curve = ((1 - p) * term).mean(), (p * (1 - p) * term.square()).mean()
        self.phi += NEWTON_RATE * float(slope / (curve + 1e-3))


def fit_with_covariate(
    model: RewardModel,
    pairs: RankedPairs,
    config: RewardConfig,
    *,
    generator: torch.Generator,
    progress: Progress = _silent,
) -> float:
    """Fit r with the length covariate and drop it; phi, in nats. Raises as train_reward does."""
    covariate = LengthCovariate(pairs)
    train_reward(model, pairs, config, generator=generator, progress=progress, objective=covariate)
    return covariate.phi


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
        self.length_weight, self.orthogonal_weight = length_weight, orthogonal_weight
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
        loss = bradley_terry_loss(chosen.sum(1), rejected.sum(1))
        loss = loss + self.length_weight * (quality.abs() - length)
        return loss + self.orthogonal_weight * overlap.abs(), (chosen - rejected)[:, 0]


def correlation(scores: Tensor, lengths: Tensor) -> Tensor:
    """Pearson's, over rows: scores [B, K] with lengths [B] -> [K]; 0 where nothing varies."""
    x, y = scores - scores.mean(0), (lengths - lengths.to(scores).mean()).to(scores)
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
    trunk, kept = model.trunk, model.trunk.scalar
    start = torch.randn(2, trunk.config.d_model, generator=generator) * trunk.config.d_model**-0.5
    trunk.scalar = UnitHeads(start.to(kept.weight))
    try:
        train_reward(
            model, pairs, config, generator=generator, progress=progress, objective=odin or Odin()
        )
    finally:
        with torch.no_grad():
            kept.weight.copy_(F.normalize(trunk.scalar.weight)[:1])
        trunk.scalar = kept
