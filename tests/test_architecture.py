"""The arrows and the size budget of the design, read off the source; and that each check can fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROLES = {
    "fedge": "fedge",
    "fedge_strategies": "strategies",
    "fedge_server": "server",
    "fedge_client": "client",
    "fedge_flower": "flower",
    "fedge_sim": "simulations",
}
MAY_IMPORT = {
    "fedge": {"fedge"},
    "fedge_strategies": {"fedge", "fedge_strategies", "fedge_flower"},
    "fedge_server": {"fedge", "fedge_server", "fedge_flower"},
    "fedge_client": {"fedge", "fedge_client", "fedge_flower"},
    "fedge_flower": {"fedge", "fedge_flower"},
    "fedge_sim": set(ROLES),
}
SHELLS_OF_THE_CORE = {
    *("fedge/cli.py", "fedge/faults.py", "fedge/logs.py", "fedge/new.py", "fedge/parallel.py"),
    "strategies/fedge_strategies/flower.py",  # an adapter, which nothing of ours imports
}
FORBIDDEN_IN_THE_CORE = {
    *("grpc", "asyncio", "socket", "threading", "time", "random", "logging", "torch", "flwr"),
    *("secrets", "uuid", "multiprocessing", "subprocess", "concurrent"),
}
HIDDEN_INPUTS = {"now", "utcnow", "today", "urandom", "getrandom"}
CODE_IN_DATA = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "jsonpickle",
    "joblib",
}
MAX_LINES = 500
MAX_DEPTH = 1


@dataclass(frozen=True)
class Module:
    """A source file: its path from the root, its dotted name, and its syntax tree."""

    path: str
    name: str
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.endswith("__init__.py")


@dataclass(frozen=True)
class Import:
    """`target` is the dotted name; what `from a import b` names is `a.b`, be it a module or not."""

    target: str
    line: int
    at_load: bool
    """Whether importing the file runs it: not inside a function, not for type checkers alone."""


def module(path: str, source: str, name: str | None = None) -> Module:
    dotted = name or path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return Module(path, dotted, ast.parse(source))


def is_generated(path: str) -> bool:
    return path.endswith(("_pb2.py", "_pb2_grpc.py"))


def sources(role: str) -> Iterator[Module]:
    folder = ROOT / ROLES[role]
    base = ROOT if role == "fedge" else folder
    for path in sorted(folder.rglob("*.py")):
        inner = path.relative_to(base).as_posix()
        name = inner.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        yield module(path.relative_to(ROOT).as_posix(), path.read_text(), name)


PROJECT = {role: list(sources(role)) for role in ROLES}
EVERYTHING = [each for modules in PROJECT.values() for each in modules]


# Imports.


@cache
def imports(of: Module) -> list[Import]:
    """Every import at any depth, those by a constant string included."""
    out: list[Import] = []

    def visit(node: ast.AST, at_load: bool) -> None:
        match node:
            case ast.Import(names=names):
                out.extend(Import(alias.name, node.lineno, at_load) for alias in names)
            case ast.ImportFrom(module=name, names=names, level=level):
                base = _absolute(of, name, level)
                out.extend(Import(f"{base}.{alias.name}", node.lineno, at_load) for alias in names)
            case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]) if _imports_by_name(
                function
            ):
                out.append(Import(name, node.lineno, at_load))
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                at_load = False
            case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                for child in node.body:
                    visit(child, False)
                for child in node.orelse:
                    visit(child, at_load)
                return
            case _:
                pass
        for child in ast.iter_child_nodes(node):
            visit(child, at_load)

    visit(of.tree, True)
    return out


def _absolute(of: Module, name: str | None, level: int) -> str:
    if not level:
        return name or ""
    package = of.name.split(".")
    package = package[: len(package) - level + of.is_package]
    return ".".join([*package, *([name] if name else [])])


def _imports_by_name(function: ast.expr) -> bool:
    match function:
        case ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module"):
            return True
    return False


def is_within(target: str, name: str) -> bool:
    return target == name or target.startswith(f"{name}.")


def wrong_arrows(of: Module, role: str) -> list[str]:
    return [
        f"{of.path}:{each.line} imports {each.target}"
        for each in imports(of)
        for other in ROLES
        if is_within(each.target, other) and other not in MAY_IMPORT[role]
    ]


def impure(of: Module) -> list[str]:
    """What a core module may not have: clocks, entropy, sockets, threads, logs, frameworks."""
    found = [
        f"{of.path}:{each.line} imports {each.target}"
        for each in imports(of)
        if each.target.split(".")[0] in FORBIDDEN_IN_THE_CORE or "_pb2_grpc" in each.target
    ]
    for node in ast.walk(of.tree):
        match node:
            case ast.Call(func=ast.Attribute(attr=name)) if name in HIDDEN_INPUTS:
                found.append(f"{of.path}:{node.lineno} calls {name}")
            case ast.Call(func=ast.Attribute(attr="default_rng"), args=[], keywords=[]):
                found.append(f"{of.path}:{node.lineno} calls default_rng without a seed")
            case _:
                pass
    return found


def loads(of: Module) -> set[str]:
    """What importing this file imports, directly: the packages above each target included."""
    out = set()
    for each in imports(of):
        if each.at_load:
            parts = each.target.split(".")
            out |= {".".join(parts[: n + 1]) for n in range(len(parts))}
    package = of.name.split(".")[:-1]
    return out | {".".join(package[: n + 1]) for n in range(len(package))}


def way_to(start: Module, goal: str, known: dict[str, Module]) -> list[str]:
    """The chain of files through which importing `start` imports `goal`; empty if there is none."""
    ways, seen = [[start.name]], {start.name}
    while ways:
        way = ways.pop()
        for target in sorted(loads(known[way[-1]])):
            if is_within(target, goal):
                return [*way, target]
            if target in known and target not in seen:
                seen.add(target)
                ways.append([*way, target])
    return []


ARROWS = [
    # Each: where, the source, what is wrong with it ("" for nothing).
    ("fedge", "import fedge_server", "fedge_server"),
    ("fedge", "import fedge.vector\nfrom fedge import round", ""),
    ("fedge", "def f():\n    from fedge_client.torch import flat", "fedge_client.torch.flat"),
    ("fedge", "if TYPE_CHECKING:\n    from fedge_sim import x", "fedge_sim.x"),
    (
        "fedge",
        "import importlib\nimportlib.import_module('fedge_strategies.fedavg')",
        "fedge_strategies.fedavg",
    ),
    ("fedge", "__import__('fedge_sim')", "fedge_sim"),
    ("fedge", "import fedge_serverless", ""),
    ("fedge_strategies", "from fedge_strategies import fedavg\nfrom fedge.pipeline import Mean", ""),
    ("fedge_strategies", "import fedge_client as c", "fedge_client"),
    ("fedge_server", "class A:\n    import fedge_client.agent", "fedge_client.agent"),
    ("fedge_server", "import fedge_strategies", "fedge_strategies"),
    ("fedge_client", "try:\n    import fedge_server\nexcept ImportError:\n    pass", "fedge_server"),
    ("fedge_client", "from fedge_sim.engine import *", "fedge_sim.engine.*"),
    ("fedge_sim", "import fedge, fedge_client.torch, fedge_server, fedge_strategies", ""),
]


@pytest.mark.parametrize(("role", "source", "wrong"), ARROWS)
def test_the_check_of_the_arrows_finds_what_is_wrong_and_nothing_else(role, source, wrong):
    found = wrong_arrows(module(f"{role}/x.py", source), role)
    assert [line.split(" imports ")[1] for line in found] == ([wrong] if wrong else [])


@pytest.mark.parametrize("role", ROLES)
def test_each_package_imports_only_what_its_arrows_allow(role):
    assert [wrong for each in PROJECT[role] for wrong in wrong_arrows(each, role)] == []


RELATIVE = [
    ("a/b/c.py", "from . import d", "a.b.d"),
    ("a/b/c.py", "from .d import e", "a.b.d.e"),
    ("a/b/c.py", "from ..d import e", "a.d.e"),
    ("a/b/__init__.py", "from . import d", "a.b.d"),
    ("a/b/__init__.py", "from ..d import e", "a.d.e"),
]


@pytest.mark.parametrize(("path", "source", "target"), RELATIVE)
def test_relative_imports_are_resolved(path, source, target):
    assert [each.target for each in imports(module(path, source))] == [target]


IMPURITIES = [
    ("import time", "time"),
    ("from time import monotonic", "time.monotonic"),
    ("def f():\n    def g():\n        import random", "random"),
    ("async def f():\n    import asyncio.queues", "asyncio.queues"),
    ("class A:\n    from logging import getLogger", "logging.getLogger"),
    ("f = lambda: __import__('socket')", "socket"),
    ("if TYPE_CHECKING:\n    import torch", "torch"),
    ("import importlib\nimportlib.import_module('threading')", "threading"),
    ("from fedge.wire import fedge_pb2_grpc", "fedge.wire.fedge_pb2_grpc"),
    ("from fedge.wire.fedge_pb2_grpc import Stub", "fedge.wire.fedge_pb2_grpc.Stub"),
    ("import grpc.aio as aio", "grpc.aio"),
    ("import flwr", "flwr"),
    ("import secrets", "secrets"),
    ("import numpy.random\nimport timeit\nfrom fedge.wire import fedge_pb2\nimport torchlike", ""),
    ("np.random.default_rng(7)\nevent.time\nnow(3)", ""),
    ("from datetime import datetime\ndatetime.now(UTC)", "now"),
    ("import os\nos.urandom(3)", "urandom"),
    ("np.random.default_rng()", "default_rng without a seed"),
]


@pytest.mark.parametrize(("source", "wrong"), IMPURITIES)
def test_the_check_of_the_core_finds_what_is_wrong_and_nothing_else(source, wrong):
    found = impure(module("fedge/x.py", source))
    assert [line.split(" ", 2)[2] for line in found] == ([wrong] if wrong else [])


def test_the_core_and_the_strategies_have_no_clock_entropy_socket_thread_log_or_framework():
    checked = [
        each
        for each in [*PROJECT["fedge"], *PROJECT["fedge_strategies"]]
        if each.path not in SHELLS_OF_THE_CORE and not each.path.endswith("_pb2_grpc.py")
    ]
    assert [wrong for each in checked for wrong in impure(each)] == []


def may_import_torch(of: Module) -> bool:
    return of.name == "fedge_client.worker" or is_within(of.name, "fedge_client.torch")


TORCH_WAYS = {
    "directly": ({"c.agent": "import torch"}, ["c.agent", "torch"]),
    "in a try": ({"c.agent": "try:\n    import torch.nn\nexcept ImportError: pass"}, ["c.agent", "torch"]),
    "through another file": (
        {"c.agent": "from c import helper", "c.helper": "import c.flat", "c.flat": "from torch import nn"},
        ["c.agent", "c.helper", "c.flat", "torch"],
    ),
    "through a package": ({"c": "import torch", "c.agent": ""}, ["c.agent", "c", "torch"]),
    "in a function": ({"c.agent": "def f():\n    import torch"}, []),
    "for type checkers": (
        {"c.agent": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"},
        [],
    ),
    "in the other branch": (
        {"c.agent": "if TYPE_CHECKING:\n    pass\nelse:\n    import torch"},
        ["c.agent", "torch"],
    ),
    "a name like it": ({"c.agent": "import torchlike, c.torch", "c.torch": ""}, []),
}


@pytest.mark.parametrize(("files", "way"), TORCH_WAYS.values(), ids=TORCH_WAYS)
def test_the_check_of_torch_finds_every_way_to_it(files, way):
    known = {
        name: module(name.replace(".", "/") + ("/__init__.py" if name == "c" else ".py"), source, name)
        for name, source in files.items()
    }
    assert way_to(known["c.agent"], "torch", known) == way


def test_a_site_without_its_worker_never_imports_torch():
    known = {each.name: each for each in EVERYTHING}
    ways = [way_to(each, "torch", known) for each in PROJECT["fedge_client"] if not may_import_torch(each)]
    assert [" -> ".join(way) for way in ways if way] == []


# Code in data.


def dangers(of: Module) -> list[str]:
    """Calls and imports that make code out of data."""
    found = [each.target for each in imports(of) if each.target.split(".")[0] in CODE_IN_DATA]
    found += [each.target for each in imports(of) if each.target in ("torch.load", "yaml.load")]
    for node in ast.walk(of.tree):
        if isinstance(node, ast.Call):
            keywords = {word.arg: word.value for word in node.keywords}
            match node.func:
                case ast.Name(id="eval" | "exec" | "compile" as name):
                    found.append(name)
                case ast.Attribute(value=ast.Name(id="builtins"), attr="eval" | "exec" | "compile" as name):
                    found.append(name)
                case ast.Attribute(value=ast.Name(id="torch"), attr="load"):
                    if not _is(keywords.get("weights_only"), True):
                        found.append("torch.load")
                case ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="load"):
                    if not _is(keywords.get("allow_pickle", ast.Constant(False)), False):
                        found.append("numpy.load")
                case ast.Attribute(value=ast.Name(id="yaml"), attr=name) if _yaml_runs_code(name):
                    found.append(f"yaml.{name}")
                case _:
                    pass
    return found


def _yaml_runs_code(name: str) -> bool:
    return "load" in name and not name.startswith(("safe_", "_"))


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


DANGERS = [
    ("import pickle", ["pickle"]),
    ("def f():\n    from pickle import loads", ["pickle.loads"]),
    ("import marshal as m", ["marshal"]),
    ("__import__('dill')", ["dill"]),
    ("eval('1')", ["eval"]),
    ("def f(x):\n    return [exec(y) for y in x]", ["exec"]),
    ("import builtins\nbuiltins.exec(x)", ["exec"]),
    ("compile(x, 'f', 'exec')", ["compile"]),
    ("import torch\ntorch.load(f)", ["torch.load"]),
    ("import torch\ntorch.load(f, weights_only=False)", ["torch.load"]),
    ("import torch\ntorch.load(f, weights_only=flag)", ["torch.load"]),
    ("from torch import load", ["torch.load"]),
    ("yaml.load(f, Loader=L)", ["yaml.load"]),
    ("yaml.unsafe_load(f)", ["yaml.unsafe_load"]),
    ("np.load(f, allow_pickle=True)", ["numpy.load"]),
    ("np.load(f, allow_pickle=x)", ["numpy.load"]),
    ("import torch\ntorch.load(f, weights_only=True)\nnp.load(f)\nnp.load(f, allow_pickle=False)", []),
    ("re.compile('x')\nmodel.eval()\nyaml.safe_load(f)\njson.load(f)\nself.load(f)", []),
]


@pytest.mark.parametrize(("source", "wrong"), DANGERS)
def test_the_check_of_dangers_finds_what_is_wrong_and_nothing_else(source, wrong):
    assert dangers(module("x.py", source)) == wrong


def test_nothing_makes_code_out_of_data():
    assert [f"{each.path}: {danger}" for each in EVERYTHING for danger in dangers(each)] == []


# Size.


def too_long(path: str, text: str) -> bool:
    return len(text.splitlines()) > MAX_LINES and not is_generated(path)


def test_the_check_of_length_counts_lines_and_leaves_generated_code_out():
    assert too_long("fedge/x.py", "\n" * (MAX_LINES + 1))
    assert not too_long("fedge/x.py", "\n" * MAX_LINES)
    assert not too_long("fedge/wire/fedge_pb2.py", "\n" * 5000)


def test_no_file_is_longer_than_five_hundred_lines():
    folders = [*ROLES.values(), "tests", "benchmarks"]
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    long = [path.relative_to(ROOT).as_posix() for path in paths if too_long(path.name, path.read_text())]
    assert long == []


def depths(modules: list[Module]) -> dict[str, int]:
    """For each class, how many classes of this project it descends from in a line."""
    bases: dict[str, list[str]] = {}
    for of in modules:
        names = {each.target.split(".")[-1]: each.target for each in imports(of)}
        names |= _aliases(of)
        for node in ast.walk(of.tree):
            if isinstance(node, ast.ClassDef):
                names[node.name] = f"{of.name}.{node.name}"
        for node in ast.walk(of.tree):
            if isinstance(node, ast.ClassDef):
                bases[names[node.name]] = [_dotted(base, names) for base in node.bases]

    def depth(name: str) -> int:
        return max((1 + depth(base) for base in bases[name] if base in bases), default=0)

    return {name: depth(name) for name in bases}


def _aliases(of: Module) -> dict[str, str]:
    out = {}
    for node in ast.walk(of.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            base = f"{_absolute(of, node.module, node.level)}." if isinstance(node, ast.ImportFrom) else ""
            out |= {alias.asname: base + alias.name for alias in node.names if alias.asname}
    return out


def _dotted(base: ast.expr, names: dict[str, str]) -> str:
    match base:
        case ast.Name(id=name):
            return names.get(name, name)
        case ast.Attribute(value=value, attr=attribute):
            return f"{_dotted(value, names)}.{attribute}"
        case ast.Subscript(value=value):
            return _dotted(value, names)
        case _:
            return ""


DEPTHS = {
    "no base": ({"m": "class A: pass"}, {"m.A": 0}),
    "a base of another project": ({"m": "import enum\nclass A(enum.Enum): pass"}, {"m.A": 0}),
    "one of ours": ({"m": "class A: pass\nclass B(A): pass"}, {"m.A": 0, "m.B": 1}),
    "two of ours in a line": (
        {"m": "class A: pass", "n": "from m import A\nclass B(A): pass", "o": "import n\nclass C(n.B): pass"},
        {"m.A": 0, "n.B": 1, "o.C": 2},
    ),
    "under another name": (
        {"m": "class A: pass\nclass B(A): pass", "n": "from m import B as X\nclass C(X): pass"},
        {"m.A": 0, "m.B": 1, "n.C": 2},
    ),
    "generic": ({"m": "class A(Generic[T]): pass\nclass B(A[int]): pass"}, {"m.A": 0, "m.B": 1}),
    "the same name elsewhere": (
        {"m": "class A: pass\nclass B(A): pass", "n": "from other import B\nclass C(B): pass"},
        {"m.A": 0, "m.B": 1, "n.C": 0},
    ),
}


@pytest.mark.parametrize(("files", "expected"), DEPTHS.values(), ids=DEPTHS)
def test_the_check_of_depth_counts_our_classes_in_a_line(files, expected):
    assert depths([module(f"{name}.py", source) for name, source in files.items()]) == expected


def test_no_class_is_deeper_than_one_outside_the_tree_of_errors():
    found = depths([each for each in EVERYTHING if not is_generated(each.path)])
    deep = {name: depth for name, depth in found.items() if depth > MAX_DEPTH}
    assert {name: depth for name, depth in deep.items() if not name.startswith("fedge.errors.")} == {}


def test_the_checks_see_the_project():
    assert {"fedge.round", "fedge.vector", "fedge.wire"} <= {each.name for each in PROJECT["fedge"]}
    assert "fedge_strategies.fedavg" in {each.name for each in PROJECT["fedge_strategies"]}
    assert "fedge_client.torch.flat" in {each.name for each in PROJECT["fedge_client"]}
    assert "fedge_server.driver" in {each.name for each in PROJECT["fedge_server"]}
    assert "fedge_sim" in {each.name for each in PROJECT["fedge_sim"]}
    assert depths(EVERYTHING)["fedge.run.Work"] == 1
    assert depths(EVERYTHING)["fedge.errors.LimitError"] == 3
