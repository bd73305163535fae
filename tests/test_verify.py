"""`volseg verify` and what it advises: from damage to a sound result again, by the commands alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import Case, labels_of, probabilities_of, receipts_of, segment, segment_words, status_of
from volseg import api
from volseg.cli.main import main
from volseg.errors import JobInterrupted
from volseg.execution.driver import Tally
from volseg.spec import SegmentSpec

OPTIONS: dict[str, Any] = {"overlap": 0, "block": "16,16,16", "probabilities": True}
BLOCKS = 36


@pytest.fixture(scope="module")
def sound(case: Case) -> Path:
    output = case.folder / "sound.zarr"
    segment(case, output, **OPTIONS)
    return output


@pytest.fixture
def output(sound: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "out.zarr"
    shutil.copytree(sound, copy)
    shutil.copytree(f"{sound}.volseg", f"{copy}.volseg")
    return copy


def verify(capsys: pytest.CaptureFixture[str], output: Path, *more: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    code = main(["verify", str(output), "--json", *more])
    return code, json.loads(capsys.readouterr().out)


def again(case: Case, output: Path) -> list[str]:
    words = segment_words(
        case, output, "--overlap", 0, "--block", "16,16,16", "--probabilities", "--executor", "serial"
    )
    return [str(word) for word in words]


def test_sound(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ((), ("--deep",)):
        code, result = verify(capsys, output, *more)
        assert code == 0
        assert result["status"] == "verified"
        assert result["blocks"] == {"total": BLOCKS, "with_receipt": BLOCKS, "without_receipt": 0, "damaged": 0}
        assert result["objects"] == 2 * BLOCKS
    assert main(["verify", str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"verified: {BLOCKS} of {BLOCKS} blocks have a receipt; ")


def test_unfinished(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(tally: Tally) -> None:
        if tally.computed >= 5:
            raise KeyboardInterrupt

    output = tmp_path / "out.zarr"
    values = {"input": case.image, "output": str(output), "model": case.bundle, "executor": "serial", **OPTIONS}
    with pytest.raises(JobInterrupted):
        api.run_segment(SegmentSpec.read(values), stop)
    code, result = verify(capsys, output)
    assert code == 3
    assert result["status"] == "incomplete"
    assert 5 <= result["blocks"]["with_receipt"] == BLOCKS - result["blocks"]["without_receipt"] < BLOCKS
    main(["verify", str(output)])
    assert "run the same 'volseg segment' command again to finish it" in capsys.readouterr().out
    assert main(again(case, output)) == 0
    assert verify(capsys, output, "--deep")[0] == 0


def test_damage_that_only_reading_finds(
    case: Case, sound: Path, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A flipped bit, mended as verify advises: remove the object it names, segment again."""
    victim = output / "0" / "c" / "1" / "2" / "0"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert verify(capsys, output)[0] == 0
    assert main(["verify", str(output), "--deep"]) == 4
    text = capsys.readouterr().out
    assert text.startswith("damaged: ")
    assert "stored in 0/c/1/2/0, probabilities/0/c/0/1/2/0" in text
    assert f"remove the object from {output} first" in text
    code, result = verify(capsys, output, "--deep")
    assert code == 4
    (found,) = result["damaged"]
    assert found["box"] == "16:32,32:45,0:16"
    assert found["objects"] == ["0/c/1/2/0", "probabilities/0/c/0/1/2/0"]
    (output / found["objects"][0]).unlink()
    assert main([*again(case, output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"]["computed"] == 1
    assert verify(capsys, output, "--deep")[0] == 0
    np.testing.assert_array_equal(labels_of(output), labels_of(sound))
    np.testing.assert_array_equal(probabilities_of(output), probabilities_of(sound))


def test_objects_that_changed_places(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both are sound in themselves, and their sizes are made to be right: only digests tell."""
    keys = ["probabilities/0/c/0/0/0/0", "probabilities/0/c/0/0/0/1"]
    first, second = (output / key for key in keys)
    content = first.read_bytes(), second.read_bytes()
    assert content[0] != content[1]
    first.write_bytes(content[1])
    second.write_bytes(content[0])
    sizes = dict(zip(keys, (len(content[1]), len(content[0])), strict=True))
    for path in receipts_of(output):
        receipts = [json.loads(line) for line in path.read_text().splitlines()]
        for receipt in receipts:
            receipt["objects"] |= {key: size for key, size in sizes.items() if key in receipt["objects"]}
        path.write_text("".join(json.dumps(receipt) + "\n" for receipt in receipts))
    assert verify(capsys, output)[0] == 0
    code, result = verify(capsys, output, "--deep")
    assert code == 4
    assert [e["box"] for e in result["damaged"]] == ["0:16,0:16,0:16", "0:16,0:16,16:32"]
    assert {e["error"] for e in result["damaged"]} == {"probabilities/0: the voxels are not those that were written"}


def test_lost_receipts(case: Case, sound: Path, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`complete` in the metadata does not help where the ledger does not say so."""
    segments = receipts_of(output)
    segments[-1].unlink()
    lost = BLOCKS - sum(len(path.read_text().splitlines()) for path in segments[:-1])
    assert status_of(output) == "complete"
    code, result = verify(capsys, output)
    assert code == 3
    assert result["status"] == "incomplete"
    assert result["blocks"]["without_receipt"] == lost > 0
    assert main([*again(case, output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blocks"]["computed"] == lost
    assert verify(capsys, output, "--deep")[0] == 0


def test_lost_ledger(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(f"{output}.volseg")
    assert main(["verify", str(output)]) == 2
    assert "the ledger of" in capsys.readouterr().err


def test_region(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only the blocks of the region have to be there."""
    output = tmp_path / "out.zarr"
    segment(case, output, **{**OPTIONS, "roi": "3:17,20:30,:"})
    code, result = verify(capsys, output, "--deep")
    assert code == 0
    assert result["blocks"]["total"] == 2 * 1 * 4
    assert result["objects"] == len([p for p in output.rglob("c/**/*") if p.is_file()]) == 16
