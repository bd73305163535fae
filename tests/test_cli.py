"""The commands as people and scripts meet them: the whole way by words alone, help, JSON, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from tests.support import Case, labels_of, run, smooth
from volseg import __version__, api
from volseg.cli import commands
from volseg.cli.main import build_parser, main
from volseg.errors import JobError, JobInterrupted

COMMANDS = (
    "import", "info", "train", "recipes", "plan", "segment", "bench", "model", "export", "import-model", "tune",
    "suggest", "submit", "jobs", "status", "logs", "cancel", "wait", "result", "batch", "k8s",
    "verify", "evaluate", "overlay", "demo",
)  # fmt: skip


def test_the_commands_are_these() -> None:
    assert tuple(build_parser()[1]) == COMMANDS
    (script,) = entry_points(group="console_scripts", name="volseg")
    assert script.value == "volseg.cli.main:main"


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Worth reading: what the command does, every option with an explanation."""
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    out, err = capsys.readouterr()
    assert not err
    assert out.startswith(f"usage: volseg {name}")
    assert "--json" in out
    parser = build_parser()[1][name]
    assert parser.description
    assert len(parser.description.split()) >= 5
    for action in parser._actions:
        assert action.help, action.dest
        assert len(action.help.split()) >= 2, action.dest


def test_help_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)
    assert "examples:" in out
    assert "Exit codes:" in out
    for line in (line.strip() for line in out.splitlines() if line.startswith("  volseg ")):
        words = line.split()[1:]
        assert words[0] in COMMANDS
        known = {option for action in build_parser()[1][words[0]]._actions for option in action.option_strings}
        assert {word for word in words if word.startswith("--")} <= known


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.split() == ["volseg", __version__]


# ---------------------------------------------------------------- the whole way


def stack(folder: Path) -> None:
    """A bright ball in noise, its labels in four slices of twelve."""
    z, y, x = np.ogrid[:12, :40, :36]
    truth = ((z - 6) ** 2 * 2 + (y - 20) ** 2 + (x - 17) ** 2 < 150).astype(np.uint8)
    image = truth * 90 + 60 + smooth((12, 40, 36), seed=2, high=40)
    tifffile.imwrite(folder / "raw.tif", image.astype(np.uint8), photometric="minisblack")
    tifffile.imwrite(folder / "truth.tif", truth, photometric="minisblack")


STEPS = [
    "import raw.tif w/image.zarr --voxel-size 0.1,0.022,0.022 --unit micrometer",
    "import truth.tif w/labels.zarr --labels --classes air,ball",
    "info w/image.zarr",
    "recipes",
    "recipes salt-unet",
    "train --image w/image.zarr --labels w/labels.zarr --dims 2 --out w/unet --preview w/preview.png",
    "train --image w/image.zarr --labels w/labels.zarr --dims 2 --train-roi 0:8,:,: --val-roi 8:12,:,: --out w/unet "
    "--max-steps 3 --widths 4,8 --patch 1,16,16 --batch 2",
    "model w/unet",
    "model w/unet --picture w/slices.png --slices 2",
    "export w/unet w/unet.pt2",
    "import-model other.yaml w/other",
    "suggest w/image.zarr --model w/other --n 2 --workers 1",
    "plan w/image.zarr w/seg.zarr --model w/unet",
    "segment w/image.zarr w/seg.zarr --model w/unet --executor serial",
    "verify w/seg.zarr --deep",
    "evaluate w/seg.zarr w/labels.zarr --roi 8:12,:,: --surface --slab-axis y",
    "overlay w/image.zarr w/seg.zarr w/overlay.png",
]
OTHER = """
architecture: unet
arguments: {dims: 2, widths: [4, 8], norm: batch}
weights: [w/unet/model.safetensors]
classes: [air, ball]
activation: sigmoid
threshold: 0.5
image: w/image.zarr
patch: [1, 16, 16]
"""
FIELDS: dict[str, set[str]] = {
    "import": {"output", "shape", "dtype", "chunks", "shards", "voxel_size", "unit", "labels"},
    "info": {"shape", "dtype", "chunks", "voxel_size", "status"},
    "train": set(),
    "recipes": set(),
    "model": {"architecture", "parameters", "receptive_field", "classes", "scores", "provenance", "files"},
    "export": {"export", "format"},
    "import-model": {"bundle", "digest"},
    "suggest": {"suggestions"},
    "plan": {
        "patches", "blocks", "forwards", "forwards_per_patch", "forwards_per_voxel", "memory_per_worker", "bytes_read",
        "bytes_written", "executor",
    },
    "segment": {"status", "blocks", "forwards", "patches", "seconds", "classes", "memory"},
    "verify": {"status", "blocks", "damaged"},
    "evaluate": {"classes", "mean_foreground_dice", "confusion"},
    "overlay": {"picture", "position", "classes"},
}  # fmt: skip


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_the_whole_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], as_json: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    stack(tmp_path)
    (tmp_path / "other.yaml").write_text(OTHER)
    for step in STEPS:
        words = step.split()
        capfd.readouterr()
        assert main([*words, "--json"] if as_json else words) == 0, capfd.readouterr().err
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        assert "Warning" not in err
        if as_json:
            # One document and nothing else, also of what C code writes.
            document = json.loads(out)
            assert FIELDS[words[0]] <= set(document), set(document)
        else:
            assert out.strip()
            assert "{" not in out or words[0] == "recipes"
        if "--max-steps" in words and as_json:
            assert {"bundle", "digest", "steps", "seconds", "dice", "mean_foreground_dice"} <= set(document)
    for name in ("overlay", "preview", "slices"):
        assert (tmp_path / "w" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert labels_of("w/seg.zarr").shape == (12, 40, 36)


def test_plan_tells_what_segment_does(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--overlap", "0.25", "--block", "16,24,20", "--executor", "serial", "--probabilities", "--json")
    words = [case.image, str(tmp_path / "out.zarr"), "--model", case.bundle, *options]
    assert main(["plan", *words]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert main(["segment", *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["blocks"] == {"total": planned["blocks"], "computed": planned["blocks"], "resumed": 0, "failed": 0}
    assert report["forwards"] == planned["forwards"]
    assert report["patches"] == planned["patches"]
    assert report["job_key"] == planned["job_key"]
    assert report["memory"]["predicted"] == planned["memory_per_worker"]["total"]
    assert planned["bytes_written"] == 40 * 45 * 50 * (1 + 3)


def test_the_same_by_keywords_flags_and_file(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three ways to one job: the second and third find it done."""
    output = tmp_path / "out.zarr"
    options: dict[str, Any] = {"overlap": 0.25, "block": "24,24,24", "roi": "0:20,:,3:", "blend": "constant"}
    assert (
        api.segment(case.image, str(output), model=case.bundle, executor="serial", **options)["blocks"]["resumed"] == 0
    )
    flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    (tmp_path / "job.yaml").write_text(
        f"input: {case.image}\noutput: {output}\nmodel: {case.bundle}\noverlap: 0.9\nblock: [24, 24, 24]\n"
        "roi: '0:20,:,3:'\nblend: constant\nexecutor: serial\n"
    )
    for words in (
        ["segment", case.image, str(output), "--model", case.bundle, "--executor", "serial", *flags],
        ["segment", "--spec", str(tmp_path / "job.yaml"), "--set", "overlap=0.25"],
    ):
        assert main([*words, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["blocks"]["resumed"] == report["blocks"]["total"] == 6


# ---------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (JobError("disk"), 4),
        (JobInterrupted("stopped"), 130),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("bug"), 4),
    ],
    ids=repr,
)
def test_exit_codes(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> commands.Result:
        print("noise")
        raise error

    monkeypatch.setattr(commands, "run_info", fail)
    monkeypatch.delenv("VOLSEG_DEBUG", raising=False)
    assert main(["info", "x", "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out)["exit_code"] == code
    assert err.splitlines()[0] == "noise"
    assert len(err.splitlines()) == 2


def test_a_bug_shows_its_traceback_where_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> commands.Result:
        raise ZeroDivisionError("bug")

    monkeypatch.setattr(commands, "run_info", fail)
    monkeypatch.setenv("VOLSEG_DEBUG", "1")
    assert main(["info", "x"]) == 4
    assert "Traceback (most recent call last)" in capsys.readouterr().err


# ---------------------------------------------------------------- processes


def test_console_script_and_module_are_one(case: Case) -> None:
    script = Path(sys.executable).with_name("volseg")
    by_name = subprocess.run([script, "info", case.image, "--json"], capture_output=True, text=True, check=True)
    by_module = run("info", case.image, "--json")
    assert json.loads(by_name.stdout) == json.loads(by_module.stdout)
    assert not by_name.stderr
