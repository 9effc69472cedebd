"""C6: one site of twenty is twenty times slower than the others; beside it, the same without it being slow.

Every round asks three more than it needs: the slow one is asked when its turn comes, is not waited for, and is told
when its round is over.
"""

from __future__ import annotations

from statistics import median

from benchmarks import light
from benchmarks.light import ENDED
from benchmarks.measure import FEDGE, Case, Goal, Options, Sample, Side
from benchmarks.processes import CrashError

_SITES = 20
_COHORT = 10
_OVER_SELECT = 1.3
_SLOWER = 20.0
_ELEMENTS = 2_500
_WORK_S = (0.1, 0.3)
_EVEN = "nobody is slow"
_GOAL = 1.05
_DEADLINE_S = 600.0


def cases(options: Options) -> list[Case]:
    rounds = 10 if options.quick else 50
    return [
        Case(
            "C6",
            f"one of {_SITES} clients is {_SLOWER:.0f} times slower",
            (
                Side.of(_EVEN, lambda: _run(rounds, slower=1.0, options=options)),
                Side.of(FEDGE, lambda: _run(rounds, slower=_SLOWER, options=options)),
            ),
            (Goal("the median round, of the one without", _GOAL, lambda found: found.ratio(_EVEN)),),
        )
    ]


def _run(rounds: int, *, slower: float, options: Options) -> Sample:
    federation = light.federation("c6", sites=_SITES, options=options)
    habits = ("--work-s", *_WORK_S, "--first-slower", slower)
    with federation.coordinator() as server, federation.connected(server, *habits):
        run = light.run_toml("c6", rounds=rounds, size=_COHORT, over_select=_OVER_SELECT)
        run_id = federation.submit(run, elements=_ELEMENTS)
        server.until(ENDED, deadline_s=_DEADLINE_S)
        detail = federation.show(run_id)
    if detail.summary.status != "done" or len(detail.history) != rounds:
        raise CrashError(f"expected {rounds} rounds, found {detail.summary}")
    return Sample({"seconds": median(row.seconds for row in detail.history)}, rounds=rounds)
