"""Where the critic starts: a linear read-out of the reference, fitted before the first step.

A critic that starts at 0 calls every answer to an easy prompt "better than expected" for dozens
of steps. The policy's own final states already tell prompts apart, so ridge regression of the
returns of a few rollouts on them gives a sensible start in closed form, without moving a weight
that the policy uses. Left out: training a critic of its own.

Source: pretraining the value model as in Yuan et al. (2025, arXiv 2503.01491, section 3.2); the
closed form is ours.
"""

import torch
from torch import Tensor

from minirlhf.model import response_states
from minirlhf.ppo import PPO

RIDGE = 0.1  # strong: the read-out should tell prompts apart rather than follow each token


def ridge(features: Tensor, y: Tensor, weights: Tensor, *, shrink_mean: bool) -> Tensor:
    """Weighted ridge regression of y [N] on features [N, F] and a constant: [F + 1], it last.

    Minimises the weighted mean of squared errors plus RIDGE times the squared coefficients, of
    which the constant is one if `shrink_mean`.
    """
    w = weights / weights.sum()
    x = torch.cat([features, torch.ones_like(features[:, :1])], 1)
    penalty = torch.full_like(x[0], RIDGE)
    if not shrink_mean:
        penalty[-1] = 0.0
    gram = x.T @ (w[:, None] * x) + penalty.diag()
    return torch.linalg.solve(gram, x.T @ (w * y))


@torch.no_grad()
def fit_critic(run: PPO, *, batches: int = 6) -> float:
    """Set the scalar head of run.policy; returns the share of the returns' variance it explains.

    Draws `batches` rollouts from `run` (its generator moves on) and learns from none of them.
    The returns are the undiscounted sums of the rewards still to come, in reward sd.
    """
    states, returns, weights = [], [], []
    for _ in range(batches):
        rollout, _ = run.rollout()
        assert rollout.rewards is not None
        given = (rollout.prompts, rollout.responses, rollout.mask)
        states.append(response_states(run.policy, *given).cpu().double())
        to_come = rollout.rewards.flip(1).cumsum(1).flip(1)
        returns.append(to_come[rollout.mask].cpu().double())
        share = 1 / rollout.lengths[:, None].expand_as(rollout.mask)  # an answer counts once,
        weights.append(share[rollout.mask].cpu().double())  # else long ones decide the fit
    x, y, w = torch.cat(states), torch.cat(returns), torch.cat(weights)
    solution = ridge(x, y, w, shrink_mean=True)
    head = run.policy.scalar
    head.weight.copy_(solution[:-1][None])
    head.bias.copy_(solution[-1:])
    w = w / w.sum()
    spread = (w * (y - (w * y).sum()).square()).sum()
    left = x @ solution[:-1] + solution[-1] - y
    return 1 - float((w * left.square()).sum() / spread)
