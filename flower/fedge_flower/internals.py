"""The one file that names parts of Flower outside of its public modules: when Flower moves one, this is where it shows.

Made for flwr 1.41. `tests/flower/test_internals.py` says what each part has to be.
"""

from __future__ import annotations

from typing import Any

from fedge.errors import ConfigError

try:
    from flwr.app import Message
    from flwr.common.constant import (
        NUM_PARTITIONS_KEY,
        PARTITION_ID_KEY,
        SUPERLINK_NODE_ID,
        SType,
    )
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
except ModuleNotFoundError as error:
    if error.name != "flwr":
        raise ConfigError(
            f"this version of flwr has no {error.name} any more: fedge was made for flwr 1.41; "
            "pip install 'fedge[flower]'"
        ) from error
    raise ConfigError("Flower apps need flwr: pip install 'fedge[flower]'") from error
except ImportError as error:
    raise ConfigError(
        f"this version of flwr is another than fedge was made for, which is 1.41 ({error}): "
        "pip install 'fedge[flower]'"
    ) from error

__all__ = [
    "NUM_PARTITIONS_KEY",
    "PARTITION_ID_KEY",
    "SUPERLINK_NODE_ID",
    "NodeInfo",
    "Run",
    "SType",
    "be",
    "with_id",
]


def be(*, run_id: int, node_id: int) -> None:
    """This process is that node from now on: what it makes of new messages says so."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, node_id, run_id


def with_id(message: Message, **metadata: Any) -> Message:
    """The same message with these of its metadata, which has no setters: `message_id`, `reply_to_message_id`, ..."""
    for name, value in metadata.items():
        key = f"_{name}"
        if key not in message.metadata.__dict__:
            raise ConfigError(f"flwr's messages have no {name} any more: fedge was made for flwr 1.41")
        message.metadata.__dict__[key] = value
    return message
