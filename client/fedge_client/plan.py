"""What a run's privacy would cost: at sites of any size, and at this one with what it has spent before."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedge.errors import ConfigError, RefusedError, TaskError
from fedge.plan import Plan
from fedge.privacy.central import Central
from fedge.privacy.example import ONE_RELEASE, Schedule
from fedge.privacy.ledger import admit as admit_release
from fedge.privacy.pld import statement
from fedge.privacy.rdp import epsilon_of
from fedge.privacy.terms import Terms, price
from fedge.run import RunConfig
from fedge.secagg.terms import SumTerms
from fedge.strategy import load_strategy, work_kind
from fedge.task import OwnTask, Site, check_unit, first_model, load_any_task
from fedge.vector import Layout, Tensor
from fedge_client.admission import Request, admit, check_price, check_task
from fedge_client.ledger_file import read_only
from fedge_client.settings import ClientSettings, load_client


@dataclass(frozen=True, slots=True)
class Cost:
    """A run at a site of `examples` training examples (at client level: whatever it has, as one release a round).

    `epsilon` is by PLD, `admission_epsilon` by RDP.
    """

    examples: int
    sampling_rate: float
    steps: int
    noise_multiplier: float
    releases: tuple[str, ...]
    delta: float
    epsilon: float
    admission_epsilon: float
    accountant: str
    rounding: float = 1.0
    """With secure sums, how much longer an update may be once it is on their grid: the noise is made for that."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cost_of(run: RunConfig, examples: int, *, folder: Path) -> Cost:
    """The price of a run at a site of so many training examples; `folder` is where its task's code is.

    Raises:
        ConfigError: the run has no privacy, or no noise keeps its epsilon there.
        TaskError: its noise depends on its model, which cannot be made.
    """
    terms = Terms.of(run)
    if terms is None:
        raise ConfigError(
            f'run {run.name!r} has [privacy] unit = "none": it costs nothing and protects nothing'
        )
    strategy = load_strategy(run)
    if (central := Central.of(run)) is not None:
        central.check(strategy)
    secure = SumTerms.of(run, strategy, _layout(run, folder))
    return _cost(run, terms, examples, secure)


def _cost(run: RunConfig, terms: Terms, examples: int, secure: SumTerms | None) -> Cost:
    kind = work_kind(load_strategy(run))
    assert kind != "evaluate"  # no strategy orders that
    summed = secure.mechanism if secure is not None else None
    try:
        found = price(terms, run.work, kind, examples, summed=summed)
    except ValueError as error:
        raise ConfigError(f"run {run.name!r} at a site of {examples} examples: {error}") from None
    schedule = Schedule.of(run.work, examples, kind) if terms.unit == "example" else ONE_RELEASE
    epsilon, accountant = statement(found.run, terms.delta)
    return Cost(
        examples=examples,
        sampling_rate=schedule.sampling_rate,
        steps=schedule.steps,
        noise_multiplier=found.noise_multiplier,
        releases=tuple(map(str, found.run)),
        delta=terms.delta,
        epsilon=epsilon,
        admission_epsilon=epsilon_of(found.run, terms.delta),
        accountant=accountant,
        rounding=secure.rounding if secure is not None else 1.0,
    )


def fewest_clients(run: RunConfig) -> int:
    """Sites without which a run cannot come to its end, with the turns that its privacy leaves to each.

    Raises:
        ConfigError: its strategy is none.
    """
    strategy = load_strategy(run)
    return Plan.of(run, kind=work_kind(strategy), max_staleness=strategy.max_staleness).fewest_clients


@dataclass(frozen=True, slots=True)
class AtSite:
    """What this site's gate would say. `refusal` is empty if it would take part; `examples` are 0 where the task trains
    by itself, and nobody else knows."""

    examples: int
    cost: Cost | None
    run_epsilon: float | None
    spent_before: float
    spent_after: float | None
    cap: float
    delta: float
    refusal: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def at_site(run: RunConfig, client_toml: Path) -> AtSite:
    """A run against the policy, the data and the ledger of a site; nothing is reserved.

    Raises:
        ConfigError, TaskError, RefusedError: the settings, the task or the ledger cannot be read.
    """
    settings = load_client(client_toml)
    folder, policy = client_toml.parent.resolve(), settings.policy
    task_folder = folder / settings.task.path
    books = read_only(
        folder / settings.ledger.path, settings.ledger.dataset, head_folder=folder / settings.identity
    ).books
    before = books.spent()
    spent = before.epsilon(policy.delta)
    found: Cost | None = None
    run_epsilon, after, size = None, None, 0
    try:
        check_task(policy, run.task, folder=task_folder)
        request = _request(run, _layout(run, task_folder))
        size = _examples(run, settings, task_folder)
        admit(policy, request, folder=task_folder)
        if (terms := request.terms) is not None:
            found = _cost(run, terms, size, request.secure)
            priced = price(terms, run.work, request.kind, size, summed=request.noise_of_sums)
            run_epsilon = epsilon_of(priced.run, policy.delta)
            check_price(policy, priced, run_epsilon)
            unit = terms.unit
            for release in priced.run:
                before = before.charged(unit, release)
            after = before.epsilon(policy.delta)
            admit_release(
                books,
                priced.order,
                unit=unit,
                delta=policy.delta,
                max_epsilon=policy.max_epsilon,
                run_id="planned",
            )
        refusal = ""
    except RefusedError as error:
        refusal = str(error)
    return AtSite(size, found, run_epsilon, spent, after, policy.max_epsilon, policy.delta, refusal)


_NO_MODEL = Layout((Tensor("none", ()),))


def _layout(run: RunConfig, folder: Path) -> Layout:
    """That of a run's model, if its length matters to what the run costs. This runs the task's code."""
    if not (run.privacy.unit == "client" and run.secure_aggregation.enabled):
        return _NO_MODEL
    task = load_any_task(run.task, path=folder)
    return first_model(task, seed=run.seed, unit=run.privacy.unit, personal=run.work.personal).layout


def _request(run: RunConfig, layout: Layout) -> Request:
    """The run as its coordinator would offer it."""
    strategy = load_strategy(run)
    kind = work_kind(strategy)
    assert kind != "evaluate"  # no strategy orders that
    terms = Terms.of(run)
    return Request(
        run_id="planned",
        task=run.task,
        strategy=run.strategy.name,
        kind=kind,
        rounds=run.rounds,
        seed=run.seed,
        work=run.work,
        layout=layout,
        clip=run.privacy.clip,
        terms=terms,
        cohort=run.cohort.needed,
        secure=SumTerms.of(run, strategy, layout),
    )


def _examples(run: RunConfig, settings: ClientSettings, folder: Path) -> int:
    task = load_any_task(run.task, path=folder)
    if isinstance(task, OwnTask):
        check_unit(task, run.privacy.unit)
        return 0
    try:
        train, _ = task.data(Site("planned", MappingProxyType(settings.data.table)))
        return len(train)
    except Exception as error:  # user code may raise anything
        raise TaskError(f"{run.task}: its data cannot be loaded: {type(error).__name__}") from error
