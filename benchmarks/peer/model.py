"""The images and the float logits that every engine is held against: `python -m peer.model JOB`."""

from __future__ import annotations

import math
import sys

import numpy as np

from peer.interface import Job

IMAGES = 32


def write(job: Job) -> None:
    """Writes images.npy, synthesized and seeded, and logits.npy, torch's float32 answer to them."""
    import torch

    from tvm_vitq.calibrate.synthesize import synthesize

    torch.set_num_threads(job.threads)
    model = job.torch_model()
    configuration = model.pretrained_cfg
    count = job.batch * math.ceil(IMAGES / job.batch)
    images = synthesize(count, tuple(configuration["input_size"]), configuration, job.seed)
    with torch.inference_mode():
        logits = torch.cat([model(part) for part in images.split(8)])
    np.save(job.folder / "images.npy", images.numpy())
    np.save(job.folder / "logits.npy", logits.numpy())


if __name__ == "__main__":
    write(Job.from_json(sys.argv[1]))
