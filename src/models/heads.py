"""What sits on a backbone: projection head and classifiers."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"leaky_relu": nn.LeakyReLU, "relu": nn.ReLU}


class ProjectionHead(nn.Module):
    """MLP whose output has unit length, (B, F) → (B, D).

    Self-Classifier, arXiv:2103.10994v3. The last layer is linear; every other one is followed by batch normalisation
    (optional) and an activation. Weights start normal with standard deviation 0.02, biases at 0.

    Args:
        layers: number of linear layers; 0 only normalises the length.
    """

    def __init__(self, width: int, hidden_dim: int, dim: int, layers: int, bn: bool, activation: str):
        super().__init__()
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
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        embeddings = self.mlp(features)
        with torch.autocast(embeddings.device.type, enabled=False):
            # eps is near the smallest half-precision numbers, so the norm is taken in float32
            embeddings = embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings
            return F.normalize(embeddings, dim=1, eps=1e-7)


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
