"""Files of each format for a tiny pipeline, random and nowhere zero, and what a stock pipeline draws of them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from pipeline_forms import full_mask

from weaver import ConceptUse, FusionPlan, attach, stack_plans
from weaver.concepts.concept import attn2_projections
from weaver.conditioning import text_encoders

PROMPT, STEPS = "a fox, mountain", 1
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, one step; the deepest level's projections move 1e-4
VISIBLE = 10 * CLOSE["atol"]
ALL = ("to_k", "to_v", "to_q", "to_out.0")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noisy(x: torch.Tensor, generator: torch.Generator, amount: float = 0.8) -> torch.Tensor:
    """`x` and a change that float16 keeps to the last bit, as concepts keep it; nowhere zero."""
    change = amount * (torch.rand(x.shape, generator=generator) + 0.5)
    change *= torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1.0, 1.0)
    return x.detach() + change.half().to(x.dtype)


def changed_weights(pipe, names=ALL, seed: int = 0) -> dict[str, torch.Tensor]:
    """``{"<path>.attn2.to_k.weight": [out, in], ...}``, other than the base model's."""
    generator = rng(seed)
    return {f"{key}.weight": noisy(part.weight, generator) for key, part in attn2_projections(pipe.unet, names).items()}


def vectors(pipe, count: int = 1, seed: int = 1) -> dict[str, torch.Tensor]:
    """Vectors [V, C] of one token for each text encoder of the pipeline."""
    generator = rng(seed)
    return {
        name: noisy(torch.zeros(count, encoder.get_input_embeddings().weight.shape[1]), generator, 1.0)
        for name, encoder in text_encoders(pipe).items()
    }


def by_hand(pipe, weights, token_vectors, token: str = "<new1>"):
    """A copy of the pipeline with weights overwritten, and with the token in its tokenizers and text encoders."""
    changed = type(pipe)(**{name: copy.deepcopy(part) for name, part in pipe.components.items()}, **options(pipe))
    changed.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for name, value in weights.items():
            changed.unet.get_parameter(name).copy_(value)
        for name, rows in token_vectors.items():
            tokenizer, encoder = getattr(changed, name.replace("text_encoder", "tokenizer")), getattr(changed, name)
            names = [token, *(f"{token}_{i}" for i in range(1, len(rows)))]
            tokenizer.add_tokens(names)
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(names)] = rows.to(encoder.dtype)
    return changed


def options(pipe) -> dict:
    return {"requires_safety_checker": False} if hasattr(pipe, "safety_checker") else {}


def draw_by_hand(changed, prompt: str) -> torch.Tensor:
    """Latents of a stock pipeline at guidance 1; SDXL's pooled embedding is that of `PROMPT`, as in a fusion."""
    text = {"prompt": prompt}
    if "text_encoder_2" in text_encoders(changed):
        encoded, base = (changed.encode_prompt(each, do_classifier_free_guidance=False) for each in (prompt, PROMPT))
        text = {"prompt_embeds": encoded[0], "pooled_prompt_embeds": base[2]}
    size = {"height": 32, "width": 32, "num_inference_steps": STEPS, "output_type": "latent"}
    return changed(**text, **size, guidance_scale=1.0, generator=rng()).images


def draw_fused(pipe, concept, prompt: str) -> torch.Tensor:
    """Latents of a fusion whose one region is the whole picture, without suppression, at guidance 1."""
    return draw_each(pipe, [concept], prompt)


def draw_each(pipe, concepts, prompt: str) -> torch.Tensor:
    """The same of each concept by itself, from the same noise, in one batch."""
    arguments = {"prompt": PROMPT, "steps": STEPS, "guidance": 1.0, "height": 32, "width": 32}
    uses = [ConceptUse(concept, prompt=prompt) for concept in concepts]
    plan = stack_plans([FusionPlan.build(pipe, [use], full_mask(), suppression=0.0, **arguments) for use in uses])
    noise = torch.randn(1, 4, *plan.size, generator=rng()).to(pipe.unet.dtype).expand(len(uses), -1, -1, -1)
    with attach(pipe, plan):
        arguments = plan.pipeline_arguments() | {"guidance_scale": 1.0, "output_type": "latent", "latents": noise}
        return pipe(**arguments).images


def save(tensors, path: Path) -> Path:
    """By `torch.save`, or as safetensors where the name says so."""
    from safetensors.torch import save_file

    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path
