"""Masks: keystreams of AES-256 in counter mode, added to or taken from vectors of a ring in place.

A mask is drawn in parts that stay in the processor's cache, and every mask is applied to a part of the vector before
the next part is touched. A key masks one vector: its counter begins at 0, so two vectors would share a keystream.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedge.parallel import in_shares
from fedge.secagg.ring import Words

KEY_BYTES = 32
_BLOCK_BYTES = 16
_PART_BYTES = 1 << 17
_SPARE = _BLOCK_BYTES - 1  # the library asks for room beyond the output


def apply_masks(
    vector: Words, *, add: Sequence[bytes] = (), subtract: Sequence[bytes] = (), first_block: int = 0
) -> None:
    """Add the masks of some keys to `vector` (words[n], in place) and subtract those of others, modulo its type.

    `first_block` is where in the keystreams the vector's masks begin, in blocks of 16 bytes. Large work is shared
    among threads; the result is the same.

    Raises:
        ValueError: a key is not of 32 bytes.
    """
    keys = [(key, np.add) for key in add] + [(key, np.subtract) for key in subtract]
    if any(len(key) != KEY_BYTES for key, _ in keys):
        raise ValueError(f"expected mask keys of {KEY_BYTES} bytes")
    step = _PART_BYTES // vector.itemsize

    def share(parts: range) -> None:
        buffer = np.empty(_PART_BYTES + _SPARE, np.uint8)
        zeros = bytes(_PART_BYTES)
        words = buffer[:_PART_BYTES].view(vector.dtype)
        block = first_block + parts.start * _PART_BYTES // _BLOCK_BYTES
        streams = [(_keystream(key, block), apply) for key, apply in keys]
        for number in parts:
            part = vector[number * step : (number + 1) * step]
            data = memoryview(zeros)[: part.nbytes]
            for stream, apply in streams:
                stream.update_into(data, buffer)
                apply(part, words[: len(part)], out=part)

    blocks = -(-len(vector) // step)
    in_shares(share, blocks=blocks, elements=len(vector) * len(keys))


def blocks_of(vector: Words) -> int:
    """How many blocks of a keystream mask this vector: where the masks of the next one begin."""
    return -(-vector.nbytes // _BLOCK_BYTES)


def _keystream(key: bytes, block: int):  # type: ignore[no-untyped-def]  # the library's type has no public name
    return Cipher(algorithms.AES256(key), modes.CTR(block.to_bytes(_BLOCK_BYTES, "big"))).encryptor()
