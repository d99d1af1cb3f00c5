"""Images made up from natural statistics, for calibration without data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def synthesize(
    count: int, shape: tuple[int, ...], preprocessing: Mapping[str, Any] | None, seed: int
) -> torch.Tensor:
    """Normalized float32 images [count, 3, H, W]: 1/f noise in correlated colours with a few plain shapes on
    it.

    Natural images have amplitude spectra near 1/f, strongly correlated colour channels, and edges; images
    with these three excite a network's activations much more like real ones than white noise does. The same
    seed gives the same images.
    """
    rng = np.random.default_rng(seed)
    channels, height, width = shape
    images = np.stack([_image(rng, channels, height, width) for _ in range(count)])
    known = preprocessing or {}
    mean = np.asarray(known.get("mean", (0.485, 0.456, 0.406)), np.float32).reshape(-1, 1, 1)
    std = np.asarray(known.get("std", (0.229, 0.224, 0.225)), np.float32).reshape(-1, 1, 1)
    return torch.from_numpy(((images - mean) / std).astype(np.float32))


def _image(rng: np.random.Generator, channels: int, height: int, width: int) -> np.ndarray:
    """One image in 0..1."""
    brightness = _noise(rng, height, width)
    colours = np.stack([_noise(rng, height, width) for _ in range(channels)])
    image = rng.uniform(0.35, 0.6) + rng.uniform(0.1, 0.25) * (brightness + 0.4 * colours)
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    for _ in range(rng.integers(2, 7)):
        inside = _shape(rng, x, y)
        colour = rng.uniform(0.0, 1.0, (channels, 1, 1))
        shading = 1.0 + rng.uniform(-0.5, 0.5) * (x - 0.5) + rng.uniform(-0.5, 0.5) * (y - 0.5)
        opacity = rng.uniform(0.5, 1.0)
        image = np.where(inside, (1 - opacity) * image + opacity * colour * shading, image)
    return np.clip(image, 0.0, 1.0)


def _noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Noise with amplitude spectrum 1/f, mean 0 and variance 1."""
    spectrum = np.fft.rfft2(rng.standard_normal((height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.irfft2(spectrum / frequency, s=(height, width))
    return noise / noise.std()


def _shape(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Mask of an ellipse or a rectangle, turned by any angle."""
    centre_x, centre_y = rng.uniform(0.1, 0.9, 2)
    half_x, half_y = rng.uniform(0.04, 0.3, 2)
    angle = rng.uniform(0, np.pi)
    along = ((x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)) / half_x
    across = ((y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)) / half_y
    if rng.random() < 0.5:
        return along**2 + across**2 < 1
    return (np.abs(along) < 1) & (np.abs(across) < 1)
