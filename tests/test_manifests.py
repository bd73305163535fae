"""deploy/kuberay and what `volseg k8s render` prints: valid against KubeRay's own schemas, and tight."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kube_schemas import Manifest, faults, read_yaml
from tests.kustomize import FOLDERS, KUBERAY, RECORDED, REPO, build, by_kubectl, by_name, digest
from volseg import __version__
from volseg.cli.main import main
from volseg.cli.options import load_yaml
from volseg.kube import Placement, load_base, render_job
from volseg.kube.render import SPEC_ANNOTATION, SPEC_FILE
from volseg.spec import SegmentSpec, TrainSpec

PLACES = {"input": "s3://scans/a.zarr", "output": "s3://seg/a.zarr", "model": "s3://models/pores"}
IMAGE = f"volseg:{__version__}"
DEFAULT = Placement(IMAGE)
RENDERED = {
    "segment": render_job(SegmentSpec.read(PLACES), DEFAULT),
    "train": render_job(
        TrainSpec.read({"image": "s3://a/b", "labels": "s3://c/d", "out": "s3://e/f", "workers": "2:4"}), DEFAULT
    ),
    "everything": render_job(
        SegmentSpec.read(PLACES | {"input": "/data/a.zarr"}),
        Placement(
            IMAGE, namespace="tomo", gpus=0, cpus=2, queue="night", service_account="lab", s3_secret="s3",
            mounts={"scans": "/data"}, environment={"VOLSEG_S3_RATE": "200"},
        ),
    ),
}  # fmt: skip
OVERLAYS = tuple(folder for folder in FOLDERS if folder.startswith("ray"))
JOBS = tuple(folder for folder in OVERLAYS if folder.startswith("rayjob"))


@cache
def manifests_of(name: str) -> list[Manifest]:
    """Return the manifests of a folder or a rendered job; who changes one copies it first."""
    return [RENDERED[name]] if name in RENDERED else build(KUBERAY / name)


def cluster_of(name: str) -> Manifest:
    """Return the spec of the cluster in an overlay or a rendered job."""
    (found,) = [m for m in manifests_of(name) if m["apiVersion"] == "ray.io/v1"]
    spec = found["spec"]
    cluster = spec["rayClusterSpec"] if found["kind"] == "RayJob" else spec
    assert isinstance(cluster, dict)
    return cluster


def pods_of(name: str) -> Iterator[tuple[str, dict[str, str], dict[str, Any]]]:
    """Yield role, labels and spec of every pod that comes of an overlay or a rendered job."""
    for manifest in manifests_of(name):
        spec = manifest["spec"] if manifest["kind"] != "ServiceAccount" else {}
        templates = {"submitter": spec.get("submitterPodTemplate"), "redis": spec.get("template")}
        if manifest["apiVersion"] == "ray.io/v1":
            cluster = cluster_of(name)
            templates |= {"head": cluster["headGroupSpec"]["template"]}
            (group,) = cluster["workerGroupSpecs"]
            templates |= {"worker": group["template"]}
        for role, template in templates.items():
            if template is not None:
                yield role, template["metadata"]["labels"], template["spec"]


# ---------------------------------------------------------------- valid


@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_gives_the_same(folder: str) -> None:
    """What these tests look at is what kubectl applies: it said so when the digests were written, or says it now."""
    ours = build(KUBERAY / folder)
    recorded = json.loads(RECORDED.read_text())[folder]
    assert digest(ours) == recorded, "changed? `python -m tests.kustomize`, where kubectl is"
    theirs = by_kubectl(KUBERAY / folder)
    assert theirs is None or by_name(theirs) == by_name(ours)


@pytest.mark.parametrize("name", [*FOLDERS, *RENDERED])
def test_every_manifest_is_valid(name: str) -> None:
    for manifest in manifests_of(name):
        assert faults(manifest) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_one_of_rays_kinds(name: str) -> None:
    kinds = [m["kind"] for m in manifests_of(name) if m["apiVersion"] == "ray.io/v1"]
    assert kinds == ["RayCluster" if name == "raycluster" else "RayJob"]


MISSPELT = [
    ("rayjob-segment", "RayJob", "spec.entrypoint", "entryPoint"),
    ("rayjob-segment", "RayJob", "spec.shutdownAfterJobFinishes", "shutdownAfterJobFinish"),
    ("rayjob-segment", "RayJob", "spec.ttlSecondsAfterFinished", "ttlSecondAfterFinished"),
    ("rayjob-segment", "RayJob", "spec.submitterPodTemplate", "submitterPodTemplates"),
    ("rayjob-segment", "RayJob", "spec.submitterConfig.backoffLimit", "backOffLimit"),
    ("rayjob-segment", "RayJob", "spec.rayClusterSpec.authOptions", "authOption"),
    ("rayjob-segment", "RayJob", "spec.rayClusterSpec.enableInTreeAutoscaling", "enableInTreeAutoScaling"),
    ("rayjob-segment", "RayJob", "spec.rayClusterSpec.autoscalerOptions.idleTimeoutSeconds", "idleTimeOutSeconds"),
    ("rayjob-train", "RayJob", "spec.rayClusterSpec.headGroupSpec.rayStartParams", "rayStartParam"),
    ("rayjob-train", "RayJob", "HEAD.serviceAccountName", "servicAccountName"),
    ("rayjob-train", "RayJob", "HEAD.securityContext.runAsNonRoot", "runAsNonroot"),
    ("rayjob-train", "RayJob", "HEAD.securityContext.seccompProfile", "secCompProfile"),
    ("rayjob-train", "RayJob", "HEAD.affinity.nodeAffinity", "nodeAfinity"),
    ("rayjob-train", "RayJob", "HEAD.containers.0.securityContext.readOnlyRootFilesystem", "readOnlyRootFileSystem"),
    ("raycluster", "RayCluster", "spec.gcsFaultToleranceOptions", "gcsFaultToleranceOption"),
    ("raycluster", "RayCluster", "spec.gcsFaultToleranceOptions.redisAddress", "redisAdress"),
    ("raycluster", "RayCluster", "WORKER.tolerations.0.operator", "operators"),
    ("raycluster", "RayCluster", "WORKER.terminationGracePeriodSeconds", "terminationGracePeriod"),
    ("raycluster", "RayCluster", "WORKER.containers.0.envFrom.0.configMapRef", "configmapRef"),
    ("raycluster", "RayCluster", "WORKER.containers.0.resources.limits", "limit"),
    ("raycluster", "RayCluster", "WORKER.containers.0.securityContext.capabilities.drop", "drops"),
    ("raycluster", "RayCluster", "WORKER.volumes.0.emptyDir.sizeLimit", "sizelimit"),
    ("raycluster", "RayCluster", "WORKER.containers.0.volumeMounts.0.mountPath", "mountpath"),
    ("raycluster", "RayCluster", "spec.workerGroupSpecs.0.maxReplicas", "maxReplica"),
    ("raycluster", "RayCluster", "metadata.labels", "label"),
    ("raycluster", "StatefulSet", "spec.volumeClaimTemplates", "volumeClaimTemplate"),
    ("raycluster", "StatefulSet", "spec.template.spec.containers.0.readinessProbe", "readynessProbe"),
    ("raycluster", "Service", "spec.selector", "selectors"),
    ("namespace", "NetworkPolicy", "spec.podSelector", "podSelectors"),
    ("namespace", "NetworkPolicy", "spec.policyTypes", "policyType"),
    ("namespace", "NetworkPolicy", "spec.egress.0.to.0.podSelector", "podSelectr"),
    ("namespace", "PodDisruptionBudget", "spec.minAvailable", "minAvailible"),
    ("namespace", "ServiceAccount", "metadata", "meta"),
]


@pytest.mark.parametrize(("folder", "kind", "place", "wrong"), MISSPELT)
def test_a_misspelt_field_is_caught(folder: str, kind: str, place: str, wrong: str) -> None:
    manifest = copy.deepcopy(next(m for m in manifests_of(folder) if m["kind"] == kind))
    cluster = "spec.rayClusterSpec" if kind == "RayJob" else "spec"
    place = place.replace("HEAD", f"{cluster}.headGroupSpec.template.spec")
    place = place.replace("WORKER", f"{cluster}.workerGroupSpecs.0.template.spec")
    *path, last = place.split(".")
    value: Any = manifest
    for key in path:
        value = value[int(key)] if isinstance(value, list) else value[key]
    value[wrong] = value.pop(last)
    assert any(repr(wrong) in fault for fault in faults(manifest))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("authOptions.mode", "tokens"),
        ("autoscalerOptions.version", "v3"),
        ("headGroupSpec.rayStartParams.num-cpus", 0),
        ("enableInTreeAutoscaling", "true"),
        ("workerGroupSpecs.0.maxReplicas", "8"),
    ],
)
def test_a_wrong_value_is_caught(place: str, value: object) -> None:
    manifest = copy.deepcopy(RENDERED["segment"])
    inner: Any = manifest["spec"]["rayClusterSpec"]
    *path, last = place.split(".")
    for key in path:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[last] = value
    assert any(str(value) in fault for fault in faults(manifest))


def test_what_stands_twice_or_is_no_field_of_kustomize_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="twice"):
        read_yaml("spec: 1\nspec: 2\n")
    (tmp_path / "kustomization.yaml").write_text("resource: []\n")
    with pytest.raises(AssertionError, match="'resource'"):
        build(tmp_path)
    assert faults({"apiVersion": "v1", "kind": "Pot", "metadata": {}}) == ["no schema of v1 Pot"]


# ---------------------------------------------------------------- one source


@pytest.mark.parametrize(
    ("folder", "placement"),
    [
        ("rayjob-segment", {}),
        ("rayjob-train", {}),
        ("rayjob-segment-kueue", {"queue": "volseg"}),
        ("rayjob-segment-s3-secret", {"s3_secret": "volseg-s3"}),
    ],
)
def test_an_overlay_is_what_render_prints(folder: str, placement: dict[str, Any], tmp_path: Path) -> None:
    (overlay,) = [m for m in manifests_of(folder) if m["kind"] == "RayJob"]
    (tmp_path / "spec.yaml").write_text(annotation_of(overlay))
    values = load_yaml(str(tmp_path / "spec.yaml"))
    spec = (TrainSpec if "image" in values else SegmentSpec).read(values)
    name = overlay["metadata"]["name"]
    rendered = render_job(spec, Placement(IMAGE, name=name, gpus=8, **placement))
    assert yaml.safe_load(annotation_of(rendered)) == values
    head_annotations(rendered)[SPEC_ANNOTATION] = annotation_of(overlay)
    assert rendered == overlay


def head_annotations(job: Manifest) -> dict[str, str]:
    found = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["annotations"]
    assert isinstance(found, dict)
    return found


def annotation_of(job: Manifest) -> str:
    return head_annotations(job)[SPEC_ANNOTATION]


def test_versions_are_those_of_the_image() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (REPO / "constraints.txt").read_text(), re.MULTILINE))
    cluster, _ = load_base()
    assert cluster["spec"]["rayVersion"] == pins["ray"]
    images = {c["image"] for name in OVERLAYS for _, _, pod in pods_of(name) for c in pod["containers"]}
    assert images == {IMAGE, "redis:7.2.5"}
    for folder in JOBS:
        for image in re.findall(r"newTag: (\S+?)\}", (KUBERAY / folder / "kustomization.yaml").read_text()):
            assert image == __version__


# ---------------------------------------------------------------- tight


@pytest.mark.parametrize("name", [*OVERLAYS, *RENDERED])
def test_posture_of_every_pod(name: str) -> None:
    roles = set()
    for role, _, pod in pods_of(name):
        roles.add(role)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert "terminationGracePeriodSeconds" in pod or role == "submitter"
        # The autoscaler, which lives on the head, is the only one that talks to Kubernetes.
        assert pod.get("automountServiceAccountToken", True) is (role == "head")
        for container in pod["containers"]:
            assert_tight(container)
            assert set(container["resources"]["requests"]) >= {"cpu", "memory", "ephemeral-storage"}
    cluster = cluster_of(name)
    assert_tight(cluster["autoscalerOptions"])
    assert roles == {"head", "worker"} | ({"redis"} if name == "raycluster" else {"submitter"})


def assert_tight(container: dict[str, Any]) -> None:
    context = container["securityContext"]
    assert context["allowPrivilegeEscalation"] is False
    assert context["readOnlyRootFilesystem"] is True
    assert context["capabilities"] == {"drop": ["ALL"]}
    resources = container["resources"]
    assert resources["requests"] == resources["limits"]
    assert {"cpu", "memory"} <= set(resources["limits"])


@pytest.mark.parametrize("name", [*OVERLAYS, *RENDERED])
def test_what_must_be_written_can_be(name: str) -> None:
    """With a read-only root, everything that Ray and libraries write to is an emptyDir with a limit."""
    for role, _, pod in pods_of(name):
        if role == "redis":
            continue
        container = pod["containers"][0]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = {m["mountPath"]: volumes[m["name"]] for m in container["volumeMounts"] if not m.get("readOnly")}
        home = next(entry["value"] for entry in container["env"] if entry["name"] == "HOME")
        for folder in {"/tmp", home} | ({"/dev/shm", "/tmp/ray"} if role != "submitter" else set()):
            assert "sizeLimit" in mounts[folder]["emptyDir"]
        limit = container["resources"]["limits"]["ephemeral-storage"]
        on_disk = [m["emptyDir"] for m in mounts.values() if "medium" not in m.get("emptyDir", {"medium": "none"})]
        assert sum(gibibytes(m["sizeLimit"]) for m in on_disk) <= gibibytes(limit)
        if role != "submitter":
            assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
            group = cluster_of(name)["headGroupSpec" if role == "head" else "workerGroupSpecs"]
            params = (group if role == "head" else group[0])["rayStartParams"]
            shared = gibibytes(mounts["/dev/shm"]["emptyDir"]["sizeLimit"])
            assert int(params["object-store-memory"]) / 2**30 < shared < gibibytes(limit_of(container))
            # KubeRay would add volumes of these names where they were missing, the first without a useful limit.
            assert {"shared-mem", "ray-logs"} <= set(volumes)
    for mount in cluster_of(name)["autoscalerOptions"]["volumeMounts"]:
        assert mount["name"] in {v["name"] for r, _, pod in pods_of(name) if r == "head" for v in pod["volumes"]}


def limit_of(container: dict[str, Any]) -> str:
    return str(container["resources"]["limits"]["memory"])


def gibibytes(quantity: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) / (1024 if unit == "Mi" else 1)


@pytest.mark.parametrize("name", [*OVERLAYS, *RENDERED])
def test_posture_of_the_cluster(name: str) -> None:
    cluster = cluster_of(name)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    head, (group,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert group["minReplicas"] == 0
    assert group["maxReplicas"] >= group["replicas"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits.get("nvidia.com/gpu") == "1") is (group["groupName"] == "gpu")
    assert "nvidia.com/gpu" not in json.dumps(head)
    # Spot machines for workers, none for the head.
    assert "tolerations" not in head["template"]["spec"]
    terms = head["template"]["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    refused = {e["key"] for t in terms["nodeSelectorTerms"] for e in t["matchExpressions"] if e["operator"] == "NotIn"}
    tolerated = {t["key"] for t in group["template"]["spec"]["tolerations"]}
    assert {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} <= refused & tolerated
    # Autoscaler v2 wants pods that are never restarted in place, and KubeRay refuses any other policy.
    assert not any("restartPolicy" in pod for role, _, pod in pods_of(name) if role in {"head", "worker"})
    # Ray drains for so long when its pod is deleted (tests/test_elastic.py does that), and then is killed.
    (worker,) = [pod for role, _, pod in pods_of(name) if role == "worker"]
    variables = {entry["name"]: entry.get("value") for entry in worker["containers"][0]["env"]}
    patience = float(variables["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert 60 <= patience < worker["terminationGracePeriodSeconds"] - 10
    # Nothing may stand between Kubernetes' signal and `ray start`, which is the container's first process.
    assert not {"command", "args", "lifecycle"} & set(worker["containers"][0])
    (identity,) = {pod["serviceAccountName"] for role, _, pod in pods_of(name) if role in {"head", "worker"}}
    assert identity == ("lab" if name == "everything" else "volseg")


def test_the_long_running_cluster_survives_its_head() -> None:
    options = cluster_of("raycluster")["gcsFaultToleranceOptions"]
    service = by_name(manifests_of("raycluster"))["Service/volseg-redis"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert set(options["redisPassword"]["valueFrom"]) == {"secretKeyRef"}
    # It begins without any worker, and brings them when they are needed.
    assert cluster_of("raycluster")["workerGroupSpecs"][0]["replicas"] == 0


@pytest.mark.parametrize("name", [*JOBS, *RENDERED])
def test_posture_of_a_job(name: str) -> None:
    (job,) = [m for m in manifests_of(name) if m["kind"] == "RayJob"]
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] > 0
    assert "activeDeadlineSeconds" not in spec
    assert "runtimeEnvYAML" not in spec
    assert spec["submissionMode"] == "K8sJobMode"
    assert len(job["metadata"]["name"]) <= 47
    (head,) = [pod for role, _, pod in pods_of(name) if role == "head"]
    (volume,) = [v for v in head["volumes"] if "downwardAPI" in v]
    (mount,) = [m for m in head["containers"][0]["volumeMounts"] if m["name"] == volume["name"]]
    (item,) = volume["downwardAPI"]["items"]
    assert f"{mount['mountPath']}/{item['path']}" == SPEC_FILE
    assert item["fieldRef"]["fieldPath"] == f"metadata.annotations['{SPEC_ANNOTATION}']"
    assert spec["entrypoint"].endswith(SPEC_FILE)
    queued = "kueue.x-k8s.io/queue-name" in job["metadata"]["labels"]
    assert queued is spec.get("suspend", False) is (name in {"rayjob-segment-kueue", "everything"})


@pytest.mark.parametrize("name", OVERLAYS)
def test_nothing_goes_in_or_out_unnamed(name: str) -> None:
    policies = [m for m in manifests_of(name) if m["kind"] == "NetworkPolicy"]
    for role, labels, _ in pods_of(name):
        mine = [p["spec"] for p in policies if selects(p["spec"]["podSelector"], labels)]
        assert {kind for policy in mine for kind in policy["policyTypes"]} == {"Ingress", "Egress"}
        ingress = [rule for policy in mine for rule in policy.get("ingress", [])]
        egress = [rule for policy in mine for rule in policy.get("egress", [])]
        assert all(rule["from"] for rule in ingress)
        assert all(rule["to"] for rule in egress)
        outside = [rule for rule in ingress if any("namespaceSelector" in peer for peer in rule["from"])]
        assert all("ports" in rule for rule in outside)
        if role == "redis":
            assert not egress
            assert [selects(rule["from"][0]["podSelector"], head_labels(name)) for rule in ingress] == [True]
        anywhere = [r for r in egress if any(p.get("ipBlock", {}).get("cidr") == "0.0.0.0/0" for p in r["to"])]
        assert {port["port"] for rule in anywhere for port in rule["ports"]} <= {443, 6443}
        reached = {port["port"] for rule in outside for port in rule["ports"]}
        assert reached == {"head": {8080, 8265}, "redis": set()}.get(role, {8080})


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_head_is_evicted(name: str) -> None:
    (budget,) = [m["spec"] for m in manifests_of(name) if m["kind"] == "PodDisruptionBudget"]
    chosen = [role for role, labels, _ in pods_of(name) if selects(budget["selector"], labels)]
    assert chosen == ["head"]
    # Percentages and maxUnavailable are not for pods whose owner has no scale.
    assert isinstance(budget["minAvailable"], int)
    assert budget["minAvailable"] > 100


def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def head_labels(name: str) -> dict[str, str]:
    return next(labels for role, labels, _ in pods_of(name) if role == "head")


@pytest.mark.parametrize("name", [*FOLDERS, *RENDERED])
def test_no_credential_lies_in_a_manifest(name: str) -> None:
    """Secrets are named, never held: they are read from a Secret that is made by hand, as a file where that can be."""
    for manifest in manifests_of(name):
        assert manifest["kind"] != "Secret"
    for _, _, pod in pods_of(name) if name in OVERLAYS or name in RENDERED else ():
        for container in pod["containers"]:
            named = [e for e in container["env"] if re.search("SECRET|TOKEN|PASSW|KEY", e["name"])]
            assert all("value" not in entry and "secretKeyRef" in entry["valueFrom"] for entry in named)


def test_s3_by_a_secret_is_a_file() -> None:
    for role, _, pod in pods_of("rayjob-segment-s3-secret"):
        if role == "submitter":
            assert "s3" not in json.dumps(pod)
            continue
        container = pod["containers"][0]
        (path,) = [e["value"] for e in container["env"] if e["name"] == "AWS_SHARED_CREDENTIALS_FILE"]
        (mount,) = [m for m in container["volumeMounts"] if path.startswith(f"{m['mountPath']}/")]
        assert mount["readOnly"] is True
        (volume,) = [v for v in pod["volumes"] if v["name"] == mount["name"]]
        assert volume["secret"]["defaultMode"] & 0o007 == 0


# ---------------------------------------------------------------- the command


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main([str(word) for word in ("k8s", "render", *words)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text("# AKIAIOSFODNN7EXAMPLE in a comment\n" + yaml.safe_dump(PLACES | {"roi": "0:14,:,:"}))
    return path


def test_the_command_prints_one_rayjob(
    spec_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "canary-credential-7Qz0"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, canary)
    words = (spec_file, "--namespace", "tomo", "--image", "r.example.org/volseg:2", "--gpus", 4, "--queue", "night")
    code, out, err = run(capsys, *words, "--set", "overlap=0.25")
    assert (code, err) == (0, "")
    (job,) = read_yaml(out)
    assert faults(job) == []
    assert job["metadata"]["namespace"] == "tomo"
    carried = yaml.safe_load(annotation_of(job))
    assert carried == {**PLACES, "roi": "0:14,:,:", "overlap": 0.25, "workers": 4, "device": "cuda"}
    assert canary not in out
    assert "AKIA" not in out
    code, out, _ = run(capsys, *words, "--set", "overlap=0.25", "--json")
    assert json.loads(out) == job


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "overlpa=0.3"), r"unknown option 'overlpa' \(did you mean 'overlap'\?\)"),
        (("--env", "VOLSEG_S3_RATE"), "--env was given something without NAME="),
        (("--env", "AWS_SECRET_ACCESS_KEY=canary"), "--env AWS_SECRET_ACCESS_KEY is called like a credential"),
        (("--gpu", "3"), r"unknown argument '--gpu' \(did you mean '--gpus'\?\)"),
        (("--kind", "train"), "IMAGE, LABELS, OUT must be given"),
        (("--set", "output=w/out.zarr"), "output w/out.zarr is a local path"),
    ],
)
def test_the_command_refuses(
    spec_file: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    code, out, err = run(capsys, spec_file, *words)
    assert (code, out) == (2, "")
    assert re.search(message, err)
    assert "canary" not in err


def test_the_readmes_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it shows is rendered as written, and the folders and flags that it names are there."""
    text = (REPO / "README.md").read_text()
    section = text[text.index("### Kubernetes") : text.index("### Slurm")]
    (command,) = re.findall(r"^volseg k8s render (.*) > w/rayjob\.yaml$", section, re.MULTILINE)
    (spec,) = re.findall(r"```yaml\n(# w/s3\.yaml\n.*?)```", section, re.DOTALL)
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "s3.yaml").write_text(spec)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *command.split())
    assert (code, err) == (0, "")
    (job,) = read_yaml(out)
    assert faults(job) == []
    (_, submit), *_ = [line.split(" ", 1) for line in section.splitlines() if line.startswith("volseg submit")]
    assert submit == "submit w/s3.yaml --device cuda"
    for folder in re.findall(r"deploy/kuberay/([a-z-]+)", section):
        assert (KUBERAY / folder / "kustomization.yaml").exists()
    with pytest.raises(SystemExit):
        main(["k8s", "--help"])
    known = capsys.readouterr().out
    flags = [flag for flag in re.findall(r"`(--[a-z0-9-]+)", section) if flag != "--device"]
    assert flags
    assert all(flag in known for flag in flags)


def test_rendering_needs_no_cluster_and_no_torch(spec_file: Path) -> None:
    script = (
        "import sys; from volseg.cli.main import main\n"
        f"assert main(['k8s', 'render', {str(spec_file)!r}]) == 0\n"
        "assert not {'ray', 'torch', 'zarr'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=REPO, timeout=60)
