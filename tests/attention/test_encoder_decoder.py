"""Encoder and decoder on one axis, in a case that can be checked by eye."""

import torch

from xmodal_interp.attention import AttentionCall, decoder_layer, encoder_layer

N_ENCODER, N = 2, 4
EVEN = {"tower": "language", "layer": 0, "module": "m", "scaling": 1.0}


def call(kind: str, n_queries: int, n_keys: int, **more: object) -> AttentionCall:
    """A call in which every visible key gets the same probability."""
    q, k = torch.zeros(1, 1, n_queries, 2), torch.zeros(1, 1, n_keys, 2)
    return AttentionCall(kind=kind, call=0, q=q, k=k, **EVEN, **more)  # type: ignore[arg-type]


def shown(whole: AttentionCall) -> list[list[float | None]]:
    """Return the probabilities; None for a row without a visible key."""
    rows = whole.probs()[0, 0]
    return [
        None if row.isnan().all() else [round(value, 2) for value in row.tolist()] for row in rows
    ]


def test_an_encoder_layer_has_rows_and_keys_of_the_encoder() -> None:
    whole = encoder_layer([call("self", 2, 2)], N_ENCODER, N)
    assert shown(whole) == [[0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], None, None]


def test_cross_attention_has_rows_of_the_decoder_and_keys_of_the_encoder() -> None:
    whole = decoder_layer([call("cross", 1, 2), call("cross", 1, 2)], N_ENCODER, N, merged=False)
    assert shown(whole) == [None, None, [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]]


def test_decoder_self_attention_is_causal() -> None:
    steps = [call("self", 1, 1), call("self", 1, 2, offset=1)]
    whole = decoder_layer(steps, N_ENCODER, N, merged=False)
    assert shown(whole) == [None, None, [0, 0, 1, 0], [0, 0, 0.5, 0.5]]


def test_merged_attention_has_keys_of_both() -> None:
    steps = [call("self", 1, 3), call("self", 1, 4)]
    whole = decoder_layer(steps, N_ENCODER, N, merged=True)
    assert shown(whole) == [None, None, [0.33, 0.33, 0.33, 0], [0.25, 0.25, 0.25, 0.25]]


def test_merged_attention_keeps_its_mask() -> None:
    hidden = torch.tensor([[[[True, False, True]]]])
    whole = decoder_layer([call("self", 1, 3, mask=hidden)], N_ENCODER, 3, merged=True)
    assert shown(whole) == [None, None, [0, 0.5, 0.5]]


def test_calls_that_hold_only_probabilities_are_placed_too() -> None:
    dense = torch.tensor([[[[0.25, 0.75]]]])
    bare = AttentionCall(kind="cross", call=0, q=None, k=None, dense=dense, **EVEN)  # type: ignore[arg-type]
    whole = decoder_layer([bare], N_ENCODER, 3, merged=False)
    assert shown(whole) == [None, None, [0.25, 0.75, 0]]
