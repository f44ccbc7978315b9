"""What a sweep costs: sixteen runs against one run that has both cores, and dask against loky.

    python benchmarks/sweep.py [--by dials|seeds] [--steps 80] [--dask-steps 20]

`dials`: 4 betas x 4 epsilons of one seed, which share a reference and a reward model; `seeds`: 16
seeds of the default settings, which share nothing. Everything is timed with nothing else running;
each timing is a process of its own. Then one cell is run alone, on one thread, and its row and
every metric of its trajectory are compared bit for bit. Needs the dask extra for the last part.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import tyro

from minirlhf.drift.config import DriftConfig
from minirlhf.drift.run import Drift
from minirlhf.engine import compute
from minirlhf.engine.jobs import Workers
from minirlhf.sweeps.cells import outcome, run_cells, trajectory
from minirlhf.sweeps.grid import Cell, Grid

BETAS, CLIPS = (0.02, 0.05, 0.07, 0.2), (0.05, 0.1, 0.2, 0.4)


def cells(by: str, base: DriftConfig) -> list[Cell]:
    """Sixteen of them."""
    dials, seeds = Grid(beta=BETAS, clip=CLIPS), Grid(seed=tuple(range(16)))
    return (dials if by == "dials" else seeds).cells(base)


def one_run(steps: int, threads: int) -> float:
    """Seconds of one default run on so many cores."""
    compute.use(threads)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        Drift(replace(DriftConfig(), steps=steps), Path(folder) / "run").run()
    return time.perf_counter() - start


def sixteen(by: str, steps: int, backend: Literal["loky", "dask"], out: Path, count: int) -> float:
    """Seconds of the first `count` cells, on two processes, from nothing."""
    base = replace(DriftConfig(), steps=steps)
    if backend == "loky":
        start = time.perf_counter()
        run_cells(cells(by, base)[:count], base, out, Workers("loky", jobs=2, retries=0))
        return time.perf_counter() - start
    from distributed import LocalCluster

    shape: dict[str, Any] = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    cluster: Any = LocalCluster(**shape)
    with cluster:
        workers = Workers("dask", address=cluster.scheduler_address, retries=0)
        start = time.perf_counter()
        run_cells(cells(by, base)[:count], base, out, workers)
        return time.perf_counter() - start


def same_alone(by: str, steps: int, out: Path) -> bool:
    """Whether the last cell's row and trajectory are those of the run alone on one thread."""
    compute.use(1)
    base = replace(DriftConfig(), steps=steps)
    cell = cells(by, base)[-1]
    run = Drift(cell.recipe(base).config)
    found = {"outcome": outcome(run, run.run()), "trajectory": trajectory(run)}
    stored = json.loads((out / "done" / "runs" / f"{cell.key}.json").read_text())
    mine = json.loads(json.dumps(found))
    kept = {k: stored["row"][k] for k in mine["outcome"]}
    steps_ = [{k: row[k] for k in mine["trajectory"][0]} for row in stored["trajectory"]]
    return kept == mine["outcome"] and steps_ == mine["trajectory"]


def main(
    by: Literal["dials", "seeds"] = "dials",
    steps: int = 80,
    dask_steps: int = 20,
    part: Literal["", "one", "loky", "dask"] = "",
    count: int = 16,
    out: Path = Path(),
) -> None:
    """Every timing in a process of its own (`part`, `count` and `out` are how this script calls
    itself)."""
    if part:
        print(one_run(steps, 2) if part == "one" else sixteen(by, steps, part, out, count))
        return
    with tempfile.TemporaryDirectory() as folder:

        def timed(part: str, count: int, steps: int) -> float:
            words = [sys.executable, __file__, "--by", by, "--steps", str(steps), "--part", part]
            words += ["--count", str(count), "--out", f"{folder}/{part}{count}"]
            lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            return float(lines.splitlines()[-1])

        one, all_ = timed("one", 1, steps), timed("loky", 16, steps)
        print(f"one run on two cores {one:.1f} s; 16 by {by} {all_:.1f} s: {all_ / one:.2f} x")
        same = same_alone(by, steps, Path(folder) / "loky16")
        print("the last cell, alone on one thread: " + ("the same bits" if same else "DIFFERENT"))
        loky, dask = (timed(backend, 8, dask_steps) for backend in ("loky", "dask"))
        said = f"8 runs of {dask_steps} steps: loky {loky:.1f} s, dask {dask:.1f} s"
        print(f"{said}: {dask / loky:.2f} x")


if __name__ == "__main__":
    tyro.cli(main)
