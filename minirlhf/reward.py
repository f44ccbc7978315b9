"""The reward model: a Transformer that ranks answers, trained on pairs.

r(x, y) is the scalar head at the last token of the answer (Xiao and Zhu 2025, arXiv 2501.09223,
chapter 4: h_last W_r). The ranking loss fixes only *differences* between answers to one prompt:
the offset of a score is free, so after training scores are put on a scale on which the
reference's own answers have mean 0 and standard deviation 1, "reward sd". It knows nothing of
what the answers are about. Left out: losses that take a bias out (remedies/ranking.py has two).

Sources: Bradley and Terry (1952); Stiennon et al. (2020, arXiv 2009.01325, section 3.4).
"""

from collections.abc import Callable, Iterator
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minirlhf.config import RewardConfig
from minirlhf.engine.adamw import FlatAdamW, learning_rate
from minirlhf.model import Transformer, answer_scalars

Progress = Callable[[int, int, dict[str, float]], None]


@runtime_checkable  # so that the checker of the tests can ask
class RankedPairs(Protocol):
    """What training reads: prompts [N, P]; winner and loser [N, T] with their masks."""

    @property
    def prompts(self) -> Int[Tensor, "N P"]: ...  # noqa: D102
    @property
    def chosen(self) -> Int[Tensor, "N T"]: ...  # noqa: D102
    @property
    def chosen_mask(self) -> Bool[Tensor, "N T"]: ...  # noqa: D102
    @property
    def rejected(self) -> Int[Tensor, "N T"]: ...  # noqa: D102
    @property
    def rejected_mask(self) -> Bool[Tensor, "N T"]: ...  # noqa: D102


def bradley_terry_loss(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    *,
    margin: float | Float[Tensor, " B"] = 0.0,
) -> Float[Tensor, ""]:
    """Mean of -log sigmoid(r_chosen - r_rejected - margin), in nats; scores [B] each.

    The gradient on r_chosen is -(1 - p) / B with p the modelled chance of the label: a pair that
    is ranked well already teaches nothing.
    """
    # Stiennon et al. (2020, section 3.4); a margin moves the gap at which a label is a toss-up
    gap = chosen - rejected - margin
    return -F.logsigmoid(gap).mean()


class RewardModel(nn.Module):
    """A Transformer read as a scorer, with the scale that makes its scores "reward sd"."""

    mean: Tensor
    sd: Tensor

    def __init__(self, trunk: Transformer, *, mean: float = 0.0, sd: float = 1.0):
        super().__init__()
        self.trunk = trunk
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("sd", torch.tensor(sd))

    def forward(
        self,
        prompts: Int[Tensor, "B P"],
        responses: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> Float[Tensor, "B ..."]:
        """Scores [B] in reward sd of responses [B, T] to prompts [B, P]; differentiable.

        A trunk whose scalar head has K outputs gives [B, K].
        """
        raw = answer_scalars(self.trunk, prompts, responses, mask)
        return (raw - self.mean) / self.sd

    @torch.no_grad()
    def score(
        self,
        prompts: Int[Tensor, "B P"],
        responses: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
        *,
        chunk: int = 1024,
    ) -> Float[Tensor, "B ..."]:
        """As forward(), without gradients, in chunks of rows."""
        chunks = zip(prompts.split(chunk), responses.split(chunk), mask.split(chunk), strict=True)
        return torch.cat([self(*part) for part in chunks])

    def calibrate(
        self,
        prompts: Int[Tensor, "B P"],
        responses: Int[Tensor, "B T"],
        mask: Bool[Tensor, "B T"],
    ) -> None:
        """Set the scale so that these answers (the reference's own) score mean 0, sd 1.

        Raises ValueError if they all score alike, which leaves no unit to measure in.
        """
        # as the trunk says them, whatever scale was set before
        raw = self.score(prompts, responses, mask) * self.sd + self.mean
        if not raw.std() > 1e-6:
            raise ValueError("the reward model gives every reference answer one score; train it")
        self.mean.copy_(raw.mean())
        self.sd.copy_(raw.std())


Rows = Int[Tensor, " B"] | slice
"""which pairs: their numbers, or a stretch of them"""
LossAndGaps = tuple[Float[Tensor, ""], Float[Tensor, " B"]]
Objective = Callable[[RewardModel, RankedPairs, Int[Tensor, " B"]], LossAndGaps]
"""(model, pairs, rows [B]) -> the loss, and the gaps r_chosen - r_rejected [B] of what is kept."""


def plain_ranking(model: RewardModel, pairs: RankedPairs, rows: Int[Tensor, " B"]) -> LossAndGaps:
    """The ranking loss of the scores as they are, and the gaps [B] behind it."""
    chosen, rejected = score_pairs(model, pairs, rows)
    return bradley_terry_loss(chosen, rejected), chosen - rejected


def train_reward(
    model: RewardModel,
    pairs: RankedPairs,
    config: RewardConfig,
    *,
    generator: torch.Generator,
    progress: Progress = lambda step, total, metrics: None,
    objective: Objective = plain_ranking,
) -> list[dict[str, float]]:
    """Fit `model` to ranked pairs in place; one row of metrics per step.

    `objective` is what is minimised (bias can be taken out there). Raises ValueError if the pairs
    do not fill one batch, FloatingPointError if the loss stops being finite.
    """
    count = len(pairs.prompts)
    _demand_one_batch(count, config)
    optimiser = FlatAdamW(
        model.trunk,
        lr=config.lr,
        betas=(0.9, 0.98),  # a short memory of squared gradients, as in SFT
        weight_decay=config.weight_decay,
    )
    total = config.epochs * (count // config.batch)
    history: list[dict[str, float]] = []
    for rows in _batches(count, config, generator):
        rows = rows.to(pairs.prompts.device)
        optimiser.lr = learning_rate(config.lr, len(history), total)
        loss, gaps = objective(model, pairs, rows)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"{config.section} model loss is {loss.item()} at step {len(history)}; "
                f"lower {config.section}.lr ({config.lr}) and train again"
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.clip_grad(config.max_grad_norm)
        optimiser.step()
        accuracy = (gaps > 0).float().mean()
        metrics = {
            f"{config.section}/loss": loss.item(),
            f"{config.section}/accuracy": accuracy.item(),
        }
        history.append(metrics)
        progress(len(history), total, metrics)
    return history


def _demand_one_batch(count: int, config: RewardConfig) -> None:
    if count < config.batch:
        raise ValueError(
            f"{count} pairs do not fill one batch of {config.batch}: draw more pairs or lower "
            f"{config.section}.batch"
        )


def _batches(
    count: int, config: RewardConfig, generator: torch.Generator
) -> Iterator[Int[Tensor, " B"]]:
    """Which pairs each step reads; a pass draws their order anew and drops what fills no batch."""
    whole = count - count % config.batch
    for _ in range(config.epochs):
        order = torch.randperm(count, generator=generator)
        yield from order[:whole].split(config.batch)


def both_answers(
    pairs: RankedPairs, rows: Rows
) -> tuple[Int[Tensor, "both P"], Int[Tensor, "both T"], Bool[Tensor, "both T"]]:
    """Prompts, answers and mask of `rows`, [2N, ...] each: the winners, then the losers."""
    prompts = pairs.prompts[rows].repeat(2, 1)
    answers = torch.cat([pairs.chosen[rows], pairs.rejected[rows]])
    mask = torch.cat([pairs.chosen_mask[rows], pairs.rejected_mask[rows]])
    return prompts, answers, mask


def score_pairs(
    model: RewardModel, pairs: RankedPairs, rows: Rows = slice(None)
) -> tuple[Float[Tensor, "N ..."], Float[Tensor, "N ..."]]:
    """Scores of the winners and of the losers of `rows`, [N] each, in one pass."""
    prompts, answers, mask = both_answers(pairs, rows)
    chosen, rejected = model(prompts, answers, mask).chunk(2)
    return chosen, rejected


@torch.no_grad()
def ranking_accuracy(model: RewardModel, pairs: RankedPairs) -> float:
    """Share of pairs whose winner scores higher; a tie counts one half."""
    chosen, rejected = score_pairs(model, pairs)
    won = (chosen > rejected).double()
    tied = (chosen == rejected).double()
    return (won + 0.5 * tied).mean().item()
