"""C4: in every round a tenth of all clients is cut off in the middle of its work; beside it, the same quietly.

Links, not processes, are killed: to start a Python process for each would be most of what is measured. What
the coordinator sees is the same, a connection that is gone at once.
"""

from __future__ import annotations

from benchmarks import light
from benchmarks.light import COMMITTED, ENDED, GIVEN_UP
from benchmarks.measure import FEDGE, Case, Goal, Options, Sample, Side
from benchmarks.processes import CrashError

_SITES = 20
_COHORT = 10
_OVER_SELECT = 1.3
_CUTS = 2
_PROCESSES = 5
_ELEMENTS = 2_500
_WORK_S = (0.2, 0.6)
"""Long against the second after which a site is back: else most of them are away most of the time."""

_QUIET = "the quiet run"
_GOAL = 1.2
_DEADLINE_S = 600.0


def cases(options: Options) -> list[Case]:
    rounds = 10 if options.quick else 50
    return [
        Case(
            "C4",
            f"{_CUTS} of {_SITES} clients are cut off in every round",
            (
                Side.of(_QUIET, lambda: _run(rounds, cuts=0, options=options)),
                Side.of(FEDGE, lambda: _run(rounds, cuts=_CUTS, options=options)),
            ),
            (
                Goal("all rounds, of the quiet run's", _GOAL, lambda found: found.ratio(_QUIET)),
                Goal(
                    "rounds that had to be begun again",
                    0.0,
                    lambda found: found.spread(FEDGE, "given_up_rounds"),
                    "rounds",
                ),
            ),
        )
    ]


def _run(rounds: int, *, cuts: int, options: Options) -> Sample:
    federation = light.federation("c4", sites=_SITES, options=options)
    folder = federation.folder / "cuts"
    folder.mkdir()
    habits = ("--work-s", *_WORK_S, "--cuts", folder, "--cuts-a-round", cuts)
    with (
        federation.coordinator() as server,
        federation.connected(server, *habits, processes=_PROCESSES) as sites,
    ):
        run = light.run_toml("c4", rounds=rounds, size=_COHORT, over_select=_OVER_SELECT)
        run_id = federation.submit(run, elements=_ELEMENTS)
        server.until(ENDED, deadline_s=_DEADLINE_S)
        detail = federation.show(run_id)
        if detail.summary.status != "done" or len(detail.history) != rounds:
            raise CrashError(f"expected {rounds} rounds, found {detail.summary}")
        cut = light.count_lines(sites, "cut")
        given_up = len(server.lines(GIVEN_UP))
        seconds = server.lasted_s(COMMITTED)
    if cut != cuts * rounds:
        raise CrashError(f"expected {cuts * rounds} clients to be cut off, found {cut}")
    return Sample(
        {"seconds": seconds, "cut_off_clients": float(cut), "given_up_rounds": float(given_up)},
        rounds=rounds - 1,
    )
