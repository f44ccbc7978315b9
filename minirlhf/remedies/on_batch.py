"""What a remedy does to one logged batch, at once: effective rewards, advantages, pushes.

A run that drifts has logged a batch in the middle of its drift, and its state before it. The same
answers are scored, priced and credited as the remedy would have it; the critic follows by a fit to
this batch (approximate: a trained one would have seen others); then the push (autopsy/pushes.py)
says what one optimiser step would do to the verbose and to the concise answers to brief prompts.

A push above zero says that the policy of that moment is still less verbose than the remedied
objective wants it; so its sign predicts whether the remedied run ends with more or with fewer
verbose answers than that policy gave. Group baselines need several answers to a prompt: for them
the same policy answers anew. Left out: the remedied run itself (sweeps/remedy_runs.py); DPO and
best-of-n, which learn from no batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minirlhf.advantages import masked_mean
from minirlhf.audit.auditor import Auditor
from minirlhf.autopsy.convention import Convention
from minirlhf.autopsy.parts import split
from minirlhf.autopsy.pushes import CLASSES, Push, push, reference_entropy, token_classes
from minirlhf.autopsy.what_ifs import follow
from minirlhf.desk.world import Prompt
from minirlhf.drift.batches import kinds
from minirlhf.model import response_states
from minirlhf.ppo import PPO, price_and_credit, treat_missing_eos
from minirlhf.rollout import Rollout

Row = dict[str, Any]
Stop = Callable[[dict[str, float]], bool]
FORK = CLASSES.index("fork")
PARTS = ("reward", "kl", "baseline", "shift", "value_loss", "kl_loss")


@dataclass(frozen=True)
class Logged:
    """A batch that a run has logged, and the run as it was before it."""

    rollout: Rollout
    before: dict[str, Tensor]
    convention: Convention
    kl: tuple[float, ...]
    """mean KL of every earlier batch, nats per answer"""


def at_batch(
    logged: Logged,
    *,
    ppo: PPO,
    auditor: Auditor,
    prompts: Sequence[Prompt],
    stop: Stop | None = None,
) -> Row:
    """What a remedied run would have made of the logged batch.

    `ppo`, `auditor` and the prompt table are those of that run, prepared and not trained; `stop`
    says after which metrics it ends. Effective rewards and their gap in reward sd, advantages in
    the units of the update, pushes in nats a step: the change of the mean log pi of the batch's
    verbose, or concise, answers to brief prompts by one Adam step on the batch, without what
    earlier gradients add through its memory.
    """
    beta = _controlled(ppo, logged)
    ppo.load_state_dict(logged.before)
    ppo.controller.beta = beta
    rollout, anew, absorbed = _credited(ppo, logged)

    assert rollout.index is not None and rollout.rewards is not None
    asked = [prompts[i] for i in rollout.index.tolist()]
    brief = torch.tensor([prompt.stratum == "brief" for prompt in asked])
    verbose, concise = kinds(auditor.desk, rollout, asked, auditor.config.verbose_padding)
    sides = {"verbose": verbose & brief, "concise": concise & brief}
    then = auditor.closing(auditor.sample(ppo.policy))["brief"]["verbose_rate"]
    found: Row = {"beta_then": beta, "anew": anew, "absorbed": absorbed, "verbose_then": then}
    for side, rows in sides.items():
        found[f"n_{side}"] = int(rows.sum())
    if not all(rows.any() for rows in sides.values()):  # nothing to push apart
        return found

    found |= _gaps(rollout, **sides)
    found |= _at_the_fork(ppo, rollout, sides)
    parts = split(_dearer(ppo, rollout), _convention(ppo))
    pushes = push(ppo, rollout, parts, sides, optimiser="adam")
    # a run that has ended by then pushes nothing
    weight = 0.0 if _stopped(stop, logged) else 1.0
    for side, pushed in pushes.items():
        found |= _pushed(side, pushed, weight)
    return found


def _convention(ppo: PPO) -> Convention:
    return Convention.of(ppo.config, beta=ppo.beta)


def _controlled(ppo: PPO, logged: Logged) -> float:
    """Beta as the run's controller would have set it by then, seeing the same batches."""
    for kl in logged.kl:
        ppo.controller.update(kl, len(logged.rollout))
    return ppo.beta


def _stopped(stop: Stop | None, logged: Logged) -> bool:
    if stop is None:
        return False
    return any(stop({"objective/kl_nats": kl}) for kl in logged.kl)


def _prices(ppo: PPO, rollout: Rollout) -> Tensor:
    """Multiples of beta for each answer, [B, 1]."""
    if ppo.prices is None:
        return torch.ones_like(rollout.scores)[:, None]
    assert rollout.index is not None
    return ppo.prices[rollout.index][:, None]


def _dearer(ppo: PPO, rollout: Rollout) -> Rollout:
    """The batch with every log-ratio times its price: at one beta, it is charged the same."""
    ratio = rollout.logprobs - rollout.ref_logprobs
    return replace(rollout, ref_logprobs=rollout.logprobs - _prices(ppo, rollout) * ratio, kl=None)


def _credited(ppo: PPO, logged: Logged) -> tuple[Rollout, bool, float]:
    """The batch as the run credits it, whether it had to be drawn anew, and the share of the
    change of what is to come that the critic's fit takes up."""
    old = logged.rollout
    config = ppo.config
    neighbours_differ = old.prompts.unflatten(0, (-1, config.group)).diff(dim=1).any()
    if config.advantage != "gae" and neighbours_differ:
        return ppo.rollout()[0], True, float("nan")

    assert old.finished is not None
    scores = ppo.reward_model(old.prompts, old.responses, old.mask)
    scores = treat_missing_eos(scores, old.finished, config)
    batch = replace(old, scores=scores)
    absorbed = float("nan")
    if config.advantage == "gae" and logged.convention.advantage == "gae":
        with torch.no_grad():
            features = response_states(ppo.policy, old.prompts, old.responses, old.mask)
        change, absorbed = follow(
            old, _dearer(ppo, batch), logged.convention, _convention(ppo), features
        )
        batch = replace(batch, values=(batch.values + change).to(old.values.dtype))
    credit = price_and_credit(batch, config, ppo.beta * _prices(ppo, batch))
    return replace(batch, **credit), False, absorbed


def _gaps(rollout: Rollout, verbose: Tensor, concise: Tensor) -> Row:
    """Mean of verbose minus mean of concise answers: score, what KL costs, and their difference."""
    assert rollout.rewards is not None
    effective = rollout.rewards.sum(1)
    each = {"score": rollout.scores, "effective": effective, "cost": rollout.scores - effective}
    return {f"gap_{k}": float(x[verbose].mean() - x[concise].mean()) for k, x in each.items()}


def _at_the_fork(ppo: PPO, rollout: Rollout, sides: Mapping[str, Tensor]) -> Row:
    """Mean advantage of all tokens, and of those where the reference had a choice."""
    assert rollout.advantages is not None
    entropy = reference_entropy(ppo.reference, rollout)
    tokens = {"advantage": rollout.mask, "fork": token_classes(rollout, entropy) == FORK}
    found: Row = {}
    for side, rows in sides.items():
        for what, mask in tokens.items():
            at = mask & rows[:, None]
            mean = float(masked_mean(rollout.advantages, at))
            found[f"{what}_{side}"] = mean if at.any() else float("nan")
    return found


def _pushed(side: str, found: Push, weight: float) -> Row:
    parts = {k: weight * float(x.sum()) for k, x in found.tokens.items()}
    row: Row = {f"push_{side}_{part}": parts.get(part, 0.0) for part in PARTS}
    row[f"push_{side}"] = sum(parts.values())
    row[f"push_{side}_measured"] = found.measured
    return row
