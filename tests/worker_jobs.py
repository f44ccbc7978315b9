"""Jobs for engine/test_jobs.py: workers import them by name, and sooner without pytest."""

import os
import signal
import time
from pathlib import Path

import torch

from minirlhf.engine.files import DiskFull
from minirlhf.engine.jobs import Workers, run_jobs


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
    raise ArithmeticError("never\nworks")


def die_once(seed, folder):
    if first_time(folder, seed):
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(seed, folder)


def die(seed, folder):
    first_time(folder, f"{seed}-{time.time_ns()}")
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


def no_room(seed, folder):
    raise DiskFull("cannot write x: No space left on device; free some space")


def slow(seed, folder):
    """Leaves a mark where it begins, too."""
    (Path(folder) / f"begun-{seed}-{time.time_ns()}").touch()
    time.sleep(0.1)
    return compute(seed, folder)


def odd(kind):
    return {"tuple": (1, 2), "nan": float("nan"), "set": {1}, "key": {1: torch.float64}}[kind]


def jobs(folder, n=6, function=compute, **others):
    """n jobs; `others` names the function of some of them."""
    other = {int(k[1:]): f for k, f in others.items()}
    return {f"s{i}": (other.get(i, function), (i, str(folder))) for i in range(n)}


def run_in_a_session(room, backend, address=None):
    """24 slow jobs, in a group of processes that one signal can reach."""
    os.setsid()
    # a background job of a shell ignores Ctrl-C, and so would everything that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_jobs(jobs(room / "marks", 24, slow), room / "out", Workers(backend, 2, address))
