"""Where commands print: what files, peers and tasks say is shown as it is."""

from __future__ import annotations

from rich.console import Console


def plain_console(*, stderr: bool = False) -> Console:
    """A console that takes nothing in a text for markup, colours no numbers, and leaves it to the terminal to wrap
    lines: in a pipe or a file each stays one, and a command can be copied."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)
