"""What a message asks a node to return: a setting of fedge's own beside the app's."""

from __future__ import annotations

from typing import Final, Literal

from flwr.app import RecordDict

WORK_KEY: Final = "fedge-work"
"""In the settings of a message: what a node is to return, "train" (its arrays) or "gradient" (theirs)."""


def work_kind_of(content: RecordDict) -> Literal["train", "gradient"]:
    """What a message's settings say; "train" where they say nothing."""
    asked = any(config.get(WORK_KEY) == "gradient" for config in content.config_records.values())
    return "gradient" if asked else "train"
