"""Every statistic against a slow reference, a property, or SciPy; and what breaks when a law is broken."""

import itertools
import math
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from stripe import stats
from stripe.stats import Moments, arithmetic

few = settings(deadline=None, max_examples=25)


def stripes(samples=60, channels=12, *, noise=0.05, row=0.0, seed=0, dtype=np.float64):
    """Attention-like values: channel effect + sample effect + noise, around 0.5."""
    rng = np.random.default_rng(seed)
    effect = rng.uniform(0.3, 0.7, channels) + row * rng.normal(size=(samples, 1))
    return (effect + noise * rng.normal(size=(samples, channels))).astype(dtype)


@dataclass
class Named:
    name: str


class MemoryRun:
    """A run held in memory: {epoch: {gate: values}}, read in batches of 7."""

    has_samples, has_label_means = True, False

    def __init__(self, records, labels=None):
        self.records, self._labels = records, labels
        self.epochs = sorted(records)
        self.gates = [Named(name) for name in next(iter(records.values()), {})]

    def attention(self, gate, epoch):
        return self.records[epoch][gate]

    def labels(self, epoch):
        samples = len(next(iter(self.records[epoch].values())))
        return np.full(samples, -1) if self._labels is None else self._labels

    def batches(self, epoch, gates=None):
        names = [gate.name for gate in self.gates] if gates is None else gates
        for start in range(0, len(self.labels(epoch)), 7):
            yield {name: self.records[epoch][name][start : start + 7] for name in names}


# ---- slow references: the definitions, value by value ----------------------------------------------------


def slow_mean(numbers):
    return math.fsum(numbers) / len(numbers)


def slow_variance(numbers):
    mean = slow_mean(numbers)
    return math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1)


def slow_columns(values):
    return [[float(value) for value in column] for column in np.asarray(values, dtype=float).T]


def slow_strength(values):
    columns = slow_columns(values)
    within = slow_mean([slow_variance(column) for column in columns])
    means = [slow_mean(column) for column in columns]
    between = max(slow_variance(means) - within / len(values), 0.0)
    return between / (between + within), between, within


def slow_shares(values):
    """Two-way mean squares from residuals A_nc - row - column + grand, cell by cell."""
    samples, channels = values.shape
    rows, columns = [slow_mean(row) for row in values.tolist()], [slow_mean(c) for c in slow_columns(values)]
    grand = slow_mean(rows)
    residuals = [
        (float(values[n, c]) - rows[n] - columns[c] + grand) ** 2 for n in range(samples) for c in range(channels)
    ]
    rest = math.fsum(residuals) / ((samples - 1) * (channels - 1))
    sample = max(slow_variance(rows) - rest / channels, 0.0)
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
    assert (actual.near_bounds, actual.nonfinite) == (expected.near_bounds, expected.nonfinite)
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
    assert measured.near_bounds == np.count_nonzero((wide <= 1e-3) | (wide >= 1 - 1e-3))
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
    merged = reduce(Moments.merge, [Moments.of(part) for part in np.split(values, at)])
    assert_same_moments(merged, Moments.of(values))
    reverse = reduce(Moments.merge, [Moments.of(part) for part in np.split(values, at)[::-1]])
    assert_same_moments(reverse, merged)


def test_merging_is_not_adding():
    values = stripes(40, 3)
    low, high = Moments.of(values[:20]), Moments.of(values[20:] + 1)
    whole = Moments.of(np.concatenate([values[:20], values[20:] + 1]))
    assert_same_moments(low.merge(high), whole)
    assert np.all(low.m2 + high.m2 < 0.5 * whole.m2)  # control: the distance of the means is most of it


@few
@given(st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_statistics_ignore_the_order_of_samples(samples, seed):
    values = stripes(samples, 6, row=0.02, seed=seed)
    labels = np.arange(samples) % 2
    order = np.random.default_rng(seed).permutation(samples)
    assert_same_moments(Moments.of(values[order]), Moments.of(values), rtol=1e-11)
    one, two = stats.two_way_shares(values), stats.two_way_shares(values[order])
    assert (one.channel, one.sample) == pytest.approx((two.channel, two.sample), rel=1e-9, abs=1e-12)
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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_value_stays_in_its_channel(bad):
    values = stripes(50, 4)
    clean = stats.stripe_strength(Moments.of(values[:, [0, 1, 3]]))
    values[7, 2] = bad
    measured = Moments.of(values[:20]).merge(Moments.of(values[20:]))
    assert measured.nonfinite == 1
    assert measured.finite.tolist() == [True, True, False, True]
    assert math.isnan(measured.mean[2])
    assert math.isnan(measured.m2[2])
    assert stats.stripe_strength(measured).strength == pytest.approx(clean.strength, rel=1e-12)
    assert stats.flags(measured) == ("nonfinite",)


def test_streamed_moments_equal_the_whole_run():
    run = MemoryRun({e: {g: stripes(30, 5, seed=e + ord(g)) for g in "ab"} for e in (1, 2, 4)})
    measured = stats.moments(run)
    assert set(measured) == {(epoch, gate) for epoch in (1, 2, 4) for gate in "ab"}
    for (epoch, gate), found in measured.items():
        assert_same_moments(found, Moments.of(run.attention(gate, epoch)))
    assert set(stats.moments(run, epochs=[4], gates=["b"])) == {(4, "b")}


# ---- flags -----------------------------------------------------------------------------------------------


def test_flags_name_what_is_wrong_and_leave_stripes_alone():
    perfect = np.broadcast_to(np.linspace(0.1, 0.9, 6), (30, 6))
    half = np.full((30, 6), 0.5)
    open_or_shut = np.tile([0.0005, 0.9995, 1.0], (30, 2))
    assert stats.flags(Moments.of(perfect)) == ()
    assert stats.flags(Moments.of(half)) == ("dead",)
    assert stats.flags(Moments.of(half + np.linspace(0, 9e-7, 6))) == ("dead",)
    assert stats.flags(Moments.of(half + np.linspace(0, 2e-6, 6))) == ()
    assert stats.flags(Moments.of(open_or_shut)) == ("saturated",)
    assert stats.flags(Moments.of(np.zeros((30, 6)))) == ("dead", "saturated")
    assert stats.flags(Moments.of(np.full((30, 6), np.nan))) == ("nonfinite",)
    assert stats.flags(Moments.of(np.full((30, 6), np.inf))) == ("nonfinite",)


def test_saturated_means_more_than_99_percent():
    values = np.ones((100, 2))
    values[:2, 0] = 0.5
    assert stats.flags(Moments.of(values)) == ()
    values[0, 0] = -0.0005
    assert stats.flags(Moments.of(values)) == ("saturated",)


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
    interval = stats.bootstrap_strength(values, resamples=20)
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


def strength_of_axes(values, axis):
    """Statistic as scipy.stats.bootstrap wants it: samples along ``axis``, channels along the first axis."""
    within = values.var(axis=axis, ddof=1).mean(axis=0)
    between = np.maximum(values.mean(axis=axis).var(axis=0, ddof=1) - within / values.shape[axis], 0)
    return between / (between + within)


def test_bootstrap_interval_equals_scipys():
    values = stripes(80, 10, noise=0.1, row=0.1)
    found = stats.bootstrap_strength(values, resamples=4000, confidence=0.9, seed=1)
    rows = np.arange(80)

    def strength(drawn, axis):
        return strength_of_axes(np.moveaxis(values[drawn], -1, 0), axis)

    reference = scipy.stats.bootstrap(
        (rows,), strength, n_resamples=4000, method="percentile", confidence_level=0.9, batch=200, rng=2
    ).confidence_interval
    width = reference.high - reference.low
    assert found.low == pytest.approx(reference.low, abs=0.06 * width)
    assert found.high == pytest.approx(reference.high, abs=0.06 * width)
    narrow = stats.bootstrap_strength(values, resamples=4000, confidence=0.8, seed=1)
    assert abs(narrow.low - reference.low) > 0.06 * width  # control: another level is told apart


def test_bootstrap_equals_a_slow_resampling():
    values = stripes(9, 5, noise=0.2, row=0.1)
    draws = np.random.default_rng(7).integers(9, size=(40, 9))
    expected = np.quantile([slow_strength(values[draw])[0] for draw in draws], [0.05, 0.95])
    found = stats.bootstrap_strength(values, resamples=40, confidence=0.9, seed=7)
    assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-10)


def test_bootstrap_is_seeded_and_independent_of_blocks(monkeypatch):
    values = stripes(50, 6, dtype=np.float32)
    found = stats.bootstrap_strength(values, resamples=64, seed=3)
    assert found == stats.bootstrap_strength(values, resamples=64, seed=3)
    assert found != stats.bootstrap_strength(values, resamples=64, seed=4)
    monkeypatch.setattr(arithmetic, "COUNT_VALUES", 400)
    monkeypatch.setattr(arithmetic, "BLOCK_VALUES", 100)
    blocked = stats.bootstrap_strength(values, resamples=64, seed=3)
    assert (blocked.low, blocked.high) == pytest.approx((found.low, found.high), rel=1e-10)


@pytest.mark.parametrize(("resamples", "confidence"), [(0, 0.95), (10, 0.0), (10, 1.0), (10, 95)])
def test_bootstrap_refuses_what_makes_no_interval(resamples, confidence):
    with pytest.raises(ValueError, match="expected resamples >= 1 and 0 < confidence < 1"):
        stats.bootstrap_strength(stripes(), resamples=resamples, confidence=confidence)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (20, 20)])
def test_effective_rank_is_the_participation_ratio_of_eigenvalues(shape):
    values = stripes(*shape, row=0.05)
    eigenvalues = np.linalg.eigvalsh(np.cov(values, rowvar=False))
    expected = eigenvalues.sum() ** 2 / np.square(eigenvalues).sum()
    assert stats.effective_rank(values) == pytest.approx(expected, rel=1e-9)
    uncentred = np.linalg.eigvalsh(values.T @ values)
    assert expected != pytest.approx(uncentred.sum() ** 2 / np.square(uncentred).sum(), rel=0.1)


def test_effective_rank_counts_directions():
    rng = np.random.default_rng(0)
    assert stats.effective_rank(rng.normal(size=(30, 1)) * np.ones(9)) == pytest.approx(1.0)
    assert stats.effective_rank(rng.normal(size=(20_000, 9))) == pytest.approx(9.0, rel=0.01)


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
    others = stats.drift(Moments.of(before[:, 1:]), Moments.of(after[:, 1:]))
    assert stats.drift(Moments.of(before), Moments.of(after)) == others
    after[:] = np.nan
    assert math.isnan(stats.drift(Moments.of(before), Moments.of(after)))


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
    table = stats.summarize(run, bootstrap=50)
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
        interval = stats.bootstrap_strength(values, resamples=50)
        assert (row.strength_low, row.strength_high) == (interval.low, interval.high)
        assert row.strength_low < row.strength < row.strength_high
        assert row.rank == stats.effective_rank(values)
        assert row.flags == ""
        means = [slow_mean(column) for column in columns]
        if row.gate in previous:
            changes = [abs(a - b) for a, b in zip(means, previous[row.gate], strict=True)]
            assert row.drift == pytest.approx(slow_mean(changes), rel=1e-10)
        else:
            assert math.isnan(row.drift)
        previous[row.gate] = means


def test_the_table_gives_settled_epochs(run):
    table = stats.summarize(run, bootstrap=0)
    rows = table[table["gate"] == "layer2.se"]
    assert stats.settled_epoch(rows["epoch"], rows["drift"], rows["drift"].max() * 1.01) == 1
    assert stats.settled_epoch(rows["epoch"], rows["drift"], rows["drift"].iloc[-1]) is None


def test_the_table_can_be_narrowed_and_do_without_the_interval(run):
    table = stats.summarize(run, epochs=[1, 5], gates=["layer2.se"], bootstrap=0)
    assert table.epoch.tolist() == [1, 5]
    assert table.gate.unique().tolist() == ["layer2.se"]
    assert table[["strength_low", "strength_high"]].isna().all(axis=None)
    a, b = (Moments.of(run.attention("layer2.se", epoch)) for epoch in (1, 5))
    assert table.drift[1] == stats.drift(a, b)


def test_the_table_names_gates_with_non_finite_values(run):
    clean = stats.summarize(run, bootstrap=20)
    run.records[2]["layer1.se"][5, 3] = np.nan
    run.records[2]["layer2.se"][:] = np.inf
    table = stats.summarize(run, bootstrap=20)
    assert table["flags"].tolist() == ["", "", "nonfinite", "nonfinite", "", ""]
    untouched = [column for column in table.columns if column != "drift"]
    pd.testing.assert_frame_equal(table.loc[[0, 1, 4, 5], untouched], clean.loc[[0, 1, 4, 5], untouched])
    others = MemoryRun({2: {"layer1.se": np.delete(run.attention("layer1.se", 2), 3, axis=1)}}, run.labels(2))
    expected = stats.summarize(others, bootstrap=20)
    same = [column for column in untouched if column not in ("channels", "flags")]
    pd.testing.assert_frame_equal(table.loc[[2], same].reset_index(drop=True), expected[same], rtol=1e-10)
    assert (table.channels[2], expected.channels[0]) == (6, 5)
    assert table.drift[2] > 0
    assert table.loc[3, "strength":"rank"].isna().all()


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


def test_match_leaves_non_finite_channels_out():
    values = stripes(30, 8)
    learned = values.mean(axis=0) + 0.01
    expected = stats.match(learned[1:], values[:, 1:], permutations=99)
    values[4, 0] = np.nan
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
