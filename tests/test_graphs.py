"""Calls by value through captured graphs: what goes in and out, and what a U-Net's forward becomes meanwhile.

There is no GPU: in the place of a graph stands a call of the function with the tensors that a capture would hold.
"""

from __future__ import annotations

import copy
import sys
from functools import partial

import pytest
import torch
from conftest import shallow
from pipeline_forms import make

from weaver import InjectionSites, WeaverError, collect_features, ddim_scheduler, invert, replay, weave
from weaver.compiled import hook_paths
from weaver.fusion import ConceptUse, FusionPlan, attach
from weaver.graphs import CapturedForward, CUDAGraphs, captured, graph_reasons, uncaptured
from weaver.replay import forward_until

PATH = "up_blocks.1.resnets.0.conv2"
SITES = InjectionSites("some", resnets=(3,), attentions=(4,), resnet_window=1.0, attention_window=0.5)


class Held(CUDAGraphs):
    """Calls instead of graphs, with the same tensors each time."""

    device_type = "cpu"

    def __init__(self, **options):
        super().__init__(**options)
        self.held = {}

    def run(self, kind, call, written):
        self.held.setdefault(kind, call)()


def test_arguments_and_results_are_copied():
    graphs, seen = Held(), []

    def add(x, more, *, twice):
        seen.append((x.data_ptr(), more["y"][0].data_ptr()))
        return {"sum": (x + more["y"][0]) * (2 if twice else 1)}, None

    results = []
    for value in (1.0, 2.0, 3.0):
        x = torch.full((2, 3), value)
        results.append(graphs.call("add", add, x, {"y": [x.half()]}, twice=False))
        x.zero_()
    assert [found["sum"][0, 0].item() for found, _ in results] == [2.0, 4.0, 6.0]
    assert len(set(seen)) == 1 and all(nothing is None for _, nothing in results)


def test_kinds_shapes_types_and_numbers_have_graphs_of_their_own():
    graphs, x = Held(), torch.ones(2)

    def times(x, number=1):
        return x * number

    assert torch.equal(graphs.call(0, times, x, number=3), torch.full((2,), 3.0))
    for kind, argument, number in ((1, x, 3), (0, torch.ones(3), 3), (0, x.double(), 3), (0, x, 4)):
        before = len(graphs.held)
        assert torch.equal(graphs.call(kind, times, argument, number=number), argument * number)
        assert len(graphs.held) == before + 1
    graphs.call(0, times, torch.zeros(2), number=3)
    assert len(graphs.held) == 5


@torch.no_grad()
def test_a_forward_is_captured_within_the_block_and_only_by_itself(tiny_pipe):
    unet, text = tiny_pipe.unet, torch.randn(2, 12, tiny_pipe.unet.config.cross_attention_dim).double()
    z = torch.randn(2, 4, 16, 16).double()
    expected = unet(z, 7, text).sample
    graphs = Held()
    with captured(unet, graphs):
        assert isinstance(unet.forward, CapturedForward)
        for t in (7, torch.tensor(7)):  # a number of the host's is no graph of its own
            assert torch.equal(unet(z, t, text, return_dict=False)[0], expected)
        assert torch.equal(unet(z, 7, text).sample, expected)  # another result, another graph
        assert len(graphs.held) == 2
        with uncaptured(unet):
            unet(z, 7, text)
        found, _ = forward_until(unet, [PATH], z, torch.tensor(7), {"encoder_hidden_states": text})
        with torch.enable_grad():
            assert unet(z, 7, text).sample.requires_grad
        assert len(graphs.held) == 2 and set(found) == {PATH}
    assert "forward" not in vars(unet)
    with captured(unet, None):
        assert "forward" not in vars(unet)


def test_graphs_are_there_before_anything_is_captured():
    assert CUDAGraphs() and not len(CUDAGraphs())


def test_numbers_of_other_types_and_what_can_not_be_compared():
    graphs, x = Held(), torch.ones(2)

    def keep(x, option):
        return x * 1, option

    for option in (1, True, 1.0):
        assert type(graphs.call(0, keep, x, option)[1]) is type(option)
    assert len(graphs.held) == 3
    assert graphs.call(0, keep, x, {1, 2})[1] == {1, 2} and len(graphs.held) == 3


def test_graphs_follow_one_unet_as_it_is(tiny_pipe, tiny_pipe_v):
    graphs, unet = CUDAGraphs(), tiny_pipe.unet
    for change, forgets in {
        "none": (lambda: None, False),
        "another": (lambda: tiny_pipe_v.unet, True),
        "hooks": (lambda: unet.register_forward_hook(lambda *_: None), True),
        "free-u": (lambda: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6), True),
    }.values():
        graphs.follow(unet)
        graphs._graphs["kind"] = None
        changed = change()
        graphs.follow(changed if isinstance(changed, torch.nn.Module) else unet)
        assert (len(graphs) == 0) == forgets
        if hasattr(changed, "remove"):
            changed.remove()
    unet.disable_freeu()
    graphs.follow(unet)
    graphs._graphs["kind"] = None
    weight = unet.conv_in.weight
    before, weight.data = weight.data, weight.data.clone()  # as by a way to the host and back
    graphs.follow(unet)
    weight.data = before
    assert len(graphs) == 0


def test_a_forward_is_captured_once(tiny_pipe):
    with captured(tiny_pipe.unet, Held()), pytest.raises(WeaverError, match="captured already"):
        with captured(tiny_pipe.unet, Held()):
            pass
    assert "forward" not in vars(tiny_pipe.unet)


@pytest.fixture
def attached(monkeypatch, tiny_pipe):
    """`attach` as it is on a GPU, with the graphs that it makes."""
    made = []
    module = sys.modules["weaver.fusion.attach"]
    monkeypatch.setattr(module, "graph_reasons", lambda *_: [])
    monkeypatch.setattr(module, "graphs_for", lambda graphs: (made.append(Held()) or made[-1]) if graphs else None)
    return made


def test_numbers_of_pictures_take_turns_in_as_many_graphs(tiny_pipe, concepts, attached):
    masks = torch.zeros(1, 32, 32)
    masks[0, 8:, :16] = 1
    late = ConceptUse(concepts[0], window=(0.3, 1.0))
    plan = FusionPlan.build(tiny_pipe, [late], masks, prompt="a dog", steps=3)

    def draw(number, **options):
        generator = torch.Generator().manual_seed(0)
        given = {"num_images_per_prompt": number, "generator": generator, "output_type": "latent"} | options
        return tiny_pipe(**plan.pipeline_arguments(), **given).images

    with attach(tiny_pipe, plan):
        expected = [draw(number) for number in (1, 2)]
    with attach(tiny_pipe, plan, graphs=True):
        for i in (0, 1, 0, 1, 0):
            torch.testing.assert_close(draw(i + 1), expected[i], rtol=1e-9, atol=1e-9)
    assert len(attached[0].held) == 2


@pytest.mark.parametrize("kind", ["stored", "replayed"])
def test_features_under_attached_graphs_in_inference_mode_and_out_of_it(tiny_pipe, attached, kind):
    sites = InjectionSites("some", resnets=(4,), attentions=(4, 7), resnet_window=0.8, attention_window=0.4)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).double()
    features = collect_features(tiny_pipe, invert(tiny_pipe, z, "a dog", 5), sites, kind=kind)
    plan = FusionPlan.build(tiny_pipe, prompt="a dog", features=features)
    pipe = make(type(tiny_pipe), tiny_pipe, requires_safety_checker=False)
    pipe.scheduler = ddim_scheduler(tiny_pipe.scheduler)
    with attach(pipe, plan):
        expected = pipe(**plan.pipeline_arguments(), output_type="latent").images
    with attach(pipe, plan, graphs=True):
        for inference in (True, False):
            with torch.inference_mode(inference):
                found = pipe(**plan.pipeline_arguments(), output_type="latent").images
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert len(attached[0].held) == 3


def test_weave_keeps_its_graphs_from_one_call_to_the_next(tiny_pipe, concepts, monkeypatch):
    """Other concepts, masks, prompts, omegas and seeds take turns in them; more concepts do not."""
    monkeypatch.setattr(Held, "clear", lambda self: setattr(self, "held", {}) or CUDAGraphs.clear(self))
    dog, cat, _, _, mountain = concepts
    masks = torch.zeros(2, 32, 32)
    masks[0, 8:, :16] = masks[1, :20, 16:] = 1
    options = {"masks": masks, "steps": 2, "template_steps": 2, "sites": SITES}
    turns = [
        {"prompt": "a dog and a cat, mountain", "concepts": [dog, cat]},
        {"prompt": "a cat and a dog, mountain", "concepts": [cat, dog], "masks": masks.flip(-1), "guidance": 3.0},
        {"prompt": "a dog, mountain", "concepts": [dog], "masks": masks[:1], "seed": 3},
    ]
    graphs, samplers, sizes = Held(), [], []
    for turn in turns:
        expected = weave(tiny_pipe, **options | turn)
        found = weave(tiny_pipe, **options | turn, graphs=graphs)
        assert found.image.tobytes() == expected.image.tobytes()
        samplers.append(graphs.sampler)
        sizes.append((len(graphs.held), len(graphs.sampler._graphs.held)))
        assert not any(hook_paths(tiny_pipe.unet)) and "forward" not in vars(tiny_pipe.unet)
    assert len(set(map(id, samplers))) == 1 and len(set(sizes)) == 1 and min(sizes[0]) > 0
    weave(tiny_pipe, **options | turns[0], background=mountain, graphs=graphs)
    assert graphs.sampler is not samplers[0]
    graphs.clear()
    assert graphs.sampler is None


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_features_by_graphs_are_those_of_the_forward(tiny_pipe, compiled, monkeypatch):
    monkeypatch.setattr(replay, "compile_whole", partial(replay.compile_whole, backend="eager"))
    unet, graphs = shallow(tiny_pipe).unet, Held(compiled=compiled)
    arguments = {"encoder_hidden_states": torch.randn(1, 12, unet.config.cross_attention_dim).double()}
    for whole in (False, True):
        for seed in range(2):
            z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)).double()
            given = (unet, [PATH], z, torch.tensor(7), arguments)
            found, output = forward_until(*given, whole=whole, graphs=graphs)
            expected, expected_output = forward_until(*given, whole=whole)
            assert torch.equal(found[PATH], expected[PATH])
            assert torch.equal(output, expected_output) if whole else output is None
    assert len(graphs.held) == 2
    kept = forward_until(*given, graphs=graphs, keep=lambda x: x[:, :1])[0]
    assert kept[PATH].shape[1] == 1
    assert not hook_paths(unet)
    torch.compiler.reset()


def test_a_forward_is_compiled_as_a_whole_before_it_is_captured_or_not_where_parts_are(tiny_pipe, monkeypatch):
    forwards = []
    monkeypatch.setattr("weaver.graphs.compile_whole", lambda forward: forwards.append(forward) or forward)
    z, t = torch.zeros(1, 4, 16, 16).double(), torch.tensor(7)
    unet, graphs = copy.deepcopy(tiny_pipe.unet), Held(compiled=True)
    arguments = t, torch.zeros(1, 12, unet.config.cross_attention_dim).double()
    expected = unet(z, *arguments).sample
    for _ in range(2):
        with torch.no_grad(), captured(unet, graphs):
            assert torch.equal(unet(z, *arguments).sample, expected)
    assert len(forwards) == 2 and len(graphs.held) == 1
    unet.compile_repeated_blocks(backend="eager")
    assert graph_reasons(unet, Held()) == []
    assert "parts of it are compiled already" in graph_reasons(unet, graphs)[0]


@pytest.mark.parametrize("path", ["", PATH, "mid_block.attentions.0.transformer_blocks.0.attn2"], ids=str)
def test_forward_hooks_are_refused_since_a_replay_does_not_call_them(tiny_pipe, path):
    z, unet = torch.zeros(1, 4, 16, 16).double(), tiny_pipe.unet
    called, module = [], unet.get_submodule(path)
    for add in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = add(lambda *_: called.append(1))
        try:
            with pytest.raises(WeaverError, match=f"graphs don't call forward hooks .* {path or 'the U-Net'} has some"):
                invert(tiny_pipe, z, "a dog", 2, graphs=Held())
        finally:
            handle.remove()
    assert not called and graph_reasons(unet, Held()) == []


def test_graphs_need_a_gpu(tiny_pipe, concepts):
    plan = FusionPlan.build(tiny_pipe, concepts[:1], torch.ones(1, 32, 32), prompt="a dog")
    with pytest.raises(WeaverError, match="graphs need a CUDA device, the U-Net is on cpu"):
        with attach(tiny_pipe, plan, graphs=True):
            pass
    for graphs in (True, CUDAGraphs()):
        with pytest.raises(WeaverError, match="graphs need a CUDA device, the U-Net is on cpu"):
            weave(tiny_pipe, "a dog", concepts[:1], graphs=graphs)
    with pytest.raises(WeaverError, match="graphs is a str, expected True or a weaver.graphs.CUDAGraphs"):
        weave(tiny_pipe, "a dog", concepts[:1], graphs="yes")
    with pytest.raises(WeaverError, match="graphs need a CUDA device, the U-Net is on cpu"):
        invert(tiny_pipe, torch.zeros(1, 4, 16, 16), "a dog", 2, graphs=CUDAGraphs())
