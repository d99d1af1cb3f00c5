"""The file format of compiled libraries: one ELF shared object that says about itself what it is.

    [ELF shared object][program of VTA][metadata: JSON, UTF-8][trailer, 32 bytes]

    trailer, little endian:
    u64 bytes of ELF and program | u64 bytes of JSON | u32 CRC-32 of both | u32 version | b"VITQLIB\\0"

The dynamic loader maps only what the ELF headers name, so it never sees the tail; metadata can be read, and
a library for another machine refused, before a single instruction of it is loaded. `runtime/metadata.h` is
the same reader in C++.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from tvm_vitq import cpu
from tvm_vitq.errors import VitqError
from tvm_vitq.files import written_whole
from tvm_vitq.targets import TargetProfile

LOAD = "vitq_load"
"""Function of a library that unpacks its weights; `main` takes them behind its input."""

VERSION = 1
MAGIC = b"VITQLIB\0"
TRAILER = struct.Struct("<QQII8s")
# e_ident to e_machine: magic, class, ..., e_type (u16 at 16), e_machine (u16 at 18); e_shoff u64 at 40,
# e_shentsize u16 at 58, e_shnum u16 at 60 (System V ABI, 64-bit little-endian).
_ELF_HEADER_BYTES = 64
_REBUILD = "build and export the library again"


@dataclass(frozen=True)
class LibraryInfo:
    """What a library knows about itself.

    model : name of the model.
    target : what it was compiled for.
    input_shape : (N, 3, H, W), float32, normalized as `preprocessing` says.
    classes : logits per image; the result is float32 (N, classes).
    plan_hash : identifies the quantized model; libraries with equal hashes return equal logits.
    preprocessing : mean, std, crop and so on as timm spells them, None if unknown.
    versions : package name -> version at build time.
    report : the build report as plain data.
    program_at, program_bytes : where in the file VTA's program is; 0 bytes if there is none.
    """

    model: str
    target: TargetProfile
    input_shape: tuple[int, ...]
    classes: int
    plan_hash: str = ""
    preprocessing: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    program_at: int = 0
    program_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain data; ELF machine number and dtype are written out for readers in other languages."""
        data = {**asdict(self), "target": self.target.to_json(), "input_shape": list(self.input_shape)}
        return {**data, "elf_machine": cpu.ELF_MACHINE[self.target.arch], "dtype": "float32"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LibraryInfo:
        """The inverse of `to_json`."""
        own = {key: value for key, value in data.items() if key not in ("elf_machine", "dtype")}
        own |= {"target": TargetProfile.from_json(data["target"]), "input_shape": tuple(data["input_shape"])}
        return cls(**own)


def write(path: str | os.PathLike[str], shared_object: Path, info: LibraryInfo, program: bytes = b"") -> None:
    """Writes a library file, whole or not at all.

    Parameters
    ----------
    program : of VTA, see vta/runtime/program.py.

    Raises
    ------
    VitqError : the file cannot be written (folder missing, disk full, ...).
    """
    with written_whole(path) as part, part.open("wb") as out, shared_object.open("rb") as elf:
        shutil.copyfileobj(elf, out, 1 << 20)
        if program:
            info = replace(info, program_at=out.tell(), program_bytes=len(program))
            out.write(program)
        elf_bytes = out.tell()
        text = json.dumps(info.to_json(), ensure_ascii=False, sort_keys=True).encode()
        out.write(text)
        out.flush()
        with part.open("rb") as written:
            checksum = _checksum(written, elf_bytes + len(text))
        out.write(TRAILER.pack(elf_bytes, len(text), checksum, VERSION, MAGIC))


def read(path: str | os.PathLike[str]) -> LibraryInfo:
    """Reads and checks a library file without loading it.

    Raises
    ------
    VitqError : no such file; not a library of ours, truncated or damaged; written by another version.
    """
    file = Path(path)
    try:
        with file.open("rb") as stream:
            return _read(file, stream)
    except OSError as error:
        raise VitqError(
            "cannot read the library", where=file, got=error.strerror, fix="check the path"
        ) from error


def read_program(path: str | os.PathLike[str]) -> bytes:
    """The program of VTA in a library file; none is empty.

    Raises
    ------
    VitqError : as `read` does.
    """
    info = read(path)
    with Path(path).open("rb") as stream:
        stream.seek(info.program_at)
        return stream.read(info.program_bytes)


def _read(file: Path, stream: BinaryIO) -> LibraryInfo:
    size = os.fstat(stream.fileno()).st_size
    _check_elf(file, stream.read(_ELF_HEADER_BYTES), size)
    if size < _ELF_HEADER_BYTES + TRAILER.size:
        raise _no_trailer(file)
    stream.seek(size - TRAILER.size)
    elf_bytes, json_bytes, checksum, version, magic = TRAILER.unpack(stream.read(TRAILER.size))
    if magic != MAGIC:
        raise _no_trailer(file)
    if version != VERSION:
        raise VitqError(
            "library was written by another version of tvm-vitq",
            where=file,
            got=f"format {version}",
            expected=f"format {VERSION}",
            fix=_REBUILD,
        )
    if elf_bytes + json_bytes + TRAILER.size != size:
        raise VitqError(
            "library is damaged: its length is wrong",
            where=file,
            got=f"{size} bytes",
            expected=f"{elf_bytes + json_bytes + TRAILER.size} bytes",
            fix="copy it again, or " + _REBUILD,
        )
    stream.seek(0)
    if _checksum(stream, elf_bytes + json_bytes) != checksum:
        raise VitqError(
            "library is damaged: its checksum is wrong", where=file, fix="copy it again, or " + _REBUILD
        )
    stream.seek(elf_bytes)
    try:
        return LibraryInfo.from_json(json.loads(stream.read(json_bytes)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise VitqError(
            "library has malformed metadata", where=file, got=f"{type(error).__name__}: {error}", fix=_REBUILD
        ) from error


def _check_elf(file: Path, header: bytes, size: int) -> None:
    """Foreign files, and those cut off before their ELF section table."""
    if header[:4] != b"\x7fELF":
        raise VitqError(
            "not a compiled library",
            where=file,
            got="an empty file" if size == 0 else f"a file that begins with {header[:4]!r}",
            expected="a file written by export_library",
        )
    sections_at = struct.unpack_from("<Q", header, 40)[0] if len(header) == _ELF_HEADER_BYTES else size
    entry, count = struct.unpack_from("<HH", header, 58) if len(header) == _ELF_HEADER_BYTES else (1, 1)
    if sections_at + entry * count > size:
        raise VitqError(
            "library is truncated",
            where=file,
            got=f"{size} bytes",
            expected=f"more than {sections_at + entry * count} bytes",
            fix="copy it again, or " + _REBUILD,
        )


def _no_trailer(file: Path) -> VitqError:
    return VitqError(
        "shared object without the metadata of a tvm-vitq library",
        where=file,
        expected="a file written by export_library; stripped or truncated copies lose the metadata",
        fix="copy the original again, or " + _REBUILD,
    )


def _checksum(stream: BinaryIO, count: int) -> int:
    """CRC-32 of the next `count` bytes."""
    value = 0
    while count > 0 and (block := stream.read(min(count, 1 << 20))):
        value = zlib.crc32(block, value)
        count -= len(block)
    return value


def check_runs_here(info: LibraryInfo, where: object) -> None:
    """Refuses a library that would crash on this machine.

    Raises
    ------
    VitqError : compiled for another architecture, or with instructions that this CPU lacks.
    """
    here = cpu.host()
    if info.target.arch != here.arch:
        raise VitqError(
            "library is for another architecture",
            where=where,
            got=f"{info.target.arch} ({info.target})",
            expected=here.arch,
            fix="run it there"
            + (", or emulate it with tvm_vitq.emulate.run_aarch64" if info.target.arch == "aarch64" else ""),
        )
    missing = info.target.missing_here()
    if missing:
        raise VitqError(
            "library needs instructions that this CPU does not have",
            where=where,
            got=f"compiled for {info.target}; missing here: {', '.join(missing)}",
            expected="a library for this CPU or an older one",
            fix='build it on this machine with target="llvm", or for the oldest CPU it shall run on',
        )
