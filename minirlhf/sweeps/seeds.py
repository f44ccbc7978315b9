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
from minirlhf.sweeps.markdown import markdown_table

Summary = dict[str, Any]
FRESH = 100  # the first of the seeds at which no setting was chosen
SPREAD = ("mean", "low", "high", "least", "most")  # of a claim's value over runs
HEADS = ("measure", "threshold", "mean [95 % interval]", "range", "held")
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
    return lambda run: run["final"][stratum][key] - run["reference"][stratum][key]


def growth(stratum: str) -> Callable[[Summary], float]:
    """Final over reference length."""
    key = "length_tokens"
    return lambda run: run["final"][stratum][key] / run["reference"][stratum][key]


def _brief_over_detailed(run: Summary) -> float:
    return growth("brief")(run) / growth("detailed")(run)


def _still_rising(run: Summary) -> float:
    """RM score at the end minus the mean of the two audits before it, reward sd."""
    scores = [audit["rm_score_sd"] for audit in run["history"]]
    return scores[-1] - float(np.mean(scores[-3:-1]))


def _final(key: str) -> Callable[[Summary], float]:
    return lambda run: run["final"][key]


def _batch(key: str) -> Callable[[Summary], float]:
    return lambda run: run["batch"][key]


def _kl_contrast(run: Summary) -> float:
    """How far verbose answers are beyond concise ones: >= 1 if five times |concise| or 2 nats
    above it."""
    verbose = run["batch"]["kl_verbose_nats"]
    concise = abs(run["batch"]["kl_concise_nats"])
    return max(verbose / (5 * concise + 1e-9), (verbose - concise) / 2)


def _facts(run: Summary) -> dict[str, Any]:
    """The facts of brief prompts in the mid-run batches; without answers of a kind none holds."""
    return run["facts"].get("brief", {"holds": [False] * 3, "intervals": {}})


def _all_facts(run: Summary) -> float:
    return float(all(_facts(run)["holds"]))


def _limit(quantity: str, kind: str, which: int = 1) -> Callable[[Summary], float]:
    """Lower (1) or upper (2) limit of an interval of the facts."""
    return lambda run: _facts(run)["intervals"][quantity][kind][which]


def _judge(key: str) -> Callable[[Summary], float]:
    return lambda run: run["reward_model"][key]


DRIFT = (
    Claim("RM score, final (reward sd)", _final("rm_score_sd"), low=1.0),
    Claim("RM score, end against the two audits before (reward sd)", _still_rising, low=-0.15),
    Claim("brief: length, final / reference", growth("brief"), low=2.0),
    Claim("brief: gold, change (points)", change("brief", "gold"), high=-0.4),
    Claim("brief: direct rate, change", change("brief", "direct_rate"), high=-0.20),
    Claim("brief: evasion rate, change", change("brief", "evasion_rate"), low=0.08),
    Claim("growth of brief / growth of detailed", _brief_over_detailed, low=1.4),
    Claim("KL(policy‖reference), k1, final (nats per answer)", _final("kl_nats"), low=4.0),
    Claim(
        "batch: RM gap of one courtesy phrase, matched pairs (reward sd)",
        _batch("rm_gap_sd"),
        low=1e-9,
        high=0.6,
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
    Claim("brief: length, final / reference", growth("brief"), low=0.70, high=1.15),
    Claim("brief: gold, change (points)", change("brief", "gold"), low=-0.1),
    Claim("detailed: gold, change (points)", change("detailed", "gold"), low=-0.1),
    Claim("brief: direct rate, change", change("brief", "direct_rate"), low=-0.05),
    Claim("brief: evasion rate, change", change("brief", "evasion_rate"), high=0.05),
    Claim("brief: hedged rate, change", change("brief", "hedged_rate"), high=0.05),
    Claim("batch: verbose answers to brief prompts", _batch("n_verbose"), digits=1),
    Claim(
        "fact a: one courtesy phrase, upper limit of its 95 % interval (reward sd)",
        _limit("phrase", "gap", 2),
        high=-1e-9,
    ),
    Claim("all three facts (1 = yes)", _all_facts, high=0.0),
    Claim("RM score, final (reward sd)", _final("rm_score_sd")),
    Claim("KL(policy‖reference), k1, final (nats per answer)", _final("kl_nats")),
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
        tasks[f"drift_{seed}"] = (run_one, (drift, "drift"))
        tasks[f"control_{seed}"] = (run_one, (drift.control(), "control"))
    found = run_jobs(tasks, folder, workers, report)
    return sorted(found.values(), key=lambda s: (s["arm"], s["seed"]))


def table(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """One row per claim and arm: mean, 95 % bootstrap interval over seeds, range, runs held."""
    rows = []
    for arm, claims in (("drift", DRIFT), ("control", CONTROL)):
        runs = [summary for summary in summaries if summary["arm"] == arm]
        runs.sort(key=lambda summary: summary["seed"])  # or the bootstrap would draw others
        if runs:
            rows += [_row(arm, claim, runs) for claim in claims]
    return rows


def _row(arm: str, claim: Claim, runs: Sequence[Summary]) -> dict[str, Any]:
    values = np.array([_number(claim.value, run) for run in runs])
    holds = (values >= claim.low) & (values <= claim.high)  # nan holds nothing
    return {
        "arm": arm,
        "claim": claim.name,
        "threshold": _threshold(claim),
        **_spread(values[np.isfinite(values)]),
        "held": int(holds.sum()),
        "runs": len(runs),
        "digits": claim.digits,
    }


def _number(value: Callable[[Summary], float], summary: Summary) -> float:
    try:
        found = value(summary)
    except (KeyError, TypeError):  # no batch was kept, or a group without answers: None
        return np.nan
    return np.nan if found is None else found


def _spread(values: np.ndarray) -> dict[str, float | None]:
    """Mean, its 95 % percentile bootstrap interval, and range; None where no run has a value."""
    if not len(values):
        return dict.fromkeys(SPREAD)
    found = bootstrap_mean(values, np.random.default_rng(0), draws=4000, fewest=1)
    return {**found._asdict(), "least": float(values.min()), "most": float(values.max())}


def _threshold(claim: Claim) -> str:
    """Where the claim holds, as text: "" for one that is only measured."""
    low = f"{claim.low:.{claim.digits}f}"
    high = f"{claim.high:.{claim.digits}f}"
    if np.isinf(claim.low) and np.isinf(claim.high):
        return ""
    # a limit right beside 0 is there to leave 0 itself out
    if np.isinf(claim.high):
        return "> 0" if 0 < claim.low < 1e-6 else f"≥ {low}"
    if np.isinf(claim.low):
        return "< 0" if -1e-6 < claim.high < 0 else f"≤ {high}"
    return f"{low} … {high}"


def markdown(rows: Sequence[dict[str, Any]], command: str, *, note: str) -> str:
    """One table per arm as Markdown, with the command that made it and a note on the seeds."""
    blocks = ["# The case over seeds", f"Made by `{command}`.", note]
    for group in dict.fromkeys(row.get("seeds", "") for row in rows):
        for arm in ("drift", "control"):
            here = [row for row in rows if row["arm"] == arm and row.get("seeds", "") == group]
            blocks.append(f"## {arm}, {group}" if group else f"## {arm}")
            blocks.append(markdown_table(HEADS, [_line(row) for row in here]))
    return "\n\n".join(blocks) + "\n"


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table as text, in the order of HEADS."""
    said = {}
    for name in SPREAD:
        said[name] = "none" if row[name] is None else f"{row[name]:.{row['digits']}f}"
    return (
        row["claim"],
        row["threshold"],
        "{mean} [{low}, {high}]".format(**said),
        "{least} … {most}".format(**said),
        f"{row['held']}/{row['runs']}" if row["threshold"] else "",
    )
