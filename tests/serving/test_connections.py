"""Connections that say little: closed in time, beyond the limit, and not in others' way."""

from __future__ import annotations

import contextlib
import logging
import socket
import time

import pytest
import uvicorn.protocols.http.auto as parser

from tests.serving.conftest import fast_costs, httpx, listening, sleeping_service
from turbotx.serving import connections
from turbotx.serving.connections import ConnectionLimits, connection_limit

HEAD = b"POST /embed HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
WHOLE = HEAD + b'content-length: 16\r\n\r\n{"inputs": "w1"}'


@pytest.fixture(params=["httptools", "h11"])
def either_parser(request, monkeypatch):
    module = pytest.importorskip(f"uvicorn.protocols.http.{request.param}_impl")
    names = {"httptools": "HttpToolsProtocol", "h11": "H11Protocol"}
    chosen = getattr(module, names[request.param])
    assert hasattr(parser, "AutoHTTPProtocol")
    monkeypatch.setattr(connections, "AutoHTTPProtocol", chosen)


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    found = socket.create_connection((host, int(port)), timeout=20)
    return found


def is_closed(sock):
    """Whether the server closes it within the socket's time-out."""
    with contextlib.suppress(ConnectionResetError):
        return sock.recv(1) == b""
    return True


def test_who_says_nothing_or_half_is_closed(either_parser):
    with listening(sleeping_service(), receive_s=1.0) as url:
        socks = [connect(url) for _ in range(4)]
        socks[1].sendall(HEAD)
        socks[2].sendall(HEAD + b"content-length: 500\r\n\r\n{")
        socks[3].sendall(WHOLE)
        assert socks[3].recv(100).startswith(b"HTTP/1.1 200")
        socks[3].settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while socks[3].recv(10_000):
                pass
        socks[3].settimeout(20)
        socks[3].sendall(HEAD)  # half a second request
        assert all(is_closed(sock) for sock in socks)
        assert httpx.post(f"{url}/embed", json={"inputs": "w1"}).status_code == 200
        for sock in socks:
            sock.close()


def send_slowly(sock):
    for i in range(200):
        sock.sendall(WHOLE[i : i + 1])
        time.sleep(0.05)


def test_a_header_byte_by_byte_is_closed_too(either_parser):
    with listening(sleeping_service(), receive_s=1.0) as url, connect(url) as slow:
        with pytest.raises(OSError, match=r"(?i)reset|pipe"):
            send_slowly(slow)
        assert httpx.get(f"{url}/health").status_code == 200


@pytest.mark.parametrize("first", [b"", WHOLE], ids=["alone", "beside an answer"])
def test_a_header_without_end_is_refused(first, either_parser):
    service = sleeping_service(fast_costs(scale=1000.0))
    with listening(service) as url, connect(url) as endless:
        endless.sendall(first + HEAD)
        said = b""
        with contextlib.suppress(OSError):
            for i in range(200):
                endless.sendall(b"x-%d: %s\r\n" % (i, b"a" * 4000))
                time.sleep(0.002)
        with contextlib.suppress(ConnectionResetError):
            while part := endless.recv(10_000):
                said += part
        assert said == b"" or b"HTTP/1.1 431" in said or b"HTTP/1.1 400" in said
        assert httpx.get(f"{url}/health").status_code == 200


def test_an_offer_of_http_2_does_not_cost_the_body(either_parser):
    offer = b"connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n"
    with listening(sleeping_service()) as url, connect(url) as java:
        for whole in (WHOLE.replace(b"host: a\r\n", b"host: a\r\n" + offer), WHOLE):
            java.sendall(whole)
            assert java.recv(10_000).startswith(b"HTTP/1.1 200")


def test_an_idle_connection_that_is_reused_stays(either_parser):
    with listening(sleeping_service(), receive_s=1.0) as url, httpx.Client(base_url=url) as client:
        for _ in range(2):
            assert client.post("/embed", json={"inputs": "w1"}).status_code == 200
            time.sleep(2.2)


def test_beyond_the_limit_the_most_silent_goes(either_parser, caplog):
    with caplog.at_level(logging.WARNING, "turbotx"), listening(sleeping_service(), most=8) as url:
        silent = [connect(url) for _ in range(20)]
        assert httpx.post(f"{url}/embed", json={"inputs": "w1"}).status_code == 200
        assert is_closed(silent[0])
        for sock in silent:
            sock.close()
    assert "8 connections are open, the limit" in caplog.text


def test_a_body_that_is_half_there_does_not_hold_the_server(either_parser):
    service = sleeping_service()
    with listening(service) as url, connect(url) as half:
        half.sendall(HEAD + b"content-length: 500\r\n\r\n{")
        time.sleep(0.3)
        service.bodies.leave()
        assert half.recv(100).startswith(b"HTTP/1.1 503")


def test_the_limit_leaves_descriptors_for_the_rest(monkeypatch):
    said = []
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (100, 200))
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, both: said.append(both))
    assert connection_limit(20) == 20 and not said
    assert connection_limit(1000) == 136 and said == [(200, 200)]


class Connection:
    def __init__(self, busy=False):
        self.busy, self.aborted, self.in_body = busy, False, False
        self.head_since_s, self.unread, self.read_s, self.left = None, 0, 0.0, 0
        self.transport = self

    def abort(self):
        self.aborted = True

    def leave(self):
        pass

    def get_write_buffer_size(self):
        return self.left


def test_busy_connections_are_never_the_ones_to_go():
    limits = ConnectionLimits(1.0, 2)
    working, idle, newest = Connection(True), Connection(), Connection()
    for connection in (working, idle, newest):
        limits.admit(connection)
    assert idle.aborted and not working.aborted and not newest.aborted
    limits = ConnectionLimits(1.0, 1)
    for connection in (working, newest):
        limits.admit(connection)
    assert newest.aborted and not working.aborted


def test_who_has_spoken_lately_stays():
    limits = ConnectionLimits(1.0, 2)
    first, second, third = (Connection() for _ in range(3))
    limits.admit(first)
    limits.admit(second)
    limits.hear(first)
    limits.hear(third)  # not counted, or no more: stays so
    limits.admit(third)
    assert second.aborted and not first.aborted and list(limits.open) == [first, third]


def test_who_does_not_read_is_closed_and_who_reads_slowly_is_not():
    limits = ConnectionLimits(3.0, 10)
    never, slowly, done = (Connection() for _ in range(3))
    for connection in (never, slowly, done):
        limits.admit(connection)
        connection.left = 1000
    for now_s in range(100, 110):
        slowly.left -= 1 if now_s % 2 else 0
        done.left = 0
        limits.close_late(float(now_s))
    assert never.aborted and not slowly.aborted and not done.aborted


def test_of_answers_that_are_not_read_the_largest_go():
    limits = ConnectionLimits(3.0, 10, nbytes=100)
    small, large, middle = (Connection() for _ in range(3))
    for connection, left in ((small, 200), (large, 700), (middle, 300)):
        limits.admit(connection)
        connection.left = left
    limits.close_late(0.0)
    assert large.aborted and not small.aborted and not middle.aborted


CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "begin, more",
    [
        (CHUNKED + b"1\r\n{\r\n0\r\n", b"x-a: b\r\n" * 1000),  # trailers
        (CHUNKED + b"1", b";a=b" * 2000),  # extensions of a chunk
    ],
)
def test_what_goes_with_a_body_has_an_end(either_parser, begin, more):
    with listening(sleeping_service(), nbytes=10_000) as url, connect(url) as sock:
        sock.sendall(begin)
        with pytest.raises(OSError, match=r"reset|pipe"):
            sock.sendall(more * 2_000)  # 16 MB and more
        assert httpx.post(f"{url}/embed", json={"inputs": "w1"}).status_code == 200


def test_trailers_are_not_kept():
    parsers = pytest.importorskip("uvicorn.protocols.http.httptools_impl")
    protocol = connections.make_protocol(ConnectionLimits(1.0, 1))
    if not issubclass(protocol, parsers.HttpToolsProtocol):
        pytest.skip("uvicorn takes its other parser")
    one = protocol.__new__(protocol)
    one.headers, one.heads_over = [], True
    one.on_header(b"x", b"y")
    assert one.headers == []


@pytest.mark.parametrize("offer", [b"h2c", b"websocket", b"foo/2"])
def test_an_offer_of_another_protocol_changes_nothing(either_parser, caplog, offer):
    wanted = WHOLE.replace(
        b"\r\n\r\n", b"\r\nconnection: upgrade\r\nupgrade: " + offer + b"\r\n\r\n"
    )
    with listening(sleeping_service()) as url, connect(url) as sock:
        sock.sendall(wanted)
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
    assert "WebSocket" not in caplog.text


def test_who_leaves_while_many_are_answered_is_no_error(either_parser, caplog):
    with listening(sleeping_service()) as url:
        for _ in range(5):
            with connect(url) as sock:
                sock.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: a\r\n\r\n" * 300)
                time.sleep(0.05)
        assert httpx.post(f"{url}/embed", json={"inputs": "w1"}).status_code == 200
    assert "Exception in ASGI" not in caplog.text
