"""The table of bad input with every place on S3: the same lines and exit codes, nothing that looks whole."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path

import pytest

from tests.s3_servers import Server
from tests.support import make_bundle, smooth, store
from tests.test_bad_input import ITEMS, PROGRESS, SHAPE, Lab
from volseg.cli.main import main
from volseg.storage import files
from volseg.storage.nodes import read_node

pytest_plugins = ("tests.s3_fixtures",)
pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("short_pauses")]

# What they are about has no place on S3: options, and the importer's source, which is a local file.
ELSEWHERE = {"missing source of an import", "output inside the input", "output equal to the bundle"}
NAMES = [name for name in ITEMS if name not in ELSEWHERE]


@pytest.fixture(scope="module", params=["moto", "rclone"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="module")
def shared(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a good image and a good bundle, and the bucket that has them, too."""
    folder = tmp_path_factory.mktemp("good")
    store(folder / "image.zarr", smooth(SHAPE))
    make_bundle(folder / "bundle")
    with pytest.MonkeyPatch.context() as patch:
        server.use(patch)
        bucket = f"s3://{server.new_bucket()}"
        upload(folder, f"{bucket}/good")
    return folder, bucket


@pytest.fixture
def lab(shared: tuple[Path, str], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    server.use(monkeypatch)
    return Lab(tmp_path, str(shared[0] / "image.zarr"), str(shared[0] / "bundle"))


def upload(folder: Path, uri: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            files.write_bytes(files.join(uri, path.relative_to(folder).as_posix()), path.read_bytes())
        elif not any(path.iterdir()):
            # A folder is there only where something is in it.
            files.write_bytes(files.join(uri, path.relative_to(folder).as_posix(), "note.txt"), b"mine")


@pytest.mark.parametrize("name", NAMES)
def test_refused(name: str, lab: Lab, shared: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, bucket = shared
    place = f"{bucket}/{uuid.uuid4().hex[:8]}"
    words = ITEMS[name].make(lab)
    upload(lab.path, place)
    # Specs and what is imported lie with the user.
    mine = {word for word in words if word.endswith((".yaml", ".tif", ".npy", ".png", "/slices"))}
    words = [
        word if word in mine else word.replace(str(lab.path), place).replace(str(folder), f"{bucket}/good")
        for word in words
    ]
    before = files.sizes_below(place)
    capsys.readouterr()
    assert main([*words, "--json"]) == ITEMS[name].code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not PROGRESS.match(line)]
    answer = "\n".join([*lines, out])
    assert "Traceback" not in answer
    assert "bug of volseg" not in answer
    for text in ITEMS[name].says:
        assert re.search(text, json.loads(out).get("error", answer)) or re.search(text, answer)
    output = f"{place}/out.zarr"
    node = read_node(output) if files.exists(output) else None
    assert node is None or node.attributes["volseg"]["status"] == "incomplete"
    if ITEMS[name].code == 2 and "nan weights" not in name:
        assert files.sizes_below(place) == before
