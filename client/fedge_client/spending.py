"""What the ledger is told of a run's orders, and when: before training, before a byte leaves, and after.

The ledger syncs to disk, so it is called on a thread; its refusals name what is left of the budget, which
is for the site's own log and not for a coordinator.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import ParamSpec, TypedDict, TypeVar

from fedge.errors import RefusedError
from fedge.events import OrderId
from fedge.privacy.ledger import admit, check_rested
from fedge.privacy.mechanism import Mechanism
from fedge.privacy.rdp import epsilon_of
from fedge.privacy.terms import Price, Terms
from fedge.refusal import Refusal, RefusalCode
from fedge_client.admission import check_price
from fedge_client.ledger import Ledger
from fedge_client.protection import Protection
from fedge_client.settings import Policy

log = logging.getLogger(__name__)

_ROUNDING = 1 + 1e-9
"""A sum of curves, release by release, is not to the last bit their number times one."""

P = ParamSpec("P")
T = TypeVar("T")


class Caps(TypedDict):
    """Bounds on what may be spent, as the ledger takes them."""

    max_epsilon: float
    run_caps: dict[float, float]


_TOLD = {
    code: Refusal(code, f"{what}; see the site's log")
    for code, what in (
        (RefusalCode.BUDGET_EXHAUSTED, "this site's privacy budget does not allow this"),
        (RefusalCode.LEDGER_UNUSABLE, "this site's ledger cannot be used"),
    )
}
"""What a coordinator hears of the ledger's refusals, which name what is left, and files of the site."""


def log_refusal(error: RefusedError) -> None:
    """For the site's owner: with what is left."""
    log.warning("%s %s", error.refusal.code.name.lower(), error)


def as_told(error: RefusedError) -> RefusedError:
    """A refusal in the words that may leave the site."""
    return RefusedError(_TOLD.get(error.refusal.code, error.refusal))


class Spending:
    """The ledger of this site's data set, under its owner's caps."""

    def __init__(self, ledger: Ledger, policy: Policy, witnessed: Callable[[], None] = lambda: None) -> None:
        """`witnessed` is called when the ledger has come further, before anything that it pays for leaves."""
        self._ledger = ledger
        self._policy = policy
        self._witnessed = witnessed

    async def join(self, run_id: str, protection: Protection) -> None:
        """A run is about to be joined; one without privacy is recorded as such, before it sees anything.

        Raises:
            RefusedError: the run would spend more than the policy allows a run, or not even one of its
                orders can be paid for, or the ledger cannot be used.
        """
        if protection.price is None:
            if run_id not in self._ledger.books.unprotected:
                await self._call(self._ledger.unprotected, run_id)
            return
        whole = epsilon_of(protection.price.run, self._policy.delta)
        check_price(self._policy, protection.price, whole)
        await self._call(self._admit, run_id, protection, protection.price.order)
        spent = self._ledger.books.spent().epsilon(self._policy.delta)
        log.info(
            "run_priced run=%s releases=%s epsilon=%.4g delta=%g spent_before=%.4g cap=%g",
            *(run_id, "; ".join(map(str, protection.price.run)), whole),
            *(self._policy.delta, spent, self._policy.max_epsilon),
        )

    async def reserve(self, run_id: str, order: OrderId, protection: Protection, cost: Mechanism) -> int:
        """Set aside the most that an order may spend; returns the ledger's entry.

        Raises:
            RefusedError: the budget does not allow it, or the ledger cannot be used; or the order comes too
                soon after another for the run's noise.
        """
        assert protection.terms is not None  # what costs something has terms and a price
        assert protection.price is not None
        check_rested(self._ledger.books.of_run(run_id), order, protection.terms.separation)
        return await self._call(
            self._ledger.reserve,
            run_id,
            order,
            cost,
            unit=protection.terms.unit,
            **self._caps(protection.terms, protection.price),
        )

    async def leaves(self, entry: int) -> None:
        """The first byte that depends on the data is about to leave: from now on it is spent."""
        await self._call(self._ledger.sending, entry)
        self._witnessed()

    async def settle(self, entry: int, cost: Mechanism) -> None:
        """What was spent in fact."""
        await self._call(self._ledger.commit, entry, cost)
        self._witnessed()

    async def give_back(self, entry: int) -> None:
        """Nothing left this site, and nothing will."""
        await self._call(self._ledger.release, entry)

    def _admit(self, run_id: str, protection: Protection, cost: Mechanism) -> None:
        assert protection.terms is not None  # both or neither
        assert protection.price is not None
        admit(
            self._ledger.books,
            cost,
            unit=protection.terms.unit,
            delta=self._policy.delta,
            run_id=run_id,
            **self._caps(protection.terms, protection.price),
        )

    def _caps(self, terms: Terms, price: Price) -> Caps:
        """A run may not be made to spend more than it said, be it by rounds or by attempts at them.

        At its own delta, and at the owner's: at a large enough delta anything costs nothing.
        """
        return {
            "max_epsilon": self._policy.max_epsilon,
            "run_caps": {
                delta: epsilon_of(price.run, delta) * _ROUNDING for delta in (terms.delta, self._policy.delta)
            },
        }

    async def _call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.to_thread(function, *args, **kwargs)
        except RefusedError as error:
            log_refusal(error)
            raise as_told(error) from None
