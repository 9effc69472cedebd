"""What simulated clients have spent: counted as a site's ledger does, at a price that does not grow with the rounds."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import pytest
import simulated
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.errors import RefusedError, TaskError
from fedge.privacy.mechanism import merged, scaled
from fedge.privacy.rdp import epsilon_of
from fedge_sim.privacy import Accounts

SIZES = {"a": 20, "b": 20, "c": 33}
DELTA = 1e-5
Kind = Literal["train", "evaluate"]


def accounts() -> Accounts:
    run = simulated.config(
        rounds=4,
        privacy={
            "unit": "example",
            "noise_multiplier": 1.1,
            "delta": DELTA,
            "clip": 1.0,
            "max_participations": 3,
            "evaluation_noise_multiplier": 20.0,
        },
    )
    return Accounts(run, "train")


def epsilon(found: Accounts, size: int, trained: int, evaluated: int) -> float:
    price = found.price(size)
    assert price.evaluation is not None
    costs = [(price.order, trained), (price.evaluation, evaluated)]
    history = merged(scaled(cost, times * cost.count) for cost, times in costs if times)
    return epsilon_of(history, DELTA)


CHARGES = st.lists(
    st.tuples(st.sampled_from(sorted(SIZES)), st.sampled_from(["train", "evaluate"]), st.booleans()),
    max_size=25,
)


@given(CHARGES)
@settings(max_examples=40)
def test_the_worst_is_that_of_all_histories_whenever_it_is_asked_for(
    charges: list[tuple[str, Kind, bool]],
) -> None:
    found, made = accounts(), Counter[tuple[str, Kind]]()

    def expected() -> dict[str, float]:
        names = {client for client, _ in made}
        return {
            name: epsilon(found, SIZES[name], made[name, "train"], made[name, "evaluate"]) for name in names
        }

    assert found.terms is not None
    limits = {"train": found.terms.participations, "evaluate": found.terms.evaluations}
    for client, kind, asked in charges:
        if made[client, kind] == limits[kind]:
            with pytest.raises(RefusedError, match="budget"):
                found.charge(client, kind, SIZES[client])
        else:
            found.charge(client, kind, SIZES[client])
            made[client, kind] += 1
        if asked:
            assert found.worst() == pytest.approx(max(expected().values()), rel=1e-12)
    made = +made
    assert found.worst() == pytest.approx(max(expected().values(), default=0.0), rel=1e-12)
    assert found.spent().epsilons == pytest.approx(expected(), rel=1e-12)


def test_a_client_whose_number_of_examples_changes_is_told_so_where_it_sets_the_price() -> None:
    found = accounts()
    found.charge("a", "train", 20)
    with pytest.raises(TaskError, match="expected a to keep its 20 training examples, found 21"):
        found.charge("a", "train", 21)
    privacy = {"unit": "client", "noise_multiplier": 1.0, "clip": 1.0, "delta": DELTA}
    whole = Accounts(simulated.config(rounds=2, privacy=privacy), "train")
    for size in (20, 21):
        whole.charge("a", "train", size)
    assert len(whole.spent().epsilons) == 1


def test_without_privacy_nothing_is_counted() -> None:
    found = Accounts(simulated.config(rounds=1), "train")
    found.charge("a", "train", 20)
    assert found.worst() is None
    assert found.spent().as_dict() == {"unit": "none"}
