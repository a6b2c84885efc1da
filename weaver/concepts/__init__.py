"""Concepts: learned, kept in files, named in prompts (Concept Weaver, section 3.1).

Import from the modules: `concept` (the file), `train`, `settings`, `images`, `prompts`.
"""
