"""The autopsy: parts against an independent calculation, facts by hand, pushes against real steps,
planted conventions found again, and what-ifs that know what they are."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import fake_rollout, naive_gae, ragged_batch, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minirlhf.autopsy.convention import Convention, charged_kl
from minirlhf.autopsy.facts import three_facts
from minirlhf.autopsy.parts import AdvantageParts, split
from minirlhf.autopsy.pushes import CLASSES, push, reference_entropy, token_classes
from minirlhf.autopsy.reconciliation import recomputed, reconcile
from minirlhf.autopsy.what_ifs import rescored, what_if, what_if_clip
from minirlhf.engine import compute
from minirlhf.engine.intervals import FEWEST
from minirlhf.engine.intervals import bootstrap_mean as interval
from minirlhf.model import response_logprobs, response_states
from minirlhf.ppo import PPO, PPOConfig, price_and_credit
from minirlhf.rollout import Rollout

CONFIG = PPOConfig(beta=0.3, gamma=0.97, lam=0.9, batch=6, group=3, minibatches=1)
PLAIN = Convention.of(replace(CONFIG, whiten_advantages="none"))
ONE_PROMPT = torch.tensor([[0, 3, 2]])


def logged(rollout: Rollout, config: PPOConfig) -> Rollout:
    """The batch with what a run of ours would have made of it."""
    return replace(rollout, **price_and_credit(rollout, config, config.beta))


def grouped(seed: int, dtype: torch.dtype = torch.float64) -> Rollout:
    """Six answers to two prompts, three each."""
    r = fake_rollout(seed, dtype=dtype)
    return replace(r, prompts=torch.tensor([[2, 3], [3, 2]]).repeat_interleave(3, 0))


# --- parts ------------------------------------------------------------------------------------

KINDS = st.fixed_dictionaries(
    {
        "advantage": st.sampled_from(["gae", "rloo", "grpo"]),
        "whiten_advantages": st.sampled_from(["none", "scale", "shift_scale"]),
        "whiten_rewards": st.sampled_from(["none", "scores", "rewards"]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3"]),
        "kl_aggregation": st.sampled_from(["sequence_sum", "token_mean"]),
        "kl_place": st.sampled_from(["reward", "loss", "none"]),
        "beta": st.floats(0, 2),
        "gamma": st.floats(0, 1),
        "lam": st.floats(0, 1),
    }
)


@given(KINDS, st.integers(0, 10_000))
def test_parts_add_up_to_what_a_run_learns_from(kind, seed):
    config = replace(CONFIG, **kind)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        batch = logged(grouped(seed, dtype), config)
        assert batch.advantages is not None
        total = split(batch, Convention.of(config)).total
        assert total.dtype == torch.float64 and not total[~batch.mask].any()
        scale = max(1.0, float(batch.advantages.abs().max()))
        assert float((total - batch.advantages).abs().max()) <= tolerance * scale


DEGENERATE = {
    "one token": [[True]],
    "one answer": [[True, True, False]],
    "all but one masked": [[False, False, False], [False, True, False]],
    "full rows": [[True] * 4] * 3,
    "an empty row": [[False, False], [True, True]],
    "holes": [[True, False, True, True], [False, True, False, True]],
}


@pytest.mark.parametrize("whitening", ["none", "scale", "shift_scale"])
@pytest.mark.parametrize("name", DEGENERATE)
def test_parts_add_up_in_degenerate_batches(name, whitening):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        rollout = fake_rollout(1, mask=torch.tensor(DEGENERATE[name]), dtype=dtype)
        config = replace(CONFIG, whiten_advantages=whitening)
        batch = logged(rollout, config)
        assert batch.advantages is not None
        parts = split(batch, Convention.of(config))
        assert float((batch.advantages - parts.total).abs().max()) <= tolerance
        kl = rollout.logprobs - rollout.ref_logprobs
        raw = split(batch, replace(Convention.of(config), whiten_advantages="none")).kl
        expected = naive_gae(-0.3 * kl * batch.mask, 0 * kl, batch.mask, 0.97, 0.9)
        torch.testing.assert_close(raw, expected, rtol=0, atol=tolerance)


def independent(r: Rollout, advantage: str, whitening: str) -> Tensor:
    """Advantages [B, T] from the definitions, by loops that share no line with the library."""
    mask = r.mask
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    for b in range(len(mask)):
        at = [t for t in range(mask.shape[1]) if mask[b, t]]
        for t in at:
            rewards[b, t] = -0.3 * (float(r.logprobs[b, t]) - float(r.ref_logprobs[b, t]))
        if at:
            rewards[b, at[-1]] += float(r.scores[b])
    if advantage == "gae":
        found = naive_gae(rewards, r.values, mask, 0.97, 0.9)
    else:
        found, sums = torch.zeros(mask.shape, dtype=torch.float64), rewards.sum(1).tolist()
        for b, own in enumerate(sums):
            group = sums[b // 3 * 3 : b // 3 * 3 + 3]
            mean = sum(group) / 3
            base, by = (sum(group) - own) / 2, 1.0
            if advantage == "grpo":
                base, by = mean, (sum((x - mean) ** 2 for x in group) / 2) ** 0.5 + 1e-4
            found[b][mask[b]] = (own - base) / by
    inside = found[mask]
    if whitening == "none":
        return found
    mean, sd = inside.mean(), 1.0  # one number has no sd, but a mean that can be taken away
    if len(inside) > 1:
        sd = ((inside - mean).square().sum() / (len(inside) - 1) + 1e-8).sqrt()
    return torch.where(mask, (found - (mean if whitening == "shift_scale" else 0)) / sd, 0.0)


@pytest.mark.parametrize("whitening", ["none", "scale", "shift_scale"])
@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
@pytest.mark.parametrize(
    "lengths", [(5, 1, 3, 5, 2, 4), (1,) * 6, (5,) * 6, (1, 0, 0, 0, 0, 0)], ids=str
)
def test_parts_add_up_to_advantages_made_without_the_library(lengths, advantage, whitening):
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    config = replace(CONFIG, advantage=advantage, whiten_advantages=whitening)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        r = fake_rollout(3, mask=mask, dtype=dtype)
        r = replace(r, prompts=torch.tensor([[2, 3], [3, 2]]).repeat_interleave(3, 0))
        r = replace(r, scores=torch.where(mask.any(1), r.scores, 0.0))
        total = split(r, Convention.of(config)).total
        assert float((total - independent(r, advantage, whitening)).abs().max()) <= tolerance


@pytest.mark.parametrize("whitening", ["scores", "rewards"])
def test_whitened_rewards_have_parts_too(whitening):
    config = replace(CONFIG, whiten_rewards=whitening, whiten_advantages="none")
    batch, c = logged(fake_rollout(0), config), Convention.of(config)
    torch.testing.assert_close(split(batch, c).total, batch.advantages, rtol=0, atol=1e-12)
    by_ratio = split(batch, c).kl / split(batch, replace(c, whiten_rewards="none")).kl
    ratios = by_ratio[batch.mask].unique()
    # scores over their sd make KL dear by comparison; rewards over theirs leave the price alone
    assert (ratios - 1).abs().max() < 1e-9 if whitening == "scores" else ratios.std() < 1e-9


def test_parts_of_group_baselines_by_hand():
    r = replace(grouped(0), scores=torch.tensor([1.0, 2, 6, -3, 0, 0]).double())
    cost = -0.3 * (r.logprobs - r.ref_logprobs).sum(1)
    rloo = split(r, replace(PLAIN, advantage="rloo"))
    at = torch.arange(6), r.last
    assert rloo.reward[at].tolist() == r.scores.tolist()  # an answer's own score
    torch.testing.assert_close(rloo.kl[at], cost)  # its own KL, whole
    net = (r.scores + cost).tolist()
    others = [-(net[1] + net[2]) / 2, -(net[0] + net[2]) / 2, -(net[0] + net[1]) / 2]
    torch.testing.assert_close(rloo.baseline[at][:3], torch.tensor(others).double())
    grpo = split(r, replace(PLAIN, advantage="grpo"))
    sd = np.std(net[:3], ddof=1) + 1e-4
    torch.testing.assert_close(grpo.reward[at][:3], r.scores[:3] / sd)
    torch.testing.assert_close(grpo.baseline[at][0].item(), -np.mean(net[:3]) / sd)


def test_the_score_one_slot_after_eos_by_hand():
    # rewards 0, 0, 0 and the score 2 in the slot after; values 3, 5, 7, 4; gamma = lambda = 1/2:
    # A4 = -2, A3 = 4/2 - 7 - 2/4 = -11/2, A2 = 7/2 - 5 - 11/8 = -23/8, A1 = 5/2 - 3 - 23/32
    mask = torch.tensor([[True, True, True, False], [True] * 4, [False] * 4])
    r = fake_rollout(0, mask=mask)
    values = torch.tensor([[3.0, 5, 7, 4], [0, 0, 0, 1], [9, 9, 9, 9]]).double()
    r = replace(r, values=values, scores=torch.tensor([2.0, 2, 2]).double())
    c = replace(PLAIN, beta=0.0, gamma=0.5, lam=0.5, score_at="after_eos")
    parts = split(r, c)
    assert parts.total[0].tolist() == [-1 / 2 - 23 / 32, -23 / 8, -11 / 2, 0]
    assert parts.reward[0].tolist() == [2 / 64, 2 / 16, 2 / 4, 0]
    assert parts.total[1, 3] == 1.0, "a full row has no slot left: the score is on its last token"
    assert not parts.total[2].any()
    # nor has a row without a token a slot: it does not count when rewards are whitened
    c = replace(c, whiten_rewards="rewards")
    some = split(r.select(torch.tensor([0, 1])), c).total
    torch.testing.assert_close(split(r, c).total[:2], some, rtol=1e-12, atol=0)


def test_whitening_by_answer_and_keeping_the_mean():
    r = fake_rollout(3)
    raw = split(r, PLAIN).total
    white = replace(PLAIN, whiten_advantages="shift_scale", ddof=0)
    by_answer = split(r, replace(white, whiten_scope="answer")).total
    for row, found, inside in zip(raw, by_answer, r.mask, strict=True):
        x = row[inside]
        expected = (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt() if len(x) > 1 else 0 * x
        torch.testing.assert_close(found[inside], expected)
    kept = split(r, replace(white, keep_mean=True))
    x = raw[r.mask]
    expected = (x - x.mean()) / x.std(correction=0) + x.mean()
    torch.testing.assert_close(kept.total[r.mask], expected, rtol=1e-6, atol=1e-6)
    assert kept.shift is not None and kept.shift[r.mask].unique().numel() == 1


# --- reconciliation ---------------------------------------------------------------------------

PLANTED = [
    {"score_at": "after_eos"},
    {"kl_estimator": "k3"},
    {"kl_estimator": "k2"},
    {"kl_aggregation": "token_mean"},
    {"ddof": 0},
    {"whiten_scope": "answer"},
    {"whiten_advantages": "none"},
    {"whiten_advantages": "scale"},
    {"keep_mean": True},
    {"whiten_rewards": "scores"},
    {"whiten_rewards": "rewards"},
    {"lam": 0.95},
    {"gamma": 0.99},
    {"beta": 0.0},
    {"beta": 0.1234},
    {"clamp": 10.0},
    {"beta": 0.1234, "whiten_advantages": "none"},
    {"lam": 0.95, "score_at": "after_eos"},
]
STATED = Convention.of(replace(CONFIG, whiten_advantages="shift_scale", gamma=0.9, lam=0.8))


@pytest.mark.parametrize("changes", PLANTED, ids=str)
@pytest.mark.parametrize("fields", [("advantages",), ("kl", "rewards", "advantages", "returns")])
def test_the_convention_that_made_a_log_is_found(changes, fields):
    r = fake_rollout(5, batch=10)
    r = replace(r, logprobs=4.5 * r.logprobs)  # some log-ratios beyond the clamp
    assert (r.logprobs - r.ref_logprobs).abs().max() > 10
    made = recomputed(r, replace(STATED, **changes))
    batch = replace(r, **{k: made[k].float() * r.mask for k in fields})
    found = reconcile(batch, STATED)
    first = found[0]
    assert first.explains and first.changes.keys() == changes.keys()
    assert all(first.changes[k] == pytest.approx(v, rel=1e-4) if k == "beta" else
               first.changes[k] == v for k, v in changes.items())  # fmt: skip
    stated = next(c for c in found if not c.changes)
    assert not stated.explains and stated.residuals.keys() == set(fields)
    assert max(stated.residuals.values()) > 1e-3
    assert not any(c.explains for c in found[1:]), "nothing else explains it"


def test_a_stated_convention_that_holds_comes_first_and_ties_are_told():
    config = replace(CONFIG, gamma=1.0, lam=1.0)
    batch = logged(fake_rollout(0), config)
    found = reconcile(replace(batch, kl=None, rewards=None), Convention.of(config))
    assert found[0].changes == {} and max(found[0].residuals.values()) < 1e-9
    # with gamma lambda = 1 and no value in the slot after EOS nobody can tell where the score sat
    ties = [c.changes for c in found if c.explains]
    assert ties == [{}, {"clamp": 10.0}, {"score_at": "after_eos"}] or ties == [
        {}, {"score_at": "after_eos"}, {"clamp": 10.0}
    ]  # fmt: skip


def test_a_log_that_nothing_explains_says_so_and_small_noise_needs_a_wider_tolerance():
    config = replace(CONFIG, gamma=0.9, lam=0.8)
    batch = logged(fake_rollout(0), config)
    assert batch.advantages is not None
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(batch.mask.shape, generator=g) * batch.mask
    wild = replace(batch, advantages=noise.double(), rewards=None, returns=None)
    assert not any(c.explains for c in reconcile(wild, Convention.of(config), depth=1))
    coarse = replace(batch, advantages=batch.advantages.bfloat16().double(), rewards=None)
    assert not reconcile(coarse, Convention.of(config), depth=0)[0].explains
    assert reconcile(coarse, Convention.of(config), depth=0, tolerance=2e-2)[0].explains


# --- three facts ------------------------------------------------------------------------------


def facts_batch() -> tuple[Rollout, Tensor, Tensor]:
    """Prompt 0: two verbose, one concise; prompt 1: one of each; prompt 2: one verbose."""
    lengths = torch.tensor([4, 2, 1, 3, 2, 4, 0])
    mask = torch.arange(4) < lengths[:, None]
    r = fake_rollout(0, mask=mask)
    ratio = torch.tensor([1.0, 2, -1, 3, 0.5, 4, 100])[:, None] * mask
    push_ = torch.tensor([2.0, -1, -3, 1, 0, 5, 100])[:, None] * mask
    push_[0, 0] = -2.0
    scores = torch.tensor([1.0, 2, 0.5, 3, 1, 7, 100]).double()
    index = torch.tensor([0, 0, 0, 1, 1, 2, 0])
    r = replace(r, logprobs=ratio.double(), ref_logprobs=0 * ratio.double(), scores=scores)
    verbose = torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool()  # the empty row is left out
    concise = torch.tensor([0, 0, 1, 0, 1, 0, 0]).bool()
    return replace(r, advantages=push_.double(), index=index), verbose, concise


def test_facts_by_hand():
    r, verbose, concise = facts_batch()
    found = three_facts(r, verbose, concise, rng=np.random.default_rng(0))["all"]
    assert (found.n_verbose, found.n_concise, found.prompts) == (4, 2, 3)
    mean = {k: {side: x.mean for side, x in v.items()} for k, v in found.intervals.items()}
    assert mean["score"]["verbose"] == pytest.approx((1 + 2 + 3 + 7) / 4)
    assert mean["score"]["gap"] == pytest.approx(13 / 4 - 0.75)
    assert mean["kl"]["verbose"] == pytest.approx((4 + 4 + 9 + 16) / 4)
    assert mean["kl"]["concise"] == pytest.approx((-1 + 1) / 2)
    assert mean["advantage"]["verbose"] == pytest.approx(((6 - 2) / 4 - 1 + 1 + 5) / 4)
    assert mean["positive_share"]["verbose"] == pytest.approx((3 + 0 + 3 + 4) / 13)
    within = three_facts(r, verbose, concise, rng=np.random.default_rng(0), match="prompt")["all"]
    assert (within.n_verbose, within.n_concise, within.prompts) == (3, 2, 2)
    # prompt 0: (1 + 2) / 2 - .5 = 1; prompt 1: 3 - 1 = 2
    assert within.intervals["score"]["gap"].mean == pytest.approx(1.5)
    assert np.isnan(within.intervals["score"]["gap"][1:]).all(), "two prompts are too few"


def test_intervals_of_few_prompts_would_exclude_zero_too_often_and_are_not_given():
    """How often the lower limit of a mean of nothing is above 0; 1 in 40 would be right."""
    rng = np.random.default_rng(3)

    def share(n, trials=600):
        x = rng.normal(size=(trials, n))
        draws = x[:, rng.integers(n, size=(400, n))].mean(-1)  # (trials, draws)
        return (np.quantile(draws, 0.025, axis=1) > 0).mean()

    assert share(3) > 0.1 and share(FEWEST) < 0.07
    few = interval(rng.normal(size=FEWEST - 1), rng)
    assert np.isfinite(few.mean) and np.isnan(few[1:]).all()
    enough = interval(np.arange(FEWEST) + 1.0, rng)
    assert 0 < enough.low < enough.mean < enough.high


def test_facts_by_stratum_and_what_too_few_prompts_leave_open():
    r, verbose, concise = facts_batch()
    strata = np.array(["brief"] * 5 + ["detailed"] * 2)
    found = three_facts(r, verbose, concise, strata=strata, rng=np.random.default_rng(0))
    assert found.keys() == {"brief", "detailed"}
    detailed = found["detailed"].intervals["kl"]
    assert detailed["verbose"].mean == 16 and np.isnan(detailed["verbose"][1:]).all()
    assert np.isnan(detailed["gap"]).all() and found["detailed"].holds == (False, False, False)
    matched = three_facts(r, verbose, concise, strata=strata, match="prompt",
                          rng=np.random.default_rng(0))  # fmt: skip
    assert matched.keys() == {"brief"}


def simulated(rng: np.random.Generator, effect: float = 1.0) -> tuple[Rollout, Tensor, Tensor]:
    """40 prompts, a verbose and a concise answer each, all quantities shared within a prompt."""
    mask = torch.ones(80, 2, dtype=torch.bool)
    r = fake_rollout(0, mask=mask)
    verbose = torch.arange(80) % 2 == 0
    gap = rng.exponential(size=40)  # mean 1, skewed
    shared = rng.normal(size=40) * 3
    scores = np.stack([shared + effect * gap, shared], 1).ravel()
    x = torch.tensor(scores)[:, None].expand(-1, 2)
    r = replace(r, scores=torch.tensor(scores), logprobs=x + 10, ref_logprobs=0 * x)
    return replace(r, advantages=x + 20, index=torch.arange(80) // 2), verbose, ~verbose


def test_intervals_cover_what_they_say():
    rng = np.random.default_rng(0)
    hits, trials = 0, 100
    for _ in range(trials):
        found = three_facts(*simulated(rng), rng=rng, resamples=300)["all"]
        gap = found.intervals["score"]["gap"]
        hits += gap.low <= 1.0 <= gap.high
        assert gap.high - gap.low < 1.5, "pairs share a prompt: their spread must not count"
    assert 0.86 <= hits / trials <= 0.99  # nominal .95; a percentile interval of a skewed mean


def test_the_three_facts_hold_only_where_the_intervals_exclude_zero():
    rng = np.random.default_rng(1)
    r, verbose, concise = simulated(rng)
    facts = three_facts(r, verbose, concise, rng=rng)["all"]
    assert facts.holds == (True, True, True) and facts.coverage == 0.95
    assert three_facts(r, concise, verbose, rng=rng)["all"].holds == (False, False, True)
    assert r.advantages is not None
    centred = replace(r, advantages=r.advantages - 20 - r.scores.mean())
    assert three_facts(centred, verbose, concise, rng=rng)["all"].holds[2] is False


def test_the_parts_are_compared_too():
    r = replace(fake_rollout(0), index=torch.arange(6))
    batch = logged(r, CONFIG)
    parts = split(batch, Convention.of(CONFIG))
    verbose = torch.arange(6) < 3
    found = three_facts(batch, verbose, ~verbose, parts=parts, rng=np.random.default_rng(0))["all"]
    names = ("reward", "kl", "baseline", "shift")
    for side in ("verbose", "concise", "gap"):
        means = [
            found.intervals[f"{k}_part"][side].mean for k in names if getattr(parts, k) is not None
        ]
        assert sum(means) == pytest.approx(found.intervals["advantage"][side].mean, abs=1e-9)
    nats = (r.logprobs - r.ref_logprobs).sum(1)
    assert found.intervals["kl"]["verbose"].mean == pytest.approx(nats[:3].mean().item())


# --- push -------------------------------------------------------------------------------------


def small_run(seed: int = 0, **settings: Any) -> tuple[PPO, Rollout, AdvantageParts]:
    """A run of a real Transformer in float64, a batch it sampled, and the batch's parts."""
    policy, reference = (tiny_model(seed + i, context=12, spread=1.5) for i in (0, 100))
    options = {"batch": 20, "max_new_tokens": 5, "minibatches": 1, "temperature": 1.3, "beta": 0.2}
    config = PPOConfig(**{**options, "lam": 0.9, "max_grad_norm": 0.5, **settings})
    prompts = ragged_batch(seed, batch=8)[0]
    scorer = lambda p, r, m: (r == 3).double().sum(1) - 0.2 * m.sum(1)  # noqa: E731
    run = PPO(policy, reference, scorer, prompts, config, seed=seed)
    batch, _ = run.rollout()
    return run, batch, split(batch, Convention.of(config, beta=run.beta))


def sides(batch: Rollout) -> dict[str, Tensor]:
    first = torch.arange(len(batch)) < 8
    return {"verbose": first, "concise": ~first}


SETTINGS = [
    {},
    {"whiten_advantages": "shift_scale", "clip_style": "book"},
    {"loss_aggregation": "sequence_sum", "value_coef": 1.0, "value_clip": 0.1},
    {"advantage": "rloo", "group": 4},
    {"advantage": "grpo", "group": 2, "loss_aggregation": "sequence_mean"},
    {"kl_place": "loss", "kl_estimator": "k2"},
    {"kl_place": "loss", "kl_estimator": "k3", "kl_aggregation": "token_mean"},
]


@pytest.mark.parametrize("seed", range(21))
def test_push_is_a_real_sgd_step_to_first_order(seed):
    run, batch, parts = small_run(seed, **SETTINGS[seed % len(SETTINGS)])
    before = run.state_dict()
    errors = []
    for lr in (1e-3, 1e-6):
        found = push(run, batch, parts, sides(batch), lr=lr)
        errors.append(max(abs(p.measured / p.total - 1) for p in found.values()))
    assert errors[1] < 0.02 and (errors[1] < errors[0] or errors[0] < 1e-5)
    after = run.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before), "the run is left as it was"


def whole(run: PPO, batch: Rollout, target: Tensor) -> float:
    """<grad log pi, -grad loss>, by two ordinary backward passes, before the clip of gradients."""
    chosen = batch.select(target)
    given = (chosen.prompts, chosen.responses, chosen.mask)
    logp = (
        response_logprobs(run.policy, *given, temperature=run.config.temperature)[0].sum(1).mean()
    )
    weights = list(run.policy.parameters())
    up, down = (torch.autograd.grad(x, weights, allow_unused=True) for x in
                (logp, run.loss(batch)[0]))  # fmt: skip
    dots = [(u * d).sum() for u, d in zip(up, down, strict=True) if u is not None and d is not None]
    return -float(torch.stack(dots).sum())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("moved", [False, True])
def test_pushes_by_part_and_by_class_sum_to_the_whole(settings, moved):
    run, batch, parts = small_run(3, max_grad_norm=1e9, clip=0.05, **settings)
    if moved:  # the ratio is not 1, and some tokens are clipped
        run.optimiser.lr = 0.02
        run.loss(batch)[0].backward()
        run.optimiser.step()
        run.optimiser.zero_grad()
    found = push(run, batch, parts, sides(batch), lr=1.0)
    for name, target in sides(batch).items():
        expected = whole(run, batch, target)
        assert found[name].total == pytest.approx(expected, rel=1e-5, abs=1e-9)
        classes = token_classes(batch)
        table = found[name].by_class(classes)
        for part, x in found[name].parts.items():
            if part != "memory":
                assert sum(table[part].values()) == pytest.approx(x, rel=1e-9, abs=1e-12)


def test_each_part_alone_is_the_surrogate_with_that_part_as_advantage():
    run, batch, parts = small_run(1, max_grad_norm=1e9, value_coef=0.0, clip_style="none")
    target = sides(batch)["verbose"]
    found = push(run, batch, parts, {"verbose": target}, lr=1.0)["verbose"]
    classes = token_classes(batch)
    table = found.by_class(classes)
    for name in ("reward", "kl", "baseline"):
        alone = replace(batch, advantages=getattr(parts, name))
        assert found.parts[name] == pytest.approx(whole(run, alone, target), rel=1e-7)
        for i, kind in enumerate(CLASSES):
            some = replace(batch, advantages=torch.where(classes == i, getattr(parts, name), 0.0))
            expected = whole(run, some, target)
            assert table[name][kind] == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_push_of_an_answer_that_is_not_in_the_batch_and_of_float32():
    run, batch, parts = small_run(2)
    responses = torch.tensor([[3, 1, 0], [4, 4, 1]])
    given = (batch.prompts[:2], responses, torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    found = push(run, batch, parts, {"pair": given}, lr=1e-6)["pair"]
    assert found.measured == pytest.approx(found.total, rel=0.02)
    single = copy.deepcopy(run.policy).float()
    other = PPO(single, tiny_model(100, vocab=5, context=12).float(), run.reward_model, run.prompts,
                replace(run.config, max_grad_norm=1e9))  # fmt: skip
    target = sides(batch)["verbose"]
    again = push(other, batch.to(torch.float32), parts, {"v": target}, lr=1.0)["v"]
    scale = sum(abs(x) for x in again.parts.values())
    assert again.total == pytest.approx(
        whole(other, batch.to(torch.float32), target), abs=1e-5 * scale
    )


def test_push_is_the_same_on_two_cores():
    run, batch, parts = small_run(6)
    one = push(run, batch, parts, sides(batch), lr=1e-3)["verbose"]
    try:
        compute.use(2)
        two = push(run, batch, parts, sides(batch), lr=1e-3)["verbose"]
    finally:
        compute.use(1)
    assert one.parts == two.parts and one.measured == two.measured


def test_push_under_adam_with_a_past():
    run, batch, parts = small_run(4)
    for lr in (1e-6, 1e-7):  # the second time with moments of its own
        found = push(run, batch, parts, sides(batch), optimiser="adam", lr=lr)["verbose"]
        plain = push(run, batch, parts, sides(batch), lr=lr)["verbose"]
        assert found.total == pytest.approx(found.measured, rel=0.02)
        assert abs(found.total / plain.total - 1) > 0.5, "Adam's step is another one"
        assert (found.memory != 0) == (run.optimiser.steps > 0)
        run.step()
    twin_of = run.copy()
    assert torch.equal(twin_of.optimiser.mean, run.optimiser.mean)


def test_rows_without_a_token_push_nothing():
    run, batch, _ = small_run(5)
    empty = torch.zeros_like(batch.mask)
    empty[:2] = batch.mask[:2]
    cut = logged(replace(batch, mask=batch.mask & ~empty), run.config)
    cut_parts = split(cut, Convention.of(run.config))
    found = push(run, cut, cut_parts, {"rest": torch.arange(20) > 0}, lr=1e-6)["rest"]
    assert found.measured == pytest.approx(found.total, rel=0.02)
    assert not any(x[:2].any() for x in found.tokens.values())


def test_token_classes_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    stop = torch.tensor([[0.01, 0.5, 0.99, 0.9], [0.25, 0.5, 0.5, 0.5]]).log()
    r = replace(fake_rollout(0, mask=mask), ref_eos_logprobs=stop.double(),
                finished=torch.tensor([True, False]))  # fmt: skip
    assert [[CLASSES[i] if i >= 0 else "-" for i in row] for row in token_classes(r)] == [
        ["filler", "fork", "filler", "eos"],
        ["fork", "fork", "-", "-"],  # cut at the cap: its last token is no EOS
    ]
    model = tiny_model(0)
    entropy = reference_entropy(model, r)
    assert entropy.shape == mask.shape and not entropy[~mask].any()
    probs = model(torch.cat([r.prompts, r.responses], 1))[0][:, 1].softmax(-1)
    torch.testing.assert_close(entropy[:, 0], torch.distributions.Categorical(probs).entropy())
    assert (token_classes(r, 10 * mask) == torch.tensor([[0, 0, 0, 3], [0, 0, -1, -1]])).all()


# --- what if ----------------------------------------------------------------------------------


def test_another_beta_is_what_the_run_would_have_made_with_it():
    batch = logged(fake_rollout(0), CONFIG)
    found = what_if(batch, Convention.of(CONFIG), beta=1.7)
    expected = logged(fake_rollout(0), replace(CONFIG, beta=1.7)).advantages
    torch.testing.assert_close(found.advantages, expected, rtol=1e-12, atol=1e-12)
    assert found.exact and found.why.startswith("exact for this batch")


def test_a_critic_fitted_again_absorbs_the_cost_of_kl():
    """KL that depends on the prompt alone is taken by the baseline whole: no advantage moves."""
    r = fake_rollout(0, mask=torch.ones(6, 1, dtype=torch.bool))
    nats = torch.tensor([1.0, 1, 1, 4, 4, 4])[:, None].double()
    r = replace(r, logprobs=nats, ref_logprobs=0 * nats)
    c = replace(PLAIN, beta=0.1)
    before, frozen = split(r, c), what_if(r, c, beta=0.5)
    torch.testing.assert_close(frozen.advantages - before.total, -0.4 * nats)
    fitted = what_if(r, c, beta=0.5, features=1e3 * nats)
    torch.testing.assert_close(fitted.advantages, before.total, rtol=0, atol=1e-6)
    assert fitted.figures["absorbed"] == pytest.approx(1.0) and not fitted.exact
    assert fitted.why.startswith("approximate")
    torch.testing.assert_close(fitted.parts.kl, frozen.parts.kl)  # the cost is there all the same
    # within a prompt nothing can be absorbed: deviations act, features or not
    mixed = replace(r, logprobs=torch.tensor([0.0, 2, 0, 2, 0, 2])[:, None].double())
    same = torch.ones(6, 1).double()
    moved = what_if(mixed, c, beta=0.5, features=same).advantages - split(mixed, c).total
    expected = torch.tensor([0.4, -0.4] * 3, dtype=torch.float64)[:, None]
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-9)


def test_at_the_same_settings_a_fitted_critic_is_the_logged_one():
    run, batch, parts = small_run(0)
    features = response_states(run.policy, batch.prompts, batch.responses, batch.mask).detach()
    found = what_if(batch, Convention.of(run.config), features=features)
    torch.testing.assert_close(found.advantages, parts.total, rtol=0, atol=1e-12)
    other = what_if(batch, Convention.of(run.config), beta=0.9, features=features)
    assert 0 < other.figures["absorbed"] < 1


def test_another_reward_model_and_another_baseline():
    run, batch, _ = small_run(1, missing_eos_penalty=2.0)
    c = Convention.of(run.config)
    longer = rescored(batch, lambda p, r, m: m.sum(1).double(), c)
    assert batch.finished is not None and not batch.finished.all()
    assert torch.equal(longer, batch.lengths - 2.0 * ~batch.finished)
    found = what_if(batch, c, scores=longer)
    bare = replace(batch, scores=longer)
    torch.testing.assert_close(found.advantages, logged(bare, run.config).advantages)
    blind = what_if(
        batch, c, values=torch.zeros_like(batch.values), whiten_advantages="none", lam=1.0
    )
    assert not blind.parts.baseline.any() and blind.exact
    assert "given values" in blind.why and "the same critic" in found.why
    grouped_ = logged(grouped(0), CONFIG)
    rloo = what_if(grouped_, Convention.of(CONFIG), advantage="rloo").advantages
    expected = logged(grouped(0), replace(CONFIG, advantage="rloo")).advantages
    torch.testing.assert_close(rloo, expected)


def test_another_epsilon_takes_the_real_update_again():
    run, batch, parts = small_run(2, epochs=4, lr=0.02, minibatches=2, max_grad_norm=1e9)
    before = run.state_dict()
    shares = []
    for clip in (0.01, 0.2, 0.99):
        found = what_if_clip(batch, parts, replace(run.config, clip=clip), run=run)
        assert found.exact and "taken again" in found.why
        shares.append(found.figures["cut_share"])
    assert shares[0] > shares[1] > shares[2]
    after = run.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    real = run.copy()
    metrics = real.update(batch)
    again = what_if_clip(batch, parts, run.config, run=run)
    assert metrics.items() <= again.figures.items(), "at its own epsilon: the update itself"


def test_clipped_weights_by_hand():
    r = fake_rollout(0, mask=torch.ones(1, 4, dtype=torch.bool))
    zeros = torch.zeros_like(r.logprobs)
    parts = AdvantageParts(torch.tensor([[2.0, 2, -2, -2]]).double(), zeros - 0.5, zeros)
    r = replace(r, logprobs=zeros, advantages=parts.total)
    ratio = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).double()
    found = what_if_clip(r, parts, CONFIG, logprobs=ratio.log())
    assert found.parts.reward[0].tolist() == pytest.approx([0, 1.0, -3.0, 0])
    assert found.parts.kl[0].tolist() == pytest.approx([0, -0.25, -0.75, 0])
    assert found.figures["cut_share"] == 0.5
    book = what_if_clip(r, parts, replace(CONFIG, clip_style="book"), logprobs=ratio.log())
    assert book.parts.reward[0].tolist() == pytest.approx([0, 1.0, 0, -1.0])


# --- what cannot be taken apart ---------------------------------------------------------------


def test_a_clamp_of_zero_charges_nothing():
    rollout = fake_rollout(0)
    bound = replace(Convention.of(CONFIG), clamp=0.0)
    assert charged_kl(rollout, replace(bound, clamp=None)).abs().max() > 0.1
    assert not charged_kl(rollout, bound).any()
    assert not split(rollout, bound).kl.any()


def test_bad_batches_are_answered_with_one_sentence():
    r = fake_rollout(0)
    c = Convention.of(CONFIG)
    run, batch, parts = small_run(0)
    someone = torch.arange(6) < 3
    rng = np.random.default_rng(0)
    none = torch.zeros(20, dtype=torch.bool)
    cases = [
        (lambda: split(replace(r, values=None), c), "has no values: log it"),
        (
            lambda: split(replace(r, ref_logprobs=None, scores=None), c),
            "no ref_logprobs and no sco",
        ),
        (lambda: split(replace(r, mask=r.mask & False), c), "its mask is all False"),
        (lambda: split(r, replace(c, advantage="rloo", group=3)), "answer different prompts"),
        (lambda: split(r, replace(c, advantage="grpo", group=2, batch=4)), "different prompts"),
        (lambda: split(replace(r, values=r.values * torch.nan), c), "'values' holds NaN"),
        (lambda: reconcile(r, c), "no kl and no rewards and no advantages and no returns"),
        (lambda: three_facts(r, someone, ~someone, rng=rng), "has no advantages"),
        (lambda: three_facts(r, someone, someone & False, rng=rng), "or none is concise"),
        (lambda: push(run, batch, parts, {"x": none}), "target 'x' has no answer with a token"),
        (lambda: push(run, batch, split(batch, replace(c, beta=1.0)), {}), "these parts miss"),
        (lambda: push(run, replace(batch, returns=None), parts, {}), "has no returns"),
        (lambda: token_classes(r), "has no ref_eos_logprobs"),
        (lambda: rescored(r, run.reward_model, c), "has no finished"),
        (lambda: what_if(r, replace(c, kl_place="loss"), beta=0.1), "kl_place loss no advantage"),
        (lambda: what_if(grouped(0), c, advantage="rloo", features=r.mask), "no critic that could"),
        (lambda: what_if(r, c, lam=2.0), "ppo.lam is 2.0"),
        (lambda: what_if_clip(batch, parts, run.config), "the ratio is 1 on every token"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
