"""Figures from numbers: each function takes what a run measured and returns a labelled Figure.

Axes name their unit and which direction is better; lines differ in dash and marker as well as in
colour (Okabe and Ito's palette). A figure's label is the sentence that a lecturer would say about
it, with the numbers in it: it serves as alt text and as caption. Nothing here computes a result,
and no number is typed in. Left out: styles and themes.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from minirlhf.audit.measures import MEASURES

BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
ORANGE = "#E69F00"
PURPLE = "#AA4488"
INK, GREY = "#222222", "#777777"
LOOKS = ((BLUE, "-", "o"), (VERMILLION, "--", "s"), (GREEN, "-.", "D"), (INK, ":", "^"))
Chart = tuple[str, str, Mapping[str, tuple[Any, Any]]]  # x label, y label, name -> (x, y)
STRATUM: dict[str, dict[str, Any]] = {
    "brief": {"color": BLUE, "ls": "-", "marker": "o"},
    "detailed": {"color": VERMILLION, "ls": "--", "marker": "s"},
}


def _seen(name: str, title: str = "", note: str = "") -> tuple[str, str, str]:
    """A measure's title, unit and direction; a title or a note of its own for this reader."""
    measure = MEASURES[name]
    return title or measure.title, measure.unit, note or measure.direction


SEEN_BY_TEAM = {
    "rm_score_sd": _seen("rm_score_sd"),
    "kl_nats": _seen("kl_nats", title="KL to the reference", note="lower is closer"),
}
SEEN_BY_AUDITOR = {  # the first four are drawn
    "gold": _seen("gold", title="gold quality"),
    "direct_rate": _seen("direct_rate"),
    "length_tokens": _seen("length_tokens", note="as short as the question allows"),
    "evasion_rate": _seen("evasion_rate"),
    "correct_rate": _seen("correct_rate"),
    "truncated_rate": _seen("truncated_rate"),
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


def one_legend(figure: Figure, axes: Iterable[Axes], **look: Any) -> None:
    """One legend below a figure for whatever has a name in `axes`, each name once."""
    keys = {}
    for ax in axes:
        handles, names = ax.get_legend_handles_labels()
        keys.update(zip(names, handles, strict=True))
    place = {"loc": "outside lower center", "fontsize": 12, "frameon": False}
    figure.legend(keys.values(), keys, **{**place, **look})


def chart_figure(said: str, charts: Mapping[str, Chart]) -> Figure:
    """Charts side by side by title, up to four curves each, and any number of levels.

    A curve whose y is one number is a horizontal level. Charts that all show the same names have
    one legend, others one each. `said` is the sentence about all of it.
    """
    width = 6.2 if len(charts) < 3 else 3.4
    figure = blank(width * len(charts), 4.2)
    axes = np.ravel(figure.subplots(1, len(charts)))
    shared = len({tuple(curves) for *_, curves in charts.values()}) == 1 < len(charts)
    for ax, (title, (x_label, y_label, curves)) in zip(axes, charts.items(), strict=True):
        looks = iter(LOOKS)
        dashes = iter(("--", ":", "-."))
        for name, (x, y) in curves.items():
            if np.ndim(y) == 0:
                ax.axhline(y, color=GREY, lw=2, ls=next(dashes), label=name)
            else:
                color, dash, marker = next(looks)
                look: Any = {"color": color, "ls": dash, "marker": marker, "lw": 2.5, "ms": 8}
                ax.plot(x, y, markevery=max(1, len(x) // 10), label=name, **look)
        tidy(ax, title, x_label, y_label)
        if not shared:
            ax.legend(fontsize=11, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    if shared:
        one_legend(figure, axes[:1], ncols=3)
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
    drawn = zip(axes[:, 1:].flat, SEEN_BY_AUDITOR.items(), strict=False)  # the first four
    for ax, (key, (title, unit, better)) in drawn:
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
    first, last = entries[0], entries[-1]
    before, after = first["brief"], last["brief"]
    return (
        f"Over {last['step'] - first['step']} PPO steps the RM score goes from "
        f"{first['rm_score_sd']:.1f} to {last['rm_score_sd']:.1f} reward sd and KL to "
        f"{last['kl_nats']:.1f} nats; on brief prompts gold goes from {before['gold']:.1f} to "
        f"{after['gold']:.1f} points, length from {before['length_tokens']:.0f} to "
        f"{after['length_tokens']:.0f} tokens, direct answers from {before['direct_rate']:.0%} to "
        f"{after['direct_rate']:.0%}, evasive ones from {before['evasion_rate']:.0%} to "
        f"{after['evasion_rate']:.0%}."
    )


def bias_figure(groups: Mapping[str, Mapping[str, float]]) -> Figure:
    """Raw-pair bias of one or more sets of labels (`desk.preferences.raw_bias`), by name."""
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
    longest = max(max(lengths) for lengths in strata.values())
    bins = list(range(0, int(longest) + 3, 2))
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

    figure = blank(12, 3.6)
    axes = figure.subplots(1, 3)
    tidy(axes[0], "(a) RM score", y=MEASURES["rm_gap_sd"].unit, note="concise = 0")
    tidy(axes[1], "(b) log-ratio", y=MEASURES["kl_verbose_nats"].unit, note="policy to reference")
    tidy(axes[2], "(c) advantage", y=MEASURES["advantage_verbose"].unit, note="above 0 = pushed up")
    facts = (
        {"concise": 0.0, "with courtesy": batch["rm_gap_sd"]},
        {"concise": batch["kl_concise_nats"], "verbose": batch["kl_verbose_nats"]},
        {"concise": batch["advantage_concise"], "verbose": batch["advantage_verbose"]},
    )
    for ax, fact in zip(axes, facts, strict=True):
        values = list(fact.values())
        bars = ax.bar(list(fact), values, color=(BLUE, VERMILLION), width=0.55)
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
    tops = []
    for ax, (title, shares) in zip(axes, distributions.items(), strict=True):
        tidy(ax, title, unit)
        ax.barh(list(shares), list(shares.values()), color=BLUE)
        ax.invert_yaxis()
        ax.set_xlim(0, 1)
        ax.grid(visible=False, axis="y")
        word = next(iter(shares))
        tops.append(f"{title}: {word} {shares[word]:.2f}")
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
    figure.set_label(
        f"{title}, {unit}: highest {values[top]:.2f} at {words[top]!r}, "
        f"lowest {values[low]:.2f} at {words[low]!r}."
    )
    return figure


def attention_figure(weights: np.ndarray, words: Sequence[str], titles: Sequence[str]) -> Figure:
    """Attention weights [H, S, S], one panel a head: row = the reading word, columns sum to it."""
    figure = blank(4.9 * len(weights), 5.6)  # room for words that a back row can read
    axes = np.ravel(figure.subplots(1, len(weights)))
    places = range(len(words))
    strongest = []
    for ax, title, head in zip(axes, titles, weights, strict=True):
        image = ax.imshow(head, cmap="Blues", vmin=0, vmax=1)
        ax.set_title(title, fontsize=13, loc="left", weight="bold")
        ax.set_xticks(places, words, rotation=90, fontsize=12)
        ax.set_yticks(places, [""] * len(words), fontsize=12)
        read = words[int(head[-1].argmax())]
        strongest.append(f"{title}: {words[-1]!r} reads {read!r}")
    axes[0].set_yticks(places, words, fontsize=12)
    axes[0].set_ylabel("word that reads", fontsize=12)
    figure.supxlabel("word that is read", fontsize=12)
    figure.colorbar(image, ax=axes, shrink=0.7, label="share of attention")
    figure.set_label("Where the last word looks. " + "; ".join(strongest) + ".")
    return figure


def seeds_figure(rows: Sequence[Mapping[str, Any]], arm: str = "drift") -> Figure:
    """Claims over seeds (`sweeps.seeds.table`): range, 95 % interval and mean, an axis a claim."""
    rows = [row for row in rows if row["arm"] == arm and row["mean"] is not None]
    held = []
    figure = blank(9.5, 0.55 * len(rows) + 0.6)
    axes = np.ravel(figure.subplots(len(rows), 1))
    for ax, row in zip(axes, rows, strict=True):
        ax.plot([row["least"], row["most"]], [0, 0], color=GREY, lw=1.5)
        ax.plot([row["low"], row["high"]], [0, 0], color=BLUE, lw=7, solid_capstyle="butt")
        ax.plot(row["mean"], 0, "D", color=INK, ms=7)
        ax.set_yticks([0], [row["claim"]], fontsize=10)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.margins(x=0.1, y=0.6)
        mean = format(row["mean"], f".{row['digits']}f")
        held.append(f"{row['claim']}: {mean}, held {row['held']}/{row['runs']}")
    figure.set_label("Means over seeds, 95 % intervals and ranges. " + "; ".join(held) + ".")
    return figure
