"""A panel's job ends where it is told to, leaves the panel usable, and never wakes up again."""

import threading
import time

import pytest

from minirlhf.lab.background import ButtonJob, Cancelled, Job, JobPanel, Stop
from minirlhf.lab.picture import LiveFigure, slider
from minirlhf.lab.plots import blank

SOON = 60  # seconds that a thread may take on a busy machine


def until_stopped(seen):
    """Work that notes every look at its Stop."""

    def work(stop):
        while True:
            stop.check()
            seen.append(threading.current_thread())
            time.sleep(0.001)

    return work


def wait(true):
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_stop_raises_once_it_is_set():
    stop = Stop()
    stop.check()
    stop.set()
    with pytest.raises(Cancelled):
        stop.check()


def test_an_idle_job_may_be_cancelled_and_waited_for():
    job = Job()
    job.cancel()
    job.join()
    job.halt()
    assert not job.busy


def test_work_runs_on_a_daemon_thread_and_ends_where_it_is_told_to():
    job, seen = Job(), []
    job.start(until_stopped(seen))
    wait(lambda: seen)
    assert job.busy and seen[0] is job.thread is not threading.current_thread()
    assert job.thread.daemon
    job.cancel()
    assert not job.busy
    job.join(SOON)
    assert not job.thread.is_alive()


def test_the_next_job_does_not_wake_the_one_before():
    job, first, second = Job(), [], []
    job.start(until_stopped(first))
    wait(lambda: first)
    old = job.thread
    job.start(until_stopped(second))
    old.join(10)
    assert not old.is_alive() and job.busy
    job.halt()
    assert first[-1] is old and old not in second


def test_the_button_starts_and_cancels_and_the_bar_begins_anew():
    seen = []
    job = ButtonJob(lambda: job.start(until_stopped(seen)), ("go", "leave it"), 5)
    job.progress.value = 3
    job.button.click()
    wait(lambda: seen)
    assert (job.button.description, job.progress.value, job.progress.max) == ("leave it", 0, 5)
    job.button.click()
    assert job.button.description == "go" and not job.busy
    job.join(SOON)
    job.start(lambda stop: None)
    job.join(SOON)
    assert job.button.description == "go", "work that ended by itself"


def test_a_cancelled_job_that_ends_late_leaves_the_next_ones_button_alone():
    held, seen = threading.Event(), []
    job = ButtonJob(lambda: None, ("go", "leave it"), 5)
    job.start(lambda stop: held.wait(SOON))
    old = job.thread
    job.start(until_stopped(seen))
    held.set()
    old.join(SOON)
    assert job.button.description == "leave it"
    job.halt()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_work_that_fails_gives_the_button_back():
    job = ButtonJob(lambda: None, ("go", "leave it"), 5)
    job.start(lambda stop: 1 / 0)
    job.join(SOON)
    assert job.button.description == "go" and not job.busy


class Small(JobPanel):
    """A slider, an empty picture and a job."""

    def __init__(self):
        self.job = Job()
        live = LiveFigure(blank(1, 1), [], width=100)
        super().__init__("small", {"at": slider("at", 0, 0, 1, 1)}, live, lambda at: f"at {at}")


def test_closing_a_panel_stops_its_job():
    panel, seen = Small(), []
    panel.job.start(until_stopped(seen))
    assert panel.busy
    again = Small()  # the cell run again
    assert not panel.busy
    panel.wait()
    assert not panel.job.thread.is_alive()
    again.close()
