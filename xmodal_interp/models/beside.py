"""Records of the types whose image tokens are not identified by an id in the prompt.

Either text attends to images by cross-attention, or the model inserts image features at positions
that no token id marks.
"""

from __future__ import annotations

from xmodal_interp.models import geometry
from xmodal_interp.models.family import Family

QUERIES = (
    "Its image tokens are learned queries, each of which attends to the whole image, so they have "
    "no row and column; xi.on_patches maps their values to the patches that they attend to."
)
"""The reason given for families whose image tokens are learned queries."""

_HEADED = geometry.FixedGrid(before=1, tower_before=1)  # a class token before the patches
_ENCODERS: dict[str, geometry.Rule] = {
    **dict.fromkeys(("vit", "beit", "dinov2"), _HEADED),
    "deit": geometry.FixedGrid(before=2, tower_before=2),  # class and distillation tokens
    **dict.fromkeys(
        ("swin", "donut-swin"),
        geometry.FixedGrid(
            cell=lambda config, *_: (
                config.encoder.patch_size * 2 ** (len(config.encoder.depths) - 1)
            ),
            show=geometry.framed,
            tower_before=None,
        ),
    ),
}

BESIDE: tuple[Family, ...] = (
    # keys of a cross-attention
    Family("mllama", "image_token_index", geometry.aspect_ratio_tiles, in_sequence=False),
    Family("blip", None, _HEADED, in_sequence=False, in_front=True, rewritten=True),
    Family(
        "idefics",
        None,
        geometry.Chosen(
            lambda config: config.use_resampler,
            {
                False: _HEADED,
                True: geometry.QueryTokens(
                    "perceiver_config.resampler_n_latents", class_token=True, reason=QUERIES
                ),
            },
        ),
        in_sequence=False,
        placeholder=None,
        image_mark="<image>",
        in_front=True,
    ),
    Family("pix2struct", None, geometry.FlattenedPatches(), in_sequence=False, in_front=True),
    Family(
        "pp_formulanet",
        None,
        geometry.FixedGrid(
            cell=lambda config, *_: config.vision_config.patch_size * 4,
            show=geometry.framed,
            shift=1.5 / 4,
            tower_before=None,
        ),
        in_sequence=False,
        reads_text=False,
    ),
    Family(
        "vision-encoder-decoder",
        None,
        geometry.Chosen(
            lambda config: config.encoder.model_type,
            _ENCODERS,
            "There is no geometry rule for an encoder of the type {!r}.",
        ),
        in_sequence=False,
        reads_text=False,
    ),
    # image tokens that no id marks
    Family("git", None, _HEADED, prepended=True, in_front=True),
    Family(
        "kosmos-2",
        None,
        geometry.QueryTokens("latent_query_num", class_token=True),
        placeholder=None,
        image_mask="image_embeds_position_mask",
        in_front=True,
        reason=QUERIES,
    ),
    Family(
        "kosmos-2.5",
        None,
        geometry.FlattenedPatches("latent_query_num"),
        placeholder=None,
        image_mask="image_embeds_position_mask",
        in_front=True,
        reason=QUERIES,
    ),
)
