from __future__ import annotations

import pytest
import torch

from weaver import WeaverError
from weaver.features import collect_features, reconstruction_psnr
from weaver.inversion import invert
from weaver.latents import decode_latents, psnr
from weaver.layers import InjectionSites
from weaver.schedule import ddim_scheduler

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


def test_replayed_features_are_the_stored_ones_to_the_last_bit(tiny_pipe, inversion):
    stored = collect_features(tiny_pipe, inversion, SITES)
    replayed = collect_features(tiny_pipe, inversion, SITES, kind="replayed")
    assert replayed.nbytes == 0 and torch.equal(replayed.reconstruction, stored.reconstruction)
    for step in range(STEPS):
        with torch.no_grad():
            found = replayed.replay(tiny_pipe.unet, step)
        assert found.keys() == stored.tensors[step].keys()
        assert all(torch.equal(found[path], stored.tensors[step][path]) for path in found)


def test_a_replay_ends_at_the_last_injected_layer(tiny_pipe, inversion):
    sites = InjectionSites("early", resnets=(4,), resnet_window=0.5)
    features = collect_features(tiny_pipe, inversion, sites, kind="replayed", reconstruct=False)
    assert features.reconstruction is None and len(features.path) == 3
    called = []
    layers = ["mid_block", "up_blocks.1.resnets.1.conv2", "up_blocks.1.resnets.1", "up_blocks.2", "conv_out"]
    hooks = [
        tiny_pipe.unet.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))
        for path in layers
    ]
    with torch.no_grad():
        assert set(features.replay(tiny_pipe.unet, 1)) == {RESNETS[0]} and called == layers[:2]
        for step in range(2, STEPS):  # past the window, where the path was not kept
            assert features.replay(tiny_pipe.unet, step) == {} and called == layers[:2]
    for hook in hooks:
        hook.remove()


def test_features_of_the_inversion_are_what_it_saw(tiny_pipe):
    """The inversion pass reads (x_{t-1}, t), the reverse pass (x_t, t)."""
    z, seen = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double(), []
    hook = tiny_pipe.unet.get_submodule(RESNETS[0]).register_forward_hook(lambda m, a, output: seen.append(output))
    inversion = invert(tiny_pipe, z, "a dog and a cat", STEPS)
    hook.remove()
    found = collect_features(tiny_pipe, inversion, SITES, kind="inversion", reconstruct=False)
    stored = collect_features(tiny_pipe, inversion, SITES)
    assert found.path is None and found.reconstruction is None
    for step in range(3):
        torch.testing.assert_close(found.tensors[step][RESNETS[0]], seen[STEPS - 1 - step], rtol=1e-12, atol=1e-12)
        assert found.tensors[step].keys() == stored.tensors[step].keys()
        assert (found.tensors[step][RESNETS[0]] - stored.tensors[step][RESNETS[0]]).abs().max() > 1e-4
    whole = collect_features(tiny_pipe, inversion, SITES, kind="inversion")
    assert torch.equal(whole.reconstruction, stored.reconstruction)
    assert all(torch.equal(whole.tensors[0][path], x) for path, x in found.tensors[0].items())


def test_kinds_that_there_are_not(tiny_pipe, inversion):
    with pytest.raises(WeaverError, match="the kind is 'cached', expected one of stored, replayed, inversion"):
        collect_features(tiny_pipe, inversion, SITES, kind="cached")
