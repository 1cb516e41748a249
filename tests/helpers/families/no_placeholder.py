"""Types whose image tokens do not come from a placeholder that a user writes."""

from tests.helpers.families.dual_encoders import PIXELS, PROMPTS
from tests.helpers.families.family_record import Record, Token

_SQUARE = {"height": 64, "width": 64}
_VIT = {"image_size": 64, "patch_size": 8}

RECORDS: tuple[Record, ...] = (
    Record(
        "mllama",
        note="Resized with its aspect ratio kept onto the best canvas of image_processor.size "
        "tiles (max_image_tiles), padded right and below, cut; text attends to the tiles by "
        "cross-attention.",
        image="<|image|>",
        tokens=("<|image|>", "<|python_tag|>"),
        images={"size": {"height": 48, "width": 48}, "max_image_tiles": 4},
        config={
            "vision_config": {
                "image_size": 48,
                "patch_size": 8,
                "num_global_layers": 1,
                "intermediate_layers_indices": [0, 1],
                "vision_output_dim": 96,
                "max_num_tiles": 4,
            },
            "text_config": {"cross_attention_layers": [1]},
            "image_token_index": Token("<|image|>"),
        },
        nested=True,
    ),
    Record(
        "git",
        note="Shorter side resized to size.shortest_edge, centre crop of crop_size; the patches "
        "(and CLS) precede the text inside the model, not in input_ids.",
        image="",
        images={"size": {"shortest_edge": 64}, "crop_size": _SQUARE},
        config={"vision_config": _VIT},
        template=False,
        several=False,
    ),
    Record(
        "blip",
        note="Resized to image_processor.size ignoring its aspect ratio; text reads the patches "
        "(and CLS) by cross-attention.",
        image="",
        images={"size": _SQUARE},
        config={"vision_config": _VIT, "image_text_hidden_size": 32},
        template=False,
        several=False,
    ),
    Record(
        "pix2struct",
        note="Resized, aspect ratio kept, to at most max_patches patches of patch_size px; each "
        "flattened patch starts with its row and column, from 1. With is_vqa the question is drawn "
        "above.",
        image="",
        images={"patch_size": {"height": 8, "width": 8}, "max_patches": 64},
        call={"max_patches": 64},
        config={"vision_config": {"patch_size": 8, "patch_embed_hidden_size": 192, "seq_len": 64}},
        template=False,
        several=False,
    ),
    Record(
        "kosmos-2.5",
        note="As pix2struct; latent queries attend to the patches and are between <image> and "
        "</image>.",
        image="",
        named={"image_token": "<image_slot>", "boi_token": "<image>", "eoi_token": "</image>"},
        processor_class="Kosmos2_5Processor",
        images={"patch_size": {"height": 8, "width": 8}, "max_patches": 64},
        processor={"num_image_tokens": 8},
        call={"max_patches": 64},
        config={
            "vision_config": {
                "patch_size": 8,
                "patch_embed_hidden_size": 192,
                "max_num_patches": 32,
            },
            "text_config": {"embed_dim": 32, "layers": 2},
            "latent_query_num": 8,
        },
        template=False,
        begins=False,
        several=False,
    ),
    Record(
        "fuyu",
        note="Shrunk, aspect ratio kept, if larger than image_processor.size, padded right and "
        "below; raw patches of patch_size px, a newline token ends each row.",
        image="",
        words=("|SPEAKER|", "|NEWLINE|", "<0x04>"),
        images={
            "size": {"height": 96, "width": 128},
            "patch_size": {"height": 16, "width": 16},
        },
        config={"image_size": 96, "patch_size": 16, "image_token_id": Token("|SPEAKER|")},
        template=False,
        several=False,
    ),
    Record(
        "idefics",
        note="Resized to a square of image_size ignoring its aspect ratio; text reads the "
        "patches (and CLS), or the perceiver's queries, by gated cross-attention.",
        image="<fake_token_around_image><image><fake_token_around_image>",
        tokens=("<fake_token_around_image>", "<end_of_utterance>"),
        named={"image_token": "<image>"},
        images={"image_size": 64},
        nested=True,
        config={"vision_config": _VIT, "additional_vocab_size": 0},
        template=False,
    ),
    Record(
        "pp_formulanet",
        note="Margins cropped, thumbnailed and padded to image_processor.size on both sides; there "
        "is no prompt, the answer is generated from the image by cross-attention.",
        image="",
        images={"size": _SQUARE, "do_crop_margin": False},
        asks=False,
        config={
            "vision_config": {
                "image_size": 64,
                "patch_size": 4,
                "output_channels": 16,
                "window_size": 4,
                "global_attn_indexes": [1],
                "post_conv_in_channels": 16,
                "post_conv_mid_channels": 16,
                "post_conv_out_channels": 32,
                "decoder_hidden_size": 32,
            },
        },
        template=False,
        several=False,
    ),
    Record(
        "vision-encoder-decoder",
        note="Resized to image_processor.size ignoring its aspect ratio (a ViT, with TrOCR's "
        "processor); there is no prompt, the answer is generated by cross-attention.",
        image="",
        processor_class="TrOCRProcessor",
        asks=False,
        images={"@": "ViTImageProcessor", "size": _SQUARE},
        config={
            "encoder": _VIT,
            "decoder_start_token_id": Token("<s>"),
            "pad_token_id": Token("<pad>"),
        },
        template=False,
        several=False,
    ),
    Record(
        "udop",
        note="Resized to image_processor.size ignoring its aspect ratio; patches are joined with "
        "the words whose box they hold.",
        unbuildable="not built yet: its processor takes words and their boxes instead of a prompt, "
        "with a separate tokenizer class.",
        config={"max_2d_position_embeddings": 64},
        given={
            **PROMPTS,
            **PIXELS,
            "bbox": [
                [[0.1 * n, 0.2, 0.1 * n + 0.1, 0.3 + 0.3 * row] for n in range(8)] for row in (0, 1)
            ],
            "decoder_input_ids": [[1, *range(90, 95)], [1, *range(95, 100)]],
        },
        generate={"decoder_start_token_id": 1},
    ),
    Record(
        "evolla",
        unbuildable="its input is a protein: its processor takes no image.",
        config={"aligner_num_add_layers": 1, "protein_encoder_config": {"vocab_size": 128}},
        given={
            **PROMPTS,
            "protein_input_ids": [[*range(90, 97), 0, 0], list(range(100, 109))],
            "protein_attention_mask": [[1] * 7 + [0] * 2, [1] * 9],
        },
    ),
    Record(
        "mistral4",
        unbuildable="it is text-only: transformers registers no processor for it.",
        given=PROMPTS,
    ),
)
