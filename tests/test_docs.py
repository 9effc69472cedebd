"""The documentation is true: what it shows runs and prints what it says, and its links lead somewhere.

How a fenced block is marked says what is done with it here:

    ```bash                                     runs, in the page's folder and shell, in order
    ```bash background=coordinator wait="ready" one command that goes on running; wait until it says so
    ```bash not-run                             only parsed: it needs another machine
    ```python                                   runs, in the same order
    ```python file=app.py                       is written to that file (so may be any other language)
    ```toml run                                 is a run.toml, or a part of one (server, client, admin)
    ```text                                     what the block before it prints; `...` stands for anything
"""

from __future__ import annotations

import doctest
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import typer

from fedge.cli import app
from fedge.config import Config, build
from fedge.run import RunConfig
from fedge.strategy import load_strategy
from fedge_client.settings import ClientSettings
from fedge_server.settings import AdminSettings, ServerSettings

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ROLES = ("fedge", "strategies", "server", "client", "flower", "simulations")
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / role / "README.md" for role in ROLES),
    ROOT / "fedge/templates/README.md.template",
]
LANGUAGES = {"bash", "python", "toml", "text", "mermaid"}
TABLES: dict[str, tuple[type[Config], dict[str, object]]] = {
    "run": (RunConfig, {"name": "part", "task": "app:task", "rounds": 1}),
    "server": (ServerSettings, {"listen": "127.0.0.1:8443"}),
    "client": (ClientSettings, {"server": "127.0.0.1:8443"}),
    "admin": (AdminSettings, {"server": "127.0.0.1:8443"}),
}
RUN_S = 300
END_S = 30

_FENCE = re.compile(r"^```(\S*)[ ]?([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"^(?:\w+=)?(fedge (?:\\\n|[^\n|&>])*)", re.MULTILINE)
_SUBSTITUTION = re.compile(r"\$\(([^()]*)\)")
_INLINE_COMMAND = re.compile(r"`(fedge(?: [a-z]+)+)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(rf"`((?:{'|'.join(ROLES)}|tests|benchmarks|docs)/[\w./-]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its marks (`name` or `name=value`), its text."""

    page: Path
    line: int
    language: str
    marks: dict[str, str]
    text: str

    @property
    def runs(self) -> bool:
        return self.language in ("bash", "python") and "not-run" not in self.marks

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    source = page.read_text()
    for match in _FENCE.finditer(source):
        language, info, text = match.groups()
        if page.suffix == ".template":  # what users are given carries no marks of ours
            language, info = "bash", "not-run"
        words = (word.partition("=") for word in shlex.split(info))
        line = source.count("\n", 0, match.start()) + 1
        yield Block(page, line, language, {name: value for name, _, value in words}, text)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


EVERY_BLOCK = [block for page in PAGES for block in blocks(page)]
RUNNING_PAGES = sorted({relative(block.page) for block in EVERY_BLOCK if block.runs})


# What is shown runs.

_PRELUDE = """\
set -euo pipefail
declare -A background
finish() {
  code=$?
  for name in "${!background[@]}"; do
    kill "${background[$name]}" 2>/dev/null || true
    wait "${background[$name]}" || { echo "$name ended with $?" >&2; code=1; }
  done
  exit $code
}
trap finish EXIT
wait_for() {  # the file, what is to be in it, the process that writes it
  for ((tenths = 0; tenths < 900; tenths++)); do
    if grep -qF -- "$2" "$1"; then return; fi
    kill -0 "$3" || return 1
    sleep 0.1
  done
  return 1
}
"""


def script_of(page: list[Block], notes: Path) -> str:
    """One bash script that does what the page shows; each block's output goes to `notes`."""
    lines = [_PRELUDE]
    for number, block in enumerate(page):
        out = shlex.quote(str(notes / f"{number}.out"))
        if "file" in block.marks:
            source = notes / f"{number}.file"
            source.write_text(block.text)
            lines.append(f"cp {shlex.quote(str(source))} {shlex.quote(block.marks['file'])}")
        elif not block.runs:
            continue
        elif block.language == "python":
            lines.append(f"python -c {shlex.quote(block.text)} > {out} 2>&1")
        elif name := block.marks.get("background"):
            lines.append(f"(exec {block.text.strip()}) > {out} 2>&1 &")
            lines.append(f"background[{name}]=$!")
            lines.append(f"wait_for {out} {shlex.quote(block.marks['wait'])} $!")
        else:
            lines.append(f"{{\n{block.text}}} > {out} 2>&1")
    return "\n".join(lines) + "\n"


def run_script(script: str, folder: Path) -> tuple[int, str]:
    """Run it, and leave nothing behind: every process is of a session that begins here."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "100",
    }
    process = subprocess.Popen(
        ["bash", "-c", script],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=RUN_S)
    except BaseException:
        os.killpg(process.pid, signal.SIGTERM)  # the group is this session's; its leader is not yet reaped
        try:
            process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        raise
    return process.returncode, out


def said(notes: Path) -> str:
    parts = sorted(notes.glob("*.out"), key=lambda path: int(path.stem))
    return "\n".join(f"--- block {part.stem}\n{part.read_text()[-3000:]}" for part in parts)


@pytest.mark.slow
@pytest.mark.timeout(RUN_S + 2 * END_S)
@pytest.mark.parametrize("name", RUNNING_PAGES)
def test_what_a_page_shows_runs_and_prints_what_it_says(name: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    page = [
        Block(block.page, block.line, block.language, block.marks, block.text.replace("8443", port))
        for block in EVERY_BLOCK
        if block.page == ROOT / name
    ]
    notes, folder = tmp_path / "notes", tmp_path / "page"
    notes.mkdir()
    folder.mkdir()
    code, out = run_script(script_of(page, notes), folder)
    assert code == 0, f"exit code {code}: {out}\n{said(notes)}"
    for number, block in enumerate(page[1:], start=1):
        if block.language == "text" and page[number - 1].runs:
            assert_prints(block, (notes / f"{number - 1}.out").read_text())


def assert_prints(block: Block, found: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if not doctest.OutputChecker().check_output(block.text, found, flags):
        pytest.fail(f"{block}: expected\n{block.text}\nfound\n{found}")


def test_a_page_that_shows_something_false_fails(tmp_path: Path) -> None:
    page = [
        Block(
            ROOT / "README.md",
            1,
            "bash",
            {"background": "sleeper", "wait": "up"},
            "sh -c 'echo up; sleep 60'",
        ),
        Block(ROOT / "README.md", 2, "bash", {}, "cd /\nfalse\n"),
        Block(ROOT / "README.md", 3, "bash", {}, "echo never\n"),
    ]
    code, out = run_script(script_of(page, tmp_path), tmp_path)
    assert code == 1
    assert "sleeper ended with 143" in out
    assert not (tmp_path / "2.out").exists()
    with pytest.raises(pytest.fail.Exception):
        assert_prints(Block(ROOT / "README.md", 4, "text", {}, "up\n...\ndown\n"), "up\nup\n")


# What is not run is at least well-formed.


@pytest.mark.parametrize("block", EVERY_BLOCK, ids=str)
def test_every_block_is_marked_as_something_that_is_checked(block: Block) -> None:
    assert block.language in LANGUAGES
    assert block.language != "toml" or TABLES.keys() & block.marks.keys(), "which file is it of?"


@pytest.mark.parametrize("block", [b for b in EVERY_BLOCK if b.language == "toml"], ids=str)
def test_every_toml_block_is_accepted(block: Block) -> None:
    (kind,) = TABLES.keys() & block.marks.keys()
    model, required = TABLES[kind]
    config = build(model, required | tomllib.loads(block.text), source=str(block))
    if isinstance(config, RunConfig) and ":" not in config.strategy.name:
        load_strategy(config)


def command_at(words: list[str]) -> tuple[click.Command, click.Context, list[str]]:
    """The command that words name, and those left for it; a word that names nothing is a UsageError."""
    command = typer.main.get_command(app)
    context = click.Context(command, info_name="fedge")
    while isinstance(command, click.Group) and words:
        inner = command.get_command(context, words[0])
        if inner is None:
            raise click.UsageError(f"no such command: {words[0]}")
        command, words = inner, words[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    return command, context, words


def commands_of(text: str) -> list[str]:
    """Every `fedge ...` command in a script, those in `$(...)` included."""
    inner = _SUBSTITUTION.findall(text)
    return [line for part in (*inner, _SUBSTITUTION.sub("word", text)) for line in _COMMAND.findall(part)]


def parse_command(line: str) -> None:
    """Parse a whole `fedge ...` command as the shell would hand it over; it is not called."""
    command, context, rest = command_at(shlex.split(line.replace("\\\n", " "), comments=True)[1:])
    if not isinstance(command, click.Group):
        command.make_context(command.name, list(rest), parent=context.parent)


def test_a_command_that_does_not_exist_is_found_out() -> None:
    script = (
        'fedge new a  # b\nID=$(fedge run list) cat\nfedge client enrol \\\n  --token "$(fedge server x)"\n'
    )
    assert commands_of(script) == [
        "fedge run list",
        "fedge server x",
        "fedge new a  # b",
        'fedge client enrol \\\n  --token "word"',
    ]
    parse_command("fedge server token server.toml --site north")
    parse_command("fedge run submit run.toml \\\n  --admin admin.toml  # and so on")
    for wrong in (
        "fedge server tokn server.toml --site north",
        "fedge server token server.toml",
        "fedge server token server.toml --site north --for-ever",
    ):
        with pytest.raises(click.UsageError):
            parse_command(wrong)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_command_on_a_page_exists(page: Path) -> None:
    for block in blocks(page):
        if block.language == "bash":
            for line in commands_of(block.text):
                parse_command(line)
    for inline in _INLINE_COMMAND.findall(page.read_text()):
        command_at(inline.split()[1:])


# Links and paths.


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub makes of a page's headings."""
    out = set()
    for heading in re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        out.add(plain.strip().replace(" ", "-"))
    return out


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue  # the outside world
        target, _, fragment = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{link}: there is no {path}"
        assert not fragment or fragment in anchors(path), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_file_that_is_named_exists(page: Path) -> None:
    for path in _PATH.findall(page.read_text()):
        assert (ROOT / path).exists(), f"there is no {path}"


def test_the_index_lists_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    listed = {(DOCS / link.partition("#")[0]).resolve() for link in _LINK.findall(index)}
    assert {page for page in DOCS.rglob("*.md") if page.name != "README.md"} <= listed


def test_decisions_are_numbered_in_a_row() -> None:
    names = sorted(page.name for page in (DOCS / "decisions").glob("*.md"))
    assert [int(name[:4]) for name in names] == list(range(1, len(names) + 1))
