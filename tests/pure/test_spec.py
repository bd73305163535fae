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
    assert (spec.overlap, spec.blend, spec.precision, spec.executor) == (None, "gaussian", "fp32", "auto")
    assert (spec.patch, spec.block, spec.workers, spec.batch, spec.threshold) == (None,) * 5
    assert TrainSpec.read(TRAIN).ignore == 255


@pytest.mark.parametrize(
    ("misspelt", "right"),
    [
        ("ovelap", "overlap"),
        ("train_rio", "train_roi"),
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
        ("blend", "hann", "'gaussian', 'constant' or 'exact'"),
        ("precision", "fp8", "'fp32', 'bf16', 'fp16' or 'auto'"),
        ("nan", "skip", "'error' or 'fill'"),
        ("executor", "spark", "'auto', 'serial', 'threads' or 'ray'"),
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


def test_steps_are_limited_where_nothing_else_limits_a_training() -> None:
    for options, most in (({}, 10_000), ({"max_minutes": 3}, 10**9), ({"max_minutes": 3, "max_steps": 20}, 20)):
        assert TrainSpec.read({**TRAIN, **options}).most_steps == most


def test_floats_are_read_from_text() -> None:
    assert parse_floats("0.1,0.022,0.022", "--voxel-size") == (0.1, 0.022, 0.022)
    assert parse_floats("3", "--voxel-size") == (3.0, 3.0, 3.0)
    assert parse_floats(None, "--voxel-size") is None
    for text in ("1,2", "a", "", "1,2,3,4"):
        with pytest.raises(SpecError, match=f"--voxel-size {text!r}: write three numbers"):
            parse_floats(text, "--voxel-size")


# ---------------------------------------------------------------- several volumes


def test_one_region_stands_for_all_volumes() -> None:
    both = {**TRAIN, "image": "a,b", "labels": "c,d"}
    spec = TrainSpec.read({**both, "train_roi": "0:3,:,:", "offset": "1,2,3;4,5,6"})
    assert spec.per_volume("train_roi") == ("0:3,:,:",) * 2
    assert spec.per_volume("offset") == ((1, 2, 3), (4, 5, 6))
    assert spec.per_volume("val_roi") == (None, None)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"image": "a,b"}, "2 image(s) and 1 labels: give one labels entry an image"),
        ({"mask": "a,b"}, "1 image(s) and 2 mask"),
        ({"volume_weights": "1,2"}, "1 image(s) and 2 volume_weights"),
        ({"volume_weights": "0"}, "volume_weights must all be above 0"),
        ({"train_roi": "0:1,:,:;1:2,:,:"}, "1 image(s) and 2 entries of train_roi"),
        ({"offset": "0;1"}, "1 image(s) and 2 entries of offset"),
        ({"split": 0.5, "val_roi": ":,:,:"}, "val_roi and split both say what validates"),
        ({"folds": 2, "split": 0.5}, "split and folds both say what validates"),
        ({"patience": 3}, "patience needs validation data"),
        ({"snapshots": True}, "snapshots are taken at the ends of cycles"),
        ({"workers": "0"}, "at least one worker"),
        ({"workers": "3:2"}, "LOW not above HIGH"),
        ({"workers": "two"}, "write a number of workers, or LOW:HIGH"),
        ({"class_weights": "rare"}, "option 'class_weights'"),
        ({"augmentation": {"rigns": 1}}, "unknown option 'augmentation.rigns' (did you mean 'augmentation.rings'?)"),
        ({"augmentation": {"rings": -1}}, "option 'augmentation.rings': -1 is not allowed"),
    ],
)
def test_options_that_do_not_go_together_are_refused(values: dict[str, Any], says: str) -> None:
    assert says in refused(TrainSpec, **values)


@pytest.mark.parametrize(("value", "expected"), [(2, (2, 2)), ("3", (3, 3)), ("1:4", (1, 4)), ([1, 2], (1, 2))])
def test_workers_are_a_number_or_a_range(value: object, expected: tuple[int, int]) -> None:
    assert TrainSpec.read({**TRAIN, "workers": value}).workers == expected


@pytest.mark.parametrize(("value", "expected"), [("balanced", "balanced"), ("1,2", (1.0, 2.0)), ([1, 2], (1.0, 2.0))])
def test_class_weights_are_numbers_or_balanced(value: object, expected: object) -> None:
    assert TrainSpec.read({**TRAIN, "class_weights": value}).class_weights == expected


@pytest.mark.parametrize("value", ["z,y,x", ["z", "y", "x"]])
def test_a_network_may_go_along_several_axes(value: object) -> None:
    assert SegmentSpec.read({**SEGMENT, "axis": value}).axis == ("z", "y", "x")
    assert "every axis at most once" in refused(SegmentSpec, axis="z,z")
