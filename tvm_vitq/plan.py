"""The quantization plan: every quantizer of a model as plain data, read from and written to JSON.

A plan holds no tensors and needs neither torch nor TVM. `SiteQuantizer` says how one operand of a matmul is
quantized; `QuantPlan` holds one per site, the observed ranges of all other tensors, and where the numbers
came from.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.files import written_whole
from tvm_vitq.site_statistics import SiteStatistics

FORMAT = "tvm-vitq plan"
FORMAT_VERSION = 1

MIN_BITS, MAX_BITS = 2, 8
GRANULARITIES = ("tensor", "token", "channel", "group", "head", "instance")
REQUANTIZE_KINDS = ("multiply", "shift")


def check_bits(bits: object, where: object) -> int:
    """`bits` as an int; VitqError outside MIN_BITS..MAX_BITS or if it is not a whole number."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not MIN_BITS <= bits <= MAX_BITS:
        raise VitqError(
            "unsupported bit width",
            where=where,
            got=bits,
            expected=f"a whole number from {MIN_BITS} to {MAX_BITS}",
        )
    return bits


@dataclass(frozen=True)
class SiteQuantizer:
    """Quantizer of one site: the operand of one matmul.

    Parameters
    ----------
    codec : name in ``tvm_vitq.quantizers.CODECS``; "uniform" decodes ``scale * (q - zero_point)``.
    bits : width of the codes, 2 to 8.
    signed : False: codes ``0 .. 2**bits - 1``; True: ``-(2**(bits-1) - 1) .. 2**(bits-1) - 1`` (weights).
    granularity : which elements share a scale. "tensor": all; "token", "channel", "head": those of one index
        of `axis`; "group": `group_size` consecutive elements of the last axis, of one index of `axis` if
        that is set; "instance": the channels of an image that choose the same scale at run time.
    axis : the axis of "token" (-2), "head" (-3) and "channel" (0 of a weight, -1 of an activation). Negative
        for activations, so that it holds whatever the batch axes in front.
    group_size : elements per group of granularity "group".
    scale, zero_point : one entry per set of elements that share them, in row-major order; scales are
        positive and finite, zero points whole.
    dynamic : whether scales are computed at run time from the input; then `scale` and `zero_point` may be
        empty.
    params : further numbers of the codec, by name.
    """

    bits: int
    scale: list[float]
    zero_point: list[int]
    codec: str = "uniform"
    signed: bool = False
    granularity: str = "tensor"
    axis: int | None = None
    group_size: int | None = None
    dynamic: bool = False
    params: dict[str, Any] = field(default_factory=dict)

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1) - 1) if self.signed else 0

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1

    def check(self, where: str) -> None:
        """VitqError naming `where` if a field is outside its range."""
        check_bits(self.bits, where)
        if self.group_size is not None and self.group_size < 1:
            raise VitqError("group_size must be 1 or more", where=where, got=self.group_size)
        if self.granularity not in GRANULARITIES:
            raise VitqError(
                "unknown granularity", where=where, got=self.granularity, expected=", ".join(GRANULARITIES)
            )
        if (self.granularity == "group") != (self.group_size is not None):
            raise VitqError(
                "group_size belongs to granularity 'group' and only to it", where=where, got=self.group_size
            )
        if self.granularity in ("token", "channel", "head") and self.axis is None:
            raise VitqError(f"granularity {self.granularity!r} needs an axis", where=where)
        if len(self.scale) != len(self.zero_point):
            raise VitqError(
                "scale and zero_point differ in length",
                where=where,
                got=(len(self.scale), len(self.zero_point)),
            )
        if not self.scale and not self.dynamic:
            raise VitqError("a static quantizer needs scales", where=where)
        if self.granularity == "tensor" and len(self.scale) > 1:
            raise VitqError("a per-tensor quantizer has one scale", where=where, got=len(self.scale))
        for value in self.scale:
            if not (math.isfinite(value) and value > 0):
                raise VitqError("a scale must be positive and finite", where=where, got=value)
        for zero in self.zero_point:
            if self.signed and zero != 0:
                raise VitqError(
                    "a signed quantizer is symmetric: its zero points are 0", where=where, got=zero
                )


@dataclass
class Calibration:
    """Where the numbers of a plan came from."""

    source: str = ""
    count: int = 0
    ids: list[str] = field(default_factory=list)
    seed: int = 0


@dataclass
class QuantPlan:
    """All quantizers of one model.

    Parameters
    ----------
    model, input_shape : of the float model; `preprocessing` travels with it.
    bits : the general width, "w8a8"; `recipe`, `recipe_params` : the method that fitted it.
    requantize : "multiply" or "shift" (every requantization constant is a power of two).
    sites : quantizer per site; site names are "<linear>.input", "<linear>.weight", "<attention>.q", ".k",
        ".v", ".probs".
    aliases : sites that use the quantizer of another one because they read the same tensor.
    ranges : largest magnitude that each tensor of the float graph took during calibration, by variable name.
    notes : what was declined or changed on the way, with the reason, by site or layer.
    comment : free text.
    statistics : what calibration saw at every site and how much noise its quantizer adds there.
    """

    model: str = ""
    input_shape: list[int] = field(default_factory=list)
    recipe: str = ""
    recipe_params: dict[str, Any] = field(default_factory=dict)
    bits: str = "w8a8"
    requantize: str = "multiply"
    sites: dict[str, SiteQuantizer] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, float] = field(default_factory=dict)
    preprocessing: dict[str, Any] | None = None
    calibration: Calibration = field(default_factory=Calibration)
    notes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    comment: str = ""
    statistics: dict[str, SiteStatistics] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __getitem__(self, site: str) -> SiteQuantizer:
        """Quantizer of a site or of the site it is an alias of; VitqError with the nearest names if there is
        none.
        """
        owner = self.aliases.get(site, site)
        if owner not in self.sites:
            raise VitqError(
                "the plan has no such site",
                where=site,
                expected=nearest(site, self.sites) or f"one of {len(self.sites)} sites",
            )
        return self.sites[owner]

    @property
    def hash(self) -> str:
        """Twelve hex digits that depend on everything that changes results; comment, notes, versions and
        statistics do not.
        """
        data = self.to_dict()
        for key in ("comment", "notes", "versions", "statistics"):
            del data[key]
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def check(self, sites: Iterable[str] | None = None, where: object = "plan") -> None:
        """Validate all fields and, if `sites` is given, that plan and model name the same sites; `where` is
        the plan's file.
        """
        if self.requantize not in REQUANTIZE_KINDS:
            raise VitqError(
                "unknown requantization",
                where=f"{where}: requantize",
                got=self.requantize,
                expected=" or ".join(REQUANTIZE_KINDS),
            )
        for name, site in self.sites.items():
            site.check(f"{where}: {name}")
        for name, seen in self.statistics.items():
            seen.check(f"{where}: statistics of {name}")
        for alias, owner in self.aliases.items():
            if owner not in self.sites:
                raise VitqError(
                    "alias of a site that the plan does not have", where=f"{where}: {alias}", got=owner
                )
        for name, value in self.ranges.items():
            if not (math.isfinite(value) and value >= 0):
                raise VitqError(
                    "a range must be finite and not negative", where=f"{where}: {name}", got=value
                )
        if sites is not None:
            self._check_names(set(sites))

    def _check_names(self, known: set[str]) -> None:
        for name in [*self.sites, *self.aliases]:
            if name not in known:
                raise VitqError(
                    "the plan names a layer that the model does not have",
                    where=name,
                    expected=nearest(name, known) or "a site of this model",
                    fix=f"the plan was made for {self.model!r}; quantize this model anew or correct the name",
                )
        missing = sorted(known - set(self.sites) - set(self.aliases))
        if missing:
            raise VitqError(
                "the plan lacks quantizers of the model",
                where=", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
                fix="quantize the model anew, or copy the missing sites from a plan of the same model",
            )

    def asked(self) -> dict[str, dict[str, Any]]:
        """Bits and granularity of every site, in the form of `overrides`: what a recipe fits numbers to."""
        names = [*self.sites, *self.aliases]
        return {
            name: {
                "bits": q.bits,
                # "instance" is a recipe's own choice where "tensor" was asked for
                "granularity": "tensor" if q.granularity == "instance" else q.granularity,
                "group_size": q.group_size,
            }
            for name, q in ((name, self[name]) for name in names)
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data; defaults of a site are left out, so that plans stay readable."""
        data: dict[str, Any] = {"format": FORMAT, "format_version": self.format_version}
        for item in dataclasses.fields(self):
            if item.name not in ("format_version", "sites", "statistics"):
                value = getattr(self, item.name)
                data[item.name] = dataclasses.asdict(value) if isinstance(value, Calibration) else value
        data["sites"] = {name: _given(site) for name, site in self.sites.items()}
        data["statistics"] = {name: _given(seen) for name, seen in self.statistics.items()}
        return data

    @classmethod
    def from_dict(cls, data: Any, where: object = "plan") -> QuantPlan:
        """The plan in `data`; VitqError for anything that `to_dict` could not have written."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise VitqError(
                "not a quantization plan", where=where, expected=f'a JSON object with "format": "{FORMAT}"'
            )
        if data.get("format_version") != FORMAT_VERSION:
            raise VitqError(
                "plan of another format version",
                where=where,
                got=data.get("format_version"),
                expected=FORMAT_VERSION,
            )
        fields = {k: v for k, v in data.items() if k != "format"}
        _check_keys(fields, cls, where)
        for key, read in (("sites", _site_from_dict), ("statistics", _statistics_from_dict)):
            given = fields.get(key, {})
            if not isinstance(given, Mapping):
                raise VitqError(f"{key} must be a JSON object", where=where, got=type(given).__name__)
            fields[key] = {str(name): read(one, f"{where}: {name}") for name, one in given.items()}
        if "calibration" in fields:
            _check_keys(fields["calibration"], Calibration, f"{where}: calibration")
            fields["calibration"] = Calibration(**fields["calibration"])
        plan = cls(**fields)
        plan.check(where=where)
        return plan

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, whole or not at all; a list of numbers takes one line."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        text = re.sub(r"\[\n\s+([-+.,\deE\s]*?)\n\s*\]", lambda m: f"[{' '.join(m[1].split())}]", text)
        with written_whole(path) as part:
            part.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantPlan:
        """Read a plan; VitqError if the file is missing, truncated or something else."""
        source = Path(path)
        try:
            text = source.read_text(encoding="utf-8")
        except OSError as error:
            raise VitqError(
                "could not read the plan", where=source, got=error.strerror, fix="check the path"
            ) from error
        except UnicodeDecodeError as error:
            raise VitqError("not a quantization plan", where=source, got=error, expected="JSON") from error
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise VitqError(
                "the plan is truncated or not JSON",
                where=f"{source}, line {error.lineno}, column {error.colno}",
                got=error.msg,
                fix="write it again with QuantPlan.save or `vitq quantize`",
            ) from error
        return cls.from_dict(data, source)


def _given(site: SiteQuantizer | SiteStatistics) -> dict[str, Any]:
    """The fields that differ from their defaults."""
    data: dict[str, Any] = {}
    for item in dataclasses.fields(site):
        value = getattr(site, item.name)
        default = {} if item.default_factory is dict else item.default
        if (
            item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        ) or value != default:
            data[item.name] = value
    return data


def _site_from_dict(data: Any, where: str) -> SiteQuantizer:
    if not isinstance(data, Mapping):
        raise VitqError("a site must be a JSON object", where=where, got=type(data).__name__)
    _check_keys(data, SiteQuantizer, where)
    try:
        return SiteQuantizer(
            **{
                **data,
                "scale": [float(v) for v in data["scale"]],
            }
        )
    except (KeyError, TypeError) as error:
        raise VitqError(
            "incomplete site", where=where, got=", ".join(data), expected="bits, scale and zero_point"
        ) from error


def _statistics_from_dict(data: Any, where: str) -> SiteStatistics:
    _check_keys(data, SiteStatistics, f"{where}: statistics")
    return SiteStatistics(**data)


def _check_keys(data: Any, of: type, where: object) -> None:
    if not isinstance(data, Mapping):
        raise VitqError("must be a JSON object", where=where, got=type(data).__name__)
    hints = typing.get_type_hints(of)
    for key, value in data.items():
        if key not in hints:
            raise VitqError(
                "unknown key", where=f"{where}: {key}", expected=nearest(key, hints) or ", ".join(hints)
            )
        if key not in ("sites", "statistics", "calibration") and not _fits(value, hints[key]):
            text = json.dumps(value, default=repr)
            raise VitqError(
                "value of the wrong type",
                where=f"{where}: {key}",
                got=text if len(text) <= 80 else text[:77] + "...",
                expected=of.__annotations__[key],
            )


def _fits(value: Any, hint: Any) -> bool:
    """Whether plain data have the type that a field's annotation asks for."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return True
    if kind is types.UnionType:
        return any(_fits(value, one) for one in inner)
    if kind is list:
        return isinstance(value, list) and all(_fits(v, inner[0]) for v in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    if kind is float and isinstance(value, int):
        return not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
