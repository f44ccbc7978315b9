"""Jobs on every backend: the same results, nothing lost, one sentence for what goes wrong."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minirlhf import cores, store, workers
from minirlhf.workers import JobsFailed, NoWorkers, Workers, run_jobs

HERE = Path(__file__).resolve().parent


# The jobs. Workers import them by name.
def compute(seed, folder):
    """Leaves a mark, so that runs can be counted; the numbers are the seed's alone."""
    (Path(folder) / f"ran-{seed}-{time.time_ns()}").touch()
    x = torch.rand(64, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {"seed": seed, "sum": (x @ x).sum().item(), "threads": torch.get_num_threads()}


def first_time(folder, name):
    marker = Path(folder) / f"tried-{name}"
    seen = marker.exists()
    marker.touch()
    return not seen


def stumble(seed, folder):
    """Fails once."""
    if first_time(folder, seed):
        raise ValueError("not yet")
    return compute(seed, folder)


def fail(seed, folder):
    first_time(folder, f"{seed}-{time.time_ns()}")
    raise ArithmeticError("never works")


def die_once(seed, folder):
    if first_time(folder, seed):
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(seed, folder)


def die(seed, folder):
    first_time(folder, f"{seed}-{time.time_ns()}")
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def slow(seed, folder):
    time.sleep(0.15)
    return compute(seed, folder)


def odd(kind):
    return {"tuple": (1, 2), "nan": float("nan"), "set": {1}, "key": {1: torch.float64}}[kind]


def jobs(folder, n=6, function=compute, **others):
    """n jobs; `others` names the function of some of them."""
    other = {int(k[1:]): f for k, f in others.items()}
    return {f"s{i}": (other.get(i, function), (i, str(folder))) for i in range(n)}


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
    two |= {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    quiet = {"distributed.scheduler.allowed-failures": 0}
    with dask.config.set(quiet), LocalCluster(**two, silence_logs=logging.CRITICAL) as made:
        yield made.scheduler_address


def workers_of(backend, request, **settings):
    address = request.getfixturevalue("cluster") if backend == "dask" else None
    return Workers(backend, 2, address, **settings)


BACKENDS = pytest.mark.parametrize("backend", ["sequential", "loky", "dask"])
PROCESSES = pytest.mark.parametrize("backend", ["loky", "dask"])


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
    assert line.startswith("s2 failed (ValueError: not yet (test_workers.py:")
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


@PROCESSES
def test_a_killed_worker_costs_a_try(backend, room, truth, request):
    said, tasks = [], jobs(room / "marks", s2=die_once)
    workers = workers_of(backend, request, retries=1)
    assert run_jobs(tasks, room / "out", workers, lambda *x: said.append(x)) == truth[0]
    assert results(room / "out") == truth[1]
    assert any("s2 failed (" in text and "it is run again" in text for text, *_ in said)


@pytest.mark.parametrize(("backend", "retries"), [("loky", 0), ("loky", 1), ("dask", 0)])
def test_a_job_that_kills_its_worker_each_time_comes_to_an_end(
    backend, retries, room, truth, request
):
    tasks = jobs(room / "marks", s2=die)
    with pytest.raises(JobsFailed, match="1 of 6 jobs failed .*s2: ") as info:
        run_jobs(tasks, room / "out", workers_of(backend, request, retries=retries))
    assert "\n" not in str(info.value)
    assert results(room / "out") == {k: v for k, v in truth[1].items() if k != "s2.json"}
    assert len(marks(room / "marks", "tried")) <= retries + 2


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


RUN = """
import sys
sys.path.insert(0, {tests!r})
import test_workers as t
from pathlib import Path
if __name__ == "__main__":
    room = Path({room!r})
    t.run_jobs(t.jobs(room / "marks", 24, t.slow), room / "out", t.Workers("loky", 2), print)
"""


def start(room):
    script = room / "run.py"
    script.write_text(RUN.format(tests=str(HERE), room=str(room)), encoding="utf-8")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    return subprocess.Popen([sys.executable, script], start_new_session=True, **pipes)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


posix = pytest.mark.skipif(os.name == "nt", reason="signals to a process group")


@posix
def test_killed_five_times_and_resumed_gives_the_same_files(room, tmp_path):
    want = run_jobs(jobs(tmp_path, 24), tmp_path / "whole", Workers("sequential"))
    for kill in range(5):
        run = start(room)
        before = len(results(room / "out"))
        wait_for(lambda n=before: len(results(room / "out")) > n)
        time.sleep(0.05 * kill)
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        assert 0 < len(results(room / "out")) < 24, "killed in the middle"
        for content in results(room / "out").values():
            json.loads(content)
    done, so_far = len(results(room / "out")), len(marks(room / "marks"))
    assert run_jobs(jobs(room / "marks", 24), room / "out", Workers("sequential")) == want
    assert len(marks(room / "marks")) == so_far + 24 - done
    assert results(room / "out") == results(tmp_path / "whole")
    assert not list((room / "out").glob(".*")) or done < 24


@posix
def test_ctrl_c_stops_at_once_and_leaves_nobody_behind(room):
    run = start(room)
    wait_for(lambda: len(results(room / "out")) > 1)
    began = time.monotonic()
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does it
    _, said = run.communicate(timeout=15)
    assert time.monotonic() - began < 5 and run.returncode != 0 and "KeyboardInterrupt" in said
    time.sleep(0.5)
    ran = len(marks(room / "marks"))
    time.sleep(0.5)
    assert len(marks(room / "marks")) == ran, "a worker goes on"


def test_what_json_cannot_hold(tmp_path):
    good = {"a": (odd, ("tuple",)), "b": (odd, ("nan",))}
    out = run_jobs(good, tmp_path, Workers("sequential"))
    assert out == {"a": [1, 2], "b": None} == run_jobs(good, tmp_path, Workers("sequential"))
    for kind in ("set", "key"):
        with pytest.raises(JobsFailed, match="TypeError: Object of type"):
            run_jobs({kind: (odd, (kind,))}, tmp_path, Workers("sequential", retries=0))


@pytest.mark.parametrize("backend", ["sequential", "loky"])
def test_a_full_disk_is_one_sentence(backend, room, truth, monkeypatch, recwarn):
    replace, n = Path.replace, []

    def full(self, target):
        n.append(target)
        if len(n) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(self, target)

    tasks = jobs(room / "marks")
    with monkeypatch.context() as patch, pytest.raises(store.StoreError) as info:
        patch.setattr(Path, "replace", full)
        run_jobs(tasks, room / "out", Workers(backend, 2))
    assert "No space left" in str(info.value) and "\n" not in str(info.value)
    assert len(results(room / "out")) == 2 and not list((room / "out").glob(".*"))
    assert not [w for w in recwarn if "cancelled" in str(w.message)]
    assert run_jobs(tasks, room / "out", Workers(backend, 2)) == truth[0]


BAD = ["a/b", "a\\b", "a:b", "", ".", "..", "a b", "nul", "COM1", "lpt9.x", "x" * 151, "é", "a*"]


@pytest.mark.parametrize("key", [*BAD, "S1"])
def test_a_key_is_a_file_name_everywhere(key, room):
    tasks = jobs(room / "marks") | {key: (compute, (1, str(room)))}
    with pytest.raises(ValueError, match="file name|but for case"):
        run_jobs(tasks, room / "out", Workers("sequential"))
    assert not marks(room / "marks"), "nothing ran"


def test_keys_that_are_fine(tmp_path):
    keys = ["beta=0.02,clip=0.2,bias=-0.1", "console", "a+b@c_d-e.f", "x" * 150, "0"]
    assert sorted(run_jobs({k: (odd, ("nan",)) for k in keys}, tmp_path, Workers("sequential")))


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1:1", "nowhere://x", "tcp://"])
def test_an_unreachable_scheduler_is_one_sentence(address, room):
    began = time.monotonic()
    with pytest.raises(NoWorkers, match="cannot reach a dask scheduler at .*loky") as info:
        run_jobs(jobs(room), room / "out", Workers("dask", address=address))
    assert time.monotonic() - began < 8 and address in str(info.value)
    assert "\n" not in str(info.value)


def test_a_scheduler_without_workers_is_one_sentence(room, monkeypatch):
    from distributed import LocalCluster

    monkeypatch.setattr(workers, "SECONDS", 1)
    none = LocalCluster(n_workers=0, dashboard_address=None, silence_logs=logging.CRITICAL)
    with none, pytest.raises(NoWorkers, match="has no workers: start some with `dask worker tcp"):
        run_jobs(jobs(room), room / "out", Workers("dask", address=none.scheduler_address))


@pytest.mark.parametrize(("backend", "package"), [("dask", "distributed"), ("ray", "ray")])
def test_a_missing_package_is_one_sentence(backend, package, room, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NoWorkers, match=rf"package {package}.*pip install 'minirlhf\[{backend}\]'"):
        run_jobs(jobs(room), room / "out", Workers(backend, address="tcp://127.0.0.1:1"))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"backend": "dask"}, "address of a running scheduler"),
        ({"backend": "threads"}, "unknown backend 'threads'"),
        ({"jobs": -1}, "jobs = -1"),
        ({"retries": -1}, "retries = -1"),
    ],
)
def test_settings_that_cannot_be(settings, word):
    with pytest.raises(ValueError, match=word):
        Workers(**settings)


def test_by_default_one_process_a_core(monkeypatch, room):
    asked = []
    monkeypatch.setattr(workers, "Parallel", lambda n, **rest: asked.append(n) or list)
    monkeypatch.setattr(cores, "available", lambda: 3)
    with workers._local(Workers()) as pool:
        list(pool.outcomes(iter(())))
    assert asked == [3]
