"""`fedge` itself: it finds commands by entry point, loads little, and ends errors in one clear message."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest
import typer

import fedge
from fedge import cli
from fedge.errors import ConfigError, FedgeError, IdentityError, LinkError, RunError, TaskError

COMMANDS = {"client", "demo", "new", "run", "server", "simulate", "site"}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """What the shell would see of `fedge ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["fedge", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Make a module of some text, and a command `trial` of what it offers as `app`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def installed(text: str) -> None:
        (tmp_path / "trial_role.py").write_text(text)
        monkeypatch.delitem(sys.modules, "trial_role", raising=False)
        entry = EntryPoint("trial", "trial_role:app", "fedge.commands")
        monkeypatch.setattr(cli, "_commands", lambda: {"trial": entry})

    return installed


def test_the_version_is_the_packages(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"fedge {fedge.__version__}\n"


def test_the_help_lists_every_command_and_loads_no_torch():
    """In a process of its own: here torch may have been imported by other tests."""
    script = (
        "import sys; sys.argv = ['fedge', '--help']\n"
        "from fedge.cli import main\n"
        "try: main()\n"
        "except SystemExit as ended: code = ended.code\n"
        "assert 'torch' not in sys.modules, 'torch takes seconds'\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    listed = {
        line.split()[1] for line in done.stdout.splitlines() if line.startswith("│ ") and line[2] != " "
    }
    assert listed >= COMMANDS


def test_every_role_has_its_commands_as_an_entry_point():
    assert {entry.name for entry in entry_points(group="fedge.commands")} >= COMMANDS


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(monkeypatch, capsys, name):
    groups = [(name,)]
    while groups:
        command = groups.pop()
        assert run(monkeypatch, *command, "--help") == 0
        shown = capsys.readouterr().out
        if "Commands" not in shown:
            assert f"Example: fedge {' '.join(command)}" in shown
            continue
        subcommands = [
            line.split()[1] for line in shown.splitlines() if line.startswith("│ ") and line[2].isalpha()
        ]
        assert subcommands
        groups += [(*command, subcommand) for subcommand in subcommands]


def test_an_unknown_command_is_a_usage_error(monkeypatch, capsys):
    assert run(monkeypatch, "simulat") == 2
    assert "simulat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "code"),
    [(ConfigError, 2), (TaskError, 3), (LinkError, 4), (IdentityError, 5), (RunError, 1), (FedgeError, 1)],
)
def test_an_error_is_its_message_and_its_exit_code_without_a_traceback(
    monkeypatch, capsys, install, kind, code
):
    install(
        "from fedge import errors\n"
        f"def app() -> None: raise errors.{kind.__name__}('expected [a] \\\\[b], found [/c] :warning: do d')\n"
    )
    assert run(monkeypatch, "trial") == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: expected [a] \\[b], found [/c] :warning: do d\n"


def test_a_command_may_end_with_an_exit_code_of_its_own(monkeypatch, install):
    install("import typer\ndef app() -> None: raise typer.Exit(7)\n")
    assert run(monkeypatch, "trial") == 7
    install("def app() -> None: pass\n")
    assert run(monkeypatch, "trial") == 0


def test_ctrl_c_is_exit_code_130(monkeypatch, install):
    install("def app() -> None: raise KeyboardInterrupt\n")
    assert run(monkeypatch, "trial") == cli.INTERRUPTED == 130


def test_a_role_without_its_extra_is_still_listed_and_says_what_to_install(monkeypatch, capsys, install):
    missing = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"
    install(missing)
    assert run(monkeypatch, "--help") == 0
    assert "pip install 'fedge[torch]'" in " ".join(capsys.readouterr().out.split())
    assert run(monkeypatch, "trial", "run.toml", "--clients", "3") == 1
    assert capsys.readouterr().err == "Error: `fedge trial` needs torch: pip install 'fedge[torch]'\n"
    # The same for a command that imports it only when it has work for it.
    install(f"def app() -> None: {missing}\n")
    assert run(monkeypatch, "trial") == 1
    assert "needs torch: pip install 'fedge[torch]'" in capsys.readouterr().err


def test_a_role_with_a_broken_installation_does_not_name_an_extra_that_there_is_none_of(
    monkeypatch, capsys, install
):
    install("import no_such_package_at_all\n")
    assert run(monkeypatch, "trial") == 1
    assert (
        capsys.readouterr().err == "Error: `fedge trial` needs no_such_package_at_all: install fedge again\n"
    )


def test_a_defect_of_ours_keeps_its_traceback(monkeypatch, install):
    install("def app() -> None: import no_such_package_at_all\n")
    monkeypatch.setattr(sys, "argv", ["fedge", "trial"])
    with pytest.raises(ModuleNotFoundError):
        cli.main()


def test_a_role_may_be_a_group_of_commands(monkeypatch, capsys, install):
    install(
        "import typer\napp = typer.Typer(no_args_is_help=True)\n"
        "@app.command()\ndef one() -> None: typer.echo('uno')\n"
        "@app.command()\ndef two() -> None: typer.echo('due')\n"
    )
    assert run(monkeypatch, "trial", "two") == 0
    assert capsys.readouterr().out == "due\n"
    assert isinstance(cli.app, typer.Typer)
