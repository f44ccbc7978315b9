"""Work behind a panel: a job on a thread of its own that can be told to stop.

Cells can be run and dials turned while it works. No thread is killed: the work hears of a stop
where it looks, between two steps, so that it leaves nothing half done. Left out: what the work is,
and what a panel says when it fails.
"""

import contextlib
import threading
from collections.abc import Callable

import ipywidgets as widgets

from minirlhf.lab.picture import Panel


class Cancelled(Exception):
    """Raised by `Stop.check` in a job that was told to stop."""


class Stop(threading.Event):
    """What a job looks at between its steps: set once it is to stop."""

    def check(self) -> None:
        """Raises Cancelled once it is set: the way out of work that only reports its progress."""
        if self.is_set():
            raise Cancelled


class Job:
    """At most one piece of work that counts, on its thread; may be started again and again."""

    def __init__(self) -> None:
        self.thread = threading.Thread()
        self._stop = Stop()

    @property
    def busy(self) -> bool:
        """Under way, and not told to stop."""
        return self.thread.is_alive() and not self._stop.is_set()

    def start(self, work: Callable[[Stop], None]) -> None:
        """Run work(stop) on a new thread. One under way is told to stop, and not waited for."""
        self._stop.set()
        # each has a Stop of its own: what was told to stop must not go on because this one begins
        self._stop = Stop()
        # a daemon: the kernel can end while it runs
        self.thread = threading.Thread(target=self._run, args=(work, self._stop), daemon=True)
        self.thread.start()

    def cancel(self) -> None:
        """Tell the work to stop; returns at once."""
        self._stop.set()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the work has ended, for `timeout` seconds at most."""
        if self.thread.ident is not None:  # it was started
            self.thread.join(timeout)

    def halt(self) -> None:
        """Tell the work to stop and wait until it has."""
        self.cancel()
        self.join()

    def _run(self, work: Callable[[Stop], None], stop: Stop) -> None:
        with contextlib.suppress(Cancelled):  # it ended as it was told to
            work(stop)


class ButtonJob(Job):
    """A job with a progress bar and one button, which starts it and then cancels it.

    A click calls `begin`, which calls `start` with the work; `names` are what the button says
    while nothing is under way, and while something is. The bar ends at `steps`.
    """

    def __init__(self, begin: Callable[[], None], names: tuple[str, str], steps: int) -> None:
        super().__init__()
        self._idle, self._running = names
        self.button = widgets.Button(description=self._idle)
        self.button.on_click(lambda _: self.cancel() if self.busy else begin())
        self.progress = widgets.IntProgress(0, 0, steps)

    def start(self, work: Callable[[Stop], None]) -> None:
        """As Job.start, with the bar back at 0."""
        self.progress.value = 0
        self.button.description = self._running
        super().start(work)

    def cancel(self) -> None:
        """As Job.cancel; the button starts the next one."""
        super().cancel()
        self.button.description = self._idle

    def _run(self, work: Callable[[Stop], None], stop: Stop) -> None:
        try:
            super()._run(work, stop)
        finally:
            if not stop.is_set():  # else the button may be another job's by now
                self.button.description = self._idle


class JobPanel(Panel):
    """A panel with a job, which sets `job` before it calls Panel.__init__."""

    job: Job

    @property
    def busy(self) -> bool:
        """The job is under way."""
        return self.job.busy

    def cancel(self) -> None:
        """Tell the job to stop; returns at once."""
        self.job.cancel()

    def wait(self) -> None:
        """Until the job has ended."""
        self.job.join()

    def close(self) -> None:
        """As Panel.close; a job under way is stopped."""
        if hasattr(self, "job"):  # a panel that refused what it was given has none
            self.job.cancel()
        super().close()
