"""A run's state machine as JSON and back: values only, checked when they are read."""

from __future__ import annotations

from typing import Final

from pydantic import TypeAdapter, ValidationError

from fedge.errors import StorageError
from fedge.run_state import Federation

_ADAPTER: Final = TypeAdapter(Federation)


def encode_machine(machine: Federation) -> str:
    return _ADAPTER.dump_json(machine).decode()


def decode_machine(text: str) -> Federation:
    """The state machine that was encoded.

    Raises:
        StorageError: the text is not one.
    """
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise StorageError(
            f"store: expected the state of a run, found one that cannot be read: {problem['msg']}"
        ) from None
