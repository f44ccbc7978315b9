"""The example of CONTRIBUTING.md does what it says."""

import re
from dataclasses import replace
from pathlib import Path

import torch
from tiny_drift import TINY

from minirlhf.drift.recipe import Recipe, changed
from minirlhf.drift.run import Drift
from minirlhf.remedies import arms

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_adding_a_remedy_is_one_function_and_one_row(monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    for table in ("REMEDIES", "ARMS"):
        monkeypatch.setattr(arms, table, dict(getattr(arms, table)))
    exec(compile(code, "CONTRIBUTING.md", "exec"), vars(arms).copy())
    base = replace(TINY, ppo=replace(TINY.ppo, kl_target=None))
    recipe = arms.stack("half+larger_beta", base)
    assert changed(Recipe(base), arms.stack("half", base)) == {"scores"}
    assert recipe.config.ppo.beta == 4 * base.ppo.beta and recipe.names == ("half", "larger_beta")
    run = Drift(recipe.config, recipe=recipe)
    run.prepare()
    answers = run.auditor.sample(run.reference)[:2]
    given = (run.auditor.prompts, *answers)
    assert torch.equal(run.ppo.reward_model(*given), 0.5 * run.reward_model.score(*given))
