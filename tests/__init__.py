"""Tests; `tests/pure` needs neither torch nor ray nor zarr."""
