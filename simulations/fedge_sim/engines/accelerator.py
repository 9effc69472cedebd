"""The accelerator that a simulation's stacks lie on: found, asked for its size, and held to the same bits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from fedge.errors import ConfigError

HOST: Final = torch.device("cpu")
"""Where this machine's own memory is."""

_UNKNOWN_BYTES: Final = 1 << 32
"""What an accelerator is taken to have that does not say."""


def accelerator(name: str) -> torch.device | None:
    """The device of this name ("cuda", "cuda:1", "xpu"); None for "cpu", which is this machine's own memory.

    Raises:
        ConfigError: there is none, or it has no float64, in which exact means are made.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(
            f"device: expected cpu, or an accelerator by torch's name such as cuda or cuda:1, found {name[:80]!r}"
        ) from None
    if device.type == "cpu":
        return None
    try:
        torch.ones(1, dtype=torch.float64, device=device).add(1.0).cpu()
    except Exception as error:  # noqa: BLE001  # each kind of device has another way of not being there
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"device {name[:80]}: torch {torch.__version__} cannot compute there in float64 ({why[:200]}); "
            f"it finds {_present()}"
        ) from None
    return device


def memory(device: torch.device) -> int:
    """Bytes that a device has, whoever uses them: the size of a stack, and so its bits, must not depend on them."""
    try:
        return int(torch.accelerator.get_memory_info(device)[1])
    except (AttributeError, RuntimeError, ValueError, TypeError):
        return _UNKNOWN_BYTES


@contextmanager
def reproducible(device: torch.device | None) -> Iterator[None]:
    """Have torch compute on a device as on a processor: to float32's precision, and to the same bits each time.

    An operation of which the device has no such form is warned of, by torch.
    """
    if device is None:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by CUDA when it is first used
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    precision = torch.get_float32_matmul_precision()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _present() -> str:
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return "no accelerator on this machine"
    return ", ".join(f"{kind.type}:{number}" for number in range(torch.accelerator.device_count()))
