"""Trading time for memory: parts of a network are run a second time instead of being remembered."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ..errors import InputError


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch normalisation inside normalises as ever but leaves its running statistics alone.

    For the second time that the same images pass through: the statistics count every image once.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:  # copies take the updates: without any buffer, autograd would remember other tensors than before
        norm._buffers.update({name: buffer.clone() for name, buffer in norm._buffers.items() if buffer is not None})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)


def checkpoint_activations(backbone: nn.Module) -> int:
    """Keep only the inputs of each block of a backbone, run the blocks again during backward; return their number.

    A block is a child of one of the backbone's own sequences: of `layer1` to `layer4` in a ResNet, `blocks` in a ViT.

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
        raise InputError(f"--checkpoint-activations: {name} has no sequence of blocks to run again: drop it")
    for block in blocks:
        contexts = partial(_first_and_second_run, block)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    return len(blocks)


def _first_and_second_run(block: nn.Module):
    return nullcontext(), statistics_kept(block)
