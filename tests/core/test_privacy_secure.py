"""Noise and samples: what is drawn from a key has the distribution that the accountant prices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedge.privacy.secure import SecureSource


def source(key: int = 1) -> SecureSource:
    return SecureSource(key.to_bytes(32, "big"))


def gaussian(count: int, deviation: float = 1.0, key: int = 1) -> np.ndarray:
    out = np.zeros(count, np.float32)
    source(key).add_gaussian(out, deviation)
    return out


@pytest.mark.parametrize("deviation", [1e-3, 1.0, 40.0])
def test_noise_is_gaussian(deviation):
    found = gaussian(400_001, deviation).astype(np.float64) / deviation
    assert stats.kstest(found, "norm").pvalue > 1e-3
    assert abs(found.mean()) < 5 / math.sqrt(len(found))
    assert abs(found.std() - 1) < 5 / math.sqrt(2 * len(found))
    assert abs(stats.kurtosis(found)) < 5 * math.sqrt(24 / len(found))


def test_tails_are_as_heavy_as_they_should_be():
    found = np.abs(gaussian(4_000_000))
    for bound in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(bound) * len(found)
        assert abs((found > bound).sum() - expected) < 5 * math.sqrt(expected)
    assert found.max() > 4.7


def test_radii_reach_as_far_as_a_statement_about_delta_needs(monkeypatch: pytest.MonkeyPatch):
    """From a word of 0 alone the largest would be 6.77: an example could move an output to where noise never gets."""
    source, vector = SecureSource(bytes(32)), np.zeros(2, np.float32)
    monkeypatch.setattr(SecureSource, "uint32", lambda self, count: np.zeros(count, np.uint32))
    radii = []
    for fine in (0, 1 << 32, 1 << 63):
        monkeypatch.setattr(
            SecureSource, "uint64", lambda self, count, fine=fine: np.full(count, fine, np.uint64)
        )
        vector[:] = 0
        source.add_gaussian(vector, 1.0)
        radii.append(float(vector[0]) + 1 / 32)  # without what smears them
    uniform = [(fine + 0.5) * 2.0**-96 for fine in (0, 1 << 32, 1 << 63)]
    np.testing.assert_allclose(radii, np.sqrt(-2 * np.log(uniform)), atol=1e-4)
    assert radii[0] == pytest.approx(11.596, abs=1e-3)


@pytest.mark.parametrize("deviation", [1.0, 3.7, 1e-9])
@pytest.mark.parametrize("what", ["nothing", "a little", "much"])
def test_what_comes_out_lies_on_one_grid_whatever_went_in(deviation: float, what: str):
    """Low bits that depend on what was there would tell it; so would an uneven use of the grid."""
    size, generator = 400_000, np.random.default_rng(5)
    scale = {"nothing": 0.0, "a little": 1e-3, "much": 30.0}[what] * deviation
    vector = (generator.standard_normal(size) * scale).astype(np.float32)
    SecureSource(bytes(32)).add_gaussian(vector, deviation)
    step = 2.0 ** (np.floor(np.log2(deviation)) - 14)
    places = vector.astype(np.float64) / step
    assert np.array_equal(places, np.rint(places))
    # Far from zero float32 rounds to halves of a step first, and of those the even neighbour is taken.
    for parts in (2, 7, 64) if what != "much" else ():
        counts = np.bincount(places.astype(np.int64) % parts, minlength=parts)
        assert stats.chisquare(counts).pvalue > 1e-4


def test_nothing_tells_whether_a_number_is_one_that_the_noise_alone_can_be():
    """Undo Box and Muller: were the largest radii those of single words, whoever sees a vector could tell nothing
    from a gradient that is there, by whether it comes to whole numbers."""
    first, second = gaussian(1 << 24).astype(np.float64).reshape(2, -1)
    word = np.exp(-(first**2 + second**2) / 2) * 2.0**32 - 0.5
    word = word[(word > 1) & (word < 1 << 16)]
    assert len(word) > 100
    assert stats.kstest(word - np.rint(word), stats.uniform(-0.5, 1).cdf).pvalue > 1e-3


def test_its_parts_are_independent():
    found = gaussian(400_000)
    half = len(found) // 2
    for a, b in [(found[:half], found[half:]), (found[:-1], found[1:]), (found[:-32768], found[32768:])]:
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(len(a))
        assert abs(np.corrcoef(a**2, b**2)[0, 1]) < 5 / math.sqrt(len(a))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 65535, 65536, 65537, 131073])
def test_every_element_has_noise_of_its_own(count):
    found = gaussian(count)
    assert np.count_nonzero(found) >= 0.9999 * count  # a 40,000th is rounded to zero
    assert len(np.unique(found)) >= min(0.98 * count, 30_000)


def test_noise_is_added_to_what_is_there():
    out = np.full(1000, 5.0, np.float32)
    source().add_gaussian(out, 0.0)
    np.testing.assert_array_equal(out, np.full(1000, 5.0, np.float32))
    source().add_gaussian(out, 0.1)
    assert abs(out.mean() - 5) < 0.05


def test_keys_differ_and_calls_go_on():
    one = source(1)
    words = [one.uint32(100), one.uint32(100), source(2).uint32(100)]
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert not np.intersect1d(words[a], words[b]).size
    np.testing.assert_array_equal(source(1).uint32(100), words[0])
    assert repr(one) == "SecureSource()"
    with pytest.raises(ValueError, match="32 bytes"):
        SecureSource(bytes(16))


def test_words_are_uniform():
    words = source().uint64(100_000)
    bits = np.unpackbits(words.view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / math.sqrt(len(words))


@pytest.mark.parametrize("rate", [0.001, 0.2, 0.9])
def test_each_example_is_sampled_by_itself_with_the_rate(rate):
    size, draws = 400, 2000
    of = source()
    member = np.zeros((draws, size), bool)
    for draw in range(draws):
        member[draw, of.poisson_sample(size, rate)] = True
    counts = member.sum(axis=0)
    bound = 5 * math.sqrt(draws * rate * (1 - rate)) + 1
    assert np.abs(counts - draws * rate).max() < bound
    # The number of examples is binomial, not fixed: its variance is what independence gives.
    sizes = member.sum(axis=1)
    assert abs(sizes.mean() - size * rate) < 5 * math.sqrt(size * rate * (1 - rate) / draws)
    assert sizes.var() == pytest.approx(size * rate * (1 - rate), rel=0.2)


def test_the_edges_of_a_sample():
    assert source().poisson_sample(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert source().poisson_sample(0, 0.5).tolist() == []
    assert source().poisson_sample(1000, 1e-30).tolist() == []
    for rate in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="sampling_rate"):
            source().poisson_sample(5, rate)
