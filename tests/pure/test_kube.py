"""A spec as a RayJob: what is in it, what can never be in it, and which requests are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from volseg.errors import SpecError
from volseg.kube import Placement, kind_of, load_base, render_job, to_yaml
from volseg.spec import SegmentSpec, TrainSpec
from volseg.spec.batch import BatchSpec

IMAGE = "registry.example.org/tomo/volseg:0.1.0"
PLACES = {"input": "s3://scans/a.zarr", "output": "s3://seg/a.zarr", "model": "s3://models/pores"}
TRAIN = {"image": "s3://scans/a.zarr", "labels": "s3://labels/a.zarr", "out": "s3://models/pores"}
CANARY = "canary7Qz0"


def render(values: dict[str, Any], **placement: Any) -> dict[str, Any]:
    models: dict[str, type[SegmentSpec] | type[TrainSpec]] = {
        "segment": SegmentSpec, "train": TrainSpec, "batch": BatchSpec
    }  # fmt: skip
    placement.setdefault("image", IMAGE)
    return render_job(models[kind_of(values)].read(values), Placement(**placement))


def spec_in(job: dict[str, Any]) -> dict[str, Any]:
    """Return the spec that a RayJob carries."""
    annotations = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["annotations"]
    found = yaml.safe_load(annotations["volseg/spec"])
    assert isinstance(found, dict)
    return found


def workers_of(job: dict[str, Any]) -> dict[str, Any]:
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert isinstance(group, dict)
    return group


def test_the_base_is_one() -> None:
    cluster, job = load_base()
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    # Nobody changes what the next one gets.
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "disabled"
    again, job = load_base()
    assert job["spec"]["rayClusterSpec"]["authOptions"] == again["spec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize(
    ("values", "kind", "workers", "replicas"),
    [
        (PLACES, "segment", 3, (1, 3)),
        (TRAIN, "train", 3, (3, 3)),
        (TRAIN | {"workers": "2:3"}, "train", "2:3", (2, 3)),
        ({**PLACES, "input": "s3://scans/2026-*/recon.zarr"}, "batch", 3, (1, 3)),
        ({"volumes": {"s3://a/b": "s3://c/d"}, "model": "s3://models/pores", "workers": 2}, "batch", 2, (1, 3)),
    ],
)
def test_each_kind(values: dict[str, Any], kind: str, workers: object, replicas: tuple[int, int]) -> None:
    job = render(values, gpus=3, namespace="tomo")
    assert (job["kind"], job["apiVersion"]) == ("RayJob", "ray.io/v1")
    assert job["metadata"]["namespace"] == "tomo"
    assert job["metadata"]["name"].startswith(f"volseg-{kind}-")
    assert job["spec"]["entrypoint"] == f"python /opt/volseg/jobs/{kind}.py /etc/volseg/spec.yaml"
    assert spec_in(job)["workers"] == workers
    group = workers_of(job)
    assert (group["minReplicas"], group["replicas"], group["maxReplicas"]) == (0, *replicas)
    images = [pod["containers"][0]["image"] for pod in pods_of(job)]
    assert images == [IMAGE] * 3


def pods_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [
        cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"],
        job["spec"]["submitterPodTemplate"]["spec"],
    ]  # fmt: skip


def test_the_same_spec_is_the_same_job() -> None:
    name = render(PLACES)["metadata"]["name"]
    assert render(dict(PLACES), queue="night", namespace="tomo")["metadata"]["name"] == name
    assert render({**PLACES, "overlap": 0.25})["metadata"]["name"] != name
    assert render(PLACES, name="mine")["metadata"]["name"] == "mine"


def test_machines_without_gpus() -> None:
    job = render({**PLACES, "workers": 10}, gpus=0, cpus=4, memory="32Gi")
    group = workers_of(job)
    assert (group["groupName"], group["replicas"], group["maxReplicas"]) == ("cpu", 1, 3)
    pod = group["template"]["spec"]
    for part in pod["containers"][0]["resources"].values():
        assert part == {"cpu": "4", "memory": "32Gi", "ephemeral-storage": "20Gi"}
    assert not any("nvidia" in toleration["key"] for toleration in pod["tolerations"])
    assert spec_in(job)["device"] == "cpu"
    assert spec_in(render(PLACES))["device"] == "cuda"
    assert workers_of(render({**PLACES, "device": "cpu", "workers": 4}))["groupName"] == "cpu"


def test_a_queue_of_kueue() -> None:
    job = render(PLACES, queue="night")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "night"
    assert job["spec"]["suspend"] is True
    assert "suspend" not in render(PLACES)["spec"]


def test_secret_mount_and_settings_reach_head_and_workers() -> None:
    job = render(
        {**PLACES, "input": "/data/scans/a.zarr"}, s3_secret="lab-s3", service_account="lab",
        mounts={"scans": "/data"}, environment={"VOLSEG_S3_RATE": "200"},
    )  # fmt: skip
    *working, submitter = pods_of(job)
    for pod in working:
        container = pod["containers"][0]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        assert environment["AWS_SHARED_CREDENTIALS_FILE"] == "/etc/volseg-s3/credentials"
        assert environment["VOLSEG_S3_RATE"] == "200"
        assert pod["serviceAccountName"] == "lab"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/etc/volseg-s3"]["secret"]["secretName"] == "lab-s3"
        assert mounts["/data"]["persistentVolumeClaim"] == {"claimName": "scans"}
    assert "lab-s3" not in json.dumps(submitter)


@settings(max_examples=25)
@given(
    st.fixed_dictionaries(
        {
            "model": st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs"))),
            "roi": st.sampled_from(["0:14,:,:", "0:1,0:2,0:3"]),
            "overlap": st.floats(0, 0.99),
        },
        optional={"block": st.sampled_from([[8, 16, 10]]), "probabilities": st.booleans()},
    )
)
def test_yaml_says_what_was_asked(values: dict[str, Any]) -> None:
    """Whatever the text, both YAML documents, the RayJob and the spec inside, bring it back."""
    asked = {**PLACES, **values, "model": f"s3://models/{values['model']}"}
    try:
        job = render(asked)
    except SpecError as error:
        assert "whoever sees the RayJob could read" in str(error)  # noqa: PT017 - random text may look like a token
        return
    again = yaml.safe_load(to_yaml(job))
    assert again == job
    assert SegmentSpec.read(spec_in(again)) == SegmentSpec.read(asked | {"workers": 1, "device": "cuda"})


@pytest.mark.parametrize("text", ["y", "n", "true", "no", "1e5", "0x10", "12:30", "~", "null", "", " a", "a: b", "# a"])
def test_text_stays_text(text: str) -> None:
    written = to_yaml({"key": text, "list": [text]})
    assert yaml.safe_load(written) == {"key": text, "list": [text]}
    # Kubernetes' own reader takes more words for truth values than this one.
    assert f'"{text}"' in written


@pytest.mark.parametrize(
    ("values", "placement", "message"),
    [
        ({"input": "/scans/a.zarr"}, {}, r"input /scans/a\.zarr is a local path, which the cluster's pods do not see"),
        ({"output": "file:///w/out.zarr"}, {}, r"output file:///w/out\.zarr is a local path"),
        ({"model": "/data/../etc/m"}, {"mounts": {"c": "/data"}}, "is a local path"),
        ({"executor": "serial"}, {}, "the spec says executor serial, but a RayJob runs on the workers"),
        ({"address": "10.0.0.1:6379"}, {}, "the spec says address"),
        ({"device": "cuda"}, {"gpus": 0}, "device cuda, but --gpus 0"),
        ({"device": "cpu"}, {"gpus": 1}, "device cpu, but --gpus 1"),
        ({}, {"gpus": -1}, "--gpus -1 is below 0"),
        ({}, {"cpus": 0}, "--cpus 0 is below 1"),
        ({}, {"namespace": "Tomo"}, "--namespace 'Tomo' is no name for Kubernetes"),
        ({}, {"name": "9lives"}, "begins with a letter"),
        ({}, {"name": "a" * 48}, "at most 47 long"),
        ({}, {"queue": "a.b"}, "--queue 'a.b' is no name"),
        ({}, {"memory": "16GB"}, "--memory '16GB' is no amount"),
        ({}, {"mounts": {"claim": "data"}}, "the folder must be an absolute one"),
        ({}, {"mounts": {"claim": "/tmp/ray/x"}}, "the folder must be an absolute one"),
        ({}, {"mounts": {"claim": "/"}}, "the folder must be an absolute one"),
        ({}, {"environment": {"RAY_AUTH_MODE": "disabled"}}, "--env RAY_AUTH_MODE would change"),
        ({}, {"environment": {"HOME": "/root"}}, "--env HOME would change"),
        ({}, {"environment": {"A B": "c"}}, "--env 'A B' is no name of a variable"),
        ({"model": "s3://m/" + "x" * 300_000}, {}, "Kubernetes keeps 256 KiB of annotations"),
    ],
)
def test_refusals(values: dict[str, Any], placement: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as raised:
        render(PLACES | values, **placement)
    assert "nothing was rendered" in str(raised.value)


def test_a_training_needs_all_its_workers_and_a_segmentation_takes_what_it_gets() -> None:
    with pytest.raises(SpecError, match=r"3 workers, which need a GPU each, and --gpus is 2: .*say --gpus 3"):
        render(TRAIN | {"workers": "3:4"}, gpus=2)
    assert workers_of(render(TRAIN | {"workers": "2:4"}, gpus=2))["replicas"] == 2
    job = render({**PLACES, "workers": 4}, gpus=2)
    assert (workers_of(job)["maxReplicas"], spec_in(job)["workers"]) == (2, 4)


@pytest.mark.parametrize(
    ("values", "placement"),
    [
        ({"input": f"s3://AKIDEXAMPLE:{CANARY}@scans/a.zarr"}, {}),
        ({"input": f"https://{CANARY}@host/a.zarr"}, {}),
        ({"input": f"https://host/a.zarr?X-Amz-Signature={CANARY}"}, {}),
        ({"output": f"https://host/a.zarr?sv=1&sig={CANARY}"}, {}),
        ({"model": f"https://host/m?access_token={CANARY}"}, {}),
        ({"model": f"s3://models/AKIAIOSFODNN7EXAMPLE/{CANARY}"}, {}),
        ({"roi": f"Bearer {CANARY}abcdefghijkl"}, {}),
        ({"roi": f"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.{CANARY}"}, {}),
        ({"roi": f"-----BEGIN RSA PRIVATE KEY-----{CANARY}"}, {}),
        ({}, {"environment": {"AWS_SECRET_ACCESS_KEY": CANARY}}),
        ({}, {"environment": {"AWS_ACCESS_KEY_ID": CANARY}}),
        ({}, {"environment": {"AWS_SESSION_TOKEN": CANARY}}),
        ({}, {"environment": {"RAY_AUTH_TOKEN": CANARY}}),
        ({}, {"environment": {"DB_PASSWORD": CANARY}}),
        ({}, {"environment": {"AWS_ENDPOINT_URL": f"https://user:{CANARY}@s3.example.org"}}),
        ({}, {"image": f"user:{CANARY}@registry.example.org/volseg:1"}),
        ({}, {"image": f"https://user:{CANARY}@registry.example.org/volseg"}),
        ({"volumes": {f"https://u:{CANARY}@host/a": "s3://c/d"}, "model": "s3://m/p"}, {}),
        (TRAIN | {"init": f"https://u:{CANARY}@host/m"}, {}),
        (TRAIN | {"network": {"note": f"https://u:{CANARY}@host/m"}}, {}),
    ],
)
def test_credentials_never_appear(values: dict[str, Any], placement: dict[str, Any]) -> None:
    whole = values if {"volumes", "image"} & set(values) else PLACES | values
    with pytest.raises(SpecError) as raised:
        render(whole, **placement)
    assert CANARY not in str(raised.value)
    assert "nothing was rendered" in str(raised.value)


@pytest.mark.parametrize(
    "value", ["s3://scans/a@b/c.zarr", "s3://scans/day-?=/recon.zarr", "https://host/a.zarr?version=3", "s3://k/tokens"]
)
def test_what_only_looks_odd_is_fine(value: str) -> None:
    assert spec_in(render({**PLACES, "model": value}))["model"] == value


@pytest.mark.parametrize(
    "image", ["volseg", "volseg:0.1.0", "localhost:5000/a/b_c:x", "r.example.org/v@sha256:" + "0" * 64]
)
def test_names_of_images(image: str) -> None:
    assert image in json.dumps(render(PLACES, image=image))
