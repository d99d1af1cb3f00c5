"""Modules of our own: every way to write attention, gates and activations that the passes know."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from frontend_checks import calls, check, lively, operators
from timm.layers import GluMlp, SwiGLU
from torch import nn

from tvm_vitq.ops import attrs, shape_of

WIDTH, HEADS, TOKENS = 16, 2, 9


class Net(nn.Module):
    """Patches, residual blocks, mean over tokens, head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 5, 5)
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean(dim=1))


def net(*blocks: nn.Module) -> Net:
    return lively(Net(*blocks))  # type: ignore[return-value]


IMAGE = (2, 3, 16, 17)  # five does not divide either side: the remainder is cropped, as the convolution does


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("allowed", torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], HEADS, -1).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = self.mix(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x)))
        return self.proj(mixed.transpose(1, 2).reshape(x.shape))

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class Sigmoid(Attention):
    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(q * 0.25 @ k.transpose(-2, -1) - math.log(TOKENS)) @ v


class SplitScales(Attention):
    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = ((q * 0.5) @ (k / 2).transpose(-2, -1)).masked_fill(~self.allowed, -torch.inf) * 3
        return scores.softmax(-1) @ v


class BooleanMask(Attention):
    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed, scale=0.75)


class Joint(Attention):
    """Batch and heads in one axis, bmm, as decomposed programs have it."""

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        flat = [t.reshape(-1, TOKENS, WIDTH // HEADS) for t in (q, k, v)]
        weights = torch.bmm(flat[0], flat[1].transpose(1, 2)).softmax(-1)
        return torch.bmm(weights, flat[2]).view(q.shape)


class PerHead(Attention):
    """Cosine attention's scale, one number per head."""

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scale = torch.tensor([0.5, 2.0]).view(1, HEADS, 1, 1)
        return ((q @ k.transpose(-2, -1)) * scale).softmax(-1) @ v


class TalkingHeads(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Linear(HEADS, HEADS)

    def mix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = (q @ k.transpose(-2, -1)).permute(0, 2, 3, 1)
        return self.between(scores).permute(0, 3, 1, 2).softmax(-1) @ v


class SelfAttention(nn.Module):
    """torch's own module, its projections without modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


def test_forms_of_attention() -> None:
    model = check(net(Sigmoid(), SplitScales(), BooleanMask(), Joint(), PerHead(), SelfAttention()), IMAGE)
    found = {name: attrs(call) for name, call in calls(model, "vitq.attention").items()}
    assert {k: (v["kind"], round(v["scale"], 6)) for k, v in found.items()} == {
        "blocks.0": ("sigmoid", 0.25),
        "blocks.1": ("softmax", 0.75),
        "blocks.2": ("softmax", 0.75),
        "blocks.3": ("softmax", 1.0),
        "blocks.4": ("softmax", 1.0),
        "blocks.5.inner": ("softmax", round((WIDTH // HEADS) ** -0.5, 6)),
    }
    masked = calls(model, "vitq.attention")["blocks.1"].args[3]
    assert shape_of(masked) == [1, 1, TOKENS, TOKENS]
    assert {"blocks.5.inner.in_proj", "blocks.5.inner.out_proj"} <= set(calls(model, "vitq.linear"))


def test_decomposed_program_gives_the_same_graph() -> None:
    module = net(
        SplitScales(), BooleanMask(), nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())
    )
    program = torch.export.export(module, (torch.zeros(IMAGE),)).run_decompositions()
    model = check(program, IMAGE, torch_module=module)  # type: ignore[arg-type]
    assert operators(model)["vitq.attention"] == 2 and operators(model)["vitq.layer_norm"] == 1
    assert {"blocks.0.q", "blocks.2.1", "head"} <= set(calls(model, "vitq.linear"))


def test_attention_that_does_not_match_stays_float() -> None:
    from frontend_checks import images, largest_error

    from tvm_vitq.frontend import import_model
    from tvm_vitq.frontend.canonicalize import float_islands

    module = net(TalkingHeads())
    model = import_model(module, input_shape=IMAGE)
    assert float_islands(model.mod) == {"relax.matmul": 2, "relax.nn.softmax": 1}
    assert largest_error(model, module, images(IMAGE)) < 1e-5


class Written(nn.Module):
    """An activation written out, between two linears."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.form = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), form

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(FORMS[self.form](self.fc1(x)))


FORMS = {
    "gelu": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: (
        0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))
    ),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * x.sigmoid(),
    "hardswish": lambda x: x * F.relu6(x + 3) / 6,
    "relu": torch.relu,
}


def test_activations_written_out() -> None:
    model = check(net(*(Written(form) for form in FORMS)), IMAGE)
    kinds = [attrs(call)["kind"] for call in calls(model, "vitq.activation").values()]
    assert kinds == list(FORMS)


class PlainNorm(nn.Module):
    """LayerNorm in elementary operators, and a LayerNorm without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.bare = nn.LayerNorm(WIDTH, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return self.bare(centred / torch.sqrt(variance + 1e-3) * self.gamma + self.beta)


class LayerScale(nn.Module):
    """A per-channel scale and shift on both sides of a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))
        self.fc = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x * self.before + 0.5) * self.after - self.before


def test_norms_and_scales() -> None:
    model = check(net(PlainNorm(), LayerScale()), IMAGE)
    assert operators(model)["vitq.layer_norm"] == 2
    assert operators(model)["relax.multiply"] == 0
    assert operators(model)["relax.add"] == 2, "the residual adds alone"


@pytest.mark.parametrize("gate", ["GluMlp", "SwiGLU"])
def test_gated_mlps(gate: str) -> None:
    mlp = GluMlp(WIDTH, 2 * WIDTH) if gate == "GluMlp" else SwiGLU(WIDTH, 2 * WIDTH)
    model = check(net(mlp), IMAGE)
    assert operators(model)["relax.multiply"] == 1
    assert [attrs(c)["kind"] for c in calls(model, "vitq.activation").values()] == [
        "sigmoid" if gate == "GluMlp" else "silu"
    ]
