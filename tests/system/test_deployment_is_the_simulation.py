"""A federation of real processes computes what the simulator computes, to the bit."""

from __future__ import annotations

import pytest
from harness import Federation, run_toml, simulated

STRATEGIES = {
    "fedavg": '[strategy]\nname = "fedavg"',
    "mirrored-sgd": '[strategy]\nname = "mirrored_sgd"\noptimizer = "adam"\nlearning_rate = 0.01',
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_makes_the_same_bits_deployed_and_simulated(federation: Federation, name: str) -> None:
    text = run_toml(name, rounds=5, more=STRATEGIES[name])
    detail = federation.run(text)
    assert [list(row.clients) for row in detail.history] == [["client-0", "client-1"]] * 5
    assert federation.digest(detail.summary.run_id) == simulated(text)
