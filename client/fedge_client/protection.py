"""What the gate demands of every order of a run, and whether the worker did it.

The gate decides the noise, and the worker says what it did; an update of which it says anything else, or
nothing, does not leave.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedge.errors import RefusedError
from fedge.privacy.calibration import releases
from fedge.privacy.example import ExampleLevel
from fedge.privacy.mechanism import Gaussian, Mechanism, SampledGaussian, Skellam
from fedge.privacy.terms import Price, Terms, price
from fedge.refusal import Refusal, RefusalCode
from fedge.strategy import WorkKind
from fedge_client import pipe_pb2 as pipe
from fedge_client.admission import Request


@dataclass(frozen=True, slots=True)
class Protection:
    """A run's privacy at this site. Without `terms` there is none, and everything leaves as it is."""

    terms: Terms | None = None
    price: Price | None = None

    @classmethod
    def of(cls, request: Request, *, train_examples: int) -> Protection:
        """What a run's terms mean for a site of so many examples.

        Raises:
            RefusedError: no noise can keep them; what it would take is in the cause, for the site alone.
        """
        if request.terms is None:
            return cls()
        try:
            found = price(
                request.terms, request.work, request.kind, train_examples, summed=request.noise_of_sums
            )
        except ValueError as error:
            raise RefusedError(
                Refusal(RefusalCode.PROTECTION_UNAVAILABLE, "no noise keeps the run's terms of privacy here")
            ) from error
        return cls(request.terms, found)

    @property
    def is_on(self) -> bool:
        return self.terms is not None

    def cost(self, kind: WorkKind) -> Mechanism | None:
        """The most that an order of this kind spends; None without privacy.

        Raises:
            RefusedError: an evaluation, for which the run's terms have no noise.
        """
        if self.price is None:
            return None
        if kind != "evaluate":
            return self.price.order
        if self.price.evaluation is None:
            raise RefusedError(
                Refusal(
                    RefusalCode.PROTECTION_UNAVAILABLE,
                    "asked for an evaluation; this run's terms of privacy have none",
                )
            )
        return self.price.evaluation

    def demand(self) -> pipe.ExampleLevel | None:
        """What the worker is told to do; None if it has nothing to do for privacy."""
        if self.terms is None or self.price is None or self.terms.unit != "example":
            return None
        return pipe.ExampleLevel(
            clip=self.terms.clip,
            noise_multiplier=self.price.noise_multiplier,
            evaluation_noise_multiplier=self.terms.evaluation_noise_multiplier,
            loss_bound=self.terms.loss_bound,
        )

    def check(self, finished: pipe.Finished, kind: WorkKind) -> None:
        """Refuse work that was not protected as demanded, or carries what may not leave beside it.

        Raises:
            RefusedError: with the code PROTECTION_UNAVAILABLE.
        """
        if self.demand() is None:
            return
        done = decode_releases(finished)
        if done != self.cost(kind):
            raise _unprotected(f"expected work with {self.cost(kind)}, found {done or 'none'}")
        if finished.num_examples != 1:
            raise _unprotected(
                "expected an update that does not tell the number of examples, found one that does"
            )
        if kind != "evaluate" and finished.metrics:
            raise _unprotected("expected no metrics beside a private update, found some")


def decode_level(message: pipe.ExampleLevel) -> ExampleLevel:
    """What the worker is told to do.

    Raises:
        ValueError: it is no protection.
    """
    return ExampleLevel(
        message.clip,
        message.noise_multiplier,
        message.evaluation_noise_multiplier if message.HasField("evaluation_noise_multiplier") else None,
        message.loss_bound,
    )


def encode_releases(mechanism: Mechanism | None) -> pipe.Releases | None:
    """What the worker did, as it tells the agent."""
    match mechanism:
        case None:
            return None
        case Gaussian(sigma, count):
            return pipe.Releases(noise_multiplier=sigma, sampling_rate=1.0, count=count)
        case SampledGaussian(sigma, rate, count):
            return pipe.Releases(noise_multiplier=sigma, sampling_rate=rate, count=count)
        case Skellam():
            raise ValueError("expected a Gaussian mechanism of the worker, found Skellam noise")


def decode_releases(finished: pipe.Finished) -> Mechanism | None:
    """What the worker says it did; None if it says nothing, or nothing that can be."""
    if not finished.HasField("releases"):
        return None
    done = finished.releases
    try:
        return releases(done.noise_multiplier, sampling_rate=done.sampling_rate, count=done.count)
    except ValueError:
        return None


def _unprotected(message: str) -> RefusedError:
    return RefusedError(Refusal(RefusalCode.PROTECTION_UNAVAILABLE, message))
