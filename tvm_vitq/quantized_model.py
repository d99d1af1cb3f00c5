"""The quantized model: an integer graph and the plan that it was made from, in memory and on disk."""

from __future__ import annotations

import json
import os
import zipfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.files import written_whole
from tvm_vitq.numerics import Array
from tvm_vitq.plan import QuantPlan

if TYPE_CHECKING:
    import tvm

    from tvm_vitq.reference import Program

FORMAT = "tvm-vitq model"
FORMAT_VERSION = 1


class QuantizedModel:
    """What `quantize` returns: target-independent, exact, ready to be compiled for any target.

    Attributes
    ----------
    plan : every quantizer, the calibration and its source.
    mod : the integer Relax graph; its operators are those of tvm_vitq/numerics.py.
    name : name of the float model.
    """

    def __init__(self, mod: tvm.IRModule, plan: QuantPlan) -> None:
        self.mod = mod
        self.plan = plan

    @property
    def name(self) -> str:
        return self.plan.model or "model"

    @cached_property
    def input_shape(self) -> tuple[int, ...]:
        """(N, 3, H, W); N is the batch size of the build."""
        return tuple(int(v) for v in self.mod["main"].params[0].ty.shape)

    @cached_property
    def classes(self) -> int:
        return int(self.mod["main"].ret_ty.shape[-1])

    @cached_property
    def float_islands(self) -> list[tuple[str, str]]:
        """Name and operator of everything that stays in float; empty for a fully integer model."""
        from tvm_vitq.relax_passes.realize import float_islands

        return float_islands(self.mod)

    @cached_property
    def _program(self) -> Program:
        from tvm_vitq.reference import Program

        return Program(self.mod)

    def reference(self, x: Any) -> Array:
        """Logits by NumPy: what every compiled library returns, bit for bit.

        Parameters
        ----------
        x : float32 (n, 3, H, W), normalized, for any n: batches of the graph's size, the last one padded.

        Raises
        ------
        VitqError : wrong shape or dtype, NaN or infinity, or a model with float operators.
        """
        images = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
        if images.dtype != np.float32 or images.shape[1:] != self.input_shape[1:] or not len(images):
            raise VitqError(
                "wrong input",
                where="reference",
                got=f"{images.dtype} {images.shape}",
                expected=f"float32 (n, {', '.join(map(str, self.input_shape[1:]))})",
            )
        if not np.isfinite(images).all():
            raise VitqError("input has NaN or infinity", where="reference", expected="finite images")
        batch = self.input_shape[0]
        padded = np.concatenate([images, np.zeros((-len(images) % batch, *images.shape[1:]), np.float32)])
        parts = [self._program(padded[i : i + batch]) for i in range(0, len(padded), batch)]
        return np.concatenate(parts)[: len(images)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model, whole or not at all: a zip file with graph, plan and format version."""
        import tvm

        header = {"format": FORMAT, "format_version": FORMAT_VERSION, "plan_hash": self.plan.hash}
        with (
            written_whole(path) as part,
            zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        ):
            archive.writestr("header.json", json.dumps(header, indent=1))
            archive.writestr("plan.json", json.dumps(self.plan.to_dict(), indent=1))
            archive.writestr("graph.json", tvm.ir.save_json(self.mod))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> QuantizedModel:
        """Read a model written by `save`; VitqError if the file is missing, truncated, foreign or of another
        version.
        """
        import tvm

        from tvm_vitq import ops  # noqa: F401  registers the operators that the graph calls

        file = Path(path)
        if not file.is_file():
            raise VitqError(
                "no such model file", where=file, fix="write one with QuantizedModel.save or `vitq quantize`"
            )
        try:
            with zipfile.ZipFile(file) as archive:
                header = dict(json.loads(archive.read("header.json")))
                if header.get("format") != FORMAT or header.get("format_version") != FORMAT_VERSION:
                    raise VitqError(
                        "not a quantized model of this version",
                        where=file,
                        got=f"{header.get('format')} version {header.get('format_version')}",
                        expected=f"{FORMAT} version {FORMAT_VERSION}",
                        fix="quantize the model anew with this version of tvm-vitq",
                    )
                plan = QuantPlan.from_dict(json.loads(archive.read("plan.json")), f"{file}: plan.json")
                mod = tvm.ir.load_json(archive.read("graph.json").decode())
                mod["main"]
        except VitqError:
            raise
        except Exception as error:  # zipfile, json and TVM raise many types for damaged content
            reason = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise VitqError(
                "the file is truncated, damaged or not a quantized model",
                where=file,
                got=str(reason).split("\n")[0],
                fix="write it again with QuantizedModel.save or `vitq quantize`",
            ) from error
        return cls(mod, plan)
