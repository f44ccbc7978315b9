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
from minirlhf.engine.intervals import bootstrap_mean as interval
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
    found = (padding >= verbose_padding, (padding == 0) & grades["correct"])
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def batch_facts(
    auditor: Auditor, rollout: Rollout, prompts: Sequence[Prompt], *, stratum: str = "brief"
) -> dict[str, float]:
    """The case's three facts in one PPO batch, for answers to prompts of one stratum.

    "kl" is the log-ratio to the reference summed over an answer (of a chosen group, so not a
    KL, and free to be negative); the advantage is the mean over an answer's tokens, averaged over
    answers; the positive share is one of tokens; the last share is that of absolute log-ratios
    held by the top tenth of all tokens of the batch. A group without answers gives nan.
    """
    here = np.array([prompt.stratum == stratum for prompt in prompts])
    both = kinds(auditor.desk, rollout, prompts, auditor.config.verbose_padding)
    verbose, concise = (here & kind.numpy() for kind in both)
    assert rollout.advantages is not None
    mask, lengths = rollout.mask, rollout.lengths
    log_ratio = rollout.logprobs - rollout.ref_logprobs
    kl = log_ratio.sum(1).cpu().numpy()
    advantage = (rollout.advantages.sum(1) / lengths).cpu().numpy()
    positive = ((rollout.advantages > 0) & mask).cpu().numpy()[verbose]
    sizes = log_ratio[mask].abs().sort(descending=True).values
    matched = auditor.matched_gaps([p for p, h in zip(prompts, here, strict=True) if h])
    return {
        "rm_gap_sd": mean_or_nan(matched),
        "kl_verbose_nats": mean_or_nan(kl[verbose]),
        "kl_concise_nats": mean_or_nan(kl[concise]),
        "advantage_verbose": mean_or_nan(advantage[verbose]),
        "advantage_concise": mean_or_nan(advantage[concise]),
        "positive_token_share_verbose": mean_or_nan(positive[mask.cpu().numpy()[verbose]]),
        "kl_share_top_decile": float(sizes[: len(sizes) // 10].sum() / sizes.sum().clamp(min=1e-9)),
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
    there = [i for i, b in enumerate(batches) if b["n_verbose"] >= 2 * b["n_concise"] > 0]
    middle = there[0] if there else len(batches) - 1
    around = batches[max(middle - 1, 0) : middle + 2]
    pooled: dict[str, Any] = {"step": batches[middle]["step"]}
    pooled["steps"] = [b["step"] for b in around]
    for name in (name for name in around[0] if name != "step"):
        values = np.array([np.nan if b[name] is None else b[name] for b in around], dtype=float)
        if name in ("n_verbose", "n_concise"):
            pooled[name] = int(values.sum())
            continue
        ends = (end for end in ("verbose", "concise") if end in name)
        weights = np.array([b[f"n_{end}"] for end in ends for b in around] or [1.0] * len(around))
        known = (weights > 0) & np.isfinite(values)
        mean = np.average(values[known], weights=weights[known]) if known.any() else np.nan
        pooled[name] = float(mean)
    return pooled


def clearest(batches: Sequence[dict[str, Any]], steps: Sequence[int]) -> int:
    """Of these steps, the one in whose batch the smaller of the two groups of answers is largest:
    the means of verbose and of concise answers are there least a matter of chance."""
    smaller = {b["step"]: min(b["n_verbose"], b["n_concise"]) for b in batches}
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
    whole, rng = concat([rollout for rollout, _ in batches]), np.random.default_rng(seed)
    splits = [vars(split(*batch)) for batch in batches]
    known = [name for name, part in splits[0].items() if part is not None]
    parts = AdvantageParts(**{name: torch.cat([s[name] for s in splits]) for name in known})
    assert whole.index is not None
    asked = [table[i] for i in whole.index.tolist()]
    verbose, concise = kinds(auditor.desk, whole, asked, auditor.config.verbose_padding)
    strata, found = np.array([prompt.stratum for prompt in asked]), {}
    if verbose.any() and concise.any():
        found = three_facts(whole, verbose, concise, rng=rng, strata=strata, parts=parts)
    out: dict[str, dict[str, Any]] = {}
    for name in map(str, np.unique(strata)):
        numbers = np.unique(whole.index.numpy(force=True)[strata == name])
        phrase = interval(auditor.matched_gaps([table[i] for i in numbers]), rng)
        facts = found.get(name)
        later = (False, False) if facts is None else facts.holds[1:]
        out[name] = {} if facts is None else asdict(facts)
        out[name] |= {"holds": [phrase.low > 0, *later], "prompts": len(numbers)}
        for kind, rows in (("n_verbose", verbose), ("n_concise", concise)):
            out[name][kind] = int((rows.numpy() & (strata == name)).sum())
        out[name]["intervals"] = _listed(facts) | {"phrase": {"gap": list(phrase)}}
    return out


def _listed(facts: Facts | None) -> dict[str, dict[str, list[float]]]:
    """The intervals as plain lists, [mean, low, high]."""
    if facts is None:
        return {}
    return {q: {k: list(x) for k, x in kinds.items()} for q, kinds in facts.intervals.items()}
