"""Other people's simulators at W1 and W2: Apple's pfl, and Flower by its Ray backend. Nothing of ours but the task.

    python -m benchmarks.floors.simulators has|run pfl|flower w1|w2 [--rounds N]

By whatever interpreter has them: see `benchmarks.simulators`. `has` only imports them. Else prints {"seconds": [...]}:
from one aggregated model to the next, a number a round, the first one included.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.tasks.workload import W1, W2, Workload

WORKLOADS = {"w1": W1, "w2": W2}


def pfl(name: str, workload: Workload, rounds: int) -> list[float]:
    """FedAvg by its simulated backend, in this process, weighted by examples."""
    algorithm = importlib.import_module("pfl.algorithm.federated_averaging")
    base = importlib.import_module("pfl.algorithm.base")
    backend = importlib.import_module("pfl.aggregate.simulate")
    data = importlib.import_module("pfl.data.federated_dataset")
    dataset = importlib.import_module("pfl.data.dataset")
    sampling = importlib.import_module("pfl.data.sampling")
    callbacks = importlib.import_module("pfl.callback.base")
    hyperparam = importlib.import_module("pfl.hyperparam")
    model = importlib.import_module("pfl.model.pytorch")
    task = importlib.import_module(f"benchmarks.tasks.{name}")

    class Learner(torch.nn.Module):
        """The model, as pfl wants it: with its loss."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = task.model()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(inputs)
            return found

        def loss(
            self, inputs: torch.Tensor, targets: torch.Tensor, eval: bool = False
        ) -> torch.Tensor:  # its name
            return cross_entropy(self(inputs), targets)

        def metrics(self, inputs: torch.Tensor, targets: torch.Tensor, eval: bool = False) -> dict[str, Any]:
            return {}

    def make(client: int) -> Any:
        return dataset.Dataset(task.examples(client), user_id=str(client), train_kwargs={"eval": False})

    times = [time.perf_counter()]

    class Clock(callbacks.TrainingProcessCallback):  # type: ignore[misc]  # its class is only known when it runs
        """Notes when each model is there."""

        def after_central_iteration(self, aggregate: Any, model: Any, *, central_iteration: int) -> Any:
            times.append(time.perf_counter())
            return False, importlib.import_module("pfl.metrics").Metrics()

    learner = Learner()
    trained = model.PyTorchModel(learner, torch.optim.SGD, torch.optim.SGD(learner.parameters(), 1.0))
    sampler = sampling.get_user_sampler("random", list(range(workload.clients)))
    federated = data.FederatedDataset(make, sampler)
    algorithm.FederatedAveraging().run(
        algorithm_params=base.NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=workload.cohort,
            val_cohort_size=0,
        ),
        backend=backend.SimulatedBackend(training_data=federated, val_data=federated),
        model=trained,
        model_train_params=hyperparam.NNTrainHyperParams(
            local_batch_size=workload.batch_size,
            local_num_epochs=1,
            local_learning_rate=workload.learning_rate,
        ),
        callbacks=[Clock()],
        send_metrics_to_platform=False,
    )
    return [later - earlier for earlier, later in pairwise(times)]


def flower(name: str, workload: Workload, rounds: int) -> list[float]:
    """FedAvg by `run_simulation`: an actor for each core, one client after the other in each."""
    app = importlib.import_module("flwr.app")
    clientapp = importlib.import_module("flwr.clientapp")
    serverapp = importlib.import_module("flwr.serverapp")
    strategies = importlib.import_module("flwr.serverapp.strategy")
    simulation = importlib.import_module("flwr.simulation")
    client, server = clientapp.ClientApp(), serverapp.ServerApp()
    times = [time.perf_counter()]

    @client.train()  # type: ignore[untyped-decorator]  # it is only known when it runs
    def train(message: Any, context: Any) -> Any:
        torch.set_num_threads(1)
        task = importlib.import_module(f"benchmarks.tasks.{name}")
        module = task.model()
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        inputs, targets = task.examples(int(context.node_config["partition-id"]))
        optimizer = torch.optim.SGD(module.parameters(), lr=workload.learning_rate)
        for positions in torch.split(torch.randperm(len(inputs)), workload.batch_size):
            optimizer.zero_grad()
            cross_entropy(module(inputs[positions]), targets[positions]).backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
        records = {
            "arrays": app.ArrayRecord(module.state_dict()),
            "metrics": app.MetricRecord({"num-examples": len(inputs)}),
        }
        return app.Message(content=app.RecordDict(records), reply_to=message)

    @server.main()  # type: ignore[untyped-decorator]  # as above
    def main(grid: Any, context: Any) -> None:
        task = importlib.import_module(f"benchmarks.tasks.{name}")

        class FedAvg(strategies.FedAvg):  # type: ignore[misc]  # as above
            """Its own, with a clock."""

            def aggregate_train(self, server_round: int, replies: Any) -> Any:
                made = super().aggregate_train(server_round, replies)
                times.append(time.perf_counter())
                return made

        strategy = FedAvg(
            fraction_train=workload.cohort / workload.clients,
            fraction_evaluate=0.0,
            min_available_nodes=workload.clients,
        )
        initial = app.ArrayRecord(task.model().state_dict())
        strategy.start(grid=grid, initial_arrays=initial, num_rounds=rounds)

    # As many clients at once as there are processors, as ours; by default each is given two of them.
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    simulation.run_simulation(server, client, num_supernodes=workload.clients, backend_config=resources)
    return [later - earlier for earlier, later in pairwise(times)]


SIMULATORS = {"pfl": (pfl, "pfl"), "flower": (flower, "flwr.simulation")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["has", "run"])
    parser.add_argument("simulator", choices=list(SIMULATORS))
    parser.add_argument("workload", choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=6)
    given = parser.parse_args()
    run, package = SIMULATORS[given.simulator]
    if given.what == "has":
        importlib.import_module(package)
        print("{}")
        return
    logging.disable(logging.INFO)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    np.random.seed(0)  # what pfl draws from
    seconds = run(given.workload, WORKLOADS[given.workload], given.rounds)
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main()
