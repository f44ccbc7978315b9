"""The same batch under other conventions: which one made it, and what another one had made of it.

`reconcile` comes first: it says how far the logged numbers are from those that the stated
convention gives, and searches for the convention that gives them. `what_if` prices and credits
the same answers anew; `what_if_clip` takes the real update again, on a copy.

Every answer carries a sentence that says how exact it is. None knows which answers another
setting would have led to: that takes another run.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

import torch
from torch import Tensor

from minirlhf.advantages import AdvantageParts, gae, masked_mean, shape_rewards
from minirlhf.autopsy import Convention, charged_kl, demand, laid_out, split, whitened
from minirlhf.config import PPOConfig
from minirlhf.critic import RIDGE
from minirlhf.model import response_logprobs
from minirlhf.ppo import PPO, Scorer, treat_missing_eos
from minirlhf.push import surrogate_slope, twin
from minirlhf.rollout import Rollout

LOGGED = ("kl", "rewards", "advantages", "returns")
EXACT = "exact for this batch: the same answers and the same critic, priced and credited anew"
OTHERS = "exact for this batch and the given values in the critic's place; the answers are the same"
AGAIN = (
    "exact: the ratios after the real update of this batch, taken again on a copy of the run; the "
    "update itself was a sum of minibatches, each with ratios of its own"
)
FIT = "fit"  # a beta found by regression
# What frameworks do differently, one setting at a time
CHANGES = {"beta": (0.0, FIT), "gamma": (1.0, 0.99), "lam": (1.0, 0.95, 0.0), "clamp": (None, 10.0)}
CHANGES |= {"keep_mean": (False, True), "ddof": (0, 1)}
SWITCHES = ("kl_estimator", "kl_aggregation", "score_at", "whiten_scope")
SWITCHES += ("whiten_rewards", "whiten_advantages")
CHANGES |= {f.name: get_args(f.type) for f in fields(Convention) if f.name in SWITCHES}


@dataclass(frozen=True)
class Candidate:
    """A convention, and how far what it gives is from what was logged."""

    convention: Convention
    changes: dict[str, Any]
    """settings that differ from the stated convention (none: the stated one)"""
    residuals: dict[str, float]
    """logged field -> largest absolute difference on a token"""
    explains: bool
    """every residual is within the tolerance"""


def recomputed(rollout: Rollout, convention: Convention) -> dict[str, Tensor]:
    """kl, rewards, advantages and returns [B, T] that the convention gives, in float64."""
    c, laid = convention, laid_out(rollout, convention)
    assert laid.kl is not None
    raw = split(rollout, replace(c, whiten_advantages="none"))
    rewards = shape_rewards(laid.scores, laid.kl, laid.mask, beta=c.price)
    returns = raw.total + laid.values if c.advantage == "gae" else rewards
    advantages = whitened(raw, rollout.mask, c).total
    made = {"rewards": rewards, "advantages": advantages, "returns": returns}
    return made | {"kl": charged_kl(rollout, c)}


def fitted_beta(rollout: Rollout, convention: Convention) -> float:
    """The price of KL that the logged advantages agree with best, whatever their scale and shift.

    They are a * (A without KL) + b * (A of KL at price 1) + c under whitening of the batch.
    """
    demand(rollout, "advantages")
    assert rollout.advantages is not None
    plain = replace(convention, whiten_advantages="none", kl_place="reward", beta=1.0)
    parts, mask = split(rollout, plain), rollout.mask
    columns = (parts.reward + parts.baseline, parts.kl, torch.ones_like(parts.kl))
    x = torch.stack([c[mask] for c in columns], 1)
    a, b, _ = torch.linalg.lstsq(x, rollout.advantages.double()[mask]).solution.tolist()
    return float(f"{b / a:.6g}") if b * a > 1e-6 * a * a else 0.0


def reconcile(
    rollout: Rollout, stated: Convention, *, tolerance: float = 1e-5, depth: int = 2
) -> list[Candidate]:
    """The stated convention and others, best first; several that explain the log are a tie.

    Every single setting of CHANGES is tried, and combinations of up to `depth` as long as nothing
    explains the log. Order: those that explain it, with the fewest changes first; then by the
    largest residual. `tolerance` is relative to the largest number of a field (or to 1; a log in
    bfloat16 needs some 2e-2). Raises ValueError where nothing was logged, and as `split` does.
    """
    logged = {k: x.double() for k in LOGGED if (x := getattr(rollout, k)) is not None}
    demand(rollout, *(() if logged else LOGGED))
    settings = [(name, value) for name, values in CHANGES.items() for value in values]
    found: list[Candidate] = []
    for size in range(depth + 1):
        for changes in map(dict, itertools.combinations(settings, size)):
            c = _changed(rollout, stated, changes)
            if c is None or any(c == other.convention for other in found):
                continue
            made = recomputed(rollout, c)
            gaps = {k: float(((made[k] - x) * rollout.mask).abs().max()) for k, x in logged.items()}
            fits = all(g <= tolerance * (1 + logged[k].abs().max()) for k, g in gaps.items())
            found.append(Candidate(c, {k: getattr(c, k) for k in changes}, gaps, fits))
        if size and any(candidate.explains for candidate in found):
            break
    found.sort(
        key=lambda c: (len(c.changes) if c.explains else depth + 1, max(c.residuals.values()))
    )
    return found


def _changed(rollout: Rollout, stated: Convention, changes: dict[str, Any]) -> Convention | None:
    """The stated convention with other settings; None where one of them makes no difference."""
    c = replace(stated, **{k: v for k, v in changes.items() if v != FIT})
    if "beta" in changes:
        beta = c.beta
        if changes["beta"] == FIT:
            beta = 0.0 if rollout.advantages is None else fitted_beta(rollout, c)
        c = replace(c, beta=beta, kl_place="reward")
    idle = {"gamma", "lam"} if c.advantage != "gae" else set()
    idle |= {"whiten_scope", "ddof"} if c.whiten_advantages == "none" else set()
    idle |= {"keep_mean"} if c.whiten_advantages != "shift_scale" else set()
    idle |= {k for k in changes.keys() - {"beta"} if getattr(c, k) == getattr(stated, k)}
    idle |= {"beta"} if abs(c.price - stated.price) < 1e-6 else set()
    return None if idle & changes.keys() else c


@dataclass(frozen=True)
class WhatIf:
    """What the batch's advantages would have been, and how far to believe it."""

    parts: AdvantageParts
    exact: bool
    why: str
    """one sentence for the screen"""
    figures: dict[str, float]

    @property
    def advantages(self) -> Tensor:
        """[B, T] float64: the sum of the parts."""
        return self.parts.total


def rescored(rollout: Rollout, reward_model: Scorer, convention: Convention) -> Tensor:
    """Scores [B] of the same answers by another reward model, with the same missing-EOS rule."""
    demand(rollout, "finished")
    with torch.no_grad():
        scores = reward_model(rollout.prompts, rollout.responses, rollout.mask)
    return treat_missing_eos(scores, rollout.finished, convention)  # type: ignore[arg-type]


def what_if(
    rollout: Rollout,
    convention: Convention,
    *,
    scores: Tensor | None = None,
    values: Tensor | None = None,
    features: Tensor | None = None,
    **changes: Any,
) -> WhatIf:
    """The same answers under other settings (beta=0.3, lam=0.95, whiten_advantages="none",
    advantage="rloo"), other scores [B] (rescored) or other values [B, T] (zeros: no critic).

    `features` [N, F] of the N tokens in the mask (model.response_states, or the old values) fit the
    critic again: to the change of what is still to come, each answer counting once. Raises
    ValueError where beta is not charged in the reward, or where no critic is there to fit.
    """
    after = replace(convention, **changes)
    if "beta" in changes and after.kl_place != "reward":
        raise ValueError(
            f"with kl_place {after.kl_place} no advantage depends on beta; add kl_place='reward' "
            "to ask what charging it in the reward would do"
        )
    batch = replace(
        rollout,
        scores=rollout.scores if scores is None else scores,
        values=rollout.values if values is None else values,
    )
    if features is not None:
        return _refitted(rollout, batch, convention, after, features)
    return WhatIf(split(batch, after), True, EXACT if values is None else OTHERS, {})


def repricer(
    rollout: Rollout, convention: Convention, scores: Mapping[Any, Tensor]
) -> Callable[[float, Any], WhatIf]:
    """what_if of beta and of named scores [B], for a dial that is dragged.

    Until whitening the split is linear in beta, so one split a name is enough, and a move costs a
    tenth. Where it is not (group baselines, whitened rewards) or where no advantage depends on
    beta, every call is a what_if.
    """
    c = convention
    if c.kl_place != "reward" or c.advantage != "gae" or c.whiten_rewards == "rewards":
        same = {c.price: {}}
        return lambda beta, name: what_if(
            rollout, c, scores=scores[name], **same.get(beta, {"beta": beta})
        )
    unit = replace(c, beta=1.0, whiten_advantages="none")
    raw = {name: split(replace(rollout, scores=x), unit) for name, x in scores.items()}

    def priced(beta: float, name: Any) -> WhatIf:
        parts = replace(raw[name], kl=beta * raw[name].kl)
        return WhatIf(whitened(parts, rollout.mask, c), True, EXACT, {})

    return priced


def follow(
    logged: Rollout, batch: Rollout, before: Convention, after: Convention, features: Tensor
) -> tuple[Tensor, float]:
    """How far the values [B, T] of a critic would move that followed the change from `logged`
    under `before` to `batch` under `after`, and the share of the change that it takes up."""
    change = _to_come(batch, after) - _to_come(logged, before)
    fitted = _ridge(features.double(), change, batch)
    left = torch.where(batch.mask, change - fitted, 0.0).square().sum()
    return fitted, 1 - float(left / change.square().sum().clamp(min=1e-12))


def _refitted(
    logged: Rollout, batch: Rollout, before: Convention, after: Convention, features: Tensor
) -> WhatIf:
    """`batch` under `after`, with a critic that has followed the change of what is to come."""
    if after.advantage != "gae":
        raise ValueError(f"advantage {after.advantage} has no critic that could be fitted again")
    fitted, absorbed = follow(logged, batch, before, after, features)
    why = (
        "approximate: the critic is fitted again to this batch alone, by ridge regression; "
        "a trained one would have seen other answers"
    )
    followed = replace(batch, values=batch.values.double() + fitted)
    return WhatIf(split(followed, after), False, why, {"absorbed": absorbed})


def _to_come(rollout: Rollout, convention: Convention) -> Tensor:
    """Discounted rewards from each token on, [B, T]."""
    laid = laid_out(rollout, convention)
    rewards = shape_rewards(laid.scores, laid.kl, laid.mask, beta=convention.price)  # type: ignore
    sums = gae(rewards, 0 * rewards, laid.mask, gamma=convention.gamma, lam=1.0)
    return torch.where(rollout.mask, sums, 0.0)


def _ridge(features: Tensor, y: Tensor, rollout: Rollout) -> Tensor:
    """Fitted values [B, T] of y, regressed on features [N, F] of the masked tokens."""
    x = torch.nn.functional.pad(features, (0, 1), value=1.0)
    w = (1 / rollout.lengths[:, None].double()).expand_as(rollout.mask)[rollout.mask]
    gram = x.T @ (w[:, None] * x) / w.sum()
    gram.diagonal()[:-1].add_(RIDGE)  # the mean is not shrunk
    fitted = torch.zeros_like(y)
    fitted[rollout.mask] = x @ torch.linalg.solve(gram, x.T @ (w * y[rollout.mask]) / w.sum())
    return fitted


def _watched(loss: Callable, watch: Callable[[], None]) -> Callable:
    """PPO.loss that says when it is called: a progress bar and a way out for a reader."""

    def called(batch: Rollout) -> Any:
        watch()
        return loss(batch)

    return called


def what_if_clip(
    rollout: Rollout,
    parts: AdvantageParts,
    config: PPOConfig,
    *,
    run: PPO | None = None,
    logprobs: Tensor | None = None,
    watch: Callable[[], None] | None = None,
) -> WhatIf:
    """What the surrogate lets through at the epsilon and style of `config`: parts times ratio, and
    0 where the clip has cut the gradient.

    With `run` (as it was before this batch) the real update is taken again on a copy, and the
    ratio is that after it; figures are its metrics. With `logprobs` [B, T] of a later policy the
    ratio is fixed. `watch` is called before each of the update's minibatches; what it raises ends
    the update. Raises ValueError where the ratio is 1 everywhere, so that no clip acts.
    """
    demand(rollout, "advantages")
    figures, why = {}, "exact for these log-probs; another epsilon would have led to others"
    if run is not None:
        copied, given = twin(run), (rollout.prompts, rollout.responses, rollout.mask)
        copied.config = replace(run.config, clip=config.clip, clip_style=config.clip_style)
        if watch is not None:
            copied.loss = _watched(copied.loss, watch)
        figures = copied.update(rollout)
        with torch.no_grad():
            logprobs = response_logprobs(copied.policy, *given, temperature=config.temperature)[0]
        why = AGAIN
    now = rollout.logprobs if logprobs is None else logprobs
    moved = torch.where(rollout.mask, now - rollout.logprobs, 0.0)
    if moved.abs().max() < 1e-4:
        raise ValueError(
            "the ratio is 1 on every token, as in the first minibatch of an update, so no epsilon "
            "changes anything: give the run, whose update is then taken again, or later log-probs"
        )
    each = replace(config, loss_aggregation="sequence_sum")
    slope = len(rollout) * surrogate_slope(now, rollout, each).double()
    scaled = {name: slope * x for name, x in vars(parts).items() if x is not None}
    figures["cut_share"] = float(masked_mean((slope == 0).double(), rollout.mask))
    return WhatIf(AdvantageParts(**scaled), True, why, figures)
