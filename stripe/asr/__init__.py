"""ASR: train with a learned vector in place of the image, merge it into a plain layer, validate it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stripe.asr.annealing import AnnealedAttention, anneal, annealed
    from stripe.asr.convert import deploy, fuse, insert, switch_to_deploy, switch_to_train
    from stripe.asr.layers import ASRBatchNorm2d, ASRLayer
    from stripe.asr.validation import Validation, validate

_HOMES = {
    "ASRBatchNorm2d": "layers",
    "ASRLayer": "layers",
    "AnnealedAttention": "annealing",
    "Validation": "validation",
    "anneal": "annealing",
    "annealed": "annealing",
    "deploy": "convert",
    "fuse": "convert",
    "insert": "convert",
    "switch_to_deploy": "convert",
    "switch_to_train": "convert",
    "validate": "validation",
}

__all__ = [
    "ASRBatchNorm2d", "ASRLayer", "AnnealedAttention", "Validation", "anneal", "annealed", "deploy", "fuse", "insert",
    "switch_to_deploy", "switch_to_train", "validate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it, so that each module here can be imported alone."""
    if name not in _HOMES:
        raise AttributeError(f"module 'stripe.asr' has no attribute '{name}'; expected one of {', '.join(__all__)}")
    return getattr(import_module(f"stripe.asr.{_HOMES[name]}"), name)
