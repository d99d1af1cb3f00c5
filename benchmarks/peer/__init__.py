"""Engines that run the same timm model side by side, one module each; see benchmarks/peers.py."""

from __future__ import annotations

from peer import onnx_runtime, openvino_cpu, pytorch, vitq
from peer.interface import Peer

PEERS: dict[str, Peer] = {
    peer.name: peer for module in (vitq, openvino_cpu, onnx_runtime, pytorch) for peer in module.PEERS
}
"""By name, in the order of the table. The modules import their engine only when asked to prepare it."""
