"""ASR layers: a plain layer whose output channels are scaled by v = attention(psi), psi a learned vector.

v multiplies the wrapped layer's weight and bias, not its output, which gives the same numbers without another pass over
the feature map.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from stripe.recipe import PSI_INIT
from stripe.torch_internals import BatchNorm, Convolution

DRAWS = 100
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
"""Largest relative difference allowed between a layer in training form and deployed, by data type."""


class ASRLayer(nn.Module):
    """A norm, convolution or linear layer scaled by attention(psi) in training, plain after deployment.

    Keys: `bn.*` for the wrapped layer, `vector` for psi (1, C, 1, 1), `attention_module.*`, and `fused_bn.*` once the
    layer is deployed without delete.
    """

    fused_bn: nn.Module | None
    vector: nn.Parameter

    def __init__(self, bn: nn.Module, attention: nn.Module, psi_init: float | Literal["normal"] = PSI_INIT) -> None:
        """Wrap `bn`, which may itself be an ASRLayer (repeated insertion).

        Args:
            bn: BatchNorm1d/2d/3d, SyncBatchNorm, GroupNorm, LayerNorm over one dimension, Conv or Linear.
            attention: maps (1, C, 1, 1) to C attention values.
            psi_init: the constant psi starts at, or "normal" for standard normal numbers.

        Raises:
            TypeError: the layer's output channels cannot be scaled.
        """
        super().__init__()
        tensors = itertools.chain(plain_layer(bn).parameters(), plain_layer(bn).buffers())
        like = next(tensors, torch.empty(0))
        psi = (
            torch.randn(1, channels_of(bn), 1, 1)
            if psi_init == "normal"
            else torch.full((1, channels_of(bn), 1, 1), psi_init)
        )
        self.bn = bn
        self.vector = nn.Parameter(psi.to(like))
        self.attention_module = attention.to(like)
        self.fused_bn = None
        self.register_load_state_dict_pre_hook(_check_form)  # type: ignore[no-untyped-call]
        self.train(bn.training)

    def train(self, mode: bool = True) -> "ASRLayer":
        """Set the mode; batch norms inside the attention stay frozen, since psi is a batch of one."""
        super().train(mode)
        for module in self.attention_module.modules():
            if isinstance(module, BatchNorm):
                module.eval()
        return self

    def learned_vector(self) -> Tensor:
        """Return v = attention(psi), times the wrapped layer's own v if that is an ASRLayer too; shape (C,).

        It is computed without autocast, so that in mixed precision, too, the vector that is deployed is the one that
        was trained.
        """
        with torch.autocast(self.vector.device.type, enabled=False):
            vector: Tensor = self.attention_module(self.vector).flatten()
        return vector * self.bn.learned_vector() if isinstance(self.bn, ASRLayer) else vector

    def affine(self) -> dict[str, Tensor]:
        """Return the wrapped layer's weight and bias (ones and zeros if it has none) times v along output channels."""
        layer, vector = plain_layer(self), self.learned_vector()
        if layer.weight is None:
            return {"weight": vector, "bias": torch.zeros_like(vector)}
        scaled = {"weight": layer.weight * vector.view(-1, *[1] * (layer.weight.ndim - 1))}
        if layer.bias is not None:
            scaled["bias"] = layer.bias * vector
        return scaled

    def forward(self, x: Tensor) -> Tensor:
        """Return bn(x) * v, shaped as bn(x)."""
        if self.fused_bn is not None:
            return cast(Tensor, self.fused_bn(x))
        return cast(Tensor, functional_call(plain_layer(self), self.affine(), (x,)))

    @property
    def repeats(self) -> int:
        """How many learned vectors scale the wrapped layer."""
        return 1 + (self.bn.repeats if isinstance(self.bn, ASRLayer) else 0)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """Return a plain layer with v in its weight and bias, computed in float64; a norm without affine gains both."""
        plain: nn.Module = copy.deepcopy(plain_layer(self))
        for name, value in copy.deepcopy(self).double().affine().items():
            old = getattr(plain, name)
            like = self.vector if old is None else old
            setattr(plain, name, nn.Parameter(value.to(like.dtype), requires_grad=like.requires_grad))
        for flag in ("affine", "elementwise_affine"):
            if hasattr(plain, flag):
                setattr(plain, flag, True)
        return plain

    @torch.no_grad()
    def check(self, plain: nn.Module) -> float:
        """Return the relative error of `plain` against the training form, in eval mode on random numbers in float64.

        Raises:
            ArithmeticError: the error exceeds TOLERANCE for the layer's data type.
        """
        ours, theirs = copy.deepcopy(self).double().eval(), copy.deepcopy(plain).double().eval()
        ours.fused_bn = None
        x = _probe(plain_layer(self)).to(self.vector.device)
        expected = ours(x)
        error = float(
            (theirs(x) - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        )
        if not error <= TOLERANCE[self.vector.dtype]:
            raise ArithmeticError(
                f"merging {type(plain).__name__} gave relative error {error:.3g}; expected at most "
                f"{TOLERANCE[self.vector.dtype]:g}: check its weights and psi for non-finite numbers"
            )
        return error

    def switch_to_deploy(self, delete: bool = False) -> float:
        """Merge v into a plain layer and run that from now on; return the relative error of merging.

        With `delete` this object becomes the plain layer itself, in class, keys and parameters; nothing of ASR is left.
        """
        plain = self.merged()
        error = self.check(plain)
        plain.train(self.training)
        if delete:
            self.__dict__ = plain.__dict__
            self.__class__ = type(plain)  # type: ignore[assignment]
        else:
            self.fused_bn = plain
        return error

    def switch_to_train(self) -> None:
        """Drop the merged layer and go on training the parts, which deployment left as they were."""
        self.fused_bn = None

    def reparameterize(self) -> None:
        """Become the plain layer; timm's `reparameterize_model` calls this method."""
        self.switch_to_deploy(delete=True)


def _check_form(layer: ASRLayer, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Before weights are loaded, add an error if their form, deployed or training, is not the layer's."""
    errors: list[str] = args[-1]
    if f"{prefix}vector" not in state_dict:
        errors.append(f"{prefix}* are weights of a deployed layer, this one is in training form: deploy it first")
    elif layer.fused_bn is None:  # a merged copy beside the parts is derived from them, so it is not needed
        for key in [key for key in state_dict if key.startswith(f"{prefix}fused_bn.")]:
            del state_dict[key]
    elif not any(key.startswith(f"{prefix}fused_bn.") for key in state_dict):
        errors.append(f"{prefix}* are weights in training form, this layer is deployed: switch_to_train() first")


ASRBatchNorm2d = ASRLayer
"""The paper's case: ASRBatchNorm2d(bn, attention, psi_init=0.1)."""


def wrap(
    bn: nn.Module,
    build: Callable[[], nn.Module],
    psi_init: float | Literal["normal"] = PSI_INIT,
    repeats: int = 1,
) -> ASRLayer:
    """Wrap `bn` in `repeats` ASRLayers, each with an attention module that `build` redraws until psi gets a gradient.

    The ReLUs of a small module can all be off at the initial psi (in a quarter of the draws with two hidden units);
    psi could then never learn.

    Raises:
        ValueError: psi got no finite gradient from any of DRAWS modules.
    """
    inner = bn if repeats == 1 else wrap(bn, build, psi_init, repeats - 1)
    for _ in range(DRAWS):
        with torch.inference_mode(False), torch.enable_grad():
            layer = ASRLayer(inner, build(), psi_init)
            (gradient,) = torch.autograd.grad(layer.learned_vector().sum(), layer.vector)
        if gradient.isfinite().all() and gradient.any():
            return layer
    raise ValueError(f"psi gets no finite gradient from {type(layer.attention_module).__name__}: take another module")


def asr_layers(model: nn.Module) -> Iterator[tuple[str, ASRLayer]]:
    """Yield the path and the layer of every outermost ASRLayer of `model`."""
    inside: str | None = None
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, ASRLayer):
            inside = f"{name}." if name else ""
            yield name, module


def plain_layer(layer: nn.Module) -> Any:
    """Return the layer that (possibly repeated) ASRLayers wrap, or the layer itself."""
    while isinstance(layer, ASRLayer):
        layer = layer.bn
    return layer


def channels_of(layer: nn.Module) -> int:
    """Return how many output channels `layer` scales.

    Raises:
        TypeError: it is not a norm, convolution or linear layer, or it is a layer norm over several dimensions.
    """
    layer = plain_layer(layer)
    if isinstance(layer, BatchNorm):
        return layer.num_features
    if isinstance(layer, nn.GroupNorm):
        return layer.num_channels
    if isinstance(layer, nn.LayerNorm) and len(layer.normalized_shape) == 1:
        return layer.normalized_shape[0]
    if isinstance(layer, Convolution) and not layer.transposed:
        return layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.out_features
    raise TypeError(
        f"{type(layer).__name__} cannot carry a vector; "
        "expected a batch, group or one-dimensional layer norm, a convolution or a linear layer"
    )


def _probe(layer: nn.Module) -> Tensor:
    """Return a random float64 input for `layer`, two samples of the smallest useful size."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, Convolution):
        extent = [d * (k - 1) + 1 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        shape = [2, layer.in_channels, *extent]
    elif isinstance(layer, nn.Linear):
        shape = [2, layer.in_features]
    elif isinstance(layer, nn.LayerNorm):  # C at both ends, since a subclass may take channels first
        shape = [2, layer.normalized_shape[0], 1, layer.normalized_shape[0]]
    else:
        spatial = 0 if isinstance(layer, nn.BatchNorm1d) else 3 if isinstance(layer, nn.BatchNorm3d) else 2
        shape = [2, channels_of(layer), *[2] * spatial]
    return torch.randn(shape, generator=generator, dtype=torch.float64)
