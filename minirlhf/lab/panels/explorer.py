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
import threading
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from minirlhf.desk.world import STRATA
from minirlhf.drift.data import DIALS
from minirlhf.engine.intervals import student_t, student_t_rows
from minirlhf.lab.panels.batch_plots import SIDE
from minirlhf.lab.panels.steered_run import LiveRun
from minirlhf.lab.picture import LiveFigure, Panel
from minirlhf.lab.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILLION, blank, tidy
from minirlhf.oracle.closed_form import two_answer

CELL = ("beta", "clip", "length_bias")
NAMES = {"beta": "beta", "clip": "epsilon", "length_bias": "length bias"}
ENDS = {  # column of the sweep -> title, unit and direction
    "final_brief_gold": ("gold, brief", "points, ↑ better"),
    "final_brief_kl_nats": ("KL, brief", "nats per answer"),
    "final_brief_length_tokens": ("length, brief", "tokens"),
    "final_brief_verbose_rate": ("verbose answers, brief", "share"),
}
LIVE, CANCEL = "run this cell live", "cancel the live run"


def closed_form(rows: pd.DataFrame) -> np.ndarray:
    """p* of every run, from its own p0 and gap. A p0 of 0 or 1 among n answers counts as half an
    answer of n + 1, so that it has a logit; beta 0 is the limit of a small one."""
    n = rows["reference_brief_n"].to_numpy(dtype=float)
    p0 = (n * rows["reference_brief_verbose_rate"].to_numpy(dtype=float) + 0.5) / (n + 1)
    gap = rows["gap_courtesy_brief_sd"].to_numpy(dtype=float)
    beta = np.maximum(rows["beta"].to_numpy(dtype=float), 1e-9)
    return two_answer(*(torch.tensor(x) for x in (p0, gap, beta))).numpy()


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
        steps, values = table.index.to_numpy(), table.to_numpy(dtype=float)
        mean, low, high = student_t_rows(values)
        self._mean.set(data=(steps, mean), markevery=max(1, len(steps) // 8))
        runs = [np.c_[steps, run][~np.isnan(run)] for run in values.T]
        self._seeds.set_segments([run for run in runs if len(run)])
        edge = np.r_[np.c_[steps, low], np.c_[steps, high][::-1]]
        edge = edge[~np.isnan(edge[:, 1])]
        self._band.set_verts([edge] if len(edge) else [])
        return dict(zip(steps.tolist(), mean.tolist(), strict=True))


class _Ends:
    """Ends of runs over the computed betas, evenly spaced: dots, mean, interval; a ring round the
    chosen one. `predicted`, if the table has it for this column, as crosses."""

    def __init__(self, ax: Axes, column: str, sweep: pd.DataFrame, betas: list[float]):
        self._column, title, unit = column, *ENDS[column]
        tidy(ax, title, "beta (computed ones only)", unit)
        ax.set_xticks(range(len(betas)), [f"{b:g}" for b in betas], fontsize=10)
        low, high = sweep[column].min(), sweep[column].max()
        self._rate = column.endswith("_rate")
        if self._rate:
            low, high = 0.0, 1.0
            ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        air = 0.12 * (high - low) + 1e-9
        ax.set(xlim=(-0.5, len(betas) - 0.5), ylim=(low - air, high + air))
        self._seeds = ax.plot([], [], ".", color=GREY, ms=5)[0]
        self._bars = ax.vlines([0], 0, 0, color=BLUE, lw=3)
        self._mean = ax.plot([], [], "o", color=BLUE, ms=8, label="measured")[0]
        self._form = ax.plot([], [], "X", color=VERMILLION, ms=9, mec="white")[0]
        self._form.set_label("closed form: 2 answers, 1 phrase" if self._rate else "")
        self._ring = ax.plot([], [], "o", mfc="none", mec=INK, mew=2, ms=18)[0]
        self.artists = [self._seeds, self._bars, self._mean, self._form, self._ring]

    def move(self, cells: dict[int, pd.DataFrame], chosen: int) -> dict[str, float]:
        """Show the cells of one epsilon and length bias by place; the chosen one's numbers."""
        values = {at: of[self._column].to_numpy(dtype=float) for at, of in cells.items()}
        found = {at: student_t(x) for at, x in values.items()}
        spread = [(at, y) for at, x in values.items() for y in x]
        self._seeds.set_data(*np.transpose(spread))
        self._mean.set_data([*found], [x.mean for x in found.values()])
        self._bars.set_segments([[(at, x.low), (at, x.high)] for at, x in found.items()])
        self._ring.set_data([chosen], [found[chosen].mean])
        said = {self._column: found[chosen].mean}
        if self._rate:
            form = {at: float(of["closed_form"].mean()) for at, of in cells.items()}
            self._form.set_data([at + 0.22 for at in form], [*form.values()])
            said["closed_form"] = form[chosen]
        return said


class SweepExplorer(Panel):
    """Dials over the cells of a sweep of the run with nothing changed.

    `sweep` and `trajectories` are tables of `minirlhf sweep`; `case` (shipped()) gives what a live
    run starts from. `cell` is what is on screen, {"beta", "clip", "length_bias"}; `shown` its
    numbers. `live_run` is the LiveRun of the button, once there is one: show it in a cell to go on.
    Raises ValueError for tables without a run.
    """

    def __init__(
        self, sweep: pd.DataFrame, trajectories: pd.DataFrame, case: Any = None, *, steps: int = 20
    ):
        self._stop, self._job, self._lived = threading.Event(), threading.Thread(), {}
        self.button = widgets.Button(description=LIVE, disabled=case is None)
        plain = (d[d["remedy"] == "none"] for d in (sweep, trajectories))
        self._sweep, self._paths = (d.astype(dict.fromkeys(CELL, float)) for d in plain)
        if self._sweep.empty:
            raise ValueError("the sweep has no run with nothing changed: sweep the remedy 'none'")
        self._sweep = self._sweep.assign(closed_form=closed_form(self._sweep))
        self._cells = dict(list(self._sweep.groupby([*CELL])))
        shown = ["length_tokens", *(f"advantage_{side}" for side in SIDE)]
        wide = self._paths.pivot(index=[*CELL, "step"], columns="seed", values=shown).astype(float)
        self._steps = {key: of.droplevel([*CELL]) for key, of in wide.groupby(level=[*CELL])}
        self._options = {name: sorted(set(self._sweep[name])) for name in CELL}
        self._case, self._count = case, steps
        self.live_run: LiveRun | None = None
        look: Any = {"layout": widgets.Layout(width="33%"), "style": {"description_width": "82px"}}
        controls = {name: self._dial(name, look) for name in CELL}
        self.button.on_click(lambda _: self.cancel() if self.busy else self.run_live())
        self.progress, self.note = widgets.IntProgress(0, 0, steps), widgets.HTML()
        self.button.layout.width = self.progress.layout.width = "170px"
        live = LiveFigure(*self._draw(), width=1010)
        between = [self.button, self.progress, self.note]
        super().__init__("sweep", controls, live, self.show, between)
        wide = {"width": "1020px", "max_width": "100%"}
        self.layout = widgets.Layout(display="flex", flex_flow="row wrap", **wide)

    def _dial(self, name: str, look: dict[str, Any]) -> widgets.SelectionSlider:
        values = self._options[name]
        look |= {"options": [(f"{x:g}", x) for x in values], "value": values[len(values) // 2]}
        return widgets.SelectionSlider(description=NAMES[name], **look)

    # ------------------------------------------------------------------ the picture
    def _draw(self) -> tuple[Figure, list[Any]]:
        figure = blank(10.1, 5.0, rect=(0, 0, 1, 0.94), wspace=0.02)
        axes: Any = figure.subplots(2, 3)
        ax = tidy(axes[0, 0], "length, all prompts", "PPO step", "tokens")
        self._length = _Band(ax, BLUE, "o", "mean, 95 % interval")
        ax = tidy(axes[0, 1], "advantage, brief", "PPO step", "mean, ↑ pushed up")
        ax.axhline(0, color=INK, lw=1)
        looks = ((PURPLE, "s"), (GREEN, "o"))
        self._advantage = {k: _Band(ax, c, m, k) for k, (c, m) in zip(SIDE, looks, strict=True)}
        (self._run,) = axes[0, 0].plot([], [], color=ORANGE, lw=3, ls="--", label="live run")
        last, top = self._paths["step"].max(), max(48.0, self._paths["length_tokens"].max())
        axes[0, 0].set(xlim=(0, last), ylim=(0, 1.05 * top))
        sides = self._paths.groupby([*CELL, "step"])[[f"advantage_{side}" for side in SIDE]]
        pushed = 1.2 * sides.mean().abs().stack().quantile(0.99) + 1e-9  # rare sides are noisy
        ax.set(xlim=(0, last), ylim=(-pushed, pushed))
        places = zip((axes[1, 0], axes[1, 1], axes[1, 2], axes[0, 2]), ENDS, strict=True)
        betas = self._options["beta"]
        self._ends = [_Ends(ax, column, self._sweep, betas) for ax, column in places]
        look: Any = {"transform": figure.transFigure, "va": "top", "in_layout": False}
        self._title = axes[0, 0].text(0.005, 0.995, "", fontsize=13, weight="bold", **look)
        found = (x.get_legend_handles_labels() for x in (axes[0, 0], ax, axes[0, 2]))
        keys = {name: line for pair in found for line, name in zip(*pair, strict=True)}
        place: Any = {"loc": "outside lower center", "ncols": 6, "columnspacing": 1.1}
        figure.legend(keys.values(), keys, fontsize=10, frameon=False, **place)
        drawn = (self._length, *self._advantage.values(), *self._ends)
        return figure, [*(a for x in drawn for a in x.artists), self._run, self._title]

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
        rows, paths = self._cells[key], self._steps[key]
        beta, betas = self.cell["beta"], self._options["beta"]
        near = {betas.index(k[0]): of for k, of in self._cells.items() if k[1:] == key[1:]}
        self.shown: dict[str, Any] = {"seeds": sorted(rows["seed"])}
        self.shown["length"] = self._length.move(paths["length_tokens"])
        for side, band in self._advantage.items():
            self.shown[side] = band.move(paths[f"advantage_{side}"])
        for ends in self._ends:
            self.shown |= ends.move(near, betas.index(beta))
        lived = self._lived.get(key, [])
        self._run.set_data(range(1, len(lived) + 1), lived)
        named = ", ".join(f"{NAMES[n]} {x:g}" for n, x in self.cell.items())
        asked = "" if self.cell == dials else "; the dials' own cell was not computed"
        self._title.set_text(said := f"computed cell: {named}; {len(rows)} seeds{asked}")
        return f"{said[0].upper()}{said[1:]}. {self._sentence()}"

    def _sentence(self) -> str:
        found, (first, *_, last) = self.shown, [*self.shown["length"].values()] * 2
        rate, form = found["final_brief_verbose_rate"], found["closed_form"]
        return (
            f"Over PPO's steps the mean length goes from {first:.0f} to {last:.0f} tokens; at the "
            f"end, on brief prompts, gold is {found['final_brief_gold']:.1f} points, KL "
            f"{found['final_brief_kl_nats']:.1f} nats, and {rate:.0%} of answers are verbose; one "
            f"courtesy phrase's gap in the two-answer formula would make it {form:.0%}."
        )

    # ------------------------------------------------------------------ the live run
    @property
    def busy(self) -> bool:
        """A live run is under way."""
        return self._job.is_alive() and not self._stop.is_set()

    def run_live(self) -> None:
        """Make the steps of the cell on screen, on a thread of its own."""
        self.cancel()
        self.wait()
        if self.cell["length_bias"] not in DIALS:
            shipped = ", ".join(f"{x:g}" for x in DIALS)
            self.note.value = f"No reward model of this length bias is shipped: take {shipped}."
            return
        self._stop, self.progress.value, self.button.description = threading.Event(), 0, CANCEL
        given = (self._stop, tuple(self.cell.values()))
        self._job = threading.Thread(target=self._work, args=given, daemon=True)
        self._job.start()

    def cancel(self) -> None:
        """Stop a live run after the step in flight; what it made stays on screen."""
        self._stop.set()
        self.button.description = LIVE

    def wait(self) -> None:
        """Until the live run has ended."""
        if self._job.ident is not None:
            self._job.join()

    def _work(self, stop: threading.Event, key: tuple[float, ...]) -> None:
        source = f"the shipped reference and reward model of length bias {key[2]:g}, seed 0"
        self.note.value = f"Starting from {source} ..."
        try:
            self.live_run = live = LiveRun(self._case, batch=self._case.config.ppo.batch)
            for name, value in zip(CELL, key, strict=True):
                live.controls[name].value = value
            if tuple(live.values().values()) != key:
                raise ValueError("the live run's dials do not reach this cell")
            while len(live.history) < self._count and not stop.is_set():
                done = len(live.history)
                live.run_steps(1)
                if len(live.history) == done:
                    raise ValueError(live.live.alt)
                self._lived[key] = [_mean_length(row) for row in live.history]
                self.progress.value = done + 1
                self.note.value = f"Step {done + 1} of {self._count}, from {source}."
                self.update()
        except Exception as error:  # in a thread nobody else would see it
            self.note.value = f"Stopped: {html.escape(str(error))}"
        finally:
            if not stop.is_set():
                self.button.description = LIVE

    def close(self) -> None:
        """As Panel.close; a live run under way is stopped."""
        self.cancel()
        super().close()


def _mean_length(row: dict[str, Any]) -> float:
    """Tokens per answer of a whole batch, from its strata."""
    known = [row[s] for s in STRATA if row[s]["n"]]
    return sum(x["n"] * x["length_tokens"] for x in known) / sum(x["n"] for x in known)
