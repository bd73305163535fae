"""A bundle's network for other programs: ONNX, and torch.export's own file.

What is exported takes raw grey values and gives probabilities: the intensity scaling, the class bias, the activation
and the average over the members are inside, so nobody has to build them again and get them slightly wrong.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from volseg.errors import BundleError, InputError, OutputExistsError
from volseg.geometry.box import Triple
from volseg.models.bundle import load_networks
from volseg.models.description import BundleManifest
from volseg.models.network import NetworkConfig
from volseg.storage import files

if TYPE_CHECKING:
    from torch.export import ExportedProgram

INPUT_NAME, OUTPUT_NAME = "raw", "probabilities"
# Beside the graph in both kinds of file: what an answer means.
DESCRIPTION_NAME = "volseg.json"
# A file of protocol buffers ends at 2 GiB; the graph needs its share.
_ONNX_LIMIT = (2 << 30) - (16 << 20)
_ONNX_PACKAGES = ("onnx", "onnxscript")


class Answer(nn.Module):
    """All of a bundle in one module: raw grey values (b, c, [z,] y, x) to probabilities (b, classes, [z,] y, x).

    Grey values may be of any dtype, probabilities are float32 and sum to one; a bundle with one sigmoid channel gives
    two of them. The answer is smaller than the input by the network's margin at each end.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    std: Tensor
    bias: Tensor

    def __init__(self, manifest: BundleManifest, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        shape = (1, -1) + (1,) * manifest.config.dims
        for name in ("low", "high", "mean", "std"):
            values = torch.tensor(getattr(manifest.scaling, name), dtype=torch.float32)
            self.register_buffer(name, values.reshape(shape))
        outputs = manifest.config.out_channels
        self.register_buffer("bias", torch.tensor(manifest.class_bias or (0.0,) * outputs).reshape(shape))
        self.sigmoid = manifest.activation == "sigmoid"
        self.members = nn.ModuleList(networks)

    def forward(self, raw: Tensor) -> Tensor:
        """Return probabilities; see the class for shapes."""
        scaled = (torch.clamp(raw.to(torch.float32), self.low, self.high) - self.mean) / self.std
        total = self._probabilities(self.members[0](scaled))
        for member in list(self.members)[1:]:
            total = total + self._probabilities(member(scaled))
        return total / len(self.members)

    def _probabilities(self, logits: Tensor) -> Tensor:
        if self.sigmoid:
            one = torch.sigmoid(logits)
            return torch.cat((1 - one, one), dim=1)
        return torch.softmax(logits + self.bias, dim=1)


def export_onnx(uri: str, out: str, *, member: int | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the bundle at `uri` as the ONNX file `out` and return what it takes and gives.

    It maps ``raw``, float32 (b, c, [z,] y, x), to ``probabilities``, float32 (b, classes, [z,] y, x), averaged over the
    members, or of one `member` (from 0 on) alone. Batch and sides are free where the exporter finds that they can be;
    what is fixed is in the result, as are the steps between allowed sides. The metadata of the model holds the same as
    JSON under ``volseg.json``. Raises BundleError where the bundle cannot be used or exported, InputError where a
    package is missing, OutputExistsError where something lies at `out`.
    """
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"export to ONNX needs the package {' and '.join(missing)}, which is not installed; nothing was written: "
            "pip install 'volseg[export]'"
        )
    _check_place(out, overwrite)
    manifest, networks = _load(uri, member)
    size = manifest.config.state_bytes * len(networks)
    if size > _ONNX_LIMIT:
        raise BundleError(
            f"the weights of {uri} are {size} bytes, an ONNX file holds at most {_ONNX_LIMIT}; nothing was written: "
            "export one --member, or a .pt2"
        )
    program = _export(uri, manifest, networks)
    described = _describe(program, manifest, len(networks))
    with _quiet():
        converted = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[INPUT_NAME], output_names=[OUTPUT_NAME]
        )
    assert converted is not None
    converted.model.metadata_props[DESCRIPTION_NAME] = json.dumps(described)
    files.write_bytes(out, converted.model_proto.SerializeToString())
    return {"export": files.absolute(out), "format": "onnx", **described}


def export_program(uri: str, out: str, *, member: int | None = None, overwrite: bool = False) -> dict[str, Any]:
    """Write the bundle at `uri` as the file `out` of torch.export (``.pt2``) and return what it takes and gives.

    Everything is as with `export_onnx`; ``torch.export.load(out).module()`` is called with the raw grey values, and the
    JSON is the extra file ``volseg.json``.
    """
    _check_place(out, overwrite)
    manifest, networks = _load(uri, member)
    program = _export(uri, manifest, networks)
    described = _describe(program, manifest, len(networks))
    content = BytesIO()
    with _quiet():
        torch.export.save(program, content, extra_files={DESCRIPTION_NAME: json.dumps(described)})
    files.write_bytes(out, content.getvalue())
    return {"export": files.absolute(out), "format": "torch.export", **described}


def _check_place(out: str, overwrite: bool) -> None:
    if files.exists(out) and not overwrite:
        raise OutputExistsError(f"{out} exists; nothing was written: choose another place, or say --overwrite")


def _load(uri: str, member: int | None) -> tuple[BundleManifest, list[nn.Module]]:
    manifest, networks = load_networks(uri)
    if member is None:
        return manifest, networks
    if not 0 <= member < len(networks):
        raise InputError(
            f"member {member} was asked for, but {uri} has {len(networks)}, numbered from 0; nothing was written: "
            "leave --member out for all of them together"
        )
    return manifest, [networks[member]]


def _export(uri: str, manifest: BundleManifest, networks: Sequence[nn.Module]) -> ExportedProgram:
    config = manifest.config
    answer = Answer(manifest, networks).eval()
    # Sizes of 1 anywhere inside would be taken as fixed, so the example has at least two of everything.
    patch = manifest.patch_along("z")
    roomy = [max(side, least + step) for side, least, step in zip(patch, config.smallest, config.pooling, strict=True)]
    sides = config.fit((roomy[0], roomy[1], roomy[2]), up=True)[3 - config.dims :]
    raw = torch.zeros((2, config.in_channels, *sides))
    free = {axis: torch.export.Dim.AUTO for axis in range(raw.ndim) if axis != 1}
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(answer, (raw,), dynamic_shapes={INPUT_NAME: free})
    except (RuntimeError, TypeError, ValueError, NotImplementedError, torch._dynamo.exc.TorchDynamoException) as error:
        first = str(error).strip().partition("\n")[0]
        raise BundleError(
            f"torch.export cannot follow the network {manifest.architecture!r} of {uri} ({first}); nothing was "
            "written: only networks whose steps do not depend on values can be exported"
        ) from error


def _describe(program: ExportedProgram, manifest: BundleManifest, members: int) -> dict[str, Any]:
    """Return in plain values what the exported network takes and gives; a free side is None."""
    config = manifest.config
    flat = config.dims == 2
    # Parameters and buffers are placeholders, too; the one input comes last.
    *_, value = (node.meta["val"] for node in program.graph.nodes if node.op == "placeholder")
    shape = [size if isinstance(size, int) else None for size in value.shape]

    def sides(rule: Sequence[int]) -> list[int]:
        return list(rule[1:] if flat else rule)

    smallest = _smallest(program, config)
    patch = [max(pair) for pair in zip(manifest.patch_along("z"), smallest, strict=True)]
    return {
        "input": {
            "name": INPUT_NAME,
            "axes": ["b", "c", *_axes(manifest)],
            "shape": shape,
            "values": "raw grey values, float32",
            "sides": {"step": sides(config.pooling), "phase": sides(config.phase), "smallest": sides(smallest)},
            "patch": sides(patch),
        },
        "output": {
            "name": OUTPUT_NAME,
            "axes": ["b", "class", *_axes(manifest)],
            "values": "probabilities, float32",
            "margin": sides(config.margin),
            "threshold": manifest.threshold,
        },
        "classes": [c.model_dump() for c in manifest.classes],
        "members": members,
        "voxel_size": manifest.voxel_size,
        "unit": manifest.unit,
        "bundle": manifest.digest,
    }


def _smallest(program: ExportedProgram, config: NetworkConfig) -> Triple:
    """Return the smallest sides that the exported network takes: sizes of 1 inside may have been ruled out."""
    try:
        with torch.no_grad():
            program.module()(torch.zeros(1, config.in_channels, *config.smallest[3 - config.dims :]))
    except AssertionError:
        a, b, c = (least + step for least, step in zip(config.smallest, config.pooling, strict=True))
        return a, b, c
    return config.smallest


def _axes(manifest: BundleManifest) -> list[str]:
    return [axis for axis in "zyx" if manifest.config.dims == 3 or axis != manifest.axis]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' own notes to their developers away from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
