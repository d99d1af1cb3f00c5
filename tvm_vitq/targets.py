"""Target strings: what a user writes becomes a `TargetProfile`, which every later stage reads.

    >>> parse("llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76").isa
    'dotprod'

TVM itself dropped the classic "llvm -mcpu=..." strings, so they are parsed here. Adding an instruction set
is one entry in `ISAS` (and its kernels in schedules/).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_vitq import cpu, target_text
from tvm_vitq.errors import VitqError, nearest
from tvm_vitq.vta.machine.config import LEAST_LOG_BLOCK, VtaConfig, config_from, named_config, read_config

if TYPE_CHECKING:
    import tvm


@dataclass(frozen=True)
class Isa:
    """An instruction set that has kernels of its own.

    name, key : the short name, and the name of profiles and tuning logs (also accepted as a target alias).
    arch : "x86_64" or "aarch64".
    needs : LLVM features without which the kernels do not run; the first entry of `ISAS` whose needs are met
        is used.
    mcpu, mattr : what the alias compiles for: the oldest machine that has the instruction set.
    summary : the instructions that do the dot products.
    """

    name: str
    key: str
    arch: str
    needs: tuple[str, ...]
    mcpu: str
    mattr: tuple[str, ...]
    summary: str


_AVX512 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

ISAS: tuple[Isa, ...] = (
    Isa(
        "avx512vnni",
        "x86-avx512vnni",
        "x86_64",
        (*_AVX512, "avx512vnni"),
        "x86-64-v4",
        ("+avx512vnni",),
        "512-bit vpdpbusd",
    ),
    Isa(
        "avxvnni",
        "x86-avxvnni",
        "x86_64",
        ("avx2", "avxvnni"),
        "x86-64-v3",
        ("+avxvnni",),
        "256-bit vpdpbusd",
    ),
    Isa("avx2", "x86-avx2", "x86_64", ("avx2",), "x86-64-v3", (), "256-bit vpmaddwd"),
    Isa("x86_64", "x86-64", "x86_64", ("64bit", "sse2"), "x86-64", (), "128-bit pmaddwd"),
    Isa(
        "i8mm",
        "aarch64-i8mm",
        "aarch64",
        ("neon", "dotprod", "i8mm"),
        "generic",
        ("+v8.2a", "+dotprod", "+i8mm"),
        "smmla",
    ),
    Isa(
        "dotprod",
        "aarch64-dotprod",
        "aarch64",
        ("neon", "dotprod"),
        "generic",
        ("+v8.2a", "+dotprod"),
        "sdot",
    ),
    Isa("neon", "aarch64-neon", "aarch64", ("neon",), "generic", (), "smlal"),
)

ALIASES: Mapping[str, Mapping[str, Any]] = {
    isa.key: {
        "kind": "llvm",
        "mtriple": f"{isa.arch}-linux-gnu",
        "mcpu": isa.mcpu,
        "mattr": list(isa.mattr),
    }
    for isa in ISAS
}
"""Short names of targets: the options that they stand for."""


@dataclass(frozen=True)
class TargetProfile:
    """A machine to compile for: hashable, plain data, equal for equal machines.

    isa : which kernels are used, one of the names in `ISAS`.
    key : short canonical name ("x86-avx512vnni"); names folders of tuning logs.
    triple, mcpu, mattr : what LLVM is told; mcpu may be empty.
    threads : `-num-cores`, 0 if not given (then TVM's thread pool decides at run time).
    features : flags of `/proc/cpuinfo` that the machine must have to run the code.
    vta : the accelerator beside the CPU, which runs what is left over for it; None: there is none.
    driver : the accelerator's shared library; empty: VITQ_VTA_DRIVER names it, or it is simulated.
    residual : whether residual sums are the accelerator's, else the CPU's.
    """

    isa: str
    key: str
    triple: str
    mcpu: str
    mattr: tuple[str, ...]
    threads: int
    features: tuple[str, ...]
    vta: VtaConfig | None = None
    driver: str = ""
    residual: bool = True

    @property
    def arch(self) -> str:
        """The architecture: "x86_64" or "aarch64"."""
        return next(isa.arch for isa in ISAS if isa.name == self.isa)

    @property
    def target(self) -> tvm.target.Target:
        """The TVM target, its host being itself."""
        return _tvm_target(self)

    @property
    def is_host_arch(self) -> bool:
        """Whether this process could load the code, other features aside."""
        return cpu.host().arch == self.arch

    def missing_here(self) -> tuple[str, ...]:
        """Flags that the code needs and this machine lacks; all of them on another architecture."""
        here = cpu.host()
        if here.arch != self.arch:
            return self.features
        return tuple(flag for flag in self.features if flag not in here.flags)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TargetProfile:
        """The inverse of `to_json`, from trusted data (whose reader has checked the file's version)."""
        vta = data.get("vta") and VtaConfig(**data["vta"])
        lists = {key: tuple(data[key]) for key in ("mattr", "features")}
        return cls(**{**data, **lists, "vta": vta})

    def __str__(self) -> str:
        options = {
            "mtriple": self.triple,
            "mcpu": self.mcpu,
            "mattr": ",".join(self.mattr),
            "num-cores": self.threads,
            "config": self.vta.name if self.vta and self.vta != VtaConfig() else "",
            "driver": self.driver,
            "residual": "" if self.residual else "cpu",
        }
        kind = "vta" if self.vta else "llvm"
        return " ".join([kind, *(f"-{name}={value}" for name, value in options.items() if value)])


def parse(target: str | Mapping[str, Any] | tvm.target.Target | TargetProfile) -> TargetProfile:
    """Reads a target as users write it.

    Parameters
    ----------
    target : one of

        * "llvm" (or "native", "host"): this machine with all its instructions;
        * a classic string: "llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76 -mattr=+dotprod -num-cores=4".
          Without -mtriple this machine's architecture is meant; with any of -mtriple, -mcpu, -mattr the
          instructions are those named and the architecture's baseline, not this machine's;
        * the key of an instruction set: "x86-avx2", "aarch64-dotprod", ...;
        * "vta": the accelerator in its default configuration beside this machine's CPU; -config=FILE names a
          VTA JSON configuration (or is a `VtaConfig.name`), -driver=LIBRARY what drives the accelerator,
          -residual=cpu leaves residual sums to the CPU; the other options are those of "llvm" and describe
          the CPU. In a dict, "config" may be the configuration itself;
        * one of TVM's target tags ("raspberry-pi/4b-aarch64"), a dict, its JSON text, a `tvm.target.Target`;
        * a `TargetProfile`, which is returned.

    Raises
    ------
    VitqError : unknown kind, option, CPU or feature; malformed text; an architecture or system without
        kernels; a VTA configuration that cannot be.
    """
    if isinstance(target, TargetProfile):
        return target
    options = target_text.read(target, ALIASES)
    if options["kind"] == "vta":
        driver, residual = str(options.get("driver") or ""), _residual(options)
        return replace(_cpu_profile(options), vta=_vta(options), driver=driver, residual=residual)
    return _cpu_profile(options)


def _vta(options: Mapping[str, Any]) -> VtaConfig:
    config = options.get("config")
    if config is None:
        return VtaConfig()
    if not config or not isinstance(config, (str, os.PathLike, Mapping)):
        raise VitqError(
            "no VTA configuration",
            where="target option -config",
            got=repr(config),
            expected=f"a JSON file, its content, or a name such as {VtaConfig().name}",
        )
    if isinstance(config, Mapping):
        found = config_from(config)
    else:
        found = named_config(str(config)) or read_config(Path(config))
    if found.log_block < LEAST_LOG_BLOCK:
        raise VitqError(
            "VTA blocks are too small",
            where="LOG_BLOCK",
            got=found.log_block,
            expected=f"at least {LEAST_LOG_BLOCK}",
        )
    return found


def _residual(options: Mapping[str, Any]) -> bool:
    """Whether residual sums are the accelerator's."""
    given = options.get("residual", "vta")
    if given not in ("vta", "cpu"):
        raise VitqError(
            "no such place for residual sums",
            where="target option -residual",
            got=given,
            expected="vta or cpu",
        )
    return given == "vta"


def _cpu_profile(options: Mapping[str, Any]) -> TargetProfile:
    threads = target_text.core_count(options)
    if not any(options.get(key) for key in ("mtriple", "mcpu", "mattr")):
        return _host_profile(threads)
    triple, arch = target_text.triple(options)
    mcpu = str(options.get("mcpu") or "")
    mattr = target_text.attributes(options)
    _check_mcpu(triple, arch, mcpu)
    for attribute in mattr:
        _check_attribute(triple, attribute)
    return _profile(triple, arch, mcpu, mattr, threads)


def _llvm(name: str, **options: Any) -> list[str]:
    """Answer of one of TVM's LLVM queries (`target.llvm_get_...`) for a target with these options."""
    import tvm
    from tvm_ffi import get_global_func

    target = tvm.target.Target({"kind": "llvm", **{key: value for key, value in options.items() if value}})
    return [str(entry) for entry in get_global_func(f"target.llvm_get_{name}")(target)]


def _check_mcpu(triple: str, arch: str, mcpu: str) -> None:
    import tvm  # noqa: F401  (registers the query below)
    from tvm_ffi import get_global_func

    is_valid = get_global_func("target.llvm_is_valid_cpu")  # also knows aliases, which the list below lacks
    if not mcpu or is_valid(mcpu, triple):
        return
    home = next((other for other in cpu.ELF_MACHINE if is_valid(mcpu, f"{other}-linux-gnu")), None)
    known = _llvm("cpu_archlist", mtriple=triple)
    raise VitqError(
        f"LLVM knows no {arch} CPU of this name",
        where="target option -mcpu",
        got=mcpu,
        expected=nearest(mcpu, known) or f"one of {', '.join(known)}",
        fix=f"{mcpu} is an {home} CPU: add -mtriple={home}-linux-gnu" if home else None,
    )


def _check_attribute(triple: str, attribute: str) -> None:
    # LLVM ignores unknown features with a remark on stderr, so each is looked up before LLVM sees it.
    known = _known_features(triple)
    if attribute[1:] not in known:
        raise VitqError(
            "LLVM knows no CPU feature of this name",
            where="target option -mattr",
            got=attribute,
            expected=nearest(attribute[1:], known) or "a feature that LLVM has for " + triple,
        )


@functools.lru_cache(maxsize=8)
def _known_features(triple: str) -> frozenset[str]:
    """Every feature that some CPU of the architecture has, and those of our own table."""
    cpus = _llvm("cpu_archlist", mtriple=triple)
    found = {feature for name in cpus for feature in _llvm("cpu_features", mtriple=triple, mcpu=name)}
    return frozenset(found | cpu.KERNEL_NAME[triple.split("-")[0]].keys())


def _host_profile(threads: int) -> TargetProfile:
    """This machine: its CPU's name for LLVM's cost models, corrected by what the kernel says is there."""
    import tvm  # noqa: F401  (registers the query below)
    from tvm_ffi import get_global_func

    here = cpu.host()
    triple = f"{here.arch}-linux-gnu"
    mcpu = str(get_global_func("target.llvm_get_system_cpu")())
    by_name = frozenset(_llvm("cpu_features", mtriple=triple, mcpu=mcpu)) & cpu.KERNEL_NAME[here.arch].keys()
    have = here.llvm_features  # virtual machines often hide features that the CPU's name implies
    mattr = tuple(sorted({f"+{f}" for f in have - by_name} | {f"-{f}" for f in by_name - have}))
    return _profile(triple, here.arch, mcpu, mattr, threads)


def _profile(triple: str, arch: str, mcpu: str, mattr: tuple[str, ...], threads: int) -> TargetProfile:
    features = frozenset(_llvm("cpu_features", mtriple=triple, mcpu=mcpu, mattr=list(mattr)))
    for isa in ISAS:
        if isa.arch == arch and features.issuperset(isa.needs):
            flags = cpu.kernel_flags(arch, features)
            return TargetProfile(isa.name, isa.key, triple, mcpu, mattr, threads, flags)
    baseline = [isa for isa in ISAS if isa.arch == arch][-1]
    raise VitqError(
        "the target lacks the instructions that the smallest kernels need",
        where="target",
        got=f"mcpu={mcpu or 'generic'} mattr={','.join(mattr) or 'none'}",
        expected=f"at least {', '.join(baseline.needs)} ({baseline.key})",
    )


@functools.lru_cache(maxsize=32)
def _tvm_target(profile: TargetProfile) -> tvm.target.Target:
    import tvm

    config: dict[str, Any] = {"kind": "llvm", "mtriple": profile.triple}
    config |= {"mcpu": profile.mcpu} if profile.mcpu else {}
    config |= {"mattr": list(profile.mattr)} if profile.mattr else {}
    config |= {"num-cores": profile.threads} if profile.threads else {}
    return tvm.target.Target({**config, "host": config})
