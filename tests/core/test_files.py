"""Files are written whole or not at all, private ones for their owner alone, and read only up to a cap."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fedge import files
from fedge.errors import ConfigError, StorageError
from fedge.files import private_folder, read_capped, write_atomic, write_private

writers = pytest.mark.parametrize("write", [write_private, write_atomic])


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_a_file_is_read_up_to_the_cap(tmp_path: Path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"12345")
    assert read_capped(path, max_bytes=5) == b"12345"
    with pytest.raises(ConfigError, match=r"a\.toml: expected at most 4 bytes, found 5"):
        read_capped(path, max_bytes=4)


def test_a_file_over_the_cap_is_not_even_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("read although it is too large"))
    with pytest.raises(ConfigError, match="expected at most"):
        read_capped(path, max_bytes=1 << 20)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "expected a file, found none"),
        (lambda path: path.mkdir(), "expected a file, found something else"),
        (os.mkfifo, "expected a file, found something else"),
        (lambda path: path.symlink_to(path), "cannot be read"),
    ],
    ids=["nothing", "a folder", "a pipe", "a loop of links"],
)
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, make: Callable[[Path], object], says: str):
    make(tmp_path / "thing")
    with pytest.raises(ConfigError, match=f"thing: {says}"):
        read_capped(tmp_path / "thing", max_bytes=10)


def test_a_file_below_another_file_is_refused_by_name(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="file/below: cannot be read: Not a directory"):
        read_capped(tmp_path / "file" / "below", max_bytes=10)


@writers
def test_what_is_written_is_there_and_replaces_what_was(tmp_path: Path, write: Callable[..., None]):
    path = tmp_path / "a"
    write(path, b"first, and longer")
    write(path, "z\N{SNOWMAN}")
    assert path.read_text(encoding="utf-8") == "z\N{SNOWMAN}"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_a_private_file_is_its_owners_alone_and_another_follows_the_umask(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        write_private(tmp_path / "key", b"secret")
        write_atomic(tmp_path / "model", b"numbers")
        assert os.umask(umask) == umask, "the umask is as it was"
    finally:
        os.umask(before)
    assert mode(tmp_path / "key") == 0o600
    assert mode(tmp_path / "model") == 0o666 & ~umask


def test_a_file_that_was_open_to_all_becomes_private_when_it_is_written_as_such(tmp_path: Path):
    path = tmp_path / "key"
    path.write_bytes(b"old")
    path.chmod(0o666)
    write_private(path, b"new")
    assert mode(path) == 0o600


@writers
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a"
    write(path, b"old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@writers
def test_a_full_disk_is_said_in_words_and_leaves_the_old_file(
    tmp_path: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "a"
    write(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(StorageError, match="a: cannot be written: No space left on device"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@writers
def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path: Path, write: Callable[..., None]):
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"")
    for path in (
        tmp_path / "none" / "a",
        tmp_path / "file" / "a",
        tmp_path / "folder",
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(StorageError, match="cannot be written"):
            write(path, b"new")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "folder"]


def test_a_private_folder_is_its_owners_alone_even_if_it_was_there(tmp_path: Path):
    (tmp_path / "open").mkdir(mode=0o755)
    assert private_folder(tmp_path / "open") == tmp_path / "open"
    assert mode(tmp_path / "open") == 0o700
    assert mode(private_folder(tmp_path / "new" / "inner")) == 0o700


def test_a_private_folder_cannot_be_made_of_a_file(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(StorageError, match="cannot make a private folder there"):
            private_folder(path)
