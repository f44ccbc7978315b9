"""Simulated labelers: pairs of answers, and the ranking that biased people give them.

A labeler prefers answer a to b with probability sigmoid((u_a - u_b) / temperature), the model of
Bradley & Terry (1952). The utility u is gold quality plus two dials, a bonus per token and a
bonus for hedging; a share of the labels (`skim`) comes from people who did not check the fact and
see style alone. At equal content nothing else makes a long answer attractive, and on brief prompts
length only costs: with the dials at 0 the same pipeline has nothing to drift to. The bias is
measured on the raw pairs, before any model is trained, and so is the best accuracy that label
noise leaves to a reward model.

Left out on purpose: labelers with names, tastes or fatigue. Every label is an independent draw.

Sources: Ouyang et al. 2022 (arXiv 2203.02155, section 3.5) for ranking data; Singhal et al. 2023
(arXiv 2310.03716) for "the longer one wins" as a measure; Dubois et al. 2023 (arXiv 2305.14387)
for simulated labelers with injected noise and bias.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirlhf.desk.config import PreferenceConfig
from minirlhf.desk.world import Desk, Prompt
from minirlhf.text import right_pad

Sampler = Callable[[Sequence[Prompt]], Sequence[str]]  # one answer a prompt


@dataclass(frozen=True)
class Pairs:
    """N labelled pairs. `chosen` won the label; gold says who should have.

    Tensors: prompts [N, P] padded on the left; chosen, rejected [N, T] padded on the right, with
    masks [N, T] that are True up to and including EOS. Columns [N]: `p_label` is the probability,
    over labelers who check and who skim, that the label falls as it did; `fact_*` is the part of
    `gold_*` (both in points) that a skimming labeler does not see; `length_*` is in tokens.
    """

    prompts: Tensor
    chosen: Tensor
    chosen_mask: Tensor
    rejected: Tensor
    rejected_mask: Tensor
    p_label: np.ndarray
    gold_chosen: np.ndarray
    gold_rejected: np.ndarray
    fact_chosen: np.ndarray
    fact_rejected: np.ndarray
    length_chosen: np.ndarray
    length_rejected: np.ndarray
    hedged_chosen: np.ndarray
    hedged_rejected: np.ndarray
    stratum: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device) -> "Pairs":
        """The same pairs with their tensors on `device`."""
        moved = {k: v.to(device) for k, v in self._columns().items() if isinstance(v, Tensor)}
        return replace(self, **moved)

    def _columns(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def select(self, rows: np.ndarray) -> "Pairs":
        """The pairs of an index or boolean array [N]."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        index = torch.from_numpy(rows)
        picked: dict[str, Any] = {}
        for name, column in self._columns().items():
            picked[name] = column[index] if isinstance(column, Tensor) else column[rows]
        return Pairs(**picked)

    def join(self, other: "Pairs") -> "Pairs":
        """These pairs, and then those of `other`."""
        made: dict[str, Any] = {}
        for name, column in self._columns().items():
            join = torch.cat if isinstance(column, Tensor) else np.concatenate
            made[name] = join((column, getattr(other, name)))
        return Pairs(**made)

    def swap(self, rows: np.ndarray) -> "Pairs":
        """The same pairs with the winner of the True rows [N] exchanged; p_label follows."""
        flip = torch.from_numpy(rows)[:, None]
        new: dict[str, Any] = {"p_label": np.where(rows, 1 - self.p_label, self.p_label)}
        for name in ("{}", "{}_mask", "gold_{}", "fact_{}", "length_{}", "hedged_{}"):
            winner, loser = name.format("chosen"), name.format("rejected")
            a, b = getattr(self, winner), getattr(self, loser)
            if isinstance(a, Tensor):
                new[winner] = torch.where(flip, b, a)
                new[loser] = torch.where(flip, a, b)
            else:
                new[winner] = np.where(rows, b, a)
                new[loser] = np.where(rows, a, b)
        return replace(self, **new)


@dataclass(frozen=True)
class PreferenceData:
    """Labelled pairs for training, and held-out ones for every figure that is reported."""

    train: Pairs
    heldout: Pairs


def make_pairs(
    desk: Desk,
    config: PreferenceConfig,
    rng: np.random.Generator,
    sampler: Sampler | None = None,
) -> PreferenceData:
    """Prompts, two different answers each, and one label. Half of the answers come from `sampler`,
    the reference's own voice, so that the reward model knows what the policy starts from."""
    prompts = desk.prompts(config.pairs, rng)
    first, second = _answers(desk, prompts, config, rng, sampler)
    pairs = _label(pack_pairs(desk, prompts, first, second), config, rng)
    held = round(config.pairs * config.holdout)
    order = rng.permutation(config.pairs)
    return PreferenceData(train=pairs.select(order[held:]), heldout=pairs.select(order[:held]))


def relabel(
    data: PreferenceData, config: PreferenceConfig, rng: np.random.Generator
) -> PreferenceData:
    """The same prompts and answers, ranked anew by labelers with the dials of `config`."""
    return PreferenceData(
        train=_label(data.train, config, rng), heldout=_label(data.heldout, config, rng)
    )


def label_probability(
    gold: np.ndarray,
    fact: np.ndarray,
    length: np.ndarray,
    hedged: np.ndarray,
    config: PreferenceConfig,
) -> np.ndarray:
    """P(a labeler prefers a to b) [N] from differences a - b of the columns [N] of `Pairs`."""
    bias = config.length_bias * length + config.hedge_bias * hedged
    checked = _sigmoid((gold + bias) / config.temperature)
    skimmed = _sigmoid((gold - fact + bias) / config.temperature)
    return (1 - config.skim) * checked + config.skim * skimmed


def raw_bias(pairs: Pairs) -> dict[str, float]:
    """How the labels lean, before any training: shares of pairs, and the counts behind them.

    longer_wins: pairs of different lengths that the longer answer won; hedged_wins: pairs with
    one hedging answer that it won. `*_matched` keeps the pairs whose answers are equally right
    and direct, where only style can decide. A share of no pairs is nan.
    """
    longer = pairs.length_chosen > pairs.length_rejected
    unequal = pairs.length_chosen != pairs.length_rejected
    one_hedges = pairs.hedged_chosen != pairs.hedged_rejected
    matched = np.isclose(pairs.fact_chosen, pairs.fact_rejected)
    shares = {
        "longer_wins": (longer, unequal),
        "longer_wins_matched": (longer, unequal & matched),
        "hedged_wins": (pairs.hedged_chosen, one_hedges),
        "hedged_wins_matched": (pairs.hedged_chosen, one_hedges & matched),
    }
    out = {"n": float(len(pairs))}
    for name, (wins, among) in shares.items():
        out[name] = float(wins[among].mean()) if among.any() else float("nan")
        out[f"n_{name}"] = float(among.sum())
    return out


def bayes_ceiling(pairs: Pairs) -> float:
    """Best accuracy on these labels that any ranking can expect: the rest is label noise."""
    return float(np.maximum(pairs.p_label, 1 - pairs.p_label).mean())


def gold_ceiling(pairs: Pairs) -> float:
    """Accuracy on these labels that the auditor's own ranking would expect; ties count half."""
    gap = pairs.gold_chosen - pairs.gold_rejected
    agrees = np.where(np.isclose(gap, 0), 0.5, gap > 0)
    return float((agrees * pairs.p_label + (1 - agrees) * (1 - pairs.p_label)).mean())


def _answers(
    desk: Desk,
    prompts: list[Prompt],
    config: PreferenceConfig,
    rng: np.random.Generator,
    sampler: Sampler | None,
) -> tuple[list[str], list[str]]:
    """Two different answers to every prompt, by the desk's candidate writer and the sampler."""
    slots = np.zeros((len(prompts), 2), bool)
    if sampler is not None:
        slots = rng.random(slots.shape) < config.sampled
    rows = [int(i) for i in np.nonzero(slots)[0]]
    own = sampler([prompts[i] for i in rows]) if sampler and rows else []
    if len(own) != len(rows):
        raise ValueError(
            f"the sampler gave {len(own)} answers to {len(rows)} prompts; give one each"
        )
    drawn = iter(own)
    first: list[str] = []
    second: list[str] = []
    for prompt, (own_a, own_b) in zip(prompts, slots, strict=True):
        a = next(drawn) if own_a else desk.candidate(prompt, rng)
        b = next(drawn) if own_b else desk.candidate(prompt, rng)
        for _ in range(100):  # equal answers cannot be ranked: the second one is written anew
            if a != b:
                break
            b = desk.candidate(prompt, rng)
        else:
            raise ValueError(f"the desk has one answer only to {prompt.text!r}; add a style")
        first.append(a)
        second.append(b)
    return first, second


def pack_pairs(
    desk: Desk, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
) -> Pairs:
    """Tensors and graded columns of written answers; `chosen` is the first one, p_label 1/2."""
    columns: dict[str, Any] = {}
    for end, answers in (("chosen", first), ("rejected", second)):
        answers = [" ".join(answer.split()[: desk.max_response]) for answer in answers]
        ids = [desk.vocabulary.encode(answer) for answer in answers]
        # An answer that fills the response has no room for EOS: it was cut off.
        finished = [len(row) < desk.max_response for row in ids]
        for row, done in zip(ids, finished, strict=True):
            if done:
                row.append(desk.vocabulary.eos)
        columns[end], columns[f"{end}_mask"] = right_pad(ids, desk.max_response)
        grades = desk.grade_many(prompts, answers, finished)
        columns[f"length_{end}"] = grades["length_tokens"]
        for name in ("gold", "fact", "hedged"):
            columns[f"{name}_{end}"] = grades[name]
    return Pairs(
        prompts=desk.encode(prompts),
        stratum=np.array([prompt.stratum for prompt in prompts]),
        p_label=np.full(len(prompts), 0.5),
        **columns,
    )


def _label(pairs: Pairs, config: PreferenceConfig, rng: np.random.Generator) -> Pairs:
    """Draw who wins each pair, whoever held `chosen` before."""
    p = label_probability(
        pairs.gold_chosen - pairs.gold_rejected,
        pairs.fact_chosen - pairs.fact_rejected,
        pairs.length_chosen - pairs.length_rejected,
        pairs.hedged_chosen.astype(float) - pairs.hedged_rejected,
        config,
    )
    return replace(pairs, p_label=p).swap(rng.random(len(pairs)) >= p)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))  # never overflows
