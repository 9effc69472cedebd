"""A process that runs the ClientApp of a simulated Flower app: a message at a time, whichever node's it is."""

from __future__ import annotations

import json
import random
import signal
import socket
import sys
from pathlib import Path

import numpy as np

from fedge.errors import FedgeError, LimitError
from fedge.records import AppError, AppMessage
from fedge.seeds import derive_seed
from fedge_flower.app import FlowerApp
from fedge_flower.internals import ErrorCode
from fedge_flower.node import Answer, Node, answered, reply_to
from fedge_sim.flower.frames import Frames


def main() -> int:
    """Until the simulator closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the simulator hears of it, and ends this process
    frames = Frames(socket.socket(fileno=int(sys.argv[1])))
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
            _seed(told["seed"], about["node"], about["number"])
            node = Node(about["node"], about["config"])
            answer = answered(
                client, node, message, run_id=told["run_id"], run_config=told["config"], state=state.content
            )
            _send(frames, message, answer)
    except (EOFError, BrokenPipeError):
        return 0


def _send(frames: Frames, message: AppMessage, answer: Answer) -> None:
    kept = AppMessage("", "query", 0, answer.state)
    try:
        frames.send_message(answer.message)
    except (LimitError, ValueError) as error:
        frames.send_message(reply_to(message, AppError(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, str(error))))
    frames.send_message(kept)


def _seed(seed: int, node: int, number: int) -> None:
    """What an app draws from global generators follows from the run's seed, the node and which message it is."""
    drawn = derive_seed(seed, "flower", node, number)
    random.seed(drawn)
    np.random.seed(drawn & 0xFFFFFFFF)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(drawn)


if __name__ == "__main__":
    sys.exit(main())
