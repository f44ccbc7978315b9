"""The answers of a batch as a list to sort and to choose from: one line an answer.

A list box of the browser's own, so it scrolls by itself and never changes its height. A click
chooses, and so do two buttons beside it, for JupyterLab keeps the up and down arrows to itself and
moves from cell to cell. Left out: what the chosen answer says, token by token (lab/heatmap.py).
"""

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as widgets
import numpy as np

from minirlhf.audit.measures import STEP
from minirlhf.autopsy.convention import demand_fields
from minirlhf.lab.heatmap import visible
from minirlhf.rollout import Rollout

LINES = 12  # seen at once
MOST = 1000  # answers that a browser lists without waiting
COLUMNS = {  # name -> what its head says, width, format
    "row": ("answer", 6, "d"),
    "stratum": ("stratum", 10, "s"),
    "length": (STEP["response/length_tokens"].short, 6, ".0f"),
    "score": (STEP["objective/score_sd"].unit, 9, "+.2f"),
    "kl": (f"KL, {STEP['objective/kl_nats'].short}", 8, "+.2f"),
    "advantage": ("mean adv.", 9, "+.2f"),
    "positive_share": ("share > 0", 9, ".0%"),
    "finished": ("finished", 8, "s"),
}
CHOICES = {  # what to sort by
    "answer number": "row",
    "stratum": "stratum",
    f"length, {COLUMNS['length'][0]}": "length",
    f"score, {COLUMNS['score'][0]}": "score",
    "KL to the reference, nats an answer": "kl",
    "mean advantage": "advantage",
    "share of tokens with a positive advantage": "positive_share",
    "finished or cut off": "finished",
}
STYLE = """<style>.minirlhf-batch select[size]{font:13px/17px monospace;height:232px}
.minirlhf-batch pre{font:bold 13px/17px monospace;margin:0 0 0 6px;padding:0;border:0;
color:inherit;background:none}</style>"""


def batch_rows(rollout: Rollout, strata: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Columns of the table, name -> [B]; score in reward sd, kl (the log-ratio summed over an
    answer) in nats, advantage the mean over an answer's tokens, positive_share of its tokens.

    nan where an answer has no token. Raises ValueError for a batch without advantages.
    """
    demand_fields(rollout, "advantages")
    assert rollout.advantages is not None
    n = len(rollout)
    if strata is not None and len(strata) != n:
        raise ValueError(f"{len(strata)} strata for {n} answers: give one name an answer")
    mask = rollout.mask.numpy(force=True)
    a, log_p, log_ref = (
        np.where(mask, x.numpy(force=True).astype(float), 0.0)
        for x in (rollout.advantages, rollout.logprobs, rollout.ref_logprobs)
    )
    length = mask.sum(1)
    per = np.where(length > 0, length, np.nan)
    ended = None if rollout.finished is None else rollout.finished.numpy(force=True)
    return {
        "row": np.arange(n),
        "stratum": np.array(["all"] * n if strata is None else [visible(s, 10) for s in strata]),
        "length": length,
        "score": rollout.scores.numpy(force=True).astype(float),
        "kl": (log_p - log_ref).sum(1),
        "advantage": a.sum(1) / per,
        "positive_share": ((a > 0) & mask).sum(1) / per,
        "finished": np.full(n, "?") if ended is None else np.where(ended, "yes", "cut off"),
    }


def order(values: np.ndarray, *, descending: bool) -> np.ndarray:
    """Rows sorted by `values`: ties by their number, nan at the end either way."""
    found = np.unique(values, return_inverse=True)[1].astype(float)  # ranks: names sort as well
    rank = -found if descending else found
    if values.dtype.kind == "f":
        rank = np.where(np.isnan(values), np.inf, rank)
    return np.argsort(rank, kind="stable")


class BatchTable(widgets.VBox):
    """The answers of a batch, sorted by any column; `on_choose(row)` hears which one is chosen.

    Sorting chooses the first line. `show(rollout)` puts another batch of the same answers in its
    place (what a what-if makes of them, say) and keeps the chosen answer. `row` is the chosen
    answer's number in the batch. `below` is shown under the list. Where no kernel runs, the first
    lines stand as text.
    """

    def __init__(
        self,
        rollout: Rollout,
        strata: Sequence[str] | None = None,
        *,
        on_choose: Callable[[int], Any] | None = None,
        below: widgets.Widget | None = None,
    ):
        self._strata = strata
        self._told = on_choose
        self._quiet = False
        wide = widgets.Layout(width="420px", max_width="100%")
        looks: dict[str, Any] = {"layout": wide, "style": {"description_width": "60px"}}
        self.by: Any = widgets.Dropdown(
            options=CHOICES, value="row", description="sort by", **looks
        )
        self.down: Any = widgets.ToggleButtons(
            options={"low first": False, "high first": True},
            style={"button_width": "90px"},
        )
        head = "".join(_fit(name, width) for name, width, _ in COLUMNS.values())
        room = widgets.Layout(width="660px", max_width="100%", height="232px")
        self.answers: Any = widgets.Select(rows=LINES, layout=room)
        self.note = widgets.HTML(f"{STYLE}<pre>{html.escape(head)}</pre>")
        self.steps = [self._button(*step) for step in (("previous", "up", -1), ("next", "down", 1))]
        beside = widgets.HBox([self.answers, widgets.VBox(self.steps)])
        listed = widgets.VBox([widgets.HBox([self.by, self.down]), self.note, beside])
        listed.layout.height = "300px"
        super().__init__([listed] if below is None else [listed, below])
        self.add_class("minirlhf-batch")
        self.row = 0
        self.show(rollout)
        self.by.observe(self._sort, "value")
        self.down.observe(self._sort, "value")
        self.answers.observe(self._choose, "value")

    def show(self, rollout: Rollout) -> None:
        """List these answers; raises ValueError as `batch_rows` does."""
        self.columns = batch_rows(rollout, self._strata)
        self._list(self.row)

    def choose(self, row: int) -> None:
        """Choose an answer by its number in the batch; ValueError if the list has none such."""
        if row not in self.order[:MOST]:
            raise ValueError(f"no answer {row} in the list: choose one of {len(self.order)}")
        self.answers.value = row

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None, **options: Any) -> Any:
        shown = super()._repr_mimebundle_(include=include, exclude=exclude, **options)
        head = "".join(_fit(name, width) for name, width, _ in COLUMNS.values())
        lines = [head, *(line for line, _ in self.answers.options[:LINES])]
        return {**(shown or {}), "text/plain": "\n".join(line.rstrip() for line in lines)}

    def _button(self, name: str, arrow: str, by: int) -> widgets.Button:
        """A button that chooses the line `by` lines further down, if there is one."""
        button = widgets.Button(
            description=name, icon=f"arrow-{arrow}", layout=widgets.Layout(width="100px")
        )

        def move(_clicked: Any) -> None:
            at = self.answers.index + by
            if 0 <= at < len(self.answers.options):
                self.answers.index = at

        button.on_click(move)
        return button

    def _sort(self, _change: Any) -> None:
        self._list(None)  # an answer kept would be chosen out of sight

    def _list(self, keep: int | None) -> None:
        """Fill the list and choose `keep`, or the first line if it is not there."""
        self.order = order(self.columns[self.by.value], descending=self.down.value)
        lines = [(self._line(row), int(row)) for row in self.order[:MOST]]
        self._quiet = True  # new options choose the first, which nobody asked for
        try:
            self.answers.options = lines
            self.answers.value = keep if keep in self.order[:MOST] else lines[0][1]
        finally:
            self._quiet = False
        self._choose()

    def _line(self, row: int) -> str:
        cells = []
        for name, (_, width, shown) in COLUMNS.items():
            value = self.columns[name][row]
            known = value == value  # nan is not
            cells.append(_fit(format(value, shown) if known else "-", width))
        return "".join(cells)

    def _choose(self, _change: Any = None) -> None:
        if self._quiet or self.answers.value is None or self.answers.value == self.row:
            return
        self.row = self.answers.value
        if self._told:
            self._told(self.row)


def _fit(text: str, width: int) -> str:
    return f"{text[:width]:>{width}}  "
