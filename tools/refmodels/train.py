"""Trains one reference model on procedural images: `python tools/refmodels/train.py vit`.

Every image is drawn once and never repeated, so there is nothing to overfit and no augmentation. The nuisance
grows during the first part of training, because small transformers do not take off on the full task. Muon
trains the weights of the linear layers, with several times fewer images than AdamW needs here; AdamW trains
the rest. Interrupted runs resume from the last checkpoint with the same images.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from tvm_vitq.refmodels import scenes
from tvm_vitq.refmodels.architectures import build
from tvm_vitq.refmodels.images import normalize

CHUNK = 2048
"""Images drawn at a time; the chunk's number is its random seed."""
MONITOR_SEED = 10_000_000
"""Stream of the progress figures; the shipped images come from other streams."""


def severity(progress: float) -> float:
    return min(1.0, 0.2 + 0.8 * progress / 0.4)


def rate(progress: float, warmup: float = 0.04) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to zero."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: np.ndarray, labels: np.ndarray) -> float:
    model.eval()
    hits = 0
    for start in range(0, len(images), 250):
        logits = model(torch.from_numpy(normalize(images[start : start + 250])))
        hits += int((logits.argmax(1).numpy() == labels[start : start + 250]).sum())
    model.train()
    return hits / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=["vit", "swin"])
    parser.add_argument("--chunks", type=int, default=90, help=f"training length in chunks of {CHUNK} images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint file, resumed from if it exists")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    model = build(arguments.model).train()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # on a CPU, plain matmuls train 1.7 times faster on so few tokens
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=True
    )
    matrices = [
        m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "head" not in n
    ]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=arguments.rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=arguments.rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    first, spent = 0, 0.0
    if arguments.out.exists():
        state = torch.load(arguments.out, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, spent = state["chunks"], state["seconds"]

    monitors = {
        "train sources": scenes.draw(scenes.TRAIN, 500, MONITOR_SEED),
        "test sources": scenes.draw(scenes.TEST, 500, MONITOR_SEED),
    }
    started = time.time()
    for chunk in range(first, arguments.chunks):
        losses = []
        images, labels = scenes.draw(
            scenes.TRAIN, CHUNK, arguments.seed * 1_000_000 + chunk, severity(chunk / arguments.chunks)
        )
        for start in range(0, CHUNK, arguments.batch):
            progress = (chunk + start / CHUNK) / arguments.chunks
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = arguments.rate * rate(progress)
            batch = torch.from_numpy(normalize(images[start : start + arguments.batch]))
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch).float()
            target = torch.from_numpy(labels[start : start + arguments.batch])
            loss = functional.cross_entropy(logits, target, label_smoothing=0.05)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(rest, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            average.update_parameters(model)
            losses.append(float(loss.detach()))
        seconds = spent + time.time() - started
        line = f"{arguments.model} chunk {chunk + 1}/{arguments.chunks} loss {np.mean(losses):.3f}"
        if (chunk + 1) % 5 == 0 or chunk + 1 == arguments.chunks:
            for name, (monitor, truth) in monitors.items():
                line += f" | {name} {100 * accuracy(average.module, monitor, truth):.1f} %"
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "chunks": chunk + 1,
                "seconds": seconds,
                "command": f"python tools/refmodels/train.py {arguments.model} --chunks {arguments.chunks} "
                f"--batch {arguments.batch} --rate {arguments.rate} --seed {arguments.seed} "
                f"--out {arguments.out.name}",
            }
            partial = arguments.out.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(arguments.out)
        left = (time.time() - started) / (chunk + 1 - first) * (arguments.chunks - chunk - 1)
        print(f"{line} | {seconds / 60:.1f} min, {left / 60:.1f} left", flush=True)


if __name__ == "__main__":
    main()
