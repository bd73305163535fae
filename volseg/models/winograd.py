"""Convolutions on CPUs: straight to oneDNN, over several sources at once, in tiles of rows, fused with what follows.

oneDNN's direct kernels run at a core's peak (float32: as fast as a large matrix product), so only fewer multiplications
make a forward faster. A kernel of 3 along the first axis is therefore computed with Winograd's
F(4, 3) along that axis: 6 convolutions of one dimension less make 4 rows, instead of 12. Both transforms are products
with a 6 x 6 and a 4 x 6 matrix.

Sources: Winograd 1980; Lavin & Gray 2016 (arXiv 1509.09308). The points 0, +-3/4, +-3/2 and infinity are our choice
among twelve sets that were measured: with them the error is 1.4 to 2 times that of a direct convolution, with the usual
0, +-1, +-2 and infinity four times.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from volseg.models.graph import activate
from volseg.models.program import Activation
from volseg.models.tiles import MADE, READ, Tiles, tiles_of

_POINTS = (0.0, 0.75, -0.75, 1.5, -1.5)
_UNARY: dict[Activation, tuple[str, list[float]]] = {
    "none": ("none", []),
    "relu": ("relu", []),
    "leaky_relu": ("leaky_relu", [0.01]),
    "silu": ("swish", []),
}


_PREPARING = threading.Lock()
"""Threads may run one network: what is made of its kernels is made once, and complete when it is seen."""


class CpuConv(nn.Module):
    """A convolution of stride 1, its bias and its activation, in oneDNN whatever the shapes.

    torch itself sends a 3D convolution whose batch x channels x depth x height is at most 20,480 to a kernel that
    unfolds the input 27 times: with one patch a forward that is the first layer and most of the deep ones.

    `widths` are the channels of the sources, whose joined channels the kernel reads: they are never copied together.
    """

    def __init__(
        self, conv: nn.Conv2d | nn.Conv3d, widths: Sequence[int], activation: Activation, *, tiled: bool = True
    ) -> None:
        super().__init__()
        self._tiled = tiled
        self.weight, self.bias, self._activation = conv.weight, conv.bias, activation
        assert not isinstance(conv.padding, str)
        ones = [1] * len(conv.padding)
        self._how = list(conv.padding), ones, ones, 1
        bounds = [0, *accumulate(widths)]
        self._parts = [slice(a, b) for a, b in pairwise(bounds)]
        self._packed: list[Tensor] = []
        self._rows: _Rows | None = None

    def forward(self, sources: list[Tensor]) -> Tensor:
        """Convolve sources (b, c, [z,] y, x), channels last; the list is emptied once they were read."""
        tiles = self._tiles(sources[0])
        if tiles is None:
            return self._direct(sources)
        pad = self._how[0][0]
        made = self._prepared_rows(sources, pad, tiles)(sources, pad, tiles)
        sources.clear()
        return activate(made, self._activation)

    def _prepared_rows(self, sources: Sequence[Tensor], pad: int, tiles: Tiles) -> _Rows:
        with _PREPARING:
            if self._rows is None:
                rows = [_rows_first(x)[0] for x in sources]
                self._rows = _Rows(self.weight, self.bias, self._parts, rows, pad, tiles)
            return self._rows

    def _tiles(self, x: Tensor) -> Tiles | None:
        if not self._tiled:
            return None
        kernel = self.weight.shape[2:]
        sides = [n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], self._how[0], kernel, strict=True)]
        return tiles_of(_triple(kernel), self.weight.shape[1], self.weight.shape[0], _triple(sides), x.itemsize)

    def _direct(self, sources: list[Tensor]) -> Tensor:
        ops, how = torch.ops.mkldnn, self._how
        with _PREPARING:
            if not self._packed:
                # Each call would otherwise bring the kernel into oneDNN's order anew.
                self._packed = [
                    ops._reorder_convolution_weight(_last(self.weight[:, part]), *how, list(x.shape))
                    for part, x in zip(self._parts, sources, strict=True)
                ]
        unary, scalars = _UNARY[self._activation]
        alone = len(sources) == 1
        fused = (unary, scalars) if alone else ("none", [])
        made: Tensor = ops._convolution_pointwise(sources[0], self._packed[0], self.bias, *how, *fused, "")
        for x, weight in zip(sources[1:], self._packed[1:], strict=True):
            ops._convolution_pointwise_.binary(made, x, weight, None, *how, "add", 1.0, None, [], None)
        sources.clear()
        return made if alone else activate(made, self._activation)


class _Rows:
    """The kernel of one convolution, transformed, and what it makes of rows."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        parts: Sequence[slice],
        rows: Sequence[Tensor],
        pad: int,
        tiles: Tiles,
    ) -> None:
        kernel, gather, spread, ones = _matrices()
        # Their entries are short binary fractions, so that bfloat16 holds them, too.
        self._gather, self._spread = gather.to(weight.dtype), spread.to(weight.dtype)
        # (6, cout, cin, [y,] x); a 2D network's kernel gets a side of 1 for the axis along which rows are stacked.
        made = torch.einsum("pk,oik...->poi...", kernel, weight.double()).to(weight.dtype)
        made = made if weight.ndim == 5 else made.unsqueeze(3)
        self._cout = weight.shape[0]
        self._weights = [
            [self._packed(made[p, :, part], x, pad, tiles) for p in range(READ)]
            for part, x in zip(parts, rows, strict=True)
        ]
        zero = torch.zeros(self._cout) if bias is None else bias.double()
        self._bias = [(n * zero).to(weight.dtype) for n in ones.tolist()]

    def __call__(self, sources: Sequence[Tensor], pad: int, tiles: Tiles) -> Tensor:
        """Convolve (b, c, [z,] y, x), padded with zeros by `pad` along every axis."""
        rows = [_rows_first(x) for x in sources]
        batch, depth, *rest = rows[0].shape[:-1]
        sides = [n + 2 * pad - 2 for n in rest]
        new = rows[0].new_empty
        made = new((batch, depth + 2 * pad - 2, *sides, self._cout))
        between = [new((READ, tiles.chunk, *x.shape[2:])) for x in rows]
        products = new((READ, tiles.chunk, *sides, self._cout))
        for b in range(batch):
            for first in range(0, tiles.count, tiles.chunk):
                count = min(tiles.chunk, tiles.count - first)
                views = [v[:, :count] for v in between]
                for x, view in zip(rows, views, strict=True):
                    self._read(x[b], view, first, pad)
                self._multiply(views, products[:, :count], pad)
                self._make(products[:, :count], made[b], first)
        return made.movedim(-1, 1)

    def _packed(self, weight: Tensor, rows: Tensor, pad: int, tiles: Tiles) -> Tensor:
        """Return a kernel in the order in which oneDNN wants it for a chunk of such rows (n, [y,] x, c)."""
        shape = list(_picture(torch.empty((tiles.chunk, *rows.shape[1:]), device="meta")).shape)
        packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(_last(weight), *self._how(pad, rows.ndim), shape)
        return packed

    def _how(self, pad: int, ndim: int) -> tuple[list[int], list[int], list[int], int]:
        """Return padding, stride, dilation, groups of the products; lines of a picture are stacked, not padded."""
        return [pad if ndim == 4 else 0, pad], [1, 1], [1, 1], 1

    def _read(self, x: Tensor, view: Tensor, first: int, pad: int) -> None:
        """Put the transformed rows of some tiles into `view`: (6, tiles, [y,] x, c)."""
        flat, lines = x.flatten(1), view.flatten(2)
        count, above, below = view.shape[1], pad - MADE * first, len(flat) + pad - READ - MADE * first
        # Tiles that lie inside, all in one call: they overlap by two rows.
        low = min(count, max(0, -(-above // MADE)))
        inner = range(low, max(low, min(count, below // MADE + 1)))
        if inner:
            start, line = MADE * (first + inner.start) - pad, flat.shape[1]
            source = flat[start:].as_strided((len(inner), READ, line), (MADE * line, line, 1))
            target = lines[:, inner.start : inner.stop].transpose(0, 1)
            torch.bmm(self._gather.expand(len(inner), READ, READ), source, out=target)
        for i in (*range(inner.start), *range(inner.stop, count)):
            start = MADE * (first + i) - pad
            low, high = max(start, 0), min(start + READ, len(flat))
            source = flat[low:high]
            if high - low < READ:
                source = torch.nn.functional.pad(source, (0, 0, low - start, start + READ - high))
            torch.mm(self._gather, source, out=lines[:, i])

    def _multiply(self, views: Sequence[Tensor], products: Tensor, pad: int) -> None:
        products.zero_()
        for number, (view, weights) in enumerate(zip(views, self._weights, strict=True)):
            how = self._how(pad, view.ndim - 1)
            for p, weight in enumerate(weights):
                bias = None if number else self._bias[p]
                torch.ops.mkldnn._convolution_pointwise_.binary(
                    _picture(products[p]), _picture(view[p]), weight, bias, *how, "add", 1.0, None, [], None
                )

    def _make(self, products: Tensor, made: Tensor, first: int) -> None:
        flat, lines = made[MADE * first :].flatten(1), products.flatten(2)
        whole = min(lines.shape[1], len(flat) // MADE)
        if whole:
            target = flat[: MADE * whole].view(whole, MADE, -1)
            torch.bmm(self._spread.expand(whole, MADE, READ), lines[:, :whole].transpose(0, 1), out=target)
        if whole < lines.shape[1]:
            rest = flat[MADE * whole :]
            rest.copy_(torch.mm(self._spread, lines[:, whole])[: len(rest)])


@cache
def _matrices() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the kernel's (6, 3), the input's (6, 6) and the answer's (4, 6) transform, and what a bias becomes (6).

    Toom-Cook: row p of the kernel's transform evaluates its polynomial at point p, scaled; the last point is infinity.
    """
    points = torch.tensor(_POINTS, dtype=torch.float64)
    finite = READ - 1
    spread = torch.zeros(MADE, READ, dtype=torch.float64)
    kernel, gather = torch.zeros(READ, 3, dtype=torch.float64), torch.zeros(READ, READ, dtype=torch.float64)
    for p, point in enumerate(points):
        others = torch.cat([points[:p], points[p + 1 :]])
        kernel[p] = point ** torch.arange(3) / torch.prod(point - others)
        spread[:, p] = point ** torch.arange(MADE)
        gather[p, :finite] = _polynomial(others)
    kernel[-1, -1] = spread[-1, -1] = 1.0
    gather[-1] = _polynomial(points)
    # A constant answer of 1, as products.
    ones = torch.linalg.lstsq(spread, torch.ones(MADE, 1, dtype=torch.float64)).solution[:, 0]
    return kernel, gather, spread, ones


def _polynomial(roots: Tensor) -> Tensor:
    """Return the coefficients, constant first, of the polynomial with these roots and leading coefficient 1."""
    made = torch.ones(1, dtype=torch.float64)
    for root in roots:
        made = torch.cat([torch.zeros(1, dtype=torch.float64), made]) - root * torch.cat(
            [made, torch.zeros(1, dtype=torch.float64)]
        )
    return made


def _rows_first(x: Tensor) -> Tensor:
    """Return (b, c, [z,] y, x) as (b, [z,] y, x, c), contiguous."""
    return x.movedim(1, -1).contiguous()


def _picture(rows: Tensor) -> Tensor:
    """Return rows (n, [y,] x, c) as pictures (b, c, y, x): planes of a volume one each, lines of a picture stacked."""
    return (rows if rows.ndim == 4 else rows[None]).movedim(-1, 1)


def _last(weight: Tensor) -> Tensor:
    form = torch.channels_last if weight.ndim == 4 else torch.channels_last_3d
    return weight.contiguous(memory_format=form)


def _triple(sides: Sequence[int]) -> tuple[int, int, int]:
    a, b, c = (1,) * (3 - len(sides)) + tuple(sides)
    return a, b, c
