"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys

import pytest

from tvm_vitq.errors import VitqError
from tvm_vitq.files import written_whole


def test_content_appears_at_once(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with written_whole(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, VitqError])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "plan.json"
    path.write_text("old")
    with pytest.raises(error), written_whole(path) as part:
        part.write_text("half")
        raise error("stop")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "No space left"), (errno.EDQUOT, "quota")])
def test_full_disk_is_told(tmp_path, number, words):
    with pytest.raises(VitqError, match=words), written_whole(tmp_path / "a.so"):
        raise OSError(number, os.strerror(number))
    assert os.listdir(tmp_path) == []


def test_missing_folder_is_told(tmp_path):
    with pytest.raises(VitqError, match="mkdir -p"), written_whole(tmp_path / "no" / "a.so"):
        pass


def test_folder_in_the_way_is_told(tmp_path):
    with pytest.raises(VitqError, match="in the way"), written_whole(tmp_path):
        pass


def test_real_file_size_limit(tmp_path):
    """The operating system itself refuses the write, in a process whose files may have 64 KiB."""
    code = (
        "import sys; from tvm_vitq.files import written_whole; from tvm_vitq.errors import VitqError\n"
        "try:\n"
        "    with written_whole(sys.argv[1]) as part: part.write_bytes(bytes(1 << 20))\n"
        "except VitqError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "big.so")],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
    )
    assert "ulimit" in done.stdout
    assert os.listdir(tmp_path) == []
