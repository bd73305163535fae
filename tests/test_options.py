"""One spec behind flags, YAML, --set and keywords: whichever way an option comes, it means the same."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic.fields import FieldInfo

from volseg.cli.main import build_parser
from volseg.cli.options import group_of, parse, read_spec
from volseg.errors import SpecError
from volseg.recipes import resolve
from volseg.spec import AugmentSpec, SegmentSpec, Spec, TrainSpec

# Every option with its text on the command line, its value in YAML, and what Python gets.
SEGMENT: dict[str, tuple[str, Any, Any]] = {
    "input": ("image.zarr", "image.zarr", "image.zarr"),
    "output": ("s3://bucket/out.zarr", "s3://bucket/out.zarr", "s3://bucket/out.zarr"),
    "model": ("unet", "unet", "unet"),
    "patch": ("1,256,300", [1, 256, 300], (1, 256, 300)),
    "overlap": ("0.25", 0.25, 0.25),
    "blend": ("constant", "constant", "constant"),
    "tile": ("1,256,300", [1, 256, 300], (1, 256, 300)),
    "axis": ("z,y", ["z", "y"], ("z", "y")),
    "mirror": ("", True, True),
    "roi": ("0:14,:,-3:", "0:14,:,-3:", "0:14,:,-3:"),
    "threshold": ("0.7", 0.7, 0.7),
    "probabilities": ("", True, True),
    "precision": ("bf16", "bf16", "bf16"),
    "nan": ("fill", "fill", "fill"),
    "block": ("128", 128, (128, 128, 128)),
    "chunks": ("32,64,64", "32,64,64", (32, 64, 64)),
    "shards": ("64,128,128", [64, 128, 128], (64, 128, 128)),
    "executor": ("serial", "serial", "serial"),
    "workers": ("2", 2, 2),
    "address": ("ray://head:10001", "ray://head:10001", "ray://head:10001"),
    "device": ("cpu", "cpu", "cpu"),
    "batch": ("3", 3, 3),
    "memory": ("1.5", 1.5, 1.5),
    "allow_device": ("0a1b2c3d4e5f", "0a1b2c3d4e5f", "0a1b2c3d4e5f"),
    "seams": ("off", "off", "off"),
    "seam_memory": ("0.5", 0.5, 0.5),
    "attempts": ("5", 5, 5),
    "overwrite": ("", True, True),
    "webhook": ("https://lab/done", "https://lab/done", "https://lab/done"),
}
TRAIN: dict[str, tuple[str, Any, Any]] = {
    "image": ("a.zarr,b.zarr", ["a.zarr", "b.zarr"], ("a.zarr", "b.zarr")),
    "labels": ("c.zarr, d.zarr", ["c.zarr", "d.zarr"], ("c.zarr", "d.zarr")),
    "out": ("unet", "unet", "unet"),
    "mask": ("m.zarr,n.zarr", ["m.zarr", "n.zarr"], ("m.zarr", "n.zarr")),
    "offset": ("1,2,3;0", [[1, 2, 3], 0], ((1, 2, 3), (0, 0, 0))),
    "volume_weights": ("1,2.5", [1, 2.5], (1.0, 2.5)),
    "train_roi": ("0:14,:,:;:,0:4,:+:,8:9,:", ["0:14,:,:", ":,0:4,:+:,8:9,:"], ("0:14,:,:", ":,0:4,:+:,8:9,:")),
    "val_roi": ("14:17,:,:", "14:17,:,:", ("14:17,:,:",)),
    "split": ("0.8", 0.8, 0.8),
    "folds": ("5", 5, 5),
    "classes": ("air, pore,active material", ["air", "pore", "active material"], ("air", "pore", "active material")),
    "ignore": ("254", 254, 254),
    "recipe": ("salt-unet", "salt-unet", "salt-unet"),
    "init": ("other-unet", "other-unet", "other-unet"),
    "architecture": ("fcn8", "fcn8", "fcn8"),
    "dims": ("2", 2, 2),
    "axis": ("x", "x", "x"),
    "patch": ("1,64,64", "1,64,64", (1, 64, 64)),
    "side": ("128", 128, 128),
    "widths": ("16,32,64", [16, 32, 64], (16, 32, 64)),
    "pools": ("1,2,2;2,2,2", [[1, 2, 2], [2, 2, 2]], ((1, 2, 2), (2, 2, 2))),
    "convs": ("3", 3, 3),
    "activation": ("silu", "silu", "silu"),
    "norm": ("group", "group", "group"),
    "dropout": ("0.1", 0.1, 0.1),
    "network": ("{residual: true}", {"residual": True}, {"residual": True}),
    "loss": ("focal", "focal", "focal"),
    "class_weights": ("1,2", [1, 2], (1.0, 2.0)),
    "focal_gamma": ("1", 1, 1.0),
    "tversky_beta": ("0.6", 0.6, 0.6),
    "batch": ("8", 8, 8),
    "accumulate": ("2", 2, 2),
    "learning_rate": ("0.001", 0.001, 0.001),
    "weight_decay": ("0", 0, 0.0),
    "schedule": ("restarts", "restarts", "restarts"),
    "cycles": ("4", 4, 4),
    "snapshots": ("", True, True),
    "warm_up": ("0", 0, 0.0),
    "average": ("no", False, False),
    "validations": ("20", 20, 20),
    "patience": ("10", 10, 10),
    "augment": ("no", False, False),
    "augmentation": ("{rings: 0.3}", {"rings": 0.3}, AugmentSpec(rings=0.3)),
    "precision": ("bf16", "bf16", "bf16"),
    "max_steps": ("500", 500, 500),
    "max_minutes": ("2.5", 2.5, 2.5),
    "seed": ("7", 7, 7),
    "resume": ("no", False, False),
    "overwrite": ("", True, True),
    "device": ("cpu", "cpu", "cpu"),
    "threads": ("1", 1, 1),
    "workers": ("1:4", "1:4", (1, 4)),
    "address": ("ray://head:10001", "ray://head:10001", "ray://head:10001"),
    "sync_norm": ("", True, True),
    "attempts": ("5", 5, 5),
    "webhook": ("https://lab/done", "https://lab/done", "https://lab/done"),
}
AUGMENT: dict[str, tuple[str, Any]] = {
    "flips": ("no", False),
    "turns": ("never", "never"),
    "warp": ("0.1", 0.1),
    "angle": ("5", 5.0),
    "zoom": ("0.1", 0.1),
    "shift": ("0.2", 0.2),
    "elastic": ("0", 0.0),
    "grey": ("0.2", 0.2),
    "contrast": ("0.2", 0.2),
    "brightness": ("0.3", 0.3),
    "gamma": ("0.4", 0.4),
    "noise": ("0.5", 0.5),
    "shading": ("0.6", 0.6),
    "blur": ("0.7", 0.7),
    "rings": ("0.8", 0.8),
    "drift": ("0.9", 0.9),
}
# What only goes together with another option, and what excludes others.
PARTNERS = {"tile": {"blend": "exact"}, "snapshots": {"schedule": "restarts"}, "patience": {"val_roi": ":,:,:"}}
EXCLUSIVE = {"split", "folds", "tile"}
# Groups of options have no flag of their own.
NO_FLAG = {"network", "augmentation"}
CASES = [(SegmentSpec, "segment", SEGMENT), (TrainSpec, "train", TRAIN)]
ONE_BY_ONE = [(model, command, table, name) for model, command, table in CASES for name in table]


def read(command: str, *words: str) -> Spec:
    parser, known = build_parser()
    arguments = parse(parser, known, [command, *words])
    return read_spec(arguments, TrainSpec, resolve) if command == "train" else read_spec(arguments, SegmentSpec)


def refused(command: str, *words: str) -> str:
    with pytest.raises(SpecError) as caught:
        read(command, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def as_flags(name: str, text: str) -> list[str]:
    if name in {"input", "output"}:
        return [text]
    if name in NO_FLAG:
        return ["--set", f"{name}={text}"]
    flag = "--" + name.replace("_", "-")
    return [flag.replace("--", "--no-") if text == "no" else flag] if text in {"", "no"} else [flag, text]


def required(model: type[Spec], table: dict[str, tuple[str, Any, Any]], but: str) -> dict[str, str]:
    return {n: table[n][0] for n, field in model.model_fields.items() if field.is_required() and n != but}


def from_file(command: str, path: str) -> list[str]:
    return [path] if command == "train" else ["--spec", path]


def write(path: Path, values: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


@pytest.mark.parametrize(("model", "command", "table"), CASES)
def test_the_tables_hold_every_option_and_no_default(model: type[Spec], command: str, table: dict[str, Any]) -> None:
    assert list(table) == list(model.model_fields)
    for name, field in model.model_fields.items():
        assert table[name][2] != field.default


@pytest.mark.parametrize(("model", "command", "table", "name"), ONE_BY_ONE)
def test_an_option_means_the_same_whichever_way_it_comes(
    tmp_path: Path, model: type[Spec], command: str, table: dict[str, tuple[str, Any, Any]], name: str
) -> None:
    text, value, expected = table[name]
    rest = required(model, table, but=name) | PARTNERS.get(name, {})
    if command == "train" and len(expected if isinstance(expected, tuple) else ()) != 2:
        rest |= {n: rest[n].split(",")[0] for n in ("image", "labels") if n in rest}
    words = [word for n, t in rest.items() for word in as_flags(n, t)]
    if name in {"input", "output"}:
        words = [table[n][0] for n in ("input", "output")] + as_flags("model", table["model"][0])
        by_flag = read(command, *words)
    else:
        by_flag = read(command, *words, *as_flags(name, text))
    assert getattr(by_flag, name) == expected
    by_yaml = read(command, *from_file(command, write(tmp_path / "spec.yaml", {**rest, name: value})))
    from_rest = write(tmp_path / "rest.yaml", rest)
    assignment = f"{name}={yaml.safe_dump(value, default_flow_style=True)}"
    by_set = read(command, *from_file(command, from_rest), "--set", assignment)
    read_values = resolve if command == "train" else model.read
    by_keyword = read_values({**rest, name: value})
    by_python = read_values({**rest, name: expected})
    assert by_flag == by_yaml == by_set == by_keyword == by_python


@pytest.mark.parametrize(("model", "command", "table"), CASES)
def test_all_options_together(tmp_path: Path, model: type[Spec], command: str, table: dict[str, Any]) -> None:
    table = {name: row for name, row in table.items() if name not in EXCLUSIVE}
    first = [name for name in ("input", "output") if name in table]
    flags = [
        word for name in [*first, *(n for n in table if n not in first)] for word in as_flags(name, table[name][0])
    ]
    read_values = resolve if command == "train" else model.read
    expected = read_values({name: value for name, (_, _, value) in table.items()})
    assert read(command, *flags) == expected
    values = {name: value for name, (_, value, _) in table.items()}
    assert read(command, *from_file(command, write(tmp_path / "spec.yaml", values))) == expected
    texts = {name: {"": "yes"}.get(text, text) for name, (text, _, _) in table.items()}
    assert read(command, *(word for name, text in texts.items() for word in ("--set", f"{name}={text}"))) == expected


@pytest.mark.parametrize("name", AUGMENT)
def test_a_group_has_dotted_flags(tmp_path: Path, name: str) -> None:
    assert list(AUGMENT) == list(AugmentSpec.model_fields)
    text, expected = AUGMENT[name]
    assert getattr(AugmentSpec(), name) != expected
    base = ("--image", "a", "--labels", "b", "--out", "c")
    by_flag = read("train", *base, *as_flags(f"augmentation.{name}", text))
    by_set = read("train", *base, "--set", f"augmentation.{name}={text}")
    by_yaml = read("train", write(tmp_path / "s.yaml", {"augmentation": {name: expected}}), *base)
    assert by_flag == by_set == by_yaml
    assert isinstance(by_flag, TrainSpec)
    assert by_flag.augmentation == AugmentSpec.read({name: expected})


def test_plan_takes_what_segment_takes() -> None:
    words = ["image.zarr", "out.zarr", "--model", "unet", "--patch", "64", "--memory", "2"]
    assert read("plan", *words) == read("segment", *words)


# ---------------------------------------------------------------- who wins


def test_flags_win_over_the_file_and_set_wins_over_everything(tmp_path: Path) -> None:
    path = write(tmp_path / "spec.yaml", {"model": "unet", "input": "a", "output": "b", "overlap": 0.1, "workers": 1})
    spec = read("segment", "--spec", path, "--workers", "2", "--overlap", "0.2", "--set", "overlap=0.3", "c")
    assert isinstance(spec, SegmentSpec)
    assert (spec.input, spec.output, spec.workers, spec.overlap) == ("c", "b", 2, 0.3)


def test_the_last_assignment_wins() -> None:
    spec = read("segment", "a", "b", "--model", "m", "--set", "overlap=0.1", "--set", "overlap = 0.2")
    assert isinstance(spec, SegmentSpec)
    assert spec.overlap == 0.2


def test_a_switch_can_be_turned_off_again(tmp_path: Path) -> None:
    path = write(tmp_path / "spec.yaml", {"model": "m", "input": "a", "output": "b", "probabilities": True})
    spec = read("segment", "--spec", path, "--no-probabilities")
    assert isinstance(spec, SegmentSpec)
    assert not spec.probabilities


def test_a_default_comes_back_by_null(tmp_path: Path) -> None:
    path = write(tmp_path / "spec.yaml", {"model": "m", "input": "a", "output": "b", "workers": 3})
    spec = read("segment", "--spec", path, "--set", "workers=null")
    assert isinstance(spec, SegmentSpec)
    assert spec.workers is None


def test_a_range_is_no_sum_of_sixties(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("image: a\nlabels: b\nout: c\nworkers: 1:4\nlearning_rate: 1e-3\nbatch: 010\nclasses: 0,1\n")
    spec = read("train", str(path))
    assert isinstance(spec, TrainSpec)
    assert (spec.workers, spec.learning_rate, spec.batch, spec.classes) == ((1, 4), 1e-3, 10, ("0", "1"))


# ---------------------------------------------------------------- nested assignments


def test_a_dotted_key_sets_one_field_of_a_group(tmp_path: Path) -> None:
    class Inner(Spec):
        rate: float = 1.0
        steps: int = 1

    class Outer(Spec):
        schedule: Inner = Inner()

    class Arguments:
        spec = write(tmp_path / "spec.yaml", {"schedule": {"steps": 5}})
        assignments = ("schedule.rate=0.5",)

    found = read_spec(Arguments, Outer)  # type: ignore[arg-type]
    assert found.schedule == Inner(rate=0.5, steps=5)
    Arguments.spec = ""
    assert read_spec(Arguments, Outer).schedule == Inner(rate=0.5)  # type: ignore[arg-type]
    Arguments.assignments = ("schedule.rte=0.5",)
    with pytest.raises(SpecError, match=r"unknown option 'schedule\.rte'"):
        read_spec(Arguments, Outer)  # type: ignore[arg-type]


def test_a_dot_in_a_plain_option_is_refused() -> None:
    base = ("a", "b", "--model", "m")
    assert "option 'workers': {'x': 2} is not allowed" in refused("segment", *base, "--set", "workers.x=2")
    message = refused("segment", *base, "--workers", "2", "--set", "workers.x=2")
    assert message == "--set workers.x: 'workers' is no group of options: leave out the dot"


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("a", "b", "--model", "m", "--ovelap", "0.1"), "unknown argument '--ovelap' (did you mean '--overlap'?)"),
        (("a", "b", "--model", "m", "--ovelap=0.1"), "(did you mean '--overlap'?)"),
        (("a", "b", "c", "--model", "m"), "unknown argument 'c'"),
        (("a", "b", "--model", "m", "--over", "0.1"), "unknown argument '--over'"),
        (("a", "b", "--model", "m", "--workers"), "argument --workers: expected one argument"),
        (("a", "b", "--model", "m", "--set", "overlap"), "--set 'overlap' has no value: write --set key=value"),
        (("a", "b", "--model", "m", "--set", "ovelap=1"), "unknown option 'ovelap' (did you mean 'overlap'?)"),
        (("a", "b", "--model", "m", "--set", "overlap=[1"), "--set 'overlap=[1': the value is no YAML: quote it"),
        (("a", "b", "--model", "m", "--overlap", "much"), "option 'overlap': 'much' is not allowed"),
        (("a", "b", "--model", "m", "--workers", "1.5"), "option 'workers': '1.5' is not allowed"),
        (("a",), "OUTPUT, MODEL must be given, as an argument or in the spec file"),
        ((), "INPUT, OUTPUT, MODEL must be given"),
    ],
)
def test_wrong_words_are_refused(words: tuple[str, ...], says: str) -> None:
    assert says in refused("segment", *words)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("input: a\noutput: b\nmodel: m\nbatchsize: 2\n", "unknown option 'batchsize' (did you mean 'batch'?)"),
        ("input: a\noutput: b\nmodel: m\nallow-device: x\n", "(did you mean 'allow_device'?)"),
        ("input: [", "is no YAML"),
        ("roi: 0:14,:,:\n", "quote values with colons, such as roi: '0:14,:,:'"),
        ("- a\n- b\n", "must hold 'option: value' lines"),
        ("", "must hold 'option: value' lines"),
        ("1: a\n", "must hold 'option: value' lines"),
        ("input: a\noutput: b\nmodel: 3\n", "option 'model': 3 is not allowed: Input should be a valid string"),
        ("\x00", "is no YAML"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(content)
    message = refused("segment", "--spec", str(path))
    assert says in message


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "none.yaml")
    assert refused("segment", "--spec", path) == (
        f"spec {path} cannot be read (No such file or directory); nothing was done: check the path"
    )
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\xd8")
    assert "is no YAML" in refused("segment", "--spec", str(tmp_path / "binary.yaml"))


def test_a_file_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text(f"input: !!python/object/apply:os.mkdir [{tmp_path / 'touched'}]\n")
    assert "is no YAML" in refused("segment", "--spec", str(path))
    assert not (tmp_path / "touched").exists()


# ---------------------------------------------------------------- help


def options(model: type[Spec], prefix: str = "") -> dict[str, FieldInfo]:
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        group = group_of(field)
        found |= {prefix + name: field} if group is None else options(group, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize(("command", "model"), [("segment", SegmentSpec), ("plan", SegmentSpec), ("train", TrainSpec)])
def test_help_explains_every_option(command: str, model: type[Spec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = " ".join(build_parser()[1][command].format_help().split())
    # A line of help may break after a hyphen or a slash.
    joined = text.replace("- ", "-")
    for name, field in options(model).items():
        assert field.description
        if name == "network":
            continue
        described = " ".join(field.description.split())
        if field.default is not None and not field.is_required() and field.annotation is not bool:
            shown = ";".join(field.default) if isinstance(field.default, tuple) else field.default
            described += f" [default: {shown}]"
        assert described in text or described.replace("- ", "-") in joined
        assert name.upper() in text if name in {"input", "output"} else f"--{name.replace('_', '-')}" in text
        if field.annotation is bool:
            assert f"--no-{name.replace('_', '-')}" in text
    assert ("SPEC.yaml" if command == "train" else "--spec FILE") in text
    assert "--set KEY=VALUE" in text


def test_help_shows_choices_and_shapes() -> None:
    text = build_parser()[1]["segment"].format_help()
    assert "--patch Z,Y,X" in text
    assert "--overlap F" in text
    assert "--workers N" in text
    assert "--blend {gaussian,constant,exact}" in text
    assert "--roi TEXT" in text
    text = build_parser()[1]["train"].format_help()
    assert "--dims {2,3}" in text
    assert "--widths LIST" in text
    assert "--workers N" in text
