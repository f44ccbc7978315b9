"""The autopsy of one PPO batch: the parts of every advantage, and the case's three facts.

A batch's advantages are made from its log-probs, scores and values by a *convention*: where the
score sits, which KL estimator is charged, what is whitened. Under a stated convention they are
exactly a part from the reward model, one from the KL penalty, one from the baseline and one from
the shift of whitening, because every step is linear or affine (`split`). `three_facts` compares
verbose with concise answers.

All of it works in float64 on any Rollout, wherever it came from. Left out: what makes an answer
verbose (the caller's masks), which convention made a batch and what another one would have made
of it (whatif.py), what the advantages do to the policy (push.py), pictures.

Sources: Schulman et al. (2015, arXiv 1506.02438, eq. 16) for GAE, which is linear; Efron and
Tibshirani (1993, "An introduction to the bootstrap", chapter 13) for percentile intervals.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minirlhf.advantages import (
    AdvantageParts,
    decompose_advantages,
    grpo_advantages,
    rescale,
    rloo_advantages,
    shape_rewards,
    whitening_moments,
)
from minirlhf.config import PPOConfig
from minirlhf.engine.intervals import FEWEST, Interval, percentile
from minirlhf.kl import kl_tokens
from minirlhf.rollout import Rollout


@dataclass(frozen=True)
class Convention(PPOConfig):
    """How a batch's advantages come from its log-probs, scores and values: the settings of a run
    (of which those of the update play no part here) and what other frameworks do otherwise."""

    clamp: float | None = None
    """bound on the size of a token's log-ratio, nats"""
    score_at: Literal["eos", "after_eos"] = "eos"
    """the score's slot: the last token, or one later with a value of its own, where a row has
    room for it"""
    keep_mean: bool = False
    """add the old mean again after advantages were centred (whiten_advantages shift_scale)"""
    whiten_scope: Literal["batch", "answer"] = "batch"
    """the tokens over which mean and sd of advantages are taken"""
    ddof: int = 1
    """1: sample variance, 0: population variance"""

    @classmethod
    def of(cls, config: PPOConfig, *, beta: float | None = None) -> "Convention":
        """That of a run of ours; `beta` where a controller has moved it (run.beta)."""
        given: dict[str, Any] = asdict(config)
        given["beta"] = config.beta if beta is None else beta
        return cls(**given)

    @property
    def price(self) -> float:
        """What the reward charges for a nat: beta, or 0 where KL is not in the reward."""
        return self.beta if self.kl_place == "reward" else 0.0


def demand(rollout: Rollout, *names: str) -> None:
    """Raises ValueError, in one sentence, for a batch without these fields or without a token."""
    missing = [name for name in names if getattr(rollout, name) is None]
    if missing:
        raise ValueError(
            f"this batch has no {' and no '.join(missing)}: log it with the batch, "
            "or fill it in with dataclasses.replace"
        )
    if not rollout.mask.any():
        raise ValueError("no token of this batch was chosen by the policy: its mask is all False")


def charged_kl(rollout: Rollout, convention: Convention) -> Tensor:
    """What each token pays, [B, T] nats, before beta."""
    c, bound = convention, convention.clamp or torch.inf
    ratio = (rollout.logprobs.double() - rollout.ref_logprobs).clamp(-bound, bound)
    kind, per, none = c.kl_estimator, c.kl_aggregation, torch.zeros_like(ratio)
    return kl_tokens(ratio, none, rollout.mask, estimator=kind, aggregation=per)


def laid_out(rollout: Rollout, convention: Convention) -> Rollout:
    """The batch in float64 as the convention's rewards see it.

    Its kl and scores are what beta and GAE act on, scaled where rewards are whitened; its mask has
    one more slot in a row whose score sits after EOS.
    """
    demand(rollout, "logprobs", "ref_logprobs", "values", "scores")
    c, r, kl = convention, rollout.to(torch.float64), charged_kl(rollout, convention)
    mask, scores = r.mask, r.scores
    if c.whiten_rewards == "scores":
        scores = rescale(scores, torch.ones_like(scores, dtype=torch.bool))
    if c.score_at == "after_eos":
        before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
        after = torch.arange(mask.shape[1], device=mask.device) == r.last[:, None] + 1
        mask = mask | (after & before)
    if c.whiten_rewards == "rewards":
        sd = whitening_moments(shape_rewards(scores, kl, mask, beta=c.price), mask)[1]
        scores, kl = scores / sd, kl / sd
    return replace(r, mask=mask, kl=kl, scores=scores, rewards=None)


def group_parts(laid: Rollout, convention: Convention) -> AdvantageParts:
    """The split with a group as baseline: an answer's own score, its own KL, the group's both.

    Raises ValueError for groups that do not divide the batch or whose prompts differ.
    """
    c, group = convention, convention.group
    against = {"rloo": rloo_advantages, "grpo": grpo_advantages}[c.advantage]
    assert laid.kl is not None
    scores, cost = laid.scores * laid.mask.any(1), -c.price * laid.kl.sum(1)
    whole = against(scores + cost, group)
    if laid.prompts.unflatten(0, (-1, group)).diff(dim=1).any():
        raise ValueError(
            f"neighbouring rows answer different prompts, so no group of {group} can be their "
            "baseline: sort the batch by prompt, or keep the critic (advantage gae)"
        )
    if c.advantage == "grpo":
        sd = (scores + cost).view(-1, group).std(1).repeat_interleave(group) + 1e-4
        scores, cost = scores / sd, cost / sd
    parts = (scores, cost, whole - scores - cost)
    return AdvantageParts(*(x[:, None].expand_as(laid.mask) for x in parts))


def whitened(parts: AdvantageParts, mask: Tensor, convention: Convention) -> AdvantageParts:
    """The split after whitening: every part over the sd, and what the shift adds."""
    c, dims = convention, (0, 1) if convention.whiten_scope == "batch" else (1,)
    if c.whiten_advantages == "none":
        return parts
    n, total = mask.sum(dims, keepdim=True), parts.total
    mean = torch.where(mask, total, 0.0).sum(dims, keepdim=True) / n.clamp(min=1)
    squares = torch.where(mask, (total - mean).square(), 0.0).sum(dims, keepdim=True)
    sd = torch.where(n > 1, (squares / (n - c.ddof).clamp(min=1) + 1e-8).sqrt(), 1.0)
    shift = c.keep_mean * mean - mean / sd if c.whiten_advantages == "shift_scale" else 0 * mean
    scaled = (parts.reward / sd, parts.kl / sd, parts.baseline / sd)
    return AdvantageParts(*scaled, shift=torch.where(mask, shift, 0.0))


def split(rollout: Rollout, convention: Convention) -> AdvantageParts:
    """The advantages of a batch in parts, [B, T] float64, exact under the convention.

    Raises ValueError for a batch without values (put zeros there for groups), without a token, or
    whose groups do not answer one prompt.
    """
    c, laid, mask = convention, laid_out(rollout, convention), rollout.mask
    if c.advantage == "gae":
        raw = decompose_advantages(laid, beta=c.price, gamma=c.gamma, lam=c.lam)
    else:
        raw = group_parts(laid, c)
    inside = (torch.where(mask, x, 0.0) for x in (raw.reward, raw.kl, raw.baseline))
    return whitened(AdvantageParts(*inside), mask, c)


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
