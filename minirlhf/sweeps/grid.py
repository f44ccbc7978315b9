"""Grids of runs: beta x epsilon x length bias x remedy x seed, one row and one trajectory a run.

    base, grid = DriftConfig(steps=60), Grid(beta=(0.02, 0.2), seed=(0, 1))
    rows, steps = run_cells(grid.cells(base), base, Path("runs/sweep"), Workers())

Each cell is the run that drift.Drift alone would make, bit for bit: what cells have in common (the
reference of a seed; the reward model of its pairs and rules) is trained once, before them, and a
cell that finds nothing there trains its own. A run that was killed goes on where it last saved.
Results are written by the caller alone, so workers elsewhere need no common disk. Left out: which
processes run them (engine/jobs.py), and what a remedy does to one batch (sweeps/remedy_runs.py).
"""

import itertools
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minirlhf import __version__
from minirlhf.audit.auditor import mean_or_nan
from minirlhf.desk.world import STRATA, Desk
from minirlhf.drift.batches import clearest
from minirlhf.drift.config import DriftConfig
from minirlhf.drift.recipe import Recipe, changed, described
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
from minirlhf.remedies.arms import ARMS, stack

Row = dict[str, Any]
SHARED = ("reference", "reward", "member_1", "member_2")
UPSTREAM = {"pairs", "fit", "sft", "preferences", "reward"}  # what a reward model depends on
TRAJECTORY = {
    "response/length_tokens": "length_tokens",
    "objective/score_sd": "score_sd",
    "objective/kl_nats": "kl_nats",
    "objective/beta": "beta_now",
    "advantage/positive_share": "positive_share",
    "policy/clip_share": "clip_share",
}
AT_BATCHES = ("advantage_verbose", "advantage_concise", "kl_verbose_nats", "kl_concise_nats")


@dataclass(frozen=True)
class Cell:
    """One run of a grid."""

    remedy: str
    beta: float
    clip: float
    length_bias: float
    seed: int

    @property
    def key(self) -> str:
        """Its name, good for a file."""
        dials = f"beta{self.beta:g}_clip{self.clip:g}_bias{self.length_bias:g}"
        return f"{self.remedy}_{dials}_seed{self.seed}"

    def recipe(self, base: DriftConfig) -> Recipe:
        """The settings of `base` with this cell's dials, and the remedy's change."""
        dialled = replace(
            base,
            seed=self.seed,
            ppo=replace(base.ppo, beta=self.beta, clip=self.clip),
            preferences=replace(base.preferences, length_bias=self.length_bias),
        )
        return stack(self.remedy, dialled)

    def upstream(self, base: DriftConfig) -> str:
        """The name of what it shares with other cells: its pairs and its reward model."""
        return f"{self._acting(base, UPSTREAM)}_bias{self.length_bias:g}_seed{self.seed}"

    def reference(self, base: DriftConfig) -> str:
        """The name of the reference that it shares."""
        return f"{self._acting(base, {'sft'})}_seed{self.seed}"

    def _acting(self, base: DriftConfig, on: set[str]) -> str:
        """Those of its remedies that act on one of these, joined."""
        usual = replace(self, remedy="none").recipe(base)
        names = (n for n in self.remedy.split("+") if changed(usual, ARMS[n](usual)) & on)
        return "+".join(names) or "none"


@dataclass(frozen=True)
class Grid:
    """The values of every dial; each combination is a run."""

    beta: tuple[float, ...] = ()
    """price of KL, reward sd per nat (none given: that of the settings, as for the others)"""
    clip: tuple[float, ...] = ()
    """epsilon of the clipped ratio"""
    length_bias: tuple[float, ...] = ()
    """what labelers pay for a token, gold points"""
    remedy: tuple[str, ...] = ("none",)
    """arms of remedies/arms.py; several joined by + are applied one after the other"""
    seed: tuple[int, ...] = ()
    """every random draw of a run"""

    def cells(self, base: DriftConfig) -> list[Cell]:
        """Every combination once. Raises ValueError, before any run, for one that cannot be."""
        usual = {"beta": base.ppo.beta, "clip": base.ppo.clip, "seed": base.seed}
        usual |= {"length_bias": base.preferences.length_bias, "remedy": "none"}
        dials = {name: getattr(self, name) or (value,) for name, value in usual.items()}
        for name, values in dials.items():
            if len(set(values)) < len(values):
                raise ValueError(f"grid.{name} is {values}; give no value twice")
        found = [Cell(**dict(zip(dials, values))) for values in itertools.product(*dials.values())]  # noqa: B905
        for cell in found:
            cell.recipe(base)
        return found


DIALS = {"ppo": ("beta", "clip"), "preferences": ("length_bias",)}  # named by a cell's key


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
    settings = plain(asdict(replace(base, seed=0)))
    for part, names in dials.items():
        settings[part] = {k: v for k, v in settings[part].items() if k not in names}
    wanted: Row = {"version": __version__, "settings": settings}
    wanted["desk"] = Desk.load().fingerprint
    known = {name: described(stack(name, DriftConfig())) for name in sorted(set(arms))}
    path = out / "sweep.json"
    if path.exists() and not resume and any((out / "done").rglob("*.json")):
        raise StoreError(f"{out} already holds a sweep; add --resume or choose another --out")
    if path.exists() and resume:
        held = read_json(path)
        earlier = held.pop("arms", {})
        changed_ = [name for name in known if earlier.get(name, known[name]) != known[name]]
        if held != wanted or changed_:
            what = f"another {', '.join(changed_)}" if changed_ else "other settings"
            raise StoreError(
                f"{out} holds a sweep with {what} (see {path}); give the same to resume it, or "
                "choose another --out"
            )
        known = earlier | known
    write_json(path, {**wanted, "arms": known})


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
    three, the one in which verbose and concise answers are best compared (facts.clearest).
    Raises workers.JobsFailed when cells keep failing: the tables then hold the others.
    """
    first = {cell.reference(base): cell for cell in reversed(cells)}
    trained = {cell.upstream(base): cell for cell in reversed(cells)}
    for stage, make, wanted in (
        ("references", make_reference, first),
        ("reward models", make_reward_model, trained),
    ):
        tasks = {key: (make, (cell, base, out)) for key, cell in wanted.items()}
        run_jobs(tasks, out / "done" / stage.replace(" ", "_"), workers, report(stage))
    tasks = {cell.key: (run_cell, (cell, base, out, keep_batch)) for cell in cells}
    try:
        run_jobs(tasks, out / "done" / "runs", workers, report("runs"))
    finally:
        rows, paths = _tables(out, sorted(tasks))
    return rows, paths


def _tables(out: Path, keys: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """The tables of the cells that are done. Seconds have one of their own: they alone differ
    between two runs of a sweep on one machine."""
    paths = (out / "done" / "runs" / f"{key}.json" for key in keys)
    found = [read_json(path) for path in paths if path.exists()]
    rows, steps = [f["row"] for f in found], [step for f in found for step in f["trajectory"]]
    named = {"sweep": rows, "trajectories": steps, "seconds": [f["seconds"] for f in found]}
    for name, table in named.items():
        if table:
            write_table(out / f"{name}.parquet", table)
    return rows, steps


@contextmanager
def workplace(cell: Cell, base: DriftConfig, out: Path, name: str) -> Iterator[Drift]:
    """The cell's run, in a folder of its own that begins with what others have trained and goes
    once the run is over. What it trained itself stays behind for the others."""
    folder, recipe = out / "work" / name, cell.recipe(base)
    shared = out / "shared" / cell.upstream(base)
    places = {"reference": out / "shared" / f"reference_{cell.reference(base)}.safetensors"}
    places |= {part: shared / f"{part}.safetensors" for part in SHARED[1:]}
    for part, place in places.items():
        _copy(place, folder / f"{part}.safetensors")
    yield Drift(recipe.config, folder, recipe=recipe, resume=True)
    for part, place in places.items():
        _copy(folder / f"{part}.safetensors", place)
    shutil.rmtree(folder)


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
    with workplace(cell, base, out, cell.key) as run:
        summary = run.run()
        row = {**asdict(cell), **_machine(), **outcome(run, summary)}
        row["config"] = json.dumps(summary["config"], sort_keys=True)
        steps = [{**asdict(cell), **step} for step in trajectory(run)]
        if keep_batch and summary["batch"]:
            step = clearest(run.batches, summary["batch"]["steps"])
            _keep_batch(run, out / "batches" / cell.key, step)
    seconds = {**asdict(cell), **summary["seconds"], "wall": time.perf_counter() - start}
    return {"row": row, "trajectory": steps, "seconds": seconds}


def _machine() -> Row:
    kind = f"{platform.system()} {platform.machine()}"
    return {"version": __version__, "torch": torch.__version__, "machine": kind}


def outcome(run: Drift, summary: Mapping[str, Any]) -> Row:
    """What came out of a run, reference beside end, brief and detailed prompts apart."""
    found: Row = {"steps": summary["final"]["step"], "rm_score_sd": summary["final"]["rm_score_sd"]}
    found["kl_nats"] = summary["final"]["kl_nats"]
    assert run.ending is not None
    answers = {"reference": run.auditor.sample(run.reference), "final": run.ending}
    for moment, sampled in answers.items():
        more = run.auditor.closing(sampled)
        for stratum in STRATA:
            for name, value in {**summary[moment][stratum], **more[stratum]}.items():
                found[f"{moment}_{stratum}_{name}"] = value
    judged = summary["reward_model"]
    found |= {k: judged[k] for k in ("heldout_accuracy", "gold_accuracy", "bayes_ceiling")}
    return found | style_gaps(run)


def style_gaps(run: Drift) -> Row:
    """What PPO is told one courtesy phrase, and one hedge, is worth on a concise correct answer:
    reward sd (of what the rules make of the score), per stratum."""
    found, auditor = {}, run.auditor
    for stratum in STRATA:
        at = auditor.stratum == stratum
        probes = [p for p, here in zip(auditor.probes, at, strict=True) if here]
        for name, hedge in (("courtesy", False), ("hedge", True)):
            gaps = auditor.matched_gaps(probes, hedge=hedge, scorer=run.ppo.reward_model)
            found[f"gap_{name}_{stratum}_sd"] = mean_or_nan(gaps)
    return found


def trajectory(run: Drift) -> list[Row]:
    """One row a PPO step: the batch's mean length and the rest of TRAJECTORY; at the kept batches
    also the advantages and log-ratios of verbose and concise answers to brief prompts."""
    kept = {batch["step"]: batch for batch in run.batches}
    found = []
    for step in run.metrics:
        row = {"step": step["step"], **{new: step.get(old) for old, new in TRAJECTORY.items()}}
        at = kept.get(step["step"], {})
        found.append(row | {name: at.get(name) for name in AT_BATCHES})
    return found


def _keep_batch(run: Drift, folder: Path, step: int) -> None:
    assert run.out is not None
    for kind in ("rollouts", "before"):
        _copy(run.out / kind / f"step_{step:03d}.safetensors", folder / f"{kind}.safetensors")
    rows = [m for m in run.metrics if m["step"] < step]
    kl = [m["objective/kl_nats"] for m in rows]
    write_json(folder / "batch.json", {"step": step, "kl_nats": kl})
