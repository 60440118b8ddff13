"""Win back what folding cost: re-estimated batch-norm statistics, and a short distillation from the original."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from stripe.devices import device_of
from stripe.folding.constants import endless
from stripe.folding.divergence import divergence, kind_of
from stripe.folding.tensors import outputs_of
from stripe.gates.hooks import copied
from stripe.messages import Progress
from stripe.recipe import DISTILL_LR, Recipe
from stripe.torch_internals import BatchNorm
from stripe.training import TrainingBatches

REESTIMATED = 50  # batches whose statistics are averaged
WARM_UP = 0.05  # share of the distillation's steps in which the learning rate rises


def reestimate_norms(model: nn.Module, loader: Iterable[Sequence[Tensor]], *, batches: int = REESTIMATED) -> nn.Module:
    """Return a copy whose batch norms hold the average statistics of the first `batches` of images.

    Nothing else is in train mode meanwhile, so that dropout and the like do not disturb the statistics.
    """
    model = copied(model).eval()
    norms = [norm for norm in model.modules() if isinstance(norm, BatchNorm) and norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # average over all batches
        norm.train()
    with torch.no_grad():
        for images, *_ in itertools.islice(loader, batches):
            model(images.to(device_of(model)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def distill(
    student: nn.Module,
    teacher: nn.Module,
    loader: TrainingBatches,
    *,
    steps: int,
    lr: float = DISTILL_LR,
    weight_decay: float = Recipe.weight_decay,
    amp: str = Recipe.amp,
    kind: str | None = None,
    progress: Progress = iter,
) -> nn.Module:
    """Return a copy of `student` trained for some steps to give the outputs of `teacher`; labels are not used.

    The optimiser is SGD with Nesterov momentum; its rate rises to `lr` and falls by a cosine. The loss is the
    `divergence` of the student's outputs from the teacher's: that of class probabilities, as in Hinton et al. (2015) at
    temperature 1, or the squared relative error of any other output. `kind` says which, "classes" or "values" (default:
    found by `kind_of`). `amp` is "no" or "bf16".

    Raises:
        ValueError: an unknown `amp`, or nothing to train.
        FloatingPointError: the loss is no longer finite.
    """
    if amp not in ("no", "bf16"):
        raise ValueError(f"amp '{amp}': expected no or bf16")
    student, teacher = copied(student).train(), teacher.eval()
    weights = [weight.requires_grad_() for weight in student.parameters()]
    optimizer = torch.optim.SGD(weights, lr, momentum=0.9, weight_decay=weight_decay, nesterov=True, fused=True)
    autocast = torch.autocast(device_of(student).type, torch.bfloat16, enabled=amp == "bf16")
    for step, images in zip(progress(range(steps)), endless(loader), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = lr * _rate(step / steps)
        images = images.to(device_of(student))
        with autocast:
            with torch.no_grad():
                wanted = outputs_of(teacher, images)
            given = outputs_of(student, images)
        kind = kind or kind_of(teacher, images)
        loss = divergence(kind, [each.float() for each in given], [each.float() for each in wanted])
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"distillation's loss is {loss.item()} at step {step}: lower its learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student.eval()


def _rate(progress: float) -> float:
    """Return the learning rate, as a share of the highest, once the share `progress` of the steps is done."""
    return min((progress + 1e-3) / WARM_UP, 1.0) * (1 + math.cos(math.pi * progress)) / 2
