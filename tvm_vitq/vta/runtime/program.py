"""The launches of a model, as a file holds them and as a device runs them.

Streams share buffers: what one launch stores, a later one may load. Addresses are settled when a program is
placed on a device; there every stream is proved sound before it runs.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tvm_vitq.errors import VitqError
from tvm_vitq.numerics import Array
from tvm_vitq.vta.check import Region, require_sound
from tvm_vitq.vta.machine.config import INSTRUCTION_BYTES, PAGE, VtaConfig
from tvm_vitq.vta.machine.cycles import Cycles, count_cycles
from tvm_vitq.vta.machine.isa import Instruction, Store, decode, encode
from tvm_vitq.vta.runtime.device import Allocation, Device
from tvm_vitq.vta.stream.assembler import Buffer, Stream
from tvm_vitq.vta.stream.launch import Launch
from tvm_vitq.vta.stream.operand import Operand

HEADER = "program.json"


@dataclass
class Program:
    """Launches in the order in which a call of the model runs them.

    config : the machine.
    launches : by name.
    """

    config: VtaConfig
    launches: dict[str, Launch]

    @property
    def buffers(self) -> list[Buffer]:
        """All buffers, each once, in the order of their first use."""
        used = (buffer for launch in self.launches.values() for buffer in launch.stream.buffers)
        return list(dict.fromkeys(used))

    @property
    def memory(self) -> int:
        """Bytes of device memory that it needs."""
        streams = (INSTRUCTION_BYTES * len(launch.stream.program) for launch in self.launches.values())
        sizes = [*(buffer.size for buffer in self.buffers), *streams]
        return sum(-(-max(size, 1) // PAGE) * PAGE for size in sizes)

    def to_bytes(self) -> bytes:
        """A file's content, for `from_bytes`."""
        place = {buffer: number for number, buffer in enumerate(self.buffers)}
        header = {
            "config": asdict(self.config),
            "buffers": [[buffer.name, buffer.size, buffer.written] for buffer in place],
            "launches": {
                name: {
                    "buffers": [place[buffer] for buffer in launch.stream.buffers],
                    "inputs": [_operand_to_json(operand, place) for operand in launch.inputs],
                    "outputs": [_operand_to_json(operand, place) for operand in launch.outputs],
                    "macs": launch.macs,
                }
                for name, launch in self.launches.items()
            },
        }
        arrays: dict[str, Any] = {HEADER: np.frombuffer(json.dumps(header).encode(), np.uint8)}
        for buffer, number in place.items():
            if buffer.contents is not None:
                arrays[f"contents {number}"] = buffer.contents
        for number, launch in enumerate(self.launches.values()):
            arrays[f"stream {number}"] = np.frombuffer(encode(launch.stream.program, self.config), np.uint8)
            arrays[f"uses {number}"] = np.array(launch.stream.uses, np.int32)
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: object = "VTA program") -> Program:
        """The inverse of `to_bytes`.

        Raises
        ------
        VitqError : other content.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                header = json.loads(arrays[HEADER].tobytes())
                config = VtaConfig(**header["config"])
                buffers = [
                    Buffer(name, size, arrays.get(f"contents {number}"), written)
                    for number, (name, size, written) in enumerate(header["buffers"])
                ]
                launches = {}
                for number, (name, made) in enumerate(header["launches"].items()):
                    program = decode(arrays[f"stream {number}"].tobytes(), config)
                    uses = arrays[f"uses {number}"].tolist()
                    stream = Stream(program, [buffers[place] for place in made["buffers"]], uses)
                    inputs, outputs = (
                        [_operand_from_json(entry, buffers) for entry in made[side]]
                        for side in ("inputs", "outputs")
                    )
                    launches[name] = Launch(stream, inputs, outputs, made["macs"])
        except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
            raise VitqError("VTA program is damaged", where=where, got=error, fix="build it again") from error
        return cls(config, launches)


def _operand_to_json(operand: Operand, place: Mapping[Buffer, int]) -> list[Any]:
    planes = [place[plane] for plane in operand.planes]
    return [planes, operand.count, operand.rows, operand.columns, operand.dtype, operand.order]


def _operand_from_json(data: list[Any], buffers: list[Buffer]) -> Operand:
    planes, count, rows, columns, dtype, order = data
    return Operand(tuple(buffers[plane] for plane in planes), count, rows, columns, dtype, tuple(order))


class PlacedProgram:
    """A program on a device.

    Parameters
    ----------
    program : for a machine of the device's configuration.
    device : where its buffers are allocated, constants written, and streams checked.

    Raises
    ------
    VitqError : a program for another machine, a stream that is not sound, no memory.
    """

    def __init__(self, program: Program, device: Device) -> None:
        if program.config != device.config:
            raise VitqError(
                "program is for another VTA", got=program.config, expected=device.config, fix="build it again"
            )
        self._program, self._device = program, device
        self._allocated: dict[Buffer, Allocation] = {}
        self._streams: dict[str, Allocation] = {}
        self._programs: dict[str, list[Instruction]] = {}
        try:
            self._place(program, device)
        except BaseException:
            self.close()
            raise

    def _place(self, program: Program, device: Device) -> None:
        for buffer in program.buffers:
            self._allocated[buffer] = device.allocate(buffer.size)
        for buffer, memory in self._allocated.items():
            if buffer.contents is not None:
                memory.write(buffer.contents)
        stored: set[Buffer] = set()
        for name, launch in program.launches.items():
            stream = launch.stream
            placed = stream.placed([self._allocated[b].address for b in stream.buffers], program.config)
            writes = {
                stream.buffers[used]
                for used, instruction in zip(stream.uses, stream.program, strict=True)
                if used >= 0 and isinstance(instruction, Store)
            }
            regions = [self._region(buffer, writes, stored) for buffer in stream.buffers]
            require_sound(placed, program.config, regions, name)
            stored |= writes
            self._programs[name] = placed
            self._streams[name] = device.allocate(INSTRUCTION_BYTES * len(placed))
            self._streams[name].write(np.frombuffer(encode(placed, program.config), np.uint8))

    def _region(self, buffer: Buffer, writes: set[Buffer], stored: set[Buffer]) -> Region:
        address = self._allocated[buffer].address
        return Region(
            buffer.name,
            address,
            buffer.size,
            contents=buffer.contents,
            written=buffer.written or buffer in stored,
            writable=buffer in writes and buffer.contents is None,
        )

    def run(self, name: str, *inputs: Array) -> list[Array]:
        """Runs a launch: tensors to device memory, the stream, and its results from there."""
        launch, block = self._program.launches[name], self._device.config.block
        for operand, tensor in zip(launch.inputs, inputs, strict=True):
            for plane, content in zip(operand.planes, operand.packed(tensor, block), strict=True):
                self._allocated[plane].write(content)
        self._device.run(self._streams[name], len(self._programs[name]))
        return [
            operand.unpacked([self._allocated[plane].read() for plane in operand.planes], block)
            for operand in launch.outputs
        ]

    def cycles(self, name: str) -> Cycles:
        """Of a launch, by the cycle model."""
        return count_cycles(self._programs[name], self._device.config)

    def close(self) -> None:
        """Gives all device memory back."""
        for memory in (*self._allocated.values(), *self._streams.values()):
            memory.free()
