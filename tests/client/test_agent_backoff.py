"""How long an agent waits for a coordinator that is away: never much, however long it is away."""

from __future__ import annotations

from fedge_client.agent import backoff_s


def test_waits_grow_to_half_a_minute_and_stay_there_for_ever() -> None:
    waits = [backoff_s(failures) for failures in range(5000)]
    assert waits == sorted(waits)
    assert (waits[0], waits[1], waits[-1]) == (0.5, 1.0, 30.0)
