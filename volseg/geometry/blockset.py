"""A set of block numbers that stays small: a bit a block, in pages that exist only where they are used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_PAGE_BYTES = 4096
_PAGE = 8 * _PAGE_BYTES


class BlockSet:
    """A set of whole numbers from 0 on; ten million of them take 1.3 MB where they are dense."""

    def __init__(self, numbers: Iterable[int] = ()) -> None:
        self._pages: dict[int, bytearray] = {}
        self._count = 0
        for number in numbers:
            self.add(number)

    def add(self, number: int) -> bool:
        """Add a number; return whether it was not there. Raises ValueError for a negative one."""
        if number < 0:
            raise ValueError(f"a block has no number below 0, got {number}")
        page = self._pages.get(number // _PAGE)
        if page is None:
            page = self._pages[number // _PAGE] = bytearray(_PAGE_BYTES)
        place, bit = number % _PAGE >> 3, 1 << (number & 7)
        if page[place] & bit:
            return False
        page[place] |= bit
        self._count += 1
        return True

    def discard(self, number: int) -> None:
        """Take a number out; nothing happens where it is not there."""
        if number in self:
            self._pages[number // _PAGE][number % _PAGE >> 3] ^= 1 << (number & 7)
            self._count -= 1

    def __contains__(self, number: int) -> bool:
        page = self._pages.get(number // _PAGE)
        return page is not None and bool(page[number % _PAGE >> 3] & 1 << (number & 7))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers in order."""
        for key in sorted(self._pages):
            for place, byte in enumerate(self._pages[key]):
                if byte:
                    yield from (key * _PAGE + 8 * place + bit for bit in range(8) if byte >> bit & 1)

    def missing(self, count: int) -> Iterator[int]:
        """Yield, in order, the numbers below `count` that are not in the set, as it is when each is asked for."""
        return (number for number in range(count) if number not in self)
