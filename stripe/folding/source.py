"""Replace an expression of a module's own source, such as x * gate, by one of its operands; keep the rest as written.

The module gets a class derived from its own in which only the methods concerned are recompiled, so that it keeps its
attributes, its other methods and its behaviour in train mode. Whatever only the expression needed is removed: the
statements that computed it, and the submodules and parameters that no method names any longer, which become None.
"""

from __future__ import annotations

import ast
import copy
import inspect
import linecache
import textwrap
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

from torch import nn

from stripe.folding.statements import Drop, Liveness, Span, span_of
from stripe.gates.graph import Place
from stripe.torch_internals import has_hooks, names_held

_SYNONYMS = {"multiply": "mul", "imul": "mul", "iadd": "add"}
"""Functions whose names differ from those of the operations that they run."""


class Unremovable(Exception):
    """An expression cannot be taken out of a module's source; the message says why."""


@dataclass(frozen=True, eq=False)
class Removal:
    """An expression to be replaced by its operand at the position `operand`, to which `scale`, if any, is applied.

    `op` names the operation that the expression runs; it is None where the expression calls a module.
    """

    place: Place
    operand: int
    op: str | None
    scale: nn.Module | None = None


def without(module: nn.Module, removals: Sequence[Removal]) -> nn.Module:
    """Remove expressions from `module`, which is changed, and return the module to put in its place.

    That is `module` itself, or nn.Identity or the scale where nothing else is left of its forward.

    Raises:
        Unremovable: the source is not known, or holds no such expression.
    """
    scales = {}
    for removal in removals:
        if removal.scale is not None:
            scales[removal.place.span] = f"channel_scale_{len(list(module.children()))}"
            module.add_module(scales[removal.place.span], removal.scale)
    kind, texts = type(module), []
    for owner, method in dict.fromkeys((removal.place.owner, removal.place.method) for removal in removals):
        written = _Method(module, owner, method)
        written.remove([r for r in removals if (r.place.owner, r.place.method) == (owner, method)], scales)
        is_forward = (owner, method) == _forward_of(kind) and not has_hooks(module)
        if is_forward and (whole := written.whole(module)) is not None:
            return whole
        texts.append((owner, method, written.text()))
    derived = _derived(kind, tuple(texts))  # type: ignore[arg-type]
    unused = _unused(module, derived, [_member(kind, *text[:2]) for text in texts])
    for name in unused:
        setattr(module, name, None)
    if scales or len(texts) > 1 or not written.is_as_with_none(unused, module):
        module.__class__ = derived
    return module


def left_argument(module: nn.Module, removal: Removal) -> int | None:
    """Return the position of the argument that a forward without an expression merely returns; None if it does more."""
    if (removal.place.owner, removal.place.method) != _forward_of(type(module)) or has_hooks(module):
        return None
    written = _Method(module, removal.place.owner, "forward")
    written.remove([removal], {})
    return written.returned()


def arguments(module: nn.Module) -> int:
    """Return how many arguments a module's forward takes."""
    return int(inspect.unwrap(type(module).forward).__code__.co_argcount) - 1


def _forward_of(kind: type) -> tuple[int, str]:
    """Return which of a class and its bases defines the forward that runs, and the method's name, as in `Place`."""
    return next(i for i, each in enumerate(kind.__mro__) if "forward" in vars(each)), "forward"


def _member(kind: type, owner: int, name: str) -> Any:
    return inspect.unwrap(vars(kind.__mro__[owner])[name])


# ---- one method ----
class _Method:
    """The parsed source of a method, with the positions that it has in its file."""

    def __init__(self, module: nn.Module, owner: int, name: str) -> None:
        kind = type(module)
        self.function = _member(kind, owner, name)
        code: CodeType = self.function.__code__
        try:
            source = inspect.getsource(code)
        except (OSError, TypeError) as error:
            raise Unremovable(f"the source of {kind.__name__}.{name} is not known") from error
        nested = source[0].isspace()
        tree = ast.parse(f"if True:\n{source}" if nested else source)
        ast.increment_lineno(tree, code.co_firstlineno - 1 - nested)
        body: Any = tree.body[0]
        self.definition: ast.FunctionDef = body.body[0] if nested else body
        self.written = copy.deepcopy(self.definition)
        self.names: list[str] = []
        if not isinstance(self.definition, ast.FunctionDef):
            raise Unremovable(f"{kind.__name__}.{name} is not written as a function")
        self.names = [argument.arg for argument in (*self.definition.args.posonlyargs, *self.definition.args.args)]
        self.definition = Drop(()).visit(_Resolved(self.names[0], module).visit(self.definition))

    def remove(self, removals: Sequence[Removal], scales: dict[Span, str]) -> None:
        """Replace expressions by their operands, and drop the statements that nothing needs any longer."""
        dead = set(Liveness(self.definition.body).dead)
        replace = _Replace(removals, scales, self.names[0], self.function.__globals__)
        self.definition = replace.visit(self.definition)
        if missing := [r for r in removals if r.place.span not in replace.done]:
            raise Unremovable(f"no single expression of its source is the product at line {missing[0].place.span[0]}")
        while dropped := set(Liveness(self.definition.body).dead) - dead:
            self.definition = Drop(dropped).visit(self.definition)
        body = self.definition.body
        while len(body) > 1 and isinstance(body[-1], ast.Return) and isinstance(body[-2], ast.Assign):
            made, result = body[-2], body[-1].value
            if result is None or [ast.unparse(target) for target in made.targets] != [ast.unparse(result)]:
                return
            body[-2:] = [ast.copy_location(ast.Return(made.value), made)]  # x = f(x); return x

    def returned(self) -> int | None:
        """Return the position, after self, of the argument that the method merely returns; None if it does more."""
        body = _without_docstring(self.definition.body)
        value = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
        return self.names.index(value.id) - 1 if isinstance(value, ast.Name) and value.id in self.names else None

    def whole(self, module: nn.Module) -> nn.Module | None:
        """Return nn.Identity or the scale where that is all that is left of a forward of one argument, else None."""
        if len(self.names) != 2 or self.definition.args.vararg or self.definition.args.kwonlyargs:
            return None
        if self.returned() == 0:
            return nn.Identity()
        body = _without_docstring(self.definition.body)
        value = body[0].value if len(body) == 1 and isinstance(body[0], ast.Return) else None
        if isinstance(value, ast.Call) and [ast.unparse(a) for a in value.args] == [self.names[1]]:
            called = ast.unparse(value.func).removeprefix(f"{self.names[0]}.")
            return module.get_submodule(called) if called.startswith("channel_scale_") else None
        return None

    def is_as_with_none(self, names: Collection[str], module: nn.Module) -> bool:
        """Return whether the method as it was written does the same, now that the attributes `names` are None."""
        plain = Drop(()).visit(_Resolved(self.names[0], module).visit(self.written))
        return bool(names) and [ast.dump(s) for s in plain.body] == [ast.dump(s) for s in self.definition.body]

    def text(self) -> str:
        """Return the source of a function that, given the method's free variables, returns the method."""
        definition = self.definition
        definition.returns = None
        for argument in ast.walk(definition.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        definition.args.defaults = [ast.Constant(None) for _ in definition.args.defaults]
        definition.args.kw_defaults = [d and ast.Constant(None) for d in definition.args.kw_defaults]
        free = ", ".join(self.function.__code__.co_freevars)
        inner = ast.unparse(ast.fix_missing_locations(definition)).replace("\n", "\n    ")
        return f"def made({free}):\n    {inner}\n    return {definition.name}\n"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0]
    return body[1:] if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) else body


class _Replace(ast.NodeTransformer):
    """Replaces expressions by their operands."""

    def __init__(self, removals: Sequence[Removal], scales: dict[Span, str], self_name: str, names: Any) -> None:
        self.done: set[Span] = set()
        self._removals = {removal.place.span: removal for removal in removals}
        self._scales = scales
        self._self = self_name
        self._globals = names

    def visit(self, node: ast.AST) -> Any:
        span = span_of(node)
        if isinstance(node, ast.Expr) and span_of(node.value) in self._scales and (target := _in_place(node.value)):
            return ast.copy_location(ast.Assign([target], self.visit(node.value)), node)
        removal = self._removals.get(span) if isinstance(node, ast.BinOp | ast.AugAssign | ast.Call) else None
        if removal is None:
            return self.generic_visit(node)
        self.done.add(span)
        operand = self.visit(self._operand(node, removal))
        if span in self._scales:
            function = ast.Attribute(ast.Name(self._self, ast.Load()), self._scales[span], ast.Load())
            operand = ast.Call(function, [operand], [])
        if isinstance(node, ast.AugAssign):
            return ast.copy_location(ast.Assign([node.target], operand), node)
        return ast.copy_location(operand, node)

    def _operand(self, node: ast.AST, removal: Removal) -> ast.expr:
        """Return the operand that is to replace an operation, as an expression."""
        if isinstance(node, ast.BinOp):
            return (node.left, node.right)[removal.operand]
        if isinstance(node, ast.AugAssign):
            target = copy.deepcopy(node.target)
            target.ctx = ast.Load()
            return (target, node.value)[removal.operand]
        assert isinstance(node, ast.Call)
        if any(keyword.arg == "out" for keyword in node.keywords):
            raise Unremovable(f"{ast.unparse(node)} writes its result into a tensor that is given")
        given = list(node.args)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if "einsum" in (name, getattr(node.func, "id", "")) and node.args:
            return _scaled_by_einsum(node)
        does = _SYNONYMS.get(name.strip("_"), name.strip("_"))
        if isinstance(node.func, ast.Attribute) and does == removal.op and not self._is_module(node.func.value):
            given.insert(0, node.func.value)
        elif removal.op is not None and does != removal.op:
            return self._passed(node, removal)
        if removal.operand >= len(given) or any(isinstance(each, ast.Starred) for each in given):
            raise Unremovable(f"the operands of {ast.unparse(node)} cannot be determined")
        return given[removal.operand]

    def _passed(self, call: ast.Call, removal: Removal) -> ast.expr:
        """Return the argument that the product inside a called function scales: as its source says, else the first."""
        function = self._globals.get(call.func.id) if isinstance(call.func, ast.Name) else None
        name = _scaled_parameter(function, removal)
        if name is None and call.args and not isinstance(call.func, ast.Lambda) and not _is_lambda(function):
            return call.args[0]
        names = list(inspect.signature(function).parameters) if name and callable(function) else []
        given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords}
        if name not in given:
            raise Unremovable(f"it is unclear which argument of {ast.unparse(call)} is the map")
        return given[name]

    def _is_module(self, value: ast.expr) -> bool:
        """Return whether an expression names a Python module, as torch does in torch.mul, or an attribute of self."""
        named = isinstance(value, ast.Name) and inspect.ismodule(self._globals.get(value.id))
        owned = isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name) and value.value.id == self._self
        return named or owned


def _scaled_by_einsum(call: ast.Call) -> ast.expr:
    """Return the only operand with the axes of the result, such as x in torch.einsum("nchw,nc->nchw", x, g)."""
    equation, *operands = call.args
    written = equation.value if isinstance(equation, ast.Constant) and isinstance(equation.value, str) else ""
    axes, arrow, result = written.replace(" ", "").partition("->")
    same = [operand for operand, its in zip(operands, axes.split(","), strict=False) if its == result and arrow]
    if len(same) != 1:
        raise Unremovable(f"it is unclear which operand of {ast.unparse(call)} is the map: write x * g")
    return same[0]


def _in_place(call: ast.expr) -> ast.expr | None:
    """Return the variable that a statement such as x.mul_(g) writes."""
    function = call.func if isinstance(call, ast.Call) else None
    if isinstance(function, ast.Attribute) and function.attr.endswith("_") and isinstance(function.value, ast.Name):
        return ast.Name(function.value.id, ast.Store())
    return None


def _is_lambda(function: Any) -> bool:
    return getattr(function, "__name__", "") == "<lambda>"


def _scaled_parameter(function: Any, removal: Removal) -> str | None:
    """Return the parameter that a function scales, if its only product multiplies or adds two of its parameters."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        parameters = inspect.signature(function).parameters
    except (OSError, SyntaxError, TypeError, ValueError):  # no source, or not parsable alone, as a lambda's
        return None
    kind = {"mul": ast.Mult, "add": ast.Add}.get(removal.op or "")
    products = [n for n in ast.walk(tree) if isinstance(n, ast.BinOp) and kind and isinstance(n.op, kind)]
    pairs = [(product.left, product.right) for product in products]
    named = [[each.id for each in pair if isinstance(each, ast.Name) and each.id in parameters] for pair in pairs]
    return named[0][removal.operand] if len(named) == 1 and len(named[0]) == 2 else None


class _Resolved(ast.NodeTransformer):
    """Decides the ifs that depend on the module's settings alone: plain attributes, or whether a submodule exists."""

    def __init__(self, self_name: str, module: nn.Module) -> None:
        self._self = self_name
        self._module = module

    def visit_If(self, node: ast.If) -> Any:
        """Keep only the branch that runs."""
        self.generic_visit(node)
        settings = ast.Attribute, ast.Constant, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.Name
        parts = [n for n in ast.walk(node.test) if isinstance(n, ast.expr)]
        if not all(isinstance(n, settings) for n in parts) or not all(self._is_setting(n) for n in parts):
            return node
        try:
            value = eval(ast.unparse(node.test), {self._self: self._module})  # noqa: S307
        except AttributeError:
            return node
        if not isinstance(value, bool | int | float | str | None | nn.Module):
            return node
        return (node.body if value is not None and value is not False and bool(value) else node.orelse) or None

    def _is_setting(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr != "training"
        return not isinstance(node, ast.Name) or node.id == self._self


# ---- classes ----
@cache
def _derived(base: type, texts: tuple[tuple[int, str, str], ...]) -> type:
    """Return a class like `base` in which some methods, of its own or of its bases, are recompiled from these sources.

    If `base` overrides a method and calls the inherited one by super(), the recompiled one is held by a class that
    follows `base` in the order of method resolution.
    """
    root, stages = getattr(base, "_folded_from", (base, ()))
    members: dict[str, Any] = {"_folded_from": (root, (*stages, texts)), "__reduce_ex__": _reduce}
    behind = []
    for owner, name, text in texts:
        method = _compiled(_member(base, owner, name), text)
        if any(name in vars(each) for each in base.__mro__[:owner]):
            behind.append(type(base.__name__, (base.__mro__[owner],), {name: method}))
        else:
            members[name] = method
    for name in ("__module__", "__qualname__", "__doc__"):
        members[name] = getattr(base, name)
    return type(base.__name__, (base, *behind), members)


def _compiled(function: Any, text: str) -> Any:
    """Compile a method from its source, with the globals, closure and defaults of the method that it replaces."""
    file = f"<{function.__qualname__} without {zlib.crc32(text.encode()):x}>"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    made: dict[str, Callable[..., Any]] = {}
    try:
        exec(compile(text, file, "exec"), function.__globals__, made)  # noqa: S102
        method: Any = made["made"](*(cell.cell_contents for cell in function.__closure__ or ()))
    except Exception as error:  # a decorator, say, or an empty cell may raise anything
        raise Unremovable(f"{function.__qualname__} cannot be compiled anew ({error})") from error
    innermost = inspect.unwrap(method)
    innermost.__defaults__, innermost.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    innermost.__qualname__ = function.__qualname__
    return method


def _reduce(module: nn.Module, protocol: Any) -> Any:
    return _revived, type(module)._folded_from, module.__dict__  # type: ignore[attr-defined]


def _revived(root: type, stages: tuple[tuple[tuple[int, str, str], ...], ...]) -> nn.Module:
    """Make an empty module of a derived class, which copying or unpickling then fills."""
    for texts in stages:
        root = _derived(root, texts)
    module: nn.Module = root.__new__(root)  # type: ignore[call-overload]
    return module


def _unused(module: nn.Module, derived: type, changed: Sequence[Any]) -> list[str]:
    """Return the submodules, parameters and buffers that the changed methods named and no method names any longer."""
    named = {name for function in changed for name in _names(function)}
    own = [each for each in derived.__mro__ if each not in nn.Module.__mro__]
    queue, still = ["forward"], set[str]()
    while queue:  # names in forward, and in the members of the class that it reaches
        name = queue.pop()
        members = [vars(each)[name] for each in own if name in vars(each)]
        found = {n for m in members if not callable(m) or inspect.unwrap(m) not in changed for n in _names(m)}
        queue += found - still
        still |= found
    held = names_held(module)
    return [name for name in held if name in named - still and not name.startswith("channel_scale_")]


def _names(member: Any) -> set[str]:
    """Return the names that the code of a function or property refers to, nested functions included."""
    function = member.fget if isinstance(member, property) else member
    queue, found = [getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None)], set[str]()
    while queue:
        code = queue.pop()
        if isinstance(code, CodeType):
            found |= {*code.co_names, *(c for c in code.co_consts if isinstance(c, str))}
            queue += list(code.co_consts)
    return found
