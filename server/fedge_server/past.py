"""A run that nobody drives: it has ended, or it cannot go on here. What it was is read from the store."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from google.protobuf.message import DecodeError

from fedge.config import parse_toml
from fedge.errors import StorageError
from fedge.run import RunConfig
from fedge.run_state import Federation
from fedge.vector import Layout, Model
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import decode_layout
from fedge_server.archive import Archive
from fedge_server.history import History
from fedge_server.store.machine import decode_machine
from fedge_server.store.records import KeptRun, RunRecord

_MODEL = "state.model"
"""Where every checkpoint has the model: see `fedge_server.archive.Saved`."""


@dataclass(frozen=True, slots=True)
class PastRun:
    """A run's last moment. `held` says why it does not go on although it has not ended."""

    kept: KeptRun
    config: RunConfig
    layout: Layout
    machine: Federation
    history: History = field(repr=False)
    archive: Archive = field(repr=False)
    held: str = ""

    @classmethod
    def of(cls, kept: KeptRun, archive: Archive) -> PastRun:
        """Read what the store has of a run, but for its vectors. Blocks.

        Raises:
            StorageError, ConfigError: its records are damaged, or of a version that this one cannot read.
        """
        config = parse_toml(kept.record.run_toml, RunConfig, source=f"run.toml of {kept.record.run_id}")
        try:
            layout = decode_layout(pb.Layout.FromString(kept.record.layout))
        except DecodeError:
            raise StorageError(f"store: the layout of run {kept.record.run_id} is damaged") from None
        machine = decode_machine(kept.progress.machine)
        history = History(list(archive.store.rows(kept.record.run_id)))
        return cls(kept, config, layout, machine, history, archive)

    def holding(self, reason: str) -> PastRun:
        """The same run, which cannot go on for this reason."""
        return replace(self, held=reason)

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def record(self) -> RunRecord:
        return self.kept.record

    @property
    def over(self) -> bool:
        return True

    @property
    def waiting_for(self) -> str:
        if self.held:
            return f"this run cannot go on; correct this and start the coordinator again: {self.held}"
        return self.machine.reason

    def read_model(self) -> Model:
        """The model of the last committed round. Blocks.

        Raises:
            StorageError: its file is missing or damaged.
        """
        vector = self.archive.read(self.kept).arrays.get(_MODEL)
        if vector is None or vector.dtype != "float32" or vector.shape != (self.layout.size,):
            raise StorageError(
                f"store: expected the model of run {self.run_id} in its checkpoint, found none"
            )
        return Model(vector, self.layout)
