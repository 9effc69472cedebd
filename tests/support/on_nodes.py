"""A task for a Ray cluster of which a node is to be lost: whoever works there says so, and waits to be taken away.

FEDGE_TEST_FOLDER is a folder that the cluster's nodes share with the test, which writes the node's id to `lost`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import simulated
import torch.nn.functional as F
from ray import get_runtime_context

from fedge import Site, Task


def _held(site: Site) -> Any:
    folder = Path(os.environ["FEDGE_TEST_FOLDER"])
    lost = folder / "lost"
    if lost.exists():
        if lost.read_text() == get_runtime_context().get_node_id():
            (folder / "held").touch()
            time.sleep(60)
        time.sleep(0.5)  # so that there is work for the other
    return simulated.data(site)


held = Task(model=simulated.perceptron, data=_held, loss=F.cross_entropy)
