"""Options of a batch: many volumes with one model."""

from __future__ import annotations

from pydantic import Field

from volseg.spec.segment import SegmentSpec


class BatchSpec(SegmentSpec):
    """Segment many volumes: those that match a pattern, or those of a list; every other option holds for all."""

    input: str = Field("", description="pattern of image volumes, such as 's3://scans/2026-*/recon.zarr'")
    output: str = Field("", description="folder for the label volumes; each is named as the pattern found its input")
    volumes: dict[str, str] = Field({}, description="label volume by image volume, instead of a pattern")
