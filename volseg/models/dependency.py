"""What a program's answer to a part of the input lacks: the halo of exact mode, by arithmetic and without torch.

A window is a part of the whole input, cut on the pooling step. Where it ends inside the whole input, some voxels of
every tensor differ from those that the whole input gives: they see zeros, or nothing, where there is more. How many
they are at each end follows from operation to operation; what is left of them in the answer is the halo, and no smaller
one would do: `tests/test_dependency.py` finds the same by putting NaN outside.
"""

from __future__ import annotations

from functools import reduce

from volseg.geometry.tiles import Halo
from volseg.models.program import INPUT, Conv, Enlarge, Normalise, Op, Pool, Program, Raise
from volseg.models.sides import raise_padding

_OF_THE_PATCH = {"instance", "group"}


def patch_dependent(program: Program) -> tuple[str, ...]:
    """Return the names of the operations whose result depends on the whole patch: they rule exact mode out."""
    return tuple(op.name for op in program.main.ops if isinstance(op, Conv | Normalise) and op.norm in _OF_THE_PATCH)


def halo_of(program: Program) -> Halo:
    """Return the halo of the first answer, in network coordinates.

    Statistics that normalisations take of the whole patch are not counted: see `patch_dependent`.
    """
    before, after = zip(*(_spoilt(program.main, axis) for axis in range(3)), strict=True)
    a, b, c = (rule.step for rule in program.allowed)
    return Halo((before[0], before[1], before[2]), (after[0], after[1], after[2]), (a, b, c))


def _spoilt(program: Program, axis: int) -> tuple[int, int]:
    """Return how many voxels of the answer are wrong at the begin and at the end of a window along `axis`."""
    found = {INPUT: (0, 0)}
    for op in program.ops:
        found[op.name] = _behind(program, op, [found[name] for name in op.sources], axis)
    return found[program.answers[0]]


def _behind(program: Program, op: Op, sources: list[tuple[int, int]], axis: int) -> tuple[int, int]:
    """Return the wrong voxels at both ends of what `op` makes, each counted from the end of its own tensor."""
    before, after = sources[0]
    match op:
        case Conv(padded=False):
            # It makes fewer voxels by as many as it looks further.
            return before, after
        case Conv():
            reach = op.kernel[axis] // 2
            return before + reach, after + reach
        case Pool() if op.stride[axis] == op.kernel[axis]:
            factor = op.stride[axis]
            return -(-before // factor), -(-after // factor)
        case Pool():
            reach = op.kernel[axis] // 2
            return before + reach, after + reach
        case Enlarge():
            factor = op.factor[axis]
            return before * factor, after * factor
        case Raise():
            kernel, factor = op.kernel[axis], op.factor[axis]
            padding = raise_padding(kernel, factor)
            # Voxel y sums up the voxels i of its source with 0 <= y + padding - i * factor < kernel.
            return (before - 1) * factor + kernel - padding, after * factor + padding
        case _:
            cuts = [_cut(program, op, name, axis) for name in op.sources]
            left = [(max(0, b - cut), max(0, a - cut)) for (b, a), cut in zip(sources, cuts, strict=True)]
            return reduce(lambda one, other: (max(one[0], other[0]), max(one[1], other[1])), left)


def _cut(program: Program, op: Op, source: str, axis: int) -> int:
    """Return how many voxels of `source` are cut off at each end before `op` puts it together with others."""
    made, given = program.lines[op.name][axis], program.lines[source][axis]
    return (made.lost - given.lost) // (2 * given.scale)
