"""Personal layers: a model is divided and joined again without loss, or not at all."""

from __future__ import annotations

from fnmatch import fnmatchcase

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.config import parse_toml
from fedge.errors import ConfigError, LayoutError, RefusedError
from fedge.personal import Split
from fedge.run import RunConfig, Work
from fedge.strategy import load_strategy
from fedge.task import OwnTask, first_model
from fedge.variates import unsuited
from fedge.vector import Carried, Layout, Tensor
from fedge.wire.codec import decode_work, encode_work

ROLES = ("trainable", "frozen", "buffer")


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Tensors `a0`, `b1`, ... of any role and size, the first of which is trained and shared."""
    kinds = draw(
        st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(ROLES), st.integers(0, 4)), max_size=8)
    )
    tensors = [Tensor(f"{part}{at}", (size,), role=role) for at, (part, role, size) in enumerate(kinds)]
    return Layout.of([Tensor("a", (2,)), *tensors, Tensor("b", (1,))], [Carried("bn", (), "int8", b"\0")])


@given(layouts(), st.randoms(use_true_random=False))
def test_what_is_divided_and_joined_is_what_it_was(layout: Layout, random: object) -> None:
    split = Split.of(layout, ["b*"])
    whole = np.arange(layout.size, dtype=np.float32)
    shared, own = split.shared_of(whole), split.personal_of(whole)
    assert np.array_equal(split.join(shared, own), whole)
    assert len(shared) + len(own) == len(whole)
    views = layout.views(whole)
    for part, vector, mine in ((split.shared, shared, False), (split.personal, own, True)):
        assert [each for each in layout.tensors if fnmatchcase(each.name, "b*") == mine] == list(part.tensors)
        for name, value in part.views(vector).items():
            assert np.array_equal(value, views[name])
    assert split.shared.carried == layout.carried, "integers are neither trained nor averaged"


def test_neighbours_are_moved_together():
    layout = Layout.of([Tensor(name, (3,)) for name in ("a", "b", "c", "d")])
    split = Split.of(layout, ["c", "d"])
    assert split.shared_spans == ((slice(0, 6), slice(0, 6)),)
    assert split.personal_spans == ((slice(6, 12), slice(0, 6)),)


def test_a_tied_tensor_is_personal_by_any_of_its_names():
    layout = Layout.of([Tensor("body", (1,)), Tensor("embedding", (2,), tied=("head.weight",))])
    assert Split.of(layout, ["head.*"]).personal.names == ["embedding", "head.weight"]


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (
            ["hed.*"],
            r"expected names of the model's floating-point tensors \(body, head, mean\), found 'hed\.\*'",
        ),
        (["head", "nothing"], "found 'nothing', which matches none"),
        (["*"], "expected a trained tensor that is shared, found that all are personal"),
        (["body", "head"], "nothing would be learned together"),
    ],
)
def test_what_cannot_be_divided_is_said(patterns: list[str], says: str) -> None:
    layout = Layout.of([Tensor("body", (1,)), Tensor("head", (2,)), Tensor("mean", (2,), role="buffer")])
    with pytest.raises(LayoutError, match=says):
        Split.of(layout, patterns)


def test_vectors_that_do_not_fit_are_refused():
    split = Split.of(Layout.of([Tensor("body", (1,)), Tensor("head", (2,))]), ["head"])
    with pytest.raises(LayoutError):
        split.join(np.zeros(3, np.float32), np.zeros(2, np.float32))
    with pytest.raises(LayoutError):
        split.join(np.zeros(1, np.float32), np.zeros(3, np.float32))


def run(work: str, strategy: str = 'name = "fedavg"') -> RunConfig:
    text = f'name = "r"\ntask = "t:t"\nrounds = 1\n[work]\n{work}\n[strategy]\n{strategy}\n'
    return parse_toml(text, RunConfig, source="run.toml")


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        ('name = "mirrored_sgd"', "expected a strategy whose clients train, found mirrored_sgd"),
        ('name = "sgd"', "expected a strategy whose clients train, found sgd"),
        ('name = "scaffold"\nclients = 20', "leave out work.personal"),
    ],
)
def test_strategies_whose_clients_cannot_have_them_are_refused(strategy: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_strategy(run('personal = ["head.*"]\nsteps = 2', strategy))
    assert load_strategy(run("steps = 2", strategy)) is not None


@pytest.mark.parametrize("value", ['"head"', "[1]", '[""]', str(["x"] * 65)])
def test_a_setting_that_is_no_list_of_names_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"work\.personal"):
        run(f"personal = {value}")


@given(st.lists(st.text(min_size=1, max_size=20, alphabet="ab.*"), max_size=4))
def test_an_offer_says_which_they_are(patterns: list[str]) -> None:
    work = Work(personal=tuple(patterns))
    assert decode_work(encode_work(work)) == work


def test_a_task_that_trains_by_itself_has_none():
    with pytest.raises(RefusedError, match="no layers of its model can be kept apart"):
        first_model(OwnTask(lambda seed: None, lambda site, work: None), seed=1, personal=["head"])  # type: ignore[arg-type,return-value]  # nobody is asked


def test_control_variates_are_of_whole_models():
    assert unsuited(Work(steps=2)) == ""
    assert "work.personal" in unsuited(Work(steps=2, personal=("head",)))
