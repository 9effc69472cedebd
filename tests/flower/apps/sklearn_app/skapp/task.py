"""A logistic regression, and a node's part of the breast cancer data that come with scikit-learn."""

import warnings

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

FEATURES = 30

warnings.filterwarnings("ignore", category=ConvergenceWarning)  # a round is one iteration


def new_model() -> LogisticRegression:
    model = LogisticRegression(max_iter=1, warm_start=True)
    model.classes_ = np.array([0, 1])
    return set_arrays(model, [np.zeros((1, FEATURES)), np.zeros(1)])


def get_arrays(model: LogisticRegression) -> list[np.ndarray]:
    return [model.coef_, model.intercept_]


def set_arrays(model: LogisticRegression, arrays: list[np.ndarray]) -> LogisticRegression:
    model.coef_, model.intercept_ = arrays
    return model


def load_data(partition: int, partitions: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    data = load_breast_cancer()
    values = (data.data - data.data.mean(0)) / data.data.std(0)
    own, labels = values[partition::partitions], data.target[partition::partitions]
    cut = int(0.8 * len(labels))
    return own[:cut], labels[:cut], own[cut:], labels[cut:]
