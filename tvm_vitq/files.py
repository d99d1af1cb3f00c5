"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tvm_vitq.errors import VitqError


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary file beside `path`; on success it takes the place of `path`, otherwise it is removed.

    The temporary file lies in the same folder because only a rename within one file system is atomic. Its
    content reaches the disk before the rename, so a crash leaves the old file or the new one.

    Raises
    ------
    VitqError : no such folder, no permission, disk or quota full, or any other OSError of the block.
    """
    final = Path(path)
    part = _beside(final)
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.chmod(0o666 & ~_umask())  # mkstemp makes private files
        os.replace(part, final)
    except OSError as error:
        raise _write_error(final, error) from error
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """VitqError as of `written_whole` if the file cannot be made: told before long work rather than after
    it.
    """
    _beside(Path(path)).unlink()


def _beside(final: Path) -> Path:
    if final.is_dir():
        raise VitqError("a folder is in the way of the file", where=final, fix="name a file inside it")
    try:
        handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent)
        os.close(handle)
    except OSError as error:
        raise _write_error(final, error) from error
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_error(path: Path, error: OSError) -> VitqError:
    fixes = {
        errno.ENOSPC: "free some space or choose another folder; nothing was left behind",
        errno.EDQUOT: "your quota is used up: free some space; nothing was left behind",
        errno.EFBIG: "the file size limit is too small (ulimit -f); nothing was left behind",
        errno.ENOENT: f"make the folder first: mkdir -p {path.parent}",
        errno.EACCES: "choose a folder that you may write to",
        errno.EROFS: "choose a folder that you may write to",
    }
    return VitqError(
        "cannot write the file", where=path, got=error.strerror or str(error), fix=fixes.get(error.errno or 0)
    )
