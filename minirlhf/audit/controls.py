"""How much of a gain is length, and how sure is that: controls before anything is called biased.

An RM score that rises together with length may rise *because* of length, or beside it. Three ways
to tell, from the audit's tables alone: compare answers of equal length (`nrg`), regress the score
on length while gold is held fixed (`slopes`), and ask how much of the gain a ruler would have
shown (`ruler`). A length slope alone is no bias: gold itself may deserve length. So each measure
takes any score, and the same number for gold, or for a reward model of fair labelers, is its
control. Every number here can be had with an interval over prompts (`over_prompts`).

A table is a pandas DataFrame or a dict of arrays with one row per prompt. Left out: causes. Two
policies differ in more than length, and a linear control leaves what is not linear.

Sources: Singhal et al. (2023, arXiv 2310.03716, section 3) for the non-length reward gain; Kitagawa
(1955, JASA 50) for splitting a difference of means by strata; Efron and Tibshirani (1993, "An
introduction to the bootstrap", chapter 13) for percentile intervals.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minirlhf.engine.intervals import Interval, percentile

Table = Mapping[str, np.ndarray]
MEANS = ("length_tokens", "gold", "correct", "direct", "evasive", "hedged")
PADDED = {"padded": "padding_tokens", "courteous": "courtesy_tokens"}  # rate of answers with any


class Gain(NamedTuple):
    """A score's gain: in all, at equal length, and the share of answers that can be compared."""

    total: float
    within: float
    covered: float

    @property
    def share(self) -> float:
        """Of the gain, what is there at equal length; may be negative or exceed 1."""
        return self.within / self.total if self.total else float("nan")


def nrg(before: Any, after: Any, *, score: str = "rm_score_sd", width: int = 20) -> Gain:
    """Singhal's non-length reward gain: the gain within bins of `width` tokens.

    Bins count by the answers in them, before and after; a bin that one side leaves empty cannot
    be compared and drops out (`covered` says how much is left). Bins as wide as the answers are
    long hide length inside a bin; very narrow ones compare few answers. Raises ValueError for a
    width below 1 or an empty table.
    """
    if width < 1 or not len(before["length_tokens"]) or not len(after["length_tokens"]):
        raise ValueError(f"nrg needs bins of at least 1 token (width is {width}) and answers")
    bins = [np.asarray(t["length_tokens"]).astype(int) // width for t in (before, after)]
    scores = [np.asarray(t[score], dtype=float) for t in (before, after)]
    size = max(int(b.max()) for b in bins) + 1
    counts = np.array([np.bincount(b, minlength=size) for b in bins])
    sums = np.array([np.bincount(b, s, size) for b, s in zip(bins, scores, strict=True)])
    both = (counts > 0).all(0)
    means, weights = sums[:, both] / counts[:, both], counts[:, both].sum(0)
    within = np.average(means[1] - means[0], weights=weights) if both.any() else np.nan
    total = scores[1].mean() - scores[0].mean()
    return Gain(float(total), float(within), float(weights.sum() / counts.sum()))


def slopes(
    table: Any, *, score: str = "rm_score_sd", on: Sequence[str] = ("length_tokens", "gold")
) -> dict[str, float]:
    """Least squares of a score on all columns of `on` at once, standardised: sd per sd.

    The slope on length *given gold* asks: of two equally good answers, does the longer one score
    higher? A column that does not vary has no slope: nan.
    """
    values = np.array([np.asarray(table[name], dtype=float) for name in (score, *on)]).T
    spread = values.std(0)
    varies = spread[1:] > 1e-12
    scaled = (values - values.mean(0)) / np.where(spread > 1e-12, spread, 1.0)
    fitted = np.full(len(on), np.nan)
    fitted[varies] = np.linalg.lstsq(scaled[:, 1:][:, varies], scaled[:, 0], rcond=None)[0]
    return dict(zip(on, fitted.tolist(), strict=True))


def ruler(before: Any, after: Any, *, score: str = "rm_score_sd") -> float:
    """The gain, in units of the score, that a ruler would have shown: length alone decides.

    A line through the answers *before* (score on length) is read at the lengths after. Divide by
    the gain for its share. Lengths far beyond those before are extrapolated.
    """
    x, y = np.asarray(before["length_tokens"], dtype=float), np.asarray(before[score], dtype=float)
    longer = np.asarray(after["length_tokens"], dtype=float).mean() - x.mean()
    varies = ((x - x.mean()) ** 2).sum()
    if varies == 0:
        raise ValueError("all answers before are of one length: nothing says what length is worth")
    return float(((x - x.mean()) * y).sum() / varies * longer)


def over_prompts(
    measure: Callable[..., float],
    *tables: Any,
    rng: np.random.Generator,
    draws: int = 1000,
    coverage: float = 0.95,
) -> Interval:
    """`measure(*tables)` with its percentile bootstrap interval, whole prompts drawn anew.

    Row i of every table must belong to the same prompt (a `probe` column is checked), so that a
    comparison stays paired. Draws in which the measure is nan are left out. Raises ValueError.
    """
    known = [{name: np.asarray(t[name]) for name in t} for t in tables]
    size = len(next(iter(known[0].values())))
    probes = [t["probe"] for t in known if "probe" in t]
    rows = {len(column) for t in known for column in t.values()}
    if rows != {size} or any((p != probes[0]).any() for p in probes):
        raise ValueError("the tables' rows are not of the same prompts: sort them by probe")
    found = []
    for _ in range(draws if size > 1 else 0):
        index = rng.integers(size, size=size)
        found.append(measure(*({name: c[index] for name, c in t.items()} for t in known)))
    return percentile(float(measure(*known)), np.array(found), coverage)


def rates(
    answers: Any, *, rng: np.random.Generator, draws: int = 1000, coverage: float = 0.95
) -> list[dict[str, Any]]:
    """Every rate of the audit by step and stratum, each with its interval over prompts.

    `answers` is the audit's DataFrame; a row per step, stratum and measure comes back: `value`,
    `low`, `high`, `n`. `padded` and `courteous` are shares of answers with any such token (the
    latter where the table has courtesy_tokens).
    """
    found = []
    for (step, stratum), rows in answers.groupby(["step", "stratum"]):
        columns = {name: rows[name].to_numpy(dtype=float) for name in MEANS}
        columns |= {k: (rows[c] > 0).to_numpy(dtype=float) for k, c in PADDED.items() if c in rows}
        values = np.array([*columns.values()])  # (measures, prompts)
        size = values.shape[1]
        means = values[:, rng.integers(size, size=(draws, size))].mean(2)
        for name, value, drawn in zip(columns, values.mean(1), means, strict=True):
            shown = percentile(float(value), drawn, coverage)
            row = {"step": step, "stratum": stratum, "measure": name, "n": size}
            found.append(row | {"value": shown.mean, "low": shown.low, "high": shown.high})
    return found
