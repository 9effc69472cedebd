"""What users install is what lies here: the wheel's content, and that generated code is current."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from fedge import __version__

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "fedge": ROOT / "fedge",
    "fedge_strategies": ROOT / "strategies/fedge_strategies",
    "fedge_server": ROOT / "server/fedge_server",
    "fedge_client": ROOT / "client/fedge_client",
    "fedge_flower": ROOT / "flower/fedge_flower",
    "fedge_sim": ROOT / "simulations/fedge_sim",
}
PROTOS = ("fedge/wire/fedge.proto", "client/fedge_client/pipe.proto")
BIN = Path(sys.executable).parent
COMMAND_S = 110


def sources(package: str) -> set[str]:
    """The files of a package, by the names that they have in a wheel."""
    folder = PACKAGES[package]
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {f"{package}/{path.relative_to(folder).as_posix()}" for path in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    options = "--quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options.split(), "--wheel-dir", str(folder), str(ROOT)],
        check=True,
        timeout=COMMAND_S,
    )
    (built,) = folder.glob("*.whl")
    assert built.name == f"fedge-{__version__}-py3-none-any.whl"
    return zipfile.ZipFile(built)


@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_the_wheel_has_every_file_of_every_package(wheel: zipfile.ZipFile, package: str) -> None:
    found = {name for name in wheel.namelist() if name.startswith(f"{package}/")}
    assert found == sources(package)
    assert f"{package}/py.typed" in found


@pytest.mark.slow
def test_the_wheel_has_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {*PACKAGES, f"fedge-{__version__}.dist-info"}
    assert f"fedge-{__version__}.dist-info/licenses/LICENSE" in wheel.namelist()


@pytest.mark.slow
def test_the_wheel_has_what_is_no_python(wheel: zipfile.ZipFile) -> None:
    expected = {
        "fedge/templates/app.py.template",
        "fedge/templates/run.toml.template",
        "fedge/templates/README.md.template",
        "fedge/wire/fedge.proto",
        "fedge/wire/fedge_pb2.pyi",
        "fedge_client/pipe.proto",
        "fedge_sim/demo/fedavg.toml",
    }
    assert expected <= set(wheel.namelist())


@pytest.mark.slow
def test_the_entry_points_of_the_wheel_are_those_of_the_project(wheel: zipfile.ZipFile) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parser = configparser.ConfigParser(delimiters="=")
    parser.read_string(wheel.read(f"fedge-{__version__}.dist-info/entry_points.txt").decode())
    found = {section: dict(parser[section]) for section in parser.sections()}
    assert found == {"console_scripts": project["scripts"], **project["entry-points"]}


@pytest.mark.parametrize("group", ["fedge.commands", "fedge.strategies", "fedge.frameworks"])
def test_every_entry_point_leads_somewhere(group: str) -> None:
    entries = entry_points(group=group)
    assert entries
    for entry in entries:
        assert entry.load() is not None


def test_generated_code_is_what_make_proto_makes(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for proto in PROTOS:
        (tmp_path / proto).parent.mkdir(parents=True)
        shutil.copy(ROOT / proto, tmp_path / proto)
    # `-o`: the environment is there already, whatever made it.
    subprocess.run(
        ["make", "--silent", "-o", ".venv/.ready", f"BIN={BIN}", "proto"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},
        check=True,
        timeout=COMMAND_S,
    )
    made = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*_pb2*")}
    committed = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for folder in PACKAGES.values()
        for path in folder.rglob("*_pb2*.py*")
        if "__pycache__" not in path.parts
    }
    assert set(made) == set(committed)
    assert [name for name in sorted(made) if made[name] != committed[name]] == [], "run `make proto`"
