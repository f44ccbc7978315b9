"""The mechanism battery: nine short runs that tell why a policy drifts towards one of two answers.

Nothing here reads which penalty, whitening, baseline or reference a subject (battery_desk.py) uses.
Every combination of those (a `World`) predicts numbers, most in closed form, and each is held
against the measured one, line by line. `judge` names the causes that all fitting worlds share;
where no world fits, or worlds with other causes fit as well, it says "cannot tell".
Left out: whatever needs answers of several tokens (discounts, aggregation, EOS). It leaves no trace
on one word, so the battery is silent on it.

Sources: Tang and Munos (2025, arXiv 2506.09477) for the gradient of each penalty; Liu et al.
(2025, arXiv 2503.20783) for GRPO's std; those of oracle/closed_form.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.autopsy.battery_desk import Changes, Subject, Trace
from minirlhf.oracle.closed_form import kl_pull, two_answer_end

RUNS = {
    "as it is": Changes(),
    "beta / 4": Changes(beta=0.25),
    "beta x 4": Changes(beta=4.0),
    "gap / 100": Changes(gap=0.01),
    "no gap": Changes(gap=0.0),
    "exact critic": Changes(exact_critic=True),
    "many epochs": Changes(many_epochs=True),
    "other clip": Changes(other_clip=True),
    "other seed": Changes(seed=1),
}
PRICES = ("beta / 4", "as it is", "beta x 4")
Traces = dict[str, Trace]
SAME = ("exact critic", "many epochs", "other clip", "other seed")  # should not move the end

PENALTIES = {
    ("reward", "k1"): "",
    ("loss", "k2"): "",
    ("loss", "k3"): "k3 as a loss",
    ("reward", "k3"): "k3 in the reward",
    ("reward", "k2"): "k2 in the reward",
    ("book_literal", "k1"): "book-literal penalty",
    ("none", "k1"): "no KL term",
}
SMALL = "small beta, correct KL"
NO_GAP = "no length bias"
MOVING = "moving reference"
SCORES = "scores whitened before KL"
GROUP = "GRPO-std"
BATCH = "advantages over their sd, KL outside"


class World(NamedTuple):
    """One combination of settings, and all that it predicts."""

    place: str
    estimator: str
    scale: str
    """plain; scores: over their sd before KL; batch: advantages over theirs; both: the two of
    them; group: over each group's sd, as GRPO does; grouped: that and then the batch's"""
    moving: bool

    @property
    def over_scores(self) -> bool:
        """Scores are divided by their sd before KL is charged."""
        return self.scale in ("scores", "both")

    @property
    def over_group(self) -> bool:
        """Advantages are divided by the sd of their group."""
        return self.scale in ("group", "grouped")

    @property
    def over_batch(self) -> bool:
        """Advantages are divided by the sd of their batch."""
        return self.scale in ("batch", "both", "grouped")

    @property
    def pulls(self) -> bool:
        """The KL term weighs more on an answer the more it has gained."""
        return self.place in ("reward", "loss")

    @property
    def causes(self) -> frozenset[str]:
        """The pathways that are at work in it."""
        penalty = PENALTIES[self.place, self.estimator]
        found = {penalty} if penalty else set()
        if self.moving:
            found.add(MOVING)
        if self.over_scores:
            found.add(SCORES)
        if self.over_group:
            found.add(GROUP)
        if self.scale == "batch" and self.place == "loss":
            found.add(BATCH)
        # KL in the reward is divided by what the advantages are divided by: its price stays right
        priced = self.scale == "plain" or self.place == "reward"
        if priced and not (penalty or self.moving or self.over_scores):
            found.add(SMALL)
        return frozenset(found)


SCALES = ("plain", "scores", "batch", "both", "group", "grouped")
WORLDS = [
    World(*penalty, scale, moving)
    for penalty, scale, moving in itertools.product(PENALTIES, SCALES, (False, True))
    if scale not in ("both", "grouped") or penalty[0] == "reward"  # else it looks like batch
]


class Line(NamedTuple):
    """One piece of evidence for or against a world."""

    symptom: str
    measured: float
    expected: str
    fits: bool


def lift(pushes: Tensor, t: Trace) -> Tensor:
    """[K, N] push on V less that on C, where both were sampled and p can still be told from 1.

    It is what raises the log-odds of V, and hardly depends on which answers were sampled: the
    battery's best witness.
    """
    sure = (t.share - 0.5).abs() < 0.498
    return torch.where(sure, pushes[..., 0] - pushes[..., 1], math.nan)


def pull_residual(world: World, t: Trace) -> Tensor:
    """[K, N] net push over the push at price 0, less what the world's penalty leaves of it.

    With u = 1 - beta pull / push that is u itself; GRPO's std around both leaves only its sign,
    and a whole batch's sd another scale at each probe, which is fitted.
    """
    free = lift(t.free, t)
    # how often the run's own reference says V, from the log-ratios that the run logs
    odds = t.share.logit() - t.log_ratio[..., 0] + t.log_ratio[..., 1]
    anchor = torch.sigmoid(odds)
    seen = free.isfinite() & anchor.isfinite()
    p, p0 = (torch.where(seen, x, 0.5) for x in (t.share, anchor))
    pull = t.beta[:, None] * kl_pull(p, p0, place=world.place, estimator=world.estimator)
    against = torch.full_like(free, t.gap)  # what a price of KL in the reward is paid from
    if world.place == "loss":
        against = free
    elif world.over_scores:
        against = against / t.score_sd[:, None]
    left = torch.where(seen, lift(t.net, t) / free, 0.0)
    told = torch.where(seen, 1 - pull / against, 0.0)
    size = left.abs().amax(1, keepdim=True).clamp(min=1.0)  # a batch's sd may blow all of it up
    if world.place == "reward" and world.over_group:
        told = told.sign()
    if world.place == "reward" and world.over_batch:
        scale = (left * told).sum(1) / told.square().sum(1).clamp(min=1e-9)
        told = told * scale.clamp(min=0)[:, None]
    return torch.where(seen, (left - told) / size, math.nan)


def ends(world: World, t: Trace) -> Tensor | None:
    """[N] where the world takes p, from the gap, price and sd that the trace shows; None: open."""
    if world.moving:
        return None
    gap: float | Tensor = t.gap
    if world.place == "loss":
        # a price of KL against the advantages as they came to be: in the last four probes
        late = lift(t.free, t)[-4:].nanmean(0)
        gap = torch.where(late.isfinite(), late, late.nanmean())
    elif world.over_scores:
        gap = gap / float(t.score_sd[-1])
    if not torch.as_tensor(gap).isfinite().all():
        return None
    return two_answer_end(t.start, gap, t.beta[-1], place=world.place, estimator=world.estimator)


def without_lost(t: Trace, x: Tensor) -> Tensor:
    """x [N], NaN where sampling has lost V: p fell to a twentieth, against the gap and for good.
    No world predicts that of any prompt; where it took more than half of them, nothing is left out.
    """
    lost = t.end < 0.05 * t.start
    if lost.double().mean() > 0.5:
        return x
    return torch.where(lost, math.nan, x)


def rms(x: Tensor) -> float:
    """Root mean square of what is not NaN."""
    return float(x.square().nanmean().sqrt())


def evidence(world: World, traces: Traces) -> list[Line]:
    """Every symptom that the world says something about."""
    return [*scale_lines(world, traces), *pull_lines(world, traces), *end_lines(world, traces)]


def near(symptom: str, measured: float, expected: float, within: float) -> Line:
    """Fits if measured is that near to what is expected; NaN never fits."""
    said = f"{expected:.3g} (within {within:.2g})"
    return Line(symptom, measured, said, abs(measured - expected) <= within)


def beyond(symptom: str, measured: float, bound: float) -> Line:
    """Fits if measured is more than the bound; NaN never fits."""
    return Line(symptom, measured, f"> {bound}", measured > bound)


def scale_lines(world: World, traces: Traces) -> Iterator[Line]:
    """Does the push on V know how large the gap is, and what is it divided by?"""
    base, few = traces["as it is"], traces["gap / 100"]
    # a hundredth of the gap: what of the push is left in the first batch, under each scale
    told = {
        "plain": 0.01,
        "group": 1.0,
        "grouped": 1.0,
        "scores": 0.01 * float(base.score_sd[0] / few.score_sd[0]),
    }
    if world.scale in told:
        expected = told[world.scale]
        first, last = (float(lift(t.free, t)[0].nanmean()) for t in (base, few))
        symptom = "first push at gap / 100, over that at the gap"
        yield near(symptom, last / first, expected, expected / 2)

    by_gap = lift(base.free, base).nanmean(1) / base.gap
    if world.scale == "plain":
        yield near("push at a price of 0, over the gap", float(by_gap.nanmedian()), 1, 0.15)
    if world.scale == "scores":
        by_gap = by_gap * base.score_sd
        symptom = "push at a price of 0 x sd of scores / gap"
        yield near(symptom, float(by_gap.nanmedian()), 1, 0.15)

    distance = (base.advantage_sd - 1).abs()
    off = 1.0
    if (distance < 0.5).any():  # a batch whose answers are all alike has next to no sd at all
        off = float(distance[base.advantage_sd > 0.5].max())
    symptom = "sd of a batch's advantages, largest distance from 1"
    yield near(symptom, off, 0, 0.005) if world.over_batch else beyond(symptom, off, 0.005)


def pull_lines(world: World, traces: Traces) -> Iterator[Line]:
    """What does the KL term do to the push, and from which policy is KL counted?"""
    base = traces["as it is"]
    priced = [traces[name] for name in PRICES]
    residual = torch.cat([pull_residual(world, t).flatten() for t in priced])
    within = 0.1 if world.over_group and world.place == "reward" else 0.01
    yield near("KL's pull, off the formula of the penalty by: rms", rms(residual), 0, within)

    # no KL term pushes no answer, the book's pushes every answer down by beta, whatever it is
    sure = lift(base.net, base).isfinite()
    size = ((base.net - base.free).abs() / base.beta[:, None, None])[sure]
    off = {e: float((size - e).abs().max()) if len(size) else 1.0 for e in (0.0, 1.0)}
    e = float(world.place == "book_literal")
    if world.pulls:  # what pulls cannot be the same on all answers
        e = min(off, key=off.__getitem__)
    named = "book-literal" if e else "no KL term"
    symptom = f"KL's push on one answer, furthest from {e:g} beta ({named}: 0)"
    yield beyond(symptom, off[e], 0.02) if world.pulls else near(symptom, off[e], 0, 0.02)

    both = torch.cat([t.kl for t in priced])
    ratios = [float(logged / first) for logged, first in both if first > 0.02]
    told = (0.0, 0.5) if world.moving else (1.0, 0.05)
    symptom = "logged KL, over KL to the first policy: smallest"
    yield near(symptom, min(ratios, default=1.0), *told)


def end_lines(world: World, traces: Traces) -> Iterator[Line]:
    """Where do the runs end? A moving reference and K2 or K3 in the reward leave it open."""
    if world.moving:
        return
    if not world.pulls or world.place == "loss" or world.estimator == "k1":
        for name in PRICES:
            t = traces[name]
            told = ends(world, t)
            if told is not None:
                yield _end_line(name, t, told, "rms", rms(without_lost(t, t.end - told)), 0.15)
        # next to no push, over its own sd, is all noise
        noise = not world.pulls or BATCH in world.causes or world.over_scores
        for name in () if noise else ("gap / 100", "no gap"):
            t = traces[name]
            told = t.start if name == "no gap" else ends(world, t)
            if told is not None:  # small pushes are mostly noise: there only the mean is asked for
                yield _end_line(name, t, told, "mean", abs(float((t.end - told).mean())), 0.2)
    base = traces["as it is"]
    for name in SAME:
        other = traces[name]
        change = without_lost(base, without_lost(other, other.end - base.end))
        yield near(f"{name}: change of the end, rms", rms(change), 0, 0.25)


def _end_line(name: str, t: Trace, told: Tensor, how: str, off: float, within: float) -> Line:
    """How far a run ended from the p [N] that it was told to end at, `off` in the sense of how."""
    said = f"{float(told.mean()):.3f} ({how} within {within})"
    return Line(f"end, {name}: mean p", float(t.end.mean()), said, off <= within)


def shown(figure: float) -> str:
    """Three digits; what is rounding alone, on any machine, is not told apart."""
    return "< 1e-6" if 0 < abs(figure) < 1e-6 else f"{figure:.3g}"


@dataclass(frozen=True)
class Verdict:
    """What the battery says."""

    causes: frozenset[str] | None
    said: str
    """the pathways at work (none: it cannot tell), and the same in words"""
    lines: list[Line]
    others: dict[str, list[Line]]
    """evidence on the world that fits or comes closest, and against each other pathway alone"""

    def table(self) -> str:
        """All of it as text: the verdict, then a line a symptom, then the other pathways."""
        rows = [("", "symptom", "measured", "expected")]
        for line in self.lines:
            mark = "fits" if line.fits else "NO"
            rows.append((mark, line.symptom, shown(line.measured), line.expected))
        symptoms = max(len(row[1]) for row in rows)
        numbers = max(len(row[2]) for row in rows)
        out = [f"Verdict: {self.said}.", ""]
        for mark, symptom, measured, expected in rows:
            out.append(f"{mark:<5}{symptom:<{symptoms}} {measured:>{numbers}}  {expected}")
        if self.others:
            out += ["", "What speaks against the pathways, each on its own:"]
        for name, (line, *more) in sorted(self.others.items()):
            rest = f"; {len(more)} more" if more else ""
            out.append(
                f"  {name}: {line.symptom} is {shown(line.measured)}, not {line.expected}{rest}"
            )
        return "\n".join(out)


def judge(traces: Traces) -> Verdict:
    """Which pathways fit the nine runs of RUNS."""
    base = traces["as it is"]
    if abs(base.gap) < 0.005:
        return _unpaid(traces)
    found = {world: evidence(world, traces) for world in WORLDS}
    wrong = {world: [line for line in lines if not line.fits] for world, lines in found.items()}
    fitting = {world.causes for world in WORLDS if not wrong[world]}
    best = min(WORLDS, key=lambda world: (len(wrong[world]), len(world.causes)))
    rise = float((base.end - base.start).mean())

    causes = None
    if len(fitting) == 1:
        (causes,) = fitting
        said = " and ".join(sorted(causes))
        if causes == {SMALL} and abs(rise) < 0.03:
            causes = frozenset()
            said = "nothing drifted: there is no cause to name"
    elif fitting:
        each = sorted(" and ".join(sorted(some)) for some in fitting)
        said = f"cannot tell these apart: {'; or '.join(each)}"
    else:
        said = "cannot tell: no cause on the list fits all the evidence"
    others = {c: lines for c, lines in _against(wrong).items() if lines and c not in (causes or ())}
    return Verdict(causes, said, found[best], others)


def _against(wrong: dict[World, list[Line]]) -> dict[str, list[Line]]:
    """What speaks against each pathway alone: the least that does against a world of just it."""
    found: dict[str, list[Line]] = {}
    for world, lines in wrong.items():
        if len(world.causes) == 1:
            (cause,) = world.causes
            found[cause] = min(found.get(cause, lines), lines, key=len)
    return found


def _unpaid(traces: Traces) -> Verdict:
    """The verdict where the reward model pays V nothing."""
    lines = [near("what V is paid more than C, reward sd", traces["as it is"].gap, 0, 0.005)]
    for name, t in traces.items():
        lines.append(near(f"rise of p, {name}: mean", float((t.end - t.start).mean()), 0, 0.1))
    if all(line.fits for line in lines):
        return Verdict(frozenset({NO_GAP}), NO_GAP, lines, {})
    return Verdict(None, "cannot tell: V is paid no more than C, and yet p moved", lines, {})


def diagnose(
    subject: Subject, report: Callable[[str, int, int], None] | None = None
) -> tuple[Verdict, dict[str, Trace]]:
    """Train the subject nine times and judge; report(run, done, total) before each, and after."""
    traces: dict[str, Trace] = {}
    for name, changes in RUNS.items():
        if report:
            report(name, len(traces), len(RUNS))
        traces[name] = subject.train(changes)
    if report:
        report("judged", len(RUNS), len(RUNS))
    return judge(traces), traces
