"""Specs: what is refused, with what words, and what is read as what."""

from typing import Any

import pytest

from volseg.errors import SpecError
from volseg.spec import SegmentSpec, TrainSpec, parse_floats

SEGMENT = {"input": "image.zarr", "output": "out.zarr", "model": "unet"}
TRAIN = {"image": "image.zarr", "labels": "labels.zarr", "out": "unet"}


def refused(model: type[SegmentSpec | TrainSpec], **values: Any) -> str:
    base = SEGMENT if model is SegmentSpec else TRAIN
    with pytest.raises(SpecError) as caught:
        model.read({**base, **values})
    message = str(caught.value)
    assert message.endswith("; nothing was done")
    assert "\n" not in message
    return message


def test_the_defaults_need_no_more_than_the_places() -> None:
    spec = SegmentSpec.read(SEGMENT)
    assert (spec.overlap, spec.blend, spec.precision, spec.executor) == (0.5, "gaussian", "fp32", "auto")
    assert (spec.patch, spec.block, spec.workers, spec.batch, spec.threshold) == (None,) * 5
    assert TrainSpec.read(TRAIN).ignore == 255


@pytest.mark.parametrize(
    ("misspelt", "right"),
    [
        ("ovelap", "overlap"),
        ("train-roi", "train_roi"),
        ("probabilites", "probabilities"),
        ("max_minute", "max_minutes"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(misspelt: str, right: str) -> None:
    model = SegmentSpec if right in SegmentSpec.model_fields else TrainSpec
    assert f"unknown option {misspelt!r} (did you mean {right!r}?)" in refused(model, **{misspelt: 1})


def test_a_key_like_no_other_gets_no_hint() -> None:
    assert refused(SegmentSpec, qqq=1) == "unknown option 'qqq'; nothing was done"


def test_every_fault_is_named_at_once() -> None:
    message = refused(SegmentSpec, overlap=2, wokers=3, patch="1,2")
    assert "option 'overlap': 2 is not allowed" in message
    assert "(did you mean 'workers'?)" in message
    assert "write three whole numbers z,y,x" in message


def test_what_is_missing_is_named() -> None:
    with pytest.raises(SpecError, match="option 'output' is missing; option 'model' is missing"):
        SegmentSpec.read({"input": "image.zarr"})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("64", (64, 64, 64)),
        (64, (64, 64, 64)),
        ("1,256,300", (1, 256, 300)),
        ("(1, 256, 300)", (1, 256, 300)),
        ([1, 256, 300], (1, 256, 300)),
        ((1, 256, 300), (1, 256, 300)),
        (None, None),
    ],
)
@pytest.mark.parametrize("name", ["patch", "block", "chunks", "shards"])
def test_triples_are_read_from_text_numbers_and_lists(name: str, value: object, expected: object) -> None:
    assert getattr(SegmentSpec.read({**SEGMENT, name: value}), name) == expected


@pytest.mark.parametrize("value", ["1,2", "1,2,3,4", "a,b,c", "1,,2", "", "-1,4,4", "1.5,4,4", [1, 2], [1, 2, 3, 4]])
@pytest.mark.parametrize("name", ["patch", "block", "chunks", "shards"])
def test_other_triples_are_refused(name: str, value: object) -> None:
    message = refused(SegmentSpec, **{name: value})
    assert message.startswith(f"option {name!r}: {value!r} is not allowed: write three whole numbers z,y,x")


@pytest.mark.parametrize("value", ["0,4,4", 0, [4, 4, -4]])
def test_a_side_is_at_least_one_voxel(value: object) -> None:
    assert "every side must be at least 1 voxel" in refused(SegmentSpec, block=value)
    assert "every side must be at least 1 voxel" in refused(TrainSpec, patch=value)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("overlap", -0.1, "greater than or equal to 0"),
        ("overlap", 1.0, "less than 1"),
        ("overlap", float("nan"), "less than 1"),
        ("threshold", 0.0, "greater than 0"),
        ("threshold", 1.0, "less than 1"),
        ("workers", 0, "greater than or equal to 1"),
        ("batch", 0, "greater than or equal to 1"),
        ("batch", 1025, "less than or equal to 1024"),
        ("memory", 0, "greater than 0"),
        ("attempts", 0, "greater than or equal to 1"),
        ("blend", "hann", "'gaussian' or 'constant'"),
        ("precision", "fp16", "'fp32' or 'bf16'"),
        ("nan", "skip", "'error' or 'fill'"),
        ("executor", "spark", "'auto', 'serial' or 'ray'"),
        ("device", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("axis", "c", "'z', 'y' or 'x'"),
        ("patch", True, "valid tuple"),
        ("input", 3, "valid string"),
    ],
)
def test_values_outside_their_limits_are_refused(name: str, value: object, rule: str) -> None:
    message = refused(SegmentSpec, **{name: value})
    assert f"option {name!r}: {value!r} is not allowed" in message
    assert rule in message


@pytest.mark.parametrize("value", [0, 0.5, 0.999])
def test_limits_themselves_are_allowed(value: float) -> None:
    assert SegmentSpec.read({**SEGMENT, "overlap": value}).overlap == value


@pytest.mark.parametrize("value", [2, "2"])
def test_a_choice_between_numbers_takes_text(value: object) -> None:
    assert TrainSpec.read({**TRAIN, "dims": value}).dims == 2


@pytest.mark.parametrize("value", [4, "4", "2d", [2]])
def test_other_dimensions_are_refused(value: object) -> None:
    assert "Input should be 2 or 3" in refused(TrainSpec, dims=value)


@pytest.mark.parametrize("value", ["16,32", "16, 32", [16, 32], ("16", "32")])
def test_widths_are_read_from_text_and_lists(value: object) -> None:
    assert TrainSpec.read({**TRAIN, "widths": value}).widths == (16, 32)


def test_one_width_is_a_list_of_one() -> None:
    assert TrainSpec.read({**TRAIN, "widths": 16}).widths == TrainSpec.read({**TRAIN, "widths": "16"}).widths == (16,)


def test_class_names_are_read_from_text() -> None:
    assert TrainSpec.read({**TRAIN, "classes": "pore, active material"}).classes == ("pore", "active material")


def test_a_spec_does_not_change() -> None:
    spec = SegmentSpec.read(SEGMENT)
    with pytest.raises(ValueError, match="frozen"):
        spec.overlap = 0.1  # type: ignore[misc]


@pytest.mark.parametrize("model", [SegmentSpec, TrainSpec])
def test_every_option_says_what_it_means(model: type[SegmentSpec | TrainSpec]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name


def test_floats_are_read_from_text() -> None:
    assert parse_floats("0.1,0.022,0.022", "--voxel-size") == (0.1, 0.022, 0.022)
    assert parse_floats("3", "--voxel-size") == (3.0, 3.0, 3.0)
    assert parse_floats(None, "--voxel-size") is None
    for text in ("1,2", "a", "", "1,2,3,4"):
        with pytest.raises(SpecError, match=f"--voxel-size {text!r}: write three numbers"):
            parse_floats(text, "--voxel-size")
