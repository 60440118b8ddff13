"""ASR: train with a learned vector in place of the image, merge it into a plain layer, validate it."""

from stripe.asr.convert import deploy, fuse, insert, switch_to_deploy, switch_to_train
from stripe.asr.layers import ASRBatchNorm2d, ASRLayer

__all__ = [
    "ASRBatchNorm2d",
    "ASRLayer",
    "deploy",
    "fuse",
    "insert",
    "switch_to_deploy",
    "switch_to_train",
]
