"""What stands at a site: a gate, which lets the module compute and stores what it gives, or blends in its place.

A gate reads its group's mode, its group's row of coefficients and its site's rings, and nothing else: so torch.compile can trace it, with
the mode as a constant of the graph and the tensors as its inputs. They are reached from the patched module, and so Dynamo takes their
addresses to be static, as a buffer's are: a CUDA graph reads and writes them in place (`tests/test_cuda_graphs.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastercache.families import BranchOrder
from fastercache.memory import Ring, branch_half, half
from fastercache.plan import Branch, Group, GroupStep

Mode = Literal["compute", "push", "blend"]


@dataclass(eq=False)
class GroupState:
    """What the sites of one group do now. `row`: their coefficients, `[ROW_SIZE]` float32, rewritten in place before every step.

    thread: the one whose call this is about; the sites compute for any other, which calls the model uncached. A graph is run by it alone.
    ring_half, output_half: the half of the rings' rows, and of the module's output's, that a push or a blend is about; `None` for all.
    """

    row: torch.Tensor
    mode: Mode = "compute"
    ring_half: int | None = None
    output_half: int | None = None
    thread: int | None = None

    def set(self, group: Group, step: GroupStep, branches: tuple[Branch, ...], order: BranchOrder) -> None:
        """What the plan says of this group, on a step that runs `branches`."""
        self.thread = threading.get_ident()
        self.mode = "blend" if step.blend else "push" if step.push else "compute"
        used = branches if step.blend else step.push or branches
        self.ring_half = branch_half(order, group.branches, used)
        self.output_half = branch_half(order, branches, used)


class Gate:
    """Stands around one site's module. Outside a run, and where the schedule does not name the site, `group` is `None`."""

    def __init__(self) -> None:
        self.group: GroupState | None = None
        self.rings: tuple[Ring, ...] = ()

    def __call__(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        group = self.group
        if group is None or group.mode == "compute" or not (torch.compiler.is_dynamo_compiling() or group.thread == threading.get_ident()):
            return original(*args, **kwargs)
        if group.mode == "blend":
            outputs = tuple(ring.blend(group.row, group.ring_half) for ring in self.rings)
            return outputs if len(outputs) > 1 else outputs[0]
        output = original(*args, **kwargs)
        computed = output if isinstance(output, tuple) else (output,)
        for ring, tensor in zip(self.rings, computed, strict=True):
            ring.push(half(tensor, group.output_half), group.row, group.ring_half)
        return output
