"""`volseg verify`: does the stored result match its receipts?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from volseg.errors import BlockError, VerifyError, VolumeError
from volseg.execution.output import marks_of, unsound
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
    receipts = ledger.receipts()
    arrays = _open({name for receipt in receipts.values() for name in receipt.digests}, output)
    damaged = dict.fromkeys(unsound(output, receipts), "an object is absent or has another size")
    if deep:
        damaged |= _compare(arrays, grid, {i: r for i, r in receipts.items() if i not in damaged}, progress)
    missing = len(grid) - len(receipts)
    complete = marks.get("status") == "complete" and not missing
    return {
        "status": "damaged" if damaged else "verified" if complete else "incomplete",
        "output": output,
        "deep": deep,
        "blocks": {
            "total": len(grid),
            "with_receipt": len(receipts),
            "without_receipt": missing,
            "damaged": len(damaged),
        },
        "objects": sum(len(receipt.objects) for receipt in receipts.values()),
        "bytes": sum(sum(receipt.objects.values()) for receipt in receipts.values()),
        "damaged": [
            {
                "block": index,
                "box": str(grid.box(index)),
                "error": message,
                "objects": sorted(receipts[index].objects),
            }
            for index, message in sorted(damaged.items())
        ],
    }


def _open(names: Iterable[str], output: str) -> dict[str, ArrayWriter]:
    try:
        return {name: ArrayWriter(files.join(output, name)) for name in sorted(names)}
    except VolumeError as error:
        raise VerifyError(f"the result in {output} cannot be read: {error}") from None


def _compare(
    arrays: Mapping[str, ArrayWriter], grid: BlockGrid, receipts: dict[int, Receipt], progress: Progress | None
) -> dict[int, str]:
    damaged: dict[int, str] = {}
    for count, (index, receipt) in enumerate(receipts.items(), start=1):
        for name, wanted in receipt.digests.items():
            try:
                found = digest(arrays[name].read(grid.box(index)))
            except (OSError, BlockError) as error:
                damaged[index] = f"{name}: {error}"
                continue
            if found != wanted:
                damaged[index] = f"{name}: the voxels are not those that were written"
        if progress is not None:
            progress(count, len(receipts))
    return damaged
