"""Channel-attention modules: each maps a feature map (N, C, H, W) to attention (N, C, 1, 1); the caller multiplies."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

REDUCTION = 16  # channels per hidden unit of the fully connected modules


def _hidden(channels: int) -> int:
    return max(1, round(channels / REDUCTION))


class SqueezeExcitation(nn.Module):
    """SE (Hu et al. 2018): sigmoid(fc2(relu(fc1(mean over space))))."""

    def __init__(self, channels: int, inputs: int | None = None) -> None:
        """Build for C channels; fc1 takes `inputs` numbers per sample (default C)."""
        super().__init__()
        self.fc1 = nn.Linear(inputs or channels, _hidden(channels))
        self.fc2 = nn.Linear(_hidden(channels), channels)

    def squeeze(self, x: Tensor) -> Tensor:
        """Reduce a map (N, C, H, W) to (N, inputs) numbers."""
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention (N, C, 1, 1)."""
        hidden = F.relu(self.fc1(self.squeeze(x)))
        return torch.sigmoid(self.fc2(hidden))[:, :, None, None]


class SpatialPyramid(SqueezeExcitation):
    """SPA (Guo et al. 2020): SE on the means over a 1x1, a 2x2 and a 4x4 grid."""

    grids = (1, 2, 4)

    def __init__(self, channels: int) -> None:
        """Build for C channels, each described by 21 numbers."""
        super().__init__(channels, channels * sum(size * size for size in self.grids))

    def squeeze(self, x: Tensor) -> Tensor:
        """Reduce a map (N, C, H, W) to (N, 21 C) means; the pixels of a map smaller than a grid are repeated."""
        return torch.cat([F.adaptive_avg_pool2d(x, size).flatten(1) for size in self.grids], dim=1)


class ChannelCBAM(SqueezeExcitation):
    """The channel part of CBAM (Woo et al. 2018): one MLP on the mean and on the maximum, summed."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention (N, C, 1, 1)."""
        pooled = torch.stack([x.mean((2, 3)), x.amax((2, 3))])
        return torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))).sum(0))[:, :, None, None]


class EfficientChannel(nn.Module):
    """ECA (Wang et al. 2020): sigmoid of a 1-D convolution over the channels' means."""

    def __init__(self, channels: int) -> None:
        """Build for C channels; the kernel's size is the odd number nearest to |log2(C) / 2 + 1/2|."""
        super().__init__()
        kernel = int(abs(math.log2(channels) / 2 + 0.5)) | 1
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention (N, C, 1, 1)."""
        mean = x.mean((2, 3))[:, None, :]
        return torch.sigmoid(self.conv(mean)).transpose(1, 2)[..., None]


class StyleRecalibration(nn.Module):
    """SRM (Lee et al. 2019): sigmoid(bn(a * mean + b * std)), channel by channel.

    The std is sqrt(population variance + eps), so that it and its gradient stay finite on a 1x1 map.
    """

    def __init__(self, channels: int) -> None:
        """Build for C channels."""
        super().__init__()
        self.cfc = nn.Parameter(torch.empty(channels, 2).normal_(0, 0.5))
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention (N, C, 1, 1)."""
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        style = torch.stack([mean, (variance + 1e-5).sqrt()], dim=-1)
        return torch.sigmoid(self.bn((style * self.cfc).sum(-1)))[:, :, None, None]


class InstanceEnhancement(nn.Module):
    """IE (Liang et al. 2020): sigmoid(weight * mean + bias), channel by channel.

    The weight starts at 0.1 rather than at the paper's 0, with which ASR's psi would receive no gradient.
    """

    def __init__(self, channels: int) -> None:
        """Build for C channels."""
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), 0.1))
        self.bias = nn.Parameter(torch.full((channels,), -1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention (N, C, 1, 1)."""
        return torch.sigmoid(x.mean((2, 3)) * self.weight + self.bias)[:, :, None, None]


class GatherExcite(nn.Module):
    """GE without parameters (Hu et al. 2018b): sigmoid of the mean over the whole map."""

    def __init__(self, channels: int) -> None:
        """Build for C channels (nothing depends on C)."""
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention (N, C, 1, 1)."""
        return torch.sigmoid(x.mean((2, 3), keepdim=True))


class TimmAttention(nn.Module):
    """A timm attention layer whose attention is read at its `.gate`, since the layer itself returns the product."""

    def __init__(self, name: str, channels: int) -> None:
        """Build timm's layer `name` for C channels.

        Raises:
            ValueError: timm has no such layer, or the layer has no `.gate` submodule that gives C numbers.
        """
        super().__init__()
        try:
            import timm.layers
        except ImportError as error:
            raise ValueError(f"module 'timm:{name}' needs timm: pip install 'stripe-observation[hub]'") from error
        try:
            self.layer: nn.Module = timm.layers.create_attn(name, channels)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"timm has no attention layer '{name}' for {channels} channels: {error}") from error
        self.name = name
        with torch.no_grad():
            self.eval()(torch.zeros(1, channels, 2, 3))
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention (N, C, 1, 1) that the layer multiplies x by."""
        seen: list[Tensor] = []
        gate = getattr(self.layer, "gate", None)
        handle = (gate or self).register_forward_hook(lambda module, inputs, output: seen.append(output))
        try:
            self.layer(x)
        finally:
            handle.remove()
        if len(seen) != 1 or seen[0].numel() != x.shape[0] * x.shape[1]:
            shapes = [tuple(output.shape) for output in seen] or "nothing"
            raise ValueError(
                f"timm's '{self.name}' gave {shapes} at `.gate`; expected attention of shape {tuple(x.shape[:2])}"
            )
        return seen[0].reshape(*x.shape[:2], 1, 1)


ATTENTION: dict[str, type[nn.Module]] = {
    "senet": SqueezeExcitation,
    "eca": EfficientChannel,
    "srm": StyleRecalibration,
    "cbam": ChannelCBAM,
    "spa": SpatialPyramid,
    "ie": InstanceEnhancement,
    "ge": GatherExcite,
}


def create_attention(name: str, channels: int) -> nn.Module:
    """Build the attention module `name` (a key of ATTENTION, or "timm:NAME") for C channels.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> import torch
        >>> create_attention("senet", channels=64)(torch.rand(2, 64, 8, 8)).shape
        torch.Size([2, 64, 1, 1])
    """
    if name.startswith("timm:"):
        return TimmAttention(name.removeprefix("timm:"), channels)
    if name not in ATTENTION:
        raise ValueError(f"unknown attention module '{name}'; expected one of {', '.join(ATTENTION)}, timm:NAME")
    return ATTENTION[name](channels)
