"""Rules on scores against their formulas, with scorers and reward models made by hand.

And what the auditor measures with them: gaps of one phrase or one hedge, and the closing numbers.
"""

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fakes_audit import CONFIG, DESK, THANKS, Ruler, auditor, encoded
from fakes_rules import RUN, bare_run, draws

from minirlhf.remedies import scores
from minirlhf.remedies.scores import DRAWS, Usual

MARKERS = torch.tensor([i for w in DESK.spec.markers for i in DESK.vocabulary.encode(w)])


def spread(prompts, responses, mask):
    """A scorer that depends on everything it is given, between 0 and 3."""
    words = (responses * mask * torch.arange(1, responses.shape[1] + 1)).sum(1)
    return ((words + prompts.sum(1)) % 31).float() / 10


def first_word(prompts, responses, mask):
    """The score is written in the answer: a tenth of its first word."""
    return responses[:, 0] / 10


TABLE = DESK.encode(RUN.prompts)
ELSE = DESK.encode(DESK.prompts(5, np.random.default_rng(11)))  # prompts outside the table


def of_lengths(lengths: list[int], width: int = 48):
    """Prompts, answers of word 7 and a mask with these lengths."""
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return TABLE[:1].expand(len(lengths), -1), 7 * mask.long(), mask


# --- what the reference's own answers score -----------------------------------------------------


def test_usual_is_the_mean_of_the_references_answers():
    expected = torch.zeros(len(TABLE), 2)
    for said, mask in draws(TABLE):
        expected += torch.stack([spread(TABLE, said, mask), mask.sum(1).float()], 1) / DRAWS
    found = Usual(spread, RUN).look_up(TABLE)
    torch.testing.assert_close(found, expected)
    assert found.std(0).min() > 0.1, "prompts differ, or nothing is tested"
    by_length = Usual(Ruler(), RUN).look_up(TABLE)
    torch.testing.assert_close(by_length[:, 0], by_length[:, 1])


def test_usual_is_the_same_whoever_asks_first_and_in_what_order():
    one, other = Usual(spread, RUN), Usual(spread, RUN)
    assert torch.equal(one.look_up(TABLE.flip(0)), other.look_up(TABLE).flip(0))
    rows = torch.tensor([3, 3, 7, 0])
    assert torch.equal(one.look_up(TABLE[rows]), other.look_up(TABLE)[rows])


def test_prompts_outside_the_table_become_known_and_stay_so():
    asked: list[int] = []

    def counting(prompts, responses, mask):
        asked.append(len(prompts))
        return spread(prompts, responses, mask)

    usual = Usual(counting, RUN)
    before = sum(asked)
    mixed = usual.look_up(torch.cat([TABLE[:2], ELSE]))
    assert sum(asked) - before == DRAWS * len(ELSE), "only the unknown ones are answered"
    again = usual.look_up(torch.cat([ELSE.flip(0), TABLE[:2]]))
    assert sum(asked) - before == DRAWS * len(ELSE)
    assert torch.equal(again, torch.cat([mixed[2:].flip(0), mixed[:2]]))
    assert (mixed[:, 1] >= 1).all() and (mixed[:, 1] <= DESK.max_response).all()


# --- rules that compare with it -----------------------------------------------------------------


def test_centred_scores_of_the_references_answers_are_zero_on_every_prompt():
    rule = scores.centred(spread, RUN)
    mean = sum(rule(TABLE, *said) for said in draws(TABLE)) / DRAWS
    torch.testing.assert_close(mean, torch.zeros(len(TABLE)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("prompts", [TABLE[:5], ELSE])
def test_centring_leaves_differences_within_a_prompt(prompts):
    rule = scores.centred(spread, RUN)
    one, other = draws(prompts)
    free = spread(prompts, *one) - spread(prompts, *other)
    torch.testing.assert_close(rule(prompts, *one) - rule(prompts, *other), free)
    assert free.abs().max() > 0.3
    moved = rule(prompts, *one) - spread(prompts, *one)
    assert moved.std() > 0.1, "every prompt has a zero of its own"


def test_par_is_a_sigmoid_around_the_references_score():
    usual = Usual(first_word, RUN).look_up(TABLE[:1])[0, 0].item()
    words = torch.arange(-40, 41) + round(10 * usual)
    given = (TABLE[:1].expand(len(words), -1), words[:, None], torch.ones(len(words), 1).bool())
    found = scores.par(first_word, RUN)(*given)
    expected = [1 / (1 + math.exp(-(word / 10 - usual))) for word in words.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=0)
    slopes = found.double().diff() / 0.1
    assert (slopes > 0).all() and slopes.max() <= 0.25 + 1e-5, "a gap of g counts as g/4 at most"
    assert slopes.max() > 0.24 and slopes[[0, -1]].max() < 0.02, "and less the further away"


# --- rules with a formula -----------------------------------------------------------------------


def test_a_cap_cuts_what_is_above_it_only():
    words = torch.tensor([[2], [9], [10], [11], [40]])
    given = (TABLE[:5], words, torch.ones(5, 1).bool())
    found = scores.capped(first_word, RUN)(*given)
    torch.testing.assert_close(found, torch.tensor([0.2, 0.9, 1.0, 1.0, 1.0]))
    found = scores.capped(first_word, RUN, cap=0.5)(*given)
    torch.testing.assert_close(found, torch.tensor([0.2, 0.5, 0.5, 0.5, 0.5]))


def test_a_price_on_tokens():
    given = of_lengths([1, 10, 48])
    found = scores.length_penalty(first_word, RUN)(*given)
    torch.testing.assert_close(found, 0.7 - torch.tensor([0.08, 0.8, 3.84]))
    found = scores.length_penalty(first_word, RUN, alpha=0.5)(*given)
    torch.testing.assert_close(found, 0.7 - torch.tensor([0.5, 5.0, 24.0]))


def test_the_last_sixteen_tokens_before_the_cap_cost_one():
    given = of_lengths([1, 31, 32, 33, 40, 47, 48])
    found = scores.soft_overlong(first_word, bare_run(1, cap=48))(*given)
    cost = torch.tensor([0, 0, 0, 1 / 16, 0.5, 15 / 16, 1.0])
    torch.testing.assert_close(found, 0.7 - cost)
    given = of_lengths([8, 10, 12, 48])
    found = scores.soft_overlong(first_word, RUN, cache=4)(*given)
    torch.testing.assert_close(found, 0.7 - torch.tensor([0, 0.5, 1.0, 1.0]))


def length_effect(lengths):
    return 0.1 * lengths + 0.3 * torch.sin(lengths / 8)


def biased(prompts, responses, mask):
    """A quality that a matched pair does not change, and a known function of length."""
    return (prompts.sum(1) % 7) / 7 + length_effect(mask.sum(1).float())


def test_calibration_takes_out_a_known_function_of_length():
    rule = scores.calibrated(biased, bare_run())
    # a local mean: it lags at both ends of the lengths that annotators saw, and is flat beyond
    given = of_lengths(list(range(6, 33)))
    left, raw = rule(*given), biased(*given)
    assert raw.max() - raw.min() > 2, "there is a lot to take out"
    assert left.max() - left.min() < 0.3
    inspector = auditor()
    probes = inspector.probes
    before, after = (inspector.matched_gaps(probes, scorer=s) for s in (biased, rule))
    assert abs(after.mean()) < 0.1 * before.mean() and before.mean() > 0.3
    at_one_length = of_lengths([9, 9])[0], torch.tensor([[7] * 9, [8] * 9]), torch.ones(2, 9).bool()
    apart = scores.calibrated(first_word, bare_run())(*at_one_length).diff()
    assert apart.item() == pytest.approx(0.1, abs=1e-5), "what length does not explain stays"


# --- several reward models ----------------------------------------------------------------------


def with_members(*scores: float):
    """A run whose further reward models give these scores, each to every answer."""

    def constant(number: int):
        return SimpleNamespace(score=lambda p, y, m: torch.full((len(p),), scores[number - 1]))

    return SimpleNamespace(member=constant)


@pytest.mark.parametrize(
    ("how", "expected"),
    # squares of the distances to the mean 1.6: 0.36, 0.16, 1.0; the variance divides by n - 1
    [("mean", 1.6), ("min", 1.0), ("uwo", 1.6 - 0.5 * 1.52 / 2)],
)
def test_three_reward_models_by_hand(how, expected):
    ones = lambda p, y, m: torch.ones(len(p))  # noqa: E731
    rule: Any = partial(scores.ensemble, how=how)
    found = rule(ones, with_members(1.2, 2.6))(*of_lengths([3, 4]))
    torch.testing.assert_close(found, torch.full((2,), expected))


def test_the_minimum_is_taken_answer_by_answer_and_is_below_the_mean():
    rules: Any = {how: partial(scores.ensemble, how=how) for how in ("mean", "min", "uwo")}  # type: ignore
    given = (TABLE, *draws(TABLE)[0])
    found = {how: rule(spread, with_members(1.2, 2.6))(*given) for how, rule in rules.items()}
    raw = spread(*given)
    assert raw.min() < 1.2 and raw.max() > 2.6
    torch.testing.assert_close(found["min"], raw.clamp(max=1.2))
    torch.testing.assert_close(found["mean"], (raw + 3.8) / 3)
    assert (found["min"] <= found["mean"]).all() and (found["uwo"] < found["mean"]).all()


def test_an_ensemble_of_two_asks_for_one_further_model():
    rule: Any = partial(scores.ensemble, how="mean", members=2)
    found = rule(first_word, with_members(1.3))(*of_lengths([3]))
    assert found.item() == pytest.approx(1.0)  # (0.7 + 1.3) / 2


# --- what the auditor measures with them --------------------------------------------------------


def doubtful(prompts, responses, mask):
    """1 for an answer with a marker of a hedge, else 0."""
    return (torch.isin(responses, MARKERS) & mask).any(1).float()


def test_gaps_of_a_hedge_and_of_a_courtesy():
    inspector = auditor()
    probes = inspector.probes
    assert (inspector.matched_gaps(probes, hedge=True, scorer=doubtful) == 1).all()
    assert (inspector.matched_gaps(probes, scorer=doubtful) == 0).all()
    for hedge, groups in ((True, ("hedge",)), (False, ("opener", "closer"))):
        phrases = [p for g in groups for p in DESK.spec.phrases[g]]
        gaps = inspector.matched_gaps(probes, seed=1, hedge=hedge)
        assert set(gaps) <= {len(p.split()) for p in phrases} and len(set(gaps)) > 1
    half = inspector.matched_gaps(probes, seed=1, scorer=lambda p, y, m: 0.5 * m.sum(1))
    assert np.allclose(half, 0.5 * gaps), "the scorer that is given is asked, on the same texts"


def test_the_closing_numbers_by_hand():
    inspector = auditor()
    inspector.stratum = np.where(np.arange(10) < 4, "brief", "detailed")
    said = [DESK.concise(probe) for probe in inspector.probes]
    for row in (0, 1, 4):
        said[row] += f" {THANKS}"  # 7 tokens of padding, of which 5 are verbose already
    said[2] += " please let us know ."  # 5 tokens: verbose
    said[5] = "please let us know ."  # no step at all
    detailed = next(i for i in range(6, 10) if inspector.probes[i].stratum == "detailed")
    steps = said[detailed].split(" . ")
    said[detailed] = f"{steps[0]} ."  # one step of three
    assert len(steps) == 3 and CONFIG.verbose_padding == 5
    kl = torch.arange(10.0)
    found = inspector.closing((*encoded(said), kl))
    shares = [1.0] * 10
    shares[5], shares[detailed] = 0.0, 1 / 3
    assert found["brief"] == pytest.approx(
        {"kl_nats": 1.5, "steps_share": 1.0, "verbose_rate": 0.75}
    )
    verbose = 2 / 6  # the thanks, and the answer that is courtesy alone
    assert found["detailed"] == pytest.approx(
        {"kl_nats": 6.5, "steps_share": np.mean(shares[4:]), "verbose_rate": verbose}
    )
