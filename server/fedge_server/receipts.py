"""An update that was handed in, and the receipt that its sender waits for."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from fedge.refusal import Refusal
from fedge_server.spool import Upload


@dataclass(frozen=True, slots=True)
class Delivery:
    """A complete, well-formed update and the future that its sender's receipt waits on."""

    num_examples: int
    metrics: dict[str, float]
    upload: Upload | None
    receipt: asyncio.Future[Refusal | None]
    proof: bytes = b""
    """Of a masked update: its site's signature."""

    def answer(self, refusal: Refusal | None) -> None:
        """Tell its sender that it counts (None), or why it does not; the first answer holds."""
        if not self.receipt.done():
            self.receipt.set_result(refusal)
        if refusal is not None and self.upload is not None:
            self.upload.close()

    def leave(self, error: Exception) -> None:
        """No answer: the sender keeps it, and brings it to the next process."""
        self.receipt.set_exception(error)
        if self.upload is not None:
            self.upload.close()
