"""Classes: the mean attention of each, and how much of the variance across samples the classes explain."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stripe.stats.arithmetic import Array, Labels, ratio
from stripe.stats.moments import Moments


def class_means(attention: Array | Moments, labels: Labels | None = None) -> dict[int, Array]:
    """Average attention over the samples of each class: what SENet's authors call the excitation of a class.

    Args:
        attention: (samples, channels), with the labels; or moments that were measured with them.
        labels: the class of every sample, (samples,); below 0 where it is unknown, and such samples are left out.

    Returns:
        The mean vector (channels,) of each class, ascending; empty if no class is known, or if the moments kept none
        because there were more than `CLASSES`.

    Raises:
        ValueError: an array comes without a label for every sample, or moments come with labels.

    Example:
        >>> import numpy as np
        >>> class_means(np.array([[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]), np.array([0, 2, 0]))
        {0: array([0.5, 0.5]), 2: array([0.5, 0.5])}
    """
    moments = _with_classes(attention, labels)
    if moments.classes is None:
        return {}
    means = zip(moments.classes.keys.tolist(), moments.classes.means, strict=True)
    return {key: mean for key, mean in means if key >= 0}


def _with_classes(attention: Array | Moments, labels: Labels | None) -> Moments:
    if isinstance(attention, Moments) == (labels is not None):
        raise ValueError("expected an array with the label of every sample, or moments that were measured with labels")
    return attention if isinstance(attention, Moments) else Moments.of(attention, labels=labels)


@dataclass(frozen=True)
class LabelShare:
    """Share of the variance across samples that the class explains, plain and bias-corrected."""

    eta_squared: float
    omega_squared: float


def label_share(attention: Array | Moments, labels: Labels | None = None) -> LabelShare:
    """Explain the variance across samples by class: one-way ANOVA pooled over channels.

    omega^2 = (SSB - (k - 1) MSW) / (SST + MSW) (Hays 1963) can fall below 0 by chance. Samples with a label
    under 0 are left out; both shares are NaN with fewer than two classes.

    Args:
        attention: (samples, channels), with the labels; or moments that were measured with them.
        labels: the class of every sample, (samples,).

    Raises:
        ValueError: an array comes without a label for every sample, or moments come with labels.

    Example:
        >>> import numpy as np
        >>> noise = 0.1 * np.random.default_rng(0).standard_normal((500, 16))
        >>> attention = np.linspace(0.2, 0.8, 16) + noise  # 500 images, 16 channels
        >>> labels = np.arange(500) % 10
        >>> attention[labels == 3] += 0.2  # one class differs
        >>> round(label_share(attention, labels).omega_squared, 3)
        0.261
    """
    moments = _with_classes(attention, labels)
    nothing = LabelShare(math.nan, math.nan)
    if moments.classes is None or len(moments.classes.keys) < 2:
        return nothing
    known = moments.classes.chosen(moments.classes.keys >= 0)
    if len(known.keys) < 2:
        return nothing
    between, within = float(known.counts @ known.deviations.squares), float(known.scatter.sum())
    total, extra = between + within, len(known.keys) - 1
    error = ratio(within, float(known.counts.sum()) - len(known.keys))
    return LabelShare(float(ratio(between, total)), float(ratio(between - extra * error, total + error)))
