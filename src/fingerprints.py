"""Fingerprints of weights and images.

A stored fingerprint tells whether a file belongs to given weights or images.
"""

import hashlib
import os

import torch
from torch import Tensor, nn

from .data.datasets import Images, MemoryImages
from .errors import InputError


def of_weights(module: nn.Module) -> str:
    """Return the SHA-256 of all parameters and buffers of a module, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(of_bytes(value))
    return digest.hexdigest()


def of_network(network: nn.Module) -> str:
    """Return the SHA-256 of a network. It covers the weights and the parts without weights, such as activations."""
    digest = hashlib.sha256(str(network).encode())
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(of_bytes(tensor))
    return digest.hexdigest()


def of_images(data: Images) -> str:
    """Return the SHA-256 of the images, without their labels.

    For images in memory the hash covers their contents. For image files it covers their paths relative to their common
    folder, their sizes, their modification times and `upright`, because reading a million files would take as long as computing
    their features.

    Raises:
        InputError: if a file is missing.
    """
    digest = hashlib.sha256()
    if isinstance(data, MemoryImages):
        digest.update(str(tuple(data.images.shape)).encode())
        digest.update(of_bytes(data.images))
        return digest.hexdigest()
    if data.upright:
        digest.update(b"upright")
    top = os.path.dirname(data.paths[0]) if len(data) == 1 else os.path.commonpath(data.paths)
    for path in data.paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}, expected a readable image file: check --data") from None
        digest.update(os.fsencode(os.path.relpath(path, top)) + f"\0{status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def of_data(data: Images) -> str:
    """Return the SHA-256 of a data set, which is the same on every machine.

    For images in memory the hash covers their contents and labels. For image files it covers their paths relative to their
    common folder, and the labels, but not the contents of the files.
    """
    digest = hashlib.sha256()
    if isinstance(data, MemoryImages):
        digest.update(f"{data.images.dtype} {tuple(data.images.shape)}".encode())
        digest.update(of_bytes(data.images))
    else:
        top = os.path.dirname(data.paths[0]) if len(data) == 1 else os.path.commonpath(data.paths)
        for path in data.paths:
            digest.update(os.fsencode(path[len(top) :].lstrip(os.sep)) + b"\0")
    digest.update(of_bytes(data.labels))
    return digest.hexdigest()


def of_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
