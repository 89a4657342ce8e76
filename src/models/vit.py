"""Vision transformer whose position embedding is interpolated as in the code of Self-Classifier.

timm is slow to import, so `backbones.py` imports this module only when a ViT is built.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

MARGIN = 0.1  # the original adds this share of a patch to the number of patches before it divides


class SelfClassifierViT(VisionTransformer):
    """timm's vision transformer of depth 12 with the original's position embedding, (B, C, H, W) → (B, F).

    The features are the class token. For images whose size differs from that of the position embedding, timm interpolates
    the embedding with antialiasing; the original does not use antialiasing. The class token starts from a truncated normal
    distribution with standard deviation 0.02, as all other weights, and not near 0 as in timm.
    Source: Self-Classifier, arXiv:2103.10994v3, whose ViT is that of DINO, arXiv:2104.14294.

    Args:
        width: F, the size of the tokens.
        heads: number of attention heads.
        image_size: side in pixels of the images for which the position embedding is made.
        patch_size: side of the patches in pixels.
        in_channels: C.
    """

    def __init__(self, width: int, *, heads: int, image_size: int, patch_size: int, in_channels: int):
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            in_chans=in_channels,
            num_classes=0,
            global_pool="token",
            embed_dim=width,
            depth=12,
            num_heads=heads,
            dynamic_img_size=True,
        )
        assert self.cls_token is not None
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.width = width

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add the position embedding to the class token and the patches, (B, h, w, F) → (B, 1 + h · w, F)."""
        assert self.cls_token is not None
        assert self.pos_embed is not None
        positions = interpolated(self.pos_embed, self.patch_embed.grid_size, size=(x.shape[1], x.shape[2]))
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(1, 2)], dim=1) + positions


def interpolated(positions: Tensor, grid: tuple[int, int], *, size: tuple[int, int]) -> Tensor:
    """Interpolate a position embedding to another number of patches, bicubic and without antialiasing.

    The position of output patch i on the grid of n patches is (i + ½) · n / (size + 0.1) - ½. The margin of 0.1 is the
    original's, which adds it so that rounding does not lose a patch.

    Args:
        positions: (1, 1 + n · m, F), the class token and then the patches row by row.
        grid: n, m, the numbers of rows and columns of patches.
        size: the wanted numbers of rows and columns.

    Returns:
        (1, 1 + rows · columns, F). The entry of the class token is unchanged.
    """
    if size == tuple(grid):
        return positions
    first, patches = positions[:, :1], positions[:, 1:]
    patches = patches.unflatten(1, grid).permute(0, 3, 1, 2)
    scale = [(wanted + MARGIN) / have for wanted, have in zip(size, grid, strict=True)]
    patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", recompute_scale_factor=False)
    return torch.cat([first, patches.flatten(2).mT], dim=1)
