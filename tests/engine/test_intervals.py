"""Intervals: they hold the truth as often as they say, and say nothing of too few values."""

import numpy as np
import pytest

from minirlhf.engine.intervals import (
    FEWEST,
    Interval,
    bootstrap_mean,
    percentile,
    student_t,
    student_t_rows,
)

# t of 95 % by degrees of freedom, as every textbook prints it (Student 1908; Fisher 1925)
TABLE = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 19: 2.093, 29: 2.045}


def held(truth, found):
    """The share of the intervals that hold the truth."""
    return np.mean([each.low <= truth <= each.high for each in found])


def unknown(interval):
    return np.isnan(interval.low) and np.isnan(interval.high)


# --- percentiles of resampled values --------------------------------------------------------------


def test_percentiles_by_hand():
    found = percentile(7.0, np.arange(101.0), 0.9)
    assert found == (7.0, pytest.approx(5.0), pytest.approx(95.0))


def test_draws_that_are_not_finite_do_not_count():
    noisy = np.concatenate([np.arange(101.0), [np.nan, np.inf, -np.inf]])
    assert percentile(0.0, noisy) == percentile(0.0, np.arange(101.0))
    assert unknown(percentile(3.0, np.array([np.nan, np.inf])))
    assert percentile(3.0, np.array([])).mean == 3.0


@pytest.mark.parametrize(("n", "coverage"), [(40, 0.9), (60, 0.95)])
def test_bootstrap_holds_the_mean_of_a_skewed_world(n, coverage):
    """1,000 worlds of an exponential: a little below what is asked, as is known of percentiles."""
    rng = np.random.default_rng(0)
    worlds = rng.exponential(2.0, (1000, n))
    found = [bootstrap_mean(x, rng, coverage=coverage, draws=400) for x in worlds]
    assert coverage - 0.04 < held(2.0, found) < coverage + 0.01


def test_bootstrap_is_as_wide_as_the_error_of_the_mean():
    rng = np.random.default_rng(1)
    values = rng.normal(5.0, 3.0, 400)
    found = bootstrap_mean(values, rng, draws=20_000)
    error = values.std() / np.sqrt(len(values))
    assert found.mean == values.mean()
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.03)


@pytest.mark.parametrize("fewest", [2, FEWEST])
def test_bootstrap_of_too_few_has_a_mean_and_no_limits(fewest):
    values = np.arange(float(fewest))
    few = bootstrap_mean(values[:-1], np.random.default_rng(0), fewest=fewest)
    assert few.mean == values[:-1].mean() and unknown(few)
    assert not unknown(bootstrap_mean(values, np.random.default_rng(0), fewest=fewest))
    nothing = bootstrap_mean(values[:0], np.random.default_rng(0), fewest=fewest)
    assert np.isnan(nothing.mean) and unknown(nothing)


def test_one_seed_one_interval():
    values = np.random.default_rng(0).normal(size=30)
    one, again = (bootstrap_mean(values, np.random.default_rng(5)) for _ in range(2))
    assert one == again != bootstrap_mean(values, np.random.default_rng(6))


# --- Student's t ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("freedom", "t"), TABLE.items())
def test_student_by_the_printed_table(freedom, t):
    values = np.random.default_rng(freedom).normal(10.0, 2.0, freedom + 1)
    half = t * values.std(ddof=1) / np.sqrt(freedom + 1)
    found = student_t(values)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, rel=1e-3)
    assert found.high == pytest.approx(values.mean() + half, rel=1e-3)


@pytest.mark.parametrize(("n", "coverage"), [(2, 0.95), (5, 0.95), (5, 0.8), (20, 0.95)])
def test_student_holds_the_mean_of_a_normal_world_however_few(n, coverage):
    worlds = np.random.default_rng(2).normal(-1.0, 3.0, (4000, n))
    rows = student_t_rows(worlds, coverage, fewest=2)
    share = np.mean((rows.low <= -1.0) & (rows.high >= -1.0))
    assert share == pytest.approx(coverage, abs=0.015)


def test_rows_are_the_scalars():
    values = np.random.default_rng(3).normal(size=(40, 6))
    values[np.random.default_rng(4).random(values.shape) < 0.3] = np.nan
    values[0], values[1] = np.nan, [1.0, 2.0, 3.0, np.nan, np.nan, np.nan]
    rows = student_t_rows(values, 0.9, fewest=2)
    table = np.stack(rows)  # [3, 40]
    for i, row in enumerate(values):
        one = student_t(row, 0.9)
        assert all(type(figure) is float for figure in one)
        np.testing.assert_allclose(one, table[:, i], rtol=1e-12)


def test_unknown_values_do_not_count():
    known = np.array([1.0, 2.0, 4.0])
    assert student_t(np.array([1.0, np.nan, 2.0, 4.0, np.nan])) == student_t(known)


@pytest.mark.filterwarnings("error")
def test_student_of_too_few_has_a_mean_and_no_limits():
    alone = student_t(np.array([np.nan, 3.0]))
    assert isinstance(alone, Interval) and alone.mean == 3.0 and unknown(alone)
    nothing = student_t(np.array([np.nan, np.nan]))
    assert np.isnan(nothing.mean) and unknown(nothing) and unknown(student_t(np.array([])))


@pytest.mark.parametrize("fewest", [2, 3, 4])
@pytest.mark.filterwarnings("error")
def test_rows_with_fewer_than_asked_have_no_limits(fewest):
    values = np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, np.nan], [1.0, 2.0, np.nan, np.nan]])
    rows = student_t_rows(values, fewest=fewest)
    np.testing.assert_allclose(rows.mean, [2.5, 2.0, 1.5])
    known = [4, 3, 2]
    assert np.isfinite(rows.low).tolist() == [n >= fewest for n in known]
    assert np.isfinite(rows.high).tolist() == [n >= fewest for n in known]
    assert np.isfinite(student_t_rows(values).low).tolist() == [True, True, False]


def test_values_that_are_all_alike_have_no_width():
    assert student_t(np.full(5, 0.25)) == (0.25, 0.25, 0.25)
    assert bootstrap_mean(np.full(12, 0.25), np.random.default_rng(0)) == (0.25, 0.25, 0.25)


def test_an_unknown_value_leaves_no_limits():
    """Draws that happen to miss it would else give an interval round a mean that is not known."""
    values = np.array([0.5] * 19 + [np.nan])
    found = bootstrap_mean(values, np.random.default_rng(0))
    assert np.isnan(found).all()
