"""A site is one client: a second one takes its place, and a look at the link takes nobody's."""

from __future__ import annotations

import shutil

from harness import Federation, Running, fedge_ok


def test_a_second_client_of_a_site_stays_and_the_first_ends_and_says_why(bare: Federation):
    bare.enrol("doubled")
    copy = shutil.copytree(bare.folder / "doubled", bare.folder / "elsewhere")
    first = bare.start("doubled")
    second = Running.start("client", "start", copy / "client.toml", log=bare.folder / "doubled-2.log")
    try:
        assert first.ends() == 5
        assert "another client connected as site 'doubled'" in first.output
        second.says("session_started")
        assert "doubled" in bare.connected()
        assert second.output.count("session_started") == 1
    finally:
        second.end()


def test_a_second_client_of_a_data_set_is_refused_and_the_first_stays(bare: Federation):
    """Two that spend one budget would each believe that the other's part is left."""
    bare.enrol("shared")
    first = bare.start("shared")
    second = Running.start(
        "client", "start", bare.folder / "shared" / "client.toml", log=bare.folder / "shared-2.log"
    )
    assert second.ends() == 6
    assert "another client at work with this data set" in second.output
    assert first.process.poll() is None
    assert "shared" in bare.connected()
    first.end()


def test_a_check_takes_over_no_session(bare: Federation):
    bare.enrol("looked-at")
    client = bare.start("looked-at")
    output = fedge_ok("client", "check", bare.folder / "looked-at" / "client.toml")
    assert "federation" in output
    assert client.process.poll() is None
    assert client.output.count("session_started") == 1
    client.end()
