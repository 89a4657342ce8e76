"""Views of handwritten digits: random shift, rotation, stretch, shear, brightness and noise.

Each image gets its own random amounts. The views are never flipped, because a mirrored 2 is not a 2, and the digits have no
colour to change. The code augments whole batches at once, on any device.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Views
from .randomness import uniforms

LUMA = (0.299, 0.587, 0.114)  # shares of red, green and blue in grey, ITU-R BT.601; they sum to 1


@dataclass(frozen=True, kw_only=True)
class DigitRecipe:
    """Parameters of one view. A parameter x means that the change is uniform in [-x, x], where 0 is no change."""

    size: int = 8  # output pixels
    rotation: float = 15.0  # degrees
    stretch: float = 0.2  # factor 1 ± x of the height. The width is not stretched: a narrow 8 looks like a 1.
    shear: float = 0.2  # horizontal shift per unit of height
    shift: float = 0.125  # share of the side; 1/8 is one pixel of the original image
    brightness: float = 0.3  # factor 1 ± x
    noise: float = 0.1  # standard deviation of the normal noise, on a scale where ink is 1


PLAIN_DIGIT = DigitRecipe(rotation=0, stretch=0, shear=0, shift=0, brightness=0, noise=0)  # no augmentation


class DigitViews(Views):
    """Make augmented views of (B, 1, H, W) uint8 digits.

    The views are a list of (B, 1, size, size) tensors of torch's default dtype. Ink is near 1 and paper is near -1.

    Args:
        recipes: one for each view.
    """

    def __init__(self, recipes: list[DigitRecipe]):
        self.recipes = recipes

    def __call__(self, images: Tensor, indices: np.ndarray, *, seed: int, epoch: int) -> list[Tensor]:
        return [
            self._view(images, indices, seed=seed, epoch=epoch, view=view, recipe=recipe)
            for view, recipe in enumerate(self.recipes)
        ]

    def single(self, images: Tensor) -> Tensor:
        """Return the digits without augmentation, resized to the size of the first view."""
        ink = images.to(torch.get_default_dtype()) / 255
        if images.shape[-1] != self.recipes[0].size:
            ink = F.interpolate(ink, size=self.recipes[0].size, mode="bilinear", align_corners=False)
        return 2 * ink - 1

    def single_cut(self, image: Tensor) -> Tensor:
        """Return a decoded image in grey, resized to the size of the first view, (1, size, size) uint8. White is ink."""
        grey = (image.float() * torch.tensor(LUMA).view(3, 1, 1)).sum(dim=0, keepdim=True)
        size = self.recipes[0].size
        if image.shape[-2:] != (size, size):
            grey = F.interpolate(grey[None], size=(size, size), mode="bilinear", align_corners=False, antialias=True)[0]
        return grey.round().clamp(0, 255).to(torch.uint8)

    def single_finish(self, crops: Tensor) -> Tensor:
        """Do what `single` does to the results of `single_cut`."""
        return self.single(crops)

    def _view(
        self, images: Tensor, indices: np.ndarray, *, seed: int, epoch: int, view: int, recipe: DigitRecipe
    ) -> Tensor:
        """Make one view of a batch, (B, 1, size, size)."""
        pixels, dtype = recipe.size**2, torch.get_default_dtype()
        draws = torch.from_numpy(uniforms(seed=seed, epoch=epoch, indices=indices, view=view, count=6 + pixels))
        draws = draws.to(dtype)
        signed = (2 * draws[:, :6] - 1).to(images.device, non_blocking=True)
        angle = signed[:, 0] * math.radians(recipe.rotation)
        height = 1 + recipe.stretch * signed[:, 1]
        shear = recipe.shear * signed[:, 2]
        cos, sin = angle.cos(), angle.sin()
        # The matrix maps output to input coordinates, both in [-1, 1]: stretch, shear, rotate, then shift.
        first = torch.stack([cos, (cos * shear - sin) * height, 2 * recipe.shift * signed[:, 3]], dim=1)
        second = torch.stack([sin, (sin * shear + cos) * height, 2 * recipe.shift * signed[:, 4]], dim=1)
        affine = torch.stack([first, second], dim=1)  # (B, 2, 3)
        grid = F.affine_grid(affine, [len(images), 1, recipe.size, recipe.size], align_corners=False)
        ink = F.grid_sample(images.to(dtype) / 255, grid, align_corners=False)  # pixels outside the image are paper
        ink = ink * (1 + recipe.brightness * signed[:, 5]).view(-1, 1, 1, 1)
        # Inverse distribution function of the normal. The clamp keeps the noise finite where a draw rounds to 0 or 1.
        normal = math.sqrt(2) * torch.erfinv((2 * draws[:, 6:] - 1).clamp(-0.999999, 0.999999))
        normal = normal.to(images.device, non_blocking=True)
        return 2 * (ink + recipe.noise * normal.view_as(ink)) - 1
