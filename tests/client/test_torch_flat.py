"""A flat module is the module it was made from, in one vector."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedge.checkpoint import from_safetensors, to_safetensors
from fedge.errors import LayoutError
from fedge.vector import Model
from fedge_client.torch.flat import FlatModule, layout_of

FLOAT_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


class Bare(nn.Module):
    """A module of the parameters and buffers it is given."""

    def __init__(self, *parameters: torch.Tensor, **buffers: torch.Tensor | None) -> None:
        super().__init__()
        self.own = nn.ParameterList(
            p if isinstance(p, nn.Parameter) else nn.Parameter(p, requires_grad=p.is_floating_point())
            for p in parameters
        )
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    return model


def shared_submodule() -> nn.Module:
    norm = nn.BatchNorm1d(5)
    return nn.Sequential(nn.Linear(5, 5), norm, nn.Linear(5, 5), norm)


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).half())
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(3, 2),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(27, 2)
    ),
    "float16": lambda: nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).half(),
    "bfloat16": lambda: nn.Linear(3, 4).bfloat16(),
    "float64": lambda: nn.Linear(3, 4).double(),
    "mixed dtypes": lambda: nn.Sequential(
        nn.Linear(3, 4).bfloat16(), nn.Linear(4, 2), nn.Linear(2, 2).double()
    ),
    "tied": tied,
    "shared submodule": shared_submodule,
    "partly frozen": partly_frozen,
    "0-d": lambda: Bare(torch.tensor(2.5), torch.tensor(1.5, dtype=torch.float16)),
    "empty": lambda: Bare(torch.zeros(0, 3), torch.ones(2)),
    "transposed": lambda: Bare(torch.arange(6.0).view(2, 3).t(), torch.arange(6.0).view(2, 3).t().half()),
    "channels last": lambda: nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last),
    "interleaved": lambda: Bare(*torch.arange(8.0).view(4, 2).unbind(1)),
    "integers": lambda: Bare(
        torch.tensor([1, -2]), a=torch.tensor([True, False]), b=torch.tensor(3).int(), c=None
    ),
    "float buffers": lambda: Bare(
        torch.ones(2), a=torch.ones(3).double(), b=torch.ones(2, 2).t(), c=torch.tensor(0.5)
    ),
    "lstm": lambda: nn.LSTM(3, 4, num_layers=2),
    "parametrised": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
    "no parameters": lambda: nn.ReLU(),
}

every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name


def rounded_to_float32(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a vector keeps of a state: float64 is averaged as float32."""
    return {k: v.float().double() if v.dtype == torch.float64 else v for k, v in state.items()}


@every_model
def test_becoming_flat_changes_no_value_of_the_state_dict(make: Callable[[], nn.Module]) -> None:
    module = make()
    before = state_of(module)
    FlatModule(module)
    assert_same_state(state_of(module), before)


@every_model
def test_loading_a_models_own_vector_into_another_instance_gives_the_same_state_dict(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    first, second = make(), make()
    FlatModule(second).load(FlatModule(first).vector)
    assert_same_state(state_of(second), rounded_to_float32(state_of(first)))


@every_model
def test_a_checkpoint_loads_into_the_plain_module_strictly_and_back(make: Callable[[], nn.Module]) -> None:
    flat = FlatModule(make())
    data = to_safetensors(Model(flat.vector, flat.layout))
    plain = make()
    plain.load_state_dict(safetensors.torch.load(data), strict=True)
    assert_same_state(state_of(plain), rounded_to_float32(state_of(flat.module)))
    assert np.array_equal(from_safetensors(data, flat.layout).vector, flat.vector)


@every_model
def test_a_layout_is_read_without_touching_the_module(make: Callable[[], nn.Module]) -> None:
    module = make()
    before = [(p.data_ptr(), p.stride()) for p in module.parameters()]
    layout = layout_of(module)
    assert [(p.data_ptr(), p.stride()) for p in module.parameters()] == before
    assert sorted(layout.names) == sorted(module.state_dict())
    assert layout == FlatModule(module).layout


@every_model
def test_every_tensor_of_the_module_reads_as_the_slice_the_layout_gives_it(
    make: Callable[[], nn.Module],
) -> None:
    flat = FlatModule(make())
    flat.load(np.linspace(-1, 1, flat.layout.size, dtype=np.float32))
    state, views = flat.module.state_dict(), flat.layout.views(flat.vector)
    for tensor in flat.layout.tensors:
        for name in (tensor.name, *tensor.tied):
            expected = torch.from_numpy(views[tensor.name]).to(state[name].dtype)
            assert torch.equal(state[name], expected), name


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 4), max_size=3),
            st.sampled_from(FLOAT_DTYPES),
            st.sampled_from(["trainable", "frozen", "buffer", "transposed"]),
        ),
        max_size=6,
    ),
    st.integers(0, 2**32 - 1),
)
def test_what_is_loaded_is_what_the_layout_flattens_again(
    specs: list[tuple[list[int], torch.dtype, str]], seed: int
) -> None:
    module = nn.Module()
    for at, (shape, dtype, kind) in enumerate(specs):
        value = torch.zeros(shape, dtype=dtype)
        if kind == "buffer":
            module.register_buffer(f"t{at}", value)
        else:
            value = torch.zeros(shape[::-1], dtype=dtype).permute(tuple(reversed(range(len(shape)))))
            module.register_parameter(f"t{at}", nn.Parameter(value, requires_grad=kind != "frozen"))
    flat = FlatModule(module)
    # Small integers are exact in every dtype, so equality is the law and not a tolerance.
    vector = np.random.default_rng(seed).integers(-64, 64, flat.layout.size).astype(np.float32)
    flat.load(vector)
    flat.settle()
    assert np.array_equal(flat.vector, vector)
    assert np.array_equal(
        flat.layout.flatten({k: v.double() for k, v in module.state_dict().items()}), vector
    )


@pytest.mark.parametrize(
    "name", ["linear", "mixed dtypes", "tied", "transposed", "channels last", "0-d", "partly frozen"]
)
def test_the_flat_gradient_is_the_gradient_of_each_parameter(name: str) -> None:
    torch.manual_seed(0)
    plain, taken = MODELS[name](), MODELS[name]()
    taken.load_state_dict(plain.state_dict())
    flat = FlatModule(taken)

    def loss(module: nn.Module) -> torch.Tensor:
        terms = [
            (p.double() ** 2).sum() * (at + 1) for at, p in enumerate(module.parameters()) if p.requires_grad
        ]
        return torch.stack(terms).sum()

    loss(plain).backward()
    for _ in range(2):  # the second pass finds the first one's residue
        flat.zero_gradient()
        loss(taken).backward()
        flat.collect()
    gradients = dict(plain.named_parameters())
    for tensor, where in zip(flat.layout.tensors, flat.layout.slices, strict=True):
        if tensor.role == "trainable":
            expected = gradients[tensor.name].grad
            assert expected is not None
            assert torch.equal(flat.gradient[where], expected.float().reshape(-1)), tensor.name


def test_parameters_and_gradients_are_views_of_the_two_vectors() -> None:
    flat = FlatModule(MODELS["batch norm"]())
    flat.vector[:] = 3
    flat.gradient.fill_(2)
    for parameter in flat.module.parameters():
        assert parameter.is_contiguous()
        assert bool((parameter == 3).all())
        assert parameter.grad is not None
        assert bool((parameter.grad == 2).all())
    assert np.shares_memory(flat.vector, flat.theta.numpy())


def test_moved_parameters_of_other_dtypes_are_seen_once_published() -> None:
    flat = FlatModule(MODELS["bfloat16"]())
    flat.head.fill_(1.5)
    flat.publish()
    assert all(bool((p == 1.5).all()) for p in flat.module.parameters())


class Restless(nn.Module):
    """Does in its forward everything that user code does to its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("in_place", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("rehoused", torch.zeros(2))
        self.register_buffer("replaced_half", torch.zeros(2, dtype=torch.float16))
        self.register_buffer("wide", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(4))
        self.register_buffer("rehoused_steps", torch.tensor(4))
        self.register_buffer("transient", torch.zeros(2), persistent=False)
        self.register_buffer("lazily", None)

    def forward(self) -> torch.Tensor:
        self.in_place += 1
        self.replaced = self.replaced + 2
        self.rehoused.data = self.rehoused.data + 3
        self.replaced_half = self.replaced_half + 4
        self.wide += 5
        self.steps = self.steps + 1
        self.rehoused_steps.data = self.rehoused_steps.data + 1
        self.transient += 6
        self.lazily = torch.ones(1) if self.lazily is None else self.lazily + 1
        self.weight.data = self.weight.data.clamp(max=0.5)
        self.weight.grad = None
        return (self.weight * (self.transient + self.lazily)).sum()


def test_what_a_forward_did_to_its_buffers_and_parameters_is_read_back() -> None:
    flat = FlatModule(Restless())
    flat.load(flat.vector.copy())
    for _ in range(2):
        flat.zero_gradient()
        flat.module().backward()
        flat.collect()
    flat.settle()
    views = flat.layout.views(flat.vector)
    assert {name: view.tolist() for name, view in views.items()} == {
        "weight": [0.5, 0.5],
        "in_place": [2, 2],
        "replaced": [4, 4],
        "rehoused": [6, 6],
        "replaced_half": [8, 8],
        "wide": [10, 10],
    }
    assert flat.gradient.tolist() == [14, 14]  # of the second pass alone: transient 12, lazily 2
    assert flat.module.replaced.data_ptr() == flat.theta[4:].data_ptr()


def test_a_load_undoes_whatever_a_forward_did() -> None:
    flat = FlatModule(Restless())
    start = flat.vector.copy()
    outputs = []
    for _ in range(3):
        flat.load(start)
        outputs.append((flat.module().item(), {k: v.tolist() for k, v in flat.module.state_dict().items()}))
    assert outputs[0] == outputs[1] == outputs[2]
    flat.load(start)
    assert flat.module.steps.item() == 4
    assert flat.module.lazily is None
    assert np.array_equal(flat.vector, start)
    assert [p.grad is not None and p.grad.data_ptr() for p in flat.module.parameters()] == [
        flat.gradient.data_ptr()
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_untouched_buffer_of_a_narrow_dtype_keeps_every_bit_of_its_master(dtype: torch.dtype) -> None:
    flat = FlatModule(Bare(torch.ones(1), narrow=torch.zeros(3, dtype=dtype)))
    vector = np.array([1, 0.1, 1 / 3, np.pi], np.float32)  # not representable in sixteen bits
    flat.load(vector)
    flat.settle()
    assert np.array_equal(flat.vector, vector)


def test_a_buffer_that_changes_its_shape_is_an_error_and_the_next_load_recovers() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self) -> None:
            self.seen = torch.cat([self.seen, self.seen])

    flat = FlatModule(Growing())
    flat.module()
    with pytest.raises(LayoutError, match=r"'seen'.*\[1\].*\[2\]"):
        flat.settle()
    flat.load(np.array([7], np.float32))
    assert flat.module.seen.tolist() == [7]


def test_a_vector_of_another_size_is_refused_by_load() -> None:
    flat = FlatModule(nn.Linear(2, 2))
    with pytest.raises(LayoutError, match="6 elements"):
        flat.load(np.zeros(7, np.float32))


def sharing(one: torch.Tensor, other: torch.Tensor) -> nn.Module:
    return Bare(nn.Parameter(one), nn.Parameter(other))


def with_extra_state() -> nn.Module:
    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"version": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    return Extra(2, 2)


def stale_view() -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("first_row", model.weight.data[0], persistent=False)
    return model


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(2, 2)


BASE = torch.arange(8.0)
REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "complex": (lambda: Bare(a=torch.zeros(2, dtype=torch.complex64)), "complex64"),
    "float8": (lambda: Bare(a=torch.zeros(2).to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "unsigned 16": (lambda: Bare(a=torch.zeros(2, dtype=torch.uint16)), "uint16"),
    "quantised": (lambda: Bare(a=torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)), "qint8"),
    "sparse": (lambda: Bare(a=torch.eye(2).to_sparse()), "to_dense"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "CPU.*meta"),
    "lazy": (lambda: nn.LazyLinear(2), "lazy.*run a batch"),
    "expanded": (lambda: Bare(torch.ones(1).expand(3)), "clone"),
    "inference": (made_in_inference_mode, "inference"),
    "extra state": (with_extra_state, "dict.*get_extra_state"),
    "same memory, two parameters": (lambda: sharing(BASE, BASE), "own.0.*own.1.*overlapping"),
    "overlapping slices": (lambda: sharing(BASE[:5], BASE[4:]), "overlapping"),
    "transposed view": (lambda: sharing(BASE.view(2, 4), BASE.view(2, 4).t()), "overlapping"),
    "nested spans": (lambda: Bare(*BASE.view(4, 2).unbind(1), BASE[6:7]), "own.0.*own.2.*overlapping"),
    "other dtype, same memory": (lambda: Bare(BASE, a=BASE.view(torch.int32)), "overlapping"),
    "a constant view of a parameter": (stale_view, "first_row.*weight.*overlapping"),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_flat_vector_cannot_hold_is_refused_by_name(
    make: Callable[[], nn.Module], message: str
) -> None:
    module = make()
    with pytest.raises(LayoutError, match=message):
        layout_of(module)
    with pytest.raises(LayoutError, match=message):
        FlatModule(module)


def test_a_complex_constant_outside_the_state_dict_is_no_concern_of_the_layout() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("rotations", torch.ones(2, dtype=torch.complex64), persistent=False)
    assert [tensor.name for tensor in layout_of(model).tensors] == ["weight", "bias"]


def test_the_roles_order_the_layout_and_ties_are_one_tensor() -> None:
    layout = layout_of(nn.Sequential(nn.BatchNorm1d(2), partly_frozen()))
    assert [tensor.role for tensor in layout.tensors] == ["trainable"] * 4 + ["frozen"] * 2 + ["buffer"] * 2
    assert [carried.name for carried in layout.carried] == ["0.num_batches_tracked"]
    (shared,) = [tensor for tensor in layout_of(tied()).tensors if tensor.tied]
    assert (shared.name, shared.tied) == ("0.weight", ("1.weight",))
