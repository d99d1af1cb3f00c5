"""A folder with all that a machine without Python needs to run exported libraries.

    DIR/vitq_run                 the program of runtime/vitq_run.cc
    DIR/lib/libtvm_*.so          TVM's runtime, 6 MB, out of the wheels of that architecture

    python -m tvm_vitq.deploy_kit aarch64 DIR

The wheels are those of the versions installed here, since a library and the runtime that loads it must match.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from tvm_vitq import cpu, settings
from tvm_vitq.errors import VitqError

COMPILERS = {"x86_64": "x86_64-linux-gnu-g++", "aarch64": "aarch64-linux-gnu-g++"}
"""C++ compiler of each architecture, under Debian's names; on the architecture itself plain g++ will do."""

LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "apache-tvm-ffi": ("tvm_ffi/lib/libtvm_ffi.so",),
    "apache-tvm": ("tvm/lib/libtvm_runtime.so", "tvm/lib/libtvm_runtime_extra.so"),
}
"""Distribution -> the files of its wheel that a process needs in order to run a library."""

_FLAGS = ("-std=c++17", "-O2", "-Wall")


def cache_folder() -> Path:
    """Where kits are kept: VITQ_CACHE, else the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(settings.CACHE.value or Path(base) / "tvm-vitq")


def cached(arch: str) -> Path:
    """The kit of an architecture, made on first use; remade when TVM's version or the program changes.

    Raises
    ------
    VitqError : as `make`.
    """
    sources = importlib.resources.files("tvm_vitq.deploy")
    digest = hashlib.sha256("".join(importlib.metadata.version(name) for name in LIBRARIES).encode())
    for name in ("vitq_run.cc", "metadata.h", "cpu_features.h"):
        digest.update((sources / name).read_bytes())
    folder = cache_folder() / f"kit-{arch}-{digest.hexdigest()[:12]}"
    if not (folder / "vitq_run").exists():
        make(arch, folder)
    return folder


def make(arch: str, folder: str | os.PathLike[str]) -> Path:
    """Makes the folder, whole or not at all; an existing one is replaced.

    Parameters
    ----------
    arch : "x86_64" or "aarch64".
    folder : the kit's place.

    Raises
    ------
    VitqError : unknown architecture; no C++ compiler for it; its wheels cannot be downloaded; disk full.
    """
    if arch not in COMPILERS:
        raise VitqError("no kit for this architecture", where="arch", got=arch, expected=", ".join(COMPILERS))
    final = Path(folder)
    compiler = _compiler(arch)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".kit-", dir=final.parent) as scratch:
            kit = Path(scratch) / "kit"
            (kit / "lib").mkdir(parents=True)
            _collect_libraries(arch, kit / "lib", Path(scratch) / "wheels")
            _compile(compiler, kit)
            if final.exists():
                final.rename(Path(scratch) / "old")
            kit.rename(final)
    except OSError as error:
        raise VitqError("cannot make the deployment kit", where=final, got=error.strerror) from error
    return final


def _compiler(arch: str) -> str:
    native = cpu.canonical_arch(os.uname().machine) == arch
    for name in (COMPILERS[arch], *(["g++"] if native else [])):
        if path := shutil.which(name):
            return path
    raise VitqError(
        f"no C++ compiler for {arch}",
        where="deployment kit",
        expected=COMPILERS[arch],
        fix="apt-get install " + ("g++" if native else f"g++-{arch.replace('_', '-')}-linux-gnu"),
    )


def _collect_libraries(arch: str, into: Path, wheels: Path) -> None:
    if cpu.canonical_arch(os.uname().machine) == arch:
        for distribution, names in LIBRARIES.items():
            for name in names:
                shutil.copy(str(importlib.metadata.distribution(distribution).locate_file(name)), into)
        return
    _download(arch, wheels)
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for name in set(archive.namelist()) & {name for names in LIBRARIES.values() for name in names}:
                (into / Path(name).name).write_bytes(archive.read(name))


def _download(arch: str, into: Path) -> None:
    """The wheels of another architecture; those in an index or folder that pip is configured for."""
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in LIBRARIES]
    options = [
        "--no-deps",
        "--only-binary=:all:",
        "--platform",
        f"manylinux_2_28_{arch}",
        "--dest",
        str(into),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", *options, *pins],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise VitqError(
            f"cannot download TVM's runtime for {arch}",
            where=f"pip download {' '.join(pins)}",
            got=done.stderr.strip()[-1000:],
            fix="check the network; pip's own settings (index, proxy) are used",
        )


def _compile(compiler: str, kit: Path) -> None:
    headers = importlib.metadata.distribution("apache-tvm-ffi").locate_file("tvm_ffi/include")
    library = kit / "lib"
    with importlib.resources.as_file(importlib.resources.files("tvm_vitq.deploy")) as sources:
        command = [compiler, *_FLAGS, f"-I{headers}", str(Path(sources) / "vitq_run.cc"), f"-L{library}"]
        # The virtual machine registers itself on loading; no symbol names its library, hence --no-as-needed.
        command += ["-Wl,-rpath,$ORIGIN/lib", f"-Wl,-rpath-link,{library}", "-Wl,--no-as-needed"]
        command += ["-ltvm_runtime_extra", "-ltvm_runtime", "-ltvm_ffi", "-o", str(kit / "vitq_run")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise VitqError("compiling vitq_run failed", where=compiler, got=done.stderr.strip()[-2000:])


def main(arguments: list[str]) -> int:
    """`python -m tvm_vitq.deploy_kit ARCH DIR`."""
    if len(arguments) != 2:
        print(f"usage: python -m tvm_vitq.deploy_kit {{{','.join(COMPILERS)}}} DIR", file=sys.stderr)
        return 2
    try:
        print(make(*arguments))
    except VitqError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
