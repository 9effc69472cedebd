"""`simulate_app`: a Flower app on this machine, unchanged."""

from __future__ import annotations

from dataclasses import dataclass

from fedge.errors import ConfigError
from fedge.parallel import processors
from fedge.seeds import derive_seed
from fedge_client.apps.process import Setting
from fedge_client.apps.worker import seed_globally
from fedge_flower.app import FlowerApp, Settings
from fedge_flower.internals import SUPERLINK_NODE_ID, be
from fedge_sim.flower.local import local_grid

MAX_NODES = 100_000


@dataclass(frozen=True, slots=True)
class Done:
    """What there is to say of an app that has come to its end."""

    nodes: int
    messages: int
    replies: int


def simulate_app(
    app: FlowerApp, *, config: Settings, nodes: int, workers: int | None = None, seed: int = 0
) -> Done:
    """Run an app's ServerApp in this process, with `nodes` whose ClientApps run in `workers` others (as many as there
    are processors unless given). `config` is what it finds in `context.run_config`.

    Global generators begin from `seed`, here and at each message; nodes have the same ids each time.

    Raises:
        ConfigError: there are no nodes, or no workers.
        TaskError: the app cannot be loaded, or its ServerApp fails.
    """
    if not 1 <= nodes <= MAX_NODES:
        raise ConfigError(f"--nodes: expected 1 to {MAX_NODES} nodes, found {nodes}")
    if workers is not None and not 1 <= workers <= 1024:
        raise ConfigError(f"--workers: expected 1 to 1024 processes, found {workers}")
    run_id = derive_seed(seed, "flower run")
    be(run_id=run_id, node_id=SUPERLINK_NODE_ID)
    drawn = derive_seed(seed, "flower server")
    seed_globally(drawn)
    server = app.server()
    seed_globally(drawn)  # with torch, if the app has imported it
    setting = Setting(str(app.folder.resolve()), run_id, dict(config), seed)
    with local_grid(setting, nodes=nodes, workers=workers or processors()) as grid:
        app.serve(server, grid, run_id=run_id, config=config)
    return Done(nodes, grid.sent, grid.received)
