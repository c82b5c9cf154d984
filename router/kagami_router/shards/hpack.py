"""Header blocks of HTTP/2 (RFC 7541), as much of it as one gRPC call needs.

What is written has no index and no Huffman code. What is read may refer to the static table, and
says by its name or its value only what `STATUS` and a gRPC peer's literal headers say: of a header
whose name or value is Huffman coded or stands in a table nothing is reported. gRPC's C core writes
none that matters here so; it may not have a table of its own (`SETTINGS_HEADER_TABLE_SIZE` is 0).
"""

from collections.abc import Iterable

# Entries 8 to 14 of the static table (appendix A): `:status` with a value.
STATUS = {8: "200", 9: "204", 10: "206", 11: "304", 12: "400", 13: "404", 14: "500"}
_STATUS_NAMES = range(8, 15)


def written(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A block of literal headers without indexing (section 6.2.2)."""
    return b"".join(b"\x00" + _string(name) + _string(value) for name, value in headers)


def _string(text: bytes) -> bytes:
    """Section 5.2, not Huffman coded."""
    if len(text) < 0x7F:
        return bytes((len(text),)) + text
    rest, size = len(text) - 0x7F, b"\x7f"
    while rest >= 0x80:
        size += bytes((rest & 0x7F | 0x80,))
        rest >>= 7
    return size + bytes((rest,)) + text


def read(block: bytes) -> dict[str, str]:
    """The headers of a block that can be read; raises `ValueError` where it is none."""
    reader = _Reader(block)
    found: dict[str, str] = {}
    while not reader.is_done:
        first = block[reader.position]
        if first & 0x80:  # indexed, section 6.1
            index = reader.integer(7)
            if index in STATUS:
                found[":status"] = STATUS[index]
        elif first & 0xE0 == 0x20:  # a new size of the dynamic table, section 6.3
            reader.integer(5)
        else:  # a literal, sections 6.2.1 to 6.2.3
            name_index = reader.integer(6 if first & 0x40 else 4)
            name = reader.string() if name_index == 0 else _name_of(name_index)
            value = reader.string()
            if name is not None and value is not None:
                found[name] = value
    return found


def _name_of(index: int) -> str | None:
    return ":status" if index in _STATUS_NAMES else None


class _Reader:
    """Integers and strings of one block, in order."""

    def __init__(self, block: bytes) -> None:
        self._block = block
        self.position = 0

    @property
    def is_done(self) -> bool:
        return self.position >= len(self._block)

    def _byte(self) -> int:
        if self.is_done:
            raise ValueError("a header block ends within a header")
        self.position += 1
        return self._block[self.position - 1]

    def integer(self, prefix_bits: int) -> int:
        """Section 5.1."""
        most = (1 << prefix_bits) - 1
        value = self._byte() & most
        if value < most:
            return value
        for shift in range(0, 28, 7):
            byte = self._byte()
            value += (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("an integer of a header block has more than 28 bits")

    def string(self) -> str | None:
        """Section 5.2; None where it is Huffman coded."""
        is_huffman = bool(not self.is_done and self._block[self.position] & 0x80)
        end = self.integer(7)
        start, end = self.position, self.position + end
        if end > len(self._block):
            raise ValueError("a header block ends within a string")
        self.position = end
        return None if is_huffman else self._block[start:end].decode("utf-8", "replace")
