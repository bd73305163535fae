"""Is the container well? Where Ray runs, its node must answer; where it does not, there is nothing to ask.

Looks at the processes of the container, because the port on which the node answers is theirs to choose.
"""

import re
import sys
import urllib.request
from collections.abc import Iterable
from pathlib import Path

SECONDS = 5
USUAL_PORT = "52365"


def commands(proc: Path = Path("/proc")) -> list[str]:
    """Return the command lines of all processes that can be seen."""
    found = []
    for path in proc.glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            # Gone since it was listed.
            continue
    return found


def ports(lines: Iterable[str]) -> set[str]:
    """Return where the agents of the Ray nodes among these processes listen."""
    agents = [line for line in lines if "dashboard/agent.py" in line]
    return {
        match[1] if (match := re.search(r"--listen-port[= ](\d+)", line)) else USUAL_PORT for line in agents
    }  # fmt: skip


def is_well(lines: Iterable[str]) -> bool:
    """Tell whether every Ray node among these processes answers that it is well."""
    lines = list(lines)
    if not any("/raylet/raylet " in line for line in lines):
        return True
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    there = ports(lines)
    for port in there:
        try:
            with opener.open(f"http://127.0.0.1:{port}/api/local_raylet_healthz", timeout=SECONDS) as answer:
                if b"success" not in answer.read(100):
                    return False
        except OSError:
            return False
    return bool(there)


if __name__ == "__main__":
    sys.exit(not is_well(commands()))
