"""Training of the embedded model and its helpers: ``python -m weaver.embedded.training`` (``make train-embedded``)."""
