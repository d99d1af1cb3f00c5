"""Plain Relax to the canonical float graph: the passes, in order."""

from __future__ import annotations

from collections import Counter

import tvm
from tvm import relax

from tvm_vitq.ops import op_name
from tvm_vitq.relax_passes.canonicalize_activations import canonicalize_activations
from tvm_vitq.relax_passes.canonicalize_arithmetic import canonicalize_arithmetic
from tvm_vitq.relax_passes.canonicalize_attention import canonicalize_attention
from tvm_vitq.relax_passes.canonicalize_batch_norms import canonicalize_batch_norms
from tvm_vitq.relax_passes.canonicalize_convolutions import canonicalize_convolutions
from tvm_vitq.relax_passes.canonicalize_layer_norms import canonicalize_layer_norms
from tvm_vitq.relax_passes.canonicalize_linears import canonicalize_linears
from tvm_vitq.relax_passes.canonicalize_pooling import canonicalize_pooling
from tvm_vitq.relax_passes.canonicalize_views import canonicalize_views
from tvm_vitq.relax_passes.fold_affine import fold_affine
from tvm_vitq.relax_passes.move_permutations import move_permutations
from tvm_vitq.relax_passes.name_bindings import name_bindings

CANONICAL = frozenset(
    {
        "vitq.linear",
        "vitq.layer_norm",
        "vitq.activation",
        "vitq.attention",
        "vitq.mean",
        "relax.reshape",
        "relax.permute_dims",
        "relax.strided_slice",
        "relax.concat",
        "relax.take",
        "relax.broadcast_to",
        "relax.add",
        "relax.multiply",
    }
)
"""Operators that quantization knows; anything else stays in float and is reported."""


def canonicalization() -> list[tvm.transform.Pass]:
    """The passes from an importer's output to the canonical graph, in order.

    Operators are recognized first, then attention, which needs the views around it in normal form; the rest
    moves and folds until the pieces that belong together are adjacent, and a second round uses what the
    first one opened up.
    """
    settle = [
        canonicalize_views(),
        move_permutations(),
        canonicalize_views(),
        canonicalize_arithmetic(),
        fold_affine(),
    ]
    return [
        canonicalize_batch_norms(),
        canonicalize_views(),
        canonicalize_arithmetic(),
        canonicalize_layer_norms(),
        canonicalize_activations(),
        canonicalize_convolutions(),
        canonicalize_linears(),
        canonicalize_attention(),
        canonicalize_pooling(),
        *settle * 3,
        canonicalize_views(),
        name_bindings(),
    ]


def canonicalize(mod: tvm.IRModule) -> tvm.IRModule:
    """Run `canonicalization` on an imported module."""
    for step in canonicalization():
        mod = step(mod)
    return mod


def bindings_of(mod: tvm.IRModule) -> list[relax.VarBinding]:
    """The bindings of ``main``'s dataflow block, in order."""
    return [binding for block in mod["main"].body.blocks for binding in block.bindings]


def float_islands(mod: tvm.IRModule) -> Counter[str]:
    """Operators outside the canonical vocabulary and how often each occurs."""
    found = Counter(op_name(b.value) or type(b.value).__name__ for b in bindings_of(mod))
    return Counter({name: count for name, count in found.items() if name not in CANONICAL})
