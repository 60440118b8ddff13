"""CIFAR ResNets with optional channel attention and ASR, in the key layout of the ASR reference code."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.nn import functional as F

from stripe.asr.layers import asr_layers, channels_of, wrap
from stripe.attention import create_attention
from stripe.recipe import PSI_INIT

WIDTHS = (16, 32, 64)


class Block(nn.Module):
    """Convolutions with batch norms, a gate on the last norm's output, the shortcut, ReLU."""

    expansion: int

    def __init__(self, inputs: int, width: int, kernels: tuple[int, ...], stride: int) -> None:
        """Build a block of len(kernels) convolutions; the first of size 3 carries the stride."""
        super().__init__()
        outputs = width * self.expansion
        self.depth = len(kernels)
        self.attention_module: nn.Module | None = None
        strided = kernels.index(3)
        for i, kernel in enumerate(kernels):
            channels = (inputs if i == 0 else width, outputs if i == self.depth - 1 else width)
            step = stride if i == strided else 1
            self.add_module(f"conv{i + 1}", nn.Conv2d(*channels, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i + 1}", nn.BatchNorm2d(channels[1]))
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    @property
    def last_norm(self) -> str:
        """Name of the norm that attention follows and that ASR wraps: bn3 or bn2."""
        return f"bn{self.depth}"

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, width * expansion, H / stride, W / stride)."""
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i < self.depth:
                out = F.relu(out, inplace=True)
        if self.attention_module is not None:
            out = out * self.attention_module(out)
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class BasicBlock(Block):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        """Build for `inputs` channels in and `width` out."""
        super().__init__(inputs, width, (3, 3), stride)


class Bottleneck(Block):
    """1x1, 3x3, 1x1 convolutions, four times as wide at the end."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        """Build for `inputs` channels in and 4 * `width` out."""
        super().__init__(inputs, width, (1, 3, 1), stride)


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"bottleneck": Bottleneck, "basicblock": BasicBlock}
BLOCK_DEPTHS = {"bottleneck": 9, "basicblock": 6}
"""Convolutions that one more block in each of the three stages adds; stem and classifier are two more layers."""


class ResNet(nn.Module):
    """A CIFAR ResNet: stem of 16 channels, three stages of 16, 32, 64 planes, mean over space, classifier."""

    def __init__(
        self,
        depth: int,
        block: str = "bottleneck",
        module: str | None = None,
        *,
        asr: bool = False,
        both: bool = False,
        num_classes: int = 10,
        psi_init: float | Literal["normal"] = PSI_INIT,
        repeats: int = 1,
    ) -> None:
        """Build the network; the plain part's initial weights depend on torch's seed alone, not on the attention.

        Args:
            depth: 9n+2 with bottleneck blocks, 6n+2 with basic ones.
            block: "bottleneck" or "basicblock".
            module: attention module's name (`stripe.attention`), or None.
            asr: scale the last norm's output by attention(psi), in place of attention computed from the image.
            both: with `asr`, keep the attention computed from the image too.
            num_classes: outputs of the classifier.
            psi_init: the constant psi starts at, or "normal" for standard normal numbers.
            repeats: learned vectors per block, with `asr`.

        Raises:
            ValueError: an impossible depth, an unknown block or module, `asr` without a module, `both` without `asr`.
        """
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"unknown block '{block}'; expected one of {', '.join(BLOCKS)}")
        blocks, rest = divmod(depth - 2, BLOCK_DEPTHS[block])
        if blocks < 1 or rest:
            raise ValueError(f"depth {depth} does not fit {block}; expected {BLOCK_DEPTHS[block]}n+2, such as 20")
        if asr and module is None or both and not asr:
            raise ValueError(f"asr={asr}, both={both}, module={module}: asr needs an attention module, both needs asr")
        self._options = {"depth": depth, "block": block, "module": module, "num_classes": num_classes}
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        kind = BLOCKS[block]
        self.layer1 = _stage(kind, WIDTHS[0], WIDTHS[0], blocks, stride=1)
        self.layer2 = _stage(kind, WIDTHS[0] * kind.expansion, WIDTHS[1], blocks, stride=2)
        self.layer3 = _stage(kind, WIDTHS[1] * kind.expansion, WIDTHS[2], blocks, stride=2)
        self.fc = nn.Linear(WIDTHS[2] * kind.expansion, num_classes)
        for convolution in (m for m in self.modules() if isinstance(m, nn.Conv2d)):
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        if module is not None:
            build = partial(create_attention, module)
            for part in (m for m in self.modules() if isinstance(m, Block)):
                norm = part.get_submodule(part.last_norm)
                channels = channels_of(norm)
                if asr:
                    part.set_submodule(part.last_norm, wrap(norm, partial(build, channels), psi_init, repeats))
                if both or not asr:
                    part.attention_module = build(channels)

    @property
    def config(self) -> dict[str, Any]:
        """The arguments that rebuild the network as it is now, which is the plain network after deployment."""
        layer = next((layer for _, layer in asr_layers(self)), None)
        asr = layer is not None
        gated = any(isinstance(m, Block) and m.attention_module is not None for m in self.modules())
        module = self._options["module"] if asr or gated else None
        repeats = 1 if layer is None else layer.repeats
        return self._options | {"module": module, "asr": asr, "both": asr and gated, "repeats": repeats}

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) to logits (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.layer3(self.layer2(self.layer1(x)))
        return cast(Tensor, self.fc(x.mean((2, 3))))

    def to_asr(self) -> "ResNet":
        """Return a new network with ASR in place of each gate, starting from this network's weights; psi is new.

        Raises:
            ValueError: the network has no gates, or has ASR already.
        """
        config = self.config
        if config["module"] is None or config["asr"]:
            raise ValueError(f"module={config['module']}, asr={config['asr']}: expected gates, and no ASR beside them")
        network = ResNet(**config | {"asr": True}).train(self.training)
        norm = next(block.last_norm for block in self.modules() if isinstance(block, Block))
        state = network.state_dict()
        for key, value in self.state_dict().items():
            key = key.replace(f".{norm}.", f".{norm}.bn.")
            state[key.replace(".attention_module.", f".{norm}.attention_module.")] = value
        network.load_state_dict(state)
        return network

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; a plain network recognises and refuses weights in ASR training form.

        Raises:
            RuntimeError: the weights do not fit.
        """
        if any(key.endswith(".vector") for key in state_dict) and not any(asr_layers(self)):
            raise RuntimeError(
                "these weights are in ASR training form, this network is plain or deployed: build it with asr=True"
            )
        return super().load_state_dict(state_dict, strict, assign)


def _stage(
    kind: type[BasicBlock] | type[Bottleneck], inputs: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    rest = [kind(width * kind.expansion, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(kind(inputs, width, stride), *rest)


def block_of(keys: set[str]) -> str:
    """Infer the block's name from a state dict's keys."""
    return "bottleneck" if "layer1.0.conv3.weight" in keys else "basicblock"


def depth_of(keys: set[str]) -> int:
    """Infer the depth from a state dict's keys."""
    blocks = len({key.split(".")[1] for key in keys if key.startswith("layer1.")})
    return blocks * BLOCK_DEPTHS[block_of(keys)] + 2
