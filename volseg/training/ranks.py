"""One rank of a training, from a spec to a bundle: the same for a training in this process and for one on Ray.

An adapter (`train.py`, `cluster/ray_train.py`) gives a `Site`; every rank opens the data itself, and what must be equal
is the first rank's: plan, checkpoint, arithmetic.
"""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from volseg.journal import Note
from volseg.models.allocator import keep_freed_memory
from volseg.models.manifest import read_manifest
from volseg.spec import TrainSpec
from volseg.storage import files
from volseg.storage.places import check_places
from volseg.training.checkpoint import CheckpointWriter, State, Workplace, pack, unpack
from volseg.training.claim import check_out, check_same
from volseg.training.compose import (
    check_shares,
    describe,
    make_network,
    make_task,
    plan_for,
    plan_from,
    plan_values,
    settle,
)
from volseg.training.data import Data, open_data
from volseg.training.distributed import together
from volseg.training.finish import write_bundle
from volseg.training.folds import Trained, combine
from volseg.training.loop import fit
from volseg.training.planning import TrainPlan
from volseg.training.progress import TrainResult
from volseg.training.site import Site, choose_dtype
from volseg.training.task import Context

_RESULT = "result.json"


def run_rank(spec: TrainSpec, site: Site) -> TrainResult:
    """Train as `spec` says and return the result, the same on every rank; the first rank writes the bundle.

    Raises kinds of InputError before anything is trained, JobError where the training diverges, JobInterrupted where
    the user stops it; what is raised on purpose on one rank is raised on all.
    """
    workplace = Workplace.beside(spec.out)
    finished = site.group.first(_finished(spec, workplace, site))
    if finished is not None:
        return finished
    together(site.group, partial(_check, spec))
    before = site.group.first(together(site.group, partial(_plan_before, spec, workplace, site)))
    dims = before["config"]["dims"] if before is not None else None
    settled = site.group.first(together(site.group, partial(settle, spec, site, dims)))
    data = together(site.group, partial(open_data, settled, note_of(site)))
    if before is not None:
        plan = plan_from(settled, before)
    else:
        plan = site.group.first(together(site.group, partial(plan_for, settled, data, site)))
    if spec.folds is None:
        trained = train_one(spec, settled, data, plan, site, workplace)
    else:
        trained = combine(_train_folds(spec, settled, data, plan, site))
    result: TrainResult | None = None

    def write() -> TrainResult | None:
        return _write(spec, settled, data, trained, workplace) if site.group.rank == 0 else None

    result = site.group.first(together(site.group, write))
    assert result is not None
    return result


def train_one(
    spec: TrainSpec, settled: TrainSpec, data: Data, plan: TrainPlan, site: Site, workplace: Workplace
) -> Trained:
    """Run one training of a network on `data`, resumed from `workplace` where it holds a checkpoint.

    `spec` is what the user asked for and must ask for again to resume; `settled` the same with everything planned that
    data depend on. A resumed training keeps the plan it began with, which the answer holds.
    """
    group = site.group
    name, state = together(group, partial(_load, spec, workplace, site))
    if group.world > 1:
        # The others take the first rank's, which they may be unable to read.
        data_of = group.first(pack(state) if state else None)
        state = unpack(data_of) if data_of is not None else None
    if state is not None:
        plan = plan_from(settled, state["plan"])
    together(group, partial(check_shares, plan, group.world))
    note_of(site)(describe(settled, plan, data, group.world))
    about = {"spec": spec.model_dump(mode="json"), "plan": plan_values(plan)}
    with closing(CheckpointWriter(workplace, name)) as writer:
        context = Context(
            device=site.device,
            threads=site.threads,
            dtype=group.first(together(group, partial(choose_dtype, settled, site.device))),
            save=lambda now: writer.save(now | about),
            report=site.report,
            record=workplace.write_metrics,
            started=site.started,
            spent=float(state["seconds"]) if state else 0.0,
            group=group,
            stop=site.stop,
        )
        before = torch.get_num_threads()
        try:
            keep_freed_memory()
            torch.set_num_threads(1)
            torch.manual_seed(settled.seed)
            say = note_of(site) if state is None else _silent
            network = together(group, partial(make_network, settled, data, plan, say))
            task = together(group, partial(make_task, settled, data, plan, context, network))
            outcome = fit(task, context, state)
        finally:
            torch.set_num_threads(before)
    return Trained(outcome, plan, context.seconds, int(state["step"]) if state else 0)


def _train_folds(spec: TrainSpec, settled: TrainSpec, data: Data, plan: TrainPlan, site: Site) -> list[Trained]:
    """Train every fold in a workplace of its own: a resumed training goes on in the fold that was interrupted."""
    assert spec.folds is not None
    say, workplace = note_of(site), Workplace.beside(spec.out)
    minutes = spec.max_minutes / spec.folds if spec.max_minutes is not None else None
    share = {"max_minutes": minutes, "max_steps": max(1, spec.most_steps // spec.folds)}
    each = settled.model_copy(update=share)
    trained = []
    for number, part in enumerate(together(site.group, partial(data.folds, spec.folds, say)), 1):
        say(f"fold {number} of {spec.folds}")
        place = replace(site, started=time.monotonic())
        trained.append(train_one(spec, each, part, plan, place, workplace.part(f"fold-{number}")))
    return trained


def _check(spec: TrainSpec) -> None:
    """Raise what is wrong with the places of `spec` before anything is read."""
    read = [*spec.image, *spec.labels, *(spec.mask or ()), *([spec.init] if spec.init is not None else [])]
    written = [files.absolute(spec.out), Workplace.beside(spec.out).uri]
    check_places([files.absolute(uri) for uri in read], written)
    check_out(spec)


def _load(spec: TrainSpec, workplace: Workplace, site: Site) -> tuple[str | None, State | None]:
    """Return name and state of the checkpoint to go on from, on the first rank."""
    if site.group.rank > 0:
        return None, None
    if not spec.resume and not site.restarted:
        workplace.remove()
        return None, None
    found = workplace.newest_valid(site.note)
    if found is None:
        return None, None
    state = found[1]
    check_same(spec, state["spec"])
    site.note(f"going on from step {state['step']} after {state['seconds']:.0f} s of training")
    return found


def _plan_before(spec: TrainSpec, workplace: Workplace, site: Site) -> dict[str, Any] | None:
    """Return, on the first rank, the plan of an earlier attempt: with other machines or times it would be another now.

    The folds of a training have one plan, that of the first one.
    """
    if site.group.rank > 0 or not (spec.resume or site.restarted):
        return None
    found = (workplace if spec.folds is None else workplace.part("fold-1")).newest_valid(_silent)
    if found is None:
        return None
    check_same(spec, found[1]["spec"])
    plan: dict[str, Any] = found[1]["plan"]
    return plan


def note_of(site: Site) -> Note:
    """Return what takes lines for the user: of several ranks only the first one speaks."""
    return site.note if site.group.rank == 0 else _silent


def _silent(_: str) -> None:
    """Take a line that nobody needs."""


def _finished(spec: TrainSpec, workplace: Workplace, site: Site) -> TrainResult | None:
    """Return, on the first rank, the result of a training that wrote its bundle and was killed before it said so."""
    place = files.join(workplace.uri, _RESULT)
    if site.group.rank > 0 or not (spec.resume or site.restarted) or not files.exists(place):
        return None
    result = TrainResult(**json.loads(files.read_bytes(place)))
    if not files.exists(spec.out) or read_manifest(spec.out).digest != result.digest:
        return None
    workplace.remove()
    return result


def _write(spec: TrainSpec, settled: TrainSpec, data: Data, trained: Trained, workplace: Workplace) -> TrainResult:
    outcome = trained.outcome
    metrics = workplace.write_metrics(outcome.rows)
    digest = write_bundle(settled, data, trained.plan, outcome, trained.seconds, metrics)
    scores = outcome.scores
    result = TrainResult(
        bundle=files.absolute(spec.out),
        digest=digest,
        steps=outcome.steps,
        seconds=round(trained.seconds, 2),
        resumed_from=trained.resumed_from,
        dice=dict(zip(data.names, scores.dice, strict=True)) if scores else None,
        mean_foreground_dice=scores.mean_foreground if scores else None,
        weights=outcome.weights,
        threshold=outcome.threshold,
        steps_per_second=round(outcome.steps_per_second, 3),
        data_wait=round(outcome.data_wait, 4),
        class_bias=outcome.class_bias,
        members=len(outcome.networks),
    )
    files.write_bytes(files.join(workplace.uri, _RESULT), json.dumps(dataclasses.asdict(result)).encode())
    workplace.remove()
    return result
