"""Real processes, real gRPC, real mutual TLS on loopback. The helpers beside this file are importable."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# pytest imports test modules by path (importlib mode); what they share lies in this folder.
sys.path.insert(0, str(Path(__file__).parent))

from harness import Federation, coordinator  # needs the line above
from malicious import Attacked, attacked

# A suite that a shell runs in the background inherits that Ctrl-C is ignored, and its children would, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator and two honest sites, named as a simulation of two clients names them."""
    with coordinator(tmp_path_factory.mktemp("federation")) as started:
        for name in ("client-0", "client-1"):
            started.enrol(name)
        for name in ("client-0", "client-1"):
            started.start(name)
        yield started


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A coordinator without any site: for clients that are scripted here, message by message."""
    with coordinator(tmp_path_factory.mktemp("bare")) as started:
        yield started


@pytest.fixture(scope="module")
def attack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    """A coordinator that a test plays message by message, and a real agent that is connected to it."""
    with attacked(tmp_path_factory.mktemp("attacked")) as started:
        yield started
