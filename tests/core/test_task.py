"""How a task is found by name: from its folder first, by its own name, or not at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedge import Site, Task
from fedge.errors import ConfigError, TaskError
from fedge.task import load_framework, load_task

APP = "from fedge import Task\ntask = Task(model={0!r}, data=None, loss=None)\n"


@pytest.fixture(autouse=True)
def clean_imports() -> Iterator[None]:
    modules, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def project(folder: Path, module: str = "trial_app", mark: str = "") -> Path:
    file = folder / f"{module.replace('.', '/')}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(APP.format(mark or folder.name))
    return folder


def test_a_task_is_imported_from_its_folder(tmp_path: Path):
    folder = project(tmp_path / "one")
    assert load_task("trial_app:task", path=folder).model == "one"
    assert load_task("trial_app:task", path=folder).model == "one", "and again"
    assert load_task("trial_pkg.inner:task", path=project(tmp_path, "trial_pkg.inner")).model == tmp_path.name


def test_the_folder_comes_before_the_usual_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(project(tmp_path / "installed")))
    assert load_task("trial_app:task", path=project(tmp_path / "site")).model == "site"


def test_without_a_folder_or_not_in_it_it_is_the_usual_import_path(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(project(tmp_path / "installed")))
    (tmp_path / "empty").mkdir()
    assert load_task("trial_app:task", path=tmp_path / "empty").model == "installed"
    assert load_task("trial_app:task").model == "installed"


def test_a_second_project_with_a_module_of_the_same_name_is_not_silently_the_first(tmp_path: Path):
    load_task("trial_app:task", path=project(tmp_path / "one"))
    with pytest.raises(
        TaskError, match=r"one/trial_app\.py under that name; rename one, or use a process for"
    ):
        load_task("trial_app:task", path=project(tmp_path / "two"))
    assert load_task("trial_app:task", path=tmp_path / "one").model == "one"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("trial_app", "expected a task named 'module:attribute', found 'trial_app'"),
        (":task", "expected a task named 'module:attribute'"),
        ("trial_app:", "expected a task named 'module:attribute'"),
        ("trial_none:task", "cannot import task 'trial_none:task' .searched .*: ModuleNotFoundError"),
        ("trial_app:none", "cannot import task 'trial_app:none' .*: AttributeError"),
        ("trial_app:Task", "expected 'trial_app:Task' to be a fedge.Task, found a type"),
        ("trial_bad:task", "cannot import task 'trial_bad:task' .*: ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_task_is_said_in_words(tmp_path: Path, name: str, says: str):
    (project(tmp_path) / "trial_bad.py").write_text("1 / 0")
    with pytest.raises(TaskError, match=says):
        load_task(name, path=tmp_path)


def test_a_folder_that_is_not_there_is_said_so(tmp_path: Path):
    with pytest.raises(TaskError, match=r"expected the folder of the task's code at .*none, found none"):
        load_task("trial_app:task", path=tmp_path / "none")


def test_a_framework_is_found_by_name_or_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"no training framework named 'jax' .*'fedge\[torch\]'"):
        load_framework("jax")
    for module in [name for name in sys.modules if name.startswith(("torch", "fedge_client.torch"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"needs torch: pip install 'fedge\[torch\]'"):
        load_framework()


def test_a_site_and_a_task_are_values():
    assert Site("a", index=1, count=2) == Site("a", index=1, count=2)
    task = Task(model=int, data=int, loss=int)
    with pytest.raises(AttributeError):
        task.loss = float  # type: ignore[misc,assignment]  # that it cannot be set is the point
