"""What each remedy does: to one logged batch at once, and to a run in the end.

*Before and after on the same batch.* A run that drifts has logged a batch in the middle of its
drift, and its state before it. The same answers are scored, priced and credited as the remedy
would have it; the critic follows by a fit to this batch (approximate: a trained one would have
seen others); then the push (push.py) says what one optimiser step would do to the verbose and to
the concise answers to brief prompts. *Trained.* The remedied run from nothing, audited (sweep.py).

A push above zero says that the policy of that moment is still less verbose than the remedied
objective wants it; so its sign predicts whether the remedied run ends with more or with fewer
verbose answers than that policy gave. Group baselines need several answers to a prompt: for them
the same policy answers anew. DPO and best-of-n do not learn from a batch and have no push.
Left out: pictures (lab/).
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minirlhf.advantages import masked_mean
from minirlhf.autopsy import Convention, split
from minirlhf.checkpoints import load_rollout
from minirlhf.drift import Drift
from minirlhf.drift_config import DriftConfig
from minirlhf.engine.files import load_tensors, read_json
from minirlhf.engine.jobs import Report, Workers, run_jobs
from minirlhf.facts import kinds
from minirlhf.model import response_states
from minirlhf.ppo import price_and_credit, treat_missing_eos
from minirlhf.push import CLASSES, Push, push, reference_entropy, token_classes
from minirlhf.recipe import Recipe, changed
from minirlhf.remedies import FAULTS, REMEDIES, stack
from minirlhf.rollout import Rollout
from minirlhf.sweep import Cell, Row, run_cells, workplace
from minirlhf.whatif import follow

STACKS = ("counterfactual_length+covariate", "matched+larger_beta")
EVERY_ARM = (*REMEDIES, "fair", *STACKS)
FORK = CLASSES.index("fork")
PARTS = ("reward", "kl", "baseline", "shift", "value_loss", "kl_loss")


@dataclass(frozen=True)
class Logged:
    """A batch that a run has logged, and the run as it was before it."""

    rollout: Rollout
    before: dict[str, Tensor]
    convention: Convention
    kl: tuple[float, ...]
    """mean KL of every earlier batch, nats per answer"""

    @classmethod
    def load(cls, folder: Path, cell: Cell, base: DriftConfig) -> "Logged":
        """As sweep.run_cell leaves it with keep_batch."""
        before, _ = load_tensors(folder / "before.safetensors")
        convention = Convention.of(cell.recipe(base).config.ppo, beta=float(before["beta"]))
        kl = tuple(read_json(folder / "batch.json")["kl_nats"])
        return cls(load_rollout(folder / "rollouts.safetensors")[0], before, convention, kl)


def at_batch(run: Drift, logged: Logged) -> Row:
    """What the recipe of `run` (prepared, not trained) would have made of the logged batch.

    Effective rewards and their gap in reward sd, advantages in the units of the update, pushes in
    nats a step: the change of the mean log pi of the batch's verbose, or concise, answers to brief
    prompts by one Adam step on the batch, without what earlier gradients add through its memory.
    """
    beta = _controlled(run, logged)
    run.ppo.load_state_dict(logged.before)
    run.ppo.controller.beta = beta
    rollout, anew, absorbed = _credited(run, logged)
    assert rollout.index is not None and rollout.rewards is not None
    asked = [run.prompts[i] for i in rollout.index.tolist()]
    brief = torch.tensor([prompt.stratum == "brief" for prompt in asked])
    both = kinds(run.desk, rollout, asked, run.config.audit.verbose_padding)
    verbose, concise = (kind & brief for kind in both)
    then = run.auditor.closing(run.auditor.sample(run.ppo.policy))["brief"]["verbose_rate"]
    found: Row = {"beta_then": beta, "anew": anew, "absorbed": absorbed, "verbose_then": then}
    found |= {"n_verbose": int(verbose.sum()), "n_concise": int(concise.sum())}
    if not (verbose.any() and concise.any()):  # nothing to push apart
        return found
    found |= _gaps(rollout, verbose, concise)
    found |= _at_the_fork(run, rollout, {"verbose": verbose, "concise": concise})
    given = (run.ppo, rollout, split(_dearer(run, rollout), _convention(run)))
    pushes = push(*given, {"verbose": verbose, "concise": concise}, optimiser="adam")
    weight = 0.0 if _stopped(run, logged) else 1.0
    for name, found_push in pushes.items():
        found |= _pushed(name, found_push, weight)
    return found


def _convention(run: Drift) -> Convention:
    return Convention.of(run.ppo.config, beta=run.ppo.beta)


def _controlled(run: Drift, logged: Logged) -> float:
    """Beta as the recipe's controller would have set it by then, seeing the same batches."""
    for kl in logged.kl:
        run.ppo.controller.update(kl, len(logged.rollout))
    return run.ppo.beta


def _stopped(run: Drift, logged: Logged) -> bool:
    stop = run.rules.stop
    return stop is not None and any(stop({"objective/kl_nats": kl}) for kl in logged.kl)


def _prices(run: Drift, rollout: Rollout) -> Tensor:
    """Multiples of beta for each answer, [B, 1]."""
    if run.ppo.prices is None:
        return torch.ones_like(rollout.scores)[:, None]
    assert rollout.index is not None
    return run.ppo.prices[rollout.index][:, None]


def _dearer(run: Drift, rollout: Rollout) -> Rollout:
    """The batch with every log-ratio times its price: at one beta, it is charged the same."""
    ratio = rollout.logprobs - rollout.ref_logprobs
    return replace(rollout, ref_logprobs=rollout.logprobs - _prices(run, rollout) * ratio, kl=None)


def _credited(run: Drift, logged: Logged) -> tuple[Rollout, bool, float]:
    """The batch as the recipe credits it, whether it had to be drawn anew, and the share of the
    change of what is to come that the critic's fit takes up."""
    ppo, old, config = run.ppo, logged.rollout, run.ppo.config
    grouped = not old.prompts.unflatten(0, (-1, config.group)).diff(dim=1).any()
    if config.advantage != "gae" and not grouped:
        return ppo.rollout()[0], True, float("nan")
    answers = (old.prompts, old.responses, old.mask)
    assert old.finished is not None
    scores = treat_missing_eos(ppo.reward_model(*answers), old.finished, config)
    batch, absorbed = replace(old, scores=scores), float("nan")
    if config.advantage == "gae" and logged.convention.advantage == "gae":
        with torch.no_grad():
            features = response_states(ppo.policy, *answers)
        given = (_dearer(run, batch), logged.convention, _convention(run), features)
        change, absorbed = follow(old, *given)
        batch = replace(batch, values=(batch.values + change).to(old.values.dtype))
    credit = price_and_credit(batch, config, ppo.beta * _prices(run, batch))
    return replace(batch, **credit), False, absorbed


def _gaps(rollout: Rollout, verbose: Tensor, concise: Tensor) -> Row:
    """Mean of verbose minus mean of concise answers: score, what KL costs, and their difference."""
    assert rollout.rewards is not None
    effective = rollout.rewards.sum(1)
    each = {"score": rollout.scores, "effective": effective, "cost": rollout.scores - effective}
    return {f"gap_{k}": float(x[verbose].mean() - x[concise].mean()) for k, x in each.items()}


def _at_the_fork(run: Drift, rollout: Rollout, sides: Mapping[str, Tensor]) -> Row:
    """Mean advantage of all tokens, and of those where the reference had a choice."""
    fork = token_classes(rollout, reference_entropy(run.reference, rollout)) == FORK
    assert rollout.advantages is not None
    found: Row = {}
    for name, rows in sides.items():
        for what, mask in (("advantage", rollout.mask), ("fork", fork)):
            at = mask & rows[:, None]
            found[f"{what}_{name}"] = float(masked_mean(rollout.advantages, at))
            found |= {f"{what}_{name}": float("nan")} if not at.any() else {}
    return found


def _pushed(name: str, found: Push, weight: float) -> Row:
    parts = {k: weight * float(x.sum()) for k, x in found.tokens.items()}
    row = {f"push_{name}_{part}": parts.get(part, 0.0) for part in PARTS}
    return {**row, f"push_{name}": sum(parts.values()), f"push_{name}_measured": found.measured}


def push_cell(cell: Cell, fault: Cell, base: DriftConfig, out: Path) -> Row:
    """at_batch of one arm and seed, on the batch that the run of `fault` has logged."""
    logged = Logged.load(out / "batches" / fault.key, fault, base)
    with workplace(cell, base, out, f"push_{cell.key}") as run:
        run.prepare()
        return {"remedy": cell.remedy, "seed": cell.seed, **at_batch(run, logged)}


def run_remedies(
    names: Sequence[str],
    seeds: Sequence[int],
    base: DriftConfig,
    out: Path,
    workers: Workers,
    report: Callable[[str], Report] = lambda stage: lambda key, done, total: None,
) -> list[Row]:
    """One row for each of these arms and seeds: what it does to the logged batch, what came of it.

    The default run and the runs with a fault come first, for their batches, which lie in `out`: on
    several machines it must be a common disk. An arm that repairs a fault into the default run is
    not trained again. Resumable, as run_cells is.
    """

    def cells(arms: Iterable[str]) -> list[Cell]:
        dials = (base.ppo.beta, base.ppo.clip, base.preferences.length_bias)
        return [Cell(name, *dials, seed) for name in sorted(arms) for seed in seeds]

    for name in names:
        stack(name, base)  # one that is no arm is refused before any run
    fault = {name: REMEDIES[name].fault if name in REMEDIES else "none" for name in names}
    logging = {"none", *fault.values(), *(name for name in names if name in FAULTS)}
    fault |= {name: name for name in sorted(logging)}
    _forget_without_batch(cells(logging), out)
    run_cells(cells(logging), base, out, workers, report, keep_batch=True)
    trained = {name for name in fault if name in logging or not _is_default(name, base)}
    rows, _ = run_cells(cells(trained), base, out, workers, report)
    learners = cells(n for n in fault if stack(n, base).rules.policy is None)
    batches = [replace(c, remedy=fault[c.remedy]) for c in learners]
    both = zip(learners, batches, strict=True)
    tasks = {c.key: (push_cell, (c, logged, base, out)) for c, logged in both}
    pushes = run_jobs(tasks, out / "done" / "pushes", workers, report("pushes"))
    ended = {(row["remedy"], row["seed"]): row for row in rows}
    pushed = {(row["remedy"], row["seed"]): row for row in pushes.values()}
    found = []
    for name, s in itertools.product(fault, seeds):
        end = ended[name if name in trained else "none", s]
        found.append({**end, **pushed.get((name, s), {}), "remedy": name, "fault": fault[name]})
    return found


def _forget_without_batch(cells: Sequence[Cell], out: Path) -> None:
    """A sweep without remedies may have run these cells, and kept no batch."""
    for cell in cells:
        if not (out / "batches" / cell.key / "batch.json").exists():
            (out / "done" / "runs" / f"{cell.key}.json").unlink(missing_ok=True)


def _is_default(name: str, base: DriftConfig) -> bool:
    return not changed(Recipe(base), stack(name, base))
