"""The three ways to learn a constant for each gate: in the same network, beside its gates, or in a separate network.

`asr.validation` compares what is learned with the stripe. In the same network, that is the gate's value itself. In the
other two cases the network defines only the merged scale |gamma| v of the layer that ASR wraps, since gamma and v can
be changed together without changing any output. The overall size of that scale says nothing about the stripe, because
gamma and a gate have no common unit. So scale and stripe are compared up to one factor, common to all channels, and so
are the random vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from stripe import stats
from stripe.asr.layers import ASRLayer, asr_layers, plain_layer
from stripe.asr.psi import NEAREST, Psi, best_fit, random_psis, values, vectors_of
from stripe.asr.task import Array, Fit, Task, Vectors
from stripe.gate import Gate
from stripe.gates import isolate, read_gates, replace_gates
from stripe.gates.hooks import copied, modules_by_path
from stripe.stats.verdicts import aligned, energy_distance, shuffled_misalignments
from stripe.training import UNKNOWN_LABEL, logits_of

PSI_RATE = 0.05  # Adam's learning rate for psi
ATTENTION_RATE = 1e-3  # and for the attention's weights, if they are trained too
GRID = 4  # channels are matched on their maps, averaged over GRID fields along each dimension of space

# ---- same ------------------------------------------------------------------------------------------------


def same(task: Task) -> Fit:
    """Freeze the network, give each gate attention(psi) for every image, and train psi on the task's loss."""
    network = copied(task.model) if task.train_attention else task.model
    attentions, left_out = isolate(network, task.gates, task.probe)
    psis = {name: Psi(attention, task.start(attention.gate)) for name, attention in attentions.items()}
    untrained, starts = values(psis), {name: psi.vector.detach().clone() for name, psi in psis.items()}
    for gate in task.gates:
        if gate.name in psis and not gate.exclusive:
            left_out[gate.name] = "no gradient reaches it, since its attention is used elsewhere too"
    trained = {name: psi for name, psi in psis.items() if name not in left_out}
    if trained:
        _train(task, network, trained)
    random: Vectors = {}
    best: Vectors = {}
    for name, psi in psis.items():
        random[name], best[name] = _controls(task, name, psi, starts[name])
    return Fit(values(trained), random, untrained, best, left_out=left_out)


def _train(task: Task, network: nn.Module, psis: Mapping[str, Psi]) -> None:
    """Train psi, and the attention's weights if the task says so."""
    weights = _attention_weights(psis) if task.train_attention else []
    groups = {"params": [psi.vector for psi in psis.values()], "lr": PSI_RATE}
    optimizer = torch.optim.Adam([groups, {"params": weights, "lr": ATTENTION_RATE}])
    for images, labels in task.batches():
        vectors = {name: psi.learned_vector() for name, psi in psis.items()}
        with replace_gates(network, task.gates, vectors), task.precision:
            logits = logits_of(network(images))
        loss = F.cross_entropy(logits.float(), labels, ignore_index=UNKNOWN_LABEL)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _controls(task: Task, gate: str, psi: Psi, start: Tensor) -> tuple[Array, Array]:
    """Return the distances (draws,) of the vectors of random psi from a gate's stripe, and the best vector of any."""
    stripe, use = task.stripes[gate], task.uses[gate]
    draws = random_psis(task.squeezes[gate])
    distances = energy_distance(vectors_of(psi.attention_module, draws), stripe, use.energy, use.result)
    nearest = draws[np.argsort(distances)[:NEAREST].copy()]
    return distances, best_fit(psi, stripe, use, torch.cat([psi.vector.detach()[None], start[None], nearest]))


def _attention_weights(psis: Mapping[str, Psi]) -> list[nn.Parameter]:
    """Make the weights that attention(psi) depends on trainable, and return them."""
    weights = list({id(p): p for psi in psis.values() for p in psi.attention_module.parameters()}.values())
    for weight in weights:
        weight.requires_grad_()
    total = torch.stack([psi.learned_vector().sum() for psi in psis.values()]).sum()
    gradients = torch.autograd.grad(total, weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is not None)
    return [weight for weight in weights if weight.requires_grad]


# ---- both ------------------------------------------------------------------------------------------------


def both(task: Task) -> Fit:
    """Take the merged scale of the ASR layer before each gate of the same network, aligned with the gate's stripe.

    The energies depend on the scale, which has shaped the map, so it is the stripe that is shuffled.
    """
    learned: Vectors = {}
    random: Vectors = {}
    for gate, layer in _asr_before(task).items():
        scale, stripe, energy = merged_scale(layer), task.stripes[gate], task.uses[gate].energy
        learned[gate] = aligned(scale, stripe, energy)
        random[gate] = _share(task, gate) * shuffled_misalignments(stripe, scale, energy)
    return Fit(learned, random)


@torch.no_grad()
def merged_scale(layer: nn.Module) -> Array:
    """Return |gamma| v of an ASR layer or |gamma| of a plain one, (C,); gamma is a norm's weight or a filter's norm."""
    plain = plain_layer(layer)
    scale = layer.learned_vector() if isinstance(layer, ASRLayer) else torch.ones(1)
    if plain.weight is not None:
        scale = scale * plain.weight.double().flatten(1).norm(dim=1) if plain.weight.ndim > 1 else scale * plain.weight
    found: Array = scale.double().abs().cpu().numpy()
    return found


def _share(task: Task, gate: str) -> float:
    """Return the stripe's own share of the result's energy, by which a misalignment becomes a distance."""
    use = task.uses[gate]
    return float(np.square(task.stripes[gate]) @ use.energy / use.result.sum()) if use.result.sum() > 0 else 0.0


@torch.no_grad()
def _asr_before(task: Task) -> dict[str, ASRLayer]:
    """Return, by gate, the last ASR layer with as many channels that runs between the previous gate and this one."""
    layers, modules = dict(asr_layers(task.asr_model)), modules_by_path(task.model)
    if lost := [path for path in layers if path not in modules]:
        raise ValueError(
            f"the network has no {lost[0]}: the ASR network must be built as the one that the run recorded"
        )
    found: dict[str, ASRLayer] = {}
    passed: list[str] = []

    def meet(gate: Gate, kind: str, values: Tensor) -> None:
        fitting = [layers[path] for path in passed if layers[path].vector.numel() == gate.channels]
        if fitting:
            found[gate.name] = fitting[-1]
        passed.clear()

    with ExitStack() as hooks:
        for path in layers:
            handle = modules[path].register_forward_pre_hook(lambda module, args, path=path: passed.append(path))
            hooks.callback(handle.remove)
        hooks.enter_context(read_gates(task.model, task.gates, meet))
        task.model(task.probe)
    for gate in task.gates:
        if gate.name not in found:
            raise ValueError(
                f"gate '{gate.name}' has no ASR layer of {gate.channels} channels before it: expected one before each "
                "gate, in training form (deploying with delete drops the vectors)"
            )
    return found


# ---- separate --------------------------------------------------------------------------------------------


def separate(task: Task) -> Fit:
    """Take the merged scales of another network, whose channels are matched by how their maps correlate.

    The scales are compared with |gamma| times the stripe; the returned vectors are divided by the gated network's
    |gamma|, so that they are in the gate's units. The energies depend on the gated network, so it is the other
    network's scales that are shuffled.
    """
    learned: Vectors = {}
    random: Vectors = {}
    notes = {}
    layers, modules, gates = _asr_before(task), modules_by_path(task.model), {gate.name: gate for gate in task.gates}
    for gate, correlations in _map_correlations(task, layers).items():
        rows, matched = linear_sum_assignment(correlations, maximize=True)
        stripe, energy, own = task.stripes[gate], task.uses[gate].energy, _scale_before(gates[gate], modules)
        used = own > 0
        energy = np.divide(energy, own**2, out=np.zeros_like(energy), where=used)
        scale = merged_scale(layers[gate])[matched]
        merged = aligned(scale, own * stripe, energy)
        learned[gate] = np.divide(merged, own, out=stripe.copy(), where=used)
        random[gate] = _share(task, gate) * shuffled_misalignments(scale, own * stripe, energy)
        notes[gate] = {
            "map_r": float(correlations[rows, matched].mean()),
            "wasserstein": stats.wasserstein(merged, own * stripe),
            "p_wasserstein": stats.swap_test(merged, own * stripe),
        }
    return Fit(learned, random, notes=notes)


def _scale_before(gate: Gate, modules: Mapping[str, nn.Module]) -> Array:
    """Return the merged scale of the layer that made what the gate scales; ones if no such layer is known."""
    layer = modules.get(gate.before or "")
    weight = None if layer is None else getattr(plain_layer(layer), "weight", None)
    fits = isinstance(weight, Tensor) and len(weight) == gate.channels
    return merged_scale(layer) if layer is not None and fits else np.ones(gate.channels)


@torch.no_grad()
def _map_correlations(task: Task, layers: Mapping[str, ASRLayer]) -> Vectors:
    """Correlate what each gate scales (rows) with its ASR layer's map (columns) over images and fields: (C, C)."""
    ours: Vectors = {}
    theirs: Vectors = {}
    sums = {gate.name: np.zeros((1 + 2 * gate.channels,) * 2) for gate in task.gates}

    def note(gate: Gate, kind: str, values: Tensor) -> None:
        if kind == "map":
            ours[gate.name] = _fields(values)

    def note_output(gate: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        theirs[gate] = _fields(output)

    with ExitStack() as hooks:
        for gate, layer in layers.items():
            hooks.callback(layer.register_forward_hook(partial(note_output, gate)).remove)
        hooks.enter_context(read_gates(task.model, task.gates, note, maps=True))
        for images, _ in task.batches():
            task.model(images), task.asr_model(images)
            for name, products in sums.items():
                rows = np.hstack([np.ones((len(ours[name]), 1)), ours[name], theirs[name]])
                products += rows.T @ rows
    return {name: _correlations(products) for name, products in sums.items()}


def _fields(maps: Tensor) -> Array:
    """Average (N, C, *space) over GRID fields along each dimension of space: (N * fields, C)."""
    pool: Any = {3: F.adaptive_avg_pool1d, 4: F.adaptive_avg_pool2d, 5: F.adaptive_avg_pool3d}[maps.ndim]
    means: Array = pool(maps, GRID).flatten(2).transpose(1, 2).flatten(0, 1).double().cpu().numpy()
    return means


def _correlations(products: Array) -> Array:
    """Return (C, C) correlations from the summed products (1 + 2C, 1 + 2C) of [1, ours, theirs]; 0 where constant."""
    mean = products[0, 1:] / products[0, 0]
    covariance = products[1:, 1:] / products[0, 0] - np.outer(mean, mean)
    std = np.sqrt(covariance.diagonal().clip(min=0))
    channels = len(mean) // 2
    ours_theirs, scale = covariance[:channels, channels:], np.outer(std[:channels], std[channels:])
    correlations: Array = np.divide(ours_theirs, scale, out=np.zeros_like(scale), where=scale > 0)
    return correlations


PROTOCOLS: dict[str, Callable[[Task], Fit]] = {"same": same, "both": both, "separate": separate}
