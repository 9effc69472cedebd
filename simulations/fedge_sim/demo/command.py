"""`fedge demo`: the first thing a visitor runs. Real processes, real TLS, real data; it ends by itself."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from fedge.console import plain_console
from fedge.errors import ConfigError


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the trained models go.")] = Path(
        "demo-results"
    ),
    keep: Annotated[bool, typer.Option(help="Keep keys and logs, and say where.")] = False,
) -> None:
    """Run a coordinator and five hospitals on this machine, on real medical data, with differential privacy.

    First FedAvg, then MirroredSGD; at the end, what each hospital's ledger has counted.

    Example: fedge demo
    """
    try:
        from fedge_sim.demo.federation import Federation
        from fedge_sim.demo.summary import Outcome, baselines, federated_accuracy, print_summary
    except ModuleNotFoundError as error:
        raise ConfigError(f"the demo needs {error.name}: pip install 'fedge[demo]'") from error
    console = plain_console()
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fedge-demo-"))
    try:
        with contextlib.ExitStack() as stack:
            federation = stack.enter_context(Federation.started(folder, console=console))
            outcomes: list[Outcome] = []
            for name in ("fedavg", "mirrored_sgd"):
                run = federation.run(name, model=out / f"{name}.safetensors")
                outcomes.append(Outcome(run, federated_accuracy(out / f"{name}.safetensors")))
        console.print("training each hospital alone, and all of them pooled, to compare ...")
        print_summary(console, baselines(), outcomes, out=out, seconds=time.monotonic() - began)
    except KeyboardInterrupt:
        console.print("interrupted: every process of the demo was ended")
        raise
    finally:
        if keep:
            console.print(f"keys and logs are in {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)
