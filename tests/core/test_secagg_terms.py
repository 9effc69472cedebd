"""What a run asks for in secure aggregation: which runs can have it, and which numbers are terms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from fedge.errors import ConfigError
from fedge.pipeline import Mean, Pipeline
from fedge.run import RunConfig
from fedge.secagg.encoding import BEYOND_BOUND
from fedge.secagg.session import MAX_MEMBERS
from fedge.secagg.terms import MAX_CLIENTS, SumTerms, least_of
from fedge.strategy import AnyStrategy
from fedge.vector import Layout, Tensor
from fedge_strategies import FedAvg, Sgd

LAYOUT = Layout((Tensor("w", (40,)),))
TERMS = SumTerms(least=3, clients=10, bound=1.0)


def terms_of(strategy: AnyStrategy | None = None, **tables: Any) -> SumTerms | None:
    known = {"secure_aggregation": {"enabled": True}, "cohort": {"size": 9}}
    table = {"name": "a", "task": "app:task", "rounds": 12, **known, **tables}
    return SumTerms.of(RunConfig.from_table(table, source="run.toml"), strategy or FedAvg(), LAYOUT)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"least": 2}, "each knows the other's part"),
        ({"least": 11}, "found 11 to 10"),
        ({"clients": MAX_CLIENTS + 1}, f"at most {MAX_CLIENTS}"),
        ({"least": 257, "clients": 300}, "the most that one sum has, found 257"),
        ({"bits": 7}, "bits: expected 8 to 32 of an element, found 7"),
        ({"bits": 33}, "bits: expected 8 to 32 of an element, found 33"),
        ({"threshold_ppm": -1}, "threshold: expected 0 to 1"),
        ({"threshold_ppm": 1_000_001}, "threshold: expected 0 to 1"),
        ({"metrics": tuple(map(str, range(65)))}, "at most 64 different names"),
        ({"metrics": ("loss", "loss")}, "different names"),
        ({"max_weight": 0}, "weight"),
        ({"bits": 8, "clients": 100}, "use more bits"),
    ],
    ids=str,
)
def test_numbers_that_are_no_terms_are_refused(changes: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        replace(TERMS, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"least": 3},
        {"least": 10},
        {"clients": MAX_CLIENTS},
        {"least": 256, "clients": 300},
        {"bits": 8},
        {"threshold_ppm": 0},
        {"threshold_ppm": 1_000_000},
        {"metrics": tuple(map(str, range(64)))},
    ],
    ids=str,
)
def test_numbers_at_the_bounds_are_terms(changes: dict[str, Any]):
    replace(TERMS, **changes)


def test_ranges_are_made_for_the_members_of_one_sum_of_however_many_an_order_has():
    assert TERMS.members == 10
    many = replace(TERMS, clients=1000)
    assert (many.members, many.shards) == (MAX_MEMBERS, 6)
    assert many.encoding(4, b"").body == replace(TERMS, clients=256).encoding(4, b"").body


@pytest.mark.parametrize(
    ("quorum", "clients", "least"),
    [
        (5, 9, 5),
        (256, 256, 256),
        (900, 1000, 113),  # in six shards: 150 on average, less three times its root
        (10, 1000, 3),
    ],
)
def test_a_sum_is_of_the_quorum_or_of_what_a_shard_of_it_rarely_has_fewer_than(quorum, clients, least):
    assert least_of(quorum, clients) == least


def test_a_run_without_secure_aggregation_has_no_terms_of_it():
    assert terms_of(secure_aggregation={}) is None
    assert terms_of() is not None


@dataclass(frozen=True, slots=True)
class OneByOne(FedAvg):
    """Averaging that looks at the updates one by one before it does."""

    @property
    def reduction(self) -> Any:
        return Pipeline(Mean())


@pytest.mark.parametrize(
    ("strategy", "says"),
    [(OneByOne(), "with Pipeline, which looks at each of them"), (Sgd(), "expected a strategy with rounds")],
)
def test_a_strategy_that_needs_more_than_a_sum_of_a_round_cannot_have_it(strategy: AnyStrategy, says: str):
    with pytest.raises(ConfigError, match=says):
        terms_of(strategy)


def test_sums_that_do_not_fit_are_refused_when_the_run_is_configured():
    with pytest.raises(ConfigError, match="secure_aggregation: bits"):
        terms_of(secure_aggregation={"enabled": True, "bits": 8})


PRIVACY = {"epsilon": 3.0, "delta": 1e-5, "clip": 1.0}


@pytest.mark.parametrize(
    ("strategy", "privacy", "max_weight"),
    [
        (FedAvg(), {"unit": "none"}, 10_000),
        (FedAvg(weighting="uniform"), {"unit": "none"}, 1),
        (FedAvg(), {"unit": "example", **PRIVACY}, 1),
        (FedAvg(), {"unit": "client", **PRIVACY}, 1),
    ],
)
def test_updates_weigh_their_examples_where_these_may_be_told(strategy, privacy, max_weight):
    terms = terms_of(strategy, privacy=privacy)
    assert terms is not None
    assert terms.max_weight == max_weight


@pytest.mark.parametrize(
    ("privacy", "noisy"),
    [
        ({"unit": "none"}, False),
        ({"unit": "example", **PRIVACY}, False),
        ({"unit": "client", **PRIVACY}, True),
    ],
)
def test_the_members_of_a_sum_add_noise_where_the_sum_is_to_protect_whole_sites(privacy, noisy: bool):
    terms = terms_of(privacy=privacy)
    assert terms is not None
    assert (terms.noise is not None) is noisy
    assert (terms.mechanism is not None) is noisy
    assert (BEYOND_BOUND in terms.metrics) is not noisy
