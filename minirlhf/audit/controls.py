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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minirlhf.engine.intervals import Interval, percentile

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
    bins = [np.asarray(table["length_tokens"]).astype(int) // width for table in (before, after)]
    scores = [np.asarray(table[score], dtype=float) for table in (before, after)]
    total = scores[1].mean() - scores[0].mean()

    # Answers and summed scores, [2, bins]: a row before, a row after.
    size = max(int(numbers.max()) for numbers in bins) + 1
    counts = np.array([np.bincount(numbers, minlength=size) for numbers in bins])
    sums = np.array([np.bincount(bins[i], scores[i], size) for i in range(2)])
    both = (counts > 0).all(0)  # bins that can be compared
    weights = counts[:, both].sum(0)
    within = np.nan
    if both.any():
        # Singhal et al., section 3; Kitagawa's (1955) part of a gain that is not the make-up's.
        means = sums[:, both] / counts[:, both]
        within = np.average(means[1] - means[0], weights=weights)
    covered = weights.sum() / counts.sum()
    return Gain(float(total), float(within), float(covered))


def slopes(
    table: Any, *, score: str = "rm_score_sd", on: Sequence[str] = ("length_tokens", "gold")
) -> dict[str, float]:
    """Least squares of a score on all columns of `on` at once, standardised: sd per sd.

    The slope on length *given gold* asks: of two equally good answers, does the longer one score
    higher? A column that does not vary has no slope: nan.
    """
    values = np.array([np.asarray(table[name], dtype=float) for name in (score, *on)]).T
    sd = values.std(0)
    varies = sd > 1e-12
    scaled = (values - values.mean(0)) / np.where(varies, sd, 1.0)
    y = scaled[:, 0]
    x = scaled[:, 1:]
    fitted = np.full(len(on), np.nan)
    known = varies[1:]
    # All columns at once: each slope is then that of its column with the others held fixed.
    fitted[known] = np.linalg.lstsq(x[:, known], y, rcond=None)[0]
    return dict(zip(on, fitted.tolist(), strict=True))


def ruler(before: Any, after: Any, *, score: str = "rm_score_sd") -> float:
    """The gain, in units of the score, that a ruler would have shown: length alone decides.

    A line through the answers *before* (score on length) is read at the lengths after. Divide by
    the gain for its share. Lengths far beyond those before are extrapolated. Raises ValueError
    if the answers before are all of one length.
    """
    x = np.asarray(before["length_tokens"], dtype=float)
    y = np.asarray(before[score], dtype=float)
    longer = np.asarray(after["length_tokens"], dtype=float).mean() - x.mean()
    centred = x - x.mean()
    varies = (centred**2).sum()
    if varies == 0:
        raise ValueError("all answers before are of one length: nothing says what length is worth")
    slope = (centred * y).sum() / varies  # of least squares
    return float(slope * longer)


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
    known = [{name: np.asarray(table[name]) for name in table} for table in tables]
    lengths = {len(column) for table in known for column in table.values()}
    probes = [table["probe"] for table in known if "probe" in table]
    if len(lengths) != 1 or any((numbers != probes[0]).any() for numbers in probes):
        raise ValueError("the tables' rows are not of the same prompts: sort them by probe")
    size = lengths.pop()
    found = []
    for _ in range(draws if size > 1 else 0):
        # One draw for all tables: a prompt brings its answers on every side along.
        index = rng.integers(size, size=size)
        drawn = [{name: column[index] for name, column in table.items()} for table in known]
        found.append(measure(*drawn))
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
    # The audit's stratum, as it was measured: the desk's label is not in this table.
    for (step, stratum), rows in answers.groupby(["step", "stratum"]):
        columns = {name: rows[name].to_numpy(dtype=float) for name in MEANS}
        for name, tokens in PADDED.items():
            if tokens in rows:
                columns[name] = (rows[tokens] > 0).to_numpy(dtype=float)
        values = np.array(list(columns.values()))  # (measures, prompts)
        size = values.shape[1]
        # One draw for all measures, as a prompt's grades belong together.
        index = rng.integers(size, size=(draws, size))
        means = values[:, index].mean(2)  # (measures, draws)
        for name, value, drawn in zip(columns, values.mean(1), means, strict=True):
            interval = percentile(float(value), drawn, coverage)
            found.append(
                {
                    "step": step,
                    "stratum": stratum,
                    "measure": name,
                    "n": size,
                    "value": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                }
            )
    return found
