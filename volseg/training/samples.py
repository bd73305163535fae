"""What a training would see: patches as its sampler makes them, in one picture."""

from __future__ import annotations

from volseg.spec import TrainSpec
from volseg.storage import ome
from volseg.training.compose import plan_for, planned_augmentation, settle
from volseg.training.data import open_data
from volseg.training.preview import preview
from volseg.training.sampler import Sampler
from volseg.training.site import Site, choose_device, cores, memory_share

_SAMPLES = 11


def draw_preview(spec: TrainSpec) -> bytes:
    """Return a PNG of training patches with their labels: one as it was read, then changed ones as `spec` asks for.

    Raises what a training by `spec` would raise before its first step.
    """
    device = choose_device(spec)
    site = Site(device, spec.threads or cores(), memory_share(device), report=lambda _: None, note=lambda _: None)
    settled = settle(spec, site)
    data = open_data(settled, site.note)
    plan = plan_for(settled, data, site)
    plain = Sampler(data, plan.patch, plan.answer, None, spec.seed)
    changed = Sampler(data, plan.patch, plan.answer, planned_augmentation(settled, data), spec.seed)
    pairs = [plain.draw(0, 0), *(changed.draw(0, number) for number in range(_SAMPLES))]
    colours = {**dict(enumerate(ome.default_colours(len(data.names)))), **data.labels[0].colours}
    return preview(pairs, {number: (c[0], c[1], c[2]) for number, c in colours.items() if number})
