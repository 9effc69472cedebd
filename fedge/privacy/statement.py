"""A run's statement of differential privacy: what was promised to whom, in trust of whom, and the signature.

A statement is canonical JSON, so that the signature is over bytes that anybody can make again.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedge.errors import IdentityError
from fedge.principal import key_of_pem, load_certificate, principal_of
from fedge.privacy.central import Central
from fedge.privacy.config import Unit
from fedge.privacy.mechanism import merged, scaled
from fedge.privacy.pld import statement
from fedge.privacy.terms import Terms, price
from fedge.run import RunConfig
from fedge.secagg.terms import SumTerms
from fedge.vector import Layout

DOMAIN: Final = b"fedge-dp-statement/1\n"
MAX_STATEMENT_BYTES: Final = 1 << 22

ADJACENCY: Final[Mapping[Unit, str]] = {
    "none": "",
    "example": "add or remove one training example of one site, whose number of examples counts as known",
    "client": "add or remove everything of one site",
}
TRUST: Final[Mapping[Unit, str]] = {
    "none": "",
    "example": "nobody: a site adds the noise before anything leaves it",
    "client": "the coordinator, which sees each clipped update and adds the noise to their sum",
}
TRUST_IN_SUMS: Final = (
    "no single party: the sites add the noise before their updates are summed in secret, and it is enough though a "
    "third of a sum's sites, whom the coordinator chooses, tell it theirs"
)
ADJACENCY_IN_SUMS: Final = (
    "change to nothing, or back, everything of one site, whose taking part counts as known"
)


@dataclass(frozen=True, slots=True)
class Statement:
    """What can be said of a run's privacy.

    `epsilon` holds for every site that took part at most `participations` times; None where the coordinator
    cannot know it (`reason` says why), or where nothing was protected. `sites` is in how many rounds each
    site's update counted.
    """

    run_id: str
    name: str
    status: str
    unit: Unit
    adjacency: str
    trust: str
    mechanism: str
    epsilon: float | None
    delta: float | None
    accountant: str
    participations: int
    sites: Mapping[str, int]
    reason: str = ""

    def encode(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, UTF-8."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def state(
    run: RunConfig, run_id: str, status: str, cohorts: Sequence[Sequence[str]], layout: Layout
) -> Statement:
    """The statement of a run of a model of this layout, whose committed rounds had these `cohorts`.

    Raises:
        ConfigError: dp-accounting, by which epsilon is stated, is not installed.
    """
    sites: dict[str, int] = {}
    for cohort in cohorts:
        for site in cohort:
            sites[site] = sites.get(site, 0) + 1
    terms = Terms.of(run)
    unit = run.privacy.unit
    most = max(sites.values(), default=0)
    epsilon, accountant, mechanism, reason = None, "", "none", ""
    trust, adjacency = TRUST[unit], ADJACENCY[unit]
    if terms is None:
        reason = (
            "the run has no differential privacy: whoever saw its updates or its model is bounded by nothing"
        )
    elif terms.unit == "example":
        mechanism = (
            "DP-SGD: gradients of Poisson-sampled examples, each clipped to L2 norm "
            f"{terms.clip:g}, with Gaussian noise at every step"
        )
        accountant = "RDP, by each site's ledger before every order"
        epsilon = terms.epsilon
        if epsilon is None:
            reason = "the run fixes the noise, and not epsilon: each site's own ledger knows what it spent"
    else:
        if run.secure_aggregation.enabled:
            sums = SumTerms.for_updates(run, layout, weighted=False)
            found = price(terms, run.work, "train", 1, summed=sums.mechanism)
            trust, adjacency = TRUST_IN_SUMS, ADJACENCY_IN_SUMS
            mechanism = (
                f"Skellam noise of {found.noise_multiplier:.6g} x the L2 sensitivity on each secure sum of updates, "
                f"which {sums.honest} of its members or more have added"
            )
            # Attempts that came to nothing are releases, too; no site makes more of them.
            releases = list(found.run) if most else []
        else:
            found = price(terms, run.work, "train", 1)
            mechanism = str(Central.of(run))
            releases = [scaled(found.order, most)] if most else []
            if found.evaluation is not None and terms.evaluations:
                releases.append(scaled(found.evaluation, terms.evaluations))
        epsilon, accountant = statement(merged(releases), terms.delta)
    return Statement(
        run_id=run_id,
        name=run.name,
        status=status,
        unit=unit,
        adjacency=adjacency,
        trust=trust,
        mechanism=mechanism,
        epsilon=epsilon,
        delta=terms.delta if terms is not None else None,
        accountant=accountant,
        participations=most,
        sites=dict(sorted(sites.items())),
        reason=reason,
    )


def sign(encoded: bytes, *, key_pem: bytes) -> bytes:
    """ECDSA (P-256, SHA-256) over the statement behind its domain prefix; DER.

    Raises:
        IdentityError: the key is not one.
    """
    return key_of_pem(key_pem).sign(DOMAIN + encoded, ec.ECDSA(hashes.SHA256()))


def document(encoded: bytes, signature: bytes, certificate_pem: bytes) -> str:
    """The file that is handed on: the statement, its signature, and the signer's certificate."""
    content = {
        "statement": json.loads(encoded),
        "signature": base64.b64encode(signature).decode(),
        "certificate": certificate_pem.decode("ascii"),
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def verify(text: str, *, ca_pem: bytes) -> dict[str, Any]:
    """The statement in a document, if a coordinator of this CA has signed it. Validity in time is not asked:
    a statement outlives the certificate that signed it.

    Raises:
        IdentityError: it is damaged, or signed by nobody whom this CA has certified as a coordinator.
    """
    try:
        content = json.loads(text)
        encoded = json.dumps(
            content["statement"], sort_keys=True, separators=(",", ":"), allow_nan=False
        ).encode()
        signature = base64.b64decode(content["signature"], validate=True)
        certificate = load_certificate(content["certificate"])
        found: dict[str, Any] = content["statement"]
        if not isinstance(found, dict):
            raise TypeError("not an object")
    except (ValueError, KeyError, TypeError, RecursionError):
        raise IdentityError(
            "expected a statement as `fedge run statement --out` writes it, found something else"
        ) from None
    key = certificate.public_key()
    try:
        certificate.verify_directly_issued_by(load_certificate(ca_pem))
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise TypeError("not an elliptic curve key")
        key.verify(signature, DOMAIN + encoded, ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, TypeError):
        raise IdentityError(
            "expected a statement signed by a coordinator of this CA, found another signature or a changed text"
        ) from None
    if principal_of(certificate).role != "coordinator":
        raise IdentityError(
            f"expected a coordinator's signature, found that of {principal_of(certificate).uri}"
        )
    return found
