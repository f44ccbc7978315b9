"""The arms of the remedies: each one on a logged batch, and trained from nothing.

The default run and the runs with a fault come first and log a batch in the middle of their drift;
every arm is then asked what it makes of that batch (remedies/on_batch.py) and trained (cells.py).
DPO and best-of-n do not learn from a batch and have no push. Left out: the table (remedy_table.py).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from minirlhf.autopsy.convention import Convention
from minirlhf.checkpoints import load_rollout
from minirlhf.drift.config import DriftConfig
from minirlhf.drift.recipe import Recipe, changed
from minirlhf.engine.files import load_tensors, read_json
from minirlhf.engine.jobs import Report, Workers, run_jobs
from minirlhf.remedies.arms import FAULTS, REMEDIES, stack
from minirlhf.remedies.on_batch import Logged, at_batch
from minirlhf.sweeps.cells import RUNS, run_cells, workplace
from minirlhf.sweeps.grid import Cell, Row

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
    for name in names:
        stack(name, base)  # one that is no arm is refused before any run
    fault = _faults(names)

    # the default run and the faults come first: the others are asked about their batches
    logging = [name for name in fault if fault[name] == name]
    cells = _cells(logging, seeds, base)
    _forget_without_batch(cells, out)
    run_cells(cells, base, out, workers, report, keep_batch=True)

    trained = [name for name in fault if name in logging or not _is_default(name, base)]
    cells = _cells(trained, seeds, base)
    rows, _ = run_cells(cells, base, out, workers, report)

    tasks = _push_tasks(fault, seeds, base, out)
    pushed = run_jobs(tasks, out / "done" / "pushes", workers, report("pushes"))

    ends = _by_arm_and_seed(rows)
    pushes = _by_arm_and_seed(pushed.values())
    found = []
    for name in fault:
        # what changes nothing ends as the default run does
        ended = name if name in trained else "none"
        for seed in seeds:
            push = pushes.get((name, seed), {})
            found.append({**ends[ended, seed], **push, "remedy": name, "fault": fault[name]})
    return found


def _push_tasks(
    fault: Mapping[str, str], seeds: Sequence[int], base: DriftConfig, out: Path
) -> dict[str, tuple[Callable[..., Row], tuple[Any, ...]]]:
    """A job for every arm and seed that learns from a batch: what is done in place of PPO does
    not."""
    learners = [name for name in fault if stack(name, base).rules.policy is None]
    tasks = {}
    for cell in _cells(learners, seeds, base):
        logged = replace(cell, remedy=fault[cell.remedy])
        tasks[cell.key] = (push_cell, (cell, logged, base, out))
    return tasks


def _by_arm_and_seed(rows: Iterable[Row]) -> dict[tuple[str, int], Row]:
    return {(row["remedy"], row["seed"]): row for row in rows}


def _faults(names: Sequence[str]) -> dict[str, str]:
    """{arm: the arm whose batch it is asked about}: that which it repairs, or the default run.

    The arms that log such a batch are added; each of them is asked about its own.
    """
    fault = {}
    for name in names:
        fault[name] = REMEDIES[name].fault if name in REMEDIES else "none"
    logging = {"none", *fault.values(), *(name for name in names if name in FAULTS)}
    for name in sorted(logging):
        fault[name] = name
    return fault


def _cells(arms: Iterable[str], seeds: Sequence[int], base: DriftConfig) -> list[Cell]:
    """The cells of these arms and seeds at the settings' own dials."""
    usual = Cell(
        remedy="none",
        beta=base.ppo.beta,
        clip=base.ppo.clip,
        length_bias=base.preferences.length_bias,
        seed=base.seed,
    )
    return [replace(usual, remedy=name, seed=seed) for name in sorted(arms) for seed in seeds]


def _forget_without_batch(cells: Sequence[Cell], out: Path) -> None:
    """A sweep without remedies may have run these cells, and kept no batch."""
    for cell in cells:
        if not (out / "batches" / cell.key / "batch.json").exists():
            (out / RUNS / f"{cell.key}.json").unlink(missing_ok=True)


def _is_default(name: str, base: DriftConfig) -> bool:
    """Whether the arm changes nothing of these settings, as the repair of a fault may."""
    return not changed(Recipe(base), stack(name, base))
