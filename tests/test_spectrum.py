"""The spectrum of attention: shares, directions and ranks of simulated attention whose directions are known."""

import itertools

import numpy as np
import pytest

from stripe import stats


def simulated(rng, *, samples=500, channels=64, rank=3, noise=0.1):
    """Draw attention with `rank` directions of falling width and noise in all; return it and the true eigenvalues."""
    widths = np.linspace(1, 0.4, rank)
    widths *= (1 - noise) / widths.sum()
    directions = np.linalg.qr(rng.normal(size=(channels, rank)))[0]
    scores = rng.normal(size=(samples, rank)) * np.sqrt(widths)
    attention = 0.5 + scores @ directions.T + rng.normal(size=(samples, channels)) * np.sqrt(noise / channels)
    true = np.full(channels, noise / channels)
    true[:rank] += widths
    return attention, true, directions


@pytest.mark.parametrize("rank", [1, 3, 10])
@pytest.mark.parametrize("channels", [16, 64])
def test_the_share_of_all_true_directions_lies_in_its_interval_as_often_as_promised(rank, channels):
    rng = np.random.default_rng(rank)
    held, held_rank, shares, repeats = 0, 0, [], 80
    for _ in range(repeats):
        attention, true, _ = simulated(rng, channels=channels, rank=rank)
        found = stats.spectrum(attention, directions=rank)
        expected = true[:rank].sum()
        held += found.low[-1] <= expected <= found.high[-1]
        held_rank += found.rank_low <= 1 / np.square(true).sum() <= found.rank_high
        shares.append(found.shares[-1])
    assert held_rank >= 0.87 * repeats
    assert found.rank_high < 1.35 * found.rank_low
    assert found.rank == pytest.approx(stats.effective_rank(attention), rel=1e-12)
    assert held >= 0.87 * repeats  # 0.95 of 80 cases, less three standard errors
    assert np.mean(shares) == pytest.approx(expected, abs=0.002)
    assert (found.high - found.low < 0.1).all()


@pytest.mark.parametrize(("rank", "noise"), [(1, 0.01), (3, 0.1), (10, 0.1), (1, 0.9)])
def test_the_effective_rank_is_unbiased_to_five_percent_at_500_samples(rank, noise):
    rng = np.random.default_rng(rank)
    ranks = []
    for _ in range(20):
        attention, true, _ = simulated(rng, channels=256, rank=rank, noise=noise)
        ranks.append(stats.effective_rank(attention))
    assert np.mean(ranks) == pytest.approx(1 / np.square(true).sum(), rel=0.05)


@pytest.mark.parametrize("shape", [(9, 5), (7, 9)])
def test_the_effective_rank_is_a_mean_over_all_draws_of_four_samples(shape):
    values = np.random.default_rng(0).normal(size=shape) + 3
    draws = [values[list(four)] for four in itertools.permutations(range(len(values)), 4)]
    trace = np.mean([((x - y) @ (x - y)) * ((z - w) @ (z - w)) for x, y, z, w in draws])
    squares = np.mean([((x - y) @ (z - w)) ** 2 for x, y, z, w in draws])
    assert stats.effective_rank(values) == pytest.approx(min(trace / squares, shape[1]), rel=1e-9)


def test_the_effective_rank_of_a_line_is_one_and_of_nothing_is_not_a_number():
    rng = np.random.default_rng(0)
    assert stats.effective_rank(rng.normal(size=(30, 1)) * np.ones(9)) == pytest.approx(1.0, abs=1e-9)
    assert np.isnan(stats.effective_rank(np.full((30, 9), 0.5)))
    assert np.isnan(stats.effective_rank(rng.normal(size=(3, 9))))


@pytest.mark.parametrize("samples", [20_000, 40])
@pytest.mark.parametrize("spread", [1e-30, 1e-6, 1e-3, 0.3, 1e30])
def test_the_effective_rank_of_float32_values_is_that_of_float64(samples, spread):
    """Also where the mean is large beside the spread, and all but a trace of the variance lies on a line."""
    rng = np.random.default_rng(0)
    line = rng.normal(size=(samples, 1)) * rng.normal(size=64)
    for mean, own in itertools.product([0.0, 1.0, 30.0] if spread < 1 else [0.0], [1.0, 1e-3]):
        values = (mean + spread * (line + own * rng.normal(size=(samples, 64)))).astype(np.float32)
        expected = stats.effective_rank(values.astype(np.float64))
        assert stats.effective_rank(values) == pytest.approx(expected, rel=1e-5, nan_ok=True)
        if own == 1 and spread > 1e-6:
            assert stats.effective_rank(values[:, :-1]) != pytest.approx(expected, rel=1e-5)


def test_directions_are_found_and_their_sign_is_fixed():
    attention, _, true = simulated(np.random.default_rng(0), samples=2000, rank=2, noise=0.01)
    found = stats.spectrum(attention, directions=2)
    cosines = np.abs(np.einsum("kc,ck->k", found.directions, true))
    assert (cosines > 0.99).all()
    assert np.abs(np.linalg.det(found.directions @ true)) > 0.98
    flipped = stats.spectrum(1 - attention, directions=2)
    np.testing.assert_allclose(np.abs(flipped.directions), np.abs(found.directions), atol=1e-9)
    assert (found.directions[[0, 1], np.abs(found.directions).argmax(axis=1)] > 0).all()
    assert (flipped.directions[[0, 1], np.abs(flipped.directions).argmax(axis=1)] > 0).all()


def test_projections_leave_what_the_directions_hold():
    attention, _, _ = simulated(np.random.default_rng(0), rank=3)
    found = stats.spectrum(attention, directions=64)
    np.testing.assert_allclose(found.project(attention, 64), attention, atol=1e-12)
    np.testing.assert_allclose(found.project(attention, 0), np.tile(found.mean, (500, 1)))
    left = attention - found.project(attention, 3)
    share = 1 - np.square(left).sum() / np.square(attention - attention.mean(0)).sum()
    assert share == pytest.approx(found.shares[2], abs=0.01)  # corrected for what the estimate adds
    assert found.scores(attention).std(axis=0)[:3].min() > 5 * found.scores(attention).std(axis=0)[3]


def test_wide_attention_has_the_spectrum_of_its_samples():
    rng = np.random.default_rng(0)
    attention, _, _ = simulated(rng, samples=40, channels=60)
    padded = np.hstack([attention, np.full((40, 100), 0.3)])  # channels that do not vary
    few, many = stats.spectrum(attention[:, :30]), stats.spectrum(np.hstack([attention[:, :30], padded[:, 60:]]))
    np.testing.assert_allclose(many.shares, few.shares, rtol=1e-6)
    np.testing.assert_allclose(many.high, few.high, rtol=1e-6)
    assert (many.rank, many.rank_low, many.rank_high) == pytest.approx((few.rank, few.rank_low, few.rank_high))


def test_samples_that_are_not_finite_are_left_out_and_too_few_are_refused():
    attention, _, _ = simulated(np.random.default_rng(0))
    ids = np.arange(500)
    broken = np.vstack([attention, np.full((1, 64), np.nan)])
    found = stats.spectrum(broken, sample_ids=np.append(ids, 500))
    assert np.array_equal(found.shares, stats.spectrum(attention, sample_ids=ids).shares)
    with pytest.raises(ValueError, match="2 samples are finite"):
        stats.spectrum(attention[:2])
    with pytest.raises(ValueError, match="confidence"):
        stats.spectrum(attention, confidence=95)
    dead = stats.spectrum(np.full((9, 4), 0.5))
    assert np.isnan([*dead.shares, dead.rank, dead.rank_low, dead.rank_high]).all()


def test_the_table_of_ranks_has_a_row_for_each_gate_and_number_of_directions():
    attention, _, _ = simulated(np.random.default_rng(0))
    few, more = stats.spectrum(attention, directions=1), stats.spectrum(attention, directions=3)
    table = stats.rank_table({"a": few, "b": more})
    assert table[["gate", "directions"]].values.tolist() == [["a", 1], ["b", 1], ["b", 2], ["b", 3]]
    np.testing.assert_array_equal(table["share"], [*few.shares, *more.shares])
    np.testing.assert_array_equal(table["share_high"], [*few.high, *more.high])


def test_canonical_correlations_of_known_mixtures():
    rng = np.random.default_rng(0)
    common, own, other = rng.normal(size=(3, 20_000))
    mixed = np.stack([0.6 * common + 0.8 * own, other], axis=1)
    found = stats.canonical_correlations(
        mixed @ rng.normal(size=(2, 2)), np.stack([common, own * 0 + rng.normal(size=20_000)], axis=1)
    )
    assert found[0] == pytest.approx(0.6, abs=0.02)
    assert found[1] < 0.05
    with pytest.raises(ValueError, match="same number of samples"):
        stats.canonical_correlations(mixed, common[:100, None])
