"""8 × 8 digits (scikit-learn ships them, 1,797 images), split once for all, and moved between domains on request."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ...dist.errors import MissingPackage

DOMAINS = ("plain", "left", "down", "right", "grey", "mirrored", "tilted")


@dataclass(frozen=True)
class Split:
    """Images float32[N, 64] in [0, 1] and labels int64[N]."""

    x: Tensor
    y: Tensor

    def batch(self, *, seed: int, step: int, rows: slice, batch: int) -> tuple[Tensor, Tensor]:
        generator = np.random.Generator(np.random.Philox(key=[seed, step]))
        picked = torch.from_numpy(generator.integers(0, len(self.y), size=batch)[rows])
        return self.x[picked], self.y[picked]

    def to(self, device: torch.device) -> Split:
        return Split(self.x.to(device), self.y.to(device))


@cache
def load() -> tuple[Split, Split, Split]:
    """Train (1,200), validation (297) and test (300), in a fixed order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackage("scikit-learn", extra="workloads", needed_for="the digits workload") from error
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.from_numpy(images[order].astype("float32") / 16)
    y = torch.from_numpy(labels[order].astype("int64"))
    return Split(x[:1200], y[:1200]), Split(x[1200:1497], y[1200:1497]), Split(x[1497:], y[1497:])


def moved(split: Split, domain: str) -> Split:
    """The same images in another domain."""
    image = split.x.view(-1, 8, 8)
    changed = {
        "plain": lambda: image,
        "left": lambda: image.roll(-1, 2),
        "down": lambda: image.roll(1, 1),
        "right": lambda: image.roll(1, 2),
        "grey": lambda: 0.5 - 0.4 * image,
        "mirrored": lambda: image.flip(2),
        "tilted": lambda: _tilt(image),
    }[domain]()
    return Split(changed.reshape(-1, 64).contiguous(), split.y)


def _tilt(image: Tensor) -> Tensor:
    """The upper half a pixel to the right, the lower half a pixel to the left."""
    return torch.cat((image[:, :4].roll(1, 2), image[:, 4:].roll(-1, 2)), 1)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(-1) == labels).double().mean().item()
