"""L1: a chain of tokens with one fork, whose advantages are known exactly.

The first token decides between two answers, filler follows. Everything is in float64. Scalars or
tensors go in and broadcast together; tensors come out.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minirlhf.advantages import gae
from minirlhf.oracle.closed_form import Number, as_double, demand_one_of, rest_point

VERBOSE, CONCISE = 0, 1  # rows of what the methods give


@dataclass(frozen=True)
class ForkChain:
    """L1: token 0 decides; a verbose answer has `steps` tokens, a concise one `short`.

    With short = 1 the fork is "stop or go on", and 1 - p0 is the reference's P(EOS). The score
    comes with the last token, delta_r for verbose and 0 for concise. Filler is not a choice: each
    filler token of the verbose answer costs `filler_kl` nats, 0 where the reference agrees.
    Methods take p [...] and give [..., 2, steps]: row 0 verbose, row 1 concise, 0 past its end.
    """

    p0: float
    delta_r: float
    beta: float
    steps: int = 30
    short: int = 1
    filler_kl: float = 0.0
    place: Literal["reward", "loss"] = "reward"
    """k1 in the reward, or k2 in the loss, token by token"""
    aggregation: Literal["sequence_sum", "token_mean"] = "sequence_sum"

    @property
    def mask(self) -> Tensor:
        """[2, steps], True on the tokens of each answer."""
        return torch.arange(self.steps) < torch.tensor([[self.steps], [self.short]])

    def charges(self, p: Number) -> Tensor:
        """Each token's log-ratio in nats, over the answer's length if aggregated by token_mean."""
        x = as_double("p", p, "between 0 and 1").logit()
        x0 = as_double("p0", self.p0, "between 0 and 1").logit()
        out = torch.full((*x.shape, 2, self.steps), self.filler_kl, dtype=torch.float64)
        out[..., CONCISE, :] = 0.0
        # The fork is the only choice: log(p / p0), and log((1 - p) / (1 - p0)) on the other side.
        out[..., VERBOSE, 0] = logsigmoid(x) - logsigmoid(x0)
        out[..., CONCISE, 0] = logsigmoid(-x) - logsigmoid(-x0)
        if self.aggregation == "token_mean":
            out = out / self.mask.sum(-1, keepdim=True)
        return out

    def rewards(self, p: Number) -> Tensor:
        """Per-token rewards: the score at the end, less beta times the charges (place reward)."""
        charges = self.charges(p)
        out = torch.zeros_like(charges)
        if self.place == "reward":
            out -= self.beta * charges
        out[..., VERBOSE, -1] += self.delta_r
        return out

    def values(self, p: Number, *, critic: str = "exact", gamma: float = 1.0) -> Tensor:
        """The worth of the state before each token, by backward induction.

        V_t = r_t + gamma V_{t+1} on each branch, and both share V_0 = p Q_V + (1 - p) Q_C. A
        "flat" critic says V_0 everywhere: right about the prompt, blind to the answer.
        """
        demand_one_of("critic", critic, ("exact", "flat"))
        out = self.rewards(p)
        p = as_double("p", p)
        for t in reversed(range(self.steps - 1)):
            out[..., t] += gamma * out[..., t + 1]
        # Before the fork both answers are in the same state; its worth is their mean.
        start = p * out[..., VERBOSE, 0] + (1 - p) * out[..., CONCISE, 0]
        if critic == "flat":
            out = start[..., None, None].expand(out.shape).clone()
        out[..., 0] = start[..., None]
        return torch.where(self.mask, out, 0.0)

    def advantages(
        self, p: Number, *, critic: str = "exact", gamma: float = 1.0, lam: float = 1.0
    ) -> Tensor:
        """GAE (Schulman et al. 2015, arXiv 1506.02438, eq. 16) on the two answers."""
        rewards = self.rewards(p)
        values = self.values(p, critic=critic, gamma=gamma)
        # The core's gae takes rows of answers, whatever p's shape.
        found = gae(
            rewards.reshape(-1, self.steps),
            values.reshape(-1, self.steps),
            self.mask.expand(rewards.shape).reshape(-1, self.steps),
            gamma=gamma,
            lam=lam,
        )
        return found.view(rewards.shape)

    def end(self, *, critic: str = "exact", gamma: float = 1.0, lam: float = 1.0) -> float:
        """Where p ends: the fork's expected ascent p (1 - p) [A_0V - A_0C - KL's own] is zero."""

        def net(x: Tensor) -> Tensor:
            # The search looks far ahead, where a sigmoid rounds to 0 or 1 and has no logit.
            p = torch.sigmoid(x).clamp(1e-300, 1 - 1e-16)
            fork = self.advantages(p, critic=critic, gamma=gamma, lam=lam)[..., 0]
            if self.place == "loss":
                fork = fork - self.beta * self.charges(p)[..., 0]  # k2's slope is the log-ratio
            return fork[..., VERBOSE] - fork[..., CONCISE]

        start = as_double("p0", [self.p0]).logit()
        return torch.sigmoid(rest_point(net, start)).item()
