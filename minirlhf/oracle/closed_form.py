"""L0: exact answers to hold PPO against, for one prompt that has two answers.

p is the policy's probability of the verbose answer and p0 the reference's; delta_r is how much
more the verbose one scores (reward sd), beta the price of KL (reward sd per nat), k = delta_r /
beta. A whole run is then one number that climbs or falls. L1, a chain of tokens, is chain.py.

Everything is in float64. Scalars or tensors go in and broadcast together; tensors come out
(0-dimensional ones for scalars). Left out: shared parameters between prompts, optimiser noise.

Sources: Korbak et al. (2022, arXiv 2205.11275) and Rafailov et al. (2023, arXiv 2305.18290, eq.
4) for the tilt; Schulman (2020), "Approximating KL divergence", for k1 to k3; Tang and Munos (2025,
arXiv 2506.09477) for their gradients; Shao et al. (2024, arXiv 2402.03300) for scores over a
group's sd; Schulman et al. (2017, arXiv 1707.06347, eq. 7) for the clip.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Number = float | Tensor
FARTHEST = 60.0  # logits past a half; there 1 - p is below 1e-26 and the run has run away


def as_double(
    name: str,
    x: Number | list[float],
    ok: Literal["finite", "positive", "between 0 and 1"] = "finite",
) -> Tensor:
    """x as a tensor in float64. Raises ValueError, with `name`, unless every entry is `ok`."""
    t = torch.as_tensor(x, dtype=torch.float64)
    if ok == "between 0 and 1":
        allowed = (t > 0) & (t < 1)
    elif ok == "positive":
        allowed = (t > 0) & t.isfinite()
    else:
        allowed = t.isfinite()
    if not bool(allowed.all()):
        raise ValueError(f"{name} is {x}; it must be {ok}")
    return t


def demand_one_of(name: str, x: str, among: tuple[str, ...]) -> None:
    """Raises ValueError, with `name`, unless x is one of `among`."""
    if x not in among:
        raise ValueError(f"{name} is {x!r}; it must be one of {', '.join(among)}")


def tilt(ref_probs: Tensor, rewards: Tensor, beta: Number) -> Tensor:
    """The policy that maximises E[r] - beta KL(pi || ref): pi* ~ ref * exp(r / beta).

    ref_probs and rewards [..., A] over A answers (or tokens); beta a number or [..., 1]. Because
    E[r] - beta KL(pi || ref) = beta log Z - beta KL(pi || pi*), nothing beats pi*, whatever the
    policy's form (Rafailov et al. eq. 4). Raises ValueError for shapes that differ, rows of
    ref_probs that are no distribution, or beta <= 0.
    """
    ref = torch.as_tensor(ref_probs, dtype=torch.float64)
    scores = as_double("rewards", rewards)
    if ref.shape != scores.shape:
        raise ValueError(f"ref_probs {list(ref.shape)} and rewards {list(scores.shape)} must agree")
    sums_to_one = (ref.sum(-1) - 1).abs() < 1e-4
    if not bool((ref >= 0).all() and sums_to_one.all()):
        raise ValueError("ref_probs must be >= 0 and sum to 1 over their last dimension")
    price = as_double("beta", beta, "positive")
    # pi* = ref exp(r / beta) / Z (Rafailov et al. eq. 4): Z is what a softmax divides by
    return (ref.log() + scores / price).softmax(-1)


def two_answer(p0: Number, delta_r: Number, beta: Number) -> Tensor:
    """The tilt for two answers: logit p* = logit p0 + delta_r / beta. Returns p*.

    The odds of verbose are multiplied by exp(delta_r / beta). Scores divided by their sd *before*
    KL is charged make that exp(delta_r / (sd * beta)): whitening then acts as beta * sd. Raises
    ValueError unless 0 < p0 < 1 and beta > 0.
    """
    start = as_double("p0", p0, "between 0 and 1").logit()
    gap = as_double("delta_r", delta_r)
    price = as_double("beta", beta, "positive")
    # Rafailov et al. eq. 4 for both answers: Z cancels in the odds, and the log makes them a sum
    return torch.sigmoid(start + gap / price)


def largest_drift(delta_r: Number, beta: Number) -> Tensor:
    """The p0 whose prompts move most, 1 / (1 + exp(k / 2)); they move by 1 - 2 p0."""
    k = as_double("delta_r", delta_r) / as_double("beta", beta, "positive")
    # d/dp0 [sigmoid(logit p0 + k) - p0] = 0 says p* (1 - p*) = p0 (1 - p0). So p* = 1 - p0, which
    # is logit p0 + k = -logit p0.
    return torch.sigmoid(-k / 2)


def moving_reference(p0: Number, delta_r: Number, beta: Number, rounds: int) -> Tensor:
    """p* [rounds, ...] after 1, 2, ... rounds, each anchored to the policy that the last left.

    Every round starts at KL 0 and multiplies the odds by exp(k) anew: logit p_n = logit p0 + n k.
    """
    once = two_answer(p0, delta_r, beta).logit()
    start = as_double("p0", p0, "between 0 and 1").logit()
    k = once - start
    return torch.stack([torch.sigmoid(start + n * k) for n in range(1, rounds + 1)])


def net_advantages(p: Number, p0: Number, delta_r: Number, beta: Number) -> tuple[Tensor, Tensor]:
    """Exact (A_V, A_C) with k1 in the reward, against the mean V = p R_V + (1 - p) R_C.

    Positive A_V is "still below p*".
    """
    # R_V = delta_r - beta L_V and R_C = -beta L_C, with L the log-ratio of an answer
    net = delta_r - as_double("beta", beta) * kl_pull(p, p0)
    p = as_double("p", p, "between 0 and 1")
    # A_V = R_V - V = (1 - p)(R_V - R_C) and A_C = R_C - V = -p (R_V - R_C)
    return (1 - p) * net, -p * net


def kl_pull(p: Number, p0: Number, *, place: str = "reward", estimator: str = "k1") -> Tensor:
    """How hard the KL term holds logit p back, in nats: its expected gradient over p (1 - p).

    With L_V = log(p / p0) and L_C of the other answer, an estimator k in the reward gives
    k(L_V) - k(L_C), because E[k s] = p (1 - p) times that (s: the score function). Differentiated
    in the loss it gives k'(L_V) - k'(L_C): for k1 (book_literal) 1 - 1 = 0, for k2 the gradient
    of KL, for k3 that of the forward KL (Tang and Munos 2025). The true KL has logit p - logit p0.
    """
    x = as_double("p", p, "between 0 and 1").logit()
    x0 = as_double("p0", p0, "between 0 and 1").logit()
    return _pull(x, x0, place, estimator)


def _pull(x: Tensor, x0: Tensor, place: str, estimator: str) -> Tensor:
    """kl_pull at logit p = x and logit p0 = x0."""
    demand_one_of("place", place, ("reward", "loss", "book_literal", "none"))
    demand_one_of("estimator", estimator, ("k1", "k2", "k3"))
    if place == "none" or place == "book_literal":
        return torch.zeros_like(x + x0)
    # L_V and L_C by way of the logits: log(1 - p) would lose the digits of a rare p
    verbose = logsigmoid(x) - logsigmoid(x0)
    concise = logsigmoid(-x) - logsigmoid(-x0)
    slopes = (-concise).exp() - (-verbose).exp()  # k3'(L_V) - k3'(L_C)
    if place == "loss":
        # k'(L_V) - k'(L_C), where k1' = 1, k2' = L and k3' = 1 - exp(-L)
        if estimator == "k1":
            return torch.zeros_like(x + x0)
        return verbose - concise if estimator == "k2" else slopes
    # k(L_V) - k(L_C), where k1 = L, k2 = L^2 / 2 and k3 = exp(-L) - 1 + L (Schulman 2020)
    if estimator == "k1":
        return verbose - concise
    if estimator == "k2":
        return (verbose.square() - concise.square()) / 2
    return verbose - concise - slopes


def _standardised(x: Tensor, group: int | None) -> Tensor:
    """How hard scores over their sd push logit p, over p (1 - p); x is logit p.

    In groups of finite size (None: large ones), the mean over what a group may consist of.
    """
    p = torch.sigmoid(x)
    q = torch.sigmoid(-x)
    if group is None:
        return (p * q).rsqrt()  # the gap over its sd, delta_r sqrt(p q)
    # With n of G verbose, GRPO's advantages push by n (G - n) / G^2 per unit of gap, over the
    # sample sd sqrt(n (G - n) / (G (G - 1))). A group of one kind (n = 0 or G) does not push.
    terms = []
    for n in range(1, group):
        ways = float(math.comb(group, n))  # a float: the count outgrows int64
        chance = ways * p ** (n - 1) * q ** (group - n - 1)  # binomial, over p q
        terms.append(chance * math.sqrt(n * (group - n)))
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
    demand_one_of("scale", scale, ("none", "scores", "advantages"))
    gap = as_double("delta_r", delta_r)
    price = as_double("beta", beta, "positive")
    start = as_double("p0", p0, "between 0 and 1").logit()
    x0, gap, price = (t[..., None] for t in torch.broadcast_tensors(start, gap, price))

    def net(x: Tensor) -> Tensor:
        push = gap
        if scale == "scores":
            push = gap.sign() * _standardised(x, group=None)
        # With KL in the reward the sd divides score and charge alike, which changes no sign.
        if scale == "advantages" and place != "reward":
            push = gap.sign() * _standardised(x, group)
        return push - price * _pull(x, x0, place, estimator)

    return torch.sigmoid(rest_point(net, x0)).squeeze(-1)


def rest_point(net: Callable[[Tensor], Tensor], x0: Tensor) -> Tensor:
    """The logit [..., 1] at which an ascent stops that starts at x0 [..., 1].

    It goes where the sign of net(x) points until that changes; inf or -inf if it never does.
    `net` takes logits [..., K] and is asked at every start together.
    """
    way = net(x0).sign()
    # The first of 1200 steps past a rest point ...
    x = x0 + way * _ahead(x0, 1201)
    past = net(x) * way <= 0
    first = past.int().argmax(-1, keepdim=True).clamp(min=1)
    low = x.gather(-1, first - 1)
    high = x.gather(-1, first)
    # ... halved 45 times, which leaves less than 1e-13 of it.
    for _ in range(45):
        middle = (low + high) / 2
        before = net(middle) * way > 0
        low = torch.where(before, middle, low)
        high = torch.where(before, high, middle)
    end = torch.where(past.any(-1, keepdim=True), high, way * math.inf)
    return torch.where(way == 0, x0, end)  # no gap, no way


def _ahead(x0: Tensor, points: int) -> Tensor:
    """How far to look from logit x0 [..., 1], in `points` places: to FARTHEST beyond a half from
    however rare a start, and no less from a start that lies beyond it already."""
    return torch.linspace(0, 1, points, dtype=torch.float64) * (FARTHEST + x0.abs())


def runaway_threshold(p0: Number, *, place: str = "reward", estimator: str = "k3") -> Tensor:
    """The k = delta_r / beta above which nothing stops p on its way up; inf if something always
    does. It is the largest kl_pull on (p0, 1): beyond it the ascent has no zero."""
    x0 = as_double("p0", p0, "between 0 and 1").logit()[..., None]
    pull = _pull(x0 + _ahead(x0, 6001), x0, place, estimator)
    best, where = pull.max(-1)
    still_rising = where == pull.shape[-1] - 1
    return torch.where(still_rising, math.inf, best)


def clip_steps(p: float, q: float, clip: float, *, verbose_only: bool = False) -> int:
    """The fewest PPO iterations, each optimised to the end, that take p up to q > p.

    An iteration stops where no sample pushes on (Schulman et al. 2017, eq. 7): verbose ones up to
    ratio 1 + clip, concise ones down to ratio 1 - clip. The farther of the two counts
    (`verbose_only`: the first). Raises ValueError unless 0 < p < q < 1 and 0 < clip < 1.
    """
    if not (0 < p < q < 1 and 0 < clip < 1):
        raise ValueError(f"p {p}, q {q}, clip {clip}: needs 0 < p < q < 1 and 0 < clip < 1")
    steps = 0
    while p < q:
        emptied = 1 - (1 - clip) * (1 - p)  # 1 - p' = (1 - clip)(1 - p)
        p = (1 + clip) * p  # p' = (1 + clip) p
        if not verbose_only:
            p = max(p, emptied)
        steps += 1
    return steps
