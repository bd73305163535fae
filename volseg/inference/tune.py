"""Measuring the ways to run a bundle on this device, once: what each takes and does to labels, and which is best."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from volseg.errors import BundleError, InputError, NonFiniteError
from volseg.inference.choice import Choice, candidates, tuned_place, write_tuned
from volseg.inference.choose import make_predictor
from volseg.inference.guard import Verdict, answers, compare, sample_patches
from volseg.inference.predictor import Predictor, fingerprint
from volseg.inference.worker import settle
from volseg.journal import Note
from volseg.models.bundle import load_networks
from volseg.models.hardware import has_bf16
from volseg.models.manifest import BundleManifest
from volseg.planning import Plan
from volseg.spec import SegmentSpec
from volseg.storage import files
from volseg.storage.volume import Volume

_ROUNDS = 5
# Below that the difference may be chance, and the default is the safer choice.
_LEAST_GAIN = 0.03


@dataclass
class _Candidate:
    way: Choice
    batch: int
    predictor: Predictor | None = None
    verdict: Verdict | None = None
    problem: str = ""
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Least seconds a patch."""
        return min(self.seconds) / self.batch

    def describe(self, reference: float) -> dict[str, Any]:
        found: dict[str, Any] = {"way": str(self.way), "batch": self.batch}
        if self.problem:
            return {**found, "problem": self.problem}
        found |= {"seconds_per_patch": round(self.best, 5), "speed": round(reference / self.best, 3)}
        if self.verdict is not None:
            found |= {"guard": str(self.verdict), "allowed": self.verdict.passed}
        return found


def tune(spec: SegmentSpec, plan: Plan, bundle_digest: str, volume: Volume, note: Note) -> dict[str, Any]:
    """Measure every candidate on patches of `volume`, keep the best beside the bundle, and return what was found.

    Only what is as exact as the precision asked for, what the guard allows, what changes no batch and whose memory a
    plan foretells is chosen; the rest is measured and reported. Raises InputError where the guard allows nothing.
    """
    settle(plan.device)
    wanted = candidates(spec.precision, plan.device)
    manifest, networks = load_networks(spec.model)
    if manifest.digest != bundle_digest:
        raise BundleError(f"the bundle {spec.model} changed meanwhile; nothing was kept: run the same command again")
    patches = sample_patches(volume, plan, manifest.scaling.low)
    tried = _candidates(plan)
    full = answers(make_predictor(manifest, networks, spec, plan, Choice("fp32", "plain")), plan, patches)
    for candidate in tried:
        note(f"trying {candidate.way}, batch {candidate.batch}")
        _prepare(candidate, manifest, networks, spec, plan)
        _judge(candidate, plan, patches, full)
    usable = [candidate for candidate in tried if not candidate.problem]
    for _ in range(_ROUNDS):
        # In turn, so that what else the machine does hits all of them.
        for candidate in usable:
            _time(candidate, plan, patches[0][0])
    chosen = _choose(usable, wanted, spec.precision, plan)
    facts = fingerprint(plan.device)
    place = tuned_place(spec.model, bundle_digest, plan, spec.precision, facts["name"])
    reference = next(candidate for candidate in usable if candidate.way == Choice("fp32", "plain")).best
    report = {
        "chosen": str(chosen.way), "precision": spec.precision, "patch": [list(view.patch) for view in plan.views],
        "device": facts, "tried": [candidate.describe(reference) for candidate in tried],
    }  # fmt: skip
    write_tuned(place, chosen.way, report)
    return {**report, "kept": files.absolute(place)}


def _candidates(plan: Plan) -> list[_Candidate]:
    on_cpu = plan.device == "cpu"
    ways = [Choice("fp32", "plain"), Choice("fp32", "compiled"), Choice("fp32")]
    ways += [Choice("fp32", "direct")] if on_cpu else [Choice("fp16")]
    if has_bf16(plan.device):
        ways += [Choice("bf16"), Choice("bf16", "compiled"), *([Choice("bf16", "direct")] if on_cpu else [])]
    found = [_Candidate(way, plan.batch) for way in ways]
    return [*found, _Candidate(Choice("fp32"), 2 * plan.batch)]


def _prepare(
    candidate: _Candidate, manifest: BundleManifest, networks: Sequence[nn.Module], spec: SegmentSpec, plan: Plan
) -> None:
    candidate.predictor = make_predictor(manifest, networks, spec, replace(plan, batch=candidate.batch), candidate.way)


def _judge(candidate: _Candidate, plan: Plan, patches: Sequence[Sequence[Tensor]], full: Sequence[Tensor]) -> None:
    """Compare the answers of a candidate with those of torch's own fp32; what cannot run says why."""
    assert candidate.predictor is not None
    try:
        candidate.verdict = compare(full, answers(candidate.predictor, plan, patches), plan.threshold)
    except NonFiniteError:
        candidate.problem = "the network answered NaN or Inf"
    except Exception as error:
        # Compilers and libraries raise whatever they like; without one the others are still measured.
        if candidate.way.kernels != "compiled":
            raise
        candidate.problem = f"cannot be compiled here ({' '.join(str(error).split())[:160]})"


def _time(candidate: _Candidate, plan: Plan, patch: Tensor) -> None:
    predictor = candidate.predictor
    assert predictor is not None
    group = [patch.to(predictor.device)] * candidate.batch
    started = time.perf_counter()
    for _ in predictor.run(group, plan.views[0].axis):
        pass
    if predictor.device.type == "cuda":
        torch.cuda.synchronize(predictor.device)
    candidate.seconds.append(time.perf_counter() - started)


def _choose(usable: Sequence[_Candidate], wanted: Sequence[Choice], asked: str, plan: Plan) -> _Candidate:
    precisions = {way.precision for way in wanted}
    allowed = [
        c for c in usable
        if c.way.precision in precisions and c.batch == plan.batch and c.way.kernels != "compiled"
        and c.verdict is not None and c.verdict.passed
    ]  # fmt: skip
    if not allowed:
        raise InputError(
            f"precision {asked} was refused by its guard in every way that was tried; nothing was kept: use "
            "--precision auto or fp32"
        )
    best = min(allowed, key=lambda candidate: candidate.best)
    default = next((c for way in wanted for c in allowed if c.way == way), best)
    return best if best.best < (1 - _LEAST_GAIN) * default.best else default
