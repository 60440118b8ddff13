"""anneal: attention that turns into its own running mean while its network is trained, and then folds exactly."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stripe.gate import Gate
from stripe.gates import find_gates
from stripe.gates.hooks import copied
from stripe.gates.layouts import flat, like_output
from stripe.gates.trace import Images

MOMENTUM = 0.01  # of the running mean: about 100 steps, a few epochs of a small data set; a batch norm's spans 10


class AnnealedAttention(nn.Module):
    """A gate's attention, blended step by step into its running mean over images.

    Up to training step `begin` the attention is unchanged, from `end` on it is the running mean at `end` for every
    image, and in between the blend moves linearly from one to the other. A step is a forward pass in train mode; steps
    are counted in a buffer, so that training resumed from a checkpoint continues where it stopped. In bfloat16 the
    blend has the resolution of that type, about 1/256, and is exact at both ends.

    Attributes:
        attention: the module that computes the attention.
        gate: the gate that the attention belongs to.
        running_mean: the attention's running mean over images, (C,).
        steps: training steps so far.
    """

    running_mean: Tensor
    steps: Tensor

    def __init__(self, attention: nn.Module, gate: Gate, begin: int, end: int, momentum: float = MOMENTUM) -> None:
        """Wrap the module whose output is the gate's attention."""
        super().__init__()
        self.attention, self.gate = attention, gate
        self.begin, self.end, self.momentum = begin, end, momentum
        like = next((p for p in attention.parameters() if p.is_floating_point()), torch.empty(0))
        self.register_buffer("running_mean", torch.zeros(gate.channels, device=like.device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=like.device))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the attention for the given arguments, blended into the running mean as far as the step requires."""
        values: Tensor = self.attention(*args, **kwargs)
        if self.training:
            self.steps += 1
            self._follow(flat(self.gate, values.detach()).float().mean(0))
        constant = like_output(self.gate, self.running_mean, values)
        return torch.lerp(values, constant, self.blend.to(values.dtype))

    @property
    def blend(self) -> Tensor:
        """Weight of the running mean in the output, from 0 to 1."""
        return ((self.steps - self.begin) / (self.end - self.begin)).clamp(0, 1)

    def _follow(self, mean: Tensor) -> None:
        """Move the running mean towards a batch's mean: a plain average at first, exponential later, fixed at `end`."""
        weight = (1 / self.steps).clamp_min(self.momentum) * (self.steps < self.end)
        self.running_mean.lerp_(mean, weight)

    def extra_repr(self) -> str:
        """Say when the attention turns into its mean."""
        return f"begin={self.begin}, end={self.end}, momentum={self.momentum}"


def anneal(
    model: nn.Module,
    images: Images,
    *,
    begin: int,
    end: int,
    gates: Sequence[Gate] | None = None,
    momentum: float = MOMENTUM,
    inplace: bool = False,
) -> nn.Module:
    """Let the attention of a network turn into a constant while the network is trained, by any training loop.

    Between the training steps `begin` and `end` each gate's attention is blended into its running mean. From `end` on
    it is the same for every image, so that `stripe.fold(model, annealed(model), images)` loses nothing.

    Args:
        model: a network with gates.
        images: a small batch as the network takes it.
        begin: training steps (batches) after which the blending begins.
        end: training steps after which the attention is the same for every image; later steps adapt the rest of the
            network to the constants.
        gates: some of the network's gates (default: all that `find_gates` finds).
        momentum: how fast the running mean follows, per step.
        inplace: convert `model` itself.

    Returns:
        The network, each gate's attention wrapped as an `AnnealedAttention`.

    Raises:
        ValueError: `begin` is not before `end`, there are no gates, or a gate's attention is not a tensor that a
            module returns for that gate's product alone.

    Example:
        >>> import torch, stripe
        >>> model = stripe.models.create_model("resnet", depth=11, module="senet")
        >>> images = torch.randn(4, 3, 32, 32)
        >>> annealed_model = stripe.asr.anneal(model, images, begin=10, end=20)
        >>> for _ in range(20):
        ...     _ = annealed_model.train()(images)
        >>> constants = stripe.asr.annealed(annealed_model)
        >>> folded, report = stripe.fold(annealed_model.eval(), constants, images)
        >>> stripe.find_gates(folded, images)
        no gates
    """
    if not 0 <= begin < end:
        raise ValueError(f"begin={begin}, end={end}: expected 0 <= begin < end, in training steps")
    model = model if inplace else copied(model)
    gates = find_gates(model, images) if gates is None else gates
    if not gates:
        raise ValueError("the network has no gates to anneal; stripe.gates.explain_gates says why not")
    for gate in gates:
        if fault := _fault(gate, gates):
            raise ValueError(f"gate {gate.name!r} cannot be annealed: {fault}; leave it out of `gates`")
    for gate in gates:
        attention = model.get_submodule(str(gate.source))
        model.set_submodule(str(gate.source), AnnealedAttention(attention, gate, begin, end, momentum))
    return model


def _fault(gate: Gate, gates: Sequence[Gate]) -> str:
    """Return why this gate's attention cannot be wrapped, or an empty string if it can."""
    tap = gate.attention
    if gate.source is None or tap is None:
        return "no module returns its attention"
    if not gate.exclusive:
        return f"what the module '{gate.source}' returns is used elsewhere too, not in the gate's product alone"
    if tap.call or sum(other.source == gate.source for other in gates) > 1:
        return f"the module '{gate.source}' is called several times"
    return "the module returns more than its attention" if tap.position else ""


def annealed(model: nn.Module) -> dict[str, Tensor]:
    """Return the running mean (C,) of each annealed gate by name, for `stripe.fold`; empty without such gates.

    Raises:
        ValueError: a gate still depends on the image, since training has not reached the step `end`.
    """
    found = {}
    for module in model.modules():
        if isinstance(module, AnnealedAttention):
            if module.steps < module.end:
                steps = f"{int(module.steps)} training steps, and is to be constant after {module.end}"
                raise ValueError(f"gate {module.gate.name!r} has seen {steps}: train on, or anneal with an earlier end")
            found[module.gate.name] = module.running_mean.clone()
    return found
