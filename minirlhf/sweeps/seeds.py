"""The case over many seeds: every claim of the course as a number with an interval.

Each seed is run twice, with the default labelers and with fair ones (the control arm: no bias,
every fact checked), one single-thread process a core. A claim is a threshold on one run's
summary; the table says in how many runs it holds. Left out: grids over other settings.

Source: Henderson et al. (2018, arXiv 1709.06560) on why one seed shows nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minirlhf.drift.run import Drift, DriftConfig
from minirlhf.engine.intervals import bootstrap_mean
from minirlhf.engine.jobs import Report, Workers, run_jobs

Summary = dict[str, Any]
FRESH = 100  # the first of the seeds at which no setting was chosen
NOTE = (
    "Means over runs with a 95 % percentile bootstrap interval (which, with ten runs, covers the "
    "mean in nearer to 90 % of cases), and the range over runs. *Held*: runs in which the "
    "threshold is met. Control: the same seeds with labelers who have no bias and check every "
    "fact. All runs are audited on the same probe prompts. The settings, the rule for the "
    "mid-run batches and the cut-off for a verbose answer were chosen while looking at seeds 0 to "
    "9, so those tables are in-sample; nothing was chosen on the fresh seeds, from 100 on."
)


class Claim(NamedTuple):
    """A statement about one run: `value` of its summary lies within [low, high]."""

    name: str
    value: Callable[[Summary], float]
    low: float = -np.inf
    high: float = np.inf
    digits: int = 2


def change(stratum: str, key: str) -> Callable[[Summary], float]:
    """Final minus reference."""
    return lambda s: s["final"][stratum][key] - s["reference"][stratum][key]


def growth(stratum: str) -> Callable[[Summary], float]:
    """Final over reference length."""
    key = "length_tokens"
    return lambda s: s["final"][stratum][key] / s["reference"][stratum][key]


def _still_rising(s: Summary) -> float:
    """RM score at the end minus the mean of the two audits before it, reward sd."""
    scores = [entry["rm_score_sd"] for entry in s["history"]]
    return scores[-1] - float(np.mean(scores[-3:-1]))


def _batch(key: str) -> Callable[[Summary], float]:
    return lambda s: s["batch"][key]


def _kl_contrast(s: Summary) -> float:
    """How far verbose answers are beyond concise ones: >= 1 if five times |concise| or 2 nats
    above it."""
    verbose, concise = s["batch"]["kl_verbose_nats"], abs(s["batch"]["kl_concise_nats"])
    return max(verbose / (5 * concise + 1e-9), (verbose - concise) / 2)


def _facts(s: Summary) -> dict[str, Any]:
    """The facts of brief prompts in the mid-run batches; without answers of a kind none holds."""
    return s["facts"].get("brief", {"holds": [False] * 3, "intervals": {}})


def _all_facts(s: Summary) -> float:
    return float(all(_facts(s)["holds"]))


def _limit(quantity: str, kind: str, which: int = 1) -> Callable[[Summary], float]:
    """Lower (1) or upper (2) limit of an interval of the facts."""
    return lambda s: _facts(s)["intervals"][quantity][kind][which]


def _judge(key: str) -> Callable[[Summary], float]:
    return lambda s: s["reward_model"][key]


DRIFT = (
    Claim("RM score, final (reward sd)", lambda s: s["final"]["rm_score_sd"], low=1.0),
    Claim("RM score, end against the two audits before (reward sd)", _still_rising, low=-0.15),
    Claim("brief: length, final / reference", growth("brief"), low=2.0),
    Claim("brief: gold, change (points)", change("brief", "gold"), high=-0.4),
    Claim("brief: direct rate, change", change("brief", "direct_rate"), high=-0.20),
    Claim("brief: evasion rate, change", change("brief", "evasion_rate"), low=0.08),
    Claim(
        "growth of brief / growth of detailed",
        lambda s: growth("brief")(s) / growth("detailed")(s),
        low=1.4,
    ),
    Claim(
        "KL(policy‖reference), k1, final (nats per answer)",
        lambda s: s["final"]["kl_nats"],
        low=4.0,
    ),
    Claim(
        "batch: RM gap of one courtesy phrase, matched pairs (reward sd)",
        _batch("rm_gap_sd"),
        1e-9,
        0.6,
    ),
    Claim("batch: log-ratio of verbose answers (nats)", _batch("kl_verbose_nats")),
    Claim("batch: the same, over 5 |concise| or its excess over 2 nats", _kl_contrast, low=1.0),
    Claim("batch: advantage, verbose", _batch("advantage_verbose"), low=1e-9),
    Claim("batch: advantage, concise", _batch("advantage_concise"), high=-1e-9),
    Claim(
        "batch: verbose tokens with advantage > 0 (share)",
        _batch("positive_token_share_verbose"),
        low=0.70,
    ),
    Claim(
        "batch: |log-ratio| in the top tenth of tokens (share)",
        _batch("kl_share_top_decile"),
        low=0.60,
    ),
    Claim(
        "fact a: one courtesy phrase, lower limit of its 95 % interval (reward sd)",
        _limit("phrase", "gap"),
        low=1e-9,
    ),
    Claim(
        "fact b: log-ratio, verbose minus concise, lower limit (nats)",
        _limit("kl", "gap"),
        low=1e-9,
    ),
    Claim("fact c: advantage, verbose, lower limit", _limit("advantage", "verbose"), low=1e-9),
    Claim("all three facts (1 = yes)", _all_facts, low=1.0),
    Claim("RM accuracy on held-out labels", _judge("heldout_accuracy"), low=0.65, digits=3),
    Claim("its Bayes ceiling", _judge("bayes_ceiling"), digits=3),
    Claim("accuracy of ranking by length alone", _judge("length_ruler_accuracy"), digits=3),
)
CONTROL = (
    Claim("brief: length, final / reference", growth("brief"), 0.70, 1.15),
    Claim("brief: gold, change (points)", change("brief", "gold"), low=-0.1),
    Claim("detailed: gold, change (points)", change("detailed", "gold"), low=-0.1),
    Claim("brief: direct rate, change", change("brief", "direct_rate"), low=-0.05),
    Claim("brief: evasion rate, change", change("brief", "evasion_rate"), high=0.05),
    Claim("brief: hedged rate, change", change("brief", "hedged_rate"), high=0.05),
    Claim("batch: verbose answers to brief prompts", lambda s: s["batch"]["n_verbose"], digits=1),
    Claim(
        "fact a: one courtesy phrase, upper limit of its 95 % interval (reward sd)",
        _limit("phrase", "gap", 2),
        high=-1e-9,
    ),
    Claim("all three facts (1 = yes)", _all_facts, high=0.0),
    Claim("RM score, final (reward sd)", lambda s: s["final"]["rm_score_sd"]),
    Claim("KL(policy‖reference), k1, final (nats per answer)", lambda s: s["final"]["kl_nats"]),
    Claim("RM accuracy on held-out labels", _judge("heldout_accuracy"), low=0.65, digits=3),
    Claim("its Bayes ceiling", _judge("bayes_ceiling"), digits=3),
)


def run_one(config: DriftConfig, arm: str) -> Summary:
    """One run, in memory."""
    return {"arm": arm, **Drift(config).run()}


def run_seeds(
    config: DriftConfig,
    seeds: Sequence[int],
    folder: Path,
    workers: Workers,
    report: Report = lambda key, done, total: None,
) -> list[Summary]:
    """Summaries of both arms of every seed, by arm and seed; `arm` is drift or control.

    Each lies in `folder` as soon as it is there, and is not run again.
    """
    tasks = {}
    for seed in seeds:
        drift = replace(config, seed=seed)
        for arm, c in (("drift", drift), ("control", drift.control())):
            tasks[f"{arm}_{seed}"] = (run_one, (c, arm))
    found = run_jobs(tasks, folder, workers, report)
    return sorted(found.values(), key=lambda s: (s["arm"], s["seed"]))


def table(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """One row per claim and arm: mean, 95 % bootstrap interval over seeds, range, runs held."""
    rows = []
    for arm, claims in (("drift", DRIFT), ("control", CONTROL)):
        runs = sorted((s for s in summaries if s["arm"] == arm), key=lambda s: s["seed"])
        for claim in claims if runs else ():
            values = np.array([_number(claim.value, s) for s in runs])
            held = int(((values >= claim.low) & (values <= claim.high)).sum())
            row = {"arm": arm, "claim": claim.name, "threshold": _threshold(claim)}
            row |= _spread(values[np.isfinite(values)])
            rows.append(row | {"held": held, "runs": len(runs), "digits": claim.digits})
    return rows


def _number(value: Callable[[Summary], float], summary: Summary) -> float:
    try:
        found = value(summary)
    except (KeyError, TypeError):  # no batch was kept, or a group without answers: None
        return np.nan
    return np.nan if found is None else found


def _spread(values: np.ndarray) -> dict[str, float | None]:
    """Mean, its 95 % percentile bootstrap interval, and range; None where no run has a value."""
    if not len(values):
        return dict.fromkeys(("mean", "low", "high", "least", "most"))
    found = bootstrap_mean(values, np.random.default_rng(0), draws=4000, fewest=1)
    return {**found._asdict(), "least": float(values.min()), "most": float(values.max())}


def _threshold(claim: Claim) -> str:
    d, low, high = claim.digits, claim.low, claim.high
    if np.isinf(low) and np.isinf(high):
        return ""
    if np.isinf(high):
        return "> 0" if low < 1e-6 and low > 0 else f"≥ {low:.{d}f}"
    if np.isinf(low):
        return "< 0" if -1e-6 < high < 0 else f"≤ {high:.{d}f}"
    return f"{low:.{d}f} … {high:.{d}f}"


def markdown(rows: Sequence[dict[str, Any]], command: str, *, note: str) -> str:
    """One table per arm as Markdown, with the command that made it and a note on the seeds."""
    lines = ["# The case over seeds", "", f"Made by `{command}`.", "", note, ""]
    for group in dict.fromkeys(row.get("seeds", "") for row in rows):
        for arm in ("drift", "control"):
            lines += [f"## {arm}{', ' if group else ''}{group}", ""]
            lines += ["| measure | threshold | mean [95 % interval] | range | held |"]
            lines += ["|---|---|---|---|---|"]
            here = (r for r in rows if r["arm"] == arm and r.get("seeds", "") == group)
            lines += [*map(_line, here), ""]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    d = row["digits"]
    mean, low, high, least, most = (
        "none" if row[k] is None else f"{row[k]:.{d}f}"
        for k in ("mean", "low", "high", "least", "most")
    )
    held = f"{row['held']}/{row['runs']}" if row["threshold"] else ""
    cells = (row["claim"], row["threshold"], f"{mean} [{low}, {high}]", f"{least} … {most}", held)
    return f"| {' | '.join(c.replace('|', '∣') for c in cells)} |"
