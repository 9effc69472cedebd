"""Where commands print: what files, peers and tasks say is shown as it is."""

from __future__ import annotations

from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Column

_PIPED_COLUMNS: Final = 200
"""For the tables that no terminal shows."""

_BAR_COLUMNS: Final = 20


def plain_console(*, stderr: bool = False) -> Console:
    """A console that takes nothing in a text for markup, colours no numbers, and leaves it to the terminal to wrap
    lines: in a pipe or a file each stays one, and a command can be copied."""
    console = Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = max(console.width, _PIPED_COLUMNS)
    return console


def live_progress(console: Console, *more: ProgressColumn, live: bool) -> Progress:
    """A line for each task: how many of its `total` are done, in what time, `more`, and the task's field "note", which
    is cut where the terminal ends. Without `live` nothing is shown."""
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(_BAR_COLUMNS),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *more,
        TextColumn("{task.fields[note]}", markup=False, table_column=rest),
        console=console,
        disable=not live,
        expand=True,
    )
