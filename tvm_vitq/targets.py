"""Target strings: what a user writes becomes a `TargetProfile`, which every later stage reads.

    >>> parse("llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76").isa
    'dotprod'

TVM itself dropped the classic "llvm -mcpu=..." strings, so they are parsed here. Adding an instruction set
is one entry in `ISAS` (and its kernels in schedules/).
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from tvm_vitq import cpu
from tvm_vitq.errors import VitqError, nearest

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

HOST_ALIASES = ("llvm", "native", "host")
NOT_YET = ("cuda", "nvptx", "vta", "ext_dev")

_USED = {"kind", "mtriple", "mcpu", "mattr", "num-cores"}
# Written by TVM into every exported target, or descriptive; none changes the generated code.
_DESCRIPTIVE = {"tag", "keys", "device", "model", "host"}


@dataclass(frozen=True)
class TargetProfile:
    """A machine to compile for: hashable, plain data, equal for equal machines.

    isa : which kernels are used, one of the names in `ISAS`.
    key : short canonical name ("x86-avx512vnni"); names folders of tuning logs.
    triple, mcpu, mattr : what LLVM is told; mcpu may be empty.
    threads : `-num-cores`, 0 if not given (then TVM's thread pool decides at run time).
    features : flags of `/proc/cpuinfo` that the machine must have to run the code.
    """

    isa: str
    key: str
    triple: str
    mcpu: str
    mattr: tuple[str, ...]
    threads: int
    features: tuple[str, ...]

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
        return cls(**{**data, "mattr": tuple(data["mattr"]), "features": tuple(data["features"])})

    def __str__(self) -> str:
        options = {
            "mtriple": self.triple,
            "mcpu": self.mcpu,
            "mattr": ",".join(self.mattr),
            "num-cores": self.threads,
        }
        return " ".join(["llvm", *(f"-{name}={value}" for name, value in options.items() if value)])


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
        * one of TVM's target tags ("raspberry-pi/4b-aarch64"), a dict, its JSON text, a `tvm.target.Target`;
        * a `TargetProfile`, which is returned.

    Raises
    ------
    VitqError : unknown kind, option, CPU or feature; malformed text; an architecture or system without
        kernels.
    """
    if isinstance(target, TargetProfile):
        return target
    options = _options(target)
    kind = options.pop("kind", None)
    if kind != "llvm":
        raise _unknown_kind(kind, target)
    _refuse_unknown_options(options)
    threads = _positive_int(options.get("num-cores"), target)
    named = {key: options[key] for key in ("mtriple", "mcpu", "mattr") if options.get(key)}
    if not named:
        return _host_profile(threads)
    triple, arch = _triple(named.get("mtriple"))
    mcpu = str(named.get("mcpu", ""))
    mattr = _mattr(named.get("mattr", ()))
    _check_mcpu(triple, arch, mcpu)
    for attribute in mattr:
        _check_attribute(triple, attribute)
    return _profile(triple, arch, mcpu, mattr, threads)


def _options(target: Any) -> dict[str, Any]:
    """The options as a dict with "kind", whatever form the user chose."""
    if isinstance(target, Mapping):
        return dict(target)
    if isinstance(target, str):
        return _options_of_text(target)
    if hasattr(target, "export") and hasattr(target, "kind"):
        return _exported(target)
    raise VitqError(
        "target has the wrong type",
        where="target",
        got=type(target).__name__,
        expected='a string such as "llvm", a dict, or a tvm.target.Target',
    )


def _exported(target: tvm.target.Target) -> dict[str, Any]:
    """A TVM target as options; its "feature.*" entries are derived by TVM from mcpu and mattr."""
    data = target.export()
    data = json.loads(data) if isinstance(data, str) else dict(data)
    return {str(key): value for key, value in data.items() if not str(key).startswith("feature.")}


def _options_of_text(text: str) -> dict[str, Any]:
    text = text.strip()
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise VitqError(
                "target is not valid JSON", where="target", got=text, expected=str(error)
            ) from None
    for isa in ISAS:
        if text == isa.key:
            triple = f"{isa.arch}-linux-gnu"
            return {"kind": "llvm", "mtriple": triple, "mcpu": isa.mcpu, "mattr": list(isa.mattr)}
    if text in HOST_ALIASES:
        return {"kind": "llvm"}
    if "/" in text and " " not in text:
        return _options_of_tag(text)
    return _options_of_classic(text)


def _options_of_tag(tag: str) -> dict[str, Any]:
    import tvm
    from tvm_ffi import get_global_func

    tags = [str(name) for name in get_global_func("target.TargetTagListTags")()]
    if tag not in tags:
        raise VitqError(
            "unknown target tag",
            where="target",
            got=tag,
            expected=nearest(tag, tags) or "one of TVM's target tags",
            fix='write the target out, for instance "llvm -mtriple=aarch64-linux-gnu -mcpu=cortex-a76"',
        )
    return _exported(tvm.target.Target(tag))


def _options_of_classic(text: str) -> dict[str, Any]:
    """ "llvm -a=1 -b 2" as a dict; every token must be an option or the value of the one before it."""
    try:
        kind, *tokens = shlex.split(text)
    except ValueError:  # nothing in the string, or a quote that is not closed
        raise _malformed(text, text) from None
    options: dict[str, Any] = {"kind": kind}
    while tokens:
        token = tokens.pop(0)
        name, equals, value = token.lstrip("-").partition("=")
        if not token.startswith("-") or not name:
            raise _malformed(text, token)
        if not equals and tokens and not tokens[0].startswith("-"):
            value = tokens.pop(0)
        if name in options:
            raise VitqError("target option is given twice", where=f"target {text!r}", got=f"-{name}")
        if not value:
            raise VitqError(
                "target option has no value", where=f"target {text!r}", got=token, expected=f"-{name}=<value>"
            )
        options[name] = value
    return options


def _malformed(text: str, part: str) -> VitqError:
    return VitqError(
        "malformed target string",
        where=f"target {text!r}",
        got=part or "nothing",
        expected='"llvm [-mtriple=<triple>] [-mcpu=<cpu>] [-mattr=+<feature>,...] [-num-cores=<n>]"',
    )


def _unknown_kind(kind: Any, target: Any) -> VitqError:
    aliases = [*HOST_ALIASES, *(isa.key for isa in ISAS)]
    if kind in NOT_YET:
        return VitqError(
            f"target kind {kind!r} is not available yet: this version compiles for x86-64 and AArch64 CPUs",
            where="target",
            got=target,
            expected='"llvm ..." or one of ' + ", ".join(aliases),
        )
    return VitqError(
        "unknown target kind",
        where="target",
        got=repr(kind) if kind is not None else f"no kind in {target}",
        expected='"llvm ..." or one of ' + ", ".join(aliases),
        fix=f"did you mean {near}?" if kind and (near := nearest(str(kind), aliases)) else None,
    )


def _refuse_unknown_options(options: Mapping[str, Any]) -> None:
    for name in options:
        if name.startswith("fast-math"):
            raise VitqError(
                "fast-math would make results differ between targets",
                where="target",
                got=f"-{name}",
                fix="leave it out: the float steps that remain are exact and cost next to nothing",
            )
        if name not in _USED | _DESCRIPTIVE:
            near = nearest(name, _USED - {"kind"})
            raise VitqError(
                "unknown target option",
                where="target",
                got=f"-{name}",
                expected=", ".join(f"-{known}" for known in sorted(_USED - {"kind"})),
                fix=f"did you mean -{near}?" if near else None,
            )


def _positive_int(value: Any, target: Any) -> int:
    if value is None:
        return 0
    try:
        count = int(str(value))
    except ValueError:
        count = 0
    if count < 1:
        raise VitqError(
            "-num-cores is not a positive whole number",
            where=f"target {target!r}",
            got=value,
            expected="1 or more",
        )
    return count


def _triple(value: Any) -> tuple[str, str]:
    """(triple, architecture); an architecture alone means its Linux with glibc."""
    if value is None:
        arch = cpu.host().arch
        return f"{arch}-linux-gnu", arch
    first, *rest = str(value).split("-")
    architecture = cpu.canonical_arch(first)
    if architecture is None:
        raise VitqError(
            "no kernels for this architecture",
            where="target option -mtriple",
            got=value,
            expected=", ".join(f"{arch}-linux-gnu" for arch in cpu.ELF_MACHINE),
        )
    if rest and "linux" not in rest:
        raise VitqError(
            "compiled libraries are ELF shared objects for Linux",
            where="target option -mtriple",
            got=value,
            expected=f"{architecture}-linux-gnu",
        )
    return "-".join([architecture, *(rest or ["linux", "gnu"])]), architecture


def _mattr(value: Any) -> tuple[str, ...]:
    """ "+a,-b" or a list of such entries as a tuple, each with its sign."""
    entries: Iterable[Any] = value.split(",") if isinstance(value, str) else value
    attributes = tuple(str(entry).strip() for entry in entries)
    for attribute in attributes:
        if len(attribute) < 2 or attribute[0] not in "+-":
            raise VitqError(
                "malformed CPU feature",
                where="target option -mattr",
                got=repr(attribute),
                expected="+feature or -feature, separated by commas",
            )
    return attributes


def _llvm(name: str, **options: Any) -> list[str]:
    """Answer of one of TVM's LLVM queries (`target.llvm_get_...`) for a target with these options."""
    import tvm
    from tvm_ffi import get_global_func

    target = tvm.target.Target({"kind": "llvm", **{key: value for key, value in options.items() if value}})
    return [str(entry) for entry in get_global_func(f"target.llvm_get_{name}")(target)]


def _check_mcpu(triple: str, arch: str, mcpu: str) -> None:
    if not mcpu or mcpu in (known := _llvm("cpu_archlist", mtriple=triple)):
        return
    others = [other for other in cpu.ELF_MACHINE if other != arch]
    home = next((o for o in others if mcpu in _llvm("cpu_archlist", mtriple=f"{o}-linux-gnu")), None)
    near = nearest(mcpu, known)
    raise VitqError(
        f"LLVM knows no {arch} CPU of this name",
        where="target option -mcpu",
        got=mcpu,
        expected=near or f"one of {', '.join(known)}",
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
