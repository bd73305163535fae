"""Options of a training."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from volseg.geometry.box import Triple
from volseg.spec.augment import AugmentSpec
from volseg.spec.base import Spec, parse_list, parse_triple, parse_triples, positive

_STEPS = 10_000
# More than any time allows.
_ANY_STEPS = 10**9


class TrainSpec(Spec):
    """Train a network on labelled regions of one or several volumes and write a bundle.

    Lists with one entry a volume are separated by commas, regions and offsets by semicolons; one region or offset
    stands for all volumes.
    """

    sections: ClassVar[dict[str, str]] = {
        "image": "data",
        "recipe": "network",
        "loss": "loss and optimisation",
        "augment": "changes of the training patches",
        "precision": "limits",
        "resume": "who does the work",
    }

    image: tuple[str, ...] = Field(min_length=1, description="image volumes: Zarr arrays or OME-Zarrs, paths or URIs")
    labels: tuple[str, ...] = Field(min_length=1, description="label volumes, one an image; 255 means unlabelled")
    out: str = Field(description="folder of the bundle that is written")
    mask: tuple[str, ...] | None = Field(
        None, description="volumes of the labels' shape, one an image: only voxels above 0 count as labelled"
    )
    offset: tuple[Triple, ...] | None = Field(
        None, description="where the labels of a crop begin in the image, z,y,x in voxels [default: same shape]"
    )
    volume_weights: tuple[float, ...] | None = Field(
        None, description="how often patches come from each volume [default: in proportion to its labelled voxels]"
    )
    train_roi: tuple[str, ...] = Field(
        (":,:,:",),
        min_length=1,
        description="region to train on, z,y,x ranges of the labels such as 0:14,:,:; several boxes of a volume are "
        "joined by +, none leaves a volume out",
    )
    val_roi: tuple[str, ...] | None = Field(
        None, min_length=1, description="region to validate on, apart from --train-roi [default: none]"
    )
    split: float | None = Field(
        None,
        gt=0.0,
        lt=1.0,
        description="share of the slices along --axis that train, drawn by --seed; the others validate",
    )
    folds: int | None = Field(
        None, ge=2, le=20, description="cross-validate over so many slabs of --train-roi and bundle all networks"
    )
    classes: tuple[str, ...] | None = Field(
        None,
        description="class names from 0 on, comma-separated [default: those of the labels, else class 0, class 1 ...]",
    )
    ignore: int = Field(255, ge=0, description="label value that means unlabelled")
    recipe: str = Field("default", description="named training that gives the options left out: see 'volseg recipes'")
    init: str | None = Field(None, description="bundle whose weights the training starts from, as far as they fit")
    architecture: str = Field("unet", description="network: see 'volseg recipes'")
    dims: Literal[2, 3] | None = Field(None, description="2: slice by slice, 3: volumetric [default: planned]")
    axis: Literal["z", "y", "x"] = Field("z", description="axis that a 2D network goes along")
    patch: Triple | None = Field(None, description="patch z,y,x in voxels [default: planned]")
    side: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="side of a planned patch in fine voxels, where the region has as many "
        "[default: 256 in 2D, 64 in 3D]",
    )
    widths: tuple[int, ...] | None = Field(None, description="channels a level, e.g. 16,32,64,128 [default: planned]")
    pools: tuple[Triple, ...] | None = Field(
        None, description="pooling factors z,y,x between the levels, e.g. '1,2,2;2,2,2' [default: planned]"
    )
    convs: int | None = Field(None, ge=1, le=8, description="convolutions a level [default: the architecture's]")
    activation: Literal["relu", "leaky_relu", "silu"] | None = Field(
        None, description="activation function [default: the architecture's]"
    )
    norm: Literal["batch", "instance", "group", "none"] | None = Field(
        None, description="normalisation layers [default: the architecture's]"
    )
    dropout: float | None = Field(
        None, ge=0.0, lt=1.0, description="dropout probability at each level [default: the architecture's]"
    )
    network: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of the architecture, e.g. --set network.residual=true"
    )
    loss: Literal["dice_ce", "ce", "bce", "dice", "focal", "tversky"] = Field(
        "dice_ce", description="what is minimised; bce is cross entropy for two classes, and ce for more"
    )
    class_weights: tuple[float, ...] | Literal["balanced"] | None = Field(
        None, description="weight of each class in the loss, or balanced: by the root of its rarity [default: equal]"
    )
    focal_gamma: float = Field(2.0, ge=0.0, le=10.0, description="focus of the focal loss on what is hard")
    tversky_beta: float = Field(
        0.7, gt=0.0, lt=1.0, description="weight of missed voxels in the Tversky loss; that of false ones is the rest"
    )
    batch: int | None = Field(
        None, ge=1, le=4096, description="patches a step, over all workers together [default: planned]"
    )
    accumulate: int = Field(1, ge=1, le=1024, description="parts that a step's patches are taken in, to save memory")
    learning_rate: float = Field(2e-3, gt=0.0, le=1.0, description="peak learning rate of AdamW")
    weight_decay: float = Field(1e-2, ge=0.0, le=1.0, description="weight decay of AdamW")
    schedule: Literal["cosine", "poly", "restarts", "one_cycle", "plateau", "constant"] = Field(
        "cosine", description="how the learning rate goes over the training"
    )
    cycles: int = Field(3, ge=1, le=100, description="cycles of the restarts schedule")
    snapshots: bool = Field(False, description="bundle the weights of the end of every cycle as an ensemble")
    warm_up: float = Field(0.03, ge=0.0, lt=1.0, description="share of the training in which the learning rate rises")
    average: bool = Field(True, description="validate and keep a running average of the weights")
    validations: int = Field(12, ge=1, le=1000, description="how often the validation region is scored")
    patience: int | None = Field(
        None, ge=1, description="validations without improvement after which the training stops [default: never]"
    )
    augment: bool = Field(True, description="change the training patches at random: shape, grey values, noise")
    augmentation: AugmentSpec = Field(
        default_factory=AugmentSpec, description="how patches are changed, e.g. --set augmentation.rings=0.3"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="arithmetic of the training steps; auto: bf16 where the processor has it"
    )
    max_steps: int | None = Field(
        None, ge=1, description="optimiser steps at most [default: 10000, as many as fit where --max-minutes is given]"
    )
    max_minutes: float | None = Field(None, gt=0.0, description="wall-clock limit in minutes, validation included")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of everything random")
    resume: bool = Field(True, description="continue an interrupted training in the same folder")
    overwrite: bool = Field(False, description="replace a finished bundle in the same folder")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the network is trained")
    threads: int | None = Field(None, ge=1, description="CPU threads a worker [default: all cores]")
    workers: tuple[int, int] | None = Field(
        None, description="training workers on Ray: N, or LOW:HIGH to go on with what is there [default: this process]"
    )
    address: str | None = Field(None, description="address of a Ray cluster [default: Ray started inside this process]")
    sync_norm: bool = Field(False, description="batch normalisation over the patches of all workers together")
    attempts: int = Field(3, ge=0, le=1000, description="how often workers may fail before the training stops")
    webhook: str | None = Field(
        None, description="URL that gets a signed message from the driver at the end; its operator must allow it"
    )

    _lists = field_validator("image", "labels", "mask", "classes", "widths", "volume_weights", mode="before")(
        parse_list()
    )
    _regions = field_validator("train_roi", "val_roi", mode="before")(parse_list(";"))
    _groups = field_validator("pools", "offset", mode="before")(parse_triples)
    _patch = field_validator("patch", mode="before")(parse_triple)
    _sides = field_validator("patch")(positive)

    @field_validator("dims", mode="before")
    @classmethod
    def _dims_text(cls, value: object) -> object:
        # A choice between numbers does not take the command line's text by itself.
        return int(value) if isinstance(value, str) and value in {"2", "3"} else value

    @field_validator("class_weights", mode="before")
    @classmethod
    def _weights_text(cls, value: object) -> object:
        return value if value == "balanced" else parse_list()(value)

    @field_validator("workers", mode="before")
    @classmethod
    def _workers_text(cls, value: object) -> object:
        rule = "write a number of workers, or LOW:HIGH"
        if isinstance(value, int) and not isinstance(value, bool):
            return (value, value)
        if isinstance(value, str):
            parts = value.split(":")
            if len(parts) > 2 or not all(part.strip().isdigit() for part in parts):
                raise ValueError(rule)
            return (int(parts[0]), int(parts[-1]))
        return value

    @field_validator("workers")
    @classmethod
    def _workers_order(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1]:
            raise ValueError("at least one worker, and LOW not above HIGH")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        count = len(self.image)
        for name in ("labels", "mask", "volume_weights"):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise ValueError(f"{count} image(s) and {len(values)} {name}: give one {name} entry an image")
        for name in ("offset", "train_roi", "val_roi"):
            values = getattr(self, name)
            if values is not None and len(values) not in {1, count}:
                raise ValueError(
                    f"{count} image(s) and {len(values)} entries of {name}: give one for all, or one an image"
                )
        if self.volume_weights is not None and not all(weight > 0 for weight in self.volume_weights):
            raise ValueError("volume_weights must all be above 0: leave a volume out instead of giving it no weight")
        chosen = [name for name in ("val_roi", "split", "folds") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} both say what validates: give one of them")
        if self.patience is not None and not chosen:
            raise ValueError("patience needs validation data: give val_roi, split or folds")
        if self.snapshots and self.schedule != "restarts":
            raise ValueError("snapshots are taken at the ends of cycles: say schedule restarts, too")
        return self

    @property
    def flat(self) -> bool:
        """Whether slices are taken one by one; None of `dims` is planned before anybody asks."""
        return self.dims == 2

    @property
    def most_steps(self) -> int:
        """Optimiser steps at most."""
        if self.max_steps is not None:
            return self.max_steps
        return _STEPS if self.max_minutes is None else _ANY_STEPS

    def per_volume(self, name: Literal["offset", "train_roi", "val_roi"]) -> tuple[Any, ...]:
        """Return the entries of `name`, one a volume; None where the option was not given."""
        values = getattr(self, name)
        if values is None:
            return (None,) * len(self.image)
        return tuple(values) if len(values) == len(self.image) else tuple(values) * len(self.image)
