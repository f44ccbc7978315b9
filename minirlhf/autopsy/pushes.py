"""The push: how one optimiser step on a batch moves log pi of any answer, and what does it.

To first order a step in direction d changes log pi(y | x) by <grad log pi(y | x), d>. The
gradient of the loss is a sum over the batch's tokens, so this is a sum over tokens too:

    change = sum_t  w_t * u_t,     u_t = <grad log pi(y_t | .), grad log pi(y | x)> * rate

w_t is what the loss lays on token t and linear in its advantage, u_t how much raising token t
raises the answer. One double backward gives every u_t; parts, token classes and what-ifs are sums.
Policy and critic share a trunk, so the value loss moves log pi as well and is shown as a part.
Left out: the several minibatches of a PPO update; this is one step on the whole batch.

Sources: Pearlmutter (1994, "Fast exact multiplication by the Hessian") for derivatives along a
direction; Kingma and Ba (2015, arXiv 1412.6980, algorithm 1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minirlhf.autopsy.convention import demand_fields
from minirlhf.autopsy.parts import AdvantageParts
from minirlhf.config import PPOConfig
from minirlhf.kl import kl_tokens
from minirlhf.model import CHUNK, Transformer, response_logprobs, response_outputs
from minirlhf.ppo import PPO, aggregate, ppo_policy_loss, value_loss
from minirlhf.rollout import Rollout

Answers = tuple[Tensor, Tensor, Tensor]  # prompts, responses, mask
CLASSES = ("fork", "filler", "answer", "eos")
LENGTH_BY_COVARIANCE = (
    "exact: how mean length would move if answers counted by their mean advantage"
)
LENGTH_BY_STEP = (
    "approximate: first order, what the policy's gradient does in one step, seen on these answers"
)
FORK_NATS = 0.5  # in the shipped batches a fifth of the tokens, two thirds of all |log-ratio|


@dataclass(frozen=True)
class Push:
    """First-order change of the mean log pi of some answers by one optimiser step, in nats.

    The split into parts and tokens is exact; that their sum is the change is approximate, and
    `measured` says by how much.
    """

    tokens: dict[str, Tensor]
    """part -> [B, T]: what each token of the batch contributes (reward, kl, baseline, shift, and
    value_loss and kl_loss where the loss has them)"""
    memory: float
    """what earlier gradients contribute through Adam's first moment (sgd: 0)"""
    measured: float
    """the change by a real step of the same optimiser, on a copy: exact"""

    @property
    def parts(self) -> dict[str, float]:
        """Each part over all tokens, and "memory"; their sum is the prediction."""
        found = {part: float(x.sum()) for part, x in self.tokens.items()}
        found["memory"] = self.memory
        return found

    @property
    def total(self) -> float:
        """The predicted change, approximate; measured - total is what first order leaves out."""
        return sum(self.parts.values())

    def by_class(self, classes: Tensor) -> dict[str, dict[str, float]]:
        """part -> token class -> its tokens' sum, exactly; classes [B, T] index CLASSES."""
        found = {}
        for part, x in self.tokens.items():
            found[part] = {
                name: float(x[classes == number].sum()) for number, name in enumerate(CLASSES)
            }
        return found


@torch.no_grad()
def reference_entropy(reference: Transformer, rollout: Rollout) -> Tensor:
    """Entropy [B, T], nats, of the reference's next token at every token of the batch: exact."""
    logits, _ = response_outputs(reference, rollout.prompts, rollout.responses, rollout.mask)
    logp = logits.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.where(rollout.mask, entropy, 0.0)


def token_classes(rollout: Rollout, entropy: Tensor | None = None) -> Tensor:
    """Index into CLASSES for every token, [B, T]; -1 outside the mask.

    eos: the last token of an answer that ended. fork: where the reference's entropy reaches
    FORK_NATS; without `entropy`, that of its choice to stop alone. filler: the rest. Which tokens
    carry the answer only the caller can know. eos is exact; a fork is a matter of the threshold.
    """
    if entropy is None:
        demand_fields(rollout, "ref_eos_logprobs")
        assert rollout.ref_eos_logprobs is not None
        stop = rollout.ref_eos_logprobs.exp()
        entropy = -torch.xlogy(stop, stop) - torch.xlogy(1 - stop, 1 - stop)
    classes = torch.where(entropy >= FORK_NATS, CLASSES.index("fork"), CLASSES.index("filler"))
    if rollout.finished is not None:
        columns = torch.arange(classes.shape[1], device=classes.device)
        ends = (columns == rollout.last[:, None]) & rollout.finished[:, None]
        classes = torch.where(ends, CLASSES.index("eos"), classes)
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

    Approximate, to first order in the step; the real step is taken on a copy and measured beside
    it. A target is a bool [B] of answers in the batch, or (prompts, responses, mask) of any others.
    `parts` must add up to rollout.advantages. The gradient is clipped as the run clips it; adam
    goes on from the run's own moments. lr: the run's, unless given. Raises ValueError for a target
    without a token or parts of another batch.
    """
    demand_fields(rollout, "advantages", "returns")
    _demand_whole(parts, rollout)
    lr = run.config.lr if lr is None else lr
    answers = {name: _answers(rollout, name, target) for name, target in targets.items()}
    rate, kept = _rate(run, rollout, lr, optimiser)
    weights = _weights(run, rollout, parts)
    stepped = run.copy()
    _step(stepped, rollout, lr, optimiser)
    found = {}
    for name, target in answers.items():
        before = _likelihood(run, target)
        gradient = _gradient(run, before)
        by_logprob, by_value = _tangents(run, rollout, rate * gradient)
        tokens = {}
        for part, weight in weights.items():
            # the value loss pulls on a token's value, all else on its log-prob
            tokens[part] = weight * (by_value if part == "value_loss" else by_logprob)
        memory = float((kept * gradient).sum())
        with torch.no_grad():
            measured = float(_likelihood(stepped, target) - before)
        found[name] = Push(tokens, memory, measured)
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

    Approximate: to first order, by one step of `run` on the whole batch whose scale (gradient
    clip, Adam's second moment) stays as the logged advantages make it. Times any advantages and
    summed, this is what their policy gradient does; `push` explains the logged ones alone, and
    checks itself.
    """
    demand_fields(rollout, "advantages", "returns")
    lr = run.config.lr if lr is None else lr
    logprobs, _ = outputs_of(run, rollout)
    gradient = _gradient(run, (logprobs.sum(1) * weights.to(logprobs.dtype)).sum())
    rate, _ = _rate(run, rollout, lr, optimiser)
    by_logprob, _ = _tangents(run, rollout, rate * gradient)
    slope = surrogate_slope(logprobs, rollout, run.config).double()
    return slope * by_logprob


def length_weights(
    rollout: Rollout, strata: Mapping[str, Tensor], run: PPO | None
) -> tuple[dict[str, Tensor], str, str]:
    """{stratum: [B, T]}, which times advantages and summed is a move of its mean length; its unit
    and a sentence on how exact it is.

    With the `run` as it was before the batch, approximate: of one step of its optimiser on the
    whole batch, to first order, without what momentum and value loss add. Without, exact: the
    covariance of an answer's length with its mean advantage.
    """
    lengths = rollout.lengths.double()
    found = {}
    for name, rows in strata.items():
        rows = rows & (lengths > 0)
        above_mean = torch.where(rows, lengths - lengths[rows].mean(), 0.0)
        centred = above_mean / rows.sum().clamp(min=1)
        if run is None:
            # each token by 1 / length: summed over an answer that is its mean advantage
            found[name] = (centred / lengths.clamp(min=1))[:, None] * rollout.mask
        else:
            # answers that grow likelier by d log pi move the mean by sum(centred * d log pi)
            found[name] = leverage(run, rollout, centred)
    if run is None:
        return found, "tokens per unit", LENGTH_BY_COVARIANCE
    return found, "tokens per step", LENGTH_BY_STEP


def surrogate_slope(logprobs: Tensor, rollout: Rollout, config: PPOConfig) -> Tensor:
    """[B, T]: the surrogate's derivative by each log-prob, over the token's advantage. Exact.

    The ratio where no clip has cut the gradient, else 0, times the weight of a token in the
    average. The clip asks for the advantage's sign alone, so the surrogate is linear in its size.
    """
    assert rollout.advantages is not None
    sign = torch.where(rollout.advantages < 0, -1.0, 1.0).to(logprobs.dtype)
    logprobs = logprobs.detach().requires_grad_()
    loss = ppo_policy_loss(
        logprobs,
        rollout.logprobs,
        sign,
        rollout.mask,
        clip=config.clip,
        style=config.clip_style,
        aggregation=config.loss_aggregation,
    )
    (slope,) = torch.autograd.grad(loss, logprobs)
    return -slope * sign


def _demand_whole(parts: AdvantageParts, rollout: Rollout) -> None:
    """Parts that add up to the logged advantages, or ValueError; the sum is exact to rounding."""
    assert rollout.advantages is not None
    gap = float(((parts.total - rollout.advantages) * rollout.mask).abs().max())
    if gap > 1e-4 * (1 + float(parts.total.abs().max())):
        raise ValueError(
            f"these parts miss the batch's advantages by up to {gap:.2g}: "
            "find the convention that made them first (autopsy.reconcile)"
        )


def _answers(rollout: Rollout, name: str, target: Tensor | Answers) -> Answers:
    """A target as (prompts, responses, mask), exactly; ValueError where no token is in it."""
    if isinstance(target, Tensor):
        chosen = rollout.select(target & rollout.mask.any(1))
        target = (chosen.prompts, chosen.responses, chosen.mask)
    _, _, mask = target
    if not mask.any():
        raise ValueError(f"target {name!r} has no answer with a token; choose at least one")
    return target


def outputs_of(run: PPO, rollout: Rollout) -> tuple[Tensor, ...]:
    """The policy's log-probs and values [B, T] of the batch's tokens, exact."""
    temperature = run.config.temperature
    return response_logprobs(
        run.policy, rollout.prompts, rollout.responses, rollout.mask, temperature=temperature
    )


def _likelihood(run: PPO, answers: Answers) -> Tensor:
    """Mean over answers of log pi(answer | prompt), nats, exact."""
    logprobs, _ = response_logprobs(run.policy, *answers, temperature=run.config.temperature)
    return logprobs.sum(1).mean()


def _step(run: PPO, rollout: Rollout, lr: float, optimiser: str) -> None:
    """A real step on the whole batch: exact."""
    run.optimiser.zero_grad()
    loss, _ = run.loss(rollout)
    loss.backward()
    run.optimiser.clip_grad(run.config.max_grad_norm)
    run.optimiser.lr = lr
    if optimiser == "adam":
        run.optimiser.step()
    else:
        run.optimiser.flat.sub_(run.optimiser.grad, alpha=lr)


def _rate(run: PPO, rollout: Rollout, lr: float, optimiser: str) -> tuple[Tensor, Tensor]:
    """What a step multiplies each coordinate of the loss gradient by, and what it adds: exact.

    Adam divides each coordinate by the root of its second moment. With the moments as they are
    after this gradient the step is still linear in it, plus one part for earlier gradients.
    """
    loss, _ = run.loss(rollout)
    gradient = _gradient(run, loss)
    limit = run.config.max_grad_norm or torch.inf
    scale = (limit / (gradient.norm() + 1e-6)).clamp(max=1.0)  # as clip_grad does
    if optimiser == "sgd":
        return lr * scale, torch.zeros_like(gradient)
    adam = run.optimiser
    b1, b2 = adam.betas
    steps = adam.steps + 1
    square = b2 * adam.square + (1 - b2) * (scale * gradient).square()
    root = (square / (1 - b2**steps)).sqrt() + adam.eps
    rate = lr / (1 - b1**steps) / root
    return rate * (1 - b1) * scale, -rate * b1 * adam.mean


def _weights(run: PPO, rollout: Rollout, parts: AdvantageParts) -> dict[str, Tensor]:
    """Part -> [B, T]: minus the loss's derivative by each log-prob (value_loss: by each value).

    Exact, at the policy as it is. The terms are those of PPO.loss_of, each by itself.
    """
    config = run.config
    mask = rollout.mask
    with torch.no_grad():
        logprobs, values = outputs_of(run, rollout)
    logprobs.requires_grad_()
    values.requires_grad_()

    slope = surrogate_slope(logprobs, rollout, config)
    found = {name: slope * part for name, part in parts.tensors().items()}
    if config.advantage == "gae":
        assert rollout.returns is not None
        critic = value_loss(values, rollout.values, rollout.returns, mask, clip=config.value_clip)
        (by_value,) = torch.autograd.grad(critic, values)
        found["value_loss"] = -config.value_coef * by_value
    if config.kl_place in ("loss", "book_literal"):
        per = config.kl_aggregation
        kl = kl_tokens(
            logprobs, rollout.ref_logprobs, mask, estimator=config.kl_estimator, aggregation=per
        )
        # summed KL is averaged as the surrogate is; a mean over tokens is a mean already
        how = config.loss_aggregation if per == "sequence_sum" else "sequence_sum"
        (by_logprob,) = torch.autograd.grad(aggregate(kl, mask, how), logprobs)
        found["kl_loss"] = -run.beta * by_logprob
    return {name: x.double() for name, x in found.items()}


def _tangents(run: PPO, rollout: Rollout, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of every token's log-prob and value along `direction`: two [B, T], exact.

    The gradient of sum(c * log-probs) is linear in c, and its product with the direction has the
    derivatives wanted as its gradient by c. A chunk of rows at a time stays within one chunk of
    the model's, whose graph may be walked twice on any number of cores.
    """
    by_logprob = torch.zeros_like(rollout.logprobs, dtype=torch.float64)
    by_value = torch.zeros_like(by_logprob)
    for rows in rollout.mask.any(1).nonzero().squeeze(1).split(CHUNK):
        outputs = outputs_of(run, rollout.select(rows))
        c = [torch.zeros_like(x, requires_grad=True) for x in outputs]
        gradient = _gradient(run, outputs, weights=c)
        of_logprob, of_value = torch.autograd.grad(gradient @ direction, c)
        by_logprob[rows] = of_logprob.double()
        by_value[rows] = of_value.double()
    return by_logprob, by_value


def _gradient(
    run: PPO, outputs: Tensor | tuple[Tensor, ...], *, weights: list[Tensor] | None = None
) -> Tensor:
    """Gradient by the policy's parameters, end to end in the optimiser's order: exact.

    With `weights`, of sum(weights * outputs), and to be differentiated by the weights in turn.
    """
    found = torch.autograd.grad(
        outputs,
        list(run.policy.parameters()),
        grad_outputs=weights,
        create_graph=weights is not None,
        materialize_grads=True,  # 0 by a parameter on which nothing that was asked for depends
    )
    return torch.cat([gradient.flatten() for gradient in found])
