"""client.toml: strict, with errors that name the file, the key and the nearest valid key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fedge.errors import ConfigError
from fedge_client.settings import ClientSettings, load_client


def load(tmp_path: Path, text: str) -> ClientSettings:
    path = tmp_path / "client.toml"
    path.write_text(text, encoding="utf-8")
    return load_client(path)


def test_a_server_is_all_that_it_takes(tmp_path: Path):
    settings = load(tmp_path, 'server = "fl.example.org:8443"')
    assert settings.server == "fl.example.org:8443"
    assert (settings.identity, settings.task.path) == (".", ".")
    assert settings.policy.tasks is None, "those in the task folder"
    assert settings.policy.coordinators is None, "the one it enrolled with"
    assert settings.data.table == {}
    assert settings.policy.limits.max_model_bytes == settings.policy.max_model_bytes == 4 << 30


def test_every_key_is_taken_over(tmp_path: Path):
    settings = load(
        tmp_path,
        """
        server = "[::1]:1"
        identity = "keys"
        [task]
        path = "code"
        [policy]
        tasks = ["app:task", "pkg.mod:other"]
        coordinators = ["aa"]
        max_runs = 2
        max_model_bytes = 1000
        [worker]
        hang_s = 5
        memory_mb = 512
        threads = 3
        [data]
        path = "/data/icu"
        columns = ["a", "b"]
        nested = { deep = { value = 1.5 } }
        """,
    )
    assert settings.policy.tasks == ["app:task", "pkg.mod:other"]
    assert (settings.worker.hang_s, settings.worker.memory_mb, settings.worker.threads) == (5.0, 512, 3)
    assert settings.data.table == {
        "path": "/data/icu",
        "columns": ["a", "b"],
        "nested": {"deep": {"value": 1.5}},
    }
    with pytest.raises(ValidationError):
        settings.policy.max_runs = 9  # type: ignore[misc]  # that it cannot be set is the point


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a key 'server', found none"),
        ('server = "host"', "server: expected HOST:PORT, found 'host'"),
        ('server = "h:99999"', "server: expected HOST:PORT"),
        ('server = "h:1"\nidentiy = "."', "unknown key 'identiy'; did you mean 'identity'"),
        ('server = "h:1"\n[polcy]', "unknown key 'polcy'; did you mean 'policy'"),
        ('server = "h:1"\n[policy]\ntask = []', "unknown key 'policy.task'; did you mean 'tasks'"),
        ('server = "h:1"\n[policy]\ntasks = "app:task"', "policy.tasks: input should be a valid list"),
        (
            'server = "h:1"\n[policy]\ntasks = ["app"]',
            "policy.tasks.0: expected 'module:attribute', found 'app'",
        ),
        (
            'server = "h:1"\n[policy]\nmax_runs = 0',
            "policy.max_runs: input should be greater than or equal to 1",
        ),
        ('server = "h:1"\n[policy]\nmax_runs = true', "policy.max_runs: input should be a valid integer"),
        ('server = "h:1"\n[worker]\nhang_s = 0', "worker.hang_s: input should be greater than 0"),
        ('server = "h:1"\n[worker]\nhang_s = "900"', "worker.hang_s: input should be a valid number"),
        ('server = "h:1"\n[worker]\nhang_s = true', "worker.hang_s: input should be a valid number"),
        ('server = "h:1"\n[worker]\nhang_s = inf', "worker.hang_s: input should be a finite number"),
        (
            'server = "h:1"\n[worker]\nmemory_mb = 63',
            "worker.memory_mb: input should be greater than or equal to 64",
        ),
        ('server = "h:1"\n[worker]\nthreads = 1.5', "worker.threads: input should be a valid integer"),
        ('server = "h:1"\n[task]\nfolder = "x"', "unknown key 'task.folder'; valid keys: path"),
        ('server = "h:1"\nserver = "h:2"', "not valid TOML"),
    ],
)
def test_a_mistake_is_named_by_file_and_key(tmp_path: Path, text: str, says: str):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path / 'client.toml'}: ")
    assert says in str(error.value)


def test_every_mistake_is_told_at_once(tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, 'server = "h"\n[policy]\nmax_runs = 0\nsize = 1')
    assert len(str(error.value).splitlines()) == 3


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"none\.toml: expected a file, found none"):
        load_client(tmp_path / "none.toml")


def test_the_free_keys_of_data_are_nobodys_attributes(tmp_path: Path):
    """They may be called as what is of our own."""
    settings = load(tmp_path, 'server = "h:1"\n[data]\ntable = "t"\ncopy = 1\nmodel_config = 2')
    assert settings.data.table == {"table": "t", "copy": 1, "model_config": 2}
