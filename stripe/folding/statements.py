"""Find the statements of a function's body that nothing needs any longer, and drop them."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Sequence
from typing import Any

Span = tuple[int, int, int, int]


def span_of(node: ast.AST) -> Span:
    """Return where a piece of source stands in its file: first and last line, first and last column."""
    end = getattr(node, "end_lineno", None), getattr(node, "end_col_offset", None)
    return getattr(node, "lineno", None), end[0], getattr(node, "col_offset", None), end[1]  # type: ignore[return-value]


class Liveness:
    """Finds the assignments and ifs of a function's body that write only names that no later statement reads."""

    def __init__(self, body: list[ast.stmt]) -> None:
        """Analyse a body; `dead` then holds the statements that nothing needs."""
        self.dead: list[tuple[Span, str]] = []
        self._block(body, set())

    def _block(self, body: Sequence[ast.stmt], live: set[str]) -> set[str]:
        for statement in reversed(body):
            live = self._before(statement, live)
        return live

    def _before(self, statement: ast.stmt, live: set[str]) -> set[str]:
        """Return the names that `statement` or a later one reads."""
        written = _written(statement)
        if written is not None and (not written & live or _is_idle(statement)):
            self.dead.append(_key(statement))
            return live
        if isinstance(statement, ast.Return | ast.Raise):
            return _read(statement)
        if isinstance(statement, ast.If):
            return self._if(statement, live)
        if isinstance(statement, ast.For | ast.While | ast.With | ast.Try):
            return live | _read(statement)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and written is not None:
            return (live - written) | _read(statement)
        return live | _read(statement)

    def _if(self, statement: ast.If, live: set[str]) -> set[str]:
        before = len(self.dead)
        branches = [self._block(branch, live) for branch in (statement.body, statement.orelse)]
        gone = {key for key in self.dead[before:]}
        inside = [*statement.body, *statement.orelse]
        if all(_key(s) in gone or isinstance(s, ast.Pass) for s in inside) and _is_plain(statement.test):
            self.dead[before:] = [*gone, _key(statement)]
            return live
        return branches[0] | branches[1] | _read(statement.test)


def _key(statement: ast.stmt) -> tuple[Span, str]:
    return span_of(statement), type(statement).__name__


def _written(statement: ast.stmt) -> set[str] | None:
    """Return the local names that a statement writes, if it does nothing else; None otherwise."""
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        parts = [part for target in targets for part in _parts(target)]
        if statement.value is None or any(
            isinstance(n, ast.NamedExpr | ast.Await | ast.Yield) for n in ast.walk(statement)
        ):
            return None
        return {p.id for p in parts if isinstance(p, ast.Name)} if all(isinstance(p, ast.Name) for p in parts) else None
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):  # g.sigmoid_()
        function = statement.value.func
        if isinstance(function, ast.Attribute) and function.attr.endswith("_") and isinstance(function.value, ast.Name):
            return {function.value.id}
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Name):  # what is left of x.mul_(g)
        return set()
    return None


def _parts(target: ast.expr) -> Iterator[ast.expr]:
    if isinstance(target, ast.Tuple | ast.List):
        for part in target.elts:
            yield from _parts(part)
    else:
        yield target


def _is_idle(statement: ast.stmt) -> bool:
    """Return whether a statement is x = x."""
    return isinstance(statement, ast.Assign) and [ast.unparse(t) for t in statement.targets] == [
        ast.unparse(statement.value)
    ]


def _is_plain(test: ast.expr) -> bool:
    """Return whether a condition calls nothing."""
    return not any(isinstance(node, ast.Call | ast.NamedExpr | ast.Await) for node in ast.walk(test))


def _read(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and (isinstance(n.ctx, ast.Load))} | {
        n.target.id for n in ast.walk(node) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)
    }


class Drop(ast.NodeTransformer):
    """Drops statements; a block that would be empty gets a pass."""

    def __init__(self, dead: Collection[tuple[Span, str]]) -> None:
        """Take the statements to drop, as `Liveness` finds them."""
        self._dead = dead

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Visit the nodes inside, and make sure that no block is left empty."""
        super().generic_visit(node)
        if isinstance(node, ast.If | ast.For | ast.While | ast.With | ast.FunctionDef) and not node.body:
            node.body = [ast.Pass()]
        return node

    def visit(self, node: ast.AST) -> Any:
        """Drop a statement, or visit the nodes inside it."""
        if isinstance(node, ast.stmt) and _key(node) in self._dead:
            return None
        return super().visit(node)
