"""A coordinator that a test plays message by message: our service's stubs, real certificates, a real agent opposite.

The agent is the only site that is connected. The others of its federation are played here, by the same machine that
an agent has, and with keys that the CA has signed: friends of the coordinator, as far as a test wants them to be.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
from authorities import enrolled, new_authority
from harness import PATIENCE_S, Running, fedge_ok, initial_model, run_toml, set_tables, tasks_into, until
from scripted import honest_update

from fedge.config import parse_toml
from fedge.events import OrderId
from fedge.pipeline import Aggregate
from fedge.privacy.secure import KEY_BYTES, SecureSource
from fedge.refusal import RefusalCode
from fedge.run import RunConfig
from fedge.secagg.directory import Directory, Statement
from fedge.secagg.session import Advertisement, Context, InputProof
from fedge.secagg.site import Opened, Rules
from fedge.secagg.terms import SumTerms
from fedge.signing import SignedDirectory, public_bytes
from fedge.vector import Array, bytes_of
from fedge.wire import fedge_pb2 as pb
from fedge.wire import fedge_pb2_grpc as services
from fedge.wire import secure as codec
from fedge.wire.agreed import offer_digest, order_digest
from fedge.wire.codec import encode_blob, encode_order_id
from fedge.wire.keys import encode_directory
from fedge.wire.limits import PROTOCOL
from fedge_client.gate import Released
from fedge_client.identity import Identity, save_identity
from fedge_client.secure_part import SecurePart
from fedge_server.identity import Authority
from fedge_server.offers import offer_of
from fedge_server.secure_sum import SecureSum
from fedge_strategies import FedAvg

SITE = "ward-2"
OTHERS = ("ward-1", "ward-3", "ward-4")
EVERYBODY = tuple(sorted((SITE, *OTHERS)))

SECURE = """
[secure_aggregation]
enabled = true
bound = 50.0
max_weight = 100
metrics = ["train_loss"]
"""
_UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))


class Coordinator(services.FederationServicer):
    """The service that the agent is connected to. Everything that it says is kept, in its order."""

    def __init__(self, authority: Authority, identities: Mapping[str, Identity]) -> None:
        self.authority = authority
        self.identities = identities
        self.epoch = 0
        self.directory = pb.Directory()
        """What the agent is shown; that of the honest is `publish`ed."""
        self.said: list[pb.ClientMessage] = []
        self.sessions = 0
        self._outgoing: SimpleQueue[pb.ServerMessages | None] = SimpleQueue()
        self._changed = threading.Condition()

    # ---- the service ----

    def Session(self, request_iterator: Any, context: grpc.ServicerContext) -> Iterator[pb.ServerMessages]:
        next(request_iterator)
        outgoing: SimpleQueue[pb.ServerMessages | None] = SimpleQueue()
        with self._changed:
            self._outgoing.put(None)
            self._outgoing, self.sessions = outgoing, self.sessions + 1
            self._changed.notify_all()
        welcome = pb.Welcome(protocol=PROTOCOL, software="malicious", federation=self.authority.federation)
        yield pb.ServerMessages(messages=[pb.ServerMessage(welcome=welcome)])
        threading.Thread(target=self._listen, args=(request_iterator, outgoing), daemon=True).start()
        while (batch := outgoing.get()) is not None:
            yield batch

    def _listen(self, requests: Iterator[pb.ClientMessage], outgoing: SimpleQueue[Any]) -> None:
        try:
            for message in requests:
                with self._changed:
                    self.said.append(message)
                    self._changed.notify_all()
        except grpc.RpcError:
            pass  # the agent is gone; it comes again, or a test says why not
        outgoing.put(None)

    def Keys(self, request: pb.DirectoryRequest, context: grpc.ServicerContext) -> pb.Directory:
        return self.directory

    def Fetch(self, request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[pb.Chunk]:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "models ride inline here")

    def Deliver(self, request_iterator: Any, context: grpc.ServicerContext) -> pb.Receipt:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "updates ride inline here")

    def Resume(self, request: pb.ResumeRequest, context: grpc.ServicerContext) -> pb.ResumeReply:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "updates ride inline here")

    def Renew(self, request: pb.EnrolRequest, context: grpc.ServicerContext) -> pb.EnrolReply:
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "certificates last for longer than a test")

    # ---- what a test does ----

    def tell(self, **message: Any) -> None:
        """Send the agent a message of this kind, whatever it is."""
        self._outgoing.put(pb.ServerMessages(messages=[pb.ServerMessage(**message)]))

    def tell_all(self, messages: list[pb.ServerMessage]) -> None:
        """Several in one write."""
        self._outgoing.put(pb.ServerMessages(messages=messages))

    def heard(self, kind: str, about: Callable[[Any], bool]) -> list[Any]:
        """What the agent has said of this kind so far."""
        bodies = [getattr(each, kind) for each in self.said if each.WhichOneof("kind") == kind]
        return [body for body in bodies if about(body)]

    def hear(self, kind: str, about: Callable[[Any], bool], *, after: int = 0) -> Any:
        """The agent's next message of this kind: the first, but for so many that came before."""
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            while len(found := self.heard(kind, about)) <= after:
                assert self._changed.wait(deadline - time.monotonic()), (
                    f"waited in vain for {kind}; said was {[each.WhichOneof('kind') for each in self.said[-8:]]}"
                )
        return found[after]

    def reconnected(self, since: int) -> None:
        """Wait until the agent has begun another session."""
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            while self.sessions <= since:
                assert self._changed.wait(deadline - time.monotonic()), "the agent has not come again"

    def publish(self, *, epoch: int | None = None, **instead: bytes | None) -> SignedDirectory:
        """Show a directory that the CA has signed, of the next epoch unless another is asked for.

        `instead`, by site with underscores, are keys in the place of the sites' own; None leaves a site out.
        """
        keys: dict[str, bytes | None] = {
            site: public_bytes(each.signing) for site, each in self.identities.items()
        }
        keys |= {site.replace("_", "-"): key for site, key in instead.items()}
        lines = [Statement(site, key, 0, 2**33) for site, key in keys.items() if key is not None]
        epoch = self.epoch + 1 if epoch is None else epoch
        self.epoch = max(self.epoch, epoch)
        directory = Directory.of(self.authority.federation, epoch, lines)
        signed = SignedDirectory(directory, directory.sign(self.authority.issuer.key))
        self.show(signed)
        return signed

    def show(self, signed: SignedDirectory) -> None:
        """Show this directory, whoever has signed it."""
        self.directory = encode_directory(signed)

    def forge(self, directory: Directory, *, signer: Authority | None = None) -> None:
        """Show a directory under the CA's signature, or somebody else's."""
        key = (signer or self.authority).issuer.key
        self.show(SignedDirectory(directory, directory.sign(key)))


@dataclass(eq=False)
class Run:
    """A run that the agent was offered, and takes part in."""

    coordinator: Coordinator
    run_id: str
    config: RunConfig
    terms: SumTerms
    offer: pb.Offer
    signed: SignedDirectory
    round: int = 0

    @classmethod
    def offered(cls, coordinator: Coordinator, *, more: str = SECURE) -> Run:
        """Make an offer, which may be refused."""
        text = run_toml("attacked", rounds=50, size=len(EVERYBODY), quorum=3, more=more)
        config = parse_toml(text, RunConfig, source="run.toml")
        layout = initial_model(text).layout
        terms, run_id = SumTerms.of(config, FedAvg(), layout), secrets.token_hex(8)
        offer = offer_of(run_id, config, layout, kind="train", strategy="FedAvg()", secure=terms)
        agreed = terms or SumTerms(
            least=3, clients=4, bound=1.0
        )  # of an offer without, nothing is ever summed
        return cls(coordinator, run_id, config, agreed, offer, coordinator.publish())

    @classmethod
    def begun(cls, coordinator: Coordinator, *, more: str = SECURE) -> Run:
        """Make an offer that the agent accepts."""
        run = cls.offered(coordinator, more=more)
        coordinator.tell(offer=run.offer)
        coordinator.hear("accept", run.is_about)
        return run

    def is_about(self, body: Any) -> bool:
        return bool(body.run_id == self.run_id)

    def end(self) -> None:
        self.coordinator.tell(ended=pb.Ended(run_id=self.run_id, status="done"))

    def play(self, *, round: int | None = None, attempt: int = 1, **changes: Any) -> Play:
        """An order of the next round, unless told otherwise; `changes` are of its model, or of its epoch."""
        self.round = self.round + 1 if round is None else round
        return Play.of(self, OrderId("train", self.round, attempt), **changes)


@dataclass(eq=False)
class Play:
    """One order's secure sum. By the rules, step by step: each step sends the agent what the one before has made, takes
    the agent's answer, and returns what would be sent next, for a test to do with as it likes."""

    run: Run
    message: pb.Order
    context: Context
    sum: SecureSum
    parts: dict[str, SecurePart] = field(default_factory=dict)
    keys: Advertisement | None = None
    """The agent's."""
    opened: dict[str, Opened] = field(default_factory=dict)
    """What each other member knows: if it is a friend, so does the coordinator."""

    @classmethod
    def of(cls, run: Run, order: OrderId, *, scale: float = 1.0, epoch: int | None = None) -> Play:
        vector = initial_model(_toml(run)).vector * np.float32(scale)
        message = pb.Order(
            run_id=run.run_id,
            id=encode_order_id(order),
            deadline_s=PATIENCE_S,
            model=encode_blob(bytes_of(vector)),
            secure=pb.SecureOrder(epoch=run.signed.directory.epoch if epoch is None else epoch),
        )
        context = _context(run, order, message)
        encoding = run.terms.encoding(len(vector), context.digest)
        return cls(run, message, context, SecureSum(context, run.signed.directory, encoding))

    @property
    def model(self) -> Array:
        return np.frombuffer(self.message.model.inline, np.float32)

    def part(self, site: str, context: Context | None = None) -> SecurePart:
        """Another site's part, in this sum unless in another."""
        context = context or self.context
        return SecurePart(
            context,
            site,
            self.run.coordinator.identities[site].signing,
            rules=Rules(),
            directory=self.run.signed.directory,
            encoding=self.run.terms.encoding(len(self.model), context.digest),
            entropy=secrets.token_bytes,
        )

    # ---- the protocol, by the rules ----

    def order(self) -> pb.Roster:
        self.run.coordinator.tell(order=self.message)
        self.keys = codec.decode_member(self.hear("advertise").member, site=SITE)
        self.sum.advertised(self.keys)
        for site in OTHERS:
            self.parts[site] = self.part(site)
            self.sum.advertised(self.parts[site].advertisement)
        self.sum.enlist(EVERYBODY)
        return self.wire(pb.Roster, members=codec.encode_members(self.sum.roster(SITE)))

    def roster(self, roster: pb.Roster | None = None) -> pb.Envelopes:
        self.run.coordinator.tell(roster=roster or self.order())
        self.sum.shared(SITE, codec.decode_shares(self.hear("share").envelopes))
        for site, part in self.parts.items():
            self.sum.shared(site, part.share(self.sum.roster(site)))
        self.sum.mask(EVERYBODY)
        return self.wire(pb.Envelopes, envelopes=codec.encode_envelopes(self.sum.envelopes(SITE)))

    def envelopes(self, envelopes: pb.Envelopes | None = None, *, without: str = "") -> pb.Survivors:
        """`without` drops out before it has masked anything."""
        self.run.coordinator.tell(envelopes=envelopes or self.roster())
        update = self.hear("update")
        self.sum.add(SITE, self.digest_of(update), update.vector.inline)
        survivors = {SITE, *OTHERS} - {without}
        for site in survivors - {SITE}:
            self.parts[site].open(self.sum.envelopes(site))
            knows = self.parts[site]._state
            assert isinstance(knows, Opened)
            self.opened[site] = knows
            masked = self.parts[site].mask(self.released(site), SecureSource(secrets.token_bytes(KEY_BYTES)))
            self.sum.add(site, masked.proof, masked.data)
        self.sum.survive(survivors)
        return self.wire(pb.Survivors, members=self.sum.survivors(SITE))

    def survivors(self, survivors: pb.Survivors | None = None, *, without: str = "") -> pb.Consents:
        self.run.coordinator.tell(survivors=survivors or self.envelopes(without=without))
        self.sum.consented(SITE, self.hear("consent").signature)
        for site in set(OTHERS) - {without}:
            self.sum.consented(site, self.parts[site].consent(self.sum.survivors(site)))
        return codec.encode_consents(self.run.run_id, self.message.id, self.sum.disclose(SITE))

    def consents(self, consents: pb.Consents | None = None, *, without: str = "") -> Aggregate:
        self.run.coordinator.tell(consents=consents or self.survivors(without=without))
        self.sum.revealed(SITE, codec.decode_reveal(self.hear("reveal").shares))
        for site in set(OTHERS) - {without}:
            self.sum.revealed(site, self.parts[site].reveal(self.sum.disclose(site)))
        return self.sum.unmask({SITE, *OTHERS} - {without})

    # ---- what is heard, and what is true ----

    def is_about(self, body: Any) -> bool:
        return bool((body.run_id, body.id) == (self.run.run_id, self.message.id))

    def hear(self, kind: str, *, after: int = 0) -> Any:
        return self.run.coordinator.hear(kind, self.is_about, after=after)

    def heard(self, kind: str) -> list[Any]:
        return self.run.coordinator.heard(kind, self.is_about)

    def wire(self, kind: type[Any], **fields: Any) -> Any:
        """A message of this sum."""
        return kind(run_id=self.run.run_id, id=self.message.id, **fields)

    @staticmethod
    def digest_of(update: pb.Update) -> InputProof:
        return InputProof(update.vector.digest, update.proof)

    def released(self, site: str) -> Released:
        """What an honest site of this name learns."""
        update = honest_update(self.message, self.run.config, site=site)
        metrics = {each.name: each.value for each in update.metrics if each.name in self.run.terms.metrics}
        return Released(np.frombuffer(update.vector.inline, np.float32), update.num_examples, metrics)

    def ends_well(self, *, without: str = "") -> None:
        """Play it to its end; what comes out is the mean of what honest sites learn."""
        aggregate = self.consents(without=without)
        learned = [self.released(site) for site in EVERYBODY if site != without]
        weights = [each.num_examples for each in learned]
        assert aggregate.num_examples == sum(weights)
        mean = np.average([each.vector for each in learned], axis=0, weights=weights)
        assert np.allclose(
            aggregate.vector, mean, rtol=0, atol=1e-5
        )  # four roundings of 50 * 400 / 2**31, over 41

    def is_refused(
        self,
        code: RefusalCode,
        what: str = "",
        *,
        blamed: tuple[str, ...] = (),
        handed_in: bool = False,
    ) -> None:
        """The agent says so, and why; it reveals nothing, then or later, nor hands in what it had not yet; and it goes
        on with the next round."""
        failed = self.hear("failed")
        assert (RefusalCode(failed.refusal.code), tuple(failed.culprits)) == (code, blamed)
        assert what in failed.refusal.message
        self.run.play(round=max(self.run.round, self.message.id.round) + 1).ends_well()
        assert not self.heard("reveal")
        assert bool(self.heard("update")) == handed_in


def _context(run: Run, order: OrderId, message: pb.Order) -> Context:
    return run.terms.context(
        federation=run.coordinator.authority.federation,
        run_id=run.run_id,
        order=order,
        offer=offer_digest(run.offer),
        model=order_digest(message),
        epoch=message.secure.epoch,
    )


def _toml(run: Run) -> str:
    return run_toml("attacked", rounds=50, size=len(EVERYBODY), quorum=3)


@dataclass(eq=False)
class Attacked:
    """The coordinator, and the one agent that it is after."""

    coordinator: Coordinator
    folder: Path
    agent: Running

    @property
    def control(self) -> Path:
        return self.folder / "control"

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Within the block the agent's training does not end once it has begun."""
        (self.control / "reached").unlink(missing_ok=True)
        (self.control / "block").touch()
        try:
            yield
        finally:
            (self.control / "block").unlink()

    def at_work(self) -> None:
        until((self.control / "reached").exists, "the agent is at work")

    @property
    def ledger(self) -> dict[str, Any]:
        """What `fedge client ledger --json` prints."""
        found = fedge_ok("client", "ledger", self.folder / "client.toml", "--json", "--verify")
        return dict(json.loads(found))

    def restart(self) -> None:
        """End the agent's process, and begin another in its folder."""
        sessions = self.coordinator.sessions
        self.agent.end()
        self.agent = _start(self.folder)
        self.coordinator.reconnected(sessions)


@contextmanager
def attacked(folder: Path, **policy: Any) -> Iterator[Attacked]:
    """A malicious coordinator and a real agent that is connected to it; `policy` are further lines of its owner's."""
    now = datetime.now(UTC).replace(microsecond=0)
    authority, _ = new_authority(folder / "authority", now=now)
    identities = {site: enrolled(authority, site, now=now) for site in EVERYBODY}
    coordinator = Coordinator(authority, identities)
    server = grpc.server(ThreadPoolExecutor(8), options=_UNLIMITED)
    services.add_FederationServicer_to_server(coordinator, server)
    own = authority.server_credential(now=now)
    port = server.add_secure_port(
        "127.0.0.1:0",
        grpc.ssl_server_credentials(
            [(own.key_pem, own.certificate_pem)],
            root_certificates=authority.ca_pem,
            require_client_auth=True,
        ),
    )
    server.start()
    site = folder / SITE
    save_identity(site, identities[SITE])
    tasks_into(site)
    (site / "control").mkdir()
    (site / "client.toml").write_text(f'server = "127.0.0.1:{port}"\n', encoding="utf-8")
    tables = {
        "policy": {"require_secure_aggregation": True, "max_runs": 64} | policy,
        "worker": {"threads": 1},
        "data": {"control": str(site / "control")},
    }
    set_tables(site / "client.toml", tables)
    started = Attacked(coordinator, site, _start(site))
    try:
        coordinator.reconnected(0)
        yield started
    finally:
        started.agent.end()
        server.stop(None).wait(PATIENCE_S)


def _start(folder: Path) -> Running:
    return Running.start("client", "start", folder / "client.toml", log=folder / "agent.log")
