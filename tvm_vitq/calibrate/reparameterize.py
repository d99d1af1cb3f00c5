"""Folds per-channel quantizer scales of LayerNorm outputs into gamma, beta and the following linear layers.

Channels of a LayerNorm output differ in range by more than ten times, so one scale for all wastes most codes
of most channels. RepQ-ViT's algebra gives each channel c its own scale s_c and zero point z_c and then moves
the differences where they cost nothing. With the common scale ``s~ = mean(s)`` and zero point ``z~``, ``r_c
= s_c / s~`` and ``d_c = s~ (z~ - z_c)``:

    gamma' = gamma / r        beta' = beta / r - d          so the LayerNorm gives  a' = a / r - d
    W'[:, c] = W[:, c] r_c    bias' = bias + W' d           so  W' a' + bias' = W a + bias

and ``a' / s~ + z~ = a / s + z``: the same codes. z~ is a whole number, else codes would shift by a fraction;
any whole z~ gives the same function, so it is that of z, rounded and limited to the codes. Any s~ does as
well, as long as weights have one scale for all input channels of a row: W' scales with it as a whole.
Methods that differ here (the median of DopQ-ViT, a searched s~) differ in name, see `TARGETS`.

`fit_channels` makes the quantizers per channel, from ranges by any method, and `fold_quantizers` folds them;
a model may be trained in between (`staged`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tvm import relax

from tvm_vitq.calibrate.job import Job
from tvm_vitq.calibrate.observe import View, observe
from tvm_vitq.calibrate.searches import RangeRule, quantizer_numbers
from tvm_vitq.calibrate.statistics import Summary
from tvm_vitq.errors import VitqError
from tvm_vitq.graph import channels_stay, data_operands, is_movement
from tvm_vitq.ops import attrs, op_name, shape_of
from tvm_vitq.plan import SiteQuantizer
from tvm_vitq.relax_passes.sites import bindings, readers

Range = tuple[torch.Tensor, torch.Tensor]
"""Lower and upper ends, [C] each."""

SMALLEST_RATIO = 2.0**-10
"""Channels narrower than this share of the mean are scaled as if they were that wide: gamma / r stays
moderate, and such a channel has no influence that finer steps could keep."""

TARGETS: dict[str, Callable[[np.ndarray], Any]] = {"mean": np.mean, "median": np.median}
"""What s~ and z~ are of s and z: RepQ-ViT's mean, DopQ-ViT's median."""

FINEST_STEP = 2.0**-9
"""Smallest step of a channel in units of |gamma|, the channel's standard deviation over all normalized
inputs. A channel that hardly changes over the calibration images (a class token, say) would otherwise get a
step so fine that the integer LayerNorm has no headroom for it."""


@dataclass
class Fold:
    """A LayerNorm whose output only linear layers read, behind movements that keep channels in place.

    layer : of the LayerNorm; variables : its output, the means and moved copies of it, each with the name of
        a tensor that holds its values by channel: itself, or what it is a copy of.
    sites : the vitq.quantize sites on the way; linears : the layers behind them.
    """

    layer: str
    variables: dict[str, str] = field(default_factory=dict)
    sites: list[str] = field(default_factory=list)
    linears: list[str] = field(default_factory=list)


class _Declined(Exception):
    pass


def find_folds(job: Job) -> list[Fold]:
    """All LayerNorms of the annotated module that can be folded; the others are noted with the reason."""
    reading = readers(job.mod)
    folds = []
    for binding in bindings(job.mod):
        if op_name(binding.value) != "vitq.layer_norm":
            continue
        layer = attrs(binding.value)["site"]
        fold = Fold(layer)
        try:
            _follow(binding.var, (), binding.var, reading, job.mod["main"].body.body, fold)
            _check_sites(job, fold)
            folds.append(fold)
        except _Declined as reason:
            job.notes[layer] = f"per-channel scales not folded: {reason}"
    return folds


def _follow(
    variable: relax.Var,
    path: tuple[relax.Call, ...],
    origin: relax.Var,
    reading: dict[str, list[relax.VarBinding]],
    result: relax.Expr,
    fold: Fold,
) -> None:
    """Collect in `fold` what reads `variable`, which the movements `path` made from `origin`."""
    fold.variables[variable.name] = (variable if channels_stay(path, shape_of(origin)) else origin).name
    if variable.same_as(result):
        raise _Declined("it is the model's result")
    for binding in reading.get(variable.name, []):
        call, op = binding.value, op_name(binding.value)
        if isinstance(call, relax.Var):
            _follow(binding.var, path, origin, reading, result, fold)
        elif is_movement(call) and len(data_operands(call)) == 1:
            _follow(binding.var, (*path, call), origin, reading, result, fold)
        elif (
            op == "vitq.mean" and attrs(call)["axis"] % len(shape_of(variable)) != len(shape_of(variable)) - 1
        ):
            _require_in_place(path, shape_of(origin), binding.var.name)
            _follow(binding.var, (), binding.var, reading, result, fold)
        elif op == "vitq.quantize":
            _require_in_place(path, shape_of(origin), binding.var.name)
            fold.sites.append(attrs(call)["site"])
            fold.variables[binding.var.name] = fold.variables[variable.name]
            for reader in reading.get(binding.var.name, []):
                if op_name(reader.value) != "vitq.linear":
                    raise _Declined(f"{op_name(reader.value)} reads its quantized output")
                fold.linears.append(attrs(reader.value)["site"])
        else:
            raise _Declined(f"{op} reads its output ({binding.var.name})")


def _require_in_place(path: tuple[relax.Call, ...], shape: list[int], variable: str) -> None:
    if not channels_stay(path, shape):
        raise _Declined(f"its channels are no longer the last axis at {variable}")


def _check_sites(job: Job, fold: Fold) -> None:
    if not fold.linears:
        raise _Declined("no linear layer reads it")
    for site in fold.sites:
        if job.specs[site].granularity != "tensor":
            raise _Declined(f"{site} is quantized per {job.specs[site].granularity}")
    if len({job.specs[site].bits for site in fold.sites}) > 1:
        raise _Declined("the linear layers behind it want different bits")


def observe_with_folds(
    job: Job, folds: list[Fold], views: dict[str, View], tail: float
) -> dict[str, Summary]:
    """`observe` with what folding needs: folded sites per channel, ranges per channel of what
    will change.
    """
    wanted = views | {site: View("channel", -1) for fold in folds for site in fold.sites}
    return observe(job, wanted, tail, {origin for fold in folds for origin in fold.variables.values()})


def channel_ranges(
    job: Job, folds: list[Fold], summaries: dict[str, Summary], rule: RangeRule
) -> dict[str, Range]:
    """The range of each channel by LayerNorm: the widest of what the rule gives at its sites."""
    found = {}
    for fold in folds:
        bits = job.specs[fold.sites[0]].bits
        lows, highs = zip(*(rule(summaries[site], bits, False) for site in fold.sites), strict=True)
        found[fold.layer] = torch.stack(lows).amin(0), torch.stack(highs).amax(0)
    return found


def fit_channels(job: Job, folds: list[Fold], ranges: Mapping[str, Range]) -> None:
    """Quantizers with numbers per channel for all sites of folds, which the integer program cannot have but
    `fold_quantizers` removes. A constant output gets one for all channels, and a note.
    """
    for fold in folds:
        bits = job.specs[fold.sites[0]].bits
        low, high = (end.double().numpy() for end in ranges[fold.layer])
        gamma = job.executor.constants[f"{fold.layer}.gamma"].double().numpy()
        step = np.maximum((high - low) / (2**bits - 1), FINEST_STEP * np.abs(gamma))
        if step.max() > 0:
            step = np.maximum(step, SMALLEST_RATIO * step.mean())
            zero = np.rint(-low / step).astype(np.int64)
            made = SiteQuantizer(bits, step.tolist(), zero.tolist(), granularity="channel", axis=-1)
        else:
            job.notes[fold.layer] = "per-channel scales not folded: its output is constant"
            numbers = quantizer_numbers(torch.from_numpy(low[:1]), torch.from_numpy(high[:1]), bits, False)
            made = SiteQuantizer(bits, numbers[0].tolist(), numbers[1].tolist())
        job.quantizers |= dict.fromkeys(fold.sites, made)


def fold_quantizers(job: Job, folds: list[Fold], target: str = "mean") -> None:
    """Replace the quantizers of `fit_channels` by one for all channels that gives the same codes: changes
    the module's constants, the sites' quantizers and ranges.
    """
    if target not in TARGETS:
        raise VitqError("unknown target of scales", where="target", got=target, expected=", ".join(TARGETS))
    changed: dict[str, np.ndarray] = {}
    for fold in folds:
        if job.quantizers[fold.sites[0]].granularity == "channel":
            _apply(job, fold, target, changed)
    if changed:
        job.replace(changed)


def _apply(job: Job, fold: Fold, target: str, changed: dict[str, np.ndarray]) -> None:
    quantizer = job.quantizers[fold.sites[0]]
    step, zero = np.array(quantizer.scale), np.array(quantizer.zero_point, np.float64)
    middle = TARGETS[target]
    common = float(np.float32(middle(step)))
    common_zero = int(np.clip(np.rint(middle(zero)), 0, quantizer.qmax))
    changed |= _moved(job, fold, step / common, common * (common_zero - zero))
    for site in fold.sites:
        job.quantizers[site] = SiteQuantizer(quantizer.bits, [common], [common_zero])


def limit_channels(job: Job, folds: list[Fold], limit: float) -> None:
    """Divide LayerNorm channels whose calibrated magnitude exceeds `limit` by the power of two that brings
    it below, and multiply the weights that read them: changes the module's constants and ranges.

    Needs ``job.channel_ranges`` of `observe_with_folds`.
    """
    changed: dict[str, np.ndarray] = {}
    for fold in folds:
        origins = [job.channel_ranges[origin] for origin in fold.variables.values()]
        largest = torch.stack([end.abs() for ends in origins for end in ends]).amax(0).double().numpy()
        ratio = np.exp2(np.ceil(np.log2(np.maximum(largest / limit, 1.0))))
        if ratio.max() > 1:
            changed |= _moved(job, fold, ratio, np.zeros_like(ratio))
    if changed:
        job.replace(changed)


def _moved(job: Job, fold: Fold, ratio: np.ndarray, shift: np.ndarray) -> dict[str, np.ndarray]:
    """Constants for which the LayerNorm gives ``a / ratio - shift`` and the layers behind it the same;
    changes ranges.
    """
    constants = {n: v.double().numpy() for n, v in job.executor.constants.items() if _of(fold, n)}
    new = {f"{fold.layer}.gamma": constants[f"{fold.layer}.gamma"] / ratio}
    new[f"{fold.layer}.beta"] = constants[f"{fold.layer}.beta"] / ratio - shift
    for linear in dict.fromkeys(fold.linears):
        weight = constants[f"{linear}.weight"] * ratio
        new[f"{linear}.weight"] = weight
        new[f"{linear}.bias"] = constants[f"{linear}.bias"] + weight @ shift
    for variable, origin in fold.variables.items():
        ends = [end.double().numpy() / ratio - shift for end in job.channel_ranges[origin]]
        job.ranges[variable] = float(np.abs(ends).max())
    return {name: value.astype(np.float32) for name, value in new.items()}


def _of(fold: Fold, constant: str) -> bool:
    return constant.rpartition(".")[0] in {fold.layer, *fold.linears}
