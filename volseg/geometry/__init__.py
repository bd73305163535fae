"""Box, patch lattice and block grid: pure arithmetic, (z, y, x), voxels, half-open."""

from volseg.geometry.box import AXES, Box, Triple
from volseg.geometry.grid import BlockGrid
from volseg.geometry.lattice import AxisLattice, PatchLattice, stride_for

__all__ = ["AXES", "AxisLattice", "BlockGrid", "Box", "PatchLattice", "Triple", "stride_for"]
