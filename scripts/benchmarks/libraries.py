"""Networks of other people's libraries, with random weights, each with an input (3, ...) that suits it.

Nothing is downloaded. A library that is not installed raises ModuleNotFoundError, which names it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from stripe.models import read_checkpoint

SAMPLES = 3
SIZE = 224  # of images for a network that does not say its own
WORDS = 16  # of a text
SECONDS = 16_000  # values per second of sound


def build(spec: str) -> tuple[nn.Module, Any]:
    """Build LIBRARY:NAME; return the network in eval mode and its input: a tensor, a tuple, or a mapping by name.

    Raises:
        KeyError: this module does not know the library.
        ModuleNotFoundError: the library is not installed.
    """
    library, _, name = spec.partition(":")
    package, make = LIBRARIES[library]
    import_module(package)
    torch.manual_seed(0)
    network, given = make(name)
    return network.eval(), given


def library_version(spec: str) -> str | None:
    """Return the version of the library that a network comes from."""
    package, _ = LIBRARIES[spec.partition(":")[0]]
    return version(DISTRIBUTIONS.get(package, package))


def _pixels(*size: int, channels: int = 3) -> Tensor:
    return torch.rand(SAMPLES, channels, *size)


def _by_stripe(library: str) -> Callable[[str], tuple[nn.Module, Any]]:
    """Return a builder of networks that `stripe.models` knows by name, with images of the network's own size."""

    def make(name: str) -> tuple[nn.Module, Any]:
        checkpoint = read_checkpoint(f"{library}:{name}")
        size = checkpoint.description.get("data", {}).get("size", SIZE)
        return checkpoint.model, _pixels(size, size)

    return make


def _torchvision(name: str) -> tuple[nn.Module, Any]:
    """Build a network with images for a classifier, a list of images for a detector, or frames for a video network."""
    from torchvision import models

    kind = models.get_model_builder(name).__module__.split(".")[2]
    options = {"weights": None, "weights_backbone": None} if kind in ("detection", "segmentation") else {}
    if not options and kind != "video":
        return _by_stripe("torchvision")(name)
    network = models.get_model(name, **options)
    if kind == "detection":
        return network, ([*_pixels(320, 320)],)
    return network, _pixels(16, 112, 112) if kind == "video" else _pixels(96, 128)


def _segmentation(name: str) -> tuple[nn.Module, Any]:
    """Build DECODER/ENCODER, or DECODER/ENCODER/ATTENTION with attention in the decoder."""
    decoder, encoder, *attention = name.split("/")
    options = {"decoder_attention_type": attention[0]} if attention else {}
    make = getattr(import_module("segmentation_models_pytorch"), decoder)
    return make(encoder_name=encoder, encoder_weights=None, **options), _pixels(96, 128)


def _efficientnet(name: str) -> tuple[nn.Module, Any]:
    return import_module("efficientnet_pytorch").EfficientNet.from_name(name), _pixels(96, 128)


def _pretrainedmodels(name: str) -> tuple[nn.Module, Any]:
    return import_module("pretrainedmodels").__dict__[name](pretrained=None), _pixels(SIZE, SIZE)


def _pytorchcv(name: str) -> tuple[nn.Module, Any]:
    network = import_module("pytorchcv.model_provider").get_model(name)
    return network, _pixels(*network.in_size)


def _monai(name: str) -> tuple[nn.Module, Any]:
    """Build NETWORK/DIMENSIONS, for volumes or images with one channel."""
    network, _, dimensions = name.partition("/")
    spatial = int(dimensions)
    kind = {"spatial_dims": spatial}
    io = {"in_channels": 1, "out_channels": 2}
    channels = {"channels": (8, 16, 32), "strides": (2, 2)}
    options: dict[str, dict[str, Any]] = {
        "EfficientNetBN": {"model_name": "efficientnet-b0", "pretrained": False, "in_channels": 1},
        "DenseNet121": io,
        "SegResNet": io | {"init_filters": 8},
        "UNet": io | channels,
        "AttentionUnet": io | channels,
        "BasicUNet": io | {"features": (8, 8, 16, 32, 64, 8)},
        "resnet18": {"n_input_channels": 1},
    }
    made = getattr(import_module("monai.networks.nets"), network)(**kind, **options.get(network, {"in_channels": 1}))
    return made, _pixels(*[64] * spatial, channels=1)


def _speechbrain(name: str) -> tuple[nn.Module, Any]:
    """Build a network with features (samples, time, 40) of sound."""
    module, _, kind = name.rpartition("/")
    make = getattr(import_module(f"speechbrain.lobes.models.{module}"), kind)
    options: dict[str, dict[str, Any]] = {
        "ECAPA_TDNN": {"input_size": 40, "channels": [64] * 4 + [192], "lin_neurons": 32},
        "ContextNet": {"input_shape": (SAMPLES, 40, 40)},
        "Xvector": {"in_channels": 40},
    }
    return make(**options[kind]), torch.randn(SAMPLES, 40, 40)


def _torchaudio(name: str) -> tuple[nn.Module, Any]:
    """Build a network with features (samples, time, 64) for a conformer, else with sound."""
    models = import_module("torchaudio.models")
    if name == "Conformer":
        return models.Conformer(64, 4, 128, 2, 15), (torch.randn(SAMPLES, 50, 64), torch.full((SAMPLES,), 50))
    sound = torch.randn(SAMPLES, SECONDS // 4)
    return getattr(models, name)(), sound[:, None] if name in ("ConvTasNet", "Wav2Letter") else sound


def _transformers(name: str) -> tuple[nn.Module, Any]:
    """Build a small network for images, text or sound from its configuration, with its input by name."""
    transformers = import_module("transformers")
    config = getattr(transformers, f"{name}Config")(**_CONFIGS.get(name, {}))
    network = transformers.AutoModel.from_config(config)
    given = {
        "pixel_values": lambda: _pixels(96, 96),
        "input_ids": lambda: torch.randint(1, 100, (SAMPLES, WORDS)),
        "input_values": lambda: torch.randn(SAMPLES, SECONDS // 2),
    }[network.main_input_name]()
    return network, {network.main_input_name: given}


_SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
_CONFIGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("Bert", "Roberta", "Electra", "FNet", "Wav2Vec2", "Hubert", "WavLM"), _SMALL),
    "ViT": _SMALL | {"image_size": 96},
    "Swin": {"image_size": 96, "window_size": 3, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 2]},
    "GPT2": {"n_layer": 2, "n_embd": 64, "n_head": 4},
    "DistilBert": {"n_layers": 2, "dim": 64, "n_heads": 4, "hidden_dim": 128},
    "EfficientNet": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 96, "hidden_dim": 1280},
    "RegNet": {"layer_type": "y"},
}

LIBRARIES: dict[str, tuple[str, Callable[[str], tuple[nn.Module, Any]]]] = {
    "timm": ("timm", _by_stripe("timm")),
    "torchvision": ("torchvision", _torchvision),
    "transformers": ("transformers", _transformers),
    "smp": ("segmentation_models_pytorch", _segmentation),
    "efficientnet_pytorch": ("efficientnet_pytorch", _efficientnet),
    "pretrainedmodels": ("pretrainedmodels", _pretrainedmodels),
    "pytorchcv": ("pytorchcv", _pytorchcv),
    "monai": ("monai", _monai),
    "speechbrain": ("speechbrain", _speechbrain),
    "torchaudio": ("torchaudio", _torchaudio),
}
"""By prefix, the package to import and the function that builds a network from it."""

DISTRIBUTIONS = {"segmentation_models_pytorch": "segmentation-models-pytorch"}
