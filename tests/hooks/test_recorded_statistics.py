"""``record(model, reduce="entropy")``: calls that hold statistics instead of q and k."""

import pytest
import torch

from tests.helpers.attention_variants import of
from tests.helpers.tiny import QUESTION, picture, tiny_vlm
from xmodal_interp.errors import InputError, NotRecordedError
from xmodal_interp.hooks import record


def calls_of(vlm, **options):
    inputs = vlm.prepare([[picture()]], [QUESTION])[0]
    with torch.no_grad(), record(vlm.model, **options) as recording:
        output = vlm.run(inputs)
    return recording, output


@pytest.mark.parametrize("names", ["entropy", "received", ["received", "entropy"]])
def test_statistics_by_name_equal_those_of_recorded_operands(names) -> None:
    vlm = tiny_vlm("qwen2_vl")
    (full, plain), (held, output) = calls_of(vlm), calls_of(vlm, reduce=names)
    assert torch.equal(plain.logits, output.logits)
    assert held.results == []
    assert len(held.calls) == len(full.calls) > 0
    for call, other in zip(full.calls, held.calls, strict=True):
        assert (other.name, other.module) == (call.name, call.module)
        assert other.q is other.k is other.v is other.dense is None
        for name in ("entropy", "received"):
            weights = [] if name == "entropy" else [torch.ones(1, call.n_queries)]
            if name in names:
                found, expected = (getattr(each, name)(*weights) for each in (other, call))
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
            else:
                with pytest.raises(NotRecordedError, match=rf"not {name}\. Add '{name}'"):
                    getattr(other, name)(*weights)
    assert sum(c.n_bytes for c in held.calls) < 0.5 * sum(c.n_bytes for c in full.calls)


def test_an_inline_softmax_and_norms() -> None:
    model, inputs = of("blip")
    recordings = []
    for reduce in (None, "entropy"):
        with torch.no_grad(), record(model, norms=True, reduce=reduce) as recording:
            model(**inputs)
        recordings.append(recording.calls)
    for call, other in zip(*recordings, strict=True):
        torch.testing.assert_close(other.entropy(), call.entropy(), equal_nan=True)
        torch.testing.assert_close(other.update_share, call.update_share, equal_nan=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"reduce": ["entropy", "mass"]},
            "reduce='mass' requires groups of keys, which a model without processor does not have. "
            "Pass a function, such as lambda call: call.mass(groups), or capture with "
            "Keep(statistics=['mass']).",
        ),
        (
            {"reduce": "distance"},
            "Statistics must be among 'mass', 'entropy', 'received'; got 'distance'.",
        ),
        ({"reduce": []}, "Statistics must be among 'mass', 'entropy', 'received'; got none."),
        ({"reduce": 3}, "reduce must be a function or names of statistics; got 3."),
        (
            {"reduce": "entropy", "values": True},
            "Got values=True and reduce= with statistics, which are kept instead of q, k and v. "
            "Pass one of them.",
        ),
    ],
)
@pytest.mark.usefixtures("any_type")
def test_wrong_names_are_errors(options, message) -> None:
    with pytest.raises(InputError) as refusal:
        record(tiny_vlm("llava").model, **options)
    assert str(refusal.value) == message
