"""`[strategy]`: how an algorithm is found by name and its fields are checked, ours and a user's alike."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from fedge.config import parse_toml
from fedge.errors import ConfigError
from fedge.pipeline import Mean
from fedge.run import RunConfig, StrategyConfig
from fedge.strategy import Strategy, installed_strategies, load_strategy
from fedge_strategies import FedAvg, MirroredSgd, Sgd

MEAN = Mean()


def strategy(name: str = "fedavg", work: str = "", *, allowed: list[str] | None = None, **fields: Any) -> Any:
    text = f'name = "a"\ntask = "app:task"\nrounds = 1\n[work]\n{work}'
    run = parse_toml(text, RunConfig, source="run.toml")
    return load_strategy(
        run.model_copy(update={"strategy": StrategyConfig(name=name, **fields)}), allowed=allowed
    )


def test_the_installed_strategies_are_found_by_name():
    assert {"fedavg", "mirrored_sgd", "sgd"} <= set(installed_strategies())
    assert strategy("fedavg") == FedAvg()
    assert strategy("mirrored_sgd") == MirroredSgd()
    assert strategy("sgd") == Sgd()


def test_an_unknown_strategy_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown strategy 'fedavgg'; did you mean 'fedavg'"):
        strategy("fedavgg")


@pytest.mark.parametrize("fields", [{"server_learning_rat": 1.0}, {"Server_learning_rate": 1.0}])
def test_an_unknown_field_of_a_strategy_names_the_nearest(fields):
    (name,) = fields
    with pytest.raises(ConfigError) as error:
        strategy("fedavg", **fields)
    assert str(error.value) == (
        f"unknown key 'strategy.{name}' for 'fedavg'; did you mean 'server_learning_rate'?"
    )


@pytest.mark.parametrize("value", ["1.0", True, 0, -1.0, math.nan, math.inf, None, [1.0], 10**400])
def test_an_ill_typed_field_of_a_strategy_is_refused_as_strictly_as_any(value):
    """Found by review: text, truth values and infinity were taken for a learning rate."""
    with pytest.raises(ConfigError, match=r"^strategy\.server_learning_rate: Input should be"):
        strategy("fedavg", server_learning_rate=value)


def test_an_integer_is_accepted_where_a_strategy_expects_a_number():
    found = strategy("fedavg", server_learning_rate=2)
    assert found == FedAvg(2.0)
    assert type(found.server_learning_rate) is float


@pytest.mark.parametrize("value", ["by size", 3, ["uniform"]])
def test_a_choice_of_a_strategy_is_one_of_its_words(value):
    with pytest.raises(ConfigError, match=r"strategy\.weighting: Input should be 'examples' or 'uniform'"):
        strategy("fedavg", weighting=value)


def test_fields_that_work_sets_are_inherited_by_the_strategy_and_its_own_come_first():
    work = 'learning_rate = 0.5\noptimizer = "adam"\nbeta1 = 0.7\nepochs = 3'
    assert strategy("mirrored_sgd", work) == MirroredSgd("adam", 0.5, beta1=0.7)
    assert strategy("mirrored_sgd", work, learning_rate=0.25) == MirroredSgd("adam", 0.25, beta1=0.7)
    assert strategy("sgd", work, max_staleness=2) == Sgd("adam", 0.5, beta1=0.7, max_staleness=2)
    assert strategy("fedavg", work) == FedAvg()


def test_defaults_of_work_are_not_inherited():
    assert strategy("mirrored_sgd", "epochs = 2").learning_rate == MirroredSgd().learning_rate


@dataclass(frozen=True)
class Mine:
    """A user's own strategy: no slots, a required field, a check of its own."""

    max_staleness: int
    rates: dict[str, float] = field(default_factory=dict)
    learning_rate: float = 0.1
    reduction: Any = MEAN

    def __post_init__(self) -> None:
        if self.max_staleness == 13:
            raise ValueError("13 brings bad luck")

    def init(self, model: Any) -> Any: ...

    def order(self, state: Any, round: int) -> Any: ...

    def step(self, state: Any, aggregate: Any) -> Any: ...


@dataclass
class NotFrozen:
    max_staleness: None = None


@dataclass(frozen=True)
class NoStep:
    reduction: Any = MEAN
    max_staleness: None = None

    def init(self, model: Any) -> Any: ...

    def order(self, state: Any, round: int) -> Any: ...


class NoDataclass:
    pass


NOT_A_CLASS = FedAvg()


@pytest.fixture
def here(monkeypatch):
    """The name under which this module can be imported, as a user's would be."""
    monkeypatch.setitem(sys.modules, "my_strategies", sys.modules[__name__])
    return "my_strategies"


def test_a_users_strategy_is_loaded_by_its_name_and_has_no_less_than_ours(here):
    found = strategy(f"{here}:Mine", "learning_rate = 0.5", max_staleness=3, rates={"a": 1})
    assert found == Mine(3, {"a": 1.0}, 0.5)
    assert isinstance(found, Strategy)
    with pytest.raises(ConfigError, match=r"strategy\.rates\.a: Input should be a valid number"):
        strategy(f"{here}:Mine", max_staleness=3, rates={"a": "1"})


def test_a_users_strategy_may_be_named_by_an_allowed_list_alone(here):
    name = f"{here}:Mine"
    assert strategy(name, allowed=[name], max_staleness=1) == Mine(1)
    for allowed in ([], ["other:Mine"], [here]):
        with pytest.raises(ConfigError, match="is not one that this coordinator may import"):
            strategy(name, allowed=allowed, max_staleness=1)
    assert strategy("fedavg", allowed=[]) == FedAvg()


def test_what_is_not_allowed_is_not_even_imported():
    with pytest.raises(ConfigError, match="may import"):
        strategy("this.module.does.not.exist:Attribute", allowed=[])
    assert "this" not in sys.modules


BAD_STRATEGIES = {
    "my_strategies:NotFrozen": "to be a frozen dataclass",
    "my_strategies:NoDataclass": "to be a frozen dataclass",
    "my_strategies:NOT_A_CLASS": "to be a frozen dataclass",
    "my_strategies:NoStep": "has no 'step': see fedge.strategy.Strategy",
    "my_strategies:Missing": "cannot import strategy",
    "my_strategies:": "unknown strategy",
    ":Mine": "unknown strategy",
    ".my_strategies:Mine": "cannot import strategy",
    "no_such_module:X": "cannot import strategy 'no_such_module:X': ModuleNotFoundError",
    "a..b:c": "cannot import strategy",
    "my strategies:x": "cannot import strategy",
}


@pytest.mark.parametrize(("name", "words"), BAD_STRATEGIES.items(), ids=BAD_STRATEGIES)
@pytest.mark.usefixtures("here")
def test_what_is_not_a_strategy_is_a_config_error(name, words):
    with pytest.raises(ConfigError, match=words):
        strategy(name)


def test_a_module_that_fails_while_it_is_imported_is_a_config_error(tmp_path, monkeypatch):
    (tmp_path / "breaks_on_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot import strategy .*ZeroDivisionError"):
        strategy("breaks_on_import:X")


def test_a_strategys_own_check_and_a_missing_field_are_config_errors(here):
    with pytest.raises(ConfigError, match=r"cannot be made of its fields: 13 brings bad luck"):
        strategy(f"{here}:Mine", max_staleness=13)
    with pytest.raises(ConfigError, match=r"expected a key 'strategy\.max_staleness', found none"):
        strategy(f"{here}:Mine")
