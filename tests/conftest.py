"""Shared set-up: one thread (repeatable to the last bit, fastest at this size), few examples."""

import pytest
import shapes
import torch
from hypothesis import HealthCheck, settings
from ladder import COMMAND, Ladder

end_of_checks = shapes.install()  # before anything of minirlhf is imported
torch.set_num_threads(1)
settings.register_profile(
    "course",
    max_examples=25,
    deadline=None,
    derandomize=True,  # the same examples on every run: a red test stays red
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("course")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _checked_afresh():
    """A test's first calls of every function of the core are checked, whatever ran before."""
    shapes.afresh()


@pytest.fixture
def unchecked():
    """For a test of what the product itself says about a wrong shape or type."""
    with shapes.unchecked():
        yield


@pytest.fixture(autouse=True)
def _no_global_rng():
    """The global RNG is never touched: every draw comes from a generator that was handed in."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "something drew from torch's global RNG"


@pytest.hookimpl(optionalhook=True)  # xdist may be left out
def pytest_xdist_make_scheduler(config, log):
    """A file stays on one worker, as a notebook's cells must; the planted bugs are spread out."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            alone = "test_every_bug_is_caught[" in nodeid
            return nodeid if alone else super()._split_scope(nodeid)

    return ByFile(config, log)


LADDER = pytest.StashKey[Ladder]()
LEFT_OUT, RAN, FAILED = [], [], []  # names of slow tests


@pytest.fixture(scope="session")
def ladder(pytestconfig) -> Ladder:
    """Where a slow test records its claims; `make slow` turns them into docs/ladder.md."""
    return pytestconfig.stash[LADDER]


def pytest_configure(config):
    config.stash[LADDER] = Ladder()


def pytest_unconfigure():
    end_of_checks()


def pytest_deselected(items):
    LEFT_OUT.extend(item.name for item in items if item.get_closest_marker("slow"))


def pytest_runtest_logreport(report):
    if "slow" in report.keywords:
        if report.when == "call":
            RAN.append(report.location[2])
        if report.failed:
            FAILED.append(report.location[2])


def pytest_sessionfinish(session):
    """Write the table, but only after a run in which every slow test came to an end."""
    config = session.config
    table, root = config.stash[LADDER], config.rootpath
    if not table.rows:
        return
    whole = [root / arg for arg in config.args] == [root / "tests"] and not LEFT_OUT
    why = "" if whole else "only a part of the slow tests was asked for"
    if whole and len(RAN) < session.testscollected:
        why = f"only {len(RAN)} of {session.testscollected} slow tests came to an end"
    target = root / "docs" / "ladder.md"
    if not why:
        target.write_text(table.markdown(FAILED), encoding="utf-8")
    what = f"not written: {why}; use `{COMMAND}`" if why else "written"
    print(f"\n{target.relative_to(root)} {what}")
