"""torch as a framework that the core finds by entry point: building a task's model from a seed."""

from __future__ import annotations

import torch

from fedge.errors import TaskError
from fedge.privacy.config import Unit
from fedge.task import Task
from fedge.vector import Model
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.private.admission import check_private
from fedge_client.torch.seeded import GlobalRandomness


def build_module(task: Task, *, seed: int) -> torch.nn.Module:
    """The task's module with values drawn from `seed`; global randomness goes on as if nothing happened.

    Raises:
        TaskError: the task's `model` fails, or what it makes is no torch module.
    """
    with GlobalRandomness().seeded(seed), torch.enable_grad():
        try:
            module = task.model()
        except Exception as error:  # user code may raise anything
            raise TaskError(f"the task's model failed: {type(error).__name__}: {error}") from error
    if not isinstance(module, torch.nn.Module):
        raise TaskError(
            f"expected the task's model to make a torch.nn.Module, found a {type(module).__name__}"
        )
    return module


class TorchFramework:
    """`fedge.task.Framework` for torch."""

    def initial_model(self, task: Task, *, seed: int, unit: Unit = "none") -> Model:
        """The task's model with freshly seeded values; the same seed gives the same bits.

        Raises:
            TaskError: the task's `model` fails.
            RefusedError: MODEL_NOT_PRIVATE; the module cannot be trained with this unit of privacy.
            LayoutError: the module holds what a flat vector cannot.
        """
        module = build_module(task, seed=seed)
        check_private(module, unit)
        flat = FlatModule(module)
        return Model(flat.vector, flat.layout)


framework = TorchFramework()
