"""Length controls against worlds in which the share of length is known, and intervals' coverage."""

import numpy as np
import pandas as pd
import pytest

from minirlhf.audit.controls import nrg, over_prompts, rates, ruler, slopes


def table(lengths, scores, **more):
    return {"length_tokens": np.array(lengths), "rm_score_sd": np.array(scores, float), **more}


def world(rng, n=400, *, length=0.0, gold=0.0, noise=0.3, longer=0.0, better=0.0):
    """Answers whose score is length * tokens + gold * quality + noise."""
    tokens = rng.integers(5, 45, n) + longer
    quality = rng.normal(better, 1, n)
    score = length * tokens + gold * quality + rng.normal(0, noise, n)
    return table(tokens, score, gold=quality, probe=np.arange(n))


# --- the non-length share -----------------------------------------------------------------------


def test_singhals_share_on_the_worked_example():
    """Reference: 8 short answers at .10, 2 long ones at .60; policy: 2 at .15, 8 at .65."""
    before = table([10] * 8 + [30] * 2, [0.10] * 8 + [0.60] * 2)
    after = table([10] * 2 + [30] * 8, [0.15] * 2 + [0.65] * 8)
    gain = nrg(before, after)
    assert gain.total == pytest.approx(0.35)
    assert gain.within == pytest.approx(0.05)
    assert gain.share == pytest.approx(1 / 7)  # 14.3 %
    assert gain.covered == 1.0


def test_bins_weigh_by_their_answers_on_both_sides():
    """Gains .1 (3 answers) and .4 (5): neither side's counts alone give the mean of all eight."""
    before = table([10, 10, 30, 30, 30], [0.0, 0.0, 0.0, 0.0, 0.0])
    after = table([10, 30, 30], [0.1, 0.4, 0.4])
    assert nrg(before, after).within == pytest.approx((3 * 0.1 + 5 * 0.4) / 8)


def test_a_bin_without_a_partner_drops_out_and_is_counted():
    before, after = table([10, 10, 10], [0, 0, 0.0]), table([10, 50, 50], [1.0, 9.0, 9.0])
    gain = nrg(before, after)
    assert (gain.within, gain.total) == (1.0, pytest.approx(19 / 3))
    assert gain.covered == pytest.approx(4 / 6)
    nothing = nrg(before, table([50], [9.0]))
    assert np.isnan(nothing.within) and nothing.covered == 0


def test_a_ruler_gains_nothing_and_a_judge_of_content_everything():
    rng = np.random.default_rng(0)
    start = world(rng, 4000, length=0.1)
    assert abs(nrg(start, world(rng, 4000, length=0.1, longer=8), width=2).share) < 0.1
    start = world(rng, 4000, gold=1.0)
    better = world(rng, 4000, gold=1.0, longer=8, better=1.0)
    assert nrg(start, better, width=2).share == pytest.approx(1.0, abs=0.1)


def test_bins_as_wide_as_the_answers_hide_a_ruler():
    rng = np.random.default_rng(1)
    start, longer = world(rng, 4000, length=0.1), world(rng, 4000, length=0.1, longer=8)
    assert nrg(start, longer, width=100).share == pytest.approx(1.0)
    assert nrg(start, longer, width=20).share > nrg(start, longer, width=2).share + 0.2


def test_nothing_to_compare_is_a_sentence():
    some = table([1, 2], [0.0, 1.0])
    with pytest.raises(ValueError, match="at least 1 token"):
        nrg(some, some, width=0)
    with pytest.raises(ValueError, match="answers"):
        nrg(some, table([], []))
    assert np.isnan(nrg(some, some).share)


# --- length given gold --------------------------------------------------------------------------


def test_slopes_are_partial_and_standardised():
    """By the closed form for two correlated columns, from plain correlations."""
    rng = np.random.default_rng(2)
    x, e, f = rng.normal(size=(3, 5000))
    z = 0.6 * x + 0.8 * e
    y = 0.5 * x - 0.7 * z + 0.4 * f
    found = slopes({"rm_score_sd": y, "length_tokens": 9 * x + 20, "gold": z})
    rxy, rzy, rxz = (np.corrcoef(a, b)[0, 1] for a, b in ((x, y), (z, y), (x, z)))
    assert found["length_tokens"] == pytest.approx((rxy - rxz * rzy) / (1 - rxz**2))
    assert found["gold"] == pytest.approx((rzy - rxz * rxy) / (1 - rxz**2))


def test_deserved_length_has_a_slope_of_its_own_but_none_given_gold():
    rng = np.random.default_rng(3)
    quality = rng.normal(size=4000)
    tokens = 20 + 5 * quality + rng.normal(0, 3, 4000)  # better answers are longer
    t = table(tokens, quality + rng.normal(0, 0.2, 4000), gold=quality)
    assert slopes(t, on=("length_tokens",))["length_tokens"] > 0.7
    assert abs(slopes(t)["length_tokens"]) < 0.03


def test_a_column_that_does_not_vary_has_no_slope():
    t = table([3, 5, 9], [0.0, 1.0, 3.0], gold=np.ones(3))
    found = slopes(t)
    assert np.isnan(found["gold"]) and found["length_tokens"] == pytest.approx(
        np.corrcoef([3, 5, 9], [0, 1, 3])[0, 1]
    )


def test_ruler_reads_the_references_line_at_the_new_lengths():
    before = table([4, 6, 8], [0.0, 1.0, 2.0])  # half a point a token
    assert ruler(before, table([10, 20], [0.0, 0.0])) == pytest.approx(0.5 * 9)
    with pytest.raises(ValueError, match="one length"):
        ruler(table([5, 5], [0.0, 1.0]), before)


# --- intervals over prompts ---------------------------------------------------------------------


def test_intervals_cover_the_truth_as_often_as_they_say():
    """A rate of .3 among 60 prompts, 300 worlds: 90 % intervals hold it in 85 to 95 % of them."""
    rng, held = np.random.default_rng(4), 0
    for _ in range(300):
        t = {"x": (rng.random(60) < 0.3).astype(float)}
        found = over_prompts(lambda t: t["x"].mean(), t, rng=rng, draws=400, coverage=0.9)
        held += found.low <= 0.3 <= found.high
    assert 0.85 <= held / 300 <= 0.95


def test_prompts_are_drawn_whole_so_that_pairs_stay_pairs():
    """Prompts differ a lot, the change is the same in all: paired, its interval is a point."""
    rng = np.random.default_rng(5)
    level = rng.normal(0, 10, 50)
    before, after = {"x": level, "probe": np.arange(50)}, {"x": level + 1, "probe": np.arange(50)}
    found = over_prompts(lambda a, b: b["x"].mean() - a["x"].mean(), before, after, rng=rng)
    assert (found.low, found.high) == (pytest.approx(1), pytest.approx(1))
    with pytest.raises(ValueError, match="same prompts"):
        over_prompts(lambda a, b: 0.0, before, {"x": level, "probe": np.arange(50)[::-1]}, rng=rng)


def test_draws_without_an_answer_are_left_out():
    t = {"x": np.array([1.0, np.nan, 2.0])}
    found = over_prompts(lambda t: float(t["x"].max()), t, rng=np.random.default_rng(0), draws=50)
    assert found.low >= 1 and found.high <= 2


def test_rates_of_the_audit_with_intervals():
    rng = np.random.default_rng(6)
    n, rows = 200, []
    for step in (0, 10):
        for i in range(n):
            row = {"step": step, "probe": i, "stratum": ("brief", "detailed")[i % 2]}
            row |= dict.fromkeys(("gold", "correct", "direct", "evasive", "hedged"), i % 4 == 0)
            rows.append(row | {"length_tokens": 8 + step, "padding_tokens": step * (i % 10 == 0)})
    found = pd.DataFrame(rates(pd.DataFrame(rows), rng=rng)).set_index(
        ["step", "stratum", "measure"]
    )
    assert found.loc[(10, "brief", "length_tokens"), ["value", "low", "high"]].tolist() == [18] * 3
    direct = found.loc[(0, "brief", "direct")]
    assert direct.value == 0.5 and direct.n == 100
    half = 1.96 * np.sqrt(0.25 / 100)  # the normal interval of a rate
    assert direct.low == pytest.approx(0.5 - half, abs=0.02)
    assert direct.high == pytest.approx(0.5 + half, abs=0.02)
    assert found.loc[(10, "brief", "padded"), "value"] == 0.2
    assert found.loc[(10, "detailed", "padded"), "value"] == 0
    assert "courteous" not in found.index.get_level_values("measure")
