"""A style over the whole picture: a LoRA loaded into the pipeline, under which concepts and background are fused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from peft import LoraConfig
from PIL import Image

from weaver import Concept, ConceptUse, weave
from weaver.embedded import concept_path, load_pipeline
from weaver.layers import EMBEDDED

PROMPT = "a cat and a panda, forest background"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "net.0.proj", "net.2"]
STEPS = 4


def styled(fuse: bool):
    """The embedded model under a LoRA of all of its attention and feed-forward, beside its weights or in them."""
    pipe = load_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False), adapter_name="style")
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.3)
    if fuse:
        pipe.unet.fuse_lora()
        for module in list(pipe.unet.modules()):  # plain layers again, of which nothing tells that there was a LoRA
            for key, child in list(module.named_children()):
                if hasattr(child, "base_layer"):
                    setattr(module, key, child.base_layer)
        pipe.unet._hf_peft_config_loaded = False
    return pipe


@pytest.fixture(scope="module")
def woven():
    def picture(pipe, known_base: bool = True) -> np.ndarray:
        names = ("tuxedo-cat", "blue-panda", "autumn-forest")
        cat, panda, forest = (Concept.load(concept_path(name)) for name in names)
        if not known_base:  # merged weights have another hash
            cat, panda, forest = (dataclasses.replace(c, base_hash="") for c in (cat, panda, forest))
        masks = np.zeros((2, 64, 64), bool)
        masks[0, 20:56, 4:30] = masks[1, 20:56, 34:60] = True
        template = Image.new("RGB", (64, 64), "green")
        background = ConceptUse(forest, prompt="a <autumn-forest> forest background")
        options = {"background": background, "template": template, "masks": masks, "seed": 3, "steps": STEPS}
        options |= {"guidance": 3.0, "suppression": 0.0, "eta": 0.5, "sites": EMBEDDED}  # not by the model's hash
        return np.asarray(weave(pipe, PROMPT, [cat, panda], **options).image).astype(int)

    torch.set_num_threads(1)
    return picture


def test_a_loaded_lora_acts_in_every_context_as_if_it_were_in_the_weights(woven):
    plain, beside, merged = woven(load_pipeline()), woven(styled(False)), woven(styled(True), known_base=False)
    assert np.abs(beside - merged).max() <= 2  # levels of 255: float32 in another order
    assert np.abs(beside - plain).mean() > 5


def test_concepts_know_their_base_under_a_loaded_lora_and_refuse_it_merged(woven):
    with pytest.raises(ValueError, match="base"):
        woven(styled(True))
