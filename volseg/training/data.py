"""What a training learns from: regions of all volumes with their labels counted, names of the classes, one scaling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import psutil

from volseg.errors import SpecError, VolumeError
from volseg.geometry.box import AXES, Box, Triple
from volseg.intensity import Scaling
from volseg.journal import Note
from volseg.models.config import Axis, to_network, to_volume
from volseg.spec import TrainSpec
from volseg.storage.volume import Volume
from volseg.training.index import Asked, LabelIndex, RegionIndex, build_index, count_slices
from volseg.training.region import Region
from volseg.training.sources import Source, open_sources
from volseg.training.split import cut_slabs, draw_slices, take_range, take_slices
from volseg.training.view import NetworkView, TileCache

_CACHE_BYTES = 2 << 30
_SCALING_SAMPLES = 2_000_000
_SCALING_TILES = 256


@dataclass(frozen=True, eq=False)
class Data:
    """Regions to train and to validate on (network coordinates), of volumes with one scaling and one list of classes.

    `index` counts the labels of the training regions, one part each. `volume_weights` are those that the user gave;
    `fold_axis` is the axis (network coordinates) that slabs are cut across, None for the one with the most labelled
    slices.
    """

    images: tuple[Volume, ...]
    labels: tuple[Volume, ...]
    train: tuple[Region, ...]
    val: tuple[Region, ...]
    names: tuple[str, ...]
    scaling: Scaling
    index: LabelIndex
    volume_weights: tuple[float, ...] | None
    fold_axis: int | None

    def folds(self, count: int, say: Note = lambda _: None) -> list[Data]:
        """Return one Data a fold: it validates on one of `count` slabs of the labelled part and trains on the others.

        Slabs hold about as many labelled voxels each; with several volumes, they follow each other from the first
        volume to the last. All folds keep the scaling, so that their networks can work as one. `say` takes a line about
        each class that a fold cannot learn. Raises SpecError where fewer slices than folds hold labels.
        """
        volumes = _by_volume(self.train)
        counts = [count_slices(region.labels, boxes, region.ignore) for region, boxes in volumes]
        axis = self.fold_axis
        if axis is None:
            axis = max(range(3), key=lambda a: sum(int(np.count_nonzero(rows[a])) for rows in counts))
        folds = []
        for number, slab in enumerate(cut_slabs([rows[axis] for rows in counts], count), 1):
            outer, inner = (
                _labelled(
                    replace(region, box=box)
                    for (region, boxes), (start, stop) in zip(volumes, slab, strict=True)
                    for box in take_range(boxes, axis, start, stop, inside=inside)
                )
                for inside in (False, True)
            )
            train, index = _weighted(outer, len(self.names), self.volume_weights, "training")
            val, _ = _weighted(inner, len(self.names), None, "validation")
            for name, total in zip(self.names, index.totals, strict=True):
                if total == 0:
                    say(
                        f"class {name!r} has no labelled voxel in the training slabs of fold {number}: it is not learnt"
                    )
            folds.append(replace(self, train=train, val=val, index=index))
        return folds


def open_data(spec: TrainSpec, say: Note) -> Data:
    """Open and check what `spec` names; `say` takes a line about each class that cannot be learnt.

    A class without a labelled voxel in the training regions is refused where --classes names it, and told where only
    the labels' own list or a gap in their numbers has it. Raises VolumeError where volumes do not fit each other or the
    classes, SpecError where the regions are malformed, overlap or cannot be divided.
    """
    sources = open_sources(spec)
    names = _class_names(spec, sources)
    flat = spec.dims == 2
    regions = _regions(spec, sources, spec.axis if flat else "z")
    if spec.split is not None:
        regions = _split(spec, regions[0], 0 if flat else AXES.index(spec.axis))
        if not flat:
            say(
                "--split draws single slices, and a 3D network sees each run of them alone: --folds or --val-roi keep "
                "slices together"
            )
    limit = len(names) if names else None
    train, index = _weighted(regions[0], limit, spec.volume_weights, "training")
    val, val_index = _weighted(regions[1], limit, None, "validation")
    count = max(part.counts.shape[1] for part in (*index.parts, *val_index.parts))
    index, val_index = (LabelIndex(tuple(p.widened(count) for p in i.parts)) for i in (index, val_index))
    names = names or ("background", *(f"class {i}" for i in range(1, count)))
    _check_classes(spec, names, index, val_index, say)
    scaling = _measure(train, spec.seed)
    return Data(
        images=tuple(source.image for source in sources),
        labels=tuple(source.labels for source in sources),
        train=tuple(replace(region, scaling=scaling) for region in train),
        val=tuple(replace(region, scaling=scaling) for region in val),
        names=names,
        scaling=scaling,
        index=index,
        volume_weights=spec.volume_weights,
        fold_axis=0 if flat else None,
    )


def volume_shape(spec: TrainSpec, box: Box) -> Triple:
    """Return the sides (z, y, x) of a `box` that is given in network coordinates."""
    return to_volume(box.shape, spec.axis) if spec.dims == 2 else box.shape


def _class_names(spec: TrainSpec, sources: Sequence[Source]) -> tuple[str, ...] | None:
    """Return the names given, else those of the labels; None where there are none."""
    if spec.classes is not None:
        if len(spec.classes) < 2:
            raise SpecError(
                f"--classes {','.join(spec.classes)} names one class, two are the least; nothing was trained"
            )
        return spec.classes
    named = [source.labels for source in sources if source.labels.class_names]
    for labels in named[1:]:
        if labels.class_names != named[0].class_names:
            raise VolumeError(
                f"labels {named[0].uri} have the classes {', '.join(named[0].class_names or ())}, labels {labels.uri} "
                f"{', '.join(labels.class_names or ())}: a number must mean the same everywhere; nothing was trained: "
                "correct the labels, or name the classes of all with --classes"
            )
    names = named[0].class_names if named else None
    if names is not None and len(names) < 2:
        raise SpecError(
            f"labels {named[0].uri} name one class, {names[0]}, two are the least; nothing was trained: name all "
            "classes with --classes"
        )
    return names


def _regions(spec: TrainSpec, sources: Sequence[Source], axis: Axis) -> tuple[list[Region], list[Region]]:
    """Return the regions that train and those that validate; scaling and weights come later, from their voxels."""
    workers = spec.workers[1] if spec.workers is not None else 1
    cache = TileCache(_CACHE_BYTES, psutil.virtual_memory().available // (4 * workers))
    unscaled = Scaling(low=(0.0,), high=(1.0,), mean=(0.0,), std=(1.0,))
    train: list[Region] = []
    val: list[Region] = []
    for number, source in enumerate(sources):
        image = NetworkView(source.image, axis, cache, source.offset)
        labels = NetworkView(source.labelled, axis, cache)
        for kept, boxes in ((train, source.train), (val, source.val)):
            for box in boxes:
                inner = Box(to_network(box.start, axis), to_network(box.stop, axis))
                kept.append(Region(image, labels, inner, unscaled, spec.ignore, 1.0, source.name, number))
    return train, val


def _split(spec: TrainSpec, regions: Sequence[Region], axis: int) -> tuple[list[Region], list[Region]]:
    """Divide the labelled slices of `regions` into those that train and those that validate."""
    assert spec.split is not None
    volumes = _by_volume(regions)
    counts = [count_slices(region.labels, boxes, spec.ignore)[axis] for region, boxes in volumes]
    train, val = (
        _labelled(
            replace(region, box=box)
            for i, (region, boxes) in enumerate(volumes)
            for box in take_slices(boxes, axis, {place[1] for place in places if place[0] == i})
        )
        for places in draw_slices(counts, spec.split, spec.seed)
    )
    return train, val


def _by_volume(regions: Sequence[Region]) -> list[tuple[Region, list[Box]]]:
    """Return one region of each volume, with the boxes of all."""
    volumes: dict[int, tuple[Region, list[Box]]] = {}
    for region in regions:
        volumes.setdefault(region.volume, (region, []))[1].append(region.box)
    return list(volumes.values())


def _labelled(regions: Iterable[Region]) -> list[Region]:
    """Return those `regions` that hold a label: of several boxes in a slice, one may be without."""
    return [r for r in regions if count_slices(r.labels, [r.box], r.ignore)[0].any()]


def _weighted(
    regions: Sequence[Region], classes: int | None, weights: Sequence[float] | None, where: str
) -> tuple[tuple[Region, ...], LabelIndex]:
    """Count the labels of `regions` and return these with the share of the patches that each gives, and the counts.

    `weights` are the shares of the volumes, in proportion to their labelled voxels where None.
    """
    parts: list[RegionIndex] = []
    for region in regions:
        own = [r.box for r in regions if r.volume == region.volume]
        asked = Asked(classes, region.ignore, where, region.name)
        parts.append(build_index(region.labels, region.box, asked, _around(own)))
    sizes = [int(part.totals.sum()) for part in parts]
    totals: dict[int, int] = {}
    for region, size in zip(regions, sizes, strict=True):
        totals[region.volume] = totals.get(region.volume, 0) + size
    shares = {v: float(weights[v]) if weights else float(total) for v, total in totals.items()}
    whole = sum(shares.values())
    return tuple(
        replace(region, weight=shares[region.volume] / whole * size / totals[region.volume])
        for region, size in zip(regions, sizes, strict=True)
    ), LabelIndex(tuple(parts))


def _around(boxes: Sequence[Box]) -> Box:
    z0, y0, x0 = (min(box.start[i] for box in boxes) for i in range(3))
    z1, y1, x1 = (max(box.stop[i] for box in boxes) for i in range(3))
    return Box((z0, y0, x0), (z1, y1, x1))


def _check_classes(spec: TrainSpec, names: Sequence[str], index: LabelIndex, validation: LabelIndex, say: Note) -> None:
    seen = validation.totals if validation.parts else np.zeros(len(names), np.int64)
    for name, total, scored in zip(names, index.totals, seen, strict=True):
        if total:
            continue
        found = f"class {name!r} has no labelled voxel in the training regions"
        if spec.classes is not None:
            drawn = ", another --split or --seed" if spec.split is not None else ""
            raise VolumeError(
                f"{found}, but --classes names it: it cannot be learnt; nothing was trained: choose a --train-roi that "
                f"covers it{drawn}, or leave --classes out"
            )
        say(f"{found}: it cannot be learnt" + (", and its score will be 0" if scored else ""))


def _measure(regions: Sequence[Region], seed: int) -> Scaling:
    """Take the intensity statistics of a random sample of all training regions."""
    tiles = [(region, tile) for region in regions for tile in region.box.tiles(region.image.tile)]
    rng = np.random.default_rng(seed)
    if len(tiles) > _SCALING_TILES:
        tiles = [tiles[i] for i in np.sort(rng.choice(len(tiles), _SCALING_TILES, replace=False))]
    voxels = sum(tile.size for _, tile in tiles)
    share = min(1.0, _SCALING_SAMPLES / voxels)
    samples = []
    for region, tile in tiles:
        values = region.image.read(tile)
        values = values.reshape(len(values), -1)
        count = max(1, round(share * values.shape[1]))
        samples.append(values if share == 1.0 else values[:, rng.integers(values.shape[1], size=count)])
    try:
        return Scaling.measure(np.concatenate(samples, axis=1))
    except ValueError as error:
        uris = ", ".join(dict.fromkeys(region.name for region in regions))
        raise VolumeError(
            f"image {uris}: {error} in the training region; nothing was trained: choose a region that holds data"
        ) from None
