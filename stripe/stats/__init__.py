"""Statistics over samples: arrays of shape (samples, channels) in, frozen dataclasses or one DataFrame out.

Law: NumPy and pandas alone; nothing here knows a path or a network; moments of parts merge into those of the
whole. Non-finite values are never repaired: they are counted, make the moments of their own channel NaN and raise
the "nonfinite" flag, and the statistics of the gate are then those of its other channels.
"""

from stripe.stats.arithmetic import SEED, Array, Counts, Labels
from stripe.stats.epochs import SUMMARY, Measured, drift, measure, settled_epoch, summarize, tabulate
from stripe.stats.matching import (
    OBSERVED_RANGE,
    PERMUTATIONS,
    Match,
    benjamini_hochberg,
    match,
    pearson,
    permutation_test,
    swap_test,
    wasserstein,
)
from stripe.stats.moments import DEAD_RANGE, NEAR_BOUND, SATURATED_SHARE, Moments, flags, moments
from stripe.stats.runs import Batch, ClassMeans, NamedGate, RecordedRun
from stripe.stats.strength import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    LabelShare,
    Shares,
    Strength,
    bootstrap_strength,
    effective_rank,
    label_share,
    label_share_of_means,
    stripe_strength,
    two_way_shares,
)

__all__ = [
    "CONFIDENCE", "DEAD_RANGE", "NEAR_BOUND", "OBSERVED_RANGE", "PERMUTATIONS",
    "RESAMPLES", "SATURATED_SHARE", "SEED", "SUMMARY", "Array", "Batch", "ClassMeans", "Counts", "Interval",
    "LabelShare", "Labels", "Match", "Measured", "Moments", "NamedGate", "RecordedRun", "Shares", "Strength",
    "benjamini_hochberg", "bootstrap_strength", "drift", "effective_rank", "flags", "label_share",
    "label_share_of_means", "match", "measure", "moments", "pearson", "permutation_test", "settled_epoch",
    "stripe_strength", "summarize", "swap_test", "tabulate", "two_way_shares", "wasserstein",
]  # fmt: skip
