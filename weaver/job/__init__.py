"""A job: what one run needs, in a file and in memory. Import the specs from here, all else from the modules.

`spec` what a job is, `parse`, `parse_concept`, `parse_mask` and `fields` from a mapping to it, `mask_rules` what a
place may say, `file` its file, `inputs` the files it reads, `resolve` the model's defaults and checks, `choose` its
template, `prepare` all of that in order, `preview` its masks alone.
"""

from weaver.job.spec import (
    SAME_MODEL,
    BackgroundSpec,
    ConceptSpec,
    FusionSpec,
    Job,
    JobError,
    MaskSpec,
    MasksSpec,
    StyleSpec,
    TemplateSpec,
    TextSpec,
    TrainSpec,
)

__all__ = [
    "BackgroundSpec",
    "ConceptSpec",
    "FusionSpec",
    "Job",
    "JobError",
    "MaskSpec",
    "MasksSpec",
    "SAME_MODEL",
    "StyleSpec",
    "TemplateSpec",
    "TextSpec",
    "TrainSpec",
]
