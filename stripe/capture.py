"""A training step as one CUDA graph: forward, backward and update are replayed with a single launch.

Launching the thousands of kernels of a ResNet-164's step takes the CPU longer than running them takes the GPU, and most
kernels are so small that their number determines the time. So weights are cast to autocast's precision all at once, and
compiled parts merge small kernels. This module knows nothing of recipes: it captures an objective and its optimizer.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stripe.messages import one_line
from stripe.torch_internals import at_most_graphs, copy_all, uncompile

MOST_GRAPHS = 64  # graphs compiled of one block's forward, at most: a few for each network trained in this process
WARM_UP = 3  # steps before the capture, in which kernels are compiled and workspaces are allocated
FUSED = {"combo_kernels": True}  # options of torch.compile: independent kernels are merged into one
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # not their subclasses, which may use weights differently


class CapturedStep:
    """One training step at a given learning rate, replayed for every batch of the same size as the first.

    Batches of other sizes (the last of an epoch) take the same step uncaptured and uncompiled, and so do all batches
    where the network cannot be captured, for instance because it reads its values on the CPU. With `compile`, the
    network's repeated blocks are compiled while the step is captured and are plain again afterwards, so evaluation,
    recording and saving see the network as it is. cuDNN tries its algorithms for each convolution and keeps the best.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        compile: bool = False,
        precision: torch.dtype | None = None,
    ) -> None:
        """Prepare for `objective(images, labels)` -> scores (3,), the first of which is the summed loss.

        `precision` is that of the autocast within the objective, None if it has no autocast.
        """
        self._objective, self._optimizer, self._compile = objective, optimizer, compile
        self._casts = Casts(objective, precision)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._shape: torch.Size | None = None  # of the batches for which the step is captured

    def __call__(self, images: Tensor, labels: Tensor, rate: float) -> Tensor:
        """Take a step with images (n, ...) and labels (n,) on the device; return the batch's scores (3,)."""
        if self._shape is None:
            self._shape = images.shape
            self._try_to_capture(images, labels)
        if self._graph is None or images.shape != self._shape:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            return self._step(images, labels)
        self._images.copy_(images, non_blocking=True)
        self._labels.copy_(labels, non_blocking=True)
        self._rate.fill_(rate)
        self._graph.replay()
        return self._scores.clone()

    def _try_to_capture(self, images: Tensor, labels: Tensor) -> None:
        try:
            with _tried_algorithms():
                self._capture(images, labels)
        except RuntimeError as error:
            self._graph = None
            torch.cuda.synchronize(images.device)
            warnings.warn(
                "this network's training step cannot be captured as a CUDA graph, so it is trained without one, more "
                f"slowly: {one_line(error)}",
                stacklevel=4,
            )

    def _step(self, images: Tensor, labels: Tensor, casts: Casts | None = None) -> Tensor:
        self._optimizer.zero_grad()
        if casts:
            casts.refresh()
        scores: Tensor = self._objective(images, labels)
        (scores[0] / len(labels)).backward()
        if casts:
            casts.return_gradients()
        self._optimizer.step()
        return scores.detach()

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        """Capture a step for batches of this shape; weights, buffers and momentum end as they were."""
        self._images, self._labels = images.clone(), labels.clone()
        self._rate = torch.zeros((), device=images.device)  # a plain number would be frozen into the graph
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        regions = _regions(self._objective) if self._compile else []
        with self._kept(), self._casts.in_place(), _compiled(regions):
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._step(self._images, self._labels, self._casts)
            torch.cuda.current_stream().wait_stream(aside)
            self._optimizer.zero_grad()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._scores = self._step(self._images, self._labels, self._casts)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Restore weights, buffers and momentum, in place, after the block."""
        for group in self._optimizer.param_groups:
            for weight in group["params"]:  # else the first step would make the momentum, too late to restore it
                self._optimizer.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
        momenta = [state["momentum_buffer"] for state in self._optimizer.state.values()]
        tensors = [*self._objective.parameters(), *self._objective.buffers(), *momenta]
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)


class Casts:
    """Weights of convolutions and linear layers in autocast's precision, all cast together before a step.

    Autocast itself would cast each weight, and each gradient back, with a separate kernel; the values are the same.
    Weights that a layer computes, such as normalised ones, are left to autocast.
    """

    def __init__(self, module: nn.Module, precision: torch.dtype | None) -> None:
        """Prepare for the layers of a module; without a precision there is nothing to cast."""
        layers = [layer for layer in module.modules() if precision and type(layer) in LAYERS]
        self._places = [
            (layer, name, weight)
            for layer in layers
            for name, weight in layer.named_parameters(recurse=False)
            if name in ("weight", "bias") and weight.dtype == torch.float32
        ]
        weights = {weight for *_, weight in self._places}
        self._casts = {weight: nn.Parameter(weight.to(precision), weight.requires_grad) for weight in weights}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the casts into the layers in place of their weights within the block."""
        try:
            for layer, name, weight in self._places:
                setattr(layer, name, self._casts[weight])
            yield
        finally:
            for layer, name, weight in self._places:
                setattr(layer, name, weight)

    def refresh(self) -> None:
        """Copy the weights into their casts, and clear the casts' gradients."""
        for cast in self._casts.values():
            cast.grad = None
        copy_all(self._casts.values(), self._casts.keys())

    def return_gradients(self) -> None:
        """Copy the casts' gradients back to the weights."""
        wide: list[Tensor] = []
        narrow: list[Tensor] = []
        for weight, cast in self._casts.items():
            if cast.grad is not None:  # some weights may have no part in the loss
                weight.grad = torch.empty_like(weight)
                wide.append(weight.grad)
                narrow.append(cast.grad)
        copy_all(wide, narrow)


@contextmanager
def _tried_algorithms() -> Iterator[None]:
    """Let cuDNN try the algorithms for each convolution within the block, and keep the fastest."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _regions(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules of each repeated kind, which share compiled code; without any, the whole module."""
    kinds = Counter(type(each) for each in module.modules())

    def search(within: nn.Module) -> Iterator[nn.Module]:
        for child in within.children():
            container = isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict)
            if kinds[type(child)] > 1 and not container and any(child.children()):
                yield child
            else:
                yield from search(child)

    return [*search(module)] or [module]


@contextmanager
def _compiled(regions: list[nn.Module]) -> Iterator[None]:
    """Compile modules within the block only, each for the shapes that it meets."""
    if not regions:
        yield
        return
    for region in regions:
        region.compile(dynamic=False, options=FUSED)
    try:
        with at_most_graphs(MOST_GRAPHS):
            yield
    finally:
        for region in regions:
            uncompile(region)
