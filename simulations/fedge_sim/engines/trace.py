"""A traced step with less in it: for a small model what a step costs is how many operations it has.

`simplified` does only what cannot change a bit: operations that do nothing for the shapes that were traced are left
out, those that are there twice are done once, and what does not depend on the arguments is made beforehand. What is
traced `IN_PARTS` is the same to float32's rounding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

_aten = torch.ops.aten
_SHAPERS: Final = frozenset(
    (_aten.expand.default, _aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)  # its name
)
_norm = _aten.linalg_vector_norm.default
_FEW: Final = 64
_MOST_CONSTANT: Final = 1 << 18
"""Numbers of a tensor that is made beforehand."""


def _log_softmax(values: torch.Tensor, axis: int, widened: bool) -> Any:
    """The log softmax of few classes, for which torch's own takes three times as long."""
    if widened or values.shape[axis] > _FEW:
        return NotImplemented
    shifted = values - values.amax(axis, keepdim=True)
    return shifted - shifted.exp().sum(axis, keepdim=True).log()


def _log_softmax_backward(slope: torch.Tensor, found: torch.Tensor, axis: int, to: torch.dtype) -> Any:
    if to != found.dtype or found.shape[axis] > _FEW:
        return NotImplemented
    return slope - found.exp() * slope.sum(axis, keepdim=True)


IN_PARTS: Final[Mapping[torch._ops.OpOverload[..., Any], Callable[..., Any]]] = {  # its type
    _aten._log_softmax.default: _log_softmax,  # its names
    _aten._log_softmax_backward_data.default: _log_softmax_backward,
}
"""What a trace has in parts, since that is faster: the same to float32's rounding."""


def simplified(traced: GraphModule, device: torch.device | None = None) -> GraphModule:
    """The same function of arguments of the same shapes, to the bit. Changes what it is given, which was traced with
    arguments on that device."""
    graph = traced.graph
    operations = [node for node in graph.nodes if node.op == "call_function"]
    # One that writes to what another has made: then two that look the same may not be.
    if not all(_is_pure(node) for node in operations):
        return traced
    known: dict[Any, Node] = {}
    for node in operations:
        if (same := _same(node)) is None:
            same = known.setdefault((node.target, _frozen(node.args), _frozen(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
    for node in list(graph.nodes):
        if (value := _constant(node, device)) is not None:
            _precompute(traced, node, value)
    graph.eliminate_dead_code()
    graph.lint()
    traced.recompile()
    return traced


def with_short_norms(traced: GraphModule) -> GraphModule:
    """With the norm of a column times a row, as the gradient of a layer's weight by one example is, as the product of
    their norms: the same to float32's rounding, and the matrix need not be made. Changes what it is given."""
    graph = traced.graph
    for node in list(graph.nodes):
        factors, found = _column_and_row(node), _shape(node)
        if factors is not None and found is not None:
            with graph.inserting_before(node):
                norms = [graph.call_function(_norm, (each, 2, [1, 2])) for each in factors]
                product = graph.call_function(_aten.mul.Tensor, tuple(norms))
                node.replace_all_uses_with(graph.call_function(_aten.view.default, (product, list(found[0]))))
    graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _column_and_row(node: Node) -> tuple[Node, Node] | None:
    """Of the products [n, rows, 1] x [n, 1, columns] whose norms a node is; None if it is none of such."""
    arguments: tuple[Any, ...] = node.args
    if node.target is not _norm or arguments[1:2] != (2,) or len(arguments) != 3 or node.kwargs:
        return None
    inner, before = arguments[0], _shape(arguments[0])
    while inner.target in _SHAPERS and inner.target is not _aten.expand.default:
        inner = inner.args[0]
    if inner.target is not _aten.bmm.default or before is None:
        return None
    product, column = _shape(inner), _shape(inner.args[0])
    if product is None or column is None or column[0][2] != 1:
        return None
    each = product[0][1] * product[0][2]
    last = len(before[0]) - 1
    return inner.args if arguments[2] == [last] and before[0][last] == each else None


def uses_last(traced: GraphModule) -> bool:
    """Whether the last argument means anything to what was traced: where a device hides its tensors from a trace, all
    of them are constants in it."""
    return bool([node for node in traced.graph.nodes if node.op == "placeholder"][-1].users)


def changes_arguments(traced: GraphModule) -> bool:
    """Whether something that was traced writes to what the function was given, or may."""
    operations = (node for node in traced.graph.nodes if node.op == "call_function")
    return any(not _is_pure(node) and not _is_made(node.args[0]) for node in operations)


def _is_made(node: Any) -> bool:
    """Whether the memory of a value was made on the way."""
    while isinstance(node, Node) and node.op == "call_function":
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":  # its type
            return False
        returned = node.target._schema.returns  # there is no other way to ask
        if all(each.alias_info is None for each in returned):
            return True
        node = node.args[0]  # it looks at that, or has written to it
    return False


def flat(traced: GraphModule) -> Callable[..., list[torch.Tensor]]:
    """Called with all its arguments in a row, to give all its results so: without what torch.fx does for each call to
    fold and unfold them. Changes what it is given."""
    traced.graph.set_codegen(CodeGen())
    traced.recompile()
    forward: Callable[..., list[torch.Tensor]] = traced.forward
    return forward


def _is_pure(node: Node) -> bool:
    """Whether an operation is torch's own, and changes none of its arguments."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":  # its type
        return False
    return not node.target._schema.is_mutable  # there is no other way to ask


def _same(node: Node) -> Node | None:
    """The node whose value this one's is, if it does nothing."""
    arguments: tuple[Any, ...] = node.args
    inner = arguments[0] if arguments else None
    if not isinstance(inner, Node):
        return None
    alike = _shape(node) is not None and _shape(node) == _shape(inner)
    if alike and (node.target in _SHAPERS or (node.target is _aten.mul.Scalar and arguments[1] == 1)):
        return inner
    if node.target is _aten.transpose.int and inner.target is _aten.transpose.int:
        before: tuple[Any, ...] = inner.args
        shape = _shape(node)
        if shape is not None and _axes(arguments, len(shape[0])) == _axes(before, len(shape[0])):
            return before[0] if isinstance(before[0], Node) else None
    return None


def _axes(arguments: tuple[Any, ...], count: int) -> set[int]:
    """Those that a transposition changes."""
    return {axis % count for axis in arguments[1:3]}


def _shape(node: Node) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Of the tensor that was seen here, with its type."""
    meta: Any = node.meta.get("tensor_meta")
    return (tuple(meta.shape), meta.dtype) if hasattr(meta, "shape") else None


def _constant(node: Node, device: torch.device | None) -> torch.Tensor | None:
    """What a node always is, whatever the arguments; None if it depends on them, or is large."""
    seen = _shape(node)
    if node.op != "call_function" or seen is None or math.prod(seen[0]) > _MOST_CONSTANT:
        return None
    if node.target is _aten.scalar_tensor.default:
        arguments: Any = node.args
        at: Any = node.kwargs.get("device", device)
        return torch.full(seen[0], arguments[0], dtype=seen[1], device=at)
    if node.target is _aten.ones_like.default:
        return torch.ones(seen[0], dtype=seen[1], device=device)
    if node.target is _aten.new_zeros.default:
        return torch.zeros(seen[0], dtype=seen[1], device=device)
    return None


def _precompute(traced: GraphModule, node: Node, value: torch.Tensor) -> None:
    name = f"constant_{node.name}"
    traced.register_buffer(name, value)
    with traced.graph.inserting_before(node):
        node.replace_all_uses_with(traced.graph.get_attr(name))
    traced.graph.erase_node(node)


def _frozen(value: Any) -> Any:
    """Arguments as what can be looked up; numbers of different types are different."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(each) for each in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(each)) for key, each in value.items())
    return value if isinstance(value, Node) else (type(value), value)
