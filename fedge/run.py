"""RunConfig: the parsed run.toml. One file describes a run for `fedge simulate` and `fedge run submit`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fedge.config import Config, build, parse_toml, read_toml, shown
from fedge.privacy.config import Privacy
from fedge.simulation import Count, Fraction, Positive, Simulation

Strength = Annotated[float, Field(ge=0, le=1e30)]
"""A float32, in which training computes."""


def _batch_size(value: object) -> object:
    if value == "full" or (type(value) is int and 1 <= value <= 2**31 - 1):
        return value
    raise ValueError(f'expected "full" or a whole number from 1 to 2^31 - 1, found {shown(value)}')


BatchSize = Annotated[int | Literal["full"], BeforeValidator(_batch_size)]


def _names(value: object) -> object:
    """A list of names, as TOML has it, is a tuple."""
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list of names, found {shown(value)}")
    return tuple(value)


Names = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=100)], ...], BeforeValidator(_names)]


class StrategyConfig(BaseModel):
    """`[strategy]`: a name, and any field of the strategy it names (checked when it is loaded)."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, defer_build=True)

    name: Annotated[str, Field(min_length=1, max_length=200)] = "fedavg"

    @property
    def fields(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Work(Config):
    """`[work]`: what a client does in a round. Gradient strategies use all but `epochs`, `steps` and `proximal`.

    `proximal` is mu of the term mu/2 * ||theta - theta_0||^2 that holds local training to the model theta_0 with which
    it began (Li et al. 2020, "Federated Optimization in Heterogeneous Networks", eq. 2): FedAvg with it is FedProx.
    `personal` names the tensors, as a shell does files, that each client keeps to itself (`fedge.personal`).
    """

    epochs: Count | None = None
    steps: Count | None = None
    batch_size: BatchSize = 32
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] = 0.05
    momentum: Fraction = 0.9
    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: Positive = 1e-8
    l1: Strength = 0.0
    l2: Strength = 0.0
    proximal: Strength = 0.0
    personal: Annotated[Names, Field(max_length=64)] = ()

    @model_validator(mode="after")
    def _one_length(self) -> Work:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("expected epochs or steps, found both: leave one out")
        return self

    @property
    def regularises(self) -> bool:
        """Whether the gradient of the loss is not all that a step follows."""
        return bool(self.l1 or self.l2 or self.proximal)


class Cohort(Config):
    """`[cohort]`: who takes part in a round. `size` updates are the goal, `quorum` are enough."""

    size: Count = 10
    quorum: Count | None = None
    over_select: Annotated[float, Field(ge=1, le=10)] = 1.0
    deadline_s: Positive = 600.0
    attempts: Annotated[int, Field(ge=1, le=100)] = 3
    wait_s: Positive = 3600.0

    @model_validator(mode="after")
    def _reachable(self) -> Cohort:
        if self.quorum is not None and self.quorum > self.size:
            raise ValueError(f"quorum: expected at most size = {self.size}, found {self.quorum}")
        return self

    @property
    def needed(self) -> int:
        """Updates without which a round does not count; all of `size` unless a quorum is given."""
        return self.quorum if self.quorum is not None else self.size


class Evaluation(Config):
    """`[evaluation]`: the model is judged on the sites' own test sets every `every` rounds (0: never)."""

    every: Annotated[int, Field(ge=0)] = 1
    clients: Count | None = None


class CheckpointConfig(Config):
    """`[checkpoint]`: how much a crash of the coordinator may cost. A simulation ignores it.

    A run's progress is kept, behind its rounds, once `rounds` were committed or `seconds` have passed
    since the last time. What came after is done again; keeping takes at most a tenth of the time.
    """

    rounds: Count = 100
    seconds: Annotated[float, Field(ge=0, le=3600)] = 5.0


class SecureAggregation(Config):
    """`[secure_aggregation]`: the coordinator can read the sum of a round's updates, and none of them.

    At least `threshold` of a sum's members must come to the end (more than two thirds in any case). Elements of an
    update travel with `bits` bits; they are cut to `bound`, and a site's weight to `max_weight`, so that sums fit.
    With `rotate` the bound is on the update's norm, and few bits go further. Metrics ride in the sum by their names.
    """

    enabled: bool = False
    threshold: Annotated[float, Field(ge=0.67, le=1)] | None = None
    suite: Literal["x25519", "x25519-mlkem768"] = "x25519"
    bits: Annotated[int, Field(ge=8, le=32)] = 32
    bound: Positive = 10.0
    max_weight: Annotated[int, Field(ge=1, le=1_000_000)] = 10_000
    rotate: bool = False
    consistency: bool = True
    exchange_s: Annotated[float, Field(gt=0, le=3600)] = 60.0
    metrics: Names = ("train_loss", "loss", "accuracy")


class Compression(Config):
    """`[compression]`: only `none` in this version."""

    kind: Literal["none"] = "none"


class RunConfig(Config):
    """A run, from start to finish: the parsed and checked run.toml."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    task: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", max_length=200)]
    rounds: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    strategy: StrategyConfig = StrategyConfig()
    work: Work = Work()
    cohort: Cohort = Cohort()
    evaluation: Evaluation = Evaluation()
    checkpoint: CheckpointConfig = CheckpointConfig()
    privacy: Privacy = Privacy(unit="none")
    secure_aggregation: SecureAggregation = SecureAggregation()
    compression: Compression = Compression()
    simulation: Simulation = Simulation()

    @model_validator(mode="after")
    def _summable(self) -> RunConfig:
        """Whether a secure sum can be what is asked for."""
        if not self.secure_aggregation.enabled:
            return self
        if self.cohort.needed < 3:
            raise ValueError(
                f"cohort.quorum: expected 3 or more with secure aggregation, found {self.cohort.needed}: of a sum of "
                "two, each of them knows the other's part"
            )
        if self.privacy.unit == "client":
            self._private_sums()
        return self

    def _private_sums(self) -> None:
        """Whether noise that sites add to a secure sum can be what is asked for."""
        if self.evaluation_every:
            raise ValueError(
                'privacy.evaluation_noise_multiplier: with unit = "client" and secure aggregation the sites add noise '
                "to updates alone; set evaluation.every = 0, and judge the model on data that is public"
            )
        if not self.secure_aggregation.consistency:
            raise ValueError(
                'secure_aggregation.consistency: expected true with privacy.unit = "client": a coordinator that lies '
                "could read one site's update with that site's share of the noise alone"
            )
        if self.privacy.separation > 1 or self.privacy.adaptive_clip is not None:
            raise ValueError(
                "privacy: separation and adaptive_clip are for noise that the coordinator adds; with secure "
                "aggregation the sites add it, each for itself: leave them out"
            )
        given = {"bound", "max_weight", "metrics"} & self.secure_aggregation.model_fields_set
        if given:
            raise ValueError(
                f'secure_aggregation: {" and ".join(sorted(given))} say what privacy.unit = "client" decides: '
                "privacy.clip bounds updates, which weigh the same, and no metrics ride beside them"
            )

    @model_validator(mode="after")
    def _compatible(self) -> RunConfig:
        privacy, weighting = self.privacy, self.strategy.fields.get("weighting")
        if privacy.unit == "none":
            return self
        if weighting == "examples":
            raise ValueError(
                f"strategy.weighting: 'examples' needs every site's number of examples, which privacy.unit = "
                f"{privacy.unit!r} does not let it tell; leave the key out, and updates weigh the same"
            )
        asked = "every" in self.evaluation.model_fields_set and self.evaluation.every > 0
        if asked and privacy.evaluation_noise_multiplier is None:
            raise ValueError(
                "evaluation.every: metrics would be released without protection; set "
                "privacy.evaluation_noise_multiplier, or evaluation.every = 0"
            )
        return self

    @property
    def evaluation_every(self) -> int:
        """Rounds from one evaluation to the next; 0 if there are none, as where metrics have no protection."""
        if self.privacy.unit != "none" and self.privacy.evaluation_noise_multiplier is None:
            return 0
        return self.evaluation.every

    def left_out(self, metrics: Iterable[str]) -> str:
        """Which of a task's metrics do not ride in the secure sum, in words; empty if they all do, or there is none."""
        names = sorted(set(metrics) - set(self.secure_aggregation.metrics))
        if not self.secure_aggregation.enabled or not names or self.privacy.unit == "client":
            return ""  # without a sum they travel on their own; of a private one everybody knows that none do
        return (
            f"the task's {', '.join(names)} stay at the sites: name them in secure_aggregation.metrics for them to "
            "ride in the secure sum"
        )

    def notes(self) -> list[str]:
        """What the owner of this run should know before it starts; printed, never acted upon."""
        notes = []
        if self.strategy.name in ("mirrored_sgd", "sgd") and (
            self.work.epochs or self.work.steps or self.work.proximal
        ):
            notes.append(
                f"{self.strategy.name} computes one gradient a round: [work] epochs, steps and proximal do not apply"
            )
        if self.evaluation.every and not self.evaluation_every:
            in_sums = self.privacy.unit == "client" and self.secure_aggregation.enabled
            notes.append(
                "the sites do not evaluate: "
                + (
                    "inside secure sums they add noise to updates alone; judge the model on data that is public"
                    if in_sums
                    else "metrics of private data are released only with noise "
                    "(privacy.evaluation_noise_multiplier)"
                )
            )
        return notes

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        """Read and check a run.toml.

        Raises:
            ConfigError: naming the file, the key and the nearest valid key.
        """
        return parse_toml(read_toml(path), cls, source=str(path))

    @classmethod
    def from_table(cls, table: dict[str, Any], *, source: str) -> RunConfig:
        """Check a table of values, as `load` checks a file's; `source` begins every error message."""
        return build(cls, table, source=source)
