"""One call, bytes in and out; h2, another implementation, plays its server where it can."""

import struct

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest

from kagami_router.shards.http2 import ClientCall, Kind, Setting, frame

MESSAGE = b"\x08\x01" * 5


def framed(message: bytes) -> bytes:
    return b"\0" + len(message).to_bytes(4) + message


class Server:
    """h2 behind a `ClientCall`: whatever either says reaches the other at once."""

    def __init__(self, **settings: int) -> None:
        self.peer = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        codes = {h2.settings.SettingCodes[name.upper()]: value for name, value in settings.items()}
        self.peer.local_settings = h2.settings.Settings(client=False, initial_values=codes)
        self.peer.initiate_connection()
        self.call = ClientCall("/kagami/Run", "localhost")
        self.headers: dict[bytes, bytes] = {}
        self.received = b""
        self.messages: list[bytes] = []
        self.exchange()

    def exchange(self) -> None:
        while True:
            output = self.call.take_output()
            for event in self.peer.receive_data(output):
                if isinstance(event, h2.events.RequestReceived):
                    self.headers = dict(event.headers)
                elif isinstance(event, h2.events.DataReceived):
                    self.received += event.data
                    self.peer.acknowledge_received_data(event.flow_controlled_length, 1)
            answer = self.peer.data_to_send()
            self.messages += self.call.receive(answer)
            if not answer:
                return

    def end(self, *headers: tuple[str, str]) -> None:
        self.peer.send_headers(1, headers, end_stream=True)
        self.exchange()


def test_a_call_names_its_method() -> None:
    headers = Server().headers
    assert (headers[b":path"], headers[b"te"]) == (b"/kagami/Run", b"trailers")
    assert headers[b"content-type"] == b"application/grpc"


def test_a_message_is_framed() -> None:
    server = Server()
    server.call.send(MESSAGE)
    server.exchange()
    assert server.received == framed(MESSAGE)


def test_a_message_larger_than_every_window_arrives_whole() -> None:
    server = Server(initial_window_size=1000)
    large = bytes(range(256)) * 2000
    server.call.send(large)
    server.call.send(MESSAGE)
    server.exchange()
    assert server.received == framed(large) + framed(MESSAGE)


def test_messages_come_out_however_they_were_cut() -> None:
    server = Server()
    server.peer.send_headers(1, [(":status", "200")])
    server.exchange()
    sent = framed(MESSAGE) + framed(b"") + framed(b"x" * 300)
    for start in range(0, len(sent), 7):
        server.peer.send_data(1, sent[start : start + 7], pad_length=3)
    for byte in server.peer.data_to_send():
        server.messages += server.call.receive(bytes((byte,)))
    assert server.messages == [MESSAGE, b"", b"x" * 300]


def test_more_than_a_window_can_be_received() -> None:
    server = Server()
    server.peer.send_headers(1, [(":status", "200")])
    part = b"\0" * 16_000
    assert server.peer.outbound_flow_control_window > 1 << 24
    whole = framed(part * 2000)
    for start in range(0, len(whole), len(part)):
        server.peer.send_data(1, whole[start : start + len(part)])
        server.exchange()
    assert server.messages == [part * 2000]
    assert server.peer.local_flow_control_window(1) > 1 << 30


def test_a_ping_is_answered() -> None:
    server = Server()
    server.call.take_output()
    server.call.receive(frame(Kind.PING, 0, 0, b"12345678"))
    assert server.call.take_output() == frame(Kind.PING, 1, 0, b"12345678")


def test_an_unknown_frame_is_ignored() -> None:
    call = ClientCall("/m", "a")
    unknown = bytes((0, 0, 1, 99, 0, 0, 0, 0, 1)) + b"x"
    message = frame(Kind.DATA, 0, 1, framed(MESSAGE))
    assert call.receive(unknown + message) == [MESSAGE]


def test_a_smaller_window_holds_back_what_was_promised() -> None:
    call = ClientCall("/m", "a")
    call.take_output()
    small = struct.pack(">HI", Setting.INITIAL_WINDOW_SIZE, 3)
    call.receive(frame(Kind.SETTINGS, 0, 0, small))
    call.take_output()
    call.send(b"abc")
    assert call.take_output() == frame(Kind.DATA, 0, 1, framed(b"abc")[:3])
    call.receive(frame(Kind.WINDOW_UPDATE, 0, 1, struct.pack(">I", 100)))
    assert call.take_output() == frame(Kind.DATA, 0, 1, framed(b"abc")[3:])


def test_trailers_say_how_a_call_ended() -> None:
    server = Server()
    server.peer.send_headers(1, [(":status", "200")])
    encoder = server.peer.encoder
    block = encoder.encode([("grpc-status", "10"), ("grpc-message", "a%20b")], huffman=False)
    server.exchange()
    server.call.receive(frame(Kind.HEADERS, 0x1, 1, block[:5]))
    server.call.receive(frame(Kind.CONTINUATION, 0x4, 1, block[5:]))
    assert server.call.end == "a b"


def test_trailers_that_cannot_be_read_end_the_call_too() -> None:
    server = Server()
    server.end((":status", "200"), ("grpc-status", "0"))
    assert server.call.end is not None
    assert "gRPC status" in server.call.end


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (frame(Kind.RST_STREAM, 0, 1, struct.pack(">I", 8)), "reset with HTTP/2 error 8"),
        (frame(Kind.GOAWAY, 0, 0, struct.pack(">II", 0, 2) + b"bye"), "bye"),
        (frame(Kind.DATA, 0, 1, b"\x01\0\0\0\0"), "compressed"),
        (frame(Kind.HEADERS, 0x4, 1, b"\x8d"), "HTTP status 404"),
        (frame(Kind.HEADERS, 0x4, 1, b"\x00\x09a"), "header block"),
        (b"\xff\xff\xff" + b"\0" * 6, "a frame of 16777215 bytes"),
    ],
)
def test_a_call_tells_why_it_ended(data: bytes, reason: str) -> None:
    call = ClientCall("/m", "a")
    call.receive(data)
    assert call.end is not None
    assert reason in call.end


def test_a_server_that_leaves_lets_a_call_go_on() -> None:
    call = ClientCall("/m", "a")
    call.receive(frame(Kind.GOAWAY, 0, 0, struct.pack(">II", 1, 0) + b"drained"))
    assert call.receive(frame(Kind.DATA, 0, 1, framed(MESSAGE))) == [MESSAGE]
    call.connection_lost("closed")
    assert call.end == "drained"


def test_a_cancelled_call_is_reset() -> None:
    call = ClientCall("/m", "a")
    call.take_output()
    call.cancel()
    assert call.take_output() == frame(Kind.RST_STREAM, 0, 1, struct.pack(">I", 8))
