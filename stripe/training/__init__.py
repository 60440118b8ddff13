"""Training and evaluation of SE, plain and ASR networks alike: `loop` runs them, `callbacks` act after each epoch."""

from stripe.training.callbacks import Callback, TensorBoard
from stripe.training.loop import (
    UNKNOWN_LABEL,
    Batches,
    Evaluation,
    TrainingBatches,
    evaluate,
    fit,
    logits_of,
    processes,
)

__all__ = [
    "UNKNOWN_LABEL", "Batches", "Callback", "Evaluation", "TensorBoard", "TrainingBatches", "evaluate", "fit",
    "logits_of", "processes",
]  # fmt: skip
