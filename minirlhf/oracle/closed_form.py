"""Exact answers to hold PPO against: two answers (L0) and a chain of tokens with one fork (L1).

L0: one prompt, two answers. p is the policy's probability of the verbose one and p0 the
reference's; delta_r is how much more the verbose one scores (reward sd), beta the price of KL
(reward sd per nat), k = delta_r / beta. A whole run is then one number that climbs or falls.
L1: the first token decides between the two answers, filler follows.

Everything is in float64. Scalars or tensors go in and broadcast together; tensors come out
(0-dimensional ones for scalars). Left out: shared parameters between prompts, optimiser noise.

Sources: Korbak et al. (2022, arXiv 2205.11275) and Rafailov et al. (2023, arXiv 2305.18290, eq.
4) for the tilt; Tang and Munos (2025, arXiv 2506.09477) for the gradients of KL estimators;
Schulman et al. (2017, arXiv 1707.06347, eq. 7) for the clip.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Number = float | Tensor
FARTHEST = 60.0  # logits past a half; there 1 - p is below 1e-26 and the run has run away


def as_double(name: str, x: Number | list[float], ok: str = "finite") -> Tensor:
    """x in float64; raises ValueError unless it is finite, positive or a probability."""
    t = torch.as_tensor(x, dtype=torch.float64)
    tests = {"finite": t.isfinite(), "positive": (t > 0) & t.isfinite()}
    tests["between 0 and 1"] = (t > 0) & (t < 1)
    if not bool(tests[ok].all()):
        raise ValueError(f"{name} is {x}; it must be {ok}")
    return t


def one_of(name: str, x: str, among: tuple[str, ...]) -> None:
    """Raises ValueError unless x is one of `among`."""
    if x not in among:
        raise ValueError(f"{name} is {x!r}; it must be one of {', '.join(among)}")


def tilt(ref_probs: Tensor, rewards: Tensor, beta: Number) -> Tensor:
    """The policy that maximises E[r] - beta KL(pi || ref): pi* ~ ref * exp(r / beta).

    ref_probs and rewards [..., A] over A answers (or tokens); beta a number or [..., 1]. Because
    E[r] - beta KL(pi || ref) = beta log Z - beta KL(pi || pi*), nothing beats pi*, whatever the
    policy's form (Rafailov et al. eq. 4). Raises ValueError for shapes that differ, rows of
    ref_probs that are no distribution, or beta <= 0.
    """
    ref, r = torch.as_tensor(ref_probs, dtype=torch.float64), as_double("rewards", rewards)
    if ref.shape != r.shape:
        raise ValueError(f"ref_probs {list(ref.shape)} and rewards {list(r.shape)} must agree")
    if not (bool((ref >= 0).all()) and bool(((ref.sum(-1) - 1).abs() < 1e-4).all())):
        raise ValueError("ref_probs must be >= 0 and sum to 1 over their last dimension")
    return (ref.log() + r / as_double("beta", beta, "positive")).softmax(-1)


def two_answer(p0: Number, delta_r: Number, beta: Number) -> Tensor:
    """The tilt for two answers: logit p* = logit p0 + delta_r / beta. Returns p*.

    The odds of verbose are multiplied by exp(delta_r / beta). Scores divided by their sd *before*
    KL is charged make that exp(delta_r / (sd * beta)): whitening then acts as beta * sd. Raises
    ValueError unless 0 < p0 < 1 and beta > 0.
    """
    p0, gap = as_double("p0", p0, "between 0 and 1"), as_double("delta_r", delta_r)
    return torch.sigmoid(p0.logit() + gap / as_double("beta", beta, "positive"))


def largest_drift(delta_r: Number, beta: Number) -> Tensor:
    """The p0 whose prompts move most, 1 / (1 + exp(k / 2)); they move by 1 - 2 p0.

    d/dp0 [sigmoid(logit p0 + k) - p0] = 0 gives p*(1 - p*) = p0 (1 - p0), hence p* = 1 - p0.
    """
    k = as_double("delta_r", delta_r) / as_double("beta", beta, "positive")
    return torch.sigmoid(-k / 2)


def moving_reference(p0: Number, delta_r: Number, beta: Number, rounds: int) -> Tensor:
    """p* [rounds, ...] after 1, 2, ... rounds, each anchored to the policy that the last left.

    Every round starts at KL 0 and multiplies the odds by exp(k) anew: logit p_n = logit p0 + n k.
    """
    once = two_answer(p0, delta_r, beta).logit()
    start = as_double("p0", p0, "between 0 and 1").logit()
    return torch.stack([torch.sigmoid(start + n * (once - start)) for n in range(1, rounds + 1)])


def net_advantages(p: Number, p0: Number, delta_r: Number, beta: Number) -> tuple[Tensor, Tensor]:
    """Exact (A_V, A_C) with k1 in the reward and V(x) = p R_V + (1 - p) R_C.

    R_V = delta_r - beta L_V and R_C = -beta L_C with L the log-ratio of an answer, so that
    A_V = (1 - p)(R_V - R_C) and A_C = -p (R_V - R_C): positive is "still below p*".
    """
    net = delta_r - as_double("beta", beta) * kl_pull(p, p0)
    p = as_double("p", p, "between 0 and 1")
    return (1 - p) * net, -p * net


def kl_pull(p: Number, p0: Number, *, place: str = "reward", estimator: str = "k1") -> Tensor:
    """How hard the KL term holds logit p back, in nats: its expected gradient over p (1 - p).

    With L_V = log(p / p0) and L_C of the other answer, an estimator k in the reward gives
    k(L_V) - k(L_C), because E[k s] = p (1 - p) times that (s: the score function). Differentiated
    in the loss it gives k'(L_V) - k'(L_C): for k1 (book_literal) 1 - 1 = 0, for k2 the gradient
    of KL, for k3 that of the forward KL (Tang and Munos 2025). The true KL has logit p - logit p0.
    """
    x = as_double("p", p, "between 0 and 1").logit()
    return _pull(x, as_double("p0", p0, "between 0 and 1").logit(), place, estimator)


def _pull(x: Tensor, x0: Tensor, place: str, estimator: str) -> Tensor:
    one_of("place", place, ("reward", "loss", "book_literal", "none"))
    one_of("estimator", estimator, ("k1", "k2", "k3"))
    if place == "none" or place == "book_literal" or (place, estimator) == ("loss", "k1"):
        return torch.zeros_like(x + x0)
    verbose, concise = logsigmoid(x) - logsigmoid(x0), logsigmoid(-x) - logsigmoid(-x0)
    if (place, estimator) in (("reward", "k1"), ("loss", "k2")):
        return verbose - concise
    if estimator == "k2":
        return (verbose.square() - concise.square()) / 2
    slopes = (-concise).exp() - (-verbose).exp()  # of k3; k3 itself is exp(-l) - 1 + l
    return slopes if place == "loss" else verbose - concise - slopes


def _standardised(x: Tensor, group: int | None) -> Tensor:
    """(A_V - A_C) of scores over their sd, as seen by the gradient: 1 / sqrt(p (1 - p)).

    In groups of finite size, the mean over their make-up: n of G verbose push by n(G - n) / G^2
    over the sample sd sqrt(n (G - n) / (G (G - 1))) per unit of gap, and n = 0 or G not at all.
    """
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    if group is None:
        return (p * q).rsqrt()
    terms = [
        float(math.comb(group, n))
        * p ** (n - 1)
        * q ** (group - n - 1)
        * math.sqrt(n * (group - n))
        for n in range(1, group)
    ]
    return torch.stack(terms).sum(0) * math.sqrt(group * (group - 1)) / group**2


def two_answer_end(
    p0: Number,
    delta_r: Number,
    beta: Number,
    *,
    place: str = "reward",
    estimator: str = "k1",
    scale: str = "none",
    group: int | None = None,
) -> Tensor:
    """Where p ends that starts at p0: the first rest point on its way, 1.0 or 0.0 if there is none.

    The expected ascent on logit p is p (1 - p) (delta_r - beta kl_pull(p, p0)): zero at
    two_answer for k1 in the reward and k2 in the loss, at beta (p - p0) = delta_r p (1 - p) for
    k3 in the loss, nowhere for book_literal, and for k3 in the reward only while k is below
    runaway_threshold(p0).
    scale: "none"; "scores" divides the scores by their own sd |delta_r| sqrt(p (1 - p)) before
    KL is charged; "advantages" divides score and charge by the sd of their sum, as GRPO does in
    groups of `group` (None: large ones). Raises ValueError for unknown words.
    """
    one_of("scale", scale, ("none", "scores", "advantages"))
    given = as_double("delta_r", delta_r), as_double("beta", beta, "positive")
    start = as_double("p0", p0, "between 0 and 1").logit()
    x0, gap, price = (t[..., None] for t in torch.broadcast_tensors(start, *given))

    def net(x: Tensor) -> Tensor:
        pull, push = price * _pull(x, x0, place, estimator), gap
        if scale == "scores" or (scale == "advantages" and place != "reward"):
            # in the reward the division by sd comes after KL, and changes no sign
            push = gap.sign() * _standardised(x, group if scale == "advantages" else None)
        return push - pull

    return torch.sigmoid(rest_point(net, x0)).squeeze(-1)


def rest_point(net: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    """Where logit p stops that starts at x0 [..., 1] and goes where net(x) points; inf: nowhere."""
    way = net(x0).sign()
    x = x0 + way * _ahead(x0, 1201)
    past = net(x) * way <= 0
    first = past.int().argmax(-1, keepdim=True).clamp(min=1)
    low, high = x.gather(-1, first - 1), x.gather(-1, first)
    for _ in range(45):
        middle = (low + high) / 2
        before = net(middle) * way > 0
        low, high = torch.where(before, middle, low), torch.where(before, high, middle)
    end = torch.where(past.any(-1, keepdim=True), high, way * math.inf)
    return torch.where(way == 0, x0, end)


def _ahead(x0: Tensor, points: int) -> Tensor:
    """How far to look from logit x0 [..., 1]: `points` steps, to FARTHEST beyond a half from
    however rare a start, and no less from a start that lies beyond it already."""
    return torch.linspace(0, 1, points, dtype=torch.float64) * (FARTHEST + x0.abs())


def runaway_threshold(p0: Number, *, place: str = "reward", estimator: str = "k3") -> Tensor:
    """The k = delta_r / beta above which nothing stops p on its way up; inf if something always
    does. It is the largest kl_pull on (p0, 1): beyond it the ascent has no zero."""
    x0 = as_double("p0", p0, "between 0 and 1").logit()[..., None]
    x = x0 + _ahead(x0, 6001)
    pull = _pull(x, x0, place, estimator)
    best, where = pull.max(-1)
    return torch.where(where == pull.shape[-1] - 1, math.inf, best)


def clip_steps(p: float, q: float, clip: float, *, verbose_only: bool = False) -> int:
    """The fewest PPO iterations, each optimised to the end, that take p up to q > p.

    An iteration stops where no sample pushes on: verbose ones up to ratio 1 + clip, so
    p' = (1 + clip) p; concise ones down to ratio 1 - clip, so 1 - p' = (1 - clip)(1 - p). The
    farther of the two counts (`verbose_only`: the first). Raises ValueError unless 0 < p < q < 1.
    """
    if not (0 < p < q < 1 and 0 < clip < 1):
        raise ValueError(f"p {p}, q {q}, clip {clip}: needs 0 < p < q < 1 and 0 < clip < 1")
    steps = 0
    while p < q:
        lifted, emptied = (1 + clip) * p, 1 - (1 - clip) * (1 - p)
        p, steps = lifted if verbose_only else max(lifted, emptied), steps + 1
    return steps
