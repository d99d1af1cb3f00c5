"""Schedules every function that is not a kernel already: fused elementwise operators, data movement, float
islands.
"""

from __future__ import annotations

import tvm

from tvm_vitq.relax_passes.lower_kernels import KERNEL_ATTRIBUTE
from tvm_vitq.schedules.default_rule import schedule_default
from tvm_vitq.schedules.window_rule import schedule_window


def schedule_rest(mod: tvm.IRModule) -> tvm.IRModule:
    """Replace unscheduled functions by scheduled ones; nothing runs as a plain loop nest."""
    functions, target = {}, tvm.target.Target.current(allow_none=True)
    for name, function in mod.functions.items():
        if isinstance(function, tvm.tirx.PrimFunc) and KERNEL_ATTRIBUTE not in function.attrs:
            function = schedule_window(function, target) or schedule_default(function)
        functions[name] = function
    return tvm.IRModule(functions, attrs=mod.attrs)
