"""A sample of what every matmul of the float model sees, to measure its output's error by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tvm_vitq.calibrate.executor import Hooks
from tvm_vitq.calibrate.job import CHUNK, Job
from tvm_vitq.ops import attrs, op_name
from tvm_vitq.relax_passes.sites import OPERANDS, bindings

ROWS = 512
"""Rows kept per linear layer: tokens drawn from all images."""

ATTENTION_VALUES = 2**20
"""Probabilities kept per attention layer, in whole images (windows), at least one."""


@dataclass
class LinearSample:
    """x : [R, K];  weight : [N, K];  importance : [R, N] of the squared error of each output, or None."""

    x: Tensor
    weight: Tensor
    importance: Tensor | None

    def __post_init__(self) -> None:
        self.output = self.x @ self.weight.T

    def error(self, x: Tensor, weight: Tensor) -> Tensor:
        """Mean squared error [N] of each output channel with these operands."""
        return _weighted_square(x @ weight.T - self.output, self.importance).mean(0)


@dataclass
class AttentionSample:
    """q, k, v : [n, H, T, D];  probs : [n, H, T, keys];  of_scores, of_output : importance of the squared
    errors of ``q @ k`` and of ``probs @ v``, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    probs: Tensor
    of_scores: Tensor | None
    of_output: Tensor | None

    def __post_init__(self) -> None:
        self.scores, self.output = self.q @ self.k.mT, self.probs @ self.v

    def score_error(self, q: Tensor, k: Tensor) -> Tensor:
        """Mean squared error [H] of each head's scores with these operands."""
        return _weighted_square(q @ k.mT - self.scores, self.of_scores).mean((0, 2, 3))

    def output_error(self, probs: Tensor, v: Tensor) -> Tensor:
        """Mean squared error [H] of each head's result with these operands."""
        return _weighted_square(probs @ v - self.output, self.of_output).mean((0, 2, 3))


def _weighted_square(difference: Tensor, importance: Tensor | None) -> Tensor:
    square = difference.square_()
    return square if importance is None else square.mul_(importance)


@dataclass
class Samples:
    """By layer; and, for every input that has a quantizer, the linear layers that read it."""

    linear: dict[str, LinearSample] = field(default_factory=dict)
    attention: dict[str, AttentionSample] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)

    def inputs(self) -> Iterator[tuple[str, list[LinearSample]]]:
        """Inputs that have a quantizer, with the layers that read them."""
        for site, layers in self.readers.items():
            yield site, [self.linear[layer] for layer in layers]


def record(job: Job, images: int = 32, fisher: bool = False, rows: int = ROWS) -> Samples:
    """Run some images through the float model as it is now and keep a sample of all operands.

    Parameters
    ----------
    fisher : whether outputs count by their importance, the squared gradient of the log-likelihood of a label
        drawn from the model's own prediction. Its mean over images is the diagonal of the Fisher matrix, the
        Hessian of the divergence between the float and the quantized model's predictions.
    rows : kept per linear layer.
    """
    recorder = _Recorder(job, rows, min(images, len(job.images)))
    executor = job.executor
    chunk = max(CHUNK // executor.batch, 1) * executor.batch
    with torch.set_grad_enabled(fisher):
        for part in job.progress(job.images[:images].split(chunk), "sample"):
            logits = executor.run(part.clone().requires_grad_(fisher), recorder)
            if fisher:
                prediction = logits.detach().softmax(-1).flatten(0, -2)
                drawn = torch.multinomial(prediction, 1, generator=job.generator)
                logits.log_softmax(-1).flatten(0, -2).gather(-1, drawn).sum().backward()
    return recorder.samples(fisher)


class _Recorder(Hooks):
    def __init__(self, job: Job, rows: int, images: int) -> None:
        self.job, self.rows, self.images = job, rows, images
        self.calls = {b.var.name: b.value for b in bindings(job.mod) if op_name(b.value) in OPERANDS}
        self.operands: dict[str, Tensor] = {}
        self.index: dict[str, Tensor] = {}
        self.kept: dict[str, list[dict[str, Tensor]]] = {}

    def quantize(self, site: str, x: Tensor) -> Tensor:
        self.operands[site] = x
        if site.endswith(".input"):  # a row is a token; all layers that read it keep the same ones
            self.index[site] = self._draw(self.rows, x.shape[:-1].numel(), len(x))
        return x

    def probs(self, site: str, probs: Tensor) -> Tensor:
        self.operands[site] = probs
        wanted = max(1, ATTENTION_VALUES // probs[0, 0].numel())
        self.index[site] = self._draw(wanted, probs.shape[:2].numel(), len(probs))
        return probs

    def _draw(self, wanted: int, count: int, batches: int) -> Tensor:
        """Indices of the share of `wanted` that `count` rows of some batches of images have to give."""
        images = batches * self.job.executor.batch
        drawn = max(1, wanted * images // max(self.images, images))
        return torch.randperm(count, generator=self.job.generator)[:drawn]

    def value(self, name: str, x: Tensor) -> Tensor:
        if name not in self.calls:
            return x
        call = self.calls[name]
        layer, linear = attrs(call)["site"], op_name(call) == "vitq.linear"
        roles, last = (("input",), -2) if linear else (("q", "k", "v", "probs"), 1)
        owners = {role: self._owner(f"{layer}.{role}") for role in roles}
        index = self.index[owners[roles[-1]]]
        kept = {role: self.operands[o].detach().flatten(0, last)[index] for role, o in owners.items()}
        self.kept.setdefault(layer, []).append(kept)
        if x.requires_grad:
            x.register_hook(lambda g: kept.update(gradient=g.flatten(0, last)[index]))
        return x

    def _owner(self, site: str) -> str:
        return self.job.aliases.get(site, site)

    def samples(self, fisher: bool) -> Samples:
        """All parts put together."""
        found = Samples()
        for layer, parts in self.kept.items():
            whole = {role: torch.cat([part[role] for part in parts]) for role in parts[0]}
            if "input" in whole:
                importance = whole["gradient"].square() if fisher else None
                found.linear[layer] = LinearSample(whole["input"], self.job.weight(layer), importance)
                found.readers.setdefault(self._owner(f"{layer}.input"), []).append(layer)
            else:
                softmax = self.job.sites[f"{layer}.probs"].kind == "softmax"
                found.attention[layer] = _attention(whole, softmax)
        return found


def _attention(whole: dict[str, Tensor], softmax: bool) -> AttentionSample:
    q, k, v, probs = (whole[role] for role in ("q", "k", "v", "probs"))
    if "gradient" not in whole:
        return AttentionSample(q, k, v, probs, None, None)
    back = whole["gradient"] @ v.mT
    if softmax:
        scores = probs * (back - (back * probs).sum(-1, keepdim=True))
    else:
        scores = probs * (1 - probs) * back
    return AttentionSample(q, k, v, probs, scores.square(), whole["gradient"].square())
