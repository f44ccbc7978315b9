"""The push: how one optimiser step on a batch moves log pi of any answer, and what does it.

To first order a step in direction d changes log pi(y | x) by <grad log pi(y | x), d>. The
gradient of the loss is a sum over the batch's tokens, so this is a sum over tokens too:

    change = sum_t  w_t * u_t,     u_t = <grad log pi(y_t | .), grad log pi(y | x)> * rate

w_t is what the loss lays on token t and linear in its advantage, u_t how much raising token t
raises the answer. One double backward gives every u_t; parts, token classes and what-ifs are sums.
Policy and critic share a trunk, so the value loss moves log pi as well and is shown as a part.

Adam divides each gradient coordinate by the root of its second moment. With the moments as they
are after this gradient the step is still linear in it, plus one part for earlier gradients.
Left out: the several minibatches of a PPO update; this is one step on the whole batch.

Sources: Pearlmutter (1994, "Fast exact multiplication by the Hessian") for derivatives along a
direction; Kingma and Ba (2015, arXiv 1412.6980, algorithm 1).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from minirlhf.autopsy.convention import demand
from minirlhf.autopsy.parts import AdvantageParts
from minirlhf.config import PPOConfig
from minirlhf.kl import kl_tokens
from minirlhf.model import CHUNK, Transformer, response_logprobs, response_outputs
from minirlhf.ppo import PPO, aggregate, ppo_policy_loss, value_loss
from minirlhf.rollout import Rollout

Answers = tuple[Tensor, Tensor, Tensor]  # prompts, responses, mask
CLASSES = ("fork", "filler", "answer", "eos")
LENGTH_WHYS = (
    "exact: how mean length would move if answers counted by their mean advantage",
    "approximate: first order, what the policy's gradient does in one step, seen on these answers",
)
FORK_NATS = 0.5  # in the shipped batches a fifth of the tokens, two thirds of all |log-ratio|


@dataclass(frozen=True)
class Push:
    """First-order change of the mean log pi of some answers by one optimiser step, in nats."""

    tokens: dict[str, Tensor]
    """part -> [B, T]: what each token of the batch contributes (reward, kl, baseline, shift, and
    value_loss and kl_loss where the loss has them)"""
    memory: float
    """what earlier gradients contribute through Adam's first moment (sgd: 0)"""
    measured: float
    """the change by a real step of the same optimiser, on a copy"""

    @property
    def parts(self) -> dict[str, float]:
        """Each part over all tokens, and "memory"; their sum is the prediction."""
        return {k: float(x.sum()) for k, x in self.tokens.items()} | {"memory": self.memory}

    @property
    def total(self) -> float:
        """The predicted change; measured - total is what first order leaves out."""
        return sum(self.parts.values())

    def by_class(self, classes: Tensor) -> dict[str, dict[str, float]]:
        """part -> token class -> its tokens' sum; classes [B, T] index CLASSES."""
        at = {name: classes == i for i, name in enumerate(CLASSES)}
        return {k: {c: float(x[m].sum()) for c, m in at.items()} for k, x in self.tokens.items()}


@torch.no_grad()
def reference_entropy(reference: Transformer, rollout: Rollout) -> Tensor:
    """Entropy [B, T], nats, of the reference's next token at every token of the batch."""
    logits, _ = response_outputs(reference, rollout.prompts, rollout.responses, rollout.mask)
    logp = logits.log_softmax(-1)
    return torch.where(rollout.mask, -(logp.exp() * logp).sum(-1), 0.0)


def token_classes(rollout: Rollout, entropy: Tensor | None = None) -> Tensor:
    """Index into CLASSES for every token, [B, T]; -1 outside the mask.

    eos: the last token of an answer that ended. fork: where the reference's entropy reaches
    FORK_NATS; without `entropy`, that of its choice to stop alone. filler: the rest. Which tokens
    carry the answer only the caller can know.
    """
    if entropy is None:
        demand(rollout, "ref_eos_logprobs")
        assert rollout.ref_eos_logprobs is not None
        stop = rollout.ref_eos_logprobs.exp()
        entropy = -torch.xlogy(stop, stop) - torch.xlogy(1 - stop, 1 - stop)
    classes = torch.where(entropy >= FORK_NATS, CLASSES.index("fork"), CLASSES.index("filler"))
    if rollout.finished is not None:
        ends = torch.arange(classes.shape[1], device=classes.device) == rollout.last[:, None]
        classes = torch.where(ends & rollout.finished[:, None], CLASSES.index("eos"), classes)
    return torch.where(rollout.mask, classes, -1)


def push(
    run: PPO,
    rollout: Rollout,
    parts: AdvantageParts,
    targets: Mapping[str, Tensor | Answers],
    *,
    optimiser: Literal["sgd", "adam"] = "sgd",
    lr: float | None = None,
) -> dict[str, Push]:
    """What one step of `run` on the whole batch would do to each target; nothing is changed.

    A target is a bool [B] of answers in the batch, or (prompts, responses, mask) of any others.
    `parts` must add up to rollout.advantages. The gradient is clipped as the run clips it; adam
    goes on from the run's own moments. lr: the run's, unless given. Raises ValueError for a target
    without a token or parts of another batch.
    """
    demand(rollout, "advantages", "returns")
    gap = float(((parts.total - rollout.advantages) * rollout.mask).abs().max())  # type: ignore
    if gap > 1e-4 * (1 + float(parts.total.abs().max())):
        raise ValueError(
            f"these parts miss the batch's advantages by up to {gap:.2g}: "
            "find the convention that made them first (whatif.reconcile)"
        )
    lr = run.config.lr if lr is None else lr
    answers = {name: _answers(rollout, name, target) for name, target in targets.items()}
    rate, kept = _rate(run, rollout, lr, optimiser)
    weights, copied, found = _weights(run, rollout, parts), run.copy(), {}
    _step(copied, rollout, lr, optimiser)
    for name, given in answers.items():
        before = _likelihood(run, given)
        gradient = _gradient(run, before)
        u = _tangents(run, rollout, rate * gradient)
        tokens = {part: w * u[part == "value_loss"] for part, w in weights.items()}
        with torch.no_grad():
            measured = float(_likelihood(copied, given) - before)
        found[name] = Push(tokens, float((kept * gradient).sum()), measured)
    return found


def leverage(
    run: PPO,
    rollout: Rollout,
    weights: Tensor,
    *,
    optimiser: Literal["sgd", "adam"] = "adam",
    lr: float | None = None,
) -> Tensor:
    """[B, T]: what a unit of advantage on each token adds to sum(weights [B] * log pi(answer)).

    To first order, by one step of `run` on the whole batch whose scale (gradient clip, Adam's
    second moment) stays as the logged advantages make it. Times any advantages and summed, this
    is what their policy gradient does; `push` explains the logged ones alone, and checks itself.
    """
    demand(rollout, "advantages", "returns")
    lr = run.config.lr if lr is None else lr
    given = (rollout.prompts, rollout.responses, rollout.mask)
    logprobs, _ = response_logprobs(run.policy, *given, temperature=run.config.temperature)
    gradient = _gradient(run, (logprobs.sum(1) * weights.to(logprobs.dtype)).sum())
    rate, _ = _rate(run, rollout, lr, optimiser)
    slope = surrogate_slope(logprobs, rollout, run.config).double()
    return slope * _tangents(run, rollout, rate * gradient)[0]


def length_weights(
    rollout: Rollout, strata: Mapping[str, Tensor], run: PPO | None
) -> tuple[dict[str, Tensor], str, str]:
    """{stratum: [B, T]}, which times advantages and summed is a move of its mean length; its unit
    and a sentence on how exact it is.

    With the `run` as it was before the batch: of one step of its optimiser on the whole batch,
    without what momentum and value loss add. Without: the covariance of an answer's length with
    its mean advantage.
    """
    found, lengths = {}, rollout.lengths.double()
    for name, rows in strata.items():
        rows = rows & (lengths > 0)
        centred = torch.where(rows, lengths - lengths[rows].mean(), 0.0) / rows.sum().clamp(min=1)
        if run is None:
            found[name] = (centred / lengths.clamp(min=1))[:, None] * rollout.mask
        else:
            found[name] = leverage(run, rollout, centred)
    if run is None:
        return found, "tokens per unit", LENGTH_WHYS[0]
    return found, "tokens per step", LENGTH_WHYS[1]


def _step(run: PPO, rollout: Rollout, lr: float, optimiser: str) -> None:
    """A real step on the whole batch."""
    run.optimiser.zero_grad()
    run.loss(rollout)[0].backward()
    run.optimiser.clip_grad(run.config.max_grad_norm)
    run.optimiser.lr = lr
    if optimiser == "adam":
        run.optimiser.step()
    else:
        run.optimiser.flat.sub_(run.optimiser.grad, alpha=lr)


def _answers(rollout: Rollout, name: str, target: Tensor | Answers) -> Answers:
    if isinstance(target, Tensor):
        chosen = rollout.select(target & rollout.mask.any(1))
        target = (chosen.prompts, chosen.responses, chosen.mask)
    if not target[2].any():
        raise ValueError(f"target {name!r} has no answer with a token; choose at least one")
    return target


def _likelihood(run: PPO, given: Answers) -> Tensor:
    """Mean over answers of log pi(answer | prompt), nats."""
    logprobs, _ = response_logprobs(run.policy, *given, temperature=run.config.temperature)
    return logprobs.sum(1).mean()


def _rate(run: PPO, rollout: Rollout, lr: float, optimiser: str) -> tuple[Tensor, Tensor]:
    """What a step multiplies each coordinate of the loss gradient by, and what it adds."""
    gradient = _gradient(run, run.loss(rollout)[0])
    o, limit = run.optimiser, run.config.max_grad_norm or torch.inf
    scale = (limit / (gradient.norm() + 1e-6)).clamp(max=1.0)  # as clip_grad does
    if optimiser == "sgd":
        return lr * scale, torch.zeros_like(gradient)
    (b1, b2), steps = o.betas, o.steps + 1
    square = b2 * o.square + (1 - b2) * (scale * gradient).square()
    rate = lr / (1 - b1**steps) / ((square / (1 - b2**steps)).sqrt() + o.eps)
    return rate * (1 - b1) * scale, -rate * b1 * o.mean


def surrogate_slope(logprobs: Tensor, rollout: Rollout, config: PPOConfig) -> Tensor:
    """[B, T]: the surrogate's derivative by each log-prob, over the token's advantage.

    The ratio where no clip has cut the gradient, else 0, times the weight of a token in the
    average. The clip asks for the advantage's sign alone, so the surrogate is linear in its size.
    """
    assert rollout.advantages is not None
    sign = torch.where(rollout.advantages < 0, -1.0, 1.0).to(logprobs.dtype)
    x, per = logprobs.detach().requires_grad_(), config.loss_aggregation
    how = {"clip": config.clip, "style": config.clip_style, "aggregation": per}
    loss = ppo_policy_loss(x, rollout.logprobs, sign, rollout.mask, **how)  # type: ignore[arg-type]
    return -torch.autograd.grad(loss, x)[0] * sign


def _weights(run: PPO, rollout: Rollout, parts: AdvantageParts) -> dict[str, Tensor]:
    """Part -> [B, T]: minus the loss's derivative by each log-prob (value_loss: by each value)."""
    c, r, mask = run.config, rollout, rollout.mask
    given = (r.prompts, r.responses, mask)
    with torch.no_grad():
        now = response_logprobs(run.policy, *given, temperature=c.temperature)
    logprobs, values = (x.requires_grad_() for x in now)
    slope = surrogate_slope(logprobs, r, c)
    found = {k: slope * x for k, x in vars(parts).items() if x is not None}
    if c.advantage == "gae":
        assert r.returns is not None
        critic = value_loss(values, r.values, r.returns, mask, clip=c.value_clip)
        found["value_loss"] = -c.value_coef * torch.autograd.grad(critic, values)[0]
    if c.kl_place in ("loss", "book_literal"):
        kind, per = c.kl_estimator, c.kl_aggregation
        how = c.loss_aggregation if per == "sequence_sum" else "sequence_sum"  # as PPO.loss does
        tokens = kl_tokens(logprobs, r.ref_logprobs, mask, estimator=kind, aggregation=per)
        kl = aggregate(tokens, mask, how)
        found["kl_loss"] = -run.beta * torch.autograd.grad(kl, logprobs)[0]
    return {k: x.double() for k, x in found.items()}


def _tangents(run: PPO, rollout: Rollout, direction: Tensor) -> list[Tensor]:
    """Derivatives of every token's log-prob and value along `direction`: two [B, T].

    The gradient of sum(c * log-probs) is linear in c, and its product with the direction has the
    derivatives wanted as its gradient by c. A chunk of rows at a time stays within one chunk of
    the model's, whose graph may be walked twice on any number of cores.
    """
    found = [torch.zeros_like(rollout.logprobs, dtype=torch.float64) for _ in range(2)]
    for rows in rollout.mask.any(1).nonzero().squeeze(1).split(CHUNK):
        r = rollout.select(rows)
        given, temperature = (r.prompts, r.responses, r.mask), run.config.temperature
        outputs = response_logprobs(run.policy, *given, temperature=temperature)
        c = [torch.zeros_like(x, requires_grad=True) for x in outputs]
        gradient = _gradient(run, outputs, c, create_graph=True)
        for whole, part in zip(found, torch.autograd.grad(gradient @ direction, c), strict=True):
            whole[rows] = part.double()
    return found


def _gradient(
    run: PPO, outputs: Tensor | Sequence[Tensor], *weights: Any, **options: Any
) -> Tensor:
    """Gradient by the policy's parameters, end to end in the optimiser's order."""
    parameters = list(run.policy.parameters())
    found = torch.autograd.grad(outputs, parameters, *weights, allow_unused=True, **options)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])
