"""What a torch module holds, as a Layout: which tensors, under which names, in which role.

Read-only: nothing here moves a tensor. What cannot live in a flat vector is refused here, by name.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.parameter import is_lazy

from fedge.errors import LayoutError
from fedge.vector import FLOATS, INTEGERS, Carried, Layout, Role, Tensor

_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MAX_OVERLAP_WORK = 1_000_000


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One tensor of a module: the object itself and every name under which the state dict shows it.

    `role` is None for integers and booleans, which are carried beside the flat vector.
    """

    names: tuple[str, ...]
    value: torch.Tensor
    role: Role | None


def layout_of(module: torch.nn.Module) -> Layout:
    """The names, shapes, dtypes and roles of a module's state dict.

    Raises:
        LayoutError: the module holds something that a flat float32 vector cannot: see `parts_of`.
    """
    return layout_from(parts_of(module))


def layout_from(parts: tuple[Part, ...]) -> Layout:
    """The layout of parts in state-dict order."""
    tensors, carried = [], []
    for part in parts:
        shape, dtype = tuple(part.value.shape), dtype_name(part.value)
        if part.role is not None:
            tensors.append(Tensor(part.names[0], shape, dtype, part.role, part.names[1:]))
        else:
            array = part.value.detach().numpy()
            data = array.astype(array.dtype.newbyteorder("<")).tobytes()
            carried += [Carried(name, shape, dtype, data) for name in part.names]
    return Layout.of(tensors, carried)


def parts_of(module: torch.nn.Module) -> tuple[Part, ...]:
    """Every tensor of the module's state dict, in its order, each once.

    Raises:
        LayoutError: a tensor is lazy, quantised, sparse, complex, of another unknown dtype, not on the
            CPU, made in inference mode, or shares memory with another without being the same object;
            or the state dict holds what is neither a parameter nor a persistent buffer.
    """
    parameters = {id(p): (name, p) for name, p in module.named_parameters()}
    buffers = {id(b): (name, b) for name, b in module.named_buffers()}
    held: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in parameters and id(value) not in buffers:
            raise LayoutError(
                f"{name!r}: expected a parameter or a buffer in the state dict, found a "
                f"{type(value).__name__} that a hook or get_extra_state put there; keep it out of the model"
            )
        held.setdefault(id(value), (value, []))[1].append(name)
    for key, (name, _) in parameters.items():
        if key not in held:
            raise LayoutError(
                f"{name!r}: expected every parameter in the state dict, found none; unregister it"
            )
    for value, names in held.values():
        _check(names[0], value)
    transient = [(name, b) for key, (name, b) in buffers.items() if key not in held and is_plain(b)]
    _check_overlaps([(names[0], value) for value, names in held.values()] + transient)
    return tuple(
        Part(tuple(names), value, _role(value, id(value) in parameters)) for value, names in held.values()
    )


def dtype_name(value: torch.Tensor) -> str:
    """The dtype as a Layout spells it."""
    return str(value.dtype).removeprefix("torch.")


def is_plain(value: torch.Tensor) -> bool:
    """Whether the tensor is initialised strided memory on the CPU."""
    return not is_lazy(value) and value.layout == torch.strided and value.device.type == "cpu"


def repeats_itself(value: torch.Tensor) -> bool:
    """Whether two indices of the tensor may name one element, as in the result of `expand`."""
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _role(value: torch.Tensor, is_parameter: bool) -> Role | None:
    if dtype_name(value) not in FLOATS:
        return None
    if not is_parameter:
        return "buffer"
    return "trainable" if value.requires_grad else "frozen"


def _check(name: str, value: torch.Tensor) -> None:
    if is_lazy(value):
        raise LayoutError(
            f"{name!r}: expected an initialised tensor, found a lazy one; run a batch through the model "
            "before model() returns it"
        )
    if value.layout != torch.strided:
        raise LayoutError(f"{name!r}: expected a dense tensor, found layout {value.layout}; call .to_dense()")
    if value.device.type != "cpu":
        raise LayoutError(
            f"{name!r}: expected a tensor on the CPU, found one on {value.device}; build it there"
        )
    if dtype_name(value) not in FLOATS + INTEGERS:
        raise LayoutError(
            f"{name!r}: expected a dtype of {', '.join(FLOATS + INTEGERS)}, found {dtype_name(value)}; "
            "convert it, or register it with persistent=False if it is a constant"
        )
    if value.is_inference():
        raise LayoutError(
            f"{name!r}: expected a tensor made outside torch.inference_mode(), found one made inside"
        )
    if repeats_itself(value):
        raise LayoutError(
            f"{name!r}: expected an element of memory per element, found an expanded one; clone() it"
        )


def _check_overlaps(named: list[tuple[str, torch.Tensor]]) -> None:
    """Two views of one memory would be trained twice, or go stale once the parts have moved."""
    spans = sorted((*_span(value), at) for at, (_, value) in enumerate(named) if value.numel())
    reaching: list[tuple[int, int]] = []  # (end, which) of the spans that may still reach the next one
    for start, end, at in spans:
        reaching = [(other_end, other) for other_end, other in reaching if other_end > start]
        for _, other in reaching:
            if _share(named[at][1], named[other][1]):
                first, second = sorted((named[at][0], named[other][0]))
                raise LayoutError(
                    f"expected {first!r} and {second!r} in memory of their own, found them overlapping; "
                    "clone() one, or tie them by assigning the same Parameter to both names"
                )
        reaching.append((end, at))


def _span(value: torch.Tensor) -> tuple[int, int]:
    last = sum(stride * (size - 1) for stride, size in zip(value.stride(), value.shape, strict=True))
    return value.data_ptr(), value.data_ptr() + value.element_size() * (last + 1)


def _share(one: torch.Tensor, other: torch.Tensor) -> bool:
    try:
        return np.shares_memory(_bits(one), _bits(other), max_work=_MAX_OVERLAP_WORK)  # type: ignore[arg-type]  # stubs: -1, 0
    except np.exceptions.TooHardError:
        return True  # interleaved beyond what can be decided: refused, as any doubt is


def _bits(value: torch.Tensor) -> npt.NDArray[np.generic]:
    """The tensor's memory as integers: numpy has no bfloat16."""
    value = torch.view_as_real(value.detach()) if value.is_complex() else value.detach()
    return value.view(_SAME_SIZE[value.element_size()]).numpy()
