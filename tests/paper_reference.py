"""The paper's equations, written out: what the stock pipeline under `attach` is compared with.

The reference imports nothing of the package (`paper_comparison` holds the two beside each other): it copies the U-Net,
adds each concept's token to copies of tokenizers and text encoders, loops over contexts inside each cross-attention,
projects each with its own key and value weights, runs the output projection of each, fuses after it, applies guidance,
and recomputes the source row in the batch of every step (rows: source, negative, fused). What concepts change outside
of cross-attention, or of its queries and outputs as factors, goes past the paper: it is added to the fused row's output
of each module, one concept at a time, inside its mask. In float64, where the two differ by rounding only. SDXL's rows
have the pooled embeddings of the source, the negative and the base prompt, and the same time ids.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

STEPS = 5
WORDS = ("dog", "cat", "fox", "panda")


@dataclass(frozen=True)
class Sites:
    """Layers and windows as plain numbers, so that the reference needs nothing of the package."""

    name: str
    resnets: tuple[int, ...] = ()
    attentions: tuple[int, ...] = ()
    resnet_window: float = 0.8
    attention_window: float = 0.5


@dataclass
class Case:
    name: str
    n: int
    prediction: str = "epsilon"
    lam: float = 0.0
    omega: float = 4.0
    negative: str = ""
    background: bool = False
    soft: bool = False
    pixels: tuple[int, int] = (32, 32)
    sites: Sites | None = None
    strengths: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0, 1.0)
    windows: dict[int, tuple[float, float]] = field(default_factory=dict)
    scale: float = 1.0
    own_negatives: dict[int, str] = field(default_factory=dict)


def prompts_of(case: Case) -> tuple[str, list[str]]:
    animals = [f"a {word}" for word in WORDS[: case.n]]
    base = ", ".join([" and ".join(animals) or "a photo", "mountain"])
    own = [f"a <v{i + 1}> {word}, mountain" for i, word in enumerate(WORDS[: case.n])]
    return base, own + ([base.replace("mountain", "<v5> mountain")] if case.background else [])


def masks_of(case: Case) -> torch.Tensor:
    """[N, H, W]: upright stripes on a margin; soft ones share their borders by halves."""
    height, width = case.pixels
    masks = torch.zeros(case.n, height, width)
    stripe = (width - 8) // max(case.n, 1)
    for i in range(case.n):
        masks[i, 3 : height - 6 - i, 4 + i * stripe : 4 + (i + 1) * stripe] = 1
        if case.soft:
            masks[i, :, 4 + (i + 1) * stripe - 1] *= 0.5
    return masks


def encode(pipe, prompt, concept=None):
    """Text [1, L, C] and SDXL's pooled [1, P], with the concept's token added to copies of tokenizers and encoders."""
    two = hasattr(pipe, "text_encoder_2")
    found = []
    for suffix in ("", "_2") if two else ("",):
        tokenizer, encoder = getattr(pipe, f"tokenizer{suffix}"), getattr(pipe, f"text_encoder{suffix}")
        if concept is not None:
            tokenizer, encoder = copy.deepcopy(tokenizer), copy.deepcopy(encoder)
            tokenizer.add_tokens(concept.token)
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
            encoder.get_input_embeddings().weight.data[-1] = concept.embeddings[f"text_encoder{suffix}"][0]
        length = tokenizer.model_max_length
        ids = tokenizer(prompt, padding="max_length", max_length=length, return_tensors="pt").input_ids
        found.append(encoder(ids, output_hidden_states=True))
    if not two:
        return found[0][0], None
    return torch.cat([output.hidden_states[-2] for output in found], dim=-1), found[1].text_embeds


def heads(x, attn):
    return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


class CrossAttention:
    def __init__(self, run, path):
        self.run, self.path = run, path

    def one(self, attn, h, text, concept, fused=False):
        """softmax(q k^T) v through the output projection, with a concept's own W^k and W^v."""
        w_k, w_v = attn.to_k.weight, attn.to_v.weight
        if concept is not None:
            w_k = w_k + self.run.case.scale * concept.deltas.get(f"{self.path}.to_k", 0 * w_k)
            w_v = w_v + self.run.case.scale * concept.deltas.get(f"{self.path}.to_v", 0 * w_v)
        w_q, w_o, b_o = attn.to_q.weight, attn.to_out[0].weight, attn.to_out[0].bias
        if concept is not None:  # Custom Diffusion's of all of cross-attention
            w_q = w_q + self.matrix(concept, "to_q", w_q)
            w_o = w_o + self.matrix(concept, "to_out.0", w_o)
            b_o = b_o + self.matrix(concept, "to_out.0.bias", b_o)
        q = F.linear(h, w_q)
        q = self.run.changed(f"{self.path}.to_q", attn.to_q, h, q) if fused else q
        q, k, v = heads(q, attn), heads(F.linear(text, w_k), attn), heads(F.linear(text, w_v), attn)
        out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        out = out.transpose(1, 2).flatten(-2)
        found = F.linear(out, w_o, b_o)
        return self.run.changed(f"{self.path}.to_out.0", attn.to_out[0], out, found) if fused else found

    def matrix(self, concept, name, like):
        """What a concept adds to a weight as a matrix; factors are added to what the projection gives."""
        change = concept.deltas.get(f"{self.path}.{name}")
        return self.run.case.scale * change if isinstance(change, torch.Tensor) else 0 * like

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        run, case = self.run, self.run.case
        rows = dict(zip(run.rows, hidden_states.split(1), strict=True))
        out = {kind: self.one(attn, h, run.text[kind], None) for kind, h in rows.items() if kind != "fused"}
        h = rows["fused"]
        base = self.one(attn, h, run.text["base"], None, fused=True)
        masks = run.masks_for(h.shape[1])
        mixed = torch.zeros_like(base)
        for i, text in run.own_negatives.items() if "negative" in rows else ():
            own = self.one(attn, rows["negative"], text, None)
            general = self.one(attn, rows["negative"], run.text["negative"], None)
            out["negative"] = out["negative"] + run.strength(i) * masks[i][None, :, None] * (own - general)
        for i, (text, concept) in enumerate(run.contexts):
            a = run.strength(i)
            h_i = a * self.one(attn, h, text, concept, fused=True) + (1 - a) * base
            mixed = mixed + masks[i][None, :, None] * h_i
        if not case.background:
            mixed = mixed + masks[-1][None, :, None] * base
        out["fused"] = (1 + case.lam) * mixed - case.lam * base
        return torch.cat([out[kind] for kind in run.rows])


class SelfAttention:
    def __init__(self, run, until):
        self.run, self.until = run, until

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        h = hidden_states
        q, k, v = heads(attn.to_q(h), attn), heads(attn.to_k(h), attn), heads(attn.to_v(h), attn)
        if self.run.step < self.until:
            q, k = q[:1].expand_as(q), k[:1].expand_as(k)
        out = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(-2))


class Reference:
    """Algorithm of the paper's fusion stage, a step at a time."""

    def __init__(self, pipe, case, concepts, masks, source=None):
        self.case, self.step, self.scheduler = case, 0, pipe.scheduler
        base, own = prompts_of(case)
        used = concepts[: case.n] + ([concepts[4]] if case.background else [])
        self.contexts = [(encode(pipe, prompt, c)[0], c) for prompt, c in zip(own, used, strict=True)]
        encoded = {"base": encode(pipe, base), "negative": encode(pipe, case.negative)}
        self.rows = (["source"] if source else []) + (["negative"] if case.omega > 1 else []) + ["fused"]
        if source:
            encoded["source"] = encode(pipe, source)
        self.text = {kind: text for kind, (text, _) in encoded.items()}
        self.own_negatives = {i: encode(pipe, prompt)[0] for i, prompt in case.own_negatives.items()}
        self.added = None
        if encoded["base"][1] is not None:
            pooled = [encoded["base" if kind == "fused" else kind][1] for kind in self.rows]
            height, width = case.pixels
            ids = torch.tensor([[height, width, 0, 0, height, width]] * len(self.rows)).double()
            self.added = {"text_embeds": torch.cat(pooled), "time_ids": ids}
        full = torch.cat([masks, 1 - masks.sum(0, keepdim=True)]).double()
        self.masks = {}
        for factor in (2, 4, 8, 16):
            small = F.avg_pool2d(full[None], factor)[0].flatten(1)
            self.masks[small.shape[1]] = small
        self.unet, self.times = copy.deepcopy(pipe.unet), {}
        self.install()

    def strength(self, i):
        start, end = self.case.windows.get(i, (0.0, 1.0))
        return self.case.strengths[i] if start <= self.step / STEPS < end else 0.0

    def masks_for(self, tokens):
        return self.masks[tokens]

    def install(self):
        for path in {path: None for _, concept in self.contexts for path in concept.outside}:
            module, changed = self.unet.get_submodule(path), partial(self.change, path)
            if path.endswith("time_emb_proj"):  # where it is added to the picture: to what conv1 gives
                resnet = self.unet.get_submodule(path.rpartition(".")[0])
                resnet.register_forward_pre_hook(partial(self.keep_time, path))
                resnet.conv1.register_forward_hook(changed)
            else:
                module.register_forward_hook(changed)
        sites = self.case.sites or Sites("none")
        for path, module in self.unet.named_modules():
            if path.endswith("attn2"):
                module.set_processor(CrossAttention(self, path))
            if path.endswith("attn1"):
                layers = [f"up_blocks.{n // 3}.attentions.{n % 3}." for n in sites.attentions]
                injected = any(path.startswith(layer) for layer in layers)
                module.set_processor(SelfAttention(self, int(sites.attention_window * STEPS) if injected else 0))
        for n in sites.resnets:
            conv2 = self.unet.up_blocks[n // 3].resnets[n % 3].conv2
            conv2.register_forward_hook(self.copy_source_row)

    def keep_time(self, path, resnet, args):
        self.times[path] = F.silu(args[1])

    def change(self, path, module, args, output):
        return torch.cat([output[:-1], self.changed(path, module, args[0][-1:], output[-1:])])

    def changed(self, path, module, x, y):
        """y[t] + sum_i a_i M_i[t] (delta_i x)[t], a soft edge's changes blended."""
        h, w = y.shape[-2:] if y.ndim == 4 else (1, y.shape[-2])
        masks = self.masks_for(h * w)
        for i, (_, concept) in enumerate(self.contexts):
            factors = (concept.outside | concept.deltas).get(path)
            if isinstance(factors, tuple):
                down, up = factors
                down, up = down.double(), self.case.scale * up.double()
                amount = self.strength(i) * masks[i]
                if path.endswith("time_emb_proj"):
                    added = F.linear(F.linear(self.times[path][-1:], down), up)[..., None, None]
                elif y.ndim == 4:
                    down, up = down.view(*down.shape, *(1,) * (4 - down.ndim)), up.view(*up.shape[:2], 1, 1)
                    added = F.conv2d(F.conv2d(x, down, None, module.stride, module.padding), up)
                else:
                    added = F.linear(F.linear(x, down), up)
                y = y + added * (amount.view(1, 1, h, w) if y.ndim == 4 else amount.view(1, -1, 1))
        return y

    def copy_source_row(self, module, args, output):
        if self.step < int(self.case.sites.resnet_window * STEPS):
            return output[:1].expand_as(output)

    def ddim(self, output, t, z):
        """One step of DDIM, with the noise levels in the precision in which the scheduler keeps them."""
        levels = self.scheduler.alphas_cumprod
        a, previous = levels[t], t - 1000 // STEPS
        b = levels[previous] if previous >= 0 else levels[0]
        if self.case.prediction == "epsilon":
            z_0, eps = (z - (1 - a) ** 0.5 * output) / a**0.5, output
        else:
            z_0, eps = a**0.5 * z - (1 - a) ** 0.5 * output, a**0.5 * output + (1 - a) ** 0.5 * z
        return b**0.5 * z_0 + (1 - b) ** 0.5 * eps

    def run(self, z):
        source, ignored = z, self.text["base"].expand(len(self.rows), -1, -1)
        for self.step, t in enumerate(range(1 + 1000 // STEPS * (STEPS - 1), 0, -1000 // STEPS)):
            latents = {"source": source, "negative": z, "fused": z}
            batch = torch.cat([latents[kind] for kind in self.rows])
            output = self.unet(batch, t, ignored, added_cond_kwargs=self.added).sample
            output = dict(zip(self.rows, output.split(1), strict=True))
            omega = self.case.omega
            eps = output["fused"]
            if omega > 1:
                eps = omega * eps + (1 - omega) * output["negative"]
            if "source" in self.rows:
                source = self.ddim(output["source"], t, source)
            z = self.ddim(eps, t, z)
        return z
