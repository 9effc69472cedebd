"""Flower apps that are run to their end, by fedge's simulation and by Flower's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SUPPORT = Path(__file__).parent
APPS = SUPPORT.parent / "flower/apps"
APPS_THAT_ARE_COMPARED = (
    "numpy_quickstart",
    "torch_quickstart",
    "legacy",
    "sklearn_app",
    "custom_strategy",
    "flowers_strategies",
)
"""Which Flower's own simulation gives the same results each time."""


def flower(*arguments: str, cwd: Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("fedge"), "flower", "run", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def simulated(app: str, tmp_path: Path, *, nodes: int, workers: int = 2, **config: Any) -> Any:
    """What an app reports, run by fedge."""
    report = tmp_path / "fedge.json"
    settings = {"report.path": str(report), **config}
    pairs = " ".join(f"{key.replace('_', '-')}={json.dumps(value)}" for key, value in settings.items())
    done = flower(
        str(APPS / app), "--nodes", str(nodes), "--workers", str(workers), "--run-config", pairs, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"{nodes} nodes" in done.stdout
    return json.loads(report.read_text())


def by_flower(app: str, tmp_path: Path, *, nodes: int) -> Any:
    """What it reports, run by Flower."""
    report = tmp_path / "flower.json"
    done = subprocess.run(
        [
            sys.executable,
            SUPPORT / "flower_peer.py",
            APPS / app,
            str(nodes),
            json.dumps({"report.path": str(report)}),
        ],
        cwd=tmp_path,
        env={
            **os.environ,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_HOME": str(tmp_path / "flwr"),
            "RAY_ADDRESS": "local",  # no cluster that another test has begun
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert report.exists(), done.stderr[-4000:]
    return json.loads(report.read_text())


def assert_alike(one: Any, other: Any, where: str = "") -> None:
    """To the tolerance of a float32 sum in another order."""
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_alike(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for at, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_alike(left, right, f"{where}[{at}]")
    else:
        assert one == (pytest.approx(other, rel=1e-5, abs=1e-6) if isinstance(one, float) else other), where
