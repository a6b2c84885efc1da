"""Keys and values of all contexts of a layer, each with its own change of the projections."""

from weaver_kernels.project_contexts.op import ContextKV, equal_contexts, project_contexts
from weaver_kernels.project_contexts.reference import LowRank, ProjectionChange, project_contexts_reference

__all__ = [
    "ContextKV",
    "LowRank",
    "ProjectionChange",
    "equal_contexts",
    "project_contexts",
    "project_contexts_reference",
]
