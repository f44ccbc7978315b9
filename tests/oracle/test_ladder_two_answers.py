"""L0 and L1 in full (slow): PPO on a real Transformer ends where the closed forms say.

Every row goes into docs/ladder.md. Acceptance: at most .02 from two_answer for KL in the reward
(k1) and k2 in the loss, .03 for k3 and the rest, above .98 where a run must run away.
"""

import itertools
import math

import pytest
import torch
from fakes_bandit import (
    LONG,
    SHORT,
    bandit,
    fork_reference,
    fork_run,
    fork_share,
    kl_gradients,
    refreshed,
    settle,
    whole_batches,  # noqa: F401
)

from minirlhf.oracle.chain import ForkChain
from minirlhf.oracle.closed_form import (
    clip_steps,
    kl_pull,
    largest_drift,
    moving_reference,
    two_answer,
    two_answer_end,
)
from minirlhf.oracle.pocket import verbose_share

pytestmark = pytest.mark.slow
GRID = [*itertools.product((0.02, 0.1, 0.5), (0.1, 0.3), (0.05, 0.1, 0.2, 0.4))]
GRID += [(0.001, 0.6, 0.1), (0.3, -0.2, 0.1), (0.9, 0.3, 0.1), (0.6, -0.1, 0.05)]


def setting(p0, gap, beta, more=""):
    return f"p0 {p0}, gap {gap} sd, beta {beta}{more and ', ' + more}"


def assert_held(ladder, section, cases, tolerance, patient=False):
    """Train each (p0, gap, beta, what, options, known) and record it; assert that all held."""
    held = []
    for seed, (p0, gap, beta, what, options, known) in enumerate(cases):
        predicted = float(two_answer_end(p0, gap, beta, **known))
        phases = LONG if patient and gap / beta > 2 else SHORT  # a long way to go
        found = settle(bandit(p0, gap, beta, seed, **options), phases)
        name = setting(p0, gap, beta, what)
        if predicted in (0.0, 1.0):  # nothing stops it: what counts is that it goes all the way
            good = found > 0.98 if predicted == 1.0 else found < 0.02
            words = "runs away to 1 (> .98)" if predicted == 1.0 else "runs away to 0 (< .02)"
            held.append(ladder.add(section, name, words, found, held=good, seed=seed))
        else:
            held.append(ladder.add(section, name, predicted, found, tolerance, seed=seed))
    assert all(held)


@pytest.mark.parametrize(
    "section, options, known",
    [
        ("L0a end points: k1 in the reward", {}, {}),
        (
            "L0b end points: k2 in the loss",
            {"kl_place": "loss", "kl_estimator": "k2"},
            {"place": "loss", "estimator": "k2"},
        ),
    ],
)
def test_end_points_of_the_two_right_penalties(ladder, section, options, known):
    for case in GRID:
        assert float(two_answer_end(*case, **known)) == pytest.approx(float(two_answer(*case)))
    assert_held(ladder, section, [(*case, "", options, known) for case in GRID], 0.02, True)


def test_the_books_penalty_ends_at_one_whatever_beta_is(ladder):
    options, known = {"kl_place": "book_literal"}, {"place": "book_literal"}
    cases = [(0.02, 0.3, b, "", options, known) for b in (0.05, 0.2, 1.0)]
    cases += [(0.02, 0.3, b, "4 epochs", options | {"epochs": 4}, known) for b in (0.05, 1.0)]
    cases += [(0.02, 0.3, 1.0, "book clip", options | {"clip_style": "book"}, known)]
    assert_held(ladder, "L0c the book's literal penalty", cases, 0.02)


def test_k3_ends_at_its_own_equilibrium_or_runs_away(ladder):
    loss = {"kl_place": "loss", "kl_estimator": "k3"}, {"place": "loss", "estimator": "k3"}
    reward = {"kl_estimator": "k3"}, {"estimator": "k3"}
    ends = [(0.1, 0.2), (0.02, 0.15), (0.01, 0.4), (0.3, 0.05), (0.01, 0.8), (0.3, -0.2)]
    cases = [(p0, gap, 0.1, "k3 in the loss", *loss) for p0, gap in ends]
    ends = [(0.1, 0.04), (0.01, 0.2), (0.1, 0.1), (0.01, 0.3), (0.5, 0.05), (0.3, -0.05)]
    cases += [(p0, gap, 0.1, "k3 in the reward", *reward) for p0, gap in ends]
    cases += [(0.1, 0.1, 0.1, "k2 in the reward", {"kl_estimator": "k2"}, {"estimator": "k2"})]
    assert_held(ladder, "L0d k3 (and k2 in the reward)", cases, 0.03)


def test_what_scaling_does_to_the_end(ladder):
    cases = []
    for beta in (0.2, 0.5, 1.0):
        given = {"whiten_rewards": "scores"}, {"scale": "scores"}
        cases.append((0.02, 0.3, beta, "scores over their sd, then KL", *given))
    cases.append((0.05, 0.1, 0.05, "score and KL over their sd", {"whiten_rewards": "rewards"}, {}))
    moves = {"whiten_advantages": "shift_scale"}
    cases.append((0.05, 0.1, 0.05, "advantages whitened, mean shifted", moves, {}))
    for group, gap in ((4, 0.1), (8, 0.1), (8, 0.02)):
        options = {"advantage": "grpo", "group": group, "kl_place": "loss", "kl_estimator": "k3"}
        known = {"place": "loss", "estimator": "k3", "scale": "advantages", "group": group}
        cases.append((0.05, gap, 0.2, f"GRPO, groups of {group}, k3 in the loss", options, known))
    for kind in ("grpo", "rloo"):
        options = {"advantage": kind, "group": 8}
        cases.append((0.05, 0.1, 0.05, f"{kind.upper()}, k1 in the reward", options, {}))
    assert_held(ladder, "L0e scaling", cases, 0.03)


def test_clip_and_epochs_change_the_speed_not_the_end(ladder):
    cases = [(0.05, 0.1, 0.05, "no clip, 1 epoch", {"clip_style": "none"}, {})]
    for clip, epochs in ((0.1, 4), (0.3, 4), (0.2, 8)):
        options = {"clip": clip, "epochs": epochs}
        cases.append((0.05, 0.1, 0.05, f"clip {clip}, {epochs} epochs", options, {}))
    assert_held(ladder, "L0f clip", cases, 0.02)
    # Adam's momentum carries p a little past the bound: the less, the smaller its steps
    sides = {"verbose and concise": {"advantage": "rloo", "group": 8}}
    sides["verbose alone"] = {"value_coef": 0.0}  # a critic of 0: the concise ones have A = 0
    held = []
    for (p0, clip), (side, options) in itertools.product(((0.3, 0.2), (0.1, 0.2)), sides.items()):
        long = {"epochs": 1200, "lr": 2e-5, "batch": 512, "clip": clip} | options
        run = bandit(p0, 1.0, 0.0, kl_place="none", **long)
        run.step()
        bound = (1 + clip) * p0 if "value_coef" in options else 1 - (1 - clip) * (1 - p0)
        name = f"one iteration of 1200 epochs, p0 {p0}, clip {clip}, {side} push: p"
        held.append(ladder.add("L0f clip", name, bound, verbose_share(run.policy), 0.02))
        assert clip_steps(p0, bound - 1e-9, clip, verbose_only="value_coef" in options) == 1
    assert all(held)


@pytest.mark.parametrize("seed", range(5))
def test_sampled_gradient_of_the_kl_term(ladder, seed):
    """(c): k1 in the loss has no expected gradient; the interval of the others is away from 0."""
    held = []
    for place, estimator in itertools.product(("reward", "loss"), ("k1", "k2", "k3")):
        found = kl_gradients(place, estimator, seed=seed, n=100_000)
        mean, se = found.mean().item(), found.std().item() / math.sqrt(len(found))
        exact = 0.21 * float(kl_pull(0.3, 0.01, place=place, estimator=estimator))
        zero = (place, estimator) == ("loss", "k1")
        good = abs(mean - exact) < 4 * se and (abs(mean) < 4 * se) is zero  # 30 draws in all
        name = f"{estimator} in the {place}, p .3, p0 .01, 100 000 samples"
        section = "L0g expected gradient of the KL term in logit p"
        held.append(
            ladder.add(
                section,
                name,
                exact,
                mean,
                f"4 se = {4 * se:.3f}",
                held=good,
                seed=seed,
                how="sampled",
            )
        )
    assert all(held)


def test_the_briefest_prompts_do_not_drift_most_but_those_near_the_formula(ladder):
    """(e): the peak of p - p0 over a grid of p0 is within one bin of 1 / (1 + exp(k / 2))."""
    grid, held = [0.005, 0.02, 0.05, 0.12, 0.27, 0.5, 0.8], []
    for gap, beta in ((0.2, 0.1), (0.2, 0.05), (0.3, 0.05)):
        moved = [settle(bandit(p0, gap, beta, i)) - p0 for i, p0 in enumerate(grid)]
        peak = max(range(len(grid)), key=moved.__getitem__)
        where = float(largest_drift(gap, beta))
        nearest = min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / where)))
        name = f"gap {gap} sd, beta {beta}: p0 of the largest drift"
        held.append(
            ladder.add(
                "L0h drift against p0", name, where, grid[peak], "one bin",
                held=abs(peak - nearest) <= 1, seed="0-6",
            )
        )  # fmt: skip
        name = f"gap {gap} sd, beta {beta}: the drift there"
        exact = float(two_answer(grid[peak], gap, beta)) - grid[peak]
        held.append(ladder.add("L0h drift against p0", name, exact, moved[peak], 0.02, seed="0-6"))
    assert all(held)


def test_the_staircase_of_a_moving_reference(ladder):
    """(f): every refresh multiplies the odds by exp(k) anew."""
    held = []
    for p0, gap, beta, rounds in ((0.01, 0.2, 0.1, 5), (0.05, 0.1, 0.1, 4)):
        stairs = moving_reference(p0, gap, beta, rounds).tolist()
        for n, (want, got) in enumerate(zip(stairs, refreshed(p0, gap, beta, rounds), strict=True)):
            name = setting(p0, gap, beta, f"round {n + 1}")
            held.append(ladder.add("L0i moving reference", name, want, got, 0.02, seed=n))
    assert all(held)


def test_the_fork_chain_on_a_transformer(ladder):
    """30-token answers: L0's p*, a flat critic with lambda .95, gamma .95, and KL per token."""
    reference = fork_reference()
    p0 = fork_share(reference)
    flat = {"lam": 0.95, "value_coef": 0.0}  # the critic says 0 for ever
    mean, equal = {"kl_aggregation": "token_mean"}, ForkChain(p0, 0.3, 0.05, short=30)
    cases = [
        ("L0's p*", 0.3, 0.1, {}, float(two_answer(p0, 0.3, 0.1))),
        ("flat critic, lambda .95", 0.3, 0.05, flat, equal.end(critic="flat", lam=0.95)),
        ("KL as a mean over tokens", 0.3, 1.0, mean,
         ForkChain(p0, 0.3, 1.0, aggregation="token_mean").end()),
        ("gamma .95", 0.3, 0.05, {"gamma": 0.95}, equal.end(gamma=0.95)),
    ]  # fmt: skip
    held = []
    for what, gap, beta, options, predicted in cases:
        run = fork_run(reference, gap, beta, **options)
        found = settle(run, SHORT, fork_share)
        name = setting(f"{p0:.3f}", gap, beta, what)
        held.append(ladder.add("L1a fork chain, 30 tokens", name, predicted, found, 0.03))
        if what == "L0's p*":
            rollout, _ = run.rollout()
            kl = torch.where(rollout.mask, rollout.logprobs - rollout.ref_logprobs, 0.0)
            share = float(kl[:, 0].sum() / kl.sum())
            name = "share of the answers' KL that is paid at the fork"
            held.append(ladder.add("L1a fork chain, 30 tokens", name, 1.0, share, 0.05))
    assert all(held)


def test_credit_along_the_chain(ladder):
    """The toy's signs and counts (exact): p0 .02, p .1, gap .3 sd, beta .05, 30 tokens."""
    chain, held = ForkChain(0.02, 0.3, 0.05), []
    exact = {("flat", 1.0): (0.194, 30), ("flat", 0.95): (-0.019, 29), ("flat", 0.0): (-0.080, 1)}
    exact |= {("exact", lam): (0.194, 1) for lam in (1.0, 0.95, 0.0)}
    for (critic, lam), (fork, positive) in exact.items():
        verbose = chain.advantages(0.1, critic=critic, lam=lam)[0]
        count = int((verbose > 1e-9).sum())
        name, section = f"{critic} critic, lambda {lam}", "L1b credit along 30 tokens"
        rows = ((": A at the fork", fork, float(verbose[0]), 5e-4),)
        rows += ((": tokens with A > 0", positive, count, 0),)
        held += [ladder.add(section, name + what, *row, how="exact") for what, *row in rows]
    assert all(held)
