from __future__ import annotations

import pytest
import torch

from weaver import WeaverError
from weaver.layers import (
    EMBEDDED,
    PAPER,
    PLUG_AND_PLAY,
    InjectionSites,
    cross_attention_paths,
    layer_size,
    site_reasons,
    sites_for,
)


def test_layer_numbers_are_the_papers():
    assert PAPER.resnet_modules() == ["up_blocks.1.resnets.1.conv2"]
    assert EMBEDDED.resnet_modules() == [f"up_blocks.{b}.resnets.{i}.conv2" for b in (1, 2) for i in range(3)]


def test_attention_modules(tiny_pipe):
    path = "up_blocks.{}.attentions.{}.transformer_blocks.0.attn1"
    assert PAPER.attention_modules(tiny_pipe.unet) == [path.format(1, 1), path.format(2, 1), path.format(3, 0)]
    assert PLUG_AND_PLAY.attention_modules(tiny_pipe.unet) == [
        path.format(block, i) for block, i in [(1, 1), (1, 2)] + [(b, i) for b in (2, 3) for i in range(3)]
    ]


def test_sites_by_name_and_by_model(tiny_pipe):
    assert sites_for("plug-and-play") is PLUG_AND_PLAY
    assert sites_for(tiny_pipe.unet) is EMBEDDED
    assert sites_for({**tiny_pipe.unet.config, "sample_size": 96}) is PAPER
    with pytest.raises(WeaverError, match="'paprika': choose one of paper, plug-and-play, embedded"):
        sites_for("paprika")
    with pytest.raises(WeaverError, match="pass an InjectionSites"):
        sites_for({**tiny_pipe.unet.config, "block_out_channels": (320, 640, 1280)})


def test_sites_that_a_model_lacks(tiny_pipe):
    assert site_reasons(tiny_pipe.unet, EMBEDDED) == []
    reasons = site_reasons(tiny_pipe.unet, InjectionSites("odd", resnets=(4, 12), attentions=(2, 12, 5)))
    assert [reason.split("name ")[1][:14] for reason in reasons] == [
        "ResNet l=12, a",
        "attention l=2,",
        "attention l=12",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resnets": (-1,)}, "resnets"),
        ({"attentions": (4, 4)}, "attentions"),
        ({"attentions": (4.0,)}, "attentions"),
        ({"resnet_window": 1.1}, "resnet_window is 1.1"),
        ({"attention_window": -0.1}, "attention_window is -0.1"),
    ],
)
def test_bad_sites(arguments, message):
    with pytest.raises(WeaverError, match=message):
        InjectionSites("odd", **arguments)


def test_windows_round_down():
    sites = InjectionSites("x", resnet_window=0.29, attention_window=0.5)
    assert (sites.resnet_steps(100), sites.attention_steps(25)) == (29, 12)


@pytest.mark.parametrize("size", [(16, 16), (8, 24), (10, 18)], ids=str)
def test_layer_sizes_are_the_unets_own(tiny_pipe, size):
    unet, seen = tiny_pipe.unet, {}
    hooks = [
        unet.get_submodule(path).register_forward_hook(lambda m, a, o, path=path: seen.update({path: o.shape[1]}))
        for path in cross_attention_paths(unet)
    ]
    with torch.no_grad():
        unet(torch.zeros(1, 4, *size, dtype=unet.dtype), 1, torch.zeros(1, 16, 16, dtype=unet.dtype))
    for hook in hooks:
        hook.remove()
    for path, tokens in seen.items():
        height, width = layer_size(path, 4, size)
        assert height * width == tokens
        assert (height >= width) == (size[0] >= size[1])
    assert len(seen) == 16
