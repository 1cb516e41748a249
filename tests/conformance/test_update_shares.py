"""The share of attention in updates, for the language tower of every type with one residual stream.

Some types are tested by default, all of them with ``--all-types``.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.real import GENERATING, asked, some_of, vlm_with_exact_steps
from tests.helpers.tiny import picture
from xmodal_interp.errors import CaptureError
from xmodal_interp.hooks import record

pytestmark = pytest.mark.filterwarnings(  # raised inside the processors
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
SEVERAL_STREAMS = {"gemma3n", "glm5_next", "inkling2"}
"""Types without a single residual stream: AltUp, hyper-connections, attention over earlier
layers."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = GENERATING if metafunc.config.getoption("all_types") else some_of(GENERATING)
    metafunc.parametrize("name", names)


def test_every_language_layer_has_a_share_and_outputs_are_unchanged(name: str) -> None:
    vlm = vlm_with_exact_steps(name)
    inputs, _ = vlm.prepare([[picture()]], [asked(vlm, 1)])
    with torch.no_grad():
        plain = vlm.run(inputs).logits
        if name in SEVERAL_STREAMS:
            with (
                pytest.raises(CaptureError, match=r"no addition was found"),
                record(vlm.model, towers=["language"], norms=True),
            ):
                vlm.run(inputs)
            return
        with record(vlm.model, towers=["language"], norms=True) as recording:
            assert torch.equal(vlm.run(inputs).logits, plain)
    assert recording.calls
    for call in recording.calls:
        share = call.update_share
        assert share.shape == (call.n_samples, call.n_queries)
        sees = call.visible().any(-1).any(1).expand(share.shape)  # elsewhere Idefics adds nothing
        assert torch.where(sees, share > 0, share >= 0).all()
        assert (share < 1).all()
