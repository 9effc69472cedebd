"""Flower's own simulation of an app: what ours is compared with. Run as a script: APP_DIR NODES CONFIG_JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flwr.app import Context, RecordDict
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.telemetry import EventType

from fedge_flower.app import FlowerApp


def main() -> None:
    folder, nodes, overrides = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    app = FlowerApp.load(folder)
    run = Run.create_empty(7)
    run.override_config, run.primary_task_id, run.federation_id = overrides, 7, NOOP_FEDERATION_ID
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 7, 1, 7
    sys.path.insert(0, str(folder))
    _run_simulation(
        num_supernodes=nodes,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
        client_app_attr=app.clientapp,
        server_app_attr=app.serverapp,
        server_app_context=Context(7, 1, {}, RecordDict(), app.with_config(overrides)),
        app_dir=str(folder),
        run=run,
        is_app=True,
        backend_config={"init_args": {"num_cpus": 2}},
    )


if __name__ == "__main__":
    main()
