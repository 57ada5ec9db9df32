"""Mutants of a Python source: one small change of meaning each, found and applied on the syntax tree.

Left alone: docstrings, annotations, error messages (all of a `raise`), strings, decorators, imports, class attributes.
"""

from __future__ import annotations

import ast
import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

Path_ = tuple[tuple[str, int | None], ...]

ARITHMETIC: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.MatMult: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
COMPARISON: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
BOUNDARY: dict[type[ast.AST], type[ast.AST]] = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
SWAPPED = {
    "min": "max",
    "amin": "amax",
    "minimum": "maximum",
    "argmin": "argmax",
    "any": "all",
    "zeros": "ones",
    "zeros_like": "ones_like",
    "sin": "cos",
    "sinh": "cosh",
    "floor": "ceil",
    "triu": "tril",
    "real": "imag",
    "vjp": "jvp",
    "sum": "mean",
    "log1p": "log",
    "expm1": "exp",
}
SWAPPED |= {new: old for old, new in SWAPPED.items()}
SWAPPED |= {"fsum": "max", "median": "mean", "prod": "sum", "erf": "erfc", "erfc": "erf", "ndtr": "log_ndtr"}
DROPPED = {"abs", "sqrt", "square", "exp", "log", "detach", "tanh", "cumsum", "flip", "sort", "reciprocal", "conj"}
SKIPPED_FIELDS = {"annotation", "returns", "decorator_list", "type_params", "bases", "keywords_of_class"}


@dataclass(frozen=True)
class Mutant:
    """One change: where it is (line, path in the tree), the source before and after, and the lines of its statement."""

    line: int
    column: int
    lines: tuple[int, int]
    statement: str
    path: Path_
    function: str
    before: str
    after: str
    change: str
    new: ast.AST
    repeat: int = 1

    @property
    def key(self) -> str:
        """What names the mutant when lines move: function, statement, column and change, and which one of several."""
        which = f" ({self.repeat})" if self.repeat > 1 else ""
        return f"{self.function} | {self.statement} | {self.column}: {self.before} -> {self.after}{which}"

    def apply(self, tree: ast.Module) -> ast.Module:
        """A copy of the tree with the change made."""
        mutated = copy.deepcopy(tree)
        node: Any = mutated
        for field, index in self.path[:-1]:
            node = getattr(node, field) if index is None else getattr(node, field)[index]
        field, index = self.path[-1]
        old = getattr(node, field) if index is None else getattr(node, field)[index]
        new = copy.deepcopy(self.new)
        if isinstance(old, ast.expr | ast.stmt):
            ast.copy_location(new, old)
        if index is None:
            setattr(node, field, new)
        else:
            getattr(node, field)[index] = new
        return ast.fix_missing_locations(mutated)


def find_mutants(source: str) -> list[Mutant]:
    """Every mutant of a source, in the order of the tree; two that read the same are one."""
    found: dict[tuple[Path_, str], Mutant] = {}
    for mutant in _Finder().walk(ast.parse(source)):
        if mutant.before != mutant.after:
            found.setdefault((mutant.path, mutant.after), mutant)
    seen: Counter[str] = Counter()
    mutants = []
    for mutant in found.values():
        seen[mutant.key] += 1
        mutants.append(replace(mutant, repeat=seen[mutant.key]))
    return mutants


class _Finder:
    def __init__(self) -> None:
        self.function: list[str] = []
        self.statement: ast.stmt | None = None
        self.in_class_body = False

    def walk(self, node: ast.AST, path: Path_ = ()) -> Iterator[Mutant]:
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr) or _is_text(node):
            return
        named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        outer, was_class = self.statement, self.in_class_body
        if isinstance(node, ast.stmt):
            if was_class and not named:
                return
            self.statement = node
        if named:
            self.function.append(node.name)
            self.in_class_body = isinstance(node, ast.ClassDef)
        yield from self._here(node, path)
        for field, value in ast.iter_fields(node):
            if field in SKIPPED_FIELDS or (isinstance(node, ast.ClassDef) and field != "body"):
                continue
            children = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, child in children:
                if isinstance(child, ast.AST):
                    yield from self.walk(child, (*path, (field, index)))
        if named:
            self.function.pop()
        self.statement, self.in_class_body = outer, was_class

    def _mutant(self, node: ast.expr | ast.stmt, path: Path_, new: ast.AST, change: str, show: ast.AST) -> Mutant:
        assert self.statement is not None
        first, last = self.statement.lineno, self.statement.end_lineno or self.statement.lineno
        body = getattr(self.statement, "body", None)
        if body:  # only the header of a compound statement
            last = max(first, body[0].lineno - 1)
        before, after = ast.unparse(node), ast.unparse(ast.fix_missing_locations(copy.deepcopy(show)))
        where = ".".join(self.function) or "module"
        statement = ast.unparse(self.statement).splitlines()[0]
        return Mutant(node.lineno, node.col_offset, (first, last), statement, path, where, before, after, change, new)

    def _here(self, node: ast.AST, path: Path_) -> Iterator[Mutant]:
        if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
            new = copy.copy(node)
            new.op = ARITHMETIC[type(node.op)]()  # type: ignore[assignment]
            yield self._mutant(node, path, new, "arithmetic operator", new)
        elif isinstance(node, ast.Compare):
            yield from self._comparisons(node, path)
        elif isinstance(node, ast.BoolOp):
            new = copy.copy(node)
            new.op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
            yield self._mutant(node, path, new, "and, or", new)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
            yield self._mutant(node, path, node.operand, "minus or not dropped", node.operand)
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            yield self._mutant(node, path, _other_constant(node.value), "constant", _other_constant(node.value))
        elif isinstance(node, ast.Call):
            yield from self._calls(node, path)
        elif isinstance(node, ast.Attribute) and node.attr in {"mT", "T", "mH"}:
            yield self._mutant(node, path, node.value, "transpose dropped", node.value)
        if isinstance(node, ast.If | ast.IfExp | ast.While) and not _is_plain_comparison(node.test):
            negated = ast.UnaryOp(ast.Not(), node.test)
            yield self._mutant(node.test, (*path, ("test", None)), negated, "condition negated", negated)

    def _comparisons(self, node: ast.Compare, path: Path_) -> Iterator[Mutant]:
        for place, operator in enumerate(node.ops):
            whole = any(isinstance(side, ast.Constant) and isinstance(side.value, int) for side in
                        (node.left, *node.comparators))  # fmt: skip
            for table in (COMPARISON, BOUNDARY) if whole else (COMPARISON,):
                if type(operator) in table:
                    new = copy.copy(node)
                    new.ops = [*node.ops]
                    new.ops[place] = table[type(operator)]()  # type: ignore[call-overload]
                    yield self._mutant(node, path, new, "comparison", new)

    def _calls(self, node: ast.Call, path: Path_) -> Iterator[Mutant]:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in SWAPPED:
            new = copy.copy(node)
            new.func = copy.copy(node.func)
            setattr(new.func, "attr" if isinstance(node.func, ast.Attribute) else "id", SWAPPED[name])
            if not (isinstance(new.func, ast.Name) and new.func.id in {"mean", "imag", "real"}):
                yield self._mutant(node, path, new, "function swapped", new)
        if name in DROPPED:
            method = isinstance(node.func, ast.Attribute) and not _is_module(node.func.value)
            kept = node.func.value if method else (node.args[0] if node.args else None)  # type: ignore[attr-defined]
            if kept is not None:
                yield self._mutant(node, path, kept, "function dropped", kept)


def _other_constant(value: float) -> ast.expr:
    if isinstance(value, bool):
        return ast.Constant(not value)
    return ast.Constant(1.0 if value == 0.5 else value + 1)


def _is_plain_comparison(test: ast.expr) -> bool:
    """Comparisons of one operator are flipped already."""
    return isinstance(test, ast.Compare) and len(test.ops) == 1


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in {"torch", "math", "np", "numpy", "special", "scipy", "mpmath"}


def _is_text(node: ast.AST) -> bool:
    """Docstrings, warnings, `__all__`, and what only type checkers read."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
        return True
    if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
        return True
    return isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "warn"
