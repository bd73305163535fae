"""Planning: block shape, memory, cost and refusals; pure arithmetic on plain values."""

from volseg.planning.compare import compare
from volseg.planning.make import make_plan
from volseg.planning.plan import ModelFacts, Plan, Resources, View, ViewFacts, VolumeFacts
from volseg.planning.seams import SeamRoom, Seams

__all__ = [
    "ModelFacts",
    "Plan",
    "Resources",
    "SeamRoom",
    "Seams",
    "View",
    "ViewFacts",
    "VolumeFacts",
    "compare",
    "make_plan",
]
