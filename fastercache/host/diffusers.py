"""diffusers' side of what the runtime asks (`fastercache.runtime.host`): the labels of its calls, and its attention
backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from fastercache.host.attention import Attention
from fastercache.host.labels import CallLabels
from fastercache.host.processes import processes_of
from fastercache.host.signature import signature_of
from fastercache.schedule.branches import Branch, BranchLayout
from fastercache.schedule.signature import Signature


class DiffusersHost:
    """Of one model; one that is not diffusers' has no labels and no backends to choose, and nothing here acts on it.

    attention_backend: as `fastercache.compile` has it.
    """

    def __init__(self, attention_backend: str | None, model: nn.Module):
        self.model = model
        self.attention = Attention(model)
        self.processes = processes_of(model)
        self.attention.divided = self.processes is not None
        if attention_backend is not None:
            try:
                self.attention.use(attention_backend)
            except BaseException:
                if self.processes is not None:
                    self.processes.detach()
                raise
        self.labels = CallLabels(model)

    @property
    def notes(self) -> list[str]:
        """What the summary says of the attention backend."""
        return self.attention.notes

    @property
    def label(self) -> str | None:
        return self.labels.current

    @property
    def attention_backends(self) -> tuple[str, ...]:
        return self.attention.backends

    def settle(self, original: Callable[..., Any], arguments: Mapping[str, Any], backend: Any) -> None:
        self.attention.settle(original, arguments, backend)

    def check_label(self, layout: BranchLayout, branch: Branch | None, remedy: str | None) -> None:
        self.labels.check(layout, branch, remedy)

    def refusal(self, error: BaseException) -> Exception | None:
        return self.attention.refusal(error)

    def signature(self, steps: int, shape: Sequence[int], dtype: Any, guided: bool) -> Signature:
        return signature_of(None, self.model, steps=steps, shape=shape, dtype=dtype, guided=guided)

    @contextmanager
    def natively(self) -> Iterator[None]:
        alone = nullcontext() if self.processes is None else self.processes.alone()
        with self.attention.natively(), alone:
            yield

    def detach(self) -> None:
        self.labels.detach()
        if self.processes is not None:
            self.processes.detach()
        self.attention.restore()
