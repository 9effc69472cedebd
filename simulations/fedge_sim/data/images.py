"""Images in the binary files of the MNIST family (IDX) and of CIFAR-10 and CIFAR-100.

LeCun, Cortes and Burges, "The MNIST database"; Krizhevsky 2009, "Learning multiple layers of features from tiny
images". Pixels become float32 in [0, 1], channels first.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch.utils.data import TensorDataset

from fedge_sim.data.dataset import dataset_of
from fedge_sim.data.reading import MAX_BYTES, file_bytes, malformed

_IDX_TYPES: Final[Mapping[int, np.dtype[Any]]] = {
    0x08: np.dtype(">u1"),
    0x09: np.dtype(">i1"),
    0x0B: np.dtype(">i2"),
    0x0C: np.dtype(">i4"),
    0x0D: np.dtype(">f4"),
    0x0E: np.dtype(">f8"),
}
_CIFAR_SHAPE: Final = (3, 32, 32)


def idx(path: Path, *, max_bytes: int = MAX_BYTES) -> npt.NDArray[Any]:
    """The array in an IDX file (.gz or not), in native byte order.

    Raises:
        ConfigError: it is none: another magic number, a type that there is not, or more or fewer bytes than it says.
    """
    data = file_bytes(path, max_bytes=max_bytes)
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES or not data[3]:
        raise malformed(path, "an IDX file", f"one that begins with {data[:4].hex() or 'nothing'}")
    dtype, header = _IDX_TYPES[data[2]], 4 + 4 * data[3]
    if len(data) < header:
        raise malformed(path, f"{data[3]} dimensions", f"a file that ends after {len(data)} bytes")
    shape = struct.unpack(f">{data[3]}I", data[4:header])
    wanted = header + math.prod(shape) * dtype.itemsize
    if len(data) != wanted:
        raise malformed(path, f"{wanted} bytes for {dtype.name}{list(shape)}", str(len(data)))
    found = np.frombuffer(data, dtype, offset=header).reshape(shape)
    return found.astype(dtype.newbyteorder("="))


def mnist(images: Path, labels: Path) -> TensorDataset:
    """MNIST, Fashion-MNIST, EMNIST ...: float32[n, 1, rows, columns] and int64[n].

    Raises:
        ConfigError: one of the files is not as it should be, or they do not belong together.
    """
    pixels, classes = idx(images), idx(labels)
    if pixels.ndim != 3 or pixels.dtype != np.uint8:
        raise malformed(images, "images uint8[n, rows, columns]", f"{pixels.dtype}{list(pixels.shape)}")
    if classes.dtype != np.uint8 or classes.shape != pixels.shape[:1]:
        raise malformed(labels, f"labels uint8[{len(pixels)}]", f"{classes.dtype}{list(classes.shape)}")
    return dataset_of(_unit(pixels)[:, None], classes)


def cifar10(paths: Sequence[Path]) -> TensorDataset:
    """CIFAR-10's binary batches, one after the other: float32[n, 3, 32, 32] and int64[n].

    Raises:
        ConfigError: one is not of whole records, or has a label that there is not.
    """
    return _cifar(paths, classes=(10,))


def cifar100(paths: Sequence[Path], *, coarse: bool = False) -> TensorDataset:
    """CIFAR-100's binary files, by their 100 fine classes or the 20 coarse ones. `groups` are the coarse ones.

    Raises:
        ConfigError: as `cifar10`.
    """
    return _cifar(paths, classes=(20, 100), target=0 if coarse else 1)


def _cifar(paths: Sequence[Path], *, classes: tuple[int, ...], target: int = 0) -> TensorDataset:
    width = len(classes) + math.prod(_CIFAR_SHAPE)
    records = []
    for path in paths:
        data = file_bytes(path)
        if not data or len(data) % width:
            raise malformed(path, f"records of {width} bytes", f"{len(data)} bytes")
        rows = np.frombuffer(data, np.uint8).reshape(-1, width)
        for column, count in enumerate(classes):
            if rows[:, column].max() >= count:
                raise malformed(path, f"labels below {count}", str(int(rows[:, column].max())))
        records.append(rows)
    if not records:
        raise ValueError("expected one file or more, found none")
    rows = np.concatenate(records)
    pixels = rows[:, len(classes) :].reshape(-1, *_CIFAR_SHAPE)
    groups = rows[:, 0].astype(np.int64) if len(classes) > 1 else None
    return dataset_of(_unit(pixels), rows[:, target].astype(np.int64), groups)


def _unit(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    scaled: npt.NDArray[np.float32] = pixels.astype(np.float32) / np.float32(255)
    return scaled
