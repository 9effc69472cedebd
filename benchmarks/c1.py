"""C1: a coordinator with 100 connected sites is killed in the middle of a round, and started again.

No floor: nothing else does this work. What is measured is the time from the start of the new process until
the run's next round is committed.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

from benchmarks import light
from benchmarks.light import COMMITTED, CONNECTED, READY, RESUMED
from benchmarks.measure import FEDGE, Case, Goal, Options, Sample, Side

_SITES = 100
_ELEMENTS = 2_500
_WORK_S = (0.05, 0.15)
_DOWN_S = 5.0
"""How long it is away: by then the sites try no more often than they ever do in the first minute."""

_GOAL_S = 5.0
_DEADLINE_S = 120.0


def cases(options: Options) -> list[Case]:
    rounds_before = 30 if options.quick else 50

    def restart() -> Sample:
        with ExitStack() as stack:
            federation = light.federation("c1", sites=_SITES, options=options)
            first = stack.enter_context(federation.coordinator())
            stack.enter_context(federation.connected(first, "--work-s", *_WORK_S))
            run = light.run_toml("c1", rounds=1_000_000, size=_SITES)
            federation.submit(run, elements=_ELEMENTS)
            first.until(COMMITTED, times=rounds_before, deadline_s=_DEADLINE_S)
            time.sleep(_WORK_S[0])  # the next round is in the middle of its work
            first.process.kill()
            first.process.wait()
            reached = first.last_round(COMMITTED)
            time.sleep(_DOWN_S)
            second = stack.enter_context(federation.coordinator(ready=False))
            ready = second.until(READY, deadline_s=_DEADLINE_S)
            connected = second.until(CONNECTED, times=_SITES, deadline_s=_DEADLINE_S)
            committed = second.until(COMMITTED, deadline_s=_DEADLINE_S)
            again = second.until(COMMITTED, times=2, deadline_s=_DEADLINE_S)
            return Sample(
                {
                    "seconds": committed,
                    "ready_seconds": ready,
                    "connected_seconds": connected,
                    "second_round_seconds": again,
                    "repeated_rounds": float(reached - second.last_round(RESUMED)),
                }
            )

    return [
        Case(
            "C1",
            f"a coordinator with {_SITES} sites is killed and started again",
            (Side.of(FEDGE, restart),),
            (
                Goal(
                    "from its start to the next committed round",
                    _GOAL_S,
                    lambda found: found.spread(FEDGE, "seconds"),
                    "s",
                ),
            ),
        )
    ]
