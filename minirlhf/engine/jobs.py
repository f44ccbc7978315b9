"""Many independent jobs: on this machine's cores through joblib, or on a dask cluster.

A job is a function of a module (workers import it by name) with arguments; it returns something
that JSON can hold. Its result lies in a file of its own as soon as it is there, so whatever ends a
call, an error, a killed worker, a full disk or Ctrl-C, the next one goes on from those files. The
calling process alone writes; workers on other machines need no common disk. Each job computes on
one thread: at this model's size one job a core beats threads inside each operation.

Left out: starting a cluster (give the address of one that runs), order and priorities.
"""

import asyncio
import json
import logging
import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from joblib import Parallel, delayed, parallel_config

from minirlhf.engine import compute, files
from minirlhf.engine.workers import Workers, available

Report = Callable[[str, int, int], None]
Tasks = Mapping[str, tuple[Callable[..., Any], tuple]]
SECONDS = 5  # in which a scheduler answers, or there is none


class JobsFailed(RuntimeError):
    """Some jobs never succeeded; the message names them. The others' results are kept."""


class NoWorkers(RuntimeError):
    """Nobody to run the jobs: a scheduler that does not answer, or a missing package."""


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
        connect = _dask if workers.backend == "dask" else _local
        with connect(workers, tasks) as outcomes:
            while todo := run.todo():
                alone = [key for key in todo if run.is_last_try_of_a_suspect(key)]
                run.take(outcomes([key for key in todo if key not in alone]))
                for key in alone:
                    run.take(outcomes([key]))
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
    """Of one try of one job."""

    key: str
    result: Any = None
    error: str | None = None
    in_company: bool = False  # its worker died, perhaps of another job


Outcomes = Callable[[Sequence[str]], Generator[_Outcome, None, None]]  # each of these keys once


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


class _Run:
    """What is done, what failed how often, and what is still to do."""

    def __init__(self, tasks: Tasks, folder: Path, retries: int, report: Report) -> None:
        self.tasks = tasks
        self.folder = folder
        self.retries = retries
        self.report = report
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

    def take(self, outcomes: Generator[_Outcome, None, None]) -> None:
        """Each as it comes: a result into its file, an error into the count of tries."""
        with warnings.catch_warnings(), closing(outcomes):
            # joblib's advice where it is stopped in the middle
            warnings.filterwarnings("ignore", r"\d+ tasks ", UserWarning)
            for outcome in outcomes:
                if outcome.error is None:
                    files.write_json(self.folder / f"{outcome.key}.json", outcome.result)
                    self.results[outcome.key] = outcome.result
                    self._say(outcome.key)
                else:
                    self._failed(outcome.key, outcome.error, outcome.in_company)

    def _failed(self, key: str, error: str, in_company: bool) -> None:
        if error.startswith("DiskFull: "):  # neither this job nor another one can be written
            raise files.DiskFull(error.removeprefix("DiskFull: ").rpartition(" (")[0])
        if in_company:  # perhaps another's fault, so this was not its last try
            self.suspects.add(key)
            self.tries[key] = min(self.tries[key], self.retries - 1)
        self.tries[key] += 1
        self.errors[key] = error
        then = "it is run again" if self.tries[key] <= self.retries else "that was its last try"
        self._say(f"{key} failed ({error}); {then}")

    def check(self) -> None:
        """Raises JobsFailed."""
        if keys := [key for key in self.tasks if key not in self.results]:
            named = "; ".join(f"{key}: {self.errors[key]}" for key in keys[:3])
            more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise JobsFailed(
                f"{len(keys)} of {len(self.tasks)} jobs failed {self.retries + 1} times ({named}"
                f"{more}); the others are kept in {self.folder}, run it again to try these anew"
            )


@contextmanager
def _local(workers: Workers, tasks: Tasks) -> Iterator[Outcomes]:
    """In processes of joblib's on this machine, or in this one."""
    one = workers.backend == "sequential"
    jobs = 1 if one else workers.jobs or available()

    def outcomes(keys: Sequence[str]) -> Generator[_Outcome, None, None]:
        under_way: list[str] = []  # few at a time: what a dying worker can take along

        def calls() -> Iterator[Any]:
            for key in keys:
                under_way.append(key)
                yield delayed(_attempt)(key, *tasks[key])

        how: Any = {"return_as": "generator_unordered", "pre_dispatch": "n_jobs", "batch_size": 1}
        try:
            parallel: Any = Parallel(jobs, **how)
            with closing(parallel(calls())) as found:
                for outcome in found:
                    under_way.remove(outcome.key)
                    yield outcome
        except Exception as error:  # joblib gives up all of them where a worker dies
            if not under_way:
                raise
            for key in under_way:
                yield _Outcome(key, error=_sentence(error), in_company=len(under_way) > 1)

    with parallel_config(workers.backend, inner_max_num_threads=None if one else 1):
        yield outcomes


@contextmanager
def _dask(workers: Workers, tasks: Tasks) -> Iterator[Outcomes]:
    """On the workers of a running scheduler; when the client closes, what it asked for is dropped.

    A failed job is submitted again by us. distributed's own `retries` would do it unseen (nobody
    could report each failure), and leaves out the deaths of workers, which it repeats itself, as
    often as the scheduler's `allowed-failures` says, before it raises KilledWorker: that is a try.
    """
    client = _client(str(workers.address))
    import distributed  # an extra, which _client found

    where = f"dask scheduler at {workers.address}"

    def outcomes(keys: Sequence[str]) -> Generator[_Outcome, None, None]:
        waiting = iter(keys)
        names: dict[distributed.Future, str] = {}  # of what is under way
        ended = distributed.as_completed(loop=client.loop)

        def submit(count: int) -> None:
            for key in islice(waiting, count):
                future = client.submit(_attempt, key, *tasks[key], pure=False)
                names[future] = key
                ended.add(future)

        submit(workers.jobs or len(keys))  # without a limit the scheduler keeps the queue
        for future in ended:
            key = names.pop(future)
            try:
                outcome = future.result()  # the job's own error is a result, too
            except Exception as error:  # its worker died, or nobody is there any more
                if client.status != "running":
                    what = "what is done is kept, run it again to go on"
                    raise NoWorkers(f"lost the {where}; {what}") from error
                outcome = _Outcome(key, error=_sentence(error), in_company=len(keys) > 1)
            yield outcome
            submit(1)

    with client:
        try:
            client.wait_for_workers(1, timeout=6 * SECONDS)
        except TimeoutError as error:
            raise NoWorkers(
                f"the {where} has no workers: start some with `dask worker {workers.address}`"
            ) from error
        yield outcomes


def _client(address: str) -> Any:
    """Of the scheduler at this address. Raises NoWorkers where none answers."""
    try:
        import distributed
    except ImportError as error:
        raise NoWorkers(
            "the dask backend needs the package distributed, which cannot be imported: "
            "pip install 'minirlhf[dask]', or use the loky backend"
        ) from error
    # what these print is said here in a sentence
    for name in ("distributed", "distributed.client", "tornado", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        asyncio.run(_knock(address))  # a client that fails to connect closes noisily
        return distributed.Client(address, timeout=SECONDS, set_as_default=False)
    except Exception as error:  # whatever answers at that address may speak another language
        raise NoWorkers(
            f"cannot reach a dask scheduler at {address}: start one with `dask scheduler` and "
            f"workers with `dask worker {address}`, or use the loky backend"
        ) from error


async def _knock(address: str) -> None:
    """Raises where no scheduler answers."""
    from distributed.core import rpc

    async with rpc(address) as scheduler:
        await asyncio.wait_for(scheduler.identity(), SECONDS)
