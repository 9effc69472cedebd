"""Enrolment: a one-time token and a fresh key in, an identity and a client.toml in a private folder out."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import tomlkit

from fedge.errors import ConfigError
from fedge.files import private_folder, write_private
from fedge.signing import authority_of_pem, make_signing_key, prove, public_bytes, signing_key_of_pem
from fedge.wire.address import check_address
from fedge_client.identity import (
    Identity,
    accept_certificate,
    load_authority_pem,
    make_csr,
    open_token,
    save_identity,
)
from fedge_client.link import Link

MAX_PEM_BYTES = 64 << 10

_HINTS = """

# The folder of the task code that you installed here; without it, this file's own folder.
# [task]
# path = "."

# Which tasks may run here; without it, those in the task folder.
# [policy]
# tasks = ["app:task"]

# The process that runs task code is restarted when it outgrows or outlasts these.
# [worker]
# memory_mb = 4096
# hang_s = 900

# Any keys: your task gets them as `site.config`.
# [data]
# folder = "/srv/data"
"""


async def enrol_site(
    server: str, token: str, *, ca_pem: bytes, folder: Path, authority_pem: bytes | None = None
) -> Identity:
    """Have new keys certified and write them, the certificate, the CA and a client.toml into `folder`.

    `authority_pem` is whose signature the directory of the sites' keys has to have, if not the CA's. Without it,
    the one that is there stays, and so does an existing client.toml: a site that enrols again keeps its settings.

    Raises:
        ConfigError: the address is malformed, or the folder cannot be written (found before the token
            is spent).
        IdentityError: the token is used, expired or of another coordinator; or the authority is no key.
        LinkError: the coordinator cannot be reached.
    """
    try:
        check_address(server)
    except ValueError as error:
        raise ConfigError(f"--server: {error}") from None
    now = datetime.now(UTC)
    opened = open_token(token, ca_pem=ca_pem, now=now)
    private_folder(folder)
    authority_pem = load_authority_pem(folder) if authority_pem is None else authority_pem
    if authority_pem is not None:
        authority_of_pem(authority_pem)
    key_pem, csr = make_csr()
    signing_pem = make_signing_key()
    signing = signing_key_of_pem(signing_pem)
    proof = prove(signing, federation=opened.principal.federation, site=opened.site, csr_der=csr)
    link = Link(server, ca_pem=ca_pem, key_pem=opened.key_pem, certificate_pem=opened.certificate_pem)
    try:
        certificate = await link.enrol(csr, key=public_bytes(signing), proof=proof)
    finally:
        await link.close()
    identity = accept_certificate(
        certificate,
        key_pem=key_pem,
        signing_pem=signing_pem,
        ca_pem=ca_pem,
        authority_pem=authority_pem,
        site=opened.site,
        now=now,
    )
    save_identity(folder, identity)
    if not (folder / "client.toml").exists():
        _write_client_toml(folder / "client.toml", server)
    return identity


def _write_client_toml(path: Path, server: str) -> None:
    document = tomlkit.document()
    document.add(
        tomlkit.comment(
            "This site's client: `fedge client start` reads this file, `fedge client check` tries it."
        )
    )
    document.add("server", tomlkit.item(server))
    write_private(path, tomlkit.dumps(document) + _HINTS)
