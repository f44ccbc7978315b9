"""One batch under three dials: beta, the labelers' length bias, and the clip's epsilon.

They drive, together and in one frame, the words' heat map, the batch's, the advantages in parts,
the positive share and what the batch does to length. beta and length bias price the same answers
anew at every move. epsilon takes the real update again, on a copy and on a thread of its own,
when its handle is let go: the words, both pictures and the share then show the push that is left
at the end of that update. Length does not follow epsilon: a push that is left is not the way that
was gone, it may even point back. Every what-if says on screen how exact it is.

Which answers another setting would have led to, one batch cannot tell. Left out: what made the
batch (autopsy/reconciliation.py), the drawing and the still figures (batch_plots.py).
"""

import html
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from torch import Tensor

from minirlhf.autopsy.convention import Convention
from minirlhf.autopsy.parts import AdvantageParts
from minirlhf.autopsy.pushes import length_weights
from minirlhf.autopsy.reconciliation import recomputed
from minirlhf.autopsy.what_ifs import WhatIf, repricer, what_if, what_if_clip
from minirlhf.lab.background import ButtonJob, JobPanel, Stop
from minirlhf.lab.heatmap import STYLE, heat_map, passed_up
from minirlhf.lab.panels.batch_plots import BatchPicture, part_means, waterfall_said
from minirlhf.lab.picture import LiveFigure
from minirlhf.ppo import PPO, TrainingDiverged
from minirlhf.rollout import Rollout

EPSILONS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
FIRST = "first minibatch"
LOGGED = "as logged"
FIRST_WHY = "exact: in the first minibatch every ratio is 1, so the clip cuts nothing"
RUNNING = "the update is being taken again; until it is there, nothing is cut"
NONE_YET = "no update with this epsilon yet, so nothing is cut: press the button"
ABOVE = '<div style="height:248px;overflow:auto">{}{}</div>'  # one height: nothing below jumps
LINE = '<p style="margin:0;line-height:1.3;font-size:13px"><b>{}</b>: {}.</p>'
BEFORE = "before any clip, whatever epsilon is"
LEFT = "words, pictures and shares show the push that is left"
AGAIN, CANCEL = "take the update again", "cancel the update"


class Dials(NamedTuple):
    """What an update depends on."""

    eps: float
    beta: float
    bias: Any
    refit: bool


class BatchPanel(JobPanel):
    """Three dials over one batch; `shown` holds the numbers on screen, `seen` [B, T] what a token's
    log-probability is pushed by.

    `verbose` and `concise` are bool [B]; `words` a word for every token of every answer; `scores`
    {length bias: scores [B]} of the same answers by reward models trained at other dials
    (`rescored`), none for a batch whose reward models are gone; `strata` names [B]; `run` the run
    as it was before this batch, which epsilon needs; `features` [N, F] of the tokens in the mask
    for a critic fitted again (default: the old values). Raises ValueError as `autopsy.split`.
    """

    def __init__(
        self,
        rollout: Rollout,
        convention: Convention,
        *,
        verbose: Tensor,
        concise: Tensor,
        words: Sequence[Sequence[str]],
        scores: Mapping[float, Tensor] | None = None,
        strata: Sequence[str] | np.ndarray | None = None,
        run: PPO | None = None,
        features: Tensor | None = None,
    ):
        self._batch = rollout
        self._convention = convention
        self._run = run
        self._words = words
        self._kinds = {"verbose": verbose, "concise": concise}
        self._features = rollout.values[rollout.mask][:, None] if features is None else features
        self._scores: dict[Any, Tensor] = {LOGGED: rollout.scores}
        if scores:
            self._scores = {bias: scores[bias] for bias in sorted(scores)}
        self._priced = repricer(rollout, convention, self._scores)
        names = np.full(len(rollout), "all") if strata is None else np.asarray(strata)
        self._strata = {str(s): torch.as_tensor(names == s) for s in np.unique(names)}
        self._lengths, self._unit, self._why = length_weights(rollout, self._strata, run)
        self._stops = None if rollout.ref_eos_logprobs is None else passed_up(rollout)
        self._updates: dict[Dials, Tensor | str] = {}  # slopes [B, T], or why there are none
        self._latest: dict[float, Dials] = {}  # of each epsilon's latest update
        config = convention if run is None else run.config
        self.job = ButtonJob(self.take, (AGAIN, CANCEL), config.epochs * config.minibatches)
        self.button, self.progress = self.job.button, self.job.progress
        self.button.layout.width = "190px"
        self.progress.layout.width = "150px"
        controls = self._controls()
        between = [self.button, self.progress, widgets.HTML(f"<style>{STYLE}</style>")]
        live = self._live_figure(controls["beta"].max, controls["bias"].value)
        super().__init__("batch", controls, live, self.show, between)
        controls["eps"].observe(self.take, "value")
        wide = {"width": "1010px", "max_width": "100%"}
        self.layout = widgets.Layout(display="flex", flex_flow="row wrap", **wide)

    # ------------------------------------------------------------------ what is on screen
    def _controls(self) -> dict[str, Any]:
        """The dials, two in a row."""
        look: Any = {"style": {"description_width": "90px"}, "layout": {"width": "49%"}}
        beta = self._convention.price
        top = 6 * beta or 0.5
        drag: Any = {"min": 0, "max": top, "step": top / 60, "readout_format": ".3f"}
        # the dial starts at the reward model whose scores are nearest to those of the log
        gaps = {k: float((x - self._batch.scores).abs().mean()) for k, x in self._scores.items()}
        near = min(gaps, key=gaps.__getitem__)
        biases = [(k if k == LOGGED else f"{k:g} points a token", k) for k in self._scores]
        epsilons = [(FIRST, 0.0)] + [(f"{e:g}", e) for e in EPSILONS]
        # an update is dear: it waits until the handle is let go
        late: Any = {"value": 0.0, "continuous_update": False}
        select = widgets.SelectionSlider
        return {
            "beta": widgets.FloatSlider(beta, **drag, description="beta", **look),
            "bias": select(options=biases, value=near, description="length bias", **look),
            "eps": select(options=epsilons, description="epsilon", **late, **look),
            "stratum": widgets.Dropdown(options=[*self._strata], description="stratum", **look),
            "refit": widgets.Checkbox(False, description="critic refitted", **look),
        }

    def _live_figure(self, top: float, bias: Any) -> LiveFigure:
        """The figure, with limits for the whole range of beta and length bias."""
        price = self._convention.price
        mask = self._batch.mask
        betas = (0.0, top) if self._convention.kl_place == "reward" else (price,)
        refits = (False, True) if self._convention.advantage == "gae" else (False,)
        # at the ends of every dial, and where the batch was logged
        ends = itertools.product(betas, self._scores, refits)
        views = [self._what_if(*dials).parts for dials in ends]
        start = self._what_if(price, bias, False).parts
        views.append(start)
        self._limit = float(start.total[mask].abs().quantile(0.95)) or 1.0
        rows = [self._rows(name) for name in self._strata]
        self._drawn = BatchPicture(
            mask.shape[1],
            self._limit,
            sides=[part_means(parts, mask, own) for parts in views for own in rows],
            strata=list(self._strata),
            length=f"length, {self._unit}",
            moves=[x for parts in views for x in self._moves(parts.total).values()],
        )
        return LiveFigure(self._drawn.figure, self._drawn.artists, width=1000)

    # ------------------------------------------------------------------ the numbers
    def _what_if(self, beta: float, bias: Any, refit: bool) -> WhatIf:
        if not refit:
            return self._priced(beta, bias)
        changes: dict[str, Any] = {} if beta == self._convention.price else {"beta": beta}
        return what_if(
            self._batch,
            self._convention,
            scores=self._scores[bias],
            features=self._features,
            **changes,
        )

    def _rows(self, stratum: str) -> dict[str, Tensor]:
        return {side: kind & self._strata[stratum] for side, kind in self._kinds.items()}

    def _moves(self, advantages: Tensor) -> dict[str, float]:
        return {name: float((w * advantages).sum()) for name, w in self._lengths.items()}

    def show(self, beta: float, bias: Any, eps: float, stratum: str, refit: bool) -> str:
        """Move everything to these dials; returns the numbers as a sentence."""
        try:
            found = self._what_if(beta, bias, refit)
        except ValueError as refusal:
            self.live.above = ABOVE.format(f"<p>{html.escape(str(refusal))}</p>", "")
            return str(refusal)
        slope, why_clip = self._clip(Dials(eps, beta, bias, refit))
        tokens = {name: x for name, x in vars(found.parts).items() if x is not None}
        if slope is not None:
            tokens = {name: slope * x for name, x in tokens.items()}
        parts = AdvantageParts(**tokens)
        self.seen = parts.total
        rows = self._rows(stratum)
        chosen = {side: (self.seen[own], self._batch.mask[own]) for side, own in rows.items()}
        share = {side: float((x[mask] > 0).double().mean()) for side, (x, mask) in chosen.items()}
        sides = part_means(parts, self._batch.mask, rows)
        moves = self._moves(found.parts.total)
        self.shown = {"sides": sides, "positive": share, "length": moves, **found.figures}
        self._drawn.draw(sides, share, moves, chosen)
        lines = (
            LINE.format("beta, length bias", html.escape(found.why)),
            LINE.format("epsilon", html.escape(why_clip)),
            LINE.format("length", html.escape(f"{self._why}; {BEFORE}")),
        )
        self.live.above = ABOVE.format(self._map(rows), "".join(lines))
        up = ", ".join(f"{side} {x:.0%}" for side, x in share.items())
        length = ", ".join(f"{name} {x:+.2f}" for name, x in moves.items())
        before = f", {BEFORE}" if eps else ""
        return (
            f"Beta {beta:.3f}, length bias {bias}, epsilon {eps or FIRST}; {stratum} prompts. "
            f"{waterfall_said(sides)}. Tokens pushed up: {up}. "
            f"Length, {self._unit}{before}: {length}."
        )

    def _map(self, rows: Mapping[str, Tensor]) -> str:
        """The words of an answer of middling length of either kind."""
        lengths = self._batch.lengths
        at: dict[str, int] = {}
        for side, kind in rows.items():
            own = (kind & (lengths > 0)).nonzero().squeeze(1)
            if len(own):
                by_length = own[lengths[own].argsort()]
                at[side] = int(by_length[len(own) // 2])
        if not at:
            return "<p>This stratum has no verbose and no concise answer.</p>"
        chosen = torch.tensor(list(at.values()))
        page = heat_map(
            [self._words[row] for row in at.values()],
            self.seen[chosen],
            self._batch.mask[chosen],
            unit="unit of advantages",
            limit=self._limit,
            titles=list(at),
            stops=None if self._stops is None else self._stops[chosen],
        )
        return page.removeprefix(f"<style>{STYLE}</style>")  # it stands in the panel, once

    # ------------------------------------------------------------------ epsilon's update
    def _clip(self, dials: Dials) -> tuple[Tensor | None, str]:
        """Slopes [B, T] that the clip leaves at these dials (None: all of them), and why."""
        if not dials.eps:
            return None, FIRST_WHY
        at = dials if dials in self._updates else self._latest.get(dials.eps)
        if at is None:
            return None, RUNNING if self.busy else NONE_YET
        slope = self._updates[at]
        if isinstance(slope, str):
            return None, f"refused: {slope}"
        self.cut_share = float((slope == 0)[self._batch.mask].double().mean())
        said = f"the clip has cut {self.cut_share:.0%} of the tokens"
        if at == dials:
            how = "exact: the real update, taken again on a copy; at its end"
            return slope, f"{how} {said}; {LEFT}"
        where = f"beta {at.beta:.3f}, length bias {at.bias}"
        return slope, f"approximate: {said} at the end of the update with {where}; press the button"

    def take(self, _change: Any = None) -> None:
        """Take the update again with what the dials say now, on a thread of its own.

        One under way is cancelled, and leaves nothing behind.
        """
        self.cancel()
        now = self.values()
        dials = Dials(now["eps"], now["beta"], now["bias"], now["refit"])
        if dials.eps and dials not in self._updates:
            self.job.start(lambda stop: self._work(dials, stop))
            self.update()

    def _work(self, dials: Dials, stop: Stop) -> None:
        def watch() -> None:
            stop.check()
            self.progress.value += 1

        try:
            self._updates[dials] = self._slopes(dials, watch)
        except (ValueError, TrainingDiverged) as refusal:
            self._updates[dials] = str(refusal)
        finally:
            if dials in self._updates:
                self._latest[dials.eps] = dials
            self.update()

    def _slopes(self, dials: Dials, watch: Callable[[], None]) -> Tensor:
        """What the clip leaves of this batch's update with the advantages of these dials."""
        after = replace(self._convention, beta=dials.beta)
        batch = replace(self._batch, scores=self._scores[dials.bias])
        advantages = self._what_if(dials.beta, dials.bias, dials.refit).advantages
        returns = recomputed(batch, after)["returns"]
        dtype = self._batch.logprobs.dtype
        batch = replace(batch, advantages=advantages.to(dtype), returns=returns.to(dtype))
        config = replace(after if self._run is None else self._run.config, clip=dials.eps)
        # parts of 1: what is left of them is the slope itself
        one = torch.ones_like(advantages)
        ones = AdvantageParts(one, one, one)
        with torch.enable_grad():  # a new thread has its own mode
            return what_if_clip(batch, ones, config, run=self._run, progress=watch).parts.reward
