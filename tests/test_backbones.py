"""Backbones and heads: shapes, numbers of parameters known by hand, and what is refused."""

import json
import math
from itertools import pairwise

import pytest
import torch
from conftest import GOLDEN
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from src.errors import InputError
from src.models.backbones import WideResNet, build_backbone, count_parameters
from src.models.heads import ProjectionHead, WeightNormClassifier
from src.models.vit import interpolated

# Published counts of the networks with a classifier of 1000 classes, less that classifier.
TORCHVISION = {
    "resnet18": (512, 11_689_512 - 513_000),
    "resnet50": (2048, 25_557_032 - 2_049_000),
    "shufflenet_v2_x0_5": (1024, 1_366_792 - 1_025_000),
}


@pytest.mark.parametrize("arch", TORCHVISION)
def test_torchvision_networks_lose_their_classifier(arch):
    width, parameters = TORCHVISION[arch]
    backbone = build_backbone(arch).eval()
    assert (backbone.width, count_parameters(backbone)) == (width, parameters)
    with torch.no_grad():
        assert backbone(torch.rand(2, 3, 64, 64)).shape == (2, width)


# In millions, as SwAV's authors give them, arXiv:2006.09882 (94, 375 and 586).
WIDE = {"resnet50w2": (4096, 93.91), "resnet50w4": (8192, 375.38), "resnet50w5": (10240, 586.45)}


@pytest.mark.parametrize("arch", WIDE)
def test_wide_resnets_have_the_published_sizes(arch):
    with torch.device("meta"):  # without memory
        backbone = build_backbone(arch)
        assert backbone(torch.empty(2, 3, 64, 64)).shape == (2, backbone.width)
    width, millions = WIDE[arch]
    assert backbone.width == width
    assert count_parameters(backbone) / 1e6 == pytest.approx(millions, abs=0.005)


def test_a_wide_resnet_of_width_one_is_torchvisions():
    torch.manual_seed(0)
    theirs, ours = build_backbone("resnet50"), WideResNet(1)
    for name, parameter in ours.named_parameters():  # both start alike
        other = theirs.get_parameter(name)
        assert parameter.std().item() == pytest.approx(other.std().item(), rel=0.1), name
        assert parameter.mean().item() == pytest.approx(other.mean().item(), abs=0.05), name
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(
            ours(images), theirs(images), rtol=1e-4, atol=1e-4
        )  # in training mode, which changes statistics
        assert torch.allclose(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "arch"), [("swav_resnet50", "resnet50"), ("swav_resnet50w2", "resnet50w2")])
def test_resnets_have_the_layout_of_swavs_code(name, arch):
    path = GOLDEN / "key_layouts.json"
    if not path.exists():
        pytest.skip(f"needs the file {path.name}, which is not public; it is looked for in ../shared/golden")
    layout = [(key.removeprefix("module."), shape) for key, shape in json.loads(path.read_text())[name]]
    with torch.device("meta"):
        state = build_backbone(arch).state_dict()
    trunk = {key: shape for key, shape in layout if not key.startswith(("projection_head.", "prototypes."))}
    assert {key: list(value.shape) for key, value in state.items()} == trunk


# As torchvision's ResNets; the stem has 3×3 instead of 7×7 weights.
CIFAR = {
    "cifar_resnet18": 11_689_512 - 513_000 - 64 * 3 * (49 - 9),
    "cifar_resnet34": 21_797_672 - 513_000 - 64 * 3 * (49 - 9),
}
STL = 11_168_832  # fact sheet of SCAN, section 1.1


@pytest.mark.parametrize("arch", CIFAR)
def test_cifar_resnets_count_as_their_originals_with_a_small_stem(arch):
    backbone = build_backbone(arch).eval()
    assert (backbone.width, count_parameters(backbone)) == (512, CIFAR[arch])
    with torch.no_grad():
        assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, 512)
        assert backbone.stem(torch.rand(2, 3, 32, 32)).shape == (2, 64, 32, 32)
        assert backbone.stages(backbone.stem(torch.rand(2, 3, 32, 32))).shape == (2, 512, 4, 4)
    assert count_parameters(build_backbone(arch, in_channels=1)) == CIFAR[arch] - 64 * 2 * 9


def test_the_resnet_for_stl10_has_the_size_of_scans():
    assert count_parameters(build_backbone("stl_resnet18")) == count_parameters(build_backbone("cifar_resnet18")) == STL


def vit_parameters(width, image_size, patch_size, in_channels=3):
    tokens = (image_size // patch_size) ** 2 + 1
    block = 3 * width * (width + 1) + width * (width + 1)  # queries, keys, values; projection
    block += 4 * width * (width + 1) + width * (4 * width + 1) + 2 * 2 * width  # MLP; two layer norms
    patches = width * (in_channels * patch_size**2 + 1)
    return patches + (tokens + 1) * width + 12 * block + 2 * width  # positions and class token; final layer norm


@pytest.mark.parametrize(
    ("arch", "width", "published"),
    [("vit_tiny", 192, 5_717_416), ("vit_small", 384, 22_050_664), ("vit_base", 768, 86_567_656)],
)
def test_vit_counts_as_published(arch, width, published):
    with torch.device("meta"):
        backbone = build_backbone(arch)
    without_classifier = published - 1000 * (width + 1)
    assert backbone.width == width
    assert count_parameters(backbone) == vit_parameters(width, 224, 16) == without_classifier


def test_vit_takes_views_of_other_sizes():
    backbone = build_backbone("vit_tiny", in_channels=1, image_size=32, patch_size=8).eval()
    assert count_parameters(backbone) == vit_parameters(192, 32, 8, in_channels=1)
    with torch.no_grad():
        for size in (32, 16, 48):
            assert backbone(torch.rand(2, 1, size, size)).shape == (2, 192)


def cubic(x):
    """Keys' kernel with a = -3/4, as in torch's bicubic interpolation without antialiasing."""
    x, a = abs(x), -0.75
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def line(values, size):
    """Interpolate a list of numbers to `size` numbers as the original does: the scale is (size + 0.1) / n."""
    n, found = len(values), []
    for i in range(size):
        place = (i + 0.5) * n / (size + 0.1) - 0.5
        near = [math.floor(place) + k for k in (-1, 0, 1, 2)]
        found.append(sum(cubic(place - j) * values[min(max(j, 0), n - 1)] for j in near))
    return found


@pytest.mark.parametrize("size", [(6, 6), (14, 9), (17, 20)])
def test_position_embeddings_are_interpolated_without_antialiasing(size):
    """A ViT for 224 pixels shows 96 pixels its 14 × 14 positions at 6 × 6 places."""
    positions = torch.randn(1, 1 + 14 * 14, 2, dtype=torch.float64)
    found = interpolated(positions, (14, 14), size=size)
    assert found.shape == (1, 1 + size[0] * size[1], 2)
    assert torch.equal(found[:, 0], positions[:, 0])
    for f in range(2):
        rows = positions[0, 1:, f].view(14, 14).tolist()
        across = [line(row, size[1]) for row in rows]
        columns = [line(list(column), size[0]) for column in zip(*across, strict=True)]
        expected = torch.tensor(columns, dtype=torch.float64).T
        assert (found[0, 1:, f].view(*size) - expected).abs().max() < 1e-12
    assert interpolated(positions, (14, 14), size=(14, 14)) is positions


def test_a_vit_uses_these_positions():
    backbone = build_backbone("vit_tiny", image_size=64, patch_size=8).double().eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        patches = backbone.patch_embed.proj(images).flatten(2).mT  # row by row
        tokens = torch.cat([backbone.cls_token.expand(2, -1, -1), patches], dim=1)
        tokens = tokens + interpolated(backbone.pos_embed, (8, 8), size=(4, 4))
        for block in backbone.blocks:
            tokens = block(tokens)
        assert torch.allclose(backbone(images), backbone.norm(tokens)[:, 0], rtol=1e-9, atol=1e-12)


def test_all_weights_of_a_vit_start_at_the_published_scale():
    """Fact sheet of Self-Classifier, section 1.5: truncated normal with standard deviation 0.02, also the class token."""
    backbone = build_backbone("vit_base", image_size=32, patch_size=16)
    for tensor in (backbone.cls_token, backbone.pos_embed, backbone.blocks[0].attn.qkv.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_small_convnet_from_8_to_32_pixels(in_channels):
    backbone = build_backbone("small_convnet", in_channels).eval()
    weights = 9 * (in_channels * 32 + 32 * 64 + 64 * 128)
    assert count_parameters(backbone) == weights + 2 * (32 + 64 + 128)
    assert backbone.width == 128
    with torch.no_grad():
        for size in (8, 12, 16, 32):
            features = backbone(torch.rand(5, in_channels, size, size))
            assert features.shape == (5, 128)
            assert (features >= 0).all()


@pytest.mark.parametrize("in_channels", [1, 3])
def test_cifar_convnet_from_16_to_40_pixels(in_channels):
    backbone = build_backbone("cifar_convnet", in_channels).eval()
    blocks = [24, 32, 32, 128, 128, 256, 256]
    weights = 4 * in_channels * 24 + 9 * sum(a * b for a, b in pairwise(blocks))
    assert count_parameters(backbone) == weights + 2 * sum(blocks)
    assert backbone.width == 256
    with torch.no_grad():
        for size in (16, 24, 32, 40):
            features = backbone(torch.rand(5, in_channels, size, size))
            assert features.shape == (5, 256)


def test_the_stem_of_cifar_convnet_starts_with_an_orthonormal_basis_of_both_signs():
    stem = build_backbone("cifar_convnet").blocks[0].weight.detach().flatten(1)
    assert torch.allclose(stem[:12] @ stem[:12].T, torch.eye(12), atol=1e-6)
    assert torch.equal(stem[12:], -stem[:12])
    grey = torch.tensor([1.0, -1, 1, -1]).repeat(3) / 12**0.5  # a vertical edge
    assert torch.allclose(stem[3], grey, atol=1e-6)


def test_operations_of_a_view_of_cifar_convnet():
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_backbone("cifar_convnet")(torch.empty(1, 3, 32, 32)).sum().backward()
    maps = {
        31: 4 * 3 * 24 + 9 * 24 * 32,
        15: 9 * (32 * 32 + 32 * 128),
        7: 9 * (128 * 128 + 128 * 256),
        3: 9 * 256 * 256,
    }
    forward = sum(2 * side**2 * weights for side, weights in maps.items())
    assert counter.get_total_flops() == 3 * forward - 2 * 31**2 * 4 * 3 * 24  # no gradient of the image
    assert counter.get_total_flops() / 1e9 == pytest.approx(0.265, abs=0.0005)


@pytest.mark.parametrize("arch", ["small_convnet", "cifar_convnet", "cifar_resnet18"])
def test_an_image_has_its_features_whatever_its_batch(arch):
    torch.manual_seed(0)
    backbone = build_backbone(arch, 1).eval()
    images = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        assert torch.allclose(backbone(images)[1:2], backbone(images[1:2]), rtol=1e-4, atol=1e-4)


def test_count_leaves_out_what_is_frozen():
    backbone = build_backbone("small_convnet", 1)
    backbone.layers[0].requires_grad_(False)
    assert count_parameters(backbone) == 9 * (32 * 64 + 64 * 128) + 2 * (64 + 128)


@pytest.mark.parametrize(
    ("arch", "words", "message"),
    [
        ("resnet51", {}, "expected small_convnet, .*or a torchvision network"),
        ("", {}, "expected small_convnet"),
        ("ResNet50", {}, "expected small_convnet"),
        ("vgg11", {}, "no linear classifier named fc"),
        ("vit_b_16", {}, "no linear classifier named fc"),
        ("googlenet", {}, "auxiliary classifiers"),
        ("inception_v3", {}, "auxiliary classifiers"),
        ("fasterrcnn_resnet50_fpn", {}, "expected small_convnet"),  # would fetch weights from the network
        ("r3d_18", {}, "expected small_convnet"),  # for video
        ("resnet18", {"in_channels": 1}, "images of 3 channels, but these have 1: use small_convnet"),
        ("resnet50w2", {"in_channels": 1}, "resnet50w2 takes images of 3 channels"),
        ("resnet50w3", {}, "expected small_convnet, .*resnet50w2, resnet50w4, resnet50w5"),
        ("vit_tiny", {"image_size": 225}, "--patch-size 16 does not divide --global-crops-size 225"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(arch, words, message):
    with torch.device("meta"), pytest.raises(InputError, match=message) as error:
        build_backbone(arch, **words)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------------------
# heads


def head(layers, bn=False, activation="relu", **words):
    return ProjectionHead(5, 7, 3, layers=layers, bn=bn, activation=activation, **words)


LAYOUTS = [
    (0, False, "relu", [], 0),
    (0, True, "relu", [], 0),
    (1, True, "relu", [nn.Linear], 5 * 3 + 3),
    (2, False, "relu", [nn.Linear, nn.ReLU, nn.Linear], (5 * 7 + 7) + (7 * 3 + 3)),
    (2, True, "leaky_relu", [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU, nn.Linear], (5 * 7 + 7) + 2 * 7 + (7 * 3 + 3)),
    (
        3,
        True,
        "relu",
        [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear],
        (5 * 7 + 7) + (7 * 7 + 7) + 2 * 2 * 7 + (7 * 3 + 3),
    ),
]


@pytest.mark.parametrize(("layers", "bn", "activation", "kinds", "parameters"), LAYOUTS)
def test_layout_of_the_projection_head(layers, bn, activation, kinds, parameters):
    built = head(layers, bn, activation)
    found = [type(module) for module in built.modules() if not isinstance(module, ProjectionHead | nn.Sequential)]
    assert found == kinds
    assert count_parameters(built) == parameters
    embeddings = built(torch.randn(6, 5))
    assert embeddings.shape == (6, 3 if layers else 5)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(6), atol=1e-5)


def test_one_layer_has_no_index_in_its_name():
    assert set(head(1).state_dict()) == {"mlp.weight", "mlp.bias"}
    assert set(head(2).state_dict()) == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.01)])
def test_projection_head_equals_loops(activation, slope):
    torch.manual_seed(0)
    built, features = head(2, activation=activation, std=None).double(), torch.randn(4, 5).double()
    built.requires_grad_(False)
    first, last = built.mlp[0], built.mlp[-1]
    for x, found in zip(features, built(features), strict=True):
        hidden = [sum(first.weight[j, i] * x[i] for i in range(5)) + first.bias[j] for j in range(7)]
        hidden = [h if h > 0 else slope * h for h in hidden]
        out = [sum(last.weight[k, j] * hidden[j] for j in range(7)) + last.bias[k] for k in range(3)]
        length = math.sqrt(sum(float(o) ** 2 for o in out))
        assert found.tolist() == pytest.approx([float(o) / length for o in out])


def test_weights_start_normal_and_biases_at_zero():
    torch.manual_seed(0)
    built = ProjectionHead(200, 300, 100, layers=2, bn=True, activation="relu", std=0.05)
    for linear in (built.mlp[0], built.mlp[3]):
        assert linear.weight.std().item() == pytest.approx(0.05, rel=0.02)
        assert not linear.bias.any()
    assert ProjectionHead(200, 300, 100, layers=2, bn=True, activation="relu", std=None).mlp[0].bias.any()


def test_zero_features_stay_finite():
    assert not head(0)(torch.zeros(2, 5)).any()
    assert head(0)(torch.full((1, 4), 1e-9)).tolist()[0] == pytest.approx([1e-2] * 4, rel=1e-5)  # divided by eps


def test_weight_normalised_classifier_equals_loops():
    torch.manual_seed(0)
    classifier, embeddings = WeightNormClassifier(4, 3).double(), torch.randn(5, 4).double()
    assert classifier.weight_g.tolist() == [[1.0]] * 3
    assert classifier.weight_v.abs().max() <= 0.5  # 1 / sqrt(4)
    with torch.no_grad():
        classifier.weight_g.copy_(torch.tensor([[0.5], [1.0], [-2.0]]))
    logits = classifier(embeddings)
    for b in range(5):
        for c in range(3):
            v, g = classifier.weight_v[c].tolist(), classifier.weight_g[c].item()
            dot = sum(e * w for e, w in zip(embeddings[b].tolist(), v, strict=True))
            assert logits[b, c].item() == pytest.approx(g * dot / math.sqrt(sum(w * w for w in v)))


def test_weight_normalised_classifier_ignores_the_length_of_v():
    torch.manual_seed(0)
    classifier, embeddings = WeightNormClassifier(4, 3), torch.randn(5, 4)
    before = classifier(embeddings)
    with torch.no_grad():
        classifier.weight_v.mul_(torch.tensor([[0.1], [10.0], [3.0]]))
    assert torch.allclose(classifier(embeddings), before, rtol=1e-4, atol=1e-5)
    classifier(embeddings).sum().backward()
    assert classifier.weight_g.grad.shape == (3, 1)


@pytest.mark.parametrize(("fixed", "parameters"), [(False, 3 * 4 + 3), (True, 0)])
def test_a_fixed_classifier_is_not_trained(fixed, parameters):
    assert count_parameters(WeightNormClassifier(4, 3, fixed)) == parameters
