"""Mutants of checks: what a module would be if one of its checks were not there, or were off by one.

A check is a condition under which something is raised or given up; a part that a conjunction or a bound adds to it; a
verdict that a function gives; an exception that a handler takes for a refusal; a call that is made for what it raises.
`assert` is none: it narrows types, and nothing depends on its being run. A mutant's code takes the place of that of
the very function object, so that whoever has imported it has the mutant.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_OFF_BY_ONE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}


@dataclass(frozen=True)
class Mutant:
    """A function of a module with one check less. `check` is its text, `change` what became of it."""

    module: str
    function: str
    check: str
    change: str
    number: int
    """Which of several that are called the same."""
    node: int
    """Where the check is, in the order of `ast.walk` over the function."""
    lines: frozenset[int]
    """A test that executes none of these lines cannot fail for the mutant ..."""
    fires: frozenset[int]
    """... and one that executes one of these, which are what the check does, is likely to."""

    @property
    def name(self) -> tuple[str, str, str, int]:
        """What it is called where it is listed: the same for as long as the check has its text."""
        return f"{self.module.rpartition('.')[2]}.{self.function}", self.check, self.change, self.number

    def install(self) -> None:
        """Replace the function's code in the module that was imported."""
        module = importlib.import_module(self.module)
        tree = ast.parse(inspect.getsource(module))
        function = dict(_functions(tree))[self.function]
        (apply,) = (
            do for node, change, do in _changes(function) if (node, change) == (self.node, self.change)
        )
        apply()
        _replace(module, tree, [self.function])


def recompile(module: ModuleType) -> None:
    """Replace the code of all of a module's functions by what it is, as a mutant would be."""
    tree = ast.parse(inspect.getsource(module))
    _replace(module, tree, [qualname for qualname, _ in _functions(tree)])


def modules_of(package: ModuleType) -> list[ModuleType]:
    """The modules in a package."""
    names = sorted(each.name for each in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{package.__name__}.{name}") for name in names]


def mutants(module: ModuleType) -> list[Mutant]:
    """Every mutant of a module's checks."""
    found: list[Mutant] = []
    seen: dict[tuple[str, str, str], int] = {}
    for qualname, function in _functions(ast.parse(inspect.getsource(module))):
        nodes, guards = list(ast.walk(function)), _guards(function)
        for at, change, _ in _changes(function):
            node = nodes[at]
            key = (qualname, _text(node), change)
            seen[key] = seen.get(key, 0) + 1
            lines, fires = _lines(node), guards.get(node, frozenset())
            found.append(Mutant(module.__name__, *key, seen[key], at, lines, fires))
    return found


def _functions(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Functions and methods, by name."""
    for node in tree.body:
        if isinstance(node, _FUNCTIONS):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from (
                (f"{node.name}.{each.name}", each) for each in node.body if isinstance(each, _FUNCTIONS)
            )


def _changes(function: Any) -> Iterator[tuple[int, str, Any]]:
    """What may be changed in a function: the number of the node, how it is called, and what does it."""
    verdict = isinstance(function.returns, ast.Name) and function.returns.id == "bool"
    guards = _guards(function)
    for at, node in enumerate(ast.walk(function)):
        match node:
            case ast.If() if _gives_up(node.body):
                yield at, "never", _sets(node, "test", ast.Constant(value=False))
            case ast.ExceptHandler(type=caught) if _gives_up(node.body):
                yield at, "ignored", _sets(node, "body", [ast.Pass()])
                for each in caught.elts if isinstance(caught, ast.Tuple) else ():
                    rest = [other for other in caught.elts if other is not each]
                    yield at, f"without {ast.unparse(each)}", _sets(caught, "elts", rest)
            case ast.IfExp():
                yield at, "always", _sets(node, "test", ast.Constant(value=True))
                yield at, "never", _sets(node, "test", ast.Constant(value=False))
            case ast.comprehension(ifs=[_, *_]):
                yield at, "all", _sets(node, "ifs", [])
            case ast.BoolOp(values=parts):
                for each in parts:
                    rest = [other for other in parts if other is not each]
                    # A conjunction has two parts: of one, the same twice.
                    yield at, f"without {_text(each)}", _sets(node, "values", (rest * 2)[: max(2, len(rest))])
            case ast.Call(func=ast.Name(id="max" | "min"), args=[_, _, *_] as parts):
                for each in parts:
                    rest = [other for other in parts if other is not each]
                    yield (
                        at,
                        f"without {_text(each)}",
                        _sets(node, "args", [ast.List(elts=rest, ctx=ast.Load())]),
                    )
            case ast.Return(value=ast.expr() as value) if verdict and ast.unparse(value) != "True":
                yield at, "true", _sets(node, "value", ast.Constant(value=True))
            case ast.Lambda(body=ast.Compare()):
                yield at, "true", _sets(node, "body", ast.Constant(value=True))
            case ast.Expr(value=ast.Call()):
                yield at, "gone", _sets(node, "value", ast.Constant(value=None))
            case ast.AugAssign(op=ast.BitAnd()):
                yield at, "gone", _sets(node, "value", ast.Constant(value=True))
            case ast.Compare(left=left, ops=ops, comparators=right):
                if len(ops) > 1:
                    yield at, "without the first", _drops(node, 0)
                    yield at, "without the last", _drops(node, len(ops) - 1)
                for which, op in enumerate(ops if node in guards else ()):
                    if other := _OFF_BY_ONE.get(type(op)):
                        sides = ast.Compare([left, *right][which], [op], [right[which]])
                        yield at, f"off by one: {_text(sides)}", _sets_in(ops, which, other())


def _sets(node: ast.AST, field: str, value: Any) -> Any:
    return lambda: setattr(node, field, value)


def _sets_in(values: list[Any], at: int, value: Any) -> Any:
    return lambda: values.__setitem__(at, value)


def _drops(node: ast.Compare, at: int) -> Any:
    def apply() -> None:
        if at == 0:
            node.left = node.comparators[0]
        del node.ops[at], node.comparators[at]

    return apply


def _gives_up(body: list[ast.stmt]) -> bool:
    """Whether this raises, or ends something with nothing to show for it."""
    match body[-1]:
        case (
            ast.Raise() | ast.Continue() | ast.Break() | ast.Return(value=None | ast.Constant() | ast.Tuple())
        ):
            return True
    return False


def _guards(function: Any) -> dict[ast.AST, frozenset[int]]:
    """Of each part of a condition, and of the condition: the first line of what is done if it holds."""
    found: dict[ast.AST, frozenset[int]] = {}
    for node in ast.walk(function):
        match node:
            case ast.If() if _gives_up(node.body):
                for each in (node, *ast.walk(node.test)):
                    found[each] = frozenset({node.body[0].lineno})
            case ast.ExceptHandler():
                found[node] = frozenset({node.body[0].lineno})
    return found


def _lines(node: Any) -> frozenset[int]:
    match node:
        case ast.If(test=shown) | ast.comprehension(ifs=[shown, *_]):
            return frozenset(
                range(node.lineno if isinstance(node, ast.If) else shown.lineno, shown.end_lineno + 1)
            )
    return frozenset(range(node.lineno, node.end_lineno + 1))


def _text(node: Any) -> str:
    match node:
        case ast.If():
            return f"if {ast.unparse(node.test)}"
        case ast.ExceptHandler():
            return f"except {ast.unparse(node.type)}"
    return " ".join(ast.unparse(node).split())


def _replace(module: ModuleType, tree: ast.Module, functions: Iterable[str]) -> None:
    code = compile(ast.fix_missing_locations(tree), inspect.getfile(module), "exec", dont_inherit=True)
    for qualname in functions:
        _function(module, qualname).__code__ = _code_of(code, qualname)


def _code_of(code: CodeType, qualname: str) -> CodeType:
    for part in qualname.split("."):
        code = next(each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == part)
    return code


def _function(module: ModuleType, qualname: str) -> FunctionType:
    found: Any = module
    for part in qualname.split("."):
        found = inspect.getattr_static(found, part)
    for inner in (
        "fget",
        "func",
        "__func__",
        "__wrapped__",
    ):  # property, cached_property, classmethod, lru_cache
        found = getattr(found, inner, found) if not isinstance(found, FunctionType) else found
    assert isinstance(found, FunctionType)
    return found
