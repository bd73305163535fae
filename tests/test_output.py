"""How an output begins, when it may call itself complete, and what `verify` finds in it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zarr

from tests.support import Case, labels_of, probabilities_of, receipts_of, segment, status_of
from volseg.errors import InputError, OutputExistsError, VerifyError, VolumeError
from volseg.execution.executors import executor_of
from volseg.execution.output import clear_for, create_output, finish, inspected
from volseg.execution.prepare import Cores, Prepared, local_cores, prepare
from volseg.execution.verify import verify
from volseg.planning.memory import GIB
from volseg.spec import SegmentSpec
from volseg.storage import files
from volseg.storage.ledger import Ledger

LONG = {"patch": "256,256,256"}
"""Patches whose forwards take long."""

OPTIONS: dict[str, Any] = {"block": "24,24,32", "overlap": 0.25, "probabilities": True}


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def whole(case: Case) -> Path:
    output = case.folder / "output-whole.zarr"
    assert segment(case, output, **OPTIONS)["status"] == "complete"
    return output


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A copy of the result with its ledger, to be damaged."""
    output = tmp_path / "out.zarr"
    shutil.copytree(whole, output)
    shutil.copytree(f"{whole}.volseg", f"{output}.volseg")
    return output


def spec_of(case: Case, output: Path, **options: Any) -> SegmentSpec:
    return SegmentSpec.read({"input": case.image, "output": str(output), "model": case.bundle, **OPTIONS, **options})


def job_of(case: Case, output: Path, **options: Any) -> Prepared:
    spec = spec_of(case, output, **options)
    return prepare(spec, Cores(2, 0, "cpu", 2, 4 * GIB), "serial")


def test_an_overwrite_that_was_killed_half_way_can_be_repeated(case: Case, copy: Path) -> None:
    (copy / "zarr.json").unlink()
    with pytest.raises(OutputExistsError, match="volseg did not write it"):
        segment(case, copy, **{**OPTIONS, "overlap": 0.5})
    assert segment(case, copy, **{**OPTIONS, "overlap": 0.5}, overwrite=True)["status"] == "complete"


def edit_receipts(output: Path, edit: Callable[[dict[str, Any]], bool]) -> None:
    """Change receipts in place; those for which `edit` returns False are dropped."""
    for path in receipts_of(output):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines if edit(line)))


# ---------------------------------------------------------------- beginning


@pytest.mark.parametrize("writes", range(6))
def test_a_driver_that_dies_while_it_makes_the_output_can_be_followed(
    case: Case, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """After any number of files: the same command again finds its own beginnings and finishes them."""
    output = tmp_path / "out.zarr"
    real, left = files.write_bytes, [writes]

    def dying(uri: str, data: bytes, **options: Any) -> None:
        if uri.startswith(f"{output}/"):
            if not left[0]:
                raise Killed
            left[0] -= 1
        real(uri, data, **options)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_bytes", dying)
        with pytest.raises(Killed):
            segment(case, output, **OPTIONS)
    assert status_of(output) != "complete"
    assert segment(case, output, **OPTIONS)["status"] == "complete"
    np.testing.assert_array_equal(labels_of(output), labels_of(whole))
    np.testing.assert_array_equal(probabilities_of(output), probabilities_of(whole))
    assert verify(str(output), deep=True)["status"] == "verified"


def test_what_volseg_did_not_write_is_left_alone(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "precious"
    output.mkdir()
    (output / "thesis.txt").write_text("all of it")
    job = job_of(case, output, overwrite=True)
    with pytest.raises(OutputExistsError, match="exists and volseg did not write it; nothing was done"):
        clear_for(job, note=print)
    assert (output / "thesis.txt").read_text() == "all of it"


def test_another_zarr_in_the_place_of_a_lost_result_is_left_alone(case: Case, copy: Path) -> None:
    """The ledger of this very job is still there, but what lies at its output now is somebody else's."""
    group = copy / "zarr.json"
    document = json.loads(group.read_text())
    document["attributes"].pop("volseg")
    group.write_text(json.dumps(document))
    with pytest.raises(OutputExistsError, match="volseg did not write it"):
        clear_for(job_of(case, copy), note=print)


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"overlap": 0.5}, "stride: [12, 12, 12] there, [8, 8, 8] asked for"),
        ({"blend": "constant"}, "blend: gaussian there, constant asked for"),
        ({"probabilities": False}, "probabilities: true there, false asked for"),
        ({"roi": "0:20,:,:"}, "region: 0:40,0:45,0:50 there, 0:20,0:45,0:50 asked for"),
        ({"precision": "bf16"}, "precision: fp32 there, bf16 asked for"),
        ({"nan": "fill"}, "nan: error there, fill asked for"),
        ({"patch": 8}, "patch: [16, 16, 16] there, [8, 8, 8] asked for"),
    ],
)
def test_another_spec_is_refused_with_the_difference(
    case: Case, whole: Path, options: dict[str, Any], difference: str
) -> None:
    with pytest.raises(OutputExistsError) as caught:
        clear_for(job_of(case, whole, **options), note=print)
    assert difference in str(caught.value)
    assert "replace it with --overwrite" in str(caught.value)
    assert status_of(whole) == "complete"


@pytest.mark.parametrize(
    "options",
    [{"block": "8,16,32"}, {"workers": 7}, {"batch": 3}, {"attempts": 9}, {"memory": 3.0}, {"executor": "ray"}],
)
def test_what_does_not_decide_the_bits_makes_no_other_job(case: Case, whole: Path, options: dict[str, Any]) -> None:
    job = job_of(case, whole, **options)
    assert job.job_key == job_of(case, whole).job_key
    clear_for(job, note=print)
    assert job_of(case, whole.parent / "elsewhere.zarr").job_key == job.job_key


def test_the_output_is_made_once(case: Case, tmp_path: Path) -> None:
    job = job_of(case, tmp_path / "out.zarr")
    create_output(job)
    assert status_of(tmp_path / "out.zarr") == "incomplete"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.zarr").rglob("*")}
    create_output(job)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out.zarr").rglob("*")} == before


# ---------------------------------------------------------------- the end


def test_complete_needs_every_receipt_and_every_object(case: Case, copy: Path) -> None:
    job = job_of(case, copy)
    receipts = {receipt.index: receipt for receipt in Ledger(str(copy), job.job_key).receipts()}
    assert all(sound for _, sound in inspected(str(copy), receipts.values()))
    for group in (copy, copy / "probabilities"):
        document = json.loads((group / "zarr.json").read_text())
        document["attributes"]["volseg"]["status"] = "incomplete"
        (group / "zarr.json").write_text(json.dumps(document))
    most = [receipt for index, receipt in receipts.items() if index != 3]
    with pytest.raises(
        VerifyError, match=r"1 block\(s\) have no receipt in .*out\.zarr\.volseg; the output stays incomplete"
    ):
        finish(job, most)
    victim = copy / next(iter(receipts[3].objects))
    content = victim.read_bytes()
    victim.write_bytes(content[:-1])
    assert [r.index for r, sound in inspected(str(copy), receipts.values()) if not sound] == [3]
    with pytest.raises(
        VerifyError, match="objects are gone or changed, the first is block 3; the output stays incomplete"
    ):
        finish(job, receipts.values())
    assert status_of(copy) == status_of(copy / "probabilities") == "incomplete"
    victim.write_bytes(content)
    finish(job, receipts.values())
    assert status_of(copy) == status_of(copy / "probabilities") == "complete"


# ---------------------------------------------------------------- verify


def test_a_sound_result_is_verified(whole: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = verify(str(whole), deep=True, progress=lambda done, total: seen.append((done, total)))
    assert result["status"] == "verified"
    assert result["blocks"] == {"total": 8, "with_receipt": 8, "without_receipt": 0, "damaged": 0}
    assert result["objects"] == 16
    assert result["bytes"] == sum(path.stat().st_size for path in whole.rglob("c/**/*") if path.is_file())
    assert seen == [(n, 8) for n in range(1, 9)]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 3] ^= 4
        path.write_bytes(content)


@pytest.mark.parametrize("array", ["0", "probabilities/0"])
@pytest.mark.parametrize("how", ["gone", "truncated", "flipped"])
def test_a_damaged_object_is_found(case: Case, copy: Path, how: str, array: str) -> None:
    (receipt,) = (r for r in Ledger(str(copy), job_of(case, copy).job_key).receipts() if r.index == 5)
    damage(copy / next(key for key in receipt.objects if key.startswith(array + "/")), how)
    deep = verify(str(copy), deep=True)
    assert deep["status"] == "damaged"
    assert [(entry["block"], entry["box"]) for entry in deep["damaged"]] == [(5, "24:40,0:24,32:50")]
    # A flipped bit leaves the size: only reading finds it.
    assert verify(str(copy))["status"] == ("verified" if how == "flipped" else "damaged")


def test_other_voxels_than_those_of_the_receipt_are_found(copy: Path) -> None:
    """A chunk that is sound in itself, but of another job."""

    def edit(receipt: dict[str, Any]) -> bool:
        if receipt["index"] == 2:
            receipt["digests"]["0"] = "0" * 64
        return True

    edit_receipts(copy, edit)
    assert verify(str(copy))["status"] == "verified"
    result = verify(str(copy), deep=True)
    assert [(e["block"], e["error"]) for e in result["damaged"]] == [
        (2, "0: the voxels are not those that were written")
    ]


def test_blocks_without_a_receipt_are_no_result(copy: Path) -> None:
    edit_receipts(copy, lambda receipt: receipt["index"] < 6)
    result = verify(str(copy), deep=True)
    assert (result["status"], result["blocks"]["without_receipt"]) == ("incomplete", 2)


def test_a_result_that_never_said_complete_is_incomplete(copy: Path) -> None:
    document = json.loads((copy / "zarr.json").read_text())
    document["attributes"]["volseg"]["status"] = "incomplete"
    (copy / "zarr.json").write_text(json.dumps(document))
    assert verify(str(copy))["status"] == "incomplete"


@pytest.mark.parametrize("array", ["0", "probabilities/0"])
@pytest.mark.parametrize("deep", [False, True])
def test_chunks_without_their_metadata_are_no_result(copy: Path, array: str, deep: bool) -> None:
    (copy / array / "zarr.json").unlink()
    with pytest.raises(VerifyError, match="cannot be read"):
        verify(str(copy), deep=deep)


def test_what_is_no_segmentation_cannot_be_verified(case: Case, copy: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nothing", case.image):
        with pytest.raises(VolumeError, match="is no segmentation that volseg wrote"):
            verify(str(place))
    files.remove(f"{copy}.volseg")
    with pytest.raises(VolumeError, match=r"the ledger of .* is gone"):
        verify(str(copy))


# ---------------------------------------------------------------- preparing


def test_the_output_must_not_lie_over_what_is_read(case: Case, tmp_path: Path) -> None:
    for output in (case.image, Path(case.image) / "inside", case.folder, case.bundle, Path(case.bundle) / "out.zarr"):
        with pytest.raises(
            InputError, match=r"output .* and (input|model) .* overlap: writing would destroy what is read"
        ):
            job_of(case, Path(output))
    assert job_of(case, tmp_path / "out.zarr").spec.output == str(tmp_path / "out.zarr")


def test_places_are_made_absolute(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case.folder)
    spec = SegmentSpec.read({"input": "image.zarr", "output": "relative.zarr", "model": "bundle/"})
    job = prepare(spec, local_cores(spec), "serial")
    assert (job.spec.input, job.spec.output) == (case.image, str(case.folder / "relative.zarr"))
    assert job.spec.model == case.bundle


@pytest.fixture
def vast(case: Case, tmp_path: Path) -> Case:
    """A volume that nothing was ever stored of, and that takes hours."""
    zarr.create_array(tmp_path / "vast", shape=(4000,) * 3, chunks=(64,) * 3, dtype="uint8")
    return Case(str(tmp_path / "vast"), case.bundle, tmp_path)


@pytest.mark.parametrize(
    ("options", "workers", "expected"),
    [
        ({}, 1, "serial"),
        (LONG, 8, "threads"),
        (LONG, 9, "ray"),
        ({}, 4, "ray"),
        ({"patch": "96,96,96"}, 2, "threads"),
        ({"patch": "96,96,96"}, 8, "ray"),
        ({"roi": "0:99,0:99,0:99"}, 8, "threads"),
        ({"roi": "0:99,0:99,0:99"}, 9, "ray"),
        ({"workers": 1}, 4, "serial"),
        ({"workers": 2, **LONG}, 1, "threads"),
        ({"executor": "serial"}, 4, "serial"),
        ({"executor": "threads"}, 64, "threads"),
        ({"executor": "ray"}, 1, "ray"),
        ({"address": "auto", "workers": 1}, 1, "ray"),
    ],
)
def test_which_executor(vast: Case, tmp_path: Path, options: dict[str, Any], workers: int, expected: str) -> None:
    """Threads share Python's lock: few of them, and fewer where forwards are short, unless the whole job is."""
    assert executor_of(spec_of(vast, tmp_path, **options), Cores(4, 0, "cpu", workers, GIB)) == expected


def test_a_short_job_is_over_before_ray_has_started(case: Case, vast: Case, tmp_path: Path) -> None:
    cores = Cores(4, 0, "cpu", 4, GIB)
    assert executor_of(spec_of(case, tmp_path), cores) == "threads"
    assert executor_of(spec_of(case, tmp_path), cores, many=True) == "ray", "of a batch, nobody knows how long it is"
    # What multiplies the forwards counts; without an overlap there are half as many.
    kinds: list[tuple[dict[str, Any], str]] = [
        ({}, "ray"),
        ({"overlap": 0}, "threads"),
        ({"overlap": None, "blend": "exact"}, "threads"),
        ({"overlap": 0, "mirror": True}, "ray"),
    ]
    for options, expected in kinds:
        spec = spec_of(vast, tmp_path, roi="0:600,0:600,0:600", **options)
        assert executor_of(spec, cores) == expected, options


def test_gpus_are_for_actors(case: Case, tmp_path: Path) -> None:
    """One a GPU: threads of one process are for CPU cores."""
    cores = Cores(8, 2, "cuda", 2, GIB)
    assert executor_of(spec_of(case, tmp_path), cores) == "ray"
    assert executor_of(spec_of(case, tmp_path), Cores(8, 1, "cuda", 1, GIB)) == "serial"
    with pytest.raises(InputError, match="threads computes on CPU cores, and this machine has a GPU"):
        executor_of(spec_of(case, tmp_path, executor="threads"), cores)


@pytest.mark.parametrize("executor", ["serial", "threads"])
def test_what_runs_in_this_process_has_no_address(case: Case, tmp_path: Path, executor: str) -> None:
    with pytest.raises(InputError, match=f"{executor} uses no cluster"):
        executor_of(spec_of(case, tmp_path, executor=executor, address="auto"), Cores(4, 0, "cpu", 4, GIB))


def test_a_program_that_uses_ray_goes_on_using_it(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be connected to a cluster; that ray was imported, or looked at, says nothing."""
    spec, cores = spec_of(case, tmp_path, **LONG), Cores(4, 0, "cpu", 4, GIB)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False))
    assert executor_of(spec, cores) == "threads"
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: True))
    assert executor_of(spec, cores) == "ray"


def test_ray_is_named_where_it_is_missing(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cores = Cores(4, 0, "cpu", 4, GIB)
    assert executor_of(spec_of(case, tmp_path), cores) == "threads", "whatever the forwards: there is nothing else"
    with pytest.raises(InputError, match=r"pip install 'volseg\[ray\]'"):
        executor_of(spec_of(case, tmp_path, executor="ray"), cores)


def test_an_axis_is_for_2d_networks(case: Case, flat_case: Case, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="axis y was given, but the model is 3D"):
        job_of(case, tmp_path / "out.zarr", axis="y")
    job = job_of(flat_case, tmp_path / "out.zarr", axis="y", block=None)
    # The bundle's patch turns with the axis, and shrinks to the 13 slices in steps of the pooling.
    (view,) = job.plan.views
    assert (view.axis, view.patch) == ("y", (14, 1, 16))


def test_the_memory_of_a_machine_is_shared_by_its_workers(case: Case, tmp_path: Path) -> None:
    spec = spec_of(case, tmp_path / "out.zarr", block=None)
    cores = Cores(8, 0, "cpu", 8, 8 * GIB)
    assert prepare(spec, cores, "ray").plan.memory_limit == GIB
    assert prepare(spec.model_copy(update={"workers": 2}), cores, "ray").plan.memory_limit == 4 * GIB
    assert prepare(spec, cores, "serial").plan.memory_limit == 8 * GIB
    assert prepare(spec, cores, "threads").plan.memory_limit == GIB
    assert prepare(spec.model_copy(update={"memory": 1.5}), cores, "ray").plan.memory_limit == 3 * GIB // 2
    assert prepare(spec, Cores(64, 0, "cpu", 64, 8 * GIB, slots=4), "ray").plan.memory_limit == 2 * GIB
    assert prepare(spec, Cores(1, 0, "cpu", 1, 64 * GIB), "serial").plan.memory_limit == 8 * GIB
