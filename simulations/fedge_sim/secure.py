"""Secure aggregation in a simulation: the protocol itself, with every site's keys, or what it comes to.

The ideal one adds up the same encoded vectors without masks. Both give the same bits, and both go through the same
phases of the same round machine: what a site would send is an event that comes next.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field, replace

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding as KeyEncoding
from cryptography.hazmat.primitives.serialization import PublicFormat

from fedge.errors import RunError
from fedge.events import (
    Advertised,
    Broken,
    Consented,
    Disclose,
    Enlist,
    Event,
    Mask,
    OrderId,
    Remind,
    Revealed,
    SecureEffect,
    Shared,
    Survive,
    Unmask,
    Unmasked,
)
from fedge.pipeline import Aggregate
from fedge.privacy.secure import SecureSource
from fedge.run import RunConfig
from fedge.secagg.directory import Directory, Statement
from fedge.secagg.encoding import Encoding, mean_of
from fedge.secagg.ring import Words
from fedge.secagg.session import Context
from fedge.secagg.shards import shard_of
from fedge.secagg.site import Rules
from fedge.secagg.terms import SumTerms
from fedge.seeds import derive_key
from fedge_client.gate import Released
from fedge_client.secure_part import SecurePart
from fedge_server.secure_sum import SecureSum

_FEDERATION = "simulation"
_FOREVER_S = 2**40


@dataclass
class _Order:
    """An order whose sum is in the making. `session` and `parts` are there in the protocol alone."""

    context: Context
    encoding: Encoding
    totals: dict[int, list[Words]] = field(default_factory=dict)
    session: SecureSum | None = None
    parts: dict[str, SecurePart] = field(default_factory=dict)
    aggregate: Aggregate | None = None

    def shard(self, client: str) -> int:
        return shard_of(self.context, client) if self.context.shards > 1 else 0


class SecureSums:
    """Those of one run. `events` are what clients send next, in order."""

    def __init__(
        self,
        terms: SumTerms,
        *,
        seed: int,
        size: int,
        clients: Collection[str],
        exchange_s: float,
        protocol: bool,
        divisor: int | None = None,
    ) -> None:
        self._terms, self._seed, self._size, self._protocol = terms, seed, size, protocol
        self._divisor = divisor
        self._orders: dict[OrderId, _Order] = {}
        self._directory = Directory(_FEDERATION, 1, ())
        if protocol:
            statements = [Statement(each, self._public(each), 0, _FOREVER_S) for each in clients]
            self._directory = Directory.of(_FEDERATION, 1, statements)
        self.of_round = terms.of_round(exchange_s)
        self.events: deque[Event] = deque()

    @classmethod
    def of(
        cls, run: RunConfig, terms: SumTerms | None, size: int, clients: Collection[str]
    ) -> SecureSums | None:
        """What sums a run's updates securely; None where nothing does."""
        if terms is None:
            return None
        return cls(
            terms,
            seed=run.seed,
            size=size,
            clients=clients,
            exchange_s=run.secure_aggregation.exchange_s,
            protocol=run.simulation.secure_aggregation == "protocol",
            divisor=run.cohort.size if terms.noise is not None else None,
        )

    def ask(self, client: str, order: OrderId) -> None:
        """A client is given an order, and shows its keys."""
        of = self._orders.get(order)
        if of is None:
            of = self._orders[order] = self._begin(order)
        if of.session is not None and client not in of.parts:
            of.parts[client] = self._part(client, of)
            of.session.advertised(of.parts[client].advertisement)
        self.events.append(Advertised(client, order, of.shard(client)))

    def do(self, effect: SecureEffect) -> None:
        """What the round wants done."""
        order = effect.order
        of = self._orders[order]
        match effect:
            case Enlist(_, clients):
                self._enlist(of, clients)
                self.events += [Shared(client, order) for client in clients]
            case Mask(_, clients):
                self._mask(of, clients)
            case Survive(_, clients):
                self._survive(of, clients)
                self.events += [Consented(client, order) for client in clients]
            case Disclose(_, clients):
                self._disclose(of, clients)
                self.events += [Revealed(client, order) for client in clients]
            case Unmask(_, clients):
                self.events.append(self._unmask(of, clients))
            case Remind():
                pass  # nobody here misses a message

    def add(self, client: str, order: OrderId, released: Released) -> int:
        """An update is accepted; returns how many bytes it measures on the wire."""
        of = self._orders[order]
        key = derive_key(self._seed, "rounding", client, order.kind, order.round, order.attempt)
        source = SecureSource(key)
        if of.session is not None:
            masked = of.parts[client].mask(released, source)
            of.session.add(client, masked.proof, masked.data)
            return len(masked.data)
        vectors = of.encoding.encode(released.vector, released.num_examples, released.metrics, source)
        total = of.totals.setdefault(of.shard(client), of.encoding.zeros())
        for whole, part in zip(total, vectors, strict=True):
            whole += part
        return of.encoding.packed_bytes

    def take(self, order: OrderId) -> Aggregate:
        """The aggregate of an order that is closed."""
        aggregate = self._orders.pop(order).aggregate
        assert aggregate is not None  # its masks came off before
        return aggregate

    def drop(self, order: OrderId) -> None:
        """An order is given up."""
        self._orders.pop(order, None)
        self.events = deque(event for event in self.events if getattr(event, "order", None) != order)

    def clear(self) -> None:
        """The coordinator has started again."""
        self._orders.clear()
        self.events.clear()

    def _begin(self, order: OrderId) -> _Order:
        terms = self._terms
        context = terms.context(
            federation=_FEDERATION,
            run_id="simulation",
            order=order,
            offer=derive_key(self._seed, "beacon"),
            model=b"",
            epoch=1,
        )
        seed = context.digest  # of the rotation, which is the same in all shards
        encoding = terms.encoding(0 if order.kind == "evaluate" else self._size, seed)
        session = SecureSum(context, self._directory, encoding, self._divisor) if self._protocol else None
        return _Order(context, encoding, session=session)

    def _part(self, client: str, of: _Order) -> SecurePart:
        order = of.context.order
        key = derive_key(self._seed, "secrets", client, order.kind, order.round, order.attempt)
        source = SecureSource(key)

        def entropy(count: int) -> bytes:
            return source.uint32(-(-count // 4)).tobytes()[:count]

        return SecurePart(
            replace(of.context, shard=of.shard(client)),
            client,
            self._signer(client),
            rules=Rules(honest_coordinator=True),
            directory=self._directory,
            encoding=of.encoding,
            entropy=entropy,
        )

    def _enlist(self, of: _Order, clients: Collection[str]) -> None:
        if of.session is not None:
            of.session.enlist(clients)
            for client in clients:
                of.session.shared(client, of.parts[client].share(of.session.roster(client)))

    def _mask(self, of: _Order, clients: Collection[str]) -> None:
        if of.session is not None:
            of.session.mask(clients)
            for client in clients:
                of.parts[client].open(of.session.envelopes(client))

    def _survive(self, of: _Order, clients: Collection[str]) -> None:
        if of.session is not None:
            of.session.survive(clients)
            for client in clients:
                signature = of.parts[client].consent(of.session.survivors(client))
                if of.context.consistency:
                    of.session.consented(client, signature)

    def _disclose(self, of: _Order, clients: Collection[str]) -> None:
        if of.session is not None:
            for client in clients:
                of.session.revealed(client, of.parts[client].reveal(of.session.disclose(client)))

    def _unmask(self, of: _Order, clients: Collection[str]) -> Event:
        order = of.context.order
        if of.session is None:
            members = {at: [each for each in clients if of.shard(each) == at] for at in sorted(of.totals)}
            try:
                sums = [
                    of.encoding.decode(of.totals[at], len(names)) for at, names in members.items() if names
                ]
            except RunError as error:
                return Broken(order, str(error), final=True)
            of.aggregate = mean_of(sums, sorted(clients), self._divisor)
            return Unmasked(order)
        event, of.aggregate = of.session.outcome(clients)
        return event

    def _signer(self, client: str) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(derive_key(self._seed, "identity", client))

    def _public(self, client: str) -> bytes:
        return self._signer(client).public_key().public_bytes(KeyEncoding.Raw, PublicFormat.Raw)
