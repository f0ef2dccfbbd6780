"""How one call of a model is divided between the processes of a group: what is split, where they exchange, and what is
left of each site.

Two ways. *Tokens*: each process has some of the video's tokens and all of the text, and around an attention over all of
them the processes exchange tokens for heads (Ulysses, arxiv.org/abs/2309.14509). *Frames*: each has some of the frames,
and only around an attention over time do they exchange frames for patches (arxiv.org/abs/2403.10266); a frame's own
attention, the text and the MLPs need nobody else.

diffusers' hooks split and gather (`enable_parallelism` with a plan); what they cannot say is a patch on `forward` that
lies under the gates of a schedule, so that a reused site exchanges nothing.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fastercache.errors import RunError, UnsupportedModelError
from fastercache.models.family import Family, child
from fastercache.models.patching import ForwardPatch
from fastercache.models.site import Site
from fastercache.schedule.sites import SiteNode

Shapes = tuple[torch.Size, ...]


@dataclass(frozen=True)
class Group:
    """The processes that make one video together. rank: of this one, from 0. handle: torch's."""

    handle: Any
    rank: int
    size: int

    def exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """parts `[size, ...]`, of which part k goes to process k -> the same shape, of which part k came from process
        k."""
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=self.handle)
        return received

    def gathered(self, shard: torch.Tensor, dim: int) -> torch.Tensor:
        """The shards of all processes, one after the other in dimension `dim`."""
        shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(shards, shard.contiguous(), group=self.handle)
        return torch.cat(shards, dim)

    def shard(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This process's part of a dimension, with zeros behind its end where it does not divide."""
        padded = self.padded(whole, dim)
        length = padded.shape[dim] // self.size
        return padded.narrow(dim, self.rank * length, length)

    def padded(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """With zeros behind the end of a dimension, so that it divides."""
        return longer(whole, dim, whole.shape[dim] + -whole.shape[dim] % self.size)


def longer(tensor: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """With zeros behind the end of a dimension, up to a length."""
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    return torch.cat([tensor, tensor.new_zeros((*tensor.shape[:dim], missing, *tensor.shape[dim + 1 :]))], dim)


class Division(ABC):
    """Of the calls of one class of models. text_in_sites: whether what is kept of a site may hold text, which every
    process has whole."""

    text_in_sites = True

    @property
    def native(self) -> bool:
        """Whether diffusers has a plan for the class: then the keys may also go around in a ring (Ring Attention)."""
        return False

    def hooks(self, model: nn.Module) -> Mapping[str, Any] | None:
        """The plan for diffusers' hooks; `None` for the one that the class has itself."""
        return {}

    def patches(self, model: nn.Module, family: Family, group: Group) -> list[ForwardPatch]:
        """What the processes do beside the hooks."""
        return []

    @abstractmethod
    def refuse_model(self, model: nn.Module, family: Family, size: int, ulysses: bool) -> None:
        """`UnsupportedModelError` if the model itself cannot be divided between `size` processes."""

    @abstractmethod
    def refuse_call(self, model: nn.Module, family: Family, arguments: Mapping[str, Any], size: int) -> None:
        """`RunError` if a call with these arguments cannot be divided between `size` processes."""

    @abstractmethod
    def local_shapes(
        self, model: nn.Module, family: Family, site: Site, arguments: Mapping[str, Any], shapes: Shapes, size: int
    ) -> Shapes:
        """What each process has of a site whose tensors have `shapes` where one process makes the video."""


def _refuse_remainder(count: int, what: str, size: int, remedy: str) -> None:
    if count % size:
        raise RunError(f"{count} {what} do not divide among {size} processes; {remedy}")


# ---- tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens(Division):
    """Video tokens in shards, in dimension 1 of the residual stream; the text whole on every process.

    native: diffusers has a plan for the class, and its attention exchanges by itself.
    blocks: path of the list of blocks; the first one's `stream` is split. others: lists that go on with its streams.
    rope: the module that gives positions of the tokens, with these in `rope_dim` of its two outputs, of `rope_dims`
    dimensions; rope_argument: the blocks' argument that holds them, in dimension 0. last: the module whose output is
    gathered. joint: name of the attention in a block. text_first: whether the text's tokens come before the video's
    there. text_parts: names of parts of a block that hold text alone. all_rows: whether a product of attention over the
    tokens has all rows; others are left alone. refused: gives why a model of some configuration cannot be divided.
    """

    native: bool = False  # type: ignore[assignment]
    blocks: str = "transformer_blocks"
    stream: str = "hidden_states"
    rope: str = ""
    rope_argument: str = ""
    last: str = "proj_out"
    joint: str = "attn1"
    others: tuple[str, ...] = ()
    text_first: bool = False
    text_parts: tuple[str, ...] = ("ff_context",)
    rope_dim: int = 0
    rope_dims: int = 2
    all_rows: bool = False
    refused: Callable[[Any], str | None] = field(default=lambda config: None)

    def hooks(self, model: nn.Module) -> Mapping[str, Any] | None:
        if self.native:
            return None
        from diffusers.models._modeling_parallel import ContextParallelInput as Split
        from diffusers.models._modeling_parallel import ContextParallelOutput as Gather

        plan: dict[str, Any] = {f"{self.blocks}.0": {self.stream: Split(split_dim=1, expected_dims=3)}}
        if self.rope:
            positions = Split(split_dim=self.rope_dim, expected_dims=self.rope_dims, split_output=True)
            plan[self.rope] = {0: positions, 1: positions}
        if self.rope_argument:
            positions = Split(split_dim=0, expected_dims=2)
            plan[f"{self.blocks}.*"] = {self.rope_argument: [positions, positions]}
        plan[self.last] = Gather(gather_dim=1, expected_dims=3)
        return plan

    def patches(self, model: nn.Module, family: Family, group: Group) -> list[ForwardPatch]:
        if self.native:
            return []
        for module in model.modules():
            processor = getattr(module, "processor", None)
            if getattr(processor, "_parallel_config", None) is not None:
                processor._parallel_config = None  # type: ignore[union-attr]  # it would divide the text, too
        found = []
        for name in (self.blocks, *self.others):
            for number in range(len(child(model, name))):  # type: ignore[arg-type]
                attention = child(model, f"{name}.{number}.{self.joint}")
                around = partial(_joint_attention, group, self.text_first, self.all_rows)
                found.append(ForwardPatch(attention, around, traced=True))
        return found

    def refuse_model(self, model: nn.Module, family: Family, size: int, ulysses: bool) -> None:
        heads = family.config(model).num_attention_heads
        if ulysses and heads % size:
            raise UnsupportedModelError(
                f"the {heads} attention heads of {type(model).__name__} do not divide among {size} processes; start "
                f"as many processes as divide {heads}"
            )
        reason = self.refused(family.config(model))
        if reason is not None:
            raise UnsupportedModelError(f"{type(model).__name__} cannot be divided between processes: {reason}")

    def _video(self, model: nn.Module, family: Family, arguments: Mapping[str, Any]) -> int:
        return family.site_shapes(model, Site(SiteNode("", "stack", 0)), arguments)[0][1]

    def refuse_call(self, model: nn.Module, family: Family, arguments: Mapping[str, Any], size: int) -> None:
        remedy = "choose another size or length of the video, or another number of processes"
        _refuse_remainder(self._video(model, family, arguments), "video tokens", size, remedy)

    def local_shapes(
        self, model: nn.Module, family: Family, site: Site, arguments: Mapping[str, Any], shapes: Shapes, size: int
    ) -> Shapes:
        if site.path.rpartition(".")[2] in self.text_parts:
            return shapes
        video = self._video(model, family, arguments)
        rows, tokens, *channels = shapes[0]
        # What a site gives of both streams in one tensor has the text's tokens besides.
        return (torch.Size((rows, tokens - video + video // size, *channels)), *shapes[1:])


class _Exchanged(TorchFunctionMode):
    """Inside, a product of attention over this process's video tokens and the whole text is taken over all tokens, for
    some of the heads."""

    def __init__(self, group: Group, video: int, text_first: bool, rows: int | None = None):
        super().__init__()
        self.group, self.video, self.text_first, self.rows = group, video, text_first, rows
        self.met = 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        inputs = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        query, key, value = (inputs.pop(name) for name in ("query", "key", "value"))
        if not self._is_joint(query, key):
            return function(*args, **kwargs)
        self.met += 1
        return self._joint(function, torch.stack([query, key, value]), inputs)

    def _is_joint(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        return query.shape[2] == key.shape[2] and self.rows in (None, query.shape[0])

    def _joined(self, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return torch.cat([text, video] if self.text_first else [video, text], -2)

    def _joint(self, function: Callable[..., Any], three: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """three: queries, keys and values, `[3, rows, heads, tokens of this process and the text, channels]`."""
        group, size = self.group, self.group.size
        heads = three.shape[2]
        own = slice(group.rank * heads // size, (group.rank + 1) * heads // size)
        text_tokens = three.shape[-2] - self.video
        video, text = self._parts(three, text_tokens)
        # [3, rows, heads, shard] -> [processes, 3, rows, own heads, shard] -> [3, rows, own heads, video]
        parts = group.exchange(video.unflatten(2, (size, -1)).movedim(2, 0))
        video = parts.movedim(0, 3).flatten(3, 4)
        query, key, value = self._joined(video, text[:, :, own])
        output = function(query, key, value, **inputs)
        video, text = self._parts(output, text_tokens)
        # Each process gets its shard of the video, and all of the text, of the heads computed here.
        shards = video.unflatten(2, (size, -1)).movedim(2, 0)
        shards = torch.cat([shards, text.expand(size, *text.shape)], -2)
        # [processes, rows, own heads, shard and text] -> [rows, heads, shard and text]
        whole = group.exchange(shards).movedim(0, 1).flatten(1, 2)
        return self._joined(whole[..., : self.video, :], whole[..., self.video :, :])

    def _parts(self, tokens: torch.Tensor, text: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The video's tokens, and the text's."""
        if self.text_first:
            return tokens[..., text:, :], tokens[..., :text, :]
        video = tokens.shape[-2] - text
        return tokens[..., :video, :], tokens[..., video:, :]


def _joint_attention(
    group: Group, text_first: bool, all_rows: bool, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> Any:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    exchanged = _Exchanged(group, hidden.shape[1], text_first, len(hidden) if all_rows else None)
    with exchanged:
        output = original(*args, **kwargs)
    if not exchanged.met:
        raise RunError(
            "this attention backend does not call torch's scaled_dot_product_attention, around which the processes "
            "would exchange; use 'native' or one of the '_native' backends"
        )
    return output


# ---- frames ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frames(Division):
    """Frames in shards, split in the arguments of the model and gathered in its prediction.

    Frames that do not divide are filled up with empty ones, and so are the rows of an attention over time, of which
    no other takes notice; that attention itself is over the frames that there are.

    split: the arguments with frames, and the dimension of each. frames_dim: of latents and prediction. temporal: list
    of blocks, and the name of the attention over time in one. positions: buffer of positions in time, whose dimension 1
    is frames. least: frames that each process must have, as the model treats fewer otherwise.
    """

    split: tuple[tuple[str, int], ...]
    temporal: tuple[str, str]
    frames_dim: int = 2
    positions: str = ""
    least: int = 1
    text_in_sites = False

    def patches(self, model: nn.Module, family: Family, group: Group) -> list[ForwardPatch]:
        blocks, name = self.temporal
        attentions = [child(model, f"{blocks}.{number}.{name}") for number in range(len(child(model, blocks)))]  # type: ignore[arg-type]
        length = Length()
        found = [ForwardPatch(one, partial(_over_time, group, length), traced=True) for one in attentions]
        return [ForwardPatch(model, partial(self._call, model, family, group, length)), *found]

    def _call(
        self,
        model: nn.Module,
        family: Family,
        group: Group,
        length: Length,
        original: Callable[..., Any],
        args: tuple,
        kwargs: dict[str, Any],
    ) -> Any:
        """One call on this process's frames, with the prediction of all."""
        names = list(inspect.signature(type(model).forward).parameters)[1:]
        arguments = dict(zip(names, args, strict=False)) | kwargs
        frames = length.frames = family.latents(arguments).shape[self.frames_dim]
        positions = model._buffers.get(self.positions)
        if positions is not None:
            model._buffers[self.positions] = group.shard(positions[:, :frames], 1)
        try:
            output = original(**self._narrowed(arguments, group))
        finally:
            if positions is not None:
                model._buffers[self.positions] = positions
        prediction = group.gathered(family.prediction(output), self.frames_dim)
        return family.with_prediction(output, prediction.narrow(self.frames_dim, 0, frames))

    def _narrowed(self, arguments: Mapping[str, Any], group: Group) -> dict[str, Any]:
        narrowed = dict(arguments)
        for name, dim in self.split:
            if isinstance(value := arguments.get(name), torch.Tensor):
                narrowed[name] = group.shard(value, dim)
        return narrowed

    def refuse_model(self, model: nn.Module, family: Family, size: int, ulysses: bool) -> None:
        """Any number of processes will do."""

    def refuse_call(self, model: nn.Module, family: Family, arguments: Mapping[str, Any], size: int) -> None:
        frames = family.latents(arguments).shape[self.frames_dim]
        each = -(-frames // size)
        if each < self.least:
            raise RunError(
                f"{frames} latent frames are {each} for each of {size} processes, and {type(model).__name__} needs "
                f"{self.least}, as it gives a single frame no position in time; start fewer processes"
            )

    def local_shapes(
        self, model: nn.Module, family: Family, site: Site, arguments: Mapping[str, Any], shapes: Shapes, size: int
    ) -> Shapes:
        on_shapes = {
            name: torch.empty_like(arguments[name], device="meta")
            for name, _ in self.split
            if isinstance(arguments.get(name), torch.Tensor)
        }
        return family.site_shapes(model, site, {**arguments, **self._narrowed(on_shapes, Group(None, 0, size))})


@dataclass
class Length:
    """Of the video in the call that is being made."""

    frames: int = 0


def _over_time(group: Group, length: Length, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
    """Attention over time of `[rows, frames of this process, channels]`: of all frames, for some of the rows."""
    named = "hidden_states" in kwargs
    x = kwargs["hidden_states"] if named else args[0]
    parts = group.exchange(group.padded(x, 0).unflatten(0, (group.size, -1)))
    rows = parts.transpose(0, 1).flatten(1, 2)
    y = rows[:, : length.frames]
    y = original(*args, **kwargs | {"hidden_states": y}) if named else original(y, *args[1:], **kwargs)
    frames = longer(y, 1, rows.shape[1]).unflatten(1, (group.size, -1)).transpose(0, 1)
    return group.exchange(frames).flatten(0, 1)[: len(x)]


# ---- the classes that are known --------------------------------------------------------------------------------------


def _given_frames(config: Any) -> str | None:
    if getattr(config, "image_condition_type", None) == "token_replace":
        return "it treats the tokens of its first frame, which is given, apart from the others"
    return None


DIVISIONS: dict[str, Division] = {
    "WanTransformer3DModel": Tokens(native=True),
    # Not diffusers' plan: its exchange gives some of the heads the text's mask of all of them, and fails.
    "LTXVideoTransformer3DModel": Tokens(rope="rope", rope_dim=1, rope_dims=3),
    "CogVideoXTransformer3DModel": Tokens(rope_argument="image_rotary_emb", text_first=True),
    "MochiTransformer3DModel": Tokens(rope="rope", rope_dims=3),
    "HunyuanVideoTransformer3DModel": Tokens(
        rope="rope", joint="attn", others=("single_transformer_blocks",), refused=_given_frames
    ),
    "VchitectXLTransformerModel": Tokens(stream="x", joint="attn", all_rows=True),
    "LatteTransformer3DModel": Frames(
        (("hidden_states", 2),), ("temporal_transformer_blocks", "attn1"), positions="temp_pos_embed", least=2
    ),
    "LatteT2V": Frames((("hidden_states", 2),), ("temporal_transformer_blocks", "attn1"), positions="temp_pos_embed"),
    "STDiT3": Frames((("x", 2), ("x_mask", 1)), ("temporal_blocks", "attn")),
}
"""By the name of a model's class."""


def division_of(model: nn.Module) -> Division:
    """How calls of a model are divided; `UnsupportedModelError` lists the classes that are known."""
    for cls in type(model).__mro__:
        if cls.__name__ in DIVISIONS:
            return DIVISIONS[cls.__name__]
    raise UnsupportedModelError(
        f"there is no plan by which a call of {type(model).__name__} is divided between processes; there are plans for "
        f"{', '.join(DIVISIONS)}"
    )
