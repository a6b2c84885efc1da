"""Every form of a pipeline, made of one pipeline's parts and called with every picture that it takes."""

from __future__ import annotations

import inspect

import torch
from PIL import Image

STEPS = 4


def controlnet_of(unet):
    """A ControlNet of a tiny U-Net whose zero convolutions are no longer zero."""
    from diffusers import ControlNetModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
        for parameter in net.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return net.to(unet.device, unet.dtype)


def make(kind, pipe, controlnet=None, **options):
    """A pipeline of class `kind` from the parts of another, with a ControlNet where it takes one."""
    extra = {"controlnet": controlnet} if "controlnet" in inspect.signature(kind.__init__).parameters else {}
    made = kind(**pipe.components, **extra, **options)
    made.set_progress_bar_config(disable=True)
    return made


def draw(pipe, **arguments):
    """Call a pipeline with every picture that its form takes."""
    levels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    noise = Image.fromarray(levels.numpy())
    flat = Image.new("RGB", (32, 32), (200, 120, 40))
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (4, 4, 28, 20))
    controlled = "control_image" in inspect.signature(pipe.__call__).parameters
    given = {"image": flat, "mask_image": mask, "control_image": noise}
    if not controlled and hasattr(pipe, "controlnet"):
        given["image"] = noise
    given |= {"strength": 0.75, "num_inference_steps": STEPS, "output_type": "latent"} | arguments
    given["generator"] = torch.Generator().manual_seed(0)
    taken = inspect.signature(pipe.__call__).parameters
    return pipe(**{name: value for name, value in given.items() if name in taken}).images


def full_mask():
    return torch.ones(1, 32, 32)
