"""The critic's first fit: a planted value is found, an independent solver agrees, nothing moves."""

import copy

import numpy as np
import pytest
import torch
from fakes import tiny_model

from minirlhf import critic
from minirlhf.critic import fit_critic, ridge
from minirlhf.model import response_outputs, response_states
from minirlhf.ppo import PPO, PPOConfig

PROMPTS = torch.tensor([[0, 3, 2], [4, 3, 2], [0, 4, 2]])
CONFIG = PPOConfig(batch=32, minibatches=1, max_new_tokens=6)


def run_of(seed: int = 0, dtype: torch.dtype = torch.float64) -> PPO:
    reference = tiny_model(seed, dtype=dtype)
    # the score depends on prompt and length, so that there is something to expect
    return PPO(
        copy.deepcopy(reference),
        reference,
        lambda prompts, responses, mask: (prompts[:, 0] + mask.sum(1)).to(dtype),
        PROMPTS,
        CONFIG,
        seed=1,
    )


def recorded(run: PPO) -> list:
    """Every rollout that `run` hands out from now on."""
    seen, draw = [], run.rollout

    def rollout():
        seen.append(draw())
        return seen[-1]

    run.rollout = rollout  # pyright: ignore[reportAttributeAccessIssue]
    return seen


def test_a_planted_linear_value_is_recovered(monkeypatch):
    """Returns that are exactly linear in the states: the head reproduces them, R^2 is 1."""
    monkeypatch.setattr(critic, "RIDGE", 1e-13)
    run = run_of()
    g = torch.Generator().manual_seed(5)
    weight, draw = torch.randn(run.policy.config.d_model, generator=g).double(), run.rollout

    def planted():
        rollout, seconds = draw()
        given = (rollout.prompts, rollout.responses, rollout.mask)
        with torch.no_grad():
            flat = response_states(run.policy, *given) @ weight + 0.7
        value = torch.zeros(rollout.mask.shape, dtype=torch.float64)
        value[rollout.mask] = flat
        after = torch.cat([value[:, 1:], torch.zeros(len(value), 1)], 1)
        fields = {**rollout.tensors(), "rewards": torch.where(rollout.mask, value - after, 0.0)}
        return type(rollout)(**fields), seconds

    run.rollout = planted  # pyright: ignore[reportAttributeAccessIssue]
    assert fit_critic(run, batches=3) == pytest.approx(1.0, abs=1e-6)
    rollout, _ = planted()
    assert rollout.rewards is not None
    given = (rollout.prompts, rollout.responses, rollout.mask)
    with torch.no_grad():
        _, values = response_outputs(run.policy, *given)
    returns = rollout.rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(values, returns * rollout.mask, rtol=0, atol=1e-4)


def test_the_fit_is_weighted_ridge_regression_by_another_solver():
    """Least squares on stacked rows, an answer counting once however long it is."""
    run = run_of()
    seen = recorded(run)
    explained = fit_critic(run, batches=2)
    x, y, w = [], [], []
    for rollout, _ in seen:
        for row in range(len(rollout)):
            one = rollout.select(torch.tensor([row]))
            assert one.rewards is not None
            with torch.no_grad():
                x += response_states(run.policy, one.prompts, one.responses, one.mask).tolist()
            n = int(one.lengths)
            rewards = one.rewards[0, :n].tolist()
            y += [sum(rewards[t:]) for t in range(n)]
            w += [1 / n] * n
    design = np.hstack([np.array(x), np.ones((len(x), 1))])
    y, w = np.array(y), np.array(w) / sum(w)
    root = np.sqrt(w)[:, None]
    penalty = np.sqrt(critic.RIDGE) * np.eye(design.shape[1])
    rows = np.vstack([root * design, penalty])
    found, *_ = np.linalg.lstsq(rows, np.hstack([root[:, 0] * y, 0 * penalty[0]]), rcond=None)
    head = run.policy.scalar
    assert head.weight[0].tolist() == pytest.approx(found[:-1].tolist(), abs=1e-6)
    assert head.bias.tolist() == pytest.approx([found[-1]], abs=1e-6)
    left = (w * (design @ found - y) ** 2).sum() / (w * (y - (w * y).sum()) ** 2).sum()
    assert explained == pytest.approx(1 - left, abs=1e-6) and explained > 0.1


@pytest.mark.parametrize("shrink_mean", [True, False])
def test_ridge_is_least_squares_on_stacked_rows(shrink_mean):
    """A penalty is one more row of data, sqrt(RIDGE) times a coefficient, that should be 0."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5))
    y = x @ rng.normal(size=5) + 3 + rng.normal(size=40)  # a mean that shrinking would move
    w = rng.exponential(size=40) ** 2
    design = np.hstack([x, np.ones((40, 1))])
    root = np.sqrt(w / w.sum())
    penalty = np.sqrt(critic.RIDGE) * np.eye(6)
    if not shrink_mean:
        penalty = penalty[:-1]
    rows = np.vstack([root[:, None] * design, penalty])
    expected, *_ = np.linalg.lstsq(rows, np.hstack([root * y, np.zeros(len(penalty))]), rcond=None)
    given = [torch.from_numpy(a) for a in (x, y, w)]
    found = ridge(*given, shrink_mean=shrink_mean)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-10)
    # only the weights' proportions count
    again = ridge(given[0], given[1], 7 * given[2], shrink_mean=shrink_mean)
    assert again.tolist() == pytest.approx(expected.tolist(), rel=1e-10)


def test_ridge_leaves_a_mean_alone_that_it_does_not_shrink():
    """Features around 0 say nothing of the mean: it is the weighted mean of y, or less of it."""
    x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]], dtype=torch.float64)
    y = torch.tensor([4.0, 4.0, 10.0, 10.0], dtype=torch.float64)
    w = torch.tensor([2.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    assert ridge(x, y, w, shrink_mean=False).tolist() == pytest.approx([0, 6])
    assert ridge(x, y, w, shrink_mean=True).tolist() == pytest.approx([0, 6 / (1 + critic.RIDGE)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_policy_does_not_move_by_a_bit(dtype):
    run = run_of(dtype=dtype)
    before = copy.deepcopy(run.policy)
    seen = recorded(run)
    fit_critic(run, batches=2)
    rollout, _ = seen[0]
    given = (rollout.prompts, rollout.responses, rollout.mask)
    with torch.no_grad():
        (was, old), (now, new) = (response_outputs(m, *given) for m in (before, run.policy))
    assert torch.equal(was, now) and not torch.equal(old, new)
    kept = {k: v for k, v in before.state_dict().items() if not k.startswith("scalar.")}
    assert all(torch.equal(run.policy.state_dict()[k], v) for k, v in kept.items())
    assert len(seen) == 2 and run.steps == 0 and new.dtype == dtype


def test_the_first_step_starts_from_a_smaller_value_loss():
    """The point of it all: PPO's own first step meets returns that it already half expects."""
    losses = []
    for fit in (False, True):
        run = run_of()
        if fit:
            fit_critic(run, batches=4)
        losses.append(run.step().metrics["value/loss"])
    assert losses[1] < 0.7 * losses[0]


def test_same_seed_same_head():
    heads = []
    for _ in range(2):
        run = run_of()
        fit_critic(run, batches=2)
        heads.append(run.policy.scalar.weight)
    assert torch.equal(*heads)
