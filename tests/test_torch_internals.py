"""What stripe relies on in torch beyond its public names: one test for each, so that a release that breaks it is named.

These tests run networks and operations of torch; they compare with what the public interface of torch says.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stripe import torch_internals
from stripe.torch_internals import (
    COMPILED,
    BatchNorm,
    Convolution,
    DispatchMode,
    at_most_graphs,
    compiled_from,
    copy_all,
    has_hooks,
    is_composite,
    is_in_place,
    names_held,
    run_as_parts,
    tree_leaves,
    tree_map,
    uncompile,
    unset_parameters,
    write_positions,
)

ROOT = Path(__file__).parents[1]
ADD, MATMUL = torch.ops.aten.add, torch.ops.aten.matmul.default


class Listing(DispatchMode):
    """Lists the names of the operations that it sees."""

    def __init__(self, *, parts: bool = False) -> None:
        super().__init__()
        self.parts = parts
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.parts and is_composite(func):
            with self:
                return run_as_parts(func, args, kwargs or {})
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_operations_and_returns_their_results():
    with Listing() as mode:
        result = torch.ones(3) * 2
    assert mode.names[-1] == "mul"
    assert result.tolist() == [2, 2, 2]


def test_composite_operations_run_as_their_parts():
    images, layer = torch.randn(2, 3), nn.Linear(3, 4)
    with torch.inference_mode(), Listing() as whole:
        expected = layer(images)
    with torch.inference_mode(), Listing(parts=True) as parts:
        found = layer(images)
    assert "linear" in whole.names
    assert "linear" not in parts.names
    assert "addmm" in parts.names
    torch.testing.assert_close(found, expected)
    assert is_composite(MATMUL)
    assert not is_composite(ADD.Tensor)


def test_what_an_operation_writes_is_known():
    assert write_positions(ADD.Tensor) == ()
    assert write_positions(ADD.out) == ((3, "out"),)
    assert write_positions(torch.ops.aten.add_.Tensor) == ((0, "self"),)
    assert is_in_place(torch.ops.aten.add_.Tensor)
    assert not is_in_place(ADD.Tensor)


def test_kinds_of_layers_are_told():
    norms = [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)]
    convolutions = [nn.Conv1d(2, 2, 1), nn.Conv2d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.ConvTranspose2d(2, 2, 1)]
    assert all(isinstance(norm, BatchNorm) for norm in norms)
    assert all(isinstance(layer, Convolution) for layer in convolutions)
    assert not isinstance(nn.GroupNorm(1, 2), BatchNorm)
    assert not isinstance(nn.Linear(2, 2), Convolution)


def test_nested_arguments_are_walked():
    nested = {"a": [1, (2, 3)], "b": 4}
    assert tree_map(lambda n: 10 * n, nested) == {"a": [10, (20, 30)], "b": 40}
    assert sorted(tree_leaves(nested)) == [1, 2, 3, 4]


def test_names_of_a_module_hold_those_without_a_value():
    norm = nn.BatchNorm1d(2, affine=False, track_running_stats=False)
    assert unset_parameters(norm) == ["weight", "bias"]
    assert {"weight", "bias", "running_mean", "running_var"} <= set(names_held(norm))
    assert names_held(nn.Sequential(nn.ReLU())) == ["0"]


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_a_forward_are_seen(kind):
    module = nn.ReLU()
    assert not has_hooks(module)
    handle = getattr(module, kind)(lambda *_: None)
    assert has_hooks(module)
    handle.remove()
    assert not has_hooks(module)


class Layer(nn.Linear):
    """A module of one's own: torch 2.6 compiles no forward of its own modules."""

    def forward(self, x):
        return super().forward(x)


def test_a_compiled_module_shows_what_it_wraps_and_returns_to_eager():
    model = Layer(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert compiled_from(compiled) is model
    assert compiled_from(model) is None
    assert all(path.split(".")[0] == COMPILED for path, _ in compiled.named_parameters())

    compilations = []
    model.compile(backend=lambda graph, _: compilations.append(graph) or graph.forward, dynamic=False)
    model(torch.ones(1, 2))
    uncompile(model)
    model(torch.ones(2, 2))
    assert len(compilations) == 1


def test_graphs_of_a_function_are_limited_within_the_context_alone():
    compilations = []

    def forwards(sizes):
        torch.compiler.reset()
        compilations.clear()
        model = torch.compile(Layer(2, 2), backend=lambda g, _: compilations.append(g) or g.forward, dynamic=False)
        for size in sizes:
            model(torch.ones(size, 2))
        return len(compilations)

    usual = forwards(range(2, 14))
    with at_most_graphs(12):
        assert forwards(range(2, 14)) == 12
    assert forwards(range(2, 14)) == usual < 12


def test_tensors_are_copied_all_at_once_into_their_dtypes():
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    targets = [torch.zeros(2, dtype=torch.bfloat16), torch.zeros(1)]
    copy_all(iter(targets), iter([weight, torch.ones(1)]))
    assert [each.tolist() for each in targets] == [[1.0, 2.0], [1.0]]
    assert [each.dtype for each in targets] == [torch.bfloat16, torch.float32]
    copy_all([weight], [torch.zeros(2)])  # a leaf that asks for gradients
    assert weight.tolist() == [0.0, 0.0]
    copy_all([], [])


LOADING = """
import sys, torch
from stripe.torch_internals import DispatchMode, compiler_is_loaded
class Passing(DispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))
assert not compiler_is_loaded()
with Passing():
    torch.ones(3) * 2
print(compiler_is_loaded())
torch.compile(torch.nn.ReLU(), backend="eager")(torch.ones(1))
print(compiler_is_loaded())
"""


def test_a_mode_does_not_load_the_compiler():
    done = subprocess.run([sys.executable, "-c", LOADING], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


PRIVATE = re.compile(
    r"torch(\.\w+)*\._[a-zA-Z]|(?<!self)\._schema\b|\._op_dk\b|\._parameters\b|\._buffers\b|_compiled_call_impl|_orig_mod\"|_should_skip"
)


def private_names(code):
    """Private names of torch that a module's code uses: imported, or read as an attribute."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if re.search(r"\._[a-zA-Z]", name))
        elif isinstance(node, ast.Attribute | ast.FunctionDef) and (found := PRIVATE.search(ast.unparse(node))):
            yield found.group()


@pytest.mark.parametrize("folder", ["stripe", "scripts"])
def test_private_names_of_torch_are_in_one_module(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        if path != Path(torch_internals.__file__):
            assert list(private_names(path.read_text())) == [], path
    assert set(private_names(Path(torch_internals.__file__).read_text()))


def test_the_search_for_private_names_sees_imports_and_attributes():
    assert list(private_names("from torch.nn.modules.conv import _ConvNd")) == ["torch.nn.modules.conv._ConvNd"]
    assert list(private_names("import torch\nx = torch._C.thing"))
    assert list(private_names("def f(func):\n    return func._schema"))
    assert list(private_names("import torch\nx = torch.compile(self._model)")) == []
