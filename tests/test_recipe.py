"""The recipe: learning rates beside torch's, refusals, and that no default is written twice."""

import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stripe.recipe import Recipe

ROOT = Path(__file__).parents[1]


def test_default_recipe_is_the_reference():
    rates = [Recipe().learning_rate(elapsed) for elapsed in (0, 80.99, 81, 121.99, 122, 163.99)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert (Recipe().epochs, Recipe().momentum, Recipe().weight_decay) == (164, 0.9, 1e-4)


def test_cosine_equals_torch():
    recipe = Recipe(epochs=10, lr=0.3, scheduler="cosine")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    torch_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
    for step in range(40):
        assert recipe.learning_rate(step / 4) == pytest.approx(torch_schedule.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        torch_schedule.step()


def test_onecycle_rises_and_falls():
    recipe = Recipe(epochs=10, lr=0.5, scheduler="onecycle")
    rates = [recipe.learning_rate(elapsed) for elapsed in (0, 1.5, 3, 6.5, 10 - 1e-9)]
    np.testing.assert_allclose(rates, [0.02, 0.26, 0.5, 0.250001, 0.5 / 250_000], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "linear"}, "scheduler 'linear': expected one of step, cosine, onecycle"),
        ({"amp": "int8"}, "amp 'int8': expected one of no, bf16, fp16"),
        ({"epochs": 0}, "epochs 0, .* expected at least 1"),
        ({"lr": 0.0}, r"lr 0\.0"),
        ({"lr": math.nan}, "lr nan"),
        ({"lr": math.inf}, "lr inf: expected a finite number above 0"),
        ({"momentum": math.nan}, "momentum nan: expected a finite number of at least 0"),
        ({"weight_decay": math.inf}, "weight_decay inf"),
        ({"weight_decay": -1e-4}, "weight_decay -0.0001"),
        ({"gamma": math.nan}, "gamma nan"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_recipe_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**options)


def parser_defaults(path):
    """Literal numbers that a parser of a command names as a default, with the flag."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            for word in node.keywords:
                if word.arg == "default" and isinstance(word.value, ast.Constant) and word.value.value is not None:
                    yield node.args[0].value, word.value.value


SHARED = {
    "--lr", "--epochs", "--gamma", "--momentum", "--weight-decay", "--scheduler", "--amp", "--psi-init", "--distill-lr",
    "--train-batch", "--test-batch", "--batch", "--workers", "--tolerance",
}  # fmt: skip


@pytest.mark.parametrize("name", ["train", "fold", "report", "options"])
def test_parsers_read_the_defaults_they_share_with_python(name):
    found = dict(parser_defaults(ROOT / "stripe/cli" / f"{name}.py"))
    assert not found.keys() & SHARED


def test_the_reader_of_parsers_sees_defaults():
    assert ("--depth", 164) in set(parser_defaults(ROOT / "stripe/cli/train.py"))
