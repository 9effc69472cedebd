"""Example-level privacy in the worker (DP-SGD): which models can have it, clipped sums, noisy steps."""

from fedge_client.torch.private.admission import check_private
from fedge_client.torch.private.group_norm import group_norm_for_batch_norm

__all__ = ["check_private", "group_norm_for_batch_norm"]
