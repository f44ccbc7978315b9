"""The case's three facts in one batch: verbose against concise answers, with intervals.

Left out: what makes an answer verbose (the caller's masks).

Source: Efron and Tibshirani (1993, "An introduction to the bootstrap", chapter 13) for percentile
intervals.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minirlhf.autopsy.convention import demand
from minirlhf.autopsy.parts import AdvantageParts
from minirlhf.engine.intervals import FEWEST, Interval, percentile
from minirlhf.rollout import Rollout


@dataclass(frozen=True)
class Facts:
    """The case's three facts for the matched answers of one stratum."""

    n_verbose: int
    n_concise: int
    prompts: int
    """prompts that these answers reply to"""
    coverage: float
    """nominal coverage of each interval by itself"""
    intervals: dict[str, dict[str, Interval]]
    """quantity -> "verbose", "concise" or "gap" (verbose minus concise); quantities: score [reward
    sd], kl [log-ratio summed over an answer, nats], advantage [mean over an answer's tokens],
    positive_share [of tokens], and reward_part, kl_part, ... of the advantage where parts are
    given"""

    @property
    def holds(self) -> tuple[bool, bool, bool]:
        """(a) the score prefers verbose, (b) verbose answers cost KL, and more of it than concise
        ones, (c) their advantage is positive: each with an interval that excludes zero."""
        score, kl, advantage = (self.intervals[k] for k in ("score", "kl", "advantage"))
        costly = min(kl["verbose"].low, kl["gap"].low) > 0
        return score["gap"].low > 0, costly, advantage["verbose"].low > 0


def three_facts(
    rollout: Rollout,
    verbose: Tensor,
    concise: Tensor,
    *,
    rng: np.random.Generator,
    strata: np.ndarray | None = None,
    parts: AdvantageParts | None = None,
    match: Literal["stratum", "prompt"] = "stratum",
    coverage: float = 0.95,
    resamples: int = 2000,
) -> dict[str, Facts]:
    """Facts per stratum, with percentile intervals from resampling whole prompts.

    verbose and concise are bool [B], strata [B] names (None: one stratum, "all"). Matched within
    the stratum, every answer counts once; within the prompt, only prompts with answers of both
    kinds count, each once. Empty rows are left out, and so are strata without matched answers.
    Raises ValueError for a batch without advantages or answers of a kind.
    """
    kinds = torch.stack([verbose, concise], 1) & rollout.mask.any(1)[:, None]
    if not kinds.any(0).all():
        raise ValueError("no answer of this batch is verbose, or none is concise: nothing to match")
    prompt = _prompt_numbers(rollout)
    names = np.full(len(rollout), "all") if strata is None else np.asarray(strata)
    measured, found = _measures(rollout, parts), {}
    for name in np.unique(names[kinds.any(1).numpy(force=True)]):
        side = kinds.numpy(force=True) & (names == name)[:, None]  # (B, 2)
        counts = np.stack([np.bincount(prompt[s], minlength=len(prompt)) for s in side.T], 1)
        kept = (np.all if match == "prompt" else np.any)(counts > 0, axis=1)
        if not kept.any():
            continue
        weight = side * kept[prompt][:, None]
        shown = [int(n) for n in weight.sum(0)]
        weight = weight / counts[prompt].clip(1) if match == "prompt" else weight
        member = prompt == np.flatnonzero(kept)[:, None]  # (prompts, B)
        draws = rng.multinomial(len(member), np.full(len(member), 1 / len(member)), resamples)
        sums = {k: [member @ (weight * x[:, None]) for x in m] for k, m in measured.items()}
        intervals = {k: _intervals(a, b, draws, coverage) for k, (a, b) in sums.items()}
        found[str(name)] = Facts(shown[0], shown[1], len(member), coverage, intervals)
    return found


def _prompt_numbers(rollout: Rollout) -> np.ndarray:
    """Which prompt each row answers, [B] from 0."""
    asked = rollout.prompts if rollout.index is None else rollout.index[:, None]
    return torch.unique(asked, dim=0, return_inverse=True)[1].numpy(force=True)


def _measures(rollout: Rollout, parts: AdvantageParts | None) -> dict[str, tuple]:
    """Numerator and denominator [B] of what is compared, by name."""
    demand(rollout, "logprobs", "ref_logprobs", "advantages", "scores")
    assert rollout.advantages is not None
    mask, one, n = rollout.mask, torch.ones_like(rollout.scores), rollout.lengths
    tokens = {"advantage": rollout.advantages}
    tokens |= {} if parts is None else {f"{k}_part": x for k, x in vars(parts).items()}
    log_ratio = torch.where(mask, rollout.logprobs.double() - rollout.ref_logprobs, 0.0)
    found = {"score": (rollout.scores, one), "kl": (log_ratio.sum(1), one)}
    for name, x in ((name, x) for name, x in tokens.items() if x is not None):
        found[name] = (torch.where(mask, x.double(), 0.0).sum(1) / n.clamp(min=1), one)
    found["positive_share"] = (((rollout.advantages > 0) & mask).sum(1), n)
    return {k: tuple(x.double().numpy(force=True) for x in pair) for k, pair in found.items()}


def _intervals(above: np.ndarray, below: np.ndarray, draws: np.ndarray, coverage: float) -> dict:
    """Ratios of sums [prompts, 2] (verbose, concise), over all prompts and over each draw."""
    draws = np.vstack([np.ones_like(draws[:1]), draws])
    with np.errstate(invalid="ignore"):
        ratios = (draws @ above) / (draws @ below)
    ratios[1:, (below > 0).sum(0) < FEWEST] = np.nan

    def interval(x: np.ndarray) -> Interval:  # a draw may lack all answers of a kind: nan
        return percentile(float(x[0]), x[1:], coverage)

    columns, names = (*ratios.T, ratios[:, 0] - ratios[:, 1]), ("verbose", "concise", "gap")
    return {name: interval(x) for name, x in zip(names, columns, strict=True)}
