"""The case's three facts in one batch: verbose against concise answers, each with an interval.

A question is put to every answer (its score, its KL, its advantage, the parts of that) and the
means of the two kinds are compared within a stratum. Answers to one prompt hang together, so it is
prompts that are resampled, each with all its answers.
Left out: what makes an answer verbose (the caller's masks), several batches taken together
(drift/batches.py), and why an advantage is what it is (parts.py).

Source: Efron and Tibshirani (1993, "An introduction to the bootstrap", chapter 13) for intervals
from percentiles.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minirlhf.autopsy.convention import demand_fields
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
        kl = self.intervals["kl"]
        preferred = self.intervals["score"]["gap"].low > 0
        costly = min(kl["verbose"].low, kl["gap"].low) > 0
        raised = self.intervals["advantage"]["verbose"].low > 0
        return preferred, costly, raised


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
    kinds = torch.stack([verbose, concise], 1)  # [B, 2], as every pair of columns below
    kinds = (kinds & rollout.mask.any(1)[:, None]).numpy(force=True)
    if not kinds.any(0).all():
        raise ValueError("no answer of this batch is verbose, or none is concise: nothing to match")
    names = np.full(len(rollout), "all") if strata is None else np.asarray(strata)
    prompt = _prompt_numbers(rollout)
    measures = _measures(rollout, parts)
    found = {}
    for name in np.unique(names[kinds.any(1)]):
        here = kinds & (names == name)[:, None]
        asked, weights = _matched(here, prompt, match)
        if not len(asked):
            continue
        # a resample says how often each prompt is drawn: [resamples, prompts]
        draws = rng.multinomial(len(asked), np.full(len(asked), 1 / len(asked)), resamples)
        member = prompt == asked[:, None]  # [prompts, B]
        intervals = {}
        for quantity, (above, below) in measures.items():
            # summed over the answers to each prompt first: a draw then only adds up prompts
            above_sums = member @ (weights * above[:, None])
            below_sums = member @ (weights * below[:, None])
            intervals[quantity] = _intervals(above_sums, below_sums, draws, coverage)
        n_verbose, n_concise = (weights > 0).sum(0).tolist()
        found[str(name)] = Facts(n_verbose, n_concise, len(asked), coverage, intervals)
    return found


def _prompt_numbers(rollout: Rollout) -> np.ndarray:
    """Which prompt each row answers, [B] from 0."""
    asked = rollout.prompts if rollout.index is None else rollout.index[:, None]
    _, number = torch.unique(asked, dim=0, return_inverse=True)
    return number.numpy(force=True)


def _matched(kinds: np.ndarray, prompt: np.ndarray, match: str) -> tuple[np.ndarray, np.ndarray]:
    """The prompts that count, as numbers, and the weight [B, 2] of each answer: as a verbose and as
    a concise one. kinds [B, 2] is which of the two it is, prompt [B] which prompt it replies to."""
    verbose = np.bincount(prompt[kinds[:, 0]], minlength=len(prompt))
    concise = np.bincount(prompt[kinds[:, 1]], minlength=len(prompt))
    if match == "prompt":
        counted = (verbose > 0) & (concise > 0)
        # a prompt counts once, so its answers of a kind share that one
        answers = np.stack([verbose, concise], 1)[prompt]
        weights = kinds * counted[prompt][:, None] / answers.clip(1)
    else:
        counted = verbose + concise > 0
        weights = kinds.astype(float)
    return np.flatnonzero(counted), weights


def _measures(rollout: Rollout, parts: AdvantageParts | None) -> dict[str, tuple[np.ndarray, ...]]:
    """What is compared, by name: numerator and denominator [B] of each answer, float64.

    A denominator of 1 makes a mean over answers, that of the length a share of tokens.
    """
    demand_fields(rollout, "logprobs", "ref_logprobs", "advantages", "scores")
    assert rollout.advantages is not None
    mask = rollout.mask
    one = torch.ones_like(rollout.scores)
    log_ratio = torch.where(mask, rollout.logprobs.double() - rollout.ref_logprobs, 0.0)
    found = {"score": (rollout.scores, one), "kl": (log_ratio.sum(1), one)}

    of_tokens = {"advantage": rollout.advantages}
    if parts is not None:
        for name, part in parts.tensors().items():
            of_tokens[f"{name}_part"] = part
    for name, x in of_tokens.items():
        sums = torch.where(mask, x.double(), 0.0).sum(1)
        found[name] = (sums / rollout.lengths.clamp(min=1), one)

    positive = (rollout.advantages > 0) & mask
    found["positive_share"] = (positive.sum(1), rollout.lengths)
    return {k: tuple(x.double().numpy(force=True) for x in pair) for k, pair in found.items()}


def _intervals(
    above: np.ndarray, below: np.ndarray, draws: np.ndarray, coverage: float
) -> dict[str, Interval]:
    """The ratio of two sums for verbose and for concise answers, and the gap between these.

    above and below are sums over each prompt's answers, [prompts, 2]; draws [resamples, prompts].
    """
    draws = np.vstack([np.ones_like(draws[:1]), draws])  # row 0: the batch, every prompt once
    with np.errstate(invalid="ignore"):  # a draw may lack all answers of a kind: 0 / 0 is nan
        ratios = (draws @ above) / (draws @ below)
    too_few = (below > 0).sum(0) < FEWEST
    ratios[1:, too_few] = np.nan
    verbose, concise = ratios.T
    columns = {"verbose": verbose, "concise": concise, "gap": verbose - concise}
    return {name: percentile(float(x[0]), x[1:], coverage) for name, x in columns.items()}
