"""The rules that derive tiny configs, on cases that can be checked by eye."""

from transformers import Gemma3Config, MllamaConfig

from tests.helpers.tiny_configs import kept_layers, tiny_config


def test_the_fewest_layers_that_include_every_kind_are_kept() -> None:
    kinds = ["sliding", "sliding", "sliding", "full", "sliding", "full"]
    assert kept_layers({"num_hidden_layers": 6, "layer_types": kinds}) == [0, 3]
    assert kept_layers({"depth": 6, "fullatt_block_indexes": [2, 4]}) == [0, 2]
    assert kept_layers({"num_layers": 6}) == [0, 1]
    assert kept_layers({"hidden_size": 6}) == []


def test_lists_per_layer_are_reduced_to_the_kept_layers() -> None:
    text = tiny_config(Gemma3Config).text_config
    assert text.layer_types == ["sliding_attention", "full_attention"]
    assert text.num_hidden_layers == 2
    cross = tiny_config(MllamaConfig).text_config
    assert (cross.num_hidden_layers, cross.cross_attention_layers) == (2, [1])


def test_overrides_win_and_may_change_the_type_of_a_part() -> None:
    config = tiny_config(
        Gemma3Config, {"text_config": {"hidden_size": 48}, "vision_config": {"model_type": "vit"}}
    )
    assert config.text_config.hidden_size == 48
    assert config.text_config.num_key_value_heads < config.text_config.num_attention_heads
    assert config.vision_config.model_type == "vit"
    assert config.vision_config.hidden_size == 32
