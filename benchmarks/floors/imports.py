"""The agent's floor in memory: a process that has imported what any gRPC client with numpy needs.

Prints {"rss_bytes": N}.
"""

from __future__ import annotations

import json
import os

import cryptography.x509
import google.protobuf.message
import grpc.aio
import numpy as np

from benchmarks.measure import memory

IMPORTED = (np, grpc.aio, google.protobuf.message, cryptography.x509)

if __name__ == "__main__":
    print(json.dumps({"rss_bytes": memory(os.getpid(), "VmRSS")}))
