"""The mechanism battery: nine short runs that tell why a policy drifts towards one of two answers.

A *subject* can be trained once more under named changes, `subject.train(changes)`, and gives a
`Trace`. Nothing here reads which penalty, whitening, baseline or reference it uses. Every
combination of those (a `World`) predicts numbers, most in closed form (oracle/), and each is
held against the measured one, line by line. The verdict names the causes that all fitting worlds
share; where no world fits, or worlds with other causes fit as well, it says "cannot tell".

Its best witness is the *push*: minus the loss's gradient by an answer's log-prob. Push on V less
push on C is what lifts the log-odds of V, and hardly depends on which answers were sampled. Left
out: whatever needs answers of several tokens (discounts, aggregation, EOS). It leaves no trace on
one word, so the verdict is silent on it.

Sources: Tang and Munos (2025, arXiv 2506.09477) for the gradient of each penalty; Liu et al.
(2025, arXiv 2503.20783) for GRPO's std; those of oracle/closed_form.py.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

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
SMALL, NO_GAP, MOVING = "small beta, correct KL", "no length bias", "moving reference"
SCORES, GROUP = "scores whitened before KL", "GRPO-std"
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
    def causes(self) -> frozenset[str]:
        """The pathways that are at work in it."""
        found = {PENALTIES[self.place, self.estimator], MOVING if self.moving else ""}
        found |= {SCORES} if self.scale in ("scores", "both") else set()
        found |= {GROUP} if self.scale in ("group", "grouped") else set()
        found |= {BATCH} if self.scale == "batch" and self.place == "loss" else set()
        inside = self.scale == "plain" or self.place == "reward"
        right = not PENALTIES[self.place, self.estimator] and inside and not self.moving
        found |= {SMALL} if right and self.scale not in ("scores", "both") else set()
        return frozenset(found - {""})


WORLDS = [
    World(*penalty, scale, moving)
    for penalty, scale, moving in itertools.product(
        PENALTIES, ("plain", "scores", "batch", "both", "group", "grouped"), (False, True)
    )
    if scale not in ("both", "grouped") or penalty[0] == "reward"  # else it looks like batch
]


class Line(NamedTuple):
    """One piece of evidence for or against a world."""

    symptom: str
    measured: float
    expected: str
    fits: bool


def lift(pushes: Tensor, t: Trace) -> Tensor:
    """[K, N] push on V less that on C, where both were sampled and p can still be told from 1."""
    sure = (t.share - 0.5).abs() < 0.498
    return torch.where(sure, pushes[..., 0] - pushes[..., 1], math.nan)


def pull_residual(world: World, t: Trace) -> Tensor:
    """[K, N] net push over the push at price 0, less what the world's penalty leaves of it.

    With u = 1 - beta pull / push that is u itself; GRPO's std around both leaves only its sign,
    and a whole batch's sd another scale at each probe, which is fitted.
    """
    free, x = lift(t.free, t), t.share.logit()
    anchor = torch.sigmoid(x - t.log_ratio[..., 0] + t.log_ratio[..., 1])
    seen = free.isfinite() & anchor.isfinite()
    p, p0 = (torch.where(seen, y, 0.5) for y in (t.share, anchor))
    pull = t.beta[:, None] * kl_pull(p, p0, place=world.place, estimator=world.estimator)
    against = torch.full_like(free, t.gap)
    if world.place == "loss":
        against = free
    elif world.scale in ("scores", "both"):
        against = against / t.score_sd[:, None]
    left, kept = lift(t.net, t) / free, 1 - pull / against
    left, kept = (torch.where(seen, y, 0.0) for y in (left, kept))
    size = left.abs().amax(1, keepdim=True).clamp(min=1.0)  # a batch's sd may blow all of it up
    if world.place == "reward" and world.scale in ("group", "grouped"):
        kept = kept.sign()
    if world.place == "reward" and world.scale in ("batch", "both", "grouped"):
        scale = (left * kept).sum(1) / kept.square().sum(1).clamp(min=1e-9)
        kept = kept * scale.clamp(min=0)[:, None]
    return torch.where(seen, (left - kept) / size, math.nan)


def ends(world: World, t: Trace) -> Tensor | None:
    """[N] where the world takes p, from the gap, price and sd that the trace shows; None: open."""
    if world.moving:
        return None
    gap: Any = t.gap
    if world.place == "loss":  # a price of KL against the advantages as they came to be
        late = lift(t.free, t)[-4:].nanmean(0)
        gap = torch.where(late.isfinite(), late, late.nanmean())
    elif world.scale in ("scores", "both"):
        gap = gap / float(t.score_sd[-1])
    if not torch.as_tensor(gap).isfinite().all():
        return None
    place, kind = world.place, world.estimator
    return two_answer_end(t.start, gap, t.beta[-1], place=place, estimator=kind)


def kept(t: Trace, x: Tensor) -> Tensor:
    """x [N], NaN where sampling has lost V: p fell to a twentieth, against the gap and for good.
    No world predicts that of any prompt; where it took more than half of them, nothing is left out.
    """
    lost = t.end < 0.05 * t.start
    return x if lost.double().mean() > 0.5 else torch.where(lost, math.nan, x)


def rms(x: Tensor) -> float:
    """Root mean square of what is not NaN."""
    return float(x.square().nanmean().sqrt())


def evidence(world: World, traces: Traces) -> list[Line]:
    """Every symptom that the world says something about."""
    return [*scale_lines(world, traces), *pull_lines(world, traces), *end_lines(world, traces)]


def line(symptom: str, measured: float, expected: float, within: float) -> Line:
    """Fits if measured is that near to what is expected; NaN never fits."""
    said = f"{expected:.3g} (within {within:.2g})"
    return Line(symptom, measured, said, abs(measured - expected) <= within)


def scale_lines(world: World, traces: Traces) -> Iterator[Line]:
    """Does the push on V know how large the gap is, and what is it divided by?"""
    base, few = traces["as it is"], traces["gap / 100"]
    told = {"plain": 0.01, "group": 1.0, "grouped": 1.0}
    told["scores"] = 0.01 * float(base.score_sd[0] / few.score_sd[0])
    if world.scale in told:
        first, last = (float(lift(t.free, t)[0].nanmean()) for t in (base, few))
        e = told[world.scale]
        yield line("first push at gap / 100, over that at the gap", last / first, e, e / 2)
    push = lift(base.free, base).nanmean(1) / base.gap
    if world.scale == "plain":
        yield line("push at a price of 0, over the gap", float(push.nanmedian()), 1, 0.15)
    if world.scale == "scores":
        push = push * base.score_sd
        yield line("push at a price of 0 x sd of scores / gap", float(push.nanmedian()), 1, 0.15)
    wide = (base.advantage_sd - 1).abs()
    off = float(wide[base.advantage_sd > 0.5].max()) if (wide < 0.5).any() else 1.0
    exact = world.scale in ("batch", "both", "grouped")
    symptom = "sd of a batch's advantages, largest distance from 1"
    yield line(symptom, off, 0, 0.005) if exact else Line(symptom, off, "> 0.005", off > 0.005)


def pull_lines(world: World, traces: Traces) -> Iterator[Line]:
    """What does the KL term do to the push, and from which policy is KL counted?"""
    base, priced = traces["as it is"], [traces[name] for name in PRICES]
    off = rms(torch.cat([pull_residual(world, t).flatten() for t in priced]))
    near = 0.1 if world.scale in ("group", "grouped") and world.place == "reward" else 0.01
    yield line("KL's pull, off the formula of the penalty by: rms", off, 0, near)
    sure = lift(base.net, base).isfinite()
    size = ((base.net - base.free).abs() / base.beta[:, None, None])[sure]
    off = {e: float((size - e).abs().max()) if len(size) else 1.0 for e in (0.0, 1.0)}
    symptom = "KL's push on one answer, furthest from {:g} beta ({}: 0)"
    named = ("no KL term", "book-literal")
    if world.place in ("none", "book_literal"):
        e = float(world.place == "book_literal")
        yield line(symptom.format(e, named[int(e)]), off[e], 0, 0.02)
    else:  # what pulls cannot be the same on all answers
        e = min(off, key=off.__getitem__)
        yield Line(symptom.format(e, named[int(e)]), off[e], "> 0.02", off[e] > 0.02)
    share = [float(a / b) for a, b in torch.cat([t.kl for t in priced]) if b > 0.02]
    told = (0.0, 0.5) if world.moving else (1.0, 0.05)
    yield line("logged KL, over KL to the first policy: smallest", min(share, default=1.0), *told)


def end_lines(world: World, traces: Traces) -> Iterator[Line]:
    """Where do the runs end? A moving reference and K2 or K3 in the reward leave it open."""
    base, zero = traces["as it is"], world.place in ("none", "book_literal")
    if world.moving:
        return
    if zero or world.place == "loss" or world.estimator == "k1":
        # next to no push, over its own sd, is all noise
        noise = zero or BATCH in world.causes or world.scale in ("scores", "both")
        for name in PRICES if noise else (*PRICES, "gap / 100", "no gap"):
            t = traces[name]
            told = t.start if name == "no gap" else ends(world, t)
            if told is not None:  # small pushes are mostly noise: there only the mean is asked for
                small = name not in PRICES
                gap = t.end - told
                off = abs(float(gap.mean())) if small else rms(kept(t, gap))
                bound = 0.2 if small else 0.15
                said = f"{float(told.mean()):.3f} ({'mean' if small else 'rms'} within {bound})"
                yield Line(f"end, {name}: mean p", float(t.end.mean()), said, off <= bound)
    for name in SAME:
        change = kept(base, kept(traces[name], traces[name].end - base.end))
        yield line(f"{name}: change of the end, rms", rms(change), 0, 0.25)


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
        rows += [("fits" if x.fits else "NO", x[0], f"{x[1]:.3g}", x[2]) for x in self.lines]
        wide, room = (max(len(row[i]) for row in rows) for i in (1, 2))
        out = [f"Verdict: {self.said}.", ""]
        out += [f"{a:<5}{b:<{wide}} {c:>{room}}  {d}" for a, b, c, d in rows]
        out += ["", "What speaks against the pathways, each on its own:"] if self.others else []
        for name, (x, *more) in sorted(self.others.items()):
            rest = f"; {len(more)} more" if more else ""
            out.append(f"  {name}: {x[0]} is {x[1]:.3g}, not {x[2]}{rest}")
        return "\n".join(out)


def verdict(traces: Traces) -> Verdict:
    """Which pathways fit the nine runs of RUNS."""
    base = traces["as it is"]
    if abs(base.gap) < 0.005:
        return _unpaid(traces)
    rise = float((base.end - base.start).mean())
    found = {world: evidence(world, traces) for world in WORLDS}
    wrong = {world: [line for line in lines if not line.fits] for world, lines in found.items()}
    fitting = {world.causes for world in WORLDS if not wrong[world]}
    best = min(WORLDS, key=lambda world: (len(wrong[world]), len(world.causes)))
    alone = {
        c: [w for w in WORLDS if w.causes == {c}]
        for c in frozenset().union(*(w.causes for w in WORLDS))
    }
    nearest = {c: min((wrong[w] for w in worlds), key=len) for c, worlds in alone.items()}
    if len(fitting) == 1:
        (causes,) = fitting
        said = " and ".join(sorted(causes))
        if causes == {SMALL} and abs(rise) < 0.03:
            said, causes = "nothing drifted: there is no cause to name", frozenset()
    elif fitting:
        each = "; or ".join(sorted(" and ".join(sorted(c)) for c in fitting))
        said, causes = f"cannot tell these apart: {each}", None
    else:
        said, causes = "cannot tell: no cause on the list fits all the evidence", None
    others = {c: lines for c, lines in nearest.items() if lines and c not in (causes or ())}
    return Verdict(causes, said, found[best], others)


def _unpaid(traces: Traces) -> Verdict:
    """The verdict where the reward model pays V nothing."""
    lines = [line("what V is paid more than C, reward sd", traces["as it is"].gap, 0, 0.005)]
    for name, t in traces.items():
        lines.append(line(f"rise of p, {name}: mean", float((t.end - t.start).mean()), 0, 0.1))
    if all(x.fits for x in lines):
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
    return verdict(traces), traces
