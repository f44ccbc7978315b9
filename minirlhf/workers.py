"""Many independent jobs: on this machine's cores, on a dask cluster or on ray, through joblib.

A job is a function of a module (workers import it by name) with arguments; it returns something
that JSON can hold. Its result lies in a file of its own as soon as it is there, so whatever ends a
call, an error, a killed worker, a full disk or Ctrl-C, the next one goes on from those files. The
calling process alone writes; workers on other machines need no common disk. Each job computes on
one thread: at this model's size one job a core beats threads inside each operation.

Left out: starting a cluster (give the address of one that runs), order and priorities.
"""

import importlib
import json
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast, get_args

from joblib import Parallel, delayed, parallel_config

from minirlhf import cores, store

Backend = Literal["sequential", "loky", "dask", "ray"]
Tasks = Mapping[str, tuple[Callable[..., Any], tuple]]
Report = Callable[[str, int, int], None]
Outcome = tuple[str, Any, str | None]  # key, result, what went wrong
SECONDS = 5  # to wait for a scheduler to answer


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
    tasks: Tasks, folder: Path, workers: Workers, report: Report = lambda key, done, total: None
) -> dict[str, Any]:
    """{key: result} of every task, sorted; each result lies in folder/<key>.json.

    A key whose file is there is not run again, so it must name all that its result depends on.
    NaN becomes None. report(text, done, total) gets the key of a job that is done, or a sentence
    on one that failed. A job whose worker died may have taken its neighbours along; all of them
    run again, a suspect on its last try alone, so that none fails for another's fault.

    Raises ValueError (a key that is no file name), NoWorkers (before the first job, or a
    scheduler that went away), JobsFailed (at the end, when all others are done), StoreError.
    """
    _check_keys(tasks)
    calls = _Calls(tasks, Path(folder), workers, report)
    with _backend(workers) as pool:
        calls.run(pool)
    return dict(sorted(calls.results.items()))


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


def _attempt(key: str, function: Callable[..., Any], args: tuple) -> Outcome:
    """In the worker: an error comes back as text, for not every exception survives the journey."""
    cores.use(1)
    try:
        result = json.dumps(store.plain(function(*args)), allow_nan=False)
        return key, json.loads(result), None  # as it will be read from its file
    except (Exception, SystemExit) as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return key, None, f"{type(error).__name__}: {error} ({Path(at.filename).name}:{at.lineno})"


class _Calls:
    """What is done, what failed how often, and what is still to do."""

    def __init__(self, tasks: Tasks, folder: Path, workers: Workers, report: Report) -> None:
        self.tasks, self.folder, self.retries, self.report = tasks, folder, workers.retries, report
        self.results: dict[str, Any] = {}
        self.tries: Counter[str] = Counter()
        self.errors: dict[str, str] = {}
        self.suspects: set[str] = set()  # were under way when a worker died
        for key in tasks:
            if (path := self._path(key)).exists():
                try:
                    self.results[key] = store.read_json(path)
                except store.StoreError as error:
                    self._say(f"{key} is run again: {error}")

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _say(self, text: str) -> None:
        self.report(text, len(self.results), len(self.tasks))

    def run(self, pool: "_Pool") -> None:
        """Round after round, until every job has its result or has used up its tries."""
        while todo := [k for k in self.tasks if k not in self.results and self._may_try(k)]:
            alone = [k for k in todo if k in self.suspects and self.tries[k] >= self.retries]
            for batch in [
                *pool.batches([k for k in todo if k not in alone]),
                *([k] for k in alone),
            ]:
                self._round(batch, pool)
        if failed := [key for key in self.tasks if key not in self.results]:
            named = "; ".join(f"{key}: {self.errors[key]}" for key in failed[:3])
            more = f"; and {len(failed) - 3} more" if len(failed) > 3 else ""
            raise JobsFailed(
                f"{len(failed)} of {len(self.tasks)} jobs failed {self.retries + 1} times ({named}"
                f"{more}); the others are in {self.folder}, run it again to try these anew"
            )

    def _may_try(self, key: str) -> bool:
        return self.tries[key] <= self.retries

    def _round(self, keys: Sequence[str], pool: "_Pool") -> None:
        sent: list[str] = []
        back: set[str] = set()

        def calls() -> Iterator[Any]:
            for key in keys:
                sent.append(key)
                yield delayed(_attempt)(key, *self.tasks[key])

        with _quietly_closing(pool.outcomes(calls())) as outcomes:
            while True:
                try:
                    key, result, error = next(outcomes)
                except StopIteration:
                    return None
                except Exception as broken:  # joblib gave up: a worker died
                    return self._broken([key for key in sent if key not in back], broken)
                finally:
                    pool.check()
                back.add(key)
                if error is None:
                    store.write_json(self._path(key), result)
                    self.results[key] = result
                    self._say(key)
                else:
                    self._failed(key, error)

    def _failed(self, key: str, error: str) -> None:
        self.tries[key] += 1
        self.errors[key] = error
        then = "it is run again" if self._may_try(key) else "that was its last try"
        self._say(f"{key} failed ({error}); {then}")

    def _broken(self, keys: list[str], error: Exception) -> None:
        """Nobody knows whose worker died, unless one job alone was under way."""
        if not keys:
            raise error
        for key in keys:
            self.suspects.add(key)
            if len(keys) > 1:
                self.tries[key] = min(self.tries[key], self.retries - 1)
            self._failed(key, f"{type(error).__name__}, a worker died while it ran or waited")


@contextmanager
def _quietly_closing(outcomes: Iterator[Outcome]) -> Iterator[Iterator[Outcome]]:
    """Whatever ends a round early also ends its jobs, without joblib's advice on that."""
    try:
        yield outcomes
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cast(Generator, outcomes).close()


class _Pool(NamedTuple):
    """A joblib backend that is ready, and what it needs to be told."""

    jobs: int
    under_way: str = "n_jobs"  # few at a time: what a dying worker can take along
    at_once: int = 0  # jobs a call; 0: all of them
    check: Callable[[], None] = lambda: None  # raises NoWorkers when the cluster is gone

    def batches(self, keys: list[str]) -> list[list[str]]:
        step = self.at_once or max(len(keys), 1)
        return [keys[i : i + step] for i in range(0, len(keys), step)]

    def outcomes(self, calls: Iterator[Any]) -> Iterator[Outcome]:
        how = "list" if self.at_once else "generator_unordered"
        parallel = Parallel(self.jobs, return_as=how, pre_dispatch=self.under_way, batch_size=1)  # type: ignore[arg-type]
        yield from cast(Iterator[Outcome], parallel(calls))


@contextmanager
def _backend(workers: Workers) -> Iterator[_Pool]:
    """joblib's backend, connected."""
    if workers.backend == "dask":
        with _dask(workers) as pool:
            yield pool
    elif workers.backend == "ray":
        with _ray(workers) as pool:
            yield pool
    elif workers.backend == "loky":
        with parallel_config("loky", inner_max_num_threads=1):
            yield _Pool(workers.jobs or cores.available())
    else:
        with parallel_config("sequential"):
            yield _Pool(1)


def _module(name: str, backend: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NoWorkers(
            f"the {backend} backend needs the package {name}, which cannot be imported: "
            f"pip install 'minirlhf[{backend}]', or use the loky backend"
        ) from error


@contextmanager
def _dask(workers: Workers) -> Iterator[_Pool]:
    """One client for all rounds, with two corrections of joblib's backend (as of 1.6)."""
    distributed = _module("distributed", "dask")
    from joblib._dask import DaskDistributedBackend

    class Backend(DaskDistributedBackend):
        def effective_n_jobs(self, n_jobs: int) -> int:
            # where the cluster has one core, joblib would run all jobs in the calling process
            return max(2, super().effective_n_jobs(n_jobs))

        def submit(self, func: Any, callback: Any = None) -> Any:
            # joblib waits for ever for a job whose worker died: that is its outcome, an error
            key = func.items[0][1][0]

            def arrived(out: Any) -> None:
                lost = isinstance(out, BaseException)
                callback([(key, None, f"{type(out).__name__}: {out}")] if lost else out)

            future = super().submit(func, arrived)
            future.add_done_callback(lambda f: arrived(f.exception()) if f.exception() else None)
            return future

    where = f"dask scheduler at {workers.address}"
    try:
        client = distributed.Client(workers.address, timeout=SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise NoWorkers(
            f"cannot reach a {where}: start one with `dask scheduler` and workers with "
            f"`dask worker {workers.address}`, or use the loky backend"
        ) from error

    def check() -> None:
        if client.status != "running":
            raise NoWorkers(f"lost the {where}; what is done is kept, run it again to go on")

    with client:
        try:
            client.wait_for_workers(1, timeout=SECONDS)
        except TimeoutError as error:
            raise NoWorkers(
                f"the {where} has no workers: start some with `dask worker {workers.address}`"
            ) from error
        with parallel_config(Backend(client=client)):
            yield _Pool(-1, workers.jobs or "n_jobs", check=check)


@contextmanager
def _ray(workers: Workers) -> Iterator[_Pool]:
    """joblib's ray backend gives results only when a call ends, so a call is one job a core."""
    ray = _module("ray", "ray")
    _module("ray.util.joblib", "ray").register_ray()
    ours = not ray.is_initialized()
    try:
        ray.init(workers.address, ignore_reinit_error=True, log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise NoWorkers(
            f"cannot reach a ray cluster at {workers.address}: start one with `ray start --head`, "
            "or use the loky backend"
        ) from error
    try:
        jobs = workers.jobs or int(ray.cluster_resources().get("CPU", 1))
        with parallel_config("ray"):
            yield _Pool(jobs, at_once=jobs)
    finally:
        if ours:
            ray.shutdown()
