"""Region proposals and RoI heads: torchvision's, with detectron2's losses, which do not depend on the number of ranks.

Letters: N images, A anchors, R sampled proposals of all images, K object classes (0 is the background), M side of a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import roi_align

from . import distributed

Targets = list[dict[str, Tensor]]


class Anchors(AnchorGenerator):
    """Anchors as in detectron2: their sides are not rounded, and the strides of the levels are fixed.

    Args:
        sizes: for each level the sides of square anchors in pixels.
        ratios: height / width.
        strides: pixels between neighbouring anchors, for each level.
    """

    def __init__(self, sizes: tuple[tuple[int, ...], ...], ratios: tuple[float, ...], *, strides: tuple[int, ...]):
        super().__init__(sizes, (ratios,) * len(sizes))
        self.strides = strides

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Return the (A, 4) anchors of all levels for each image; the centre of the first one is at 0, 0."""
        self.set_cell_anchors(feature_maps[0].dtype, feature_maps[0].device)
        grids = [list(features.shape[-2:]) for features in feature_maps]
        strides = [[torch.tensor(stride, device=feature_maps[0].device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors] * len(image_list.image_sizes)

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu") -> Tensor:
        """Return (ratios × scales, 4) boxes around the origin with the area scale² and height / width = ratio."""
        sizes = torch.as_tensor(scales, dtype=dtype, device=device)
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        widths, heights = (sizes / root[:, None]).flatten(), (sizes * root[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], dim=1) / 2


class SeededSampler(BalancedPositiveNegativeSampler):
    """Sample proposals of each image with a generator of its own.

    So the sample of an image depends neither on the other images of the batch, nor on the ranks or on a restart.

    Attributes:
        seeds: one seed per image. The detector sets them before each training step.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float):
        super().__init__(batch_size_per_image, positive_fraction)
        self.seeds: list[int] = []

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return two lists of masks: the sampled positive (>= 1) and the sampled negative (0) entries of each image."""
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels, seed in zip(matched, self.seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]
            wanted = min(len(positive), int(self.batch_size_per_image * self.positive_fraction))
            for places, count, masks in (
                (positive, wanted, chosen[0]),
                (negative, min(len(negative), self.batch_size_per_image - wanted), chosen[1]),
            ):
                order = torch.randperm(len(places), generator=generator)[:count].to(labels.device)
                mask = torch.zeros_like(labels, dtype=torch.bool)
                mask[places[order]] = True
                masks.append(mask)
        return chosen


class ProposalNetwork(RegionProposalNetwork):
    """Region proposal network whose losses are sums over the sampled anchors, divided by the size of a full sample.

    detectron2 divides by this constant too, and its box loss is the absolute difference (smooth L1 with beta 0).
    """

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: Targets | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the proposals of each image and, in training, the losses. Images that are smaller than the batch are padded."""
        with torch.autocast(images.tensors.device.type, enabled=False):  # boxes need more than the 8 bits of bfloat16
            return super().forward(images, {name: x.float() for name, x in features.items()}, targets)

    def compute_loss(self, objectness, pred_bbox_deltas, labels, regression_targets) -> tuple[Tensor, Tensor]:
        """Return the losses of objectness and boxes; (N·A, 1), (N·A, 4), N × (A,), N × (A, 4)."""
        positive, negative = (torch.cat(masks) for masks in self.fg_bg_sampler(labels))
        wanted, deltas = torch.cat(labels), torch.cat(regression_targets)
        sampled, scores = positive | negative, objectness.flatten()
        full = self.fg_bg_sampler.batch_size_per_image * len(labels)
        classified = F.binary_cross_entropy_with_logits(scores[sampled], wanted[sampled], reduction="sum")
        return classified / full, F.l1_loss(pred_bbox_deltas[positive], deltas[positive], reduction="sum") / full


class Heads(RoIHeads):
    """RoI heads for both architectures.

    Args:
        shared: with C4, the layers between the pooled features and both the box and the mask predictor (res5 and its extra
            normalisation). None: boxes and masks have their own pooling and layers, as torchvision's FPN.
        Other arguments: those of torchvision's RoIHeads.
    """

    def __init__(self, *, shared: nn.Module | None, positive_fraction: float = 0.25, rois: int, **arguments):
        super().__init__(batch_size_per_image=rois, positive_fraction=positive_fraction, **arguments)
        self.shared = shared
        self.fg_bg_sampler = SeededSampler(rois, positive_fraction)

    def forward(self, features, proposals, image_shapes, targets: Targets | None = None):
        """Return the detections of each image, or in training the losses.

        A detection has boxes (D, 4) and labels (D,) as in torchvision, and with masks also masks (D, 1, M, M), probabilities.
        """
        if not self.training:
            return self.detect(features, proposals, image_shapes), {}
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        pooled = self.pool(features, proposals, image_shapes)
        logits, regression = self.box_predictor(self.box_head(pooled))
        losses = box_losses(logits, regression, labels=torch.cat(labels), deltas=torch.cat(deltas))
        if self.has_mask():
            positive = [torch.where(one > 0)[0] for one in labels]
            boxes = [box[rows] for box, rows in zip(proposals, positive, strict=True)]
            objects = [match[rows] for match, rows in zip(matched, positive, strict=True)]
            if self.shared is not None:  # the features of the boxes are used again
                at = pooled[torch.cat([one > 0 for one in labels])]
            else:
                at = self.mask_roi_pool(features, boxes, image_shapes)
            classes = [one[rows] for one, rows in zip(labels, positive, strict=True)]
            logits = self.mask_predictor(self.mask_head(at)).float()
            wanted = [
                crop_masks(target["masks"], box, objects=match, size=logits.shape[-1])
                for target, box, match in zip(targets or [], boxes, objects, strict=True)
            ]
            losses["loss_mask"] = mask_loss(logits, torch.cat(classes), torch.cat(wanted))
        return [], losses

    def pool(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Return the features of the boxes; with C4 after res5 and its normalisation."""
        pooled = self.box_roi_pool(features, boxes, image_shapes)
        return pooled if self.shared is None else self.shared(pooled)

    def detect(self, features, proposals, image_shapes) -> list[dict[str, Tensor]]:
        """Return the detections of each image."""
        logits, regression = self.box_predictor(self.box_head(self.pool(features, proposals, image_shapes)))
        boxes, scores, labels = self.postprocess_detections(logits.float(), regression.float(), proposals, image_shapes)
        found = [
            {"boxes": box, "labels": label, "scores": score}
            for box, label, score in zip(boxes, labels, scores, strict=True)
        ]
        if self.has_mask():
            at = self.mask_roi_pool(features, boxes, image_shapes)
            at = at if self.shared is None else self.shared(at)
            logits = self.mask_predictor(self.mask_head(at)).float()
            for one, masks in zip(found, maskrcnn_inference(logits, labels), strict=True):
                one["masks"] = masks
        return found


def box_losses(logits: Tensor, regression: Tensor, *, labels: Tensor, deltas: Tensor) -> dict[str, Tensor]:
    """Return the losses of the classes and of the boxes: sums over the sampled proposals, divided by their number.

    Args:
        logits: (R, K + 1).
        regression: (R, 4 (K + 1)), one box for each class.
        labels: (R,) classes; 0 is the background.
        deltas: (R, 4) targets of the boxes.

    The number counts the proposals of all ranks, times the share of this rank. So the mean over ranks, which DDP takes of the
    gradients, is the loss of one process with the joined batch. The box loss has beta 0, as in detectron2.
    """
    rows = torch.where(labels > 0)[0]
    share = per_rank(labels.new_tensor(len(labels)))
    classified = F.cross_entropy(logits.float(), labels, reduction="sum") / share
    boxes = regression.float().reshape(len(labels), -1, 4)[rows, labels[rows]]
    return {"loss_classifier": classified, "loss_box_reg": F.l1_loss(boxes, deltas[rows], reduction="sum") / share}


def mask_loss(logits: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of the masks of the true classes, over the positives of all ranks.

    Args:
        logits: (P, K + 1, M, M).
        labels: (P,) classes from 1.
        wanted: (P, M, M), 0 or 1.
    """
    share = per_rank(labels.new_tensor(len(labels))) * logits.shape[-1] ** 2
    chosen = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(chosen, wanted, reduction="sum") / share


def per_rank(count: Tensor) -> Tensor:
    """Return the mean of a count over the ranks, at least 1 / ranks."""
    return distributed.sum_counts(count).clamp(min=1) / distributed.world_size()


def crop_masks(masks: Tensor, boxes: Tensor, *, objects: Tensor, size: int) -> Tensor:
    """Return the masks of objects inside boxes, resampled to size × size and rounded to 0 or 1, as in detectron2.

    Args:
        masks: (G, H, W) of the objects of an image.
        boxes: (P, 4).
        objects: (P,) which object each box shows.
    """
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    rois = torch.cat((objects[:, None].to(boxes), boxes), dim=1)
    cropped = roi_align(masks[:, None].to(boxes), rois, (size, size), 1.0, 0, True)
    return (cropped[:, 0] >= 0.5).to(boxes)
