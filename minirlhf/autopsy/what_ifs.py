"""The same batch under other settings: what another convention would have made of it.

`what_if` prices and credits the same answers anew, `repricer` does so for a dial that is dragged,
`rescored` asks another reward model, and `what_if_clip` takes the real update again, on a copy.
Every answer carries a sentence that says how exact it is.
Left out: which answers another setting would have led to. No batch knows: that takes another run.

Sources: Schulman et al. (2017, arXiv 1707.06347, eq. 7) for the clip that is moved; the critic is
fitted again by the ridge regression of critic.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minirlhf.advantages import gae, masked_mean, shape_rewards
from minirlhf.autopsy.convention import Convention, demand_fields, laid_out
from minirlhf.autopsy.parts import AdvantageParts, split, whitened_parts
from minirlhf.autopsy.pushes import outputs_of, surrogate_slope
from minirlhf.config import PPOConfig
from minirlhf.critic import ridge
from minirlhf.ppo import PPO, Scorer, treat_missing_eos
from minirlhf.rollout import Rollout

EXACT = "exact for this batch: the same answers and the same critic, priced and credited anew"
OTHERS = "exact for this batch and the given values in the critic's place; the answers are the same"
FITTED = (
    "approximate: the critic is fitted again to this batch alone, by ridge regression; "
    "a trained one would have seen other answers"
)
GIVEN = "exact for these log-probs; another epsilon would have led to others"
AGAIN = (
    "exact: the ratios after the real update of this batch, taken again on a copy of the run; the "
    "update itself was a sum of minibatches, each with ratios of its own"
)


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
    demand_fields(rollout, "finished")
    assert rollout.finished is not None
    with torch.no_grad():
        scores = reward_model(rollout.prompts, rollout.responses, rollout.mask)
    return treat_missing_eos(scores, rollout.finished, convention)


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
    batch = rollout if scores is None else replace(rollout, scores=scores)
    batch = batch if values is None else replace(batch, values=values)
    if features is not None:
        return _refitted(rollout, batch, convention, after, features)
    why = EXACT if values is None else OTHERS
    return WhatIf(parts=split(batch, after), exact=True, why=why, figures={})


def repricer(
    rollout: Rollout, convention: Convention, scores: Mapping[Any, Tensor]
) -> Callable[[float, Any], WhatIf]:
    """what_if of beta and of named scores [B], for a dial that is dragged.

    Until whitening the split is linear in beta, so one split a name is enough, and a move costs a
    tenth. Where it is not (group baselines, whitened rewards) or where no advantage depends on
    beta, every call is a what_if.
    """
    linear = convention.kl_place == "reward" and convention.advantage == "gae"
    if not linear or convention.whiten_rewards == "rewards":

        def asked(beta: float, name: Any) -> WhatIf:
            if beta == convention.price:  # as it was charged: beta may play no part at all
                return what_if(rollout, convention, scores=scores[name])
            return what_if(rollout, convention, scores=scores[name], beta=beta)

        return asked

    unit = replace(convention, beta=1.0, whiten_advantages="none")
    raw = {name: split(replace(rollout, scores=x), unit) for name, x in scores.items()}

    def priced(beta: float, name: Any) -> WhatIf:
        parts = replace(raw[name], kl=beta * raw[name].kl)
        parts = whitened_parts(parts, rollout.mask, convention)
        return WhatIf(parts=parts, exact=True, why=EXACT, figures={})

    return priced


def follow(
    logged: Rollout, batch: Rollout, before: Convention, after: Convention, features: Tensor
) -> tuple[Tensor, float]:
    """How far the values [B, T] of a critic would move that followed the change from `logged`
    under `before` to `batch` under `after`, and the share of the change that it takes up.

    Approximate, as every critic that is fitted to one batch. features [N, F] as in what_if.
    """
    change = _to_come(batch, after) - _to_come(logged, before)
    fitted = _fit(features.double(), change, batch)
    left = torch.where(batch.mask, change - fitted, 0.0).square().sum()
    share_left = float(left / change.square().sum().clamp(min=1e-12))
    return fitted, 1 - share_left


def _refitted(
    logged: Rollout, batch: Rollout, before: Convention, after: Convention, features: Tensor
) -> WhatIf:
    """`batch` under `after`, with a critic that has followed the change of what is to come."""
    if after.advantage != "gae":
        raise ValueError(f"advantage {after.advantage} has no critic that could be fitted again")
    fitted, absorbed = follow(logged, batch, before, after, features)
    followed = replace(batch, values=batch.values.double() + fitted)
    parts = split(followed, after)
    return WhatIf(parts, exact=False, why=FITTED, figures={"absorbed": absorbed})


def _to_come(rollout: Rollout, convention: Convention) -> Tensor:
    """Discounted rewards from each token on, [B, T]."""
    laid = laid_out(rollout, convention)
    assert laid.kl is not None
    rewards = shape_rewards(laid.scores, laid.kl, laid.mask, beta=convention.price)
    # with lambda 1 and no critic an advantage is the discounted sum itself
    no_values = torch.zeros_like(rewards)
    sums = gae(rewards, no_values, laid.mask, gamma=convention.gamma, lam=1.0)
    return torch.where(rollout.mask, sums, 0.0)


def _fit(features: Tensor, y: Tensor, rollout: Rollout) -> Tensor:
    """Fitted values [B, T] of y [B, T], regressed on features [N, F] of the masked tokens."""
    each = 1 / rollout.lengths[:, None].double()  # an answer counts once, however long
    weights = each.expand_as(rollout.mask)[rollout.mask]
    solution = ridge(features, y[rollout.mask], weights, shrink_mean=False)
    fitted = torch.zeros_like(y)
    fitted[rollout.mask] = features @ solution[:-1] + solution[-1]
    return fitted


def what_if_clip(
    rollout: Rollout,
    parts: AdvantageParts,
    config: PPOConfig,
    *,
    run: PPO | None = None,
    logprobs: Tensor | None = None,
    progress: Callable[[], None] = lambda: None,
) -> WhatIf:
    """What the surrogate lets through at the epsilon and style of `config`: parts times ratio, and
    0 where the clip has cut the gradient.

    With `run` (as it was before this batch) the real update is taken again on a copy, and the ratio
    is that after it; figures are its metrics. With `logprobs` [B, T] of a later policy the ratio is
    fixed. `progress` is called before each of the update's minibatches; what it raises ends the
    update. Raises ValueError where the ratio is 1 everywhere, so that no clip acts.
    """
    demand_fields(rollout, "advantages")
    figures = {}
    why = GIVEN
    if run is not None:
        copied = run.copy()
        copied.config = replace(run.config, clip=config.clip, clip_style=config.clip_style)
        figures = copied.update(rollout, progress=progress)
        with torch.no_grad():
            logprobs, _ = outputs_of(copied, rollout)
        why = AGAIN
    now = rollout.logprobs if logprobs is None else logprobs
    moved = torch.where(rollout.mask, now - rollout.logprobs, 0.0)
    if moved.abs().max() < 1e-4:
        raise ValueError(
            "the ratio is 1 on every token, as in the first minibatch of an update, so no epsilon "
            "changes anything: give the run, whose update is then taken again, or later log-probs"
        )
    # the mean over answers of their sums, times the number of answers: a token's weight is 1, so
    # that the slope is its ratio alone, or 0 where the clip has cut
    unweighted = replace(config, loss_aggregation="sequence_sum")
    slope = len(rollout) * surrogate_slope(now, rollout, unweighted).double()
    let_through = {name: slope * part for name, part in parts.tensors().items()}
    figures["cut_share"] = float(masked_mean((slope == 0).double(), rollout.mask))
    return WhatIf(parts=AdvantageParts(**let_through), exact=True, why=why, figures=figures)
