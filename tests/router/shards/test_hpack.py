"""Header blocks; `hpack`, a library of its own, is what they are held against."""

import hpack as other
import pytest

from kagami_router.shards import hpack


def test_what_is_written_another_library_reads() -> None:
    headers = ((b":path", b"/a/b"), (b"long", b"x" * 300), (b"empty", b""))
    assert other.Decoder().decode(hpack.written(headers), raw=True) == list(headers)


def test_what_another_library_writes_is_read() -> None:
    encoder = other.Encoder()
    encoder.header_table_size = 0
    block = encoder.encode(
        [(":status", "200"), ("grpc-status", "14"), ("grpc-message", "é" * 200)], huffman=False
    )
    assert hpack.read(block) == {
        ":status": "200",
        "grpc-status": "14",
        "grpc-message": "é" * 200,
    }


def test_a_huffman_coded_header_is_passed_over() -> None:
    block = other.Encoder().encode([("a", "secret")], huffman=True)
    assert hpack.read(block + hpack.written([(b"b", b"c")])) == {"b": "c"}


@pytest.mark.parametrize("status", hpack.STATUS.values())
def test_every_status_of_the_static_table_is_known(status: str) -> None:
    assert hpack.read(other.Encoder().encode([(":status", status)])) == {":status": status}


@pytest.mark.parametrize("block", [b"\x00\x05ab", b"\x00", b"\x7f", b"\xff" + b"\xff" * 9])
def test_a_broken_block_is_refused(block: bytes) -> None:
    with pytest.raises(ValueError, match="header block"):
        hpack.read(block)
