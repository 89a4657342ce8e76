"""Activation checkpointing: save memory by computing parts of a network a second time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..errors import InputError


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of all batch normalisation in `module` unchanged inside this context.

    Batch normalisation itself works as usual. The context is for a second pass of the same images, so that the running
    statistics count every image only once.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [dict(norm._buffers) for norm in norms]
    # Copies receive the updates. Without buffers, autograd would save other tensors than in the first pass.
    for norm in norms:
        norm._buffers.update({name: buffer.clone() for name, buffer in norm._buffers.items() if buffer is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def checkpoint_activations(backbone: nn.Module) -> int:
    """Checkpoint the activations of a backbone: keep only the input of each block and run the block again in backward.

    A block is an element of a sequence that is a child of the backbone: `layer1` to `layer4` in a ResNet, `blocks` in a ViT.

    Returns:
        The number of blocks.

    Raises:
        InputError: if the backbone has no such blocks.
    """
    blocks = [
        block
        for sequence in backbone.children()
        if isinstance(sequence, nn.Sequential | nn.ModuleList)
        for block in sequence
        if any(True for _ in block.parameters())
    ]
    if not blocks:
        name = type(backbone).__name__
        raise InputError(
            f"--checkpoint-activations: the backbone {name} has no sequence of blocks, expected a ResNet or a ViT: drop the flag"
        )
    for block in blocks:
        contexts = partial(_first_and_second_run, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    return len(blocks)


def _first_and_second_run(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of the forward pass and of its repetition in backward, for `checkpoint`."""
    return nullcontext(), statistics_kept(block)
