"""A run of which only what score rules ask for exists."""

from dataclasses import replace
from typing import Any

import numpy as np
from fakes_audit import DESK, model
from tiny_drift import TINY

from minirlhf.audit.auditor import answer
from minirlhf.drift.run import Drift
from minirlhf.remedies.scores import DRAWS


def bare_run(count: int = 12, cap: int = 12) -> Any:
    """A run of which only what score rules ask for exists: a table and an untrained reference."""
    run: Any = Drift(replace(TINY, ppo=replace(TINY.ppo, max_new_tokens=cap)), desk=DESK)
    run.reference, run.prompts = model(), DESK.prompts(count, np.random.default_rng(4))
    return run


RUN = bare_run()


def draws(prompts, run=RUN):
    """What Usual has drawn for the table: one answer to each prompt, DRAWS times."""
    seeds = [run.stream(f"usual {draw}") for draw in range(DRAWS)]
    return [answer(DESK, run.reference, prompts, seed) for seed in seeds]
