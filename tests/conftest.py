"""Shared set-up: one thread (repeatable to the last bit, fastest at this size), few examples."""

import pytest
import torch
from hypothesis import HealthCheck, settings

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
def _no_global_rng():
    """The global RNG is never touched: every draw comes from a generator that was handed in."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state()), "something drew from torch's global RNG"
