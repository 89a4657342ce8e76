"""Fingerprints of weights and images, which tell whether a file belongs to them."""

import hashlib
import os

import numpy as np
import torch
from torch import Tensor, nn

from .data.datasets import Images, MemoryImages
from .errors import InputError


def of_weights(module: nn.Module) -> str:
    """Return the SHA-256 of every parameter and buffer, bit for bit."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(of_bytes(value))
    return digest.hexdigest()


def of_network(network: nn.Module) -> str:
    """Return the SHA-256 of a network: its weights, and its parts without weights, such as activations."""
    digest = hashlib.sha256(str(network).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(of_bytes(tensor))
    return digest.hexdigest()


def of_images(data: Images) -> str:
    """Return the SHA-256 of the images, without their labels.

    Images in memory enter by their contents. Image files enter by their paths below their common folder, their sizes
    and times of change: reading a million files would cost as much as computing their features.

    Raises:
        InputError: if a file is missing.
    """
    digest = hashlib.sha256()
    if isinstance(data, MemoryImages):
        digest.update(str(tuple(data.images.shape)).encode())
        digest.update(of_bytes(data.images))
        return digest.hexdigest()
    top = os.path.dirname(data.paths[0]) if len(data) == 1 else os.path.commonpath(data.paths)
    for path in data.paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        digest.update(os.fsencode(os.path.relpath(path, top)) + f"\0{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def of_bytes(tensor: Tensor) -> np.ndarray:
    """Return the bytes of a tensor as an array."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
