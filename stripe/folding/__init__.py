"""Fold the attention out of a trained network: constants for its gates, merged into its weights where that is exact.

`measure_gates`, `foretell`, `learn_constants` and `fit_matrices` find the constants; `sensitivity` and `greedy_order`
measure what they cost. `fold` returns the network without gates, `compact` one with a few numbers per image in their
place, and `tradeoff` measures how many numbers it needs. `damage` says how far a network is from the original,
`reestimate_norms` and `distill` win back accuracy, `latencies` times networks and the `save_` functions export them.
`study` goes from finding constants to choosing how many gates to fold.

The four conversions behave alike. `asr.insert`, `asr.deploy` and `asr.fuse` return a new network; `fold` returns a new
network and a report; `fuse_norms` is `asr.fuse` with the same kind of report. None changes its argument unless
`inplace=True` is given. All accept a network in train mode: `insert` and `deploy` are exact in both modes and leave
every module in its mode; `fuse` and `fold` are exact for inference only, treat the network as if it were in eval mode,
and return one in eval mode. Put back into train mode, a folded network behaves as before, except for its gates.

How merges are decided: `fields` and `maps` find the affine maps per channel in a graph and `merging` decides where each
one goes, all without torch; `source` removes them from the modules' own methods, and `building` assembles the new
network and compares it with the original. Names are imported on first use, so that parts without torch work without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stripe.folding.building import ChannelMix, ChannelScale
    from stripe.folding.compacting import CompactGate, CompactReport, choose_source, compact
    from stripe.folding.comparing import AS_FOLDED, Recovery, Variant, variants
    from stripe.folding.constants import Forecast, fit_matrices, foretell, learn_constants, measure_gates
    from stripe.folding.divergence import Damage, damage
    from stripe.folding.exact import fold, fuse_norms
    from stripe.folding.export import OnnxFile, onnx_session, save_onnx, save_program, save_weights
    from stripe.folding.latency import latencies
    from stripe.folding.ordering import Metric, greedy_order, predictors, rank_correlations, sensitivity
    from stripe.folding.ranks import Tradeoff, tradeoff
    from stripe.folding.recovery import distill, reestimate_norms
    from stripe.folding.report import FoldReport
    from stripe.folding.studying import Study, study
    from stripe.folding.uses import AVERAGES, GateUse, mean_constants

_NAMES = {
    "building": "ChannelMix ChannelScale",
    "compacting": "CompactGate CompactReport choose_source compact",
    "comparing": "AS_FOLDED Recovery Variant variants",
    "constants": "Forecast fit_matrices foretell learn_constants measure_gates",
    "divergence": "Damage damage",
    "exact": "fold fuse_norms",
    "export": "OnnxFile onnx_session save_onnx save_program save_weights",
    "latency": "latencies",
    "ordering": "Metric greedy_order predictors rank_correlations sensitivity",
    "ranks": "Tradeoff tradeoff",
    "recovery": "distill reestimate_norms",
    "report": "FoldReport",
    "studying": "Study study",
    "uses": "AVERAGES GateUse mean_constants",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = [
    "AS_FOLDED", "AVERAGES", "ChannelMix", "ChannelScale", "CompactGate", "CompactReport", "Damage", "FoldReport",
    "Forecast", "GateUse", "Metric", "OnnxFile", "Recovery", "Study", "Tradeoff", "Variant", "choose_source",
    "compact", "damage", "distill", "fit_matrices", "fold", "foretell", "fuse_norms", "greedy_order", "latencies",
    "learn_constants", "mean_constants", "measure_gates", "onnx_session", "predictors", "rank_correlations",
    "reestimate_norms", "save_onnx", "save_program", "save_weights", "sensitivity", "study", "tradeoff", "variants",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stripe.folding' has no attribute '{name}'; expected one of {', '.join(__all__)}")
    return getattr(import_module(f"stripe.folding.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
