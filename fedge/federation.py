"""The life of a run, sans-IO: rounds in order, attempts at each, evaluations between them.

`step(run, event) -> (run, effects)`, with the events and effects of `fedge.round` and a few more. The
driver executes effects strictly in order: after a training `Close` the new model exists, so a `Send`
behind it carries that model. A strategy with bounded staleness has no rounds to wait for: each update
is accepted, closed and stepped on arrival.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from fedge import round as rounds
from fedge.cohort import Round, Step, Terms
from fedge.events import (
    Accept,
    Advertised,
    Arrived,
    Broken,
    Cancel,
    Close,
    Consented,
    DeadlinePassed,
    Event,
    Failed,
    GiveUp,
    Joined,
    Left,
    OrderId,
    Progressed,
    Reject,
    Revealed,
    Send,
    Shared,
    StartTimer,
    Unmasked,
)
from fedge.plan import Plan
from fedge.refusal import Refusal, RefusalCode
from fedge.run_state import Federation, Finish, Returned, RunEffect, RunEvent, RunStep, Status, Stop


def begin(plan: Plan, clients: frozenset[str] = frozenset()) -> RunStep:
    """A run's first step: open (or wait for) its first round."""
    return _next_round(Federation(plan, clients=clients))


def resume(run: Federation, kept: Mapping[OrderId, Collection[str]]) -> RunStep:
    """Go on with a run whose driver has started again, from a state between two events.

    `kept` says whose accepted updates for an open order are still there. Clients count as present until
    `Left` says otherwise; each that comes is announced by `Returned`. Without rounds, the models that
    clients were at work on are gone: they are given the current one when they come, and an evaluation of
    an older model is begun anew.
    """
    if run.status != "running":
        return run, ()
    effects: tuple[RunEffect, ...] = ()
    if run.plan.max_staleness is not None:
        run = replace(run, at_work=frozenset(), resting=frozenset())
        if run.evaluation is not None and _is_past(run, run.evaluation):
            run = replace(run, evaluation=None, owed=run.committed)
        if run.committed < run.plan.rounds:
            run, effects = _put_to_work(run, frozenset())
    elif run.training is not None:
        step = rounds.resume(run.training, kept.get(run.training.order, ()), run.clients)
        # What a secure sum has lost with the driver is nobody's failure.
        return _follow_training(run, step, counts=run.training.terms.secure is None)
    if run.evaluation is None:
        run, more = _after_evaluation(run)
    else:
        again = rounds.resume(run.evaluation, kept.get(run.evaluation.order, ()), run.clients)
        run, more = _follow_evaluation(run, again)
    return run, (*effects, *more)


def step(run: Federation, event: RunEvent) -> RunStep:
    """One transition. After the end, only a late update still gets an answer."""
    if run.status != "running":
        if isinstance(event, Arrived):
            refusal = Refusal(RefusalCode.RUN_ENDED, "the run is over")
            return run, (Reject(event.client, event.order, refusal),)
        return run, ()
    match event:
        case Stop():
            return _end(run, "stopped", "stopped by its owner")
        case Joined(client):
            run = replace(run, clients=run.clients | {client}, exhausted=run.exhausted - {client})
            return _everywhere(run, event)
        case Left(client):
            run = replace(run, clients=run.clients - {client})
            return _everywhere(run, event)
        case Returned(client) if client in run.clients:
            return _welcome_back(run, client)
        case Returned(client):
            return step(run, Joined(client))
        case Failed(client, order, refusal) if (
            refusal.code == RefusalCode.BUDGET_EXHAUSTED
            and order.kind != "evaluate"
            and client not in run.exhausted
        ):
            return step(replace(run, exhausted=run.exhausted | {client}), event)
        case (
            Arrived(_, order)
            | Failed(_, order, _)
            | Progressed(_, order, _)
            | Advertised(_, order)
            | Shared(_, order)
            | Consented(_, order)
            | Revealed(_, order)
            | Unmasked(order)
            | Broken(order)
            | DeadlinePassed(order, _)
        ):
            if run.evaluation is not None and order == run.evaluation.order:
                return _in_evaluation(run, event)
            if run.plan.max_staleness is not None and order.kind != "evaluate":
                return _on_arrival(run, event)
            if run.training is not None and order == run.training.order:
                return _in_training(run, event)
            return run, _answer_old(run, event)


def arrive(run: Federation, clients: Sequence[str], order: OrderId) -> RunStep:
    """As `step` for an `Arrived` of each of these in turn; at once, where that is the same."""
    training = run.training
    if run.status == "running" and training is not None and training.order == order and clients:
        together = rounds.arrive(training, clients)
        if together is not None:
            return _follow_training(run, together)
    effects: tuple[RunEffect, ...] = ()
    for client in clients:
        run, more = step(run, Arrived(client, order))
        effects += more
    return run, effects


def fail(run: Federation, reason: str) -> RunStep:
    """End the run because its driver cannot go on."""
    return _end(run, "failed", reason)


def _everywhere(run: Federation, event: Joined | Left) -> RunStep:
    """A client came or went: both open rounds, or the stream of arrivals, hear of it."""
    effects: tuple[RunEffect, ...] = ()
    if run.evaluation is not None and not (_is_past(run, run.evaluation) and isinstance(event, Joined)):
        run, effects = _in_evaluation(run, event)
    if run.status != "running":
        return run, effects
    if run.plan.max_staleness is not None:
        run, more = _on_arrival(run, event)
    elif run.training is not None and not (isinstance(event, Joined) and not _may_train(run, event.client)):
        run, more = _in_training(run, event)
    else:
        return run, effects
    return run, (*effects, *more)


def _may_train(run: Federation, client: str) -> bool:
    return bool(run.eligible({client}))


def _welcome_back(run: Federation, client: str) -> RunStep:
    """What a client was at work on is sent to it again: its answer may have been lost with the driver."""
    open_rounds = [round for round in (run.training, run.evaluation) if round is not None]
    again = tuple(Send(client, round.order) for round in open_rounds if client in round.at_work)
    if run.plan.max_staleness is None:
        return run, again
    run, effects = _on_arrival(run, Joined(client))
    return run, (*again, *effects)


def _in_training(run: Federation, event: Event) -> RunStep:
    assert run.training is not None  # the callers have looked
    waited = event == DeadlinePassed(run.training.order, "waiting")
    return _follow_training(run, rounds.step(run.training, event), last=waited)


def _follow_training(run: Federation, step: Step, *, last: bool = False, counts: bool = True) -> RunStep:
    """What the training round's step means for the run. If it was given up and this was the `last` attempt, it is
    not tried again; one that does not count is, whatever the number of attempts."""
    round, effects = step
    run = replace(run, training=round)
    if round.phase == "closed":
        taken = run.plan.took_part(run.taken, round.order.round, asked=round.cohort, counted=round.accepted)
        run = replace(run, taken=taken)
        run, more = _commit(run, round)
        return run, (*effects, *more)
    if round.phase == "abandoned":
        give_up = effects[-1]
        assert isinstance(give_up, GiveUp)  # the only way to abandon a round
        # Whoever was asked may have handed in, and paid: its ledger lets it rest from here.
        asked = run.plan.took_part(run.taken, round.order.round, asked=round.cohort, counted=())
        run = replace(run, taken=asked, barred=run.barred | frozenset(give_up.culprits))
        if give_up.spent or _is_spent(round):
            # What was revealed is revealed: the same round is not summed again. The run goes on without it.
            run, more = _commit(run, round)
        elif last or (counts and round.order.attempt >= run.plan.attempts):
            run, more = _end(run, "failed", f"round {round.order.round}: {give_up.reason}{run.spent_turns}")
        else:
            run, more = _next_round(replace(run, previous=round), attempt=round.order.attempt + 1)
        return run, (*effects, *more)
    return run, effects


def _is_spent(round: Round) -> bool:
    """Whether clients have said that they revealed their shares in an earlier attempt, which its driver forgot."""
    return round.last_refusal is not None and round.last_refusal.code == RefusalCode.ROUND_SPENT


def _commit(run: Federation, round: Round) -> RunStep:
    """The round is over, with a step or without one."""
    run = replace(run, committed=round.order.round, training=None, previous=round, barred=frozenset())
    return _after_commit(run)


def _in_evaluation(run: Federation, event: Event) -> RunStep:
    assert run.evaluation is not None  # the callers have looked
    return _follow_evaluation(run, rounds.step(run.evaluation, event))


def _follow_evaluation(run: Federation, step: Step) -> RunStep:
    round, effects = step
    if round.phase not in ("closed", "abandoned"):
        return replace(run, evaluation=round), effects
    # Nobody to evaluate, or not in time: the run goes on without these numbers.
    run = replace(run, evaluation=None, previous=round)
    run, more = _after_evaluation(run)
    return run, (*effects, *more)


def _is_past(run: Federation, evaluation: Round) -> bool:
    """Whether the model has moved on since the evaluation began: nobody else can be asked to judge it."""
    return evaluation.order.round < run.committed


def _after_commit(run: Federation) -> RunStep:
    if run.evaluation is not None:  # without rounds, the model moves on while it is judged
        run = replace(run, evaluation=rounds.seal(run.evaluation))
    if run.plan.evaluates(run.committed):
        if run.evaluation is not None:
            run = replace(run, owed=run.committed)
        elif run.clients:
            return _evaluate(run)
    return _after_evaluation(run) if run.evaluation is None else (run, ())


def _evaluate(run: Federation) -> RunStep:
    terms = Terms(
        size=run.plan.evaluation_clients,
        quorum=1,
        deadline_s=run.plan.terms.deadline_s,
        wait_s=run.plan.terms.deadline_s,
        secure=run.plan.terms.secure,
    )
    order = OrderId("evaluate", run.committed)
    round, effects = rounds.open_round(order, terms, run.clients, seed=run.plan.seed)
    return replace(run, evaluation=round, owed=0), effects


def _after_evaluation(run: Federation) -> RunStep:
    if run.owed and run.clients:
        return _evaluate(run)
    if run.committed >= run.plan.rounds:
        return _end(run, "done", "")
    if run.plan.max_staleness is None and run.training is None:
        return _next_round(run)
    return run, ()


def _next_round(run: Federation, *, attempt: int = 1) -> RunStep:
    order = OrderId(run.plan.kind, run.committed + 1, attempt)
    if run.plan.max_staleness is not None:
        return _put_to_work(run, run.clients)
    clients = run.eligible(run.clients)
    turns = run.plan.turns(run.taken)
    round, effects = rounds.open_round(order, run.plan.terms, clients, seed=run.plan.seed, turns=turns)
    return replace(run, training=round), effects


def _end(run: Federation, status: Status, reason: str) -> RunStep:
    cancels: list[RunEffect] = []
    for round in (run.training, run.evaluation):
        if round is not None and round.is_open:
            cancels += [Cancel(client, round.order) for client in round.at_work]
    cancels += [Cancel(client, OrderId(run.plan.kind, at)) for client, at in sorted(run.at_work)]
    ended = replace(
        run, status=status, reason=reason, training=None, evaluation=None, at_work=frozenset(), owed=0
    )
    return ended, (*cancels, Finish(status, reason))


def _answer_old(run: Federation, event: Event) -> tuple[RunEffect, ...]:
    """An event for a round that is not open: only an update wants an answer."""
    if not isinstance(event, Arrived):
        return ()
    if run.previous is not None and event.order == run.previous.order:
        return rounds.step(run.previous, event)[1]
    now = run.training.order if run.training is not None else None
    abandoned = now is not None and event.order in [replace(now, attempt=n) for n in range(1, now.attempt)]
    if event.order.round <= run.committed or abandoned:
        refusal = Refusal(RefusalCode.LATE, f"the {event.order} is over; round {run.committed + 1} is open")
    else:
        refusal = Refusal(RefusalCode.NOT_ASKED, f"no {event.order} was given")
    return (Reject(event.client, event.order, refusal),)


# Runs without rounds: every update is a step.


def _put_to_work(run: Federation, clients: frozenset[str], *, new_model: bool = False) -> RunStep:
    """Send the current model's order to each of `clients` that may still be asked.

    The clock of its progress starts with the model, or when there was nobody at work on it. It is not
    set back by clients that come and go while others work.
    """
    order = OrderId(run.plan.kind, run.committed + 1)
    clients = run.eligible(clients)
    idle = not run.at_work
    run = replace(run, at_work=run.at_work | {(client, order.round) for client in clients})
    sends: tuple[RunEffect, ...] = tuple(Send(client, order) for client in sorted(clients))
    if not (idle or new_model):
        return run, sends
    if run.at_work:
        return run, (*sends, StartTimer(order, "open", run.plan.terms.deadline_s))
    return run, (*sends, StartTimer(order, "waiting", run.plan.terms.wait_s))


def _on_arrival(run: Federation, event: Event) -> RunStep:
    match event:
        case Joined(client):
            busy = any(worker == client for worker, _ in run.at_work)
            if busy or run.committed >= run.plan.rounds:
                return run, ()
            return _put_to_work(replace(run, resting=run.resting - {client}), frozenset({client}))
        case Left(client):
            worked = bool(run.at_work)
            run = replace(run, at_work=_without(run, client), resting=run.resting - {client})
            if run.at_work or not worked:
                return run, ()
            # The last at work is gone: those who failed get another chance, or the run waits for clients.
            return _put_to_work(replace(run, resting=frozenset()), run.resting)
        case Failed(client, order, refusal):
            if not _is_at_work(run, client, order):
                return run, ()
            run = replace(run, at_work=_without(run, client), resting=run.resting | {client})
            if run.at_work:
                return run, ()
            run = replace(run, missed=run.missed + 1)
            if run.missed >= run.plan.attempts:
                return _end(run, "failed", f"every client failed; the last one said: {refusal}")
            return _put_to_work(replace(run, resting=frozenset()), run.resting & run.clients)
        case DeadlinePassed(order, phase):
            if order != OrderId(run.plan.kind, run.committed + 1) or run.committed >= run.plan.rounds:
                return run, ()  # there was progress since that timer was started
            if phase != ("open" if run.at_work else "waiting"):
                return run, ()  # somebody came, or everybody left, and another timer runs
            if not run.at_work:
                return _end(run, "failed", f"no client in time for round {order.round}{run.spent_turns}")
            return _go_on(run, order)
        case Progressed(client, order, _):
            return (replace(run, moving=True) if _is_at_work(run, client, order) else run), ()
        case Arrived(client, order):
            return _apply(run, client, order)
        case _:
            return run, ()  # there is no secure sum of single updates


def _go_on(run: Federation, order: OrderId) -> RunStep:
    """No update in time: wait for work that goes on; else set everybody to work anew, a few times."""
    timer = StartTimer(order, "open", run.plan.terms.deadline_s)
    if run.moving and run.extensions < rounds.MAX_EXTENSIONS:
        return replace(run, moving=False, extensions=run.extensions + 1), (timer,)
    run = replace(run, missed=run.missed + 1)
    if run.missed >= run.plan.attempts:
        return _end(run, "failed", f"no update in time for round {order.round}, {run.missed} times in a row")
    # Who computes on this model already is not told again: there is nothing else to do.
    stale = frozenset(pair for pair in run.at_work if pair[1] != order.round)
    cancels = tuple(Cancel(client, replace(order, round=at)) for client, at in sorted(stale))
    anew = frozenset(client for client, _ in stale) | (run.resting & run.clients)
    run = replace(run, at_work=run.at_work - stale, resting=frozenset())
    run, sends = _put_to_work(run, anew, new_model=True)
    return run, (*cancels, *sends)


def _apply(run: Federation, client: str, order: OrderId) -> RunStep:
    if not _is_at_work(run, client, order):
        code = RefusalCode.LATE if run.committed >= run.plan.rounds else RefusalCode.NOT_ASKED
        refusal = Refusal(code, f"this client is not at work on the {order}")
        return run, (Reject(client, order, refusal),)
    bound = run.plan.max_staleness
    assert bound is not None  # only such runs come here
    run = replace(run, at_work=_without(run, client), moving=False, extensions=0, missed=0)
    staleness = run.committed + 1 - order.round
    if staleness > bound:
        refusal = Refusal(
            RefusalCode.STALE,
            f"the model moved {staleness} steps since this gradient's; at most {bound} count",
        )
        run, more = _put_to_work(run, frozenset({client}))
        return run, (Reject(client, order, refusal), *more)
    done = OrderId(run.plan.kind, run.committed + 1)
    taken = run.plan.took_part(run.taken, done.round, asked={client}, counted={client})
    run = replace(run, committed=run.committed + 1, taken=taken)
    effects: tuple[RunEffect, ...] = (Accept(client, order, staleness), Close(done, (client,)))
    if run.committed < run.plan.rounds:
        free = (frozenset({client}) | run.resting) & run.clients
        run, more = _put_to_work(replace(run, resting=frozenset()), free, new_model=True)
    else:
        more = tuple(Cancel(other, OrderId(run.plan.kind, at)) for other, at in sorted(run.at_work))
        run = replace(run, at_work=frozenset())
    run, rest = _after_commit(run)
    return run, (*effects, *more, *rest)


def _is_at_work(run: Federation, client: str, order: OrderId) -> bool:
    return order == OrderId(run.plan.kind, order.round) and (client, order.round) in run.at_work


def _without(run: Federation, client: str) -> frozenset[tuple[str, int]]:
    return frozenset(pair for pair in run.at_work if pair[0] != client)
