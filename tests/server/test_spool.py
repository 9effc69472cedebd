"""An arriving update is checked chunk by chunk, waits in little memory, and outlives its process."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.errors import RefusedError, StorageError
from fedge.exact import BLOCK
from fedge.refusal import RefusalCode
from fedge.vector import Array, bytes_of, digest_of
from fedge.wire.limits import CHUNK_BYTES
from fedge_server.spool import Spool, Upload

MEBI = 1 << 20
LARGE = 16 * MEBI
"""More than is kept in memory."""


def vector(size: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


def upload_of(folder: Path, data: bytes, *, size: int | None = None, digest: bytes | None = None) -> Upload:
    return Spool(folder).upload(
        size=len(data) if size is None else size,
        digest=digest_of(data) if digest is None else digest,
    )


def held(upload: Upload) -> bytes:
    return upload[0 : upload.size // 4].tobytes()


def refusal(call, *arguments) -> RefusalCode:
    with pytest.raises(RefusedError) as refused:
        call(*arguments)
    return refused.value.refusal.code


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), max_size=8))
def test_whatever_chunks_it_comes_in_it_is_the_same_vector(tmp_path: Path, sizes: list[int]):
    data = vector(sum(sizes)).tobytes()
    upload = upload_of(tmp_path, data)
    at = 0
    for size in sizes:
        upload.write(data[at : at + 4 * size])
        at += 4 * size
    upload.finish()
    assert held(upload) == data
    assert held(upload) == data, "and again"
    upload.close()


@pytest.mark.parametrize("size", [100, LARGE // 4 + 3])
def test_any_slice_of_it_is_that_slice_of_the_vector(tmp_path: Path, size: int):
    expected = vector(size)
    data = expected.tobytes()
    upload = upload_of(tmp_path, data)
    for start in range(0, len(data), 3 * MEBI):
        upload.write(data[start : start + 3 * MEBI])
    upload.finish()
    assert len(upload) == size
    for start, stop in [
        (0, size),
        (0, 1),
        (size - 1, size),
        (17, 60),
        (BLOCK, 2 * BLOCK),
        (5, 5),
        (9, 2 * size),
    ]:
        np.testing.assert_array_equal(upload[start:stop], expected[start:stop])
    upload.close()
    with pytest.raises(ValueError, match="not closed"):
        upload[0:1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 10, 25, 29])
def test_nan_or_infinity_in_any_chunk_is_refused(tmp_path: Path, bad: float, position: int):
    values = vector(30)
    values[position] = bad
    data = values.tobytes()
    upload = upload_of(tmp_path, data)
    chunks = [data[at : at + 40] for at in range(0, 120, 40)]
    for chunk in chunks[: position // 10]:
        upload.write(chunk)
    assert refusal(upload.write, chunks[position // 10]) == RefusalCode.NOT_FINITE
    upload.close()


def test_more_than_was_announced_is_refused_before_it_is_kept(tmp_path: Path):
    data = vector(10).tobytes()
    upload = upload_of(tmp_path, data, size=36)
    upload.write(data[:20])
    assert refusal(upload.write, data[20:]) == RefusalCode.WRONG_LENGTH
    assert upload[0:5].tobytes() == data[:20]
    upload.close()


def test_less_than_was_announced_is_refused_at_the_end(tmp_path: Path):
    data = vector(10).tobytes()
    upload = upload_of(tmp_path, data, size=44)
    upload.write(data)
    assert refusal(upload.finish) == RefusalCode.WRONG_LENGTH
    upload.close()


def test_another_digest_than_was_announced_is_refused(tmp_path: Path):
    data = vector(10).tobytes()
    upload = upload_of(tmp_path, data, digest=digest_of(b"other"))
    upload.write(data)
    assert refusal(upload.finish) == RefusalCode.WRONG_DIGEST
    upload.close()


def test_a_chunk_that_cuts_an_element_is_refused(tmp_path: Path):
    upload = upload_of(tmp_path, bytes(40))
    for length in (1, 2, 3, 5):
        assert refusal(upload.write, bytes(length)) == RefusalCode.WRONG_LENGTH
    upload.write(b"")
    upload.close()


def test_a_large_update_waits_in_a_private_file_and_takes_little_memory(tmp_path: Path):
    chunk = vector(MEBI // 4).tobytes()
    count = LARGE // MEBI
    digest = digest_of(chunk * count)
    tracemalloc.start()
    try:
        upload = Spool(tmp_path).upload(size=LARGE, digest=digest)
        for _ in range(count):
            upload.write(chunk)
        upload.finish()
        (path,) = tmp_path.iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        assert all(upload[at : at + BLOCK].tobytes() for at in range(0, LARGE // 4, BLOCK))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < LARGE // 2
    upload.close()
    upload.close()
    with pytest.raises(ValueError, match="not closed yet"):
        upload[0:1]


def test_a_small_update_never_touches_the_disk(tmp_path: Path):
    data = vector(1000).tobytes()
    upload = upload_of(tmp_path / "there is no such folder", data)
    upload.write(data)
    upload.finish()
    assert held(upload) == data


def test_a_disk_that_cannot_take_it_is_the_operators_trouble_and_said_in_words(tmp_path: Path):
    upload = upload_of(tmp_path / "there is no such folder", b"", size=LARGE)
    with pytest.raises(StorageError, match="an update cannot be kept: No such file or directory"):
        upload.write(bytes(CHUNK_BYTES))


def test_a_file_that_gives_back_less_than_it_took_is_said_in_words(tmp_path: Path, monkeypatch):
    upload = upload_of(tmp_path, b"", size=LARGE)
    for _ in range(LARGE // MEBI):
        upload.write(bytes(MEBI))
    rest = iter([bytes(12)])
    monkeypatch.setattr(os, "pread", lambda *arguments: next(rest, b""))
    with pytest.raises(StorageError, match="expected 400 bytes of an update back, found 12"):
        upload[0:100]


def filled(spool: Spool, seed: int) -> tuple[Upload, Array]:
    values = vector(LARGE // 4, seed)
    upload = spool.upload(size=LARGE, digest=digest_of(values))
    for at in range(0, len(values), MEBI // 4):
        upload.write(bytes_of(values[at : at + MEBI // 4]))
    upload.finish()
    return upload, values


def test_uploads_never_share_a_file_though_files_serve_again(tmp_path: Path):
    spool = Spool(tmp_path)
    for seed in range(0, 9, 3):
        pairs = [filled(spool, seed + n) for n in range(3)]
        for upload, values in pairs:
            np.testing.assert_array_equal(upload[0 : len(values)], values)
        for upload, _ in pairs:
            upload.close()
    del upload, pairs
    assert open_files(tmp_path) == 3
    spool.shrink()
    assert open_files(tmp_path) == 0


def test_a_file_still_in_use_by_a_thread_serves_nobody_else_even_if_its_upload_is_closed(
    tmp_path: Path, monkeypatch
):
    spool = Spool(tmp_path)
    upload, values = filled(spool, 1)
    others = []

    def close_first(descriptor: int, count: int, offset: int) -> bytes:
        upload.close()
        others.append(filled(spool, 2)[0])
        return pread(descriptor, count, offset)

    pread = os.pread
    monkeypatch.setattr(os, "pread", close_first)
    np.testing.assert_array_equal(upload[0:BLOCK], values[:BLOCK])


def open_files(folder: Path) -> int:
    """Files in it that this process has open."""
    descriptors = (descriptor.name for descriptor in list(Path("/proc/self/fd").iterdir()))
    return sum(_path_of(descriptor).startswith(str(folder)) for descriptor in descriptors)


def _path_of(descriptor: str) -> str:
    try:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())
    except FileNotFoundError:  # the one that listed the folder
        return ""


def test_a_complete_upload_is_found_again_by_the_next_process(tmp_path: Path):
    upload, values = filled(Spool(tmp_path), 1)
    held = upload.held()
    held.sync()
    found = Spool(tmp_path).find(held.place, size=upload.size, digest=upload.digest)
    assert found is not None
    np.testing.assert_array_equal(found[0 : len(values)], values)


def test_a_file_that_holds_other_bytes_by_now_is_not_found(tmp_path: Path):
    upload, _ = filled(Spool(tmp_path), 1)
    place = upload.held().place
    assert Spool(tmp_path).find(place, size=upload.size, digest=bytes(32)) is None
    assert Spool(tmp_path).find(place, size=2 * upload.size, digest=upload.digest) is None
    assert Spool(tmp_path).find("../" + place, size=upload.size, digest=upload.digest) is None
    assert Spool(tmp_path).find("7.update", size=upload.size, digest=upload.digest) is None
    spool = Spool(tmp_path)
    found = spool.find(place, size=upload.size, digest=upload.digest)
    assert found is not None
    assert spool.find(place, size=upload.size, digest=upload.digest) is None, "it has one owner"


def test_what_nobody_finds_again_is_swept_away_and_nothing_else(tmp_path: Path):
    first = Spool(tmp_path)
    uploads = [filled(first, seed)[0] for seed in range(2)]
    (tmp_path / "notes.txt").write_text("mine")
    second = Spool(tmp_path)
    found = second.find(uploads[1].held().place, size=uploads[1].size, digest=uploads[1].digest)
    new, _ = filled(second, 3)
    second.sweep()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"notes.txt", uploads[1].held().place, new.held().place}
    assert found is not None
