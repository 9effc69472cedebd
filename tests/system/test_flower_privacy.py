"""A Flower app whose sites protect their examples, on a coordinator: what arrives there, and what the ledgers say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from harness import coordinator, fedge_ok

from fedge.privacy.mechanism import Gaussian
from fedge_client.apps.installed import app_in
from fedge_client.ledger_file import read_only

APP = Path(__file__).parents[1] / "flower/apps/private_app"


def test_only_noised_arrays_leave_until_the_budget_is_spent(tmp_path: Path):
    report = tmp_path / "report.json"
    with coordinator(tmp_path / "federation") as federation:
        for site in range(2):
            ledgers = str(tmp_path / f"ledgers-{site}")
            nodes = [{"partition-id": 2 * site + at, "fedge-ledger": ledgers} for at in range(2)]
            federation.enrol(f"site-{site}", flower={"apps": {app_in(APP)[0]: str(APP)}, "nodes": nodes})
            federation.start(f"site-{site}")
        config = f"report.path={json.dumps(str(report))}"
        fedge_ok(
            "flower", "run", APP, "--admin", federation.admin_toml, "--nodes", "4", "--run-config", config
        )
    found = json.loads(report.read_text())
    replies = [reply for answered in found["rounds"][:6] for reply in answered]
    assert all(reply["records"] == ["arrays", "metrics"] for reply in replies)
    assert all(reply["metrics"] == {"num-examples": 1} for reply in replies)
    assert len({tuple(reply["weight"]) for reply in replies}) == len(replies) == 24
    # What is said of the budget does not tell what is left of it, and is all that comes from then on.
    refusals = {reply for answered in found["rounds"][6:] for reply in answered}
    assert refusals == {"refused: this site's privacy budget does not allow this; see the site's log"}
    assert np.allclose(found["weight"], [[1.0, -2.0, 0.5]], atol=0.2)
    for partition in range(4):
        folder = tmp_path / f"ledgers-{partition // 2}"
        books = read_only(folder, f"partition-{partition}", head_folder=folder / "heads").books
        assert books.spent().mechanisms == (Gaussian(6.0, 60),)
