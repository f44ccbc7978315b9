"""Three dials at once over runs that were made: beta, epsilon and the labelers' length bias.

`SweepExplorer` shows the runs of one cell of `minirlhf sweep`, seed by seed. It snaps to cells that
were computed and says which; between cells nothing is filled in, so the small plots over beta are
marks without a line. Beside the share of verbose answers stands what the closed form of two answers
says: logit p* = logit p0 + gap / beta (oracle.two_answer), with p0 the reference's own share of
verbose answers to brief prompts and the gap what the cell's reward model pays for ONE courtesy
phrase on a concise correct answer. A verbose answer of a run is longer than one phrase, prompts
differ, and a run may stop before it arrives: where the formula misses, the picture shows it.

A button makes 20 steps of the cell live, with the shipped reference and reward model, into the same
plot (LiveRun without its panel, so that no slider rounds a dial). Left out: other remedies.

Source: Rafailov et al. (2023, arXiv 2305.18290, eq. 4) for the tilt.
"""

import html
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from minirlhf.audit.measures import AUDIT
from minirlhf.desk.world import STRATA
from minirlhf.drift.data import DIALS
from minirlhf.engine.intervals import student_t, student_t_rows
from minirlhf.lab.background import ButtonJob, JobPanel, Stop
from minirlhf.lab.panels.batch_plots import SIDE
from minirlhf.lab.panels.steered_run import LiveRun
from minirlhf.lab.picture import LiveFigure
from minirlhf.lab.plots import BLUE, GREY, INK, ORANGE, VERMILLION, blank, one_legend, tidy
from minirlhf.oracle.closed_form import two_answer

CELL = ("beta", "clip", "length_bias")
NAMES = {"beta": "beta", "clip": "epsilon", "length_bias": "length bias"}
ENDS = {  # column of the sweep -> title, unit and direction
    "final_brief_gold": ("gold, brief", AUDIT["gold"].axis),
    "final_brief_kl_nats": ("KL, brief", AUDIT["kl_nats"].unit),
    "final_brief_length_tokens": ("length, brief", AUDIT["length_tokens"].axis),
    "final_brief_verbose_rate": ("verbose answers, brief", AUDIT["verbose_rate"].axis),
}
LIVE, CANCEL = "run this cell live", "cancel the live run"


def closed_form(rows: pd.DataFrame) -> np.ndarray:
    """p* of every run, from its own p0 and gap. A p0 of 0 or 1 among n answers counts as half an
    answer of n + 1, so that it has a logit; beta 0 is the limit of a small one."""
    n = rows["reference_brief_n"].to_numpy(dtype=float)
    p0 = (n * rows["reference_brief_verbose_rate"].to_numpy(dtype=float) + 0.5) / (n + 1)
    gap = rows["gap_courtesy_brief_sd"].to_numpy(dtype=float)
    beta = np.maximum(rows["beta"].to_numpy(dtype=float), 1e-9)
    return two_answer(torch.tensor(p0), torch.tensor(gap), torch.tensor(beta)).numpy()


class _Band:
    """Runs over steps: one faint line a seed, their mean, and its 95 % interval as a band."""

    def __init__(self, ax: Axes, color: str, marker: str, name: str):
        self._band: Any = ax.add_collection(PolyCollection([], color=color, alpha=0.2, lw=0))
        self._seeds: Any = ax.add_collection(LineCollection([], colors=color, lw=0.8, alpha=0.45))
        (self._mean,) = ax.plot([], [], color=color, marker=marker, lw=2.5, ms=6, label=name)
        self.artists = [self._band, self._seeds, self._mean]

    def move(self, table: pd.DataFrame) -> dict[int, float]:
        """Show a table of steps by seeds; {step: mean}. Steps without a value are left out."""
        table = table.dropna(how="all")
        steps = table.index.to_numpy()
        values = table.to_numpy(dtype=float)  # [steps, seeds]
        mean, low, high = np.stack(student_t_rows(values))  # [steps] each
        self._mean.set(data=(steps, mean), markevery=max(1, len(steps) // 8))
        runs = [np.c_[steps, run][~np.isnan(run)] for run in values.T]
        self._seeds.set_segments([run for run in runs if len(run)])
        # there along the lower end, back along the upper one
        edge = np.r_[np.c_[steps, low], np.c_[steps, high][::-1]]
        edge = edge[~np.isnan(edge[:, 1])]
        self._band.set_verts([edge] if len(edge) else [])
        return dict(zip(steps.tolist(), mean.tolist(), strict=True))


class _Ends:
    """Ends of runs over the computed betas, evenly spaced: dots, mean, interval; a ring round the
    chosen one. `predicted`, if the table has it for this column, as crosses."""

    def __init__(self, ax: Axes, column: str, sweep: pd.DataFrame, betas: list[float]):
        self._column = column
        title, unit = ENDS[column]
        tidy(ax, title, "beta (computed ones only)", unit)
        ax.set_xticks(range(len(betas)), [f"{b:g}" for b in betas], fontsize=10)
        low, high = sweep[column].min(), sweep[column].max()
        self._rate = column.endswith("_rate")
        if self._rate:
            low, high = 0.0, 1.0
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        air = 0.12 * (high - low) + 1e-9
        ax.set(xlim=(-0.5, len(betas) - 0.5), ylim=(low - air, high + air))
        (self._seeds,) = ax.plot([], [], ".", color=GREY, ms=5)
        self._bars = ax.vlines([0], 0, 0, color=BLUE, lw=3)
        (self._mean,) = ax.plot([], [], "o", color=BLUE, ms=8, label="measured")
        (self._form,) = ax.plot([], [], "X", color=VERMILLION, ms=9, mec="white")
        self._form.set_label("closed form: 2 answers, 1 phrase" if self._rate else "")
        (self._ring,) = ax.plot([], [], "o", mfc="none", mec=INK, mew=2, ms=18)
        self.artists = [self._seeds, self._bars, self._mean, self._form, self._ring]

    def move(self, cells: dict[int, pd.DataFrame], chosen: int) -> dict[str, float]:
        """Show the cells of one epsilon and length bias by place; the chosen one's numbers."""
        values = {at: runs[self._column].to_numpy(dtype=float) for at, runs in cells.items()}
        found = {at: student_t(ends) for at, ends in values.items()}
        spread = [(at, end) for at, ends in values.items() for end in ends]
        self._seeds.set_data(*np.transpose(spread))
        self._mean.set_data(list(found), [interval.mean for interval in found.values()])
        bars = [[(at, x.low), (at, x.high)] for at, x in found.items()]
        self._bars.set_segments(bars)
        self._ring.set_data([chosen], [found[chosen].mean])
        said = {self._column: found[chosen].mean}
        if self._rate:
            form = {at: float(runs["closed_form"].mean()) for at, runs in cells.items()}
            beside = [at + 0.22 for at in form]
            self._form.set_data(beside, list(form.values()))
            said["closed_form"] = form[chosen]
        return said


class SweepExplorer(JobPanel):
    """Dials over the cells of a sweep of the run with nothing changed.

    `sweep` and `trajectories` are tables of `minirlhf sweep`; `case` (shipped()) gives what a live
    run starts from. `cell` is what is on screen, {"beta", "clip", "length_bias"}; `shown` its
    numbers. `live_run` is the LiveRun of the button, once there is one: show it in a cell to go on.
    Raises ValueError for tables without a run.
    """

    def __init__(
        self, sweep: pd.DataFrame, trajectories: pd.DataFrame, case: Any = None, *, steps: int = 20
    ):
        self._case = case
        self._count = steps
        self._lived: dict[tuple[float, ...], list[float]] = {}  # mean lengths by cell
        self.live_run: LiveRun | None = None
        self._read(sweep, trajectories)
        self._options = {name: sorted(set(self._sweep[name])) for name in CELL}
        self.job = ButtonJob(self.run_live, (LIVE, CANCEL), steps)
        self.button, self.progress = self.job.button, self.job.progress
        self.button.disabled = case is None
        self.button.layout.width = self.progress.layout.width = "170px"
        self.note = widgets.HTML()
        controls = {name: self._dial(name) for name in CELL}
        between = [self.button, self.progress, self.note]
        figure, artists = self._draw()
        live = LiveFigure(figure, artists, width=1010)
        super().__init__("sweep", controls, live, self.show, between)
        wide = {"width": "1020px", "max_width": "100%"}
        self.layout = widgets.Layout(display="flex", flex_flow="row wrap", **wide)

    def _read(self, sweep: pd.DataFrame, trajectories: pd.DataFrame) -> None:
        """Keep the runs with nothing changed: their ends and their steps, by cell."""
        plain = sweep[sweep["remedy"] == "none"]
        if plain.empty:
            raise ValueError("the sweep has no run with nothing changed: sweep the remedy 'none'")
        dials = dict.fromkeys(CELL, float)
        plain = plain.astype(dials)
        self._sweep = plain.assign(closed_form=closed_form(plain))
        self._cells = dict(list(self._sweep.groupby([*CELL])))
        self._paths = trajectories[trajectories["remedy"] == "none"].astype(dials)
        drawn = ["length_tokens"] + [f"advantage_{side}" for side in SIDE]
        wide = self._paths.pivot(index=[*CELL, "step"], columns="seed", values=drawn).astype(float)
        by_cell = wide.groupby(level=[*CELL])
        self._steps = {key: table.droplevel([*CELL]) for key, table in by_cell}

    def _dial(self, name: str) -> widgets.SelectionSlider:
        values = self._options[name]
        return widgets.SelectionSlider(
            options=[(f"{x:g}", x) for x in values],
            value=values[len(values) // 2],
            description=NAMES[name],
            layout=widgets.Layout(width="33%"),
            style={"description_width": "82px"},
        )

    # ------------------------------------------------------------------ the picture
    def _draw(self) -> tuple[Figure, list[Any]]:
        figure = blank(10.1, 5.0, rect=(0, 0, 1, 0.94), wspace=0.02)
        axes: Any = figure.subplots(2, 3)
        lengths = tidy(axes[0, 0], "length, all prompts", "PPO step", AUDIT["length_tokens"].short)
        self._length = _Band(lengths, BLUE, "o", "mean, 95 % interval")
        pushes = tidy(axes[0, 1], "advantage, brief", "PPO step", "mean, ↑ pushed up")
        pushes.axhline(0, color=INK, lw=1)
        self._advantage = {
            "verbose": _Band(pushes, SIDE["verbose"]["color"], "s", "verbose"),
            "concise": _Band(pushes, SIDE["concise"]["color"], "o", "concise"),
        }
        (self._run,) = lengths.plot([], [], color=ORANGE, lw=3, ls="--", label="live run")
        last = self._paths["step"].max()
        longest = max(48.0, self._paths["length_tokens"].max())
        lengths.set(xlim=(0, last), ylim=(0, 1.05 * longest))
        sides = self._paths.groupby([*CELL, "step"])[[f"advantage_{side}" for side in SIDE]]
        pushed = 1.2 * sides.mean().abs().stack().quantile(0.99) + 1e-9  # rare sides are noisy
        pushes.set(xlim=(0, last), ylim=(-pushed, pushed))
        places = zip((axes[1, 0], axes[1, 1], axes[1, 2], axes[0, 2]), ENDS, strict=True)
        betas = self._options["beta"]
        self._ends = [_Ends(ax, column, self._sweep, betas) for ax, column in places]
        look: Any = {"transform": figure.transFigure, "va": "top", "in_layout": False}
        self._title = lengths.text(0.005, 0.995, "", fontsize=13, weight="bold", **look)
        named = (lengths, pushes, axes[0, 2])
        one_legend(figure, named, ncols=6, fontsize=10, columnspacing=1.1)
        drawn = [self._length, *self._advantage.values(), *self._ends]
        moved = [artist for part in drawn for artist in part.artists]
        return figure, [*moved, self._run, self._title]

    def nearest(self, **dials: float) -> tuple[float, ...]:
        """The computed cell nearest to these dials, counted in places of the sliders."""
        wanted = [self._options[name].index(dials[name]) for name in CELL]

        def away(cell: tuple[float, ...]) -> int:
            places = (self._options[n].index(x) for n, x in zip(CELL, cell, strict=True))
            return sum(abs(a - b) for a, b in zip(wanted, places, strict=True))

        return min(self._cells, key=away)

    def show(self, **dials: float) -> str:
        """Show the cell of these dials, or the nearest one that was computed; in words."""
        key = self.nearest(**dials)
        self.cell = dict(zip(CELL, key, strict=True))
        rows = self._cells[key]
        paths = self._steps[key]
        self.shown: dict[str, Any] = {"seeds": sorted(rows["seed"])}
        self.shown["length"] = self._length.move(paths["length_tokens"])
        for side, band in self._advantage.items():
            self.shown[side] = band.move(paths[f"advantage_{side}"])
        # all betas of the same epsilon and length bias, by their place on the axis
        betas = self._options["beta"]
        same = {betas.index(cell[0]): x for cell, x in self._cells.items() if cell[1:] == key[1:]}
        for ends in self._ends:
            self.shown.update(ends.move(same, betas.index(self.cell["beta"])))
        lived = self._lived.get(key, [])
        self._run.set_data(range(1, len(lived) + 1), lived)
        named = ", ".join(f"{NAMES[name]} {value:g}" for name, value in self.cell.items())
        asked = "" if self.cell == dials else "; the dials' own cell was not computed"
        said = f"computed cell: {named}; {len(rows)} seeds{asked}"
        self._title.set_text(said)
        return f"{said[0].upper()}{said[1:]}. {self._sentence()}"

    def _sentence(self) -> str:
        found = self.shown
        lengths = list(found["length"].values())
        return (
            f"Over PPO's steps the mean length goes from {lengths[0]:.0f} to {lengths[-1]:.0f} "
            f"tokens; at the end, on brief prompts, gold is {found['final_brief_gold']:.1f} "
            f"points, KL {found['final_brief_kl_nats']:.1f} nats, and "
            f"{found['final_brief_verbose_rate']:.0%} of answers are verbose; one courtesy "
            f"phrase's gap in the two-answer formula would make it {found['closed_form']:.0%}."
        )

    # ------------------------------------------------------------------ the live run
    def run_live(self) -> None:
        """Make the steps of the cell on screen, on a thread of its own.

        To cancel it stops it after the step in flight; what it made stays on screen.
        """
        self.job.halt()
        if self.cell["length_bias"] not in DIALS:
            shipped = ", ".join(f"{x:g}" for x in DIALS)
            self.note.value = f"No reward model of this length bias is shipped: take {shipped}."
            return
        cell: dict[str, float] = {**self.cell}
        self.job.start(lambda stop: self._work(stop, cell))

    def _work(self, stop: Stop, cell: dict[str, float]) -> None:
        bias = cell["length_bias"]
        source = f"the shipped reference and reward model of length bias {bias:g}, seed 0"
        self.note.value = f"Starting from {source} ..."
        try:
            live = LiveRun(self._case, batch=self._case.config.ppo.batch)
            self.live_run = live
            for name, value in cell.items():
                live.controls[name].value = value
            if live.values() != cell:
                raise ValueError("the live run's dials do not reach this cell")
            for step in range(1, self._count + 1):
                if stop.is_set():
                    return
                live.run_steps(1)
                if len(live.history) < step:  # it was refused
                    raise ValueError(live.live.alt)
                self._lived[tuple(cell.values())] = [_mean_length(row) for row in live.history]
                self.progress.value = step
                self.note.value = f"Step {step} of {self._count}, from {source}."
                self.update()
        except Exception as error:  # in a thread nobody else would see it
            self.note.value = f"Stopped: {html.escape(str(error))}"


def _mean_length(row: dict[str, Any]) -> float:
    """Tokens per answer of a whole batch, from its strata."""
    known = [row[s] for s in STRATA if row[s]["n"]]
    return sum(x["n"] * x["length_tokens"] for x in known) / sum(x["n"] for x in known)
