"""Why a certificate or a token does not count, in the words that its holder is told."""

from __future__ import annotations

from typing import Final

from fedge.principal import Principal
from fedge_server.store.registry import Holder

ASK: Final = "ask the coordinator's operator for a new one (`fedge server token`)"


def holder_refusal(principal: Principal, holder: Holder | None) -> str | None:
    """Why a certificate does not count; None if it does. Anything that is not known is refused."""
    who = f"{principal.role} {principal.name!r}"
    if holder is None:
        return f"{who} is not enrolled here: {ASK}"
    if holder.revoked:
        return f"{who} is revoked: {ASK}"
    if not holder.accepts(principal):
        return f"this certificate of {who} was superseded by a newer enrolment: use that one"
    return None


TOKEN_REFUSALS: Final = {
    "pending": None,
    "used": f"this token was already used: {ASK}",
    "cancelled": f"this token was cancelled, by a newer one or because its site was revoked: {ASK}",
    None: f"this coordinator does not know this token: {ASK}",
}
