"""`submit_app`: a Flower app on a coordinator's sites, its ServerApp in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fedge.memory import keep_freed, use_one_arena
from fedge.records import run_number
from fedge.wire import fedge_pb2 as pb
from fedge.wire.records import encode_values
from fedge_flower.app import FlowerApp, Settings
from fedge_flower.grid import AppGrid
from fedge_flower.internals import SUPERLINK_NODE_ID, be
from fedge_server.commands.link import admin_channel
from fedge_server.flower.remote import Remote, app_call
from fedge_server.settings import load_admin

WAIT_S: Final = 600.0
"""How long an app waits for as many nodes as it is to begin with."""


@dataclass(frozen=True, slots=True)
class Served:
    """What there is to say of an app that has come to its end."""

    run_id: str
    nodes: int
    messages: int
    replies: int


def submit_app(
    app: FlowerApp,
    *,
    admin: Path,
    config: Settings,
    nodes: int = 1,
    say: Callable[[str], None] = lambda text: None,
) -> Served:
    """Run an app's ServerApp here, and its ClientApp at the sites of a coordinator that take part, once there are so
    many `nodes`. `config` is what both find in `context.run_config`; `say` is told, in words, how it goes.

    Raises:
        ConfigError, IdentityError, LinkError: the coordinator cannot be reached with these settings.
        RunError: it refuses the app or ends it, or there are too few nodes.
        TaskError: the ServerApp cannot be loaded, or fails.
    """
    use_one_arena()
    keep_freed()
    server = app.server()
    offer = pb.AppOffer(app=app.name, version=app.version, config=encode_values(config))
    with admin_channel(admin) as channel:
        remote = Remote(app_call(channel), offer, server=load_admin(admin).server, say=say)
        failed = "its ServerApp was interrupted"
        try:
            run_id = run_number(remote.run_id)
            be(run_id=run_id, node_id=SUPERLINK_NODE_ID)
            grid = AppGrid(run_id).over(remote)
            remote.to(grid.hear, grid.wake)
            say(f"run {remote.run_id}: {app.name} {app.version}, {len(remote.node_ids())} nodes")
            for refusal in remote.refusals:
                say(f"not taking part: {refusal}")
            remote.wait_for(nodes, seconds=WAIT_S)
            app.serve(server, grid, run_id=run_id, config=config)
            failed = ""
        except Exception as error:
            failed = f"its ServerApp failed: {type(error).__name__}"
            raise
        finally:
            remote.close(failed)
    return Served(remote.run_id, len(remote.node_ids()), grid.sent, grid.received)
