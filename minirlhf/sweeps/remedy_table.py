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

from minirlhf.desk.world import STRATA
from minirlhf.engine.intervals import student_t
from minirlhf.remedies.arms import ARMS, REMEDIES
from minirlhf.remedies.on_batch import PARTS

Column = Callable[[pd.DataFrame], pd.Series]
LENGTH = 0.30  # brief answers this close to the reference's length, as a share of it
GOLD = -0.05  # and no worse than this, in points
STEPS = 0.80  # and detailed answers with this share of the reference's steps
PREDICTED = ("push_verbose", "final_brief_length_tokens")


class Measure(NamedTuple):
    """A column of the table: what it is, its unit, and how many digits are robust."""

    name: str
    title: str
    unit: str
    column: Column
    digits: int = 2


def _ratio(stratum: str, name: str) -> Column:
    return lambda d: d[f"final_{stratum}_{name}"] / d[f"reference_{stratum}_{name}"]


def _change(stratum: str, name: str) -> Column:
    return lambda d: d[f"final_{stratum}_{name}"] - d[f"reference_{stratum}_{name}"]


def _plain(name: str) -> Column:
    return lambda d: d[name]


def _measures() -> list[Measure]:
    found = []
    for s in STRATA:
        found += [
            Measure(f"{s}_length_ratio", f"{s}: length", "x reference", _ratio(s, "length_tokens")),
            Measure(f"{s}_gold_change", f"{s}: gold", "points", _change(s, "gold")),
        ]
        for name in ("direct", "evasion", "hedged", "verbose"):
            change = _change(s, f"{name}_rate")
            found.append(Measure(f"{s}_{name}_change", f"{s}: {name} answers", "share", change))
        found.append(Measure(f"{s}_kl_nats", f"{s}: KL", "nats", _plain(f"final_{s}_kl_nats"), 1))
    steps = _ratio("detailed", "steps_share")
    found.append(Measure("detailed_steps_kept", "detailed: steps", "x reference", steps))
    rate = _plain("final_brief_verbose_rate")
    found.append(Measure("brief_verbose_rate", "brief: verbose answers", "share", rate))
    units = {"rm_score_sd": ("RM score", "reward sd"), "kl_nats": ("KL", "nats")}
    units |= {"gap_courtesy_brief_sd": ("worth of one courtesy phrase", "reward sd")}
    units |= {"gap_hedge_brief_sd": ("worth of one hedge", "reward sd")}
    units |= {"gap_score": ("score gap in the batch", "reward sd")}
    units |= {"gap_cost": ("KL cost gap in the batch", "reward sd")}
    units |= {"gap_effective": ("effective reward gap in the batch", "reward sd")}
    for side in ("verbose", "concise"):
        units[f"fork_{side}"] = (f"advantage at the fork, {side}", "sd of advantages")
        units[f"push_{side}"] = (f"push on {side}", "nats a step")
        units |= {f"push_{side}_{p}": (f"push on {side}, {p}", "nats a step") for p in PARTS}
    digits = {k: 3 if k.startswith("push") else 2 for k in units}  # a push is a few hundredths
    return found + [Measure(k, *v, _plain(k), digits[k]) for k, v in units.items()]


MEASURES = {m.name: m for m in _measures()}


def measured(rows: pd.DataFrame, names: Sequence[str] = tuple(MEASURES)) -> pd.DataFrame:
    """remedy, seed, and one column per measure, run by run."""
    columns = {name: MEASURES[name].column(rows).astype(float) for name in names}
    return pd.DataFrame({"remedy": rows["remedy"], "seed": rows["seed"], **columns})


def summarise(rows: pd.DataFrame, names: Sequence[str] = tuple(MEASURES)) -> pd.DataFrame:
    """Long: remedy, measure, mean, low, high, n; the arms in the order of remedies/arms.py."""
    each = measured(rows, names)
    order = [name for name in ARMS if name in set(each["remedy"])]
    order += sorted(set(each["remedy"]) - set(order))  # stacks
    found = []
    for remedy in order:
        of = each.loc[each["remedy"] == remedy]
        for name in names:
            values = of[name].to_numpy()
            row = {"remedy": remedy, "measure": name, **student_t(values)._asdict()}
            found.append(row | {"n": int((~np.isnan(values)).sum())})
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
    for remedy, of in rows.groupby("remedy", sort=False):
        fault = of["fault"].iloc[0]
        if remedy == fault or of["push_verbose"].isna().all():
            continue
        pair = of.merge(rows[rows["remedy"] == fault], on="seed", suffixes=("", "_before"))
        push, end = ((pair[k] - pair[f"{k}_before"]).astype(float).to_numpy() for k in PREDICTED)
        moved, row = student_t(end), {"remedy": remedy, "push": float(np.mean(push))}
        row |= {"moved": moved.mean, "low": moved.low, "high": moved.high}
        row["told"] = moved.low > 0 or moved.high < 0
        found.append(row | {"agrees": bool(np.sign(row["push"]) == np.sign(moved.mean))})
    return pd.DataFrame(found)


def levels(rows: pd.DataFrame) -> pd.DataFrame:
    """The bolder prediction: a push above 0 says that the logged policy is less verbose yet than
    the remedied run will end. remedy; push, nats a step; moved: verbose share of brief answers at
    the end minus that of the logged policy, with its interval; told and agrees as in agreement.
    """
    of = rows[rows["push_verbose"].notna()]
    of = of.assign(step=of["final_brief_verbose_rate"] - of["verbose_then"])
    found = []
    for remedy, seeds in of.groupby("remedy", sort=False):
        push = float(seeds["push_verbose"].astype(float).mean())
        moved = student_t(seeds["step"].astype(float).to_numpy())
        told = moved.low > 0 or moved.high < 0
        row = {"remedy": remedy, "push": push, "moved": moved.mean, "low": moved.low}
        row |= {"high": moved.high, "told": told}
        found.append(row | {"agrees": bool(np.sign(push) == np.sign(moved.mean))})
    return pd.DataFrame(found)


SHOWN = ("brief_length_ratio", "brief_gold_change", "brief_direct_change")
SHOWN += ("brief_evasion_change", "brief_hedged_change", "detailed_length_ratio")
SHOWN += ("detailed_gold_change", "detailed_steps_kept", "detailed_hedged_change")
SHOWN += ("rm_score_sd", "kl_nats")
AT_BATCH = ("gap_score", "gap_cost", "gap_effective", "fork_verbose", "fork_concise")
AT_BATCH += ("push_verbose", "push_concise", "gap_courtesy_brief_sd", "gap_hedge_brief_sd")
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


def wide(rows: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """One row an arm, one column a measure, "mean [low, high]" as text."""
    long = summarise(rows, names)
    cells = zip(*(long[k] for k in ("measure", "mean", "low", "high")), strict=True)
    found = long.assign(text=[_text(m, *values) for m, *values in cells])
    order = list(dict.fromkeys(found["remedy"]))
    return found.pivot(index="remedy", columns="measure", values="text").loc[order, list(names)]


def _text(measure: str, mean: float, low: float, high: float) -> str:
    if np.isnan(mean):
        return "–"
    sign = "" if MEASURES[measure].unit == "x reference" else "+"  # a ratio is no change
    m, a, b = (f"{x:{sign}.{MEASURES[measure].digits}f}" for x in (mean, low, high))
    return f"{m} [{a}, {b}]"


def markdown(rows: pd.DataFrame, command: str) -> str:
    """docs/remedies.md: the whole table, with the command that made it."""
    test = repaired(rows).set_index("remedy")["repaired"].to_dict()
    seeds = sorted(set(rows["seed"]))
    said = f"Made by `{command}`: every arm from nothing on seeds {', '.join(map(str, seeds))}."
    blocks = ["# Remedies", f"{said} {NOTE}", WORDS]
    for title, names in (("Trained outcome", SHOWN), ("The same logged batch", AT_BATCH)):
        heads = [f"{MEASURES[n].title} ({MEASURES[n].unit})" for n in names]
        cells = wide(rows, names).to_dict("index")
        lines = [(k, "yes" if test[k] else "no", *cells[k].values()) for k in cells]
        blocks += [f"## {title}", _table(("arm", "repaired", *heads), lines)]
    blocks += ["## Push against outcome", *_agreement(rows), "## What each arm is"]
    about = ("title", "acts", "equation", "cost", "source")
    lines = [(name, *(getattr(r, k) for k in about), r.fault) for name, r in REMEDIES.items()]
    blocks += [OTHERS]
    about = (*about, "repairs")
    return "\n\n".join([*blocks, _table(("arm", *about), lines)]) + "\n"


def _agreement(rows: pd.DataFrame) -> list[str]:
    """What the push foretold, as a paragraph and a table."""
    signs = agreement(rows)
    told, bold = signs[signs["told"]], levels(rows)
    gaps = summarise(rows, ["gap_effective"]).set_index("remedy")["mean"]
    repairs = dict(zip(rows["remedy"], rows["fault"], strict=True))
    fall = [gaps[name] - gaps[repairs[name]] for name in signs["remedy"]]
    fall = pd.Series(fall, index=signs.index)
    ranks = [signs["moved"].corr(x, method="spearman") for x in (signs["push"], fall)]
    bold = bold[bold["told"]]
    said = (
        f"Of {len(signs)} arms with a push, {len(told)} change the length of brief answers by "
        f"an amount whose interval excludes zero; in {int(told['agrees'].sum())} of those the push "
        "on verbose answers changes in the same direction. (Both against the arm that is repaired, "
        f"paired by seed.) {int((told['moved'] < 0).sum())} of them end shorter, so that a "
        "constant answer does as well. In order of size the two changes go together (rank "
        f"correlation {ranks[0]:.2f} over all {len(signs)}; that of the effective gap and length: "
        f"{ranks[1]:.2f}). The bolder reading was tried first: the sign of the push itself says on "
        "which side of the logged policy the run ends. It holds for "
        f"{int(bold['agrees'].sum())} of the {len(bold)} arms whose side is told."
    )
    yes, lines = {True: "yes", False: "no"}, []
    for r in signs.to_dict("records"):
        ends = "{moved:+.1f} [{low:+.1f}, {high:+.1f}]".format(**r)
        lines.append((r["remedy"], f"{r['push']:+.3f}", ends, yes[r["agrees"]], yes[r["told"]]))
    heads = ("remedy", "change of the push (nats a step)", "change of brief length (tokens)")
    heads = (*heads, "same sign", "interval of the length excludes 0")
    return [said, _table(heads, lines)]


def _table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(
        f"| {' | '.join(str(x).replace('|', chr(92) + '|') for x in r)} |" for r in rows
    )
