"""Where the critic starts: a linear read-out of the reference, fitted before the first step.

A critic that starts at 0 calls every answer to an easy prompt "better than expected" for dozens
of steps. The policy's own final states already tell prompts apart, so ridge regression of the
returns of a few rollouts on them gives a sensible start in closed form, without moving a weight
that the policy uses. Left out: training a critic of its own.

Source: pretraining the value model as in Yuan et al. (2025, arXiv 2503.01491, section 3.2); the
closed form is ours.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from minirlhf.model import response_states
from minirlhf.ppo import PPO

RIDGE = 0.1  # strong: the read-out should tell prompts apart rather than follow each token


def ridge(
    features: Float[Tensor, "N F"],
    y: Float[Tensor, " N"],
    weights: Float[Tensor, " N"],
    *,
    shrink_mean: bool,
) -> Float[Tensor, " F+1"]:
    """Weighted ridge regression of y [N] on features [N, F] and a constant: [F + 1], it last.

    Minimises the weighted mean of squared errors plus RIDGE times the squared coefficients, of
    which the constant is one if `shrink_mean`.
    """
    share = weights / weights.sum()
    constant = torch.ones_like(features[:, :1])
    design = torch.cat([features, constant], 1)
    penalty = torch.full_like(design[0], RIDGE)
    if not shrink_mean:
        penalty[-1] = 0.0
    # where the gradient is 0: (X' W X + penalty) b = X' W y
    gram = design.T @ (share[:, None] * design) + penalty.diag()
    return torch.linalg.solve(gram, design.T @ (share * y))


@torch.no_grad()
def fit_critic(run: PPO, *, batches: int = 6) -> float:
    """Set the scalar head of run.policy; returns the share of the returns' variance it explains.

    Draws `batches` rollouts from `run` (its generator moves on) and learns from none of them.
    The returns are the undiscounted sums of the rewards still to come, in reward sd.
    """
    states = []
    returns = []
    weights = []
    for _ in range(batches):
        rollout, _ = run.rollout()
        mask = rollout.mask
        assert rollout.rewards is not None
        read = response_states(run.policy, rollout.prompts, rollout.responses, mask)
        to_come = rollout.rewards.flip(1).cumsum(1).flip(1)
        # an answer counts once, or the long ones would decide the fit
        share = 1 / rollout.lengths[:, None].expand_as(mask)
        # in float64: the normal equations square the condition number of the states
        states.append(read.cpu().double())
        returns.append(to_come[mask].cpu().double())
        weights.append(share[mask].cpu().double())
    x = torch.cat(states)
    y = torch.cat(returns)
    w = torch.cat(weights)

    solution = ridge(x, y, w, shrink_mean=True)
    head = run.policy.scalar
    head.weight.copy_(solution[:-1][None])
    head.bias.copy_(solution[-1:])

    # R^2 of the fit, weighted as the fit is
    w = w / w.sum()
    mean = (w * y).sum()
    spread = (w * (y - mean).square()).sum()
    error = x @ solution[:-1] + solution[-1] - y
    return 1 - float((w * error.square()).sum() / spread)
