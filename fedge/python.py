"""Another Python of the same import path."""

from __future__ import annotations

import json
import sys

_BEGIN = "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); sys.argv[:] = sys.argv[2:]; "
_BEGIN += "runpy.run_module(sys.argv[0], run_name='__main__')"


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this process's import path, and not what lies in the current folder."""
    return [sys.executable, "-P", "-c", _BEGIN, json.dumps(sys.path), module, *arguments]
