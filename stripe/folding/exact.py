"""fold: replace a trained network's gates by constants, and merge these into its weights wherever that is exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from stripe.devices import device_of
from stripe.folding.building import ChannelScale, Original
from stripe.folding.fields import Weights
from stripe.folding.maps import Constants, is_mix, norm_maps, require_fitting
from stripe.folding.merging import Merge, Network
from stripe.folding.report import FoldReport, report_of, table_of
from stripe.folding.tensors import doubled, in_double, named_tensors, weights_of
from stripe.gate import Gate, name_of
from stripe.gates.finding import find_gates
from stripe.gates.hooks import copied, uncompiled
from stripe.gates.kinds import require_foldable
from stripe.gates.reading import replace_gates
from stripe.gates.trace import Images, tensors_in, trace
from stripe.torch_internals import BatchNorm, Convolution, tree_map


def fold(
    model: nn.Module,
    constants: Mapping[Any, Tensor | np.ndarray[Any, Any]],
    images: Images,
    *,
    normalisers: Collection[str] = (),
) -> tuple[nn.Module, FoldReport]:
    """Replace the gates in `constants` by its vectors (C,), and merge these into the network's weights.

    The keys of `constants` are gates or their names. A value of shape (2, C) holds the constant and a shift: where the
    gate multiplies a map x, the new network computes x * value[0] + value[1]. One of shape (C, C + 1) holds a matrix
    and a shift: at every position the network computes value[:, :-1] @ x + value[:, -1]. `images` and `normalisers` are
    as `find_gates` takes them. Returns a new network, in eval mode, and the report. A gate without an exact merge
    becomes a ChannelScale or, for a matrix, a ChannelMix. In train mode the network otherwise does what it did before,
    except where a matrix was merged back through a batch norm: the norm's running statistics no longer match its input.

    Raises:
        ValueError: no gates, an unknown gate, a vector that does not fit or is not finite, a gate that cannot be
            taken out of the module that applies it, an output that holds no tensor, a network whose output
            differs between two runs, or one that is scripted, quantised to int8, sharded by FSDP or on the meta device.
        ArithmeticError: the folded network differs from the original at constants, even with nothing merged.
    """
    model = uncompiled(model)
    require_foldable(model)
    exact, images = copied(model).double().eval(), tree_map(doubled, images)
    with torch.no_grad(), in_double():
        found = find_gates(exact, images, normalisers=normalisers)
        original, constant, weights = _at_constants(exact, found, constants, images)
        plan = Network(original.graph, weights, constant.needed, constant.scaling).plan(list(constant.maps(weights)))
        folded, merges, error = original.merged(plan)
    cast_like(folded, model)
    return folded, report_of(merges, found, error)


def scaled_copy(
    model: nn.Module,
    constants: Mapping[Any, Tensor | np.ndarray[Any, Any]],
    images: Images,
    normalisers: Collection[str] = (),
) -> tuple[nn.Module, dict[str, ChannelScale]]:
    """Return a copy with a ChannelScale in place of each gate in `constants`, and these modules by the gates' names.

    Nothing is merged, so that the scales can be trained, or differ from sample to sample. A gate that the output does
    not need is left out. Raises what `fold` raises.
    """
    model = uncompiled(model)
    exact, images = copied(model).double().eval(), tree_map(doubled, images)
    with torch.no_grad(), in_double():
        original, constant, _ = _at_constants(
            exact, find_gates(exact, images, normalisers=normalisers), constants, images
        )
        plan = [Merge(map, "kept" if map.ops & constant.needed else "unused") for map in constant.alone()]
        scaled, merges, _ = original.merged(plan)
    cast_like(scaled, model)
    wanted = {name for merge in merges if merge.direction == "kept" for name in merge.map.names}
    scales = [each for each in scaled.modules() if isinstance(each, ChannelScale)]
    return scaled, {name: each for each in scales for name in each.gates if name in wanted}


def _at_constants(
    exact: nn.Module, found: Sequence[Gate], constants: Mapping[Any, Tensor | np.ndarray[Any, Any]], images: Images
) -> tuple[Original, Constants, Weights]:
    """Return a float64 network with some gates at constants, those gates in its graph, and the network's weights."""
    vectors = _checked(found, constants, tensors_in(images)[0])
    gates = [gate for gate in found if gate.name in vectors]
    graph, weights = trace(exact, images), weights_of(exact)
    constant = Constants(graph, gates, {name: vector.cpu().numpy() for name, vector in vectors.items()})
    values, shifts, mixes = dict[str, Tensor](), dict[str, Tensor](), dict[str, Tensor]()
    for gate in gates:
        name, vector = gate.name, vectors[gate.name]
        if is_mix(gate, vector.shape):
            values[name], mixes[name], shifts[name] = torch.ones_like(vector[:, 0]), vector[:, :-1], vector[:, -1]
        elif vector.ndim == 2:
            values[name], shifts[name] = vector
        else:
            values[name] = vector
    return Original(exact, graph, images, replace_gates(exact, gates, values, shifts, mixes)), constant, weights


def fuse_norms(model: nn.Module, images: Images | None = None) -> tuple[nn.Module, FoldReport]:
    """Merge each batch norm into the layers before it, or after it, where that is exact; for inference.

    `images` is a small batch as the network takes it; without it, batches that the first layer could take are tried.
    What is exact is decided on the path that these images take. Returns a new network, in eval mode, in which merged
    norms are nn.Identity, and the report: its column "norm" names all norms; those that stay are "kept", with a reason.

    Raises:
        ValueError: no `images` were given and the network takes none of the batches tried, the output holds no tensor,
            or it differs between two runs.
        ArithmeticError: the new network differs from the original, even with nothing merged.
    """
    model = uncompiled(model)
    require_foldable(model)
    exact = copied(model).double().eval()
    with torch.no_grad(), in_double():
        images = example_for(exact) if images is None else tree_map(doubled, images)
        graph, weights = trace(exact, images), weights_of(exact)
        maps, left = norm_maps(graph, weights)
        needed = Constants(graph, [], {}).needed
        plan = Network(graph, weights, needed, {}).plan(maps)
        fused, merges, error = Original(exact, graph, images, nullcontext()).merged(plan)
    cast_like(fused, model)
    ran = {call.path for call in graph.calls}
    norms = [path for path, module in exact.named_modules() if isinstance(module, BatchNorm) and path not in ran]
    left |= dict.fromkeys(norms, "the forward does not run it in eval mode")
    kept = [(name, "kept", (), (), reason, 1.0) for name, reason in left.items()]
    table = table_of(merges, "norm")
    return fused, FoldReport(pd.DataFrame([*table.itertuples(index=False), *kept], columns=table.columns), error)


def example_for(model: nn.Module) -> Tensor:
    """Return a batch of two images that a float64 network takes, of the first shape that passes.

    Raises:
        ValueError: no shape passes.
    """
    device = device_of(model)
    for shape in _shapes(model):
        images = torch.randn(2, *shape, device=device)
        try:
            model(images)
        except Exception:  # the network's own forward may raise anything
            continue
        return images
    raise ValueError(f"no batch that was tried passes through {type(model).__name__}: give one as `images`")


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield shapes that a sample could have: the one that timm notes, then those that fit the first layer."""
    noted = getattr(model, "pretrained_cfg", None)
    if isinstance(noted, Mapping) and "input_size" in noted:
        yield tuple(noted["input_size"])
    for layer in model.modules():
        if isinstance(layer, Convolution):
            dimensions = len(layer.kernel_size)
            for size in (64, 32, 224, 28, 299):
                yield layer.in_channels, *[size] * dimensions
            return
        if isinstance(layer, nn.Linear):
            yield (layer.in_features,)
            return


def _checked(
    gates: Sequence[Gate], constants: Mapping[Any, Tensor | np.ndarray[Any, Any]], like: Tensor
) -> dict[str, Tensor]:
    """Check the constants, and return them on the device and of the type of `like`."""
    if not gates:
        raise ValueError("the network has no gates to fold: see stripe.gates.explain_gates for what was looked at")
    tensors = {
        name_of(gate): given if isinstance(given, Tensor) else torch.tensor(np.array(given))  # it may be read-only
        for gate, given in constants.items()
    }
    vectors = {name: given.detach() for name, given in tensors.items()}
    require_fitting(gates, {name: vector.double().cpu().numpy() for name, vector in vectors.items()}, mixing=True)
    return {name: vector.to(like) for name, vector in vectors.items()}


def cast_like(new: nn.Module, model: nn.Module) -> None:
    """Cast tensors to the original's types; a new one gets its layer's type, or the most common one of the weights."""
    types = {name: tensor.dtype for name, tensor in named_tensors(model).items()}
    usual = Counter(kind for kind in types.values() if kind.is_floating_point).most_common(1)
    for name, tensor in named_tensors(new).items():
        beside = types.get(f"{name.rpartition('.')[0]}.weight", usual[0][0] if usual else torch.get_default_dtype())
        tensor.data = tensor.data.to(types.get(name, beside if tensor.is_floating_point() else tensor.dtype))
