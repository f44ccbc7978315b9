"""Where the critic starts: a linear read-out of the reference, fitted before the first step.

A critic that starts at 0 calls every answer to an easy prompt "better than expected" for dozens
of steps. The policy's own final states already tell prompts apart, so ridge regression of the
returns of a few rollouts on them gives a sensible start in closed form, without moving a weight
that the policy uses. Left out: training a critic of its own.

Source: pretraining the value model as in Yuan et al. (2025, arXiv 2503.01491, section 3.2); the
closed form is ours.
"""

import torch

from minirlhf.model import response_states
from minirlhf.ppo import PPO

RIDGE = 0.1  # strong: the read-out should tell prompts apart rather than follow each token


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
    w = w / w.sum()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    gram = x.T @ (w[:, None] * x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)
    solution = torch.linalg.solve(gram, x.T @ (w * y))
    head = run.policy.scalar
    head.weight.copy_(solution[:-1][None])
    head.bias.copy_(solution[-1:])
    spread = (w * (y - (w * y).sum()).square()).sum()
    return 1 - float((w * (x @ solution - y).square()).sum() / spread)
