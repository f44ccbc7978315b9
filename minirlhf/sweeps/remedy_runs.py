"""The arms of the remedies: each one on a logged batch, and trained from nothing.

The default run and the runs with a fault come first and log a batch in the middle of their drift;
every arm is then asked what it makes of that batch (remedies/on_batch.py) and trained (cells.py).
DPO and best-of-n do not learn from a batch and have no push. Left out: the table (remedy_table.py).
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from minirlhf.autopsy.convention import Convention
from minirlhf.checkpoints import load_rollout
from minirlhf.drift.config import DriftConfig
from minirlhf.drift.recipe import Recipe, changed
from minirlhf.engine.files import load_tensors, read_json
from minirlhf.engine.jobs import Report, Workers, run_jobs
from minirlhf.remedies.arms import FAULTS, REMEDIES, stack
from minirlhf.remedies.on_batch import Logged, at_batch
from minirlhf.sweeps.grid import Cell, Row, run_cells, workplace

STACKS = ("counterfactual_length+covariate", "matched+larger_beta")
EVERY_ARM = (*REMEDIES, "fair", *STACKS)


def load_logged(folder: Path, cell: Cell, base: DriftConfig) -> Logged:
    """The batch that the run of `cell` left in `folder`: run_cell with keep_batch."""
    before, _ = load_tensors(folder / "before.safetensors")
    convention = Convention.of(cell.recipe(base).config.ppo, beta=float(before["beta"]))
    rollout, _ = load_rollout(folder / "rollouts.safetensors")
    kl = tuple(read_json(folder / "batch.json")["kl_nats"])
    return Logged(rollout, before, convention, kl)


def push_cell(cell: Cell, fault: Cell, base: DriftConfig, out: Path) -> Row:
    """at_batch of one arm and seed, on the batch that the run of `fault` has logged."""
    logged = load_logged(out / "batches" / fault.key, fault, base)
    with workplace(cell, base, out, f"push_{cell.key}") as run:
        run.prepare()
        found = at_batch(
            logged, ppo=run.ppo, auditor=run.auditor, prompts=run.prompts, stop=run.rules.stop
        )
        return {"remedy": cell.remedy, "seed": cell.seed, **found}


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
