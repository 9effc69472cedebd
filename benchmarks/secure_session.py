"""What the sites of a secure sum have sent: what a coordinator or a site works on. `session_file` keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedge.events import OrderId
from fedge.secagg.directory import Directory
from fedge.secagg.encoding import Encoding
from fedge.secagg.session import Advertisement, Context, InputProof, Reveal, Shares
from fedge.secagg.terms import SumTerms
from fedge_server.secure_sum import SecureSum

FEDERATION = "0123456789abcdef"


def context_of(terms: SumTerms) -> Context:
    """What the session is about, in all of its shards."""
    return terms.context(
        federation=FEDERATION,
        run_id="0123456789abcdef",
        order=OrderId("train", 1),
        offer=b"o" * 32,
        model=b"m" * 32,
        epoch=1,
    )


@dataclass(frozen=True, slots=True)
class Ending:
    """What is sent after the masked vectors if these sites survive, and what has to come out: the mean of theirs.

    `masks` and `agreements` are how many masks are on the sums, and how many of them are between a survivor and one
    that is gone, whose key has to be agreed on again.
    """

    survivors: tuple[str, ...]
    consents: Mapping[str, bytes]
    reveals: Mapping[str, Reveal]
    mean: npt.NDArray[np.float32]
    masks: int
    agreements: int


@dataclass(frozen=True, slots=True)
class Session:
    """All that the sites of one order have sent, by name; `endings` by the percentage that drops out."""

    terms: SumTerms
    size: int
    context: Context
    directory: Directory = field(repr=False)
    advertisements: Mapping[str, Advertisement] = field(repr=False)
    shares: Mapping[str, Shares] = field(repr=False)
    inputs: Mapping[str, tuple[InputProof, bytes]] = field(repr=False)
    endings: Mapping[int, Ending] = field(repr=False)

    @property
    def encoding(self) -> Encoding:
        return self.terms.encoding(self.size, self.context.digest)

    def until_masked(self) -> SecureSum:
        """A coordinator that has got everybody's keys and shares, and waits for vectors."""
        coordinator = SecureSum(self.context, self.directory, self.encoding)
        everybody = list(self.advertisements)
        for advertisement in self.advertisements.values():
            coordinator.advertised(advertisement)
        coordinator.enlist(everybody)
        for name, shares in self.shares.items():
            coordinator.shared(name, shares)
        coordinator.mask(everybody)
        return coordinator
