"""run.toml: what parses, what is refused and in which words, and that nothing else ever comes out."""

from __future__ import annotations

import os
import tomllib
from operator import attrgetter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fedge.config import nearest, parse_toml
from fedge.errors import ConfigError
from fedge.run import RunConfig, Work

HEAD = 'name = "icu-vitals"\ntask = "app:task"\nrounds = 20\n'

DESIGN = """
name = "icu-vitals"
task = "app:task"
rounds = 20
seed = 7

[strategy]
name = "fedavg"                 # any field of that strategy may follow
server_learning_rate = 1.0

[work]
epochs = 1
batch_size = 32
optimizer = "sgd"
learning_rate = 0.05

[cohort]
size = 10
quorum = 8
over_select = 1.3
deadline_s = 60

[privacy]
unit = "example"                # or "client", or "none"
epsilon = 3.0
delta = 1e-5
clip = 1.0

[secure_aggregation]
enabled = true
threshold = 0.67

[compression]
kind = "none"
"""


def parse(text: str) -> RunConfig:
    return parse_toml(text, RunConfig, source="run.toml")


def problem(text: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse(text)
    return str(error.value)


# The example of the design.


def test_the_designs_example_parses():
    run = parse(DESIGN)
    assert (run.name, run.task, run.rounds, run.seed) == ("icu-vitals", "app:task", 20, 7)
    assert run.strategy.fields == {"server_learning_rate": 1.0}
    assert (run.work.epochs, run.work.batch_size, run.work.learning_rate) == (1, 32, 0.05)
    assert (run.cohort.size, run.cohort.needed, run.cohort.over_select) == (10, 8, 1.3)
    assert run.cohort.deadline_s == 60.0
    assert run.secure_aggregation.enabled
    assert run.secure_aggregation.threshold == 0.67


PRIVATE = HEAD + '[privacy]\nunit = "example"\nepsilon = 3.0\ndelta = 1e-5\nclip = 1.0\n'


@pytest.mark.parametrize(
    ("privacy", "says"),
    [
        ("epsilon = 3.0\ndelta = 1e-5", "privacy: clip: expected the largest norm"),  # noise without a bound
        ("epsilon = 3.0\nclip = 1.0", "privacy: delta: expected"),
        ("delta = 1e-5\nclip = 1.0", "privacy: expected epsilon (or noise_multiplier), found neither"),
        ('epsilon = 3.0\ndelta = 1e-5\nclip = 1.0\namplification = "cohort"', "is not amplified by"),
        ('epsilon = 3.0\ndelta = 1e-5\nclip = 1.0\nmechanism = "laplace"', "unknown key 'privacy.mechanism'"),
        ("epsilon = inf\ndelta = 1e-5\nclip = 1.0", "privacy.epsilon"),
        ("epsilon = 3.0\ndelta = 1.0\nclip = 1.0", "privacy.delta"),
        ("epsilon = 3.0\ndelta = 1e-5\nclip = 0.0", "privacy.clip"),
    ],
)
def test_privacy_that_cannot_keep_its_promise_is_refused(privacy, says):
    assert says in problem(f"{HEAD}[privacy]\n{privacy}")


@pytest.mark.parametrize(
    ("unit", "setting", "says"),
    [
        ("example", "separation = 2", "are for noise that the coordinator adds"),
        ("example", "[privacy.adaptive_clip]", "are for noise that the coordinator adds"),
        ("client", "[privacy.adaptive_clip]\ntarget = 1.0", "privacy.adaptive_clip.target"),
        ("client", "[privacy.adaptive_clip]\nquantile = 0.5", "unknown key 'privacy.adaptive_clip.quantile'"),
        ("client", "separation = 0", "privacy.separation"),
    ],
)
def test_what_only_a_coordinators_noise_can_do_is_refused_elsewhere(unit, setting, says):
    assert says in problem(
        f'{HEAD}[privacy]\nunit = "{unit}"\nepsilon = 3.0\ndelta = 1e-5\nclip = 1.0\n{setting}'
    )


def test_a_privacy_table_without_a_unit_means_example_level():
    assert parse(f"{HEAD}[privacy]\nepsilon = 3.0\ndelta = 1e-5\nclip = 1.0").privacy.unit == "example"


@pytest.mark.parametrize(
    "promise", ["epsilon = 3.0", "delta = 1e-5", "noise_multiplier = 1.0", "separation = 3"]
)
def test_a_budget_without_a_mechanism_is_refused(promise):
    words = f'{promise.split()[0]} promise a guarantee that unit = "none" does not give'
    assert words in problem(HEAD + f'[privacy]\nunit = "none"\n{promise}')


def test_example_weights_are_refused_where_the_number_of_examples_is_private():
    assert "strategy.weighting: 'examples' needs" in problem(PRIVATE + '[strategy]\nweighting = "examples"')
    parse(PRIVATE + '[strategy]\nweighting = "uniform"')


def test_metrics_without_protection_are_refused_if_asked_for_and_off_otherwise():
    assert "metrics would be released without protection" in problem(PRIVATE + "[evaluation]\nevery = 2")
    assert parse(PRIVATE).evaluation_every == 0
    assert any("do not evaluate" in note for note in parse(PRIVATE).notes())
    noised = parse(PRIVATE + "evaluation_noise_multiplier = 9.0\n[evaluation]\nevery = 2")
    assert noised.evaluation_every == 2
    assert parse(HEAD).evaluation_every == 1


SECURE = "[secure_aggregation]\nenabled = true\n"
PRIVATE_SUMS = (
    '[evaluation]\nevery = 0\n[privacy]\nunit = "client"\nepsilon = 3.0\ndelta = 1e-5\nclip = 1.0\n'
)


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ("[cohort]\nsize = 2\n", "cohort.quorum: expected 3 or more with secure aggregation, found 2"),
        (
            '[privacy]\nunit = "client"\nepsilon = 3.0\ndelta = 1e-5\nclip = 1.0\nevaluation_noise_multiplier = 9.0\n',
            "the sites add noise to updates alone; set evaluation.every = 0",
        ),
        (PRIVATE_SUMS + "separation = 2\n", "the sites add it, each for itself: leave them out"),
        (PRIVATE_SUMS + "[privacy.adaptive_clip]\n", "the sites add it, each for itself: leave them out"),
    ],
)
def test_what_a_secure_sum_cannot_be_is_refused_when_it_is_configured(tables: str, says: str):
    assert says in problem(HEAD + tables + SECURE)


def test_noise_inside_a_sum_is_for_coordinators_that_may_lie():
    assert "secure_aggregation.consistency: expected true" in problem(
        HEAD + PRIVATE_SUMS + SECURE + "consistency = false"
    )


@pytest.mark.parametrize("line", ["bound = 2.0", "max_weight = 5", 'metrics = ["loss"]'])
def test_what_privacy_decides_of_a_secure_sum_is_not_said_twice(line: str):
    made = parse(HEAD + PRIVATE_SUMS.replace("[evaluation]\nevery = 0\n", "") + SECURE)
    assert made.evaluation_every == 0
    assert any("judge the model on data that is public" in note for note in made.notes())
    assert 'say what privacy.unit = "client" decides' in problem(HEAD + PRIVATE_SUMS + SECURE + line)


def test_compression_is_refused_and_never_ignored():
    assert "compression.kind: input should be 'none'" in problem(HEAD + '[compression]\nkind = "int8"')


def test_name_task_and_rounds_are_all_that_a_run_needs():
    run = parse(HEAD)
    assert (run.strategy.name, run.cohort.needed, run.privacy.unit) == ("fedavg", 10, "none")
    for key in ("name", "task", "rounds"):
        rest = "\n".join(line for line in HEAD.splitlines() if not line.startswith(key))
        assert problem(rest) == f"run.toml: expected a key {key!r}, found none"


def test_a_run_is_a_frozen_printable_comparable_value():
    run = parse(DESIGN)
    assert run == parse(DESIGN)
    assert "icu-vitals" in repr(run)
    with pytest.raises(ValidationError):
        run.rounds = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        run.work.epochs = 3  # type: ignore[misc]


# Unknown keys.

UNKNOWN = {
    "top level": (f"{HEAD}round = 3", "unknown key 'round'; did you mean 'rounds'?"),
    "a table": (f"{HEAD}[cohorts]\nsize = 3", "unknown key 'cohorts'; did you mean 'cohort'?"),
    "nested": (
        f"{HEAD}[work]\nlearning_rat = 1.0",
        "unknown key 'work.learning_rat'; did you mean 'learning_rate'?",
    ),
    "nested, from another table": (
        f"{HEAD}[cohort]\nlearning_rate = 1.0",
        "unknown key 'cohort.learning_rate'; valid keys: attempts, deadline_s, over_select, quorum, size, wait_s",
    ),
    "a long table name": (
        f"{HEAD}[secure-aggregation]\nenabled = false",
        "unknown key 'secure-aggregation'; did you mean 'secure_aggregation'?",
    ),
    "a quoted key with a dot": (f'{HEAD}"a.b" = 1', "unknown key 'a.b'; valid keys: "),
    "an empty key": (f'{HEAD}"" = 1', "unknown key ''; valid keys: "),
}


@pytest.mark.parametrize(("text", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_key_names_the_file_the_path_and_the_nearest_key(text, words):
    assert problem(text).startswith(f"run.toml: {words}")


def test_every_unknown_key_is_a_line():
    lines = problem(f"{HEAD}round = 1\n[work]\nepoch = 1\n[privacy]\nunit = 'none'\neps = 1").splitlines()
    assert [line.split("'")[1] for line in lines] == ["work.epoch", "privacy.eps", "round"]
    assert all(line.startswith("run.toml: unknown key ") for line in lines)


def test_nearest_lists_all_keys_when_none_is_near():
    assert nearest("zzz", ["b", "a"]) == "valid keys: a, b"
    assert nearest("rounds", ["round", "seed"]) == "did you mean 'round'?"
    assert nearest("x", []) == "no keys are valid here"


# Ill-typed values.

FLOAT_KEYS = [
    "work.learning_rate",
    "work.momentum",
    "work.beta1",
    "work.beta2",
    "work.epsilon",
    "work.l1",
    "work.l2",
    "work.proximal",
    "cohort.over_select",
    "cohort.deadline_s",
    "cohort.wait_s",
    "simulation.alpha",
    "simulation.faults.dropout",
    "simulation.faults.failure",
    "simulation.faults.straggler",
    "simulation.faults.corruption",
]
INTEGER_KEYS = [
    "work.epochs",
    "work.steps",
    "cohort.size",
    "cohort.quorum",
    "cohort.attempts",
    "evaluation.every",
    "evaluation.clients",
    "simulation.clients",
    "simulation.faults.crash_every",
]


def with_value(key: str, value: str) -> str:
    table, _, name = key.rpartition(".")
    return f"{HEAD}[{table}]\n{name} = {value}"


@pytest.mark.parametrize("key", FLOAT_KEYS)
@pytest.mark.parametrize("value", ['"0.5"', "true", "[0.5]", "nan", "inf", "-inf", "-1", "2024-01-01", "{}"])
def test_a_number_is_not_text_nor_a_truth_value_nor_infinite(key, value):
    words = problem(with_value(key, value))
    assert words.startswith(f"run.toml: {key}: input should be ")
    assert "\n" not in words
    assert "found " in words


@pytest.mark.parametrize("key", FLOAT_KEYS)
def test_an_integer_is_accepted_where_a_number_is_expected(key):
    value = 0 if key.split(".")[1] in ("momentum", "beta1", "beta2", "l1", "l2") else 1
    found = attrgetter(key)(parse(with_value(key, str(value))))
    assert type(found) is float
    assert found == value


@pytest.mark.parametrize("key", INTEGER_KEYS)
@pytest.mark.parametrize("value", ['"3"', "true", "3.0", "[3]", "-1", "12:00:00"])
def test_a_count_is_a_whole_number_and_nothing_that_looks_like_one(key, value):
    assert problem(with_value(key, value)).startswith(f"run.toml: {key}: input should be ")


BOUNDS = {
    "rounds = 0": "rounds: input should be greater than or equal to 1, found 0",
    "rounds = 2147483648": "rounds: input should be less than or equal to 2147483647",
    "seed = -1": "seed: input should be greater than or equal to 0, found -1",
    "seed = 9223372036854775808": "seed: input should be less than",
    'name = "Icu"': "name: string should match pattern",
    'name = "a-"': "name: string should match pattern",
    'name = "a\\n"': "name: string should match pattern",
    'name = ""': "name: string should match pattern",
    'task = "app"': "task: string should match pattern",
    'task = "app:task:more"': "task: string should match pattern",
    'task = "../app:task"': "task: string should match pattern",
    'task = "app:task\\n"': "task: string should match pattern",
    "work = 3": "work: input should be a valid dictionary",
    "work = [1]": "work: input should be a valid dictionary",
    "strategy.name = ''": "strategy.name: string should have at least 1 character",
    "strategy.name = 3": "strategy.name: input should be a valid string, found 3",
    "cohort.over_select = 0.9": "cohort.over_select: input should be greater than or equal to 1",
    "cohort.attempts = 101": "cohort.attempts: input should be less than or equal to 100",
    "work.momentum = 1": "work.momentum: input should be less than 1",
    "work.learning_rate = 0": "work.learning_rate: input should be greater than 0",
    "work.proximal = 1e31": "work.proximal: input should be less than or equal to 1e+30, found 1e+31",
    "work.optimizer = 'rmsprop'": "work.optimizer: input should be 'sgd', 'momentum' or 'adam'",
    "simulation.faults.dropout = 1.01": "simulation.faults.dropout: input should be less than or equal to 1",
    "simulation.faults = 0.1": "simulation.faults: input should be a valid dictionary",
    "secure_aggregation.enabled = 1": "secure_aggregation.enabled: input should be a valid boolean",
    "secure_aggregation.metrics = 'loss'": "secure_aggregation.metrics: expected a list of names, found 'loss'",
    "secure_aggregation.threshold = 0.5": "secure_aggregation.threshold: input should be greater than or equal to 0.67",
}


@pytest.mark.parametrize(("line", "words"), BOUNDS.items())
def test_bounds_are_said_with_the_key_and_what_was_found(line, words):
    key = line.split(" = ")[0]
    rest = "".join(each + "\n" for each in HEAD.splitlines() if not each.startswith(f"{key} "))
    assert problem(f"{rest}{line}").startswith(f"run.toml: {words}")


@pytest.mark.parametrize("value", ['"half"', "0", "-3", "2.0", "true", '"32"', "2147483648", "[32]"])
def test_a_batch_size_is_a_count_or_full_and_its_error_names_the_key_once(value):
    words = problem(with_value("work.batch_size", value))
    expected = 'run.toml: work.batch_size: expected "full" or a whole number from 1 to 2^31 - 1, found '
    assert words.startswith(expected)
    assert "\n" not in words


def test_a_batch_may_be_full():
    assert parse(with_value("work.batch_size", '"full"')).work.batch_size == "full"


def test_epochs_and_steps_exclude_each_other():
    words = problem(f"{HEAD}[work]\nepochs = 1\nsteps = 10")
    assert words == "run.toml: work: expected epochs or steps, found both: leave one out"


def test_a_quorum_past_the_size_is_refused():
    words = problem(f"{HEAD}[cohort]\nsize = 3\nquorum = 4")
    assert words == "run.toml: cohort: quorum: expected at most size = 3, found 4"


def test_faults_that_are_more_than_certain_together_are_refused():
    faults = "[simulation.faults]\ndropout = 0.1\nfailure = 0.2\nstraggler = 0.7\n"
    assert parse(HEAD + faults).simulation.faults.straggler == 0.7
    words = problem(f"{HEAD}{faults}corruption = 0.01")
    assert words.startswith("run.toml: simulation.faults: expected dropout, failure, straggler, corruption, ")
    assert words.endswith("found 1.01")


def test_values_of_any_size_are_shown_in_few_words():
    words = problem(with_value("cohort.size", '"' + "x" * 10_000 + '"'))
    assert len(words) < 300


# Files and garbage.


def test_load_reads_a_file_and_names_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(DESIGN)
    assert RunConfig.load(path) == parse(DESIGN)
    path.write_text("rounds = ")
    with pytest.raises(ConfigError, match=f"{path}: not valid TOML: "):
        RunConfig.load(path)


FILES = {
    "missing": (lambda path: None, "expected a file, found none"),
    "a folder": (lambda path: path.mkdir(), "expected a file, found something else"),
    "a pipe, which would block": (os.mkfifo, "expected a file, found something else"),
    "not UTF-8": (lambda path: path.write_bytes(b'name = "\xff"'), "expected UTF-8 text"),
    "too large": (lambda path: path.write_bytes(b"#" * ((1 << 20) + 1)), "expected at most 1048576 bytes"),
    "a link to itself": (lambda path: path.symlink_to(path), "cannot be read"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("make", "words"), FILES.values(), ids=FILES)
def test_a_file_that_cannot_be_a_configuration_is_refused_by_name(make, words, tmp_path):
    path = tmp_path / "run.toml"
    make(path)
    with pytest.raises(ConfigError, match=words) as error:
        RunConfig.load(path)
    assert str(path) in str(error.value)


GARBAGE = {
    "not TOML": "rounds: 3",
    "a key twice": "rounds = 1\nrounds = 2",
    "a table twice": "[work]\n[work]",
    "a decimal number of 5000 digits": with_value("cohort.size", "9" * 5000),
    "a hexadecimal number of 5000 digits": with_value("cohort.size", "0x" + "f" * 5000),
    "a hexadecimal number as a float": with_value("work.learning_rate", "0x" + "f" * 5000),
    "a float past the largest": with_value("work.learning_rate", "1e400"),
    "nested very deeply": HEAD + "strategy.a = " + "[" * 5000 + "]" * 5000,
    "tables nested very deeply": HEAD + "strategy.a = " + "{a=" * 5000 + "1" + "}" * 5000,
    "a date that is none": with_value("work.epochs", "2024-13-45"),
    "a null byte": HEAD + "a = '\0'",
}


@pytest.mark.parametrize("text", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_a_config_error_in_few_words(text):
    """Found by review: long numbers and deep nesting came out as ValueError and RecursionError."""
    assert len(problem(text)) < 1000


KEYS = st.sampled_from(
    [
        *("name", "task", "rounds", "seed", "strategy", "work", "cohort", "privacy", "evaluation"),
        *("epochs", "batch_size", "learning_rate", "size", "quorum", "unit", "clip", "enabled", '"é.x"'),
    ]
)
SCALARS = st.one_of(
    st.integers().map(str),
    st.floats().map(lambda v: str(v).replace("e+", "e")),
    st.booleans().map(lambda v: str(v).lower()),
    st.sampled_from(
        ['"app:task"', '"none"', '"full"', '"a-b"', "2024-01-01", "07:32:00", "0xff", "[]", "{}"]
    ),
    st.text(st.characters(codec="ascii", categories=["L", "P", "Zs"]), max_size=8).map(lambda t: repr(t)),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda v: "[" + ", ".join(v) + "]")
        | st.tuples(KEYS, inner).map(lambda pair: "{" + " = ".join(pair) + "}")
    ),
    max_leaves=5,
)
LINES = st.one_of(
    st.tuples(KEYS, VALUES).map(" = ".join),
    KEYS.map(lambda key: f"[{key}]"),
    st.tuples(KEYS, KEYS).map(lambda keys: f"[{'.'.join(keys)}]"),
    st.text(max_size=10),
)
TOML = st.tuples(st.sampled_from(["", HEAD, DESIGN]), st.lists(LINES, max_size=6)).map(
    lambda parts: parts[0] + "\n".join(parts[1])
)


@settings(max_examples=120, deadline=None)
@given(TOML | st.text(max_size=60))
def test_any_text_is_a_run_or_a_config_error(text):
    try:
        run = parse(text)
    except ConfigError:
        return
    assert run.name == tomllib.loads(text)["name"]


def test_work_says_what_was_set_and_what_is_default():
    assert Work().model_fields_set == set()
    assert parse(f"{HEAD}[work]\nepochs = 1").work.model_fields_set == {"epochs"}
