"""Layout shared by the figures of several studies."""

from matplotlib.figure import Figure

from stripe.plots.drawing import LEGEND_ROOM


def finish(figure: Figure) -> Figure:
    """Put the first panel's legend below all panels and set the text sizes."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for ax in figure.axes:
        if legend := ax.get_legend():
            legend.remove()
        ax.tick_params(which="both", labelsize=7)
        ax.xaxis.label.set_fontsize(8)
        ax.yaxis.label.set_fontsize(8)
    if len(handles) <= LEGEND_ROOM:
        figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=7, frameon=False)
    return figure
