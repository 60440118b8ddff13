"""Figures of stripes. Finished numbers go in, Axes or a Figure come out: no statistic, no file, no global setting.

The modules are named for what they draw: `heatmaps` (image x channel), `channels` (one value per channel), `epochs`
(one value per gate and epoch), `spectra` (in how few directions attention varies), `folds` (folded networks). seaborn
draws the curves and scatter plots that map columns of a table to colours, markers and dashes. It is loaded by the first
figure that needs it, and never estimates or resamples anything.
"""

from stripe.plots.channels import (
    directions,
    excitation,
    learned_over_stripe,
    learned_scatter,
    std_grid,
    std_per_channel,
)
from stripe.plots.epochs import drift_over_epochs, strength_by_gate, strength_over_epochs, training_curves
from stripe.plots.folds import fold_pareto, rank_tradeoff
from stripe.plots.heatmaps import before_after, heatmap_grid, stripe_heatmap
from stripe.plots.spectra import rank_curve, scores

__all__ = [
    "before_after", "directions", "drift_over_epochs", "excitation", "fold_pareto", "heatmap_grid",
    "learned_over_stripe", "learned_scatter", "rank_curve", "rank_tradeoff", "scores", "std_grid",
    "std_per_channel", "strength_by_gate", "strength_over_epochs", "stripe_heatmap", "training_curves",
]  # fmt: skip


def __dir__() -> list[str]:
    return __all__
