"""A real Stable Diffusion pipeline of four levels, built from configuration, seeded and tiny.

Everything is float64 so that two ways to compute the same thing can be compared to rounding. `tiny_pipe` predicts
noise (epsilon), `tiny_pipe_v` velocity. They are shared by the whole session: a test that changes one puts it back.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
import torch

WORDS = (
    "a an and the with in on of two dog cat fox panda bear lion rabbit pig mountain beach night forest background "
    "red blue green black white playing ball photo picture ugly blurry low"
).split()
TEXT_LENGTH = 16
TEXT_WIDTH = 16


def pytest_configure(config):
    """Triton decides when it is first imported whether kernels are interpreted; the GPU set compiles them."""
    os.environ["WEAVER_CACHE"] = os.path.join(tempfile.gettempdir(), f"weaver-test-cache-{os.getpid()}")
    if config.getoption("markexpr") != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    elif not config.option.collectonly and not torch.cuda.is_available():
        pytest.exit(f"the GPU tests need an NVIDIA GPU, and torch {torch.__version__} sees none", returncode=2)


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["WEAVER_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def served():
    """Processes that begin in no time, from a server that has imported what they need, as commands have them."""
    from weaver.apart import expect_calls

    expect_calls("weaver.concepts.bank", "weaver.evaluation.runner")


def make_tokenizer(**options):
    """CLIP's byte-level BPE with merges learned from `WORDS`: every word of the list is one token."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    words = [[*word[:-1], word[-1] + "</w>"] for word in WORDS]
    merges = []
    while pairs := Counter(pair for word in words for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # ties by name: the same tokenizer every time
        merges.append(best)
        words = [_merged(word, best) for word in words]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_LENGTH, **options)


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def make_vae(**options):
    """An `AutoencoderKL` of two levels: a cell of latents is 2 x 2 pixels."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        **options,
    )


def make_scheduler(prediction_type: str):
    """Stable Diffusion's noise schedule, DDIM."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def make_louder(unet) -> None:
    """Have attention move the result visibly, its output's bias too."""
    for name, parameter in unet.named_parameters():
        if ".attn" in name and name.endswith("weight"):
            parameter.mul_(2)
        if name.endswith("to_out.0.bias"):
            parameter.normal_()


def shallow(pipe, levels: int = 2):
    """The same pipeline around a U-Net of fewer levels with one layer a block: every kind of block that
    `make_pipeline`'s has, for what takes long for each of them, as `torch.compile` does."""
    shape = {
        "layers_per_block": 1,
        "block_out_channels": (8, 16, 16)[:levels],
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
    }
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        unet = type(pipe.unet).from_config(pipe.unet.config, **shape)
        make_louder(unet)
    found = copy.copy(pipe)
    found.unet = unet.to(pipe.unet.dtype).eval()
    return found


def make_pipeline(prediction_type: str = "epsilon", dtype: torch.dtype = torch.float64, seed: int = 0):
    """A `StableDiffusionPipeline` with random weights: 32 px pictures, latents [4, 16, 16], text [16, 16].

    Weights are drawn larger than the library's defaults, so that text, masks and injection move the result visibly.
    """
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TEXT_LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 8, 16, 16),
            layers_per_block=2,
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        )
        vae = make_vae()
        with torch.no_grad():
            text_encoder.get_input_embeddings().weight.normal_()
            make_louder(unet)
    pipe = StableDiffusionPipeline(
        vae=vae.to(dtype).eval(),
        text_encoder=text_encoder.to(dtype).eval(),
        tokenizer=tokenizer,
        unet=unet.to(dtype).eval(),
        scheduler=make_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def compiled_kernels():
    """A run in which kernels are interpreted, or without a GPU, must not pass for one on a GPU."""
    from triton import knobs

    assert torch.cuda.is_available(), "no GPU: this set is for `make test-gpu` on a machine that has one"
    assert not knobs.runtime.interpret, "kernels are interpreted: unset TRITON_INTERPRET"


@pytest.fixture(scope="session")
def tiny_pipe():
    """Noise-predicting pipeline, float64."""
    return make_pipeline("epsilon")


@pytest.fixture(scope="session")
def tiny_pipe_v():
    """Velocity-predicting pipeline, float64."""
    return make_pipeline("v_prediction", seed=1)


def make_concept(pipe, number: int, word: str, amount: float = 0.3, changed: Sequence[str] = ("to_k", "to_v")):
    """A concept `c<number>` with token `<v<number>>` and random deltas of `amount`, for this pipeline's base.

    `changed` are the projections of every attn2 that have deltas, and "to_out.0.bias".
    """
    from weaver.concepts.concept import Concept, attn2_hash, attn2_parameters
    from weaver.conditioning import text_encoders

    rng = torch.Generator().manual_seed(number)
    parameters = {name: x for name, x in attn2_parameters(pipe.unet).items() if name.partition(".attn2.")[2] in changed}
    widths = {name: encoder.config.hidden_size for name, encoder in text_encoders(pipe).items()}
    return Concept(
        name=f"c{number}",
        token=f"<v{number}>",
        word=word,
        base_hash=attn2_hash(pipe.unet),
        embeddings={name: torch.randn(1, width, generator=rng) for name, width in widths.items()},
        deltas={name: amount * torch.randn(x.shape, generator=rng) for name, x in parameters.items()},
    )


def make_whole(pipe, number: int, word: str, paths: Iterable[str], rank: int = 2):
    """`make_concept` with random factors, besides, for the Linears and convolutions at `paths`."""
    from dataclasses import replace

    from weaver.concepts.concept_checks import parted
    from weaver_kernels import LowRank

    concept, found = make_concept(pipe, number, word), {}
    rng = torch.Generator().manual_seed(number)
    for path in (path for path in paths if path not in concept.deltas):
        weight = pipe.unet.get_submodule(path).weight
        down = torch.randn(rank, *weight.shape[1:], generator=rng) / weight[0].numel() ** 0.5
        up = 0.5 * torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=rng)
        found[path] = LowRank(down, up)
    assert found
    inside, outside = parted(found)
    return replace(concept, deltas=concept.deltas | inside, outside=outside)


WORDS_OF_CONCEPTS = ("dog", "cat", "fox", "panda", "mountain")


@pytest.fixture(scope="session")
def concepts(tiny_pipe):
    """Concepts of a dog, a cat, a fox, a panda and a mountain for `tiny_pipe`."""
    return [make_concept(tiny_pipe, i + 1, word) for i, word in enumerate(WORDS_OF_CONCEPTS)]


@pytest.fixture(scope="session")
def concepts_v(tiny_pipe_v):
    """The same for `tiny_pipe_v`."""
    return [make_concept(tiny_pipe_v, i + 1, word) for i, word in enumerate(WORDS_OF_CONCEPTS)]


@pytest.fixture(scope="session")
def tiny_sdxl():
    """A noise-predicting SDXL pipeline, float64."""
    from tiny_sdxl import make_sdxl

    return make_sdxl()


@pytest.fixture(scope="session")
def concepts_sdxl(tiny_sdxl):
    """The same concepts for `tiny_sdxl`."""
    return [make_concept(tiny_sdxl, i + 1, word) for i, word in enumerate(WORDS_OF_CONCEPTS)]


@pytest.fixture(scope="session")
def pipe():
    """A noise-predicting pipeline in float32, as jobs have it; only read."""
    return make_pipeline(dtype=torch.float32)


@pytest.fixture(scope="session")
def sdxl():
    """`tiny_sdxl` in float32; only read."""
    from tiny_sdxl import make_sdxl

    return make_sdxl(dtype=torch.float32)


@pytest.fixture(scope="session")
def job_folder(pipe, tmp_path_factory):
    """The model with concept files, pictures and masks beside it; only read."""
    from jobs import write_folder

    folder = tmp_path_factory.mktemp("job")
    write_folder(pipe, folder)
    return folder


@pytest.fixture(scope="session")
def model(job_folder):
    """The folder of the model alone."""
    return job_folder / "model"


@pytest.fixture(scope="session")
def finished(job_folder, tmp_path_factory):
    """One run with everything in it: training, a background concept, a mask file and a box; only read."""
    from jobs import TRAINED, job_of

    from weaver.run import run_job

    mapping = {
        "concepts": [TRAINED, {"file": "rex.safetensors", "mask": {"box": [0.5, 0.2, 1, 0.8]}}],
        "background": {"file": "hills.safetensors"},
        "seed": 7,
    }
    return run_job(job_of(job_folder, **mapping), tmp_path_factory.mktemp("results") / "deep" / "run")
