"""Reduced precision: what the guard lets pass, what it refuses, and what a tuning keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support import Case, labels_of, make_bundle, needs_bf16, run_json, segment, smooth, store
from volseg import api
from volseg.errors import BundleError, InputError
from volseg.inference import choice, choose, tune
from volseg.inference.choice import Choice
from volseg.inference.guard import MOST_DIFFERENT, NEAR, Verdict, compare
from volseg.inference.predictor import Predictor
from volseg.models.hardware import has_bf16

OPTIONS: dict[str, Any] = {"block": "24,24,24", "overlap": 0.25}


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(store(tmp_path / "a.zarr", smooth((32, 32, 32))), make_bundle(tmp_path / "bundle"), tmp_path)


def answer(rows: list[list[float]]) -> list[Tensor]:
    """Return probabilities (sums, 1, 1, x) from those of each voxel."""
    return [torch.tensor(rows).T[:, None, None]]


def test_a_comparison_by_hand() -> None:
    full = answer([[0.5, 0.3, 0.2], [0.4, 0.35, 0.25], [0.1, 0.1, 0.8], [0.2, 0.6, 0.2]])
    other = answer([[0.5, 0.3, 0.2], [0.35, 0.4, 0.25], [0.1, 0.1, 0.8], [0.6, 0.2, 0.2]])
    found = compare(full, other, threshold=0.5)
    assert (found.voxels, found.different) == (4, 2)
    assert found.widest == pytest.approx(0.4)
    assert not found.passed
    two = compare(answer([[0.3], [0.71], [0.69]]), answer([[0.3], [0.69], [0.69]]), threshold=0.7)
    assert (two.voxels, two.different) == (3, 1)
    assert two.widest == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("different", "widest", "passed"),
    [
        (0, 0.0, True),
        (1000 * MOST_DIFFERENT, 0.99 * NEAR, True),
        (1000 * MOST_DIFFERENT + 1, 0.01, False),
        (1, NEAR, False),
    ],
)
def test_what_passes(different: float, widest: float, passed: bool) -> None:
    assert Verdict(1000, int(different), widest).passed == passed


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Make the guard's answer what the test says; random networks hardly ever decide clearly."""
    answers = [True]
    monkeypatch.setattr(choose, "compare", lambda *_: Verdict(100, 0 if answers[0] else 1, 0.5 * NEAR))
    return answers


@needs_bf16
def test_refused_precision_ends_the_job_before_any_work(case: Case, allowed: list[bool]) -> None:
    allowed[0] = False
    with pytest.raises(InputError, match=r"precision bf16 was refused by its guard \(bf16: 1\.000 % of 100 labels"):
        segment(case, case.folder / "out.zarr", precision="bf16", **OPTIONS)


@needs_bf16
def test_auto_falls_back_and_says_so(case: Case, allowed: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = segment(case, case.folder / "fp32.zarr", **OPTIONS)
    assert plain["numerics"]["forward"] == "fp32 tiled"
    assert "guard" not in plain["numerics"]
    monkeypatch.setattr(choose, "candidates", lambda *_: [Choice("bf16"), Choice("fp32")])
    allowed[0] = False
    report = segment(case, case.folder / "auto.zarr", precision="auto", **OPTIONS)
    assert report["numerics"]["forward"] == "fp32 tiled"
    assert report["numerics"]["guard"].startswith("fp32 instead of bf16: 1.000 %")
    np.testing.assert_array_equal(labels_of(case.folder / "auto.zarr"), labels_of(case.folder / "fp32.zarr"))
    allowed[0] = True
    report = segment(case, case.folder / "reduced.zarr", precision="auto", **OPTIONS)
    assert report["numerics"]["forward"] == "bf16 tiled"
    assert report["forwards"] == plain["forwards"], "those of the guard are not the job's"


@needs_bf16
def test_a_network_that_overflows_is_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Predictor._answer

    def overflowing(self: Predictor, count: int) -> Tensor:
        if self._dtype == torch.bfloat16:
            self._finite.fill_(False)
        return run(self, count)

    monkeypatch.setattr(Predictor, "_answer", overflowing)
    with pytest.raises(InputError, match="bf16: the network answered NaN or Inf"):
        segment(case, case.folder / "out.zarr", precision="bf16", **OPTIONS)


def test_bf16_is_for_processors_that_have_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (choice, tune):
        monkeypatch.setattr(module, "has_bf16", lambda _: False)
    monkeypatch.setattr(choice, "fast_bf16", lambda _: False)
    with pytest.raises(InputError, match=r"bf16 needs a processor that has it.*use --precision auto or fp32"):
        segment(case, case.folder / "out.zarr", precision="bf16", **OPTIONS)
    assert segment(case, case.folder / "auto.zarr", precision="auto", **OPTIONS)["numerics"]["forward"] == "fp32 tiled"
    monkeypatch.setattr(tune, "_prepare", lambda *_: pytest.fail("measured what cannot be chosen"))
    with pytest.raises(InputError, match="bf16 needs a processor that has it"):
        api.tune(case.image, model=case.bundle, precision="bf16")


def test_fp16_is_for_gpus(case: Case) -> None:
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        segment(case, case.folder / "out.zarr", precision="fp16", device="cpu", **OPTIONS)


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(*_: Any, **__: Any) -> Any:
        def fail(*_: Any) -> None:
            raise RuntimeError("no C++ compiler")

        return fail

    monkeypatch.setattr(torch, "compile", compile_)


@pytest.mark.usefixtures("without_compiler")
def test_what_was_tuned_is_found_again_and_is_part_of_the_numerics(case: Case) -> None:
    found = api.tune(case.image, model=case.bundle)
    ways = {(tried["way"], tried["batch"]): tried for tried in found["tried"]}
    expected = {"fp32 plain", "fp32 tiled", "fp32 direct"} | ({"bf16 tiled"} if has_bf16("cpu") else set())
    assert expected <= {way for way, _ in ways}
    assert ways["fp32 compiled", 1]["problem"] == "cannot be compiled here (no C++ compiler)"
    assert ways["fp32 tiled", 2]["allowed"], "another batch is measured too"
    kept = Path(found["kept"])
    document = json.loads(kept.read_text())
    assert kept.parent == Path(f"{case.bundle}.tuned")
    # Which one is fastest is chance; what is kept is what is used.
    document["choice"] = {"precision": "fp32", "kernels": "direct"}
    kept.write_text(json.dumps(document))
    output = case.folder / "out.zarr"
    assert segment(case, output, **OPTIONS)["numerics"]["forward"] == "fp32 direct"
    other = segment(case, case.folder / "other.zarr", patch="24,24,24", **OPTIONS)
    assert other["numerics"]["forward"] == "fp32 tiled", "another patch was not tuned"
    next(Path(f"{output}.volseg").glob("*/receipts/*.jsonl")).unlink()
    kept.unlink()
    with pytest.raises(InputError, match="forward fp32 direct then, fp32 tiled now"):
        segment(case, output, **OPTIONS)
    kept.write_text('{"choice": {"precision": "fp32", "kernels": "magic"}}')
    with pytest.raises(BundleError, match=r"holds no choice of a tuning \(magic\)"):
        segment(case, case.folder / "third.zarr", **OPTIONS)


@pytest.mark.chaos
@pytest.mark.slow
def test_the_command(case: Case) -> None:
    words = ("tune", case.image, "--model", case.bundle, "--patch", "8,8,8", "--roi", "0:16,:,:")
    found = run_json(*words)
    assert found["patch"] == [[8, 8, 8]]
    compiled = next(tried for tried in found["tried"] if tried["way"] == "fp32 compiled")
    assert compiled.get("allowed") or "cannot be compiled here" in compiled["problem"]
    assert not found["chosen"].endswith("compiled")
