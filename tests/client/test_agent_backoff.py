"""How long an agent waits for a coordinator that is away: never much, however long it is away."""

from __future__ import annotations

from fedge_client.agent import backoff_s


def test_waits_are_short_in_the_first_minute_and_grow_to_half_a_minute_afterwards() -> None:
    for down_s, longest in ((0.0, 2.0), (59.0, 2.0), (60.0, 30.0), (1e9, 30.0)):
        waits = [backoff_s(failures, down_s=down_s) for failures in range(5000)]
        assert waits == sorted(waits)
        assert (waits[0], waits[1], waits[-1]) == (0.25, 0.5, longest)
