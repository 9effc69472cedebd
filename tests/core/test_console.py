"""What commands print is what files, peers and tasks have said, and a line is a line."""

from __future__ import annotations

import pytest
from rich.table import Table

from fedge.console import plain_console


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
