"""Runs tests against every mutant of a package's checks, and says for which of them no test fails.

    python -m mutant_hunt FINDINGS PART/PARTS PACKAGE PYTEST-ARGUMENTS...

The tests are collected once, and run once with nothing removed, which must pass; it is noted which lines each executes.
Then each mutant has a fork of the process, in which those tests run that get to its check, until one fails: as a rule
the first of those for which the check does what it is there for. So nobody lists which test is for which check.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from mutants import Mutant, modules_of, mutants, recompile

_CPU_S = 2.0
"""A test of a mutant that computes for longer does not come to an end, which is a failure ..."""

_WAIT_S = 60
"""... and so is one that waits for longer. With nothing removed, none takes a tenth of that."""

_FOUND, _SURVIVED = 10, 11


class Hunt:
    """A pytest plugin: in place of running the tests once, the whole hunt."""

    def __init__(self, prey: list[Mutant]) -> None:
        self.prey = prey
        self.survivors: list[Mutant] = []
        self._failed: list[str] = []
        self._lines: dict[Any, set[tuple[str, int]]] = {}
        """Which lines of the modules a test executes: the quickest test first."""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Examples that are drawn at random might find a mutant today and not tomorrow."""
        items[:] = [item for item in items if not getattr(item.obj, "is_hypothesis_test", False)]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._failed.append(report.nodeid)

    def pytest_runtestloop(self, session: Any) -> bool:
        files = set()
        for module in {
            mutant.module: importlib.import_module(mutant.module) for mutant in self.prey
        }.values():
            files.add(str(module.__file__))
            recompile(module)  # so that a mutant differs from what passes in its check alone
        seconds = {}
        for item in session.items:
            began = time.perf_counter()
            with _Lines(files) as lines:
                self._passes(item)
            self._lines[item], seconds[item] = lines.executed, time.perf_counter() - began
        if self._failed:
            raise pytest.UsageError(
                f"expected tests that pass with nothing removed, failed: {self._failed[:5]}"
            )
        self._lines = dict(sorted(self._lines.items(), key=lambda each: seconds[each[0]]))
        self.survivors = [mutant for mutant in self.prey if not self._is_found(mutant)]
        return True

    def _passes(self, item: Any) -> bool:
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        return not self._failed

    def _is_found(self, mutant: Mutant) -> bool:
        file = str(importlib.import_module(mutant.module).__file__)
        check = {(file, line) for line in mutant.lines}
        fires = {(file, line) for line in mutant.fires}
        items = [item for item, executed in self._lines.items() if check & executed]
        items.sort(key=lambda item: not fires & self._lines[item])
        child = os.fork()
        if child == 0:
            status = 1
            try:
                mutant.install()
                status = _FOUND if self._fails(items) else _SURVIVED
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code not in (_FOUND, _SURVIVED, -signal.SIGPROF):
            raise pytest.UsageError(
                f"expected a mutant that can be run, found {mutant.name}: exit code {code}"
            )
        return code != _SURVIVED

    def _fails(self, items: list[Any]) -> bool:
        for item in items:
            signal.setitimer(signal.ITIMER_PROF, _CPU_S)  # whose signal ends the process
            if not self._passes(item):
                return True
        return False


class _Lines:
    """Which lines of some files are executed meanwhile."""

    def __init__(self, files: set[str]) -> None:
        self._files = files
        self.executed: set[tuple[str, int]] = set()

    def __enter__(self) -> _Lines:
        threading.settrace(self._call)
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename in self._files else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        self.executed.add((frame.f_code.co_filename, frame.f_lineno))
        return self._line


def main(findings: str, part: str, package: str, *arguments: str) -> int:
    """Hunt one part of the mutants, and write down how many there were and which survive."""
    at, parts = map(int, part.split("/"))
    every = [each for module in modules_of(importlib.import_module(package)) for each in mutants(module)]
    hunt = Hunt(every[at::parts])
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-s", "--tb=native", f"--timeout={_WAIT_S}"]
    code = int(pytest.main([*options, *arguments], plugins=[hunt]))
    if code == 0:
        found = {"mutants": len(hunt.prey), "survivors": [each.name for each in hunt.survivors]}
        Path(findings).write_text(json.dumps(found), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
