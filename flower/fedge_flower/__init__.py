"""What fedge knows of Flower: its apps, its records and its nodes. Nothing else here imports flwr but through this.

Raises:
    ConfigError: flwr is not installed, or is another version than this was made for.
"""

from fedge_flower import internals as internals
