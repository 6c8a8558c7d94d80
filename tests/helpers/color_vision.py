"""How far apart two colors are, to readers of every common kind of color vision.

Color blindness as Machado, Oliveira and Fernandes (2009) simulate it, at its full severity: a matrix on linear sRGB. Distances are
those of CIELAB under D65 (CIE 1976): 2 to 3 is what a trained eye just sees with both colors side by side.
"""

from __future__ import annotations

import numpy as np

KINDS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
# sRGB's primaries (IEC 61966-2-1).
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def rgb(color: str) -> tuple[float, ...]:
    """`#1c66a8` as three numbers in 0..1."""
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))


def lab(color: str, kind: str) -> np.ndarray:
    """Lightness and the two opponent axes of a color as a kind of reader sees it."""
    srgb = np.array(rgb(color))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = XYZ @ np.clip(KINDS[kind] @ linear, 0, 1) / XYZ.sum(1)
    x, y, z = np.where(seen > (6 / 29) ** 3, np.cbrt(seen), seen / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(one: str, other: str) -> float:
    """The smallest over the kinds."""
    return min(float(np.linalg.norm(lab(one, kind) - lab(other, kind))) for kind in KINDS)
