"""Reads the options of a target out of whatever form the user chose; targets.py gives them their meaning."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tvm_vitq import cpu
from tvm_vitq.errors import VitqError, nearest

if TYPE_CHECKING:
    import tvm

HOST_ALIASES = ("llvm", "native", "host")
KINDS = ("llvm", "vta")
NOT_YET = ("cuda", "nvptx", "ext_dev")

_USED = {"kind", "mtriple", "mcpu", "mattr", "num-cores"}
# Written by TVM into every exported target, or descriptive; none changes the generated code.
_DESCRIPTIVE = {"tag", "keys", "device", "model", "host"}
_VTA = {"config", "driver", "residual"}


def read(target: Any, aliases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The options of a target: only names that the package knows, values as the user wrote them. Those of a
    CPU stand for the host where the kind is "vta".

    Parameters
    ----------
    target : classic string, alias, tag, JSON, dict or `tvm.target.Target`.
    aliases : short names and the options that they stand for.

    Raises
    ------
    VitqError : wrong type, malformed text, unknown kind or option.
    """
    if isinstance(target, Mapping):
        options = dict(target)
    elif isinstance(target, str):
        options = _of_text(target.strip(), aliases)
    elif hasattr(target, "export") and hasattr(target, "kind"):
        options = _of_tvm(target)
    else:
        raise VitqError(
            "target has the wrong type",
            where="target",
            got=type(target).__name__,
            expected='a string such as "llvm", a dict, or a tvm.target.Target',
        )
    if options.get("kind") not in KINDS:
        raise _unknown_kind(options.get("kind"), target, [*HOST_ALIASES, "vta", *aliases])
    _refuse_unknown_options(options)
    return options


def _of_tvm(target: tvm.target.Target) -> dict[str, Any]:
    """A TVM target as options, without what TVM added by itself."""
    from tvm_ffi import get_global_func

    data = target.export()
    data = json.loads(data) if isinstance(data, str) else dict(data)
    options = {str(key): value for key, value in data.items() if not str(key).startswith("feature.")}
    # TVM fills in this triple where none was given: Target("llvm") shall mean the same as "llvm".
    if options.get("mtriple") == get_global_func("tvm.codegen.llvm.GetDefaultTargetTriple")():
        del options["mtriple"]
    return options


def _of_text(text: str, aliases: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    if text.startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise VitqError(
                "target is not valid JSON", where="target", got=text, expected=str(error)
            ) from None
    if text in aliases:
        return dict(aliases[text])
    if text in HOST_ALIASES:
        return {"kind": "llvm"}
    if "/" in text and " " not in text:
        return _of_tag(text)
    return _of_classic(text)


def _of_tag(tag: str) -> dict[str, Any]:
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
    return _of_tvm(tvm.target.Target(tag))


def _of_classic(text: str) -> dict[str, Any]:
    """The dict of "llvm -a=1 -b 2"; every token must be an option or the value of the one before it."""
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
        expected='"llvm [-mtriple=<triple>] [-mcpu=<cpu>] [-mattr=+<feature>,...] [-num-cores=<n>]" or "vta '
        '[-config=<file or name>] [-driver=<library>] [-residual=vta|cpu] [options of llvm]"',
    )


def _unknown_kind(kind: Any, target: Any, aliases: Sequence[str]) -> VitqError:
    if kind in NOT_YET:
        return VitqError(
            f"target kind {kind!r} is not available yet: this version compiles for x86-64, AArch64 and VTA",
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
        used = (_USED | _VTA if options["kind"] == "vta" else _USED) - {"kind"}
        if name not in used | _DESCRIPTIVE | {"kind"}:
            near = nearest(name, used)
            raise VitqError(
                "unknown target option",
                where="target",
                got=f"-{name}",
                expected=", ".join(f"-{known}" for known in sorted(used)),
                fix=f"did you mean -{near}?" if near else None,
            )


def core_count(options: Mapping[str, Any]) -> int:
    """-num-cores, 0 if it is not given."""
    value = options.get("num-cores")
    if value is None:
        return 0
    try:
        count = int(str(value))
    except ValueError:
        count = 0
    if count < 1:
        raise VitqError(
            "number of cores is not a positive whole number",
            where="target option -num-cores",
            got=value,
            expected="1 or more",
        )
    return count


def triple(options: Mapping[str, Any]) -> tuple[str, str]:
    """(triple, architecture); an architecture alone means its Linux with glibc, none this machine's."""
    value = options.get("mtriple")
    if not value:
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


def attributes(options: Mapping[str, Any]) -> tuple[str, ...]:
    """-mattr, text or list, as a tuple of CPU features, each with its sign."""
    value = options.get("mattr") or ()
    entries = value.split(",") if isinstance(value, str) else value
    if not isinstance(entries, Sequence):
        entries = (value,)
    found = tuple(str(entry).strip() for entry in entries)
    for attribute in found:
        if len(attribute) < 2 or attribute[0] not in "+-":
            raise VitqError(
                "malformed CPU feature",
                where="target option -mattr",
                got=repr(attribute),
                expected="+feature or -feature, separated by commas",
            )
    return found
