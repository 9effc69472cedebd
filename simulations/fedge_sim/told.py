"""What a results folder says of a simulation, as it is read back: strictly, since anybody may have written it."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedge.errors import ConfigError
from fedge.files import read_capped

MAX_BYTES: Final = 1 << 30
"""Of a history: a million rounds of a thousand clients are less."""

_MEGABYTE = 1e6
_HOUR = 3600.0

Number = Literal[
    "round", "attempt", "seconds", "refused", "virtual_s", "joules", "wasted", "present", "epsilon"
]
Part = Literal["metrics", "lowest_tenth", "highest_tenth"]
Count = Annotated[int, Field(ge=0, le=1 << 62)]


class _Read(BaseModel):
    """Of the types that were written; what was added since is left alone."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Round(_Read):
    """A line of history.jsonl."""

    round: Count
    attempt: Count
    clients: list[str]
    seconds: float
    bytes_down: Count
    bytes_up: Count
    refused: Count
    metrics: dict[str, float | None]
    virtual_s: float | None = None
    joules: float | None = None
    wasted: Count | None = None
    present: Count | None = None
    epsilon: float | None = None
    lowest_tenth: dict[str, float | None] = {}  # pydantic copies it
    highest_tenth: dict[str, float | None] = {}  # as above


class _Summary(_Read):
    """The part of a summary that is used by name; a page shows all of it."""

    name: str
    clients: Count


class _Manifest(_Read):
    summary: dict[str, Any]
    run: dict[str, Any]
    versions: dict[str, str]
    labels: dict[str, dict[str, Count]] = {}  # pydantic copies it


@dataclass(frozen=True, eq=False)
class Told:
    """A simulation. `label` is what it is called beside others."""

    label: str
    name: str
    clients: int
    summary: dict[str, Any]
    run: dict[str, Any]
    versions: dict[str, str]
    labels: dict[str, dict[str, int]]
    rounds: tuple[Round, ...]

    @classmethod
    def of(cls, folder: Path, *, label: str) -> Told:
        """Read a results folder.

        Raises:
            ConfigError: it is none, or damaged.
        """
        try:
            manifest = _Manifest.model_validate_json(
                read_capped(folder / "manifest.json", max_bytes=MAX_BYTES)
            )
            summary = _Summary.model_validate(manifest.summary)
            history = read_capped(folder / "history.jsonl", max_bytes=MAX_BYTES)
            rounds = tuple(Round.model_validate_json(line) for line in history.splitlines())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(
                f"{folder}: expected the results of `fedge simulate`, found a damaged manifest.json or history.jsonl: "
                f"{where + ': ' if where else ''}{first['msg'][:200]}"
            ) from None
        return cls(
            label,
            summary.name,
            summary.clients,
            manifest.summary,
            manifest.run,
            manifest.versions,
            manifest.labels,
            rounds,
        )

    @property
    def metrics(self) -> list[str]:
        """Names, in the order in which they first came."""
        return list(dict.fromkeys(name for each in self.rounds for name in each.metrics))

    def numbers(self, name: Number) -> list[float]:
        """By round; NaN where there is none."""
        found = (getattr(each, name) for each in self.rounds)
        return [math.nan if value is None else float(value) for value in found]

    def has(self, name: Number) -> bool:
        """Whether any round says so."""
        return any(getattr(each, name) is not None for each in self.rounds)

    @property
    def hours(self) -> list[float]:
        """Of virtual time, by round."""
        return [each / _HOUR for each in self.numbers("virtual_s")]

    def metric(self, name: str, part: Part = "metrics") -> list[float]:
        """By round; NaN where there is none."""
        found = (getattr(each, part).get(name) for each in self.rounds)
        return [math.nan if value is None else value for value in found]

    @property
    def sent_mb(self) -> list[float]:
        """Megabytes that have crossed the wire by each round, both ways."""
        return list(accumulate((each.bytes_up + each.bytes_down) / _MEGABYTE for each in self.rounds))

    @property
    def turns(self) -> Counter[int]:
        """How many clients have so many updates in the model."""
        taken = Counter(client for each in self.rounds for client in each.clients)
        turns = Counter(taken.values())
        if self.clients > len(taken):
            turns[0] = self.clients - len(taken)
        return turns
