"""Checkpoint files are complete or not there; what is read back is what was written, or an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedge.errors import StorageError
from fedge.optimizer import Slots
from fedge.snapshot import revive, take
from fedge_server.store.checkpoints import Checkpoints
from fedge_server.store.records import Checkpoint

STATE = Slots((np.linspace(-1, 1, 7, dtype=np.float32), np.zeros(0, np.float32)), 0.5, 0.25)


def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "states")
    checkpoint = checkpoints.write(take(STATE), round=3)
    revived = revive(checkpoints.read(checkpoint), STATE)
    assert checkpoint.round == 3
    assert [vector.tobytes() for vector in revived.vectors] == [v.tobytes() for v in STATE.vectors]
    assert (revived.beta1_power, revived.beta2_power) == (0.5, 0.25)


def test_the_same_state_is_one_private_file(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    one, two = checkpoints.write(take(STATE), round=1), checkpoints.write(take(STATE), round=2)
    assert one.digest == two.digest
    (path,) = tmp_path.iterdir()
    assert path.name == f"{one.digest}.safetensors"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == one.size


def test_a_file_cut_short_by_a_crash_is_written_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoint = checkpoints.write(take(STATE), round=1)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20])
    checkpoints.write(take(STATE), round=1)
    assert checkpoints.read(checkpoint).tree == take(STATE).tree


@pytest.mark.parametrize("damage", ["gone", "short", "changed"])
def test_a_damaged_file_is_an_error_and_never_a_state(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoint = checkpoints.write(take(STATE), round=1)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "short":
        path.write_bytes(data[:-1])
    else:
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(StorageError, match=str(path)):
        checkpoints.read(checkpoint)


def test_only_what_is_wanted_survives_a_sweep(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    kept = checkpoints.write(take(STATE), round=1)
    checkpoints.write(take(Slots((), 0.1)), round=2)
    (tmp_path / ".interrupted").write_bytes(b"half")
    checkpoints.sweep(frozenset({kept.digest}))
    assert [path.name for path in tmp_path.iterdir()] == [f"{kept.digest}.safetensors"]


def test_a_folder_that_has_gone_is_an_error(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "states")
    (tmp_path / "states").rmdir()
    with pytest.raises(StorageError, match="cannot be written: No such file"):
        checkpoints.write(take(STATE), round=1)
    checkpoints.sweep(frozenset())
    with pytest.raises(StorageError, match="cannot be read back"):
        checkpoints.read(Checkpoint(1, "00", 1))
