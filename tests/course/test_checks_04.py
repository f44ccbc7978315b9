"""The checks of notebook 04 accept its solutions and name the planted mistakes."""

import math

import build_notebooks as bn
import pytest
import torch
from checks import c04
from exercises import written

MASTER = "04_the_kl_penalty"
SCOPE = {"math": math, "torch": torch}
CHECKS = {
    "my_k3": c04.check_k3,
    "penalty_climb": c04.check_penalty_climb,
    "charge": c04.check_charge,
    "net_advantages": c04.check_net_advantages,
}


@pytest.mark.parametrize("name", CHECKS)
def test_solution_is_right_and_stub_is_not_written(name):
    assert CHECKS[name](written(MASTER, bn.solved, **SCOPE)[name]).startswith("right: ")
    assert CHECKS[name](written(MASTER, bn.student, **SCOPE)[name]).startswith("not written yet: ")


def k3(of):
    """A way to write k3, from the log-ratio of policy to reference."""
    return lambda logprobs, ref_logprobs: of(logprobs - ref_logprobs)


def climb(of):
    """A way to write the climb, from p, p0 and the distance in log-odds; beta goes in front."""
    return lambda p, p0, beta: beta * of(p, p0, p.logit() - p0.logit())


def kl(p, p0):
    return p * (p / p0).log() + (1 - p) * ((1 - p) / (1 - p0)).log()


def charged(total, mean):
    """A charge from two functions of (log_ratio, mask)."""
    return lambda log_ratio, mask, how: (total if how == "sequence_sum" else mean)(log_ratio, mask)


def added(x, mask):
    return (x * mask).sum(1)


def averaged(x, mask):
    return added(x, mask) / mask.sum(1)


def net(reward=lambda gap, beta, l_v, l_c: (gap - beta * l_v, -beta * l_c), baseline=None):
    """A way to write both advantages: what an answer is worth, and what was expected."""

    def advantages(p, p0, delta_r, beta):
        worth = reward(delta_r, beta, math.log(p / p0), math.log((1 - p) / (1 - p0)))
        v, c = (torch.tensor(float(x)) for x in worth)
        expected = p * v + (1 - p) * c if baseline is None else baseline(p, p0, v, c)
        return torch.stack([v - expected, c - expected])

    return advantages


MISTAKES = [
    ("my_k3", k3(lambda x: x.exp() - 1 - x), "upside down"),
    ("my_k3", k3(lambda x: x.exp() - 1 + -x), "upside down"),
    ("my_k3", k3(lambda x: (-x).exp() + x), "the -1 is missing"),
    ("my_k3", k3(lambda x: (-x).exp() - 1), "the log-ratio is missing"),
    ("my_k3", k3(lambda x: x), "that is k1"),
    ("my_k3", k3(lambda x: x**2 / 2), "that is k2"),
    ("my_k3", k3(lambda x: -x), "minus k1"),
    ("my_k3", k3(lambda x: (-x).exp() - 1 - x), "+ l has become - l"),
    ("my_k3", k3(lambda x: 1 - (-x).exp() - x), "the sign is turned round"),
    ("my_k3", k3(lambda x: ((-x).exp() - 1 + x).mean()), "the shape is []"),
    ("penalty_climb", climb(lambda p, p0, far: p * (1 - p) * far), "the sign is turned round"),
    ("penalty_climb", lambda p, p0, beta: -p * (1 - p) * (p.logit() - p0.logit()), "beta is left"),
    ("penalty_climb", climb(lambda p, p0, far: -far), "p (1 - p) is left out"),
    ("penalty_climb", climb(lambda p, p0, far: p0 - p), "the forward KL's"),
    ("penalty_climb", climb(lambda p, p0, far: -p * (1 - p) * (p / p0).log()), "only log(p / p0)"),
    ("penalty_climb", climb(lambda p, p0, far: -kl(p, p0)), "the penalty itself"),
    ("penalty_climb", climb(lambda p, p0, far: 0 * p), "that is zero: k1"),
    ("penalty_climb", climb(lambda p, p0, far: -((p * (1 - p)) ** 2) * far), "goes in once"),
    ("charge", charged(lambda x, m: x.sum(1), lambda x, m: x.mean(1)), "the mask is ignored"),
    ("charge", charged(added, lambda x, m: (x * m).mean(1)), "divides by the width"),
    ("charge", charged(averaged, added), "swapped"),
    ("charge", charged(added, added), "both are sums"),
    ("charge", charged(averaged, averaged), "both are means"),
    ("charge", charged(added, lambda x, m: added(x, m) / m.sum()), "all tokens of the batch"),
    ("charge", charged(added, lambda x, m: added(x, m) / len(m)), "over answers, not over tokens"),
    ("charge", charged(lambda x, m: x.sum(1), averaged), "the sum ignores the mask"),
    (
        "charge",
        charged(lambda x, m: added(x.abs(), m), lambda x, m: averaged(x.abs(), m)),
        "absolute values",
    ),
    ("charge", charged(lambda x, m: -added(x, m), lambda x, m: -averaged(x, m)), "the sign is"),
    ("charge", charged(added, lambda x, m: x[m].mean()), '"token_mean": the shape is [], expected'),
    ("charge", charged(added, lambda *_: None), "not written yet"),
    (
        "net_advantages",
        net(lambda gap, beta, l_v, l_c: (gap + beta * l_v, beta * l_c)),
        "KL is added",
    ),
    ("net_advantages", net(baseline=lambda *_: 0), "the baseline V is missing"),
    ("net_advantages", net(lambda gap, *_: (gap, 0)), "KL is left out"),
    ("net_advantages", net(lambda gap, beta, l_v, _: (gap - beta * l_v, 0)), "only V is charged"),
    ("net_advantages", net(lambda gap, _, l_v, l_c: (gap - l_v, -l_c)), "beta is left out"),
    ("net_advantages", lambda *given: net()(*given).flip(0), "V and C are swapped"),
    ("net_advantages", lambda *given: -net()(*given), "the sign is turned round"),
    (
        "net_advantages",
        net(baseline=lambda p, p0, v, c: p0 * v + (1 - p0) * c),
        "the reference's shares",
    ),
    ("net_advantages", net(baseline=lambda p, p0, v, c: (v + c) / 2), "the plain mean"),
    ("net_advantages", net(baseline=lambda p, p0, v, c: (1 - p) * v + p * c), "p and 1 - p are"),
]


@pytest.mark.parametrize(("name", "wrong", "word"), MISTAKES)
def test_mistakes_are_named(name, wrong, word):
    said = CHECKS[name](wrong)
    assert word in said and not said.startswith("right")


@pytest.mark.parametrize("name", CHECKS)
def test_another_way_to_write_it_is_right(name):
    own = {
        "my_k3": lambda logprobs, ref: torch.expm1(ref - logprobs) - (ref - logprobs),
        "penalty_climb": climb(
            lambda p, p0, far: -p * (1 - p) * (p * (1 - p0) / (p0 * (1 - p))).log()
        ),
        "charge": charged(added, averaged),
        "net_advantages": net(),
    }
    assert CHECKS[name](own[name]).startswith("right: ")


@pytest.mark.parametrize("name", CHECKS)
def test_whatever_a_student_writes_becomes_one_sentence(name):
    def stops(*_):
        raise KeyError("nats")

    right = written(MASTER, bn.solved, **SCOPE)[name]
    for function, word in (
        (stops, "stopped with KeyError"),
        (lambda: 1, "stopped with TypeError"),
        (lambda *given: right(*given) + math.nan, "NaN"),
        (lambda *given: right(*given) + 0.123, "not yet: entry"),
        (lambda *given: torch.cat([right(*given)] * 2), "the shape is"),
        (lambda *_: "much", "return a tensor"),
        (lambda *_: 0.5, "return a tensor"),
    ):
        said = CHECKS[name](function)
        assert word in said and "\n" not in said
