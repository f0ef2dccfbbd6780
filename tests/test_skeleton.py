"""What a call on shapes alone leaves behind in a model is nothing, whatever the model keeps from its calls."""

from __future__ import annotations

import functools
import gc

import pytest
import torch
from diffusers import AnyFlowTransformer3DModel, QwenImageTransformer2DModel
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from models import ready
from torch._subclasses.fake_tensor import FakeTensor

import fastercache
from fastercache import UnsupportedModelError
from fastercache.models.skeleton import on_shapes

pytestmark = pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")
STEPS = 9
KEPT_IN_THIS_FILE: dict = {}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    KEPT_IN_THIS_FILE.clear()
    InItsClass.kept = None


def frequencies(tokens, device):
    return torch.linspace(0.5, 1.5, tokens, device=device)[:, None].expand(tokens, 8)


class InAttribute(torch.nn.Module):
    kept = None

    def forward(self, tokens, device):
        if self.kept is None or len(self.kept) != tokens:
            self.kept = frequencies(tokens, device)
        return self.kept


class InDictionary(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.kept = {}

    def forward(self, tokens, device):
        if tokens not in self.kept:
            self.kept[tokens] = [frequencies(tokens, device)]
        return self.kept[tokens][0]


class Positions:
    def __init__(self):
        self.kept = {}


class InObject(InDictionary):
    """As PositionGetter2D of Open-Sora-Plan: not a module, but an object of one."""

    def __init__(self):
        super().__init__()
        self.kept = Positions().kept


class InItsClass(torch.nn.Module):
    kept = None

    def forward(self, tokens, device):
        if self.kept is None or len(self.kept) != tokens:
            type(self).kept = frequencies(tokens, device)
        return self.kept


class InItsFile(torch.nn.Module):
    def forward(self, tokens, device):
        if tokens not in KEPT_IN_THIS_FILE:
            KEPT_IN_THIS_FILE[tokens] = (frequencies(tokens, device), tokens)
        return KEPT_IN_THIS_FILE[tokens][0]


class CachedMethod(torch.nn.Module):
    @functools.cache  # noqa: B019 - the pattern in question
    def made(self, tokens, device):
        return frequencies(tokens, device)

    def forward(self, tokens, device):
        return self.made(tokens, device)


@functools.lru_cache(maxsize=4)
def _made(tokens, device):
    return frequencies(tokens, device), tokens


def made(tokens, device):
    """As diffusers' `lru_cache_unless_export`: the cache itself has no name."""
    return _made(tokens, device)


class CachedFunction(torch.nn.Module):
    def forward(self, tokens, device):
        return made(tokens, device)[0]


class ThroughTheModel(torch.nn.Module):
    """Keeps in another module, which a function of its own refers to."""

    def __init__(self):
        super().__init__()
        self.other = InAttribute()
        self.forward = lambda tokens, device: self.other(tokens, device)


class Counted(torch.nn.Module):
    """As VideoSys' blocks, whose calls count."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, tokens, device):
        self.calls += 1
        return frequencies(tokens, device) * self.calls


class Model(ModelMixin, ConfigMixin):
    def __init__(self, rope):
        super().__init__()
        self.rope = rope
        self.blocks = torch.nn.ModuleList(
            [torch.nn.ModuleDict({"attn": Attention(query_dim=8, heads=2, dim_head=4)}) for _ in range(2)]
        )

    def forward(self, hidden_states):
        h = hidden_states.flatten(2).mT * self.rope(hidden_states[0, 0].numel(), hidden_states.device)
        for block in self.blocks:
            h = h + block["attn"](h)
        return (h.mT.reshape(hidden_states.shape),)


ROPES = [
    InAttribute,
    InDictionary,
    InObject,
    InItsClass,
    InItsFile,
    CachedMethod,
    CachedFunction,
    ThroughTheModel,
    Counted,
]


def build(rope):
    torch.manual_seed(0)
    return Model(rope()).eval().requires_grad_(False)


def inputs(size=4):
    return {"hidden_states": torch.randn(2, 8, size, size, generator=torch.Generator().manual_seed(0))}


def stand_ins():
    """Those that are alive, by their identity."""
    gc.collect()
    return {id(one): one for one in gc.get_objects() if issubclass(type(one), FakeTensor)}


def forget():
    CachedMethod.made.cache_clear()
    _made.cache_clear()
    KEPT_IN_THIS_FILE.clear()
    InItsClass.kept = None


def run(model, size):
    return [model(**inputs(size))[0] for _ in range(STEPS)]


@pytest.mark.parametrize("rope", ROPES)
def test_nothing_is_kept_of_a_call_on_shapes(rope):
    """A model of no known family is called on shapes as its first run begins, and any model where its operations are
    counted."""
    forget()
    untouched = build(rope)
    expected = [run(untouched, size)[0] for size in (4, 6, 4)]
    forget()
    model, actual, before = build(rope), [], stand_ins()
    fastercache.compile(model, steps=STEPS, cfg="none")
    for size in (4, 6):
        actual.append(run(model, size)[0])  # a run's first step computes everything
        assert fastercache.summary(model).flops.ratio > 1
    fastercache.restore(model)
    actual.append(run(model, 4)[0])
    assert all(map(torch.equal, actual, expected))
    assert stand_ins().keys() <= before.keys()  # other tests' may be there, and stay while `before` holds them


class ReadsValues(Model):
    """As VideoSys' blocks, which read the timestep, and positions that they made themselves, as numbers."""

    def forward(self, hidden_states, timestep):
        positions = torch.arange(hidden_states[0, 0].numel(), device=hidden_states.device)
        mask = torch.zeros_like(positions)
        mask[:3] = 1
        if int(timestep[0]) > 1000 or not bool((mask[: int(mask.sum())] > 0).all()):
            raise ValueError("no such timestep")
        return super().forward(hidden_states)[0] * (int(positions.max()) + 1)


def test_values_that_no_weight_or_latent_decides_can_be_read():
    torch.manual_seed(0)
    model = ReadsValues(Counted()).eval().requires_grad_(False)
    fastercache.compile(model, steps=STEPS, cfg="none")
    for _ in range(STEPS):
        model(**inputs(), timestep=torch.full((2,), 500))
    assert fastercache.summary(model).flops.ratio > 1


class PicksTokens(Model):
    """As HunyuanVideo 1.5, which asks whether there is an image, and puts the tokens that a mask leaves out last; here
    twice."""

    def forward(self, hidden_states, mask, image):
        if torch.all(image == 0):
            hidden_states = 2 * hidden_states
        rows = zip(hidden_states.mT, mask.bool(), strict=True)
        return super().forward(torch.stack([torch.cat([row[keep], row[~keep], row[~keep]]) for row, keep in rows]).mT)


@pytest.mark.parametrize("picked", [0, 1])
def test_what_a_family_says_of_a_mask_decides_how_many_tokens_it_picks(picked):
    """One number that is expanded says the values of an argument; without it they are not known."""
    torch.manual_seed(0)
    model, tokens = PicksTokens(InAttribute()).eval().requires_grad_(False), torch.randn(2, 8, 4)
    said = {"mask": torch.full((), picked).expand(2, 4), "image": torch.zeros(()).expand(2, 3, 5)}
    unsaid = {"mask": torch.full((2, 4), picked), "image": torch.zeros(2, 3, 5)}
    with on_shapes(model) as (hollow, shapes_of):

        def called(**arguments):
            return hollow(**shapes_of({"hidden_states": tokens} | arguments))[0].shape

        assert called(**said) == ((2, 8, 4) if picked else (2, 8, 8))
        for name, value in unsaid.items():
            with pytest.raises(Exception, match=r"aten\.(nonzero|_local_scalar_dense|is_nonzero)"):
                called(**said | {name: value})


def test_what_cannot_be_counted_says_why():
    model = build(Counted)
    fastercache.compile(model, "cfg-only", steps=STEPS, cfg="uncond-first")
    forward = model.blocks[1]["attn"].forward
    for _ in range(STEPS):
        model(**inputs())
    model.blocks[1]["attn"].forward = lambda h: forward(h) * int(h.sum())
    with pytest.raises(UnsupportedModelError, match=r"operations of Model cannot be counted.*shapes alone"):
        _ = fastercache.summary(model).flops


def test_a_refusal_leaves_nothing_behind_either():
    """The count fails in the middle of the model."""
    untouched, model = build(InAttribute), build(InAttribute)
    forward = model.blocks[1]["attn"].forward
    model.blocks[1]["attn"].forward = lambda h: forward(h[:, : 10**6 + int(h.sum())])
    fastercache.compile(model, steps=STEPS, cfg="none")
    with pytest.raises(UnsupportedModelError, match="cannot be called on shapes alone"):
        model(**inputs())
    fastercache.restore(model)
    assert torch.equal(model(**inputs())[0], untouched(**inputs())[0])


def test_hooks_are_not_called_on_shapes():
    """One that keeps what it sees would keep stand-ins."""
    model, seen = build(Counted), []
    model.blocks[0]["attn"].register_forward_hook(lambda module, args, output: seen.append(output))
    fastercache.compile(model, steps=STEPS, cfg="none")
    run(model, 4)
    assert fastercache.summary(model).flops.ratio > 1
    assert len(seen) == STEPS and not any(isinstance(output, FakeTensor) for output in seen)


def anyflow():
    torch.manual_seed(0)
    model = AnyFlowTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2,
        out_channels=2,
        text_dim=12,
        freq_dim=8,
        ffn_dim=32,
        num_layers=2,
    )
    text, values = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    return ready(model, torch.float32), {
        "hidden_states": torch.randn((1, 3, 2, 8, 6), generator=values),
        "encoder_hidden_states": torch.randn((1, 5, 12), generator=text),
        "timestep": torch.full((1, 3), 500.0),
        "r_timestep": torch.full((1, 3), 400.0),
        "return_dict": False,
    }


def qwen():
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=8,
        out_channels=2,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 4, 4),
    )
    values = torch.Generator().manual_seed(2)
    return ready(model, torch.float32), {
        "hidden_states": torch.randn((1, 12, 8), generator=values),
        "encoder_hidden_states": torch.randn((1, 5, 12), generator=values),
        "encoder_hidden_states_mask": torch.ones(1, 5),
        "timestep": torch.full((1,), 0.5),
        "img_shapes": [[(1, 4, 3)]],
        "return_dict": False,
    }


@pytest.mark.parametrize("build", [anyflow, qwen])
def test_models_of_diffusers_that_keep_their_frequencies(build):
    """AnyFlow in an attribute, QwenImage in a cached method."""
    untouched, arguments = build()
    expected = untouched(**arguments)[0]
    model, arguments = build()
    fastercache.compile(model, "dynamic-only", steps=STEPS, cfg="none")
    assert torch.equal(model(**arguments)[0], expected)
    for _ in range(STEPS - 1):
        model(**arguments)
    assert fastercache.summary(model).flops.ratio > 1
    fastercache.restore(model)
    assert torch.equal(model(**arguments)[0], expected)
