"""Fold the attention out of a trained network: constants for its gates, merged into its weights where that is exact.

`measure_gates` gives the constants, `sensitivity` and `greedy_order` what they cost, `fold` the network without
gates, `reestimate_norms` and `distill` win back accuracy, `latencies` and the `save_` functions take it to its use.
`study` does all of this and chooses how many gates to fold.
"""

from stripe.folding.constants import WEIGHTINGS, GateUse, mean_constants, measure_gates
from stripe.folding.exact import FoldReport, fold
from stripe.folding.export import OnnxFile, save_onnx, save_program, save_weights
from stripe.folding.latency import latencies
from stripe.folding.merging import ChannelScale
from stripe.folding.recovery import distill, reestimate_norms
from stripe.folding.sensitivity import Metric, greedy_order, predictors, rank_correlations, sensitivity
from stripe.folding.study import Study, study
from stripe.folding.variants import AS_FOLDED, Recovery, Variant, variants

__all__ = [
    "AS_FOLDED", "WEIGHTINGS", "ChannelScale", "FoldReport", "GateUse", "Metric", "OnnxFile", "Recovery", "Study",
    "Variant", "distill", "fold", "greedy_order", "latencies", "mean_constants", "measure_gates", "predictors",
    "rank_correlations", "reestimate_norms", "save_onnx", "save_program", "save_weights", "sensitivity", "study",
    "variants",
]  # fmt: skip
