"""safetensors bytes: what torch reads is what the vector holds, and no bytes do more than be refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from fedge.checkpoint import from_safetensors, to_safetensors
from fedge.errors import LayoutError
from fedge.vector import FLOATS, INTEGERS, Carried, Layout, Model, Tensor

TORCH = {name: getattr(torch, name) for name in (*FLOATS, *INTEGERS)}


def one(dtype: str = "float32", shape: tuple[int, ...] = (2, 3), **more: object) -> Layout:
    return Layout((Tensor("a", shape, dtype, **more),))  # type: ignore[arg-type]


def model(layout: Layout, seed: int = 0) -> Model:
    return Model(np.random.default_rng(seed).normal(size=layout.size).astype(np.float32), layout)


LAYOUT = Layout(
    (
        *(Tensor(f"{dtype}.weight", (3, 5), dtype) for dtype in FLOATS),
        *(Tensor(f"{dtype}.scale", (), dtype) for dtype in FLOATS),
        *(Tensor(f"{dtype}.none", (0, 2), dtype) for dtype in FLOATS),
        Tensor("embedding", (4,), tied=("head.weight", "again")),
        Tensor("mean", (7,), "bfloat16", "buffer"),
    ),
    tuple(Carried(f"{dtype}.count", (3,), dtype, np.array([1, 0, 1], dtype).tobytes()) for dtype in INTEGERS),
)


# Round trips.


def test_torch_reads_the_names_shapes_dtypes_and_values_of_the_model():
    written = model(LAYOUT)
    found = safetensors.torch.load(to_safetensors(written))
    assert sorted(found) == sorted(LAYOUT.names)
    views = LAYOUT.views(written.vector)
    for tensor in LAYOUT.tensors:
        expected = torch.from_numpy(views[tensor.name].copy()).to(TORCH[tensor.dtype])
        for name in (tensor.name, *tensor.tied):
            assert found[name].dtype == TORCH[tensor.dtype]
            assert found[name].shape == tensor.shape
            assert torch.equal(found[name], expected)
    for carried in LAYOUT.carried:
        assert found[carried.name].dtype == TORCH[carried.dtype]
        assert found[carried.name].to(torch.int64).tolist() == [1, 0, 1]


def test_numpy_reads_the_values_of_the_model():
    layout = Layout(tuple(tensor for tensor in LAYOUT.tensors if tensor.dtype != "bfloat16"), LAYOUT.carried)
    written = model(layout)
    found = safetensors.numpy.load(to_safetensors(written))
    for name, view in layout.views(written.vector).items():
        np.testing.assert_array_equal(found[name], view.astype(found[name].dtype))


def test_what_is_read_back_is_what_the_models_dtypes_hold():
    written = model(LAYOUT)
    read = from_safetensors(to_safetensors(written), LAYOUT)
    assert read.layout is LAYOUT
    for tensor, where in zip(LAYOUT.tensors, LAYOUT.slices, strict=True):
        kept = torch.from_numpy(written.vector[where]).to(TORCH[tensor.dtype]).to(torch.float32)
        np.testing.assert_array_equal(read.vector[where], kept.numpy())


@pytest.mark.parametrize("dtype", FLOATS)
def test_torch_written_files_are_read(dtype):
    values = torch.randn(2, 3).to(TORCH[dtype])
    read = from_safetensors(safetensors.torch.save({"a": values}), one(dtype))
    np.testing.assert_array_equal(read.vector, values.to(torch.float32).reshape(-1).numpy())


def test_a_state_dict_loads_the_bytes_as_they_are():
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = net.state_dict()
    layout = Layout.of(
        [
            Tensor(name, tuple(value.shape), role="buffer" if "running" in name else "trainable")
            for name, value in state.items()
            if value.is_floating_point()
        ],
        [Carried("1.num_batches_tracked", (), "int64", np.int64(41).tobytes())],
    )
    written = model(layout)
    net.load_state_dict(safetensors.torch.load(to_safetensors(written)))
    assert net.state_dict()["1.num_batches_tracked"].item() == 41
    np.testing.assert_array_equal(
        net.state_dict()["0.weight"].numpy(), layout.views(written.vector)["0.weight"]
    )


def test_a_model_without_tensors_makes_a_file():
    empty = Layout(())
    assert safetensors.torch.load(to_safetensors(Model(np.zeros(0, np.float32), empty))) == {}
    assert from_safetensors(to_safetensors(Model(np.zeros(0, np.float32), empty)), empty).vector.shape == (0,)


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "naïve.größe", "новый", "a\nb", "\u2028", "\x7f"])
def test_names_of_any_text_survive(name):
    layout = Layout((Tensor(name, (2,)),))
    written = model(layout)
    data = to_safetensors(written, metadata={name: name})
    assert list(safetensors.torch.load(data)) == [name]
    np.testing.assert_array_equal(from_safetensors(data, layout).vector, written.vector)


def test_metadata_is_readable_and_the_same_input_is_the_same_bytes(tmp_path):
    written = model(LAYOUT)
    metadata = {f"key{n}": "value" for n in range(9)}
    data = to_safetensors(written, metadata=metadata)
    assert data == to_safetensors(written, metadata=dict(reversed(metadata.items())))
    (tmp_path / "m.safetensors").write_bytes(data)
    with safe_open(tmp_path / "m.safetensors", "numpy") as file:
        assert file.metadata() == metadata


def test_each_tensor_is_aligned_to_its_element():
    data = to_safetensors(model(LAYOUT))
    size = int.from_bytes(data[:8], "little")
    assert size % 8 == 0
    header = json.loads(data[8 : 8 + size])
    widths = {"64": 8, "32": 4, "16": 2}
    for entry in header.values():
        width = next((bytes_ for digits, bytes_ in widths.items() if entry["dtype"].endswith(digits)), 1)
        assert entry["data_offsets"][0] % width == 0


# Rounding.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_bfloat16_rounds_as_torch_does(bits):
    values = np.array(bits, np.uint32).view(np.float32)
    check_bfloat16(values)


def test_bfloat16_rounds_every_kind_of_number_as_torch_does():
    random = np.random.default_rng(1).integers(0, 2**32, 200_000, dtype=np.uint32)
    # Every exponent with the halfway cases and their neighbours, both signs: subnormals, inf and NaN too.
    high = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    edges = np.concatenate([high + np.uint32(low) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
    check_bfloat16(np.concatenate([random, edges]).view(np.float32))


def check_bfloat16(values: np.ndarray) -> None:
    layout = one("bfloat16", (len(values),))
    ours = safetensors.torch.load(to_safetensors(Model(values, layout)))["a"]
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    number = ~theirs.isnan()
    assert torch.equal(ours.view(torch.int16)[number], theirs.view(torch.int16)[number])
    widened = from_safetensors(to_safetensors(Model(values, layout)), layout).vector
    expected = ours.to(torch.float32).numpy()
    np.testing.assert_array_equal(np.isnan(widened), np.isnan(expected))
    kept = ~np.isnan(expected)
    np.testing.assert_array_equal(widened.view(np.uint32)[kept], expected.view(np.uint32)[kept])


@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_other_floats_round_as_torch_does(dtype):
    bits = np.random.default_rng(2).integers(0, 2**32, 50_000, dtype=np.uint32)
    values = bits.view(np.float32)[~np.isnan(bits.view(np.float32))].copy()
    ours = safetensors.torch.load(to_safetensors(Model(values, one(dtype, values.shape))))["a"]
    assert torch.equal(ours, torch.from_numpy(values).to(TORCH[dtype]))


# What is refused.


def file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str = "F32", shape: object = (2, 3), span: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": span}


GOOD = file({"a": entry()}, bytes(24))

HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "a short length": b"\1\2\3",
    "a length past the end": (1000).to_bytes(8, "little") + b"{}",
    "a huge header": (2**63).to_bytes(8, "little") + b"{}",
    "the largest header": b"\xff" * 8 + b"{}",
    "a header that is not text": file(b"\xff\xfe{}"),
    "a header that is not JSON": file(b"{'a': 1}"),
    "a header that is a list": file([1]),
    "a header that is deep": file(b"[" * 50_000),
    "a deep entry": file(b'{"a":' * 50_000),
    "an entry that is a number": file({"a": 3}),
    "an entry without a shape": file({"a": {"dtype": "F32", "data_offsets": [0, 24]}}, bytes(24)),
    "an unknown dtype": file({"a": entry("F128")}, bytes(24)),
    "a negative size": file({"a": entry(shape=(-2, 3))}, bytes(24)),
    "a size of 2^64": file({"a": entry(shape=(2**64, 3))}, bytes(24)),
    "a size that overflows": file({"a": entry(shape=(2**62, 2**62))}, bytes(24)),
    "a fraction of a size": file({"a": entry(shape=(2.5, 3))}, bytes(24)),
    "offsets past the end": file({"a": entry(span=(0, 24))}, bytes(8)),
    "offsets backwards": file({"a": entry(span=(24, 0))}, bytes(24)),
    "offsets with a hole": file({"a": entry(span=(8, 32))}, bytes(32)),
    "offsets that do not fit the shape": file({"a": entry(span=(0, 20))}, bytes(20)),
    "more data than tensors": file({"a": entry()}, bytes(25)),
    "overlapping tensors": file({"a": entry(), "b": entry()}, bytes(24)),
    "half a character": file(b'{"\\ud800":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}', bytes(24)),
    "a shape of very many sizes": file({"a": entry(shape=[1] * 100_000, span=(0, 4))}, bytes(4)),
    "another dtype of the same width": file({"a": entry("I32")}, bytes(24)),
    "four-bit numbers": file({"a": entry("F4", (48,))}, bytes(24)),
    "a transposed shape": file({"a": entry(shape=(3, 2))}, bytes(24)),
    "a flat shape": file({"a": entry(shape=(6,))}, bytes(24)),
    "no tensors": file({}),
    "another name": file({"b": entry()}, bytes(24)),
    "a name too many": file({"a": entry(), "x" * 100_000: entry("U8", (1,), (24, 25))}, bytes(25)),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_are_refused_in_a_few_words(data):
    with pytest.raises(LayoutError) as error:
        from_safetensors(data, one())
    assert len(str(error.value)) < 600


def test_every_truncation_of_a_file_is_refused():
    data = to_safetensors(model(LAYOUT))
    for end in [*range(0, len(data), 7), len(data) - 1]:
        with pytest.raises(LayoutError):
            from_safetensors(data[:end], LAYOUT)
    with pytest.raises(LayoutError):
        from_safetensors(data + b"\0", LAYOUT)


def corrupted(data: bytes) -> st.SearchStrategy[bytes]:
    def change(where: int, value: int) -> bytes:
        return data[:where] + bytes([value]) + data[where + 1 :]

    return st.builds(change, st.integers(0, len(data) - 1), st.integers(0, 255))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | corrupted(GOOD) | st.binary(max_size=80).map(file))
def test_any_bytes_are_a_model_of_the_layout_or_a_layout_error(data):
    try:
        found = from_safetensors(data, one())
    except LayoutError:
        return
    assert found.vector.shape == (6,)


def test_the_good_file_of_these_tests_is_good():
    assert from_safetensors(GOOD, one()).vector.tolist() == [0.0] * 6


MISFITS: dict[str, tuple[Callable[[], bytes], str]] = {
    "missing": (lambda: file({}), "expected a tensor named 'a' in the checkpoint, found none"),
    "unexpected": (
        lambda: file({"a": entry(), "b": entry("U8", (1,), (24, 25))}, bytes(25)),
        "expected the tensors of the run's model, found 'b' besides",
    ),
    "shape": (
        lambda: file({"a": entry(shape=(3, 2))}, bytes(24)),
        r"'a': expected F32\[2, 3\], found F32\[3, 2\]",
    ),
    "dtype": (
        lambda: file({"a": entry("I32")}, bytes(24)),
        r"'a': expected F32\[2, 3\], found I32\[2, 3\]",
    ),
}


@pytest.mark.parametrize(("data", "words"), MISFITS.values(), ids=MISFITS)
def test_a_misfit_is_said_in_words(data, words):
    with pytest.raises(LayoutError, match=words):
        from_safetensors(data(), one())


def test_a_tied_or_carried_tensor_must_be_there_too():
    tied = one(tied=("b",))
    with pytest.raises(LayoutError, match="expected a tensor named 'b'"):
        from_safetensors(GOOD, tied)
    carried = Layout(one().tensors, (Carried("n", (), "int64", bytes(8)),))
    with pytest.raises(LayoutError, match="expected a tensor named 'n'"):
        from_safetensors(GOOD, carried)


def test_tied_names_whose_values_disagree_are_refused():
    data = safetensors.torch.save({"a": torch.zeros(2, 3), "b": torch.ones(2, 3)})
    with pytest.raises(LayoutError, match="'b': expected the values of 'a', with which it is tied"):
        from_safetensors(data, one(tied=("b",)))
