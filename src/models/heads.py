"""What sits on a backbone: projection head and classifiers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"leaky_relu": nn.LeakyReLU, "relu": nn.ReLU}


class ProjectionHead(nn.Module):
    """MLP whose output has unit length, (B, F) → (B, D).

    Self-Classifier, arXiv:2103.10994v3. The last layer is linear; every other one is followed by batch normalisation
    (optional) and an activation.

    Args:
        layers: number of linear layers; 0 only normalises the length.
        std: weights start normal with this standard deviation, biases at 0; None: nn.Linear's own start.
        eps: smallest length that is divided by.
    """

    def __init__(
        self,
        width: int,
        hidden_dim: int,
        dim: int,
        *,
        layers: int,
        bn: bool,
        activation: str,
        std: float | None = 0.02,
        eps: float = 1e-7,
    ):
        super().__init__()
        self.eps = eps
        modules = []
        for i in range(layers):
            last = i == layers - 1
            modules.append(nn.Linear(hidden_dim if i else width, dim if last else hidden_dim))
            if not last:
                modules += [nn.BatchNorm1d(hidden_dim)] if bn else []
                modules.append(ACTIVATIONS[activation](inplace=True))
        # One layer has no index in its name, as in the authors' checkpoints.
        self.mlp = modules[0] if layers == 1 else nn.Sequential(*modules)
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear) and std is not None:
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        embeddings = self.mlp(features)
        with torch.autocast(embeddings.device.type, enabled=False):
            # eps is near or below the smallest half-precision numbers, so the norm is taken in float32
            embeddings = embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings
            return F.normalize(embeddings, dim=1, eps=self.eps)


class WeightNormClassifier(nn.Module):
    """Linear layer without bias whose rows are g · v/‖v‖, (B, D) → (B, C).

    At the start g = 1, so the logits are cosines of unit embeddings; g is trained and may scale them later. The names
    and shapes of the two parameters are those of torch's classic weight_norm, as in the authors' checkpoints.
    """

    def __init__(self, dim: int, num_classes: int, fixed: bool = False):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_classes, 1), requires_grad=not fixed)
        self.weight_v = nn.Parameter(torch.empty(num_classes, dim), requires_grad=not fixed)
        nn.init.uniform_(self.weight_v, -(dim**-0.5), dim**-0.5)  # nn.Linear's own start

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.linear(embeddings, self.weight_g * F.normalize(self.weight_v, dim=1, eps=0))


class CosineClassifier(nn.Module):
    """Cosines between embeddings and C class vectors, (B, D) → (B, C); Self-Classifier's first generation.

    arXiv:2103.10994v1. The matrix starts orthogonal: C ≤ D class vectors are orthonormal; of more, the D columns are, and
    the vectors are brought to unit length on use. It stays as it starts unless `learnable`.
    """

    def __init__(self, dim: int, num_classes: int, learnable: bool = False):
        super().__init__()
        # QR of a Gaussian, as the authors; with R's diagonal made positive, so that every orientation is equally likely
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(num_classes, dim)), requires_grad=learnable)

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.linear(embeddings, F.normalize(self.weight, dim=1))


class Prototypes(nn.Module):
    """Scores of K unit vectors, cosines for unit embeddings, (B, D) → (B, K); no bias.

    SwAV, arXiv:2006.09882v5. The vectors are parameters, brought back to unit length by `normalize_` after each step.
    """

    def __init__(self, dim: int, number: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(number, dim))
        nn.init.uniform_(self.weight, -(dim**-0.5), dim**-0.5)  # nn.Linear's own start
        self.normalize_()

    @torch.no_grad()
    def normalize_(self) -> None:
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            # steps of half precision near 1 are as wide as what codes of a small epsilon have to tell apart
            return F.linear(embeddings.to(self.weight.dtype), self.weight)


class LinearClassifiers(nn.Module):
    """Linear classifiers on a backbone, as SCAN and SeLa have them: what it takes to be asked for clusters.

    Attributes:
        classes: number of classes of each classifier.
        temperature: that of the softmax.
    """

    temperature = 1.0

    def __init__(self, backbone: nn.Module, classifiers: list[nn.Module]):
        super().__init__()
        self.backbone, self.classifiers = backbone, nn.ModuleList(classifiers)
        self.classes = [classifier.out_features for classifier in classifiers]

    def predict(self, images: Tensor) -> list[Tensor]:
        """Logits of each classifier, K × (B, C_k)."""
        features = self.backbone(images)
        return [classifier(features) for classifier in self.classifiers]
