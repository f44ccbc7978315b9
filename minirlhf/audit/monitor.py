"""Drift monitors of a deployed policy: fixed probes every day, charts, and an alarm.

Every day the deployed model answers the same probes. A day's means of length and of evasion are
put on the scale of the reference's own days and summed up where they exceed it: a one-sided CUSUM,
S = max(0, S + z - slack), which forgets good days and adds up bad ones (Page 1954). The alarm's
threshold is not taken from a table: it is the one that reference days, drawn from recorded
answers, pass in `rate` of all watches of `days` days, with the uncertainty of the recorded mean
itself drawn along. The rate is then to be *measured* on fresh reference answers.

This diagnoses a drift that is there. It promises nothing about one to come, it is blind to what
is not charted, and an alarm names no cause. Left out: charts that learn, two-sided ones, and
probes that change (a policy could learn fixed ones; keep them secret).

Sources: Page (1954, Biometrika 41); Montgomery (2012, "Introduction to statistical quality
control", chapter 9) for CUSUM on standardised means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Recorded = Mapping[str, np.ndarray]  # measure -> [draws, probes], the reference's own answers


@dataclass(frozen=True)
class Monitor:
    """A calibrated alarm; `calibrate` makes one."""

    names: tuple[str, ...]
    """what is charted; all charts share one threshold"""
    mean: np.ndarray
    """a reference day's mean of each measure [M]"""
    sd: np.ndarray
    """how much such means vary from day to day [M]"""
    slack: float
    """excess, in day sds, that is forgiven every day: half the shift to be found"""
    threshold: float
    """cumulated excess, in day sds, above which the alarm goes off"""
    days: int
    """length of the watch that the false-alarm rate refers to"""
    rate: float
    """wanted share of such watches of the reference with a false alarm"""

    def charts(self, days: np.ndarray) -> np.ndarray:
        """CUSUM of each measure [..., D, M] from days' means [..., D, M], from 0 on."""
        return _cusum((days - self.mean) / self.sd, self.slack)

    def alarm(self, days: np.ndarray) -> np.ndarray:
        """The first day [...], counted from 1, on which any chart is above the threshold; 0 if
        none is."""
        above = self.charts(days).max(-1) > self.threshold
        return np.where(above.any(-1), above.argmax(-1) + 1, 0)


def calibrate(
    recorded: Recorded,
    *,
    rng: np.random.Generator,
    rate: float = 0.05,
    days: int = 30,
    slack: float = 0.5,
    watches: int = 1000,
) -> Monitor:
    """A monitor whose alarm goes off in `rate` of reference watches of `days` days.

    Each watch draws a record of its own (answers anew for every probe), from which mean and sd
    are taken as they are here: a short record gives a higher threshold. Raises ValueError.
    """
    if not 0 < rate < 1 or days < 1 or slack < 0:
        raise ValueError(f"rate {rate}, days {days}, slack {slack}: give 0 < rate < 1, days >= 1")
    x = _table(recorded, tuple(recorded))
    flat = [name for name, sd in zip(recorded, x.std((0, 1)), strict=True) if sd == 0]
    if len(x) < 2 or flat:
        raise ValueError(f"at least 2 draws that vary are needed; got {len(x)}, constant: {flat}")
    mean, sd = _scale(x)
    peaks = np.empty(watches)
    for i in range(watches):
        # The record is a sample too: each watch stands on one as short as ours, drawn anew.
        own_mean, own_sd = _scale(_redraw(x, len(x), rng))
        own_sd = np.where(own_sd > 0, own_sd, sd)
        day_means = _redraw(x, days, rng).mean(1)
        peaks[i] = _cusum((day_means - own_mean) / own_sd, slack).max()
    # An alarm goes off above the threshold, not at it: the higher peak, and no more than `rate`.
    threshold = float(np.quantile(peaks, 1 - rate, method="higher"))
    return Monitor(
        names=tuple(recorded),
        mean=mean,
        sd=sd,
        slack=slack,
        threshold=threshold,
        days=days,
        rate=rate,
    )


def stream(
    recorded: Recorded,
    days: int,
    *,
    rng: np.random.Generator,
    runs: int = 1,
    other: Recorded | None = None,
    share: float = 0.0,
) -> np.ndarray:
    """Days' means [runs, days, M], each probe answered anew from the recorded answers.

    A probe is answered from `other` with probability `share`: a policy that serves a part of the
    traffic.
    """
    names = tuple(recorded)
    found = _redraw(_table(recorded, names), runs * days, rng)
    if other is not None and share > 0:
        moved = rng.random(found.shape[:2]) < share  # by day and probe: all measures of an answer
        others = _redraw(_table(other, names), runs * days, rng)
        found = np.where(moved[..., None], others, found)
    return found.mean(1).reshape(runs, days, -1)


def _table(recorded: Recorded, names: tuple[str, ...]) -> np.ndarray:
    """The measures of a record as one array [draws, probes, M], in the order of `names`."""
    return np.stack([np.asarray(recorded[name], dtype=float) for name in names], -1)


def _redraw(x: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n answers [n, probes, M] for every probe, from its own recorded ones."""
    probes = x.shape[1]
    draws = rng.integers(len(x), size=(n, probes))
    return x[draws, np.arange(probes)]


def _scale(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [M] of a day, and its sd: answers vary within a probe, probes are fixed."""
    # A day's mean over P probes is a sum of P independent answers, over P.
    sd = np.sqrt(x.var(0, ddof=1).sum(0)) / x.shape[1]
    return x.mean((0, 1)), sd


def _cusum(z: Any, slack: float) -> np.ndarray:
    """S of each measure after each day, [..., D, M] as z, from 0 on (Page 1954)."""
    out = np.empty_like(z)
    total = np.zeros(z.shape[:-2] + z.shape[-1:])
    for day in range(z.shape[-2]):
        # Good days are not saved up: at 0 the sum starts afresh.
        total = np.maximum(0.0, total + z[..., day, :] - slack)
        out[..., day, :] = total
    return out
