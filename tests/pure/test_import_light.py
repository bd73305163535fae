"""The pure layers load nothing heavy, installed or not; and `import volseg` next to nothing."""

import subprocess
import sys

import pytest

HEAVY = ["torch", "ray", "zarr", "fsspec", "numcodecs", "tifffile", "psutil"]
PURE = ["errors", "spec", "geometry", "blend", "intensity", "planning"]


@pytest.mark.parametrize("module", ["volseg", *(f"volseg.{name}" for name in PURE)])
def test_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(sorted(set({HEAVY}) & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


def test_the_package_itself_loads_no_numpy_either() -> None:
    code = "import sys, volseg; print({'numpy', 'pydantic', 'volseg.spec'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
