"""What commands print is what files, peers and tasks have said, and a line is a line."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from fedge.console import live_progress, plain_console


@pytest.mark.parametrize("stderr", [False, True])
def test_a_text_is_shown_as_it_is_and_in_one_line(capsys: pytest.CaptureFixture[str], stderr: bool) -> None:
    text = "mirrored_sgd: [work] epochs and :smile: [/] [red]do not[/red] apply 3.5 " + 40 * "word " + "end"
    plain_console(stderr=stderr).print(text)
    found = capsys.readouterr()
    assert (found.err if stderr else found.out) == text + "\n"


def test_so_are_the_cells_and_headings_of_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("[bold]metric", "value")
    table.add_row("[/]", "[red]1")
    plain_console().print(table)
    found = capsys.readouterr().out
    assert all(text in found for text in ("[bold]metric", "[/]", "[red]1"))


def test_a_table_that_is_piped_is_as_wide_as_what_it_holds(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"a metric of number {number}" for number in range(8)]
    plain_console().print(Table(*names, box=None))
    assert "  ".join(names) in capsys.readouterr().out


def test_a_narrow_terminal_cuts_the_note_and_not_the_numbers() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system=None, width=80)
    with live_progress(console, live=True) as progress:
        progress.add_task("a-run", total=150, completed=137, note="[/] 2 clients " + 20 * "metric 0.1234  ")
    lines = [line for line in shown.getvalue().replace("\r", "\n").split("\n") if "a-run" in line]
    assert all("137/150" in line and "[/] 2 clients metric" in line and "…" in line for line in lines)
    assert lines


def test_without_somebody_who_looks_on_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with live_progress(plain_console(), live=False) as progress:
        progress.add_task("a-run", total=3, note="")
    assert capsys.readouterr().out == ""
