"""Box, lattices of patches and of tiles, block grid: pure arithmetic, (z, y, x), voxels, half-open."""

from volseg.geometry.blockset import BlockSet
from volseg.geometry.box import AXES, Box, Triple
from volseg.geometry.grid import BlockGrid
from volseg.geometry.lattice import AxisLattice, Lattice, Line, PatchLattice, stride_for
from volseg.geometry.ownership import Ownership, Patches, Seam
from volseg.geometry.sweep import Sweep
from volseg.geometry.tiles import AxisTiles, Halo, TileLattice

__all__ = [
    "AXES",
    "AxisLattice",
    "AxisTiles",
    "BlockGrid",
    "BlockSet",
    "Box",
    "Halo",
    "Lattice",
    "Line",
    "Ownership",
    "PatchLattice",
    "Patches",
    "Seam",
    "Sweep",
    "TileLattice",
    "Triple",
    "stride_for",
]
