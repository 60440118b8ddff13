"""Networks by name, from files and from factories of the user's own.

No file is executed or trusted: what a file declares of its network can name no code and fetch nothing, and is compared
with its weights before the network takes memory.
"""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Mapping
from contextlib import chdir, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stripe.attention import ATTENTION, create_attention
from stripe.checkpoints import read_tensors
from stripe.messages import listing, one_line, printable
from stripe.models.resnet import BLOCKS, WIDTHS, ResNet, block_of, depth_of

ARCHITECTURES: dict[str, type[ResNet]] = {"resnet": ResNet}
HUBS = ("timm:", "torchvision:")
HUGGING_FACE = "hf:"
IMAGENET: dict[str, Any] = {"size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
"""Input of a torchvision network without published weights."""

MAX_DEPTH = 2_000
"""The largest depth of a CIFAR ResNet that a file may declare."""

FACTORIES = {getattr(torch, name) for name in "empty zeros ones full rand randn arange linspace eye".split()}
SMALL = 4096  # values of a tensor whose memory does not matter

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HUB_NAME = re.compile(r"((timm|torchvision):[\w.]+)(:pretrained)?")


@dataclass(frozen=True)
class Checkpoint:
    """A network and what is known of it: epochs of training (None when unknown) and a description.

    The description is the one saved in the file. A network that the caller names is described by its name ("model")
    and, for its input ("data"), the size, mean and std where its library states them, and one channel if it is grey.
    """

    model: nn.Module
    epoch: int | None = None
    description: dict[str, Any] = field(default_factory=dict)


def create_model(arch: str, **options: Any) -> nn.Module:
    """Build a network of random weights: "resnet" with ResNet's options, "timm:NAME", "torchvision:NAME".

    Raises:
        ValueError: the name or an option is unknown.

    Example:
        >>> model = create_model("resnet", depth=20, module="senet", num_classes=100)
        >>> sum(weight.numel() for weight in model.parameters())
        265964
    """
    if arch.startswith(HUBS):
        return _hub_model(arch, **options)
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"unknown arch '{arch}'; expected one of {', '.join(ARCHITECTURES)}, timm:NAME, torchvision:NAME"
        )
    return ARCHITECTURES[arch](**options)


def load_checkpoint(path_or_spec: str | Path, arch: str | None = None) -> nn.Module:
    """Load a network, on the CPU, in eval mode; see `read_checkpoint`."""
    return read_checkpoint(path_or_spec, arch).model


def read_checkpoint(path_or_spec: str | Path, arch: str | None = None) -> Checkpoint:
    """Load a network and what its file says about it.

    Args:
        path_or_spec: a file (this project's .pt, the reference code's .pth.tar, .safetensors), or
            "timm:NAME[:pretrained]", "torchvision:NAME[:pretrained]", "hf:NAME_OR_DIR" of transformers, or
            "package.module:FACTORY", which is imported, from the current directory too, and called without arguments.
        arch: the network the file's weights belong to, named in the same way; None takes the network that the file
            declares, or infers a CIFAR ResNet from its keys.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, holds code, or its weights do not fit; the name is unknown or its
            factory fails.
    """
    path, spec = Path(path_or_spec).expanduser(), str(path_or_spec)
    if _is_name(spec) and not path.exists():
        model = _named_model(spec)
        return Checkpoint(model.eval(), description=_describe(model, spec))
    content = _read(path)
    state, description = _weights(content, path), content["description"]
    try:
        model = _declared_model(description.get("model", {}), state, path) if arch is None else _named_model(arch)
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path}: weights do not fit {arch or 'its network'}: {one_line(error)}") from error
    known = {} if arch is None else _describe(model, arch)
    return Checkpoint(model.eval(), content["epoch"], known | description)


def read_epoch(path_or_spec: str | Path) -> int | None:
    """Return a checkpoint's epoch of training, from the file's content or else from its name, as in epoch=0012.pt.

    Returns None where neither states it, and for the name of a network.

    Raises what `read_checkpoint` raises for a file that cannot be read.
    """
    path = Path(path_or_spec).expanduser()
    if _is_name(str(path_or_spec)) and not path.exists():
        return None
    epoch: int | None = _read(path)["epoch"]
    named = re.search(r"epoch=(\d+)", path.name)
    return int(named[1]) if epoch is None and named else epoch


def infer_config(state: Mapping[str, Tensor], source: object = "state dict") -> dict[str, Any]:
    """Infer a CIFAR ResNet's options from its weights' names and shapes.

    Raises:
        ValueError: these are not a CIFAR ResNet's weights.
    """
    keys = set(state)
    needed = {"conv1.weight", "layer1.0.conv1.weight", "layer3.0.conv1.weight", "fc.weight"}
    if not needed <= keys or state["fc.weight"].ndim != 2:
        raise ValueError(
            f"{source}: not a CIFAR ResNet's weights (no conv1, layer1..3, fc among {len(keys)} keys): "
            "name the network with --arch"
        )
    block = block_of(keys)
    norm = "bn3" if block == "bottleneck" else "bn2"
    asr = f"layer1.0.{norm}.vector" in keys
    gate = _below(state, "layer1.0.attention_module.")
    attention = gate or _below(state, f"layer1.0.{norm}.attention_module.")
    return {
        "depth": depth_of(keys),
        "block": block,
        "module": _module_of(attention, WIDTHS[0] * BLOCKS[block].expansion, source) if attention else None,
        "asr": asr,
        "both": asr and bool(gate),
        "repeats": max(1, sum(key.startswith(f"layer1.0.{norm}.") and key.endswith(".vector") for key in keys)),
        "num_classes": state["fc.weight"].shape[0],
    }


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, torch.Size]:
    return {key.removeprefix(prefix): value.shape for key, value in state.items() if key.startswith(prefix)}


def _module_of(shapes: dict[str, torch.Size], channels: int, source: object) -> str:
    for name in ATTENTION:
        if _below(create_attention(name, channels).state_dict(), "") == shapes:
            return name
    raise ValueError(
        f"{source}: attention with keys {printable(listing(sorted(shapes)))} is none of {', '.join(ATTENTION)}"
    )


def _read(path: Path) -> dict[str, Any]:
    """Read state_dict (the whole file if it has no such key) and, where usable, epoch and description from a file."""
    content = read_tensors(path)
    if not isinstance(content.get("state_dict"), dict):
        content = {"state_dict": content}
    epoch, description = content.get("epoch"), content.get("description")
    description = description if isinstance(description, dict) else {}
    usable = {
        key: value for key, value in description.items() if isinstance(value, dict) or key not in ("model", "data")
    }
    return content | {"epoch": epoch if type(epoch) is int and epoch >= 0 else None, "description": usable}


def _weights(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the state dict with the reference code's spellings undone: `module.` prefixes and `fused_bn` norms."""
    state: dict[str, Tensor] = {}
    for key, value in content["state_dict"].items():
        _put_weight(state, str(key).removeprefix("module."), value, path)
    if not state or not all(isinstance(value, Tensor) and not value.is_complex() for value in state.values()):
        raise ValueError(
            f"{path}: no weights inside; expected a state dict of real tensors, alone or under 'state_dict'"
        )
    broken = [key for key, value in state.items() if value.is_floating_point() and bool(value.isnan().any())]
    if broken:
        raise ValueError(
            f"{path}: weights are not numbers (NaN) in {len(broken)} of {len(state)} tensors, "
            f"first '{printable(broken[0][:80])}': "
            "the training diverged; take an earlier epoch, or train again at a lower learning rate"
        )
    for key in [key for key in state if ".fused_bn." in key]:
        layer, _, name = key.partition(".fused_bn.")
        value = state.pop(key)
        if f"{layer}.vector" not in state:
            _put_weight(state, f"{layer}.{name}", value, path)
    return state


def _put_weight(state: dict[str, Tensor], key: str, value: Tensor, path: Path) -> None:
    """Add a weight under the name by which a network knows it; ValueError if that name is already taken."""
    if key in state:
        raise ValueError(
            f"{path}: two weights are named '{printable(key[:80])}', with and without `module.` or `fused_bn.`: "
            "expected one of each name"
        )
    state[key] = value


def _declared_model(config: dict[str, Any], state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """Build the network that a file declares or its keys imply, after checking its shapes against those of `state`.

    Raises ValueError for a network that cannot be built, RuntimeError for one that the weights do not fit.
    """
    config = dict(config) if "arch" in config else {"arch": "resnet", **infer_config(state, path)}
    largest = max((value.shape[0] for value in state.values() if value.ndim and value.numel()), default=1)
    limits = {"depth": min(MAX_DEPTH, len(state)), "num_classes": largest, "repeats": len(state)}
    for name, limit in limits.items():
        if type(value := config.get(name, 1)) is not int or not 1 <= value <= limit:
            raise ValueError(f"{path}: it declares {name} {value!r:.80}; expected 1 to {limit} with these weights")
    try:
        if hub := _HUB_NAME.fullmatch(str(config["arch"])[:200]):
            config = {"arch": hub[1], "num_classes": config["num_classes"]}  # not :pretrained, the file has weights
        elif config["arch"] not in ARCHITECTURES:
            raise ValueError(f"unknown arch {config['arch']!r:.80}: name the network with --arch")
        elif config.get("depth", 1) * config.get("repeats", 1) > 3 * len(state):  # above what any network needs
            raise ValueError(f"depth {config['depth']} with {config['repeats']} repeats and {len(state)} weights")
        _require_shapes(config, state)
        return create_model(**config)
    except RuntimeError:
        raise
    except Exception as error:  # what a file declares can fail in many ways
        raise ValueError(f"{path}: the network that it declares cannot be built: {one_line(error)}") from error


def _require_shapes(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Raise RuntimeError unless a network, built without memory for its weights, takes these weights."""
    with _Sketched():
        network = create_model(**config)
    network.load_state_dict(state, assign=True)


class _Sketched(TorchFunctionMode):
    """Makes large tensors without memory; small ones are real, since networks compute their own settings with them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func not in FACTORIES or options.get("device") not in (None, torch.device("cpu"), "cpu"):
            return func(*args, **options)
        sketch = func(*args, **options | {"device": "meta"})
        return sketch if sketch.numel() > SMALL else func(*args, **options)


def _hub_model(spec: str, **options: Any) -> nn.Module:
    """Build "timm:NAME[:pretrained]" or "torchvision:NAME[:pretrained]"."""
    library, name, *rest = spec.split(":")
    if rest not in ([], ["pretrained"]):
        raise ValueError(
            f"unknown ending ':{':'.join(rest)}' of '{spec}'; expected {library}:NAME or {library}:NAME:pretrained"
        )
    try:
        if library == "timm":
            import timm

            model: nn.Module = timm.create_model(name, pretrained=bool(rest), **options)
        else:
            import torchvision

            build = torchvision.models.get_model_builder(name)
            backbone = {"weights_backbone"} & inspect.signature(build).parameters.keys()
            model = build(weights="DEFAULT" if rest else None, **dict.fromkeys(backbone), **options)
        return model
    except ImportError as error:
        raise ValueError(f"'{spec}' needs {library}: pip install 'stripe-observation[hub]'") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"cannot build '{spec}': {one_line(error)}") from error


def _is_name(spec: str) -> bool:
    return spec.startswith((*HUBS, HUGGING_FACE)) or is_factory(spec)


def is_factory(spec: str) -> bool:
    """Return whether a network is named as "package.module:FACTORY", whose code runs when the network is loaded."""
    return not spec.startswith((*HUBS, HUGGING_FACE)) and _FACTORY.fullmatch(spec) is not None


def _named_model(spec: str) -> nn.Module:
    """Build what a user (never a file) named: a network of create_model, of transformers, or of the user's factory."""
    if spec.startswith(HUGGING_FACE):
        return _hugging_face_model(spec)
    return create_model(spec) if spec.startswith(HUBS) or ":" not in spec else _made_model(spec)


def _hugging_face_model(spec: str) -> nn.Module:
    """Load the network in a directory made by `save_pretrained` or under a name on the hub; no code in it runs."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"'{spec}' needs transformers: pip install 'stripe-observation[hub]'") from error
    target = str(Path(spec.removeprefix(HUGGING_FACE)).expanduser())
    try:
        config = transformers.AutoConfig.from_pretrained(target, trust_remote_code=False)
        [declared] = config.architectures or ["AutoModel"]
        kind = getattr(transformers, declared, transformers.AutoModel)
        if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
            kind = transformers.AutoModel
        model: nn.Module = kind.from_pretrained(target)
    except Exception as error:  # a directory's content can fail in many ways
        raise ValueError(f"cannot build '{spec}': {one_line(error)}") from error
    return model


def _hugging_face_input(spec: str) -> dict[str, Any]:
    """Return the size, mean and std of a network's images, as far as its image processor states them."""
    import transformers

    load: Any = transformers.AutoImageProcessor.from_pretrained
    data: dict[str, Any] = {}
    with suppress(Exception):  # networks for text or sound have no image processor, nor do some for images
        processor = load(str(Path(spec.removeprefix(HUGGING_FACE)).expanduser()))
        size = getattr(processor, "crop_size", None) or processor.size
        data["size"] = size.get("height") or size["shortest_edge"]
        data |= {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    return data


def _made_model(spec: str) -> nn.Module:
    """Import "package.module:FACTORY", from the current directory too, and call the factory.

    The factory may change the working directory and `sys.path` while it runs; both are restored afterwards.
    """
    module, _, factory = spec.partition(":")
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        with chdir("."):
            model = getattr(importlib.import_module(module), factory)()
    except Exception as error:  # the user's code may raise anything
        raise ValueError(f"cannot build '{spec}': {type(error).__name__}: {one_line(error)}") from error
    finally:
        sys.path[:] = before
    if not isinstance(model, nn.Module):
        raise ValueError(f"cannot build '{spec}': it returned {type(model).__name__}; expected a torch.nn.Module")
    return model


def _describe(model: nn.Module, spec: str) -> dict[str, Any]:
    """Describe a network by its name, with the size, mean and std of its input where its library states them."""
    data: dict[str, Any] = {}
    if hasattr(model, "pretrained_cfg"):  # a network of timm, whoever built it
        from timm.data import resolve_data_config

        config = resolve_data_config(model=model)
        data = {"size": config["input_size"][-1], "mean": list(config["mean"]), "std": list(config["std"])}
    elif spec.startswith("torchvision:"):
        data = _torchvision_input(spec.split(":")[1])
    elif spec.startswith(HUGGING_FACE):
        data = _hugging_face_input(spec)
    if _takes_grey(model):
        data = {key: [sum(value) / len(value)] if isinstance(value, list) else value for key, value in data.items()}
        data["channels"] = 1
    return {"model": {"arch": spec}, "data": data}


def _takes_grey(model: nn.Module) -> bool:
    """Return whether a network's first convolution takes one channel."""
    convolutions = (module for module in model.modules() if isinstance(module, nn.Conv2d))
    return getattr(next(convolutions, None), "in_channels", 3) == 1


def _torchvision_input(name: str) -> dict[str, Any]:
    from torchvision.models import get_model_weights

    weights = get_model_weights(name)
    preset = weights["DEFAULT"].transforms() if len(weights) else None
    size = getattr(preset, "crop_size", [IMAGENET["size"]])[0]
    return {key: list(getattr(preset, key, IMAGENET[key])) for key in ("mean", "std")} | {"size": size}
