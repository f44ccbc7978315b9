"""The alarm against worlds whose days are known: its rate is the one that was set."""

import numpy as np
import pytest

from minirlhf.audit.auditor import answer, grade
from minirlhf.audit.monitor import Monitor, calibrate, stream
from minirlhf.drift.data import shipped


def worlds(rng, draws, probes=24, *, longer=0.0, evades=0.1):
    """Answers of a made-up reference: every probe has its own typical length."""
    base = np.linspace(5, 20, probes)
    lengths = rng.poisson(base + longer, (draws, probes)) + 1
    return {"length_tokens": lengths, "evasive": rng.random((draws, probes)) < evades}


def plain(threshold=2.0, slack=0.5, rate=0.05):
    return Monitor(("a",), np.array([10.0]), np.array([2.0]), slack, threshold, 5, rate)


def test_cusum_by_hand():
    """z = 1, -3, 2, 1, 0 with slack .5: up to .5, back to 0, then 1.5, 2, 1.5."""
    days = np.array([[12.0], [4.0], [14.0], [12.0], [10.0]])
    assert plain().charts(days)[:, 0].tolist() == [0.5, 0.0, 1.5, 2.0, 1.5]
    assert plain(1.9).alarm(days) == 4 and plain(1.4).alarm(days) == 3
    assert plain(2.0).alarm(days) == 0  # above, not at


def test_one_sided_and_every_chart_by_itself():
    monitor = Monitor(("a", "b"), np.zeros(2), np.ones(2), 0.5, 3.0, 5, 0.05)
    days = np.zeros((2, 5, 2))
    days[0, :, 0], days[1, :, 1] = -9, 2
    assert monitor.alarm(days).tolist() == [0, 3]


def test_scale_is_that_of_days_with_fixed_probes():
    """Probes differ widely: that is no variation from day to day."""
    rng = np.random.default_rng(0)
    monitor = calibrate(worlds(rng, 4000), rng=rng, watches=10)
    base = np.linspace(5, 20, 24)
    assert monitor.mean[0] == pytest.approx(base.mean() + 1, abs=0.1)
    assert monitor.sd[0] == pytest.approx(np.sqrt(base.sum()) / 24, rel=0.05)
    assert monitor.sd[1] == pytest.approx(np.sqrt(0.1 * 0.9 / 24), rel=0.05)


def test_false_alarms_come_as_often_as_was_set():
    """150 short records, four fresh watches each: within four binomial errors of 20 %."""
    rng, alarms, watches = np.random.default_rng(1), 0, 0
    for _ in range(150):
        monitor = calibrate(worlds(rng, 12), rng=rng, rate=0.2, days=20, watches=150)
        fresh = stream(worlds(rng, 400), 20, rng=rng, runs=4)
        alarms, watches = alarms + int((monitor.alarm(fresh) > 0).sum()), watches + 4
    error = np.sqrt(0.2 * 0.8 / watches)
    assert abs(alarms / watches - 0.2) < 4 * error


def test_a_short_record_asks_for_a_higher_threshold():
    rng = np.random.default_rng(2)
    short, long = (calibrate(worlds(rng, k), rng=rng, watches=400).threshold for k in (4, 400))
    assert short > 1.3 * long


def test_a_shift_is_found_and_sooner_the_larger_it_is():
    rng = np.random.default_rng(3)
    reference, drifted = worlds(rng, 60), worlds(rng, 60, longer=6)
    monitor = calibrate(reference, rng=rng, rate=0.05, days=30, watches=400)
    delays = []
    for share in (0.1, 0.3, 1.0):
        days = stream(reference, 30, rng=rng, runs=100, other=drifted, share=share)
        first = monitor.alarm(days)
        delays.append(np.where(first == 0, 31, first).mean())
    assert delays[0] > delays[1] > delays[2] and delays[2] < 3


def test_shorter_answers_raise_no_alarm():
    rng = np.random.default_rng(4)
    monitor = calibrate(worlds(rng, 40), rng=rng, watches=300)
    days = stream(worlds(rng, 40, longer=-2, evades=0.02), 30, rng=rng, runs=100)
    assert (monitor.alarm(days) == 0).all()


def test_a_stream_answers_every_probe_from_its_own_record():
    x = {"a": np.tile(np.arange(4.0), (3, 1)), "b": np.ones((3, 4))}
    rng = np.random.default_rng(5)
    assert (stream(x, 7, rng=rng, runs=2) == [1.5, 1.0]).all()
    other = {"b": np.zeros((2, 4)), "a": np.full((2, 4), 9.0)}
    days = stream(x, 2000, rng=rng, other=other, share=0.25)[0]
    assert days[:, 1].mean() == pytest.approx(0.75, abs=0.02)
    assert days[:, 0].mean() == pytest.approx(0.75 * 1.5 + 0.25 * 9, abs=0.1)


def test_what_cannot_be_calibrated_is_a_sentence():
    rng = np.random.default_rng(6)
    with pytest.raises(ValueError, match="constant: \\['evasive'\\]"):
        calibrate(worlds(rng, 9, evades=0), rng=rng)
    with pytest.raises(ValueError, match="at least 2 draws"):
        calibrate(worlds(rng, 1), rng=rng)
    with pytest.raises(ValueError, match="0 < rate < 1"):
        calibrate(worlds(rng, 9), rng=rng, rate=1.0)


def test_the_shipped_drift_is_found_within_two_days():
    """Twelve brief probes of the shipped desk: the policy of step 10 takes over on day 11."""
    case = shipped()
    probes = [p for p in case.desk.probes(24) if p.stratum == "brief"]

    def recorded(model, draws, seed):
        prompts = case.desk.encode(probes).repeat(draws, 1)
        grades = grade(case.desk, probes * draws, *answer(case.desk, model, prompts, seed))
        return {n: grades[n].reshape(draws, -1) for n in ("length_tokens", "evasive")}

    rng, reference = np.random.default_rng(7), recorded(case.reference, 20, 0)
    monitor = calibrate(reference, rng=rng, rate=0.05, days=20, watches=300)
    fresh, drifted = recorded(case.reference, 10, 1), recorded(case.policy(10), 10, 2)
    days = np.stack([np.concatenate([fresh[n], drifted[n]]).mean(1) for n in fresh], -1)
    assert 11 <= monitor.alarm(days) <= 12
