"""Views of handwritten digits: each image is moved, turned, stretched, brightened and disturbed by its own amounts.

A mirrored 2 is not a 2, so nothing is flipped; there is no colour to change. Whole batches at once, on any device.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .randomness import uniforms


@dataclass(frozen=True, kw_only=True)
class DigitRecipe:
    """One kind of view. Every amount is drawn uniformly from [-x, x] around no change."""

    size: int = 8  # output pixels
    rotation: float = 15.0  # degrees
    stretch: float = 0.2  # of the height, as a factor 1 ± x; not of the width: a narrow 8 is nearly a 1
    shear: float = 0.2  # horizontal shift per unit of height
    shift: float = 0.125  # of the side; 1/8 is one pixel of the original
    brightness: float = 0.3  # factor 1 ± x
    noise: float = 0.1  # standard deviation of normal noise, ink is 1


class DigitViews:
    """Augmented views of (B, 1, H, W) uint8 digits: a list of (B, 1, size, size) floats, ink near 1, paper near -1."""

    def __init__(self, recipes: list[DigitRecipe]):
        self.recipes = recipes

    def __call__(self, images: Tensor, indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        return [
            self._view(images, indices, seed=seed, epoch=epoch, view=view, recipe=recipe)
            for view, recipe in enumerate(self.recipes)
        ]

    def single(self, images: Tensor) -> Tensor:
        """The digits as they are, resampled to the size of the first view."""
        ink = images.float() / 255
        if images.shape[-1] != self.recipes[0].size:
            ink = F.interpolate(ink, size=self.recipes[0].size, mode="bilinear", align_corners=False)
        return 2 * ink - 1

    def _view(self, images, indices, *, seed, epoch, view, recipe: DigitRecipe) -> Tensor:
        pixels = recipe.size**2
        draws = torch.from_numpy(uniforms(seed=seed, epoch=epoch, indices=indices, view=view, count=6 + pixels)).float()
        signed = (2 * draws[:, :6] - 1).to(images.device, non_blocking=True)
        angle = signed[:, 0] * math.radians(recipe.rotation)
        height = 1 + recipe.stretch * signed[:, 1]
        shear = recipe.shear * signed[:, 2]
        cos, sin = angle.cos(), angle.sin()
        # Output coordinates to input coordinates, both in [-1, 1]: stretch, shear, turn, then shift.
        first = torch.stack([cos, (cos * shear - sin) * height, 2 * recipe.shift * signed[:, 3]], dim=1)
        second = torch.stack([sin, (sin * shear + cos) * height, 2 * recipe.shift * signed[:, 4]], dim=1)
        affine = torch.stack([first, second], dim=1)  # (B, 2, 3)
        grid = F.affine_grid(affine, [len(images), 1, recipe.size, recipe.size], align_corners=False)
        ink = F.grid_sample(images.float() / 255, grid, align_corners=False)  # paper outside
        ink = ink * (1 + recipe.brightness * signed[:, 5]).view(-1, 1, 1, 1)
        # Inverse distribution function of the normal; the clamp keeps draws that round to 0 or 1 finite.
        normal = math.sqrt(2) * torch.erfinv((2 * draws[:, 6:] - 1).clamp(-0.999999, 0.999999))
        normal = normal.to(images.device, non_blocking=True)
        return 2 * (ink + recipe.noise * normal.view_as(ink)) - 1
