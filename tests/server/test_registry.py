"""Who may call, on both databases: records change one at a time, and each change is told to auditors."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from threading import Barrier

import pytest
from databases import database_url, postgresql

from fedge.errors import ConfigError
from fedge.principal import Principal, Role
from fedge_server.store.database import Database
from fedge_server.store.registry import Registry
from fedge_server.store.store import Store

__all__ = ["database_url", "postgresql"]  # fixtures that the tests here ask for

NOW = datetime(2026, 11, 25, tzinfo=UTC)
KEY = b"k" * 32


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    opened.open()
    yield opened
    opened.close()


@pytest.fixture
def registry(database: Database) -> Registry:
    return Registry(database)


def principal(role: Role, name: str, serial: int) -> Principal:
    return Principal("f", role, name, serial, NOW - timedelta(days=1), NOW + timedelta(days=1))


def test_a_token_is_spent_once_and_its_site_is_in(registry: Registry, database: Database) -> None:
    token, site = principal("enrol", "icu", 1), principal("site", "icu", 2)
    assert registry.token_state(token) is None
    registry.add_token(token, now=NOW)
    assert registry.token_state(token) == "pending"
    assert registry.enrol(token, site, key=KEY, now=NOW)
    assert not registry.enrol(token, principal("site", "icu", 3), key=KEY, now=NOW)
    holder = registry.holder("site", "icu")
    assert holder is not None
    assert holder.accepts(site)
    assert registry.token_state(token) == "used"
    assert [event.kind for event in Store(database).events()] == ["site_enrolled", "token_issued"]


def test_a_renewal_adds_a_certificate_and_an_enrolment_replaces_all(registry: Registry) -> None:
    first, second, third = (principal("site", "icu", serial) for serial in (10, 11, 12))
    token = principal("enrol", "icu", 1)
    registry.add_token(token, now=NOW)
    registry.enrol(token, first, key=KEY, now=NOW)
    assert registry.renew(first, second, now=NOW)
    (holder,) = registry.holders("site")
    assert holder.accepts(first)
    assert holder.accepts(second)
    again = principal("enrol", "icu", 2)
    registry.add_token(again, now=NOW)
    registry.enrol(again, third, key=KEY, now=NOW)
    (holder,) = registry.holders("site")
    assert [holder.accepts(each) for each in (first, second, third)] == [False, False, True]
    assert not registry.renew(first, principal("site", "icu", 13), now=NOW)


def test_a_revocation_cancels_tokens_and_refuses_certificates(registry: Registry) -> None:
    token, spare, site = (
        principal("enrol", "icu", 1),
        principal("enrol", "icu", 2),
        principal("site", "icu", 3),
    )
    registry.add_token(token, now=NOW)
    registry.enrol(token, site, key=KEY, now=NOW)
    registry.add_token(spare, now=NOW)
    registry.revoke("site", "icu", now=NOW)
    holder = registry.holder("site", "icu")
    assert holder is not None
    assert not holder.accepts(site)
    assert registry.token_state(spare) == "cancelled"
    with pytest.raises(ConfigError, match="did you mean 'icu'"):
        registry.revoke("site", "icuu", now=NOW)


def test_what_has_expired_is_forgotten_in_time(registry: Registry, database: Database) -> None:
    old = replace(principal("enrol", "icu", 1), not_after=NOW - timedelta(seconds=1))
    registry.add_token(old, now=NOW - timedelta(days=1))
    registry.add_token(principal("enrol", "other", 2), now=NOW)
    assert registry.token_state(old) is None


def test_of_two_processes_one_spends_a_token(registry: Registry, database_url: str) -> None:
    token = principal("enrol", "icu", 1)
    registry.add_token(token, now=NOW)
    both = Barrier(2)

    def race(serial: int) -> bool:
        beside = Database(database_url)
        beside.join()
        try:
            both.wait()
            return Registry(beside).enrol(token, principal("site", "icu", serial), key=KEY, now=NOW)
        finally:
            beside.close()

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(race, [10, 11])) == [False, True]


def test_nobody_joins_a_database_that_no_coordinator_has_made(database_url: str) -> None:
    with pytest.raises(ConfigError, match="start the coordinator once"):
        Database(database_url).join()
