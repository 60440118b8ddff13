"""Every statistic against a slow reference, a property, or SciPy; and what breaks when a law is broken."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

import stripe
from stripe import stats
from stripe.stats import GateMoments, Moments, arithmetic, verdicts
from stripe.stats.epochs import row_of
from stripe.stats.groups import block_keys, coarse
from stripe.stats.intervals import jackknife
from stripe.stats.runs import ahead

few = settings(deadline=None, max_examples=25)


def stripes(samples=60, channels=12, *, noise=0.05, row=0.0, seed=0, dtype=np.float64):
    """Attention-like values: channel effect + sample effect + noise, around 0.5."""
    rng = np.random.default_rng(seed)
    effect = rng.uniform(0.3, 0.7, channels) + row * rng.normal(size=(samples, 1))
    return (effect + noise * rng.normal(size=(samples, channels))).astype(dtype)


@dataclass
class Named:
    name: str
    form: str = "multiplicative"


class MemoryRun:
    """A run held in memory: {epoch: {gate: values}}."""

    has_samples = keeps_moments = True

    def __init__(self, records, labels=None):
        self.records, self._labels = records, labels
        self.epochs = sorted(records)
        self.gates = [Named(name) for name in next(iter(records.values()), {})]

    def attention(self, gate, epoch):
        return self.records[epoch][gate]

    def batches(self, epoch, gates):
        for rows in (slice(0, 13), slice(13, None)):
            yield {gate: self.records[epoch][gate][rows] for gate in gates}

    def labels(self, epoch):
        samples = len(next(iter(self.records[epoch].values())))
        return np.full(samples, -1) if self._labels is None else self._labels

    def moments(self, epochs, gates):
        return {
            (e, g): Moments.of(self.records[e][g], labels=self.labels(e)) for e, g in itertools.product(epochs, gates)
        }


# ---- slow references: the definitions, value by value ----------------------------------------------------


def slow_mean(numbers):
    return math.fsum(numbers) / len(numbers)


def slow_variance(numbers):
    mean = slow_mean(numbers)
    return math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)


def slow_columns(values):
    return [[float(value) for value in column] for column in np.asarray(values, dtype=float).T]


def slow_residuals(values):
    """Residual mean square of the two-way layout: A_nc - row - column + grand, cell by cell."""
    samples, channels = values.shape
    rows, columns = [slow_mean(row) for row in values.tolist()], [slow_mean(c) for c in slow_columns(values)]
    grand = slow_mean(rows)
    residuals = [
        (float(values[n, c]) - rows[n] - columns[c] + grand) ** 2 for n in range(samples) for c in range(channels)
    ]
    return math.fsum(residuals) / ((samples - 1) * (channels - 1)), slow_variance(rows)


def slow_strength(values):
    columns = slow_columns(values)
    within = slow_mean([slow_variance(column) for column in columns])
    means = [slow_mean(column) for column in columns]
    between = max(slow_variance(means) - slow_residuals(values)[0] / len(values), 0.0)
    return between / (between + within), between, within


def slow_shares(values):
    rest, rows = slow_residuals(values)
    sample = max(rows - rest / values.shape[1], 0.0)
    strength, between, within = slow_strength(values)
    return strength, sample / (between + within), (within - sample) / (between + within)


def slow_label_share(values, labels):
    """One-way ANOVA with sums of squares pooled over channels."""
    between = within = error = 0.0
    classes = sorted({int(label) for label in labels if label >= 0})
    for column in slow_columns(values):
        groups = [[x for x, label in zip(column, labels, strict=True) if label == k] for k in classes]
        known = [x for group in groups for x in group]
        grand = slow_mean(known)
        between += math.fsum(len(group) * (slow_mean(group) - grand) ** 2 for group in groups)
        inside = math.fsum((x - slow_mean(group)) ** 2 for group in groups for x in group)
        within += inside
        error += inside / (len(known) - len(classes))
    total = between + within
    return between / total, (between - (len(classes) - 1) * error) / (total + error)


# ---- moments ---------------------------------------------------------------------------------------------


def assert_same_moments(actual, expected, rtol=1e-12):
    assert actual.count == expected.count
    assert (actual.left_out, actual.nonfinite) == (expected.left_out, expected.nonfinite)
    np.testing.assert_array_equal(actual.near, expected.near)
    for mine, others in ((actual.blocks, expected.blocks), (actual.classes, expected.classes)):
        np.testing.assert_array_equal(mine.keys, others.keys)
        np.testing.assert_array_equal(mine.counts, others.counts)
        np.testing.assert_allclose(mine.means, others.means, rtol=rtol)
    for name in ("mean", "m2"):
        np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), rtol=rtol, atol=1e-300)
    for name in ("low", "high"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(2, 1), (5, 3), (40, 300), (3000, 61)])
def test_moments_equal_a_slow_reference(shape, dtype):
    values = np.random.default_rng(1).random(shape).astype(dtype)
    measured = Moments.of(values)
    columns = slow_columns(values)
    np.testing.assert_allclose(measured.mean, [slow_mean(c) for c in columns], rtol=1e-14)
    np.testing.assert_allclose(measured.variance, [slow_variance(c) for c in columns], rtol=1e-12)
    np.testing.assert_allclose(measured.std, [math.sqrt(slow_variance(c)) for c in columns], rtol=1e-12)
    np.testing.assert_array_equal(measured.low, values.min(axis=0))
    np.testing.assert_array_equal(measured.high, values.max(axis=0))
    wide = values.astype(np.float64)
    assert measured.near.tolist() == [np.count_nonzero(np.abs(wide - bound) <= 1e-3) for bound in (0, 1, 2)]
    assert measured.nonfinite == 0


def test_moments_of_a_near_perfect_stripe_keep_their_digits():
    values = stripes(4000, 5, noise=1e-6, dtype=np.float32)
    exact = [slow_variance(column) for column in slow_columns(values)]
    np.testing.assert_allclose(Moments.of(values).variance, exact, rtol=1e-12)
    wide = values.astype(np.float64)
    naive = (np.square(wide).sum(axis=0) - wide.sum(axis=0) ** 2 / len(wide)) / (len(wide) - 1)
    assert np.max(np.abs(naive / exact - 1)) > 1e-6  # control: without the shift the digits are lost


def test_moments_survive_a_first_sample_far_from_the_others():
    values = stripes(3000, 4)
    values[0] = 1e4
    exact = [slow_variance(column) for column in slow_columns(values)]
    np.testing.assert_allclose(Moments.of(values).variance, exact, rtol=1e-12)


@few
@given(
    st.integers(1, 60),
    st.integers(1, 9),
    st.lists(st.floats(0, 1), max_size=6),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-3, 0.1]),
)
def test_moments_of_any_split_merge_to_the_whole(samples, channels, cuts, seed, noise):
    values = stripes(samples, channels, noise=noise, seed=seed, dtype=np.float32)
    values[:, 0] = 0.0005
    at = sorted({int(cut * samples) for cut in cuts} - {0, samples})
    parts = [Moments.of(values[rows], sample_ids=rows) for rows in np.split(np.arange(samples), at)]
    merged = reduce(Moments.merge, parts)
    assert_same_moments(merged, Moments.of(values))
    reverse = reduce(Moments.merge, parts[::-1])
    assert_same_moments(reverse, merged)


def test_merging_is_not_adding():
    values = stripes(40, 3)
    low, high = Moments.of(values[:20]), Moments.of(values[20:] + 1, sample_ids=np.arange(20, 40))
    whole = Moments.of(np.concatenate([values[:20], values[20:] + 1]))
    assert_same_moments(low.merge(high), whole)
    assert np.all(low.m2 + high.m2 < 0.5 * whole.m2)  # control: the distance of the means is most of it


@few
@given(st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_statistics_ignore_the_order_of_samples(samples, seed):
    values = stripes(samples, 6, row=0.02, seed=seed)
    labels = np.arange(samples) % 2
    order = np.random.default_rng(seed).permutation(samples)
    assert_same_moments(Moments.of(values[order], sample_ids=order), Moments.of(values), rtol=1e-11)
    one, two = stats.two_way_shares(values), stats.two_way_shares(values[order])
    assert (one.channel, one.sample) == pytest.approx((two.channel, two.sample), rel=1e-9, abs=1e-12)
    if samples >= 8:  # of four samples the estimate may be the difference of two numbers that are all but equal
        assert stats.effective_rank(values[order]) == pytest.approx(stats.effective_rank(values), rel=1e-9)
    if samples > 2:
        share = stats.label_share(values[order], labels[order]).omega_squared
        assert share == pytest.approx(stats.label_share(values, labels).omega_squared, rel=1e-9, abs=1e-12)


def test_a_single_sample_has_a_mean_and_no_variance():
    measured = Moments.of(np.array([[0.25, 0.5]]))
    np.testing.assert_array_equal(measured.mean, [0.25, 0.5])
    assert np.isnan(measured.std).all()
    assert math.isnan(stats.stripe_strength(measured).strength)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 3), (3, 0)])
def test_values_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(samples, channels\)"):
        Moments.of(np.zeros(shape))


def test_moments_of_different_gates_do_not_merge():
    with pytest.raises(ValueError, match="2 and of 3 channels"):
        Moments.of(np.zeros((4, 2))).merge(Moments.of(np.zeros((4, 3))))


def parted(values, pieces, ids, labels):
    """Measure samples in so many pieces."""
    cuts = [np.array_split(each, pieces) for each in (values, ids, labels)]
    return [Moments.of(v, sample_ids=i, labels=k) for v, i, k in zip(*cuts, strict=True)]


@pytest.mark.parametrize("samples", [20, 33, 300])
def test_every_statistic_of_1_2_and_7_parts_in_any_order_is_that_of_one_pass(samples):
    rng = np.random.default_rng(samples)
    values = stripes(samples, 9, noise=0.1, row=0.05, dtype=np.float32)
    ids, labels = rng.permutation(10**6)[:samples], rng.integers(-1, 3, samples)
    whole = row_of(Moments.of(values, sample_ids=ids, labels=labels))
    assert whole["strength_low"] < whole["strength"] < whole["strength_high"]
    for pieces in (1, 2, 7):
        found = parted(values, pieces, ids, labels)
        for order in (found, found[::-1], [found[i] for i in rng.permutation(pieces)]):
            row = row_of(reduce(Moments.merge, order))
            assert all(
                row[name] == pytest.approx(value, rel=1e-12, nan_ok=True)
                for name, value in whole.items()
                if value != ""
            )
    other = row_of(reduce(Moments.merge, parted(values, 7, ids, labels)[1:]))
    assert other["strength"] != pytest.approx(whole["strength"], rel=1e-12)  # control: a part is missing


def test_samples_are_dealt_by_their_ids_alone():
    ids = np.arange(-5, 4000)
    keys = coarse(block_keys(ids))
    sizes = np.bincount(keys)
    assert sizes.size == 32
    assert scipy.stats.chisquare(sizes).pvalue > 1e-3
    assert scipy.stats.chisquare(np.bincount(coarse(block_keys(32 * ids)), minlength=32)).pvalue > 1e-3
    np.testing.assert_array_equal(coarse(block_keys(ids[::-1])), keys[::-1])
    assert len(set(block_keys(ids).tolist())) == len(ids)


def test_no_more_samples_than_blocks_are_a_block_each():
    assert Moments.of(stripes(32, 3)).blocks.counts.tolist() == [1] * 32
    assert Moments.of(stripes(33, 3)).blocks.counts.max() > 1
    halves = [Moments.of(stripes(20, 3), sample_ids=np.arange(20) + at) for at in (0, 20)]
    assert len(halves[0].merge(halves[1]).blocks.keys) <= 32


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_counted_and_left_out(bad):
    values, ids, labels = stripes(50, 4), np.arange(50), np.arange(50) % 3
    values[7], values[30, 2] = bad, bad
    rest = np.delete(np.arange(50), [7, 30])
    clean = Moments.of(values[rest], sample_ids=ids[rest], labels=labels[rest])
    for pieces in (1, 2, 7, 50):
        found = reduce(Moments.merge, parted(values, pieces, ids, labels))
        assert (found.count, found.left_out, found.nonfinite) == (48, 2, 5)
        assert found.finite.all()
        assert stats.flags(found) == ("nonfinite",)
        ours, expected = row_of(found), row_of(clean)
        for name in set(ours) - {"left_out", "flags"}:
            assert ours[name] == pytest.approx(expected[name], rel=1e-10, nan_ok=True), name
    with_it = stats.stripe_strength(stripes(50, 4)).strength
    assert with_it != pytest.approx(stats.stripe_strength(clean).strength, rel=1e-10)  # control: two samples matter


def test_a_channel_that_is_never_finite_is_left_out_in_place_of_all_samples():
    values, ids = stripes(50, 5), np.arange(50)
    values[:, 2], values[9, 0] = np.nan, np.inf
    clean = Moments.of(np.delete(np.delete(values, 2, axis=1), 9, axis=0), sample_ids=np.delete(ids, 9))
    for pieces in (1, 2, 7, 50):
        found = reduce(Moments.merge, parted(values, pieces, ids, np.full(50, -1)))
        assert (found.count, found.left_out, found.nonfinite) == (49, 1, 51)
        assert found.finite.tolist() == [True, True, False, True, True]
        assert stats.stripe_strength(found).strength == pytest.approx(stats.stripe_strength(clean).strength, rel=1e-10)
        assert stats.strength_interval(found).low == pytest.approx(stats.strength_interval(clean).low, rel=1e-8)


def test_moments_of_nothing_finite_say_so():
    nothing = Moments.of(np.full((4, 3), np.nan))
    assert (nothing.count, nothing.left_out) == (0, 4)
    assert all(np.isnan(value) for name, value in row_of(nothing).items() if isinstance(value, float))
    some = Moments.of(stripes(10, 3), sample_ids=np.arange(10) + 4)
    assert nothing.merge(some).count == some.merge(nothing).count == 10
    assert some.merge(nothing).left_out == 4


def test_many_gates_side_by_side_are_each_gate_by_itself():
    rng = np.random.default_rng(0)
    values = {gate: stripes(90, width, seed=width, dtype=np.float32) for gate, width in (("a", 5), ("b", 1), ("c", 8))}
    values["b"][70, 0] = np.nan
    ids, labels = rng.permutation(90), rng.integers(-1, 4, 90)
    measured = GateMoments({gate: each.shape[1] for gate, each in values.items()})
    assert measured.empty
    for rows in np.array_split(np.arange(90), 5):
        measured.add({gate: each[rows] for gate, each in values.items()}, ids[rows], labels[rows])
    for gate, found in measured.moments().items():
        assert_same_moments(found, Moments.of(values[gate], sample_ids=ids, labels=labels), rtol=1e-11)


@pytest.mark.parametrize("spoiled", [False, True])
def test_means_of_too_many_classes_are_not_kept(spoiled):
    values = stripes(30, 3)
    if spoiled:
        values[3] = np.nan
    for most, kept in ((30, True), (10, False), (0, False), (None, True)):
        measured = GateMoments({"a": 3}, classes=most)
        for rows in (slice(0, 7), slice(7, 30)):
            measured.add({"a": values[rows]}, np.arange(30)[rows], np.arange(30)[rows])
        found = measured.moments()["a"]
        assert (found.classes is not None) == kept
        assert math.isnan(stats.label_share(found).eta_squared) == (not kept)


# ---- flags -----------------------------------------------------------------------------------------------


def test_flags_name_what_is_wrong_and_leave_stripes_alone():
    perfect = np.broadcast_to(np.linspace(0.1, 0.9, 6), (30, 6))
    half = np.full((30, 6), 0.5)
    open_or_shut = np.tile([0.0005, 0.9995, 1.0], (30, 2))
    noisy = perfect + 1e-5 * np.random.default_rng(0).normal(size=perfect.shape)
    assert stats.flags(noisy) == ()
    assert stats.flags(perfect) == ("constant",)  # what a module gives whose hidden units are all inactive
    assert stats.flags(half) == ("dead",)
    assert stats.flags(half + np.linspace(0, 9e-7, 6)) == ("dead",)
    assert stats.flags(half + np.linspace(0, 2e-6, 6)) == ("constant",)
    assert stats.flags(open_or_shut) == ("constant", "saturated")
    assert stats.flags(np.zeros((30, 6))) == ("dead", "saturated")
    assert stats.flags(np.full((30, 6), np.nan)) == ("nonfinite",)
    assert stats.flags(np.full((30, 6), np.inf)) == ("nonfinite",)
    assert stats.flags(Moments.of(noisy)) == ()


def test_saturated_means_more_than_99_percent():
    values = np.ones((100, 2))
    values[:2, 0] = 0.5
    assert stats.flags(values) == ()
    values[0, 0] = -0.0005
    assert stats.flags(values) == ("saturated",)


def test_saturation_knows_the_gates_form_and_its_upper_bound():
    rng = np.random.default_rng(0)
    at_zero = 1e-4 * rng.normal(size=(50, 4))
    assert stats.flags(at_zero, "additive") == ()
    assert stats.flags(np.abs(at_zero), "multiplicative") == ("saturated",)
    doubled = np.where(rng.random((50, 4)) < 0.5, 2 - 1e-5, 1e-5)  # 2 * sigmoid, open or shut
    assert stats.flags(doubled) == ("saturated",)
    assert stats.flags(np.where(doubled > 1, 1.0, 0.0) + 0.5) == ()
    assert stats.flags(np.where(rng.random((50, 4)) < 0.5, 1.0, 2.0)) == ()  # 1 is amid the range of 2 * sigmoid
    unbounded = np.where(rng.random((50, 4)) < 0.5, 1.0, 7.0)
    assert stats.flags(unbounded) == ()


# ---- strength, shares, rank ------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [1e-5, 0.02, 0.3])
def test_strength_equals_a_slow_reference(noise):
    values = stripes(37, 11, noise=noise, dtype=np.float32)
    found = stats.stripe_strength(Moments.of(values))
    strength, between, within = slow_strength(values)
    assert found.strength == pytest.approx(strength, rel=1e-11)
    assert found.between == pytest.approx(between, rel=1e-11)
    assert found.within == pytest.approx(within, rel=1e-11)
    uncorrected = slow_variance([slow_mean(column) for column in slow_columns(values)])
    assert found.between != pytest.approx(uncorrected, rel=1e-11)  # control: W/N is really taken off


def test_strength_is_one_for_perfect_stripes_and_near_zero_for_noise():
    perfect = np.broadcast_to(np.linspace(0.1, 0.9, 8), (50, 8))
    assert stats.stripe_strength(Moments.of(perfect)).strength == 1.0
    noise = np.random.default_rng(0).normal(size=(2000, 200))
    assert stats.stripe_strength(Moments.of(noise)).strength < 1e-3


@pytest.mark.parametrize("value", [0.5, 0.1, 1 / 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_varies_nothing_is_claimed(value, dtype):
    values = np.full((33, 7), value, dtype)
    measured = Moments.of(values[:5]).merge(Moments.of(values[5:]))
    assert math.isnan(stats.stripe_strength(measured).strength)
    shares = stats.two_way_shares(values)
    interval = stats.strength_interval(values)
    label = stats.label_share(values, np.arange(33) % 3)
    found = [shares.channel, shares.sample, shares.rest, interval.low, interval.high]
    found += [label.eta_squared, label.omega_squared, stats.effective_rank(values)]
    assert np.isnan(found).all()


@few
@given(st.integers(3, 30), st.integers(2, 12), st.floats(0.1, 50), st.floats(-5, 5), st.integers(0, 999))
def test_shares_do_not_depend_on_scale_or_offset(samples, channels, scale, offset, seed):
    values = stripes(samples, channels, row=0.05, seed=seed)
    one, two = stats.two_way_shares(values), stats.two_way_shares(scale * values + offset)
    assert (one.channel, one.sample, one.rest) == pytest.approx((two.channel, two.sample, two.rest), abs=1e-9)
    assert one.channel + one.sample + one.rest == pytest.approx(1.0, abs=1e-12)
    assert one.channel == stats.stripe_strength(Moments.of(values)).strength
    assert min(one.channel, one.sample, one.rest) >= 0


@pytest.mark.parametrize("row", [0.0, 0.05, 0.5])
def test_shares_equal_a_slow_reference(row):
    values = stripes(25, 9, row=row)
    found = stats.two_way_shares(values)
    assert (found.channel, found.sample, found.rest) == pytest.approx(slow_shares(values), rel=1e-10, abs=1e-12)


def test_the_samples_share_sees_rows_that_differ_as_a_whole():
    assert stats.two_way_shares(stripes(500, 50, row=0.3)).sample > 0.7
    assert stats.two_way_shares(stripes(500, 50)).sample < 1e-3


def test_a_single_channel_has_no_strength():
    shares = stats.two_way_shares(stripes(10, 1))
    assert np.isnan([shares.channel, shares.sample, shares.rest]).all()


def test_the_strength_is_icc_2_1_by_a_mixed_model_simulation_and_its_relatives_are_named():
    """Shrout and Fleiss's table of six targets by four judges: they print .17, .29 and .71."""
    ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
    found = stats.intraclass_correlations(ratings.T)  # judges are samples, targets channels
    assert round(found.icc_1_1, 2) == 0.17
    assert round(found.icc_2_1, 2) == 0.29
    assert round(found.icc_3_1, 2) == 0.71
    assert found.icc_2_1 == stats.stripe_strength(ratings.T).strength
    swapped = stats.intraclass_correlations(ratings)
    assert swapped.icc_2_1 != pytest.approx(found.icc_2_1, abs=0.05)  # control: samples are not channels


def simulated(samples, channels, strength, *, common, seed):
    """Yield gates of this true strength; so much of the noise's variance is common to a row."""
    rng = np.random.default_rng(seed)
    while True:
        mean = rng.normal(size=channels)
        mean = (mean - mean.mean()) / mean.std(ddof=1) * math.sqrt(strength)
        noise = math.sqrt(common) * rng.normal(size=(samples, 1)) + math.sqrt(1 - common) * rng.normal(
            size=(samples, channels)
        )
        yield 0.5 + 0.1 * (mean + math.sqrt(1 - strength) * noise)


@pytest.mark.parametrize("common", [0.0, 0.5, 0.95])
def test_the_estimate_is_unbiased_where_rows_shift_as_a_whole(common):
    gates = list(itertools.islice(simulated(20, 64, 0.3, common=common, seed=1), 200))
    estimates = [stats.stripe_strength(gate).between / 0.01 for gate in gates]
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(0.3, abs=4 * error + 0.002)
    plain = np.mean([max(gate.mean(0).var(ddof=1) - gate.var(0, ddof=1).mean() / 20, 0) / 0.01 for gate in gates])
    assert (plain < 0.3 - 0.01) == (common > 0)  # control: W / N is too much, unless rows do not shift


@pytest.mark.parametrize(
    ("samples", "channels", "strength", "common"),
    [(20, 64, 0.3, 0.0), (20, 64, 0.9, 0.0), (100, 256, 0.1, 0.0), (100, 256, 0.5, 0.0), (60, 32, 0.5, 0.5)],
)
def test_the_interval_holds_the_true_strength_and_its_estimate(samples, channels, strength, common):
    held = narrow = 0
    for gate in itertools.islice(simulated(samples, channels, strength, common=common, seed=2), 150):
        moments = Moments.of(gate)
        estimate, interval = stats.stripe_strength(moments).strength, stats.strength_interval(moments)
        half = stats.strength_interval(moments, confidence=0.5)
        assert interval.low <= half.low <= estimate <= half.high <= interval.high
        held += interval.low <= strength <= interval.high
        narrow += half.low <= strength <= half.high
    assert 0.88 <= held / 150 <= 1.0
    assert 0.3 < narrow / 150 < 0.7  # control: half is held half the time


def test_the_jackknife_of_a_mean_is_the_interval_of_students_t():
    """Of single normal samples the jackknife is the textbook's interval, but for what is estimated of their shape."""
    rng = np.random.default_rng(4)
    values = rng.normal(size=400)
    values = np.concatenate([values, -values])  # no skewness
    without = (values.sum() - values) / (len(values) - 1)
    low, high = jackknife(np.ones(len(values), np.int64), values.mean(), without, 0.9)
    expected = scipy.stats.t.interval(0.9, len(values) - 1, values.mean(), scipy.stats.sem(values))
    assert (low, high) == pytest.approx(expected, rel=0.01)
    skewed = rng.exponential(size=60)
    without = (skewed.sum() - skewed) / 59
    low, high = jackknife(np.ones(60, np.int64), skewed.mean(), without, 0.9)
    assert high - skewed.mean() > 1.2 * (skewed.mean() - low)  # a long tail to the right is reached for


def test_the_interval_of_blocks_of_unequal_sizes_holds_the_mean():
    rng, held = np.random.default_rng(5), 0
    sizes = rng.integers(1, 9, 25)
    for _ in range(400):
        sums = rng.normal(size=25) * np.sqrt(sizes)
        without = (sums.sum() - sums) / (sizes.sum() - sizes)
        low, high = jackknife(sizes, sums.sum() / sizes.sum(), without, 0.95)
        held += low <= 0 <= high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.broadcast_to([0.1, 0.5, 0.7], (9, 3)), (1.0, 1.0)),
        (stripes(2, 5), (math.nan, math.nan)),
        (stripes(9, 1), (math.nan, math.nan)),
        (np.where(np.arange(40)[:, None] == 3, 0.9, np.broadcast_to([0.1, 0.5], (40, 2))), (0.0, 1.0)),
        ([0.1, 0.5, 0.7] + 0.1 * (-1.0) ** np.arange(10)[:, None], (84 / 94, 84 / 94)),  # V = 0.28 / 3, W = 0.1 / 9
    ],
    ids=["constant", "two samples", "one channel", "one sample that differs", "deviations of one size"],
)
def test_intervals_where_there_is_little_to_go_by(values, expected):
    interval = stats.strength_interval(values)
    assert (interval.low, interval.high) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95])
def test_a_confidence_that_is_none_is_refused(confidence):
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):
        stats.strength_interval(stripes(), confidence=confidence)


def test_the_coefficient_of_variation_is_what_is_not_constant_whatever_the_contrast():
    flat, wide = (0.5 + spread * np.linspace(-1, 1, 40) for spread in (0.01, 0.4))
    noise = 0.05 * np.random.default_rng(0).normal(size=(400, 40))
    found = [stats.coefficient_of_variation(mean + noise) for mean in (flat, wide)]
    expected = [0.05 / math.sqrt(np.mean(mean**2)) for mean in (flat, wide)]
    assert found == pytest.approx(expected, rel=0.02)
    strengths = [stats.stripe_strength(mean + noise).strength for mean in (flat, wide)]
    assert strengths[0] < 0.1  # the same constancy, another contrast
    assert strengths[1] > 0.9


# ---- labels ----------------------------------------------------------------------------------------------


def test_label_share_equals_a_slow_reference_and_skips_unknown_labels():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 4, size=70)
    values = stripes(70, 5) + 0.05 * np.maximum(labels, 0)[:, None]
    found = stats.label_share(values, labels)
    assert (found.eta_squared, found.omega_squared) == pytest.approx(slow_label_share(values, labels), rel=1e-10)
    counted = stats.label_share(values, np.maximum(labels, 0))
    assert counted.eta_squared != pytest.approx(found.eta_squared, rel=1e-3)  # control: unknown is no class


def test_label_share_of_one_channel_agrees_with_scipys_f_test():
    labels = np.repeat([0, 1, 2], [10, 15, 20])
    values = stripes(45, 1) + 0.03 * labels[:, None]
    f = scipy.stats.f_oneway(*(values[labels == k, 0] for k in range(3))).statistic
    assert stats.label_share(values, labels).eta_squared == pytest.approx(2 * f / (2 * f + 42), rel=1e-10)


def test_omega_squared_is_unbiased_where_eta_squared_flatters():
    rng = np.random.default_rng(0)
    found = [stats.label_share(rng.normal(size=(40, 30)), np.arange(40) % 10) for _ in range(30)]
    assert abs(np.mean([share.omega_squared for share in found])) < 0.01
    assert np.mean([share.eta_squared for share in found]) > 0.2


@pytest.mark.parametrize("labels", [np.full(60, -1), np.zeros(60, int)])
def test_label_share_needs_two_classes(labels):
    share = stats.label_share(stripes(), labels)
    assert math.isnan(share.eta_squared)
    assert math.isnan(share.omega_squared)


def test_one_sample_a_class_leaves_no_error_to_correct_with():
    share = stats.label_share(stripes(6), np.arange(6))
    assert share.eta_squared == pytest.approx(1.0)
    assert math.isnan(share.omega_squared)


def test_labels_come_with_an_array_and_not_with_moments():
    values, labels = stripes(30, 4), np.arange(30) % 3
    moments = Moments.of(values, labels=labels)
    assert stats.label_share(moments) == stats.label_share(values, labels)
    for arguments in ((values,), (moments, labels)):
        with pytest.raises(ValueError, match="the label of every sample, or moments"):
            stats.label_share(*arguments)


def test_labels_of_other_samples_are_refused():
    with pytest.raises(ValueError, match=r"shape \(59,\); expected \(60,\)"):
        stats.label_share(stripes(), np.zeros(59, int))


# ---- epochs ----------------------------------------------------------------------------------------------


def test_drift_is_the_mean_change_of_the_observed_stripe():
    before, after = stripes(20, 5, seed=1), stripes(30, 5, seed=2)
    columns = zip(slow_columns(before), slow_columns(after), strict=True)
    expected = slow_mean([abs(slow_mean(b) - slow_mean(a)) for a, b in columns])
    assert stats.drift(Moments.of(before), Moments.of(after)) == pytest.approx(expected, rel=1e-12)
    after[3, 0] = np.nan
    others = stats.drift(Moments.of(before), Moments.of(np.delete(after, 3, axis=0)))
    assert stats.drift(Moments.of(before), Moments.of(after)) == others
    after[:] = np.nan
    assert math.isnan(stats.drift(Moments.of(before), Moments.of(after)))


@pytest.mark.parametrize(("move", "least"), [(0.01, 0.92), (0.003, 0.87), (0.001, 0.78)])
def test_the_interval_of_a_drift_holds_the_truth(move, least):
    rng, held, larger = np.random.default_rng(7), 0, 0
    for _ in range(200):
        moved, before = rng.normal(0, move, 64), rng.normal(0.5, 0.1, (1000, 64))
        after = before + moved + rng.normal(0, 0.03, before.shape)  # a channel's mean is known to 0.001
        found, drift = stats.drift_interval(Moments.of(before), Moments.of(after)), np.abs(moved).mean()
        held += found.low <= drift <= found.high
        larger += found.low <= drift + 0.001 <= found.high
    assert held / 200 >= least
    assert larger / 200 < 0.1


def test_the_interval_of_a_drift_leaves_out_what_chance_adds_to_it():
    rng = np.random.default_rng(8)
    before, moved = rng.normal(0.5, 0.1, (1000, 64)), rng.normal(0, 0.001, 64)
    after = before + moved + rng.normal(0, 0.03, before.shape)
    both = Moments.of(before), Moments.of(after)
    found = stats.drift_interval(*both)
    assert found.low < np.abs(moved).mean() < found.high
    assert (found.low + found.high) / 2 < 0.85 * stats.drift(*both)


def test_the_interval_of_a_drift_needs_the_same_samples():
    values = stripes(40, 6)
    before, after = Moments.of(values), Moments.of(values + 0.01)
    certain = stats.drift_interval(before, after)
    assert certain.low == pytest.approx(0.01) == certain.high
    for others in (Moments.of(values + 0.01, sample_ids=np.arange(40) + 7), Moments.of(values[:39] + 0.01)):
        assert math.isnan(stats.drift_interval(before, others).low)
    assert math.isnan(stats.drift_interval(Moments.of(values[:2]), Moments.of(values[:2])).low)
    with pytest.raises(ValueError, match="confidence"):
        stats.drift_interval(before, after, confidence=1.0)


def test_a_channel_that_broke_is_left_out_of_the_interval_of_a_drift():
    values = stripes(40, 6)
    after = values + 0.01
    after[:, 2] = np.nan
    found = stats.drift_interval(Moments.of(values), Moments.of(after))
    assert found.low == pytest.approx(0.01) == found.high
    assert math.isnan(stats.drift_interval(Moments.of(values), Moments.of(np.full_like(after, np.nan))).low)


@pytest.mark.parametrize(
    ("drifts", "expected"),
    [
        ([math.nan, 0.5, 0.01, 0.01], 20),
        ([math.nan, 0.01, 0.5, 0.01], 30),
        ([math.nan, 0.01, 0.01, 0.01], 10),
        ([math.nan, 0.01, 0.01, 0.5], None),
        ([math.nan, 0.01, math.nan, 0.01], 30),
        ([math.nan, 0.01, 0.02, 0.01], 30),  # at the tolerance is not under it
    ],
)
def test_settled_epoch_is_the_first_after_which_drift_stays_under(drifts, expected):
    assert stats.settled_epoch([10, 20, 30, 40], drifts, tolerance=0.02) == expected


def test_one_epoch_never_settles():
    assert stats.settled_epoch([5], [math.nan], tolerance=1.0) is None


# ---- the table -------------------------------------------------------------------------------------------


@pytest.fixture
def run():
    rng = np.random.default_rng(5)
    labels = rng.integers(-1, 3, size=40)
    records = {
        e: {
            g: stripes(40, 6 + 2 * i, noise=0.2 / e, row=0.05, seed=10 * e + i, dtype=np.float32)
            for i, g in enumerate(["layer1.se", "layer2.se"])
        }
        for e in (1, 2, 5)
    }
    return MemoryRun(records, labels)


def test_the_table_equals_slow_references(run):
    table = stats.summarize(run, rank=True)
    assert list(zip(table.epoch, table.gate, strict=True)) == [
        (epoch, gate.name) for epoch in run.epochs for gate in run.gates
    ]
    previous = {}
    for row in table.itertuples():
        values = run.attention(row.gate, row.epoch)
        columns = slow_columns(values)
        assert (row.samples, row.channels) == values.shape
        assert (row.strength, row.between, row.within) == pytest.approx(slow_strength(values), rel=1e-10)
        expected = slow_shares(values.astype(np.float64))
        assert (row.strength, row.sample_share, row.rest_share) == pytest.approx(expected, rel=1e-9)
        assert row.std == pytest.approx(slow_mean([math.sqrt(slow_variance(c)) for c in columns]), rel=1e-10)
        label = slow_label_share(values, run.labels(row.epoch))
        assert (row.label_share, row.label_omega) == pytest.approx(label, rel=1e-9)
        interval = stats.strength_interval(values)
        assert (row.strength_low, row.strength_high) == (interval.low, interval.high)
        energy = slow_mean([slow_mean(column) ** 2 for column in columns])
        assert row.cv == pytest.approx(math.sqrt(slow_strength(values)[2] / energy), rel=1e-10)
        assert row.strength_low < row.strength < row.strength_high
        assert row.rank == pytest.approx(stats.effective_rank(values), rel=1e-9)
        assert row.flags == ""
        means = [slow_mean(column) for column in columns]
        if row.gate in previous:
            changes = [abs(a - b) for a, b in zip(means, previous[row.gate], strict=True)]
            assert row.drift == pytest.approx(slow_mean(changes), rel=1e-10)
        else:
            assert math.isnan(row.drift)
        previous[row.gate] = means


def test_the_table_gives_settled_epochs(run):
    table = stats.summarize(run)
    rows = table[table["gate"] == "layer2.se"]
    assert stats.settled_epoch(rows["epoch"], rows["drift"], rows["drift"].max() * 1.01) == 1
    assert stats.settled_epoch(rows["epoch"], rows["drift"], rows["drift"].iloc[-1]) is None


def test_the_table_can_be_narrowed_and_takes_the_rank_on_request(run):
    table = stats.summarize(run, epochs=[1, 5], gates=["layer2.se"])
    assert table.epoch.tolist() == [1, 5]
    assert table.gate.unique().tolist() == ["layer2.se"]
    assert table["rank"].isna().all()
    a, b = (Moments.of(run.attention("layer2.se", epoch)) for epoch in (1, 5))
    assert table.drift[1] == stats.drift(a, b)


def test_the_table_names_gates_with_non_finite_values(run):
    clean = stats.summarize(run, rank=True)
    run.records[2]["layer1.se"][5, 3] = np.nan
    run.records[2]["layer2.se"][:] = np.inf
    table = stats.summarize(run, rank=True)
    assert table["flags"].tolist() == ["", "", "nonfinite", "nonfinite", "", ""]
    assert table["left_out"].tolist() == [0, 0, 1, 40, 0, 0]
    untouched = [column for column in table.columns if column != "drift"]
    pd.testing.assert_frame_equal(table.loc[[0, 1, 4, 5], untouched], clean.loc[[0, 1, 4, 5], untouched])
    values = np.delete(run.attention("layer1.se", 2), 5, axis=0)
    assert (table.samples[2], table.channels[2]) == values.shape
    assert table.strength[2] == pytest.approx(slow_strength(values)[0], rel=1e-10)
    assert table["rank"][2] == pytest.approx(stats.effective_rank(values), rel=1e-9)
    assert table.drift[2] > 0
    assert table.loc[3, "strength":"rank"].isna().all()


def test_gates_take_turns_where_their_products_would_not_fit_into_memory(run, monkeypatch):
    expected, asked, batches = stats.summarize(run, rank=True), [], run.batches
    monkeypatch.setattr(run, "batches", lambda epoch, gates: asked.append(gates) or batches(epoch, gates))
    monkeypatch.setattr("stripe.stats.rank.HELD_VALUES", 64)
    pd.testing.assert_frame_equal(stats.summarize(run, rank=True), expected)
    assert asked == [["layer1.se"], ["layer2.se"]] * 3


def test_ranks_do_not_depend_on_how_many_rows_are_taken_together(run, monkeypatch):
    expected = stats.summarize(run, rank=True)
    monkeypatch.setattr("stripe.stats.rank.ROWS", 7)
    pd.testing.assert_frame_equal(stats.summarize(run, rank=True), expected, rtol=1e-12)


def test_ranks_take_one_thread_of_the_blas_and_give_the_others_back(run, monkeypatch):
    def threads():
        return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]

    asked, batches = [], run.batches
    monkeypatch.setattr(run, "batches", lambda epoch, gates: asked.append(threads()) or batches(epoch, gates))
    with threadpool_limits(2, user_api="blas"):
        before = threads()
        stats.summarize(run, epochs=[1], rank=True)
        assert asked == [[1] * len(before)]
        assert threads() == before


def test_the_next_item_is_made_ahead_and_what_fails_is_raised_in_its_turn():
    made = []

    def items():
        for number in range(3):
            made.append(number)
            yield number
        raise KeyError("the end")

    source = ahead(items())
    assert [next(source), next(source), next(source)] == [0, 1, 2] == made
    with pytest.raises(KeyError, match="the end"):
        next(source)
    assert list(ahead([])) == []


def test_the_labels_share_of_many_classes_takes_the_rows(run):
    expected = stats.summarize(run)

    def without_classes(epochs, gates):
        return {key: dataclasses.replace(each, classes=None) for key, each in moments(epochs, gates).items()}

    moments, run.moments = run.moments, without_classes
    pd.testing.assert_frame_equal(stats.summarize(run), expected)
    run.has_samples = False
    assert stats.summarize(run)["label_share"].isna().all()


# ---- from one epoch to another ---------------------------------------------------------------------------


def images_twice(samples, shrink, *, seed, spread=0.1):
    """Attention of the same images early and late: what an image does stays, and shrinks."""
    rng = np.random.default_rng(seed)
    effect, own = rng.uniform(0.3, 0.7, 16), spread * rng.normal(size=(samples, 1)) * rng.normal(size=16)
    early, late = (effect + scale * own + 0.01 * rng.normal(size=(samples, 16)) for scale in (1.0, shrink))
    return early, late


@pytest.mark.parametrize(
    ("shrink", "direction"), [(0.7, "falls"), (1.3, "rises"), (1.0, "unsettled")], ids=["less", "more", "as much"]
)
def test_whether_attention_varies_less_is_told_by_an_interval(shrink, direction):
    early, late = images_twice(300, shrink, seed=0)
    for measure in ("cv", "within"):
        found = stats.change_between(Moments.of(early), Moments.of(late), measure)
        assert found.direction == direction
        assert found.change == pytest.approx(found.after / found.before, rel=1e-12)
        own = early.var(axis=0, ddof=1).mean() - 1e-4  # without the noise, which does not shrink
        true = (shrink**2 * own + 1e-4) / (own + 1e-4)
        assert found.low < (true if measure == "within" else math.sqrt(true)) < found.high
    opposite = {"falls": "rises", "rises": "falls"}.get(direction, direction)
    strength = stats.change_between(Moments.of(early), Moments.of(late), "strength")
    assert strength.direction == opposite
    assert strength.change == pytest.approx(strength.after - strength.before)


def test_the_interval_of_a_change_holds_the_truth_and_pairing_narrows_it():
    held = 0
    for seed in range(120):
        early, late = images_twice(100, 0.9, seed=seed)
        found = stats.change_between(Moments.of(early), Moments.of(late), "within")
        held += found.low <= (0.81 * 0.01 + 1e-4) / (0.01 + 1e-4) <= found.high
    # the channels' own weights vary between draws, and enter early and late alike
    assert held / 120 >= 0.88
    early, late = (Moments.of(each) for each in images_twice(300, 0.9, seed=0))
    others = Moments.of(images_twice(300, 0.9, seed=0)[1], sample_ids=np.arange(300) + 1000)
    paired, apart = (stats.change_between(early, each, "cv") for each in (late, others))
    assert apart.high - apart.low > 3 * (paired.high - paired.low)
    assert apart.change == pytest.approx(paired.change, rel=1e-12)


def test_changes_of_a_run_are_a_row_for_each_gate_and_measure(run):
    table = stats.changes(run)
    assert list(table["gate"]) == [gate.name for gate in run.gates for _ in stats.MEASURES]
    assert set(table["epoch_before"]) == {1}
    assert set(table["epoch_after"]) == {5}
    assert set(table.loc[table["measure"] == "cv", "direction"]) == {"falls"}  # the noise is 0.2 / epoch
    assert set(table.loc[table["measure"] == "strength", "direction"]) == {"rises"}
    summary = stats.summarize(run).set_index(["epoch", "gate"])
    for row in table.itertuples():
        assert row.before == summary.loc[(1, row.gate), row.measure]
    same = stats.changes(run, epochs=(5, 5))
    assert set(same["direction"]) == {"unsettled"}
    with pytest.raises(ValueError, match="needs two epochs; the run has 1"):
        stats.changes(MemoryRun({3: {"a": stripes()}}))
    with pytest.raises(ValueError, match="no measure 'std'"):
        stats.change_between(Moments.of(stripes()), Moments.of(stripes()), "std")


def test_an_empty_run_is_refused():
    with pytest.raises(ValueError, match="no finished epoch"):
        stats.summarize(MemoryRun({}))


# ---- a learned vector against a stripe -------------------------------------------------------------------


def test_pearson_equals_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30))
    assert stats.pearson(a, b) == pytest.approx(scipy.stats.pearsonr(a, b).statistic, rel=1e-12)
    assert stats.pearson(a, -3 * a + 2) == pytest.approx(-1.0)
    assert math.isnan(stats.pearson(a, np.full(30, 0.1)))
    assert math.isnan(stats.pearson(a, np.where(np.arange(30) == 2, np.nan, b)))


def test_permutation_test_equals_the_full_enumeration():
    rng = np.random.default_rng(3)
    a = rng.normal(size=6)
    b = a + rng.normal(size=6)
    full = scipy.stats.permutation_test(
        (a,), lambda x: stats.pearson(x, b), permutation_type="pairings", alternative="greater", vectorized=False
    )
    assert stats.permutation_test(a, b, permutations=20_000) == pytest.approx(full.pvalue, abs=0.01)
    assert stats.permutation_test(-a, b) > 0.5  # control: the test has a side


def test_permutation_test_is_seeded_bounded_and_fair(monkeypatch):
    rng = np.random.default_rng(0)
    a = rng.normal(size=50)
    assert stats.permutation_test(a, a, permutations=999) == 1 / 1000
    assert stats.permutation_test(np.array([1.0, 2.0]), np.array([3.0, 5.0])) == pytest.approx(0.5, abs=0.02)
    b = rng.normal(size=50)
    whole = stats.permutation_test(a, b, permutations=500, seed=1)
    monkeypatch.setattr(arithmetic, "COUNT_VALUES", 1000)
    assert stats.permutation_test(a, b, permutations=500, seed=1) == whole
    ps = [stats.permutation_test(rng.normal(size=20), b[:20], permutations=99) for _ in range(200)]
    assert np.mean(np.array(ps) <= 0.1) == pytest.approx(0.1, abs=0.07)
    assert math.isnan(stats.permutation_test(a, np.ones(50)))


def test_benjamini_hochberg_equals_scipys_and_leaves_nan_out():
    p = np.random.default_rng(0).random(20) ** 3
    expected = scipy.stats.false_discovery_control(p)
    np.testing.assert_allclose(stats.benjamini_hochberg(p), expected, rtol=1e-12)
    assert np.any(expected > p)
    holed = np.insert(p, [0, 7], np.nan)
    found = stats.benjamini_hochberg(holed)
    assert np.flatnonzero(np.isnan(found)).tolist() == [0, 8]
    np.testing.assert_allclose(found[~np.isnan(found)], expected, rtol=1e-12)


def slow_match(learned, values):
    columns = slow_columns(values)
    means, deviations = [slow_mean(c) for c in columns], [math.sqrt(slow_variance(c)) for c in columns]
    errors = [(v - mean) ** 2 for v, mean in zip(learned, means, strict=True)]
    grand = slow_mean(means)
    return {
        "r2": 1 - math.fsum(errors) / math.fsum((mean - grand) ** 2 for mean in means),
        "rmse": math.sqrt(slow_mean(errors)),
        "mean_abs_z": slow_mean([math.sqrt(e) / s for e, s in zip(errors, deviations, strict=True)]),
        "inside": slow_mean(
            [float(np.quantile(c, 0.05) <= v <= np.quantile(c, 0.95)) for v, c in zip(learned, columns, strict=True)]
        ),
        "r": scipy.stats.pearsonr(learned, means).statistic,
    }


def test_match_equals_a_slow_reference():
    values = stripes(100, 20)
    learned = values.mean(axis=0) + np.random.default_rng(1).normal(size=20) * 0.1
    found = stats.match(learned, values, permutations=999)
    for name, expected in slow_match(learned.tolist(), values).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-10), name
    assert 0 < found.inside < 1
    assert found.p == stats.permutation_test(learned, values.mean(axis=0), permutations=999)


def test_match_tells_the_stripe_itself_from_a_shuffle():
    values = stripes(100, 40, dtype=np.float32)
    stripe = values.mean(axis=0)
    same = stats.match(stripe, values, permutations=199)
    assert (same.r, same.r2, same.inside) == pytest.approx((1, 1, 1))
    assert (same.rmse, same.p) == pytest.approx((0, 1 / 200), abs=1e-6)
    shuffled = stats.match(np.random.default_rng(0).permutation(stripe), values, permutations=199)
    assert abs(shuffled.r) < 0.5
    assert shuffled.r2 < 0
    assert shuffled.p > 0.01


def test_match_of_constants_claims_nothing():
    values = stripes(30, 8)
    assert math.isnan(stats.match(np.full(8, 0.5), values).r)
    dead = stats.match(values[0], np.full((30, 8), 0.5))
    assert np.isnan([dead.r, dead.r2, dead.mean_abs_z, dead.p]).all()
    assert dead.inside == 0


def test_match_leaves_out_what_is_not_finite():
    values = stripes(30, 8)
    learned = values.mean(axis=0) + 0.01
    expected = stats.match(learned[1:], np.delete(values[:, 1:], 4, axis=0), permutations=99)
    values[4, 3], values[:, 0] = np.nan, np.nan
    assert stats.match(learned, values, permutations=99) == expected
    nothing = stats.match(learned, np.full((30, 8), np.nan), permutations=99)
    assert np.isnan([nothing.r, nothing.r2, nothing.rmse, nothing.mean_abs_z, nothing.inside, nothing.p]).all()


def test_match_refuses_other_channels():
    with pytest.raises(ValueError, match=r"shape \(7,\); expected \(8,\)"):
        stats.match(np.zeros(7), stripes(30, 8))


# ---- vectors as sets of values ---------------------------------------------------------------------------


def test_wasserstein_is_scipys_and_blind_to_order():
    a, b = np.random.default_rng(0).normal(0, 1, (2, 40))
    assert stats.wasserstein(a, b) == pytest.approx(scipy.stats.wasserstein_distance(a, b), rel=1e-12)
    assert stats.wasserstein(a, a[::-1]) == 0 < stats.wasserstein(a, a + 1) == pytest.approx(1)


def test_swap_test_equals_the_full_enumeration():
    a, b = np.array([0.1, 0.2, 0.4]), np.array([0.5, 0.6, 0.9])
    pooled, distance = np.concatenate([a, b]), stats.wasserstein(a, b)
    deals = [(list(d), [i for i in range(6) if i not in d]) for d in itertools.combinations(range(6), 3)]
    exact = np.mean([stats.wasserstein(pooled[i], pooled[j]) >= distance - 1e-12 for i, j in deals])
    assert stats.swap_test(a, b, permutations=20_000) == pytest.approx(exact, abs=0.01)


def test_swap_test_tells_one_distribution_from_two():
    a, b = np.random.default_rng(1).normal(0, 1, (2, 64))
    assert stats.swap_test(a, b) > 0.05 > stats.swap_test(a, b + 2) == 1 / (stats.PERMUTATIONS + 1)
    assert stats.swap_test(a, a) == 1
    assert math.isnan(stats.swap_test(a, np.full(64, np.nan)))


# ---- the verdict on a learned vector ---------------------------------------------------------------------


def test_the_energy_distance_is_the_wrong_share_of_the_scaled_maps_energy():
    """Counted on maps, sample by sample and pixel by pixel."""
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(50, 6, 4, 4)) * np.array([3, 1, 1, 0.1, 1, 0])[:, None, None]
    gates, stripe, learned = rng.random((50, 6)), rng.random(6), rng.random(6)
    wrong = (maps * (learned - stripe)[:, None, None]) ** 2
    result = (maps * gates[..., None, None]) ** 2
    energy = (maps**2).mean((0, 2, 3))
    found = verdicts.energy_distance(learned, stripe, energy, result.mean((0, 2, 3)))
    assert found == pytest.approx(wrong.sum() / result.sum())
    silent = learned + np.array([0, 0, 0, 0, 0, 100])
    assert verdicts.energy_distance(silent, stripe, energy, result.mean((0, 2, 3))) == pytest.approx(found)
    assert verdicts.energy_distance(np.stack([learned, stripe]), stripe, energy, energy).shape == (2,)


def test_an_aligned_vector_is_the_nearest_of_its_multiples():
    rng = np.random.default_rng(1)
    scale, stripe, energy = rng.random((3, 20))
    aligned = verdicts.aligned(scale, stripe, energy)
    factors = aligned[0] / scale[0] * np.linspace(0.5, 1.5, 101)
    distances = verdicts.energy_distance(factors[:, None] * scale, stripe, energy, stripe**2 * energy)
    assert distances.argmin() == 50
    assert verdicts.misalignment(scale, stripe, energy) == pytest.approx(distances[50])
    np.testing.assert_allclose(verdicts.aligned(7 * scale, stripe, energy), aligned)


def test_the_p_of_unrelated_vectors_is_uniform_though_the_energies_go_with_one_of_them():
    rng = np.random.default_rng(2)
    p = []
    for _ in range(300):
        scale, stripe = rng.lognormal(0, 1, 30), rng.uniform(0.2, 0.8, 30)
        energy = scale**2
        null = verdicts.shuffled_misalignments(stripe, scale, energy, draws=199, seed=int(rng.integers(2**31)))
        p.append(verdicts.rank_p(verdicts.misalignment(scale, stripe, energy), null))
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(np.array(p) < 0.05) < 0.1
    related = stripe * rng.uniform(0.9, 1.1, 30)
    null = verdicts.shuffled_misalignments(stripe, related, related**2)
    assert verdicts.rank_p(verdicts.misalignment(related, stripe, related**2), null) < 0.01


def test_a_rank_counts_equals_and_never_is_zero():
    assert verdicts.rank_p(0.0, np.ones(99)) == 0.01
    assert verdicts.rank_p(1.0, np.ones(99)) == 1
    assert math.isnan(verdicts.rank_p(math.nan, np.ones(9)))


@pytest.mark.parametrize(
    ("distance", "p", "random", "best", "word"),
    [
        (0.005, 0.01, 0.1, 0.0, "match"),
        (0.005, 0.01, 0.9, 0.0, "trivial"),
        (0.005, 0.2, 0.1, 0.0, "trivial"),
        (0.05, 0.01, 0.1, 0.0, "related"),
        (0.05, 0.2, 0.1, 0.0, "no match"),
        (0.05, 0.01, 0.0, 0.02, "cannot match"),
    ],
)
def test_verdicts(distance, p, random, best, word):
    assert verdicts.verdict(distance, limit=0.01, p=p, random=random, best=best) == word
    assert word in verdicts.VERDICTS


# ---- a run by its path, and what help tells ---------------------------------------------------------------


def test_a_run_may_be_given_by_its_path() -> None:
    run = stripe.load_example()
    expected = stats.summarize(run, epochs=[20])
    for path in (run.path, Path(run.path)):
        pd.testing.assert_frame_equal(stats.summarize(path, epochs=[20]), expected)
    with pytest.raises(FileNotFoundError, match="no/such/run"):
        stats.summarize("no/such/run")
    with pytest.raises(ValueError, match=r"has no gate 'layer9'; it has layer1.0, layer2.0, layer3.1"):
        stats.summarize(run, gates=["layer9"])


def test_help_tells_every_column_and_every_attribute() -> None:
    told = stats.summarize.__doc__
    assert told.count("{columns}") == 0
    assert all(f"``{name}``: " in told for name in stats.summarize(stripe.load_example()).columns)
    run = stripe.load_example()
    attributes = stripe.Run.__doc__.partition("Attributes:")[2]
    assert all(f" {name}: " in attributes for name in vars(run) if not name.startswith("_"))


def test_strength_takes_arrays_and_moments_alike() -> None:
    values = stripe.load_example().attention("layer3.1", 20)
    by_rows, by_moments = stats.stripe_strength(values), stats.stripe_strength(stats.Moments.of(values))
    assert by_rows.strength == pytest.approx(by_moments.strength, rel=1e-12)
    assert by_rows.strength == pytest.approx(0.4014, abs=5e-5), "what the example's table says"


def test_class_means_are_pandas_group_means_also_of_merged_parts():
    values, labels = stripes(90, 7), np.arange(90) % 4 - 1  # a quarter is unknown
    wanted = pd.DataFrame(values[labels >= 0]).groupby(labels[labels >= 0]).mean()
    parts = [Moments.of(values[half], labels=labels[half]) for half in (slice(0, 31), slice(31, 90))]
    for found in (stats.class_means(values, labels), stats.class_means(parts[0].merge(parts[1]))):
        assert list(found) == wanted.index.tolist() == [0, 1, 2]
        np.testing.assert_allclose(np.stack([*found.values()]), wanted, rtol=1e-12)
    assert not np.allclose(found[0], values.mean(axis=0))
    assert stats.class_means(values, np.full(90, -1)) == {}
    many = np.arange(stats.CLASSES + 1)  # of more classes no means are kept
    kept = GateMoments({"se": 2})
    kept.add({"se": stripes(len(many), 2)}, many, many)
    assert stats.class_means(kept.moments()["se"]) == {}
    with pytest.raises(ValueError, match="label of every sample"):
        stats.class_means(values)
