"""Who computes: the cores of this machine, and how many processes run jobs, where.

Nothing is imported here but the standard library: `minirlhf remedies --help` prints these settings
and must not wait for torch or joblib. Left out: computing (compute.py) and running jobs (jobs.py).
"""

import os
from dataclasses import dataclass
from typing import Literal, get_args

Backend = Literal["sequential", "loky", "dask"]


def available() -> int:
    """Cores that this process may run on."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(allowed(0)) if allowed else os.cpu_count() or 1


@dataclass(frozen=True)
class Workers:
    """How jobs are run."""

    backend: Backend = "loky"
    """sequential: in this process; loky: this machine's cores; dask: a cluster."""
    jobs: int = 0
    """Jobs under way at once; 0 = one a core, with dask as many as the cluster has."""
    address: str | None = None
    """Of a running scheduler, as tcp://10.0.0.1:8786; dask needs it."""
    retries: int = 2
    """How often a job that fails is run again."""

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            known = ", ".join(get_args(Backend))
            raise ValueError(f"unknown backend {self.backend!r}; use one of {known}")
        if self.jobs < 0 or self.retries < 0:
            raise ValueError(f"jobs = {self.jobs}, retries = {self.retries}: give 0 or more")
        if self.backend == "dask" and not self.address:
            raise ValueError(
                "the dask backend needs the address of a running scheduler, as in "
                "tcp://127.0.0.1:8786; start one with `dask scheduler`, or use the loky backend"
            )
