"""The keys of a growing cache are held once, and a step copies its own keys only."""

import pytest
import torch

from xmodal_interp.hooks.key_cache import KeyCache
from xmodal_interp.hooks.raw_calls import RawCall


def step(key, value, n_new: int) -> RawCall:
    return RawCall(torch.nn.Identity(), key[:, :, -n_new:], key, value, None, "sdpa", {})


@pytest.mark.parametrize("n_new", [1, 3])
def test_a_long_answer_copies_the_keys_a_few_times(n_new: int) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 900, 4), torch.randn(2, 2, 900, 6)
    cache = KeyCache(keys[:, :, :300], values[:, :, :300], None)
    memory = []
    for n in range(300 + n_new, 901, n_new):
        grown = step(keys[:, :, :n].clone(), values[:, :, :n].clone(), n_new)
        assert cache.grow(grown, None)
        memory.append(cache.k.data_ptr())
        assert cache.k.shape[2] == n
    assert len(set(memory)) < 8
    torch.testing.assert_close(cache.k, keys, atol=0, rtol=0)
    torch.testing.assert_close(cache.v, values, atol=0, rtol=0)
    cache.trim()
    assert cache.k.untyped_storage().nbytes() == keys.nbytes
    assert cache.v.untyped_storage().nbytes() == values.nbytes
    torch.testing.assert_close(cache.k, keys, atol=0, rtol=0)


def test_changed_keys_are_another_cache() -> None:
    keys = torch.randn(1, 2, 10, 4)
    cache = KeyCache(keys[:, :, :8], None, None)
    assert cache.grow(step(keys[:, :, :9], keys, 1), None)
    other = keys.clone()
    other[:, :, 8] += 1  # a key that the last step added
    assert not cache.grow(step(other, other, 1), None)
    assert cache.grow(step(keys, keys, 1), None)
    assert cache.v is None
