"""Budgets of mixed precision: what a choice of widths may cost, and what it costs."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import tvm

from tvm_vitq.errors import VitqError
from tvm_vitq.ops import attrs, op_name, shape_of
from tvm_vitq.relax_passes.sites import bindings
from tvm_vitq.site_rules import SiteSpec

FORMS = '"4.0bit" (per weight), "0.5x" (size relative to 8 bits), "6MB", "0.35x bops" (relative to w8a8)'

BYTES = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}

KINDS = ("bits", "size", "bytes", "bops")


@dataclass(frozen=True)
class Budget:
    """At most `limit` of `kind`.

    kind : "bits", average width of all weights of matmuls; "size", of their codes relative to 8 bits each;
        "bytes", of their codes, packed; "bops", bit operations relative to w8a8.

    Bit operations of a matmul are its multiply-accumulates times the widths of both operands: what hardware
    whose speed grows with narrower operands would save. The kernels of this package run every width at the
    speed of bytes, so there is no budget of milliseconds. Compiled libraries store a byte per weight as well:
    sizes are those of packed codes.
    """

    kind: str
    limit: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise VitqError(
                "unknown kind of budget", where="budget", got=self.kind, expected=", ".join(KINDS)
            )
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise VitqError("a budget must be positive", where="budget", got=self.limit)

    def __str__(self) -> str:
        return self.text(self.limit)

    def text(self, amount: float) -> str:
        """An amount in the unit of this budget, as a user writes it."""
        if self.kind == "bytes":
            return f"{amount / 1e6:.4g}MB"
        return f"{amount:.4g}" + {"bits": "bit", "size": "x", "bops": "x bops"}[self.kind]


def parse_budget(budget: str | Budget) -> Budget:
    """A budget from what a user writes, see `FORMS`; VitqError for anything else."""
    if isinstance(budget, Budget):
        return budget
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-zA-Z]+)(?:\s*([a-zA-Z]+))?\s*", str(budget))
    number, unit = (float(found[1]), " ".join(filter(None, found.groups()[1:]))) if found else (0.0, "")
    if unit in ("ms", "s", "us"):
        raise VitqError(
            "there is no budget of time",
            where="budget",
            got=budget,
            expected=FORMS,
            fix='kernels run every width at the speed of 8 bits; give bit operations, "0.35x bops"',
        )
    if unit in BYTES:
        return Budget("bytes", number * BYTES[unit])
    kinds = {"bit": "bits", "bits": "bits", "x": "size", "x bops": "bops"}
    if unit not in kinds:
        raise VitqError("unknown budget", where="budget", got=budget, expected=FORMS)
    return Budget(kinds[unit], number)


@dataclass(frozen=True)
class Matmul:
    """One product of two operands: names of their sites, multiply-accumulates, weights that it holds."""

    left: str
    right: str
    macs: int
    weights: int = 0


def matmuls(mod: tvm.IRModule) -> dict[str, list[Matmul]]:
    """The products of every linear and attention layer of a canonical graph, by layer."""
    found: dict[str, list[Matmul]] = {}
    for binding in bindings(mod):
        call, op = binding.value, op_name(binding.value)
        if op == "vitq.linear":
            layer, (rows, columns) = attrs(call)["site"], shape_of(call.args[1])
            macs = math.prod(shape_of(call)) * columns
            found[layer] = [Matmul(f"{layer}.input", f"{layer}.weight", macs, rows * columns)]
        elif op == "vitq.attention":
            layer = attrs(call)["site"]
            batch, heads, queries, depth = shape_of(call.args[0])
            keys, width = shape_of(call.args[2])[2:]
            pairs = batch * heads * queries * keys
            found[layer] = [
                Matmul(f"{layer}.q", f"{layer}.k", pairs * depth),
                Matmul(f"{layer}.probs", f"{layer}.v", pairs * width),
            ]
    return found


def cost(kind: str, products: list[Matmul], specs: Mapping[str, SiteSpec]) -> int:
    """What some products cost with these widths: bits of weights, or bit operations."""
    if kind == "bops":
        return sum(p.macs * specs[p.left].bits * specs[p.right].bits for p in products)
    return sum(p.weights * specs[p.right].bits for p in products if p.weights)


def unit_cost(kind: str, products: list[Matmul]) -> float:
    """`cost` of one unit of a budget over all products."""
    if kind == "bops":
        return 64.0 * sum(p.macs for p in products)
    weights = sum(p.weights for p in products)
    return {"bits": float(weights), "size": 8.0 * weights, "bytes": 8.0}[kind]
