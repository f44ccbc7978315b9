"""Figures from numbers: each function takes what a run measured and returns a labelled Figure.

Axes name their unit and which direction is better; lines differ in dash and marker as well as in
colour (Okabe and Ito's palette). A figure's label is the sentence that a lecturer would say about
it, with the numbers in it: it serves as alt text and as caption. Nothing here computes a result,
and no number is typed in. Left out: styles and themes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

BLUE, VERMILLION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#AA4488"
INK, GREY = "#222222", "#777777"
LOOKS = ((BLUE, "-", "o"), (VERMILLION, "--", "s"), (GREEN, "-.", "D"), (INK, ":", "^"))
Chart = tuple[str, str, Mapping[str, tuple[Any, Any]]]  # x label, y label, name -> (x, y)
STRATUM: dict[str, dict[str, Any]] = {
    "brief": {"color": BLUE, "ls": "-", "marker": "o"},
    "detailed": {"color": VERMILLION, "ls": "--", "marker": "s"},
}
SEEN_BY_TEAM = {  # key -> name, unit, direction
    "rm_score_sd": ("RM score", "reward sd", "higher is better"),
    "kl_nats": ("KL to the reference", "nats per answer", "lower is closer"),
}
SEEN_BY_AUDITOR = {  # the first four are drawn
    "gold": ("gold quality", "points", "higher is better"),
    "direct_rate": ("direct answers", "share", "higher is better"),
    "length_tokens": ("length", "tokens per answer", "as short as the question allows"),
    "evasion_rate": ("evasive answers", "share", "lower is better"),
    "correct_rate": ("correct answers", "share", "higher is better"),
    "truncated_rate": ("cut off at the cap", "share", "lower is better"),
}
BIASES = {
    "longer answer won": "longer_wins",
    "longer answer won,\nequally right and direct": "longer_wins_matched",
    "hedging answer won": "hedged_wins",
    "hedging answer won,\nequally right and direct": "hedged_wins_matched",
}


def audits(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The audits of a run in order of their steps, from the reference to the final policy."""
    found = {e["step"]: e for e in (*summary["history"], summary["reference"], summary["final"])}
    return [found[step] for step in sorted(found)]


def curve(entries: Sequence[Mapping[str, Any]], key: str, stratum: str = "") -> list[float]:
    """One measure over the audits, nan where it was not measured; `stratum` if taken apart."""
    found = [(entry[stratum] if stratum else entry)[key] for entry in entries]
    return [float("nan") if value is None else value for value in found]


def blank(width: float, height: float, **layout: Any) -> Figure:
    """An empty figure, inches, on white, with a layout that keeps labels inside."""
    engine = ConstrainedLayoutEngine(**layout)
    return Figure(figsize=(width, height), dpi=100, facecolor="white", layout=engine)


def tidy(ax: Axes, title: str = "", x: str = "", y: str = "", note: str = "") -> Axes:
    """Title with a note on direction behind it, axis labels, and no more ink than that."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#DDDDDD", lw=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=11)
    ax.set_title(title, loc="left", fontsize=13, weight="bold", color=INK)
    if note:
        ax.set_title(note, loc="right", fontsize=10, style="italic", color=GREY)
    ax.set_xlabel(x, fontsize=12)
    ax.set_ylabel(y, fontsize=12)
    return ax


def chart_figure(said: str, charts: Mapping[str, Chart]) -> Figure:
    """Charts side by side by title, up to four curves each, and any number of levels.

    A curve whose y is one number is a horizontal level. Charts that all show the same names have
    one legend, others one each. `said` is the sentence about all of it.
    """
    figure = blank((6.2 if len(charts) < 3 else 3.4) * len(charts), 4.2)
    axes = np.ravel(figure.subplots(1, len(charts)))
    shared = len({tuple(curves) for *_, curves in charts.values()}) == 1 < len(charts)
    for ax, (title, (x_label, y_label, curves)) in zip(axes, charts.items(), strict=True):
        looks, dashes = iter(LOOKS), iter(("--", ":", "-."))
        for name, (x, y) in curves.items():
            if np.ndim(y) == 0:
                ax.axhline(y, color=GREY, lw=2, ls=next(dashes), label=name)
            else:
                look = dict(zip(("color", "ls", "marker"), next(looks), strict=True))
                ax.plot(x, y, lw=2.5, ms=8, markevery=max(1, len(x) // 10), label=name, **look)
        tidy(ax, title, x_label, y_label)
        if not shared:
            ax.legend(fontsize=11, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    if shared:
        place: Any = {"loc": "outside lower center", "ncols": 3}
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=12, frameon=False, **place)
    figure.set_label(said)
    figure.draw_without_rendering()  # ticks settle: the next layout knows how wide their labels are
    return figure


def drift_figure(summary: Mapping[str, Any]) -> Figure:
    """The case in one picture: what the team watched beside what the auditor found."""
    entries = audits(summary)
    steps = curve(entries, "step")
    figure = blank(13, 6.4, rect=(0, 0.05, 1, 0.88), wspace=0.04)
    figure.add_artist(Rectangle((0, 0), 0.33, 1, color="#F1F1F1", zorder=-1))
    axes = figure.subplots(2, 3)
    for ax, (key, (title, unit, better)) in zip(axes[:, 0], SEEN_BY_TEAM.items(), strict=True):
        tidy(ax, title, "PPO step", unit, better)
        ax.plot(steps, curve(entries, key), color=INK, lw=2.5, marker="D", ms=5)
    for ax, (key, words) in zip(axes[:, 1:].flat, SEEN_BY_AUDITOR.items(), strict=False):
        title, unit, better = words
        tidy(ax, title, "PPO step", unit, better)
        for name, style in STRATUM.items():
            ax.plot(steps, curve(entries, key, name), lw=2.5, ms=5, label=name, **style)
        _limits(ax, key)
    for x, text in ((0.17, "What the team saw"), (0.67, "What the auditor saw")):
        figure.text(x, 0.985, text, fontsize=17, weight="bold", ha="center", va="top")
    handles, names = axes[0, 1].get_legend_handles_labels()
    names = [f"{name} prompts" for name in names]
    where = {"loc": "lower center", "bbox_to_anchor": (0.67, 0)}
    figure.legend(handles, names, ncols=2, fontsize=12, frameon=False, **where)
    figure.set_label(drift_caption(entries))
    return figure


def _limits(ax: Axes, key: str) -> None:
    """Lengths and shares start at 0: half the height is half the amount."""
    if key != "gold":
        ax.set_ylim(bottom=0)
    if key.endswith("_rate"):
        ax.set_ylim(0, max(ax.get_ylim()[1], 0.2))
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def drift_caption(entries: Sequence[Mapping[str, Any]]) -> str:
    """First and last audit in one sentence."""
    a, b = entries[0], entries[-1]
    brief, late = a["brief"], b["brief"]
    return (
        f"Over {b['step'] - a['step']} PPO steps the RM score goes from {a['rm_score_sd']:.1f} to "
        f"{b['rm_score_sd']:.1f} reward sd and KL to {b['kl_nats']:.1f} nats; on brief prompts "
        f"gold goes from {brief['gold']:.1f} to {late['gold']:.1f} points, length from "
        f"{brief['length_tokens']:.0f} to {late['length_tokens']:.0f} tokens, direct answers from "
        f"{brief['direct_rate']:.0%} to {late['direct_rate']:.0%}, evasive ones from "
        f"{brief['evasion_rate']:.0%} to {late['evasion_rate']:.0%}."
    )


def bias_figure(groups: Mapping[str, Mapping[str, float]]) -> Figure:
    """Raw-pair bias of one or more sets of labels (`preferences.raw_bias`), by name."""
    figure = blank(9.5, 3.6)
    ax = tidy(figure.subplots(), x="share of labelled pairs (50 % = no preference)")
    ax.axvline(0.5, color=INK, lw=1.2)
    looks = zip(groups.items(), (VERMILLION, BLUE, GREEN, PURPLE), "osD^", strict=False)
    for (name, found), color, marker in looks:
        shares = [found[key] for key in BIASES.values()]
        ax.plot(shares, range(len(BIASES)), marker, color=color, ms=11, label=name)
    ax.set_yticks(range(len(BIASES)), list(BIASES), fontsize=12)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.margins(y=0.15)
    ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside upper center", ncols=len(groups), fontsize=12, frameon=False)
    said = (f"{n}: longer {g['longer_wins']:.0%}" for n, g in groups.items())
    figure.set_label("How often the longer answer wins a label. " + "; ".join(said) + ".")
    return figure


def length_figure(strata: Mapping[str, Sequence[float]]) -> Figure:
    """Histograms of answer length in tokens, one line a stratum."""
    figure = blank(7, 3.2)
    ax = tidy(figure.subplots(), x="length, tokens", y="share of answers")
    bins = list(range(0, int(max(max(x) for x in strata.values())) + 3, 2))
    for name, lengths in strata.items():
        style = {"color": STRATUM[name]["color"], "ls": STRATUM[name]["ls"]}
        weights = np.full(len(lengths), 1 / len(lengths))
        ax.hist(lengths, bins, weights=weights, histtype="step", lw=2.5, label=name, **style)
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.legend(fontsize=12, frameon=False)
    said = (f"{name} {np.mean(lengths):.0f}" for name, lengths in strata.items())
    figure.set_label(f"Mean length in tokens: {', '.join(said)}.")
    return figure


def batch_figure(batch: Mapping[str, float]) -> Figure:
    """The three facts of PPO's batches: RM gap, KL and advantage, verbose against concise."""
    batch = {key: float("nan") if value is None else value for key, value in batch.items()}

    def pair(key: str) -> tuple[float, float]:
        return batch[key.format("concise")], batch[key.format("verbose")]

    figure = blank(12, 3.6)
    axes = figure.subplots(1, 3)
    facts = (
        ("(a) RM score", "reward sd", "concise = 0", (0.0, batch["rm_gap_sd"])),
        ("(b) log-ratio", "nats per answer", "policy to reference", pair("kl_{}_nats")),
        ("(c) advantage", "mean over tokens", "above 0 = pushed up", pair("advantage_{}")),
    )
    names = ("concise", "with courtesy"), ("concise", "verbose"), ("concise", "verbose")
    for ax, (title, unit, note, values), ticks in zip(axes, facts, names, strict=True):
        tidy(ax, title, y=unit, note=note)
        bars = ax.bar(ticks, values, color=(BLUE, VERMILLION), width=0.55)
        bars[1].set_hatch("//")
        bars[1].set_edgecolor("white")
        ax.bar_label(bars, labels=[f"{v:+.2f}" for v in values], fontsize=13, padding=3)
        ax.axhline(0, color=INK, lw=1)
        ax.margins(y=0.2)
        ax.tick_params(axis="x", labelsize=13)
    figure.set_label(
        f"Batches around step {batch['step']:.0f}, brief prompts: one courtesy phrase raises the "
        f"RM score by {batch['rm_gap_sd']:.2f} reward sd; the KL penalty "
        f"charges {batch['kl_verbose_nats']:.1f} nats for a verbose answer, "
        f"{batch['kl_concise_nats']:.1f} for a concise one; "
        f"the mean advantage is {batch['advantage_verbose']:+.2f} on verbose and "
        f"{batch['advantage_concise']:+.2f} on concise answers."
    )
    return figure


def bars_figure(distributions: Mapping[str, Mapping[str, float]], unit: str) -> Figure:
    """Next-word probabilities: one panel a distribution, its words from likely to unlikely."""
    figure = blank(3.6 * len(distributions), 3.4)
    axes = np.ravel(figure.subplots(1, len(distributions)))
    for ax, (title, shares) in zip(axes, distributions.items(), strict=True):
        tidy(ax, title, unit)
        ax.barh(list(shares), list(shares.values()), color=BLUE)
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.grid(visible=False, axis="y")
    tops = (f"{t}: {next(iter(d))} {next(iter(d.values())):.2f}" for t, d in distributions.items())
    figure.set_label("Most likely next words. " + "; ".join(tops) + ".")
    return figure


def token_figure(words: Sequence[str], values: Sequence[float], title: str, unit: str) -> Figure:
    """One value a word, of an answer or of anything else that comes in an order."""
    figure = blank(max(7.0, 0.55 * len(words)), 3.4)
    ax = tidy(figure.subplots(), title, y=unit)
    ax.plot(values, color=BLUE, marker="o", lw=2)
    ax.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=11)
    ax.set_ylim(bottom=0)
    top, low = int(np.argmax(values)), int(np.argmin(values))
    said = (f"{values[i]:.2f} at {words[i]!r}" for i in (top, low))
    figure.set_label(f"{title}, {unit}: highest {', lowest '.join(said)}.")
    return figure


def attention_figure(weights: np.ndarray, words: Sequence[str], titles: Sequence[str]) -> Figure:
    """Attention weights [H, S, S], one panel a head: row = the reading word, columns sum to it."""
    figure = blank(4.9 * len(weights), 5.6)  # room for words that a back row can read
    axes = np.ravel(figure.subplots(1, len(weights)))
    for k, (ax, head) in enumerate(zip(axes, weights, strict=True)):
        image = ax.imshow(head, cmap="Blues", vmin=0, vmax=1)
        ax.set_title(titles[k], fontsize=13, loc="left", weight="bold")
        ax.set_xticks(range(len(words)), words, rotation=90, fontsize=12)
        ax.set_yticks(range(len(words)), words if k == 0 else [""] * len(words), fontsize=12)
    axes[0].set_ylabel("word that reads", fontsize=12)
    figure.supxlabel("word that is read", fontsize=12)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of attention")
    strongest = (
        f"{t}: {words[-1]!r} reads {words[int(h[-1].argmax())]!r}"
        for t, h in zip(titles, weights, strict=True)
    )
    figure.set_label("Where the last word looks. " + "; ".join(strongest) + ".")
    return figure


def seeds_figure(rows: Sequence[Mapping[str, Any]], arm: str = "drift") -> Figure:
    """Claims over seeds (`seeds.table`): range, 95 % interval and mean, one axis a claim."""
    rows = [row for row in rows if row["arm"] == arm and row["mean"] is not None]
    figure = blank(9.5, 0.55 * len(rows) + 0.6)
    axes = np.ravel(figure.subplots(len(rows), 1))
    for ax, row in zip(axes, rows, strict=True):
        ax.plot([row["least"], row["most"]], [0, 0], color=GREY, lw=1.5)
        ax.plot([row["low"], row["high"]], [0, 0], color=BLUE, lw=7, solid_capstyle="butt")
        ax.plot(row["mean"], 0, "D", color=INK, ms=7)
        ax.set_yticks([0], [row["claim"]], fontsize=10)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.margins(x=0.1, y=0.6)
    held = (
        f"{r['claim']}: {r['mean']:.{r['digits']}f}, held {r['held']}/{r['runs']}" for r in rows
    )
    figure.set_label("Means over seeds, 95 % intervals and ranges. " + "; ".join(held) + ".")
    return figure
