"""Fusion: a plan, what attention does under it, and how to draw (Concept Weaver, section 3.5)."""

from weaver.fusion.attach import attach
from weaver.fusion.contexts import ConceptUse
from weaver.fusion.plan import FusionPlan
from weaver.fusion.sampler import FusionSampler, sample_fusion
from weaver.fusion.variants import stack_plans

__all__ = ["ConceptUse", "FusionPlan", "FusionSampler", "attach", "sample_fusion", "stack_plans"]
