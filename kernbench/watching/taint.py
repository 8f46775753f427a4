"""Which tensors are on the device: by their own word on a GPU, by marks on a machine without one.

On a machine without a GPU a workload is built for ``torch.device("cpu:0")``: the explicit index in a ``device=``
argument says "this would be the GPU". The index is lost as soon as the tensor exists, so the watcher marks storages.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.multiprocessing.reductions import StorageWeakRef

PURGE_EVERY = 4096  # marks added between two purges: bounds what dead storages hold (about 100 bytes each)


class Sides(Protocol):
    """Tells the device's side from the host's."""

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is on the device."""

    def names(self, device: Any) -> bool | None:
        """Whether a ``device=`` argument names the device; None where it does not tell."""


class ActualSides:
    """A GPU's view: a tensor says itself where it is."""

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type != "cpu"

    def names(self, device: Any) -> bool | None:
        return None if device is None else torch.device(device).type != "cpu"


class MarkedSides:
    """The CPU's view: storages born with an explicit index, and everything computed from them, are the device's.

    A mark keeps a weak reference, and with it the storage's address, so that a new storage cannot take a dead one's
    mark. A tensor made before the watch began has no mark and counts as a host tensor.
    """

    def __init__(self) -> None:
        self._marks: dict[int, StorageWeakRef] = {}
        self._purge_at = PURGE_EVERY

    def holds(self, tensor: torch.Tensor) -> bool:
        storage = storage_of(tensor)
        return storage is not None and storage._cdata in self._marks

    def names(self, device: Any) -> bool | None:
        """None for a plain "cpu": operators that torch itself calls pass it for device and host tensors alike."""
        if device is None:
            return None
        given = torch.device(device)
        return True if given.type != "cpu" or given.index is not None else None

    def mark(self, tensor: torch.Tensor) -> None:
        """Declare the tensor's storage to be on the device."""
        storage = storage_of(tensor)
        if storage is None or storage._cdata in self._marks:
            return
        self._marks[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        if len(self._marks) >= self._purge_at:
            self._marks = {address: mark for address, mark in self._marks.items() if not _expired(mark)}
            self._purge_at = len(self._marks) + PURGE_EVERY

    def unmark(self, tensor: torch.Tensor) -> None:
        """Declare the tensor's storage to be on the host."""
        storage = storage_of(tensor)
        if storage is not None:
            self._marks.pop(storage._cdata, None)


def _expired(mark: StorageWeakRef) -> bool:
    return bool(mark.expired())  # type: ignore[no-untyped-call]


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    """The storage behind a tensor, also behind the wrappers of torch.func; None where it has none (sparse tensors)."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return storage_of(torch._C._functorch.get_unwrapped(tensor))
        return None


def tensors_in(values: Any) -> list[torch.Tensor]:
    """Tensors among arguments or results, one level of lists deep, as operators take and return them."""
    found = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, torch.Tensor))
    return found
