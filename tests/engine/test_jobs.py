"""Jobs on every backend: the same results, nothing lost, one sentence for what goes wrong."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from worker_jobs import (
    compute,
    die,
    die_once,
    fail,
    jobs,
    no_room,
    odd,
    run_in_a_session,
    slow,
    stumble,
)

from minirlhf.engine import files
from minirlhf.engine import jobs as jobs_module
from minirlhf.engine.jobs import JobsFailed, NoWorkers, Workers, run_jobs


def marks(folder, kind="ran"):
    return sorted(path.name for path in Path(folder).glob(f"{kind}-*"))


def results(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("*.json")}


@pytest.fixture
def room(tmp_path):
    """A folder for marks beside that of results."""
    (tmp_path / "marks").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """What the jobs give in this process, one after the other: results and bytes of the files."""
    folder = tmp_path_factory.mktemp("truth")
    out = run_jobs(jobs(folder), folder / "out", Workers("sequential"))
    return out, results(folder / "out")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A real dask cluster of two worker processes; a job is given up when one worker dies of it."""
    import dask
    from distributed import LocalCluster

    two: dict = {"local_directory": str(tmp_path_factory.mktemp("dask"))}
    two |= {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    quiet = {"distributed.scheduler.allowed-failures": 0}
    with dask.config.set(quiet), LocalCluster(**two, silence_logs=logging.CRITICAL) as made:
        yield made.scheduler_address


def workers_of(backend, request, **settings):
    address = request.getfixturevalue("cluster") if backend == "dask" else None
    return Workers(backend, 2, address, **settings)


BACKENDS = pytest.mark.parametrize("backend", ["sequential", "loky", "dask"])


@BACKENDS
def test_same_results_on_every_backend(backend, room, truth, request):
    said = []
    out = run_jobs(
        jobs(room / "marks"), room / "out", workers_of(backend, request), lambda *x: said.append(x)
    )
    assert (out, results(room / "out")) == truth
    assert list(out) == sorted(out) and len(marks(room / "marks")) == 6
    assert all(row["threads"] == 1 for row in out.values())
    assert sorted(key for key, *_ in said) == sorted(out)
    assert [done for _, done, _ in said] == [1, 2, 3, 4, 5, 6] and {x[2] for x in said} == {6}


@BACKENDS
def test_order_of_the_tasks_does_not_matter(backend, room, truth, request):
    turned = dict(reversed(jobs(room / "marks").items()))
    assert run_jobs(turned, room / "out", workers_of(backend, request)) == truth[0]


@BACKENDS
def test_a_failed_job_is_reported_and_tried_again(backend, room, truth, request):
    said, tasks = [], jobs(room / "marks", s2=stumble)
    workers = workers_of(backend, request)
    assert run_jobs(tasks, room / "out", workers, lambda *x: said.append(x)) == truth[0]
    assert len(marks(room / "marks")) == 6, "the others ran once"
    (line,) = [text for text, *_ in said if " " in text]
    assert line.startswith("s2 failed (ValueError: not yet (worker_jobs.py:")
    assert line.endswith("); it is run again")


@BACKENDS
def test_a_job_that_always_fails_loses_only_itself(backend, room, truth, request):
    tasks = jobs(room / "marks", s2=fail)
    with pytest.raises(JobsFailed, match=r"1 of 6 jobs failed 2 times \(s2: Arithm.*never") as info:
        run_jobs(tasks, room / "out", workers_of(backend, request, retries=1))
    assert "\n" not in str(info.value)
    assert len(marks(room / "marks", "tried")) == 2
    assert results(room / "out") == {k: v for k, v in truth[1].items() if k != "s2.json"}
    assert run_jobs(jobs(room / "marks"), room / "out", Workers("sequential")) == truth[0]
    assert len(marks(room / "marks")) == 6, "only the lost one ran, now that it works"


@pytest.mark.parametrize("retries", [0, 1, 2])
@pytest.mark.parametrize("killers", [{2}, {0, 1}, {3, 5}, {0, 1, 2, 3, 4, 5}])
def test_nobody_fails_for_a_neighbour(retries, killers, room, monkeypatch):
    """A pool that breaks as long as a killer is among the three jobs under way."""
    lone = []

    def outcomes(calls):
        under_way = list(islice(calls, 3))
        while under_way:
            keys = [args[0] for _, args, _ in under_way]
            if guilty := [key for key in keys if int(key[1:]) in killers]:
                lone.extend(guilty if len(keys) == 1 else [])
                raise RuntimeError("a worker died")
            function, args, _ = under_way.pop(0)
            yield function(*args)
            under_way += islice(calls, 1)

    monkeypatch.setattr(jobs_module, "Parallel", lambda *_, **__: outcomes)
    with pytest.raises(JobsFailed) as info:
        run_jobs(jobs(room / "marks"), room / "out", Workers(retries=retries))
    assert str(info.value).startswith(f"{len(killers)} of 6 jobs failed {retries + 1} times")
    assert len(results(room / "out")) == 6 - len(killers) == len(marks(room / "marks"))
    assert sorted(set(lone)) == [f"s{i}" for i in sorted(killers)], "each found guilty alone"
    assert max(map(lone.count, lone)) <= retries + 1


@BACKENDS
def test_what_is_done_is_not_run_again(backend, room, truth, request):
    workers, said = workers_of(backend, request), []
    run_jobs(jobs(room / "marks", 4), room / "out", workers)
    assert len(marks(room / "marks")) == 4
    out = run_jobs(jobs(room / "marks"), room / "out", workers, lambda *x: said.append(x))
    assert out == truth[0] and len(marks(room / "marks")) == 6
    assert [done for _, done, _ in said] == [5, 6]
    assert run_jobs(jobs(room / "marks"), room / "out", workers) == out
    assert len(marks(room / "marks")) == 6


@pytest.mark.parametrize("rest", [b"", b'{"seed": 2, "su', b"\xff\xfe"])
def test_a_broken_result_file_is_made_anew(rest, room, truth):
    said, report = [], lambda *x: said.append(x[0])
    run_jobs(jobs(room / "marks"), room / "out", Workers("sequential"))
    (room / "out" / "s2.json").write_bytes(rest)
    out = run_jobs(jobs(room / "marks"), room / "out", Workers("sequential"), report)
    assert (out, results(room / "out")) == truth and len(marks(room / "marks")) == 7
    assert said[0].startswith("s2 is run again: cannot read") and said[1:] == ["s2"]


@contextmanager
def started(room, backend, address=None):
    """The 24 jobs in a process of their own, in the middle of them; it ends with the block."""
    context = multiprocessing.get_context("forkserver")  # imports torch once for all of them
    context.set_forkserver_preload(["minirlhf.engine.jobs"])
    run = context.Process(target=run_in_a_session, args=(room, backend, address))
    run.start()
    before, end = len(results(room / "out")), time.monotonic() + 60
    while len(results(room / "out")) == before:
        assert run.is_alive() and time.monotonic() < end, "it never came to a result"
        time.sleep(0.01)
    try:
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.join()


posix = pytest.mark.skipif(os.name == "nt", reason="signals to a process group")


@posix
def test_killed_five_times_and_resumed_gives_the_same_files(room, tmp_path):
    want = run_jobs(jobs(tmp_path, 24), tmp_path / "whole", Workers("sequential"))
    for wait in np.random.default_rng(0).uniform(0, 0.2, 4):
        with started(room, "sequential"):
            time.sleep(wait)
    with started(room, "loky"):
        pass
    done = len(results(room / "out"))
    assert 5 <= done < 24, "killed in the middle"
    for content in results(room / "out").values():
        json.loads(content)
    before = len(marks(room / "marks"))
    assert run_jobs(jobs(room / "marks", 24), room / "out", Workers("sequential")) == want
    assert len(marks(room / "marks")) == before + 24 - done
    assert results(room / "out") == results(tmp_path / "whole")


@posix
def test_ctrl_c_stops_at_once_and_leaves_nobody_behind(room):
    with started(room, "loky") as run:
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does it
        run.join(timeout=20)
        assert run.exitcode == 1, "an interrupt like any other"
        ran = len(marks(room / "marks"))
        assert ran < 20
        time.sleep(0.3)
        assert len(marks(room / "marks")) == ran, "a worker goes on"


def test_what_json_cannot_hold(tmp_path):
    good = {"a": (odd, ("tuple",)), "b": (odd, ("nan",))}
    out = run_jobs(good, tmp_path, Workers("sequential"))
    assert out == {"a": [1, 2], "b": None} == run_jobs(good, tmp_path, Workers("sequential"))
    for kind in ("set", "key"):
        with pytest.raises(JobsFailed, match="TypeError: Object of type"):
            run_jobs({kind: (odd, (kind,))}, tmp_path, Workers("sequential", retries=0))


BAD = ["a/b", "a\\b", "a:b", "", ".", "..", "a b", "nul", "COM1", "lpt9.x", "x" * 151, "é", "a*"]


@pytest.mark.parametrize("key", [*BAD, "S1"])
def test_a_key_is_a_file_name_everywhere(key, room):
    tasks = jobs(room / "marks") | {key: (compute, (1, str(room)))}
    with pytest.raises(ValueError, match=r"file name|but for case"):
        run_jobs(tasks, room / "out", Workers("sequential"))
    assert not marks(room / "marks"), "nothing ran"


def test_keys_that_are_fine(tmp_path):
    keys = ["beta=0.02,clip=0.2,bias=-0.1", "console", "a+b@c_d-e.f", "x" * 150, "0"]
    assert sorted(run_jobs(dict.fromkeys(keys, (odd, ("nan",))), tmp_path, Workers("sequential")))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1:1", "nowhere://x", "tcp://"])
def test_an_unreachable_scheduler_is_one_sentence(address, room, monkeypatch):
    assert jobs_module.SECONDS <= 5
    monkeypatch.setattr(jobs_module, "SECONDS", 1)
    began = time.monotonic()
    with pytest.raises(NoWorkers, match=r"cannot reach a dask scheduler at .*loky") as info:
        run_jobs(jobs(room), room / "out", Workers("dask", address=address))
    assert time.monotonic() - began < 10 and address in str(info.value)
    assert "\n" not in str(info.value)


def test_a_scheduler_without_workers_is_one_sentence(room, monkeypatch):
    from distributed import LocalCluster

    monkeypatch.setattr(jobs_module, "SECONDS", 0.25)
    none = LocalCluster(n_workers=0, dashboard_address=":0", silence_logs=logging.CRITICAL)
    with none, pytest.raises(NoWorkers, match="has no workers: start some with `dask worker tcp"):
        run_jobs(jobs(room), room / "out", Workers("dask", address=none.scheduler_address))


def test_a_missing_package_is_one_sentence(room, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(NoWorkers, match=r"package distributed.*pip install 'minirlhf\[dask\]'"):
        run_jobs(jobs(room), room / "out", Workers("dask", address="tcp://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"backend": "dask"}, "address of a running scheduler"),
        ({"backend": "threads"}, "unknown backend 'threads'"),
        ({"backend": "ray"}, "unknown backend 'ray'; use one of sequential, loky, dask"),
        ({"jobs": -1}, "jobs = -1"),
        ({"retries": -1}, "retries = -1"),
    ],
)
def test_settings_that_cannot_be(settings, word):
    with pytest.raises(ValueError, match=word):
        Workers(**settings)


def test_by_default_one_process_a_core(monkeypatch, room):
    asked = []

    def parallel(n, **rest):
        asked.append(n)
        return lambda calls: (call for call in calls)

    monkeypatch.setattr(jobs_module, "Parallel", parallel)
    monkeypatch.setattr(jobs_module, "available", lambda: 3)
    with jobs_module._local(Workers(), {}) as outcomes:
        list(outcomes([]))
    assert asked == [3]


@pytest.mark.parametrize("limit", [1, 2])
def test_no_more_are_under_way_than_asked_for(limit, room, cluster, truth):
    """Of 24 jobs on two workers: marks that they leave at both ends show how many overlap."""
    workers = Workers("dask", limit, cluster)
    out = run_jobs(jobs(room / "marks", 24, slow), room / "out", workers)
    assert len(out) == 24 and truth[0].items() <= out.items()
    ended = [int(name.split("-")[-1]) for name in marks(room / "marks")]
    begun = [int(name.split("-")[-1]) for name in marks(room / "marks", "begun")]
    moments = sorted([(at, 1) for at in begun] + [(at, -1) for at in ended])
    assert len(begun) == len(ended) == 24
    assert np.cumsum([change for _, change in moments]).max() == limit


@posix
def test_ctrl_c_cancels_what_the_cluster_has_not_begun(room, cluster, truth):
    with started(room, "dask", cluster) as run:
        os.killpg(run.pid, signal.SIGINT)
        run.join(timeout=20)
        assert run.exitcode == 1, "an interrupt like any other"
        time.sleep(0.3)  # a job that a worker has begun goes on to its end
        ran = len(marks(room / "marks"))
        assert ran < 20
        time.sleep(0.5)
        assert len(marks(room / "marks")) == ran, "a worker takes further jobs"
    again = run_jobs(jobs(room / "marks"), room / "again", Workers("dask", 2, cluster))
    assert again == truth[0], "the cluster is there for the next call"


@pytest.fixture
def scheduler(tmp_path):
    """A scheduler and a worker, each a process of its own: (address, the scheduler)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def process(kind, *words):
        return subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{kind}", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # for worker_jobs
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    host, port = address.split(":")
    made = process("dask_scheduler", "--host", host, "--port", port, "--no-dashboard")
    options = ["--nthreads", "1", "--no-nanny", "--no-dashboard"]
    worker = process("dask_worker", f"tcp://{address}", *options)
    yield f"tcp://{address}", made
    for each in (worker, made):
        each.kill()
        each.wait()


def test_a_scheduler_that_goes_away_is_one_sentence(room, scheduler):
    address, made = scheduler
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with suppress(OSError), socket.create_connection(address[6:].split(":"), timeout=1):
            break
        time.sleep(0.1)
    killed = []

    def kill(*_):
        if not killed:
            killed.append(time.monotonic())
            made.kill()

    with pytest.raises(NoWorkers, match=rf"lost the dask scheduler at {address}; .* kept") as info:
        run_jobs(jobs(room, 24, slow), room / "out", Workers("dask", address=address), kill)
    assert time.monotonic() - killed[0] < jobs_module.SECONDS and "\n" not in str(info.value)
    kept = len(results(room / "out"))
    assert 1 <= kept < 24
    before = len(marks(room))
    assert len(run_jobs(jobs(room, 24, slow), room / "out", Workers("loky", 2))) == 24
    assert len(marks(room)) - before == 24 - kept


# Last, for these leave no workers behind: new ones take seconds.
@pytest.mark.parametrize("backend", ["sequential", "dask", "loky"])
def test_a_full_disk_is_one_sentence(backend, room, truth, monkeypatch, recwarn, request):
    replace, n = Path.replace, []

    def full(self, target):
        n.append(target)
        if len(n) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    tasks = jobs(room / "marks")
    with monkeypatch.context() as patch, pytest.raises(files.StoreError) as info:
        patch.setattr(Path, "replace", full)
        run_jobs(tasks, room / "out", workers_of(backend, request))
    assert "No space left" in str(info.value) and "\n" not in str(info.value)
    assert len(results(room / "out")) == 2 and not list((room / "out").glob(".*"))
    assert not [w for w in recwarn if "cancelled" in str(w.message)]
    assert run_jobs(tasks, room / "out", Workers("sequential")) == truth[0]


def test_a_disk_that_is_full_for_a_job_ends_the_call_in_one_sentence(room):
    said, tasks = [], jobs(room / "marks", 2, s1=no_room)
    with pytest.raises(files.DiskFull, match=r"^cannot write x: No space left") as info:
        run_jobs(tasks, room / "out", Workers("sequential"), lambda *x: said.append(x))
    assert "\n" not in str(info.value) and [text for text, *_ in said] == ["s0"]
    assert (room / "out" / "s0.json").exists()


@pytest.mark.parametrize("backend", ["loky", "dask"])
def test_killed_workers_cost_tries_and_only_the_killer_fails(backend, room, truth, request):
    said, tasks = [], jobs(room / "marks", s4=die_once, s5=die)
    workers = workers_of(backend, request, retries=1)
    with pytest.raises(JobsFailed, match=r"1 of 6 jobs failed 2 times .s5: [TK].*Worker") as info:
        run_jobs(tasks, room / "out", workers, lambda *x: said.append(x))
    assert "\n" not in str(info.value)
    assert results(room / "out") == {k: v for k, v in truth[1].items() if k != "s5.json"}
    assert any(text.startswith("s4 failed (") and "run again" in text for text, *_ in said)
    assert len(marks(room / "marks", "tried-5")) <= 3, "tries: its own two, one in company"
