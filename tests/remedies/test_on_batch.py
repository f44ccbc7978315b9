"""Before and after on one logged batch, whose answers are written so that both kinds are there."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_drift import TINY

from minirlhf.autopsy.convention import Convention
from minirlhf.autopsy.parts import split
from minirlhf.autopsy.pushes import push
from minirlhf.drift.batches import kinds
from minirlhf.drift.recipe import Recipe
from minirlhf.drift.run import Drift
from minirlhf.engine.jobs import Workers
from minirlhf.model import response_logprobs
from minirlhf.remedies.arms import stack
from minirlhf.remedies.on_batch import Logged, at_batch
from minirlhf.sweeps.remedy_runs import run_remedies
from minirlhf.text import right_pad

BASE = replace(
    TINY, ppo=replace(TINY.ppo, batch=16, max_new_tokens=48, kl_target=None, missing_eos="none")
)


def prepared(recipe: Recipe) -> Drift:
    run = Drift(recipe.config, recipe=recipe)
    run.prepare()
    return run


def logged_by(run: Drift) -> Logged:
    """A batch of written answers, half of them padded, as a policy that has moved would log it."""
    rng, desk, ppo = np.random.default_rng(0), run.desk, run.ppo
    rows = [i for i, p in enumerate(run.prompts) if p.stratum == "brief"][:16]
    plain = [desk.concise(run.prompts[i], rng) for i in rows]
    said = [
        desk.padded(t, rng) + " have a great day ." if n % 2 else t for n, t in enumerate(plain)
    ]
    ids = [[*desk.vocabulary.encode(t), desk.vocabulary.eos] for t in said]
    responses, mask = right_pad(ids, 48)
    index = torch.tensor(rows)
    with torch.no_grad():
        for p in ppo.policy.parameters():  # a policy that has moved: its KL is not zero
            p.add_(0.05 * torch.randn(p.shape, generator=run.generator("moved")))
        given = (ppo.prompts[index], responses, mask)
        logprobs, values = response_logprobs(ppo.policy, *given)
        rollout = ppo._score(given[0], (responses, mask, logprobs, values), index)
    convention = Convention.of(run.config.ppo, beta=ppo.beta)
    return Logged(rollout, ppo.state_dict(), convention, (0.5, 3.0))


def at(run: Drift, logged: Logged) -> dict:
    stop = run.rules.stop
    return at_batch(logged, ppo=run.ppo, auditor=run.auditor, prompts=run.prompts, stop=stop)


@pytest.fixture(scope="module")
def default() -> Drift:
    return prepared(Recipe(BASE))


@pytest.fixture(scope="module")
def logged(default) -> Logged:
    return logged_by(default)


def test_a_recipe_that_changes_nothing_finds_the_logged_advantages_and_pushes(default, logged):
    found = at(default, logged)
    parts = split(logged.rollout, logged.convention)
    assert torch.allclose(parts.total.float(), logged.rollout.advantages, atol=1e-5)
    asked = [default.prompts[i] for i in logged.rollout.index.tolist()]
    verbose, concise = kinds(default.desk, logged.rollout, asked)
    targets = {"verbose": verbose, "concise": concise}
    direct = push(default.ppo, logged.rollout, parts, targets, optimiser="adam")
    assert found["n_verbose"] == 8 and found["n_concise"] == 8
    for name, each in direct.items():
        assert found[f"push_{name}"] == pytest.approx(each.total - each.memory, rel=1e-3, abs=1e-7)
        assert abs(found[f"push_{name}"]) > 1e-4  # away from zero, or nothing is tested
    rewards = logged.rollout.rewards.sum(1)
    gap = rewards[verbose].mean() - rewards[concise].mean()
    assert found["gap_effective"] == pytest.approx(float(gap), rel=1e-5)
    assert found["gap_effective"] == pytest.approx(found["gap_score"] - found["gap_cost"], abs=1e-5)


def test_beta_scales_the_cost_gap_and_leaves_the_score_gap(default, logged):
    one = at(default, logged)
    four = at(prepared(stack("larger_beta", BASE)), logged)
    assert four["gap_cost"] == pytest.approx(4 * one["gap_cost"], rel=1e-4) and one["gap_cost"]
    assert four["gap_score"] == pytest.approx(one["gap_score"], rel=1e-6)


def test_a_price_for_every_prompt_is_a_larger_beta(default, logged):
    everywhere = Recipe(BASE).rule(prices=lambda run: torch.full((len(run.prompts),), 4.0))
    dear, four = (at(prepared(r), logged) for r in (everywhere, stack("larger_beta", BASE)))
    for name in ("gap_cost", "gap_effective", "fork_verbose", "push_verbose", "push_concise"):
        assert dear[name] == pytest.approx(four[name], rel=1e-3, abs=1e-6), name


def test_scores_turned_round_turn_the_gap_round(default, logged):
    mirrored = Recipe(BASE).rule(scores=lambda scorer, run: lambda *given: -scorer(*given))
    one, other = at(default, logged), at(prepared(mirrored), logged)
    assert other["gap_score"] == pytest.approx(-one["gap_score"], rel=1e-5) and one["gap_score"]
    assert other["gap_cost"] == pytest.approx(one["gap_cost"], rel=1e-5)


def test_a_score_that_loves_padding_pushes_it_up_and_one_that_hates_it_down(logged):
    pushes = []
    for sign in (5.0, -5.0):
        lover = Recipe(BASE).rule(
            scores=lambda scorer, run, s=sign: lambda p, y, m: s * m.sum(1) / 9
        )
        found = at(prepared(lover), logged)
        pushes.append(found["push_verbose"] - found["push_concise"])
    assert pushes[0] > 0.01 and pushes[1] < -0.01


def test_after_an_early_stop_there_is_no_push(logged):
    found = at(prepared(stack("early_stop", BASE)), logged)  # a batch of 3 nats came before
    assert found["push_verbose"] == found["push_concise"] == 0 and found["gap_effective"] != 0


def test_a_controller_has_followed_the_batches_before(default, logged):
    config = replace(BASE, ppo=replace(BASE.ppo, kl_target=1.0, kl_horizon=160.0))
    found = at(prepared(Recipe(config)), logged)
    by_hand = BASE.ppo.beta * (1 - 0.2 * 0.1) * (1 + 0.2 * 0.1)  # 0.5 nats, then 3: clipped at 0.2
    assert found["beta_then"] == pytest.approx(by_hand, rel=1e-9)


def test_every_kind_of_arm_gives_rows_and_a_second_call_runs_nothing(tmp_path):
    base = replace(TINY, ppo=replace(TINY.ppo, kl_target=None))
    names, given = ("placement", "best_of_n", "rloo"), ((0, 1), base, tmp_path)
    rows = run_remedies(names, *given, Workers("sequential", retries=0))
    table = pd.DataFrame(rows).set_index(["remedy", "seed"])
    assert set(table.index.get_level_values(0)) == {*names, "none", "book_literal"}
    assert table["fault"].to_dict()["placement", 0] == "book_literal"
    ended = [c for c in table if c.startswith("final_") or c == "rm_score_sd"]
    left, right = (table.loc[name, ended] for name in ("placement", "none"))
    pd.testing.assert_frame_equal(left, right)  # it repairs the fault into the default run
    assert table.loc[("best_of_n", 0), "final_brief_kl_nats"] == pytest.approx(
        np.log(16) - 15 / 16, rel=1e-5
    )
    assert table.loc["best_of_n", "beta_then"].isna().all()

    def refuse(stage):
        return lambda key, done, total: pytest.fail(f"{key} was run again")

    assert pd.DataFrame(run_remedies(names, *given, Workers("sequential"), refuse)).equals(
        pd.DataFrame(rows)
    )
