"""The stages as one function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from jobs import SIDE, named_concept, picture

from weaver.errors import WeaverError
from weaver.fusion.contexts import ConceptUse
from weaver.pipeline import weave


def test_weave_is_a_function_of_its_arguments(pipe):
    concepts = [named_concept(pipe, "tom", "cat", "<v1>", 1), named_concept(pipe, "rex", "dog", "<v2>", 2)]
    masks = np.zeros((2, SIDE, SIDE), bool)
    masks[0, :, :16] = masks[1, :, 16:] = True
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    processors, scheduler = dict(pipe.unet.attn_processors), pipe.scheduler
    arguments = dict(template=picture(1), masks=masks, steps=2, guidance=2.0)
    first = weave(pipe, "a cat and a dog", concepts, **arguments)
    again = weave(pipe, "a cat and a dog", concepts, **arguments)
    without = weave(pipe, "a cat and a dog", [ConceptUse(c, strength=0) for c in concepts], **arguments)
    assert first.image.tobytes() == again.image.tobytes() != without.image.tobytes()
    assert torch.allclose(first.masks.sum(0), torch.ones(SIDE, SIDE))
    assert pipe.unet.attn_processors == processors and pipe.scheduler is scheduler
    assert all(torch.equal(before[name], value) for name, value in pipe.unet.state_dict().items())


def test_weave_tells_everything_that_does_not_fit(pipe):
    stranger = named_concept(pipe, "stranger", "cat", "<v1>", base_hash="0" * 64)
    with pytest.raises(WeaverError) as caught:
        weave(pipe, "a dog", [stranger], steps=0, size=(30, 32))
    assert all(
        part in str(caught.value) for part in ("steps: is 0", "size: is 32x30", "another base", "names 'cat' 0 times")
    )
    tom = named_concept(pipe, "tom", "cat", "<v1>")
    with pytest.raises(WeaverError, match="there is no concept to draw"):
        weave(pipe, "a dog", [])
    with pytest.raises(WeaverError, match=r"masks have shape \(1, 8, 8\)"):
        weave(pipe, "a cat", [tom], masks=np.ones((1, 8, 8)))
    with pytest.raises(WeaverError, match="template: is 2x2, which would have to be enlarged 16 times"):
        weave(pipe, "a cat", [tom], masks=np.ones((1, SIDE, SIDE)), template=picture(0, 2))


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "source_prompt"])
def test_no_token_stands_in_a_text_of_the_base_model(pipe, field):
    texts = {"prompt": "a cat", field: "a <v1> cat"}
    with pytest.raises(WeaverError, match=f"{field}: 'a <v1> cat' holds '<v1>', the token of tom"):
        weave(pipe, texts.pop("prompt"), [named_concept(pipe, "tom", "cat", "<v1>")], **texts)
