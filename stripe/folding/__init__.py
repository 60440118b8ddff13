"""Fold the attention out of a trained network: constants for its gates, merged into its weights where that is exact.

`measure_gates`, `foretell`, `learn_constants` and `fit_matrices` give the constants, `sensitivity` and `greedy_order`
what they cost, `fold` the network without gates, `compact` one with a few numbers per image in their place, `tradeoff`
how many it needs, `damage` how far that is from the original, `reestimate_norms` and `distill` win back accuracy,
`latencies` and the `save_` functions take it to its use; `study` does all of this and chooses how many gates to fold.

The four conversions answer alike. `asr.insert`, `asr.deploy` and `asr.fuse` return a new network and `fold` returns one
with a report; `fuse_norms` is `asr.fuse` with the same kind of report. None changes its argument, except where
`inplace=True` asks for it. None refuses a network in train mode: `insert` and `deploy` hold in both modes and leave
every module in its own; `fuse` and `fold` hold for inference, take the network as it is in eval mode, and return one in
eval mode. Put back into train mode, a folded network does there what it did before, but for its gates.

How it is decided: `fields` and `maps` say what of a graph is an affine map per channel, `merging` where it goes, all
without torch; `source` takes it out of the modules' own methods, and `building` puts together and compares. Names are
imported on first use, so that what needs no torch is there without it.
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
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stripe.folding' has no attribute '{name}'; expected one of {', '.join(__all__)}")
    return getattr(import_module(f"stripe.folding.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
