"""A strategy's state as named arrays and a JSON tree, and back: what a checkpoint holds.

A state is a frozen dataclass of arrays, numbers, text and None, of tuples and mappings of these, and of
further dataclasses. Types never come from a file: they are those of a state that the strategy has made.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from fedge.checkpoint import FORMAT_NAMES, safetensors_header
from fedge.errors import ConfigError, LayoutError

S = TypeVar("S")
AnyArray = npt.NDArray[Any]

TREE_KEY = "fedge.state"
"""Under which name the metadata of a checkpoint file holds the tree."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """`tree` is JSON: where in the state each of `arrays` is, and everything that is not an array."""

    tree: str
    arrays: Mapping[str, AnyArray]

    def parts(self) -> Iterator[bytes | memoryview]:
        """The bytes of a safetensors file of it, one piece after another; no array is copied.

        **Guarantees.** They are a function of the snapshot.
        """
        entries = [(name, str(array.dtype), array.shape) for name, array in self.arrays.items()]
        header, order = safetensors_header(entries, {TREE_KEY: self.tree})
        yield header
        for name in order:
            array = self.arrays[name]
            yield array.reshape(-1).view(np.uint8).data if array.size else b""


def take(state: object) -> Snapshot:
    """Everything in a state. Its arrays are shared, not copied, so they must not change any more.

    An array that is in several places is kept once.

    Raises:
        ConfigError: there is something in it that a checkpoint cannot hold; the message says where.
    """
    arrays: dict[str, AnyArray] = {}
    tree = _take(state, "state", arrays, {})
    return Snapshot(json.dumps(tree, separators=(",", ":")), MappingProxyType(arrays))


def revive(snapshot: Snapshot, like: S) -> S:
    """The state that was taken, of the types of `like`: a state of the same strategy.

    Raises:
        LayoutError: the snapshot is not one of such a state.
    """
    try:
        revived = _revive(json.loads(snapshot.tree), type(like), like, "state", snapshot.arrays)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LayoutError(
            f"expected a checkpoint of {type(like).__name__}, found one that does not fit: {error}"
        ) from None
    if not isinstance(revived, type(like)):
        raise LayoutError(f"expected a checkpoint of {type(like).__name__}, found another value")
    return revived


def _take(value: object, path: str, arrays: dict[str, AnyArray], seen: dict[int, str]) -> object:
    """A node of the tree; `seen` says under which name an array that was met before is kept."""
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, np.generic)):
        return value
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        if str(array.dtype) not in FORMAT_NAMES:
            raise ConfigError(f"{path}: a checkpoint holds arrays of numbers, found one of {array.dtype}")
        if id(value) not in seen:
            seen[id(value)] = path
            arrays[path] = np.ascontiguousarray(array).reshape(array.shape)
        return {"array": seen[id(value)]}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [each.name for each in dataclasses.fields(value) if each.init]
        return {
            "fields": {name: _take(getattr(value, name), f"{path}.{name}", arrays, seen) for name in names}
        }
    if isinstance(value, tuple):
        return {"items": [_take(item, f"{path}.{at}", arrays, seen) for at, item in enumerate(value)]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"map": {key: _take(item, f"{path}.{key}", arrays, seen) for key, item in value.items()}}
    raise ConfigError(
        f"{path}: a strategy's state may hold numpy arrays, numbers, text, None, tuples, mappings from text "
        f"and dataclasses, so that a run outlives a crash; found {type(value).__name__}"
    )


def _revive(node: Any, hint: object, like: object, path: str, arrays: Mapping[str, AnyArray]) -> object:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    match kind:
        case "array":
            array = arrays[content]
            return array if array.ndim else array[()]
        case "items":
            likes = like if isinstance(like, tuple) else ()
            hints = _item_hints(hint, len(content))
            return tuple(
                _revive(item, hints[at], likes[at] if at < len(likes) else None, f"{path}.{at}", arrays)
                for at, item in enumerate(content)
            )
        case "map":
            likes_by_key = like if isinstance(like, Mapping) else {}
            inner = _value_hint(hint)
            return {
                key: _revive(item, inner, likes_by_key.get(key), f"{path}.{key}", arrays)
                for key, item in content.items()
            }
        case "fields":
            return _revive_dataclass(content, hint, like, path, arrays)
        case other:
            raise ValueError(f"{path}: found an unknown kind of value, {other!r}")


def _revive_dataclass(
    content: dict[str, Any], hint: object, like: object, path: str, arrays: Mapping[str, AnyArray]
) -> object:
    kind = _dataclass_of(hint, like)
    if kind is None:
        raise ValueError(f"{path}: expected no dataclass there, found one")
    hints = get_type_hints(kind)
    values = {
        name: _revive(node, hints.get(name), getattr(like, name, None), f"{path}.{name}", arrays)
        for name, node in content.items()
    }
    return kind(**values)


def _dataclass_of(hint: object, like: object) -> type[Any] | None:
    """The dataclass that belongs in a place: that of the value there, or the one its annotation names."""
    if dataclasses.is_dataclass(like) and not isinstance(like, type):
        return type(like)
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    found = [each for each in options if isinstance(each, type) and dataclasses.is_dataclass(each)]
    return found[0] if len(found) == 1 else None


def _item_hints(hint: object, count: int) -> tuple[object, ...]:
    arguments = get_args(hint)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return (arguments[0],) * count
    return arguments if len(arguments) == count else (None,) * count


def _value_hint(hint: object) -> object:
    arguments = get_args(hint)
    return arguments[1] if len(arguments) == 2 else None
