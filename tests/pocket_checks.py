"""What the fast and the slow tests of the pocket desk share."""

from copy import deepcopy
from dataclasses import replace
from statistics import NormalDist

import torch
from torch import Tensor

from minirlhf.critic import fit_critic
from minirlhf.model import Transformer
from minirlhf.oracle.pocket import Pocket, settings
from minirlhf.ppo import PPO, PPOConfig, price_and_credit
from minirlhf.text import EOS

OBJECTIVES = [
    {"kl_place": place, "kl_estimator": estimator, "kl_aggregation": aggregation}
    for place, estimators in (
        ("reward", ("k1", "k2", "k3")),
        ("loss", ("k1", "k2", "k3")),
        ("book_literal", ("k1",)),
        ("none", ("k1",)),
    )
    for estimator in estimators
    for aggregation in ("sequence_sum", "token_mean")
]


def name(objective: dict[str, str]) -> str:
    return "-".join(value for value in objective.values())


def started(desk: Pocket, config: PPOConfig, seed: int) -> PPO:
    """A run from the desk's reference, its critic fitted where it has one."""
    policy = deepcopy(desk.reference)
    run = PPO(policy, desk.reference, desk.score, desk.prompts, config, seed=seed)
    if config.advantage == "gae":
        fit_critic(run)
    return run


def moved(desk: Pocket, size: float, seed: int = 5) -> Transformer:
    """The reference with noise on its matrices: a policy that stands somewhere else."""
    g = torch.Generator().manual_seed(seed)
    policy = deepcopy(desk.reference).requires_grad_(True)
    with torch.no_grad():
        for p in policy.parameters():
            if p.dim() > 1:
                p.add_(torch.randn(p.shape, generator=g) * size * p.std())
        policy.scalar.weight.copy_(torch.randn(policy.scalar.weight.shape, generator=g) * 0.1)
    return policy


def sampled_gradients(desk, policy, objectives, *, beta: float, batches: int):
    """(objective, ascent directions [batches, weights]) of PPO.loss on the same sampled batches."""
    configs = [settings(beta, value_coef=0.0, batch=256, **o) for o in objectives]
    run = PPO(deepcopy(policy), desk.reference, desk.score, desk.prompts, configs[0], seed=11)
    found: list[list[Tensor]] = [[] for _ in configs]
    for _ in range(batches):
        rollout, _ = run.rollout()
        for rows, config in zip(found, configs, strict=True):
            run.config = config
            run.optimiser.zero_grad()
            run.loss(replace(rollout, **price_and_credit(rollout, config, beta)))[0].backward()
            rows.append(-run.optimiser.grad.double())
    return [(o, torch.stack(rows)) for o, rows in zip(objectives, found, strict=True)]


def farthest(found: Tensor, exact: Tensor, *axes: Tensor, directions: int = 40):
    """How far the mean of found [K, weights] lies from exact, in standard errors: the largest
    over `directions` random ones and the given axes; and the bound below which all of them stay
    with chance 99.9 % (Bonferroni). The critic's head has no gradient here."""
    g = torch.Generator().manual_seed(3)
    random = torch.randn(len(exact), directions, generator=g, dtype=torch.float64)
    every = torch.cat([random, *(a.double()[:, None] for a in axes)], 1)
    along = (found - exact.double()) @ every
    z = along.mean(0) / (along.std(0) / len(found) ** 0.5)
    return float(z.abs().max()), NormalDist().inv_cdf(1 - 0.001 / 2 / every.shape[1])


def gain_within_lengths(desk: Pocket, logprobs: Tensor) -> tuple[Tensor, Tensor]:
    """Proxy gained over the reference, and the gain within answers of as many words, weighted by
    how often both say them (Singhal et al. 2023, arXiv 2310.03716, section 3). Points, exact."""
    words = (desk.mask & (desk.responses != EOS)).sum(-1)
    at = torch.nn.functional.one_hot(words).double()  # (N, lengths)
    p, ref = (x.exp().mean(0) @ at for x in (logprobs, desk.ref))
    earned, before = ((x.exp() * desk.proxy).mean(0) @ at for x in (logprobs, desk.ref))
    return (earned - before).sum(), ((p + ref) / 2 * (earned / p - before / ref)).sum()
