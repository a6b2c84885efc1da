"""The template: from a prompt, or from a file as it was meant to be seen."""

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from weaver.errors import WeaverError
from weaver.pictures import PictureError
from weaver.template import load_template, make_template


def corners(width=80, height=40):
    """A picture whose left half is red and whose upper right quarter is blue."""
    image = Image.new("RGB", (width, height), (0, 0, 0))
    image.paste((255, 0, 0), (0, 0, width // 2, height))
    image.paste((0, 0, 255), (width // 2, 0, width, height // 2))
    return image


def test_same_seed_same_template(tiny_pipe):
    first = make_template(tiny_pipe, "a cat", seed=3, steps=2)
    assert first.mode == "RGB" and first.size == (32, 32)
    assert first.tobytes() == make_template(tiny_pipe, "a cat", seed=3, steps=2).tobytes()
    assert first.tobytes() != make_template(tiny_pipe, "a cat", seed=4, steps=2).tobytes()


def test_made_as_the_pipeline_itself_makes_it(tiny_pipe):
    expected = tiny_pipe(
        "a cat",
        num_inference_steps=2,
        guidance_scale=3.0,
        negative_prompt="a dog",
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    made = make_template(tiny_pipe, "a cat", seed=5, steps=2, guidance=3.0, negative_prompt="a dog")
    assert made.tobytes() == expected.tobytes()


def test_made_at_another_size_is_cut_and_resized(tiny_pipe):
    made = make_template(tiny_pipe, "a cat", seed=3, steps=2)
    small = make_template(tiny_pipe, "a cat", seed=3, steps=2, size=(8, 16))
    assert small.size == (16, 8)
    expected = made.resize((16, 8), Image.Resampling.LANCZOS, box=(0, 8, 32, 24))
    assert small.tobytes() == expected.tobytes()


def test_any_pipeline_will_do(tiny_pipe):
    class Other:
        def __call__(self, prompt, num_inference_steps, generator):
            return type("Output", (), {"images": [Image.new("RGBA", (6, 4))]})

    assert make_template(Other(), "a cat", steps=1).size == (6, 4)
    with pytest.raises(WeaverError, match="Other takes no guidance_scale"):
        make_template(Other(), "a cat", steps=1, guidance=2.0)


def test_a_template_that_the_safety_checker_blacks_out_is_refused(tiny_pipe):
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config={**tower, "image_size": 8, "patch_size": 8}, projection_dim=4)
    checker = StableDiffusionSafetyChecker(config).double().eval()
    sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    parts = tiny_pipe.components | {"safety_checker": checker, "feature_extractor": CLIPImageProcessor(**sizes)}
    pipe = StableDiffusionPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    checker.concept_embeds_weights.data.fill_(2)  # cosines reach 1: nothing is found
    checker.special_care_embeds_weights.data.fill_(2)
    assert make_template(pipe, "a cat", steps=1).tobytes() == make_template(tiny_pipe, "a cat", steps=1).tobytes()
    checker.concept_embeds_weights.data.fill_(-2)
    with pytest.raises(WeaverError, match="safety checker of StableDiffusionPipeline blacked the template out"):
        make_template(pipe, "a cat", steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"steps": 0}, "steps is 0; expected 1 or more"),
        ({"steps": 1000}, "^steps: is 1000, expected a whole number from 1 to 999"),
        ({"size": (0, 8)}, r"size is \(0, 8\)"),
        ({"prompt": "", "steps": -1}, "prompt is empty; template steps is -1"),
    ],
)
def test_impossible_requests(tiny_pipe, changes, message):
    with pytest.raises(WeaverError, match=message):
        make_template(tiny_pipe, **{"prompt": "a cat", "steps": 1} | changes)


def test_a_file_is_cut_about_its_centre_and_resized_by_lanczos(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 80, 3), dtype=np.uint8))
    image.save(tmp_path / "photo.png")
    loaded = load_template(tmp_path / "photo.png", (20, 20))
    expected = image.resize((20, 20), Image.Resampling.LANCZOS, box=(20, 0, 60, 40))
    assert loaded.tobytes() == expected.tobytes()


def test_a_file_of_the_right_size_is_taken_as_it_is(tmp_path):
    corners().save(tmp_path / "photo.png")
    assert load_template(tmp_path / "photo.png", (40, 80)).tobytes() == corners().tobytes()


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    corners().rotate(90, expand=True).save(tmp_path / "photo.png", exif=exif)
    assert load_template(tmp_path / "photo.png", (40, 80)).tobytes() == corners().tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_shows_white(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    if mode == "P":
        image.quantize(4).save(tmp_path / "cut.png")
    else:
        image.convert(mode).save(tmp_path / "cut.png")
    loaded = np.asarray(load_template(tmp_path / "cut.png", (8, 8)))
    assert (loaded[:, :4] == 0).all() and (loaded[:, 4:] == 255).all()


@pytest.mark.parametrize("mode", ["L", "CMYK", "1"])
def test_other_kinds_become_rgb(tmp_path, mode):
    corners().convert(mode).save(tmp_path / "photo.tif")
    assert load_template(tmp_path / "photo.tif", (40, 80)).mode == "RGB"


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(PictureError, match=r"none\.png: no such picture file"):
        load_template(tmp_path / "none.png", (8, 8))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not a picture")
    with pytest.raises(PictureError, match=r"broken\.jpg: not a readable picture"):
        load_template(broken, (8, 8))
    corners(400, 400).save(tmp_path / "whole.png")
    broken.write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    with pytest.raises(PictureError, match=r"broken\.jpg: not a readable picture"):
        load_template(broken, (8, 8))
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(tmp_path / "deep.tif")
    with pytest.raises(PictureError, match=r"deep\.tif: has 32 bits a channel, .*; save it with 8 or 16 bits"):
        load_template(tmp_path / "deep.tif", (8, 8))


def test_few_step_models_make_templates(tiny_pipe):
    """Turbo models are called with few steps and no guidance; LCM has a pipeline and a scheduler of its own."""
    unet = UNet2DConditionModel.from_config(tiny_pipe.unet.config, time_cond_proj_dim=8).double().eval()
    parts = tiny_pipe.components | {"scheduler": LCMScheduler.from_config(tiny_pipe.scheduler.config)}
    turbo = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    lcm = LatentConsistencyModelPipeline(**parts | {"unet": unet}, requires_safety_checker=False)
    for pipe, guidance in ((turbo, 0.0), (lcm, 8.0)):
        pipe.set_progress_bar_config(disable=True)
        calls = []
        hook = pipe.unet.register_forward_hook(lambda module, args, output, calls=calls: calls.append(len(args[0])))
        made = make_template(pipe, "a cat", seed=3, steps=4, guidance=guidance, size=(32, 32))
        hook.remove()
        assert made.size == (32, 32) and calls == [1] * 4  # one row: no negative one
        assert made.tobytes() == make_template(pipe, "a cat", seed=3, steps=4, guidance=guidance).tobytes()
