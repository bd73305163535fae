"""Loading a bundle to be run in the way that was asked for, tuned and allowed by the guard."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from volseg.errors import BundleError, InputError, NonFiniteError
from volseg.inference.choice import Choice, candidates, read_tuned, tuned_place
from volseg.inference.guard import answers, compare, sample_patches
from volseg.inference.predictor import Predictor, fingerprint
from volseg.models.bundle import load_networks
from volseg.models.manifest import BundleManifest
from volseg.planning import Plan
from volseg.spec import SegmentSpec
from volseg.storage.volume import Volume


class Loaded:
    """A bundle, ready to run. `numerics` says how: the choice, and what the guard found."""

    def __init__(self, spec: SegmentSpec, plan: Plan, bundle_digest: str, volume: Volume) -> None:
        """Load the bundle; raises BundleError where it changed, InputError where the guard refuses what was asked."""
        self.manifest, self._networks = load_networks(spec.model)
        if self.manifest.digest != bundle_digest:
            raise BundleError(
                f"the bundle {spec.model} changed while the job ran; the job stopped: run the same command again"
            )
        self._spec, self._plan = spec, plan
        tuned = read_tuned(
            tuned_place(spec.model, bundle_digest, plan, spec.precision, fingerprint(plan.device)["name"])
        )
        self.numerics: dict[str, str] = {}
        self.predictor = self._guarded(volume, [tuned] if tuned else candidates(spec.precision, plan.device))
        self._networks = []

    def _guarded(self, volume: Volume, ways: Sequence[Choice]) -> Predictor:
        """Return the first of `ways` that the guard allows."""
        refused: list[str] = []
        reduced = [way for way in ways if way.precision != "fp32"]
        if reduced:
            patches = sample_patches(volume, self._plan, self.manifest.scaling.low)
            full = answers(self._predictor(Choice("fp32")), self._plan, patches)
        for way in reduced:
            predictor = self._predictor(way)
            try:
                verdict = compare(full, answers(predictor, self._plan, patches), self._plan.threshold)
            except NonFiniteError:
                refused.append(f"{way.precision}: the network answered NaN or Inf")
                continue
            if verdict.passed:
                self.numerics = {"forward": str(way), "guard": f"{way.precision}: {verdict}"}
                # A fresh one, whose counts begin with the job.
                return self._predictor(way)
            refused.append(f"{way.precision}: {verdict}")
        if self._spec.precision not in {"fp32", "auto"}:
            raise InputError(
                f"precision {self._spec.precision} was refused by its guard ({'; '.join(refused)}); nothing was "
                "computed: use --precision auto or fp32"
            )
        way = next((way for way in ways if way.precision == "fp32"), Choice("fp32"))
        self.numerics = {"forward": str(way)} | ({"guard": f"fp32 instead of {'; '.join(refused)}"} if refused else {})
        return self._predictor(way)

    def _predictor(self, way: Choice) -> Predictor:
        return make_predictor(self.manifest, self._networks, self._spec, self._plan, way)


def make_predictor(
    manifest: BundleManifest, networks: Sequence[nn.Module], spec: SegmentSpec, plan: Plan, way: Choice
) -> Predictor:
    """Return a predictor that runs `networks` in one way."""
    return Predictor(
        manifest, networks, mirror=spec.mirror, batch=plan.batch, precision=way.precision, kernels=way.kernels,
        device=torch.device(plan.device),
    )  # fmt: skip
