"""fedge: federated learning for edge fleets. This package is the core: values and pure steps, no I/O."""

from fedge.run import RunConfig
from fedge.task import Site, Task

__all__ = ["RunConfig", "Site", "Task", "__version__"]

__version__ = "0.1.0"
