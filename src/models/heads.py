"""Networks on top of a backbone: projection head and classifiers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"leaky_relu": nn.LeakyReLU, "relu": nn.ReLU}


class ProjectionHead(nn.Module):
    """MLP whose output is normalised to unit length, (B, F) → (B, D).

    Source: Self-Classifier, arXiv:2103.10994v3. An optional batch normalisation and an activation follow every linear layer
    except the last one.

    Args:
        width: F, the size of the features.
        hidden_dim: size of the hidden layers.
        dim: D, the size of the embeddings.
        layers: number of linear layers; 0: the head only normalises the features.
        bn: use batch normalisation.
        activation: "relu" or "leaky_relu".
        std: standard deviation of the normal distribution that initialises the weights; the biases start at 0. None: the
            default initialisation of nn.Linear.
        eps: lower bound of the length by which an embedding is divided.
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
        modules: list[nn.Module] = []
        for i in range(layers):
            last = i == layers - 1
            modules.append(nn.Linear(hidden_dim if i else width, dim if last else hidden_dim))
            if not last:
                if bn:
                    modules.append(nn.BatchNorm1d(hidden_dim))
                modules.append(ACTIVATIONS[activation](inplace=True))
        # A single layer has no index in its parameter names, as in the authors' checkpoints.
        self.mlp: nn.Module = modules[0] if layers == 1 else nn.Sequential(*modules)
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear) and std is not None:
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        embeddings = self.mlp(features)
        with torch.autocast(embeddings.device.type, enabled=False):
            # The norm is computed in float32, because eps is near or below the smallest half-precision numbers.
            embeddings = embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings
            return F.normalize(embeddings, dim=1, eps=self.eps)


class WeightNormClassifier(nn.Module):
    """Linear classifier without bias whose weight rows are g · v/‖v‖, (B, D) → (B, C).

    Initially g = 1, so the logits of unit embeddings are cosines. Training changes g, so it may scale the logits later. The
    names and shapes of the two parameters are those of torch's original weight_norm, as in the authors' checkpoints.

    Args:
        dim: D, the size of the embeddings.
        num_classes: C.
        fixed: do not train the classifier.
    """

    def __init__(self, dim: int, num_classes: int, fixed: bool = False):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_classes, 1), requires_grad=not fixed)
        self.weight_v = nn.Parameter(torch.empty(num_classes, dim), requires_grad=not fixed)
        nn.init.uniform_(self.weight_v, -(dim**-0.5), dim**-0.5)  # default of nn.Linear

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.linear(embeddings, self.weight_g * F.normalize(self.weight_v, dim=1, eps=0))


class CosineClassifier(nn.Module):
    """Classifier whose logits are cosines with C class vectors, for unit embeddings, (B, D) → (B, C).

    Source: the first generation of Self-Classifier, arXiv:2103.10994v1. The initial matrix is orthogonal: if C ≤ D, the class
    vectors are orthonormal; otherwise the D columns are orthonormal. `forward` normalises the class vectors to unit length.

    Args:
        dim: D, the size of the embeddings.
        num_classes: C.
        learnable: train the class vectors. By default they keep their initial values.
    """

    def __init__(self, dim: int, num_classes: int, learnable: bool = False):
        super().__init__()
        # Like the authors, orthogonal_ takes the QR decomposition of a Gaussian matrix. It also makes the diagonal of R
        # positive, so that every orientation is equally likely.
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(num_classes, dim)), requires_grad=learnable)

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.linear(embeddings, F.normalize(self.weight, dim=1))


class Prototypes(nn.Module):
    """Scores of K unit vectors without bias, (B, D) → (B, K). For unit embeddings the scores are cosines.

    Source: SwAV, arXiv:2006.09882v5. The vectors are parameters. After each step, `normalize_` scales them to unit length.

    Args:
        dim: D, the size of the embeddings.
        number: K.
    """

    def __init__(self, dim: int, number: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(number, dim))
        nn.init.uniform_(self.weight, -(dim**-0.5), dim**-0.5)  # default of nn.Linear
        self.normalize_()

    @torch.no_grad()
    def normalize_(self) -> None:
        """Scale the vectors to unit length, in place."""
        self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            # The scores are computed in full precision. Near 1, half-precision numbers are too far apart for the
            # differences that matter to codes with a small epsilon.
            return F.linear(embeddings.to(self.weight.dtype), self.weight)


class LinearClassifiers(nn.Module):
    """Linear classifiers on a backbone, as in SCAN and SeLa, with the interface that clustering scores need.

    Attributes:
        classes: number of classes of each classifier.
        temperature: temperature of the softmax.
    """

    temperature = 1.0

    def __init__(self, backbone: nn.Module, classifiers: Sequence[nn.Linear]):
        super().__init__()
        self.backbone, self.classifiers = backbone, nn.ModuleList(classifiers)
        self.classes = [classifier.out_features for classifier in classifiers]

    def predict(self, images: Tensor) -> list[Tensor]:
        """Return the logits of each classifier, K × (B, C_k)."""
        features = self.backbone(images)
        return [classifier(features) for classifier in self.classifiers]
