"""The numbers of each workload, and which client a site is. Imports no torch: the driver reads it too."""

from __future__ import annotations

from dataclasses import dataclass

from fedge import Site


@dataclass(frozen=True, slots=True)
class Workload:
    """`clients` in all, of which `cohort` a round; each has `examples`."""

    clients: int
    cohort: int
    examples: int
    batch_size: int
    learning_rate: float


W1 = Workload(clients=100, cohort=20, examples=32, batch_size=16, learning_rate=0.05)
W2 = Workload(clients=1000, cohort=100, examples=20, batch_size=10, learning_rate=0.05)
D1 = Workload(clients=2, cohort=2, examples=2, batch_size=2, learning_rate=0.05)
D1_BYTES = 10_000
D2 = Workload(clients=2, cohort=2, examples=2, batch_size=1, learning_rate=1e-3)
D2_BYTES = 100_000_000
D3 = Workload(clients=2, cohort=2, examples=32, batch_size=16, learning_rate=0.05)


def index_of(site: Site) -> int:
    """The index of a simulated client, or what `[data]` of a site's client.toml says."""
    return site.index if site.index is not None else int(site.config["index"])
