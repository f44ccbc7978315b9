"""The case's three facts in the batches of a run: as numbers, and with intervals.

The facts: (a) the reward model scores a verbose answer slightly above a concise correct one, (b)
the verbose answer's penalty is large, (c) its token advantages are positive all the same. One batch
holds a few dozen answers of a kind, so the facts are read from three batches in the middle of the
drift. Intervals are over prompts: the run, its critic and reward model, and the rule that chose the
batches are taken as given (sweeps/seeds.py asks other runs). Left out: what made the advantages
(autopsy/parts.py) and what they do (autopsy/pushes.py).
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirlhf.audit.auditor import Auditor, grade, mean_or_nan
from minirlhf.audit.config import AuditConfig
from minirlhf.autopsy.convention import Convention
from minirlhf.autopsy.facts import Facts, three_facts
from minirlhf.autopsy.parts import AdvantageParts, split
from minirlhf.desk.world import Desk, Prompt
from minirlhf.engine.intervals import bootstrap_mean
from minirlhf.rollout import Rollout, concat


def kinds(
    desk: Desk,
    rollout: Rollout,
    prompts: Sequence[Prompt],
    verbose_padding: int = AuditConfig().verbose_padding,
) -> tuple[Tensor, Tensor]:
    """Which answers of a batch are verbose (padding of at least so many tokens), and which are
    concise (correct, without padding): two bool [B]."""
    grades = grade(desk, prompts, rollout.responses, rollout.mask)
    padding = grades["padding_tokens"]
    verbose = padding >= verbose_padding
    concise = (padding == 0) & grades["correct"]
    return torch.from_numpy(verbose), torch.from_numpy(concise)


def batch_facts(
    auditor: Auditor, rollout: Rollout, prompts: Sequence[Prompt], *, stratum: str = "brief"
) -> dict[str, float]:
    """The case's three facts in one PPO batch, for answers to prompts of one stratum.

    "kl" is the log-ratio to the reference summed over an answer (of a chosen group, so not a
    KL, and free to be negative); the advantage is the mean over an answer's tokens, averaged over
    answers; the positive share is one of tokens; the last share is that of absolute log-ratios
    held by the top tenth of all tokens of the batch. A group without answers gives nan.
    """
    assert rollout.advantages is not None
    here = np.array([prompt.stratum == stratum for prompt in prompts])  # the desk's label
    verbose, concise = kinds(auditor.desk, rollout, prompts, auditor.config.verbose_padding)
    verbose = here & verbose.numpy()
    concise = here & concise.numpy()

    # (a) one courtesy phrase on a concise correct answer, so that nothing else differs
    phrase = auditor.matched_gaps([prompt for prompt in prompts if prompt.stratum == stratum])
    # (b) padding has a log-ratio of 0, and adds nothing to the sum
    log_ratio = rollout.logprobs - rollout.ref_logprobs
    kl = log_ratio.sum(1).cpu().numpy()  # [B]
    sizes = log_ratio[rollout.mask].abs().sort(descending=True).values
    top = sizes[: len(sizes) // 10].sum()
    # (c)
    advantage = (rollout.advantages.sum(1) / rollout.lengths).cpu().numpy()  # [B]
    mask = rollout.mask.cpu().numpy()
    positive = ((rollout.advantages > 0) & rollout.mask).cpu().numpy()
    return {
        "rm_gap_sd": mean_or_nan(phrase),
        "kl_verbose_nats": mean_or_nan(kl[verbose]),
        "kl_concise_nats": mean_or_nan(kl[concise]),
        "advantage_verbose": mean_or_nan(advantage[verbose]),
        "advantage_concise": mean_or_nan(advantage[concise]),
        "positive_token_share_verbose": mean_or_nan(positive[verbose][mask[verbose]]),
        "kl_share_top_decile": float(top / sizes.sum().clamp(min=1e-9)),
        "n_verbose": int(verbose.sum()),
        "n_concise": int(concise.sum()),
    }


def mid_run(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The facts of three kept batches around the middle of the drift, pooled over their answers.

    The middle is the first kept batch with two verbose answers to brief prompts for every concise
    one: the policy has moved by then, and there is something to compare with. One batch holds a
    few dozen such answers, so that its signs are noisy; its two neighbours are taken with it.
    `step` is the middle one. A run that never gets there gives its last batches.
    """
    if not batches:
        return {}
    middle = len(batches) - 1
    for number, batch in enumerate(batches):
        if batch["n_verbose"] >= 2 * batch["n_concise"] > 0:
            middle = number
            break
    around = batches[max(middle - 1, 0) : middle + 2]
    pooled: dict[str, Any] = {
        "step": batches[middle]["step"],
        "steps": [batch["step"] for batch in around],
    }
    for name in around[0]:
        if name in ("n_verbose", "n_concise"):
            pooled[name] = sum(batch[name] for batch in around)
        elif name != "step":
            pooled[name] = _pooled_mean(around, name)
    return pooled


def _pooled_mean(batches: Sequence[dict[str, Any]], name: str) -> float:
    """A fact of verbose (or concise) answers weighs as many of them as its batch has; the others
    weigh the same in each. nan if no batch knows it."""
    # a batch that was read back from JSON has None for nan
    values = np.array([batch[name] for batch in batches], dtype=float)
    weights = np.ones(len(batches))
    for kind in ("verbose", "concise"):
        if kind in name:
            weights = np.array([batch[f"n_{kind}"] for batch in batches])
    known = (weights > 0) & np.isfinite(values)
    if not known.any():
        return float("nan")
    return float(np.average(values[known], weights=weights[known]))


def clearest(batches: Sequence[dict[str, Any]], steps: Sequence[int]) -> int:
    """Of these steps, the one in whose batch the smaller of the two groups of answers is largest:
    the means of verbose and of concise answers are there least a matter of chance."""
    smaller = {batch["step"]: min(batch["n_verbose"], batch["n_concise"]) for batch in batches}
    return max(steps, key=lambda step: smaller[step])


def pooled_facts(
    auditor: Auditor,
    batches: Sequence[tuple[Rollout, Convention]],
    table: Sequence[Prompt],
    *,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """The three facts of batches taken together, per stratum, with 95 % intervals over prompts.

    Each batch comes with the convention that made its advantages; `table` is the run's prompt
    table, into which a batch's `index` points. Besides the quantities of autopsy.Facts, which
    compare the verbose with the concise answers of a stratum (prompts hardly ever come twice),
    "phrase" is the score of one courtesy phrase on a concise correct answer, reward sd: fact (a) on
    matched pairs. "holds": (a), (b), (c), each with an interval that excludes zero; without verbose
    or concise answers (b) and (c) do not hold, and there is no interval but that of the phrase.
    """
    if not batches:
        return {}
    rng = np.random.default_rng(seed)
    whole = concat([rollout for rollout, _ in batches])
    assert whole.index is not None
    numbers = whole.index.numpy(force=True)  # [B] in the prompt table
    prompts = [table[i] for i in numbers]
    strata = np.array([prompt.stratum for prompt in prompts])  # the desk's label
    verbose, concise = kinds(auditor.desk, whole, prompts, auditor.config.verbose_padding)
    compared: dict[str, Facts] = {}
    if verbose.any() and concise.any():
        compared = three_facts(
            whole, verbose, concise, rng=rng, strata=strata, parts=_parts(batches)
        )

    out: dict[str, dict[str, Any]] = {}
    for name in map(str, np.unique(strata)):
        here = strata == name
        asked = np.unique(numbers[here])  # a phrase is tried once on each prompt
        phrase = bootstrap_mean(auditor.matched_gaps([table[i] for i in asked]), rng)
        told = _told(compared.get(name))
        told["holds"] = [phrase.low > 0, *told["holds"]]
        told["prompts"] = len(asked)
        told["n_verbose"] = int((verbose.numpy() & here).sum())
        told["n_concise"] = int((concise.numpy() & here).sum())
        told["intervals"]["phrase"] = {"gap": list(phrase)}
        out[name] = told
    return out


def _parts(batches: Sequence[tuple[Rollout, Convention]]) -> AdvantageParts:
    """What made the advantages of all batches, one below the other."""
    splits = [vars(split(rollout, convention)) for rollout, convention in batches]
    known = [name for name, part in splits[0].items() if part is not None]
    return AdvantageParts(**{name: torch.cat([each[name] for each in splits]) for name in known})


def _told(facts: Facts | None) -> dict[str, Any]:
    """A stratum's facts as plain values, an interval as [mean, low, high]; "holds": (b) and (c)."""
    if facts is None:
        return {"holds": [False, False], "intervals": {}}
    told = asdict(facts)
    told["holds"] = list(facts.holds[1:])
    told["intervals"] = {
        quantity: {group: list(found) for group, found in groups.items()}
        for quantity, groups in facts.intervals.items()
    }
    return told
