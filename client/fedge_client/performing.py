"""An order's work, from the budget to the gate: what comes out may leave this site.

Paid for before it is begun, done by the worker, and looked at by the gate.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np

from fedge import progress
from fedge.errors import FedgeError, RefusedError, RemoteProtocolError
from fedge.events import OrderId
from fedge.refusal import RefusalCode
from fedge.variates import correct, renewed
from fedge.vector import Array
from fedge.wire import fedge_pb2 as pb
from fedge.wire.codec import decode_order_id, decode_settled, encode_order_id
from fedge_client import gate
from fedge_client import pipe_pb2 as pipe
from fedge_client.admission import check_clip
from fedge_client.participation import Participation
from fedge_client.settings import Policy
from fedge_client.spending import Spending
from fedge_client.supervisor import Supervisor
from fedge_client.variates import Variates

_ON_THREAD_BYTES = 1 << 20
_PRIVATE_GRAIN = 50

Send = Callable[[pb.ClientMessage], None]


class Performer:
    """Does what runs order. `reach` is called with the names of points at which a test may kill this process."""

    def __init__(
        self,
        policy: Policy,
        supervisor: Supervisor,
        spending: Spending,
        variates: Variates,
        send: Send,
        reach: Callable[[str], None],
    ) -> None:
        self._policy = policy
        self._supervisor = supervisor
        self._spending = spending
        self._variates = variates
        self._send = send
        self._reach = reach

    async def perform(self, run: Participation, message: pb.Order) -> gate.Released:
        """Do the work within the budget, which is reserved before it begins; `pay` before anything of it can leave.

        That it failed depends on the data, too, and is told to the coordinator: then it is spent.
        """
        order = decode_order_id(message.id)
        await self.reserve(run, order)
        try:
            return await self._do(run, order, message)
        except FedgeError as error:
            if not (isinstance(error, RefusedError) and error.refusal.code == RefusalCode.CANCELLED):
                await self.pay(run)
                await self.settle(run)
            raise

    async def reserve(self, run: Participation, order: OrderId) -> None:
        """Set aside the price of an order's work, if it has one: until `pay`, or `give_back`."""
        cost = run.protection.cost(order.kind)
        if cost is not None:
            run.reserved = await self._spending.reserve(run.run_id, order, run.protection, cost), cost

    async def pay(self, run: Participation) -> None:
        """What was done may leave at any time from now on, after a crash as well."""
        reserved, run.reserved = (
            run.reserved,
            None,
        )  # not to be given back from here on, even if this is cut short
        if reserved is not None:
            await self._spending.leaves(reserved[0])
            run.unsettled = reserved

    async def give_back(self, run: Participation) -> None:
        """Nothing of what was done last has left, unless it was paid for; nor will it."""
        reserved, run.reserved = run.reserved, None
        if reserved is not None:
            await self._spending.give_back(reserved[0])

    async def settle(self, run: Participation) -> None:
        """What was spent for a run's latest work is spent, since it was handed in or will not be."""
        unsettled, run.unsettled = run.unsettled, None
        if unsettled is not None:
            await self._spending.settle(*unsettled)

    async def _do(self, run: Participation, order: OrderId, message: pb.Order) -> gate.Released:
        """Have the worker do it, and pass the result through the gate: the last code before the wire."""
        clip = self._clip(run, message)
        own, room = await self._own(run, order, message)
        perform = pipe.Perform(
            run_id=run.run_id,
            id=encode_order_id(order),
            privacy=run.protection.demand(),
            own=own,
        )
        finished = await self._supervisor.perform(perform, progress=self._teller(run, message))
        self._reach("job.trained")
        run.protection.check(finished, order.kind)
        metrics = {metric.name: metric.value for metric in finished.metrics}
        layout = None if order.kind == "evaluate" else run.layout

        def pass_gate() -> gate.Released:
            released = gate.release(
                run.update,
                finished.num_examples,
                metrics,
                layout=layout,
                layers=gate.layers_of(clip),
                terms=run.protection.terms,
            )
            if own == pipe.OWN_CORRECTION:  # by what the coordinator adds up, as the coordinator does
                bound = run.secure.bound if run.secure is not None else None
                run.variate = order, renewed(room, released.vector, run.work, bound=bound)
            elif len(room) and order.kind == "train":
                run.variate = order, room.copy()
            return released

        if run.update.nbytes <= _ON_THREAD_BYTES or layout is None:
            return pass_gate()
        return await asyncio.to_thread(pass_gate)

    async def _own(
        self, run: Participation, order: OrderId, message: pb.Order
    ) -> tuple[pipe.Own.ValueType, Array]:
        """What this site keeps for the run and the worker needs, in the memory that it shares: what corrects gradients,
        or personal layers; or nothing, which is empty."""
        control, run.holding.control = run.holding.control, None
        size = len(control) if control is not None else run.personal
        if not size:
            return pipe.OWN_NOTHING, np.empty(0, np.float32)
        if order.kind == "train":
            run.variate = None
        settled = decode_settled(message.control, order)
        room = self._supervisor.own(run.run_id, size)

        def fill() -> pipe.Own.ValueType:
            kept = self._variates.read(run.run_id, run.terms, settled, size=size)
            if control is not None:
                room[:] = control
                correct(room, kept)
                return pipe.OWN_CORRECTION
            if kept is None:
                return pipe.OWN_FIRST_LAYERS
            room[:] = kept
            return pipe.OWN_LAYERS

        return await asyncio.to_thread(fill), room

    def _clip(self, run: Participation, message: pb.Order) -> float | None:
        """What an order's update is clipped to.

        Raises:
            RefusedError: WORK_NOT_ALLOWED; the order adapts the clip beyond what the policy allows.
            RemoteProtocolError: it adapts one that noise inside a secure sum was made for, or to what is none.
        """
        if run.clip is None or not message.HasField("clip"):
            return run.clip
        if run.secure is not None and run.secure.noise is not None:
            raise RemoteProtocolError("expected the clip that the noise in sums was made for, found another")
        if not 0 < message.clip < float("inf"):
            raise RemoteProtocolError(f"expected a finite clip above 0, found {message.clip}")
        check_clip(self._policy, message.clip)
        return message.clip

    def _teller(self, run: Participation, message: pb.Order) -> Callable[[int, int], None]:
        """Tells the coordinator now and then how far the worker is: a deadline is about progress."""
        every_s, told = progress.every_s(message.deadline_s), time.monotonic()
        # A step's share of the work would tell how many steps, and so how many examples, there are.
        hides = run.protection.is_on or run.secure is not None
        grain = _PRIVATE_GRAIN if hides else 1

        def tell(done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told < every_s:
                return
            told = time.monotonic()
            permille = progress.computed(done, total) // grain * grain
            so_far = pb.Progress(run_id=run.run_id, id=message.id, permille=permille)
            self._send(pb.ClientMessage(progress=so_far))

        return tell
