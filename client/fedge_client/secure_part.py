"""A site's part in the secure sum of one order: which step of the protocol it is at, and what it has said.

Messages may come again after a broken link. The same one is answered with the same bytes, another one of its kind
with a refusal: a site shares once, masks one vector, consents once and reveals once. What a later step does not need
is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.errors import RefusedError
from fedge.privacy.secure import SecureSource
from fedge.refusal import Refusal, RefusalCode
from fedge.secagg import site
from fedge.secagg.canonical import members_of
from fedge.secagg.directory import Directory
from fedge.secagg.encoding import Encoding
from fedge.secagg.session import Context, Envelope, InputProof, Reveal, Roster, Shares
from fedge.secagg.site import Advertised, Consented, Entropy, Masked, Opened, Rules, Shared
from fedge.vector import digest_of
from fedge_client.gate import Released


@dataclass(frozen=True, slots=True, eq=False)
class MaskedUpdate:
    """What leaves this site of an update: bytes that say nothing by themselves, and whose they are."""

    data: bytes
    proof: InputProof
    cut: bool = False
    """Whether elements of it were cut to the run's bound."""


class SecurePart:
    """One order's. Not for several threads at once."""

    def __init__(
        self,
        context: Context,
        name: str,
        signer: Ed25519PrivateKey,
        *,
        rules: Rules,
        directory: Directory,
        encoding: Encoding,
        entropy: Entropy,
    ) -> None:
        """Begin a session: P0.

        Raises:
            RefusedError: PROTECTION_TOO_WEAK; its terms are not as the owner's rules want them.
        """
        self.context = context
        self._directory, self._encoding, self._entropy = directory, encoding, entropy
        state, self.advertisement = site.advertise(context, name, signer, rules, entropy)
        self._state: Advertised | Shared | Opened | Masked | Consented | None = state
        self._roster: Roster | None = None
        self._shares: Shares | None = None
        self._envelopes: Mapping[int, Envelope] | None = None
        self._survivors: bytes | None = None
        self._consent: bytes | None = None
        self._reveal: Reveal | None = None
        self.masked: MaskedUpdate | None = None

    def __repr__(self) -> str:
        return f"SecurePart({self.context.order}, {type(self._state).__name__})"

    def share(self, roster: Roster) -> Shares:
        """P1.

        Raises:
            RefusedError: see `fedge.secagg.site.Advertised.share`; or there was another roster.
        """
        if self._shares is not None and roster == self._roster:
            return self._shares
        state = self._state
        if not isinstance(state, Advertised):
            raise _again("a roster", RefusalCode.ROSTER_INVALID)
        self._state, self._shares = state.share(roster, self._directory, self._entropy)
        self._roster = roster
        return self._shares

    def open(self, envelopes: Mapping[int, Envelope]) -> None:
        """P2, first half.

        Raises:
            BlamedError, RefusedError: see `fedge.secagg.site.Shared.open`; or there were others.
        """
        if envelopes == self._envelopes:
            return
        state = self._state
        if not isinstance(state, Shared):
            raise _again("envelopes", RefusalCode.ROSTER_INVALID)
        self._state, self._envelopes = state.open(envelopes), envelopes

    def mask(self, released: Released, source: SecureSource) -> MaskedUpdate:
        """P2: encode what the gate has released, and mask it; from `source` come the rounding and the noise. Heavy: on
        any thread.

        Raises:
            RefusedError: NOT_FINITE; it cannot be encoded.
        """
        if self.masked is not None:
            return self.masked
        state = self._state
        if not isinstance(state, Opened):
            raise _again("an update", RefusalCode.NOT_ASKED)
        try:
            vectors = self._encoding.encode(released.vector, released.num_examples, released.metrics, source)
        except ValueError as error:
            raise RefusedError(Refusal(RefusalCode.NOT_FINITE, str(error))) from None
        cut = self._encoding.was_cut(vectors)
        masked = state.mask(vectors)
        data = self._encoding.pack(vectors)
        self._state = masked
        self.masked = MaskedUpdate(data, masked.prove(digest_of(data)), cut)
        return self.masked

    def consent(self, survivors: bytes) -> bytes:
        """P3: `survivors` is a bitmap over the roster.

        Raises:
            RefusedError: see `fedge.secagg.site.Masked.consent`; or there were others.
        """
        if self._consent is not None and survivors == self._survivors:
            return self._consent
        state = self._state
        if not isinstance(state, Masked):
            raise _again("survivors", RefusalCode.SURVIVORS_INVALID)
        try:
            numbers = members_of(survivors, len(state.roster))
        except ValueError as error:
            raise RefusedError(Refusal(RefusalCode.SURVIVORS_INVALID, str(error))) from None
        self._state, self._consent = state.consent(numbers)
        self._survivors = survivors
        return self._consent

    def reveal(self, consents: Mapping[int, bytes]) -> Reveal:
        """P4. The caller has made it durable that this round is spent, and nobody is told before.

        Raises:
            RefusedError: see `fedge.secagg.site.Consented.reveal`.
        """
        if self._reveal is not None:
            return self._reveal
        state = self._state
        if not isinstance(state, Consented):
            raise _again("consents", RefusalCode.CONSENTS_INVALID)
        self._reveal = state.reveal(consents)
        self._state = None  # what could say more than this
        return self._reveal


def _again(what: str, code: RefusalCode) -> RefusedError:
    return RefusedError(Refusal(code, f"expected {what} once, in its turn, and found another"))
