"""The agent's own program, `python -m fedge_client CLIENT.toml`: what `fedge client start` becomes.

It imports nothing that only the command line needs: on a device an agent at rest should be small.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import signal
import sys
from pathlib import Path

from fedge.errors import FedgeError
from fedge.logs import configure_logging
from fedge.memory import give_back_freed, use_one_arena
from fedge_client.agent import Agent
from fedge_client.settings import load_client


async def serve(path: Path) -> None:
    """Take part in runs until SIGINT or SIGTERM."""
    agent = Agent(load_client(path), path)
    task = asyncio.ensure_future(agent.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        sys.stderr.write(f"site {agent.site} stopped\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="fedge_client", description=__doc__)
    parser.add_argument("client_toml", type=Path, metavar="CLIENT.toml")
    parser.add_argument("--verbose", action="store_true", help="log more")
    arguments = parser.parse_args()
    configure_logging(verbose=arguments.verbose)
    use_one_arena()
    give_back_freed()  # the imports are done
    code = 0
    try:
        asyncio.run(serve(arguments.client_toml))
    except FedgeError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    except KeyboardInterrupt:  # before the signal handlers are in place
        pass
    gc.collect()  # gRPC waits two seconds at exit for a channel that is still referred to
    sys.exit(code)


if __name__ == "__main__":
    main()
