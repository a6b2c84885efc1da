"""Does it fuse, and what does each part of the method give? Prompts, arms, measures, and a report of them all.

`weaver evaluate` runs the suite on the embedded model, offline; `weaver.evaluation.field` has the field's own measures
(CLIP, DINO) for real models.
"""
