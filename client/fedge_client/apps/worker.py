"""A process that runs the ClientApp of a Flower app: a message at a time, whichever node's it is."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np

from fedge.errors import FedgeError, LimitError
from fedge.memory import keep_freed, use_one_arena
from fedge.records import AppError, ErrorCode, reply_to
from fedge.seeds import derive_seed
from fedge.wire.records import Packed, pack, unpack
from fedge_client.apps.frames import Frames
from fedge_flower.app import FlowerApp
from fedge_flower.node import Answer, Node, answered


def main() -> int:
    """Until whoever has started it closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever has started it hears of it, and ends this process
    end = socket.socket(fileno=int(sys.argv[1]))
    os.register_at_fork(
        after_in_child=end.close
    )  # else its end would seem to be here when this process is gone
    frames = Frames(end)
    use_one_arena()
    keep_freed()
    try:
        told = frames.hear()
        try:
            app = FlowerApp.load(Path(told["folder"]))
            client = app.client()
        except FedgeError as error:
            frames.tell({"failed": str(error)})
            return 1
        frames.tell({})
        while True:
            asked = frames.hear()
            packed, before = frames.receive(), frames.receive_bytes()
            if told["seed"] is not None:
                seed_globally(derive_seed(told["seed"], "flower", asked["node"], asked["number"]))
            answer = answered(
                client,
                Node(asked["node"], asked["config"]),
                packed.unpacked(),
                run_id=told["run_id"],
                run_config=told["config"],
                state=unpack(before) if before else {},
                discreet=told["discreet"],
            )
            _send(frames, packed, answer, before, discreet=told["discreet"])
    except (EOFError, BrokenPipeError):
        return 0


def _send(frames: Frames, asked: Packed, answer: Answer, before: memoryview, *, discreet: bool) -> None:
    """The reply and the node's state; if one of them is more than a message may be, an error and the state `before`."""
    try:
        reply, kept = Packed.of(answer.message), pack(answer.state)
    except (LimitError, ValueError) as error:
        said = type(error).__name__ if discreet else error
        reason = f"what the ClientApp has made cannot be sent, or kept: {said}"
        failed = AppError(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)
        reply, kept = Packed(reply_to(asked.about, failed, now=time.time())), [before]
    frames.send(reply)
    frames.send_bytes(kept)


def seed_globally(seed: int) -> None:
    """Have the global generators begin from a seed: torch's too, if somebody has imported it by then."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)


if __name__ == "__main__":
    sys.exit(main())
