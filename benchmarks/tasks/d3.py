"""D3: the CNN of W1 between two sites, a gradient on a batch of 16 a round."""

from __future__ import annotations

from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from benchmarks.tasks import w1
from benchmarks.tasks.marks import Marks
from fedge import Site, Task

_marks = Marks()


def data(site: Site) -> tuple[TensorDataset, TensorDataset]:
    _marks.open(site)
    return w1.data(site)


task = Task(model=w1.model, data=data, loss=_marks.around(cross_entropy))
