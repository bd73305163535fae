"""Planning: block shape, memory, cost and refusals; pure arithmetic on plain values."""

from volseg.planning.make import make_plan
from volseg.planning.plan import ModelFacts, Plan, Resources, VolumeFacts

__all__ = ["ModelFacts", "Plan", "Resources", "VolumeFacts", "make_plan"]
