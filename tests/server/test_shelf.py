"""A vector can be fetched by those whose order names it, while it does, and by nobody else."""

from __future__ import annotations

import gc
import weakref

import numpy as np

from fedge.vector import Array, digest_of
from fedge.wire.limits import INLINE_BYTES
from fedge_server.shelf import Shelf


def vector(value: float, size: int = 4) -> Array:
    return np.full(size, value, np.float32)


def test_what_is_published_is_described_by_size_and_digest_and_inline_when_small():
    shelf = Shelf()
    small, large = vector(1.0), vector(2.0, INLINE_BYTES)
    blobs = shelf.replace([small, large])
    assert [blob.size for blob in blobs] == [small.nbytes, large.nbytes]
    assert [blob.digest for blob in blobs] == [digest_of(small), digest_of(large)]
    assert blobs[0].inline == small.tobytes()
    assert not blobs[1].HasField("inline")
    (empty,) = shelf.replace([small[:0]])
    assert (empty.size, empty.inline) == (0, b"")


def test_only_a_client_with_an_order_finds_what_the_order_names():
    shelf = Shelf()
    model = vector(1.0)
    (blob,) = shelf.replace([model])
    assert shelf.find("a", blob.digest) is None
    shelf.grant("a", "train")
    assert bytes(shelf.find("a", blob.digest) or b"") == model.tobytes()
    assert shelf.find("a", bytes(32)) is None
    assert shelf.find("b", blob.digest) is None
    shelf.withdraw("a", "train")
    assert shelf.find("a", blob.digest) is None
    shelf.withdraw("nobody", "train")


def test_an_order_of_an_earlier_model_can_still_be_fetched_until_a_newer_one_takes_its_place():
    shelf = Shelf()
    (old,) = shelf.replace([vector(1.0)])
    shelf.grant("a", "gradient")
    (new,) = shelf.replace([vector(2.0)])
    assert shelf.find("a", old.digest) is not None
    assert shelf.find("a", new.digest) is None
    shelf.grant("a", "gradient")
    assert shelf.find("a", old.digest) is None
    assert shelf.find("a", new.digest) is not None


def test_an_order_to_evaluate_and_one_to_train_may_name_models_of_different_rounds():
    """Runs without rounds move on while a model is judged."""
    shelf = Shelf()
    (judged,) = shelf.replace([vector(1.0)])
    shelf.grant("a", "evaluate")
    (newer,) = shelf.replace([vector(2.0)])
    shelf.grant("a", "gradient")
    assert shelf.find("a", judged.digest) is not None
    assert shelf.find("a", newer.digest) is not None
    shelf.withdraw("a", "gradient")
    assert shelf.find("a", judged.digest) is not None
    assert shelf.find("a", newer.digest) is None


def test_a_vector_is_not_copied_and_is_let_go_when_nobody_may_fetch_it():
    shelf = Shelf()
    model = vector(1.0)
    (blob,) = shelf.replace([model])
    shelf.grant("a", "train")
    view = shelf.find("a", blob.digest)
    assert view is not None
    assert np.shares_memory(np.frombuffer(view, np.float32), model)
    gone = weakref.ref(model)
    del view, model
    shelf.replace([vector(2.0)])
    gc.collect()
    assert gone() is not None, "its order is open"
    shelf.grant("a", "train")
    gc.collect()
    assert gone() is None
    shelf.clear()
    assert shelf.find("a", digest_of(vector(2.0))) is None
