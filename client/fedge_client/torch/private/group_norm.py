"""Batch normalisation, which mixes the examples of a batch, replaced by group normalisation, which does not."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

MAX_GROUPS = 32
MIN_CHANNELS = 4
"""Channels in a group, at least: with one a group of a flat input has nothing to be normalised against."""


def group_norm_for_batch_norm(module: nn.Module) -> nn.Module:
    """The module with a GroupNorm in place of every BatchNorm; it is changed in place, a lone BatchNorm aside.

    Weights and biases of the normalisation go on under their names, as the same Parameters; its running
    statistics are gone. Call it once, in the task's `model()`, before a run exists: it changes what the
    model computes. As many groups as divide the channels, up to 32 of at least 4 channels each (Wu and He
    2018 use 32); a prime number of channels becomes one group.
    """
    replaced: dict[int, nn.Module] = {}
    if isinstance(module, _BatchNorm):
        return _group_norm(module)
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                parent.add_module(name, replaced.setdefault(id(child), _group_norm(child)))
    # named_children gives a module of two names once: the second still holds what was replaced.
    for parent in list(module.modules()):
        for name, held in list(parent._modules.items()):
            if held is not None and id(held) in replaced:
                parent.add_module(name, replaced[id(held)])
    return module


def _group_norm(batch_norm: _BatchNorm) -> nn.GroupNorm:
    channels = batch_norm.num_features
    groups = max(
        count
        for count in range(1, min(MAX_GROUPS, channels) + 1)
        if channels % count == 0 and (count == 1 or channels // count >= MIN_CHANNELS)
    )
    found = nn.GroupNorm(groups, channels, eps=batch_norm.eps, affine=False)
    if batch_norm.affine:
        found.affine = True
        found.weight, found.bias = batch_norm.weight, batch_norm.bias
    found.train(batch_norm.training)
    return found


def is_batch_norm(module: torch.nn.Module) -> bool:
    """Whether a module normalises by statistics of the batch (any BatchNorm, SyncBatchNorm, a lazy one)."""
    return isinstance(module, _BatchNorm)
