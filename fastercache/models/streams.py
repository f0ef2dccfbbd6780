"""The residual streams of a block: which of its arguments they are, and where they come out again."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastercache.errors import UnsupportedModelError


@dataclass(frozen=True)
class Block:
    """One of the repeated blocks of a model, a module that takes the residual streams and gives them back, each with
    something added.

    path: from the model. streams: the names of the arguments that are the streams; those that the model reads after its
    last block come first, and `live` is their number. positions: of those arguments in a call without names. returned:
        where in the output each is.
    gives_tuple: whether the output is a tuple, or the one stream itself.
    """

    path: str
    module: nn.Module
    streams: tuple[str, ...]
    positions: tuple[int, ...]
    returned: tuple[int, ...]
    gives_tuple: bool
    live: int = 1

    def streams_in(self, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """The streams of a call."""
        return tuple(
            kwargs[name] if name in kwargs else args[position]
            for name, position in zip(self.streams, self.positions, strict=True)
        )

    def streams_out(self, output: Any) -> tuple[torch.Tensor, ...]:
        """The streams in what a call gave."""
        return tuple(output[position] for position in self.returned) if self.gives_tuple else (output,)

    def result(self, streams: Sequence[torch.Tensor]) -> Any:
        """An output made of streams."""
        if not self.gives_tuple:
            return streams[0]
        output: list[Any] = [None] * len(streams)
        for position, stream in zip(self.returned, streams, strict=True):
            output[position] = stream
        return tuple(output)


def block_of(path: str, module: nn.Module, streams: Sequence[str] | int, live: int = 1) -> Block:
    """The block at `path`. streams: the names of the arguments that are its streams, or how many of the first arguments
    are.

    Where the output is a tuple, the names that `forward` returns tell which is which; where it returns expressions,
    their order counts.

    Raises:
        UnsupportedModelError: `forward` has no such arguments, or returns something besides the streams.
    """
    forward = inspect.unwrap(type(module).forward)
    parameters = list(inspect.signature(forward).parameters)[1:]
    names = tuple(parameters[:streams]) if isinstance(streams, int) else tuple(streams)
    missing = [name for name in names if name not in parameters]
    if missing or not names:
        raise UnsupportedModelError(
            f"{type(module).__name__}.forward takes {', '.join(parameters) or 'nothing'}, but not "
            f"{', '.join(missing) or 'a stream'}, which its family takes for a residual stream; blocks cannot be "
            "reused here"
        )
    found = returned_names(forward)
    if found is None or not set(names) <= set(found):
        found = names
    if len(found) != len(names):
        raise UnsupportedModelError(
            f"{type(module).__name__}.forward returns {', '.join(found)}, and its residual streams are "
            f"{', '.join(names)}; what it returns besides cannot be reused"
        )
    return Block(
        path,
        module,
        names,
        tuple(map(parameters.index, names)),
        tuple(map(found.index, names)),
        len(names) > 1,
        min(live, len(names)),
    )


def returned_names(forward: Callable[..., Any]) -> tuple[str, ...] | None:
    """The names in the last `return` of a function, `None` where it returns something without a name."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):  # made without source, as by exec
        return None
    returns = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    value = returns[-1] if returns else None
    parts = value.elts if isinstance(value, ast.Tuple) else [value]
    return tuple(part.id for part in parts) if all(isinstance(part, ast.Name) for part in parts) else None  # type: ignore[union-attr]
