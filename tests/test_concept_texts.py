"""Texts in a concept's file, or in its card in a bank, that can't be read."""

from __future__ import annotations

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from weaver.concepts.bank_folder import BankFolder
from weaver.concepts.card import ConceptCard
from weaver.concepts.concept import Concept, ConceptError
from weaver.embedded import concept_path


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}", '{"a": "\\ud800"}'])
def test_they_are_told_as_the_file_s_or_the_card_s(tmp_path, text):
    """Brackets without end, a number of too many digits, half a pair of surrogates."""
    path = tmp_path / "odd.safetensors"
    with safe_open(concept_path("pug"), framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        save_file(tensors, path, metadata=file.metadata() | {"settings": text})
    with pytest.raises(ConceptError, match=r"odd\.safetensors: not a readable safetensors file"):
        Concept.load(path)
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(ConceptError, match="has a card that can't be read"):
        ConceptCard.load(tmp_path / "odd.json")
    bank = BankFolder(tmp_path)
    assert [(entry.name, entry.card) for entry in bank.entries()] == [("odd", None)]
