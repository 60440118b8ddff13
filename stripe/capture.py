"""A training step as one CUDA graph: forward, backward and update are replayed without a launch of their own each.

Launching the three thousand kernels of a ResNet-164's step takes the processor longer than computing them takes the
card. Knows torch alone: what is captured is an objective and its optimizer.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from stripe.messages import one_line
from stripe.torch_internals import at_most_graphs, uncompile

MOST_GRAPHS = 64  # that may be compiled of one block's forward: a few for each network trained in this process
WARM_UP = 3  # steps before the capture: kernels are compiled and workspaces made in them


class CapturedStep:
    """One step of training at a learning rate, replayed for batches of the size of the first one.

    Batches of other sizes (the last of an epoch) take the same step uncaptured and uncompiled, and so do all where the
    network cannot be captured, for instance because it looks at its values on the processor. With `compile` the
    network's repeated blocks are compiled while the step is captured and plain again afterwards, so evaluation,
    recording and saving meet the network as it is.
    """

    def __init__(self, objective: nn.Module, optimizer: torch.optim.Optimizer, *, compile: bool = False) -> None:
        """Prepare for `objective(images, labels)` -> scores (3,), whose first is the summed loss."""
        self._objective, self._optimizer, self._compile = objective, optimizer, compile
        self._graph: torch.cuda.CUDAGraph | None = None
        self._shape: torch.Size | None = None  # of the batches that are to be captured

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
            self._capture(images, labels)
        except RuntimeError as error:
            self._graph = None
            torch.cuda.synchronize(images.device)
            warnings.warn(
                "this network's training step cannot be captured as a CUDA graph, so it is trained without one, more "
                f"slowly: {one_line(error)}",
                stacklevel=4,
            )

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        self._optimizer.zero_grad()
        scores: Tensor = self._objective(images, labels)
        (scores[0] / len(labels)).backward()
        self._optimizer.step()
        return scores.detach()

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        """Capture a step on batches like these; weights and optimizer are as before afterwards."""
        self._images, self._labels = images.clone(), labels.clone()
        self._rate = torch.zeros((), device=images.device)  # a number would be captured with the step
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        regions = _regions(self._objective) if self._compile else []
        with self._kept(), _compiled(regions):
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    self._step(self._images, self._labels)
            torch.cuda.current_stream().wait_stream(aside)
            self._optimizer.zero_grad()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._scores = self._step(self._images, self._labels)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Restore weights, buffers and momentum, in place, after the block."""
        for group in self._optimizer.param_groups:
            for weight in group["params"]:  # a first step makes them otherwise, which the graph would repeat
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


def _regions(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules of a kind that occurs repeatedly: they share what is compiled; else the whole."""
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
    """Compile modules for the block alone, each for the shapes that it meets."""
    if not regions:
        yield
        return
    for region in regions:
        region.compile(dynamic=False)
    try:
        with at_most_graphs(MOST_GRAPHS):
            yield
    finally:
        for region in regions:
            uncompile(region)
