"""Types that combine image and text by other means than placeholders."""

from tests.conformance.overrides.record import Record

OTHER_WAYS: dict[str, Record] = {
    "blip": Record(prompt="beside"),
    "evolla": Record(
        {"aligner_num_add_layers": 1, "protein_encoder_config": {"vocab_size": 128}},
        prompt="words_only",
        extras=("protein",),
    ),
    "florence2": Record(
        {
            "vision_config": {
                "depths": (1, 1),
                "patch_size": (3, 3),
                "patch_stride": (2, 2),
                "patch_padding": (1, 1),
                "patch_prenorm": (False, True),
                "embed_dim": (16, 32),
                "num_heads": (2, 4),
                "num_groups": (2, 4),
                "window_size": 4,
            }
        },
        extras=("decoder_words",),
    ),
    "git": Record(prompt="beside"),
    "idefics": Record(prompt="beside", pixels="nested", extras=("image_attention",)),
    "instructblip": Record({"image_token_index": 8}, tokens_per_image=5, extras=("qformer_words",)),
    "instructblipvideo": Record(
        {"video_token_index": 8},
        pixels="clips",
        extras=("qformer_words",),
        image_token=8,
        tokens_per_image=10,
    ),
    "kosmos-2": Record(prompt="beside", extras=("latent_positions",)),
    "kosmos-2.5": Record(
        {"vision_config": {"max_num_patches": 32}},
        prompt="beside",
        pixels="flattened",
        extras=("latent_positions",),
    ),
    "mistral4": Record(prompt="words_only"),
    "mllama": Record(
        {
            "text_config": {"cross_attention_layers": [1]},
            "vision_config": {
                "num_global_layers": 1,
                "vision_output_dim": 96,
                "intermediate_layers_indices": [0, 1],
            },
        },
        prompt="beside",
        extras=("aspect_ratios",),
    ),
    "pi0": Record(
        {
            "chunk_size": 4,
            "max_state_dim": 6,
            "max_action_dim": 6,
            "vlm_config": {"text_config": {}, "image_token_id": 8},
        },
        extras=("robot",),
        image_token=8,
        tokens_per_image=16,
        idle=("vlm.language_model.layers.1.self_attn",),
    ),
    "pix2struct": Record(
        {"vision_config": {"seq_len": 32}},
        prompt="none",
        pixels="flattened",
        extras=("decoder_words",),
    ),
    "pp_formulanet": Record(
        {
            "vision_config": {
                "post_conv_in_channels": 8,
                "post_conv_mid_channels": 16,
                "post_conv_out_channels": 32,
                "image_size": 32,
            },
            "text_config": {"decoder_start_token_id": 1},
        },
        prompt="none",
        extras=("decoder_words",),
    ),
    "t5gemma2": Record(
        {"encoder": {"mm_tokens_per_image": 4}},
        extras=("decoder_words",),
        idle=("vision_tower.head.attention",),
    ),
    "udop": Record(
        {"max_2d_position_embeddings": 64},
        prompt="beside",
        extras=("boxes", "decoder_words"),
        generate={"decoder_start_token_id": 1},
    ),
    "vision-encoder-decoder": Record(
        prompt="none", extras=("decoder_words",), generate={"decoder_start_token_id": 1}
    ),
}
