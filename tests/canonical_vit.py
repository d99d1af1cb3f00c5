"""Hand-built canonical float graphs of small Vision Transformers, for tests that need no frontend."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from tvm_vitq.ops import call, shape_of


class GraphBuilder:
    """A BlockBuilder that emits canonical operators with random weights and named bindings."""

    def __init__(self, seed: int, outliers: float = 0.0) -> None:
        self.block = relax.BlockBuilder()
        self.rng = np.random.default_rng(seed)
        self.outliers = outliers

    def emit(self, expr: relax.Expr, name: str) -> relax.Var:
        return self.block.emit(expr, name_hint=name)

    def constant(self, *shape: int, std: float = 0.02, mean: float = 0.0) -> tvm.ir.GenericConst:
        return relax.const(self.rng.normal(mean, std, shape).astype("float32"))

    def linear(self, x: relax.Expr, width: int, site: str, std: float | None = None) -> relax.Var:
        inner = shape_of(x)[-1]
        weight = self.constant(width, inner, std=inner**-0.5 if std is None else std)
        return self.emit(call("vitq.linear", [x, weight, self.constant(width)], site=site), site)

    def layer_norm(self, x: relax.Expr, site: str) -> relax.Var:
        width = shape_of(x)[-1]
        gamma = self.rng.normal(1.0, 0.1, width).astype("float32")
        beta = self.rng.normal(0.0, 0.1, width).astype("float32")
        if self.outliers:  # a few channels far wider than the rest, as in pretrained ViTs
            chosen = self.rng.choice(width, max(1, width // 12), replace=False)
            gamma[chosen] *= self.outliers
            beta[chosen] *= self.outliers
        return self.emit(
            call("vitq.layer_norm", [x, relax.const(gamma), relax.const(beta)], site=site, eps=1e-6), site
        )

    def activation(self, x: relax.Expr, kind: str, site: str) -> relax.Var:
        return self.emit(call("vitq.activation", [x], site=site, kind=kind), site)

    def heads(self, qkv: relax.Expr, index: int, heads: int, name: str) -> relax.Var:
        """Slice `index` of a [B, T, 3C] tensor as [B, H, T, D]."""
        batch, tokens, width = shape_of(qkv)
        inner = width // 3
        part = self.emit(
            relax.op.strided_slice(qkv, axes=[2], begin=[index * inner], end=[(index + 1) * inner]),
            f"{name}_slice",
        )
        split = self.emit(relax.op.reshape(part, (batch, tokens, heads, inner // heads)), f"{name}_split")
        return self.emit(relax.op.permute_dims(split, [0, 2, 1, 3]), name)

    def attention(
        self, x: relax.Expr, heads: int, site: str, kind: str = "softmax", bias: bool = False
    ) -> relax.Var:
        batch, tokens, width = shape_of(x)
        qkv = self.linear(x, 3 * width, f"{site}.qkv")
        q, k, v = (self.heads(qkv, i, heads, f"{site}.{n}") for i, n in enumerate("qkv"))
        additive = [self.constant(1, heads, tokens, tokens, std=0.5)] if bias else []
        scale = float((width // heads) ** -0.5)
        mixed = self.emit(
            call("vitq.attention", [q, k, v, *additive], site=site, scale=scale, kind=kind), site
        )
        back = self.emit(relax.op.permute_dims(mixed, [0, 2, 1, 3]), f"{site}.back")
        joined = self.emit(relax.op.reshape(back, (batch, tokens, width)), f"{site}.joined")
        return self.linear(joined, width, f"{site}.proj")

    def mlp(self, x: relax.Expr, ratio: int, site: str, activation: str, gated: bool) -> relax.Var:
        width = shape_of(x)[-1]
        hidden = self.activation(self.linear(x, ratio * width, f"{site}.fc1"), activation, f"{site}.act")
        if gated:
            gate = self.linear(x, ratio * width, f"{site}.fc1_g")
            hidden = self.emit(relax.op.multiply(hidden, gate), f"{site}.gate")
        return self.linear(hidden, width, f"{site}.fc2")

    def patches(self, x: relax.Expr, patch: int, width: int) -> relax.Var:
        """Patchify convolution as reshape, permute and one matmul: [B, 3, H, W] to [B, tokens, width]."""
        batch, channels, height, breadth = shape_of(x)
        rows, columns = height // patch, breadth // patch
        tiles = self.emit(
            relax.op.reshape(x, (batch, channels, rows, patch, columns, patch)), "patch_embed.tiles"
        )
        moved = self.emit(relax.op.permute_dims(tiles, [0, 2, 4, 1, 3, 5]), "patch_embed.moved")
        flat = self.emit(
            relax.op.reshape(moved, (batch, rows * columns, channels * patch * patch)), "patch_embed.flat"
        )
        return self.linear(flat, width, "patch_embed.proj")


def tiny_vit(
    dim: int = 32,
    depth: int = 2,
    heads: int = 2,
    *,
    image: int = 16,
    patch: int = 4,
    classes: int = 10,
    batch: int = 2,
    ratio: int = 4,
    seed: int = 0,
    activation: str = "gelu",
    attention: str = "softmax",
    gated: bool = False,
    bias: bool = False,
    pool: str = "cls",
    outliers: float = 0.0,
) -> tvm.IRModule:
    """A canonical float ViT: (batch, 3, image, image) to (batch, classes).

    `outliers` multiplies gamma and beta of some LayerNorm channels; `gated` makes the MLP a GLU; `bias` adds
    a relative position bias; `pool` is "cls" (class token) or "mean".
    """
    build = GraphBuilder(seed, outliers)
    image_var = relax.Var("x", relax.TensorType((batch, 3, image, image), "float32"))
    with build.block.function("main", [image_var]):
        with build.block.dataflow():
            x = build.patches(image_var, patch, dim)
            if pool == "cls":
                token = np.broadcast_to(build.rng.normal(0, 0.5, (1, 1, dim)), (batch, 1, dim)).astype(
                    "float32"
                )
                x = build.emit(relax.op.concat([relax.const(token), x], axis=1), "cls_token")
            tokens = shape_of(x)[1]
            x = build.emit(relax.op.add(x, build.constant(1, tokens, dim, std=0.5)), "pos_embed")
            for i in range(depth):
                name = f"blocks.{i}"
                y = build.attention(
                    build.layer_norm(x, f"{name}.norm1"), heads, f"{name}.attn", attention, bias
                )
                x = build.emit(relax.op.add(x, y), f"{name}.add1")
                y = build.mlp(build.layer_norm(x, f"{name}.norm2"), ratio, f"{name}.mlp", activation, gated)
                x = build.emit(relax.op.add(x, y), f"{name}.add2")
            x = build.layer_norm(x, "norm")
            if pool == "cls":
                x = build.emit(relax.op.strided_slice(x, axes=[1], begin=[0], end=[1]), "cls_slice")
                x = build.emit(relax.op.reshape(x, (batch, dim)), "cls")
            else:
                x = build.emit(call("vitq.mean", [x], site="fc_norm.pool", axis=1), "pool")
            logits = build.linear(x, classes, "head")
            result = build.block.emit_output(logits, name_hint="logits")
        build.block.emit_func_output(result)
    return build.block.get()


def tiny_mixer(
    dim: int = 32,
    depth: int = 2,
    *,
    image: int = 16,
    patch: int = 4,
    classes: int = 10,
    batch: int = 2,
    seed: int = 0,
) -> tvm.IRModule:
    """A canonical MLP-Mixer: token mixing transposes between the LayerNorm and its linear."""
    build = GraphBuilder(seed)
    image_var = relax.Var("x", relax.TensorType((batch, 3, image, image), "float32"))
    with build.block.function("main", [image_var]):
        with build.block.dataflow():
            x = build.patches(image_var, patch, dim)
            for i in range(depth):
                name = f"blocks.{i}"
                y = build.layer_norm(x, f"{name}.norm1")
                y = build.emit(relax.op.permute_dims(y, [0, 2, 1]), f"{name}.across")
                y = build.mlp(y, 2, f"{name}.mlp_tokens", "gelu", False)
                y = build.emit(relax.op.permute_dims(y, [0, 2, 1]), f"{name}.along")
                x = build.emit(relax.op.add(x, y), f"{name}.add1")
                y = build.mlp(build.layer_norm(x, f"{name}.norm2"), 4, f"{name}.mlp_channels", "gelu", False)
                x = build.emit(relax.op.add(x, y), f"{name}.add2")
            x = build.emit(call("vitq.mean", [build.layer_norm(x, "norm")], site="pool", axis=1), "pool")
            result = build.block.emit_output(build.linear(x, classes, "head"), name_hint="logits")
        build.block.emit_func_output(result)
    return build.block.get()
