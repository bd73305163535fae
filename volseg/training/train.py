"""Training in this process: the local adapter of `ranks.run_rank`."""

from __future__ import annotations

from volseg.journal import Note
from volseg.spec import TrainSpec
from volseg.training.progress import ProgressCallback, TrainResult
from volseg.training.ranks import run_rank
from volseg.training.site import Site, choose_device, cores, memory_share


def train(spec: TrainSpec, progress: ProgressCallback | None = None, note: Note | None = None) -> TrainResult:
    """Train a network as `spec` says and write its bundle to `spec.out`.

    `progress` is called about twice a second, `note` with single lines that the user should see. Killed at any time,
    the same call goes on from the newest checkpoint in ``<out>.training``, and the time that was used counts. Raises
    kinds of InputError before anything is trained, JobError where the training diverges, JobInterrupted on Ctrl-C.
    """
    device = choose_device(spec)
    site = Site(
        device=device,
        threads=spec.threads or cores(),
        memory=memory_share(device),
        report=progress or (lambda _: None),
        note=note or (lambda _: None),
    )
    return run_rank(spec, site)
