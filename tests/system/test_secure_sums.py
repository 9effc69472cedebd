"""Secure sums by real processes over real TLS: the mean is the mean, and the coordinator has only that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
from harness import Federation, coordinator, run_toml

from fedge.config import parse_toml
from fedge.run import RunConfig
from fedge_sim import Result, simulate

SITES = [f"client-{n}" for n in range(4)]
SECURE = """
[secure_aggregation]
enabled = true
bound = 50.0
max_weight = 100
exchange_s = 20
metrics = ["train_loss", "loss", "bias"]
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with coordinator(tmp_path_factory.mktemp("secure")) as started:
        for name in SITES:
            started.enrol(name)
        for name in SITES:
            started.start(name)
        yield started


def in_clear(text: str, **simulation: Any) -> Result:
    """The same run simulated, without secure aggregation."""
    table = parse_toml(text.replace("enabled = true", "enabled = false"), RunConfig, source="run.toml")
    return simulate(table, task=tiny.task, clients=len(SITES))


@pytest.mark.parametrize(
    "more",
    [
        "",
        '[strategy]\nname = "mirrored_sgd"',
        'SUITE = "x25519-mlkem768"',
    ],
    ids=["fedavg", "mirrored_sgd", "post-quantum"],
)
def test_a_secure_run_makes_the_mean_that_there_is_in_clear(federation: Federation, more: str) -> None:
    secure = SECURE + ('suite = "x25519-mlkem768"\n' if more.startswith("SUITE") else "")
    text = run_toml("secure", rounds=4, size=4, quorum=4, more=secure + more.partition("SUITE")[0])
    detail = federation.run(text)
    clear = in_clear(text)
    assert np.allclose(federation.model(detail.summary.run_id), clear.model.vector, atol=1e-4)
    for row, other in zip(detail.history, clear.history, strict=True):
        assert list(row.clients) == SITES
        assert row.num_examples == other.num_examples
        found = {metric.name: metric.value for metric in row.metrics}
        assert found == pytest.approx(dict(other.metrics), abs=1e-3)
