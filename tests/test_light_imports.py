"""What people type first is answered without loading torch or ray."""

import subprocess
import sys

import pytest

HEAVY = ["torch", "ray", "matplotlib", "scipy", "skimage"]


def loaded(code: str) -> str:
    check = f"import sys; {code}; print(sorted(set({HEAVY}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-W", "error", "-c", check], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "code",
    [
        "import volseg.api",
        "import volseg; volseg.segment, volseg.plan, volseg.SegmentSpec",
        "import volseg.cli.main",
        "from volseg.cli.main import main; assert main([]) == 0",
    ],
)
def test_neither_torch_nor_ray_is_loaded(code: str) -> None:
    assert loaded(code) == "[]"


@pytest.mark.parametrize("command", ["segment", "train", "import", "evaluate"])
def test_help_loads_neither(command: str) -> None:
    code = f"""
from volseg.cli.main import main
try:
    main([{command!r}, '--help'])
except SystemExit as ended:
    assert not ended.code
"""
    assert loaded("exec(" + repr(code) + ")") == "[]"
