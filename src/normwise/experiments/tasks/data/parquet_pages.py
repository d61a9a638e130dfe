"""How large a parquet file's pages are once unpacked, by the heads of the pages themselves.

The account at a file's end says how large its columns are, and a reader believes the head of each page instead: a file of a hundred
kilobytes whose account says as much may have pages of gigabytes. Each head is a Thrift structure in the compact protocol
(parquet-format, PageHeader); its numbers are read here and nothing is unpacked.
"""

from __future__ import annotations

from typing import Any, BinaryIO

__all__ = ["unpacked_size"]

_HEAD = 1 << 16    # bytes of a page's head: more than statistics of two values take, which are cut off at some hundred bytes
_MOST_PAGES = 1_000_000
_DATA, _DATA_2 = 5, 8    # the fields of a head that are the heads of data pages; their first field is the count of values


def unpacked_size(file: BinaryIO, chunk: Any) -> int:
    """Bytes of all pages of a column chunk, unpacked. chunk: pyarrow's ``ColumnChunkMetaData``. ValueError for what are no pages."""
    at = chunk.data_page_offset
    if chunk.dictionary_page_offset:
        at = min(at, chunk.dictionary_page_offset)
    size = values = pages = 0
    while values < chunk.num_values:
        file.seek(at)
        head = _Head(file.read(_HEAD))
        fields = head.structure()
        unpacked, packed = fields.get(2, -1), fields.get(3, -1)
        pages += 1
        if unpacked < 0 or packed < 0 or pages > _MOST_PAGES:
            raise ValueError("its pages are damaged")
        size += unpacked
        values += fields.get((_DATA, 1), 0) + fields.get((_DATA_2, 1), 0)
        at += head.at + packed
    return size


class _Head:
    """A Thrift structure in the compact protocol: its whole numbers by their field's number, those of a structure in it by both."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        if self.at >= len(self.data):
            raise ValueError("the head of a page is cut off")
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80 or shift > 70:
                return value

    def number(self) -> int:
        value = self.varint()
        return value >> 1 ^ -(value & 1)

    def structure(self, depth: int = 0) -> dict[Any, int]:
        found: dict[Any, int] = {}
        field = 0
        while True:
            head = self.byte()
            if head == 0:
                return found
            field = field + (head >> 4) if head >> 4 else self.number()
            kind = head & 0x0F
            if kind in (4, 5, 6):
                found[field] = self.number()
            elif kind == 12 and depth < 8:
                found |= {(field, name): value for name, value in self.structure(depth + 1).items()}
            else:
                self.skip(kind, depth)

    def skip(self, kind: int, depth: int) -> None:
        if kind in (1, 2):    # true and false
            return
        if kind == 3:
            self.at += 1
        elif kind in (4, 5, 6):
            self.varint()
        elif kind == 7:
            self.at += 8
        elif kind == 8:
            size = self.varint()    # which moves on, too
            self.at += size
        elif kind in (9, 10) and depth < 8:
            head = self.byte()
            for _ in range(head >> 4 if head >> 4 < 15 else self.varint()):
                self.skip(1 if head & 0x0F in (1, 2) else head & 0x0F, depth + 1)
                if head & 0x0F in (1, 2):
                    self.byte()
                if self.at > len(self.data):
                    raise ValueError("the head of a page is cut off")
        elif kind == 12 and depth < 8:
            self.structure(depth + 1)
        else:
            raise ValueError("the head of a page is damaged")
