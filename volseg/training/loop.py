"""The training loop of one rank: steps, validation, checkpoints; it knows no Ray and no files."""

from __future__ import annotations

import math
import time
from contextlib import closing

import torch
from torch import Tensor

from volseg.errors import JobError, JobInterrupted, VolsegError
from volseg.training.milestones import Validation, choose, weights_of
from volseg.training.prefetch import Prefetcher
from volseg.training.replicas import Gradients, Sharing, StepLoss, share_cores
from volseg.training.state import Run
from volseg.training.task import Context, Outcome, State, Task

_CHECKPOINT_SECONDS = 30.0
_REPORT_SECONDS = 0.5
_CLIP = 5.0


def fit(task: Task, context: Context, stored: State | None = None) -> Outcome:
    """Train until the steps or the time are used up, and return the weights that do best on the validation regions.

    Without a validator, the last weights. Every rank of `context.group` calls it and returns the same. `stored` is the
    checkpoint of an earlier attempt. Raises JobError where the loss is no longer finite, JobInterrupted on Ctrl-C (or
    where `context.stop` says so) after a checkpoint, and on every rank what any of them raises on purpose.
    """
    run = Run(task, context)
    if stored is not None:
        run.restore(stored)
    sharing = _share(task, context)
    gradients = Gradients(
        run.network, task.loss, sharing, context.group,
        dtype=context.dtype, sync_norm=task.sync_norm, seed=task.seed,
    )  # fmt: skip
    validation = Validation(run)
    first, began = run.step, time.monotonic()
    patches = Prefetcher(task.sampler, task.batch, run.step, sharing.rank, sharing.world, context.threads)
    with closing(gradients), closing(patches):
        try:
            _steps(run, gradients, patches, validation)
        except KeyboardInterrupt:
            run.save()
            raise JobInterrupted(
                f"training stopped at step {run.step} by the user; the same command goes on from there"
            ) from None
        training = max(time.monotonic() - began - validation.spent, 1e-9)
        speed, wait = (run.step - first) / training, patches.waited / training
    outcome = choose(run)
    outcome.steps_per_second, outcome.data_wait = speed, wait
    return outcome


def _share(task: Task, context: Context) -> Sharing:
    group = context.group
    sharing = Sharing(task.batch, accumulate=task.accumulate, rank=group.rank, world=group.world)
    # Where ranks meet inside a step, they do so once: a second copy would have to come at the same time everywhere.
    if task.sync_norm or sharing.split or context.device.type != "cpu":
        replicas, threads = 1, context.threads
    else:
        patches = -(-task.batch // (group.world * task.accumulate))
        replicas, threads = share_cores(context.threads, patches, low_precision=context.dtype != torch.float32)
    return Sharing(task.batch, replicas, threads, task.accumulate, group.rank, group.world)


def _steps(run: Run, gradients: Gradients, patches: Prefetcher, validation: Validation) -> None:
    """Run all steps, the last validation included."""
    task, context, schedule = run.task, run.context, run.task.schedule
    reported = saved = time.monotonic()
    rate = schedule.rate(run.done)
    batch: tuple[Tensor, Tensor] | None = None
    run.network.train()
    while True:
        error = run.failed
        try:
            batch = batch or patches.next()
        except VolsegError as caught:
            error = error or caught
        # All ranks follow the first one's clock, and each other's errors.
        done, stop = context.group.agree([validation.progress(), float(context.stop())], error)
        if stop:
            raise KeyboardInterrupt
        if run.step and task.snapshots and schedule.cycle_ends(run.done, done):
            run.snapshots.append(weights_of(run))
        run.done = done
        rate = schedule.rate(done)
        if (done >= 1.0 and run.step) or run.stopping.stopped:
            break
        if run.step and validation.maybe(rate):
            run.save()
            run.report(rate, patches.waited)
            reported = saved = time.monotonic()
            continue
        assert batch is not None
        _step(run, gradients, batch, rate)
        batch = None
        now = time.monotonic()
        if now - saved > _CHECKPOINT_SECONDS:
            run.save()
            saved = now
        if now - reported > _REPORT_SECONDS or run.step == 1:
            run.report(rate, patches.waited)
            reported = now
    if task.snapshots and run.done < 1.0:
        run.snapshots.append(weights_of(run))
    validation.now(rate)
    run.save()
    run.report(rate, patches.waited)
    context.group.agree(error=run.failed)


def _step(run: Run, gradients: Gradients, batch: tuple[Tensor, Tensor], rate: float) -> None:
    """Take one step of the optimiser. Raises JobError where loss or gradients are not finite."""
    for group in run.optimiser.param_groups:
        group["lr"] = rate
    scale = run.scale.value if run.scale else 1.0
    loss = gradients.compute(*batch, run.step, scale)
    parameters = [p for p in run.network.parameters() if p.grad is not None]
    if scale != 1.0:
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], scale)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, _CLIP))
    overflow = run.scale is not None and scale > 1.0 and math.isfinite(loss.mean) and not math.isfinite(norm)
    if not overflow and not (math.isfinite(loss.mean) and math.isfinite(norm)):
        raise JobError(_diverged(run, loss, norm))
    if run.scale is not None:
        run.scale.after_step(overflow=overflow)
    # Between here and there, weights and step do not belong together, and Ctrl-C must not save them.
    run.whole = False
    if not overflow:
        run.optimiser.step()
    run.step += 1
    run.average.update(run.network, run.step)
    run.note_loss(loss.mean)
    run.whole = True


def _diverged(run: Run, loss: StepLoss, norm: float) -> str:
    value = f"the gradient of the loss is {norm}" if math.isfinite(loss.mean) else f"the loss is {loss.mean}"
    size = run.task.batch
    numbers = loss.broken or range(size)
    names = sorted({name for n in numbers for name in run.task.sampler.names(run.step, size, n, size)})
    kept, again = "no checkpoint had been written yet", ""
    if run.saved_step:
        kept, again = f"the checkpoint of step {run.saved_step}, from before, is kept", " to go on from there"
    return (
        f"{value} at step {run.step + 1}, in patches of {', '.join(names)}: training diverged and stopped, no bundle "
        f"was written; {kept}: run it again with a --learning-rate below {run.task.schedule.peak:g}{again}"
    )
