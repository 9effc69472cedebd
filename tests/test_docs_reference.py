"""The reference equals the code: every key, command, exit code, refusal and limit, and nothing else."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import click
import pytest
import typer
from pydantic import BaseModel, TypeAdapter

from fedge import errors
from fedge.cli import app
from fedge.errors import FedgeError
from fedge.history import Row
from fedge.refusal import RefusalCode
from fedge.run import RunConfig
from fedge.simulation import Spread
from fedge.wire import fedge_pb2, limits
from fedge_client.settings import ClientSettings
from fedge_server.settings import AdminSettings, ServerSettings
from fedge_sim.record import Moment, Seen

REFERENCE = Path(__file__).parents[1] / "docs/reference"
FILES: dict[str, tuple[str, type[BaseModel]]] = {
    "run.toml": ("run-toml.md", RunConfig),
    "server.toml": ("server-toml.md", ServerSettings),
    "admin.toml": ("server-toml.md", AdminSettings),
    "client.toml": ("client-toml.md", ClientSettings),
}

Cells = list[str]


def tables(page: str) -> dict[str, list[Cells]]:
    """The rows of each heading's table, without backticks; the first row is the table's head."""
    out: dict[str, list[Cells]] = {}
    heading = ""
    for line in (REFERENCE / page).read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").replace("`", "")
        elif line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line):
            cells = [cell.strip().replace("`", "") for cell in line.strip("|").split("|")]
            out.setdefault(heading, []).append(cells)
    return out


def rows(page: str, heading: str) -> list[Cells]:
    return tables(page)[heading][1:]


# Types and defaults in words.


def describe(schema: dict[str, Any]) -> str:
    """A JSON schema as a table says it: "integer ≥ 1, ≤ 64", '"iid" or "task"'."""
    if "anyOf" in schema:
        return " or ".join(describe(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return " or ".join(f'"{value}"' for value in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return f"[{', '.join(describe(each) for each in schema['prefixItems'])}]"
    if schema["type"] == "array":
        return f"list of {describe(schema['items'])}{'' if 'enum' in schema['items'] else 's'}"
    if schema["type"] == "object":
        return "table"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {number(schema[key])}" for key, sign in signs.items() if key in schema]
    return f"{schema['type']} {', '.join(bounds)}".strip()


def number(value: float) -> str:
    """A number as people write it: powers of two as such."""
    for plus, suffix in ((0, ""), (1, " - 1")):
        power = int(value) + plus
        if value == int(value) and power >= 1 << 20 and power & (power - 1) == 0:
            return f"2^{power.bit_length() - 1}{suffix}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def default_of(cell: str) -> object:
    return None if cell == "none" else tomllib.loads(f"value = {cell}")["value"]


@dataclasses.dataclass(frozen=True)
class Key:
    """A key as the code has it."""

    type: str
    required: bool
    default: object


def keys_of(model: type[BaseModel]) -> dict[str, Key]:
    """The keys of one table, without the tables inside it."""
    out = {}
    for name, field in model.model_fields.items():
        if table_of(field.annotation):
            continue
        annotation = field.annotation
        for each in field.metadata:
            annotation = Annotated[annotation, each]  # type: ignore[valid-type]
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, tuple):  # as TOML has it
            default = list(default)
        if is_quantity(annotation):
            value = default.values[0] if isinstance(default, Spread) else None
            out[name] = Key("quantity", field.is_required(), value)
            continue
        out[name] = Key(describe(TypeAdapter(annotation).json_schema()), field.is_required(), default)
    return out


def is_quantity(annotation: object) -> bool:
    """Whether a key is a number or a table of how it is spread."""
    return annotation is Spread or any(map(is_quantity, get_args(annotation)))


def table_of(annotation: object) -> type[BaseModel] | None:
    """The table that a key is, be it one that may be left out."""
    if is_quantity(annotation):
        return None
    for each in get_args(annotation) or (annotation,):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def assert_documented(found: list[Cells], keys: dict[str, Key]) -> None:
    assert [cells[0] for cells in found] == list(keys), "every key once, in the order of the code"
    for name, kind, default, meaning in found:
        assert kind.startswith(keys[name].type), f"{name}: is of type {keys[name].type}"
        assert (default == "required") == keys[name].required, name
        assert keys[name].required or default_of(default) == keys[name].default, name
        assert meaning, name


def tables_inside(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Every table below this one, by its dotted name."""
    out: dict[str, type[BaseModel]] = {}
    for name, field in model.model_fields.items():
        if table := table_of(field.annotation):
            out[name] = table
            out |= {f"{name}.{inner}": kind for inner, kind in tables_inside(table).items()}
    return out


@pytest.mark.parametrize("file", FILES)
def test_every_key_is_documented_with_its_type_and_default(file: str) -> None:
    page, model = FILES[file]
    assert_documented(rows(page, file), keys_of(model))
    for name, inner in tables_inside(model).items():
        if keys_of(inner):
            assert_documented(rows(page, f"[{name}]"), keys_of(inner))
        else:
            assert f"`[{name}]`" in (REFERENCE / page).read_text()


@pytest.mark.parametrize("page", sorted({page for page, _ in FILES.values()}))
def test_no_table_is_documented_that_does_not_exist(page: str) -> None:
    real = {name for other, model in FILES.values() if other == page for name in tables_inside(model)}
    assert {heading for heading in tables(page) if heading.startswith("[")} <= {f"[{name}]" for name in real}


@pytest.mark.parametrize("entry", entry_points(group="fedge.strategies"), ids=lambda entry: entry.name)
def test_every_strategy_is_documented_with_its_fields(entry: Any) -> None:
    kind = entry.load()
    hints = get_type_hints(kind, include_extras=True)
    keys = {
        field.name: Key(
            describe(TypeAdapter(hints[field.name]).json_schema()),
            field.default is dataclasses.MISSING,
            field.default,
        )
        for field in dataclasses.fields(kind)
    }
    assert_documented(rows("run-toml.md", entry.name), keys)


def test_a_table_that_differs_from_the_code_is_found_out() -> None:
    class Example(BaseModel):
        port: Annotated[int, typer.Option()] = 8443
        seed: int | None = None
        name: str

    keys = keys_of(Example)
    good = [
        ["port", "integer, a TCP port", "8443", "where"],
        ["seed", "integer", "none", "of the draw"],
        ["name", "string", "required", "who"],
    ]
    assert_documented(good, keys)
    for row, column, wrong in ((0, 0, "prt"), (0, 1, "number"), (0, 2, "8444"), (1, 2, "0"), (2, 2, '"a"')):
        bad = [list(cells) for cells in good]
        bad[row][column] = wrong
        with pytest.raises(AssertionError):
            assert_documented(bad, keys)
    with pytest.raises(AssertionError):
        assert_documented(good[:2], keys)


# Commands.


def commands(
    command: click.Command, path: tuple[str, ...] = ("fedge",)
) -> Iterator[tuple[str, click.Command]]:
    """Every command that can be called, with its full name."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, (*path, name))
    else:
        yield " ".join(path), command


COMMANDS = dict(commands(typer.main.get_command(app)))


def sections_of_commands() -> dict[str, str]:
    text = (REFERENCE / "cli.md").read_text()
    parts = re.split(r"^### `(fedge[^`]*)`$", text, flags=re.MULTILINE)
    return {
        name: re.split(r"^## ", body, flags=re.MULTILINE)[0]
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def test_every_command_is_documented() -> None:
    assert set(sections_of_commands()) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_documented(name: str) -> None:
    section = sections_of_commands()[name]
    documented = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", section)) - {"--help"}
    options = [each for each in COMMANDS[name].params if isinstance(each, click.Option)]
    assert documented == {option.opts[0] for option in options} - {"--help"}
    for argument in (each for each in COMMANDS[name].params if isinstance(each, click.Argument)):
        assert argument.make_metavar(click.Context(COMMANDS[name])) in section


# Errors, refusals, limits, rows.


def test_every_kind_of_error_is_documented_with_its_exit_code() -> None:
    kinds = {
        name: kind.exit_code
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, FedgeError)
    }
    documented = {name: int(code) for name, code, _ in rows("errors.md", "Kinds of error")}
    assert documented == kinds
    codes = {int(row[0]) for row in rows("errors.md", "Exit codes")}
    assert codes == {0, 130, *kinds.values()}


def test_every_refusal_is_documented() -> None:
    documented = {name: int(code) for code, name, _ in rows("errors.md", "Refusals")}
    assert documented == {code.name.lower(): int(code) for code in RefusalCode}


def test_every_limit_of_the_wire_is_documented() -> None:
    constants = {
        name: value
        for name, value in vars(limits).items()
        if name.isupper() and isinstance(value, int | float)
    }
    documented = {name: float(value.replace(" ", "")) for name, value, _ in rows("wire.md", "Limits")}
    assert documented == constants


def test_every_call_of_the_wire_is_documented() -> None:
    services = fedge_pb2.DESCRIPTOR.services_by_name
    calls = {f"{service}.{method}" for service in services for method in services[service].methods_by_name}
    assert {row[0] for row in rows("wire.md", "Calls")} == calls


def test_every_column_of_the_history_is_documented() -> None:
    names = [field.name for field in dataclasses.fields(Row)]
    assert [cells[0] for cells in rows("cli.md", "The history")] == names


def test_every_column_that_a_simulation_adds_is_documented() -> None:
    seen = Seen(Moment(1.0, 2.0, 3, 4), 0.5, {"loss": (0.1, 0.2)}).as_dict()
    assert [cells[0] for cells in rows("cli.md", "What a simulation adds")] == list(seen)


def test_every_test_that_a_promise_names_is_there():
    text = (REFERENCE / "promises.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "what happens" not in line]
    assert len(named) == len(rows) > 20, "each row names one test"
    for path, test in named:
        source = (REFERENCE.parents[1] / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {test}\(", source, re.MULTILINE), f"{path} has no {test}"
