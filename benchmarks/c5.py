"""C5: 500 rounds of D1's task between 2 real clients: what grows with them. No floor.

Every 25 rounds a moment is kept, and the memory and the open files of the three processes are looked at,
while they go on; a worker is not its agent's, and counted apart.
"""

from __future__ import annotations

import threading
from pathlib import Path

import psutil

from benchmarks import fedge_side
from benchmarks.measure import FEDGE, Case, Goal, Options, Sample, Side, memory
from benchmarks.tasks.workload import D1

_CLIENTS = 2
_EVERY = 25
_FROM = 100
_POLL_S = 0.002
_MARK_BYTES = 8
_GROWTH = 0.02
_STATE_MB = 5.0
_DEADLINE_S = 600.0


def cases(options: Options) -> list[Case]:
    rounds = 200 if options.quick else 500

    return [
        Case(
            "C5",
            f"{rounds} rounds in one go",
            (Side.of(FEDGE, lambda: _soak(rounds, options)),),
            (
                Goal.of_fedge("the coordinator's memory after round 100, growth", _GROWTH, "server_growth_x"),
                Goal.of_fedge("an agent's memory after round 100, growth", _GROWTH, "agent_growth_x"),
                Goal.of_fedge(
                    "the coordinator's open files, beyond those at round 100",
                    0.0,
                    "server_more_files",
                    "files",
                ),
                Goal.of_fedge(
                    "an agent's open files, beyond those at round 100", 0.0, "agent_more_files", "files"
                ),
                Goal.of_fedge("database, checkpoints and spool", _STATE_MB, "state_bytes", "MB", per=1e6),
            ),
        )
    ]


def _soak(rounds: int, options: Options) -> Sample:
    work = {"steps": 1, "batch_size": D1.batch_size, "learning_rate": D1.learning_rate}
    run = fedge_side.run_toml("benchmarks.tasks.d1:task", rounds=rounds, cohort=_CLIENTS, work=work)
    run += f"\n[checkpoint]\nrounds = {_EVERY}\n"
    with fedge_side.deployment("c5", clients=_CLIENTS, options=options) as deployed:
        pids = {"server": deployed.server.pid} | {
            f"agent_{number}": agent.pid for number, agent in enumerate(deployed.agents)
        }
        with Watch(pids, marks=deployed.folder / "marks-0") as watch:
            finished = deployed.run(run, rounds=rounds, deadline_s=_DEADLINE_S)
        state, spool = (_bytes_in(deployed.folder / "server" / name) for name in ("state", "spool"))
        checkpoints = len(list((deployed.folder / "server" / "state").rglob("*.safetensors")))
    agents = [name for name in pids if name != "server"]
    values = finished.values() | {
        "server_growth_x": watch.growth("server"),
        "agent_growth_x": max(watch.growth(name) for name in agents),
        "server_more_files": watch.more_files("server"),
        "agent_more_files": max(watch.more_files(name) for name in agents),
        "server_rss_bytes": watch.memory["server"][-1],
        "agent_rss_bytes": max(watch.memory[name][-1] for name in agents),
        "server_files": watch.files["server"][-1],
        "state_bytes": float(state + spool),
        "spool_bytes": float(spool),
        "checkpoints": float(checkpoints),
    }
    series = {f"{name}_rss_bytes": found for name, found in watch.memory.items()}
    series |= {f"{name}_files": found for name, found in watch.files.items()}
    return Sample(values, rounds=rounds - 1, series=series)


class Watch:
    """Looks at processes every 25 rounds, which a site's marks tell; a list of numbers for each."""

    def __init__(self, pids: dict[str, int], *, marks: Path) -> None:
        self.memory: dict[str, list[float]] = {name: [] for name in pids}
        self.files: dict[str, list[float]] = {name: [] for name in pids}
        self._pids = pids
        self._marks = marks
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def growth(self, name: str) -> float:
        """Growth of memory from round 100 to the last look, as a share."""
        return self.memory[name][-1] / self.memory[name][_FROM // _EVERY - 1] - 1

    def more_files(self, name: str) -> float:
        """Growth of open files from round 100 on: the least of the later looks less the least of the earlier.

        A single look may find a file that is open for a moment.
        """
        looks = self.files[name][_FROM // _EVERY - 1 :]
        half = len(looks) // 2
        return min(looks[half:]) - min(looks[:half])

    def _watch(self) -> None:
        while not self._done.wait(_POLL_S):
            rounds = self._marks.stat().st_size // _MARK_BYTES if self._marks.exists() else 0
            if rounds >= _EVERY * (1 + len(self.memory["server"])):
                for name, pid in self._pids.items():
                    self.memory[name].append(float(memory(pid, "VmRSS")))
                    self.files[name].append(float(psutil.Process(pid).num_fds()))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
