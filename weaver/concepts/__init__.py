"""Concepts: learned, kept in files, named in prompts (Concept Weaver, section 3.1)."""

from weaver.concepts.concept import Concept, ConceptError, attn2_hash
from weaver.concepts.prompts import PromptError, derive_prompt, encode_prompt

__all__ = ["Concept", "ConceptError", "PromptError", "attn2_hash", "derive_prompt", "encode_prompt"]
