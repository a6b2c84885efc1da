from __future__ import annotations

import math

import numpy as np
import torch
from devices import WithoutFloat64
from diffusers import AutoencoderTiny
from PIL import Image

from weaver.latents import decode_latents, encode_image, image_to_tensor, psnr, tensor_to_images, vae_scale_factor


def picture(width=24, height=16, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pictures_survive_the_way_there_and_back():
    images = [picture(seed=i) for i in range(2)]
    x = image_to_tensor(images)
    assert x.shape == (2, 3, 16, 24) and x.min() >= -1 and x.max() <= 1
    for image, back in zip(images, tensor_to_images(x), strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(back))


def test_grey_and_transparent_pictures_become_rgb():
    assert image_to_tensor(picture().convert("L")).shape[1] == 3
    assert image_to_tensor(picture().convert("RGBA")).shape[1] == 3


def test_latents_of_both_kinds_of_autoencoder(tiny_pipe):
    kl = tiny_pipe.vae
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        latent_channels=4,
        scaling_factor=0.5,
    ).eval()
    for vae in (kl, small):
        z = encode_image(vae, picture())
        cells = vae_scale_factor(vae)
        assert z.shape == (1, 4, 16 // cells, 24 // cells) and z.dtype == vae.dtype
        assert torch.equal(z, encode_image(vae, picture()))
        assert torch.equal(z, encode_image(vae, image_to_tensor(picture())))
        assert decode_latents(vae, z).shape == (1, 3, 16, 24)
    x = image_to_tensor(picture(), kl.dtype)
    with torch.no_grad():
        torch.testing.assert_close(encode_image(kl, x), kl.encode(x).latent_dist.mean * kl.config.scaling_factor)
        torch.testing.assert_close(encode_image(small, x), small.encode(x.float()).latents * 0.5)


def test_decoding_is_the_pipelines(tiny_pipe):
    arguments = {"num_inference_steps": 1, "latents": torch.randn(1, 4, 16, 16).double()}
    z = tiny_pipe("a dog", output_type="latent", **arguments).images
    image = tiny_pipe("a dog", **arguments).images[0]
    assert np.array_equal(np.asarray(tensor_to_images(decode_latents(tiny_pipe.vae, z))[0]), np.asarray(image))


def test_psnr():
    x = torch.zeros(1, 3, 4, 4)
    assert psnr(x, x) == math.inf
    assert abs(psnr(x, x + 0.2) - 20) < 1e-4
    assert psnr(x + 1, x + 5) == math.inf  # both clamp to white


def test_psnr_on_a_device_without_float64():
    x = torch.zeros(1, 3, 4, 4).as_subclass(WithoutFloat64)
    assert abs(psnr(x, x + 0.2) - 20) < 1e-4
