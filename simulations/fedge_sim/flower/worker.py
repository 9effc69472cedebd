"""A process that runs the ClientApp of a simulated Flower app: a message at a time, whichever node's it is."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
from pathlib import Path

import numpy as np

from fedge.errors import FedgeError, LimitError
from fedge.records import AppError, AppMessage
from fedge.seeds import derive_seed
from fedge.wire import records
from fedge_flower.app import FlowerApp
from fedge_flower.internals import ErrorCode
from fedge_flower.node import Answer, Node, answered, reply_to
from fedge_sim.flower.frames import Frames


def main() -> int:
    """Until the simulator closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the simulator hears of it, and ends this process
    end = socket.socket(fileno=int(sys.argv[1]))
    os.register_at_fork(
        after_in_child=end.close
    )  # else its end would seem to be here when this process is gone
    frames = Frames(end)
    try:
        told = json.loads(frames.receive()[0])
        try:
            app = FlowerApp.load(Path(told["folder"]))
            client = app.client()
        except FedgeError as error:
            frames.send(json.dumps({"failed": str(error)}).encode())
            return 1
        frames.send(b"{}")
        while True:
            about = json.loads(frames.receive()[0])
            message, state = frames.receive_message(), frames.receive_message()
            assert not isinstance(state.content, AppError)  # the simulator sends records
            seed_globally(derive_seed(told["seed"], "flower", about["node"], about["number"]))
            node = Node(about["node"], about["config"])
            answer = answered(
                client, node, message, run_id=told["run_id"], run_config=told["config"], state=state.content
            )
            _send(frames, message, answer, state)
    except (EOFError, BrokenPipeError):
        return 0


def _send(frames: Frames, message: AppMessage, answer: Answer, before: AppMessage) -> None:
    """The reply and the node's state; if one of them is more than a message may be, an error and the state `before`."""
    try:
        reply, kept = records.encode(answer.message), records.encode(AppMessage("", "query", 0, answer.state))
    except (LimitError, ValueError) as error:
        reason = f"what the ClientApp has made cannot be sent, or kept: {error}"
        reply = records.encode(reply_to(message, AppError(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)))
        kept = records.encode(before)
    frames.send(*reply)
    frames.send(*kept)


def seed_globally(seed: int) -> None:
    """Have the global generators begin from a seed: torch's too, if somebody has imported it by then."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


if __name__ == "__main__":
    sys.exit(main())
