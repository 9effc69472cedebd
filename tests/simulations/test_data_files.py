"""Local files of data: what is well formed comes back as it was written, and everything else is one clear error."""

from __future__ import annotations

import gzip
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedge.errors import ConfigError
from fedge_sim.data.images import cifar10, cifar100, idx, mnist
from fedge_sim.data.tables import from_csv, from_leaf, from_npz

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array: np.ndarray) -> bytes:
    code = CODES[array.dtype.str[1:]]
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


@given(
    st.sampled_from(list(CODES)).flatmap(
        lambda code: (
            npst.arrays(code, npst.array_shapes(max_dims=3, max_side=4), elements={"allow_nan": False})
            if code[0] == "f"
            else npst.arrays(code, npst.array_shapes(max_dims=3, max_side=4))
        )
    ),
    st.booleans(),
)
def test_an_array_comes_back_from_an_idx_file(tmp_path_factory: pytest.TempPathFactory, array, packed: bool):
    data = idx_bytes(array)
    folder = tmp_path_factory.mktemp("idx")
    path = written(folder, "a.idx.gz" if packed else "a.idx", gzip.compress(data) if packed else data)
    found = idx(path)
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "begins with nothing"),
        (GOOD[:3], "expected an IDX file"),
        (b"\x01" + GOOD[1:], "expected an IDX file"),
        (GOOD[:2] + b"\x0a" + GOOD[3:], "expected an IDX file"),
        (GOOD[:3] + b"\x00", "expected an IDX file"),
        (GOOD[:10], "3 dimensions, found a file that ends after 10 bytes"),
        (GOOD[:-1], "expected 40 bytes for uint8"),
        (GOOD + b"x", "expected 40 bytes for uint8"),
        (GOOD[:4] + b"\xff" * 12, "expected 79228162458924105385300197391 bytes"),
    ],
)
def test_what_is_no_idx_file_is_refused_before_anything_is_allocated(tmp_path: Path, data: bytes, says: str):
    with pytest.raises(ConfigError, match=says):
        idx(written(tmp_path, "a.idx", data))


def test_files_that_are_too_large_damaged_or_missing_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="at most 10 bytes, found more"):
        idx(written(tmp_path, "a.idx", GOOD), max_bytes=10)
    bomb = written(tmp_path, "bomb.gz", gzip.compress(bytes(10_000_000)))
    with pytest.raises(ConfigError, match="at most 1000 bytes, found more"):
        idx(bomb, max_bytes=1000)
    for data in (b"no gzip", gzip.compress(GOOD)[:-9], gzip.compress(GOOD)[:20] + b"\xff" * 20):
        with pytest.raises(ConfigError, match="expected a file that can be read"):
            idx(written(tmp_path, "bad.gz", data))
    with pytest.raises(ConfigError, match="No such file"):
        idx(tmp_path / "none")


def test_images_and_labels_of_the_mnist_family_belong_together(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    images, labels = (
        written(tmp_path, "i", idx_bytes(pixels)),
        written(tmp_path, "l", idx_bytes(pixels[:, 0, 0])),
    )
    inputs, targets = mnist(images, labels).tensors
    assert (inputs.dtype, inputs.shape, targets.dtype) == (torch.float32, (5, 1, 4, 3), torch.int64)
    assert np.allclose(inputs.numpy()[:, 0] * 255, pixels, atol=1e-4)
    assert targets.tolist() == pixels[:, 0, 0].tolist()
    with pytest.raises(ConfigError, match=r"labels uint8\[5\], found uint8\[4\]"):
        mnist(images, written(tmp_path, "short", idx_bytes(pixels[:4, 0, 0])))
    with pytest.raises(ConfigError, match="images uint8"):
        mnist(labels, labels)


def test_cifar_records_are_read_and_checked(tmp_path: Path):
    pixels = np.random.default_rng(1).integers(0, 256, (4, 3072), dtype=np.uint8)
    ten = np.column_stack([np.array([0, 9, 3, 1], np.uint8), pixels])
    first, second = written(tmp_path, "1", ten[:3].tobytes()), written(tmp_path, "2", ten[3:].tobytes())
    inputs, targets = cifar10([first, second]).tensors
    assert targets.tolist() == [0, 9, 3, 1]
    assert np.allclose(inputs.numpy().reshape(4, -1) * 255, pixels, atol=1e-4)
    hundred = np.column_stack([np.array([[19, 99], [0, 1], [2, 0], [1, 7]], np.uint8), pixels])
    path = written(tmp_path, "100", hundred.tobytes())
    fine = cifar100([path])
    assert fine.tensors[1].tolist() == [99, 1, 0, 7]
    assert cifar100([path], coarse=True).tensors[1].tolist() == [19, 0, 2, 1] == fine.groups.tolist()
    for data in (b"", ten.tobytes()[:-1], hundred.tobytes()):
        with pytest.raises(ConfigError, match=r"records of 3073 bytes|labels below 10"):
            cifar10([written(tmp_path, "bad", data)])
    with pytest.raises(ConfigError, match="labels below 100, found 100"):
        cifar100([written(tmp_path, "bad", bytes([0, 100]) + bytes(3072))])
    with pytest.raises(ValueError, match="one file or more"):
        cifar10([])


CSV = "age,site,dose,ill\n40,north,0.5,1\n50,south,1e-1,0\n60,north,-2,1\n"


def test_a_table_has_a_target_and_may_have_a_group(tmp_path: Path):
    path = written(tmp_path, "a.csv", b"\xef\xbb\xbf" + CSV.encode())
    data = from_csv(path, target="ill", group="site")
    assert data.tensors[0].tolist() == [[40, 0.5], [50, pytest.approx(0.1)], [60, -2]]
    assert (data.tensors[1].dtype, data.tensors[1].tolist()) == (torch.int64, [1, 0, 1])
    assert data.groups.tolist() == ["north", "south", "north"]
    assert from_csv(path, target="dose", group="site").tensors[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "settings", "says"),
    [
        (CSV, {}, "finite number, found 'north' in line 2, column 'site'"),
        (CSV.replace("0.5", "nan"), {"group": "site"}, "found 'nan' in line 2, column 'dose'"),
        (CSV.replace("0.5", ""), {"group": "site"}, "found '' in line 2"),
        (CSV.replace("0.5", "inf"), {"group": "site"}, "found 'inf'"),
        (CSV.replace("60,", ""), {"group": "site"}, "4 cells, found 3 in line 4"),
        (CSV.replace("age", "dose"), {"group": "site"}, "header of different names"),
        (CSV, {"group": "ward"}, r"a header with \['ward'\]"),
        ("", {}, r"a header with \['ill'\]"),
        ("ill\n1\n", {}, "a column of inputs or more"),
        (CSV.splitlines()[0], {"group": "site"}, "a row or more"),
        ('age,ill\n"4"0,1\n', {}, "expected CSV, found in line 2"),
        ("age,ill\n\xff,1\n", {}, "expected UTF-8"),
    ],
)
def test_a_table_that_is_none_is_refused_with_its_line_and_column(tmp_path: Path, text, settings, says):
    path = written(tmp_path, "a.csv", text.encode("latin-1"))
    with pytest.raises(ConfigError, match=says):
        from_csv(path, target="ill", **settings)


def test_arrays_of_an_archive_are_read_and_no_object_is(tmp_path: Path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.ones((3, 2)), y=np.array([1, 2, 3], np.uint8), who=np.array(["a", "b", "a"]))
    data = from_npz(path, groups="who")
    assert (data.tensors[0].dtype, data.tensors[1].tolist(), data.groups.tolist()) == (
        torch.float32,
        [1, 2, 3],
        ["a", "b", "a"],
    )


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.ones((3, 2))}, r"without \['y'\]"),
        ({"x": np.ones((3, 2)), "y": np.ones(2)}, "arrays of one length"),
        ({"x": np.ones((0, 2)), "y": np.ones(0)}, "one length above 0"),
        ({"x": np.ones(()), "y": np.ones(())}, "one length"),
        ({"x": np.array([1.0, np.nan]), "y": np.ones(2)}, "finite numbers in 'x'"),
        ({"x": np.ones(2), "y": np.array(["a", "b"])}, "finite numbers in 'y'"),
        ({"x": np.ones(2, complex), "y": np.ones(2)}, "real numbers"),
        ({"x": np.array([{}, 1], object), "y": np.ones(2)}, "an NPZ archive of plain arrays"),
    ],
    ids=["no y", "lengths", "empty", "scalars", "nan", "texts", "complex", "objects"],
)
def test_an_archive_of_something_else_is_refused(tmp_path: Path, arrays: dict[str, Any], says: str):
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    with pytest.raises(ConfigError, match=says):
        from_npz(path)


def test_an_archive_that_unpacks_to_too_much_or_is_none_is_refused(tmp_path: Path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", bytes(5_000_000))
    with pytest.raises(ConfigError, match="at most 1000000 bytes once unpacked"):
        from_npz(path, max_bytes=1_000_000)
    for data in (b"", b"PK\x03\x04", path.read_bytes()[:-30]):
        with pytest.raises(ConfigError, match="an NPZ archive"):
            from_npz(written(tmp_path, "bad.npz", data))


LEAF: dict[str, Any] = {
    "users": ["ann", "bob"],
    "num_samples": [2, 1],
    "user_data": {"ann": {"x": [[1, 2], [3, 4]], "y": [0, 1]}, "bob": {"x": [[5, 6]], "y": [1]}},
}


def leaf(folder: Path, **changes: Any) -> Path:
    return written(folder, "leaf.json", json.dumps(LEAF | changes).encode())


def test_users_of_a_leaf_file_are_its_groups(tmp_path: Path):
    data = from_leaf(leaf(tmp_path))
    assert data.tensors[0].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert data.tensors[1].tolist() == [0, 1, 1]
    assert data.groups.tolist() == ["ann", "ann", "bob"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"users": []}, "an object with users"),
        ({"users": "ann"}, "an object with users"),
        ({"users": ["ann", "ann"]}, "each user once"),
        ({"num_samples": [2]}, "a number of samples for each"),
        ({"num_samples": [2, 2]}, "2 samples of user 'bob'"),
        ({"users": ["ann", "cem"]}, "1 samples of user 'cem'"),
        ({"users": ["ann", 7]}, "1 samples of user '7'"),
        ({"user_data": {**LEAF["user_data"], "bob": {"x": 5, "y": [1]}}}, "samples of user 'bob'"),
        ({"user_data": {**LEAF["user_data"], "bob": {"x": [[5]], "y": [1]}}}, "samples of one shape"),
        ({"user_data": {**LEAF["user_data"], "bob": {"x": [["a", "b"]], "y": [1]}}}, "finite numbers in 'x'"),
        ({"user_data": {**LEAF["user_data"], "bob": {"x": [[5, 6]], "y": [float("nan")]}}}, "numbers in 'y'"),
    ],
)
def test_a_leaf_file_whose_parts_do_not_belong_together_is_refused(tmp_path: Path, changes, says):
    with pytest.raises(ConfigError, match=says):
        from_leaf(leaf(tmp_path, **changes))


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"[]", b"\xff"])
def test_what_is_no_json_or_no_object_is_refused(tmp_path: Path, data: bytes):
    with pytest.raises(ConfigError, match="expected"):
        from_leaf(written(tmp_path, "a.json", data))
