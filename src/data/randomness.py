"""Random numbers that depend on the image, not on the process.

An augmented view must be the same for any number of workers, ranks or restarts. So its random numbers cannot come from a
generator whose state depends on earlier calls. Each number is a hash of the place where it is used:

    (seed, epoch, index of the image in the data set, view, number of the draw)  ->  uniform in [0, 1)

The hash chains the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) over the coordinates.
"""

import numpy as np
import torch
from torch import Tensor

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment: 2^64 / golden ratio, odd


def _mix(x: np.ndarray) -> np.ndarray:
    """Apply the finaliser of splitmix64: each input bit changes each output bit with a probability of about one half."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(*, seed: int, epoch: int, indices: np.ndarray, view: int | np.ndarray, count: int) -> np.ndarray:
    """Return uniform random numbers for one view of each image in a batch, or for each view of one image.

    Args:
        seed, epoch: non-negative integers.
        indices: (B,) positions of the images in the data set.
        view: a non-negative integer, or (B,) of them; then `indices` has B entries or one.
        count: how many numbers each row gets.

    Returns:
        (B, count) float64 in [0, 1), with 53 random bits each.
    """
    state = np.zeros((1, 1), dtype=np.uint64)
    draws = np.arange(count, dtype=np.uint64)[None, :]
    for coordinate in (seed, epoch, np.atleast_1d(view)[:, None], np.asarray(indices)[:, None], draws):
        state = _mix(state + GOLDEN_GAMMA * (np.atleast_1d(coordinate).astype(np.uint64) + np.uint64(1)))
    return (state >> np.uint64(11)) * 2.0**-53


def beside(x: Tensor, values: np.ndarray) -> Tensor:
    """Copy a few numbers from the host to the device of `x`. Floating-point numbers get the dtype of `x`.

    The host does not wait for a GPU during such a small copy, but would wait in `x.new_tensor`. A batch takes hundreds of these
    copies while the GPU still computes the previous step.
    """
    numbers = torch.from_numpy(values)
    if numbers.is_floating_point():
        numbers = numbers.to(x.dtype)
    return numbers.to(x.device, non_blocking=True)
