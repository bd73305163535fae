"""`volseg verify`: does the stored result match its receipts?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from volseg.errors import BlockError, VerifyError, VolumeError
from volseg.execution.output import inspected, marks_of
from volseg.geometry import BlockGrid, Box
from volseg.storage import files
from volseg.storage.digest import digest
from volseg.storage.ledger import Ledger, Receipt
from volseg.storage.volume import ArrayWriter

Progress = Callable[[int, int], None]


def verify(output: str, *, deep: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Check a segmentation against its ledger: every block has a receipt, every object its recorded size.

    With `deep`, every block is read and its digest compared, too. The answer's `status` is verified, incomplete (blocks
    without a receipt, or the job did not end) or damaged (blocks named in `damaged`, with their stored objects relative
    to `output`). Raises VolumeError where `output` is no segmentation of volseg, VerifyError where the metadata of an
    array of it is gone.
    """
    output = files.absolute(output)
    marks = marks_of(output)
    if marks is None:
        raise VolumeError(f"{output} is no segmentation that volseg wrote; nothing was checked: check the path")
    ledger = Ledger(output, str(marks["job_key"]))
    header = ledger.header()
    if header is None:
        raise VolumeError(f"the ledger of {output} is gone ({ledger.path}); nothing can be checked: segment it again")
    shape, block = header["shape"], header["block"]
    region = Box.parse(header["region"], (shape[0], shape[1], shape[2]))
    grid = BlockGrid((shape[0], shape[1], shape[2]), (block[0], block[1], block[2]), region)
    missing, objects, size = len(grid), 0, 0
    damaged: dict[int, tuple[str, list[str]]] = {}
    arrays = _Arrays(output)
    for receipt, sound in inspected(output, ledger.receipts()):
        missing -= 1
        objects += len(receipt.objects)
        size += sum(receipt.objects.values())
        arrays.open(receipt.digests)
        fault = "" if sound else "an object is absent or has another size"
        if deep and sound:
            fault = arrays.compare(receipt, grid.box(receipt.index))
            if progress is not None:
                progress(len(grid) - missing, len(grid))
        if fault:
            damaged[receipt.index] = fault, sorted(receipt.objects)
    complete = marks.get("status") == "complete" and not missing
    return {
        "status": "damaged" if damaged else "verified" if complete else "incomplete",
        "output": output,
        "deep": deep,
        "blocks": {
            "total": len(grid),
            "with_receipt": len(grid) - missing,
            "without_receipt": missing,
            "damaged": len(damaged),
        },
        "objects": objects,
        "bytes": size,
        "damaged": [
            {"block": index, "box": str(grid.box(index)), "error": message, "objects": names}
            for index, (message, names) in sorted(damaged.items())
        ],
    }


class _Arrays:
    """The arrays of a result, opened as receipts name them."""

    def __init__(self, output: str) -> None:
        self._output = output
        self._found: dict[str, ArrayWriter] = {}

    def open(self, names: Iterable[str]) -> None:
        """Open what is not open yet; raises VerifyError where one cannot be read."""
        try:
            for name in names:
                if name not in self._found:
                    self._found[name] = ArrayWriter(files.join(self._output, name))
        except VolumeError as error:
            raise VerifyError(f"the result in {self._output} cannot be read: {error}") from None

    def compare(self, receipt: Receipt, box: Box) -> str:
        """Return what is wrong with the voxels of a block, an empty string where nothing is."""
        for name, wanted in receipt.digests.items():
            try:
                found = digest(self._found[name].read(box))
            except (OSError, BlockError) as error:
                return f"{name}: {error}"
            if found != wanted:
                return f"{name}: the voxels are not those that were written"
        return ""
