"""Local training, gradients and evaluation of a task with one resident module.

Every result is a function of the arguments: the module, its buffers, its gradients and the global
generators are set from them at the start of each call, so neither the calls before nor an exception
in the middle leaves a trace. One trainer serves one thread.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from fedge.errors import TaskError
from fedge.optimizer import Optimizer
from fedge.privacy.example import Schedule, evaluation_mechanism
from fedge.run import Work
from fedge.seeds import derive_seed
from fedge.task import Task
from fedge.vector import Array, Layout
from fedge_client.local import Outcome, Progress
from fedge_client.torch.batches import Batches, Order, describe, joined
from fedge_client.torch.flat import FlatModule
from fedge_client.torch.framework import build_module
from fedge_client.torch.optim import InPlaceOptimizer
from fedge_client.torch.private.choice import choose
from fedge_client.torch.private.clipping import PHYSICAL_ROWS, Clipping, Subject, UnsuitedError
from fedge_client.torch.private.evaluation import BoundedSums
from fedge_client.torch.private.independence import TRIED, Trial, nearby
from fedge_client.torch.private.rows import row_losses
from fedge_client.torch.private.steps import Private, check_unchanged, noisy_gradient
from fedge_client.torch.seeded import GlobalRandomness

EVALUATION_ROWS = 1024
EVALUATION_BYTES = 1 << 17
"""What goes into one evaluation batch: activations are often a hundred times the input."""

_EVALUATION_SEED = 0


def no_progress(done: int, total: int) -> None:
    """The progress that nobody watches."""


class Trainer:
    """Trains and judges the task's model, as a flat vector of `layout`, on datasets of this site.

    Raises:
        TaskError: the task's `model` fails or has a metric named "loss".
        LayoutError: its module holds what a flat vector cannot.
    """

    def __init__(self, task: Task, *, seed: int) -> None:
        if "loss" in task.metrics:
            raise TaskError("expected metrics named other than 'loss', which is the task's loss; rename it")
        self._task = task
        self._flat = FlatModule(build_module(task, seed=seed))
        self._optimizer = InPlaceOptimizer(self._flat.layout.trainable_size)
        self._order = Order()
        self._randomness = GlobalRandomness()
        self._clipped: Clipping | None = None
        self._tried = self._judged = 0
        self.layout: Layout = self._flat.layout

    def prepare_private(self, model: Array, train: Any) -> None:
        """Find out how the model is trained under example-level privacy, with a few examples of `train`.

        Raises:
            RefusedError: MODEL_NOT_PRIVATE; it cannot be, with the reason and the remedy.
            TaskError: the data, or the task's model or loss, fails.
        """
        batches = Batches(train, "full", order=self._order)
        if self._tried < min(TRIED, batches.size):  # what one example cannot show, another data set may
            batches.check_distinct()
            with torch.enable_grad():
                self._begin(model, training=True)
                self._clipped = choose(self._subject(), batches)
            self._tried = min(TRIED, batches.size)

    def train(
        self,
        model: Array,
        train: Any,
        work: Work,
        *,
        seed: int,
        out: Array,
        correction: Array | None = None,
        progress: Progress = no_progress,
        private: Private | None = None,
    ) -> Outcome:
        """Train from `model` and write `theta_local - theta` to `out` (both float32[layout.size]).

        Each step follows its gradient plus `correction` (float32[layout.trainable_size]; see `fedge.variates`). The
        metric "train_loss" is the mean over the examples of the last epoch, or with `work.steps` over those of all
        steps. `private`: DP-SGD, without metrics.

        Raises:
            TaskError: the data, or the task's model or loss, fails.
            RefusedError: MODEL_NOT_PRIVATE; see `prepare_private`.
            LayoutError: a vector does not fit the layout.
        """
        self.layout.check(out)
        drift = torch.from_numpy(correction) if correction is not None else None
        if private is not None:
            return self._train_privately(model, train, work, private, drift, out=out, progress=progress)
        flat, optimizer = self._flat, self._optimizer
        batches = Batches(train, work.batch_size, order=self._order)
        total = work.steps or (work.epochs or 1) * batches.per_epoch
        counted_from = 0 if work.steps else total - batches.per_epoch
        loss_sum, seen = torch.zeros((), dtype=torch.float64), 0
        with self._randomness.seeded(seed), torch.enable_grad():
            self._begin(model, training=True)
            anchor = self._anchor(work)
            optimizer.begin(_optimizer_of(work))
            for step in range(total):
                positions = batches.step(step, seed=seed)
                loss = self._differentiate(batches, positions, work, anchor)
                if drift is not None:
                    flat.gradient.add_(drift)
                optimizer.step(flat.head, flat.gradient)
                flat.publish()
                if step >= counted_from:
                    loss_sum.add_(loss, alpha=len(positions))
                    seen += len(positions)
                progress(step + 1, total)
            flat.settle()
        np.subtract(flat.vector, model, out=out)
        return Outcome(batches.size, {"train_loss": loss_sum.item() / seen})

    def gradient(
        self,
        model: Array,
        train: Any,
        work: Work,
        *,
        seed: int,
        step: int,
        out: Array,
        progress: Progress = no_progress,
        private: Private | None = None,
    ) -> Outcome:
        """Write the mean gradient at `model` over the batch of step `step` to `out` (float32[layout.size]).

        `out` holds the gradient, l1 and l2 terms included, in its trainable head, zeros for frozen
        parameters, and the change of each floating-point buffer. The batch follows from `(seed, step)`
        alone: any process can compute any step. `num_examples` is the size of the batch. `private`: the noised
        mean gradient of a Poisson sample.

        Raises:
            TaskError: the data, or the task's model or loss, fails.
            RefusedError: MODEL_NOT_PRIVATE; see `prepare_private`.
            LayoutError: a vector does not fit the layout.
        """
        self.layout.check(out)
        flat = self._flat
        if private is not None:
            done = self._differentiate_privately(model, train, work, private)
            progress(1, 1)
            out[:] = 0
            out[: flat.layout.trainable_size] = flat.gradient.numpy()
            return done
        batches = Batches(train, work.batch_size, order=self._order)
        positions = batches.step(step, seed=seed)
        with self._randomness.seeded(derive_seed(seed, "step", step)), torch.enable_grad():
            self._begin(model, training=True)
            loss = self._differentiate(batches, positions, work, flat.head)
            flat.settle()
        progress(1, 1)
        np.subtract(flat.vector, model, out=out)
        out[: flat.layout.trainable_size] = flat.gradient.numpy()
        for tensor, where in zip(self.layout.tensors, self.layout.slices, strict=True):
            if tensor.role == "frozen":
                out[where] = 0
        return Outcome(len(positions), {"train_loss": loss.item()})

    def evaluate(
        self, model: Array, test: Any, *, progress: Progress = no_progress, private: Private | None = None
    ) -> Outcome:
        """Judge `model` on the whole of `test`: "loss" (the mean over examples) and the task's metrics.

        Values that are not finite are reported as they are. `private`: noised means, see `BoundedSums`.

        Raises:
            TaskError: the data, or the task's model, loss or a metric, fails.
            LayoutError: the vector does not fit the layout.
            ValueError: `private` has no noise for evaluations.
        """
        if private is not None:
            return self._evaluate_privately(model, test, private, progress=progress)
        batches = Batches(test, EVALUATION_ROWS, order=self._order)
        outputs, targets = [], []
        loss_sum = torch.zeros((), dtype=torch.float64)
        # Not inference_mode: a tensor that the module keeps (a rotary table) must still serve training.
        with self._randomness.seeded(_EVALUATION_SEED), torch.no_grad():
            self._begin(model, training=False)
            parts = batches.in_order(max_bytes=EVALUATION_BYTES)
            for done, positions in enumerate(parts, start=1):
                inputs, target = batches.gather(positions)
                output = self._forward(inputs)
                loss_sum.add_(self._loss(output, target), alpha=len(positions))
                outputs.append(output)
                targets.append(target)
                progress(done, len(parts))
            metrics = {"loss": loss_sum.item() / batches.size}
            if self._task.metrics:
                output, target = joined(outputs), joined(targets)
                metrics |= {name: self._metric(name, output, target) for name in self._task.metrics}
        return Outcome(batches.size, metrics)

    def _train_privately(
        self,
        model: Array,
        train: Any,
        work: Work,
        private: Private,
        drift: torch.Tensor | None,
        *,
        out: Array,
        progress: Progress,
    ) -> Outcome:
        flat, optimizer = self._flat, self._optimizer
        self.prepare_private(model, train)
        assert self._clipped is not None  # prepared
        batches = Batches(train, work.batch_size, order=self._order)
        schedule = Schedule.of(work, batches.size, "train")
        with self._randomness.drawn(private.source), torch.enable_grad():
            self._begin(model, training=True)
            anchor = self._anchor(work)
            optimizer.begin(_optimizer_of(work))
            for step in range(schedule.steps):
                noisy_gradient(flat, batches, self._clipped, schedule, private)
                self._regularise(work, anchor)
                if drift is not None:  # known without this step's examples: the noise hides them as before
                    flat.gradient.add_(drift)
                optimizer.step(flat.head, flat.gradient)
                flat.publish()
                progress(step + 1, schedule.steps)
            flat.settle()
        np.subtract(flat.vector, model, out=out)
        check_unchanged(out[self.layout.trainable_size :])
        return Outcome(1, {}, schedule.mechanism(private.level.noise_multiplier))

    def _differentiate_privately(self, model: Array, train: Any, work: Work, private: Private) -> Outcome:
        """Leave the noised gradient in `flat.gradient`."""
        flat = self._flat
        self.prepare_private(model, train)
        assert self._clipped is not None  # prepared
        batches = Batches(train, work.batch_size, order=self._order)
        schedule = Schedule.of(work, batches.size, "gradient")
        with self._randomness.drawn(private.source), torch.enable_grad():
            self._begin(model, training=True)
            noisy_gradient(flat, batches, self._clipped, schedule, private)
            self._regularise(work, flat.head)
            flat.settle()
        tail = slice(self.layout.trainable_size, None)
        check_unchanged(flat.vector[tail] - model[tail])
        return Outcome(1, {}, schedule.mechanism(private.level.noise_multiplier))

    def _evaluate_privately(
        self, model: Array, test: Any, private: Private, *, progress: Progress
    ) -> Outcome:
        level = private.level
        self.prepare_private_evaluation(model, test)
        sums = BoundedSums(self._metrics(), level)
        batches = Batches(test, EVALUATION_ROWS, order=self._order)
        with self._randomness.drawn(private.source), torch.no_grad():
            self._begin(model, training=False)
            judge = partial(self._judge, batches, self._flat.buffers())
            parts = torch.split(torch.arange(batches.size), PHYSICAL_ROWS)
            for done, positions in enumerate(parts, start=1):
                sums.add_each(positions, judge)
                progress(done, len(parts))
        noise = level.evaluation_noise_multiplier
        assert noise is not None  # BoundedSums insists on it
        return Outcome(1, sums.released(batches.size, private.source), evaluation_mechanism(noise))

    def prepare_private_evaluation(self, model: Array, test: Any) -> None:
        """Find out, with a few examples of `test`, whether the model can be judged: later nothing is told of it.

        Raises:
            RefusedError: MODEL_NOT_PRIVATE; see `row_losses`.
            TaskError: the data, or the task's model, loss or a metric, fails.
        """
        batches = Batches(test, TRIED, order=self._order)
        if self._judged >= batches.batch_size:
            return
        batches.check_distinct()
        self._begin(model, training=False)
        with torch.no_grad(), nearby(self._flat):
            trial = Trial(self._subject())
            trial.check_independent(trial.examples(batches, self._judge_one)[0])
        self._judged = batches.batch_size

    def _subject(self) -> Subject:
        return Subject(self._flat, self._forward, self._loss)

    def _judge(
        self, batches: Batches, buffers: tuple[torch.Tensor, ...], positions: torch.Tensor
    ) -> tuple[torch.Tensor, Any, Any]:
        """The losses float[n], outputs and targets of the examples at `positions`; nothing of them stays behind."""
        inputs, target = batches.gather(positions)
        try:
            output = self._forward(inputs)
            return row_losses(self._loss, output, target), output, target
        finally:
            self._flat.put_back(buffers)

    def _judge_one(self, inputs: Any, target: Any) -> None:
        """Whether an example in a batch of its own can be judged."""
        output = self._forward(inputs)
        row_losses(self._loss, output, target)
        for metric in self._metrics().values():
            metric(output, target)

    def _metrics(self) -> dict[str, Callable[[Any, Any], float]]:
        return {name: partial(self._metric, name) for name in self._task.metrics}

    def _begin(self, model: Array, *, training: bool) -> None:
        self._flat.load(model)
        try:
            self._flat.module.train(training)
        except Exception as error:  # a user's override may raise anything
            raise _failed("the model's train()", error) from error

    def _anchor(self, work: Work) -> torch.Tensor:
        """What a proximal term holds the parameters to: where they are now."""
        return self._flat.head.clone() if work.proximal else self._flat.head

    def _differentiate(
        self, batches: Batches, positions: torch.Tensor, work: Work, anchor: torch.Tensor
    ) -> torch.Tensor:
        """The loss on one batch; its gradient, regularised, is in `flat.gradient`."""
        flat = self._flat
        inputs, target = batches.gather(positions)
        flat.zero_gradient()
        loss = self._loss(self._forward(inputs), target)
        if not loss.requires_grad:
            raise TaskError(
                "expected a loss that depends on the model's parameters, found one without a gradient; "
                "compute it from the output with torch, without detach(), item() or no_grad()"
            )
        try:
            loss.backward()  # type: ignore[no-untyped-call]  # torch ships no annotation for it
        except Exception as error:
            raise _failed("the backward pass", error) from error
        flat.collect()
        self._regularise(work, anchor)
        return loss.detach()

    def _regularise(self, work: Work, anchor: torch.Tensor) -> None:
        if work.regularises:
            self._optimizer.regularise(self._flat.gradient, self._flat.head, anchor, work)

    def _forward(self, inputs: Any) -> Any:
        module = self._flat.module
        try:
            if isinstance(inputs, tuple | list):
                return module(*inputs)
            return module(**inputs) if isinstance(inputs, dict) else module(inputs)
        except UnsuitedError:
            raise
        except Exception as error:  # user code may raise anything
            raise _failed("the model's forward", error) from error

    def _loss(self, output: Any, target: Any) -> torch.Tensor:
        try:
            loss = self._task.loss(output, target)
        except Exception as error:  # user code may raise anything
            raise _failed("the task's loss", error) from error
        if not isinstance(loss, torch.Tensor) or loss.ndim:
            raise TaskError(
                "expected the task's loss to be a scalar tensor, the mean over the batch; "
                f"found {describe(loss)}"
            )
        return loss

    def _metric(self, name: str, output: Any, target: Any) -> float:
        try:
            return float(self._task.metrics[name](output, target))
        except Exception as error:  # user code may raise anything
            raise _failed(f"the task's metric {name!r}", error) from error


def _optimizer_of(work: Work) -> Optimizer:
    return Optimizer(work.optimizer, work.learning_rate, work.momentum, work.beta1, work.beta2, work.epsilon)


def _failed(where: str, error: Exception) -> TaskError:
    return TaskError(f"{where} failed: {type(error).__name__}: {error}")
