"""The client without a cluster: jobs on this machine, and how it speaks to a stand-in for Ray's Jobs API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.http_server import Answer, Server
from tests.support import Case, done_blocks, labels_of, segment, store, wait_until
from volseg.cli.options import load_yaml, read_spec
from volseg.client import AsyncClient, Client, JobStatus
from volseg.cluster import jobs as jobs_module
from volseg.cluster.jobs import AccessError, ClusterError, JobsApi, RayJob, UnprotectedError, UnreachableError
from volseg.cluster.submission import (
    attempt_of,
    check_runtime_env,
    command_words,
    entrypoint,
    identify,
    is_alive,
    name_of,
    newest,
)
from volseg.errors import InputError, JobInterrupted, JobPartial
from volseg.execution.limits import check_allowed
from volseg.execution.status import LedgerStatus
from volseg.spec import SegmentSpec

TOKEN = "canary-token-77c1"


def spec_of(case: Case, output: Path, **options: Any) -> SegmentSpec:
    return SegmentSpec.read({"input": case.image, "output": str(output), "model": case.bundle, **options})


# ---------------------------------------------------------------- names


def test_names(case: Case, tmp_path: Path) -> None:
    """Workers and blocks make no other job; output, window and region do."""
    task = identify(spec_of(case, tmp_path / "out.zarr"))
    name = name_of(task, 7)
    assert attempt_of(name) == 7
    assert name.startswith(f"volseg-{task.job_key[:12]}-")
    assert attempt_of("raysubmit_a1b2c3") is None
    same = identify(spec_of(case, tmp_path / "out.zarr", workers=2, block="24,24,24", memory=2))
    assert name_of(same, 7) == name
    others = [
        identify(spec_of(case, tmp_path / "other.zarr")),
        identify(spec_of(case, tmp_path / "out.zarr", overlap=0.25)),
        identify(spec_of(case, tmp_path / "out.zarr", roi="0:20,:,:")),
    ]
    assert len({name, *(name_of(other, 7) for other in others)}) == 4


def test_newest_attempt(case: Case, tmp_path: Path) -> None:
    task = identify(spec_of(case, tmp_path / "out.zarr"))
    other = identify(spec_of(case, tmp_path / "other.zarr"))
    jobs = [RayJob(name_of(task, n), "FAILED") for n in (2, 11, 9)] + [RayJob(name_of(other, 99), "FAILED")]
    found = newest([*jobs, RayJob("raysubmit_1", "RUNNING")], task.stem)
    assert found is not None
    assert attempt_of(found.id) == 11
    assert newest(jobs[3:], task.stem) is None


@pytest.mark.parametrize(
    ("status", "state", "submission", "alive"),
    [
        ("RUNNING", "running", "me", True),
        ("RUNNING", "stopped", "me", False),
        ("RUNNING", "failed", "me", False),
        ("RUNNING", "stopped", "before", True),
        ("PENDING", "absent", "", True),
        ("FAILED", "running", "me", False),
        ("SUCCEEDED", "complete", "me", False),
    ],
)
def test_whom_to_attach_to(status: str, state: Any, submission: str, alive: bool) -> None:
    assert is_alive(RayJob("me", status), LedgerStatus("/out", "k", state, submission=submission)) is alive


def test_command_line_says_the_same(case: Case, tmp_path: Path) -> None:
    """What the driver on the cluster reads is what was submitted, whatever is in the names."""
    import shlex
    from argparse import Namespace

    odd = store(tmp_path / 'it\'s a "scan" $HOME.zarr', np.zeros((20, 20, 20)))
    spec = SegmentSpec.read({
        "input": odd, "output": str(tmp_path / "out; rm.zarr"), "model": case.bundle, "roi": "0:14,:,:",
        "block": "8,16,24", "overlap": 0.25, "nan": "fill", "probabilities": True, "memory": 1.5,
    })  # fmt: skip
    task = identify(spec)
    words = shlex.split(entrypoint(task, "name"))
    assert words[:6] == ["exec", "env", "VOLSEG_SUBMISSION=name", "python", "-m", "volseg"]
    assert words[6:] == command_words(task.spec)
    settings = [word for word in words[7:-1] if word != "--set"]
    assert read_spec(Namespace(spec=None, assignments=settings), SegmentSpec) == task.spec


@pytest.mark.parametrize(("name", "value"), [("executor", "serial"), ("address", "10.0.0.1:6379")])
def test_what_a_submission_cannot_say(case: Case, tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(InputError, match=f"the spec says {name} {value}, .*nothing was submitted"):
        identify(spec_of(case, tmp_path / "out.zarr", **{name: value}))


def test_runtime_env(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("pip: [volseg]\nworking_dir: s3://code/volseg.zip\nenv_vars: {OMP_NUM_THREADS: '1'}\n")
    check_runtime_env(load_yaml(str(file)))
    for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "DB_PASSWORD"):
        with pytest.raises(InputError, match=f"sets {name}, and whoever may list .*nothing was submitted"):
            check_runtime_env({"env_vars": {name: "x"}})
    with pytest.raises(InputError, match=r"names the folder \. of this machine"):
        check_runtime_env({"working_dir": "."})
    with pytest.raises(InputError, match="names the folder mine of this machine"):
        check_runtime_env({"py_modules": ["s3://code/a.zip", "mine"]})
    with Server(lambda *_: (200, [])) as server, Client(server.address) as client:
        with pytest.raises(InputError, match="sets API_TOKEN"):
            client.submit(spec_of(case, tmp_path / "out.zarr"), runtime_env={"env_vars": {"API_TOKEN": "x"}})
        assert server.seen == []


# ---------------------------------------------------------------- places that the operator allows


@pytest.mark.parametrize(
    ("place", "allowed", "fine"),
    [
        ("s3://scans/2026/a.zarr", "s3://scans", True),
        ("s3://scans/2026/a.zarr", "s3://other, s3://scans/2026", True),
        ("s3://scans/2026-old/a.zarr", "s3://scans/2026", False),
        ("s3://scans-private/a.zarr", "s3://scans", False),
        ("s3://scans/2026/../secret/a.zarr", "s3://scans/2026", False),
        ("gs://scans/a.zarr", "s3://scans", False),
        ("{tmp}/data/a.zarr", "{tmp}/data", True),
        ("{tmp}/data/../secret.zarr", "{tmp}/data", False),
        ("{tmp}/data/link/a.zarr", "{tmp}/data", False),
        ("{tmp}/data", "s3://scans", False),
        ("s3://scans/a.zarr", "", False),
    ],
)
def test_allowed_places(place: str, allowed: str, fine: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    place, allowed = place.format(tmp=tmp_path), allowed.format(tmp=tmp_path)
    check_allowed({"input": place}, {"output": place})
    monkeypatch.setenv("VOLSEG_ALLOWED_INPUTS", allowed)
    if fine:
        check_allowed({"input": place}, {"output": "anywhere"})
    else:
        with pytest.raises(InputError, match=r"input .* is outside of what the operator .*VOLSEG_ALLOWED_INPUTS="):
            check_allowed({"input": place}, {})


def test_driver_keeps_within_what_is_allowed(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VOLSEG_ALLOWED_OUTPUTS", str(tmp_path / "seg"))
    with pytest.raises(InputError, match=r"output .*other.zarr is outside"):
        segment(case, tmp_path / "other.zarr")
    assert not list(tmp_path.iterdir())
    assert segment(case, tmp_path / "seg" / "a.zarr", roi="0:16,0:16,0:16")["status"] == "complete"


# ---------------------------------------------------------------- the Jobs API


def entry(name: str, status: str = "RUNNING", **facts: Any) -> dict[str, Any]:
    return {"submission_id": name, "status": status, "message": "", "start_time": 5000, "metadata": {}, **facts}


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jobs_module, "_BACKOFF_SECONDS", 0.01)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_token_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with Server(lambda *_: (200, [])) as server:
        assert JobsApi(server.address).jobs() == []
        assert {given for _, _, given in server.seen} == {None}
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with Server(lambda *_: (200, [entry("a"), entry("")]), TOKEN) as server:
        (job,) = JobsApi(server.address).jobs()
        assert (job.id, job.started, job.over) == ("a", 5.0, False)
        assert [given for _, _, given in server.seen] == [None, f"Bearer {TOKEN}"]


def test_threads_of_one_client_ask_for_the_token_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one that comes while the first one looks for the token waits, and has it, too."""
    found: list[list[RayJob]] = []
    with Server(lambda *_: (200, []), TOKEN) as server:
        api = JobsApi(server.address)
        second = threading.Thread(target=lambda: found.append(api.jobs()))

        def find() -> str:
            second.start()
            second.join(0.2)
            return TOKEN

        monkeypatch.setattr(jobs_module, "find_token", find)
        assert api.jobs() == []
        second.join()
        assert found == [[]]
        assert [given for _, _, given in server.seen] == [None, f"Bearer {TOKEN}", f"Bearer {TOKEN}"]


def test_token_follows_no_redirect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with Server(lambda *_: (200, [])) as thief, Server(lambda *_: (302, f"{thief.address}/x"), TOKEN) as server:
        with pytest.raises(ClusterError, match="answered 302") as raised:
            JobsApi(server.address).jobs()
        assert thief.seen == []
        assert TOKEN not in str(raised.value)


def test_refused_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with Server(lambda *_: (200, []), TOKEN) as server:
        with pytest.raises(AccessError, match="wants a token; nothing was done: put it into RAY_AUTH_TOKEN"):
            JobsApi(server.address).jobs()
        monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong-canary")
        with pytest.raises(AccessError, match=r"refused the token \(403\)") as raised:
            JobsApi(server.address).jobs()
        assert "wrong-canary" not in str(raised.value)
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
        with pytest.raises(AccessError, match=r"none \(RAY_AUTH_TOKEN_PATH\) cannot be read"):
            JobsApi(server.address).jobs()


def test_open_cluster_elsewhere_is_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "is_loopback", lambda _: False)
    with Server(lambda method, *_: (200, [] if method == "GET" else {"submission_id": "x"})) as server:
        with (
            Client(server.address) as client,
            pytest.raises(UnprotectedError, match=r"nothing was submitted.*--insecure"),
        ):
            client.submit(spec_of(case, tmp_path / "out.zarr"))
        assert {method for method, _, _ in server.seen} == {"GET"}
        with Client(server.address, insecure=True) as client:
            assert attempt_of(client.submit(spec_of(case, tmp_path / "out.zarr")).id) == 1
    with Server(lambda *_: (200, []), TOKEN) as server:
        monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
        JobsApi(server.address).refuse_unprotected(insecure=False)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("http://127.0.0.1:8265", True), ("http://localhost:8265", True), ("http://[::1]:8265", True),
        ("http://127.9.9.9", True), ("http://10.0.0.1:8265", False), ("http://127.0.0.1.example.org", False),
        ("http://head:8265", False), ("http://localhost.example.org", False),
    ],
)  # fmt: skip
def test_loopback(address: str, loopback: bool) -> None:
    assert jobs_module.is_loopback(address) is loopback


@pytest.mark.parametrize(
    "address", ["head:8265", "ray://head:10001", "http://", "http://me:pass@head:8265", "http://h/x"]
)
def test_wrong_addresses(address: str) -> None:
    with pytest.raises(InputError, match="is no address of a cluster's Jobs API") as raised:
        Client(address)
    assert "pass" not in str(raised.value)


def test_reading_is_tried_again() -> None:
    answers = iter([(404, ""), (0, ""), (503, "busy"), (200, [entry("a")])])
    with Server(lambda *_: next(answers)) as server:
        assert [job.id for job in JobsApi(server.address).jobs()] == ["a"]
        assert len(server.seen) == 4


def test_stopping_is_tried_again() -> None:
    answers = iter([(404, ""), (0, ""), (503, "busy"), (200, {"stopped": True})])
    with Server(lambda *_: next(answers)) as server:
        JobsApi(server.address).stop("a")
        assert [method for method, _, _ in server.seen] == ["GET", "POST", "POST", "POST"]


def test_reading_gives_up() -> None:
    with Server(lambda *_: (503, "busy")) as server:
        with pytest.raises(ClusterError, match="answered 503: busy"):
            JobsApi(server.address).jobs()
        assert len(server.seen) == 5
    with pytest.raises(UnreachableError, match=r"no Ray cluster answers at .*check the address"):
        JobsApi(server.address).jobs()


def test_submission_is_sent_once(case: Case, tmp_path: Path) -> None:
    """A lost answer is looked up, not repeated."""
    taken: list[str] = []

    def answer(method: str, path: str, body: Any) -> Answer:
        if method == "POST":
            taken.append(body["submission_id"])
            return 0, ""
        if path == "/api/jobs/":
            return 200, []
        return (200, entry(taken[0])) if taken and path.endswith(taken[0]) else (404, "")

    with Server(answer) as server, Client(server.address) as client:
        job = client.submit(spec_of(case, tmp_path / "out.zarr"))
        assert [job.id] == taken
        assert [method for method, _, _ in server.seen].count("POST") == 1


def test_submission_that_never_arrived(case: Case, tmp_path: Path) -> None:
    def answer(method: str, path: str, _: Any) -> Answer:
        return (0, "") if method == "POST" else (200, []) if path == "/api/jobs/" else (404, "")

    with Server(answer) as server, Client(server.address) as client:
        with pytest.raises(UnreachableError):
            client.submit(spec_of(case, tmp_path / "out.zarr"))
        assert [method for method, _, _ in server.seen].count("POST") == 1


def test_second_of_two_attaches(case: Case, tmp_path: Path) -> None:
    """Ray has the name already, though the list did not show it yet; no GPU is kept for the driver."""
    sent: list[Any] = []

    def answer(method: str, path: str, body: Any) -> Answer:
        if method == "POST":
            sent.append(body)
            return 500, f"ValueError: Job with submission_id {body['submission_id']} already exists."
        return (200, []) if path == "/api/jobs/" else (404, "")

    with Server(answer) as server, Client(server.address) as client:
        assert client.submit(spec_of(case, tmp_path / "out.zarr"), driver_cpus=0.5).attached
    (body,) = sent
    assert body["entrypoint_num_cpus"] == 0.5
    assert "entrypoint_num_gpus" not in body
    assert body["metadata"]["volseg_output"] == str(tmp_path / "out.zarr")


def test_job_of_an_output_that_is_not_begun(tmp_path: Path) -> None:
    name = "volseg-0123456789ab-01234567-001"
    facts = {"volseg_output": str(tmp_path / "out.zarr"), "volseg_job_key": "0123456789ab"}
    with Server(lambda *_: (200, [entry(name, "PENDING", metadata=facts)])) as server, Client(server.address) as client:
        assert client.job(str(tmp_path / "out.zarr")).id == name
        with pytest.raises(InputError, match="there is no ledger beside it"):
            client.job(str(tmp_path / "other.zarr"))


def test_error_of_the_server(case: Case, tmp_path: Path) -> None:
    answers: Callable[..., Answer] = lambda method, path, _: (  # noqa: E731
        (500, "Traceback\nOSError: full\n") if method == "POST" else (200, []) if path == "/api/jobs/" else (404, "")
    )
    with Server(answers) as server, Client(server.address) as client:
        with pytest.raises(ClusterError, match="answered 500: OSError: full"):
            client.submit(spec_of(case, tmp_path / "out.zarr"))
        with pytest.raises(InputError, match=r"Ray knows no job volseg-.*name the output instead"):
            client.job("volseg-0123456789ab-01234567-001")


# ---------------------------------------------------------------- jobs on this machine


@contextmanager
def slow_job(case: Case, output: Path) -> Iterator[tuple[Client, Any]]:
    with Client(None) as client:
        job = client.submit(spec_of(case, output, overlap=0.75, block="8,16,10", workers=1))
        wait_until(lambda: done_blocks(output))
        yield client, job


@pytest.mark.slow
def test_embedded(case: Case, tmp_path: Path) -> None:
    """The same calls without a cluster: progress, result, and an answer at once for what is done."""
    output, ends = tmp_path / "out.zarr", list[JobStatus]()
    spec = spec_of(case, output, overlap=0.25, workers=1)
    with Client(None) as client:
        job = client.submit(spec, on_end=ends.append)
        assert client.submit(spec).attached
        states = [progress.state for progress in job.watch(0.05)]
        assert states[-1] == "complete"
        result = job.result()
        assert result.blocks["failed"] == 0
        assert sum(result.fractions.values()) == pytest.approx(1.0)
        assert '"status": "complete"' in job.logs() == "".join(job.follow())
        wait_until(lambda: ends)
        assert [found.id for found in client.jobs()] == [job.id]
        assert client.job(str(output)).id == job.id
    assert [end.state for end in ends] == ["complete"]
    segment(case, tmp_path / "whole.zarr", overlap=0.25)
    np.testing.assert_array_equal(labels_of(output), labels_of(tmp_path / "whole.zarr"))
    with Client(None) as client:
        again = client.submit(spec)
        assert (again.attached, again.status().state) == (True, "complete")
        assert again.result().report["job_key"] == job.job_key
        with pytest.raises(InputError, match=r"no submission of the job of .* is known, so it has no log"):
            again.logs()


@pytest.mark.slow
def test_embedded_cancel_and_timeout(case: Case, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    with slow_job(case, output) as (client, job):
        with pytest.raises(TimeoutError, match=r"is running after 0.1 s; it goes on"):
            job.wait(0.1)
        job.cancel()
        with pytest.raises(JobInterrupted, match=r"it was cancelled.*submit it again to go on"):
            job.result(60)
        kept = len(done_blocks(output))
        assert kept
        again = client.submit(spec_of(case, output, overlap=0.75, block="8,16,10", workers=1))
        assert attempt_of(again.id) == 2
    # Leaving the client stops what it started, and what is done is kept.
    assert client.jobs()[0].status().state == "stopped"
    assert len(done_blocks(output)) >= kept


@pytest.mark.slow
def test_embedded_errors(case: Case, tmp_path: Path) -> None:
    """A partial job says which blocks, and what stopped a job comes back as its own class; asyncio, too."""
    values = np.zeros((20, 20, 40), np.float32)
    values[3, 3, 3] = np.nan
    broken = Case(store(tmp_path / "nan.zarr", values, None), case.bundle, tmp_path)
    spec = spec_of(broken, tmp_path / "out.zarr", block="16,16,16", overlap=0.25, workers=1)

    async def run() -> None:
        async with AsyncClient(None) as client:
            job = await client.submit(spec)
            states = [status.state async for status in job.watch(0.1)]
            assert states[-1] == "partial"
            with pytest.raises(JobPartial, match="blocks were set aside, the first is block 0 at") as raised:
                await job.result(60)
            assert raised.value.failed_blocks[0]["block"] == 0
            assert (await job.status()).failed == len(raised.value.failed_blocks)
            assert "".join([piece async for piece in job.follow()]) == await job.logs()
            seen: list[JobStatus] = []
            assert (await job.wait(60, progress=seen.append)).state == "partial"
            assert len(seen) == 1
            with pytest.raises(TimeoutError):
                await (await client.submit(spec_of(case, tmp_path / "b.zarr", workers=1))).wait(0.01)

    asyncio.run(run())
    with Client(None) as client:
        # Another job's output: only the driver refuses it.
        job = client.submit(spec_of(case, tmp_path / "out.zarr", workers=1))
        with pytest.raises(InputError, match="holds another job's result"):
            job.result(60)


def test_client_loads_neither_torch_nor_ray() -> None:
    from tests.test_light_imports import loaded

    assert loaded("from volseg.client import AsyncClient, Client; Client(None).close()") == "[]"
