"""Voxels to the device and back: on a GPU from pinned memory, on a stream beside the one that computes."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Transfer:
    """Copies between the host and one device; on a CPU nothing is copied.

    A block's raw voxels cross the bus once, in their own dtype, while another block is computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def up(self, voxels: NDArray[Any]) -> Upload:
        """Begin to copy an array to the device; does not wait for it."""
        host = torch.from_numpy(voxels)
        if self._stream is None:
            return Upload(host, None)
        with torch.cuda.stream(self._stream):
            # The host's allocator keeps pinned memory until the copies that read it are done.
            return Upload(host.pin_memory().to(self._device, non_blocking=True), self._stream.record_event())

    def down(self, tensor: Tensor) -> NDArray[Any]:
        """Return a tensor of the device as an array, once it is computed."""
        if self._stream is None:
            return tensor.numpy()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        # Pinned memory is scarce, and the block is written later.
        return host.numpy().copy()


class Upload:
    """An array on its way to the device."""

    def __init__(self, tensor: Tensor, copied: torch.Event | None) -> None:
        self._tensor, self._copied = tensor, copied

    def get(self) -> Tensor:
        """Return the tensor; what is asked of the device from now on comes after the copy. The host does not wait."""
        if self._copied is not None:
            stream = torch.cuda.current_stream(self._tensor.device)
            stream.wait_event(self._copied)
            # It was allocated on the other stream: its memory must not be given away before this one has read it.
            self._tensor.record_stream(stream)
        return self._tensor
