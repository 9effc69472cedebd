"""The coordinator's part in the secure sum of one order: the sessions of its shards, and what has been summed.

No gRPC and no clock: the driver hands in what sites have sent, and asks for what they are to be told. Which of them
go on is the round's decision (`fedge.secure_round`); each method is called behind the event or the effect of its name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np

from fedge.errors import BlamedError, RemoteProtocolError, RunError
from fedge.events import Broken, Event, Unmasked
from fedge.pipeline import Aggregate
from fedge.secagg import server
from fedge.secagg.directory import Directory
from fedge.secagg.encoding import Encoding, mean_of
from fedge.secagg.ring import Words
from fedge.secagg.session import Advertisement, Context, Envelope, InputProof, Reveal, Roster, Shares
from fedge.secagg.shards import shard_of
from fedge.secagg.site import apply_all

Due = Literal["roster", "envelopes", "survivors", "consents"]
"""A message to a member."""


class SecureSum:
    """One order's. `context` is that of its first shard; `divisor` see `mean_of`."""

    def __init__(
        self, context: Context, directory: Directory, encoding: Encoding, divisor: int | None = None
    ) -> None:
        self.context = context
        self._encoding = encoding
        self._divisor = divisor
        shards = {at: replace(context, shard=at) for at in range(context.shards)}
        self._gathering = {at: server.Gathering(each, directory) for at, each in shards.items()}
        self._sharing: dict[int, server.Sharing] = {}
        self._collecting: dict[int, server.Collecting] = {}
        self._consenting: dict[int, server.Consenting] = {}
        self._revealing: dict[int, server.Revealing] = {}
        self._totals: dict[int, list[Words]] = {}

    def shard(self, site: str) -> int:
        """Where a site sums."""
        return shard_of(self.context, site) if self.context.shards > 1 else 0

    def advertised(self, advertisement: Advertisement) -> int:
        """P0: a site's keys; returns its shard.

        Raises:
            RemoteProtocolError: they are not for this order, or malformed, or not signed.
        """
        shard = self.shard(advertisement.site)
        self._gathering[shard] = self._gathering[shard].take(advertisement)
        return shard

    def enlist(self, sites: Collection[str]) -> None:
        """Fix the rosters: these take part."""
        for at, gathering in self._gathering.items():
            kept = gathering.only(sites)
            if kept.advertisements:
                self._sharing[at] = kept.close()

    def roster(self, site: str) -> Roster:
        """That of a member."""
        return self._sharing[self.shard(site)].roster

    def shared(self, site: str, shares: Shares) -> None:
        """P1: a member's envelopes for the others.

        Raises:
            RemoteProtocolError: it is no member, or they are not for every other one.
        """
        at = self.shard(site)
        self._sharing[at] = self._sharing[at].take(self._number(site), shares)

    def mask(self, sites: Collection[str]) -> None:
        """Everybody who takes part from here on has shared."""
        for at, sharing in self._sharing.items():
            if any(member.site in sites for member in sharing.roster.members):
                self._collecting[at] = sharing.close()

    def envelopes(self, site: str) -> Mapping[int, Envelope]:
        """What the others have sealed for a member."""
        return self._collecting[self.shard(site)].envelopes(self._number(site))

    def due(self, site: str) -> tuple[Due, ...]:
        """What a member is told that may have missed it: the latest message, and what has to come before it."""
        at = self.shard(site)
        if at in self._consenting:
            knows = not self.context.consistency or self._number(site) in self._consenting[at].consents
            return ("survivors", "consents") if at in self._revealing and knows else ("survivors",)
        if at in self._collecting:
            return ("envelopes",)
        return ("roster",) if at in self._sharing else ()

    def check(self, site: str, proof: InputProof) -> None:
        """P2: whether a masked vector of this digest may be added.

        Raises:
            RemoteProtocolError: the site has not signed that, or takes no part, or has handed in another.
        """
        self._with(site, proof)

    def add(self, site: str, proof: InputProof, data: bytes | memoryview) -> None:
        """Add a masked vector, as it was sent.

        Raises:
            RemoteProtocolError: as `check`; or it is of another length.
        """
        collecting, at = self._with(site, proof), self.shard(site)
        try:
            words = self._encoding.unpack(data)
        except ValueError as error:
            raise RemoteProtocolError(f"masked vector: {error}") from None
        total = self._totals.setdefault(at, self._encoding.zeros())
        for whole, part in zip(total, words, strict=True):
            np.add(whole, part, out=whole)
        self._collecting[at] = collecting

    def survive(self, sites: Collection[str]) -> None:
        """No other vector counts."""
        for at, collecting in self._collecting.items():
            if any(collecting.roster.member(number).site in sites for number in collecting.arrived):
                self._consenting[at] = collecting.close()

    def survivors(self, site: str) -> bytes:
        """P3: whose vectors are in the sum of a site's shard, as a bitmap over its roster."""
        return self._consenting[self.shard(site)].bitmap

    def consented(self, site: str, signature: bytes) -> None:
        """A survivor's consent.

        Raises:
            RemoteProtocolError: it is no survivor, or this is none.
        """
        at = self.shard(site)
        if at not in self._consenting:
            raise RemoteProtocolError("expected consents of survivors alone")
        self._consenting[at] = self._consenting[at].take(self._number(site), signature)

    def disclose(self, site: str) -> Mapping[int, bytes]:
        """P4: the consents that a survivor is shown before it reveals."""
        at = self.shard(site)
        if at not in self._revealing:
            self._revealing[at] = self._consenting[at].close()
        return self._consenting[at].consents

    def revealed(self, site: str, reveal: Reveal) -> None:
        """A survivor's shares.

        Raises:
            RemoteProtocolError: it is no survivor, or these are none.
        """
        at = self.shard(site)
        if at not in self._revealing:
            raise RemoteProtocolError("expected shares of survivors that were asked for them")
        self._revealing[at] = self._revealing[at].take(self._number(site), reveal)

    def outcome(self, sites: Collection[str]) -> tuple[Event, Aggregate | None]:
        """`unmask`, and what it means for the round."""
        order = self.context.order
        try:
            return Unmasked(order), self.unmask(sites)
        except BlamedError as error:
            return Broken(order, str(error), error.culprits), None
        except RunError as error:
            return Broken(order, str(error), final=True), None

    def unmask(self, sites: Collection[str]) -> Aggregate:
        """Take the masks off the sums of the shards of `sites`, and make their mean. Heavy: on any thread.

        Raises:
            BlamedError: some seeds cannot be rebuilt with the shares that are here; with more they may.
            RunError: the sum is not one that its members can have made.
        """
        shards = sorted({self.shard(site) for site in sites})
        recovered = {at: self._revealing[at].recover() for at in shards}
        sums = []
        for at in shards:
            total = self._totals[at]
            apply_all(total, add=recovered[at].add, subtract=recovered[at].subtract)
            sums.append(self._encoding.decode(total, len(self._revealing[at].survivors)))
        return mean_of(sums, sorted(sites), self._divisor)

    def _with(self, site: str, proof: InputProof) -> server.Collecting:
        collecting = self._collecting.get(self.shard(site))
        if collecting is None:
            raise RemoteProtocolError("expected masked vectors of members that have shared")
        return collecting.take(self._number(site), proof)

    def _number(self, site: str) -> int:
        sharing = self._sharing.get(self.shard(site))
        number = sharing.roster.number(site) if sharing is not None else None
        if number is None:
            raise RemoteProtocolError(f"expected messages of members of the sum, found one of {site}")
        return number
