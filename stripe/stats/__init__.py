"""Statistics over samples: arrays of shape (samples, channels) in, frozen dataclasses or one DataFrame out.

Rules: statistics are computed with NumPy, SciPy and pandas alone; nothing here reads a file or knows a network; moments
of parts merge into those of the whole. Most functions of attention take an array or its moments alike. Non-finite
values are never repaired: a sample with such a value is counted and left out of its gate's statistics, and the gate is
flagged "nonfinite". Only a channel without a single finite value is left out itself, instead of its samples.
"""

from stripe.stats.arithmetic import SEED, Array, Counts, Labels
from stripe.stats.changes import MEASURES, Change, change_between, changes
from stripe.stats.epochs import COLUMNS, SUMMARY, Measured, drift, measure, settled_epoch, summarize, tabulate
from stripe.stats.flags import DEAD_RANGE, SATURATED_SHARE, flags
from stripe.stats.groups import BLOCKS, Groups
from stripe.stats.intervals import CONFIDENCE, Interval, drift_interval, strength_interval
from stripe.stats.labels import LabelShare, class_means, label_share
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
from stripe.stats.measuring import NEAR_BOUND
from stripe.stats.moments import CLASSES, GateMoments, Moments
from stripe.stats.rank import effective_rank
from stripe.stats.runs import NamedGate, RecordedRun
from stripe.stats.spectrum import Spectrum, canonical_correlations, rank_table, spectrum
from stripe.stats.strength import (
    IntraclassCorrelations,
    Shares,
    Strength,
    coefficient_of_variation,
    intraclass_correlations,
    stripe_strength,
    two_way_shares,
)

__all__ = [
    "BLOCKS", "CLASSES", "COLUMNS", "CONFIDENCE", "DEAD_RANGE", "MEASURES", "NEAR_BOUND", "OBSERVED_RANGE",
    "PERMUTATIONS", "SATURATED_SHARE", "SEED", "SUMMARY", "Array", "Change", "Counts", "GateMoments", "Groups",
    "Interval", "IntraclassCorrelations", "LabelShare", "Labels", "Match", "Measured", "Moments", "NamedGate",
    "RecordedRun", "Shares", "Spectrum", "Strength", "benjamini_hochberg", "canonical_correlations", "change_between",
    "changes", "class_means", "coefficient_of_variation", "drift", "drift_interval", "effective_rank", "flags",
    "intraclass_correlations", "label_share", "match", "measure", "pearson", "permutation_test", "rank_table",
    "settled_epoch", "spectrum", "strength_interval", "stripe_strength", "summarize", "swap_test", "tabulate",
    "two_way_shares", "wasserstein",
]  # fmt: skip
