from __future__ import annotations

import pytest
import torch

from weaver import WeaverError
from weaver.features import collect_features, reconstruction_psnr
from weaver.inversion import ddim_scheduler, invert
from weaver.latents import decode_latents, psnr
from weaver.layers import InjectionSites

STEPS = 4
SITES = InjectionSites("some", resnets=(4, 9), attentions=(4, 10), resnet_window=0.75, attention_window=0.5)
RESNETS = ["up_blocks.1.resnets.1.conv2", "up_blocks.3.resnets.0.conv2"]
ATTENTIONS = [f"up_blocks.{block}.attentions.1.transformer_blocks.0.attn1" for block in (1, 3)]


@pytest.fixture(scope="module")
def inversion(tiny_pipe):
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    return invert(tiny_pipe, z, "a dog and a cat", STEPS)


def test_features_are_those_of_the_reverse_pass(tiny_pipe, inversion):
    features = collect_features(tiny_pipe, inversion, SITES)
    unet, z = tiny_pipe.unet, inversion.z_T
    scheduler = ddim_scheduler(tiny_pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    for step, t in enumerate(scheduler.timesteps):
        seen = {}
        wanted = RESNETS * (step < 3) + [f"{a}.{p}" for a in ATTENTIONS for p in ("to_q", "to_k")] * (step < 2)
        hooks = [
            unet.get_submodule(path).register_forward_hook(lambda m, a, o, path=path, seen=seen: seen.update({path: o}))
            for path in wanted
        ]
        with torch.no_grad():
            output = unet(z, t, inversion.text).sample
        for hook in hooks:
            hook.remove()
        assert set(features.tensors[step]) == set(wanted)
        assert all(torch.equal(seen[path], features.tensors[step][path]) for path in wanted)
        z = scheduler.step(output, t, z).prev_sample
    assert torch.equal(features.reconstruction, z)
    assert torch.equal(features.z_T, inversion.z_T) and torch.equal(features.timesteps, inversion.timesteps)
    assert (features.steps, features.size) == (STEPS, (16, 16))
    assert features.nbytes == sum(x.nbytes for step in features.tensors for x in step.values())


def test_without_reconstruction_it_stops_after_the_last_injected_step(tiny_pipe, inversion):
    calls = []
    hook = tiny_pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    features = collect_features(tiny_pipe, inversion, SITES, reconstruct=False, storage="cpu")
    hook.remove()
    assert len(calls) == 3 and len(features.tensors) == STEPS and features.reconstruction is None
    with pytest.raises(WeaverError, match="reconstruct=False"):
        reconstruction_psnr(tiny_pipe, inversion, features)


def test_reconstruction_is_measured_against_the_autoencoder(tiny_pipe, inversion):
    features = collect_features(tiny_pipe, inversion, SITES)
    pictures = [decode_latents(tiny_pipe.vae, z) for z in (features.reconstruction, inversion.z_0)]
    assert reconstruction_psnr(tiny_pipe, inversion, features) == psnr(*pictures)


def test_nothing_is_left_on_the_unet(tiny_pipe, inversion):
    collect_features(tiny_pipe, inversion, SITES)
    assert not any(module._forward_hooks for module in tiny_pipe.unet.modules())


def test_sites_that_are_not_there_or_not_called(tiny_pipe, inversion):
    with pytest.raises(WeaverError, match="attention l=1, where the U-Net has none"):
        collect_features(tiny_pipe, inversion, InjectionSites("odd", attentions=(1,)))
    attention = tiny_pipe.unet.get_submodule(ATTENTIONS[0])
    own = attention.processor
    attention.set_processor(lambda attn, hidden_states, **_: hidden_states)
    try:
        with pytest.raises(WeaverError, match="unfuse"):
            collect_features(tiny_pipe, inversion, SITES)
    finally:
        attention.set_processor(own)
    assert not any(module._forward_hooks for module in tiny_pipe.unet.modules())
