"""The training recipe, and every other default that Python and the command line share; loads no library.

The parsers read their defaults from here without importing torch, so each value is written once.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

PRECISIONS = {"no": None, "bf16": "bfloat16", "fp16": "float16"}  # `amp`'s names of the precisions, and torch's
BATCH = 100  # images per batch where nothing is trained
TRAIN_BATCH = 128  # images per training step
WORKERS = 4  # processes that decode images from disk
PSI_INIT = 0.1  # initial value of psi
PSI_STEPS = 200  # training steps of psi in asr.validate
DISTILL_LR = 0.02  # highest learning rate of folding.distill
CONSTANTS = ("mean", "energy", "fisher", "learned", "matrix")  # what can stand for a gate when it is folded
LEARNING_STEPS = 150  # batches on which learned constants are trained
SETTLED_DRIFT = 0.01  # a gate has settled once its drift stays below this


@dataclass(frozen=True)
class Recipe:
    """How to train; the defaults are the reference recipe for CIFAR.

    Attributes:
        epochs: passes over the training set.
        lr: highest learning rate.
        momentum: SGD's momentum.
        weight_decay: SGD's weight decay, on every parameter except those in `no_decay`.
        nesterov: use Nesterov's momentum.
        scheduler: "step", "cosine" or "onecycle".
        milestones: epochs after which "step" multiplies the learning rate by `gamma`.
        gamma: see `milestones`.
        no_decay: patterns of the names of parameters without weight decay, such as "*.vector" for ASR's psi.
        amp: "no", "bf16" or "fp16" mixed precision.
        channels_last: keep the network in the channels-last memory layout, which is usually faster.
        compile: run training steps through torch.compile, which takes minutes to start and pays off over many steps.
            On one GPU, except in fp16, steps are captured as a CUDA graph with or without it.
        seed: seed of every random number drawn while training.

    Raises:
        ValueError: a value that no training can use, such as an unknown scheduler or an infinite learning rate.

    Example:
        >>> recipe = Recipe(epochs=10, lr=0.5, scheduler="cosine")
        >>> [round(recipe.learning_rate(elapsed), 3) for elapsed in (0, 5, 9)]
        [0.5, 0.25, 0.012]
    """

    epochs: int = 164
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = False
    scheduler: str = "step"
    milestones: tuple[int, ...] = (81, 122)
    gamma: float = 0.1
    no_decay: tuple[str, ...] = ()
    amp: str = "no"
    channels_last: bool = True
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that no training can use."""
        for name, choices in (("scheduler", SCHEDULES), ("amp", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} '{getattr(self, name)}': expected one of {', '.join(choices)}")
        if self.epochs < 1 or self.seed < 0:
            raise ValueError(f"epochs {self.epochs}, seed {self.seed}: expected at least 1 and at least 0")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr {self.lr}: expected a finite number above 0")
        for name in ("momentum", "weight_decay", "gamma"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: expected a finite number of at least 0")

    def learning_rate(self, elapsed: float) -> float:
        """Return the learning rate after `elapsed` epochs of training, 0 <= elapsed < epochs."""
        return SCHEDULES[self.scheduler](self, elapsed)


def _step(recipe: Recipe, elapsed: float) -> float:
    return recipe.lr * recipe.gamma ** bisect_right(sorted(recipe.milestones), elapsed)


def _cosine(recipe: Recipe, elapsed: float) -> float:
    return recipe.lr * (1 + math.cos(math.pi * elapsed / recipe.epochs)) / 2


def _onecycle(recipe: Recipe, elapsed: float) -> float:
    """Rise from lr/25 over the first 30 % of training, then fall to lr/250,000 (Smith and Topin 2019)."""
    peak = 0.3 * recipe.epochs
    rising = elapsed < peak
    low = recipe.lr / (25 if rising else 250_000)
    share = elapsed / peak if rising else (recipe.epochs - elapsed) / (recipe.epochs - peak)
    return low + (recipe.lr - low) * (1 - math.cos(math.pi * share)) / 2


SCHEDULES: dict[str, Callable[[Recipe, float], float]] = {"step": _step, "cosine": _cosine, "onecycle": _onecycle}
