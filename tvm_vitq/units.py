"""Units of the wide tensors: which tensors share one, and how large their values get."""

from __future__ import annotations

import numpy as np
from tvm import relax

from tvm_vitq.graph import Dataflow, data_operands, is_constant, is_movement, value_of
from tvm_vitq.ops import op_name
from tvm_vitq.plan import QuantPlan

SAME_UNIT = ("relax.add", "vitq.mean")
"""Operators whose operands and result are integers of one unit; data movement is the other such kind."""


def wide_ranges(graph: Dataflow, plan: QuantPlan) -> dict[relax.Var, float]:
    """Largest calibrated magnitude of each variable's unit class: variables connected by additions, means and
    data movement share one, so that adding them needs no shift and rounds nothing. A class without a range is
    left out."""
    parent: dict[relax.Var, relax.Var] = {v: v for v in graph.uses}

    def root(v: relax.Var) -> relax.Var:
        while not parent[v].same_as(v):
            parent[v] = parent[parent[v]]
            v = parent[v]
        return v

    largest = {v: plan.ranges[v.name] for v in graph.uses if v.name in plan.ranges}
    for binding in graph.bindings:
        value = binding.value
        if isinstance(value, relax.Var):
            parent[root(value)] = root(binding.var)
        elif is_movement(value) or op_name(value) in SAME_UNIT:
            for operand in data_operands(value):
                if isinstance(operand, relax.Var):
                    parent[root(operand)] = root(binding.var)
                elif is_constant(operand):
                    reach = float(np.abs(value_of(operand)).max())
                    largest[binding.var] = max(largest.get(binding.var, 0.0), reach)
    merged: dict[relax.Var, float] = {}
    for v, value in largest.items():
        merged[root(v)] = max(merged.get(root(v), 0.0), value)
    return {v: merged[root(v)] for v in graph.uses if root(v) in merged}
