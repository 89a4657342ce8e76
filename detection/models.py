"""Mask R-CNN and Faster R-CNN on a ResNet-50, as C4 with an extra normalisation after res5, or as FPN."""

from collections import OrderedDict
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import ResNet
from torchvision.ops import MultiScaleRoIAlign, RoIAlign

from .heads import Anchors, Heads, ProposalNetwork, SeededSampler, Targets
from .normalization import BatchNormOverRanks

MEAN, STD = (123.675, 116.280, 103.530), (58.395, 57.120, 57.375)  # of ImageNet, for pixels from 0 to 255
LEVELS = {"layer1": "0", "layer2": "1", "layer3": "2", "layer4": "3"}
RATIOS = (0.5, 1.0, 2.0)  # height / width of anchors


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """What determines a detector.

    Attributes:
        architecture: "c4" or "fpn".
        classes: number of object classes, without the background.
        masks: Mask R-CNN instead of Faster R-CNN.
        anchor_sizes: sides of the anchors in pixels; with FPN one for each of the five levels.
        rpn_batch: anchors of an image that are sampled for the loss.
        roi_batch: proposals of an image that are sampled for the loss.
        pre_nms, post_nms: proposals of an image before and after non-maximum suppression, in training; with FPN, `pre_nms` is
            that of each level.
        pre_nms_test, post_nms_test: the same in evaluation.
        roi_size: side of the features that C4 pools from a box, before res5 halves it.
    """

    architecture: str
    classes: int
    masks: bool
    anchor_sizes: tuple[int, ...]
    rpn_batch: int
    roi_batch: int
    pre_nms: int
    post_nms: int
    pre_nms_test: int
    post_nms_test: int
    roi_size: int = 14

    def as_plain(self) -> dict:
        """Return the options as plain containers, for a file."""
        return {**asdict(self), "anchor_sizes": list(self.anchor_sizes)}


class C4Backbone(nn.Module):
    """The layers of a ResNet up to res4, whose output has a stride of 16 pixels and 1,024 channels."""

    out_channels = 1024

    def __init__(self, network: ResNet):
        super().__init__()
        names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
        self.body = nn.Sequential(OrderedDict((name, getattr(network, name)) for name in names))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return (N, 1024, H / 16, W / 16) under the name "0"."""
        return {"0": self.body(x)}


class Res5(nn.Module):
    """res5 of a ResNet, and the extra normalisation of the published transfer protocol."""

    def __init__(self, network: ResNet):
        super().__init__()
        self.layer4 = network.layer4
        self.norm = BatchNormOverRanks(2048)

    def forward(self, x: Tensor) -> Tensor:
        """Return (R, 2048, 7, 7) for (R, 1024, 14, 14)."""
        return self.norm(self.layer4(x))


class C4Pool(nn.Module):
    """RoIAlign to S × S with half-pixel offset, from the features of stride 16. S is 14 in the published protocol."""

    def __init__(self, side: int = 14) -> None:
        super().__init__()
        self.align = RoIAlign(side, spatial_scale=1 / 16, sampling_ratio=0, aligned=True)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        """Return (R, 1024, S, S) for the boxes of all images, in pixels of the images."""
        return self.align(features["0"].float(), boxes)


class Detector(nn.Module):
    """A two-stage detector.

    Args:
        backbone: returns a dict of feature maps.
        rpn, heads: see `detection.heads`.
        stride: images are padded to a multiple of it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, *, rpn: ProposalNetwork, heads: Heads, stride: int):
        super().__init__()
        self.backbone, self.rpn, self.heads, self.stride = backbone, rpn, heads, stride
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)

    def forward(self, images: list[Tensor], targets: Targets | None = None):
        """Return the losses in training, {name: scalar}, else a dict with boxes, labels, scores and masks for each image.

        Args:
            images: (3, H, W) each, uint8 RGB; the sizes may differ.
            targets: in training, for each image boxes (G, 4) as x0, y0, x1, y1 in pixels, labels (G,) from 1, with masks also
                masks (G, H, W), and a scalar `seed` for the sampling of proposals. G may be 0.
        """
        if self.training:
            seeds = [int(target["seed"]) for target in targets or []]
            self.rpn.fg_bg_sampler.seeds = self.heads.fg_bg_sampler.seeds = seeds
        batch = self.joined(images)
        features = self.backbone(batch.tensors)
        proposals, losses = self.rpn(batch, features, targets)
        found, more = self.heads(features, proposals, batch.image_sizes, targets)
        return {**losses, **more} if self.training else found

    def joined(self, images: list[Tensor]) -> ImageList:
        """Return the normalised images in one tensor, padded at the right and at the bottom by zeros."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        height, width = (-(-max(side) // self.stride) * self.stride for side in zip(*sizes, strict=True))
        tensors = self.mean.new_zeros(len(images), 3, height, width)
        for place, image, (rows, columns) in zip(tensors, images, sizes, strict=True):
            place[:, :rows, :columns] = (image.to(self.mean) - self.mean) / self.std
        return ImageList(tensors, sizes)


def build_detector(options: ModelOptions, backbone: dict[str, Tensor] | None) -> Detector:
    """Return a detector in which nothing is frozen.

    Args:
        options: see `ModelOptions`.
        backbone: weights of a ResNet-50 under torchvision's names, without `fc`. None: random weights.
    """
    network = resnet50(norm_layer=BatchNormOverRanks)
    del network.fc
    if backbone is not None:
        network.load_state_dict(backbone)
    build = _c4 if options.architecture == "c4" else _fpn
    model = build(network, options)
    model.rpn.fg_bg_sampler = SeededSampler(options.rpn_batch, 0.5)
    return model


def backbone_tensors(model: Detector) -> dict[str, Tensor]:
    """Return the tensors of the ResNet-50 in a detector under torchvision's names."""
    found = {}
    for name, tensor in model.state_dict().items():
        for before in ("backbone.body.", "heads.shared."):
            inner = name.removeprefix(before)
            if inner != name and not inner.startswith("norm."):
                found[inner] = tensor
    return found


def _proposals(options: ModelOptions, anchors: Anchors, channels: int) -> ProposalNetwork:
    return ProposalNetwork(
        anchors,
        RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=options.rpn_batch,
        positive_fraction=0.5,
        pre_nms_top_n={"training": options.pre_nms, "testing": options.pre_nms_test},
        post_nms_top_n={"training": options.post_nms, "testing": options.post_nms_test},
        nms_thresh=0.7,
    )


def _heads(options: ModelOptions, *, box_roi_pool: nn.Module, box_head: nn.Module, width: int, **masks) -> Heads:
    predictor = FastRCNNPredictor(width, options.classes + 1)
    for layer, deviation in ((predictor.cls_score, 0.01), (predictor.bbox_pred, 0.001)):
        nn.init.normal_(layer.weight, std=deviation)
        nn.init.zeros_(layer.bias)
    nn.init.normal_(masks["mask_predictor"].mask_fcn_logits.weight, std=0.001)
    nn.init.zeros_(masks["mask_predictor"].mask_fcn_logits.bias)
    if not options.masks:
        masks = {"shared": masks["shared"]}
    return Heads(
        box_roi_pool=box_roi_pool,
        box_head=box_head,
        box_predictor=predictor,
        rois=options.roi_batch,
        fg_iou_thresh=0.5,
        bg_iou_thresh=0.5,
        bbox_reg_weights=(10.0, 10.0, 5.0, 5.0),
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=100,
        **masks,
    )


def _c4(network: ResNet, options: ModelOptions) -> Detector:
    """Return R50-C4: proposals from res4, and res5 with its extra normalisation on each proposal."""
    backbone, pool = C4Backbone(network), C4Pool(options.roi_size)
    heads = _heads(
        options,
        shared=Res5(network),
        box_roi_pool=pool,
        box_head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        width=2048,
        mask_roi_pool=pool,
        mask_head=nn.Identity(),
        mask_predictor=MaskRCNNPredictor(2048, 256, options.classes + 1),
    )
    rpn = _proposals(options, Anchors((options.anchor_sizes,), RATIOS, strides=(16,)), backbone.out_channels)
    return Detector(backbone, rpn=rpn, heads=heads, stride=16)


def _fpn(network: ResNet, options: ModelOptions) -> Detector:
    """Return R50-FPN with torchvision's heads."""
    backbone = BackboneWithFPN(network, LEVELS, [256, 512, 1024, 2048], 256, norm_layer=BatchNormOverRanks)
    names = list(LEVELS.values())
    heads = _heads(
        options,
        shared=None,
        box_roi_pool=MultiScaleRoIAlign(names, 7, 0),
        box_head=TwoMLPHead(256 * 7 * 7, 1024),
        width=1024,
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 0),
        mask_head=MaskRCNNHeads(256, (256,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(256, 256, options.classes + 1),
    )
    anchors = Anchors(tuple((size,) for size in options.anchor_sizes), RATIOS, strides=(4, 8, 16, 32, 64))
    return Detector(backbone, rpn=_proposals(options, anchors, 256), heads=heads, stride=32)
