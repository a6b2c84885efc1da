"""The original packages beside transformers': `make test-original-masks`, in an environment of its own.

Both are built tiny, with the same random weights, so that boxes and masks must be the same to rounding.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import make_sam, make_text_encoder

from weaver.errors import WeaverError
from weaver.masks.grounded import Sam
from weaver.masks.opening import open_text_masks
from weaver.masks.original import OriginalGroundingDino, OriginalSam, build_grounding_dino
from weaver.masks.text import TextMasks

HERE = all(find_spec(name) for name in ("groundingdino", "segment_anything"))
original = pytest.mark.skipif(not HERE, reason="needs the original packages: make test-original-masks")

WIDTH, HEIGHT = 60, 40
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8))
BOXES = [(2.0, 3.0, 30.0, 20.0), (10.0, 10.0, 59.0, 39.0)]
NAMES = [  # transformers' -> the authors'
    ("vision_encoder.neck.conv1", "image_encoder.neck.0"),
    ("vision_encoder.neck.layer_norm1", "image_encoder.neck.1"),
    ("vision_encoder.neck.conv2", "image_encoder.neck.2"),
    ("vision_encoder.neck.layer_norm2", "image_encoder.neck.3"),
    ("vision_encoder", "image_encoder"),
    ("patch_embed.projection", "patch_embed.proj"),
    ("image_encoder.layers", "image_encoder.blocks"),
    (
        "prompt_encoder.shared_embedding.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    ("prompt_encoder.point_embed.", "prompt_encoder.point_embeddings."),
    ("mask_embed.conv1", "mask_downscaling.0"),
    ("mask_embed.layer_norm1", "mask_downscaling.1"),
    ("mask_embed.conv2", "mask_downscaling.3"),
    ("mask_embed.layer_norm2", "mask_downscaling.4"),
    ("mask_embed.conv3", "mask_downscaling.6"),
    ("upscale_conv1", "output_upscaling.0"),
    ("upscale_layer_norm", "output_upscaling.1"),
    ("upscale_conv2", "output_upscaling.3"),
    ("proj_in", "layers.first"),
    ("head.layers.0", "head.layers.1"),
    ("layer_norm_final_attn", "norm_final_attn"),
    ("layer_norm", "norm"),
]


def original_name(name: str) -> str:
    for old, new in NAMES:
        name = name.replace(old, new)
    if "hypernetworks" in name:
        name = name.replace(".layers.0.", ".layers.1.")
    return name.replace("layers.first", "layers.0").replace("proj_out", "layers.2")


def original_sam(model):
    """The authors' class with the weights of transformers' model."""
    from functools import partial

    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
    from segment_anything.modeling import Sam as Authors

    vision = ImageEncoderViT(
        img_size=64,
        patch_size=8,
        embed_dim=16,
        depth=2,
        num_heads=2,
        mlp_ratio=1,
        out_chans=8,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(1,),
    )
    prompts = PromptEncoder(8, (8, 8), (64, 64), 4)
    decoder = MaskDecoder(
        transformer_dim=8,
        transformer=TwoWayTransformer(depth=2, embedding_dim=8, num_heads=2, mlp_dim=16),
        iou_head_hidden_dim=8,
    )
    sam = Authors(vision, prompts, decoder)
    own = {name: x for name, x in model.state_dict().items() if not name.startswith("shared_image_embedding")}
    sam.load_state_dict({original_name(name): x for name, x in own.items()})
    return sam


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """The authors' Grounding DINO: its Swin as it is, all else tiny, and a tiny BERT."""
    import groundingdino
    from groundingdino.util.slconfig import SLConfig

    config = SLConfig.fromfile(str(Path(groundingdino.__file__).parent / "config" / "GroundingDINO_SwinT_OGC.py"))
    config.text_encoder_type = str(make_text_encoder(tmp_path_factory.mktemp("bert")))
    for name, value in {"enc_layers": 1, "dec_layers": 2, "num_queries": 6, "dim_feedforward": 32}.items():
        setattr(config, name, value)
    config.use_checkpoint = config.use_transformer_ckpt = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_grounding_dino(config)
    return OriginalGroundingDino(model, side=128, longest=224)


@original
def test_masks_are_those_of_transformers():
    model, processor = make_sam()
    ours, theirs = Sam(model, processor), OriginalSam(original_sam(model))
    masks = ours.of_boxes(PICTURE, BOXES)
    assert masks.any() and not masks.all()
    assert torch.equal(theirs.of_boxes(PICTURE, BOXES), masks)
    for points in ([(5.0, 6.0)], [(5.0, 6.0), (50.0, 30.0)]):
        assert torch.equal(ours.of_points(PICTURE, points), theirs.of_points(PICTURE, points))


@original
@torch.no_grad()
def test_boxes_are_in_the_pixels_of_the_picture(dino):
    """By hand: 60 x 40 pixels are seen at 192 x 128."""
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    seen = np.asarray(PICTURE.resize((192, 128), Image.Resampling.BILINEAR)) / 255
    pixels = torch.from_numpy((seen - mean) / std).permute(2, 0, 1).float()
    outputs = dino.model(pixels[None], captions=["white dog."])
    x, y, width, height = outputs["pred_boxes"][0].unbind(-1)
    by_hand = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], -1)
    by_hand = by_hand * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    found = dino.detect(PICTURE, "white dog", 0.0, 0.0)
    assert torch.allclose(torch.tensor([one.box for one in found]), by_hand, atol=1e-2)
    scores = outputs["pred_logits"][0].sigmoid().amax(-1)
    assert torch.allclose(torch.tensor([one.score for one in found]), scores, atol=1e-4)


@original
@torch.no_grad()
@pytest.mark.parametrize("axes", [2, 3])
def test_text_is_encoded_as_by_transformers(dino, axes):
    """The BERT that the package wraps, with a mask [B, L] and with one [B, L, L], beside transformers' own forward."""
    from transformers import BertModel

    bert = dino.model.bert
    own = BertModel(bert.config).eval()
    own.load_state_dict(bert.state_dict())
    ids = torch.tensor([[101, 1042, 1044, 1012, 1045, 102]])
    mask = torch.ones(1, 6) if axes == 2 else torch.eye(6)[None].bool() | torch.tensor([[0, 1, 1, 0, 0, 0]]).bool()
    mask[..., -1] = 0 if axes == 2 else mask[..., -1]
    grown = mask if axes == 2 else (1 - mask[:, None].float()) * torch.finfo(torch.float32).min
    expected = own(input_ids=ids, attention_mask=grown).last_hidden_state
    found = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-6)
    unmasked = own(input_ids=ids).last_hidden_state
    assert not torch.allclose(found, unmasked, atol=1e-4)


@original
def test_both_find_objects_together(dino):
    finder = TextMasks(OriginalSam(original_sam(make_sam()[0])), dino, box_threshold=0.0, text_threshold=0.0)
    found = finder.find(PICTURE, ["white dog", "cat"])
    assert found and {item.word for item in found} <= {"white dog", "cat"}
    assert all(item.mask.shape == (HEIGHT, WIDTH) and item.mask.any() for item in found)


@original
@pytest.mark.parametrize("field", ["detector", "segmenter"])
def test_checkpoints_that_can_not_be_used(tmp_path, field):
    load = OriginalGroundingDino.load if field == "detector" else OriginalSam.load
    damaged, other = tmp_path / "damaged.pth", tmp_path / "other.pth"
    damaged.write_bytes(b"no weights")
    torch.save({"model": {"x": torch.zeros(3)}}, other)
    for file, message in (
        (None, "the original packages bring no weights; name their checkpoint"),
        (tmp_path / "none.pth", "is not there; download"),
        (damaged, "is no checkpoint of PyTorch or is damaged"),
        (other, "holds none of the models"),
    ):
        with pytest.raises(WeaverError, match=f"^masks.text.{field}: .*{message}") as caught:
            load(file)
        assert "\n" not in str(caught.value)


@original
def test_a_checkpoint_tells_which_sam_it_is(tmp_path):
    from segment_anything import sam_model_registry

    model = sam_model_registry["vit_b"]()
    torch.save(model.state_dict(), tmp_path / "sam.pth")
    loaded = OriginalSam.load(tmp_path / "sam.pth").model
    assert len(loaded.image_encoder.blocks) == 12 and not loaded.training
    assert torch.equal(loaded.mask_decoder.iou_token.weight, model.mask_decoder.iou_token.weight)
    lacking = {name: x for name, x in model.state_dict().items() if "mask_decoder" not in name}
    torch.save(lacking, tmp_path / "part.pth")
    with pytest.raises(WeaverError, match=r"masks\.text\.segmenter: .*part\.pth lacks \d+ weights, mask_decoder"):
        OriginalSam.load(tmp_path / "part.pth")


@pytest.mark.skipif(HERE, reason="the packages are here")
def test_packages_that_are_not_there_are_told_with_the_fix():
    message = r"masks\.text\.backend: the package segment_anything can't be imported .*; pip install segment-anything"
    with pytest.raises(WeaverError, match=message) as caught:
        open_text_masks("original", words=False)
    assert "\n" not in str(caught.value)
    with pytest.raises(WeaverError, match="the package groundingdino can't be imported"):
        open_text_masks("original")
