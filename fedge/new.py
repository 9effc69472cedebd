"""`fedge new NAME`: a project that simulates and deploys as it is generated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from fedge.console import plain_console
from fedge.errors import ConfigError
from fedge.files import write_atomic

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_TEMPLATES = Path(__file__).parent / "templates"
_FILES = ("app.py", "run.toml", "README.md")


def new(
    name: Annotated[str, typer.Argument(help="The project's name, and its folder.")],
    folder: Annotated[Path, typer.Option("--dir", help="Where the project's folder goes.")] = Path(),
) -> None:
    """Make a new project: a task, a run file and a README, ready to simulate and to deploy.

    Example: fedge new pump-faults
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"expected a name of 1 to 63 small letters, digits and inner hyphens, found {name[:80]!r}"
        )
    project = folder / name
    try:
        project.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"expected a new folder, found {project} there already: choose another name"
        ) from None
    except OSError as error:
        raise ConfigError(f"{project}: cannot be made: {error.strerror}") from None
    for file in _FILES:
        text = (_TEMPLATES / f"{file}.template").read_text(encoding="utf-8")
        write_atomic(project / file, text.replace("{{name}}", name))
    console = plain_console()
    console.print(f"{project} is ready: app.py (your task), run.toml, README.md")
    console.print(f"  cd {project} && fedge simulate run.toml")
