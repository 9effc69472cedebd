"""Data that comes with a library, or from a seed: of the sizes that are said, learnable, and nobody like another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.fft import rfft

from fedge.errors import ConfigError
from fedge_sim.data.bundled import NAMES, bundled
from fedge_sim.data.dataset import dataset_of
from fedge_sim.data.synthetic import FAULTS, traffic, vibration

SHAPES = {
    "breast_cancer": (569, (30,)),
    "digits": (1797, (1, 8, 8)),
    "wine": (178, (13,)),
    "diabetes": (442, (10,)),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_bundled_set_is_divided_into_training_and_test_examples(name):
    train, test = bundled(name)
    count, shape = SHAPES[name]
    assert len(train) + len(test) == count
    assert len(test) == count // 5
    inputs, targets = train.tensors
    assert inputs.shape[1:] == shape
    assert targets.dtype == (torch.float32 if name == "diabetes" else torch.int64)
    if name == "digits":
        assert (float(inputs.min()), float(inputs.max())) == (0.0, 1.0)
    else:
        assert torch.allclose(inputs.mean(0), torch.zeros(shape), atol=1e-4)
        assert torch.allclose(inputs.std(0, correction=0), torch.ones(shape), atol=1e-4)
    again, other = bundled(name)[1], bundled(name, seed=1)[1]
    assert torch.equal(again.tensors[0], test.tensors[0])
    assert not torch.equal(other.tensors[0], test.tensors[0])


def test_a_set_that_does_not_come_with_the_library_is_refused():
    with pytest.raises(ConfigError, match="expected one of breast_cancer"):
        bundled("iris")  # type: ignore[arg-type]


def test_faults_of_bearings_can_be_told_by_their_spectrum_and_machines_are_not_alike():
    data = vibration(machines=40, windows=30, seed=2)
    inputs, labels = (tensor.numpy() for tensor in data.tensors)
    assert inputs.shape == (1200, 256)
    assert set(labels.tolist()) == set(range(len(FAULTS)))
    assert data.groups.tolist() == [machine for machine in range(40) for _ in range(30)]
    # By the nearest mean spectrum, learned on one half of the machines and judged on the other.
    features = np.log1p(np.abs(rfft(inputs, axis=1)))
    features = np.column_stack([features, 3 * np.log(inputs.std(1))])
    seen = data.groups < 20
    means = np.stack([features[seen & (labels == fault)].mean(0) for fault in range(len(FAULTS))])
    guessed = ((features[~seen, None] - means) ** 2).sum(2).argmin(1)
    assert (guessed == labels[~seen]).mean() > 0.5, "one in five by guessing"
    assert len({round(float(inputs[data.groups == machine].std()), 4) for machine in range(40)}) == 40


def test_traffic_has_its_hours_and_its_weekends_and_a_road_is_like_itself():
    data = traffic(roads=3, days=14, history=6)
    inputs, targets = (tensor.numpy() for tensor in data.tensors)
    assert inputs.shape == (3 * (14 * 288 - 6), 8)
    assert targets.shape == (len(inputs), 1)
    same = data.groups[1:] == data.groups[:-1]
    assert np.allclose(inputs[1:, 5][same], targets[:-1, 0][same])
    last = np.abs(inputs[:, 5] - targets[:, 0]).mean()
    assert last < 0.3 * targets.std(), "the next reading is like the last"
    flow = np.concatenate([np.zeros(6), targets[data.groups == 0, 0]]).reshape(14, 288)
    by_hour = flow.reshape(14, 24, 12).mean((0, 2))
    assert by_hour[[7, 8, 17]].min() > 2 * by_hour[[1, 2, 3]].max()
    days = np.sort(flow.max(1))
    assert days[4] < days[3] * 1.6, "four days of a weekend"
    assert (targets >= 0).all()


def test_a_seed_decides_and_one_machine_does_not_depend_on_how_many_there_are():
    few, many, other = (
        vibration(machines=count, windows=2, seed=seed) for count, seed in ((2, 0), (5, 0), (2, 1))
    )
    assert torch.equal(few.tensors[0], many.tensors[0][:4])
    assert not torch.equal(few.tensors[0], other.tensors[0])


@pytest.mark.parametrize("name", ["machines", "windows", "length"])
def test_nothing_cannot_be_made(name: str):
    with pytest.raises(ValueError, match=f"{name}: expected 1 or more"):
        vibration(**{"machines": 2, "windows": 2, "length": 8, name: 0})
    with pytest.raises(ValueError, match="days"):
        traffic(roads=1, days=0)


def test_parts_of_a_dataset_have_one_length():
    for targets, groups in ((np.ones(2), None), (np.ones(3), np.ones(2))):
        with pytest.raises(ValueError, match="as many targets, and groups, as inputs"):
            dataset_of(np.ones((3, 1)), targets, groups)
