"""Rotates channels by orthogonal matrices that are absorbed in the weights: the same function, without
outlier channels (QuaRot, SpinQuant, GLF-Q).

Residual stream. Every linear layer, position embedding and class token that writes it is multiplied by Q
from behind, every linear layer that reads it by Q^T from the front. LayerNorms in between are no obstacle
once their gamma and beta are moved into the linear layers behind them, and if Q maps ones to ones: then
``xQ`` has the mean and the variance of x, so ``LN(xQ) = LN(x) Q``. Papers that want any Q replace LayerNorm
by RMSNorm on a centered stream; here the integer LayerNorm stays as it is.

Heads. Scores do not change under ``q R, k R``, nor does the projection's result under ``v R`` with R^T in its
weight: each head has its own R for either.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from tvm import relax

from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.orthogonal import hadamard, keeping_ones
from tvm_vitq.calibrate.streams import find_streams
from tvm_vitq.graph import Dataflow, Leaf, columns_read, data_operands, is_movement, move
from tvm_vitq.ops import attrs, op_name, shape_of
from tvm_vitq.relax_passes.sites import OPERANDS


class _Declined(Exception):
    pass


class _Constants:
    """Constants in float64 that replace those of the job in the end."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.changed: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.changed[name] if name in self.changed else self.job.executor.constants[name].double()

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.changed[name] = value

    def write(self) -> None:
        if self.changed:
            self.job.replace({name: value.float().numpy() for name, value in self.changed.items()})


def rotate_streams(job: Job) -> set[str]:
    """Rotate every residual stream that allows it; the others are noted with the reason.

    Changes constants; call it before anything is observed.

    Returns
    -------
    The LayerNorms inside rotated streams, which have gamma 1 and beta 0 now.
    """
    generator = torch.Generator().manual_seed(job.seed)
    constants = _Constants(job)
    rotated: set[str] = set()
    for stream in find_streams(job.mod):
        if stream.declined:
            job.notes[next(iter(stream.norms))] = f"residual stream not rotated: {stream.declined}"
            continue
        for norm, readers in stream.norms.items():
            _move_affine(constants, norm, readers)
        matrix = keeping_ones(stream.width, generator)
        for layer in stream.writers:
            constants[f"{layer}.weight"] = matrix.T @ constants[f"{layer}.weight"]
            constants[f"{layer}.bias"] = constants[f"{layer}.bias"] @ matrix
        for name in (*stream.constants, *(f"{layer}.weight" for layer in stream.readers)):
            constants[name] = constants[name] @ matrix
        rotated |= set(stream.norms)
    constants.write()
    return rotated


def _move_affine(constants: _Constants, norm: str, readers: list[str]) -> None:
    """Move gamma and beta of a LayerNorm into the linear layers behind it."""
    gamma, beta = constants[f"{norm}.gamma"], constants[f"{norm}.beta"]
    for layer in readers:
        weight = constants[f"{layer}.weight"]
        constants[f"{layer}.bias"] = constants[f"{layer}.bias"] + weight @ beta
        constants[f"{layer}.weight"] = weight * gamma
    constants[f"{norm}.gamma"] = torch.ones_like(gamma)
    constants[f"{norm}.beta"] = torch.zeros_like(beta)


def rotate_heads(job: Job) -> None:
    """Rotate q with k, and v with the projection, in every attention layer that allows it; the others are
    noted with the reason.

    Changes constants; call it before anything is observed.
    """
    generator = torch.Generator().manual_seed(job.seed + 1)
    constants = _Constants(job)
    flow = Dataflow(job.mod)
    for binding in flow.bindings:
        if op_name(binding.value) != "vitq.attention":
            continue
        layer = attrs(binding.value)["site"]
        for roles in (("q", "k"), ("v",)):
            try:
                made = [_made_by(flow, binding, role) for role in roles]
                read = _read_by(flow, binding) if roles == ("v",) else {}
            except _Declined as reason:
                known = f"{job.notes[layer]}; " if layer in job.notes else ""
                job.notes[layer] = f"{known}{' and '.join(roles)} not rotated: {reason}"
                continue
            heads, width = made[0][1].shape
            for head in range(heads):
                matrix = hadamard(width, generator)
                for linear, channels in made:
                    for name in (f"{linear}.weight", f"{linear}.bias"):
                        value = constants[name].clone()
                        value[channels[head]] = matrix.T @ value[channels[head]]
                        constants[name] = value
                for linear, channels in read.items():
                    value = constants[f"{linear}.weight"].clone()
                    value[:, channels[head]] = value[:, channels[head]] @ matrix
                    constants[f"{linear}.weight"] = value
    constants.write()


def _made_by(flow: Dataflow, attention: relax.VarBinding, role: str) -> tuple[str, Tensor]:
    """The linear layer that makes an operand of attention, and its output channels [heads, width].

    Each of its channels must go to one place in this attention and nowhere else.
    """
    value = attention.value.args[OPERANDS["vitq.attention"].index(role)]
    path: list[relax.Call] = []
    made = flow.definition.get(value)
    while made is not None and op_name(made) != "vitq.linear":
        if is_movement(made) and len(data_operands(made)) == 1:
            path.insert(0, made)
        elif op_name(made) != "vitq.quantize" and not isinstance(made, relax.Var):
            raise _Declined(f"{op_name(made)} makes {role}")
        value = made if isinstance(made, relax.Var) else made.args[0]
        made = flow.definition.get(value)
    if made is None:
        raise _Declined(f"no linear layer makes {role}")
    linear = attrs(made)["site"]
    read = 0
    for leaf in flow.leaves(value):
        behind = _quantized_readers(flow, leaf)
        if not behind or any(not b.var.same_as(attention.var) for b in behind):
            raise _Declined(f"{linear} is read by more than this layer")
        read += columns_read(leaf.path, shape_of(value)).size
    columns = columns_read(tuple(path), shape_of(value))
    heads = columns[:1, :, :1]
    if not bool((columns == heads).all()):
        raise _Declined(f"channels of {linear} are mixed with tokens")
    if read != np.prod(shape_of(value)) or len(np.unique(heads)) != heads.size:
        raise _Declined(f"channels of {linear} are read more than once")
    return linear, torch.from_numpy(heads[0, :, 0].astype(np.int64))


def _quantized_readers(flow: Dataflow, leaf: Leaf) -> list[relax.VarBinding]:
    """What reads a value behind its quantizer; nothing where it has none."""
    if leaf.consumer is None or op_name(leaf.consumer.value) != "vitq.quantize":
        return []
    return flow.uses[leaf.consumer.var]


def _read_by(flow: Dataflow, attention: relax.VarBinding) -> dict[str, Tensor]:
    """The linear layers that read the result of attention, with the input channels [heads, width] at which
    they do.
    """
    shape = shape_of(attention.var)
    heads, width = shape[1], shape[3]
    source = np.broadcast_to(np.arange(heads * width).reshape(1, heads, 1, width), shape)
    found: dict[str, Tensor] = {}
    for leaf in flow.leaves(attention.var):
        layers = _quantized_readers(flow, leaf)
        if not layers or any(op_name(b.value) != "vitq.linear" for b in layers):
            raise _Declined("more than linear layers reads its result")
        columns = source
        for step in leaf.path:
            columns = move(step, columns)
        row = columns.reshape(-1, columns.shape[-1])[0]
        if not bool((columns == row).all()) or sorted(row) != list(range(heads * width)):
            raise _Declined("its result is not read head by head")
        for binding in layers:
            found[attrs(binding.value)["site"]] = torch.from_numpy(np.argsort(row).reshape(heads, width))
    return found
