"""What the trainer and the evaluations may call on a method; every hook does nothing by default."""

from typing import NamedTuple

from torch import Tensor, nn


class Step(NamedTuple):
    """What one training step returns.

    loss: scalar, with gradient.
    numbers: detached tensors of any fixed shape; the trainer averages them over the epoch's steps and all ranks.
    neighbors: (B,) index in the data set of the image that each sample was paired with, if the method pairs images.
        The trainer, which has the labels, logs how often the two agree.
    """

    loss: Tensor
    numbers: dict[str, Tensor]
    neighbors: Tensor | None = None


class Method(nn.Module):
    """A network, an objective, and what it remembers between steps.

    A method is built from a backbone and its own frozen `Config`. It sees views and indices, never labels. State that
    must survive a restart is a parameter or a buffer, so that `state_dict` holds it.
    """

    Config: type  # the frozen dataclass of the method's knobs
    temperature: float = 1.0  # softmax(logits / temperature) are the probabilities of the classes

    @staticmethod
    def check_data(config, batch_size: int, num_images: int) -> None:
        """Refuse, with an InputError, knobs that do not go with the batch (over all ranks) or the data set."""

    def prepare_epoch(self, epoch: int, loader) -> None:
        """Before an epoch: k-means, Sinkhorn over the data set, neighbour mining."""

    def forward(self, batch) -> Step:
        """The training step; called exactly once per step, through DistributedDataParallel's wrapper if there is one."""
        return self.objective(self.embed_views(batch.views), batch.indices)

    def embed_views(self, views: list[Tensor]) -> list[Tensor]:
        """Embeddings of V views, V × (B, D): the expensive half of a step, which `--accumulate` takes in parts."""
        raise NotImplementedError

    def objective(self, embeddings: list[Tensor], indices: Tensor) -> Step:
        """The other half: the loss of this rank's whole batch, and what is remembered of it."""
        raise NotImplementedError

    def after_backward(self, step: int) -> None:
        """Between backward and the optimiser: keep prototypes fixed at first, and the like."""

    def after_step(self, batch) -> None:
        """After the optimiser: normalise prototypes, and the like."""

    def embed(self, images: Tensor) -> Tensor:
        """(B, D) embeddings of single images, for k-NN and linear probes."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> list[Tensor]:
        """(B, C_k) logits of each classifier k for single images, for clustering scores."""
        raise NotImplementedError

    def summarize(self, averages: dict[str, Tensor]) -> dict[str, float | int]:
        """One epoch's averages of `numbers` as scalars to log. The key `classifier` names the classifier to be used."""
        return {}

    def report(self, summary: dict) -> str:
        """The last epoch as a table for a person."""
        return ""

    def diagnose(self, history: list[dict]) -> str | None:
        """One plain sentence if the epochs so far (their summaries, oldest first) show that training went wrong."""
        return None
