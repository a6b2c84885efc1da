"""The tokenizer of the embedded model: CLIP's own class, in which every word of the world is one token."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from weaver.embedded.backgrounds import BACKGROUNDS
from weaver.embedded.drawings import ANIMALS
from weaver.embedded.repaint import PALETTE

__all__ = ["MAX_TOKENS", "build_tokenizer"]

MAX_TOKENS = 32
_GLUE = ("a", "an", "and", "the", "with", "of", "in", "on", "picture", "photo", "drawing", "background")


def build_tokenizer() -> CLIPTokenizer:
    """Byte-level CLIP tokenizer whose merges join each known word from its end; unknown words fall into letters."""
    letters = list(bytes_to_unicode().values())
    vocabulary = letters + [letter + "</w>" for letter in letters]
    known, merges = set(vocabulary), []
    for word in (*_GLUE, *ANIMALS, *BACKGROUNDS, *PALETTE):
        suffix = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            joined = letter + suffix
            if joined not in known:
                merges.append(f"{letter} {suffix}")
                vocabulary.append(joined)
                known.add(joined)
            suffix = joined
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps({token: index for index, token in enumerate(vocabulary)}), encoding="utf-8")
        merges_file.write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
        return CLIPTokenizer(vocab=str(vocab_file), merges=str(merges_file), model_max_length=MAX_TOKENS)
