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


class Usual:
    """What the reference's own answers to a prompt score and measure, for any prompt of the run."""

    def __init__(self, scorer: Scorer, run: Run):
        self.scorer, self.run, self.known = scorer, run, {}
        self.look_up(run.desk.encode(run.prompts))

    def look_up(self, prompts: Tensor) -> Tensor:
        """Mean score, reward sd, and mean length, tokens, of the reference's answers: [B, 2]."""
        keys = [row.numpy().tobytes() for row in prompts.cpu()]
        new = [i for i, key in enumerate(keys) if key not in self.known]
        for rows in torch.tensor(new, dtype=torch.long).split(1024) if new else ():
            asked, run = prompts[rows.to(prompts.device)], self.run
            sums = torch.zeros(len(rows), 2, device=prompts.device)
            for draw in range(DRAWS):
                seed = run.stream(f"usual {draw}") + int(rows[0])
                said = answer(run.desk, run.reference, asked.to(run.device), seed)
                sums = sums + torch.stack([self.scorer(asked, *said), said[1].sum(1)], 1) / DRAWS
            self.known |= {keys[i]: s for i, s in zip(rows.tolist(), sums, strict=True)}
        return torch.stack([self.known[key] for key in keys])


def centred(scorer: Scorer, run: Run) -> Scorer:
    """r - b(x): against the mean score of the reference's own answers to the prompt."""
    usual = Usual(scorer, run)
    return lambda prompts, said, mask: scorer(prompts, said, mask) - usual.look_up(prompts)[:, 0]


def par(scorer: Scorer, run: Run) -> Scorer:
    """sigma(r - b(x)), b the mean score of the reference's answers (the paper averages sigmas over
    reference answers instead): a gap of g counts as g/4 at most, and less the better the answer."""
    against = centred(scorer, run)
    return lambda *given: against(*given).sigmoid()


def capped(scorer: Scorer, run: Run, *, cap: float = 1.0) -> Scorer:
    """min(r, cap), reward sd."""
    return lambda *given: scorer(*given).clamp(max=cap)


def length_penalty(scorer: Scorer, run: Run, *, alpha: float = 0.08) -> Scorer:
    """r - alpha |y|: alpha in reward sd a token, about what the default reward model pays."""
    return lambda prompts, said, mask: scorer(prompts, said, mask) - alpha * mask.sum(1)


def soft_overlong(scorer: Scorer, run: Run, *, cache: int = 16) -> Scorer:
    """Nothing up to `cache` tokens below the cap, then linearly down to -1 at the cap."""
    free = run.config.ppo.max_new_tokens - cache

    def scored(prompts: Tensor, said: Tensor, mask: Tensor) -> Tensor:
        return scorer(prompts, said, mask) - ((mask.sum(1) - free) / cache).clamp(0, 1)

    return scored


def calibrated(scorer: Scorer, run: Run) -> Scorer:
    """r - f(|y|), f a smooth fit of the scores of annotated answers over their lengths."""
    rng, desk = np.random.default_rng(run.stream("calibration")), run.desk
    prompts = desk.prompts(2000, rng)
    ids = [[*desk.vocabulary.encode(desk.candidate(p, rng)), desk.vocabulary.eos] for p in prompts]
    said, mask = (x.to(run.device) for x in right_pad(ids, desk.max_response))
    scores, lengths = scorer(desk.encode(prompts).to(run.device), said, mask), mask.sum(1)
    grid = torch.arange(desk.max_response + 1, device=run.device)
    near = torch.exp(-0.5 * ((grid[:, None] - lengths) / WIDTH).square())
    fit = (near * scores).sum(1) / near.sum(1)
    return lambda prompts, said, mask: scorer(prompts, said, mask) - fit[mask.sum(1)]


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

    def scored(prompts: Tensor, said: Tensor, mask: Tensor) -> Tensor:
        first = scorer(prompts, said, mask)
        each = torch.stack([first, *(other.score(prompts, said, mask) for other in others)])
        if how == "min":
            return each.min(0).values
        if how == "uwo":
            return each.mean(0) - penalty * each.var(0)
        return each.mean(0)

    return scored
