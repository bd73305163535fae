"""What the user asks for: one pydantic model behind the command line, the Python call and the YAML file.

Every option carries its meaning, its unit and its limits; `volseg segment --help` prints them from here.
"""

from volseg.spec.augment import AugmentSpec
from volseg.spec.base import Spec, parse_floats, parse_triple
from volseg.spec.bench import BenchSpec
from volseg.spec.segment import SegmentSpec
from volseg.spec.train import TrainSpec

__all__ = ["AugmentSpec", "BenchSpec", "SegmentSpec", "Spec", "TrainSpec", "parse_floats", "parse_triple"]
