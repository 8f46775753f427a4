"""The handwritten digits of scikit-learn, or a table of the same form given with --data."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from kernbench.errors import KernbenchError

CLASSES = 10
TEST_EVERY = 5
"""Every fifth image is kept for the test; writers follow each other in the file, so both parts have all of them."""


@dataclass(frozen=True)
class Digits:
    """Images [N, pixels] scaled to [0, 1] and classes [N], on one device.

    The training part, ``count`` images, is repeated at its end, so that every batch is one slice.
    """

    images: Tensor
    classes: Tensor
    test_images: Tensor
    test_classes: Tensor
    count: int
    batch: int

    def slice(self, index: int) -> tuple[Tensor, Tensor]:
        """Images and classes of batch ``index``."""
        start = index * self.batch % self.count
        return self.images[start : start + self.batch], self.classes[start : start + self.batch]


def load_digits(path: str | None, *, batch: int, device: torch.device, dtype: torch.dtype) -> Digits:
    """Digits on ``device``, from scikit-learn or from a file of rows "pixel, pixel, ..., class" (.csv or .csv.gz).

    Raises:
        KernbenchError: scikit-learn is not installed, or the file is no such table.
    """
    table = _bundled() if path is None else _table(path)
    pixels, classes = table[:, :-1], table[:, -1]
    test = numpy.arange(len(table)) % TEST_EVERY == 0
    images = torch.tensor(pixels / max(pixels.max(), 1.0), dtype=torch.float32)
    labels = torch.tensor(classes, dtype=torch.int64)
    held_out = torch.from_numpy(test)
    train_images, train_labels = images[~held_out], labels[~held_out]
    count = len(train_labels)
    repeats = -(-(count + batch) // count)
    return Digits(
        images=train_images.repeat(repeats, 1)[: count + batch].to(device=device, dtype=dtype),
        classes=train_labels.repeat(repeats)[: count + batch].to(device=device),
        test_images=images[held_out].to(device=device, dtype=dtype),
        test_classes=labels[held_out].to(device=device),
        count=count,
        batch=batch,
    )


def _bundled() -> numpy.ndarray[Any, Any]:
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError:
        raise KernbenchError(
            "kasmina trains on scikit-learn's digits, which are not installed; pip install 'kernbench[digits]', "
            "or give a table of pixels and classes with --data"
        ) from None
    found = bundled()
    return numpy.column_stack([found.data, found.target])


def _table(path: str) -> numpy.ndarray[Any, Any]:
    wanted = "--data takes a .csv of rows 'pixel,pixel,...,class' with classes 0 to 9"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            table = numpy.loadtxt(path, delimiter=",", ndmin=2)
    except OSError as error:
        raise KernbenchError(f"cannot read {path}: {error.strerror or error}; {wanted}") from None
    except (ValueError, UserWarning) as error:
        raise KernbenchError(f"{path} is no table of numbers ({error}); {wanted}") from None
    classes = table[:, -1]
    if len(table) < 2 * TEST_EVERY or table.shape[1] < 2 or not numpy.isin(classes, range(CLASSES)).all():
        raise KernbenchError(f"{path} has {table.shape[0]} rows of {table.shape[1]} numbers; {wanted}")
    return table
