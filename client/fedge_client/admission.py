"""May this run take place here? The site's policy against what a coordinator asks, before anything is imported.

Pure: a request is a value, and the answer is nothing or a typed refusal that says in words what was asked and
which line of the policy says no.
"""

from __future__ import annotations

import importlib.machinery
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedge.errors import RefusedError, RemoteProtocolError
from fedge.privacy.mechanism import Skellam
from fedge.privacy.terms import Price, Terms
from fedge.refusal import Refusal, RefusalCode
from fedge.run import Work
from fedge.secagg.terms import SumTerms
from fedge.vector import Layout
from fedge.wire import fedge_pb2 as pb
from fedge.wire.agreed import offer_digest
from fedge.wire.codec import decode_kind, decode_layout, decode_terms, decode_work
from fedge.wire.limits import check_text
from fedge.wire.secure import decode_sum_terms
from fedge_client.settings import Policy, Range


@dataclass(frozen=True, eq=False)
class Request:
    """A run as its coordinator describes it; nothing of it is believed before the policy has looked."""

    run_id: str
    task: str
    strategy: str
    kind: Literal["train", "gradient"]
    rounds: int
    seed: int
    work: Work
    layout: Layout
    clip: float | None
    terms: Terms | None
    cohort: int
    secure: SumTerms | None
    digest: bytes = b""
    """Of everything that was asked: an update that was made under other terms answers no order of this run."""

    @classmethod
    def of(cls, offer: pb.Offer) -> Request:
        """The request in an offer.

        Raises:
            RemoteProtocolError: it is malformed, or promises privacy that it cannot keep.
        """
        kind = decode_kind(offer.kind)
        if kind == "evaluate":
            raise RemoteProtocolError("expected a run of training or gradients, found one of evaluations")
        terms = decode_terms(offer.privacy) if offer.HasField("privacy") else None
        clip = offer.clip if offer.HasField("clip") else None
        if terms is not None and clip not in (None, terms.clip):
            raise RemoteProtocolError(f"expected one clip, found {clip} and {terms.clip}")
        if clip is not None and not 0 < clip < float("inf"):
            raise RemoteProtocolError(f"expected a finite clip above 0, found {clip}")
        layout = decode_layout(offer.layout)
        secure = decode_sum_terms(offer.secure_aggregation) if offer.HasField("secure_aggregation") else None
        _check_noise(secure, terms, layout)
        return cls(
            run_id=check_text("a run's id", offer.run_id),
            task=check_text("a task's name", offer.task),
            strategy=check_text("a strategy's name", offer.strategy_name),
            kind=kind,
            rounds=offer.rounds,
            seed=offer.seed,
            work=decode_work(offer.work),
            layout=layout,
            clip=terms.clip if terms is not None else clip,
            terms=terms,
            cohort=offer.cohort,
            secure=secure,
            digest=offer_digest(offer),
        )

    @property
    def example_level(self) -> bool:
        """Whether the worker protects single examples, each of which it clips."""
        return self.terms is not None and self.terms.unit == "example"

    @property
    def clip_of_updates(self) -> float | None:
        """What the gate clips whole updates to; at example level the clip is for gradients of examples."""
        return None if self.example_level else self.clip

    @property
    def noise_of_sums(self) -> Skellam | None:
        """What an order costs whose update gets its noise from the members of a secure sum."""
        return self.secure.mechanism if self.secure is not None else None

    def in_words(self) -> str:
        """What was asked, for the site's owner."""
        work, terms = self.work, self.terms
        length = "one gradient" if self.kind == "gradient" else _length(work)
        if terms is None:
            privacy = "no differential privacy"
        else:
            budget = f"epsilon {terms.epsilon:g}" if terms.epsilon is not None else "as its noise gives"
            privacy = f"{terms.unit}-level privacy, {budget} at delta {terms.delta:g}, clip {terms.clip:g}"
            if self.noise_of_sums is not None:
                privacy += ", by noise that the members of each sum add"
        secure = "without secure aggregation"
        if self.secure is not None:
            honest = "" if self.secure.consistency else " that an honest coordinator does not break"
            secure = f"with secure aggregation{honest} in sums of {self.secure.least} sites or more"
        return (
            f"task {self.task}, strategy {self.strategy}, {self.rounds} rounds of {length} at learning rate "
            f"{work.learning_rate:g}; {privacy}; {secure}, among {self.cohort} sites or more"
        )


def _check_noise(secure: SumTerms | None, terms: Terms | None, layout: Layout) -> None:
    """Noise inside a secure sum is client-level privacy, of just what the layout trains and the clip bounds."""
    noise = secure.noise if secure is not None else None
    expected = secure is not None and terms is not None and terms.unit == "client"
    if (noise is not None) != expected:
        raise RemoteProtocolError(
            "expected noise in secure sums for client-level privacy and for nothing else, found otherwise"
        )
    if noise is None:
        return
    assert secure is not None  # the noise is a part of it
    assert terms is not None  # just checked
    if noise.size != layout.trainable_size or secure.bound != terms.clip:
        raise RemoteProtocolError(
            f"expected noise for {layout.trainable_size} elements of norm {terms.clip:g}, found it for {noise.size} "
            f"of norm {secure.bound:g}"
        )
    evaluates = terms.evaluations or terms.evaluation_noise_multiplier is not None
    if evaluates or terms.separation > 1 or not secure.consistency:
        raise RemoteProtocolError(
            "expected neither evaluations, nor rests between rounds, nor a coordinator that has to be honest where the "
            "members of secure sums add the noise"
        )


def _length(work: Work) -> str:
    return f"{work.steps} steps" if work.steps else f"{work.epochs or 1} epochs"


def admit(policy: Policy, request: Request, *, folder: Path) -> None:
    """Refuse what the owner's policy does not allow. Nothing is imported to find out.

    Raises:
        RefusedError: with a code for the part of the policy that says no.
    """
    check_task(policy, request.task, folder=folder)
    check_layout(policy, request.layout)
    if policy.strategies is not None and request.strategy not in policy.strategies:
        raise _no(
            RefusalCode.STRATEGY_NOT_ALLOWED,
            f"asked for strategy {request.strategy!r}; this site's [policy] strategies are {policy.strategies}",
        )
    _check_protection(policy, request)
    _check_work(policy, request)


def check_task(policy: Policy, task: str, *, folder: Path) -> None:
    """Refuse a task that the site's owner did not allow.

    Raises:
        RefusedError: with the code TASK_NOT_ALLOWED.
    """
    if policy.tasks is not None:
        if task in policy.tasks:
            return
        raise _no(
            RefusalCode.TASK_NOT_ALLOWED,
            f"task {task!r} is not in this site's [policy] tasks: {policy.tasks}",
        )
    if not _is_in(folder, task.partition(":")[0].partition(".")[0]):
        raise _no(
            RefusalCode.TASK_NOT_ALLOWED,
            f"task {task!r} is not in this site's task folder, and [policy] tasks does not list it",
        )


def check_coordinator(policy: Policy, federation: str, *, own: str) -> None:
    """Refuse a coordinator of another federation than the policy allows.

    Raises:
        RefusedError: with the code COORDINATOR_NOT_ALLOWED.
    """
    allowed = policy.coordinators if policy.coordinators is not None else [own]
    if federation not in allowed or federation != own:
        raise _no(
            RefusalCode.COORDINATOR_NOT_ALLOWED,
            f"federation {federation!r} is not one that this site's policy allows",
        )


def check_layout(policy: Policy, layout: Layout) -> None:
    """Refuse a model that is larger than the policy allows, before room is made for it.

    Raises:
        RefusedError: with the code TOO_LARGE.
    """
    if layout.nbytes > policy.max_model_bytes:
        raise _no(
            RefusalCode.TOO_LARGE,
            f"a model of {layout.nbytes} bytes; this site's policy allows {policy.max_model_bytes}",
        )


def check_price(policy: Policy, price: Price, run_epsilon: float) -> None:
    """Refuse noise that is too weak, once it is known: it depends on the site's number of examples.

    `run_epsilon` is the whole run's at the policy's delta.

    Raises:
        RefusedError: with the code PROTECTION_TOO_WEAK. The message holds no number of this site's data.
    """
    evaluation = price.evaluation.noise_multiplier if price.evaluation is not None else math.inf
    if min(price.noise_multiplier, evaluation) < policy.min_noise_multiplier:
        raise _no(
            RefusalCode.PROTECTION_TOO_WEAK,
            f"the noise multiplier, of training or of evaluations, would be below this site's [policy] "
            f"min_noise_multiplier = {policy.min_noise_multiplier:g}; ask for a smaller epsilon, or more noise",
        )
    if policy.max_run_epsilon is not None and run_epsilon > policy.max_run_epsilon:
        raise _no(
            RefusalCode.PROTECTION_TOO_WEAK,
            f"the run would spend more than this site's [policy] max_run_epsilon = {policy.max_run_epsilon:g} "
            f"at delta {policy.delta:g}",
        )


def _check_protection(policy: Policy, request: Request) -> None:
    terms = request.terms
    unit = terms.unit if terms is not None else "none"
    if unit not in policy.units:
        asked = "no differential privacy" if terms is None else f"{unit}-level privacy"
        raise _no(
            RefusalCode.PROTECTION_TOO_WEAK,
            f"asked for a run with {asked}; this site's [policy] units are {policy.units}",
        )
    if request.cohort < policy.min_cohort:
        raise _no(
            RefusalCode.PROTECTION_TOO_WEAK,
            f"asked for rounds among {request.cohort} sites or more; this site's [policy] min_cohort is "
            f"{policy.min_cohort}",
        )
    _check_secure_sum(policy, request.secure)
    if unit == "client" and request.noise_of_sums is None and not policy.trust_coordinator:
        raise _no(
            RefusalCode.PROTECTION_TOO_WEAK,
            "asked for client-level privacy whose noise the coordinator adds; this site's [policy] does not set "
            "trust_coordinator = true",
        )


def _check_secure_sum(policy: Policy, secure: SumTerms | None) -> None:
    if secure is None:
        if policy.require_secure_aggregation:
            raise _no(
                RefusalCode.PROTECTION_TOO_WEAK,
                "asked for a run without secure aggregation; this site's [policy] requires it",
            )
        return
    if secure.least < policy.min_cohort:
        raise _no(
            RefusalCode.PROTECTION_TOO_WEAK,
            f"asked for sums of {secure.least} sites or more; this site's [policy] min_cohort is {policy.min_cohort}",
        )
    if not secure.consistency and not policy.honest_coordinator:
        raise _no(
            RefusalCode.PROTECTION_TOO_WEAK,
            "asked for secure aggregation that only an honest coordinator does not break; this site's [policy] does "
            "not set honest_coordinator = true",
        )


def _check_work(policy: Policy, request: Request) -> None:
    work = request.work
    if request.kind == "train":
        epochs = work.epochs or (None if work.steps else 1)
        if policy.epochs is not None and epochs is None:
            raise _no(
                RefusalCode.WORK_NOT_ALLOWED,
                f"asked for {work.steps} steps; this site's [policy] epochs limits runs to those of epochs",
            )
        _check_range("epochs", epochs, policy.epochs)
        _check_range("learning_rate", work.learning_rate, policy.learning_rate)
    check_clip(policy, request.clip)


def check_clip(policy: Policy, clip: float | None) -> None:
    """Refuse a clip that the policy does not allow: that of a run, or one that an order has adapted.

    Raises:
        RefusedError: with the code WORK_NOT_ALLOWED.
    """
    if policy.clip is not None and clip is None:
        raise _no(
            RefusalCode.WORK_NOT_ALLOWED,
            f"asked for no clip; this site's [policy] clip is {_shown(policy.clip)}",
        )
    _check_range("clip", clip, policy.clip)


def _check_range(name: str, value: float | None, allowed: Range | None) -> None:
    if value is None or allowed is None or allowed[0] <= value <= allowed[1]:
        return
    raise _no(
        RefusalCode.WORK_NOT_ALLOWED,
        f"asked for {name} = {value:g}; this site's [policy] {name} is {_shown(allowed)}",
    )


def _shown(allowed: Range) -> str:
    return f"[{allowed[0]:g}, {allowed[1]:g}]"


def _is_in(folder: Path, module: str) -> bool:
    """Whether `import module` would find it directly in the folder, and no part of it elsewhere."""
    spec = importlib.machinery.PathFinder.find_spec(module, [str(folder), *sys.path])
    if spec is None:
        return False
    # A folder without __init__ gives way to any package of its name on the path, and joins its namesakes.
    places = list(spec.submodule_search_locations or [spec.origin or ""])
    return all(Path(place).parent == folder for place in places)


def _no(code: RefusalCode, message: str) -> RefusedError:
    return RefusedError(Refusal(code, message))
