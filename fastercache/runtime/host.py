"""What the runtime asks of the library that a model comes from, as an interface: `fastercache.host` is diffusers' side
of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from fastercache.cache.budget import CacheBudget, Limit
from fastercache.cache.cache import CachePlan
from fastercache.models.site import Site
from fastercache.report.summary import Share
from fastercache.schedule.branches import Branch, BranchLayout
from fastercache.schedule.plan import Plan
from fastercache.schedule.signature import Signature


class Processes(Protocol):
    """What a run asks where several processes make one video: as it begins, and when it is summed up."""

    def beginning(self) -> AbstractContextManager[None]:
        """Inside, a run begins; an error of one process is raised on all."""

    def agree(
        self, plan: Plan, layout: BranchLayout, budget: CacheBudget, arguments: Mapping[str, Any], two_bands: bool
    ) -> None:
        """An error on all of them unless they are about to run the same."""

    def least(self, limit: Limit | None) -> Limit | None:
        """The least of the processes' limits."""

    def local_shapes(
        self, site: Site, arguments: Mapping[str, Any], shapes: tuple[torch.Size, ...]
    ) -> tuple[torch.Size, ...]:
        """What this process has of a site's tensors."""

    def keeps(self, planned: CachePlan, sites: Sequence[Site], arguments: Mapping[str, Any]) -> None:
        """Note what is kept of a run, for `share`."""

    def share(self, steps: int, calls: int) -> Share:
        """This process's part of a run after so many steps, of so many calls each where nothing is skipped."""


class Host(Protocol):
    """notes: what the summary says about it. label: what the host calls the call that is being made, `None` where it
    says nothing."""

    @property
    def notes(self) -> list[str]: ...

    @property
    def processes(self) -> Processes | None:
        """Those that make a video together; `None` where this one makes it alone."""

    @property
    def label(self) -> str | None: ...

    @property
    def attention_backends(self) -> tuple[str, ...]:
        """What the model's attention runs on now: graphs depend on it."""

    def settle(self, original: Callable[..., Any], arguments: Mapping[str, Any], backend: Any) -> None:
        """Before a run: make a choice that waits for the first call, as the timing of attention backends does."""

    def check_label(self, layout: BranchLayout, branch: Branch | None, remedy: str | None) -> None:
        """`RunError` if the host says of a call what does not fit the layout.

        branch: the one that the call is to be, of two calls. remedy: what a pipeline's user can do, who cannot declare
            the layout.
        """

    def refusal(self, error: BaseException) -> Exception | None:
        """A better error to raise for one that came out of the model."""

    def signature(self, steps: int, shape: Sequence[int], dtype: Any, guided: bool) -> Signature:
        """What can be known of a run without the pipeline that calls it: the model, and what is given here of the
        run."""

    def natively(self) -> AbstractContextManager[None]:
        """Inside, attention runs on what a count of operations knows, and in one process."""

    def detach(self) -> None:
        """Give the model back what was its own."""
