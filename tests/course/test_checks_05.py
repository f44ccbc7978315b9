"""The checks of notebook 05 accept its solutions and name the planted mistakes."""

import build_notebooks as bn
import pytest
import torch
from checks import c05
from exercises import written

MASTER = "05_ppo"
SCOPE = {"torch": torch}
CHECKS = {
    "backward_gae": c05.check_backward_gae,
    "whiten_masked": c05.check_whiten_masked,
    "leave_one_out": c05.check_leave_one_out,
    "clipped_surrogate": c05.check_clipped_surrogate,
}


@pytest.mark.parametrize("name", CHECKS)
def test_solution_is_right_and_stub_is_not_written(name):
    assert CHECKS[name](written(MASTER, bn.solved, **SCOPE)[name]).startswith("right: ")
    assert CHECKS[name](written(MASTER, bn.student, **SCOPE)[name]).startswith("not written yet: ")


def loop(r, v, m, gamma, lam, *, masked=True, sign=1.0, order=reversed):
    """GAE row by row and token by token, as a student would write it, or nearly."""
    out = torch.zeros_like(r)
    for i in range(len(r)):
        running, after = 0.0, 0.0
        for t in order(range(r.shape[1])):
            if masked and not m[i, t]:
                continue
            running = r[i, t] + gamma * after - sign * v[i, t] + gamma * lam * running
            after = sign * v[i, t]
            out[i, t] = running
    return out


def multiplied(carry=True, value=True, delta=True, shown=True, kept=False):
    """The backward loop with the mask multiplied in here and there, nothing skipped."""

    def f(r, v, m, gamma, lam):
        out, m = torch.zeros_like(r), m.float()
        running = after = torch.zeros(len(r))
        for t in reversed(range(r.shape[1])):
            here, before = m[:, t], after
            td = (r[:, t] + gamma * after - v[:, t]) * (here if delta else 1)
            running = (td + gamma * lam * running) * (here if carry else 1)
            after = v[:, t] * (here if value else 1)
            after = torch.where(here > 0, after, before) if kept else after
            out[:, t] = running * (here if shown else 1)
        return out

    return f


def carried_over(r, v, m, gamma, lam):
    """Right, but a hole shows what was carried over it."""
    out = loop(r, v, m, gamma, lam)
    for t in reversed(range(out.shape[1] - 1)):
        out[:, t] = torch.where(m[:, t], out[:, t], out[:, t + 1])
    return out


def in_masked(f):
    """What an unmasked `f` gives, with zeros put behind it."""
    return lambda r, v, m, g, k: torch.where(m, f(r, v, m, g, k), 0.0)


def zeroed(r, v, m, g, k):
    return loop(torch.where(m, r, 0.0), torch.where(m, v, 0.0), m, g, k, masked=False)


def other_ratio(new, old, a, clip, best=torch.minimum, ratio=None):
    rho = (new - old).exp() if ratio is None else ratio
    return best(rho * a, rho.clamp(1 - clip, 1 + clip) * a)


def rows(x, m):
    out = torch.zeros_like(x)
    for i in range(len(x)):
        out[i, m[i]] = (x[i, m[i]] - x[i, m[i]].mean()) / x[i, m[i]].std()
    return out


def mean_of_all(r, group):
    return r - r.view(-1, group).mean(1).repeat_interleave(group)


def grpo(r, group):
    return mean_of_all(r, group) / r.view(-1, group).std(1).repeat_interleave(group)


def strided(r, group):
    n = len(r) // group
    return torch.stack([r[i] - (r[i % n :: n].sum() - r[i]) / (group - 1) for i in range(len(r))])


MISTAKES = [
    ("backward_gae", lambda r, v, m, g, k: -loop(r, v, m, g, k), "the sign is turned round"),
    ("backward_gae", lambda r, v, m, g, k: loop(r, v, m, g, k, masked=False), "mask is ignored"),
    (
        "backward_gae",
        in_masked(lambda r, v, m, g, k: loop(r, v, m, g, k, masked=False)),
        "only used at the end",
    ),
    ("backward_gae", in_masked(zeroed), "still discount"),
    ("backward_gae", lambda r, v, m, g, k: loop(r, v, m, g, 1.0), "lambda is left out"),
    ("backward_gae", lambda r, v, m, g, k: loop(r, v, m, 1.0, k), "gamma is left out"),
    ("backward_gae", multiplied(), "the hole is a stop (multiplied by 0?); the value behind"),
    ("backward_gae", multiplied(delta=False), "the hole is a stop"),
    (
        "backward_gae",
        multiplied(value=False),
        "the hole is a stop (multiplied by 0?); the value of",
    ),
    ("backward_gae", multiplied(kept=True), "the hole is a stop (multiplied by 0?)"),
    (
        "backward_gae",
        multiplied(carry=False),
        "discounts once more, as if a token stood there; the",
    ),
    ("backward_gae", multiplied(carry=False, kept=True), "a hole discounts once more"),
    ("backward_gae", multiplied(carry=False, value=False), "value of a hole or of padding"),
    ("backward_gae", multiplied(carry=False, shown=False), "a hole has an advantage"),
    ("backward_gae", carried_over, "a hole has an advantage: where the mask is False it is 0"),
    ("backward_gae", lambda r, v, m, g, k: loop(r, v, m, 1.0, g * k), "missing in the TD error"),
    (
        "backward_gae",
        lambda r, v, m, g, k: loop(r, v, m, g, k / g),
        "gamma is missing in what is carried",
    ),
    ("backward_gae", lambda r, v, m, g, k: loop(r, v, m, g, 0.0), "one step only"),
    ("backward_gae", lambda r, v, m, g, k: loop(r, v, m, g, k, order=iter), "forward in time"),
    ("backward_gae", lambda r, v, m, g, k: loop(r, v, m, g, k, sign=-1.0), "wrong sign"),
    (
        "backward_gae",
        lambda r, v, m, g, k: loop(r, v, m, g, k) + v * m,
        "these are the returns",
    ),
    ("backward_gae", lambda r, v, m, g, k: loop(r, v, m, g, k)[:, :-1], "the shape"),
    ("backward_gae", lambda r, v, m, g, k: r @ v, "stopped with RuntimeError"),
    ("backward_gae", lambda r, v, m, g, k: loop(r, v, m, g, k) + 1.0, "not yet: entry"),
    ("whiten_masked", lambda x, m: (x - x.mean()) / x.std() * m, "padding counts in"),
    (
        "whiten_masked",
        lambda x, m: (x * m - (x * m).mean()) / (x * m).std() * m,
        "padding counts as zeros",
    ),
    ("whiten_masked", rows, "each answer is whitened for itself"),
    ("whiten_masked", lambda x, m: (x - x[m].mean()) / x[m].var() * m, "the variance"),
    ("whiten_masked", lambda x, m: x / x[m].std() * m, "mean is not subtracted"),
    ("whiten_masked", lambda x, m: (x - x[m].mean()) * m, "not divided by the sd"),
    (
        "whiten_masked",
        lambda x, m: (x - x[m].mean()) / x[m].std(correction=0) * m,
        "by n, not by n - 1",
    ),
    ("whiten_masked", lambda x, m: (x - x[m].mean()) / x[m].std(), "beyond the mask are not 0"),
    ("whiten_masked", lambda x, m: (x[m].mean() - x) / x[m].std() * m, "sign is turned round"),
    ("whiten_masked", lambda x, m: (x - x[m].mean()) / 0.0, "NaN or infinite"),
    ("whiten_masked", lambda x, m: x[m], "the shape"),
    ("leave_one_out", mean_of_all, "in its own baseline"),
    ("leave_one_out", lambda r, g: r - (r.sum() - r) / (len(r) - 1), "whole batch is the group"),
    ("leave_one_out", grpo, "that is GRPO"),
    (
        "leave_one_out",
        lambda r, g: r - (r.view(-1, g).sum(1).repeat_interleave(g) - r),
        "summed, not averaged",
    ),
    (
        "leave_one_out",
        lambda r, g: r - (r.view(-1, g).sum(1).repeat_interleave(g) - r) / g,
        "group instead of group - 1",
    ),
    ("leave_one_out", strided, "neighbours share a prompt"),
    ("leave_one_out", lambda r, g: -mean_of_all(r, g) * g / (g - 1), "sign is turned round"),
    ("clipped_surrogate", lambda n, o, a, c: other_ratio(o, n, a, c), "upside down"),
    (
        "clipped_surrogate",
        lambda n, o, a, c: other_ratio(n, o, a, c, ratio=n - o),
        "exp is missing",
    ),
    (
        "clipped_surrogate",
        lambda n, o, a, c: other_ratio(n, o, a, c, ratio=n / o),
        "a ratio of log-probs",
    ),
    (
        "clipped_surrogate",
        lambda n, o, a, c: torch.minimum((n - o).exp(), torch.tensor(1 + c)) * a,
        "the book's form",
    ),
    (
        "clipped_surrogate",
        lambda n, o, a, c: (n - o).exp().clamp(1 - c, 1 + c) * a,
        "without the minimum",
    ),
    (
        "clipped_surrogate",
        lambda n, o, a, c: other_ratio(n, o, a, c, best=torch.maximum),
        "maximum instead",
    ),
    ("clipped_surrogate", lambda n, o, a, c: (n - o).exp() * a, "not clipped at all"),
    ("clipped_surrogate", lambda n, o, a, c: -other_ratio(n, o, a, c), "to be maximised"),
    (
        "clipped_surrogate",
        lambda n, o, a, c: other_ratio(n, o, a, c).mean(),
        "one number came back",
    ),
    ("clipped_surrogate", lambda n, o, a, c: (n - o).exp().clamp(min=1 - c) * a, "only the lower"),
    (
        "clipped_surrogate",
        lambda n, o, a, c: torch.min((n - o).exp() * a, (n - o).clamp(-c, c).exp() * a),
        "the log-ratio is clipped",
    ),
    (
        "clipped_surrogate",
        lambda n, o, a, c: other_ratio(n, o, a, c, ratio=n.exp() - o.exp()),
        "a difference of probabilities",
    ),
    (
        "backward_gae",
        lambda r, v, m, g, k: loop(r - v, 0 * v, m, 1.0, g * k),
        "the value after the token is left out",
    ),
    (
        "leave_one_out",
        lambda r, g: (r.view(-1, g) - r.view(-1, g).sum(1, keepdim=True) / (g - 1)).flatten(),
        "counted among the group",
    ),
    ("clipped_surrogate", lambda n, o, a, c: 0.0, "a float came back"),
]


@pytest.mark.parametrize(("name", "wrong", "word"), MISTAKES)
def test_a_planted_mistake_is_named(name, wrong, word):
    said = CHECKS[name](wrong)
    assert word in said and not said.startswith("right")


def test_a_function_that_overwrites_its_input_is_judged_on_what_it_returns():
    def greedy(x, m):
        inside = x[m]
        x -= inside.mean()
        x /= inside.std()
        x[~m] = 0.0
        return x

    assert c05.check_whiten_masked(greedy).startswith("right")
