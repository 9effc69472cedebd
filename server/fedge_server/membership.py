"""Who may call, asked from the event loop: the authority's answers, which need a database, without blocking.

Only this coordinator enrols, renews and revokes sites (it alone has the database's claim), so what it
remembers of a site is exact: a site's calls cost no look into the database, and go on while it is away.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fedge.errors import FedgeError, StorageError
from fedge.principal import Principal
from fedge.signing import SignedDirectory
from fedge_server.clock import now
from fedge_server.identity import Authority
from fedge_server.store.registry import Holder

R = TypeVar("R")


class Membership:
    """The authority's asynchronous face. All methods belong to the event loop's thread."""

    def __init__(self, authority: Authority) -> None:
        self._authority = authority
        self._known: dict[str, Holder] = {}
        self._directory: SignedDirectory | None = None  # touched in the thread alone
        # One thread: answers come in the order of the questions, so that none overtakes a revocation.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="membership")

    @property
    def federation(self) -> str:
        return self._authority.federation

    async def check(self, principal: Principal) -> None:
        """Whether a caller's certificate still counts.

        Raises:
            IdentityError: it does not, and why.
            StorageError: the records cannot be read.
        """
        if principal.role != "site":
            await self._call(self._authority.check, principal, now=now())
            return
        if principal.name not in self._known:
            await self._then_look(principal.name, lambda: None)
        self._authority.check_holder(principal, self._known.get(principal.name), now=now())

    def check_known(self, site: Principal) -> None:
        """As `check`, at once, for a site whose call was let in before.

        Raises:
            IdentityError: it does not count any more, and why.
            StorageError: its record has changed, and could not be read since.
        """
        holder = self._known.get(site.name)
        if holder is None:
            raise StorageError(f"the record of site {site.name!r} could not be read")
        self._authority.check_holder(site, holder, now=now())

    async def enrol(self, principal: Principal, csr_der: bytes, *, key: bytes, proof: bytes) -> bytes:
        """See `Authority.enrol`."""
        return await self._then_look(
            principal.name,
            lambda: self._authority.enrol(principal, csr_der, key=key, proof=proof, now=now()),
        )

    async def renew(
        self, principal: Principal, csr_der: bytes, *, key: bytes = b"", proof: bytes = b""
    ) -> bytes:
        """See `Authority.renew`."""
        return await self._then_look(
            principal.name,
            lambda: self._authority.renew(principal, csr_der, key=key, proof=proof, now=now()),
        )

    async def revoke(self, site: str, *, actor: str) -> None:
        """See `Authority.revoke`."""
        await self._then_look(site, lambda: self._authority.revoke(site, now=now(), actor=actor))

    async def sites(self) -> tuple[Holder, ...]:
        """Every site that was ever enrolled, by name."""
        return await self._call(self._authority.sites)

    async def directory(self) -> SignedDirectory:
        """The newest signed directory of the sites' keys: the same object until there is a newer one.

        Raises:
            RunError: there is none yet; it says what the operator has to do.
            StorageError: the records cannot be read.
        """
        return await self._call(self._newest_directory)

    def close(self) -> None:
        """Wait for what is under way."""
        self._thread.shutdown()

    def _newest_directory(self) -> SignedDirectory:
        # An epoch is one number to read, and a directory may be large. `fedge server directory import` changes it
        # from beside.
        known = self._directory
        if known is None or known.directory.epoch != self._authority.registry.directory_epoch():
            self._directory = known = self._authority.directories.newest()
        return known

    async def _then_look(self, site: str, change: Callable[[], R]) -> R:
        """Make a change, and remember what the site's record is then."""

        def do() -> tuple[R, Holder | None]:
            return change(), self._authority.registry.holder("site", site)

        try:
            outcome, holder = await self._call(do)
        except FedgeError:
            self._known.pop(site, None)  # whatever happened to it, nothing is believed
            raise
        if holder is not None:
            self._known[site] = holder
        return outcome

    async def _call(self, function: Callable[..., R], *arguments: Any, **named: Any) -> R:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: function(*arguments, **named))
