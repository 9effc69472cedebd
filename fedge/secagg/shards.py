"""Who sums with whom when more sites take part than one session holds: a pseudo-random function decides.

Its key is fixed when the run is offered, before anybody knows who will be in which round, and every site checks that
its session's members belong there: a coordinator cannot put one honest site among friends of its own.
"""

from __future__ import annotations

import hmac

from fedge.secagg.canonical import layout
from fedge.secagg.session import MAX_MEMBERS, Context

_AIM = 192
"""Members of a shard on average: 256 are then more than four deviations above."""


def shards_for(sites: int) -> int:
    """In how many shards so many sites sum."""
    return 1 if sites <= MAX_MEMBERS else -(-sites // _AIM)


def shard_of(context: Context, site: str) -> int:
    """The shard that a site sums in, from 0. The beacon is the digest of the run's offer."""
    order = context.order
    place = layout("shard", context.run_id, order.kind, order.round, order.attempt, site)
    return int.from_bytes(hmac.digest(context.offer, place, "sha256")[:8], "little") % context.shards
