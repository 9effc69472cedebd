"""`fedge new`: the project that it makes simulates as it is, and nothing is ever overwritten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedge.errors import ConfigError
from fedge.new import new
from fedge.run import RunConfig


def test_a_new_project_has_its_name_in_it_and_no_blanks_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    new("pump-faults", folder=tmp_path)
    project = tmp_path / "pump-faults"
    assert sorted(path.name for path in project.iterdir()) == ["README.md", "app.py", "run.toml"]
    for path in project.iterdir():
        text = path.read_text(encoding="utf-8")
        assert "pump-faults" in text
        assert "{{" not in text
    run = RunConfig.load(project / "run.toml")
    assert (run.name, run.task) == ("pump-faults", "app:task")
    assert run.notes() == []
    assert f"  cd {project} && fedge simulate run.toml\n" in capsys.readouterr().out, "can be copied as it is"


def test_a_new_project_simulates_as_generated_and_learns(tmp_path: Path):
    """In a process of its own: it imports a module named `app`, of which a process has only one."""
    new("pump-faults", folder=tmp_path)
    script = (
        "import sys\n"
        "from fedge_sim import simulate\n"
        "result = simulate(sys.argv[1])\n"
        "first, last = result.history[0].metrics, result.history[-1].metrics\n"
        "assert result.status == 'done', result.reason\n"
        "assert last['accuracy'] > first['accuracy'] + 0.1, (first, last)\n"
        "assert last['loss'] < first['loss'], (first, last)\n"
    )
    run_toml = str(tmp_path / "pump-faults" / "run.toml")
    command = [sys.executable, "-W", "error", "-c", script, run_toml]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["a", "a1", "0", "a-b-c", "x" * 63])
def test_a_name_is_what_a_run_may_be_called(tmp_path: Path, name: str):
    new(name, folder=tmp_path / "not" / "yet")
    assert RunConfig.load(tmp_path / "not" / "yet" / name / "run.toml").name == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", "A", "a_b", "a/b", "..", "a b", "x" * 64, "\N{LATIN SMALL LETTER E WITH ACUTE}", "a\n"],
)
def test_another_name_is_refused_before_anything_is_made(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match="expected a name of 1 to 63 small letters"):
        new(name, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_left_as_it_is(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "app.py").write_text("my work")
    with pytest.raises(ConfigError, match="expected a new folder"):
        new("mine", folder=tmp_path)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["app.py"]
    assert (tmp_path / "mine" / "app.py").read_text() == "my work"


def test_a_place_where_no_folder_can_be_is_said_in_words(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made: Not a directory"):
        new("mine", folder=tmp_path / "file" / "below")
