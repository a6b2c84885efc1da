"""What a step of a fusion costs: against the same model's step without concepts, and against attention written out.

``python -m benchmarks.fusion_step [--concepts 2 8] [--pixels 64] [--threads 1] [--rounds 30]``

A step is one forward of the embedded model's U-Net on a fused and a negative row, once with the template's features
injected and once past their windows. `written out` loops over the contexts of a row and gives each row an attention
map of its own. All take turns on one set of inputs, and CPU time is counted, so that other work on the machine falls on
all; of the rounds' ratios the median counts. Nothing is timed unless the results agree, and only ratios are told.
"""

from __future__ import annotations

import argparse
import copy
import time
from contextlib import ExitStack
from statistics import median

import torch
import torch.nn.functional as F

from weaver.embedded import load_pipeline
from weaver.features import collect_features
from weaver.fusion import ConceptUse, FusionPlan, attach
from weaver.fusion.processors import FusedCrossAttnProcessor, InjectedSelfAttnProcessor
from weaver.inversion import invert
from weaver.layers import EMBEDDED
from weaver_kernels import context_attention_reference

ANIMALS = ("cat", "dog", "fox", "panda", "pig", "frog")
ROWS = ("negative", "fused")
STEPS = {"injected": 0, "free": 1}  # of two, of which the windows keep the first


class WrittenOutCross(FusedCrossAttnProcessor):
    """Every context of a row on all its tokens, one after the other."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        kv, _, routes = self.state.contexts(self.path)
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        contexts = routes.plan.weights, routes.plan.context_index
        out = context_attention_reference(q, kv.keys, kv.values, *contexts, scale=attn.scale)
        return attn.to_out[0](out.flatten(-2))


class WrittenOutSelf(InjectedSelfAttnProcessor):
    """PyTorch's attention with the template's queries and keys repeated for every row."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        q = self.state.injected(f"{self.path}.to_q", hidden_states)
        if q is None:
            return self.original(attn, hidden_states, *args, **kwargs)
        k, v = self.state.injected(f"{self.path}.to_k", hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q.expand_as(v), k.expand_as(v), v, scale=attn.scale)
        return attn.to_out[0](out.transpose(1, 2).flatten(-2))


def write_out(unet) -> None:
    """Put the processors above in the place of those that `attach` installed."""
    for module in unet.modules():
        own = getattr(module, "processor", None)
        if isinstance(own, FusedCrossAttnProcessor):
            module.set_processor(WrittenOutCross(own.state, own.path, own.original))
        elif isinstance(own, InjectedSelfAttnProcessor):
            module.set_processor(WrittenOutSelf(own.state, own.path, own.original))


def make_plan(pipe, n_concepts: int, pixels: int) -> FusionPlan:
    """N regions side by side on a margin, each with a prompt of its own, over the base model's background."""
    masks = torch.zeros(n_concepts, pixels, pixels)
    edges = torch.linspace(pixels // 8, pixels - pixels // 8, n_concepts + 1).int().tolist()
    for mask, left, right in zip(masks, edges, edges[1:], strict=False):
        mask[pixels // 4 : -pixels // 8, left:right] = 1
    uses = [ConceptUse(None, f"a {ANIMALS[i % len(ANIMALS)]}, {i}") for i in range(n_concepts)]
    side = pixels // 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    z = torch.randn(1, pipe.unet.config.in_channels, side, side, generator=torch.Generator().manual_seed(0))
    features = collect_features(pipe, invert(pipe, z, "a cat", len(STEPS)), EMBEDDED, reconstruct=False)
    return FusionPlan.build(pipe, uses, masks, prompt="a cat", suppression=0.2, features=features)


def measure(pipe, n_concepts: int, pixels: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU seconds of every round, by kind of step and provider."""
    plan = make_plan(pipe, n_concepts, pixels)
    unets = {name: copy.deepcopy(pipe.unet) for name in ("ours", "written out", "no concepts")}
    z, text = plan.features.z_T.repeat(2, 1, 1, 1), plan.text[:2]
    found = {}
    with ExitStack() as stack:
        states = [stack.enter_context(attach(unets[name], plan, rows=ROWS)) for name in ("ours", "written out")]
        write_out(unets["written out"])
        for kind, step in STEPS.items():
            for state in states:
                state.set_step(step, plan.features.timesteps)
            arguments = z, plan.features.timesteps[step], text
            ours, theirs, _ = (unet(*arguments).sample for unet in unets.values())
            if not (error := float((ours - theirs).norm() / theirs.norm())) < 1e-4:
                raise SystemExit(f"the results differ by {error:.1e}: nothing is measured")
            times = found[kind] = {name: [] for name in unets}
            for turn in range(rounds):
                for name in sorted(unets, reverse=turn % 2 == 1):  # none always follows the same one
                    start = time.process_time()
                    unets[name](*arguments)
                    times[name].append(time.process_time() - start)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--pixels", type=int, default=64, help="side of the picture; the model's own is 64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pipe = load_pipeline()
    print(f"{args.pixels} pixels, float32, {args.threads} threads, torch {torch.__version__}; CPU time over ours")
    for n_concepts in args.concepts:
        for kind, times in measure(pipe, n_concepts, args.pixels, args.rounds).items():
            by_round = {name: [a / b for a, b in zip(of, times["ours"], strict=True)] for name, of in times.items()}
            ratios = "  ".join(f"{name} {median(of):.2f}" for name, of in by_round.items())
            print(f"  N = {n_concepts}, {kind} step: {ratios}", flush=True)


if __name__ == "__main__":
    main()
