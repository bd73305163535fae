"""Cross-validation: one network a slab of the labelled part, trained on the others and scored on its own.

All labels are trained on, and all are scored by a network that never saw them. The networks become one ensemble.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from volseg.training.metrics import Scores
from volseg.training.planning import TrainPlan
from volseg.training.task import Outcome


@dataclass(frozen=True)
class Trained:
    """How one training ended, what it was given, its seconds over all attempts, and the step it went on from."""

    outcome: Outcome
    plan: TrainPlan
    seconds: float
    resumed_from: int


def combine(parts: Sequence[Trained]) -> Trained:
    """Return the trainings of all folds as one, whose networks are an ensemble."""
    return Trained(
        outcome=_together([part.outcome for part in parts]),
        plan=parts[0].plan,
        seconds=sum(part.seconds for part in parts),
        resumed_from=sum(part.resumed_from for part in parts),
    )


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """Return the ensemble of several outcomes: mean threshold and bias, and Dice over the slabs together."""
    dice = [outcome.scores.mean_foreground for outcome in outcomes if outcome.scores is not None]
    each = ", ".join("-" if value is None else f"{value:.3f}" for value in dice)
    thresholds = [outcome.threshold for outcome in outcomes if outcome.threshold is not None]
    biases = [outcome.class_bias for outcome in outcomes]
    known = [bias for bias in biases if bias is not None]
    return Outcome(
        networks=[network for outcome in outcomes for network in outcome.networks],
        weights=f"{len(outcomes)} folds, mean foreground Dice of each on its own slab: {each}",
        scores=mean_scores([outcome.scores for outcome in outcomes if outcome.scores is not None]),
        threshold=sum(thresholds) / len(thresholds) if thresholds else None,
        # A fold without a bias has one of 0.
        class_bias=tuple(sum(column) / len(biases) for column in zip(*known, strict=True)) if known else None,
        steps=sum(outcome.steps for outcome in outcomes),
        rows=[{"fold": number} | row for number, outcome in enumerate(outcomes, 1) for row in outcome.rows],
        steps_per_second=sum(outcome.steps_per_second for outcome in outcomes) / len(outcomes),
        data_wait=sum(outcome.data_wait for outcome in outcomes) / len(outcomes),
    )


def mean_scores(scores: Sequence[Scores]) -> Scores | None:
    """Return the Dice of every class over all slabs, each weighted by its voxels of the class; None without scores."""
    if not scores:
        return None
    sizes = tuple(sum(column) for column in zip(*(s.sizes for s in scores), strict=True))
    dice: list[float | None] = []
    for number in range(len(sizes)):
        pairs = [(s.dice[number], s.sizes[number]) for s in scores if s.dice[number] is not None]
        weight = sum(size for _, size in pairs)
        dice.append(sum((value or 0.0) * size for value, size in pairs) / weight if weight else None)
    return replace(scores[0], dice=tuple(dice), sizes=sizes, threshold=None)
