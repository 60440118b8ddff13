"""CIFAR ResNets, networks by name, networks from files."""

from stripe.models.resnet import ResNet
from stripe.models.zoo import Checkpoint, create_model, is_factory, load_checkpoint, read_checkpoint, read_epoch

__all__ = ["Checkpoint", "ResNet", "create_model", "is_factory", "load_checkpoint", "read_checkpoint", "read_epoch"]
