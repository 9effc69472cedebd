"""Terms of privacy: their numbers are such that noise in float32 can keep them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedge.errors import RemoteProtocolError
from fedge.privacy.config import LARGEST, SMALLEST
from fedge.privacy.secure import SecureSource
from fedge.privacy.terms import Terms
from fedge.wire.codec import decode_terms, encode_terms

TERMS = Terms("client", 1e-5, 1.0, 3, 1, noise_multiplier=2.0, evaluation_noise_multiplier=9.0)
NUMBERS = ("clip", "noise_multiplier", "evaluation_noise_multiplier", "loss_bound", "epsilon")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-10, 1e10, math.inf, math.nan])
def test_numbers_that_noise_cannot_keep_are_refused_also_in_an_offer(name: str, value: float):
    fields: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=f"{name}: expected a number from 1e-09 to 1e\\+09"):
        replace(TERMS, **fields)
    message = encode_terms(TERMS)
    setattr(message, name, value)
    with pytest.raises(RemoteProtocolError, match=name):
        decode_terms(message)


@pytest.mark.parametrize("deviation", [SMALLEST**2 / 2**20, LARGEST**2 * 2**20])
def test_all_others_can_be_kept_also_where_a_clip_has_adapted_as_far_as_it_may(deviation: float):
    vector = np.zeros(10_000, np.float32)
    SecureSource(bytes(32)).add_gaussian(vector, deviation)
    assert vector.astype(np.float64).std() / deviation == pytest.approx(1, abs=0.05)
