"""The probability of each generated or given answer token, from the logits of the model.

The model's forward is observed: the logits of the last positions, as the model returns them, before
repetition penalties, temperature and other changes that ``generate`` makes to them. The probability
is the softmax over the vocabulary in float32. Logits are not kept: at most those of one step are
held at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin, StoppingCriteria


class NextTokens:
    """Observes the logits of a model; made by :func:`next_tokens`."""

    def __init__(self, given: Sequence[Sequence[int]] | None = None) -> None:
        """Observe generated tokens, or given ones.

        Args:
            given: Ids of the given answer of each sample, all of one length.
        """
        self._given = None if given is None else torch.tensor([list(ids) for ids in given])
        self._last: Tensor | None = None
        self._steps: list[Tensor] = []
        self._depth = 0
        self._criterion = _AfterToken(self)

    def probabilities(self, n_steps: int) -> Float[Tensor, "sample step"] | None:
        """Return the probability of each token, in float32; None if some were not observed."""
        found = torch.cat(self._steps, dim=1).cpu() if self._steps else None
        return found if found is not None and found.shape[1] == n_steps else None

    def with_criterion(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments of ``generate`` with the stopping criterion added to those given."""
        given = options.get("stopping_criteria") or ()
        return {**options, "stopping_criteria": [*given, self._criterion]}

    def entered(self, *_: Any) -> None:
        """Count the modules with logits that are running: one may call another."""
        self._depth += 1

    def left(self, module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG002
        """Read the logits that the outermost module returns."""
        self._depth -= 1
        logits = getattr(output, "logits", None)
        if self._depth or not isinstance(logits, Tensor) or logits.ndim != 3:
            return
        if self._given is None:
            self._last = logits[:, -1].detach()
            return
        n = self._given.shape[1]
        if logits.shape[:1] == self._given.shape[:1] and logits.shape[1] > n:
            self._steps = [_probabilities(logits[:, -n - 1 : -1].detach(), self._given)]

    def generated(self, ids: Int[Tensor, " sample"]) -> None:
        """Add the probabilities of the tokens that were generated from the last logits."""
        if self._last is not None and len(self._last) == len(ids):
            self._steps.append(_probabilities(self._last[:, None], ids[:, None]))
        self._last = None


class _AfterToken(StoppingCriteria):
    """Called by ``generate`` after each token; never stops."""

    def __init__(self, observer: NextTokens) -> None:
        self._observer = observer

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # noqa: ARG002
        self._observer.generated(input_ids[:, -1])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _probabilities(
    logits: Float[Tensor, "sample step word"], ids: Int[Tensor, "sample step"]
) -> Float[Tensor, "sample step"]:
    logits = logits.float()
    chosen = logits.gather(-1, ids.to(logits.device)[..., None])[..., 0]
    return (chosen - logits.logsumexp(-1)).exp()


@contextmanager
def next_tokens(
    model: nn.Module, given: Sequence[Sequence[int]] | None = None
) -> Iterator[NextTokens]:
    """Observe the logits of a model inside the ``with`` block.

    Args:
        model: The model.
        given: Ids of the given answer of each sample, all of one length, which one forward reads at
            its last positions. Otherwise tokens are generated, with the arguments that
            :meth:`NextTokens.with_criterion` returns.
    """
    observer = NextTokens(given)
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                enter = module.register_forward_pre_hook(observer.entered)
                leave = module.register_forward_hook(observer.left, always_call=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
        yield observer
