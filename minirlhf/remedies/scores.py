"""What a remedy can do to the scores between the reward model and PPO.

Each rule takes a scorer (prompts, responses, mask) -> [B] and the run, and gives back a scorer.
Left out: which of them is worth trying (remedies/arms.py), and the KL that PPO subtracts later.

Sources: Fu et al. (2025, arXiv 2502.18770) for the sigmoid; Yu et al. (2025, arXiv 2503.14476, eq.
13) for the soft overlong penalty; Huang et al. (2024, arXiv 2409.17407) for calibration by length;
Coste et al. (2023, arXiv 2310.02743, section 3) for ensembles.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minirlhf.audit.auditor import answer
from minirlhf.drift.recipe import Run
from minirlhf.ppo import Scorer
from minirlhf.text import right_pad

DRAWS = 2  # answers of the reference to a prompt, by which its usual score and length are known
WIDTH = 3.0  # tokens: how far the smoother of scores over lengths looks
ANNOTATED = 2000  # answers by which the price of length is known
AT_ONCE = 1024  # prompts that the reference answers together


class Usual:
    """What the reference's own answers to a prompt score and measure, for any prompt of the run."""

    def __init__(self, scorer: Scorer, run: Run):
        self.scorer = scorer
        self.run = run
        self.known: dict[bytes, Tensor] = {}  # a prompt's tokens -> (score, length)
        self.look_up(run.desk.encode(run.prompts))

    def look_up(self, prompts: Tensor) -> Tensor:
        """Mean score, reward sd, and mean length, tokens, of the reference's answers: [B, 2]."""
        keys = [row.numpy().tobytes() for row in prompts.cpu()]
        # PPO asks for the same prompts again and again: only the new ones are answered
        new = [i for i, key in enumerate(keys) if key not in self.known]
        for start in range(0, len(new), AT_ONCE):
            rows = new[start : start + AT_ONCE]
            means = self._answered(prompts[torch.tensor(rows, device=prompts.device)], rows[0])
            for i, mean in zip(rows, means, strict=True):
                self.known[keys[i]] = mean
        return torch.stack([self.known[key] for key in keys])

    def _answered(self, prompts: Tensor, first: int) -> Tensor:
        """The same [B, 2] of prompts that are answered now; `first` sets their random numbers."""
        means = torch.zeros(len(prompts), 2, device=prompts.device)
        for draw in range(DRAWS):
            seed = self.run.stream(f"usual {draw}") + first
            asked = prompts.to(self.run.device)
            responses, mask = answer(self.run.desk, self.run.reference, asked, seed)
            scores = self.scorer(prompts, responses, mask)
            means = means + torch.stack([scores, mask.sum(1)], 1) / DRAWS
        return means


def centred(scorer: Scorer, run: Run) -> Scorer:
    """r - b(x): against the mean score of the reference's own answers to the prompt."""
    usual = Usual(scorer, run)
    return lambda prompts, said, mask: scorer(prompts, said, mask) - usual.look_up(prompts)[:, 0]


def par(scorer: Scorer, run: Run) -> Scorer:
    """sigma(r - b(x)), b the mean score of the reference's answers (the paper averages sigmas over
    reference answers instead): a gap of g counts as g/4 at most, and less the better the answer."""
    against = centred(scorer, run)
    return lambda prompts, said, mask: against(prompts, said, mask).sigmoid()


def capped(scorer: Scorer, run: Run, *, cap: float = 1.0) -> Scorer:
    """min(r, cap), reward sd."""
    return lambda prompts, said, mask: scorer(prompts, said, mask).clamp(max=cap)


def length_penalty(scorer: Scorer, run: Run, *, alpha: float = 0.08) -> Scorer:
    """r - alpha |y|: alpha in reward sd a token, about what the default reward model pays."""
    return lambda prompts, said, mask: scorer(prompts, said, mask) - alpha * mask.sum(1)


def soft_overlong(scorer: Scorer, run: Run, *, cache: int = 16) -> Scorer:
    """Nothing up to `cache` tokens below the cap, then linearly down to -1 at the cap."""
    free = run.config.ppo.max_new_tokens - cache

    def scored(prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        over = (mask.sum(1) - free) / cache
        return scorer(prompts, responses, mask) - over.clamp(0, 1)

    return scored


def calibrated(scorer: Scorer, run: Run) -> Scorer:
    """r - f(|y|), f a smooth fit of the scores of annotated answers over their lengths."""
    price = _price_of_length(scorer, run)
    return lambda prompts, said, mask: scorer(prompts, said, mask) - price[mask.sum(1)]


def _price_of_length(scorer: Scorer, run: Run) -> Tensor:
    """f [longest + 1]: scores of fresh answers, smoothed over lengths by a normal kernel."""
    desk = run.desk
    rng = np.random.default_rng(run.stream("calibration"))
    prompts = desk.prompts(ANNOTATED, rng)
    texts = [desk.candidate(prompt, rng) for prompt in prompts]
    ids = [[*desk.vocabulary.encode(text), desk.vocabulary.eos] for text in texts]
    responses, mask = right_pad(ids, desk.max_response)
    asked = desk.encode(prompts).to(run.device)
    mask = mask.to(run.device)
    scores = scorer(asked, responses.to(run.device), mask)
    lengths = mask.sum(1)
    grid = torch.arange(desk.max_response + 1, device=run.device)
    away = (grid[:, None] - lengths) / WIDTH  # (grid, answers)
    near = torch.exp(-0.5 * away.square())
    return (near * scores).sum(1) / near.sum(1)


def ensemble(
    scorer: Scorer,
    run: Run,
    *,
    how: Literal["mean", "min", "uwo"],
    members: int = 3,
    penalty: float = 0.5,
) -> Scorer:
    """Scores by several reward models, the ordinary one and others trained on its pairs resampled
    and in another order: their mean, their minimum, or the mean minus `penalty` times their
    variance (uwo)."""
    others = [run.member(number) for number in range(1, members)]

    def scored(prompts: Tensor, responses: Tensor, mask: Tensor) -> Tensor:
        each = [scorer(prompts, responses, mask)]
        for other in others:
            each.append(other.score(prompts, responses, mask))
        scores = torch.stack(each)  # (members, B)
        if how == "min":
            return scores.min(0).values
        if how == "uwo":
            return scores.mean(0) - penalty * scores.var(0)
        return scores.mean(0)

    return scored
