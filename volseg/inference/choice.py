"""How a network is run: its arithmetic and its kernels, and the choice of a tuning, which lies beside the bundle."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from volseg.errors import BundleError, InputError
from volseg.models.fold import Kernels
from volseg.models.hardware import fast_bf16, has_bf16
from volseg.planning import Plan
from volseg.storage import files

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Choice:
    """One way to run a network; its answers differ from those of another way in their last bits, or by more."""

    precision: Precision
    kernels: Kernels = "tiled"

    def __str__(self) -> str:
        """Name the choice in reports and in the ledger."""
        return f"{self.precision} {self.kernels}"


def candidates(asked: str, device: str) -> list[Choice]:
    """Return what `precision` may mean on a device, best first; a reduced one needs its guard's consent.

    Raises InputError for bf16 on a processor without it.
    """
    if asked == "bf16" and not has_bf16(device):
        raise InputError(
            "precision bf16 needs a processor that has it, and this one has not (on CPUs: AVX-512 or newer); nothing "
            "was computed: use --precision auto or fp32"
        )
    if asked != "auto":
        return [Choice(_precision(asked))]
    reduced = [Choice("bf16")] if fast_bf16(device) else []
    return [*([Choice("fp16")] if device == "cuda" else []), *reduced, Choice("fp32")]


def tuned_place(model: str, bundle_digest: str, plan: Plan, asked: str, fingerprint: str) -> str:
    """Return where the choice of a tuning is kept: one file a bundle, patch, precision asked for, and device."""
    key = json.dumps([bundle_digest, [list(view.patch) for view in plan.views], plan.batch, asked, fingerprint])
    return files.join(f"{model}.tuned", f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json")


def write_tuned(place: str, choice: Choice, report: dict[str, Any]) -> None:
    """Keep a choice and how it came about."""
    files.write_bytes(place, json.dumps({"choice": asdict(choice), **report}, indent=1).encode())


def read_tuned(place: str) -> Choice | None:
    """Return the choice kept at `place`, None where nothing was tuned; raises BundleError where it is damaged."""
    if not files.exists(place):
        return None
    try:
        found = json.loads(files.read_bytes(place))["choice"]
        precision, kernels = found["precision"], found["kernels"]
        if kernels not in get_args(Kernels):
            raise ValueError(kernels)
        return Choice(_precision(precision), kernels)
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{place} holds no choice of a tuning ({error}): delete it, or run volseg tune again"
        ) from None


def _precision(name: str) -> Precision:
    for known in DTYPES:
        if known == name:
            return known
    raise ValueError(f"unknown precision {name}")
