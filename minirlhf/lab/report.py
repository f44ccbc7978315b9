"""report.html: a run on one page that needs no other file and no network, on screen or on paper.

Offline evaluation beside the targeted audit, the batch's facts, answers before and after, seconds
and settings. Every text of the run is escaped. Left out: scripts, fonts and links.
"""

import ast
import html
import inspect
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from minirlhf.audit import measures
from minirlhf.drift.config import DriftConfig
from minirlhf.lab.picture import image_tag, png
from minirlhf.lab.plots import SEEN_BY_AUDITOR, SEEN_BY_TEAM

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;
background:#fff;color:#222}
table{border-collapse:collapse;margin:1em 0}th,td{padding:3px 12px;border-bottom:1px solid #ccc;
text-align:left;vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}
figure{margin:1.5em 0}figcaption{color:#444;font-size:.9em}pre{white-space:pre-wrap;
background:#f5f5f5;padding:1em}.pair{break-inside:avoid;border-top:1px solid #ccc}
@media print{body{margin:0;max-width:none;font-size:11pt}h2{break-after:avoid}
figure,table{break-inside:avoid}}
.note{border-left:6px solid #D55E00;background:#FBEDE4;padding:.5em 1em}
"""
FORMS = {"count": ".0f", "share": ".0%", "share of pairs": ".1%"}  # by unit; others with a sign
STAGES = {
    "sft": "reference: imitating demonstrations",
    "preferences": "writing and labelling pairs",
    "reward": "reward model",
    "ppo": "PPO",
    "audit": "audits",
    "total": "all together",
}
QUICK = (
    "Made with --quick: too few pairs and steps to show the drift. The numbers say that the "
    "command works, and nothing about the case."
)


def report_html(
    summary: Mapping[str, Any],
    answers: pd.DataFrame,
    figures: Sequence[Figure] = (),
    *,
    quick: bool = False,
) -> str:
    """The page of one run: its summary, its table of answers, labelled figures.

    `quick` puts a note on top that the run was too small to show anything.
    """
    a, b = summary["reference"], summary["final"]
    title = f"minirlhf drift, seed {summary['seed']}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *([f'<p class="note"><b>{QUICK}</b></p>'] if quick else []),
        f"<p>{b['step'] - a['step']} PPO steps. Before: the reference. After: the policy.</p>",
        *map(_figure, figures),
        "<h2>Offline evaluation: what the team saw</h2>",
        _table(("measure", "unit", "before", "after", ""), _measures(SEEN_BY_TEAM, a, b)),
        "<h2>Targeted audit: what the auditor saw</h2>",
        "<p>Prompts are sorted by how long the reference's own answers are.</p>",
        _table(("measure", "unit", "before", "after", ""), _audit(a, b)),
        *_batch(summary["batch"]),
        "<h2>Before training: the labels and the reward model</h2>",
        _table(
            ("measure", "unit", "value"), _labels(summary["raw_pairs"], summary["reward_model"])
        ),
        "<h2>Five answers, before and after</h2>",
        *_pairs(answers),
        *_closing(summary),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def examples(answers: pd.DataFrame, count: int = 5) -> list[tuple[pd.Series, pd.Series]]:
    """The (first, last) answers of the first `count` brief probes: no choice that could flatter."""
    ends = answers.step.min(), answers.step.max()
    first, last = (answers[answers.step == step].set_index("probe") for step in ends)
    probes = first.index[first.stratum == "brief"][:count]
    return [(first.loc[p], last.loc[p]) for p in probes]


def _n(value: Any, form: str) -> str:
    """A number in its format; `none` for one that was not measured (no answers of that kind)."""
    return format(value, form) if value is not None and value == value else "none"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["<tr>" + "".join(f'<th scope="col">{h}</th>' for h in head) + "</tr>"]
    for row in rows:
        cells = (f"<td{_numeric(cell)}>{html.escape(cell)}</td>" for cell in row)
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "<table>" + "\n".join(lines) + "</table>"


def _numeric(cell: str) -> str:
    return ' class="n"' if cell.lstrip("+-").replace(".", "", 1).rstrip("%").isdigit() else ""


def _figure(figure: Figure) -> str:
    alt = str(figure.get_label())
    picture = image_tag(png(figure, dpi=130), alt, 1000)
    return f"<figure>{picture}<figcaption>{html.escape(alt)}</figcaption></figure>"


def _measures(
    measures: Mapping[str, tuple[str, str, str]], a: Mapping[str, Any], b: Mapping[str, Any]
) -> Iterable[tuple[str, ...]]:
    for key, (name, unit, better) in measures.items():
        form = {"length_tokens": ".1f", "kl_nats": ".2f"}.get(key, "+.2f")
        form = ".0%" if key.endswith("_rate") else form
        yield name, unit, _n(a[key], form), _n(b[key], form), better


def _audit(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for stratum in ("brief", "detailed"):
        for name, *rest in _measures(SEEN_BY_AUDITOR, a[stratum], b[stratum]):
            yield f"{stratum}: {name}", *rest


def _batch(batch: Mapping[str, float]) -> Iterable[str]:
    """Nothing for a run that was too short to keep a batch."""
    if batch:
        yield f"<h2>Inside PPO's batches around step {batch['step']}</h2>"
        rows = (_worded(measure, batch[key]) for key, measure in measures.BATCH.items())
        yield _table(("fact", "unit", "value"), rows)


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """Nested settings or measures with dotted names."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _closing(summary: Mapping[str, Any]) -> Iterable[str]:
    """Where the time went, and what was set."""
    seconds = ((STAGES.get(k) or k, _n(v, ".1f")) for k, v in summary["seconds"].items())
    yield "<h2>Seconds</h2>"
    yield _table(("stage", "seconds"), seconds)
    yield "<h2>Settings</h2><p>Each is an option of <code>minirlhf drift</code>.</p>"
    yield _table(("option", "value", "meaning and unit"), _settings(summary["config"]))


def _labels(*measured: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    """What was measured before PPO, in words; a measure that has none keeps its key."""
    for key, value in (row for tree in measured for row in _flat(tree)):
        measure = measures.LABELS.get(key)
        yield _worded(measure, value) if measure else (key, "", _n(value, ".4g"))


def _worded(measure: measures.Measure, value: Any) -> tuple[str, ...]:
    return measure.title, measure.unit, _n(value, FORMS.get(measure.unit, "+.2f"))


def _settings(config: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    meant = meanings(DriftConfig)
    for key, value in _flat(config):
        words = value if isinstance(value, list | tuple) else [value]
        said = ", ".join(f"{w:.4g}" if isinstance(w, float) else str(w) for w in words)
        none = "none" if value is None else said
        yield f"--{key.replace('_', '-')}", none, meant.get(key, "")


def meanings(config: type, above: str = "") -> dict[str, str]:
    """{dotted name: the docstring under it} of a config dataclass and of those inside it."""
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    found = {}
    for node, after in pairwise(getattr(made, "body", [])):
        match node, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                found[above + name] = " ".join(text.split())
    for field in fields(config):
        if isinstance(kind := field.default_factory, type) and is_dataclass(kind):
            found |= meanings(kind, f"{above}{field.name}.")
    return found


def _pairs(answers: pd.DataFrame) -> Iterable[str]:
    for before, after in examples(answers):
        yield f'<div class="pair"><p><b>{html.escape(before.prompt.removesuffix(" <sep>"))}</b></p>'
        for name, row in (("before", before), ("after", after)):
            numbers = (
                f"{row.length_tokens} tokens, RM {row.rm_score_sd:+.2f} sd, gold {row.gold:+.2f}"
            )
            yield f"<p>{name} ({numbers}): {html.escape(row.answer)}</p>"
        yield "</div>"
