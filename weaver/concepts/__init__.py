"""Concepts: learned, kept in files, named in prompts (Concept Weaver, section 3.1)."""

from weaver.concepts.concept import Concept, ConceptError, attn2_hash
from weaver.concepts.images import TrainingSet, load_images
from weaver.concepts.prompts import PromptError, derive_prompt, encode_prompt
from weaver.concepts.settings import TrainSettings
from weaver.concepts.train import train_concept

__all__ = [
    "Concept",
    "ConceptError",
    "PromptError",
    "TrainSettings",
    "TrainingSet",
    "attn2_hash",
    "derive_prompt",
    "encode_prompt",
    "load_images",
    "train_concept",
]
