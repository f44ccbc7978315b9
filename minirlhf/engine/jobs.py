"""Many independent jobs: on this machine's cores, on a dask cluster or on ray, through joblib.

A job is a function of a module (workers import it by name) with arguments; it returns something
that JSON can hold. Its result lies in a file of its own as soon as it is there, so whatever ends a
call, an error, a killed worker, a full disk or Ctrl-C, the next one goes on from those files. The
calling process alone writes; workers on other machines need no common disk. Each job computes on
one thread: at this model's size one job a core beats threads inside each operation.

Left out: starting a cluster (give the address of one that runs), order and priorities.
"""

import asyncio
import importlib
import json
import logging
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from joblib import Parallel, delayed, parallel_config

from minirlhf.engine import compute, files

Backend = Literal["sequential", "loky", "dask", "ray"]
Report = Callable[[str, int, int], None]
Tasks = Mapping[str, tuple[Callable[..., Any], tuple]]
SECONDS = 5  # in which a scheduler answers, or there is none


class JobsFailed(RuntimeError):
    """Some jobs never succeeded; the message names them. The others' results are kept."""


class NoWorkers(RuntimeError):
    """Nobody to run the jobs: a scheduler that does not answer, or a missing package."""


@dataclass(frozen=True)
class Workers:
    """How jobs are run."""

    backend: Backend = "loky"
    """sequential: in this process; loky: this machine's cores; dask, ray: a cluster."""
    jobs: int = 0
    """Processes at once; 0 = one a core, with dask and ray as many as the cluster has."""
    address: str | None = None
    """Of a running scheduler, as tcp://10.0.0.1:8786; dask needs it, ray may start one here."""
    retries: int = 2
    """How often a job that fails is run again."""

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise ValueError(f"unknown backend {self.backend!r}; one of {get_args(Backend)}")
        if self.jobs < 0 or self.retries < 0:
            raise ValueError(f"jobs = {self.jobs}, retries = {self.retries}: give 0 or more")
        if self.backend == "dask" and not self.address:
            raise ValueError(
                "the dask backend needs the address of a running scheduler, as in "
                "tcp://127.0.0.1:8786; start one with `dask scheduler`, or use the loky backend"
            )


def run_jobs(
    tasks: Tasks, folder: Path, workers: Workers, report: Report = lambda text, done, total: None
) -> dict[str, Any]:
    """{key: result} of every task, sorted; each result lies in folder/<key>.json.

    A key whose file is there is not run again, so it must name all that its result depends on.
    NaN becomes None. report(text, done, total) gets the key of a job that is done, or a sentence
    on one that failed. A dying worker may take its neighbours along, and nobody knows whose fault
    it was: all of them run again, but none has its last try in company.

    Raises ValueError (a key that is no file name), NoWorkers (before the first job, or when a
    scheduler went away), JobsFailed (at the end, with all others done), StoreError (at once).
    """
    _check_keys(tasks)
    run = _Run(tasks, Path(folder), workers.retries, report)
    if run.todo():
        with {"dask": _dask, "ray": _ray}.get(workers.backend, _local)(workers) as pool:
            while todo := run.todo():
                alone = [key for key in todo if run.is_last_try_of_a_suspect(key)]
                run.round([key for key in todo if key not in alone], pool)
                for key in alone:
                    run.round([key], pool)
    run.check()
    return dict(sorted(run.results.items()))


def _check_keys(tasks: Tasks) -> None:
    """A key is a file name on every system, where case may not count."""
    for key in tasks:
        device = re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", key, re.IGNORECASE)
        if device or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,=+@-]{0,149}", key):
            raise ValueError(
                f"job {key!r} cannot be a file name; use up to 150 of A-Z a-z 0-9 _ . , = + @ - "
                "that begin with a letter, a digit or _, and none of Windows' devices"
            )
    twice = [key for key, n in Counter(map(str.lower, tasks)).items() if n > 1]
    if twice:
        raise ValueError(f"two jobs are called {twice[0]!r} but for case; give them other names")


class _Outcome(NamedTuple):
    key: str
    result: Any = None
    error: str | None = None


def _attempt(key: str, function: Callable[..., Any], args: tuple) -> _Outcome:
    """In the worker: an error comes back as text, for not every exception survives the journey."""
    compute.use(1)
    try:
        result = json.dumps(files.plain(function(*args)), allow_nan=False)
    except (Exception, SystemExit) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return _Outcome(key, error=f"{_sentence(error)} ({Path(at.filename).name}:{at.lineno})")
    return _Outcome(key, json.loads(result))  # as it will be read from its file


def _sentence(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class _Pool(NamedTuple):
    """A joblib backend that is connected, and what it needs to be told."""

    jobs: int
    under_way: str = "n_jobs"  # few at a time: what a dying worker can take along
    at_once: int = 0  # jobs a call; 0: all of them
    check: Callable[[], None] = lambda: None  # raises NoWorkers when the cluster is gone

    def outcomes(self, calls: Iterator[Any]) -> Generator[_Outcome, None, None]:
        how = {"return_as": "list" if self.at_once else "generator_unordered", "batch_size": 1}
        parts = iter(lambda: list(islice(calls, self.at_once)), []) if self.at_once else [calls]
        for part in parts:
            yield from Parallel(self.jobs, pre_dispatch=self.under_way, **how)(part)  # type: ignore


class _Run:
    """What is done, what failed how often, and what is still to do."""

    def __init__(self, tasks: Tasks, folder: Path, retries: int, report: Report) -> None:
        self.tasks, self.folder, self.retries, self.report = tasks, folder, retries, report
        self.results: dict[str, Any] = {}
        self.tries: Counter[str] = Counter()
        self.errors: dict[str, str] = {}
        self.suspects: set[str] = set()  # were under way when a worker died
        for key in tasks:
            if (path := folder / f"{key}.json").exists():
                try:
                    self.results[key] = files.read_json(path)
                except files.StoreError as error:
                    self._say(f"{key} is run again: {error}")

    def _say(self, text: str) -> None:
        self.report(text, len(self.results), len(self.tasks))

    def todo(self) -> list[str]:
        left = (key for key in self.tasks if key not in self.results)
        return [key for key in left if self.tries[key] <= self.retries]

    def is_last_try_of_a_suspect(self, key: str) -> bool:
        return key in self.suspects and self.tries[key] >= self.retries

    def check(self) -> None:
        """Raises JobsFailed."""
        if keys := [key for key in self.tasks if key not in self.results]:
            named = "; ".join(f"{key}: {self.errors[key]}" for key in keys[:3])
            more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise JobsFailed(
                f"{len(keys)} of {len(self.tasks)} jobs failed {self.retries + 1} times ({named}"
                f"{more}); the others are kept in {self.folder}, run it again to try these anew"
            )

    def round(self, keys: list[str], pool: _Pool) -> None:
        """Each of these once, the results written as they come."""
        under_way: list[str] = []

        def calls() -> Iterator[Any]:
            for key in keys:
                under_way.append(key)
                yield delayed(_attempt)(key, *self.tasks[key])

        with warnings.catch_warnings(), closing(pool.outcomes(calls())) as outcomes:
            # joblib's advice where a round ends early
            warnings.filterwarnings("ignore", r"\d+ tasks ", UserWarning)
            while True:
                try:
                    outcome = next(outcomes, None)
                except Exception as error:  # joblib gave up: a worker died
                    pool.check()
                    return self._broken(under_way, error)
                if outcome is None:
                    return None
                under_way.remove(outcome.key)
                if outcome.error is None:
                    files.write_json(self.folder / f"{outcome.key}.json", outcome.result)
                    self.results[outcome.key] = outcome.result
                    self._say(outcome.key)
                else:
                    pool.check()
                    self._failed(outcome.key, outcome.error)

    def _failed(self, key: str, error: str) -> None:
        if error.startswith("DiskFull: "):  # neither this job nor another one can be written
            raise files.DiskFull(error.removeprefix("DiskFull: ").rpartition(" (")[0])
        self.tries[key] += 1
        self.errors[key] = error
        then = "it is run again" if self.tries[key] <= self.retries else "that was its last try"
        self._say(f"{key} failed ({error}); {then}")

    def _broken(self, keys: list[str], error: Exception) -> None:
        if not keys:
            raise error
        for key in keys:
            self.suspects.add(key)
            if len(keys) > 1:  # perhaps another's fault: not its last try
                self.tries[key] = min(self.tries[key], self.retries - 1)
            self._failed(key, _sentence(error))


def _module(name: str, backend: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NoWorkers(
            f"the {backend} backend needs the package {name}, which cannot be imported: "
            f"pip install 'minirlhf[{backend}]', or use the loky backend"
        ) from error


@contextmanager
def _local(workers: Workers) -> Iterator[_Pool]:
    one = workers.backend == "sequential"
    with parallel_config(workers.backend, inner_max_num_threads=None if one else 1):
        yield _Pool(1 if one else workers.jobs or compute.available())


@contextmanager
def _dask(workers: Workers) -> Iterator[_Pool]:
    where = f"dask scheduler at {workers.address}"
    distributed = _module("distributed", "dask")
    for name in ("distributed", "tornado", "asyncio"):  # they print what is said here in a sentence
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        asyncio.run(_knock(str(workers.address)))  # a client that fails to connect closes noisily
        client = distributed.Client(workers.address, timeout=SECONDS, set_as_default=False)
    except Exception as error:  # whatever answers at that address may speak another language
        raise NoWorkers(
            f"cannot reach a {where}: start one with `dask scheduler` and workers with "
            f"`dask worker {workers.address}`, or use the loky backend"
        ) from error

    def check() -> None:
        if client.status != "running":
            raise NoWorkers(f"lost the {where}; what is done is kept, run it again to go on")

    with client:
        try:
            client.wait_for_workers(1, timeout=6 * SECONDS)
        except TimeoutError as error:
            raise NoWorkers(
                f"the {where} has no workers: start some with `dask worker {workers.address}`"
            ) from error
        with parallel_config(_dask_backend(client)):
            yield _Pool(-1, str(workers.jobs or "n_jobs"), check=check)


async def _knock(address: str) -> None:
    """Raises where no scheduler answers."""
    from distributed.core import rpc

    async with rpc(address) as scheduler:
        await asyncio.wait_for(scheduler.identity(), SECONDS)


def _dask_backend(client: Any) -> Any:
    """joblib's, with two corrections (of 1.6)."""
    from joblib._dask import DaskDistributedBackend

    class Backend(DaskDistributedBackend):
        def effective_n_jobs(self, n_jobs: int) -> int:
            # where the cluster has one core, joblib would run all jobs in the calling process
            return max(2, super().effective_n_jobs(n_jobs))

        def submit(self, func: Any, callback: Any = None) -> Any:
            # joblib would wait for ever for a job whose worker died; this makes it a failed try
            key = func.items[0][1][0]

            def arrived(out: Any) -> None:
                lost = isinstance(out, BaseException)
                error = _sentence(out.__cause__ or out) if lost else None
                callback([_Outcome(key, error=error)] if lost else out)

            future = super().submit(func, arrived)
            future.add_done_callback(lambda f: arrived(f.exception()) if f.exception() else None)
            return future

    return Backend(client=client)


@contextmanager
def _ray(workers: Workers) -> Iterator[_Pool]:
    ray = _module("ray", "ray")
    _module("ray.util.joblib", "ray").register_ray()
    ours = not ray.is_initialized()
    try:
        ray.init(workers.address, ignore_reinit_error=True, log_to_driver=False)
    except Exception as error:  # ray raises that very class
        raise NoWorkers(
            f"cannot reach a ray cluster at {workers.address}: start one with `ray start --head`, "
            "or use the loky backend"
        ) from error
    try:
        jobs = workers.jobs or int(ray.cluster_resources().get("CPU", 1))
        with parallel_config("ray"):
            # joblib's ray backend hands results back when a call ends: one job a core, then write
            yield _Pool(jobs, at_once=jobs)
    finally:
        if ours:
            ray.shutdown()
