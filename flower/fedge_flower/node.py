"""A node of a Flower app: what a ClientApp makes of a message, with the state that it keeps from one to the next."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import Final

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedge.errors import FedgeError, RefusedError
from fedge.records import AppError, AppMessage, Content, ErrorCode, reply_to
from fedge_flower.app import Settings
from fedge_flower.internals import be
from fedge_flower.records import content_of, message_of, plain_of, records_of

log = logging.getLogger(__name__)

_MAX_REASON: Final = 1000


@dataclass(frozen=True, slots=True)
class Node:
    """Who it is; `config` is what an app finds in `context.node_config`, a partition for instance."""

    id: int
    config: Settings


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a message, and the state behind it, which does not leave the node."""

    message: AppMessage
    state: Content


def answered(
    app: ClientApp,
    node: Node,
    message: AppMessage,
    *,
    run_id: int,
    run_config: Settings,
    state: Content,
    discreet: bool = False,
) -> Answer:
    """Have an app deal with a message. Whatever it raises is the reply's error, and its state is as before.

    `discreet`: the reply's error says no more than the exception's type, as what else it says may be of the data; but
    for a refusal, whose words are made to be told.
    """
    be(run_id=run_id, node_id=node.id)
    context = Context(run_id, node.id, dict(node.config), records_of(state), dict(run_config))
    try:
        reply = app(message_of(message, run_id=run_id), context)
        if not isinstance(reply, Message):
            raise TypeError(f"expected the ClientApp to return a Message, found a {type(reply).__name__}")
        made = plain_of(reply)
        answer = replace(
            reply_to(message, made.content, now=time.time()), created_at=made.created_at, ttl=made.ttl
        )
        return Answer(answer, content_of(context.state))
    except RefusedError as error:
        log.warning("client_app_refused node=%d kind=%s reason=%s", node.id, message.kind, error)
        refused = AppError(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"refused: {error}"[:_MAX_REASON])
        return Answer(reply_to(message, refused, now=time.time()), state)
    except FedgeError as error:
        log.warning("client_app_failed node=%d kind=%s reason=%s", node.id, message.kind, error)
        said = f"{type(error).__name__}; see the site's log" if discreet else str(error)
        return Answer(reply_to(message, AppError(ErrorCode.UNKNOWN, said), now=time.time()), state)
    except Exception as error:  # the app's code may raise anything
        log.exception("client_app_failed node=%d kind=%s", node.id, message.kind)
        what = type(error).__name__
        reason = f"{what}; see the site's log" if discreet else f"{what}: {error}"[:_MAX_REASON]
        failed = AppError(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        return Answer(reply_to(message, failed, now=time.time()), state)
