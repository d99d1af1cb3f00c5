"""softmax(q @ k.T) @ v, or with sigmoid, in whatever form it was written, to `vitq.attention`."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import numpy as np
import tvm
from tvm import relax

from tvm_vitq import ops
from tvm_vitq.ops import op_name, shape_of
from tvm_vitq.relax_passes.rewriter import (
    Call,
    Expr,
    Rewriter,
    constant,
    is_constant,
    layer_of,
    rewriting_pass,
    scalar_of,
    value_of,
)

MASKED = np.float32(-1e4)
"""In place of an infinite mask: its exp is zero beside any score, and it has a fixed-point form."""

SAFE_SOFTMAX = ("relax.equal", "relax.logical_not", "relax.any", "relax.max", "relax.astype", "relax.isinf")
MOVES = ("relax.reshape", "relax.permute_dims", "relax.strided_slice")


@dataclass
class Scores:
    """scale * q @ kt + sum(additive), as found behind a softmax."""

    q: Expr
    kt: Expr
    scale: float
    additive: list[np.ndarray] = field(default_factory=list)
    per_head: list[np.ndarray] = field(default_factory=list)
    """Factors that differ between heads, as in cosine attention; shaped to broadcast to q."""


class CanonicalizeAttention(Rewriter):
    def rewrite(self, call: Call, name: str) -> Expr | None:
        if op_name(call) != "relax.matmul" or is_constant(call.args[1]) or is_constant(call.args[0]):
            return None
        probabilities, v = call.args
        rank = len(shape_of(v))
        if rank < 3 or len(shape_of(probabilities)) != rank:
            return None
        found = self.weights(probabilities)
        if found is None:
            return None
        kind, raw = found
        scores = self.scores(raw)
        if scores is None:
            return None
        lead = four_axes(shape_of(raw)[:-2])
        tokens, keys = shape_of(raw)[-2:]
        fits = all(prod(shape_of(t)[:-2]) == prod(lead) for t in (scores.q, scores.kt, v))
        if not fits or shape_of(scores.q)[-2] != tokens or shape_of(v)[-2] != keys:
            return None
        layer = layer_of(name)
        (q, q_scale), (kt, k_scale) = self.unscaled(scores.q), self.unscaled(scores.kt)
        for factor in scores.per_head:
            if len(shape_of(q)) != factor.ndim:
                return None
            q = self.emit(relax.op.multiply(q, constant(factor)), f"{layer}:q_scale")
        rank = len(shape_of(kt))
        k = self.emit(relax.op.permute_dims(kt, [*range(rank - 2), rank - 1, rank - 2]), f"{layer}:permute")
        operands = [
            self.emit(relax.op.reshape(t, (*lead, *shape_of(t)[-2:])), f"{layer}:reshape") for t in (q, k, v)
        ]
        masks = [constant(m) for m in additive_terms(scores.additive, lead, kind)]
        scale = scores.scale * q_scale * k_scale
        mixed = self.emit(
            ops.call("vitq.attention", [*operands, *masks], site=layer, scale=scale, kind=kind),
            f"{layer}:attention",
        )
        return relax.op.reshape(mixed, shape_of(call))

    def weights(self, expr: Expr) -> tuple[str, Expr] | None:
        """The kind of attention and the scores under it, looking through reshapes of leading axes."""
        inner = self.definition(expr)
        if op_name(inner) == "relax.reshape" and shape_of(inner)[-2:] == shape_of(inner.args[0])[-2:]:
            return self.weights(inner.args[0])
        if op_name(inner) == "relax.nn.softmax":
            rank = len(shape_of(inner))
            return ("softmax", inner.args[0]) if int(inner.attrs["axis"]) % rank == rank - 1 else None
        if op_name(inner) == "vitq.activation" and ops.attrs(inner)["kind"] == "sigmoid":
            return "sigmoid", inner.args[0]
        if op_name(inner) == "relax.where":
            return self.behind_safe_tail(inner)
        return None

    def behind_safe_tail(self, call: Call) -> tuple[str, Expr] | None:
        """where(no key is allowed, 0, softmax(s)) is softmax(s) unless some row is masked throughout."""
        condition, first, second = call.args
        for zero, other in ((first, second), (second, first)):
            found = self.weights(other) if is_constant(zero) and not np.any(value_of(zero)) else None
            if found is None or not self.only_tests(condition, found[1]):
                continue
            scores = self.scores(found[1])
            if scores is not None and not any(np.isneginf(m).all(axis=-1).any() for m in scores.additive):
                return found
        return None

    def only_tests(self, condition: Expr, scores: Expr) -> bool:
        """Whether the condition is made of nothing but comparisons of the scores."""
        if condition.same_as(scores) or is_constant(condition):
            return True
        call = self.call_of(condition, *SAFE_SOFTMAX)
        return call is not None and all(self.only_tests(a, scores) for a in call.args)

    def scores(self, expr: Expr) -> Scores | None:
        """Peel constant additions, number multiplications and masking off until the matmul is reached."""
        scale, additive, per_head, target = 1.0, [], [], shape_of(expr)
        while True:
            call = self.definition(expr)
            operator = op_name(call)
            if operator == "relax.matmul":
                return None if is_constant(call.args[1]) else Scores(*call.args, scale, additive, per_head)
            if (
                operator == "relax.add"
                and is_constant(call.args[1])
                and shape_of(call.args[0]) == shape_of(call)
            ):
                term = spread(value_of(call.args[1]), shape_of(call), target) * np.float32(scale)
                for factor in per_head:
                    term = term * factor
                additive.append(term)
                expr = call.args[0]
            elif operator == "relax.multiply" and (number := scalar_of(call.args[1])) is not None:
                scale *= number
                expr = call.args[0]
            elif operator == "relax.multiply" and self.is_per_head(call):
                per_head.append(spread(value_of(call.args[1]), shape_of(call), target))
                expr = call.args[0]
            elif operator == "relax.reshape" and shape_of(call)[-2:] == shape_of(call.args[0])[-2:]:
                expr = call.args[0]
            elif (
                operator == "relax.where"
                and is_constant(call.args[0])
                and shape_of(call.args[1]) == shape_of(call)
            ):
                fill = scalar_of(call.args[2])
                if fill is None or fill > float(MASKED):
                    return None
                mask = np.where(value_of(call.args[0]), np.float32(0), np.float32(fill))
                additive.append(spread(mask, shape_of(call), target))
                expr = call.args[1]
            elif operator == "relax.where" and is_constant(call.args[0]) and is_constant(call.args[1]):
                fill = scalar_of(call.args[1])
                if fill is None or fill > float(MASKED) or shape_of(call.args[2]) != shape_of(call):
                    return None
                mask = np.where(value_of(call.args[0]), np.float32(fill), np.float32(0))
                additive.append(spread(mask, shape_of(call), target))
                expr = call.args[2]
            else:
                return None

    @staticmethod
    def is_per_head(call: Call) -> bool:
        """Whether a multiplication is by a constant that is the same for all queries and keys of a head."""
        factor, x = call.args[1], call.args[0]
        return (
            is_constant(factor)
            and shape_of(x) == shape_of(call)
            and all(s == 1 for s in shape_of(factor)[-2:])
        )

    def unscaled(self, expr: Expr) -> tuple[Expr, float]:
        """`expr` without multiplications by a number, also those beneath views of it."""
        call = self.definition(expr)
        if op_name(call) == "relax.multiply" and (number := scalar_of(call.args[1])) is not None:
            inner, scale = self.unscaled(call.args[0])
            return inner, scale * number
        if op_name(call) in MOVES:
            inner, scale = self.unscaled(call.args[0])
            if scale != 1.0:
                return self.emit(Call(call.op, [inner, *call.args[1:]], call.attrs), expr.name), scale
        return expr, 1.0


def four_axes(lead: list[int]) -> list[int]:
    """Leading axes as [batch, heads]; a joint one counts as batch."""
    return [lead[0], 1] if len(lead) == 1 else [prod(lead[:-1]), lead[-1]]


def spread(value: np.ndarray, shape: list[int], target: list[int]) -> np.ndarray:
    """A constant that broadcasts to `shape` as one that broadcasts to `target`, with other leading axes."""
    value = value.reshape((1,) * (len(shape) - value.ndim) + value.shape)
    if shape == target or all(s == 1 for s in value.shape[:-2]):
        return value.reshape((1,) * (len(target) - 2) + value.shape[-2:]) if shape != target else value
    return np.broadcast_to(value, (*shape[:-2], *value.shape[-2:])).reshape(*target[:-2], *value.shape[-2:])


def additive_terms(found: list[np.ndarray], lead: list[int], kind: str) -> list[np.ndarray]:
    """The additive constants with four axes, kept as one per head or one per window where they are that."""
    terms: list[np.ndarray] = []
    for value in found:
        value = np.maximum(value, MASKED)
        if value.size == 1 and kind == "softmax":
            continue  # the same for every key: softmax does not see it
        leading = value.shape[:-2]
        full = [prod(leading[:-1]), leading[-1]] if len(leading) > 1 else [*leading, 1]
        if any(a not in (1, b) for a, b in zip(full, lead, strict=True)):  # broadcast inside a joint axis
            joint = (*lead[:1], *value.shape[-3:]) if len(leading) > 1 else (*lead, *value.shape[-2:])
            terms.append(np.broadcast_to(value, joint).reshape(joint))
            continue
        terms.extend(factored(value.reshape(*full, *value.shape[-2:])))
    merged: dict[tuple[int, ...], np.ndarray] = {}
    for term in terms:
        merged[term.shape] = merged[term.shape] + term if term.shape in merged else term
    return [term for term in merged.values() if np.any(term)]


def factored(value: np.ndarray) -> list[np.ndarray]:
    """[windows, heads, T, T] as a mask per window plus a bias per head, where it is such a sum.

    torch hands over the sum of Swin's window mask and relative position bias; kept apart they are windows +
    heads matrices instead of windows * heads.
    """
    windows, heads = value.shape[:2]
    if windows == 1 or heads == 1:
        return [value]
    if (value == value[:1]).all():
        return [value[:1]]
    bias = value.max(axis=0, keepdims=True)
    mask = (value - bias)[:, :1]
    rounded = np.rint(mask)
    if np.abs(mask - rounded).max() < 1e-3:
        mask = rounded
    if np.abs(mask + bias - value).max() > 1e-4:
        return [value]
    return [bias, mask]


def canonicalize_attention() -> tvm.transform.Pass:
    """The pass over ``main``."""
    return rewriting_pass(CanonicalizeAttention, "CanonicalizeAttention")
