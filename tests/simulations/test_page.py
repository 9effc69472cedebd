"""The report of a simulation: one page that needs nothing else, made of what lies in results folders."""

from __future__ import annotations

import base64
import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from fedge import RunConfig
from fedge.errors import ConfigError
from fedge.history import Row
from fedge.vector import Layout, Model, Tensor
from fedge_sim import Result
from fedge_sim.command import _page
from fedge_sim.page import write_page
from fedge_sim.record import Moment, Seen
from fedge_sim.report import write_results
from fedge_sim.told import Told

LAYOUT = Layout((Tensor("w", (2,)),))


def row(round: int, **fields: Any) -> Row:
    known: dict[str, Any] = {"attempt": 1, "clients": ("a", "b"), "num_examples": 9, "seconds": 0.5}
    known |= {"bytes_down": 10**6, "bytes_up": 10**6, "refused": 0, "metrics": {"loss": 1 / round}}
    return Row(round, **(known | fields))


def results(folder: Path, *rows: Row, name: str = "trial", **fields: Any) -> Path:
    """A folder as `fedge simulate` writes it."""
    table = {"name": name, "task": "app:task", "rounds": 3, "seed": 5}
    run = RunConfig.from_table(table, source="run.toml")
    model = Model(np.zeros(2, np.float32), LAYOUT)
    folder.mkdir(parents=True)
    write_results(folder, Result(run, 4, rows, model, "done", strategy="FedAvg()", **fields))
    return folder


def page_of(tmp_path: Path, *folders: Path) -> str:
    write_page(tmp_path / "report.html", folders)
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def pictures(page: str) -> dict[str, str]:
    """The words in each picture, by its title."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/svg\+xml;base64,([^"]*)">', page)
    trees = {title: ET.fromstring(base64.b64decode(data)) for title, data in found}
    return {title: " ".join("".join(tree.itertext()).split()) for title, tree in trees.items()}


def test_the_page_shows_what_the_results_say_and_needs_nothing_else(tmp_path: Path):
    rows = row(1), row(2, metrics={"loss": 0.5, "accuracy": 0.75}), row(3, refused=2)
    page = page_of(tmp_path, results(tmp_path / "a", *rows))
    assert "FedAvg()" in page
    assert 'task = "app:task"' in page.replace("&#34;", '"')
    assert not re.findall(r"<script|<link|https?://(?!www.w3.org)", page)
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    drawn = pictures(page)
    assert {"loss by round", "accuracy by bytes", "participation", "time of a round"} <= drawn.keys()
    assert "what failed or was refused in a round" in drawn
    assert "attempts at a round" not in drawn, "there was one each"
    assert "MB sent" in drawn["loss by bytes"]


def test_the_same_results_make_the_same_page(tmp_path: Path):
    folder = results(tmp_path / "a", row(1), row(2))
    assert page_of(tmp_path, folder) == page_of(tmp_path, folder)


def test_runs_are_laid_side_by_side_by_their_folders_names(tmp_path: Path):
    one, two = results(tmp_path / "mean", row(1)), results(tmp_path / "median", row(1), row(2))
    page = page_of(tmp_path, one, two)
    assert "mean and median" in page
    assert "mean median" in pictures(page)["loss by round"]
    again = results(tmp_path / "other" / "mean", row(1))
    assert f"{one} {again}" in pictures(page_of(tmp_path, one, again))["loss by round"]


def test_numbers_of_the_history_are_those_of_the_pictures(tmp_path: Path):
    told = Told.of(
        results(tmp_path / "a", row(1, clients=("a",)), row(2), row(3, metrics={"loss": float("nan")})),
        label="a",
    )
    assert told.sent_mb == [2.0, 4.0, 6.0]
    assert told.turns == {0: 2, 2: 1, 3: 1}, "of four clients two were never asked"
    assert told.metric("loss")[:2] == [1.0, 0.5]
    assert np.isnan(told.metric("loss")[2])


def test_names_are_words_and_no_html(tmp_path: Path):
    folder = results(
        tmp_path / "a", row(1, metrics={"<b>f1</b> & $\\frac{$": 0.5}), reason="<script>alert(1)</script>"
    )
    page = page_of(tmp_path, folder)
    assert "<script>" not in page
    assert "<b>f1" not in page


def test_a_simulation_that_came_to_nothing_has_a_page(tmp_path: Path):
    page = page_of(tmp_path, results(tmp_path / "a", reason="nobody came"))
    assert "nobody came" in page
    assert "participation" in pictures(page)


LINE = row(1).as_dict()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("manifest.json", ""),
        ("manifest.json", "[]"),
        ("manifest.json", '{"summary": {}, "run": {}, "versions": {}}'),
        ("manifest.json", '{"summary": {"name": "a", "clients": Infinity}, "run": {}, "versions": {}}'),
        ("manifest.json", '{"summary": ' + "[" * 100_000),
        ("history.jsonl", '{"round": 1}\n'),
        ("history.jsonl", '{"round": 1, "attempt": 1, "seco'),
        *(
            ("history.jsonl", json.dumps(LINE | changes))
            for changes in (
                {"metrics": 5},
                {"metrics": {"loss": "abc"}},
                {"metrics": {"loss": [1]}},
                {"metrics": {"loss": 10**400}},
                {"seconds": None},
                {"bytes_up": "1"},
                {"bytes_up": -1},
                {"clients": [{}]},
            )
        ),
    ],
)
def test_results_that_are_damaged_are_refused_by_name(tmp_path: Path, file: str, content: str):
    folder = results(tmp_path / "a", row(1))
    (folder / file).write_text(content)
    with pytest.raises(ConfigError, match="expected the results of `fedge simulate`"):
        write_page(tmp_path / "report.html", [folder])
    assert not (tmp_path / "report.html").exists()


def test_numbers_that_no_picture_can_show_are_left_out(tmp_path: Path):
    rows = row(1, metrics={"loss": 1e308}), row(2, metrics={"loss": -1e308}), row(3)
    assert "loss by round" in pictures(page_of(tmp_path, results(tmp_path / "a", *rows)))


def test_a_folders_name_is_shown_whatever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, two = results(tmp_path / "_a", row(1)), results(tmp_path / "b", row(1))
    monkeypatch.chdir(two)
    drawn = pictures(page_of(tmp_path, one, Path(), one))  # and the same one once
    for picture in ("loss by round", "participation"):
        assert re.search(r"_a\s+b$", drawn[picture])


def test_a_folder_without_results_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="expected a file, found none"):
        write_page(tmp_path / "report.html", [tmp_path])


def test_without_what_draws_it_there_is_no_report_and_it_is_said_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delitem(sys.modules, "fedge_sim.page")
    monkeypatch.delitem(sys.modules, "fedge_sim.figures")
    monkeypatch.delattr("fedge_sim.page")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"it needs matplotlib; pip install 'fedge\[report\]'"):
        _page()


def test_the_page_shows_what_only_a_simulation_sees(tmp_path: Path):
    seen = tuple(
        Seen(Moment(1800.0 * n, 50.0 * n, n, 4 - n), 0.5 * n, {"loss": (0.1 / n, 2.0 / n)}) for n in (1, 2, 3)
    )
    labels = {"client-0": {0: 5, 1: 2}, "client-1": {1: 9}}
    rows = [row(n, metrics={"loss": 1 / n, "accuracy": 0.5}) for n in (1, 2, 3)]
    folder = results(tmp_path / "a", *rows, seen=seen, labels=labels)
    drawn = pictures(page_of(tmp_path, folder))
    assert "hours" in drawn["loss by virtual time"]
    assert "mean of all lowest tenth highest tenth" in drawn["loss: clients with the lowest and the highest"]
    assert "training examples" in drawn["classes of the first 2 clients"]
    assert not any("lowest" in title for title in drawn if "accuracy" in title), "of what nobody judged"
    assert {
        "privacy spent by a round, the client with the least left",
        "energy of all devices by a round",
        "orders called off or lost by a round",
        "clients that were there",
    } <= drawn.keys()
    told = Told.of(folder, label="a")
    assert told.hours == [0.5, 1.0, 1.5]
    assert told.metric("loss", "lowest_tenth") == pytest.approx([0.1, 0.05, 0.1 / 3])
    beside = page_of(tmp_path, folder, results(tmp_path / "plain", row(1)))
    assert "classes of the first 2 clients of a" in pictures(beside)


def test_without_virtual_time_privacy_or_classes_nothing_of_them_is_drawn(tmp_path: Path):
    drawn = pictures(page_of(tmp_path, results(tmp_path / "a", row(1), row(2))))
    assert not any("virtual" in title or "energy" in title or "classes" in title for title in drawn)
    assert not any("privacy" in title for title in drawn)
