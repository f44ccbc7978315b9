"""Running the cells of a grid: one row and one trajectory a run.

    base, grid = DriftConfig(steps=60), Grid(beta=(0.02, 0.2), seed=(0, 1))
    rows, steps = run_cells(grid.cells(base), base, Path("runs/sweep"), Workers())

Each cell is the run that drift.Drift alone would make, bit for bit: what cells have in common (the
reference of a seed; the reward model of its pairs and rules) is trained once, before them, and a
cell that finds nothing there trains its own. A run that was killed goes on where it last saved.
Results are written by the caller alone, so workers elsewhere need no common disk. Left out: which
processes run them (engine/jobs.py), and what a remedy does to one batch (sweeps/remedy_runs.py).
"""

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from minirlhf import __version__
from minirlhf.audit.auditor import mean_or_nan
from minirlhf.desk.world import STRATA, Desk
from minirlhf.drift.batches import clearest
from minirlhf.drift.config import DriftConfig
from minirlhf.drift.recipe import described
from minirlhf.drift.run import Drift
from minirlhf.drift.stages import Upstream
from minirlhf.engine.files import (
    StoreError,
    plain,
    read_json,
    write_atomic,
    write_json,
    write_table,
)
from minirlhf.engine.jobs import Report, Workers, run_jobs
from minirlhf.remedies.arms import stack
from minirlhf.sweeps.grid import DIALS, Cell, Row

RUNS = Path("done", "runs")  # below a sweep's folder: a file for every run that has ended
REWARD_MODELS = ("reward", "member_1", "member_2")
JUDGED = ("heldout_accuracy", "gold_accuracy", "bayes_ceiling")
TRAJECTORY = {  # a metric of a PPO step -> its column
    "response/length_tokens": "length_tokens",
    "objective/score_sd": "score_sd",
    "objective/kl_nats": "kl_nats",
    "objective/beta": "beta_now",
    "advantage/positive_share": "positive_share",
    "policy/clip_share": "clip_share",
}
AT_BATCHES = ("advantage_verbose", "advantage_concise", "kl_verbose_nats", "kl_concise_nats")


# ------------------------------------------------------------------ whose folder it is
def claim(
    out: Path,
    base: DriftConfig,
    arms: Iterable[str] = (),
    *,
    resume: bool,
    dials: Mapping[str, Sequence[str]] = DIALS,
) -> None:
    """Say whose folder it is: version, desk, settings (but for `dials`, which keys name), and what
    each of the arms does. Raises StoreError if it holds others, or a sweep and resume is False."""
    wanted: Row = {
        "version": __version__,
        "settings": _settings(base, dials),
        "desk": Desk.load().fingerprint,
    }
    known = {name: described(stack(name, DriftConfig())) for name in sorted(set(arms))}
    path = out / "sweep.json"
    if path.exists() and not resume and any((out / "done").rglob("*.json")):
        raise StoreError(f"{out} already holds a sweep; add --resume or choose another --out")
    if path.exists() and resume:
        held = read_json(path)
        earlier = held.pop("arms", {})
        others = [name for name in known if earlier.get(name, known[name]) != known[name]]
        if held != wanted or others:
            what = f"another {', '.join(others)}" if others else "other settings"
            raise StoreError(
                f"{out} holds a sweep with {what} (see {path}); give the same to resume it, or "
                "choose another --out"
            )
        known = earlier | known
    write_json(path, {**wanted, "arms": known})


def _settings(base: DriftConfig, dials: Mapping[str, Sequence[str]]) -> Row:
    """The settings that all cells have in common: without the seed and the dials."""
    settings = plain(asdict(replace(base, seed=0)))
    for part, names in dials.items():
        for name in names:
            del settings[part][name]
    return settings


# ------------------------------------------------------------------ all of them
def run_cells(
    cells: Sequence[Cell],
    base: DriftConfig,
    out: Path,
    workers: Workers,
    report: Callable[[str], Report] = lambda stage: lambda key, done, total: None,
    *,
    keep_batch: bool = False,
) -> tuple[list[Row], list[Row]]:
    """Rows and trajectories of all cells, in the order of their keys; also as Parquet in `out`.

    `report(stage)` gives what hears of the stages "references", "reward models" and "runs".
    keep_batch: a mid-run batch of every cell stays in out/batches, with the run before it: of the
    three, the one in which verbose and concise answers are best compared (batches.clearest).
    Raises jobs.JobsFailed when cells keep failing: the tables then hold the others.
    """
    # what several cells share is trained by the first of them: it is the last one to be entered
    references = {cell.reference(base): cell for cell in reversed(cells)}
    tasks = {name: (make_reference, (cell, base, out)) for name, cell in references.items()}
    run_jobs(tasks, out / "done" / "references", workers, report("references"))

    reward_models = {cell.upstream(base): cell for cell in reversed(cells)}
    tasks = {name: (make_reward_model, (cell, base, out)) for name, cell in reward_models.items()}
    run_jobs(tasks, out / "done" / "reward_models", workers, report("reward models"))

    tasks = {cell.key: (run_cell, (cell, base, out, keep_batch)) for cell in cells}
    try:
        run_jobs(tasks, out / RUNS, workers, report("runs"))
    finally:
        rows, trajectories = _tables(out, sorted(tasks))
    return rows, trajectories


def _tables(out: Path, keys: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """The tables of the cells that are done, read from disk and written as Parquet."""
    paths = [out / RUNS / f"{key}.json" for key in keys]
    found = [read_json(path) for path in paths if path.exists()]
    tables = {
        "sweep": [cell["row"] for cell in found],
        "trajectories": [step for cell in found for step in cell["trajectory"]],
        # apart, as seconds alone differ between two runs of a sweep on one machine
        "seconds": [cell["seconds"] for cell in found],
    }
    for name, rows in tables.items():
        if rows:
            write_table(out / f"{name}.parquet", rows)
    return tables["sweep"], tables["trajectories"]


# ------------------------------------------------------------------ one of them
@contextmanager
def workplace(cell: Cell, base: DriftConfig, out: Path, name: str) -> Iterator[Drift]:
    """The cell's run, in a folder of its own that begins with what others have trained and goes
    once the run is over. What it trained itself stays behind for the others."""
    folder = out / "work" / name
    shared = _shared(cell, base, out)
    for part, place in shared.items():
        _copy(place, folder / f"{part}.safetensors")
    recipe = cell.recipe(base)
    yield Drift(recipe.config, folder, recipe=recipe, resume=True)
    for part, place in shared.items():
        _copy(folder / f"{part}.safetensors", place)
    shutil.rmtree(folder)


def _shared(cell: Cell, base: DriftConfig, out: Path) -> dict[str, Path]:
    """Where what the cell has in common with others lies, once somebody has trained it."""
    upstream = out / "shared" / cell.upstream(base)
    places = {"reference": out / "shared" / f"reference_{cell.reference(base)}.safetensors"}
    for part in REWARD_MODELS:
        places[part] = upstream / f"{part}.safetensors"
    return places


def _copy(source: Path, target: Path) -> None:
    """If there is one and it is not there yet."""
    if source.exists() and not target.exists():
        write_atomic(target, lambda path: shutil.copyfile(source, path))


def make_reference(cell: Cell, base: DriftConfig, out: Path) -> bool:
    """Trains the reference of the cell's seed, for all cells of that seed."""
    with workplace(cell, base, out, f"reference_{cell.reference(base)}") as run:
        run.make_reference()
    return True


def make_reward_model(cell: Cell, base: DriftConfig, out: Path) -> bool:
    """Trains the reward model of the cell's pairs and rules, for all cells that share it."""
    with workplace(cell, base, out, f"reward_{cell.upstream(base)}") as run:
        Upstream.prepare(run)
    return True


def run_cell(cell: Cell, base: DriftConfig, out: Path, keep_batch: bool = False) -> dict[str, Any]:
    """One run: {"row", "trajectory", "seconds"}, of plain values."""
    start = time.perf_counter()
    dials = asdict(cell)
    with workplace(cell, base, out, cell.key) as run:
        summary = run.run()
        row = {**dials, **_machine(), **outcome(run, summary)}
        row["config"] = json.dumps(summary["config"], sort_keys=True)
        steps = [{**dials, **step} for step in trajectory(run)]
        if keep_batch and summary["batch"]:
            step = clearest(run.batches, summary["batch"]["steps"])
            _keep_batch(run, out / "batches" / cell.key, step)
    seconds = {**dials, **summary["seconds"], "wall": time.perf_counter() - start}
    return {"row": row, "trajectory": steps, "seconds": seconds}


def _machine() -> Row:
    return {
        "version": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _keep_batch(run: Drift, folder: Path, step: int) -> None:
    """The batch of that step, the run as it was before it, and the KL of the steps before it."""
    assert run.out is not None
    for kind in ("rollouts", "before"):
        _copy(run.out / kind / f"step_{step:03d}.safetensors", folder / f"{kind}.safetensors")
    kl = [metrics["objective/kl_nats"] for metrics in run.metrics if metrics["step"] < step]
    write_json(folder / "batch.json", {"step": step, "kl_nats": kl})


# ------------------------------------------------------------------ what came of it
def outcome(run: Drift, summary: Mapping[str, Any]) -> Row:
    """What came out of a run, reference beside end, brief and detailed prompts apart."""
    final = summary["final"]
    found: Row = {
        "steps": final["step"],
        "rm_score_sd": final["rm_score_sd"],
        "kl_nats": final["kl_nats"],
    }
    assert run.ending is not None
    answers = {"reference": run.auditor.sample(run.reference), "final": run.ending}
    for moment, sampled in answers.items():
        closing = run.auditor.closing(sampled)
        for stratum in STRATA:
            measures = {**summary[moment][stratum], **closing[stratum]}
            for name, value in measures.items():
                found[f"{moment}_{stratum}_{name}"] = value
    for name in JUDGED:
        found[name] = summary["reward_model"][name]
    return {**found, **style_gaps(run)}


def style_gaps(run: Drift) -> Row:
    """What PPO is told one courtesy phrase, and one hedge, is worth on a concise correct answer:
    reward sd (of what the rules make of the score), per stratum."""
    auditor = run.auditor
    found: Row = {}
    for stratum in STRATA:
        here = auditor.stratum == stratum
        probes = [probe for probe, yes in zip(auditor.probes, here, strict=True) if yes]
        for name, hedge in (("courtesy", False), ("hedge", True)):
            gaps = auditor.matched_gaps(probes, hedge=hedge, scorer=run.ppo.reward_model)
            found[f"gap_{name}_{stratum}_sd"] = mean_or_nan(gaps)
    return found


def trajectory(run: Drift) -> list[Row]:
    """One row a PPO step: the batch's mean length and the rest of TRAJECTORY; at the kept batches
    also the advantages and log-ratios of verbose and concise answers to brief prompts."""
    kept = {batch["step"]: batch for batch in run.batches}
    rows = []
    for metrics in run.metrics:
        row: Row = {"step": metrics["step"]}
        for metric, column in TRAJECTORY.items():
            row[column] = metrics.get(metric)
        batch = kept.get(metrics["step"], {})
        for name in AT_BATCHES:
            row[name] = batch.get(name)  # None: of this step no batch was kept
        rows.append(row)
    return rows
