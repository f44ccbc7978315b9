"""The table of remedies: what every arm does, as means over seeds with intervals.

Every measure is a column computed run by run (a change against the reference is paired: both were
audited on the same probes), then averaged over seeds with a Student t interval; with five seeds a
bootstrap would be too narrow. The two-sided test asks whether brief answers came back *and* whether
detailed ones kept what they need: a remedy that shortens deserved length has failed as well.
Left out: running the arms (sweeps/remedy_runs.py), and figures (lab/).

Source: Student (1908), "The probable error of a mean".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from minirlhf.audit import measures
from minirlhf.desk.world import STRATA
from minirlhf.engine.intervals import student_t
from minirlhf.remedies.arms import ARMS, REMEDIES
from minirlhf.remedies.on_batch import PARTS
from minirlhf.sweeps.markdown import markdown_table

Column = Callable[[pd.DataFrame], pd.Series]
LENGTH = 0.30  # brief answers this close to the reference's length, as a share of it
GOLD = -0.05  # and no worse than this, in points
STEPS = 0.80  # and detailed answers with this share of the reference's steps
PUSH = "push_verbose"  # what the batch foretells
END = "final_brief_length_tokens"  # and of what
TIMES = "x reference"  # the unit of a ratio to the reference
PLAIN = ("rm_score_sd", "kl_nats", "gap_courtesy_brief_sd", "gap_hedge_brief_sd")
PLAIN += ("gap_score", "gap_cost", "gap_effective")


class Measure(NamedTuple):
    """A column of the table: what it is, its unit, and how many digits are robust."""

    name: str
    title: str
    unit: str
    column: Column
    digits: int = 2


def _ratio(stratum: str, name: str) -> Column:
    return lambda rows: rows[f"final_{stratum}_{name}"] / rows[f"reference_{stratum}_{name}"]


def _change(stratum: str, name: str) -> Column:
    return lambda rows: rows[f"final_{stratum}_{name}"] - rows[f"reference_{stratum}_{name}"]


def _plain(name: str) -> Column:
    return lambda rows: rows[name]


def _of_stratum(stratum: str) -> list[Measure]:
    """What came of one stratum's prompts, most of it end against reference."""

    def change(name: str, key: str, title: str = "") -> Measure:
        known = measures.AUDIT[key]
        head = f"{stratum}: {title or known.title}"
        return Measure(f"{stratum}_{name}", head, known.unit, _change(stratum, key))

    length = _ratio(stratum, "length_tokens")
    kl = _plain(f"final_{stratum}_kl_nats")
    return [
        Measure(f"{stratum}_length_ratio", f"{stratum}: length", TIMES, length),
        change("gold_change", "gold"),
        change("direct_change", "direct_rate"),
        # these two in the words that WORDS explains
        change("evasion_change", "evasion_rate", "evasion answers"),
        change("hedged_change", "hedged_rate", "hedged answers"),
        change("verbose_change", "verbose_rate"),
        Measure(f"{stratum}_kl_nats", f"{stratum}: KL", measures.AUDIT["kl_nats"].short, kl, 1),
    ]


def _as_it_stands(name: str) -> Measure:
    """A column that is shown as it is, by its own name and unit."""
    known = measures.MEASURES[name]
    return Measure(name, known.title, known.short, _plain(name), known.digits)


def _pushes(side: str) -> list[Measure]:
    """The push on one side's answers and its parts, in the units of the whole."""
    whole = _as_it_stands(f"push_{side}")
    found = [whole]
    for part in PARTS:
        name = f"{whole.name}_{part}"
        found.append(whole._replace(name=name, title=f"{whole.title}, {part}", column=_plain(name)))
    return found


def _measures() -> list[Measure]:
    steps = _ratio("detailed", "steps_share")
    verbose = _plain("final_brief_verbose_rate")
    return [
        *(measure for stratum in STRATA for measure in _of_stratum(stratum)),
        Measure("detailed_steps_kept", "detailed: steps", TIMES, steps),
        Measure("brief_verbose_rate", "brief: verbose answers", "share", verbose),
        *(_as_it_stands(name) for name in PLAIN),
        _as_it_stands("fork_verbose"),
        *_pushes("verbose"),
        _as_it_stands("fork_concise"),
        *_pushes("concise"),
    ]


MEASURES = {measure.name: measure for measure in _measures()}


def measured(rows: pd.DataFrame, names: Sequence[str] = tuple(MEASURES)) -> pd.DataFrame:
    """remedy, seed, and one column per measure, run by run."""
    columns = {name: MEASURES[name].column(rows).astype(float) for name in names}
    return pd.DataFrame({"remedy": rows["remedy"], "seed": rows["seed"], **columns})


def summarise(rows: pd.DataFrame, names: Sequence[str] = tuple(MEASURES)) -> pd.DataFrame:
    """Long: remedy, measure, mean, low, high, n; the arms in the order of remedies/arms.py."""
    each = measured(rows, names)
    known = set(each["remedy"])
    stacks = sorted(known - set(ARMS))
    found = []
    for remedy in [*(name for name in ARMS if name in known), *stacks]:
        runs = each.loc[each["remedy"] == remedy]
        for name in names:
            values = runs[name].to_numpy()
            n = int((~np.isnan(values)).sum())
            interval = student_t(values)._asdict()
            found.append({"remedy": remedy, "measure": name, **interval, "n": n})
    return pd.DataFrame(found)


def repaired(rows: pd.DataFrame) -> pd.DataFrame:
    """The two-sided test on the means: remedy, the three figures, and whether each holds."""
    names = ["brief_length_ratio", "brief_gold_change", "detailed_steps_kept"]
    means = summarise(rows, names).pivot(index="remedy", columns="measure", values="mean")
    found = means[names].copy()
    found["length"] = (found["brief_length_ratio"] - 1).abs() <= LENGTH
    found["gold"] = found["brief_gold_change"] >= GOLD
    found["steps"] = found["detailed_steps_kept"] >= STEPS
    found["repaired"] = found[["length", "gold", "steps"]].all(axis=1)
    return found.reset_index()


def agreement(rows: pd.DataFrame) -> pd.DataFrame:
    """Push against outcome, both against the arm that a remedy repairs, paired by seed.

    remedy; push: the change of the push on verbose answers in the batch, nats a step; moved: the
    change of the length of brief answers at the end, tokens, with its interval; told: the interval
    excludes 0, so that there is a sign to predict; agrees: push and moved have the same sign.
    Arms without a push are left out, and so are the faults.
    """
    found = []
    for remedy, runs in rows.groupby("remedy", sort=False):
        fault = runs["fault"].iloc[0]
        if remedy == fault or runs[PUSH].isna().all():
            continue
        before = rows[rows["remedy"] == fault]
        pair = runs.merge(before, on="seed", suffixes=("", "_before"))
        push = (pair[PUSH] - pair[f"{PUSH}_before"]).astype(float).to_numpy()
        end = (pair[END] - pair[f"{END}_before"]).astype(float).to_numpy()
        found.append(_foretold(remedy, float(np.mean(push)), end))
    return pd.DataFrame(found)


def _foretold(remedy: object, push: float, moved: np.ndarray) -> dict[str, object]:
    """Whether the push has the sign of the mean movement over seeds [N], and whether that sign is
    told: the movement's interval excludes 0."""
    interval = student_t(moved)
    return {
        "remedy": remedy,
        "push": push,
        "moved": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "told": interval.low > 0 or interval.high < 0,
        "agrees": bool(np.sign(push) == np.sign(interval.mean)),
    }


def levels(rows: pd.DataFrame) -> pd.DataFrame:
    """The bolder prediction: a push above 0 says that the logged policy is less verbose yet than
    the remedied run will end. remedy; push, nats a step; moved: verbose share of brief answers at
    the end minus that of the logged policy, with its interval; told and agrees as in agreement.
    """
    known = rows[rows[PUSH].notna()]
    found = []
    for remedy, runs in known.groupby("remedy", sort=False):
        push = float(runs[PUSH].astype(float).mean())
        moved = runs["final_brief_verbose_rate"] - runs["verbose_then"]
        found.append(_foretold(remedy, push, np.asarray(moved, dtype=float)))
    return pd.DataFrame(found)


SHOWN = (
    "brief_length_ratio", "brief_gold_change", "brief_direct_change", "brief_evasion_change",
    "brief_hedged_change", "detailed_length_ratio", "detailed_gold_change", "detailed_steps_kept",
    "detailed_hedged_change", "rm_score_sd", "kl_nats",
)  # fmt: skip
AT_BATCH = (
    "gap_score", "gap_cost", "gap_effective", "fork_verbose", "fork_concise", "push_verbose",
    "push_concise", "gap_courtesy_brief_sd", "gap_hedge_brief_sd",
)  # fmt: skip
NOTE = (
    "Means over runs, with a 95 % Student t interval over seeds (a share's interval may leave [0, "
    "1]: where seeds fall into two camps the mean describes none of them). *Repaired*: on brief "
    "prompts the length within 30 % of the reference's and gold at most 0.05 points below it, and "
    "detailed answers with at least 80 % of the reference's steps; their gold and hedging stand "
    "beside it. Changes are end minus reference. The batch is one of the run that the arm repairs, "
    "its answers priced and credited anew (rloo, dr_grpo: drawn anew from the same policy). A "
    "reward sd is each reward model's own; par's scores lie in [0, 1]. The KL of best_of_n is an "
    "upper bound. The twins bring as many pairs again, without label noise, and so twice the "
    "reward model's steps; balanced, matched and equal_style take away pairs and steps. The "
    "remedies' own settings (weights, caps, prices) were chosen while looking at seed 0."
)


WORDS = (
    "*Brief* and *detailed* prompts: by the length of the reference's own answers. *Verbose*: at "
    "least eight tokens of padding; *concise*: correct, without any. *Direct*: the first sentence "
    "answers; *evasion*: no answer at all; *hedged*: with a phrase of doubt. A *gap* is verbose "
    "minus concise, brief prompts; effective: score minus beta times log-ratio. *Fork*: tokens at "
    "which the reference has a choice. *Push*: what one Adam step on the batch does to the mean "
    "log-prob of such answers (0 in seeds whose run an early stop had ended). The worth of a "
    "phrase or hedge is on a concise correct answer. The batch: of the three in the middle of the "
    "drift, the one whose smaller group (verbose or concise) is largest."
)
OTHERS = (
    "`none` is the default run, `fair` that with labelers who have no bias and check every fact. "
    "Faults: `book_literal` differentiates the sampled log-ratio itself, `token_mean` charges the "
    "mean and not the sum of an answer's KL, `grpo` divides by a group's sd and by length. `a+b` "
    "is b after a. Costs are what the literature fears; the tables say what was seen here."
)


YES = {True: "yes", False: "no"}
PUSHED = (
    "remedy",
    "change of the push (nats a step)",
    "change of brief length (tokens)",
    "same sign",
    "interval of the length excludes 0",
)
ABOUT = ("arm", "title", "acts", "equation", "cost", "source", "repairs")


def wide(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """One row an arm, one column a measure, "mean [low, high]" as text."""
    long = summarise(rows, names)
    long["text"] = [
        _text(MEASURES[row["measure"]], row["mean"], row["low"], row["high"])
        for row in long.to_dict("records")
    ]
    arms = list(dict.fromkeys(long["remedy"]))
    return long.pivot(index="remedy", columns="measure", values="text").loc[arms, list(names)]


def _text(measure: Measure, mean: float, low: float, high: float) -> str:
    if np.isnan(mean):
        return "–"
    sign = "" if measure.unit == TIMES else "+"  # a ratio is no change
    form = f"{{:{sign}.{measure.digits}f}}"
    return f"{form} [{form}, {form}]".format(mean, low, high)


def markdown(rows: pd.DataFrame, command: str) -> str:
    """docs/remedies.md: the whole table, with the command that made it."""
    seeds = ", ".join(map(str, sorted(set(rows["seed"]))))
    said = f"Made by `{command}`: every arm from nothing on seeds {seeds}."
    blocks = [
        "# Remedies",
        f"{said} {NOTE}",
        WORDS,
        "## Trained outcome",
        _means(rows, SHOWN),
        "## The same logged batch",
        _means(rows, AT_BATCH),
        "## Push against outcome",
        _agreed(rows),
        markdown_table(PUSHED, _pushed(rows)),
        "## What each arm is",
        OTHERS,
        markdown_table(ABOUT, _arms()),
    ]
    return "\n\n".join(blocks) + "\n"


def _means(rows: pd.DataFrame, names: Sequence[str]) -> str:
    """The table of these measures, each arm with the two-sided test."""
    tests = repaired(rows).set_index("remedy")["repaired"].to_dict()
    heads = [f"{MEASURES[name].title} ({MEASURES[name].unit})" for name in names]
    lines = []
    for arm, cells in wide(rows, names).to_dict("index").items():
        lines.append([arm, YES[tests[arm]], *cells.values()])
    return markdown_table(["arm", "repaired", *heads], lines)


def _agreed(rows: pd.DataFrame) -> str:
    """What the push foretold, as a paragraph."""
    signs = agreement(rows)
    told = signs[signs["told"]]
    bold = levels(rows)
    bold = bold[bold["told"]]
    # the rival: by how much a remedy lowers the gap of the effective reward
    gaps = summarise(rows, ["gap_effective"]).set_index("remedy")["mean"]
    repairs = dict(zip(rows["remedy"], rows["fault"], strict=True))
    fall = pd.Series([gaps[name] - gaps[repairs[name]] for name in signs["remedy"]])
    by_push = signs["moved"].corr(signs["push"], method="spearman")
    by_gap = signs["moved"].corr(fall, method="spearman")
    return (
        f"Of {len(signs)} arms with a push, {len(told)} change the length of brief answers by "
        f"an amount whose interval excludes zero; in {int(told['agrees'].sum())} of those the push "
        "on verbose answers changes in the same direction. (Both against the arm that is repaired, "
        f"paired by seed.) {int((told['moved'] < 0).sum())} of them end shorter, so that a "
        "constant answer does as well. In order of size the two changes go together (rank "
        f"correlation {by_push:.2f} over all {len(signs)}; that of the effective gap and length: "
        f"{by_gap:.2f}). The bolder reading was tried first: the sign of the push itself says on "
        "which side of the logged policy the run ends. It holds for "
        f"{int(bold['agrees'].sum())} of the {len(bold)} arms whose side is told."
    )


def _pushed(rows: pd.DataFrame) -> list[list[str]]:
    """The lines of the table of pushes and ends, in the order of PUSHED."""
    lines = []
    for arm in agreement(rows).to_dict("records"):
        push = "{push:+.3f}".format(**arm)
        moved = "{moved:+.1f} [{low:+.1f}, {high:+.1f}]".format(**arm)
        lines.append([arm["remedy"], push, moved, YES[arm["agrees"]], YES[arm["told"]]])
    return lines


def _arms() -> list[list[str]]:
    """The lines of the table of remedies, in the order of ABOUT."""
    lines = []
    for name, arm in REMEDIES.items():
        lines.append([name, arm.title, arm.acts, arm.equation, arm.cost, arm.source, arm.fault])
    return lines
