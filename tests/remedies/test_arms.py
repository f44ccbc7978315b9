"""The table of remedies: each changes one thing and says which; and the rules of a run, made tiny.

The base run is prepared once; the others take its reference and its reward model.
"""

import copy
import math
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_drift import TINY

from minirlhf.audit.auditor import answer
from minirlhf.dpo import answer_logprobs
from minirlhf.drift.config import DriftConfig
from minirlhf.drift.recipe import Recipe, Rules, changed
from minirlhf.drift.run import Drift
from minirlhf.remedies import arms, scores
from minirlhf.remedies import pairs as pair_rules
from minirlhf.remedies.arms import ARMS, FAULTS, REMEDIES, stack

BASE = replace(TINY, ppo=replace(TINY.ppo, kl_target=None))
PLACES = {
    "pairs": {"pairs"},
    "RM loss": {"fit"},
    "reward": {"scores"},
    "KL": {"ppo", "prices"},
    "advantage": {"ppo"},
    "update": {"stop"},
    "instead of PPO": {"policy"},
}


# --- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REMEDIES)
def test_a_remedy_changes_one_thing_where_it_says(name):
    remedy = REMEDIES[name]
    before = Recipe() if remedy.fault == "none" else FAULTS[remedy.fault](Recipe())
    (place,) = changed(before, remedy.change(before))
    assert place in PLACES[remedy.acts]
    for text in (remedy.title, remedy.equation, remedy.cost, remedy.source):
        assert text.strip() == text and len(text) > 3
    assert remedy.source == "ours" or "arXiv" in remedy.source or "ours" in remedy.source


def test_no_two_remedies_are_the_same():
    assert len({r.title for r in REMEDIES.values()}) == len(REMEDIES)
    assert len({r.equation for r in REMEDIES.values()}) == len(REMEDIES)
    assert set(ARMS) == {*REMEDIES, *FAULTS, "none", "fair"}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_change_of_ppo(name):
    assert changed(Recipe(), FAULTS[name](Recipe())) == {"ppo"}


@pytest.mark.parametrize(("fault", "name"), [("book_literal", "placement"),
                                             ("token_mean", "sequence_sum")])  # fmt: skip
def test_repairing_a_fault_gives_back_the_default(fault, name):
    recipe = stack(f"{fault}+{name}", DriftConfig(seed=4))
    assert recipe.config == DriftConfig(seed=4) and recipe.rules == Rules()
    assert REMEDIES[name].fault == fault and recipe.names == (fault, name)
    assert stack(fault, DriftConfig()).config != DriftConfig()


def test_dr_grpo_divides_by_neither_the_spread_of_a_group_nor_the_length():
    before, after = (stack(s, DriftConfig()).config.ppo for s in ("grpo", "grpo+dr_grpo"))
    assert (before.advantage, before.loss_aggregation) == ("grpo", "sequence_mean")
    assert (after.advantage, after.loss_aggregation) == ("rloo", "sequence_sum")
    differ = {f.name for f in fields(after) if getattr(after, f.name) != getattr(before, f.name)}
    assert differ == {"advantage", "loss_aggregation"}


def test_settings_of_the_remedies_that_set_some():
    usual = DriftConfig().ppo
    assert stack("larger_beta", DriftConfig()).config.ppo == replace(usual, beta=4 * usual.beta)
    assert stack("rloo", DriftConfig()).config.ppo == replace(usual, advantage="rloo")
    adaptive = stack("adaptive_beta", DriftConfig()).config.ppo
    # the row's equation: a tenth of the error, at most a fifth, for every batch
    assert adaptive == replace(usual, kl_target=3.0, kl_horizon=10 * usual.batch)
    fair = stack("fair", DriftConfig())
    assert changed(Recipe(), fair) == {"preferences"}
    dials = fair.config.preferences
    assert dials.length_bias == dials.hedge_bias == dials.skim == 0


def test_the_first_name_of_a_stack_acts_first():
    one, other = (stack(s, BASE).rules.pairs for s in ("balanced+ties", "ties+balanced"))
    assert one == (pair_rules.balance, pair_rules.ties) and other == one[::-1]
    rules = stack("capped+length_penalty", BASE).rules.scores
    assert rules == (scores.capped, scores.length_penalty)
    both = stack("counterfactual+none+larger_beta", BASE)
    assert both.names == ("counterfactual", "larger_beta"), "none is no change"
    assert changed(Recipe(BASE), both) == {"pairs", "ppo"}
    assert stack("larger_beta+larger_beta", BASE).config.ppo.beta == 16 * BASE.ppo.beta
    assert stack("none", BASE) == Recipe(BASE)


@pytest.mark.parametrize("names", ["cure", "larger_beta+cure", ""])
def test_an_unknown_name_is_refused_with_those_that_exist(names):
    with pytest.raises(ValueError, match=r"no remedy '(cure)?': there are ") as caught:
        stack(names, DriftConfig())
    assert all(name in str(caught.value) for name in ARMS) and "\n" not in str(caught.value)


def test_a_recipe_is_not_changed_by_what_is_made_of_it():
    recipe = Recipe(BASE, names=("mine",))
    twice = recipe.rule(scores=scores.capped, stop=arms.too_far).ppo(beta=0.5)
    assert recipe == Recipe(BASE, names=("mine",))
    assert twice.names == ("mine",) and twice.config.seed == BASE.seed
    assert changed(recipe, twice) == {"scores", "stop", "ppo"}
    assert changed(recipe, replace(recipe, config=replace(BASE, seed=9))) == {"seed"}


# --- rules in a run ----------------------------------------------------------------------------


@cache
def base() -> Any:
    """The tiny run, prepared: nobody may change it."""
    run = Drift(BASE)
    run.prepare()
    return run


class Quick(Drift):
    """A run with the reference and the reward model of the base run."""

    def make_reference(self) -> None:
        self.reference = base().reference

    def _read_reward(self, name):
        return base().reward_model if name == "reward" else super()._read_reward(name)


def quick(recipe: Recipe, **options) -> Quick:
    return Quick(recipe.config, recipe=recipe, **options)


class Told:
    """In place of a fit: remembers the pairs that it was given, and what it drew."""

    def __init__(self):
        self.pairs, self.drawn = [], []

    def __call__(self, model, pairs, config, *, generator, progress):
        self.pairs.append(pairs)
        self.drawn.append(torch.rand(3, generator=generator).tolist())
        with torch.no_grad():  # or every answer scores alike, and there is no scale
            model.trunk.scalar.weight.normal_(generator=generator)


def test_pair_rules_act_in_turn_with_streams_of_their_own_and_then_comes_the_fit():
    seen, told = [], Told()

    def rule(pairs, run, rng):
        seen.append((len(pairs), rng.random()))
        return pairs.select(np.arange(len(pairs) - 10))

    run = quick(Recipe(BASE).rule(pairs=rule).rule(pairs=rule).rule(fit=told))
    run.make_reference()
    train = base().preferences.train
    model = run.fit_reward(train, "reward")
    streams = [np.random.default_rng(run.stream(f"rule {i}")).random() for i in range(2)]
    assert seen == [(99, streams[0]), (89, streams[1])] and streams[0] != streams[1]
    (given,) = told.pairs
    assert torch.equal(given.chosen, train.chosen[:79])
    assert model.trunk is not run.reference and len(train) == 99


@pytest.mark.parametrize(
    ("names", "by_hand"),
    [
        ("capped+length_penalty", lambda raw, length: raw.clamp(max=1.0) - 0.08 * length),
        ("length_penalty+capped", lambda raw, length: (raw - 0.08 * length).clamp(max=1.0)),
    ],
)
def test_score_rules_act_in_turn_on_what_ppo_sees_and_not_on_the_audit(names, by_hand):
    run = quick(stack(names, BASE))
    run.prepare()
    run.reward_model = copy.deepcopy(run.reward_model)
    run.reward_model.sd.div_(10)  # scores far above the cap
    answers = run.auditor.sample(run.reference)
    given = (run.auditor.prompts, *answers[:2])
    raw, length = run.reward_model.score(*given), given[2].sum(1)
    assert raw.max() > 2 and raw.min() < 0, "or the order would not matter"
    torch.testing.assert_close(run._make_ppo().reward_model(*given), by_hand(raw, length))
    audited = run.auditor.judge(answers, 0)[0]["rm_score_sd"]
    assert audited == pytest.approx(float(base().reward_model.score(*given).mean()))


def test_a_run_stops_after_the_first_batch_that_is_too_far():
    fast = replace(BASE, steps=6, ppo=replace(BASE.ppo, lr=2e-2, beta=0.0), log_batches=())
    ends = {}
    for name in ("none", "early_stop"):
        run = quick(stack(name, fast))
        run.prepare()
        run.train_policy()
        ends[name] = run
    free, stopped = ends["none"], ends["early_stop"]
    far = [m["objective/kl_nats"] > 2 for m in free.metrics]
    count = far.index(True) + 1
    assert 1 < count < 6, "in the middle, or nothing is tested"
    assert len(stopped.metrics) == stopped.ppo.steps == count and len(free.metrics) == 6
    said = [[m["objective/kl_nats"] for m in run.metrics] for run in (free, stopped)]
    assert said[0][:count] == said[1], "up to then it is the same run"
    assert stopped.history[-1]["step"] == count and free.history[-1]["step"] == 6
    assert not arms.too_far({"objective/kl_nats": 2.0})


def test_dpo_leaves_the_reference_and_moves_the_policy_towards_the_winners():
    run = quick(stack("dpo", BASE))
    before = {k: v.clone() for k, v in base().reference.state_dict().items()}
    pairs = run.__dict__["preferences"] = base().preferences  # labelled once
    summary = run.run()
    assert all(torch.equal(before[k], v) for k, v in run.reference.state_dict().items())
    assert [entry["step"] for entry in run.history] == [0, BASE.steps] and run.metrics == []
    with torch.no_grad():
        margins = [a - b for a, b in (answer_logprobs(m, pairs.train, slice(None))
                                      for m in (run.ppo.policy, run.reference))]  # fmt: skip
    assert (margins[0] - margins[1]).mean() > 0.01
    assert summary["reference"]["kl_nats"] == 0 != summary["final"]["kl_nats"]


def test_the_best_of_n_has_the_highest_score_of_its_draws():
    run, n = quick(Recipe(BASE)), 3
    run.prepare()
    arms.choose_best(run, n=n)
    assert run.ending is not None
    said, mask, kl = run.ending
    prompts, score = run.auditor.prompts, run.reward_model.score
    seeds = [run.stream(f"best of n {i}") for i in range(n)]
    draws = [answer(run.desk, run.reference, prompts, seed) for seed in seeds]
    scores = torch.stack([score(prompts, *draw) for draw in draws])
    torch.testing.assert_close(score(prompts, said, mask), scores.max(0).values)
    assert (scores.max(0).values - scores.min(0).values).min() > 0, "draws differ"
    for row, best in enumerate(scores.argmax(0).tolist()):
        assert torch.equal(said[row], draws[best][0][row])
        assert torch.equal(mask[row], draws[best][1][row])
    bound = math.log(n) - (n - 1) / n
    assert kl.tolist() == pytest.approx([bound] * len(prompts))
    first, last = run.history
    assert (first["step"], last["step"]) == (0, BASE.steps) and first["kl_nats"] == 0
    assert last["kl_nats"] == pytest.approx(bound)
    assert last["rm_score_sd"] == pytest.approx(float(scores.max(0).values.mean()))
    assert stack("best_of_n", BASE).rules.policy is arms.choose_best


# --- members of an ensemble --------------------------------------------------------------------


def flat(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.trunk.parameters()])


def test_a_member_is_another_model_on_the_references_scale_and_is_read_back(tmp_path, monkeypatch):
    run = quick(Recipe(BASE), out=tmp_path)
    run.prepare()
    run.__dict__["preferences"] = base().preferences
    run.notes = {"kept": 1}
    main, member = run.reward_model, run.member(1)
    auditor = run.auditor
    prompts = auditor.prompts.repeat(BASE.audit.reference_samples, 1)
    scores = member.score(prompts, *auditor._scored)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std()) == pytest.approx(1, abs=1e-4)
    assert (scores - main.score(prompts, *auditor._scored)).abs().max() > 0.01
    assert not torch.equal(flat(main), flat(member))
    again = quick(Recipe(BASE), out=tmp_path, resume=True)
    again.prepare()
    again.notes = {"kept": 1}
    monkeypatch.setattr(again, "fit_reward", lambda *given: pytest.fail("trained again"))
    read = again.member(1)
    assert torch.equal(flat(read), flat(member))
    assert torch.equal(read.score(prompts, *auditor._scored), scores)
    assert again.notes == run.notes == {"kept": 1}, "what is said of the run is of its main model"


def test_members_learn_from_resampled_pairs_each_in_an_order_of_its_own():
    told = Told()
    run = quick(Recipe(BASE).rule(fit=told))
    run.prepare()
    run.__dict__["preferences"] = base().preferences
    for number in (1, 2, 1):
        run.member(number)
    train = base().preferences.train
    known = {row.numpy().tobytes() for row in torch.cat([train.prompts, train.chosen], 1)}
    rows = [[r.numpy().tobytes() for r in torch.cat([p.prompts, p.chosen], 1)] for p in told.pairs]
    for drawn in rows:
        assert len(drawn) == len(train) and set(drawn) <= known
        assert 0.5 < len(set(drawn)) / len(known) < 0.75, "with replacement: about 1 - 1/e of them"
    assert rows[0] == rows[2] != rows[1] and told.drawn[0] == told.drawn[2] != told.drawn[1]


def test_an_ensemble_in_a_run_asks_for_its_members():
    asked = []
    run: Any = SimpleNamespace(
        member=lambda k: asked.append(k) or SimpleNamespace(score=lambda *given: torch.zeros(1))
    )
    (rule,) = stack("ensemble_min", BASE).rules.scores
    given = (torch.zeros(1, 1),) * 3
    assert rule(lambda *given: torch.ones(1), run)(*given).item() == 0
    assert asked == [1, 2]
