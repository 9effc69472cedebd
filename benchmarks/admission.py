"""P2: how long a site takes to find out whether its budget allows a run; every run of another size.

    python -m benchmarks.admission RUNS

Prints {"seconds": [...], "reserve_seconds": [...]}: calibrating the noise, pricing the run and asking the ledger, as
the agent does when it is offered a run; and setting aside an order's cost, on disk, as it does before each.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path

from fedge.events import OrderId
from fedge.privacy.ledger import admit
from fedge.privacy.rdp import epsilon_of
from fedge.privacy.terms import Terms, price
from fedge.run import Work
from fedge_client.ledger import Ledger

DELTA = 1e-5
BEFORE, ROUNDS = 200, 20


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    terms, work = Terms("example", DELTA, 1.0, ROUNDS, epsilon=3.0), Work(batch_size=32, epochs=1)
    seconds, reserving = [], []
    with Ledger.open(folder / "ledger", "data", DELTA, head_folder=folder) as ledger:
        for run in range(BEFORE):
            cost = price(terms, work, "train", 500 + run % 5).order
            for round in range(1, ROUNDS + 1):
                entry = ledger.reserve(
                    f"run-{run}", OrderId("train", round), cost, unit="example", max_epsilon=1e6
                )
                ledger.sending(entry)
                ledger.commit(entry, cost)
        for run in range(int(sys.argv[1])):
            began = time.perf_counter()
            found = price(terms, work, "train", 1000 + 37 * run)
            epsilon_of(found.run, DELTA)
            admit(
                ledger.books,
                found.order,
                unit="example",
                delta=DELTA,
                max_epsilon=1e6,
                run_id=f"new-{run}",
                run_caps={DELTA: 3.0},
            )
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            ledger.reserve(f"new-{run}", OrderId("train", 1), found.order, unit="example", max_epsilon=1e6)
            reserving.append(time.perf_counter() - began)
    print(json.dumps({"seconds": seconds, "reserve_seconds": reserving}))


if __name__ == "__main__":
    main()
