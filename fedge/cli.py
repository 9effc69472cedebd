"""The `fedge` command: finds each role's commands by entry point and loads only the one that is asked for.

A role whose extras are not installed still shows up in `--help`, and says what to install.
"""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import click
import typer
from rich.markup import escape
from rich.text import Text
from typer.core import TyperGroup

from fedge import __version__
from fedge.console import plain_console
from fedge.errors import FedgeError

INTERRUPTED = 130
_GROUP = "fedge.commands"
_EXTRAS = {"torch": "torch", "sklearn": "demo"}
"""Which extra brings a module that not every installation has."""


class _Roles(TyperGroup):
    """Commands by entry point, loaded when they are used or listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _commands().get(cmd_name)
        if entry is None:
            return None
        try:
            loaded = entry.load()
        except ModuleNotFoundError as error:
            return _missing(cmd_name, error.name or "a package")
        command = typer.main.get_command(_as_app(loaded))
        command.name = cmd_name
        return command


app = typer.Typer(
    name="fedge",
    cls=_Roles,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated learning for edge fleets. Try `fedge demo`, or `fedge new my-project`.",
)


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True),
) -> None:
    if version:
        typer.echo(f"fedge {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the command line; exit code 0 only on success, and an error is one clear message, no traceback."""
    try:
        code = app(standalone_mode=False)
    except click.exceptions.Abort:
        code = INTERRUPTED
    except KeyboardInterrupt:
        plain_console(stderr=True).print("interrupted")
        code = INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except FedgeError as error:
        _print_error(str(error))
        code = error.exit_code
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise  # a defect in this program, or in what is installed
        _print_error(f"this command needs {error.name}: {_remedy(error.name)}")
        code = 1
    except BrokenPipeError:
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _print_error(text: str) -> None:
    console = plain_console(stderr=True)
    console.print(Text.assemble(("error:", "bold red"), " ", text))


def _commands() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=_GROUP)}


def _as_app(loaded: Any) -> typer.Typer:
    """A role offers a Typer app (a group of commands) or one function (a command)."""
    if isinstance(loaded, typer.Typer):
        return loaded
    single = typer.Typer(add_completion=False)
    single.command()(loaded)
    return single


def _remedy(module: str) -> str:
    return f"pip install 'fedge[{_EXTRAS[module]}]'" if module in _EXTRAS else "install fedge again"


def _missing(name: str, module: str) -> click.Command:
    def explain() -> None:
        raise click.ClickException(f"`fedge {name}` needs {module}: {_remedy(module)}")

    return click.Command(
        name,
        callback=explain,
        help=escape(f"(not installed: {_remedy(module)})"),
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
