"""Rows of numbers: CSV with a header, NPZ archives, and the JSON of LEAF.

Caldas et al. 2018, "LEAF: a benchmark for federated settings". Each is checked value by value: what is no finite
number is an error that says where it is.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import TensorDataset

from fedge.errors import ConfigError
from fedge_sim.data.dataset import dataset_of
from fedge_sim.data.reading import MAX_BYTES, file_bytes, finite, malformed

_MAX_COLUMNS = 1 << 20


def from_csv(
    path: Path, *, target: str, group: str | None = None, max_bytes: int = MAX_BYTES
) -> TensorDataset:
    """A CSV file with a header: the column `target` is the target, `group` (numbers or texts) whose each row is, and
    all others are inputs, float32[rows, columns].

    Raises:
        ConfigError: it is no such file; a cell that is no finite number is named by its line and column.
    """
    try:
        text = file_bytes(path, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise malformed(path, "UTF-8", f"something else at byte {error.start}") from None
    reader = csv.reader(io.StringIO(text), strict=True)
    try:
        header = next(reader, [])
        _check_header(path, header, [target, *([group] if group is not None else [])])
        at, of = header.index(target), header.index(group) if group is not None else None
        rows, targets, groups = [], [], []
        for row in reader:
            if len(row) != len(header):
                raise malformed(path, f"{len(header)} cells", f"{len(row)} in line {reader.line_num}")
            numbers = [
                0.0 if column == of else _number(path, cell, line=reader.line_num, column=header[column])
                for column, cell in enumerate(row)
            ]
            targets.append(numbers[at])
            rows.append([number for column, number in enumerate(numbers) if column not in (at, of)])
            if of is not None:
                groups.append(row[of])
    except csv.Error as error:
        raise malformed(path, "CSV", f"in line {reader.line_num}: {error}") from None
    if not rows:
        raise malformed(path, "a row or more below the header", "none")
    return dataset_of(np.array(rows, np.float32), _targets(targets), np.array(groups) if group else None)


def from_npz(
    path: Path,
    *,
    inputs: str = "x",
    targets: str = "y",
    groups: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> TensorDataset:
    """Arrays of these names in an NPZ archive. Objects, which would be unpickled, are refused.

    Raises:
        ConfigError: it is no archive, or too large once unpacked, or has no such arrays of one length.
    """
    names = [inputs, targets, *([groups] if groups is not None else [])]
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > max_bytes:
            raise malformed(path, f"at most {max_bytes} bytes once unpacked", f"{unpacked}")
        with np.load(path, allow_pickle=False) as archive:
            if missing := [name for name in names if name not in archive.files]:
                raise malformed(path, f"arrays named {names}", f"{archive.files[:20]}, without {missing}")
            arrays = {name: archive[name] for name in names}
    except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise malformed(
            path, "an NPZ archive of plain arrays", f"what raises {type(error).__name__}"
        ) from None
    shapes = {name: array.shape for name, array in arrays.items()}
    if any(not shape or shape[0] != arrays[inputs].shape[0] or not shape[0] for shape in shapes.values()):
        raise malformed(path, "arrays of one length above 0", str(shapes))
    for name in (inputs, targets):
        _check_numbers(path, name, arrays[name])
    return dataset_of(arrays[inputs], arrays[targets], arrays[groups] if groups is not None else None)


def from_leaf(path: Path, *, max_bytes: int = MAX_BYTES) -> TensorDataset:
    """A LEAF file of numbers: the examples of all its users, one after the other; `groups` are the users' names.

    Raises:
        ConfigError: it is no such file: not JSON, or with users, counts and data that do not belong together.
    """
    try:
        content = json.loads(file_bytes(path, max_bytes=max_bytes))
    except (ValueError, RecursionError) as error:
        raise malformed(path, "JSON", f"what raises {type(error).__name__}") from None
    users = content.get("users") if isinstance(content, dict) else None
    data = content.get("user_data") if isinstance(content, dict) else None
    counts = content.get("num_samples") if isinstance(content, dict) else None
    if not (isinstance(users, list) and isinstance(data, dict) and isinstance(counts, list) and users):
        raise malformed(path, "an object with users, num_samples and user_data", "something else")
    if len(set(map(str, users))) != len(users) or len(counts) != len(users):
        raise malformed(path, "each user once, and a number of samples for each", "otherwise")
    inputs, targets, groups = [], [], []
    for user, count in zip(users, counts, strict=True):
        own = data.get(user) if isinstance(user, str) else None
        x, y = (own.get("x"), own.get("y")) if isinstance(own, dict) else (None, None)
        if not (isinstance(x, list) and isinstance(y, list) and len(x) == len(y) == count):
            raise malformed(path, f"{count} samples of user {str(user)[:80]!r}", "another number, or none")
        inputs += x
        targets += y
        groups += [user] * count
    if not groups:
        raise malformed(path, "a sample or more", "none")
    try:
        arrays = {"x": np.array(inputs), "y": np.array(targets)}
    except ValueError:
        raise malformed(path, "samples of one shape", "samples of several") from None
    for name, array in arrays.items():
        _check_numbers(path, name, array)
    return dataset_of(arrays["x"], arrays["y"], np.array(groups))


def _check_header(path: Path, header: list[str], wanted: list[str]) -> None:
    if len(set(header)) != len(header) or len(header) > _MAX_COLUMNS:
        raise malformed(path, "a header of different names", f"{header[:20]}")
    if missing := [name for name in wanted if name not in header]:
        raise malformed(path, f"a header with {missing}", f"{header[:20]}")
    if len(header) == len(wanted):
        raise malformed(path, "a column of inputs or more", "none beside the target and the group")


def _number(path: Path, cell: str, *, line: int, column: str) -> float:
    number = finite(cell)
    if number is None:
        raise malformed(path, "a finite number", f"{cell[:40]!r} in line {line}, column {column!r}")
    return number


def _targets(numbers: list[float]) -> npt.NDArray[Any]:
    """Classes if all of them are whole, else numbers."""
    found = np.array(numbers)
    whole = (found == np.floor(found)).all() and np.abs(found).max() < 2**53
    return found.astype(np.int64) if whole else found.astype(np.float32)


def _check_numbers(path: Path, name: str, array: npt.NDArray[Any]) -> None:
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool) or not np.isfinite(array).all():
        raise malformed(path, f"finite numbers in {name!r}", f"{array.dtype}, or others among them")
    if np.iscomplexobj(array):
        raise ConfigError(f"{path}: expected real numbers in {name!r}, found complex ones")
