"""The reference recipe as it is written: float32, NCHW, bn(x) * v, torchvision transforms in DataLoader workers."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from stripe import asr
from stripe.data import ImageSet

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4


class Scaled(nn.Module):
    """Computes bn(x) * v as the formula reads, which the ASR layer avoids."""

    def __init__(self, layer: asr.ASRLayer) -> None:
        """Take over an ASR layer's parts."""
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return bn(x) * v."""
        scaled: Tensor = self.layer.bn(x) * self.layer.learned_vector().view(1, -1, 1, 1)
        return scaled


def as_written(network: nn.Module) -> nn.Module:
    """Replace a network's ASR layers, if it has any, by the formula as written, in place."""
    for name, layer in list(network.named_modules()):
        if isinstance(layer, asr.ASRLayer):
            network.set_submodule(name, Scaled(layer))
    return network


class Pictures(Dataset[tuple[Tensor, int]]):
    """Decoded images, augmented and normalised one by one, as torchvision's CIFAR sets do it."""

    def __init__(self, images: ImageSet) -> None:
        """Hold the images as arrays, as torchvision's sets do."""
        if not isinstance(images.images, Tensor):
            raise ValueError(
                f"'{images.uri}' does not fit into memory, where the reference recipe holds it: take fewer images"
            )
        self._arrays = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self._labels = images.labels.tolist()
        steps: list[Any] = [transforms.RandomCrop(images.images.shape[-1], padding=4)]
        if images.flip:
            steps.append(transforms.RandomHorizontalFlip())
        self._transform = transforms.Compose(
            [*steps, transforms.ToTensor(), transforms.Normalize(images.mean, images.std)]
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an augmented image and its label."""
        return self._transform(Image.fromarray(self._arrays[index])), self._labels[index]


def loader_as_written(images: ImageSet, batch: int, workers: int) -> DataLoader[tuple[Tensor, int]]:
    """Return shuffled batches made by `workers` processes."""
    return DataLoader(Pictures(images), batch_size=batch, shuffle=True, num_workers=workers)


def train_as_written(network: nn.Module, loader: Iterable[Any], epochs: int, lr: float, device: str) -> None:
    """Train with SGD; as the reference does, read the loss and the accuracy of every batch."""
    optimizer = torch.optim.SGD(network.parameters(), lr, MOMENTUM, weight_decay=WEIGHT_DECAY)
    criterion = nn.CrossEntropyLoss()
    network.train()
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores, as the recipe has it
    for _ in range(epochs):
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            logits = network(images)
            loss = criterion(logits, labels)
            (logits.argmax(1) == labels).sum().item()
            loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
