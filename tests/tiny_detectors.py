"""Grounding DINO and SAM of transformers, built from configuration: seeded and tiny."""

from __future__ import annotations

import torch

WORDS = "a the white black dog cat fox".split()


def make_tokenizer(folder):
    """BERT's tokenizer; the model wants its special signs at their usual places."""
    from transformers import BertTokenizer

    vocab = {f"[unused{i}]": i for i in range(1100)}
    places = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    places |= {word: 1040 + i for i, word in enumerate(WORDS)}
    names = {index: name for name, index in vocab.items()} | {index: name for name, index in places.items()}
    file = folder / "vocab.txt"
    file.write_text("\n".join(names[i] for i in range(1100)) + "\n")
    return BertTokenizer(vocab=str(file))


def make_text_encoder(folder):
    """A folder with a tiny BERT and its tokenizer, as a text encoder is read from."""
    from transformers import BertModel

    make_tokenizer(folder).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(_bert()).save_pretrained(folder)
    return folder


def _bert():
    from transformers import BertConfig

    return BertConfig(vocab_size=1100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def make_grounding_dino(folder, seed: int = 0):
    """(model, processor): random boxes, of which about every score occurs; pictures are seen at 128 x 128."""
    from transformers import (
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
        GroundingDinoProcessor,
        SwinConfig,
    )

    vision = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )
    config = GroundingDinoConfig(
        backbone_config=vision,
        text_config=_bert(),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=6,
        disable_custom_kernels=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GroundingDinoForObjectDetection(config).eval()
    pictures = GroundingDinoImageProcessorPil(size={"height": 128, "width": 128}, do_pad=False)
    return model, GroundingDinoProcessor(pictures, make_tokenizer(folder))


def make_sam(seed: int = 0):
    """(model, processor): random masks; pictures are seen at 64 pixels of the longer side."""
    from transformers import (
        SamConfig,
        SamImageProcessorPil,
        SamMaskDecoderConfig,
        SamModel,
        SamProcessor,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )

    vision = SamVisionConfig(
        hidden_size=16,
        output_channels=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        mlp_dim=16,
        window_size=4,
        global_attn_indexes=[1],
        num_pos_feats=4,
    )
    prompts = SamPromptEncoderConfig(hidden_size=8, image_size=64, patch_size=8, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(
        hidden_size=8, mlp_dim=16, num_attention_heads=2, num_hidden_layers=2, iou_head_hidden_dim=8
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    pictures = SamImageProcessorPil(
        size={"longest_edge": 64},
        pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16},
        mask_pad_size={"height": 16, "width": 16},
    )
    return model.eval(), SamProcessor(pictures)
