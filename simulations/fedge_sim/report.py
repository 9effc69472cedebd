"""The results folder: history as CSV and JSON lines, the model, and the run's manifest."""

from __future__ import annotations

import csv
import io
import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedge import __version__
from fedge.checkpoint import to_safetensors
from fedge.files import write_atomic
from fedge_sim.result import Result

_COLUMNS = (
    "round",
    "attempt",
    "clients",
    "num_examples",
    "seconds",
    "bytes_down",
    "bytes_up",
    "refused",
    "staleness",
)
_VERSIONS = ("numpy", "torch", "safetensors")


def write_results(folder: Path, result: Result) -> None:
    """Write history.csv, history.jsonl, model.safetensors and manifest.json, each in one piece."""
    rows = result.rows()
    write_atomic(folder / "history.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_atomic(folder / "history.csv", _as_csv(result.table()))
    metadata = {"fedge_run": result.run.name, "fedge_version": __version__}
    write_atomic(folder / "model.safetensors", to_safetensors(result.model, metadata=metadata))
    write_atomic(folder / "manifest.json", json.dumps(_manifest(result), indent=2) + "\n")


def _as_csv(rows: list[dict[str, Any]]) -> str:
    """A column per number and per metric."""
    columns = dict.fromkeys([*_COLUMNS, *(name for row in rows for name in row)])
    out = io.StringIO()
    writer = csv.DictWriter(out, list(columns), lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _manifest(result: Result) -> dict[str, Any]:
    """Everything that made this result: configuration, seed, versions, the model's digest."""
    return {
        "summary": result.summary(),
        "run": result.run.model_dump(mode="json"),
        "labels": {
            client: {str(label): n for label, n in found.items()} for client, found in result.labels.items()
        },
        "layout_sha256": result.model.layout.digest.hex(),
        "versions": {"fedge": __version__, "python": platform.python_version()}
        | {name: found for name in _VERSIONS if (found := _version(name))},
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
