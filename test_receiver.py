# SPDX-License-Identifier: MIT
"""Tests of every promise of the receiver, in the order of receiver.py.

First the protocol without a network, then the store on real files, then the server with real TLS
and sockets. The command line, the conformance kit, and the project itself follow.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import errno
import functools
import glob
import hashlib
import http.client
import http.server
import importlib.util
import inspect
import io
import itertools
import json
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import wsgiref.util
import wsgiref.validate
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote, unquote, urlsplit

import pytest
import requests

import receiver

# ==================================================================================================
# What all tests share
#
# Helpers that make requests, as bytes and as receiver.Request; a receiver in a separate process;
# and a TLS connection that sends exact bytes. Each receiver listens on a free port, and is stopped
# when its context or fixture ends.
# ==================================================================================================

os.environ["TZ"] = "Asia/Tokyo"  # far from UTC, to show that no local time is used
time.tzset()

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
CERT = HERE / "certs/localhost.pem"
CERT_KEY = HERE / "certs/localhost-key.pem"
RECEIVER = [sys.executable, str(HERE / "receiver.py")]
SOURCE = (HERE / "receiver.py").read_text()

SAMPLES = {
    name: json.loads((FIXTURES / f"{name}.json").read_text())
    for name in ("identify", "track", "page", "group")
}

# The API key `segment` belongs to the customer `demo`, `segment-expired` to `lapsed`, and
# `segment-identify-only`, which permits only identify, to `limited`.
KEYS = receiver.Keyring(str(FIXTURES / "keys.json")).keys
NOW = "2026-01-15T12:00:00.000Z"
TRACK = {"type": "track", "user_id": "u1", "event": "Signed Up"}
TRACK_JSON = json.dumps(TRACK).encode()
LINGER_RESET = struct.pack("ii", 1, 0)  # the SO_LINGER value that turns a close into a reset

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="uses /proc, prlimit or /dev/full")


def cases(names: str, rows: Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrize a test. `rows` maps the id of each case to the value or values of `names`."""
    has_one_name = "," not in names
    if has_one_name:
        parameters = [pytest.param(row, id=case_id) for case_id, row in rows.items()]
    else:
        parameters = [pytest.param(*row, id=case_id) for case_id, row in rows.items()]
    return pytest.mark.parametrize(names, parameters)


def basic(api_key: str) -> str:
    """The value of an Authorization header."""
    return "Basic " + base64.b64encode(f"{api_key}:".encode()).decode()


def digest(api_key: str) -> str:
    return hashlib.sha256(api_key.encode()).hexdigest()


def one_key(customer: str, **rest: Any) -> dict[str, receiver.Key]:
    """A single API key, `segment`, which belongs to this customer."""
    return {digest("segment"): receiver.Key(customer, **rest)}


class Record(NamedTuple):
    """A request from the fixtures, and the reply or the call that is expected."""

    head: str
    body: bytes
    status: int
    message: str  # how receiver.py's own message begins
    words: list[str]  # what the message of any implementation should contain; `names` in the file
    rung: int  # the rung that refuses the request; 0 if none does
    call: dict[str, Any]


def fixture_records(file: str) -> dict[str, Record]:
    """The records of a file in fixtures/ by their label."""
    records = {}
    for record in json.loads((FIXTURES / file).read_text()):
        request = record["request"]
        lines = [f"{request['method']} {request['path']} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in request["headers"].items()]
        body = request.get("body", "").encode() or base64.b64decode(request.get("body_base64", ""))
        # accepted.json calls the label of a record `right`, and refused.json calls it `wrong`.
        label = record.get("right") or record["wrong"]
        records[label] = Record(
            head="\r\n".join(lines),
            body=body,
            status=record.get("status", 200),
            message=record.get("message", ""),
            words=record.get("names", []),
            rung=record.get("rung", 0),
            call=record.get("call", {}),
        )
    return records


ACCEPTED = fixture_records("accepted.json")
REFUSED = fixture_records("refused.json")


class Recorder(receiver.Destination):
    """A destination that supports every type, and records the arguments of its handlers.

    Each handler returns `result`. But if that is an exception, the handler raises it; if it is a
    function, the handler returns the result of calling it.
    """

    def __init__(self, result: Any = None) -> None:
        self.result = result
        self.calls: list[tuple[Any, ...]] = []

    def _record(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result() if callable(self.result) else self.result

    identify = track = page = group = delete = screen = alias = _record


class Unprintable:
    """An object whose repr raises an exception."""

    def __repr__(self) -> str:
        raise AttributeError("no repr")


class FixtureDestination(Recorder):
    """The destination that the fixtures assume: it supports neither screen nor alias."""

    screen = alias = None  # type: ignore[assignment]


def ask(
    body: Any = TRACK,
    *,
    method: str = "POST",
    target: str = "/",
    destination: receiver.Destination | None = None,
    keys: Mapping[str, receiver.Key] = KEYS,
    maintenance: bool = False,
    length: Any = ...,
    **headers: str | None,
) -> receiver.Reply:
    """The reply to a request, without a network.

    `authorization=None` leaves that header out. `length` is the Content-Length: by default, that of
    the body; None if the header is missing.
    """
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"authorization": basic("segment")}
    for name, value in headers.items():
        if value is None:
            del sent[name]
        else:
            sent[name.replace("_", "-")] = value
    request = receiver.Request(
        method, target, sent, len(data) if length is ... else length, lambda: data
    )
    endpoint = receiver.Endpoint(destination or Recorder(), keys, maintenance=maintenance)
    return receiver.answer(request, endpoint, lambda: NOW)


def ask_record(
    record: Record, destination: receiver.Destination, module: Any = receiver
) -> receiver.Reply:
    """The reply to a record of the fixtures, without a network.

    `module` is receiver.py, or a variant of it.
    """
    try:
        head = module.parse_head(record.head)
    except module.Refusal as refusal:
        return module.error_reply(refusal)  # type: ignore[no-any-return]
    request = module.Request(
        head.method, head.target, head.headers, head.length, lambda: record.body
    )
    reply: receiver.Reply = module.answer(request, module.Endpoint(destination, KEYS), lambda: NOW)
    return reply


def handler_arguments(call: Any = TRACK, **changes: Any) -> tuple[Any, ...]:
    """The arguments that a handler receives for a call that is accepted."""
    recorder = Recorder()
    reply = ask(call, destination=recorder, **changes)
    assert reply.status == 200, reply
    return recorder.calls[0]


def accepted_call(call: Any = TRACK, **changes: Any) -> receiver.Call:
    """The Call that a handler receives, as its last argument, for a call that is accepted."""
    whole: receiver.Call = handler_arguments(call, **changes)[-1]
    return whole


def request(
    call: Any = TRACK,
    *lines: str,
    method: str = "POST",
    target: str = "/",
    version: str = "HTTP/1.1",
    host: str | None = "Host: localhost",
    api_key: str | None = "segment",
    length: object = None,
) -> bytes:
    """A request as bytes. `lines` are additional header lines; `host` is a header line, too.

    Without a call, there is no body, and no Content-Length unless a `length` is given.
    """
    if call is None:
        body = b""
    else:
        body = call if isinstance(call, bytes) else json.dumps(call).encode()
        if length is None:
            length = len(body)
    head = [f"{method} {target} {version}"]
    if host is not None:
        head.append(host)
    if api_key is not None:
        head.append(f"Authorization: {basic(api_key)}")
    if length is not None:
        head.append(f"Content-Length: {length}")
    return "\r\n".join([*head, *lines, "", ""]).encode("latin-1") + body


def head(*lines: str, **parts: Any) -> bytes:
    """The head of a request without a body."""
    return request(None, *lines, **parts)


def rows(path: Path, query: str, *values: object) -> list[Any]:
    """What a query finds in an SQLite database."""
    with contextlib.closing(sqlite3.connect(path, timeout=10)) as db:
        return db.execute(query, values).fetchall()


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Poll until a condition is true, and return its value. For changes that nothing signals."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} seconds: {condition}"
        time.sleep(0.01)
    return found


def command(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, by default in the project's folder."""
    defaults: dict[str, Any] = {"cwd": HERE, "capture_output": True, "text": True, "timeout": 60}
    return subprocess.run([str(word) for word in words], **{**defaults, **options})


TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


class RunningReceiver(contextlib.AbstractContextManager["RunningReceiver"]):
    """A receiver in a separate process, on a free port. Its database is calls.db in the folder."""

    def __init__(
        self,
        folder: Path,
        *options: object,
        program: Sequence[str] = RECEIVER,
        log: str | Path | None = None,
        **popen_options: Any,
    ) -> None:
        self.database = folder / "calls.db"
        self.tls_cert = str(CERT)
        self.log_path = Path(log or folder / f"log-{time.monotonic_ns()}")
        words = [*program, "--port", "0", *map(str, options)]
        if program is RECEIVER and "--database" not in options:
            words += ["--database", str(self.database)]
        with open(self.log_path, "wb") as stderr:
            defaults = {"cwd": HERE, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
            self.popen = subprocess.Popen(words, **{**defaults, **popen_options})
        assert self.popen.stdout
        self.first_line = self.popen.stdout.readline()
        self.url = self.first_line.removeprefix("Listening on ").split(" ")[0].strip()

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def wait_for_log(self, pattern: str, seconds: float = 10) -> re.Match[str]:
        """Wait until the log has a match for this pattern, and return it."""
        found: re.Match[str] = wait_until(lambda: re.search(pattern, self.log, re.M), seconds)
        return found

    def flush_log(self) -> int:
        """Wait until all earlier requests are in the log, and return its length.

        A marker call is posted for this purpose.
        """
        user = f"mark-{time.monotonic_ns()}"
        post(self, {**TRACK, "user_id": user})
        self.wait_for_log(user)
        return len(self.log)

    def lines_after(self, position: int, pattern: str) -> list[str]:
        """Wait until the log after this position matches a pattern.

        Returns all lines after the position, except the marker calls of `flush_log`.
        """
        wait_until(lambda: re.search(pattern, self.log[position:]))
        self.flush_log()
        return [line for line in self.log[position:].splitlines() if " mark-" not in line]

    def message_ids(self) -> list[str]:
        return [row[0] for row in rows(self.database, "select message_id from calls")]

    def memory_mb(self) -> int:
        """Resident memory."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found
        return int(found[1]) // 1024

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def send_signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Stop the process with a signal, and return its exit status."""
        self.send_signal(number)
        self.popen.communicate(timeout=15)
        return self.popen.returncode

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.stop(signal.SIGKILL)
        elif self.popen.stdout:
            self.popen.stdout.close()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningReceiver]:
    """One receiver, for tests that neither stop it nor depend on what it has stored."""
    with RunningReceiver(tmp_path_factory.mktemp("running")) as shared:
        yield shared


TIMEOUT = 1  # seconds


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningReceiver]:
    """One receiver with a short `--timeout`, for all tests that wait until it expires."""
    with RunningReceiver(tmp_path_factory.mktemp("impatient"), "--timeout", TIMEOUT) as shared:
        yield shared


THREADS_AT_REST = 4  # main, accept, log and writer


def add_key(customer: str, *options: object) -> subprocess.CompletedProcess[str]:
    """Run `receiver.py --add-key`."""
    return command(*RECEIVER, "--add-key", customer, *options)


def run_program(folder: Path, program: str, *options: object) -> RunningReceiver:
    """Save a program that calls receiver.main(), and run it in that folder."""
    (folder / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    words = [sys.executable, "program.py"]
    return RunningReceiver(folder, *options, program=words, cwd=folder, env=environment)


def post(
    server: receiver.Server | RunningReceiver, call: Any = TRACK, api_key: str = "segment"
) -> requests.Response:
    """Post a call with `requests`."""
    return requests.post(
        server.url, json=call, auth=(api_key, ""), verify=server.tls_cert, timeout=20
    )


def connect(server: receiver.Server | RunningReceiver) -> socket.socket:
    """A TCP connection without TLS, and with Nagle's algorithm switched off."""
    parts = urlsplit(server.url)
    sock = socket.create_connection((parts.hostname, parts.port), 15)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    return sock


class ReceivedReply(NamedTuple):
    """A reply as it was received. Its status is 0 if the connection ended without a reply."""

    status: int = 0
    headers: Mapping[str, str] = {}
    body: bytes = b""

    @property
    def message(self) -> str:
        return str(json.loads(self.body)["message"])


class TlsClient(contextlib.AbstractContextManager["TlsClient"]):
    """A TLS connection that sends exactly the given bytes, and reads one reply after another."""

    def __init__(
        self, server: receiver.Server | RunningReceiver, context: ssl.SSLContext | None = None
    ) -> None:
        context = context or ssl.create_default_context(cafile=server.tls_cert)
        self.tls = context.wrap_socket(connect(server), server_hostname="localhost")
        self.buffer = b""

    def send(self, data: bytes) -> TlsClient:
        self.tls.sendall(data)
        return self

    def half_close(self) -> TlsClient:
        """Shut down the sending side of the TCP connection, without sending a close_notify."""
        socket.socket.shutdown(self.tls, socket.SHUT_WR)
        return self

    def reset(self) -> None:
        self.tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        self.tls.close()

    def receive(self) -> bool:
        """Receive something; return False if the connection has ended."""
        data = b""
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            data = self.tls.recv(65_536)
        self.buffer += data
        return bool(data)

    def read_reply(self, head_only: bool = False) -> ReceivedReply:
        """The next reply. With `head_only`, it has no body, whatever its Content-Length."""
        while b"\r\n\r\n" not in self.buffer:
            if not self.receive():
                return ReceivedReply()
        top, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        status_line, *lines = top.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(": ")
            headers[name.lower()] = value
        length = 0 if head_only else int(headers.get("content-length", 0))
        while len(self.buffer) < length:
            if not self.receive():
                self.buffer = top + b"\r\n\r\n" + self.buffer  # keep what arrived of the reply
                return ReceivedReply()
        body = self.buffer[:length]
        self.buffer = self.buffer[length:]
        return ReceivedReply(int(status_line.split(" ")[1]), headers, body)

    def status(self, data: bytes) -> int:
        """Send a request, and return the status code of the reply."""
        return self.send(data).read_reply().status

    def is_closed(self) -> bool:
        """Whether the connection ends without another byte."""
        return not self.buffer and not self.receive()

    def __exit__(self, *_: object) -> None:
        self.tls.close()


class Load(contextlib.AbstractContextManager["Load"]):
    """Clients that post calls as fast as they can.

    Each ends when it has posted `limit` calls, or when the context or the receiver ends.
    """

    def __init__(
        self, server: receiver.Server | RunningReceiver, name: str, clients: int, limit: int = 10**9
    ) -> None:
        self.server = server
        self.limit = limit
        self.enough = threading.Event()
        self.sent: set[str] = set()
        self.acknowledged: set[str] = set()
        self.other_statuses: list[int] = []
        self.seconds: list[float] = []
        self.pool = ThreadPoolExecutor(clients)
        self.clients = [self.pool.submit(self.run, f"{name}-{number}") for number in range(clients)]

    def run(self, name: str) -> None:
        with contextlib.suppress(OSError), TlsClient(self.server) as client:
            for number in range(self.limit):
                message_id = f"{name}-{number}"
                self.sent.add(message_id)
                started = time.monotonic()
                reply = client.send(request({**TRACK, "message_id": message_id})).read_reply()
                self.seconds.append(time.monotonic() - started)
                if reply.status == 200:
                    self.acknowledged.add(message_id)
                elif reply.status:
                    self.other_statuses.append(reply.status)
                if self.enough.is_set() or reply.headers.get("connection") != "keep-alive":
                    break

    def wait_for_acknowledged(self, count: int) -> None:
        """Wait until at least this many calls have been acknowledged."""
        wait_until(lambda: len(self.acknowledged) >= count, 60)

    def wait(self) -> None:
        """Wait until every client has ended."""
        for client in self.clients:
            client.result()

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        self.pool.shutdown()


# ==================================================================================================
# Part 1. The protocol
#
# How each request is answered, without a network. Most cases are data: fixtures/accepted.json and
# fixtures/refused.json hold requests and the replies that are expected, for use in any language.
# When you look for the test of a rule of the protocol, search these two files, too.
# ==================================================================================================

# The only modules and names of the standard library that the protocol part may use.
PURE_MODULES = {"base64", "hashlib", "json", "math", "re", "uuid"}
PURE_NAMES = {
    "UTC",
    "Any",
    "Callable",
    "Mapping",
    "NamedTuple",
    "NoReturn",
    "accumulate",
    "annotations",
    "dataclass",
    "datetime",
}


def test_the_protocol_part_does_no_input_or_output_and_reads_no_clock() -> None:
    part = SOURCE[SOURCE.index("\n# Part 1. ") : SOURCE.index("\n# Part 2. ")]
    imported = set()
    for node in ast.parse(SOURCE).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {alias.asname or alias.name for alias in node.names}
    nodes = list(ast.walk(ast.parse(part)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    attributes = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    used_imports = used & imported
    assert used_imports <= (PURE_MODULES | PURE_NAMES)
    assert not used & {"open", "print", "input", "exec", "eval", "compile", "__import__"}
    assert not attributes & {"now", "utcnow", "today"}  # the clocks of `datetime`
    assert not [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def without_speed_sections() -> types.ModuleType:
    """receiver.py without its two sections about speed."""
    # Each section reaches from its heading to the next heading.
    text, removed = re.subn(r"\n# ---- Speed -(?s:.*?)(?=\n# (?:====|----))", "\n", SOURCE)
    assert removed == 2
    module = types.ModuleType("receiver_without_speed")
    sys.modules[module.__name__] = module  # dataclasses look there
    exec(compile(text, "receiver.py", "exec"), module.__dict__)
    return module


def test_without_the_sections_about_speed_every_answer_is_the_same() -> None:
    module = without_speed_sections()
    assert module.parse_head.__closure__ is None  # it is not wrapped in a cache
    for record in [*ACCEPTED.values(), *REFUSED.values()]:
        for _ in range(2):  # the second reply uses what the first one has cached
            fast = ask_record(record, FixtureDestination())
            plain = ask_record(record, FixtureDestination(), module)
            # Two replies to internal errors are never equal, because each has its own exception.
            # But no record causes an internal error.
            assert fast == plain


@cases("record", ACCEPTED)
def test_an_accepted_request_gets_a_200_and_the_destination_receives_the_expected_call(
    record: Record,
) -> None:
    destination = FixtureDestination()
    reply = ask_record(record, destination)
    assert (reply.status, reply.body, reply.headers) == (200, {}, {})
    call = destination.calls[0][-1]
    received = {name: getattr(call, name) for name in record.call}
    assert json.dumps(received) == json.dumps(record.call)  # the order of members counts, too


@cases("record", REFUSED)
def test_a_refused_request_reaches_no_destination_and_the_message_names_the_culprit(
    record: Record,
) -> None:
    destination = FixtureDestination()
    reply = ask_record(record, destination)
    message = reply.body["message"]
    assert reply.status == record.status
    assert message.startswith(record.message)
    assert [word for word in record.words if word.lower() not in message.lower()] == []
    assert destination.calls == []


@pytest.mark.parametrize("status", sorted({record.status for record in REFUSED.values()}))
def test_no_status_in_refused_json_is_one_that_segment_retries(status: int) -> None:
    retried = {408, 429, *range(500, 600)} - {501, 505}
    assert status not in retried


# ---- The ladder ----------------------------------------------------------------------------------

# `receiver.answer` checks a request in a fixed order, rung by rung. For each outcome of rungs 2 to
# 11, in that order, this table has a request and the status of its reply. Rung 1, which parses the
# head, is tested in Part 3 and with some records of refused.json. Part 3 also tests bodies that do
# not arrive, which rung 7 refuses.
LADDER: dict[str, tuple[dict[str, Any], int]] = {
    "an unknown path": ({"target": "/elsewhere"}, 404),
    "an unsupported method": ({"method": "PUT"}, 405),
    "down for maintenance": ({"maintenance": True}, 503),
    "a malformed API key": ({"authorization": "Basic ???"}, 401),
    "an unknown API key": ({"authorization": basic("revoked")}, 401),
    "an expired API key": ({"authorization": basic("segment-expired")}, 401),
    "no Content-Length": ({"length": None}, 411),
    "a body that is too long": ({"length": 524_289}, 413),
    "an unsupported Content-Type": ({"content_type": "text/plain"}, 415),
    "an unsupported Content-Encoding": ({"content_encoding": "gzip"}, 415),
    "a malformed body": ({"body": b'{"type": "juggle", '}, 400),
    "malformed settings": ({"x_segment_settings": "?"}, 400),
    "a missing type": ({"body": {"user_id": "u1"}}, 400),
    "an unsupported type": ({"body": {"type": "juggle"}}, 501),
    "a key without the permission": ({"authorization": basic("segment-identify-only")}, 403),
    "a missing field": ({"body": {"type": "track", "user_id": "u1"}}, 400),
    "a destination that refuses for now": (
        {"destination": Recorder(receiver.Refusal(503, "The lists are being loaded"))},
        503,
    ),
    "a destination that fails": ({"destination": Recorder(ZeroDivisionError("secret"))}, 500),
    "accepted, but not yet processed": ({"destination": Recorder(HTTPStatus.ACCEPTED)}, 202),
    "accepted and processed": ({}, 200),
}


@cases("changes, status", LADDER)
def test_each_rung_answers_with_its_status_and_only_an_error_reply_has_a_message(
    changes: dict[str, Any], status: int
) -> None:
    reply = ask(**changes)
    assert reply.status == status
    assert list(reply.body) == ([] if status < 300 else ["message"])


def fault_pairs() -> dict[str, tuple[str, str]]:
    """All pairs of faults that fit into one request, and have different statuses."""
    pairs = {}
    for first, second in itertools.combinations(LADDER, 2):
        first_changes, first_status = LADDER[first]
        second_changes, second_status = LADDER[second]
        # All rows but the last two are faults. So if the second is a fault, the first is one, too.
        fit_together = not first_changes.keys() & second_changes.keys()
        if fit_together and second_status >= 400 and first_status != second_status:
            pairs[f"{first} before {second}"] = (first, second)
    return pairs


@cases("first, second", fault_pairs())
def test_of_two_faults_the_one_that_is_checked_first_decides_the_reply(
    first: str, second: str
) -> None:
    reply = ask(**LADDER[first][0], **LADDER[second][0])
    assert reply.status == LADDER[first][1]


def test_a_missing_type_is_reported_before_a_missing_user() -> None:
    assert ask({}).body == {"message": "Missing type"}


EXPIRED_IDENTIFY_KEY = one_key(
    "demo", calls=frozenset({"identify"}), expires="2020-01-01T00:00:00.000Z"
)


@cases(
    "changes, status",
    {
        "an expired key that also lacks the permission": ({"keys": EXPIRED_IDENTIFY_KEY}, 401),
        "a malformed body with an unsupported type": ({"body": b'{"type": "juggle", '}, 400),
        "an unsupported type without a user": ({"body": {"type": "juggle"}}, 501),
    },
)
def test_of_two_faults_in_the_same_key_or_body_the_one_on_the_earlier_rung_decides_the_reply(
    changes: dict[str, Any], status: int
) -> None:
    assert ask(**changes).status == status


CHALLENGE = 'Basic realm="Segment calls", charset="UTF-8"'


@cases(
    "changes, headers",
    {
        "401": ({"authorization": basic("unknown")}, {"WWW-Authenticate": CHALLENGE}),
        "405": ({"method": "PUT"}, {"Allow": "POST"}),
        "405 from the health check": (
            {"method": "PUT", "target": "/health"},
            {"Allow": "GET, HEAD"},
        ),
        "415 for a Content-Encoding": (
            {"content_encoding": "gzip"},
            {"Accept-Encoding": "identity"},
        ),
        "503": ({"maintenance": True}, {"Retry-After": "5"}),
        "400": ({"body": b"{"}, {}),
        "200": ({}, {}),
    },
)
def test_a_reply_has_the_headers_that_belong_to_its_status(
    changes: dict[str, Any], headers: dict[str, str]
) -> None:
    assert ask(**changes).headers == headers


def test_an_internal_error_is_500_and_tells_the_client_no_details() -> None:
    reply = ask(destination=Recorder(ZeroDivisionError("secret")))
    assert (reply.status, reply.body) == (500, {"message": "Internal error"})
    assert isinstance(reply.error, ZeroDivisionError)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_keyboard_interrupt_system_exit_and_generator_exit_propagate(
    kind: type[BaseException],
) -> None:
    with pytest.raises(kind):
        ask(destination=Recorder(kind()))


# ---- Rungs 2 to 4: the path, the method, maintenance ---------------------------------------------


@cases(
    "target",
    {
        "an encoded slash": "/%2F",
        "two slashes": "//",
        "an empty path": "",
        "an asterisk": "*",
        "a trailing slash": "/health/",
    },
)
def test_the_path_is_compared_exactly_as_sent(target: str) -> None:
    assert ask(target=target).status == 404


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_health_check_is_200_without_an_api_key(method: str) -> None:
    reply = ask(target="/health", method=method, authorization=None)
    assert (reply.status, reply.body) == (200, {"status": "ok"})


@pytest.mark.parametrize("target", ["/?", "/?x", "/?/elsewhere"])
def test_a_query_is_ignored(target: str) -> None:
    assert ask(target=target).status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_health_check_is_503_in_maintenance(method: str) -> None:
    assert ask(target="/health", method=method, maintenance=True).status == 503


def test_the_405_for_a_get_says_that_segment_forwards_calls_to_this_endpoint() -> None:
    reply = ask(method="GET")
    assert reply.status == 405
    assert "receives calls that Segment forwards" in reply.body["message"]


def test_a_very_long_method_is_cut_in_the_message() -> None:
    message = ask(method="X" * 5000).body["message"]
    assert "X" * 80 in message
    assert "X" * 81 not in message


# ---- Rung 5: the API key -------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["Basic", "basic", "BASIC"])
def test_the_scheme_may_be_in_upper_or_lower_case(scheme: str) -> None:
    assert ask(authorization=basic("segment").replace("Basic", scheme)).status == 200


def test_several_spaces_may_follow_the_scheme() -> None:
    assert ask(authorization=basic("segment").replace(" ", "   ")).status == 200


def test_an_api_key_may_contain_non_ascii_characters() -> None:
    keys = {digest("schlüssel"): receiver.Key("Küche")}
    assert ask(keys=keys, authorization=basic("schlüssel")).customer == "Küche"


@cases(
    "expires, status",
    {
        "a moment ago": ("2026-01-15T11:59:59.999Z", 401),
        "at this moment": (NOW, 401),
        "in a moment": ("2026-01-15T12:00:00.001Z", 200),
        "never": (None, 200),
    },
)
def test_a_key_expires_exactly_at_its_expiry_time(expires: str | None, status: int) -> None:
    assert ask(keys=one_key("demo", expires=expires)).status == status


def test_an_expired_key_gets_the_message_that_segment_documents() -> None:
    reply = ask(authorization=basic("segment-expired"))
    assert reply.body == {"message": "API token expired"}


def test_the_customer_of_an_expired_key_is_known_for_the_log() -> None:
    assert ask(authorization=basic("segment-expired")).customer == "lapsed"


# ---- Rung 6: the headers that describe the body --------------------------------------------------


def test_a_body_of_exactly_524_288_bytes_is_accepted() -> None:
    padded_with_spaces = TRACK_JSON.ljust(524_288)
    assert ask(padded_with_spaces).status == 200


@pytest.mark.parametrize(
    "media_type",
    [
        "application/json",
        "Application/JSON",
        "application/vnd.segment+json",
        "application/vnd.x.v2+JSON",
        "application/json; charset=utf-8",
        'application/json;charset="UTF-8"',
        "application/json ; Charset=Utf-8",
        "application/json; version=1",
        'application/json; v="a; charset=x, b"; charset=utf-8',
        "application/json;",
        "application/json; charset*=x'y'%ff",  # RFC 2231; an unknown parameter to receiver.py
    ],
)
def test_a_media_type_of_json_in_utf_8_is_accepted(media_type: str) -> None:
    assert ask(content_type=media_type).status == 200


@pytest.mark.parametrize(
    "media_type",
    [
        "",
        "json",
        "text/json",
        "application/jsonp",
        "application/+json",
        "text/vnd.x+json",
        "application/json, x/y",
        "application/json; charset=latin-1",
        'application/json; charset="latin-1"',
        'application/json; v="a',
        "application/json; charset=utf-8; charset=utf-16",
        "application/json; charset",
        "application/json v=1",
    ],
)
def test_any_other_media_type_is_415(media_type: str) -> None:
    assert ask(content_type=media_type).status == 415


def test_the_content_encoding_identity_may_be_in_upper_or_lower_case() -> None:
    assert ask(content_encoding="Identity").status == 200


# ---- Rung 7: the body ----------------------------------------------------------------------------

# Each of these is 499 levels deep; inside an object, it reaches the limit of 500.
DEEP_ARRAYS = "[" * 499 + "]" * 499
DEEP_OBJECTS = '{"a":' * 499 + "0" + "}" * 499

LONG_KEY = "x" * 150  # too long for the caches


def repr_of_parsed(text: str) -> str:
    """Parse JSON, and return the repr of the value.

    The tests compare reprs, because `==` cannot tell 7 from 7.0, or 0.0 from -0.0. The text is
    parsed twice, because the second time, its keys come from the caches.
    """
    first, second = (receiver.parse_json(text.encode(), "It") for _ in range(2))
    assert repr(first) == repr(second)
    return repr(first)


@cases(
    "text, value",
    {
        "whitespace": (' \t\r\n{"a" : [1 , 2 ]}\n', {"a": [1, 2]}),
        "integers": (
            '{"a": [12345678901234567890123, -7, -0]}',
            {"a": [12345678901234567890123, -7, 0]},
        ),
        "doubles": (
            '{"a": [-0.0, 1E2, 1.7976931348623157e308]}',
            {"a": [-0.0, 100.0, 1.7976931348623157e308]},
        ),
        "an integer of 308 digits": ('{"a": ' + "9" * 308 + "}", {"a": int("9" * 308)}),
        "an integer of 309 digits": ('{"a": 1' + "0" * 308 + "}", {"a": 10**308}),
        "escapes": (
            r'{"a": "\ud83d\ude00 \u0000 \/ \"", "é": "日本"}',
            {"a": '😀 \0 / "', "é": "日本"},
        ),
        "nested objects, empty values, null and true": (
            '{"a": {"a": {}}, "b": [[], {}, null, true]}',
            {"a": {"a": {}}, "b": [[], {}, None, True]},
        ),
        "a repeated key": ('{"a": 1, "a": 2}', {"a": 2}),
    },
)
def test_json_is_read_exactly(text: str, value: object) -> None:
    assert repr_of_parsed(text) == repr(value)


@cases(
    "text, value",
    {
        "brackets in a string": ('{"a": "' + "[" * 5000 + r'\"["}', {"a": "[" * 5000 + '"['}),
        "many arrays side by side": ('{"a": [' + "[], " * 600 + "[]]}", {"a": [[]] * 601}),
    },
)
def test_only_nested_brackets_count_towards_the_depth(text: str, value: object) -> None:
    assert repr_of_parsed(text) == repr(value)


# `parse_json` determines the depth only of a text with more than 500 opening brackets. The empty
# array in "b" brings their number to 501.
@cases(
    "text, value",
    {
        "arrays, 500 levels deep": (
            f'{{"b": [], "a": {DEEP_ARRAYS}}}',
            {"b": [], "a": json.loads(DEEP_ARRAYS)},
        ),
        "objects, 500 levels deep": (
            f'{{"b": [], "a": {DEEP_OBJECTS}}}',
            {"b": [], "a": json.loads(DEEP_OBJECTS)},
        ),
    },
)
def test_json_may_be_nested_500_levels_deep(text: str, value: object) -> None:
    assert repr_of_parsed(text) == repr(value)


@cases(
    "text, value",
    {
        "keys at every depth": (
            '{"aB": [{"cD": ["eF", {"gH": null}]}]}',
            {"a_b": [{"c_d": ["eF", {"g_h": None}]}]},
        ),
        "a long key": (f'{{"{LONG_KEY}Y": 1}}', {LONG_KEY + "_y": 1}),
        "a key whose new name is already taken": ('{"aB": 1, "a_b": 2}', {"aB": 1, "a_b": 2}),
        "two keys whose new name is already taken": (
            '{"a_b": 2, "aB": 1, "A-B": 3}',
            {"a_b": 2, "aB": 1, "A-B": 3},
        ),
        # 𝐂 is a capital letter without a lower-case form. So only the A of "A𝐂" can be lower-cased,
        # which gives "a𝐂". The new name of "a𝐂" is "a_𝐂", because an underscore is inserted between
        # a small and a capital letter. Both new names are taken by other keys.
        "a key whose new name is taken by a key whose own new name is taken": (
            '{"a_𝐂": 1, "A𝐂": 2, "a𝐂": 3}',
            {"a_𝐂": 1, "A𝐂": 2, "a𝐂": 3},
        ),
        "two keys with the same new name: only the first is renamed": (
            '{"aB": 1, "A-b": 2, "c": 3}',
            {"a_b": 1, "A-b": 2, "c": 3},
        ),
    },
)
def test_keys_become_snake_case_at_every_depth_unless_the_new_name_is_taken(
    text: str, value: object
) -> None:
    assert repr_of_parsed(text) == repr(value)


def refusal_of_json(data: bytes) -> str:
    """The message of the refusal, in which the JSON is called "It"."""
    with pytest.raises(receiver.Refusal) as refused:
        receiver.parse_json(data, "It")
    assert refused.value.status == 400
    return refused.value.message


@cases(
    "data",
    {
        "an unclosed object": b"{",
        "two objects": b"{} {}",
        "a letter after an object": b"{}X",
        "single quotes": b"{'a': 1}",
        "a trailing comma": b'{"a": 1,}',
        "a leading zero": b'{"a": 01}',
        "no digit before the point": b'{"a": .5}',
        "a plus sign": b'{"a": +1}',
        "a hexadecimal number": b'{"a": 0x1}',
        "a tab in a string": b'{"a": "\t"}',
        "an unknown escape": rb'{"a": "\x41"}',
        "a no-break space": b"\xc2\xa0{}",
        "a comment": b"// no\n{}",
        "500 unclosed arrays": b"[" * 500,
        "500 unclosed objects": b'{"a":' * 500,
        "UTF-16 without a byte-order mark: valid UTF-8, but with NULs": b"{\0}\0",
    },
)
def test_a_syntax_error_in_json_is_refused(data: bytes) -> None:
    assert refusal_of_json(data).startswith("It must be JSON: syntax error at character ")


@cases(
    "data",
    {
        "a byte that is not UTF-8": b'"\xff"',
        "a surrogate in UTF-8": b'{"a": "\xed\xa0\x80"}',
        "an overlong slash in UTF-8": b'{"a": "\xc0\xaf"}',
        "UTF-16": '{"a": 1}'.encode("utf-16"),
    },
)
def test_what_is_not_utf_8_is_refused(data: bytes) -> None:
    assert refusal_of_json(data) == "It must be in UTF-8"


@pytest.mark.parametrize("data", [b"", b" ", b"\t\r\n"])
def test_an_empty_or_blank_text_is_refused(data: bytes) -> None:
    assert refusal_of_json(data) == "It must not be empty"


# The message quotes at most 20 characters of the number.
OUT_OF_RANGE = "It must not contain a number that is out of range: "


@cases(
    "data, message",
    {
        "a byte-order mark": (b"\xef\xbb\xbf{}", "It must not begin with a byte-order mark"),
        "NaN": (b'{"a": NaN}', "It must not contain NaN"),
        "Infinity": (b'{"a": Infinity}', "It must not contain Infinity"),
        "-Infinity": (b'{"a": -Infinity}', "It must not contain -Infinity"),
        "a double that overflows": (b'{"a": 1e400}', OUT_OF_RANGE + "1e400"),
        "a negative double that overflows": (b'{"a": -1e400}', OUT_OF_RANGE + "-1e400"),
        "an integer of 309 digits that overflows": (
            b'{"a": ' + b"9" * 309 + b"}",
            OUT_OF_RANGE + "9" * 20 + "…",
        ),
        "an integer of 5000 digits": (
            b'{"a": ' + b"9" * 5000 + b"}",
            OUT_OF_RANGE + "9" * 20 + "…",
        ),
        "an unpaired surrogate in a value": (
            rb'{"a": "\ud800"}',
            "It must not contain an unpaired surrogate",
        ),
        "an unpaired surrogate in a key": (
            rb'{"\udc00": 1}',
            "It must not contain an unpaired surrogate",
        ),
        "arrays, 501 levels deep": (
            f'{{"a": [{DEEP_ARRAYS}]}}'.encode(),
            "It must not be nested more than 500 levels deep",
        ),
        "objects, 501 levels deep": (
            f'{{"a": [{DEEP_OBJECTS}]}}'.encode(),
            "It must not be nested more than 500 levels deep",
        ),
    },
)
def test_what_other_programs_could_misread_is_refused_and_the_message_says_why(
    data: bytes, message: str
) -> None:
    assert refusal_of_json(data) == message


@cases(
    "data, position",
    {
        "at the start": (b"x", 1),
        "after whitespace": (b'\r\n {"a" 1}', 9),
        "after a character of several bytes": ('{"é" 1}'.encode(), 6),
        "at the end": (b'{"a": 1', 8),
    },
)
def test_the_position_of_a_syntax_error_is_in_characters_counted_from_1(
    data: bytes, position: int
) -> None:
    assert refusal_of_json(data).endswith(f" at character {position}")


@cases(
    "text, depth",
    {
        "opening brackets": ("[" * 400_000, 400_000),
        "closing brackets": ("]" * 400_000, 0),
        "nested objects": ('{"a":' * 100_000, 100_000),
        "escaped quotation marks in a string": ('"' + r"\"" * 200_000, 0),
        "escaped quotation marks": (r"\"" * 200_000, 0),
    },
)
def test_the_nesting_depth_of_half_a_megabyte_is_found_within_a_second(
    text: str, depth: int
) -> None:
    started = time.monotonic()
    assert receiver.nesting_depth(text) == depth
    assert time.monotonic() - started < 1


PARSE_WITH_A_SMALL_STACK = """
import base64, sys, threading
import receiver
threading.stack_size(int(sys.argv[1]))
def run():
    for data in (b"[" * 8000, b'{"a":' * 8000):
        encoded = base64.b64encode(data).decode()
        for parse, argument in ((receiver.parse_body, data), (receiver.parse_settings, encoded)):
            try:
                parse(argument)
            except receiver.Refusal as refusal:
                print(refusal.status)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""


@pytest.mark.parametrize("stack_size", [131_072, 1_048_576])
def test_deep_nesting_does_not_overflow_a_small_stack(stack_size: int) -> None:
    done = command(sys.executable, "-c", PARSE_WITH_A_SMALL_STACK, stack_size)
    assert (done.returncode, done.stdout.split()) == (0, ["400"] * 4), done


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("userId", "user_id"),
        ("UserID", "user_id"),
        ("UserId", "user_id"),
        ("user-id", "user_id"),
        ("User Id", "user_id"),
        ("user_id", "user_id"),
        ("USER_ID", "user_id"),
        ("HTMLParser", "html_parser"),
        ("parseHTML", "parse_html"),
        ("address1", "address1"),
        ("utm2Source", "utm2_source"),
        ("ABC1", "abc1"),
        ("A", "a"),
        ("aB", "a_b"),
        ("fooXBar", "foo_x_bar"),
        ("", ""),
        ("_id", "_id"),
        ("ID", "id"),
        ("user_Id", "user_id"),
        ("User-ID", "user_id"),
        ("$set", "$set"),
        ("utm.source", "utm.source"),
        ("名前", "名前"),
        ("iOSVersion", "i_os_version"),
        ("größeMax", "größe_max"),
        ("ÜberÉtat", "über_état"),
        ("XMLHttp", "xml_http"),
    ],
)
def test_a_key_is_converted_to_snake_case(key: str, name: str) -> None:
    assert receiver.snake_case(key) == name


@pytest.mark.parametrize("key", ["user_id", "utm2_source", "$set", "_id", "a__b", "größe_max", ""])
def test_a_key_in_snake_case_is_left_alone(key: str) -> None:
    assert receiver.snake_case(key) == key


def test_the_caches_of_the_conversion_to_snake_case_have_a_limit() -> None:
    for number in range(2 * receiver.MAX_CACHED_TEXTS):
        receiver.snake_keys({f"in_snake_case_{number}": 0, f"toConvert{number}": 0})
    # `receiver.snake_case` is the bound `__getitem__` of its cache, so `__self__` is that cache.
    # `snake_keys` keeps the keys that need no change in a set in its closure.
    cache: Any = receiver.snake_case.__self__  # type: ignore[attr-defined]
    known = inspect.getclosurevars(receiver.snake_keys).nonlocals["known_snake_case"]
    assert 0 < len(cache) <= receiver.MAX_CACHED_TEXTS
    assert 0 < len(known) <= receiver.MAX_CACHED_TEXTS


# ---- Rungs 8 and 9: the type of call -------------------------------------------------------------


@cases(
    "call, arguments",
    {
        "identify": ({"type": "identify", "traits": {"t": 1}}, ("u", {"t": 1})),
        "track": ({"type": "track", "event": "e", "properties": {"p": 1}}, ("u", "e", {"p": 1})),
        "page": ({"type": "page", "name": "n", "properties": {"p": 1}}, ("u", "n", {"p": 1})),
        "group": ({"type": "group", "group_id": "g", "traits": {"t": 1}}, ("u", "g", {"t": 1})),
        "delete": ({"type": "delete"}, ("u",)),
        "screen": ({"type": "screen", "name": "n", "properties": {"p": 1}}, ("u", "n", {"p": 1})),
        "alias": ({"type": "alias", "previous_id": "b"}, ("u", "b")),
    },
)
def test_a_handler_receives_its_arguments_and_then_the_whole_call(
    call: dict[str, Any], arguments: tuple[Any, ...]
) -> None:
    *received, whole = handler_arguments({"user_id": "u", **call})
    assert tuple(received) == arguments
    assert whole.type == call["type"]


class OnlyTrack(receiver.Destination):
    """A destination with one handler, and two attributes that are not handlers."""

    secret = print
    page = None

    def track(self, user_id: str, event: str, properties: object, call: receiver.Call) -> None:
        pass


@cases(
    "call_type",
    {
        "a type without a method": "identify",
        "a type whose method is None": "page",
        "an attribute that is not a type": "secret",
        "a method that is not a type": "close",
        "a special method": "__init__",
        "empty text": "",
    },
)
def test_a_type_that_the_destination_does_not_support_is_501(call_type: str) -> None:
    assert ask({"type": call_type, "user_id": "u"}, destination=OnlyTrack()).status == 501


def test_a_type_with_a_method_is_supported() -> None:
    assert ask(destination=OnlyTrack()).status == 200


def test_the_store_supports_identify_track_page_group_and_delete() -> None:
    supported = {name for name in receiver.CALL_TYPES if hasattr(receiver.Store, name)}
    assert supported == {"identify", "track", "page", "group", "delete"}


@cases(
    "call_type, quoted",
    {
        "78 characters": ("x" * 78, "'" + "x" * 78 + "'"),
        "79 characters": ("x" * 79, "'" + "x" * 78 + "…"),
        "control characters": ("\x1b" * 999, "'" + r"\x1b" * 19 + r"\x…"),
    },
)
def test_what_a_message_quotes_is_escaped_and_then_cut_to_80_characters(
    call_type: str, quoted: str
) -> None:
    assert len(quoted) == 80
    assert ask({**TRACK, "type": call_type}).body == {"message": f"Unsupported type {quoted}"}


# ---- Rung 10: the fields -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_the_fields_of_a_sample_call_are_attributes_and_raw_has_the_whole_call(name: str) -> None:
    call = accepted_call(SAMPLES[name])
    assert {field: getattr(call, field) for field in SAMPLES[name]} == SAMPLES[name]
    assert call.raw == SAMPLES[name]


def test_a_call_knows_its_customer_its_settings_and_the_size_of_its_body() -> None:
    encoded = base64.b64encode(b'{"customSettingOne": "custom setting value"}').decode()
    call = accepted_call(x_segment_settings=encoded)
    assert call.customer == "demo"
    assert call.settings == {"custom_setting_one": "custom setting value"}
    assert call.size == len(TRACK_JSON)


@pytest.mark.parametrize("name", ["customer", "settings", "raw", "size", "outcome"])
def test_an_unknown_field_does_not_replace_the_attribute_of_the_same_name(name: str) -> None:
    call = accepted_call({**TRACK, name: "x"})
    assert getattr(call, name) != "x"
    assert call.raw[name] == "x"


@pytest.mark.parametrize("name", ["traits", "properties", "context"])
def test_calls_do_not_share_the_empty_object_that_replaces_a_missing_field(name: str) -> None:
    getattr(accepted_call(), name)["mine"] = 1
    assert getattr(accepted_call(), name) == {}


@cases(
    "absent",
    {"missing": {}, "null": {"message_id": None}, "empty": {"message_id": ""}},
)
def test_a_missing_message_id_becomes_a_fresh_uuid(absent: dict[str, Any]) -> None:
    first = accepted_call({**TRACK, **absent}).message_id
    second = accepted_call({**TRACK, **absent}).message_id
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", first)
    assert first != second


ALL_REQUIRED_FIELDS = {"user_id": "u1", "event": "e", "group_id": "g", "previous_id": "p"}
NOT_AN_ID = [True, 1.5, [], {}, "a\0b"]
NOT_TEXT = [True, 7, [], {}]
NOT_AN_OBJECT = [True, 7, "x", [1]]  # but [] counts as an empty object
ARABIC_DIGITS = "٢٠٢٦-01-15"
NOT_A_TIME = ["now", 7, True, {}, [NOW], f"{NOW}\n", ARABIC_DIGITS, "2026-01-15X00:00:00"]

# A field, values that are invalid, and the types of call that refuse them.
INVALID: dict[str, tuple[list[Any], list[str]]] = {
    "user_id": (NOT_AN_ID, list(receiver.CALL_TYPES)),
    "anonymous_id": (NOT_AN_ID, list(receiver.CALL_TYPES)),
    "message_id": (NOT_AN_ID, list(receiver.CALL_TYPES)),
    "group_id": (NOT_AN_ID, ["group"]),
    "previous_id": (NOT_AN_ID, ["alias"]),
    "event": (NOT_TEXT, ["track"]),
    "name": (NOT_TEXT, ["page", "screen"]),
    "traits": (NOT_AN_OBJECT, ["identify", "group"]),
    "properties": (NOT_AN_OBJECT, ["track", "page", "screen"]),
    "timestamp": (NOT_A_TIME, list(receiver.CALL_TYPES)),
}


@pytest.mark.parametrize("call_type", receiver.CALL_TYPES)
@pytest.mark.parametrize("field", INVALID)
def test_an_invalid_field_is_400_in_the_types_that_use_it_and_ignored_elsewhere(
    field: str, call_type: str
) -> None:
    values, refusing = INVALID[field]
    for value in values:
        reply = ask({**ALL_REQUIRED_FIELDS, "type": call_type, field: value})
        assert reply.status == (400 if call_type in refusing else 200)
        if reply.status == 400:
            assert reply.body["message"].startswith(field)


@pytest.mark.parametrize("value", [None, 7, "x", "", [], [1], {}, True], ids=repr)
@pytest.mark.parametrize(
    "field",
    ["context", "integrations", "sent_at", "received_at", "original_timestamp", "version", "other"],
)
def test_some_fields_may_have_any_value_which_stays_in_raw(field: str, value: Any) -> None:
    reply = ask({**TRACK, field: value})
    assert reply.status == 200
    assert reply.raw[field] == value


@pytest.mark.parametrize("field", ["sent_at", "received_at", "original_timestamp"])
def test_a_time_other_than_timestamp_is_converted_to_utc_or_ignored_if_invalid(field: str) -> None:
    with_a_stray_colon = "2026-10-16T16:00:27.957:Z"
    valid = accepted_call({**TRACK, field: "2026-01-15T01:30:08+02:00"})
    invalid = accepted_call({**TRACK, field: with_a_stray_colon})
    assert getattr(valid, field) == "2026-01-14T23:30:08.000Z"
    assert getattr(invalid, field) is None


DAY_1 = "2026-01-01T00:00:00.000Z"
DAY_2 = "2026-01-02T00:00:00.000Z"
DAY_3 = "2026-01-03T00:00:00.000Z"


@cases(
    "times, timestamp",
    {
        "all three": ({"timestamp": DAY_1, "original_timestamp": DAY_2, "sent_at": DAY_3}, DAY_1),
        "no timestamp": ({"original_timestamp": "2026-01-02", "sent_at": DAY_3}, DAY_2),
        "no timestamp, and an invalid original_timestamp": (
            {"original_timestamp": "long ago", "sent_at": DAY_3},
            DAY_3,
        ),
        "an invalid original_timestamp, and received_at, which is not used": (
            {"original_timestamp": 5, "received_at": DAY_1},
            NOW,
        ),
    },
)
def test_the_time_of_a_call_is_timestamp_else_original_timestamp_else_sent_at_else_now(
    times: dict[str, Any], timestamp: str
) -> None:
    assert accepted_call({**TRACK, **times}).timestamp == timestamp


# ---- Rung 11: the destination --------------------------------------------------------------------


@pytest.mark.parametrize(("result", "status"), [(None, 200), (200, 200), (202, 202)])
def test_a_handler_returns_the_status_200_or_202_and_none_means_200(
    result: Any, status: int
) -> None:
    assert ask(destination=Recorder(result)).status == status


def test_a_result_that_is_a_float_gives_a_status_that_is_an_integer() -> None:
    assert repr(ask(destination=Recorder(200.0)).status) == "200"


@pytest.mark.parametrize("result", ["x", 404, False, 201, {}], ids=repr)
def test_any_other_result_of_a_handler_is_a_500(result: Any) -> None:
    reply = ask(destination=Recorder(result))
    assert reply.status == 500
    assert isinstance(reply.error, TypeError)


@pytest.mark.parametrize("status", [400, 422, 429, 503, 599])
def test_a_handler_refuses_with_its_own_status_and_message(status: int) -> None:
    reply = ask(destination=Recorder(receiver.Refusal(status, "No")))
    assert (reply.status, reply.body) == (status, {"message": "No"})


@pytest.mark.parametrize("status", [200, 399, 600])
def test_a_refusal_cannot_have_a_status_outside_400_to_599(status: int) -> None:
    with pytest.raises(ValueError, match=f"not {status}$"):
        receiver.Refusal(status, "No")


@cases(
    "headers",
    {
        "a line break in a value": {"X": "a\r\nSet-Cookie: b"},
        "a line break in a name": {"X\n": "a"},
        "a non-ASCII value": {"X": "é"},
    },
)
def test_a_header_of_a_refusal_must_be_printable_ascii(headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        receiver.Refusal(400, "No", headers)


def test_a_refusal_that_is_raised_again_and_again_keeps_no_call_in_memory() -> None:
    shared = receiver.Refusal(503, "Down")
    for _ in range(3):
        assert ask(destination=Recorder(shared)).status == 503
        assert shared.__traceback__ is None  # a traceback would keep frames, and calls in them


class CustomRefusal(receiver.Refusal):
    """A refusal that sets only the attributes that it is given."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


# A missing attribute has its default: 0 for the status (which is invalid, hence the 500), "Internal
# error" for the message, and no headers. A message of any type is converted by str(), and headers
# of None mean no headers. Any other invalid attribute makes the reply a 500.
@cases(
    "attributes, status, message",
    {
        "no attributes": ({}, 500, "Internal error"),
        "a status without a message": ({"status": 422}, 422, "Internal error"),
        "a status that is not a number": ({"status": "soon"}, 500, "Internal error"),
        "a status just below the errors": ({"status": 399}, 500, "Internal error"),
        "a status just above the errors": ({"status": 600}, 500, "Internal error"),
        "a message that is not text": ({"status": 400, "message": {1}}, 400, "{1}"),
        "headers that are None": ({"status": 422, "headers": None}, 422, "Internal error"),
        "headers that are a list": ({"status": 422, "headers": ["x"]}, 500, "Internal error"),
        "a header with a line break": (
            {"status": 422, "headers": {"X": "\r\n"}},
            500,
            "Internal error",
        ),
        "a message whose str() raises": (
            {"status": 422, "message": Unprintable()},
            500,
            "Internal error",
        ),
    },
)
def test_a_refusal_with_unusual_attributes_still_gets_a_reply(
    attributes: dict[str, Any], status: int, message: str
) -> None:
    reply = ask(destination=Recorder(CustomRefusal(**attributes)))
    assert (reply.status, reply.body) == (status, {"message": message})


# ==================================================================================================
# Part 2. Storing calls
#
# First the transactions that waiting calls share, then what the default store keeps, and last the
# promise that a 200 makes. Most of these tests need files, but no network. Those that crash a
# receiver run it in a separate process.
# ==================================================================================================

# ---- GroupCommit ---------------------------------------------------------------------------------


BLOCKER = "blocker"  # the message_id of the call with which `hold_up_writer` keeps the writer busy


class RecordingGroupCommit(receiver.GroupCommit):
    """A GroupCommit that only records its batches and events.

    While `go_on` is clear, its writer is held up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.written: list[list[str]] = []  # the message_ids of each batch
        self.events: list[str] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.open_error: Exception | None = None
        # By message_id: what `write` raises for a batch with this call.
        self.errors: dict[str, BaseException] = {}
        # By message_id: what `write` returns for this call.
        self.refusals: dict[str, receiver.Refusal] = {}

    def open(self) -> None:
        self.events.append("open")
        if self.open_error:
            raise self.open_error

    def shut(self) -> None:
        self.events.append("shut")

    def write(
        self, calls: Sequence[receiver.Call]
    ) -> Sequence[receiver.Outcome | receiver.Refusal]:
        ids = [call.message_id for call in calls]
        self.events.append("write")
        self.written.append(ids)
        assert self.go_on.wait(20)
        for message_id in ids:
            if message_id in self.errors:
                raise self.errors[message_id]
        return [self.refusals.get(message_id, receiver.Outcome.stored) for message_id in ids]

    def screen(self, *arguments: Any) -> None:
        return self.submit(arguments[-1])


@pytest.fixture
def destination() -> Iterator[RecordingGroupCommit]:
    destination = RecordingGroupCommit()
    yield destination
    destination.go_on.set()
    destination.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as executor:
        yield executor


def send_track(destination: receiver.Destination, message_id: str, **fields: Any) -> receiver.Reply:
    """Send a track call to a destination through the whole protocol."""
    return ask({**TRACK, "message_id": message_id, **fields}, destination=destination)


def queue_call(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor, message_id: str, **fields: Any
) -> Future[receiver.Reply]:
    """Send a track call while the writer is busy, and wait until it is queued."""
    length = len(destination._queue)
    reply = pool.submit(send_track, destination, message_id, **fields)
    wait_until(lambda: len(destination._queue) > length)
    return reply


def hold_up_writer(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor
) -> Future[receiver.Reply]:
    """Send a call, and keep the writer busy with it until `go_on` is set."""
    destination.go_on.clear()
    reply = pool.submit(send_track, destination, BLOCKER)
    wait_until(lambda: destination.written)
    return reply


def let_one_write_finish(destination: RecordingGroupCommit) -> None:
    """Let the write that is held up return, and hold up the next one."""
    destination.go_on.set()  # wakes the waiting write, even though clear() follows at once
    destination.go_on.clear()


def send_batch(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor, message_ids: list[str]
) -> list[receiver.Reply]:
    """Send these calls while the writer is busy with BLOCKER, so that they form one batch."""
    hold_up_writer(destination, pool)
    replies = [queue_call(destination, pool, message_id) for message_id in message_ids]
    destination.go_on.set()
    return [reply.result() for reply in replies]


def test_calls_that_wait_together_are_one_batch_in_the_order_of_their_arrival(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor
) -> None:
    replies = send_batch(destination, pool, ["a", "b", "c"])
    assert {reply.status for reply in replies} == {200}
    assert destination.written == [[BLOCKER], ["a", "b", "c"]]


def test_open_runs_before_the_first_write_and_shut_after_the_last() -> None:
    destination = RecordingGroupCommit()
    send_track(destination, "a")
    send_track(destination, "b")
    destination.close()
    assert destination.events == ["open", "write", "write", "shut"]


def test_the_first_call_starts_the_writer(destination: RecordingGroupCommit) -> None:
    assert not destination._writer.is_alive()
    send_track(destination, "a")
    assert destination._writer.is_alive()


def test_a_destination_without_calls_is_neither_opened_nor_shut() -> None:
    destination = RecordingGroupCommit()
    destination.close()
    assert destination.events == []


@pytest.mark.parametrize("call_type", ["identify", "track", "page", "group", "delete"])
def test_group_commit_supports_identify_track_page_group_and_delete(
    destination: RecordingGroupCommit, call_type: str
) -> None:
    call = {**ALL_REQUIRED_FIELDS, "type": call_type, "message_id": "a"}
    reply = ask(call, destination=destination)
    assert (reply.status, reply.outcome) == (200, "stored")


def test_a_subclass_may_support_another_type_by_submitting_its_calls(
    destination: RecordingGroupCommit,
) -> None:
    # RecordingGroupCommit.screen passes its calls to `submit`.
    reply = ask({"type": "screen", "user_id": "u1"}, destination=destination)
    assert (reply.status, reply.outcome) == (200, "stored")


def test_a_refusal_in_place_of_an_outcome_refuses_that_call_alone(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor
) -> None:
    destination.refusals["long"] = receiver.Refusal(422, "Too long", {"X-Why": "length"})
    one, refused, other = send_batch(destination, pool, ["a", "long", "b"])
    assert (one.status, other.status) == (200, 200)
    assert (refused.status, refused.body) == (422, {"message": "Too long"})
    assert refused.headers == {"X-Why": "length"}
    assert destination.written == [[BLOCKER], ["a", "long", "b"]]


def test_a_refusal_that_write_raises_refuses_the_whole_batch(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor
) -> None:
    destination.errors["b"] = receiver.Refusal(503, "The database is down")
    replies = send_batch(destination, pool, ["a", "b", "c"])
    assert {reply.status for reply in replies} == {503}
    assert destination.written == [[BLOCKER], ["a", "b", "c"]]


def test_if_write_raises_anything_but_a_refusal_each_call_is_written_again_by_itself(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor
) -> None:
    destination.errors["poisoned"] = ZeroDivisionError("no")
    one, poisoned, other = send_batch(destination, pool, ["a", "poisoned", "b"])
    assert (one.status, poisoned.status, other.status) == (200, 500, 200)
    assert isinstance(poisoned.error, ZeroDivisionError)
    assert destination.written == [[BLOCKER], ["a", "poisoned", "b"], ["a"], ["poisoned"], ["b"]]


def test_a_call_that_is_written_again_by_itself_may_be_refused(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor
) -> None:
    destination.errors["poisoned"] = ZeroDivisionError("no")
    destination.errors["long"] = receiver.Refusal(400, "Too long")
    replies = send_batch(destination, pool, ["poisoned", "long"])
    assert [reply.status for reply in replies] == [500, 400]


def test_a_write_that_returns_too_few_outcomes_is_500(destination: RecordingGroupCommit) -> None:
    destination.write = lambda calls: []  # type: ignore[method-assign]
    reply = send_track(destination, "a")
    assert reply.status == 500
    assert isinstance(reply.error, TypeError)


@cases(
    "outcome",
    {
        "None": None,
        "False": False,
        "an unknown word": "lost",
        "a class instead of an instance": receiver.Refusal,
    },
)
def test_a_call_is_not_acknowledged_if_write_returns_anything_but_an_outcome(
    destination: RecordingGroupCommit, outcome: Any
) -> None:
    destination.write = lambda calls: [outcome] * len(calls)  # type: ignore[method-assign]
    assert send_track(destination, "a").status == 500


def test_a_refusal_that_write_raises_again_and_again_keeps_no_call_in_memory(
    destination: RecordingGroupCommit,
) -> None:
    shared = receiver.Refusal(503, "Down")
    destination.errors["a"] = shared
    for _ in range(3):
        assert send_track(destination, "a").status == 503
    assert shared.__traceback__ is None


def test_a_refusal_that_open_raises_again_and_again_keeps_no_call_in_memory(
    destination: RecordingGroupCommit,
) -> None:
    shared = receiver.Refusal(503, "Down")
    destination.open_error = shared
    for _ in range(3):
        assert send_track(destination, "a").status == 503
    assert shared.__traceback__ is None


def test_a_call_is_503_if_the_writer_cannot_be_started(
    destination: RecordingGroupCommit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> NoReturn:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        assert send_track(destination, "a").status == 503
    assert send_track(destination, "b").status == 200
    assert destination.written == [["b"]]


def test_a_write_that_returns_nothing_is_500_and_the_writer_goes_on(
    destination: RecordingGroupCommit,
) -> None:
    write = destination.write
    destination.write = lambda calls: None  # type: ignore[assignment, return-value]
    assert send_track(destination, "a").status == 500
    destination.write = write  # type: ignore[method-assign]
    assert send_track(destination, "b").status == 200


@cases(
    "error, status",
    {
        "open raises a Refusal, which decides the reply": (receiver.Refusal(507, "No space"), 507),
        "open raises something else, which leads to 503": (OSError("down"), 503),
    },
)
def test_a_destination_that_cannot_be_opened_is_opened_again_for_the_next_batch(
    destination: RecordingGroupCommit, error: Exception, status: int
) -> None:
    destination.open_error = error
    assert send_track(destination, "a").status == status
    destination.open_error = None
    assert send_track(destination, "b").status == 200
    assert destination.events.count("open") == 2
    assert destination.written == [["b"]]


def test_a_call_that_waited_too_long_is_503_and_is_never_written(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hold_up_writer(destination, pool)
    monkeypatch.setattr(receiver, "STORE_TIMEOUT", 0.05)
    assert send_track(destination, "late").status == 503
    destination.go_on.set()
    assert first.result().status == 200
    monkeypatch.undo()
    assert send_track(destination, "next").status == 200
    assert destination.written == [[BLOCKER], ["next"]]


def test_no_call_of_a_failed_batch_is_written_again_after_its_deadline(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = hold_up_writer(destination, pool)
    destination.errors["poisoned"] = ZeroDivisionError("no")
    monkeypatch.setattr(receiver, "STORE_TIMEOUT", 1.0)
    late = [queue_call(destination, pool, name) for name in ("a", "poisoned")]

    # The batch is being written when the deadline of its calls passes.
    let_one_write_finish(destination)
    wait_until(lambda: len(destination.written) == 2)
    assert {reply.result().status for reply in late} == {503}

    # Only now does it fail. Neither call may be written again.
    destination.go_on.set()
    assert first.result().status == 200
    monkeypatch.undo()
    assert send_track(destination, "next").status == 200
    assert destination.written == [[BLOCKER], ["a", "poisoned"], ["next"]]


def test_the_time_limits_fit_into_the_five_seconds_that_the_sender_waits() -> None:
    # A call may wait for a lock twice: during the batch before it, and during its own.
    assert 2 * receiver.LOCK_TIMEOUT < receiver.STORE_TIMEOUT < 5


def test_a_graceful_shutdown_has_enough_time_before_the_exit_is_forced() -> None:
    connection_seconds = receiver.SHUTDOWN_GRACE + receiver.REPLY_GRACE
    log_seconds = 1  # how long closing the log waits for its thread
    total = connection_seconds + receiver.STORE_TIMEOUT + log_seconds
    assert total < receiver.FORCED_EXIT_AFTER


def send_and_expect_a_prompt_reply(
    destination: receiver.Destination, message_id: str, **fields: Any
) -> int:
    """The status of a call that is answered without waiting for the writer."""
    started = time.monotonic()
    status = send_track(destination, message_id, **fields).status
    assert time.monotonic() - started < 2
    return status


def test_at_most_1000_calls_wait(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert receiver.MAX_WAITING_CALLS == 1000
    monkeypatch.setattr(receiver, "MAX_WAITING_CALLS", 2)  # scaled down
    hold_up_writer(destination, pool)
    accepted = [queue_call(destination, pool, name) for name in ("a", "b")]
    assert send_and_expect_a_prompt_reply(destination, "one too many") == 503
    destination.go_on.set()
    assert {reply.result().status for reply in accepted} == {200}


def test_at_most_16_mb_of_bodies_wait(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert receiver.MAX_WAITING_BYTES == 16_000_000
    # Scaled down: room for two bodies, but not for three.
    monkeypatch.setattr(receiver, "MAX_WAITING_BYTES", 400)
    hold_up_writer(destination, pool)
    accepted = [queue_call(destination, pool, name, note="x" * 100) for name in ("a", "b")]
    assert send_and_expect_a_prompt_reply(destination, "one too many", note="x" * 100) == 503
    destination.go_on.set()
    assert {reply.result().status for reply in accepted} == {200}
    assert send_track(destination, "next").status == 200  # nothing waits now


def test_a_single_call_of_any_size_may_wait(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "MAX_WAITING_BYTES", 400)
    hold_up_writer(destination, pool)
    long = queue_call(destination, pool, "long", note="x" * 1000)
    assert send_and_expect_a_prompt_reply(destination, "one too many") == 503
    destination.go_on.set()
    assert long.result().status == 200


def test_the_last_batch_is_not_kept_in_memory(destination: RecordingGroupCommit) -> None:
    import gc
    import weakref

    seen: list[Any] = []
    original = destination.write

    def write(calls: Sequence[receiver.Call]) -> Any:
        seen.extend(weakref.ref(call) for call in calls)
        return original(calls)

    destination.write = write  # type: ignore[method-assign]
    assert send_track(destination, "a").status == 200

    def is_gone() -> bool:
        gc.collect()
        return seen[0]() is None

    wait_until(is_gone)


def test_close_waits_until_the_accepted_calls_are_written_and_refuses_new_ones(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor
) -> None:
    first = hold_up_writer(destination, pool)
    second = queue_call(destination, pool, "second")
    closing = pool.submit(destination.close)
    wait_until(lambda: destination._closing)
    assert send_and_expect_a_prompt_reply(destination, "too late") == 503
    assert not closing.done()
    destination.go_on.set()
    closing.result()
    assert (first.result().status, second.result().status) == (200, 200)
    assert destination.written == [[BLOCKER], ["second"]]


def test_close_does_not_wait_forever_for_a_write_that_hangs(
    destination: RecordingGroupCommit, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold_up_writer(destination, pool)
    monkeypatch.setattr(receiver, "STORE_TIMEOUT", 0.1)
    started = time.monotonic()
    destination.close()
    assert time.monotonic() - started < 3
    destination.go_on.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_once_its_writer_has_died_a_destination_is_marked_as_failed_and_answers_503(
    destination: RecordingGroupCommit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "STORE_TIMEOUT", 0.5)
    assert not destination.failed
    destination.errors["a"] = SystemExit(1)
    assert send_track(destination, "a").status == 503
    wait_until(lambda: destination.failed)
    monkeypatch.undo()
    assert send_and_expect_a_prompt_reply(destination, "b") == 503


# ---- The default store ---------------------------------------------------------------------------


class FileStore(receiver.Store):
    """A store that knows its file, takes calls through the protocol, and can be queried."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.path = path

    def save(
        self,
        call_type: str = "identify",
        user_id: Any = "u1",
        customer: str = "demo",
        **fields: Any,
    ) -> receiver.Reply:
        call = {"type": call_type, "user_id": user_id, **fields}
        return ask(call, destination=self, keys=one_key(customer))

    def find(self, query: str) -> list[Any]:
        """The rows that a query finds, through a separate connection."""
        return rows(self.path, query)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    opened = FileStore(tmp_path / "calls.db")
    yield opened
    opened.close()


# The following functions, and `delete` below, return arguments for `FileStore.save`.


def track(**fields: Any) -> dict[str, Any]:
    return {"call_type": "track", "event": "e", **fields}


def group(**fields: Any) -> dict[str, Any]:
    return {"call_type": "group", "group_id": "g1", **fields}


def identify(**fields: Any) -> dict[str, Any]:
    return {"call_type": "identify", **fields}


ON_DAY_1 = identify(
    timestamp=DAY_1, traits={"plan": "free", "seats": 1, "name": "Ann", "tags": {"a": 1, "b": 2}}
)
ON_DAY_2 = identify(
    timestamp=DAY_2, traits={"plan": "team", "email": "a@example.com", "tags": {"c": 3}}
)
ON_DAY_3 = identify(timestamp=DAY_3, traits={"plan": "gold", "name": None})
# A null replaces an older value (name). An object is replaced as a whole, and not merged (tags).
MERGED = {"plan": "gold", "seats": 1, "name": None, "tags": {"c": 3}, "email": "a@example.com"}

# Names and values that a view could damage.
ODD_TRAITS = {
    "double": 0.30000000000000004,
    "price": 84.9,
    "tiny": 5e-324,
    "huge": 1.7976931348623157e308,
    "integer": 9223372036854775807,
    "big": 12345678901234567890,
    "true": True,
    "false": False,
    "null": None,
    "text": 'é"q\\',
    "list": [1, {"a": None}],
    "b.1": 1,
    "dot.ted": 2,
    "br[0]": 3,
    "": 4,
    # The SQL has a separate branch for names with a quotation mark.
    'object"': {"a": [True]},
    'text"': "t",
    'false"': False,
    'null"': None,
    'double"': 1.5,
    "nul": "a\0b",
    "json": '{"a": 1}',
    "🙂": "🙂",
}


def save_and_find(store: FileStore, calls: list[Any], query: str) -> str:
    """Save these calls, and return the rows that a query finds, as one JSON text.

    JSON that a row contains is parsed first. The result is text, because `==` of values would not
    tell 1 from 1.0 or from true.
    """
    for call in calls:
        assert store.save(**call).status == 200
    found = [
        [json.loads(value) if str(value).startswith("{") else value for value in row]
        for row in store.find(query)
    ]
    return json.dumps(found, sort_keys=True)


@cases(
    "calls, query, expected",
    {
        "a message_id that was seen before": (
            [track(message_id="m1"), group(message_id="m1"), track(message_id="m2")],
            "select message_id, type from calls",
            [["m1", "track"], ["m2", "track"]],
        ),
        "calls without a message_id": ([track(), track()], "select count(*) from calls", [[2]]),
        "the same message_id from two customers": (
            [track(message_id="m1"), track(message_id="m1", customer="acme")],
            "select customer, message_id from calls order by 1",
            [["acme", "m1"], ["demo", "m1"]],
        ),
    },
)
def test_a_message_id_is_stored_once_for_each_customer(
    store: FileStore, calls: list[Any], query: str, expected: list[Any]
) -> None:
    assert save_and_find(store, calls, query) == json.dumps(expected, sort_keys=True)


@cases(
    "calls, query, expected",
    {
        "identifies": (
            [identify(traits={"a": 1}), track()],
            "select user_id, traits from identifies",
            [["u1", {"a": 1}]],
        ),
        "tracks": (
            [track(properties={"p": 1}, context={"ip": "::1"}), group()],
            "select event, properties, context from tracks",
            [["e", {"p": 1}, {"ip": "::1"}]],
        ),
        "pages": (
            [{"call_type": "page", "name": "n", "properties": None, "context": None}, track()],
            "select name, properties, context from pages",
            [["n", {}, {}]],
        ),
        "groups": ([group(), track()], "select group_id, traits from groups", [["g1", {}]]),
        "objects that were sent as empty arrays": (
            [identify(traits=[], context=[])],
            "select traits, context from identifies",
            [[{}, {}]],
        ),
        "a context that is not an object": (
            [identify(context="x")],
            "select context from identifies",
            [[{}]],
        ),
        "odd traits": (
            [identify(traits=ODD_TRAITS)],
            "select traits from identifies",
            [[ODD_TRAITS]],
        ),
    },
)
def test_each_view_shows_the_calls_of_its_type_and_their_fields(
    store: FileStore, calls: list[Any], query: str, expected: list[Any]
) -> None:
    assert save_and_find(store, calls, query) == json.dumps(expected, sort_keys=True)


@pytest.mark.parametrize(
    "calls",
    [
        [ON_DAY_1, ON_DAY_2, ON_DAY_3],
        [ON_DAY_3, ON_DAY_1, ON_DAY_2],
        [ON_DAY_2, ON_DAY_3, ON_DAY_1],
    ],
    ids=["days 1, 2, 3", "days 3, 1, 2", "days 2, 3, 1"],
)
def test_a_trait_comes_from_the_newest_call_that_has_it_whatever_the_order_of_arrival(
    store: FileStore, calls: list[Any]
) -> None:
    query = "select user_id, traits, first_seen, last_seen from users"
    expected = [["u1", MERGED, DAY_1, DAY_3]]
    assert save_and_find(store, calls, query) == json.dumps(expected, sort_keys=True)


@cases(
    "calls, query, expected",
    {
        "traits that are null or an empty array change nothing": (
            [identify(traits={"a": 1}), identify(traits=None), identify(traits=[])],
            "select traits from users",
            [[{"a": 1}]],
        ),
        "of values with the same timestamp, the one received last counts": (
            [identify(timestamp=DAY_1, traits={"plan": plan}) for plan in ("c", "a", "b")],
            "select traits from users",
            [[{"plan": "b"}]],
        ),
        "the traits of an account, and its first and last call": (
            [
                group(timestamp=DAY_2, traits={"size": 2, "name": "new"}),
                group(timestamp=DAY_1, traits={"size": 1, "kind": "old"}),
                group(timestamp=DAY_3, traits={}),
            ],
            "select traits, first_seen, last_seen from accounts",
            [[{"size": 2, "name": "new", "kind": "old"}, DAY_1, DAY_3]],
        ),
        "odd traits of a user": (
            [identify(traits=ODD_TRAITS)],
            "select traits from users",
            [[ODD_TRAITS]],
        ),
        "odd traits of an account": (
            [group(traits=ODD_TRAITS)],
            "select traits from accounts",
            [[ODD_TRAITS]],
        ),
    },
)
def test_traits_are_merged_in_users_and_accounts(
    store: FileStore, calls: list[Any], query: str, expected: list[Any]
) -> None:
    assert save_and_find(store, calls, query) == json.dumps(expected, sort_keys=True)


def test_users_has_one_row_for_each_user_of_each_customer_whatever_the_type_of_call(
    store: FileStore,
) -> None:
    calls = [track(user_id="u2"), identify(), identify(customer="acme"), identify()]
    anonymous = {"call_type": "page", "user_id": None, "anonymous_id": "a1"}
    found = save_and_find(store, [*calls, anonymous], "select customer, user_id from users")
    assert sorted(json.loads(found)) == [["acme", "u1"], ["demo", "u1"], ["demo", "u2"]]


def test_accounts_has_a_row_for_each_customer_and_group_id(store: FileStore) -> None:
    calls = [group(), group(group_id="g2"), group(customer="acme"), group()]
    found = save_and_find(store, calls, "select customer, group_id from accounts")
    assert sorted(json.loads(found)) == [["acme", "g1"], ["demo", "g1"], ["demo", "g2"]]


def test_each_member_of_an_account_is_counted_once(store: FileStore) -> None:
    calls = [group(), group(), group(user_id="u2"), group(group_id="g2", user_id="u3")]
    query = "select members from accounts where group_id = 'g1'"
    assert save_and_find(store, calls, query) == "[[2]]"


# As doubles, the last two would be equal.
@pytest.mark.parametrize("number", [7, 12345678901234567890, 12345678901234567891])
def test_a_group_id_that_is_an_integer_is_found_as_its_decimal_text(
    store: FileStore, number: int
) -> None:
    query = f"select group_id from accounts where group_id = '{number}'"
    assert save_and_find(store, [group(group_id=number)], query) == f'[["{number}"]]'


@cases(
    "calls, query, expected",
    {
        # Segment keeps an integration in private beta until it has enough customers or events.
        # This view counts both.
        "private_beta": (
            [track(), track(customer="acme"), {"call_type": "delete", "customer": "gone"}],
            "select customers, events, fulfilled from private_beta",
            [[2, 2, 0]],
        ),
        "users": (
            [{"call_type": "delete", "user_id": "gone"}],
            "select count(*) from users",
            [[0]],
        ),
    },
)
def test_a_view_leaves_out_customers_and_users_that_are_known_only_from_deletes(
    store: FileStore, calls: list[Any], query: str, expected: list[Any]
) -> None:
    assert save_and_find(store, calls, query) == json.dumps(expected, sort_keys=True)


def test_a_trait_whose_name_contains_nul_is_left_out_and_overwrites_no_other(
    store: FileStore,
) -> None:
    store.save(traits={"a": 3}, timestamp=DAY_1)
    # Cut off at the NUL, this name would be "a", and its newer value would win.
    store.save(traits={"a\0c": 2}, timestamp=DAY_2)
    assert store.find("select traits from users") == [('{"a":3}',)]


def test_a_trait_whose_name_only_looks_like_an_escaped_nul_is_kept(store: FileStore) -> None:
    store.save(traits={r"a\u0000b": 1})
    assert json.loads(store.find("select traits from users")[0][0]) == {r"a\u0000b": 1}


def test_a_call_is_one_row_with_its_times_in_utc(store: FileStore) -> None:
    before = datetime.now(UTC)
    store.save(
        "track",
        event="Ordered",
        anonymous_id="a1",
        message_id="m1",
        timestamp="2026-01-15T01:00:00+01:00",
    )
    [(*values, timestamp, received_at)] = store.find(
        "select customer, message_id, type, user_id, anonymous_id, timestamp, received_at"
        " from calls"
    )
    assert values == ["demo", "m1", "track", "u1", "a1"]
    assert timestamp == "2026-01-15T00:00:00.000Z"
    assert re.fullmatch(TIME, received_at)
    assert abs((datetime.fromisoformat(received_at) - before).total_seconds()) < 5


def test_a_call_is_stored_whole_with_its_keys_in_snake_case(store: FileStore) -> None:
    store.save(message_id="m1", madeUp={"listName": [1.10]})
    [(call,)] = store.find("select call from calls")
    expected = {"type": "identify", "user_id": "u1", "message_id": "m1"}
    assert json.loads(call) == {**expected, "made_up": {"list_name": [1.1]}}


def test_a_duplicate_gets_a_200_and_the_outcome_duplicate(store: FileStore) -> None:
    first = store.save(message_id="m1")
    second = store.save(message_id="m1")
    assert (first.status, first.outcome) == (200, "stored")
    assert (second.status, second.outcome) == (200, "duplicate")


@pytest.mark.parametrize(
    "condition", ["", "customer = 'demo' and "], ids=["by id", "by customer and id"]
)
@cases(
    "view, id_column, index_lookup",
    {
        "users": ("users", "user_id", "calls_by_user (user_id=?"),
        "accounts": ("accounts", "group_id", "calls_by_group (<expr>=?"),
    },
)
def test_users_and_accounts_are_found_through_an_index(
    store: FileStore, view: str, id_column: str, index_lookup: str, condition: str
) -> None:
    query = f"select traits, last_seen from {view} where {condition}{id_column} = 'x'"
    plan = [step for *_, step in store.find(f"explain query plan {query}")]
    # A step is, for example, SEARCH c USING INDEX calls_by_user (user_id=? AND customer=?). The
    # second word is the table: `calls`, or its alias in a view, which is `c` or `owner`.
    reads_of_calls = [step for step in plan if re.match(r"\w+ (calls|c|owner)\b", step)]
    assert len(reads_of_calls) == 2  # one for the row, and one for its traits
    assert all(index_lookup in step for step in reads_of_calls)


def test_ten_thousand_traits_of_a_user_are_merged_within_two_seconds(
    store: FileStore,
) -> None:
    traits = {f"trait_{number}": number * 1.1 for number in range(10_000)}
    assert store.save(traits=traits).status == 200
    seconds = []
    for _ in range(3):  # the best of three, because other programs compete for the CPU's caches
        started = time.thread_time()
        [(merged,)] = store.find("select traits from users")
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 2
    assert json.loads(merged) == traits


# The number of events is scaled down: 20 stands for 20 million.
@cases(
    "customers, events, fulfilled",
    {
        "9 customers, 20 million events": (9, 20, 0),
        "9 customers, one event more": (9, 21, 1),
        "10 customers": (10, 10, 1),
    },
)
def test_private_beta_is_fulfilled_by_10_customers_or_by_more_than_20_million_events(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    customers: int,
    events: int,
    fulfilled: int,
) -> None:
    assert receiver.SCHEMA.count(" 20000000 ") == 1
    scaled_down = receiver.SCHEMA.replace(" 20000000 ", " 20 ")
    monkeypatch.setattr(receiver, "SCHEMA", scaled_down)
    store = FileStore(tmp_path / "calls.db")
    for number in range(events):
        store.save("track", customer=f"c{number % customers}", event="e")
    store.close()
    assert store.find("select * from private_beta") == [(customers, events, fulfilled)]


# ---- Deletes -------------------------------------------------------------------------------------


def delete(timestamp: str, **fields: Any) -> dict[str, Any]:
    return {"call_type": "delete", "timestamp": timestamp, **fields}


def test_a_delete_removes_only_calls_of_its_user_and_customer_up_to_its_timestamp(
    store: FileStore,
) -> None:
    for call in (
        track(message_id="before", timestamp=DAY_1),
        track(message_id="same moment", timestamp=DAY_2),
        track(message_id="after", timestamp=DAY_3),
        track(message_id="other user", timestamp=DAY_1, user_id="u2"),
        track(message_id="other customer", timestamp=DAY_1, customer="acme"),
        track(message_id="anonymous", timestamp=DAY_1, user_id=None, anonymous_id="u1"),
    ):
        assert store.save(**call).status == 200
    assert store.save(**delete(DAY_2, message_id="delete")).outcome == "stored"
    left = {row[0] for row in store.find("select message_id from calls")}
    assert left == {"after", "other user", "other customer", "anonymous", "delete"}


@cases(
    "timestamp, outcome",
    {
        "before the delete": (DAY_1, "forgotten"),
        "at the same moment": (DAY_2, "forgotten"),
        "after the delete": (DAY_3, "stored"),
    },
)
def test_a_call_that_arrives_after_the_delete_is_stored_only_if_it_is_newer(
    store: FileStore, timestamp: str, outcome: str
) -> None:
    store.save(**delete(DAY_2))
    reply = store.save(**track(timestamp=timestamp))
    assert (reply.status, reply.outcome) == (200, outcome)


@cases(
    "timestamp, outcome",
    {"older": (DAY_1, "forgotten"), "equal": (DAY_2, "forgotten"), "newer": (DAY_3, "stored")},
)
def test_a_second_delete_is_stored_only_if_it_is_newer(
    store: FileStore, timestamp: str, outcome: str
) -> None:
    store.save(**delete(DAY_2))
    assert store.save(**delete(timestamp)).outcome == outcome


def test_a_retried_delete_removes_nothing_that_came_after_it(store: FileStore) -> None:
    # A delete that is dated in the future takes effect as of its arrival. If the retry had an
    # effect, it would therefore remove the call that arrived in between.
    in_the_future = delete("2999-01-01", message_id="d")
    assert store.save(**in_the_future).outcome == "stored"
    time.sleep(0.002)  # a later millisecond
    store.save(**track(message_id="later", timestamp=receiver.utc_now()))
    time.sleep(0.002)
    assert store.save(**in_the_future).outcome == "duplicate"
    assert store.find("select count(*) from calls where message_id = 'later'") == [(1,)]


def test_a_retry_of_a_stored_call_is_a_duplicate_even_if_it_is_dated_before_a_delete(
    store: FileStore,
) -> None:
    store.save(**track(message_id="m1", timestamp=DAY_3))  # newer than the delete, so it stays
    store.save(**delete(DAY_2))
    assert store.save(**track(message_id="m1", timestamp=DAY_1)).outcome == "duplicate"


def test_a_delete_dated_in_the_future_removes_only_what_happened_before_it_arrived(
    store: FileStore,
) -> None:
    store.save(**track(message_id="past", timestamp=DAY_1))
    store.save(**track(message_id="future", timestamp="2999-01-02"))
    store.save(**delete("2999-01-03", message_id="d"))
    assert store.find("select message_id from calls where type = 'track'") == [("future",)]
    assert store.save(**track(timestamp="2999-01-01")).outcome == "stored"


def test_a_delete_is_stored_with_nothing_but_its_type_its_ids_and_its_times(
    store: FileStore,
) -> None:
    call = delete(DAY_1, message_id="d", context={"ip": "::1"}, note="Ann", sent_at=DAY_2)
    store.save(**call, received_at={"email": "ann@example.com"})  # personal data, not a time
    [(kept,)] = store.find("select call from calls")
    expected = {"type": "delete", "user_id": "u1", "message_id": "d"}
    assert json.loads(kept) == {**expected, "timestamp": DAY_1, "sent_at": DAY_2}


def history_call(call_type: str, user_id: str, day: int, message_id: str) -> dict[str, Any]:
    return {
        "type": call_type,
        "user_id": user_id,
        "event": "e",
        "message_id": message_id,
        "timestamp": f"2026-01-{day:02}",
    }


HISTORY = [
    history_call("track", "u1", 1, "u1, day 1"),
    history_call("identify", "u1", 2, "u1, day 2"),
    history_call("delete", "u1", 2, "delete u1, day 2"),
    history_call("track", "u1", 3, "u1, day 3"),
    history_call("delete", "u1", 4, "delete u1, day 4"),
    history_call("track", "u1", 5, "u1, day 5"),
    history_call("track", "u2", 1, "u2, day 1"),
    history_call("delete", "u3", 1, "delete u3, day 1"),
    history_call("identify", "u3", 2, "u3, day 2"),
]
LEFT_AT_THE_END = [("u1, day 5",), ("u2, day 1",), ("u3, day 2",)]


@pytest.mark.parametrize("seed", range(60))
def test_any_order_of_calls_and_deletes_with_retries_leaves_the_same_calls(
    tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    retries = rng.choices(HISTORY, k=len(HISTORY))
    arrivals = [*HISTORY, *retries]
    rng.shuffle(arrivals)
    store = FileStore(tmp_path / "calls.db")
    for call in arrivals:
        assert ask(call, destination=store).status == 200
    store.close()
    left = store.find("select message_id from calls where type <> 'delete' order by 1")
    assert left == LEFT_AT_THE_END
    # The older delete of u1 is stored only if it arrives before the newer one.
    newest_deletes = "select user_id, max(timestamp) from calls where type = 'delete' group by 1"
    assert store.find(newest_deletes) == [
        ("u1", "2026-01-04T00:00:00.000Z"),
        ("u3", "2026-01-01T00:00:00.000Z"),
    ]


def files_with(path: Path, secret: bytes) -> list[str]:
    """The files of a database in which this text is found."""
    files = [path, Path(f"{path}-wal"), Path(f"{path}-shm")]
    return [file.name for file in files if file.exists() and secret in file.read_bytes()]


def test_no_trait_of_a_deleted_user_remains_in_free_pages_or_the_wal(store: FileStore) -> None:
    store.save(traits={"secret": "gone-with-the-wind"})
    assert files_with(store.path, b"gone-with-the-wind") != []
    store.save("delete")
    assert files_with(store.path, b"gone-with-the-wind") == []


def test_a_delete_does_not_wait_for_a_reader_and_the_next_call_clears_the_wal(
    store: FileStore,
) -> None:
    store.save(traits={"secret": "gone-with-the-wind"})
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as reader:
        reader.execute("begin")
        reader.execute("select count(*) from calls").fetchone()
        started = time.monotonic()
        assert store.save("delete").status == 200
        assert time.monotonic() - started < 1
        assert files_with(store.path, b"gone-with-the-wind") != []
    assert store.save(user_id="u2").status == 200
    assert files_with(store.path, b"gone-with-the-wind") == []


def test_the_wal_shrinks_again_after_a_long_running_reader(store: FileStore) -> None:
    # The first batch of a store truncates the WAL explicitly. Do that now, so that from here on,
    # only SQLite's journal_size_limit can shrink the WAL.
    store.save(message_id="before")
    with contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as reader:
        reader.execute("begin")
        reader.execute("select count(*) from calls").fetchone()
        for number in range(60):
            store.save(traits={"blob": "x" * 500_000}, message_id=f"m{number}")
        assert os.path.getsize(f"{store.path}-wal") > receiver.WAL_BYTES * 1.5
    for number in range(3):
        store.save(message_id=f"after-{number}")
    assert os.path.getsize(f"{store.path}-wal") <= receiver.WAL_BYTES


# ---- The file ------------------------------------------------------------------------------------


def make_foreign_database(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        # The version is right, but the application_id is not.
        db.executescript("create table calls (a, b); pragma user_version = 2;")


def make_database_of_another_version(path: Path) -> None:
    with contextlib.closing(receiver.open_database(str(path))) as db:
        db.execute("pragma user_version = 1")


@cases(
    "make, reason",
    {
        "another database with a table named calls": (
            make_foreign_database,
            "not a database of calls",
        ),
        "another version of the schema": (
            make_database_of_another_version,
            "its schema is version 1, but must",
        ),
        "a text file": (lambda path: path.write_text("Dear diary"), "not a database of calls"),
        "a folder": (Path.mkdir, "not a regular file"),
        "a FIFO": (os.mkfifo, "not a regular file"),
        "a WAL without its database": (
            lambda path: Path(f"{path}-wal").write_bytes(b"WAL"),
            "calls.db is missing or empty",
        ),
    },
)
def test_a_path_that_cannot_be_used_is_refused_and_nothing_is_touched(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "calls.db"
    make(path)
    before = {file: file.is_file() and file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(receiver.ConfigurationError, match=re.escape(str(path))) as refused:
        receiver.Store(path)
    assert reason in str(refused.value)
    assert {file: file.is_file() and file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_link_to_a_missing_database_is_refused_if_a_wal_lies_beside_its_target(
    tmp_path: Path,
) -> None:
    wal = tmp_path / "real.db-wal"
    wal.write_bytes(b"WAL")
    link = tmp_path / "link.db"
    link.symlink_to(tmp_path / "real.db")
    with pytest.raises(receiver.ConfigurationError, match="real.db-wal exists, but"):
        receiver.Store(link)
    assert wal.read_bytes() == b"WAL"


def test_the_name_of_the_database_must_not_be_empty() -> None:
    with pytest.raises(receiver.ConfigurationError, match="must not be empty"):
        receiver.Store("")


def test_sqlite_older_than_3_38_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 37, 2))
    with pytest.raises(receiver.ConfigurationError, match="SQLite must be 3.38 or newer"):
        receiver.Store(tmp_path / "calls.db")


def test_wal_autocheckpoint_is_set_from_the_constant_wal_pages(store: FileStore) -> None:
    assert store._db.execute("pragma wal_autocheckpoint").fetchone() == (receiver.WAL_PAGES,)


def test_the_database_is_created_with_mode_0600(store: FileStore) -> None:
    store.save()
    modes = {file.name: file.stat().st_mode & 0o777 for file in store.path.parent.iterdir()}
    assert modes == {"calls.db": 0o600, "calls.db-wal": 0o600, "calls.db-shm": 0o600}


def test_a_database_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "calls.db"
    FileStore(path).close()
    path.chmod(0o640)
    FileStore(path).close()
    assert path.stat().st_mode & 0o777 == 0o640


# ---- 200 is a promise ----------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """While this lasts, another connection holds the lock for writing."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("begin immediate")
        yield


def test_every_call_is_acknowledged_only_after_a_commit_that_is_synced_to_disk(
    store: FileStore,
) -> None:
    statements: list[str] = []
    store._db.set_trace_callback(statements.append)
    for number in range(1, 4):
        assert store.save().status == 200
        assert [text.lower() for text in statements].count("commit") == number
    # With these settings, SQLite syncs the WAL to disk before a commit returns.
    assert store._db.execute("pragma journal_mode").fetchone() == ("wal",)
    assert store._db.execute("pragma synchronous").fetchone() == (2,)  # full


def save_twelve_calls(
    store: FileStore, pool: ThreadPoolExecutor, statements: list[str]
) -> list[receiver.Reply]:
    """Save a call of u0 in one batch, and calls of u1 to u11 in another; collect the statements."""
    store._db.set_trace_callback(statements.append)
    with locked(store.path):
        replies = [pool.submit(store.save, user_id="u0")]
        wait_until(lambda: "begin immediate" in statements)
        replies += [pool.submit(store.save, user_id=f"u{number}") for number in range(1, 12)]
        wait_until(lambda: len(store._queue) == 11)
    return [reply.result() for reply in replies]


def test_calls_that_wait_together_share_one_transaction(
    store: FileStore, pool: ThreadPoolExecutor
) -> None:
    statements: list[str] = []
    replies = save_twelve_calls(store, pool, statements)
    assert {reply.status for reply in replies} == {200}
    assert [text.lower() for text in statements].count("commit") == 2


def test_a_call_waits_for_a_lock_even_after_the_wal_was_truncated(
    store: FileStore, pool: ThreadPoolExecutor
) -> None:
    # The first batch truncates the WAL, for which it sets SQLite's busy timeout to 0. Afterwards,
    # the timeout must be as before.
    assert store.save().status == 200
    statements: list[str] = []
    store._db.set_trace_callback(statements.append)
    with locked(store.path):
        reply = pool.submit(store.save)
        wait_until(lambda: "begin immediate" in statements)
        with pytest.raises(TimeoutError):
            reply.result(timeout=0.2)
    assert reply.result().status == 200


def test_a_call_that_the_database_rejects_fails_alone(
    store: FileStore, pool: ThreadPoolExecutor
) -> None:
    rejecting_u6 = (
        "create trigger t before insert on calls when new.user_id = 'u6'"
        " begin select raise(abort, 'no'); end"
    )
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        db.execute(rejecting_u6)
    replies = save_twelve_calls(store, pool, [])
    assert [reply.status for reply in replies] == [200] * 6 + [500] + [200] * 5
    assert store.find("select count(*) from calls") == [(11,)]


def test_while_the_database_file_is_missing_or_replaced_a_call_gets_503(
    store: FileStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.save().status == 200
    moved = store.path.rename(store.path.with_name("moved"))
    assert store.save().status == 503  # missing
    store.path.write_bytes(b"")
    assert store.save().status == 503  # replaced
    moved.rename(store.path)
    assert store.save().status == 200
    assert store.find("select count(*) from calls") == [(2,)]
    assert "the file or its WAL was deleted or replaced" in caplog.text


@pytest.mark.parametrize("name", ["calls.db", "a symbolic link"])
def test_while_the_wal_is_missing_calls_get_503_and_no_acknowledged_call_is_lost(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "a symbolic link").symlink_to("calls.db")
    store = FileStore(tmp_path / name)
    assert store.save().status == 200
    (tmp_path / "calls.db-wal").unlink()
    assert store.save().status == 503
    store.close()  # writes what is in the deleted WAL to calls.db
    assert rows(store.path, "select count(*) from calls") == [(1,)]


def test_while_the_database_is_read_only_a_call_gets_503_with_retry_after(
    store: FileStore,
) -> None:
    store._db.execute("pragma query_only = 1")
    reply = store.save()
    assert (reply.status, reply.headers) == (503, {"Retry-After": "5"})
    store._db.execute("pragma query_only = 0")
    assert store.save().status == 200


@contextlib.contextmanager
def full_disk(process: RunningReceiver) -> Iterator[None]:
    """While this lasts, the WAL of the process cannot grow, as though the disk were full."""
    import resource

    limit = os.path.getsize(f"{process.database}-wal")
    before = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, before[1]))
    yield
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("fault", [pytest.param("full", marks=on_linux), "locked"])
def test_while_a_store_cannot_write_it_answers_503_within_5_seconds_and_then_it_recovers(
    tmp_path: Path, fault: str, pool: ThreadPoolExecutor
) -> None:
    with RunningReceiver(tmp_path) as process, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(TlsClient(process)) for _ in range(10)]
        assert clients[0].status(request()) == 200

        def post_timed(number: int) -> tuple[int, str | None, float]:
            started = time.monotonic()
            call = {**TRACK, "message_id": f"m{number}"}
            reply = clients[number].send(request(call)).read_reply()
            return reply.status, reply.headers.get("retry-after"), time.monotonic() - started

        context = full_disk(process) if fault == "full" else locked(process.database)
        with context:
            pending = []
            for number in range(10):
                pending.append(pool.submit(post_timed, number))
                # Spread the calls out. If the database is locked, some of them then wait for the
                # lock twice: first behind another batch, and then in their own.
                time.sleep(0.2)
            for reply in pending:
                status, retry_after, seconds = reply.result()
                assert (status, retry_after) == (503, "5")
                assert seconds < 5
        assert {post_timed(number)[0] for number in range(10)} == {200}
        assert len(process.message_ids()) == 11


def test_after_kill_9_every_acknowledged_call_is_there_once(tmp_path: Path) -> None:
    sent: set[str] = set()
    acknowledged: set[str] = set()
    rng = random.Random(9)
    for number in range(6):
        with (
            RunningReceiver(tmp_path) as process,
            Load(process, f"run-{number}", clients=6) as load,
        ):
            load.wait_for_acknowledged(rng.randrange(1, 400))
            process.stop(signal.SIGKILL)
        sent |= load.sent
        acknowledged |= load.acknowledged
        # A disk that stalls for longer than STORE_TIMEOUT leads to a 503.
        assert [status for status in load.other_statuses if status != 503] == []
    with RunningReceiver(tmp_path) as process, TlsClient(process) as client:
        found = sorted(process.message_ids())
        assert len(found) == len(set(found))
        assert acknowledged <= set(found) <= sent
        assert rows(process.database, "pragma integrity_check") == [("ok",)]

        for message_id in found[:200]:  # sending them again changes nothing
            # Here, too, a disk that stalls may cause a 503.
            call = request({**TRACK, "message_id": message_id})
            wait_until(lambda call=call: client.status(call) == 200)  # type: ignore[misc]
        assert sorted(process.message_ids()) == found


def test_a_second_receiver_waits_while_the_first_creates_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: ThreadPoolExecutor
) -> None:
    begun = threading.Event()

    class Watched(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql.startswith("begin"):
                begun.set()
            return super().execute(sql, *values)

    path = tmp_path / "calls.db"
    # The first receiver is played by this connection, which does what `open_database` does.
    with contextlib.closing(sqlite3.connect(path)) as first:
        first.execute("begin immediate")
        watched = functools.partial(sqlite3.connect, factory=Watched)
        monkeypatch.setattr(sqlite3, "connect", watched)
        opened = pool.submit(receiver.open_database, str(path))
        assert begun.wait(10)
        with pytest.raises(TimeoutError):  # it still waits for the lock
            opened.result(timeout=0.3)
        for statement in receiver.SCHEMA.split(";\n"):
            first.execute(statement)
        first.commit()
        opened.result().close()


def test_two_receivers_on_one_new_database_neither_lose_nor_duplicate_a_call(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with contextlib.ExitStack() as stack:
        started = [pool.submit(RunningReceiver, tmp_path) for _ in range(2)]
        first, second = [stack.enter_context(future.result()) for future in started]
        loads = [  # two of them send the same 300 message_ids
            Load(first, "same", clients=3, limit=100),
            Load(second, "same", clients=3, limit=100),
            Load(second, "own", clients=2, limit=100),
        ]
        acknowledged: set[str] = set()
        for load in loads:
            load.wait()
            assert load.other_statuses == []
            acknowledged |= load.acknowledged
        assert sorted(first.message_ids()) == sorted(acknowledged)
        assert len(acknowledged) == 300 + 200


# ==================================================================================================
# Part 3. The server
#
# The server over real TLS, mostly in a separate process: the head of a request, one connection, the
# keys file, the log, the server with all its connections, TLS, and hostile clients.
# ==================================================================================================

# ---- Rung 1: the head of a request ---------------------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked"
JSON_TYPE = "Content-Type: application/json"
# Segment sends these with every call.
SEGMENT_HEADERS = [
    "User-Agent: Segment.io/1.0",
    "Accept: */*",
    "Cache-Control: no-cache",
    "X-Segment-Settings: e30=",
]


def request_with_head_of(size: int) -> bytes:
    """A call whose head has this many bytes before the empty line."""
    unpadded_size = request(TRACK, "X: ").index(b"\r\n\r\n")
    return request(TRACK, "X: " + "y" * (size - unpadded_size))


# A careless parser could take these for digits. `head` encodes in Latin-1, so ARABIC_5 is sent as
# D9 A5, the UTF-8 form of the Arabic digit five. For SUPERSCRIPT_2, str.isdigit() is true.
ARABIC_5 = "\xd9\xa5"
SUPERSCRIPT_2 = "\xb2"

# Heads that are refused, with the status and the beginning of the message. By default, `head` sends
# Host and Authorization first, so the first line that is passed to it is header line 3. Some heads
# are incomplete: the receiver must refuse these at once, without waiting for the rest.
REFUSED_HEADS: dict[str, tuple[list[bytes], int, str]] = {
    "stray or wrong whitespace in the request line": (
        [
            head(method="GE T"),
            head(target="/a b"),
            b"POST  / HTTP/1.1\r\nHost: x\r\n\r\n",
            head(version="HTTP/1.1 "),
            b" POST / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST\t/\tHTTP/1.1\r\nHost: x\r\n\r\n",
        ],
        400,
        "Malformed request line",
    ),
    "an illegal character, a malformed or missing version, or an empty request line": (
        [
            b"GET /\r\n\r\n",
            head(target="/\xe9"),
            head(method="G@T"),
            head(version="http/1.1"),
            head(version="HTTP/1.10"),
            b"\0\r\n\r\n",
            b"\r\n\r\n",
        ],
        400,
        "Malformed request line",
    ),
    "a version other than HTTP/1.x": (
        [head(version="HTTP/0.9"), head(version="HTTP/2.0"), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
        505,
        "HTTP version must be 1.1 or 1.0",
    ),
    "a target over 8 KiB": (
        [head(target="/" + "a" * 8192), b"POST /" + b"a" * 9000],
        414,
        "Request target must be at most 8192 bytes",
    ),
    "over 100 header lines": (
        [head(*["X: y"] * 99)],
        431,
        "Request must have at most 100 header lines",
    ),
    "over 64 KiB in all": (
        [request_with_head_of(65_537), b"POST / HTTP/1.1\r\nX: " + b"y" * 65_600],
        431,
        "Request head must be at most 65536 bytes",
    ),
    "a bare LF in a head that is not complete": (
        [
            b"POST / HTTP/1.1\nHost: x\n\n",
            b"POST / HTTP/1.1\r\nHost: x\n",
        ],
        400,
        "Malformed line",
    ),
    "a bare LF inside a head that is complete": (
        [b"POST / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n"],
        400,
        "Malformed header line 1",
    ),
    "obsolete folding": (
        [head("X: a\r\n folded"), head("X: a\r\n\tfolded")],
        400,
        "Malformed header line 4",
    ),
    "whitespace before the colon": (
        [head("X : a"), head("X\xa0: a")],  # \xa0 is a no-break space
        400,
        "Malformed header line 3",
    ),
    "control characters": (
        [head("X: a\0b"), head("X: a\rb"), head("X: a\x7fb"), head("X: \x1b[31m")],
        400,
        "Malformed header line 3",
    ),
    "no colon, a leading space, or an illegal header name": (
        [head("X"), head(": a"), head(" X: a"), head("X(y): a"), head("X\xe9: a")],
        400,
        "Malformed header line 3",
    ),
    "no Host in HTTP/1.1": ([head(host=None)], 400, "Missing Host header"),
    "a second Host": (
        [head("Host: localhost"), head("host: other")],
        400,
        "Repeated host header",
    ),
    "a second Content-Length": (
        [head("Content-Length: 5", length=5), head("content-length: 6", length=5)],
        400,
        "Repeated content-length header",
    ),
    "a second Content-Type that differs only in case": (
        [head(JSON_TYPE, "content-type: Application/JSON")],
        400,
        "Repeated content-type header",
    ),
    "a second Authorization": (
        [head(f"authorization: {basic('segment')}")],
        400,
        "Repeated authorization header",
    ),
    "a Content-Length that is not plain digits": (
        [
            head(length=text)
            for text in ("+5", "-5", "5, 5", "0x5", "5 5", "1_0", "5.0", ARABIC_5, SUPERSCRIPT_2)
        ],
        400,
        "Content-Length must be an integer without a sign, not '",
    ),
    "an empty Content-Length": ([head("Content-Length:")], 400, "Content-Length must be"),
    "a Transfer-Encoding beside a Content-Length": (
        [
            request(TRACK, CHUNKED),
            head("Transfer-Encoding: identity", length=0),
            head(CHUNKED, "Content-length:\t3"),
        ],
        400,
        "Transfer-Encoding and Content-Length must not be combined",
    ),
    "a Transfer-Encoding without a Content-Length": (
        [head(CHUNKED), head("Transfer-Encoding: xchunked")],
        411,
        "Missing Content-Length header",
    ),
}


@cases("heads, status, message", REFUSED_HEADS)
def test_a_malformed_or_unsupported_head_is_refused_and_the_connection_closes(
    running: RunningReceiver, heads: list[bytes], status: int, message: str
) -> None:
    for data in heads:
        with TlsClient(running) as client:
            reply = client.send(data).read_reply()
            assert (reply.status, reply.headers["connection"]) == (status, "close"), data[:80]
            assert reply.message.startswith(message), data[:80]
            assert client.is_closed()


# A second request, hidden in the bytes after a first head. A server that misjudges where the first
# request ends would handle it.
SMUGGLED = request({**TRACK, "message_id": "smuggled"})
LAST_CHUNK = b"0\r\n\r\n"  # exactly 5 bytes, the Content-Length below


@cases(
    "data",
    {
        "Content-Length, then Transfer-Encoding": head("Content-Length: 5", CHUNKED)
        + LAST_CHUNK
        + SMUGGLED,
        "Transfer-Encoding, then Content-Length": head(CHUNKED, "Content-Length: 5")
        + LAST_CHUNK
        + SMUGGLED,
        "only chunked": head(CHUNKED) + LAST_CHUNK + SMUGGLED,
        "two lengths": head("Content-Length: 5", length=0) + SMUGGLED,
        "a length with a sign": head(length="+0") + SMUGGLED,
        "a folded header": head("X: a\r\n Content-Length: 0", length=5) + SMUGGLED,
        "a header with whitespace before the colon": head("Content-Length : 0") + SMUGGLED,
        # This first request is valid, but what follows an upgrade might not be HTTP.
        "an upgrade, which is not supported": (
            request(TRACK, "Upgrade: h2c", "Connection: upgrade") + SMUGGLED
        ),
    },
)
def test_no_second_request_can_be_smuggled_behind_the_first(
    running: RunningReceiver, data: bytes
) -> None:
    with TlsClient(running) as client:
        client.send(data).read_reply()
        assert client.is_closed()
    assert "smuggled" not in running.message_ids()


# Requests that are answered with 200, and after which the connection stays open.
KEPT_OPEN = {
    "every header that Segment sends": request(TRACK, *SEGMENT_HEADERS, JSON_TYPE),
    "keep-alive": request(TRACK, "Connection: Keep-Alive"),
    "a later minor version": request(version="HTTP/1.2"),
    "a token that contains close": request(TRACK, "Connection: closed, x-close"),
    "HTTP/1.0 that asks for keep-alive": request(
        TRACK, "Connection: Keep-Alive", version="HTTP/1.0"
    ),
    "an empty line before the request": b"\r\n" + request(),
    "odd names and values": request(TRACK, "X-Odd:", "x-odd:\t a\xe9\t ", "!#$%&'*+-.^_`|~: ok"),
    "an empty Host": request(host="Host:"),
    "a target of 8 KiB": request(target="/?" + "a" * 8190),
    "a target in absolute form": request(target="https://other.example/?a"),
    "a target in absolute form of another scheme": request(target="x+y.z-1://other"),
    "100 header lines": request(TRACK, *["X: y"] * 97),
    "64 KiB in all": request_with_head_of(65_536),
    "a Content-Length with 20 leading zeros": request(length="0" * 20 + str(len(TRACK_JSON))),
    "the same Content-Type twice": request(TRACK, JSON_TYPE, JSON_TYPE),
    "an unknown expectation": request(TRACK, "Expect: fireworks"),
}


@cases("data", KEPT_OPEN)
def test_this_request_is_accepted_and_the_connection_stays_open(
    running: RunningReceiver, data: bytes
) -> None:
    with TlsClient(running) as client:
        reply = client.send(data).read_reply()
        assert (reply.status, reply.headers["connection"]) == (200, "keep-alive")
        assert client.status(request()) == 200


@pytest.mark.parametrize("missing", [1, 2, 3, 4])
def test_an_incomplete_head_is_too_long_only_if_it_can_no_longer_end_within_64_kib(
    missing: int,
) -> None:
    data = request_with_head_of(65_536)
    end_of_head = data.index(b"\r\n\r\n") + 4
    partial = bytearray(data[: end_of_head - missing])
    # The limit does not count the final CR LF CR LF, whose missing bytes may still arrive.
    receiver.check_partial_head(partial, resume_at=0)
    # Other bytes arrive instead, so the head can no longer end within 64 KiB.
    partial += b"x" * missing
    with pytest.raises(receiver.Refusal, match="at most 65536 bytes"):
        receiver.check_partial_head(partial, resume_at=0)


# Requests after which the connection closes, and the status of the reply.
CLOSING_REQUESTS: dict[str, tuple[bytes, int]] = {
    "close": (request(TRACK, "connection: Close"), 200),
    "close among other tokens": (request(TRACK, "Connection: x, close"), 200),
    "close in a second header": (
        request(TRACK, "Connection: keep-alive", "Connection: close"),
        200,
    ),
    "HTTP/1.0": (request(version="HTTP/1.0"), 200),
    "HTTP/1.0 without a Host": (request(version="HTTP/1.0", host=None), 200),
    "an Expect header, which HTTP/1.0 ignores": (
        request(TRACK, "Expect: 100-continue", version="HTTP/1.0"),
        200,
    ),
    "CONNECT": (head(method="CONNECT", target="x:1", length=0), 404),
    "Upgrade": (request(TRACK, "Connection: upgrade", "Upgrade: websocket"), 200),
    "no length": (head(), 411),
    "no length, and an unknown API key": (head(api_key="unknown"), 401),
    "no length, to another path": (head(target="/x"), 404),
    "chunked, to another path": (head(CHUNKED, target="/x"), 404),
    "100-continue with an unknown key": (
        head("Expect: 100-continue", length=5, api_key="unknown"),
        401,
    ),
    "100-continue with a body that is too long": (
        head("Expect: 100-continue", length=600_000),
        413,
    ),
    "100-continue to an unknown path": (head("Expect: 100-continue", length=5, target="/x"), 404),
    "a body over max-body": (head(length=10_000_000) + b"x" * 2_000_000, 413),
    "a body of absurd length": (head(length="9" * 4000) + b"x" * 1000, 413),
}


@cases("data, status", CLOSING_REQUESTS)
def test_after_this_request_the_connection_closes(
    running: RunningReceiver, data: bytes, status: int
) -> None:
    with TlsClient(running) as client:
        reply = client.send(data).read_reply()
        assert (reply.status, reply.headers["connection"]) == (status, "close")
        assert client.is_closed()


def test_a_client_that_expects_100_continue_gets_it_before_it_sends_the_body(
    running: RunningReceiver,
) -> None:
    # If the head is refused, no 100 is sent: see CLOSING_REQUESTS.
    with TlsClient(running) as client:
        expecting = head("Expect: 100-Continue", length=len(TRACK_JSON))
        assert client.status(expecting) == 100
        assert client.status(TRACK_JSON) == 200
        assert client.status(request()) == 200


def test_a_200_has_only_the_headers_date_connection_and_content_length(
    running: RunningReceiver,
) -> None:
    with TlsClient(running) as client:
        reply = client.send(request()).read_reply()
    assert list(reply.headers) == ["date", "connection", "content-length"]


def test_the_content_type_of_an_error_reply_is_json(running: RunningReceiver) -> None:
    with TlsClient(running) as client:
        reply = client.send(request({})).read_reply()
    assert reply.headers["content-type"] == "application/json"


def test_the_date_of_a_reply_is_the_current_time_in_gmt(running: RunningReceiver) -> None:
    with TlsClient(running) as client:
        date = client.send(request()).read_reply().headers["date"]
    assert date.endswith(" GMT")
    assert abs((parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds()) < 5


# ---- One connection ------------------------------------------------------------------------------


def record_bytes(record: Record) -> bytes:
    """A record of the fixtures as it is sent."""
    return record.head.encode("latin-1") + b"\r\n\r\n" + record.body


@cases("record", REFUSED)
def test_over_the_network_a_refusal_has_the_status_and_message_of_the_fixtures(
    running: RunningReceiver, record: Record
) -> None:
    with TlsClient(running) as client:
        reply = client.send(record_bytes(record)).read_reply()
    assert reply.status == record.status
    assert reply.message.startswith(record.message)


# The labels of the records after which the connection closes, for one of three reasons: the head is
# malformed, so its Content-Length cannot be trusted; it has no Content-Length; or the body is too
# long to be discarded.
REFUSALS_THAT_CLOSE = {
    "a Transfer-Encoding beside a Content-Length",
    "a Transfer-Encoding without a Content-Length",
    "a Content-Length that is negative",
    "a Content-Length with a plus sign",
    "an empty Content-Length",
    "two lengths in one Content-Length",
    "a Content-Length with a fraction",
    "a Content-Length followed by a no-break space",
    "two Content-Lengths, even though they are equal",
    "two Content-Types that differ",
    "two Authorization headers",
    "a control character in a header",
    "a space in the target",
    "a header name with a space before the colon",
    "no Content-Length",
    "a body that is too long",
    "a body that is too long, and an unsupported Content-Type as well",
}


@cases(
    "record", {name: record for name, record in REFUSED.items() if name not in REFUSALS_THAT_CLOSE}
)
def test_any_other_refusal_leaves_the_connection_usable(
    running: RunningReceiver, record: Record
) -> None:
    with TlsClient(running) as client:
        client.send(record_bytes(record)).read_reply()
        assert client.status(request()) == 200


@pytest.mark.parametrize("name", sorted(REFUSALS_THAT_CLOSE))
def test_after_this_refusal_the_connection_closes(running: RunningReceiver, name: str) -> None:
    with TlsClient(running) as client:
        reply = client.send(record_bytes(REFUSED[name])).read_reply()
        assert reply.headers["connection"] == "close"
        assert client.is_closed()


def test_the_rest_of_a_refused_body_is_discarded_as_it_arrives(running: RunningReceiver) -> None:
    with TlsClient(running) as client:
        assert client.status(head(length=100_000, api_key="unknown") + b"x" * 10_000) == 401
        for _ in range(9):
            client.send(b"x" * 10_000)
        assert client.status(request()) == 200


def test_the_rest_of_a_refused_body_must_arrive_within_the_timeout(
    impatient: RunningReceiver,
) -> None:
    with TlsClient(impatient) as client:
        assert client.status(head(length=100_000, api_key="unknown") + b"x" * 10) == 401
        started = time.monotonic()
        assert client.is_closed()
        assert TIMEOUT * 0.8 < time.monotonic() - started < TIMEOUT + 2


@on_linux
def test_a_flood_of_property_keys_does_not_fill_the_memory(running: RunningReceiver) -> None:
    with TlsClient(running) as client:
        before = running.memory_mb()
        # receiver.py caches short keys: in one cache those that are in snake_case, in another the
        # converted form of the rest. The last two prefixes make keys that are too long for these
        # caches.
        for prefix in ("k", "kA", "long" * 40, "Long" * 40):
            for repetition in range(5):
                keys = {f"{prefix}{repetition}x{number}": 0 for number in range(2500)}
                assert client.status(request({**TRACK, "properties": keys})) == 200
    # If the caches had no limits, they would grow by some 20 MB.
    assert running.memory_mb() - before < 12


@on_linux
def test_refused_bodies_do_not_fill_the_memory(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path) as process, contextlib.ExitStack() as stack:
        assert post(process).status_code == 200
        before = process.memory_mb()
        clients = [stack.enter_context(TlsClient(process)) for _ in range(200)]
        # The last byte is missing, so the server is still discarding all of these bodies. If it
        # kept them, they would take 100 MB.
        for client in clients:
            client.send(head(length=500_000, api_key="unknown") + b"x" * 499_999)
        for client in clients:
            assert client.read_reply().status == 401
        assert process.memory_mb() - before < 40


@cases(
    "data, status",
    {
        "where HEAD is allowed": (head(method="HEAD", target="/health", api_key=None), 200),
        "where HEAD is not allowed": (head(method="HEAD", api_key=None), 405),
    },
)
def test_a_reply_to_a_HEAD_request_has_no_body(  # noqa: N802 - HEAD is an HTTP method
    running: RunningReceiver, data: bytes, status: int
) -> None:
    with TlsClient(running) as client:
        assert client.send(data).read_reply(head_only=True).status == status
        assert client.status(request()) == 200  # so there was no body before this reply


@cases(
    "data",
    {
        "a malformed header": head("X : y", method="HEAD"),
        "a bare LF in a head that is incomplete": b"HEAD / HTTP/1.1\nX",
    },
)
def test_even_the_reply_to_a_malformed_HEAD_request_has_no_body(  # noqa: N802 - an HTTP method
    running: RunningReceiver, data: bytes
) -> None:
    with TlsClient(running) as client:
        assert client.send(data).read_reply(head_only=True).status == 400
        assert client.is_closed()


def test_requests_may_arrive_in_pieces_of_any_size(running: RunningReceiver) -> None:
    stream = request() + request({"type": "juggle", "user_id": "u"}) + request(b"[]") + request()
    for size in (len(stream), 100, 7, 1):
        with TlsClient(running) as client:
            for start in range(0, len(stream), size):
                client.send(stream[start : start + size])
            assert [client.read_reply().status for _ in range(4)] == [200, 501, 400, 200]


def test_a_head_that_does_not_arrive_in_time_is_408(impatient: RunningReceiver) -> None:
    with TlsClient(impatient) as client:
        started = time.monotonic()
        reply = client.send(head(length=10)[:-3]).read_reply()
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert reply.message == f"Request head did not arrive within {TIMEOUT} seconds"
        assert TIMEOUT * 0.8 < time.monotonic() - started < TIMEOUT + 2


def test_a_body_that_does_not_arrive_in_time_is_408(impatient: RunningReceiver) -> None:
    with TlsClient(impatient) as client:
        reply = client.send(head(length=10) + b'{"a":').read_reply()
        assert reply.status == 408
        assert reply.message == f"Body did not arrive within {TIMEOUT} seconds"


def test_a_second_request_that_does_not_arrive_in_time_is_408(impatient: RunningReceiver) -> None:
    with TlsClient(impatient) as client:
        assert client.status(request()) == 200
        assert client.status(b"POST") == 408


def test_a_silent_connection_is_closed_without_a_reply_after_the_timeout(
    impatient: RunningReceiver,
) -> None:
    with TlsClient(impatient) as client:
        started = time.monotonic()
        assert client.is_closed()
        assert TIMEOUT * 0.8 < time.monotonic() - started < TIMEOUT + 2


def test_keep_alive_limits_the_silence_between_requests(tmp_path: Path) -> None:
    options = ["--timeout", "9", "--keep-alive", "0.8"]
    with RunningReceiver(tmp_path, *options) as process, TlsClient(process) as client:
        assert client.status(request()) == 200
        time.sleep(0.3)  # a pause that is short enough
        assert client.status(request()) == 200
        started = time.monotonic()
        assert client.is_closed()
        assert 0.7 < time.monotonic() - started < 3


def test_a_destination_may_take_longer_than_the_timeout() -> None:
    slow = Recorder(lambda: time.sleep(1.0))
    with receiver.serve(slow, port=0, timeout=0.3) as server, TlsClient(server) as client:
        assert client.status(request()) == 200


@cases(
    "data, message",
    {
        "in the head": (request()[:20], "Request head ended early"),
        "in the body": (request()[:-1], "Body ended early"),
    },
)
def test_a_request_that_ends_early_is_400(
    running: RunningReceiver, data: bytes, message: str
) -> None:
    with TlsClient(running) as client:
        reply = client.send(data).half_close().read_reply()
        assert (reply.status, reply.message) == (400, message)


def test_a_client_that_resets_in_the_middle_of_a_body_leaves_one_line_in_the_log(
    running: RunningReceiver,
) -> None:
    before = running.flush_log()
    client = TlsClient(running)
    assert client.status(head("Expect: 100-continue", length=len(TRACK_JSON))) == 100
    client.send(TRACK_JSON[:9]).reset()
    [line] = running.lines_after(before, "Body ended early")
    assert re.fullmatch(r"\S+ 400 - demo - - \S+ ms Body ended early", line)


def ask_in_plain_http(process: RunningReceiver, method: str) -> tuple[bytes, bytes]:
    """The head and the body of the reply to a request without TLS."""
    with connect(process) as sock:
        sock.sendall(f"{method} / HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        data = b"".join(iter(lambda: sock.recv(9999), b""))
    top, _, body = data.partition(b"\r\n\r\n")
    return top, body


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS"])
def test_a_plain_http_client_is_told_in_plain_http_to_use_https(
    running: RunningReceiver, method: str
) -> None:
    top, body = ask_in_plain_http(running, method)
    assert top.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert b"Connection: close" in top
    assert body == b'{"message": "This port speaks HTTPS; use https://"}'


def test_the_reply_to_a_HEAD_request_in_plain_http_has_no_body(  # noqa: N802 - an HTTP method
    running: RunningReceiver,
) -> None:
    top, body = ask_in_plain_http(running, "HEAD")
    assert top.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert body == b""


# ---- The keys file -------------------------------------------------------------------------------

ENTRY = {"customer": "Acme", "sha256": "0" * 64}


def test_the_fixtures_hold_the_three_demo_keys() -> None:
    assert {
        digest("segment"): ("demo", None, None),
        digest("segment-expired"): ("lapsed", None, "2020-01-01T00:00:00.000Z"),
        digest("segment-identify-only"): ("limited", frozenset(["identify"]), None),
    } == KEYS


def test_an_entry_may_limit_the_types_of_call() -> None:
    entry = {**ENTRY, "calls": ["identify", "group"]}
    expected = receiver.Key("Acme", frozenset(["identify", "group"]))
    assert receiver.parse_keys([entry]) == {"0" * 64: expected}


def test_the_expiry_of_a_key_is_converted_to_utc() -> None:
    entry = {**ENTRY, "expires": "2027-01-01T01:00:00+01:00"}
    expected = receiver.Key("Acme", None, "2027-01-01T00:00:00.000Z")
    assert receiver.parse_keys([entry]) == {"0" * 64: expected}


CALLS_RULE = f"calls must contain only types of call ({', '.join(receiver.CALL_TYPES)}), not "
CUSTOMER_RULE = "customer must be a non-empty string of printable characters"
DIGEST_RULE = "sha256 must be 64 hexadecimal digits in lower case"
EXPIRES_RULE = "expires must be an ISO 8601 time such as 2026-01-15T09:41:07Z"


@cases(
    "entries, message",
    {
        "an entry that is not an object": ([ENTRY, 7], "entry 2: must be an object"),
        "a repeated digest": ([ENTRY, ENTRY], "entry 2: sha256 must not be repeated"),
        "no customer": ([{"sha256": "0" * 64}], f"entry 1: {CUSTOMER_RULE}"),
        "an empty customer": ([{**ENTRY, "customer": ""}], f"entry 1: {CUSTOMER_RULE}"),
        "a customer of two lines": ([{**ENTRY, "customer": "A\nB"}], f"entry 1: {CUSTOMER_RULE}"),
        "a customer that is a number": ([{**ENTRY, "customer": 7}], f"entry 1: {CUSTOMER_RULE}"),
        "no digest": ([{"customer": "Acme"}], f"entry 1: {DIGEST_RULE}"),
        "a digest in capitals": ([{**ENTRY, "sha256": "A" * 64}], f"entry 1: {DIGEST_RULE}"),
        "a short digest": ([{**ENTRY, "sha256": "0" * 63}], f"entry 1: {DIGEST_RULE}"),
        "a misspelled member": ([{**ENTRY, "expirs": 1}], "entry 1: unknown member 'expirs'"),
        "calls that are text": ([{**ENTRY, "calls": "track"}], "entry 1: calls must be an array"),
        "an unknown type": (
            [{**ENTRY, "calls": ["identify", "tarck"]}],
            f"entry 1: {CALLS_RULE}'tarck'",
        ),
        "a type that is an array": ([{**ENTRY, "calls": [[]]}], f"entry 1: {CALLS_RULE}[]"),
        "an expiry in words": ([{**ENTRY, "expires": "soon"}], f"entry 1: {EXPIRES_RULE}"),
        "an expiry that is a number": ([{**ENTRY, "expires": 2027}], f"entry 1: {EXPIRES_RULE}"),
    },
)
def test_an_invalid_entry_is_reported_with_its_number(entries: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        receiver.parse_keys(entries)


@cases(
    "data, message",
    {
        "an object": (b"{}", "must be a JSON array"),
        "a syntax error": (b"[\n{]", "must be JSON: syntax error at line 2, column 2"),
        "a byte that is not UTF-8": (b'["\xff"]', "must be JSON"),
        "deep nesting": (b"[" * 100_000, "must be JSON"),
    },
)
def test_a_keys_file_must_be_a_json_array(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        receiver.parse_entries(data)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    """A copy of the demo keys."""
    path = tmp_path / "keys.json"
    shutil.copy(FIXTURES / "keys.json", path)
    return path


def test_a_keys_file_must_not_be_so_long_that_it_fills_the_memory(keys_file: Path) -> None:
    os.truncate(keys_file, 10**12)  # a sparse file, which takes no space on the disk
    with pytest.raises(receiver.ConfigurationError, match="must be at most 100000000 bytes long"):
        receiver.Keyring(str(keys_file))


def test_a_keyring_reads_its_file_again_only_when_it_has_changed(keys_file: Path) -> None:
    keyring = receiver.Keyring(str(keys_file))
    keys = keyring.keys
    keyring.refresh()
    assert keyring.keys is keys
    keys_file.write_text("[]")
    keyring.refresh()
    assert keyring.keys == {}


def replace_with_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_with_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_with_link_to_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@cases(
    "break_file",
    {
        "a syntax error": lambda path: path.write_text("[{]"),
        "a folder": replace_with_folder,
        "a FIFO": replace_with_fifo,
        "no file": Path.unlink,
        "a symbolic link to a device": replace_with_link_to_device,
    },
)
def test_an_unusable_keys_file_leaves_the_old_keys_in_force_and_is_logged_once(
    keys_file: Path, caplog: pytest.LogCaptureFixture, break_file: Callable[[Path], object]
) -> None:
    keyring = receiver.Keyring(str(keys_file))
    break_file(keys_file)
    for _ in range(3):
        keyring.refresh()
    assert keyring.keys == KEYS
    assert caplog.text.count(f"Keeping the previous keys: {keys_file}: ") == 1


def test_a_keyring_tries_again_if_descriptors_have_run_out(
    keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> NoReturn:
        raise OSError(errno.EMFILE, "Too many open files")

    keyring = receiver.Keyring(str(keys_file))
    keys_file.write_text("[]")
    with monkeypatch.context() as patch:
        patch.setattr(receiver, "read_regular_file", fail)
        keyring.refresh()
    assert keyring.keys == KEYS
    keyring.refresh()
    assert keyring.keys == {}


def test_a_running_receiver_reads_changed_keys_within_two_seconds(
    tmp_path: Path, keys_file: Path
) -> None:
    with RunningReceiver(tmp_path, "--api-keys", keys_file) as process:
        assert post(process).status_code == 200
        keys_file.write_text("[]")
        process.wait_for_log(r"Reloaded .*keys\.json \(keys: 0\)", 2)
        assert post(process).status_code == 401


# ---- The log -------------------------------------------------------------------------------------

FORGED = "x\r\nForged: 1\x1b"


@cases(
    "value, shown",
    {
        "a word": ("u1", "u1"),
        "empty text": ("", "-"),
        "nothing": (None, "-"),
        "a number": (7, "7"),
        "zero": (0, "0"),
        "two words": ("two words", "'two words'"),
        "a quotation mark": ("'a", '"\'a"'),
        "a control character": ("\x1b", r"'\x1b'"),
        "an empty array": ([], "[]"),
        "an array": (["x"], "['x']"),
        "80 characters": ("x" * 80, "x" * 80),
        "81 characters: quoted, then cut to 80": ("x" * 81, "'" + "x" * 78 + "…"),
    },
)
def test_how_a_value_is_shown_in_a_line_of_the_log(value: Any, shown: str) -> None:
    assert receiver.log_word(value) == shown


# A call, its API key, and its log line without the time. A line has the status, the type, the
# customer, the user, and the event or name, with "-" for any that is missing; then the outcome, if
# there is one other than `stored`; the duration; and the message of an error reply. The order of
# the rows matters: the duplicate is sent after its original, and the forgotten call is sent after
# the delete, but has an earlier timestamp.
LOGGED: dict[str, tuple[dict[str, Any], str, str]] = {
    "accepted": (
        {**TRACK, "event": "Two Words", "message_id": "log-1"},
        "segment",
        r"200 track demo u1 'Two Words' \d+\.\d ms",
    ),
    "a duplicate": (
        {**TRACK, "event": "Two Words", "message_id": "log-1"},
        "segment",
        r"200 track demo u1 'Two Words' duplicate \d+\.\d ms",
    ),
    "a delete": (
        {"type": "delete", "user_id": "log-gone", "timestamp": DAY_2},
        "segment",
        r"200 delete demo log-gone - \d+\.\d ms",
    ),
    "forgotten": (
        {**TRACK, "user_id": "log-gone", "timestamp": DAY_1},
        "segment",
        r"200 track demo log-gone 'Signed Up' forgotten \d+\.\d ms",
    ),
    "control characters": (
        {"type": "page\n\x1b[31m", "user_id": "u1", "name": "Forged\n2026"},
        "segment",
        r"501 'page\\n\\x1b\[31m' demo u1 'Forged\\n2026' \d+\.\d ms Unsupported type 'page\\n.*",
    ),
    "no permission": (
        TRACK,
        "segment-identify-only",
        r"403 track limited u1 'Signed Up' \d+\.\d ms This API key does not permit calls .*",
    ),
    "an expired key": (TRACK, "segment-expired", r"401 - lapsed - - \d+\.\d ms API token expired"),
    "an unknown key": (TRACK, "unknown", r"401 - - - - \d+\.\d ms Unknown API key"),
    "a user whose id is 0": (
        {"type": "page", "user_id": 0, "anonymous_id": "a1"},
        "segment",
        r"200 page demo 0 - \d+\.\d ms",
    ),
    "an anonymous user": (
        {"type": "page", "anonymous_id": "a1"},
        "segment",
        r"200 page demo a1 - \d+\.\d ms",
    ),
}


def test_the_log_has_one_line_for_each_request(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path) as process:
        for call, api_key, _ in LOGGED.values():
            post(process, call, api_key)
        with TlsClient(process) as client:
            assert client.status(head("X : \x1b")) == 400
        assert process.stop() == 0
        lines = re.findall(rf"^{TIME} (.*)$", process.log, re.M)
    expected = {name: pattern for name, (*_, pattern) in LOGGED.items()}
    expected["a malformed head"] = r"400 - - - - \d+\.\d ms Malformed header line 3"
    for (name, pattern), line in zip(expected.items(), lines, strict=True):
        assert re.fullmatch(pattern, line), name


def test_the_time_of_a_log_line_is_in_utc(running: RunningReceiver) -> None:
    before = running.flush_log()
    post(running, {**TRACK, "user_id": "log-time"})
    running.wait_for_log("log-time")
    logged = datetime.fromisoformat(running.log[before:].split(" ")[0])
    assert abs((logged - datetime.now(UTC)).total_seconds()) < 60


def test_under_load_each_request_is_one_whole_line(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path) as process:
        with Load(process, "logged", clients=32, limit=100) as load:
            load.wait()
        assert process.stop() == 0
        pattern = rf"^{TIME} 200 track demo u1 'Signed Up' \d+\.\d ms$"
        assert len(load.acknowledged) == 32 * 100
        assert len(re.findall(pattern, process.log, re.M)) == 32 * 100


def test_quiet_logs_only_requests_that_were_refused(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path, "--quiet") as process:
        assert post(process).status_code == 200
        health = requests.get(process.url + "health", verify=process.tls_cert, timeout=9)
        assert health.status_code == 200
        assert post(process, api_key="unknown").status_code == 401
        assert process.stop() == 0
        assert re.findall(rf"^{TIME} (\d+)", process.log, re.M) == ["401"]


def test_verbose_adds_each_call_indented(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path, "--verbose") as process:
        assert post(process).status_code == 200
        assert process.stop() == 0
        members = '    type: "track"\n    user_id: "u1"\n    event: "Signed Up"\n'
        assert f" ms\n{members}" in process.log


def test_verbose_does_not_indent_each_level_of_a_deep_call(tmp_path: Path) -> None:
    deep: list[Any] = [1] * 30_000
    for _ in range(480):
        deep = [deep]
    with RunningReceiver(tmp_path, "--verbose") as process, TlsClient(process) as client:
        assert client.status(request({**TRACK, "properties": {"a": deep}})) == 200
        # The call takes about 90 KB, or 60 KB without the spaces. If every level were indented, it
        # would take over 50 MB.
        process.flush_log()
        assert 60_000 < len(process.log) < 1_000_000


def spoil(call: receiver.Call) -> None:
    """Put into a call what JSON, or even repr(), cannot express."""
    call.raw["object"] = object()
    call.raw["unprintable"] = Unprintable()
    call.raw[("a", "tuple")] = 1  # type: ignore[index]
    call.raw["cycle"] = call.raw
    nested: list[Any] = []
    for _ in range(200_000):
        nested = [nested]
    call.raw["too deep"] = nested


def test_a_call_that_a_destination_has_spoiled_is_still_answered_and_logged(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Careless(receiver.Destination):
        def track(self, *arguments: Any) -> None:
            spoil(arguments[-1])

    with receiver.serve(Careless(), port=0, verbose=True) as server:
        assert post(server).status_code == 200
    assert re.search(r" 200 track demo u1 'Signed Up' ", capfd.readouterr().err)


@cases(
    "result, status",
    {
        "an error": (ValueError(FORGED), 500),
        "a refusal": (receiver.Refusal(400, FORGED), 400),
    },
)
def test_nothing_that_a_destination_raises_or_a_client_sends_forges_a_line(
    capfd: pytest.CaptureFixture[str], result: Exception, status: int
) -> None:
    with receiver.serve(Recorder(result), port=0) as server:
        assert post(server, {**TRACK, "user_id": FORGED}).status_code == status
    log = capfd.readouterr().err
    assert re.search(rf"^{TIME} {status} track demo .* 'Signed Up' ", log, re.M)
    assert not re.search("^Forged", log, re.M)
    assert "\x1b" not in log


def test_a_very_long_message_is_cut_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    refusal = receiver.Refusal(400, "x" * 1_000_000)
    with receiver.serve(Recorder(refusal), port=0) as server:
        assert post(server).status_code == 400
    assert max(map(len, capfd.readouterr().err.splitlines())) < 2000


def test_an_indented_traceback_follows_the_log_line_of_an_internal_error(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with receiver.serve(Recorder(ZeroDivisionError("no")), port=0) as server:
        assert post(server).status_code == 500
    pattern = r" ms Internal error\n    Traceback \(most recent call last\):\n(    .*\n)+"
    found = re.search(pattern, capfd.readouterr().err)
    assert found
    assert found[0].endswith("    ZeroDivisionError: no\n")


def test_a_call_whose_client_did_not_wait_is_logged(capfd: pytest.CaptureFixture[str]) -> None:
    go_on = threading.Event()

    def wait() -> None:
        assert go_on.wait(9)

    slow = Recorder(wait)
    with receiver.serve(slow, port=0) as server, TlsClient(server) as client:
        client.send(request())
        wait_until(lambda: slow.calls)
        client.reset()
        go_on.set()
    log = capfd.readouterr().err
    assert re.search(r" 200 track demo u1 'Signed Up' \S+ ms$", log, re.M)
    assert "Traceback" not in log


def test_no_api_key_appears_in_the_keys_file_the_log_or_a_reply(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    api_key = add_key("Acme", "--api-keys", keys).stdout.strip()
    with RunningReceiver(tmp_path, "--api-keys", keys, "--verbose") as process:
        replies = [
            post(process, api_key=api_key),
            post(process, api_key=api_key + "x"),
            post(process, {"type": "x"}, api_key),
        ]
        with TlsClient(process) as client:
            data = head(f"Authorization : {basic(api_key)}", api_key=None)
            malformed = client.send(data).read_reply()
        assert process.stop() == 0
        texts = [process.log, keys.read_text(), str(malformed)]
        texts += [f"{reply.headers}{reply.text}" for reply in replies]
    assert [reply.status_code for reply in replies] == [200, 401, 501]
    for secret in (api_key, basic(api_key).split()[1]):
        assert [text for text in texts if secret in text] == []


@on_linux
def test_requests_succeed_even_if_the_log_is_on_a_full_disk(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path, log="/dev/full") as process, TlsClient(process) as client:
        assert {client.status(request()) for _ in range(500)} == {200}
        assert process.stop() == 0


def test_a_stalled_reader_of_the_log_delays_nothing_and_dropped_lines_are_counted(
    tmp_path: Path,
) -> None:
    reading, writing = os.pipe()
    with RunningReceiver(tmp_path, "--verbose", stderr=writing) as process:
        os.close(writing)
        with TlsClient(process) as client:
            # 10 MB, which is more than the buffer and the write in progress can hold together.
            for _ in range(250):
                assert client.status(request({**TRACK, "note": "x" * 40_000})) == 200
        # The main thread logs that maintenance is on. The stalled log must not block that thread.
        process.send_signal(signal.SIGUSR1)
        wait_until(lambda: post(process).status_code == 503)
        process.send_signal(signal.SIGTERM)
        with open(reading, "rb") as log:
            text = log.read().decode()
        assert process.popen.wait(15) == 0
    found = re.search(rf"^{TIME} Log lines dropped: (\d+)$", text, re.M)
    assert found
    # Only entries of the 250 calls are dropped: when one of them no longer fits into the buffer,
    # there is still room for the short lines that follow. Such an entry has five lines: one for the
    # request, and one for each member of the call.
    calls_written = text.count("    note: ")
    assert int(found[1]) == 5 * (250 - calls_written)


@pytest.mark.parametrize("stream", ["stdout", "stderr", "both"])
def test_it_serves_even_if_standard_output_or_error_is_closed(tmp_path: Path, stream: str) -> None:
    closing = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-"}[stream]
    # RunningReceiver would read the port from standard output, so it is chosen here.
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = f'exec "$@" --port {port} --database "{tmp_path}/calls.db" {closing}'
    process = subprocess.Popen(
        ["sh", "-c", script, "sh", *RECEIVER],
        cwd=HERE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def accepts_a_call() -> bool:
        url = f"https://localhost:{port}/"
        usual: dict[str, Any] = {"auth": ("segment", ""), "verify": str(CERT), "timeout": 9}
        with contextlib.suppress(requests.ConnectionError):
            return requests.post(url, json=TRACK, **usual).status_code == 200
        return False

    try:
        wait_until(accepts_a_call)
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait()


# ---- All connections -----------------------------------------------------------------------------


def test_beyond_max_connections_the_longest_idle_one_makes_room(tmp_path: Path) -> None:
    with (
        RunningReceiver(tmp_path, "--max-connections", "3") as process,
        contextlib.ExitStack() as stack,
    ):
        first, second, third = [stack.enter_context(TlsClient(process)) for _ in range(3)]
        for client in (second, first, third):
            assert client.status(request()) == 200
        assert stack.enter_context(TlsClient(process)).status(request()) == 200
        assert second.is_closed()
        assert [first.status(request()), third.status(request())] == [200, 200]


def test_if_no_connection_is_idle_the_oldest_without_a_complete_head_makes_room(
    tmp_path: Path,
) -> None:
    with (
        RunningReceiver(tmp_path, "--max-connections", "3") as process,
        contextlib.ExitStack() as stack,
    ):
        oldest = stack.enter_context(connect(process))
        # Connections are accepted in order, so after this reply, the oldest has been accepted.
        assert post(process).status_code == 200
        request_line, line_end, rest = request().partition(b"\r\n")
        half_head = stack.enter_context(TlsClient(process))
        half_head.send(request_line + line_end)
        busy = stack.enter_context(TlsClient(process))
        assert busy.status(head("Expect: 100-continue", length=len(TRACK_JSON))) == 100
        # The next connection has to wait until the oldest one is old enough to be evicted.
        assert stack.enter_context(TlsClient(process)).status(request()) == 200
        assert oldest.recv(1) == b""
        assert half_head.status(rest) == 200
        assert busy.status(TRACK_JSON) == 200
        assert process.stop() == 0
        assert "Connection from" not in process.log  # the eviction is not logged as an error


def test_a_connection_evicted_in_the_middle_of_its_head_gets_no_reply_and_no_log_line(
    tmp_path: Path,
) -> None:
    with RunningReceiver(tmp_path, "--max-connections", "1") as process:
        with TlsClient(process) as half_head:
            half_head.send(b"POST / HTTP/1.1\r\n")
            with TlsClient(process) as client:
                assert client.status(request()) == 200
            assert half_head.is_closed()
        assert process.stop() == 0
        assert re.findall(rf"^{TIME} (\S+)", process.log, re.M) == ["200"]


def test_new_connections_wait_if_all_others_are_busy(
    tmp_path: Path, pool: ThreadPoolExecutor
) -> None:
    with (
        RunningReceiver(tmp_path, "--max-connections", "2") as process,
        TlsClient(process) as first,
        TlsClient(process) as second,
    ):
        for client in (first, second):  # the 100 proves that the server has read both heads
            assert client.status(head("Expect: 100-continue", length=len(TRACK_JSON))) == 100
        third = pool.submit(post, process)
        # Longer than MIN_EVICTION_AGE, so being new no longer protects the first two.
        time.sleep(1.5)
        assert not third.done()
        assert first.status(TRACK_JSON) == 200
        assert third.result().status_code == 200
        assert second.status(TRACK_JSON) == 200


def test_many_silent_connections_do_not_shut_out_a_sender(tmp_path: Path) -> None:
    with (
        RunningReceiver(tmp_path, "--max-connections", "50") as process,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(120):
            stack.enter_context(connect(process))
        for _ in range(5):
            assert post(process).status_code == 200


@on_linux
def test_when_descriptors_run_out_the_longest_idle_connection_makes_room(tmp_path: Path) -> None:
    import resource

    with RunningReceiver(tmp_path) as process, contextlib.ExitStack() as stack:
        assert post(process).status_code == 200
        used = process.open_files()
        hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[1]
        room = 5  # for only a few more connections
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (used + room, hard))
        first, second = [stack.enter_context(TlsClient(process)) for _ in range(2)]
        assert second.status(request()) == 200
        for _ in range(20):
            assert first.status(request()) == 200  # so it has not been idle for long
            assert stack.enter_context(TlsClient(process)).status(request()) == 200
        assert second.is_closed()
        assert first.status(request()) == 200
        assert process.stop() == 0
        assert "Traceback" not in process.log
        assert "Cannot accept more connections" in process.log


@cases(
    "error",
    {"no more threads": RuntimeError("can't start new thread"), "no memory": MemoryError()},
)
def test_if_no_thread_can_be_started_the_server_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    import _thread

    def fail(*_: object) -> NoReturn:
        raise error

    with receiver.serve(Recorder(), port=0) as server:
        with monkeypatch.context() as patch:
            patch.setattr(_thread, "start_new_thread", fail)
            with connect(server) as sock:
                assert sock.recv(1) == b""
        assert post(server).status_code == 200
    assert caplog.text.count("Cannot accept more connections") == 1
    assert "Traceback" not in caplog.text


def test_if_a_thread_can_be_started_after_an_idle_connection_has_ended_the_new_one_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import _thread

    start = _thread.start_new_thread

    with receiver.serve(Recorder(), port=0) as server, TlsClient(server) as idle:
        assert idle.status(request()) == 200

        def fail_while_the_idle_connection_is_open(*arguments: Any) -> int:
            if not idle_connection.hung_up:
                raise RuntimeError("can't start new thread")
            return start(*arguments)

        [idle_connection] = server.connections
        monkeypatch.setattr(_thread, "start_new_thread", fail_while_the_idle_connection_is_open)
        assert post(server).status_code == 200
        assert idle.is_closed()


def test_a_connection_slot_is_released_even_if_closing_the_connection_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> NoReturn:
        raise MemoryError

    # `drain` runs when a connection closes. With only one slot, a leak would block the second post.
    monkeypatch.setattr(receiver.Connection, "drain", fail)
    with receiver.serve(Recorder(), port=0, max_connections=1) as server:
        for _ in range(3):
            assert post(server).status_code == 200
        wait_until(lambda: not server.connections)


@on_linux
def test_the_limit_on_open_files_is_raised_to_max_connections_plus_100(tmp_path: Path) -> None:
    import resource

    def lower_limit() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))

    with RunningReceiver(tmp_path, preexec_fn=lower_limit) as process:
        assert resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[0] == 1000 + 100


@on_linux
def test_an_unlimited_number_of_open_files_stays_unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    def fail(*_: object) -> NoReturn:
        raise AssertionError("the limit must not be changed")

    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    monkeypatch.setattr(resource, "setrlimit", fail)
    receiver.raise_file_limit(1000)


def test_one_sighup_reads_the_certificate_only_once(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path) as process:
        process.send_signal(signal.SIGHUP)
        process.wait_for_log("Reloaded the certificate")
        time.sleep(0.5)  # several rounds of the accept thread
        assert process.stop() == 0
        assert process.log.count("Reloaded the certificate") == 1


# The accept thread runs service_actions in every round. The handler breaks that method only when
# the first track call arrives, so that the server starts normally.
BREAKS_THE_ACCEPT_THREAD = """
import receiver

class BreaksTheServer(receiver.Destination):
    def track(self, *arguments):
        def fail(server):
            raise ZeroDivisionError("gone")

        receiver.Server.service_actions = fail

receiver.main(BreaksTheServer())
"""


def test_if_the_accept_thread_ends_unexpectedly_main_ends_with_status_1(tmp_path: Path) -> None:
    with run_program(tmp_path, BREAKS_THE_ACCEPT_THREAD) as process:
        post(process)
        assert process.popen.wait(15) == 1
        assert "The receiver has failed" in process.log


ENDS_THE_WRITER = """
import receiver

class Broken(receiver.GroupCommit):
    def write(self, calls):
        raise SystemExit

receiver.STORE_TIMEOUT = 1
receiver.main(Broken())
"""


def test_if_the_writer_ends_unexpectedly_main_ends_with_status_1(tmp_path: Path) -> None:
    with run_program(tmp_path, ENDS_THE_WRITER) as process:
        assert post(process).status_code == 503
        assert process.popen.wait(15) == 1
        assert "the destination has failed" in process.log


def test_a_server_whose_destination_fails_stops_listening_but_keeps_its_connections(
    caplog: pytest.LogCaptureFixture,
) -> None:
    destination = Recorder()
    with receiver.serve(destination, port=0) as server, TlsClient(server) as client:
        assert client.status(request()) == 200
        destination.failed = True
        wait_until(lambda: server.failed)
        with pytest.raises(requests.ConnectionError):
            post(server)
        assert client.status(request()) == 200
    assert "The receiver has failed" in caplog.text


def test_maintenance_is_toggled_by_sigusr1(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path, "--maintenance") as process:
        reply = post(process)
        assert (reply.status_code, reply.headers["Retry-After"]) == (503, "5")
        process.send_signal(signal.SIGUSR1)
        process.wait_for_log("Maintenance is off")
        assert post(process).status_code == 200
        process.send_signal(signal.SIGUSR1)
        process.wait_for_log("Maintenance is on")
        assert post(process).status_code == 503


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: str(number.name)
)
def test_sigterm_and_sigint_end_the_process_with_status_0_despite_idle_connections(
    tmp_path: Path, number: signal.Signals
) -> None:
    with (
        RunningReceiver(tmp_path) as process,
        TlsClient(process) as idle,
        TlsClient(process) as silent,
        connect(process) as without_tls,
    ):
        assert idle.status(request()) == 200
        started = time.monotonic()
        assert process.stop(number) == 0
        assert time.monotonic() - started < receiver.SHUTDOWN_GRACE
        assert idle.is_closed()
        assert silent.is_closed()
        assert without_tls.recv(1) == b""


def test_stopping_finishes_the_requests_in_flight() -> None:
    arrived = threading.Event()
    go_on = threading.Event()

    def wait() -> None:
        arrived.set()
        assert go_on.wait(9)

    with receiver.serve(Recorder(wait), port=0) as server, ThreadPoolExecutor(2) as pool:
        reply = pool.submit(post, server)
        assert arrived.wait(9)
        stopping = pool.submit(server.stop)
        wait_until(lambda: server.stopping)
        go_on.set()
        assert reply.result().status_code == 200
        assert reply.result().headers["Connection"] == "close"
        stopping.result()


def test_closing_ends_even_if_the_client_keeps_tls_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_until_the_end(tls: ssl.SSLSocket) -> None:
        while socket.socket.recv(tls, 65_536):
            pass

    # Python cannot send a flood of key updates, during which the real `unwrap` does not return.
    monkeypatch.setattr(ssl.SSLSocket, "unwrap", read_until_the_end)
    monkeypatch.setattr(receiver, "LINGER", 0.2)
    with receiver.serve(Recorder(), port=0) as server, TlsClient(server) as client:
        assert client.status(request(TRACK, "Connection: close")) == 200
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):  # once the server has closed the connection
            while time.monotonic() < started + 10:
                socket.socket.sendall(client.tls, b"x" * 1000)
        assert time.monotonic() - started < 5
        wait_until(lambda: not server.connections)


def test_a_request_that_arrives_after_the_server_has_hung_up_is_not_handled() -> None:
    destination = Recorder()
    with receiver.serve(destination, port=0) as server, TlsClient(server) as client:
        assert client.status(request()) == 200
        [connection] = server.connections
        # As if another thread had hung up just before this connection's thread woke up.
        connection.hung_up = True
        client.send(request())
        assert client.is_closed()
    assert len(destination.calls) == 1


def test_stopping_while_a_connection_is_being_set_up_hands_no_call_to_the_destination(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starting = threading.Event()
    go_on = threading.Event()
    setup = receiver.Connection.setup

    def slow_setup(connection: receiver.Connection) -> None:
        starting.set()
        assert go_on.wait(9)
        setup(connection)

    monkeypatch.setattr(receiver.Connection, "setup", slow_setup)
    destination = Recorder()
    with receiver.serve(destination, port=0) as server, ThreadPoolExecutor(1) as pool:
        reply = pool.submit(post, server)
        assert starting.wait(9)
        server.stop()
        go_on.set()
        with pytest.raises(requests.ConnectionError):
            reply.result()
    assert destination.calls == []


def test_stopping_under_load_loses_no_acknowledged_call(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path) as process, Load(process, "load", 8) as load:
        load.wait_for_acknowledged(200)
        assert process.stop() == 0
    assert set(load.other_statuses) <= {503}
    assert load.acknowledged <= set(process.message_ids())
    assert "Traceback" not in process.log


def test_a_request_that_is_still_incomplete_after_the_shutdown_grace_is_503(
    tmp_path: Path,
) -> None:
    with RunningReceiver(tmp_path) as process, TlsClient(process) as client:
        expecting = head("Expect: 100-continue", length=len(TRACK_JSON))
        assert client.status(expecting) == 100
        started = time.monotonic()
        assert process.stop() == 0
        grace = receiver.SHUTDOWN_GRACE
        assert grace <= time.monotonic() - started < grace + 3
        reply = client.read_reply()
        assert (reply.status, reply.message) == (503, "Shutting down")


HANGS_IN_CLOSE = """
import receiver, time

class Hanging(receiver.Destination):
    def track(self, *arguments):
        pass

    def close(self):
        time.sleep(60)

receiver.FORCED_EXIT_AFTER = 1
receiver.main(Hanging())
"""


def test_the_process_is_ended_by_force_if_its_destination_hangs_in_close(tmp_path: Path) -> None:
    # By default, systemd, Docker and Kubernetes give a process at least 10 seconds to end. The
    # receiver must be faster. HANGS_IN_CLOSE lowers its limit to 1 second.
    assert receiver.FORCED_EXIT_AFTER < 10
    with run_program(tmp_path, HANGS_IN_CLOSE) as process:
        assert post(process).status_code == 200
        started = time.monotonic()
        assert process.stop() == 0
        assert 1 <= time.monotonic() - started < 4
        assert "ending the process by force" in process.log


STARTS_A_THREAD_IN_ITS_CONSTRUCTOR = """
import receiver, sys, threading, time
from pathlib import Path

class Threaded(receiver.Destination):
    def __init__(self):
        threading.Thread(target=time.sleep, args=[60], daemon=True).start()

    def track(self, *arguments):
        pass

    def close(self):
        print("Closing", file=sys.stderr, flush=True)
        while not Path("may-close").exists():
            time.sleep(0.01)

receiver.main(Threaded())
"""


def test_repeated_signals_do_not_interrupt_the_shutdown(tmp_path: Path) -> None:
    # `main` blocks the signals in its own thread and in those that start later, and fetches them
    # with sigwait. The thread that the constructor starts is older and does not block them. If it
    # receives a signal, Python runs `redirect_signal` in the main thread, in the middle of the
    # shutdown. That must neither abort the shutdown nor delay it.
    with run_program(tmp_path, STARTS_A_THREAD_IN_ITS_CONSTRUCTOR) as process:
        process.send_signal(signal.SIGTERM)
        process.wait_for_log("Closing")
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGINT, signal.SIGTERM):
            process.send_signal(number)
        (tmp_path / "may-close").touch()
        assert process.popen.wait(10) == 0
        assert "Traceback" not in process.log


RUNS_IN_A_THREAD = """
import receiver, threading

thread = threading.Thread(target=receiver.main)
thread.start()
thread.join()
"""


def test_main_also_serves_outside_the_main_thread_where_no_signal_handler_can_be_set(
    tmp_path: Path,
) -> None:
    with run_program(tmp_path, RUNS_IN_A_THREAD) as process:
        assert post(process).status_code == 200


# The only thread that is started during the shutdown is the timer that ends the process by force if
# the shutdown takes too long.
STARTS_NO_TIMER = """
import receiver, threading

def fail(timer):
    raise RuntimeError("can't start new thread")

threading.Timer.start = fail
receiver.main()
"""


def test_stopping_succeeds_even_if_no_more_threads_can_be_started(tmp_path: Path) -> None:
    with run_program(tmp_path, STARTS_NO_TIMER) as process:
        assert post(process).status_code == 200
        assert process.stop() == 0
        assert "Traceback" not in process.log


HANGS_IN_A_HANDLER = """
import receiver, time

class Hanging(receiver.Destination):
    def identify(self, *arguments):
        pass

    def track(self, *arguments):
        time.sleep(60)

receiver.main(Hanging())
"""


def test_a_handler_that_hangs_does_not_keep_the_process_alive(tmp_path: Path) -> None:
    with run_program(tmp_path, HANGS_IN_A_HANDLER) as process, TlsClient(process) as client:
        client.send(request())
        assert post(process, SAMPLES["identify"]).status_code == 200  # others are still answered
        started = time.monotonic()
        assert process.stop() == 0
        longest = receiver.SHUTDOWN_GRACE + receiver.REPLY_GRACE + 2
        assert time.monotonic() - started < longest
        assert "by force" not in process.log


# ---- TLS -----------------------------------------------------------------------------------------


def make_certificate(folder: Path, name: str, algorithm: str = "ec") -> tuple[Path, Path]:
    """Make a self-signed certificate for localhost, and return its file and that of its key."""
    cert = folder / f"{name}.pem"
    key = folder / f"{name}-key.pem"
    options = {
        "ec": ["-pkeyopt", "ec_paramgen_curve:P-256"],
        "rsa": ["-pkeyopt", "rsa_keygen_bits:2048"],
    }
    words = ["openssl", "req", "-x509", "-newkey", algorithm, *options[algorithm], "-nodes"]
    words += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    command(*words, "-keyout", key, "-out", cert, check=True)
    return cert, key


@pytest.mark.parametrize("algorithm", ["ec", "rsa"])
def test_a_private_key_of_another_certificate_is_refused(tmp_path: Path, algorithm: str) -> None:
    cert, _ = make_certificate(tmp_path, "one")
    _, other_key = make_certificate(tmp_path, "other", algorithm)
    done = command(*RECEIVER, "--tls-cert", cert, "--tls-key", other_key)
    message = f"{cert}, {other_key}: the private key does not belong to the certificate"
    assert (done.returncode, done.stderr) == (2, f"receiver.py: {message}\n")


@pytest.mark.parametrize("option", ["tls_cert", "tls_key"])
def test_a_certificate_or_private_key_that_cannot_be_read_is_named(
    option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"tls_cert": str(CERT), "tls_key": str(CERT_KEY)}
    path = files[option]
    # Root may read any file, so file permissions cannot show this.
    monkeypatch.setattr(os, "access", lambda file, mode: file != path)
    with pytest.raises(receiver.ConfigurationError, match=f"^{re.escape(path)}: Permission"):
        receiver.serve(Recorder(), port=0, **files)


def test_sighup_reads_the_certificate_again_without_dropping_a_connection(tmp_path: Path) -> None:
    cert, key = make_certificate(tmp_path, "one")
    new_cert, new_key = make_certificate(tmp_path, "two")
    with RunningReceiver(tmp_path, "--tls-cert", cert, "--tls-key", key) as process:
        process.tls_cert = str(cert)
        with TlsClient(process) as old:
            shutil.copy(new_key, key)
            shutil.copy(new_cert, cert)
            process.send_signal(signal.SIGHUP)
            process.wait_for_log("Reloaded the certificate")
            process.tls_cert = str(new_cert)
            with TlsClient(process) as new:
                assert new.status(request()) == 200
            assert old.status(request()) == 200


@cases(
    "break_file",
    {
        "empty": lambda path: path.write_text(""),
        "junk": lambda path: path.write_text("junk"),
        "missing": Path.unlink,
        "a FIFO": replace_with_fifo,
    },
)
def test_a_certificate_that_cannot_be_used_leaves_the_old_one_in_force(
    tmp_path: Path, break_file: Callable[[Path], object]
) -> None:
    cert = tmp_path / "one.pem"
    key = tmp_path / "one-key.pem"
    shutil.copy(CERT, cert)
    shutil.copy(CERT_KEY, key)
    with RunningReceiver(tmp_path, "--tls-cert", cert, "--tls-key", key) as process:
        break_file(cert)
        process.send_signal(signal.SIGHUP)
        process.wait_for_log("Keeping the previous certificate: ")
        assert post(process).status_code == 200
        assert process.stop() == 0


def tls_context(cert: str, version: str, ciphers: str) -> ssl.SSLContext:
    """The context of a client that speaks only this version of TLS, with these ciphers."""
    context = ssl.create_default_context(cafile=cert)
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion[version]
    context.maximum_version = ssl.TLSVersion[version]
    return context


@cases(
    "version, ciphers",
    {
        "TLS 1.0": ("TLSv1", "ALL"),
        "TLS 1.1": ("TLSv1_1", "ALL"),
        "no forward secrecy": ("TLSv1_2", "kRSA"),
        "CBC with SHA-1": ("TLSv1_2", "ECDHE+SHA"),
        "no authentication": ("TLSv1_2", "aNULL"),
    },
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_old_version_or_a_weak_cipher_is_refused_with_an_alert(
    tmp_path: Path, version: str, ciphers: str
) -> None:
    cert, key = make_certificate(tmp_path, "rsa", "rsa")  # kRSA needs such a certificate
    with receiver.serve(Recorder(), port=0, tls_cert=cert, tls_key=key) as server:
        assert post(server).status_code == 200
        with pytest.raises(ssl.SSLError, match="alert"):
            TlsClient(server, tls_context(server.tls_cert, version, ciphers))


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_tls_1_2_and_1_3_are_spoken_with_forward_secrecy(
    running: RunningReceiver, version: str
) -> None:
    with TlsClient(running, tls_context(running.tls_cert, version, "ALL")) as client:
        cipher = client.tls.cipher()
        assert str(client.tls.version()).replace(".", "_") == version
        assert cipher
        # Forward secrecy: all ciphers of TLS 1.3, and those of TLS 1.2 that begin with ECDHE.
        assert cipher[0].startswith(("TLS_", "ECDHE-"))


def test_http_1_1_is_chosen_by_alpn(running: RunningReceiver) -> None:
    context = ssl.create_default_context(cafile=running.tls_cert)
    context.set_alpn_protocols(["h2", "http/1.1"])
    with TlsClient(running, context) as client:
        assert client.tls.selected_alpn_protocol() == "http/1.1"


def test_tls_compression_is_switched_off() -> None:
    with receiver.serve(Recorder(), port=0) as server:
        assert server.tls_context.options & ssl.OP_NO_COMPRESSION


def test_renegotiation_is_refused(running: RunningReceiver) -> None:
    address = urlsplit(running.url).netloc
    # The input "R" makes s_client ask for a renegotiation. TLS 1.3 has none, hence -tls1_2.
    shown = command("openssl", "s_client", "-tls1_2", "-connect", address, input="R\n", timeout=10)
    assert "no renegotiation" in shown.stderr


# ---- Hostile clients -----------------------------------------------------------------------------


def stall_in_handshake(process: RunningReceiver) -> bytes:
    """What the server sends to a client that stops in the middle of its handshake."""
    with connect(process) as sock:
        sock.sendall(b"\x16\x03\x01\x02")
        return sock.recv(65_536)


def stall_in_body(process: RunningReceiver) -> bytes:
    """What the server sends to a client that stops in the middle of a body."""
    with TlsClient(process) as client:
        return client.send(head(length=5000) + b'{"type"').tls.recv(65_536)


def trickle_a_head(process: RunningReceiver) -> bytes:
    """What the server sends to a client that sends a byte of a head five times a second."""
    with TlsClient(process) as client:
        client.tls.settimeout(0.2)
        client.send(b"POST /")
        for _ in range(50):
            with contextlib.suppress(TimeoutError):  # no reply within 0.2 seconds
                return client.tls.recv(65_536)
            client.send(b"a")
    return b""


@on_linux
def test_clients_that_stall_or_trickle_are_disconnected_and_do_not_disturb_others(
    tmp_path: Path,
) -> None:
    with RunningReceiver(tmp_path, "--timeout", "2") as process:
        assert post(process).status_code == 200
        wait_until(lambda: process.threads() <= THREADS_AT_REST)
        files_at_rest = process.open_files()
        with ThreadPoolExecutor(300) as clients, Load(process, "normal", 1) as load:
            started = time.monotonic()
            handshakes = [clients.submit(stall_in_handshake, process) for _ in range(60)]
            bodies = [clients.submit(stall_in_body, process) for _ in range(60)]
            trickles = [clients.submit(trickle_a_head, process) for _ in range(180)]
            for handshake in handshakes:
                assert handshake.result() == b""
            for slow_request in [*bodies, *trickles]:
                assert slow_request.result().startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - started < 8
        # Meanwhile, a normal client was served. Afterwards, everything is released.
        assert len(load.acknowledged) > 100
        assert load.other_statuses == []
        wait_until(
            lambda: process.threads() <= THREADS_AT_REST and process.open_files() <= files_at_rest
        )


def count_unread_bytes(server_port: int, client_port: int) -> int | None:
    """How many bytes a server has not read from a connection, or None if the connection is gone.

    A line of /proc/net/tcp has the local address, the remote address, the state, and the lengths of
    the send queue and the receive queue, all in hexadecimal. 0100007F is 127.0.0.1.
    """
    pattern = rf":{server_port:04X} 0100007F:{client_port:04X} \S+ \w+:(\w+)"
    found = re.search(pattern, Path("/proc/net/tcp").read_text())
    return int(found[1], 16) if found else None


@on_linux
def test_a_client_that_stops_reading_replies_is_disconnected(
    impatient: RunningReceiver,
) -> None:
    with TlsClient(impatient) as client:
        server_port = urlsplit(impatient.url).port
        assert server_port
        client_port = client.tls.getsockname()[1]
        assert client.status(request()) == 200
        # Send requests, but never read the replies. Each reply is a 404 that quotes the path, so
        # they soon fill all buffers. Then the server can no longer write, and stops reading. It
        # counts as stopped once its receive queue has held data for 0.3 seconds without a break.
        last_empty = time.monotonic()
        while time.monotonic() - last_empty < 0.3:
            if count_unread_bytes(server_port, client_port):
                time.sleep(0.01)
            else:
                last_empty = time.monotonic()
                client.send(head(target="/" + "x" * 70, length=0) * 50)
        wait_until(lambda: count_unread_bytes(server_port, client_port) is None, 8)
    assert post(impatient).status_code == 200


def track_with(properties: str) -> bytes:
    call = f'{{"type": "track", "user_id": "u", "event": "e", "properties": {properties}}}'
    return request(call.encode())


def track_with_keys(parts: Sequence[str], parts_per_key: int) -> bytes:
    """A track call with a property for every key that can be formed from this many parts."""
    keys = ("".join(key) for key in itertools.product(parts, repeat=parts_per_key))
    return track_with("{" + ",".join(f'"{key}":0' for key in keys) + "}")


@cases(
    "data, status",
    {
        "arrays, 10,000 levels": (track_with("[" * 10_000 + "]" * 10_000), 400),
        "objects, 10,000 levels": (track_with('{"a":' * 10_000 + "1" + "}" * 10_000), 400),
        "arrays without an end": (track_with("[" * 500_000), 400),
        "50,000 keys": (track_with_keys("0123456789abcde", parts_per_key=4), 200),
        "16,384 keys, many of which are the same in snake_case": (
            track_with_keys(("a-", "a ", "a_", "A"), parts_per_key=7),
            200,
        ),
        "one key 80,000 times": (track_with("{" + '"a":0,' * 80_000 + '"a":0}'), 200),
        "a key with 250,000 capitals": (track_with('{"' + "aB" * 250_000 + '": 1}'), 200),
        "escapes": (track_with('{"a": "' + r"\u0000" * 80_000 + '"}'), 200),
        "an unpaired surrogate after many pairs": (
            track_with('{"a": "' + r"\ud83d\ude00" * 40_000 + r'\ud83d"}'),
            400,
        ),
        "long integers": (track_with('{"a": [' + ("9" * 300 + ",") * 1700 + "1]}"), 200),
        "a long fraction": (track_with('{"a": 0.' + "1" * 500_000 + "}"), 200),
        "a very long integer": (track_with('{"a": ' + "1" * 500_000 + "}"), 400),
        "an unterminated string of quotes": (track_with('"' + r"\"" * 250_000), 400),
        # RFC 2231 lets a parameter be split into numbered sections, such as charset*0. A parser
        # that implements this would convert the digits to an integer. To receiver.py, the name is
        # merely unknown.
        "a parameter whose section number has 5,000 digits": (
            request(TRACK, f"{JSON_TYPE}; charset*{'0' * 5000}=utf-8"),
            200,
        ),
        "many parameters": (request(TRACK, JSON_TYPE + "; a=b" * 9000), 200),
        "an unclosed quotation mark": (request(TRACK, f'{JSON_TYPE}; "' + ";" * 60_000), 415),
        "many codings": (request(TRACK, "Content-Encoding: " + "x," * 30_000), 415),
        "deep settings": (
            request(TRACK, "X-Segment-Settings: " + base64.b64encode(b"[" * 40_000).decode()),
            400,
        ),
        "60,000 commas in Connection": (request(TRACK, "Connection: " + "," * 60_000), 200),
        "whitespace in a header": (request(TRACK, "X: a" + " " * 60_000 + "b"), 200),
        "whitespace before a control character": (
            request(TRACK, "X:" + " " * 60_000 + "\1"),
            400,
        ),
        "many expectations": (request(TRACK, "Expect: " + "100-continue," * 4000), 200),
    },
)
def test_a_heavy_request_is_answered_within_a_second(
    running: RunningReceiver, data: bytes, status: int
) -> None:
    seconds = []
    for _ in range(3):  # the best of three, because other programs may be running
        with TlsClient(running) as client:
            started = time.monotonic()
            assert client.status(data) == status
            seconds.append(time.monotonic() - started)
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1


@cases(
    "value",
    {
        "SQL": "'); drop table calls; --",
        "a quotation mark": '"',
        "control characters": "\u202e\x1b[m\r\nForged",
        "80,000 characters": "x" * 80_000,
        "an emoji and a noncharacter": "🙂\uffff",
        "a format specifier": "%s",
    },
)
def test_any_text_in_an_id_is_stored_as_it_was_sent_and_forges_no_line(
    running: RunningReceiver, value: str
) -> None:
    ids = dict.fromkeys(("user_id", "anonymous_id", "message_id", "group_id"), value)
    call = {"type": "group", "traits": {"t": value}, **ids}
    assert post(running, call).status_code == 200
    query = "select user_id, anonymous_id, call from calls where message_id = ?"
    [found] = rows(running.database, query, value)
    assert found[:2] == (value, value)
    assert json.loads(found[2]) == call
    running.flush_log()  # waits until the line is in the log
    assert not re.search("^Forged|\x1b", running.log, re.M)


VALID = [
    request(),
    request(TRACK, "Connection: keep-alive", *SEGMENT_HEADERS),
    head(method="GET", target="/health"),
]
# Bytes that are put into valid requests.
PARTS = [
    b"",
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b":",
    b"\t",
    b"9",
    b"\xff",
    b"\r\n\r\n",
    b"HTTP/1.0",
    b"Host: x\r\n",
    b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Expect: 100-continue\r\n",
    b"[",
    b'"',
    b"{",
    rb"\ud800",
    b"1e999",
]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return the data with a few bytes missing, changed or added."""
    mutated = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(mutated) + 1)
        removed = rng.choice((0, 0, 1, 1, 2, 30))
        mutated[at : at + removed] = rng.choice((rng.choice(PARTS), rng.randbytes(2)))
    return bytes(mutated)


def mutated_request(rng: random.Random) -> bytes:
    """A valid request with mutations anywhere, or one with mutations only in its body."""
    if rng.random() < 0.6:
        return mutate(rng.choice(VALID), rng)
    return request(mutate(TRACK_JSON, rng))


def test_mutated_heads_raise_nothing_but_refusals() -> None:
    rng = random.Random(4)
    refused = 0
    for _ in range(5000):
        data = mutate(rng.choice(VALID), rng).partition(b"\r\n\r\n")[0]
        try:
            receiver.parse_head(data.decode("latin-1"))
        except receiver.Refusal:  # any other exception fails the test
            refused += 1
    assert 1000 < refused < 4900  # many mutations do damage, but not all


def test_mutated_requests_never_cause_an_internal_error_or_a_partial_reply(
    running: RunningReceiver,
) -> None:
    rng = random.Random(5)
    context = ssl.create_default_context(cafile=running.tls_cert)
    statuses: list[int] = []
    answered = 0
    for _ in range(500):
        with TlsClient(running, context) as client:
            client.send(mutated_request(rng) + mutated_request(rng)).half_close()
            received = []
            while status := client.read_reply().status:  # 0 once the connection has ended
                received.append(status)
            assert client.buffer == b""  # no partial reply
        statuses += received
        answered += bool(received)
    assert answered > 450
    # Mutations cannot cause a 403, 408, 414 or 503. A 500 would be an internal error.
    assert set(statuses) <= {100, 200, 400, 401, 404, 405, 411, 413, 415, 431, 501, 505}


@cases(
    "noise",
    {
        "zeros": b"\0" * 300,
        "random bytes": random.Random(5).randbytes(3000),
        "an SSH banner": b"SSH-2.0-x\r\n",
        "an SSLv2 hello": b"\x80\x2e\x01\0\2",
        "a TLS record that is too long": b"\x16\x03\x01\xff\xff" + b"x" * 70_000,
        "a TLS alert": b"\x15\x03\x03\0\2\2\x28",
    },
)
def test_noise_on_the_port_leaves_one_line_in_the_log(
    running: RunningReceiver, noise: bytes
) -> None:
    before = running.flush_log()
    received = bytearray()
    with connect(running) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(noise)
        sock.shutdown(socket.SHUT_WR)
        while data := sock.recv(9999):
            received += data
    assert b"HTTP" not in received
    [line] = running.lines_after(before, "Connection from")
    assert re.fullmatch(rf"{TIME} Connection from 127\.0\.0\.1 failed: .+", line)


def test_a_client_that_only_probes_the_port_leaves_no_line_in_the_log(
    running: RunningReceiver,
) -> None:
    before = running.flush_log()
    for _ in range(20):
        connect(running).close()
    after = running.flush_log()
    lines = running.log[before:after].splitlines()
    assert [line for line in lines if " mark-" not in line] == []


def test_clients_that_reset_during_the_handshake_leave_no_traceback(
    running: RunningReceiver,
) -> None:
    before = running.flush_log()
    for number in range(300):
        with connect(running) as sock:
            sock.send(b"\x16\x03\x01"[: number % 3])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
    assert post(running).status_code == 200
    after = running.flush_log()
    assert "Traceback" not in running.log[before:after]


@on_linux
def test_mutated_requests_leave_no_threads_files_memory_or_tracebacks_behind(
    tmp_path: Path,
) -> None:
    with RunningReceiver(tmp_path, "--timeout", "1") as process:
        assert post(process).status_code == 200
        wait_until(lambda: process.threads() <= THREADS_AT_REST)
        files_at_rest = process.open_files()
        memory_before = process.memory_mb()
        rng = random.Random(6)
        for _ in range(200):
            with contextlib.suppress(OSError), TlsClient(process) as client:
                client.send(mutated_request(rng))
                if rng.random() < 0.5:
                    client.reset()
        wait_until(
            lambda: process.threads() <= THREADS_AT_REST and process.open_files() <= files_at_rest
        )
        assert process.memory_mb() - memory_before < 30
        assert "Traceback" not in process.log


# ==================================================================================================
# Part 4. Entry points
#
# `main`, called by a program that has its own destination; `serve`, which runs the receiver within
# another program; the command line and its error messages; and adding API keys.
# ==================================================================================================


CONTACTS = """
import receiver

class Contacts(receiver.Destination):
    def identify(self, user_id, traits, call):
        if "email" not in traits:
            raise receiver.Refusal(400, "Missing email address")
        if not traits["email"]:
            raise ZeroDivisionError
        return 202

if __name__ == "__main__":
    receiver.main(Contacts())
"""


def test_the_methods_of_a_destination_decide_how_calls_are_answered(tmp_path: Path) -> None:
    with run_program(tmp_path, CONTACTS) as process:
        process.wait_for_log("^Calls go to Contacts.$")
        for traits, status in (({}, 400), ({"email": "@"}, 202), ({"email": ""}, 500)):
            reply = post(process, {"type": "identify", "user_id": "u", "traits": traits})
            assert reply.status_code == status
        assert post(process).status_code == 501
        process.wait_for_log("^    ZeroDivisionError")


def test_a_program_with_its_own_destination_takes_the_server_options(tmp_path: Path) -> None:
    with run_program(tmp_path, CONTACTS, "--path", "/in", "--max-body", "200") as process:
        assert process.url.endswith("/in")
        assert post(process, {"type": "identify", "x": "x" * 200}).status_code == 413


def test_a_program_with_its_own_destination_has_every_server_option_but_database() -> None:
    with_database = vars(receiver.make_parser(None).parse_args([]))
    without_database = vars(receiver.make_parser(Recorder()).parse_args([]))
    assert with_database.keys() - without_database.keys() == {"database"}


def test_the_help_of_a_program_names_its_own_destination(tmp_path: Path) -> None:
    (tmp_path / "contacts.py").write_text(CONTACTS)
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    shown = command(sys.executable, "contacts.py", "--help", cwd=tmp_path, env=environment).stdout
    assert "usage: contacts.py " in shown
    assert "pass them to Contacts." in shown


OWN_STORE = """
import receiver
receiver.main(receiver.Store("own.db"))
"""


def test_a_program_may_pass_its_own_store(tmp_path: Path) -> None:
    with run_program(tmp_path, OWN_STORE) as process:
        assert post(process).status_code == 200
        process.wait_for_log("^Calls go to Store.$")
    assert (tmp_path / "own.db").exists()


def test_serve_takes_the_server_options_as_keyword_arguments() -> None:
    with receiver.serve(Recorder(), port=0, path="/in", max_body=200) as server:
        assert server.url.endswith("/in")
        assert post(server, {**TRACK, "context": {"title": "x" * 200}}).status_code == 413


def test_serve_answers_until_its_with_block_ends() -> None:
    with receiver.serve(Recorder(), port=0) as server:
        assert post(server).status_code == 200
    with pytest.raises(requests.ConnectionError):
        post(server)


def test_serve_leaves_no_thread_behind() -> None:
    before = set(threading.enumerate())
    with receiver.serve(Recorder(), port=0) as server:
        assert post(server).status_code == 200
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before


def test_serve_finds_keys_beside_receiver_py_but_makes_calls_db_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with receiver.serve(port=0) as server:
        assert post(server).status_code == 200
    assert (tmp_path / "calls.db").exists()


def test_two_servers_on_port_0_have_different_ports() -> None:
    with (
        receiver.serve(Recorder(), port=0) as one,
        receiver.serve(Recorder(), port=0) as other,
    ):
        assert one.url != other.url


class CountsCloses(Recorder):
    """A destination that counts how often it is closed."""

    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_a_server_closes_its_destination_exactly_once() -> None:
    destination = CountsCloses()
    with receiver.serve(destination, port=0) as server:
        server.stop()
        assert destination.closed == 1
    assert destination.closed == 1


def test_a_server_that_cannot_start_does_not_close_the_destination() -> None:
    destination = CountsCloses()
    with receiver.serve(Recorder(), port=0) as server:
        taken = urlsplit(server.url).port
        with pytest.raises(
            receiver.ConfigurationError, match=f"port {taken}: Address already in use"
        ):
            receiver.serve(destination, port=taken)
    assert destination.closed == 0


def test_an_error_in_close_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class FailsToClose(Recorder):
        def close(self) -> None:
            raise ZeroDivisionError

    with receiver.serve(FailsToClose(), port=0):
        pass
    assert "The destination could not be closed" in caplog.text


@cases(
    "destination, message",
    {
        "a string": (
            "contacts:Contacts",
            "destination must be a Destination, not 'contacts:Contacts'",
        ),
        "a class": (
            Recorder,
            f"destination must be a Destination, not {Recorder}; did you forget ()?",
        ),
        "a function": (
            print,
            "destination must be a Destination, not <built-in function print>",
        ),
    },
)
def test_anything_but_a_destination_is_refused(destination: Any, message: str) -> None:
    with pytest.raises(receiver.ConfigurationError, match=f"^{re.escape(message)}$"):
        receiver.serve(destination, port=0)


@cases(
    "options, message",
    {
        "an unknown option": ({"colour": 1}, "unknown option 'colour'"),
        "help": ({"help": True}, "unknown option 'help'"),
        "an option for the command line only": ({"add_key": "x"}, "unknown option 'add_key'"),
        "version": ({"version": True}, "unknown option 'version'"),
        "database with a destination": ({"database": "x"}, "unknown option 'database'"),
        "a number that is too large": ({"port": 70_000}, "argument --port: must be an integer"),
        "a timeout that is not a number": (
            {"timeout": "soon"},
            "argument --timeout: must be a number from",
        ),
        "a flag with a value": ({"quiet": "yes"}, "quiet must be True or False, not 'yes'"),
        "True for an option that takes a number": (
            {"max_body": True},
            "argument --max-body: must be an integer from 1 to 536870912, not 'True'",
        ),
        "a missing certificate": ({"tls_cert": "none.pem"}, "none.pem: No such file"),
        "missing keys": ({"api_keys": "none.json"}, "none.json: No such file"),
    },
)
def test_the_error_from_serve_names_the_option_or_file_that_cannot_be_used(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(receiver.ConfigurationError, match=f"^{message}"):
        receiver.serve(Recorder(), **{"port": 0, **options})


def test_passing_none_or_false_to_serve_is_the_same_as_leaving_the_option_out() -> None:
    with receiver.serve(Recorder(), port=0, quiet=False, path=None) as server:
        assert server.url.endswith("/")
        assert not server.options.quiet


def test_a_configuration_error_is_one_printable_line() -> None:
    error = receiver.ConfigurationError("two\nlines\x1b[31m")
    assert str(error) == "two lines [31m"


# ---- The command line ----------------------------------------------------------------------------


def test_the_first_line_says_where_it_listens(running: RunningReceiver) -> None:
    assert re.fullmatch(r"Listening on https://127\.0\.0\.1:\d+/\n", running.first_line)


def test_the_commands_in_the_startup_hint_work_when_they_are_pasted_into_a_shell(
    running: RunningReceiver, tmp_path: Path
) -> None:
    running.wait_for_log("^Warning: fixtures/keys.json contains demo keys, which are public")
    shown = command("sh", "-c", running.wait_for_log(r"^ +(curl .*)$")[1])
    assert shown.stdout.startswith("HTTP/1.1 200 OK")
    shown = command("sh", "-c", running.wait_for_log(r"^ +(sqlite3 .*)$")[1])
    # The query shows the newest call first, which is the one that curl has just sent.
    assert shown.stdout.split("\n")[0].endswith(f"|track|{SAMPLES['track']['user_id']}")
    keys = tmp_path / "keys.json"
    add_key_command = running.wait_for_log(r"^ +python3 (.* --add-key .*) FILE$")[1]
    added = command("sh", "-c", f"{sys.executable} {add_key_command} {keys}", check=True)
    assert [entry["customer"] for entry in json.loads(keys.read_text())] == ["CUSTOMER"]
    restart_command = running.wait_for_log(r"^ +python3 (.* --database .*) FILE$")[1]
    program = [sys.executable, *shlex.split(restart_command), str(keys)]
    with RunningReceiver(tmp_path, program=program) as restarted:
        assert post(restarted, api_key=added.stdout.strip()).status_code == 200


def test_the_suggested_command_ends_maintenance(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path, "--maintenance") as process:
        command("sh", "-c", process.wait_for_log(r"^ +(kill .*)$")[1], check=True)
        process.wait_for_log("Maintenance is off")


def test_without_any_api_key_there_is_a_warning_and_the_suggested_command_adds_one(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "new keys.json"
    keys.write_text("[]")
    with RunningReceiver(tmp_path, "--api-keys", keys) as process:
        process.wait_for_log("^Warning: .*new keys.json contains no API keys")
        add_key_command = process.wait_for_log(r"^ +python3 (.* --add-key .*)$")[1]
        added = command("sh", "-c", f"{sys.executable} {add_key_command}", check=True)
        process.wait_for_log(r"Reloaded .*keys: 1\)")
        assert post(process, api_key=added.stdout.strip()).status_code == 200


def test_the_suggested_curl_command_sends_a_call_that_the_destination_supports(
    tmp_path: Path,
) -> None:
    with run_program(tmp_path, CONTACTS) as process:
        process.wait_for_log("curl .*fixtures/identify.json")


def test_without_a_sample_call_no_curl_command_is_suggested(tmp_path: Path) -> None:
    shutil.copy(HERE / "receiver.py", tmp_path)  # but not fixtures/, which has the sample calls
    options = ["--tls-cert", CERT, "--tls-key", CERT_KEY, "--api-keys", FIXTURES / "keys.json"]
    options += ["--database", tmp_path / "calls.db"]
    program = [sys.executable, str(tmp_path / "receiver.py")]
    with RunningReceiver(tmp_path, *options, program=program) as process:
        process.wait_for_log("Calls are stored in")
        assert "curl" not in process.log


def test_the_suggested_curl_and_sqlite3_commands_are_quoted_for_the_shell(tmp_path: Path) -> None:
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    for name in ("localhost.pem", "localhost-key.pem"):
        shutil.copy(HERE / "certs" / name, folder)
    options = ["--tls-cert", folder / "localhost.pem", "--tls-key", folder / "localhost-key.pem"]
    with RunningReceiver(folder, *options) as process:
        for program in ("curl", "sqlite3"):
            shown = command("sh", "-c", process.wait_for_log(rf"^ +({program} .*)$")[1])
            assert shown.returncode == 0


def test_standard_output_is_only_the_line_that_says_where_it_listens(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path) as process:  # this helper has already read the first line
        assert post(process).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.popen.communicate(timeout=15)[0] == ""


@cases(
    "bind, url",
    {
        "IPv6": ("::1", r"https://\[::1\]:\d+/X-Segment/v1"),
        "every IPv4 address": ("0.0.0.0", r"https://localhost:\d+/X-Segment/v1"),
        "every address": ("::", r"https://localhost:\d+/X-Segment/v1"),
    },
)
def test_the_url_that_it_prints_can_be_used(tmp_path: Path, bind: str, url: str) -> None:
    keys = tmp_path / "keys.json"
    api_key = add_key("Acme", "--api-keys", keys).stdout.strip()
    options = ["--bind", bind, "--path", "/X-Segment/v1", "--api-keys", keys]
    with RunningReceiver(tmp_path, *options) as process:
        assert re.fullmatch(url, process.url)
        assert post(process, api_key=api_key).status_code == 200
        assert process.url in shlex.split(process.wait_for_log("curl.*")[0])


def test_without_demo_keys_there_is_no_warning_and_the_hint_has_a_placeholder(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys.json"
    add_key("Acme", "--api-keys", keys)
    with RunningReceiver(tmp_path, "--api-keys", keys) as process:
        assert "YOUR_API_KEY:" in shlex.split(process.wait_for_log("curl.*")[0])
        assert process.stop() == 0
        assert "demo key" not in process.log


def test_demo_keys_in_a_changed_file_are_refused_if_the_address_is_not_loopback(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys.json"
    api_key = add_key("Acme", "--api-keys", keys).stdout.strip()
    with RunningReceiver(tmp_path, "--api-keys", keys, "--bind", "0.0.0.0") as process:
        shutil.copy(FIXTURES / "keys.json", keys)
        process.wait_for_log("Keeping the previous keys: .*demo key")
        assert post(process).status_code == 401
        assert post(process, api_key=api_key).status_code == 200


@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="needs SO_REUSEPORT")
def test_with_reuse_port_two_receivers_share_one_port(tmp_path: Path) -> None:
    with RunningReceiver(tmp_path, "--reuse-port") as first:
        port = urlsplit(first.url).port
        with RunningReceiver(tmp_path, "--reuse-port", "--port", port) as second:
            assert second.url == first.url
            # The kernel spreads the connections, so it is next to impossible that all of them reach
            # the same receiver.
            for _ in range(40):
                assert post(first).status_code == 200
            first.wait_for_log(" 200 track ")
            second.wait_for_log(" 200 track ")


def test_reuse_port_is_refused_where_there_is_no_so_reuseport(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(socket, "SO_REUSEPORT", raising=False)
    with pytest.raises(receiver.ConfigurationError, match="--reuse-port: not supported"):
        receiver.serve(Recorder(), port=0, reuse_port=True)


def test_version_is_printed() -> None:
    shown = command(*RECEIVER, "--version")
    assert (shown.returncode, shown.stdout) == (0, f"receiver.py {receiver.__version__}\n")


DEMO_KEYS_REFUSED = (
    "fixtures/keys.json contains a demo key, which is public: use a loopback address for --bind,"
    " or make your own keys with --add-key CUSTOMER --api-keys FILE"
)
NOT_A_PAIR = "must be a PEM certificate and its unencrypted private key"
PATH_RULE = "must start with a slash and contain only visible ASCII characters except ? and #"
NO_CERT = (
    "nowhere.pem: No such file or directory; `make certs` creates certs/localhost.pem and its key"
)
CALLS_OPTION_RULE = (
    "argument --calls: must contain only types of call"
    " (identify, track, page, group, delete, screen, alias), not "
)

# The words of a command line, and the one line that is printed.
MISTAKES: dict[str, tuple[list[str], str]] = {
    "--port with a number that is too large": (
        ["--port", "65536"],
        "argument --port: must be an integer from 0 to 65535, not '65536'",
    ),
    "--port with a word": (
        ["--port", "http"],
        "argument --port: must be an integer from 0 to 65535, not 'http'",
    ),
    "--port without a value": (["--port"], "argument --port: expected one argument"),
    "--bind with a host name": (
        ["--bind", "localhost"],
        "argument --bind: must be an IPv4 or IPv6 address, not 'localhost'",
    ),
    "a path without a slash": (["--path", "segment"], f"argument --path: 'segment' {PATH_RULE}"),
    "a path with a query": (["--path", "/?"], f"argument --path: '/?' {PATH_RULE}"),
    "a path with a fragment": (["--path", "/#"], f"argument --path: '/#' {PATH_RULE}"),
    "a path beyond ASCII": (["--path", "/é"], f"argument --path: '/é' {PATH_RULE}"),
    "the path of the health check": (
        ["--path", "/health"],
        "argument --path: must not be /health, which is the path of the health check",
    ),
    "--timeout of zero": (
        ["--timeout", "0"],
        "argument --timeout: must be a number from 0.1 to 86400, not '0'",
    ),
    "--timeout that is not a number": (
        ["--timeout", "nan"],
        "argument --timeout: must be a number from 0.1 to 86400, not 'nan'",
    ),
    "--keep-alive with a number that is too large": (
        ["--keep-alive", "86401"],
        "argument --keep-alive: must be a number from 0.1 to 86400, not '86401'",
    ),
    "--max-body of zero": (
        ["--max-body", "0"],
        "argument --max-body: must be an integer from 1 to 536870912, not '0'",
    ),
    "--max-connections with a number that is too large": (
        ["--max-connections", "100001"],
        "argument --max-connections: must be an integer from 1 to 100000, not '100001'",
    ),
    "an unknown option": (["--prot", "1"], "unrecognized arguments: --prot 1"),
    "an abbreviated option": (["--verb"], "unrecognized arguments: --verb"),
    "--quiet with --verbose": (
        ["--quiet", "--verbose"],
        "argument --verbose: not allowed with argument --quiet",
    ),
    "a keys file that does not exist": (
        ["--api-keys", "nowhere.json"],
        "nowhere.json: No such file or directory",
    ),
    "a folder as the keys file": (["--api-keys", "."], ".: not a regular file"),
    "a keys file that is not an array": (
        ["--api-keys", "fixtures/track.json"],
        "fixtures/track.json: must be a JSON array",
    ),
    "a certificate that does not exist": (["--tls-cert", "nowhere.pem"], NO_CERT),
    "a private key that does not exist": (["--tls-key", "nowhere.pem"], NO_CERT),
    "a private key that is not one": (
        ["--tls-key", "fixtures/keys.json"],
        f"certs/localhost.pem, fixtures/keys.json: {NOT_A_PAIR}",
    ),
    "a certificate that is not one": (
        ["--tls-cert", "README.md"],
        f"README.md, certs/localhost-key.pem: {NOT_A_PAIR}",
    ),
    "a database that is not one": (
        ["--database", "README.md"],
        "README.md: not a database of calls",
    ),
    "a folder as the database": (["--database", "."], ".: not a regular file"),
    "a database in a missing folder": (
        ["--database", "nowhere/calls.db"],
        "nowhere/calls.db: there is no folder nowhere",
    ),
    "an empty database name": (
        ["--database", ""],
        "the name of the database must not be empty",
    ),
    "demo keys on an address that is not loopback": (["--bind", "0.0.0.0"], DEMO_KEYS_REFUSED),
    "--calls without --add-key": (["--calls", "track"], "--calls and --expires need --add-key"),
    "--expires without --add-key": (
        ["--expires", "2999-01-01"],
        "--calls and --expires need --add-key",
    ),
    "--add-key without a file": (
        ["--add-key", "A"],
        "--add-key needs --api-keys FILE, the file to add the key to",
    ),
    "--add-key with a misspelled type of call": (
        ["--add-key", "A", "--calls", "identify,tarck", "--api-keys", "k.json"],
        f"{CALLS_OPTION_RULE}'tarck'",
    ),
    "--add-key with a date in words": (
        ["--add-key", "A", "--expires", "soon", "--api-keys", "k.json"],
        "argument --expires: must be a date or time such as 2027-01-01 or 2027-01-01T18:00Z, not"
        " 'soon'",
    ),
    "--add-key with an empty customer": (
        ["--add-key=", "--api-keys", "k.json"],
        f"argument --add-key: {CUSTOMER_RULE}",
    ),
    "--add-key to a file that is not JSON": (
        ["--add-key", "A", "--api-keys", "README.md"],
        "README.md: must be JSON: syntax error at line 1, column 1",
    ),
    "--add-key in a missing folder": (
        ["--add-key", "A", "--api-keys", "nowhere/k.json"],
        "nowhere/k.json: there is no folder nowhere",
    ),
}


@cases("words, line", MISTAKES)
def test_a_mistake_prints_one_line_on_standard_error_and_exits_with_2(
    tmp_path: Path, words: list[str], line: str
) -> None:
    usual = ["--port=0", f"--database={tmp_path / 'calls.db'}"]
    done = command(*RECEIVER, *usual, *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"receiver.py: {line}\n")
    assert not (HERE / "k.json").exists()  # a mistake with --add-key must not make the file


# ---- Adding an API key ---------------------------------------------------------------------------


def test_every_added_key_is_different(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    first = add_key("Acme", "--api-keys", keys).stdout
    assert add_key("Acme", "--api-keys", keys).stdout != first


def test_add_key_prints_the_key_and_stores_only_its_digest(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    done = add_key("Acme", "--api-keys", keys)
    api_key = done.stdout.strip()
    assert re.fullmatch(r"[\w-]{43}", api_key)
    added = f"Added the digest of a key for Acme to {keys}."
    assert done.stderr == f"{added} The key itself is not stored, so save it now.\n"
    assert json.loads(keys.read_text()) == [{"customer": "Acme", "sha256": digest(api_key)}]


def test_a_new_keys_file_can_be_read_only_by_its_owner_and_no_temporary_file_remains(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys.json"
    add_key("Acme", "--api-keys", keys)
    assert keys.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [keys]


def test_add_key_keeps_the_other_entries_and_the_mode_of_the_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    add_key("Acme", "--api-keys", keys)
    [before] = json.loads(keys.read_text())
    keys.chmod(0o640)
    add_key("Other", "--api-keys", keys)
    entries = json.loads(keys.read_text())
    assert entries[0] == before
    assert [entry["customer"] for entry in entries] == ["Acme", "Other"]
    assert keys.stat().st_mode & 0o777 == 0o640


def test_add_key_stores_a_non_ascii_customer_with_the_permitted_calls_and_the_expiry(
    tmp_path: Path,
) -> None:
    keys = tmp_path / "keys.json"
    options = ["--calls", "identify,group", "--expires", "2999-01-01"]
    api_key = add_key("Küche", "--api-keys", keys, *options).stdout.strip()
    limits = {"calls": ["identify", "group"], "expires": "2999-01-01"}
    expected = {"customer": "Küche", "sha256": digest(api_key), **limits}
    assert json.loads(keys.read_text()) == [expected]


def test_add_key_with_all_types_and_no_expiry_gives_a_key_without_limits(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    api_key = add_key("Acme", "--api-keys", keys, "--calls", "all", "--expires", "never")
    expected = {"customer": "Acme", "sha256": digest(api_key.stdout.strip())}
    assert json.loads(keys.read_text()) == [expected]


def test_with_standard_error_closed_add_key_prints_only_the_key(tmp_path: Path) -> None:
    words = [*RECEIVER, "--add-key", "Acme", "--api-keys", str(tmp_path / "keys.json")]
    done = command("sh", "-c", 'exec "$@" 2>&-', "sh", *words)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)


@on_linux
@cases(
    "redirection, reason",
    {
        "a full disk": (">/dev/full", "No space left on device"),
        "closed": (">&-", "Bad file descriptor"),
    },
)
def test_add_key_says_so_if_the_key_cannot_be_printed(
    tmp_path: Path, redirection: str, reason: str
) -> None:
    keys = tmp_path / "keys.json"
    words = [*RECEIVER, "--add-key", "Acme", "--api-keys", str(keys)]
    done = command("sh", "-c", f'exec "$@" {redirection}', "sh", *words)
    message = f"the key could not be printed ({reason}); remove its entry, the last one in {keys}"
    assert (done.returncode, done.stderr) == (2, f"receiver.py: {message}\n")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the owner of a file")
def test_add_key_as_root_keeps_the_owner_of_the_file(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    add_key("Acme", "--api-keys", keys)
    nobody = 65534
    os.chown(keys, nobody, nobody)
    add_key("Other", "--api-keys", keys)
    assert (keys.stat().st_uid, keys.stat().st_gid) == (nobody, nobody)


def test_add_key_through_a_symbolic_link_changes_the_file_behind_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    keys = tmp_path / "real/keys.json"
    add_key("Acme", "--api-keys", keys)
    link = tmp_path / "link.json"
    link.symlink_to(keys)
    add_key("Other", "--api-keys", link)
    assert link.is_symlink()
    assert len(json.loads(keys.read_text())) == 2


def test_a_failed_add_key_does_not_change_the_file_or_leave_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    keys = tmp_path / "keys.json"
    add_key("Acme", "--api-keys", keys)
    before = keys.read_bytes()
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        receiver.append_entry(str(keys), ENTRY)
    assert keys.read_bytes() == before
    assert list(tmp_path.iterdir()) == [keys]


def test_the_calls_option_of_add_key_limits_the_key_to_those_types(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    api_key = add_key("Acme", "--api-keys", keys, "--calls", "group").stdout.strip()
    with RunningReceiver(tmp_path, "--api-keys", keys) as process:
        assert post(process, SAMPLES["group"], api_key).status_code == 200
        assert post(process, TRACK, api_key).status_code == 403


# ==================================================================================================
# The conformance kit
#
# Given an address and API keys, it checks any endpoint. `make conformance` runs it; the section
# "Test your own endpoint" of README.md explains the report, and variables such as CALLS. The checks
# know nothing of receiver.py; `judge_our_receiver`, in `make test`, applies them to it.
#
# A check is a sentence about the endpoint, and a way to find out whether it is true. Most checks
# are data: fixtures/conformance.json has requests, and the statuses that are expected. A MUST is an
# essential requirement of Segment's page on the protocol; if one is broken, customers' data is
# usually lost, repeated or exposed. A SHOULD is a detail of that page or of its later revisions, or
# comes from HTTP and TLS, from what real senders do, or from good practice.
#
# To add a check, add it to conformance.json; then add to FAULTS a fault that breaks it.
# ==================================================================================================

CONFORMANCE = json.loads((FIXTURES / "conformance.json").read_text())
RUN_ID = "conformance-" + secrets.token_hex(4)  # the user of most calls, and the start of most ids
UNKNOWN_KEY = "unknown-" + secrets.token_hex(8)
ORIGINAL_CALLS = ("identify", "track", "page", "group")
CALL_NUMBERS = itertools.count(1)

NOT_JSON = object()

REPLY_SECONDS = 5.0  # Segment may wait no longer than this
REPLY_LIMIT = 1.4 * REPLY_SECONDS  # for connecting and a whole reply, even on a busy machine
# Connecting is not interrupted, so it may exceed REPLY_LIMIT: the time-out applies to TCP, and then
# again to the TLS handshake.
LONGEST_CONNECT = 2 * REPLY_SECONDS
# After this time, no request is sent. The last one may fail on a connection that was kept open,
# after REPLY_LIMIT, and then be sent on a new one. So a run takes at most 45 seconds.
RUN_SECONDS = 45 - REPLY_LIMIT - LONGEST_CONNECT
MAX_REPLY = 65_536  # bytes


class NotCheckedError(Exception):
    """A check cannot be run; the text says why."""


class CutShortError(NotCheckedError):
    """A check cannot be run because the run is cut short. For a MUST, the exit status is then 2.

    The endpoint refuses connections or asks for too long a wait, or the run has no time left.
    """


class NoReplyError(Exception):
    """No complete reply arrived; the text says what happened instead."""


class BrokenError(Exception):
    """The endpoint does not do what the sentence of a check says; the text says what it does."""


class Target(NamedTuple):
    """The endpoint that is checked."""

    url: str
    keys: Mapping[str, str]  # "api", and perhaps "expired" and "limited"
    calls: tuple[str, ...] = ORIGINAL_CALLS
    context: ssl.SSLContext | None = None  # None for plain HTTP, which is allowed on loopback


class KitRequest(NamedTuple):
    """A request to the endpoint, and how to describe it without showing an API key."""

    method: str
    headers: Mapping[str, str]
    body: bytes
    description: str
    shown_authorization: str  # the Authorization header as the report shows it


class KitReply(NamedTuple):
    """A reply of the endpoint."""

    status: int
    headers: Mapping[str, str]  # with their names in lower case
    body: bytes

    def value(self) -> Any:
        """The body as JSON, or NOT_JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return NOT_JSON


Transport = Callable[[KitRequest], KitReply]


# ---- Requests ------------------------------------------------------------------------------------
#
# The format of conformance.json: `calls` has a plain call of each type, and `common` the fields
# that all of them have. A check has its `level`, the `section` that is its source, its `sentence`,
# the `requests` to send, and the `statuses`: each reply must have one of them; 2xx stands for any
# status from 200 to 299, and so on. If `may_crash` is true, `check_retry_after_a_crash` also sends
# the first six requests of this check.
#
# A request starts from the plain call of its `type`. Without a `type`, it starts from the plain
# track call, or if CALLS does not contain track, from that of the first type in CALLS:
#
#     type                          the plain call to start from; {last} is the last type in CALLS
#     set                           replaces or adds these fields
#     remove                        leaves these fields out
#     only                          leaves all other fields out
#     raw                           appends this JSON text as the last member, unchanged
#     camel_case                    converts the keys to camelCase
#     body, body_base64             replaces the whole body
#     method, scheme                replaces POST, or Basic
#     headers                       replaces or adds these headers; null leaves one out
#     credentials                   the text to encode in place of "{api}:" (see SHOWN_KEYS)
#     credentials_base64            the text after the scheme, already encoded
#     unsupported                   sends the request only if its type is not in CALLS
#
# In a value, {run} is the user id of the run, {now} the current time, and {"$repeat": ["x", 9]} a
# text repeated 9 times. In `raw`, {deep} is deep nesting, and {digits} a long number.


def expand(value: Any) -> Any:
    """A value of conformance.json in which {run}, {now} and $repeat are replaced."""
    if isinstance(value, str):
        if "{now}" in value:
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            value = value.replace("{now}", now.replace("+00:00", "Z"))
        return value.replace("{run}", RUN_ID)
    if isinstance(value, list):
        return [expand(item) for item in value]
    if isinstance(value, dict):
        if "$repeat" in value:
            text, times = value["$repeat"]
            return text * times
        return {name: expand(item) for name, item in value.items()}
    return value


def camel_case(value: Any) -> Any:
    """A value with its keys in camelCase."""
    if isinstance(value, list):
        return [camel_case(item) for item in value]
    if isinstance(value, dict):
        return {
            re.sub("_([a-z])", lambda found: found[1].upper(), name): camel_case(item)
            for name, item in value.items()
        }
    return value


def build_body(spec: Mapping[str, Any], call_type: str) -> bytes:
    """The body that a request of conformance.json asks for."""
    if "body" in spec:
        return str(expand(spec["body"])).encode()
    if "body_base64" in spec:
        return base64.b64decode(spec["body_base64"])
    call = {"type": call_type, "message_id": f"{RUN_ID}-{next(CALL_NUMBERS)}"}
    call |= expand({**CONFORMANCE["calls"][call_type], **CONFORMANCE["common"]})
    call |= expand(spec.get("set", {}))
    if "only" in spec:
        call = {name: value for name, value in call.items() if name in spec["only"]}
    for name in spec.get("remove", []):
        call.pop(name, None)
    text = json.dumps(camel_case(call) if spec.get("camel_case") else call, ensure_ascii=False)
    if "raw" in spec:
        raw = spec["raw"].replace("{deep}", "[" * 9000 + "]" * 9000)
        raw = raw.replace("{digits}", "9" * 5000)
        text = text.removesuffix("}") + ", " + raw + "}"
    return text.encode()


def shown(value: Any) -> str:
    """A value of conformance.json as the report shows it."""
    text = json.dumps(value, ensure_ascii=False).replace("{run}", RUN_ID)
    text = re.sub(r'\{"\$repeat": \[(".*?"), (\d+)\]\}', r"\1 repeated \2 times", text)
    return text if len(text) <= 70 else text[:69] + "…"


def describe(spec: Mapping[str, Any], call_type: str) -> str:
    """A request of conformance.json in a few words."""
    if "method" in spec:
        return f"a {spec['method']} request"
    if "body" in spec:
        return f"the body {shown(spec['body'])}" if spec["body"] else "an empty body"
    if "body_base64" in spec:
        return f"the body {base64.b64decode(spec['body_base64'])!r}"
    details = describe_fields(spec) + describe_headers(spec)
    if not details:
        return f"a plain {call_type} call"
    if "type" in spec.get("set", {}):
        return f"a call with {', '.join(details)}"
    article = "an" if call_type[0] in "aeiou" else "a"
    return f"{article} {call_type} call with {', '.join(details)}"


def describe_fields(spec: Mapping[str, Any]) -> list[str]:
    """How the fields of a request differ from those of a plain call."""
    details = [f"{name} {shown(value)}" for name, value in spec.get("set", {}).items()]
    details += [f"no {name}" for name in spec.get("remove", [])]
    if "only" in spec:
        details.append(f"only {', '.join(spec['only'])}")
    if "raw" in spec:
        raw = spec["raw"].replace("{deep}", "[[[… (9000 levels)")
        details.append(f"the member {raw.replace('{digits}', '999… (5000 digits)')}")
    if spec.get("camel_case"):
        details.append("keys in camelCase")
    return details


def describe_headers(spec: Mapping[str, Any]) -> list[str]:
    """How the headers of a request differ from those of a plain call."""
    details = []
    for name, value in spec.get("headers", {}).items():
        details.append(f"no {name} header" if value is None else f"the header {name}: {value}")
    if "scheme" in spec:
        details.append(f"the scheme {spec['scheme']}")
    if "credentials" in spec or "credentials_base64" in spec:
        details.append(f"the credentials {shown_credentials(spec)}")
    return details


SHOWN_KEYS = {
    "{api}": "YOUR_API_KEY",
    "{api_prefix}": "YOUR_API_KEY_WITHOUT_ITS_LAST_CHARACTER",
    "{api_other_case}": "YOUR_API_KEY_WITH_ITS_CASE_SWAPPED",
    "{unknown}": "UNKNOWN_KEY",
    "{expired}": "EXPIRED_KEY",
    "{limited}": "LIMITED_KEY",
}


def shown_credentials(spec: Mapping[str, Any]) -> str:
    """The credentials of a request as the report shows them, without an API key."""
    if "credentials_base64" in spec:
        return str(spec["credentials_base64"])
    text = str(spec.get("credentials", "{api}:"))
    for placeholder, name in SHOWN_KEYS.items():
        text = text.replace(placeholder, name)
    return f'base64("{text}")'


def fill_in_credentials(spec: Mapping[str, Any], target: Target) -> str:
    """The credentials of a request, in base64. Raises NotCheckedError if a key was not given."""
    if "credentials_base64" in spec:
        return str(spec["credentials_base64"])
    api_key = target.keys["api"]
    values = {
        "{api}": api_key,
        "{api_prefix}": api_key[:-1],
        "{api_other_case}": api_key.swapcase(),
        "{unknown}": UNKNOWN_KEY,
        "{expired}": target.keys.get("expired", ""),
        "{limited}": target.keys.get("limited", ""),
    }
    login = str(spec.get("credentials", "{api}:"))
    if "{api_other_case}" in login and api_key.swapcase() == api_key:
        raise NotCheckedError("API_KEY has no letters")
    for placeholder, value in values.items():
        if placeholder in login and not value:
            raise NotCheckedError(f"no {SHOWN_KEYS[placeholder]} was given")
        login = login.replace(placeholder, value)
    return base64.b64encode(login.encode()).decode()


def build_request(spec: Mapping[str, Any], target: Target) -> KitRequest:
    """The request that an entry of conformance.json asks for.

    Raises NotCheckedError if CALLS rules the request out, or if the API key that it needs is
    missing or unsuitable.
    """
    call_type = spec.get("type", "track" if "track" in target.calls else target.calls[0])
    if call_type == "{last}":
        call_type = target.calls[-1]
    is_supported = call_type in target.calls
    if is_supported and spec.get("unsupported"):
        raise NotCheckedError(f"{call_type} is in CALLS")
    if not is_supported and not spec.get("unsupported"):
        raise NotCheckedError(f"{call_type} is not in CALLS")

    scheme = spec.get("scheme", "Basic")
    body = build_body(spec, call_type)
    headers = {
        "Authorization": f"{scheme} {fill_in_credentials(spec, target)}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "User-Agent": "Segment.io/1.0",
        "Accept": "*/*",
        "Cache-Control": "no-cache",
        "X-Segment-Settings": "e30=",  # {} in base64
        **spec.get("headers", {}),
    }
    shown_authorization = f"{scheme} {shown_credentials(spec)}"
    return KitRequest(
        method=spec.get("method", "POST"),
        headers={name: value for name, value in headers.items() if value is not None},
        body=body,
        description=describe(spec, call_type),
        # A header that is given in conformance.json contains no API key.
        shown_authorization=spec.get("headers", {}).get("Authorization") or shown_authorization,
    )


# ---- Sending -------------------------------------------------------------------------------------


class NetworkTransport:
    """Sends requests over connections that are kept open, one for each thread.

    The time of the run, RUN_SECONDS, begins when the transport is made.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.deadline = time.monotonic() + RUN_SECONDS
        self.refused_in_a_row = 0  # connections
        self.local = threading.local()

    def new_connection(self) -> http.client.HTTPConnection:
        """A new connection, which opens when it is used."""
        parts = urlsplit(self.target.url)
        host = parts.hostname or ""
        if self.target.context is None:
            return http.client.HTTPConnection(host, parts.port, timeout=REPLY_SECONDS)
        return http.client.HTTPSConnection(
            host, parts.port, timeout=REPLY_SECONDS, context=self.target.context
        )

    def require_time(self) -> None:
        """Raise CutShortError once the time of the run is over."""
        if time.monotonic() > self.deadline:
            raise CutShortError("no time was left")

    def __call__(self, request: KitRequest) -> KitReply:
        """The reply to a request. Raises NoReplyError or NotCheckedError."""
        link = getattr(self.local, "link", None) or self.new_connection()
        self.local.link = link
        return self.send(link, request)

    def send(
        self, link: http.client.HTTPConnection, request: KitRequest, reopen: bool = True
    ) -> KitReply:
        """Send a request on this connection, and obey a rate limit.

        With `reopen`, an idle connection that has been closed is opened again. Raises NoReplyError
        or NotCheckedError.
        """
        while True:
            self.require_time()
            if self.refused_in_a_row >= 5:
                raise CutShortError("the endpoint refuses connections")
            reply = self.exchange(link, request, reopen)
            wait = retry_after(reply)
            if wait is None:
                return reply
            if time.monotonic() + wait > self.deadline:
                raise CutShortError(
                    f"the endpoint answers with {reply.status} and asks for a wait of {wait:g}"
                    " seconds, but the run ends before that"
                )
            time.sleep(wait)

    def exchange(
        self, link: http.client.HTTPConnection, request: KitRequest, reopen: bool
    ) -> KitReply:
        """Send a request once, and return the reply. For `reopen`, see `send`."""
        was_open = link.sock is not None
        end = time.monotonic() + REPLY_LIMIT
        try:
            if not was_open:
                link.connect()
            with time_limit(link.sock, end - time.monotonic()):
                reply = self.send_and_read(link, request)
        except NoReplyError:
            link.close()
            raise
        except (OSError, http.client.HTTPException) as error:
            link.close()
            if was_open and reopen and isinstance(error, ConnectionError):
                return self.exchange(link, request, reopen=False)
            if isinstance(error, ConnectionRefusedError):
                self.refused_in_a_row += 1
            reason = printable_text((str(error) or type(error).__name__).encode(), 200)
            raise NoReplyError(reason) from None
        self.refused_in_a_row = 0
        return reply

    def send_and_read(self, link: http.client.HTTPConnection, request: KitRequest) -> KitReply:
        """Send a request on an open connection, and read the reply."""
        link.putrequest(request.method, target_path(self.target), skip_accept_encoding=True)
        for name, value in request.headers.items():
            link.putheader(name, value)
        link.endheaders(request.body)
        reply = link.getresponse()
        body = reply.read(MAX_REPLY + 1)
        if len(body) > MAX_REPLY:
            raise NoReplyError(f"the reply is longer than {MAX_REPLY} bytes")
        headers = {name.lower(): value for name, value in reply.headers.items()}
        return KitReply(reply.status, headers, body)


@contextlib.contextmanager
def time_limit(sock: socket.socket, seconds: float) -> Iterator[None]:
    """Limit the time that the block takes to read a whole reply from a socket.

    The time-out of the socket limits only each single read. Raises NoReplyError if the time has run
    out.
    """
    has_expired = threading.Event()

    def shut_down() -> None:
        has_expired.set()
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    watchdog = threading.Timer(seconds, shut_down)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    except (OSError, http.client.HTTPException):
        if not has_expired.is_set():
            raise
    finally:
        watchdog.cancel()
    # Check this even if nothing was raised, because `http.client` may take the shutdown for the end
    # of the body.
    if has_expired.is_set():
        raise NoReplyError("the reply did not end in time")


def target_path(target: Target) -> str:
    """The path and query of the endpoint."""
    parts = urlsplit(target.url)
    return (parts.path or "/") + ("?" + parts.query if parts.query else "")


def retry_after(reply: KitReply) -> float | None:
    """The seconds to wait before trying again, or None if the reply is not a rate limit."""
    value = reply.headers.get("retry-after", "")
    if reply.status == 429 or (reply.status == 503 and value):
        return float(value) if value.isdigit() else 1.0
    return None


# ---- Checks --------------------------------------------------------------------------------------


class Check(NamedTuple):
    """A sentence about an endpoint, and the function that checks it."""

    level: str  # MUST or SHOULD
    section: str
    sentence: str
    run: Callable[[Target, Transport], None]  # raises BrokenError, NoReplyError, NotCheckedError


def printable_text(data: bytes, limit: int = 1000) -> str:
    """Text from outside, with control characters escaped, and shortened."""
    text = data.decode(errors="replace")
    text = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:limit])
    return text + (f" … ({len(data)} bytes)" if len(data) > limit else "")


def show_exchange(request: KitRequest, reply: KitReply | None, target: Target) -> str:
    """A request and its reply, shortened.

    API keys are hidden in the Authorization header. In the reply, they are hidden if they have at
    least SHORTEST_SECRET characters. The path is shown as it is, since it is not a secret.
    """
    lines = [f"> {request.method} {target_path(target)} HTTP/1.1"]
    for name, value in request.headers.items():
        lines.append(
            f"> {name}: {request.shown_authorization if name == 'Authorization' else value}"
        )
    lines += [">", "> " + printable_text(request.body)]
    answer = ["no reply"]
    if reply is not None:
        answer = [f"HTTP/1.1 {reply.status}"]
        for name, value in reply.headers.items():
            answer.append(f"{name}: {printable_text(value.encode())}")
        answer += ["", printable_text(reply.body)]
    for line in answer:
        for secret in secrets_of(target):
            if len(secret) >= SHORTEST_SECRET:
                line = line.replace(secret, "***")
        lines.append(f"< {line}")
    return "\n".join(f"  {line}".rstrip() for line in lines)


SHORTEST_SECRET = 8  # characters; a shorter key may occur in a reply by chance


def secrets_of(target: Target) -> list[str]:
    """The API keys, plain, URL-encoded, and as credentials in base64.

    The longest come first. If a key that is part of a longer one were replaced first, the rest of
    the longer one would stay visible.
    """
    forms = set()
    for key in target.keys.values():
        if key:
            forms |= {key, base64.b64encode(f"{key}:".encode()).decode(), quote(key)}
    return sorted(forms, key=len, reverse=True)


def either(statuses: Sequence[str]) -> str:
    """Statuses in words, such as "2xx, 4xx or 501"."""
    *others, last = statuses
    return f"{', '.join(others)} or {last}" if others else last


def is_expected(status: int, statuses: Sequence[str]) -> bool:
    return str(status) in statuses or f"{status // 100}xx" in statuses


def expect_statuses(
    specs: Sequence[Mapping[str, Any]], statuses: Sequence[str]
) -> Callable[[Target, Transport], None]:
    """A check that sends these requests and expects one of these statuses for each."""

    def run(target: Target, transport: Transport) -> None:
        requests_to_send = []
        reasons = {}  # why requests cannot be sent; a dictionary serves as an ordered set
        for spec in specs:
            try:
                requests_to_send.append(build_request(spec, target))
            except NotCheckedError as error:
                reasons[str(error)] = True
        if not requests_to_send:
            raise NotCheckedError("; ".join(reasons))

        failures = []
        for request in requests_to_send:
            failure = send_and_compare(request, statuses, target, transport)
            if failure:
                failures.append(failure)
        if failures:
            raise BrokenError(f"expected {either(statuses)}, but got\n{list_failures(failures)}")

    return run


def send_and_compare(
    request: KitRequest, statuses: Sequence[str], target: Target, transport: Transport
) -> tuple[str, str] | None:
    """Send a request, and return a description of the failure, if any, and the exchange.

    It is a failure if no reply comes, or if the reply has a status other than `statuses`.
    """
    try:
        reply = transport(request)
    except NoReplyError as error:
        words = f"no reply ({error}) to {request.description}"
        return words, show_exchange(request, None, target)
    if is_expected(reply.status, statuses):
        return None
    return f"{reply.status} to {request.description}", show_exchange(request, reply, target)


def list_failures(failures: Sequence[tuple[str, str]]) -> str:
    """The failures that `send_and_compare` has returned, and the first exchange."""
    lines = [f"  {words}" for words, _ in failures[:12]]
    if len(failures) > 12:
        lines.append(f"  and {len(failures) - 12} more")
    if len(failures) > 1:
        lines.append("the first of these:")
    first_exchange = failures[0][1]
    return "\n".join([*lines, first_exchange])


PLAIN: dict[str, Any] = {}  # no differences from a plain call
UNAUTHORIZED: list[dict[str, Any]] = [
    {"headers": {"Authorization": None}},
    {"credentials": "{unknown}:"},
]
LIKELY_TO_CRASH = {"set": {"properties": None, "traits": None, "context": None}}
REQUESTS_TO_REFUSE: list[dict[str, Any]] = [
    *UNAUTHORIZED,
    {"body": '{"type": '},
    {"set": {"type": "juggle"}},
]


def expect_replies(
    specs: Sequence[Mapping[str, Any]],
    is_good: Callable[[KitReply, Target], object],
    complaint: str,
    statuses: Sequence[str],
) -> Callable[[Target, Transport], None]:
    """A check that sends these requests, and looks at the replies with one of these statuses.

    `is_good` must be true of each of them. Otherwise, the report says: "the reply to …", and then
    the complaint.
    """

    def run(target: Target, transport: Transport) -> None:
        checked = 0
        for spec in specs:
            request = build_request(spec, target)
            try:
                reply = transport(request)
            except NoReplyError as error:  # other checks report missing replies
                raise NotCheckedError(
                    f"there was no reply to {request.description} ({error})"
                ) from None
            if not is_expected(reply.status, statuses):
                continue
            checked += 1
            if not is_good(reply, target):
                exchange = show_exchange(request, reply, target)
                raise BrokenError(f"the reply to {request.description} {complaint}\n{exchange}")
        if not checked:
            raise NotCheckedError(f"no request of this check got a {either(statuses)}")

    return run


def is_empty_or_has_message(reply: KitReply, _: Target) -> bool:
    value = reply.value()
    if not reply.body:
        return True
    return isinstance(value, dict) and isinstance(value.get("message"), str) and value["message"]


def is_empty_or_labelled_as_json(reply: KitReply, _: Target) -> bool:
    media_type = reply.headers.get("content-type", "").split(";")[0].strip().lower()
    return not reply.body or media_type == "application/json"


def is_empty_or_json(reply: KitReply, _: Target) -> bool:
    return not reply.body or reply.value() is not NOT_JSON


def shows_no_key(reply: KitReply, target: Target) -> bool:
    if len(target.keys["api"]) < SHORTEST_SECRET:
        raise NotCheckedError(f"API_KEY is shorter than {SHORTEST_SECRET} characters")
    text = reply.body.decode(errors="replace") + str(reply.headers)
    forbidden = [*secrets_of(target), UNKNOWN_KEY]
    return not any(len(secret) >= SHORTEST_SECRET and secret in text for secret in forbidden)


TRACEBACK = re.compile(
    rb"""
    Traceback[ ]\(                     # Python
    | \.\w+:\d+:\d+\)                # JavaScript
    | \.java:\d+\)                    # Java
    | \.rb:\d+:in                     # Ruby
    | \.php ( : | [ ]on[ ]line[ ] ) \d+ # PHP
    | \.go:\d+                        # Go
    """,
    re.VERBOSE,
)


def shows_no_traceback(reply: KitReply, _: Target) -> bool:
    return not TRACEBACK.search(reply.body)


def requests_that_may_crash(target: Target) -> Iterator[tuple[KitRequest, KitRequest]]:
    """Requests that may crash an endpoint, each with a copy that has a new message_id.

    If conformance.json sets the message_id of a request, or its whole body, the copy is the same.
    """
    for check in CONFORMANCE["checks"]:
        if check.get("may_crash"):
            for spec in check["requests"][:6]:  # a few of each kind are enough
                with contextlib.suppress(NotCheckedError):
                    # Each time, `build_request` takes a new message_id.
                    yield build_request(spec, target), build_request(spec, target)


def check_retry_after_a_crash(target: Target, transport: Transport) -> None:
    """A call must not be marked as seen before it is stored.

    If the retry of a call that has crashed the endpoint succeeds, although the same call with a new
    message_id still crashes it, then the endpoint has dismissed the retry as a duplicate.
    """
    for request, same_with_new_id in requests_that_may_crash(target):
        try:
            first = transport(request)
            if first.status < 500 or first.status == 501:
                continue  # it has not crashed
            retry = transport(request)
            still_crashes = transport(same_with_new_id).status == first.status
        except NoReplyError:
            continue  # other checks report missing replies
        if retry.status < 300 and still_crashes:
            raise BrokenError(
                f"a call was answered with {first.status}, and its retry with {retry.status},"
                f" although a copy with a new message_id is still answered with {first.status}\n"
                + show_exchange(request, retry, target)
            )


def require_network(transport: Transport) -> NetworkTransport:
    """The transport, if it uses the network. Raises NotCheckedError otherwise."""
    if not isinstance(transport, NetworkTransport):
        raise NotCheckedError("the endpoint runs in this process")
    return transport


def require_tls(target: Target) -> ssl.SSLContext:
    if target.context is None:
        raise NotCheckedError("the address begins with http://")
    return target.context


def check_certificate(target: Target, transport: Transport) -> None:
    """Pass if this is reached, because an untrusted certificate has already ended the run."""
    require_network(transport)
    if require_tls(target).verify_mode == ssl.CERT_NONE:
        raise NotCheckedError("INSECURE is set")


def check_sixteen_connections(target: Target, transport: Transport) -> None:
    transport = require_network(transport)
    barrier = threading.Barrier(16)

    def send_one(_: int) -> int:
        with contextlib.closing(transport.new_connection()) as link:
            link.connect()
            barrier.wait(REPLY_SECONDS)
            return transport.send(link, build_request(PLAIN, target)).status

    try:
        with ThreadPoolExecutor(16) as executor:
            statuses = list(executor.map(send_one, range(16)))
    except (OSError, threading.BrokenBarrierError):
        raise BrokenError("not all of the connections were accepted") from None
    failed = [status for status in statuses if status >= 300]
    if failed:
        raise BrokenError(f"{failed[0]} to a plain call")


def check_silent_connection(target: Target, transport: Transport) -> None:
    transport = require_network(transport)
    transport.require_time()
    parts = urlsplit(target.url)
    address = (parts.hostname, parts.port or (443 if target.context else 80))
    try:
        silent = socket.create_connection(address, REPLY_SECONDS)
    except OSError as error:
        raise NotCheckedError(f"cannot connect: {error}") from None
    with silent, contextlib.closing(transport.new_connection()) as link:
        try:
            transport.send(link, build_request(PLAIN, target))
        except NoReplyError as error:
            raise BrokenError(
                f"no reply while another client was connected and silent ({error})"
            ) from None


def check_connection_stays_open(target: Target, transport: Transport) -> None:
    transport = require_network(transport)
    for spec in [PLAIN, *REQUESTS_TO_REFUSE]:
        with contextlib.closing(transport.new_connection()) as link:
            first = build_request(spec, target)
            reply = transport.send(link, first)
            after = f"after {first.description}"
            if link.sock is None:  # `http.client` has closed it, because the reply said so
                exchange = show_exchange(first, reply, target)
                raise BrokenError(f"the connection is closed {after}\n{exchange}")
            plain = build_request(PLAIN, target)
            try:
                second = transport.send(link, plain, reopen=False)
            except NoReplyError as error:
                raise BrokenError(f"the connection does not work {after}: {error}") from None
            if second.status >= 300:
                exchange = show_exchange(plain, second, target)
                raise BrokenError(f"{second.status} to a plain call {after}\n{exchange}")


def check_plain_http(target: Target, transport: Transport) -> None:
    require_network(transport)
    require_tls(target)
    unencrypted = NetworkTransport(target._replace(context=None))
    request = build_request({"credentials": "{unknown}:"}, target)  # no real key in the clear
    with contextlib.closing(unencrypted.new_connection()) as link:
        try:
            reply = unencrypted.exchange(link, request, reopen=False)
        except NoReplyError:  # a refused connection, a reset or silence is fine
            return
    # A 401 or a 2xx means that the endpoint has processed the request, instead of refusing plain
    # HTTP.
    if reply.status == 401 or reply.status < 300:
        address = target.url.replace("https://", "http://")
        exchange = show_exchange(request, reply, target)
        raise BrokenError(f"{address} answers with {reply.status}\n{exchange}")


HANDSHAKE_RECORD = b"\x16"  # the first byte of a TLS record that carries a handshake


def client_hello(version: ssl.TLSVersion, hostname: str | None) -> bytes:
    """The first message of a handshake with this version. Raises ssl.SSLError or ValueError.

    OpenSSL only composes this message, in memory; the check then sends it over plain TCP. A real
    handshake would prove nothing, because OpenSSL on this machine might abort it, even if the
    endpoint accepts the old version.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    hello = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):  # it wants to read the server's reply
        context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname=hostname).do_handshake()
    return hello.read()


def check_old_tls(target: Target, transport: Transport) -> None:
    require_network(transport)
    require_tls(target)
    parts = urlsplit(target.url)
    for version, name in (
        (ssl.TLSVersion.TLSv1, "TLS 1.0"),
        (ssl.TLSVersion.TLSv1_1, "TLS 1.1"),
    ):
        try:
            hello = client_hello(version, parts.hostname)
        except (ssl.SSLError, ValueError):
            raise NotCheckedError(f"OpenSSL on this machine cannot offer {name}") from None
        address = (parts.hostname, parts.port or 443)
        try:
            link = socket.create_connection(address, REPLY_SECONDS)
        except OSError as error:
            raise NotCheckedError(f"cannot connect: {error}") from None
        # An endpoint that accepts the version answers with a handshake record. Any other endpoint
        # sends an alert, or closes the connection.
        with link, contextlib.suppress(OSError):
            link.sendall(hello)
            if link.recv(1) == HANDSHAKE_RECORD:
                raise BrokenError(f"{name} was accepted")


ANY_ERROR = ["4xx", "5xx"]
CODE_CHECKS = [
    Check("MUST", "Accepting Segment Data", "the certificate is trusted", check_certificate),
    Check("MUST", "Accepting Segment Data", "plain HTTP is not served", check_plain_http),
    Check("SHOULD", "RFC 8996", "TLS 1.0 and 1.1 are refused", check_old_tls),
    Check(
        "SHOULD",
        "Retries, later revision",
        "sixteen connections at once are all served",
        check_sixteen_connections,
    ),
    Check(
        "SHOULD",
        "good practice",
        "a client that connects and says nothing does not hold up others",
        check_silent_connection,
    ),
    Check(
        "SHOULD",
        "Headers, later revision",
        "a connection stays open after a call and after a refusal",
        check_connection_stays_open,
    ),
    Check(
        "MUST",
        "Status Code",
        "a call that has crashed the endpoint is not dismissed as a duplicate when it is retried",
        check_retry_after_a_crash,
    ),
    Check(
        "MUST",
        "Response Body",
        "the body of a refusal is empty, or a JSON object whose message is a non-empty string",
        expect_replies(
            REQUESTS_TO_REFUSE,
            is_empty_or_has_message,
            "has a body that is not a JSON object with a non-empty message",
            ANY_ERROR,
        ),
    ),
    Check(
        "MUST",
        "Response Body",
        "the body of a refusal is labelled as application/json",
        expect_replies(
            REQUESTS_TO_REFUSE,
            is_empty_or_labelled_as_json,
            "is not labelled as application/json",
            ANY_ERROR,
        ),
    ),
    Check(
        "SHOULD",
        "Response Body",
        "the body of a refusal is not empty",
        expect_replies(REQUESTS_TO_REFUSE, lambda reply, _: reply.body, "has no body", ANY_ERROR),
    ),
    Check(
        "SHOULD",
        "Response Body",
        "the body of a success is empty or JSON",
        expect_replies([PLAIN], is_empty_or_json, "has a body that is not JSON", ["2xx"]),
    ),
    Check(
        "SHOULD",
        "RFC 9110 §11.6",
        "a 401 reply has a WWW-Authenticate header",
        expect_replies(
            UNAUTHORIZED,
            lambda reply, _: "www-authenticate" in reply.headers,
            "has no WWW-Authenticate header",
            ["401"],
        ),
    ),
    Check(
        "SHOULD",
        "good practice",
        "no reply shows an API key",
        expect_replies(
            [PLAIN, *REQUESTS_TO_REFUSE], shows_no_key, "shows an API key", ["2xx", *ANY_ERROR]
        ),
    ),
    Check(
        "SHOULD",
        "good practice",
        "no reply shows a traceback",
        expect_replies(
            [*REQUESTS_TO_REFUSE, LIKELY_TO_CRASH],
            shows_no_traceback,
            "shows a traceback",
            ["2xx", *ANY_ERROR],
        ),
    ),
]
CHECKS = CODE_CHECKS + [
    Check(
        check["level"],
        check["section"],
        check["sentence"],
        expect_statuses(check["requests"], check["statuses"]),
    )
    for check in CONFORMANCE["checks"]
]


# ---- The run and its report ----------------------------------------------------------------------


class Finding(NamedTuple):
    """The result of a check."""

    check: Check
    outcome: str  # "kept", "broken" or "not checked"
    text: str = ""
    was_cut_short: bool = False  # whether the reason is a CutShortError


def describe_broken(finding: Finding) -> str:
    check = finding.check
    return f'{check.level} broken: "{check.sentence}" ({check.section})\n{finding.text}'


def judge(check: Check, target: Target, transport: Transport) -> Finding:
    try:
        check.run(target, transport)
    except BrokenError as error:
        return Finding(check, "broken", str(error))
    except NoReplyError as error:
        return Finding(check, "broken", f"no reply: {error}")
    except NotCheckedError as error:
        return Finding(check, "not checked", str(error), isinstance(error, CutShortError))
    return Finding(check, "kept")


FINDINGS: dict[str, Finding] = {}  # by the sentence of the check


def judge_all(
    checks: Sequence[Check], transport: NetworkTransport, findings: dict[str, Finding]
) -> None:
    """Run these checks, several at a time."""

    def judge_one(check: Check) -> None:
        findings[check.sentence] = judge(check, transport.target, transport)

    # A silent connection may hold up all other requests, so that check is run alone.
    alone = [check for check in checks if check.run is check_silent_connection]
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(judge_one, [check for check in checks if check not in alone]))
    for check in alone:
        judge_one(check)


def stop(text: str) -> NoReturn:
    """End the run with this text, a pointer to README.md, and status 2."""
    pytest.exit(f'{text}. See "Test your own endpoint" in README.md.', 2)


def require_address(url: str) -> None:
    """End the run unless this can be the address of an endpoint."""
    if not url:
        stop("ENDPOINT is missing")
    parts = urlsplit(url)
    try:
        is_valid = parts.scheme in ("https", "http") and parts.hostname and parts.port != 0
    except ValueError:  # the port is not a number, or too large
        is_valid = False
    if not is_valid:
        stop(f"ENDPOINT must be an address such as https://example.com/path, not {url!r}")
    if parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        stop("ENDPOINT must begin with https://, except on loopback")


def target_from(variables: Mapping[str, str]) -> Target:
    """The endpoint that the variables name. A mistake in them ends the run."""
    url = variables.get("ENDPOINT", "")
    require_address(url)
    if not variables.get("API_KEY"):
        stop("API_KEY is missing")
    keys = {"api": variables["API_KEY"]}
    for name in ("expired", "limited"):
        keys[name] = variables.get(f"{name.upper()}_KEY", "")

    calls = tuple(variables.get("CALLS", ",".join(ORIGINAL_CALLS)).replace(" ", "").split(","))
    if unknown := [name for name in calls if name not in CONFORMANCE["calls"]]:
        stop(f"CALLS may contain only {', '.join(CONFORMANCE['calls'])}, not {unknown[0]!r}")

    ca = variables.get("CA", "")
    if ca and not Path(ca).is_file():
        stop(f"CA: no such file: {ca!r}")
    if url.startswith("http://"):
        return Target(url, keys, calls)
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except ssl.SSLError:
        stop(f"CA: {ca!r} contains no certificate in PEM format")
    if variables.get("INSECURE") == "1":
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return Target(url, keys, calls, context)


HINTS = {
    401: "check API_KEY",
    403: "check API_KEY and CALLS",
    404: "check the path in ENDPOINT",
    502: "check the application behind the proxy",
    503: "the endpoint is down, or in maintenance",
}


def require_accepted_call(target: Target) -> NetworkTransport:
    """Send one plain call, and return the transport. Its time has begun with this call.

    If the call is not accepted, end the run with a sentence that says why.
    """
    transport = NetworkTransport(target)
    try:
        reply = transport(build_request(PLAIN, target))
    except NoReplyError as error:
        hint = "; set CA, or INSECURE=1" if "CERTIFICATE_VERIFY_FAILED" in str(error) else ""
        if "WRONG_VERSION_NUMBER" in str(error):
            hint = "; it speaks http, not https"
        stop(f"{target.url} cannot be reached: {error}{hint}")
    except NotCheckedError as error:
        stop(f"{target.url} cannot be checked: {error}")
    if 300 <= reply.status < 400:
        stop(f"{target.url} answers {reply.status}, but Segment does not follow redirects")
    if reply.status >= 300:
        hint = HINTS.get(reply.status, "a plain call must be accepted before anything is checked")
        message = f". It says: {printable_text(reply.body, 200)}" if reply.body else ""
        stop(f"{target.url} answers {reply.status} to a plain call: {hint}{message}")
    return transport


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make each check a test; with `-m conformance`, also register Report with pytest."""
    if "check" not in metafunc.fixturenames:
        return
    config = metafunc.config
    config.addinivalue_line("markers", "conformance: check the endpoint that ENDPOINT names")
    parameters = [
        pytest.param(check, id=check.sentence.replace(" ", "_"), marks=pytest.mark.conformance)
        for check in CHECKS
    ]
    metafunc.parametrize("check", parameters)
    expression = config.getoption("markexpr")
    if expression not in ("", "conformance", "not conformance"):
        stop("Use -m conformance alone, and -k to select checks")
    if expression == "conformance" and not config.getoption("collectonly"):
        config.pluginmanager.register(Report())
        # The following settings suppress pytest's own counts and its summary.
        config.option.verbose = -2
        reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        reporter.reportchars = ""


class Report:
    """A plugin that adds to the report of pytest, and sets the exit status of an incomplete run."""

    selected = 0  # how many checks will run

    def pytest_report_collectionfinish(self, items: Sequence[pytest.Item]) -> list[str]:
        self.selected = len(items)
        url = target_from(os.environ).url
        ids = f"the user id {RUN_ID}, and message ids that start with it"
        return [
            f"Sending calls to {url}. Most have {ids}",
            "One character for each check: . kept, F broken MUST, x broken SHOULD, s not checked",
        ]

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, exitstatus: int
    ) -> None:
        """Show broken SHOULDs, why checks were not run, and the counts."""
        write = terminalreporter.write_line
        reasons: dict[str, list[str]] = {}
        for finding in FINDINGS.values():
            if finding.outcome == "broken" and not self.is_shown_by_pytest(finding, exitstatus):
                write(f"{describe_broken(finding)}\n")
            if finding.outcome == "not checked":
                reasons.setdefault(finding.text, []).append(finding.check.sentence)
        for reason, sentences in reasons.items():
            write(f"Not checked ({reason}):")
            for sentence in sentences:
                write(f"  {sentence}")
        outcomes = [finding.outcome for finding in FINDINGS.values()]
        kept, broken, skipped = map(outcomes.count, ("kept", "broken", "not checked"))
        if FINDINGS and len(FINDINGS) < self.selected:
            write(f"Interrupted: only {len(FINDINGS)} of {self.selected} checks were run")
        if FINDINGS:
            write(f"{kept} kept, {broken} broken, {skipped} not checked")

    @staticmethod
    def is_shown_by_pytest(finding: Finding, exitstatus: int) -> bool:
        """Whether pytest has shown this finding as a failure.

        The first test runs all the checks; each test then shows the finding of its own check. After
        Ctrl-C, some tests have not run, so Report shows every broken check itself.
        """
        fails = finding.check.level == "MUST" or os.environ.get("STRICT") == "1"
        return fails and exitstatus != pytest.ExitCode.INTERRUPTED

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Exit with 2 if a MUST was cut short, and nothing failed."""
        unchecked = [
            finding
            for finding in FINDINGS.values()
            if finding.check.level == "MUST" and finding.was_cut_short
        ]
        if unchecked and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.INTERRUPTED


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_conformance(check: Check, request: pytest.FixtureRequest) -> None:
    """Report the finding of this check.

    The first of these tests runs all selected checks. With `-m conformance`, it runs them against
    the endpoint that ENDPOINT names, and otherwise against our own receiver.
    """
    is_kit_run = request.config.getoption("markexpr") == "conformance"
    if not FINDINGS:
        items = [item for item in request.session.items if isinstance(item, pytest.Function)]
        selected: list[Any] = [
            item.callspec.params["check"]
            for item in items
            if hasattr(item, "callspec") and "check" in item.callspec.params
        ]
        if is_kit_run:
            judge_all(selected, require_accepted_call(target_from(os.environ)), FINDINGS)
        else:
            judge_our_receiver(selected)
    finding = FINDINGS[check.sentence]
    if finding.outcome == "not checked":
        if is_kit_run or finding.text.startswith("OpenSSL on this machine"):
            pytest.skip(finding.text)
        # NoAlias does not support alias, and the demo key `segment` is very short.
        assert finding.text in ("alias is not in CALLS", "API_KEY is shorter than 8 characters")
    if finding.outcome == "broken":
        if is_kit_run and check.level == "SHOULD" and os.environ.get("STRICT") != "1":
            pytest.xfail(describe_broken(finding))
        pytest.fail(describe_broken(finding), pytrace=False)


class NoAlias(Recorder):
    """A destination that supports every type but alias."""

    alias = None  # type: ignore[assignment]


def judge_our_receiver(checks: Sequence[Check]) -> None:
    """Run these checks against our own receiver, which supports every type but alias."""
    keys = {"api": "segment", "limited": "segment-identify-only", "expired": "segment-expired"}
    calls = tuple(name for name in CONFORMANCE["calls"] if name != "alias")
    with receiver.serve(NoAlias(), port=0, quiet=True) as server:
        context = ssl.create_default_context(cafile=server.tls_cert)
        transport = NetworkTransport(Target(server.url, keys, calls, context))
        judge_all(checks, transport, FINDINGS)


# ---- The proof that the kit finds faults ---------------------------------------------------------
#
# `correct_reply` is a small correct endpoint: a function from a request to a reply. A fault is a
# function that may replace this reply. FAULTS has faults of real implementations, each with
# sentences that the kit must report as broken. For the correct endpoint, it must report none. The
# conditions of faults match the values that conformance.json sends, such as a time that ends in
# ":07Z".

PROOF_TARGET = Target(
    "https://faulty.example/",
    {"api": "kit-key-5f2c", "limited": "kit-limited-77d0", "expired": "kit-expired-0a91"},
)
# The types that each valid key permits, or None for all.
PERMITTED_TYPES = {PROOF_TARGET.keys["api"]: None, PROOF_TARGET.keys["limited"]: {"identify"}}


class Exchange(NamedTuple):
    """What a fault may look at."""

    request: KitRequest
    headers: Mapping[str, str]  # with their names in lower case
    api_key: str | None  # see parse_api_key
    call: Any  # the parsed body, or NOT_JSON
    correct: KitReply  # what a correct endpoint replies


def error_reply(status: int, message: str = "No") -> KitReply:
    headers = {"content-type": "application/json"}
    if status == 401:
        headers["www-authenticate"] = "Basic"
    return KitReply(status, headers, json.dumps({"message": message}).encode())


def decode_credentials(headers: Mapping[str, str]) -> str | None:
    """The decoded credentials of an Authorization header, or None if they are malformed."""
    _, _, encoded = headers.get("authorization", "").partition(" ")
    try:
        return base64.b64decode(encoded, validate=True).decode()
    except ValueError:
        return None


def parse_api_key(headers: Mapping[str, str]) -> str | None:
    """The API key. None if the scheme is not Basic, there is no colon, or there is a password."""
    credentials = decode_credentials(headers)
    is_basic = headers.get("authorization", "").lower().startswith("basic ")
    if not credentials or not is_basic or not credentials.endswith(":"):
        return None
    return credentials.removesuffix(":")


def is_id_or_missing(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" not in value
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def is_time_or_missing(value: Any) -> bool:
    if value in (None, ""):
        return True
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


REQUIRED_FIELDS = {"track": "event", "group": "group_id"}


def has_valid_fields(call: Mapping[str, Any]) -> bool:
    """Whether a correct endpoint accepts the fields of this call."""
    snake = {}
    for name, value in call.items():
        snake[re.sub("[A-Z]", lambda capital: "_" + capital[0].lower(), name)] = value
    call_type = snake["type"]
    ids = [snake.get(name) for name in ("user_id", "anonymous_id", "message_id")]
    if call_type == "group":
        ids.append(snake.get("group_id"))
    if not all(map(is_id_or_missing, ids)):
        return False
    if snake.get("user_id") in (None, "") and snake.get("anonymous_id") in (None, ""):
        return False

    if call_type in REQUIRED_FIELDS and snake.get(REQUIRED_FIELDS[call_type]) in (None, ""):
        return False
    if call_type == "track" and not isinstance(snake["event"], str):
        return False
    if call_type == "page" and not isinstance(snake.get("name") or "", str):
        return False

    if not is_time_or_missing(snake.get("timestamp")):
        return False
    details = snake.get("traits" if call_type in ("identify", "group") else "properties")
    return not details or isinstance(details, dict)


def correct_reply(
    request: KitRequest, headers: Mapping[str, str], api_key: str | None, call: Any
) -> KitReply:
    """What a correct endpoint replies."""
    if request.method != "POST":
        return error_reply(405)
    if api_key not in PERMITTED_TYPES:
        return error_reply(401)
    media_type = headers.get("content-type", "application/json")
    if "json" not in media_type or "content-encoding" in headers:
        return error_reply(415)
    if not isinstance(call, dict) or not isinstance(call.get("type"), str):
        return error_reply(400)
    if call["type"] not in ORIGINAL_CALLS:
        return error_reply(501)
    if call["type"] not in (PERMITTED_TYPES[api_key] or ORIGINAL_CALLS):
        return error_reply(403)
    has_malformed_settings = headers.get("x-segment-settings") == "?"  # the only such value
    if has_malformed_settings or not has_valid_fields(call):
        return error_reply(400)
    return KitReply(200, {}, b"")


# A fault returns a reply, or only its status, or None to keep the correct reply.
Fault = Callable[[Exchange], KitReply | int | None]


def reject_nan(text: str) -> NoReturn:
    raise ValueError(text)


class FaultyEndpoint:
    """A transport to an endpoint with a fault, in this process."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def __call__(self, request: KitRequest) -> KitReply:
        headers = {name.lower(): value for name, value in request.headers.items()}
        try:
            call = json.loads(request.body.decode(), parse_constant=reject_nan)
            json.dumps(call, ensure_ascii=False).encode()  # fails for an unpaired surrogate
        except (ValueError, RecursionError):
            call = NOT_JSON
        api_key = parse_api_key(headers)
        correct = correct_reply(request, headers, api_key, call)
        reply = self.fault(Exchange(request, headers, api_key, call, correct))
        if isinstance(reply, int):
            reply = KitReply(200, {}, b"") if reply == 200 else error_reply(reply)
        return reply or correct


def findings_about(fault: Fault) -> list[Finding]:
    """The findings of the kit about an endpoint with this fault."""
    endpoint = FaultyEndpoint(fault)
    return [judge(check, PROOF_TARGET, endpoint) for check in CHECKS]


def broken_sentences(fault: Fault) -> set[str]:
    """The sentences that the kit says are broken by an endpoint with this fault."""
    findings = findings_about(fault)
    return {finding.check.sentence for finding in findings if finding.outcome == "broken"}


def test_the_kit_reports_nothing_for_a_correct_endpoint() -> None:
    assert broken_sentences(lambda exchange: None) == set()


def test_the_kit_skips_only_checks_of_connections_and_of_types_not_in_calls() -> None:
    reasons = {finding.text for finding in findings_about(lambda exchange: None)}
    other_types = {f"{name} is not in CALLS" for name in ("screen", "alias", "delete")}
    kept = ""  # these findings have no text
    assert reasons == {kept, "the endpoint runs in this process"} | other_types


def test_no_finding_shows_an_api_key() -> None:
    findings = findings_about(lambda exchange: error_reply(500, f"{exchange.api_key}"))
    text = "\n".join(finding.text for finding in findings)
    assert "***" in text
    assert [secret for secret in secrets_of(PROOF_TARGET) if secret in text] == []


@pytest.mark.parametrize("data", CONFORMANCE["checks"], ids=lambda data: data["sentence"])
def test_this_check_reports_a_wrong_status(data: dict[str, Any]) -> None:
    target = PROOF_TARGET._replace(calls=tuple(CONFORMANCE["calls"]))
    if data["requests"][0].get("unsupported"):
        target = PROOF_TARGET._replace(calls=("track",))
    wrong = next(status for status in (500, 200, 400) if not is_expected(status, data["statuses"]))
    run = expect_statuses(data["requests"], data["statuses"])
    with pytest.raises(BrokenError, match=f"{wrong} to "):
        run(target, lambda request: KitReply(wrong, {}, b""))


def fault_replacing(status: int, reply: KitReply | int) -> Fault:
    """A fault that gives this reply wherever a correct endpoint answers with this status."""
    return lambda exchange: reply if exchange.correct.status == status else None


def fault_crashing(call_type: str, condition: Callable[[dict[str, Any]], object]) -> Fault:
    """A fault that crashes on authorized calls that meet a condition.

    `call_type` limits it to one type of call; "any" stands for every type.
    """

    def fault(exchange: Exchange) -> int | None:
        call = exchange.call
        if exchange.correct.status in (401, 403) or not isinstance(call, dict):
            return None
        if call_type != "any" and call.get("type") != call_type:
            return None
        return 500 if condition(call) else None

    return fault


def fault_refusing(condition: Callable[[Exchange], object], status: int = 400) -> Fault:
    """A fault that refuses calls that should be accepted, if the condition is true."""
    return lambda exchange: (
        status if exchange.correct.status == 200 and condition(exchange) else None
    )


def fault_accepting(condition: Callable[[Exchange], object]) -> Fault:
    """A fault that accepts what should be refused, if the condition is true."""
    return lambda exchange: 200 if exchange.correct.status >= 400 and condition(exchange) else None


def is_call(exchange: Exchange) -> bool:
    return isinstance(exchange.call, dict)


def marks_as_seen_and_crashes() -> Fault:
    """A fault that marks a call as seen, and then crashes."""
    seen: set[Any] = set()

    def fault(exchange: Exchange) -> int | None:
        if exchange.correct.status != 200 or not is_call(exchange):
            return None
        message_id = exchange.call.get("message_id")
        if isinstance(message_id, str) and message_id in seen:
            return 200
        if isinstance(message_id, str):
            seen.add(message_id)
        return 500 if exchange.call.get("properties") is None else None

    return fault


def answers_409_to_duplicates() -> Fault:
    """A fault that answers 409 to a call that is sent twice."""
    seen: set[Any] = set()

    def fault(exchange: Exchange) -> int | None:
        if exchange.correct.status != 200 or not is_call(exchange):
            return None
        message_id = json.dumps(exchange.call.get("message_id"))
        if message_id in seen and message_id != "null":
            return 409
        seen.add(message_id)
        return None

    return fault


def accepts_unsupported_calls_when_retried() -> Fault:
    """A fault that acknowledges a call of an unsupported type when it is sent again."""
    seen: set[Any] = set()

    def fault(exchange: Exchange) -> int | None:
        if not is_call(exchange) or exchange.correct.status != 501:
            return None
        message_id = json.dumps(exchange.call.get("message_id"))
        if message_id in seen:
            return 200
        seen.add(message_id)
        return None

    return fault


NO_5XX = "{} is never answered with a 5xx other than 501"

# A fault, and sentences that it must break.
FAULTS: dict[str, tuple[Fault, list[str]]] = {
    "success is answered with 204": (
        fault_replacing(200, KitReply(204, {}, b"")),
        ["an accepted call is answered with 200 or 202"],
    ),
    "success is answered with 201": (
        fault_replacing(200, KitReply(201, {}, b"")),
        ["an accepted call is answered with 200 or 202"],
    ),
    "success has a body that is not JSON": (
        fault_replacing(200, KitReply(200, {}, b"OK")),
        ["the body of a success is empty or JSON"],
    ),
    "a request without a key is answered with 403": (
        lambda x: 403 if "authorization" not in x.headers else None,
        ["a request without an API key is answered with 401"],
    ),
    "a request without a key is accepted": (
        fault_accepting(lambda x: "authorization" not in x.headers),
        ["a request without an API key is answered with 401"],
    ),
    "a request without a key causes a crash": (
        lambda x: 500 if "authorization" not in x.headers else None,
        [NO_5XX.format("a malformed or unauthorized request")],
    ),
    "Bearer is accepted": (
        fault_accepting(lambda x: x.headers.get("authorization", "").startswith("Bearer")),
        ["a scheme other than Basic is answered with 401"],
    ),
    "the scheme is case-sensitive": (
        fault_refusing(lambda x: not x.headers["authorization"].startswith("Basic"), 401),
        ["the scheme Basic is accepted in lower case"],
    ),
    "malformed credentials are answered with 400": (
        lambda x: 400 if "authorization" in x.headers and x.api_key is None else None,
        ["malformed credentials are answered with 401"],
    ),
    "malformed credentials cause a crash": (
        lambda x: 500 if x.headers.get("authorization") == "Basic ???" else None,
        ["malformed credentials are answered with 401"],
    ),
    "credentials that are not UTF-8 cause a crash": (
        lambda x: 500 if x.headers.get("authorization") == "Basic //8=" else None,  # \xff\xff
        ["malformed credentials are answered with 401"],
    ),
    "every key is accepted": (
        fault_accepting(lambda x: x.correct.status == 401 and x.api_key is not None),
        ["an unknown API key is answered with 401"],
    ),
    "an empty key is accepted": (
        fault_accepting(lambda x: x.api_key == ""),
        ["an unknown API key is answered with 401"],
    ),
    "a prefix of the key is accepted": (
        fault_accepting(lambda x: x.api_key == PROOF_TARGET.keys["api"][:-1]),
        ["an unknown API key is answered with 401"],
    ),
    "the case of a key is ignored": (
        fault_accepting(lambda x: (x.api_key or "").lower() == PROOF_TARGET.keys["api"]),
        ["an API key in another case, or followed by a space, is answered with 401"],
    ),
    "a key is trimmed": (
        fault_accepting(lambda x: (x.api_key or "").strip() == PROOF_TARGET.keys["api"]),
        ["an API key in another case, or followed by a space, is answered with 401"],
    ),
    "a non-ASCII key causes a crash": (
        lambda x: 500 if x.api_key and not x.api_key.isascii() else None,
        ["an unknown non-ASCII API key is answered with 401"],
    ),
    "an unknown key is answered with 403": (
        lambda x: 403 if x.api_key and x.correct.status == 401 else None,
        ["an unknown API key is answered with 401"],
    ),
    "an expired key is accepted": (
        fault_accepting(lambda x: x.api_key == PROOF_TARGET.keys["expired"]),
        ["an expired API key is answered with 401"],
    ),
    "permissions are ignored": (
        fault_replacing(403, 200),
        ["an API key that does not permit the type is answered with 403"],
    ),
    "a missing permission is answered with 401": (
        fault_replacing(403, 401),
        ["an API key that does not permit the type is answered with 403"],
    ),
    "a colon is not needed": (
        fault_accepting(lambda x: decode_credentials(x.headers) == PROOF_TARGET.keys["api"]),
        ["credentials without a colon are answered with 401"],
    ),
    "a password is ignored": (
        fault_accepting(lambda x: decode_credentials(x.headers) == PROOF_TARGET.keys["api"] + ":x"),
        ["an API key with a password is answered with 401"],
    ),
    "a 401 has no challenge": (
        fault_replacing(
            401, KitReply(401, {"content-type": "application/json"}, b'{"message": "No"}')
        ),
        ["a 401 reply has a WWW-Authenticate header"],
    ),
    "an empty body is accepted": (
        fault_accepting(lambda x: x.correct.status == 400 and not x.request.body),
        ["an empty body is answered with 400"],
    ),
    "an empty body causes a crash": (
        lambda x: 500 if not x.request.body else None,
        ["an empty body is answered with 400"],
    ),
    "a body that is not JSON causes a crash": (
        lambda x: 500 if x.call is NOT_JSON and x.correct.status == 400 else None,
        ["a body that is not JSON is answered with 400"],
    ),
    "a body that is not JSON is accepted": (
        fault_accepting(lambda x: x.call is NOT_JSON and x.correct.status == 400),
        ["a body that is not JSON is answered with 400"],
    ),
    "an array causes a crash": (
        lambda x: 500 if isinstance(x.call, list) and x.correct.status == 400 else None,
        ["JSON that is not an object is answered with 400"],
    ),
    "null is accepted": (
        fault_accepting(lambda x: x.call is None),
        ["JSON that is not an object is answered with 400"],
    ),
    "a number causes a crash": (
        lambda x: 500 if isinstance(x.call, int) else None,
        ["JSON that is not an object is answered with 400"],
    ),
    "a batch is accepted": (
        fault_accepting(lambda x: isinstance(x.call, dict) and "batch" in x.call),
        ["a batch of calls is answered with 400"],
    ),
    "a body that is not UTF-8 causes a crash": (
        lambda x: 500 if b"\xe9" in x.request.body else None,
        ["a body that is not UTF-8 is answered with 400"],
    ),
    "a body that is not UTF-8 is accepted": (
        fault_accepting(lambda x: b"\xe9" in x.request.body),
        ["a body that is not UTF-8 is answered with 400"],
    ),
    "NaN is accepted": (
        fault_accepting(lambda x: b"NaN" in x.request.body),
        ["NaN and Infinity are answered with 400"],
    ),
    "deep nesting causes a crash": (
        lambda x: 500 if b"[[[[" in x.request.body else None,
        [NO_5XX.format("a body that is hard to parse")],
    ),
    "a long integer causes a crash": (
        lambda x: 500 if b"9" * 4500 in x.request.body else None,
        [NO_5XX.format("a body that is hard to parse")],
    ),
    "an unpaired surrogate causes a crash": (
        lambda x: 500 if rb"\ud800" in x.request.body else None,
        [NO_5XX.format("a body that is hard to parse")],
    ),
    "unexpected settings cause a crash": (  # W10= is [] in base64
        lambda x: 500 if x.headers.get("x-segment-settings") in ("?", "W10=") else None,
        [NO_5XX.format("an unusual or missing header")],
    ),
    "settings are required": (
        fault_refusing(lambda x: "x-segment-settings" not in x.headers),
        ["a call without X-Segment-Settings is accepted"],
    ),
    "a missing Content-Type causes a crash": (
        lambda x: 500 if "content-type" not in x.headers else None,
        [NO_5XX.format("an unusual or missing header")],
    ),
    "a charset is refused": (
        fault_refusing(lambda x: "charset" in x.headers.get("content-type", ""), 415),
        ["a Content-Type with a charset is accepted"],
    ),
    "a vendor's media type is refused": (
        fault_refusing(lambda x: "vnd" in x.headers.get("content-type", ""), 415),
        ["a vendor's media type is accepted"],
    ),
    "an unsupported type is answered with 400": (
        fault_replacing(501, 400),
        ["a type that Segment does not have is answered with 501"],
    ),
    "every unsupported type is accepted": (
        fault_replacing(501, 200),
        ["a type that Segment does not have is answered with 501"],
    ),
    "an unsupported type is answered with 404": (
        fault_replacing(501, 404),
        ["a type that is not in CALLS is answered with 501"],
    ),
    "the case of a type is ignored": (
        fault_accepting(lambda x: is_call(x) and x.call.get("type") == "Track"),
        ["a type that Segment does not have is answered with 501"],
    ),
    "a type that is named like a built-in attribute causes a crash": (
        fault_crashing("any", lambda call: call.get("type") in ("constructor", "__class__")),
        ["a type that Segment does not have is answered with 501"],
    ),
    "a type that is an object causes a crash": (
        fault_crashing("any", lambda call: isinstance(call.get("type"), dict)),
        [NO_5XX.format("a call whose type is unexpected")],
    ),
    "a type that is null causes a crash": (
        fault_crashing("any", lambda call: call.get("type") is None),
        [NO_5XX.format("a call whose type is unexpected")],
    ),
    "a missing type is answered with 501": (
        lambda x: (
            501 if is_call(x) and not x.call.get("type") and x.correct.status == 400 else None
        ),
        ["a call without a type is answered with 400"],
    ),
    "screen is accepted": (
        fault_accepting(lambda x: is_call(x) and x.call.get("type") == "screen"),
        ["a type that is not in CALLS is answered with 501"],
    ),
    "identify is not supported": (
        fault_refusing(lambda x: x.call["type"] == "identify", 501),
        ["an identify call is accepted"],
    ),
    "page needs a name": (
        fault_refusing(lambda x: x.call["type"] == "page" and not x.call.get("name")),
        ["a page call with only the required fields is accepted"],
    ),
    "identify needs traits": (
        fault_refusing(lambda x: x.call["type"] == "identify" and not x.call.get("traits")),
        ["an identify call with only the required fields is accepted"],
    ),
    "group without traits causes a crash": (
        fault_crashing("group", lambda call: "traits" not in call),
        [NO_5XX.format("a group call with only the required fields")],
    ),
    "track without properties causes a crash": (
        fault_crashing("track", lambda call: "properties" not in call),
        [NO_5XX.format("a track call with a missing field")],
    ),
    "page without context causes a crash": (
        fault_crashing("page", lambda call: "context" not in call),
        [NO_5XX.format("a page call with a missing field")],
    ),
    "track without a message_id causes a crash": (
        fault_crashing("track", lambda call: "message_id" not in call),
        [NO_5XX.format("a track call with a missing field")],
    ),
    "track without a timestamp causes a crash": (
        fault_crashing("track", lambda call: "timestamp" not in call),
        [NO_5XX.format("a track call with a missing field")],
    ),
    "a track call whose properties are null causes a crash": (
        fault_crashing("track", lambda call: call.get("properties", {}) is None),
        [
            NO_5XX.format("a track call with a field that is null"),
            NO_5XX.format("a track call with unexpected properties"),
        ],
    ),
    "an identify call whose traits are null causes a crash": (
        fault_crashing("identify", lambda call: call.get("traits", {}) is None),
        [NO_5XX.format("an identify call with a field that is null")],
    ),
    "a group call whose context is null causes a crash": (
        fault_crashing("group", lambda call: call.get("context", {}) is None),
        [NO_5XX.format("a group call with a field that is null")],
    ),
    "an identify call whose traits are text causes a crash": (
        fault_crashing("identify", lambda call: isinstance(call.get("traits"), str)),
        [NO_5XX.format("an identify call with unexpected traits")],
    ),
    "a track call whose properties are an array causes a crash": (
        fault_crashing("track", lambda call: isinstance(call.get("properties"), list)),
        [NO_5XX.format("a track call with unexpected properties")],
    ),
    "a page call whose properties are true causes a crash": (
        fault_crashing("page", lambda call: call.get("properties") is True),
        [NO_5XX.format("a page call with unexpected properties")],
    ),
    "a group call whose traits are 0 causes a crash": (
        # In Python, False equals 0, too.
        fault_crashing(
            "group", lambda call: call.get("traits") == 0 and call["traits"] is not False
        ),
        [NO_5XX.format("a group call with unexpected traits")],
    ),
    "an identify call whose email is not text causes a crash": (
        fault_crashing(
            "identify",
            lambda call: (
                isinstance(call.get("traits"), dict)
                and "email" in call["traits"]
                and not isinstance(call["traits"]["email"], str)
            ),
        ),
        [NO_5XX.format("an identify call with unexpected traits")],
    ),
    "a NUL in properties causes a crash": (
        fault_crashing("track", lambda call: "\\u0000" in json.dumps(call.get("properties"))),
        [NO_5XX.format("a track call with unexpected properties")],
    ),
    "the integer 2**70 causes a crash": (
        fault_crashing(
            "track", lambda call: "1180591620717411303424" in json.dumps(call.get("properties"))
        ),
        [NO_5XX.format("a track call with unexpected properties")],
    ),
    "a trait whose name has a dot causes a crash": (
        fault_crashing("identify", lambda call: "a.b" in json.dumps(call.get("traits"))),
        [NO_5XX.format("an identify call with unexpected traits")],
    ),
    "non-ASCII text is refused": (
        fault_refusing(lambda x: "日本" in x.request.body.decode()),
        ["non-ASCII text is accepted"],
    ),
    "an emoji causes a crash": (
        fault_crashing("any", lambda call: call.get("user_id") == "😀"),
        [NO_5XX.format("a track call with an unexpected user_id")],
    ),
    "a user_id that is a number causes a crash": (
        fault_crashing("identify", lambda call: isinstance(call.get("user_id"), int)),
        [NO_5XX.format("an identify call with an unexpected user_id")],
    ),
    "a user_id that is a number is refused": (
        fault_refusing(lambda x: isinstance(x.call.get("user_id"), int)),
        ["ids that are numbers are accepted"],
    ),
    "a user_id that is an object causes a crash": (
        fault_crashing("page", lambda call: isinstance(call.get("user_id"), dict)),
        [NO_5XX.format("a page call with an unexpected user_id")],
    ),
    "a NUL in a user_id causes a crash": (
        fault_crashing("group", lambda call: "\0" in str(call.get("user_id"))),
        [NO_5XX.format("a group call with an unexpected user_id")],
    ),
    "a NUL in an id is accepted": (
        fault_accepting(lambda x: is_call(x) and "\0" in str(x.call.get("user_id"))),
        ["an id with a NUL in it is answered with 400"],
    ),
    "a long user_id causes a crash": (
        fault_crashing("track", lambda call: len(str(call.get("user_id"))) > 255),
        [NO_5XX.format("a track call with an unexpected user_id")],
    ),
    "a user_id is required": (
        fault_refusing(lambda x: not x.call.get("user_id", x.call.get("userId"))),
        ["an anonymous call is accepted"],
    ),
    "a call without a user is accepted": (
        fault_accepting(
            lambda x: (
                is_call(x)
                and x.correct.status == 400
                and not x.call.get("user_id")
                and not x.call.get("anonymous_id")
            )
        ),
        ["a call with neither a user_id nor an anonymous_id is answered with 400"],
    ),
    "a call without a user causes a crash": (
        fault_crashing(
            "track", lambda call: not call.get("user_id") and not call.get("anonymous_id")
        ),
        [NO_5XX.format("a track call with an unexpected user_id")],
    ),
    "a track without an event is accepted": (
        fault_accepting(
            lambda x: is_call(x) and x.call.get("type") == "track" and not x.call.get("event")
        ),
        ["a track call without an event is answered with 400"],
    ),
    "a track without an event causes a crash": (
        fault_crashing("track", lambda call: not call.get("event")),
        ["a track call without an event is answered with 400"],
    ),
    "an event that is a number causes a crash": (
        fault_crashing("track", lambda call: isinstance(call.get("event"), int)),
        [NO_5XX.format("a track call with an unexpected event")],
    ),
    "a name that is an object causes a crash": (
        fault_crashing("page", lambda call: isinstance(call.get("name"), dict)),
        [NO_5XX.format("a page call with an unexpected name")],
    ),
    "a group without a group_id causes a crash": (
        fault_crashing("group", lambda call: not call.get("group_id")),
        ["a group call without a group_id is answered with 400"],
    ),
    "a group_id that is a number causes a crash": (
        fault_crashing("group", lambda call: isinstance(call.get("group_id"), int)),
        [NO_5XX.format("a group call with an unexpected group_id")],
    ),
    "traits that are text are accepted": (
        fault_accepting(lambda x: is_call(x) and isinstance(x.call.get("traits"), str)),
        ["traits that are not an object are answered with 400"],
    ),
    "an empty array is refused": (
        fault_refusing(lambda x: [] in (x.call.get("traits"), x.call.get("properties"))),
        ["an empty array in place of an empty object is accepted"],
    ),
    "a context that is an array causes a crash": (
        fault_crashing("track", lambda call: isinstance(call.get("context"), list)),
        [NO_5XX.format("a call with an unexpected context")],
    ),
    "a library that is null causes a crash": (
        fault_crashing(
            "track",
            lambda call: (
                isinstance(call.get("context"), dict) and call["context"].get("library", {}) is None
            ),
        ),
        [NO_5XX.format("a call with an unexpected context")],
    ),
    "integrations that are an array cause a crash": (
        fault_crashing("track", lambda call: isinstance(call.get("integrations"), list)),
        [NO_5XX.format("a call with unexpected integrations")],
    ),
    "a timestamp in words causes a crash": (
        fault_crashing("track", lambda call: call.get("timestamp") == "yesterday"),
        ["a timestamp that is not a time is answered with 400"],
    ),
    "a timestamp in words is accepted": (
        fault_accepting(lambda x: is_call(x) and x.call.get("timestamp") == "yesterday"),
        ["a timestamp that is not a time is answered with 400"],
    ),
    "an empty timestamp is refused": (
        fault_refusing(lambda x: x.call.get("timestamp") == ""),
        ["an empty timestamp is accepted"],
    ),
    "a timestamp that is a number causes a crash": (
        fault_crashing("track", lambda call: isinstance(call.get("timestamp"), int)),
        [NO_5XX.format("a call with an unexpected timestamp")],
    ),
    "a timestamp needs a zone": (
        fault_refusing(lambda x: str(x.call.get("timestamp")).endswith(".250")),
        ["a timestamp without a zone is accepted"],
    ),
    "a timestamp must end in Z": (
        fault_refusing(lambda x: "+01" in str(x.call.get("timestamp"))),
        ["a timestamp with an offset is accepted"],
    ),
    "a timestamp needs milliseconds": (
        fault_refusing(lambda x: str(x.call.get("timestamp")).endswith(":07Z")),
        ["a timestamp in whole seconds is accepted"],
    ),
    "a sent_at that is not a time is refused": (
        fault_refusing(lambda x: str(x.call.get("sent_at")).endswith(":Z")),
        ["a sent_at that is not a time is accepted"],
    ),
    "a received_at that is null causes a crash": (
        fault_crashing("track", lambda call: call.get("received_at", "") is None),
        [NO_5XX.format("a call with an unexpected received_at")],
    ),
    "a version that is text is refused": (
        fault_refusing(lambda x: isinstance(x.call.get("version"), str)),
        ["a version that is text is accepted"],
    ),
    "old calls are refused": (
        fault_refusing(lambda x: str(x.call.get("timestamp")).startswith("2012")),
        ["a replay of a call from years ago is accepted"],
    ),
    "camelCase is refused": (
        fault_refusing(lambda x: "userId" in x.call),
        ["keys in camelCase are accepted"],
    ),
    "camelCase causes a crash": (
        fault_crashing("group", lambda call: "groupId" in call),
        ["keys in camelCase are accepted"],
    ),
    "unknown fields are refused": (
        fault_refusing(lambda x: "colour" in x.call),
        ["an unknown field is accepted"],
    ),
    "a body over 16 KB is refused": (
        fault_refusing(lambda x: len(x.request.body) > 16_384, 413),
        ["a call of 32 KB is accepted"],
    ),
    "a duplicate is answered with 409": (
        answers_409_to_duplicates(),
        ["a call that is sent twice is accepted both times"],
    ),
    "a call that causes a crash is marked as seen": (
        marks_as_seen_and_crashes(),
        ["a call that has crashed the endpoint is not dismissed as a duplicate when it is retried"],
    ),
    "a refused call passes when it is sent again": (
        accepts_unsupported_calls_when_retried(),
        ["a call that was refused is refused again"],
    ),
    "GET is accepted": (
        fault_accepting(lambda x: x.request.method == "GET"),
        ["GET, PUT and DELETE are answered with 405 or 404"],
    ),
    "PUT is answered with 501": (
        lambda x: 501 if x.request.method == "PUT" else None,
        ["GET, PUT and DELETE are answered with 405 or 404"],
    ),
    "a refusal is labelled as HTML": (
        lambda x: (
            x.correct._replace(headers={"content-type": "text/html"}) if x.correct.body else None
        ),
        ["the body of a refusal is labelled as application/json"],
    ),
    "a refusal is plain text": (
        lambda x: x.correct._replace(body=b"No") if x.correct.body else None,
        ["the body of a refusal is empty, or a JSON object whose message is a non-empty string"],
    ),
    "a refusal has an error instead of a message": (
        lambda x: x.correct._replace(body=b'{"error": "No"}') if x.correct.body else None,
        ["the body of a refusal is empty, or a JSON object whose message is a non-empty string"],
    ),
    "a message is empty": (
        lambda x: x.correct._replace(body=b'{"message": ""}') if x.correct.body else None,
        ["the body of a refusal is empty, or a JSON object whose message is a non-empty string"],
    ),
    "a message is a list": (
        lambda x: x.correct._replace(body=b'{"message": ["No"]}') if x.correct.body else None,
        ["the body of a refusal is empty, or a JSON object whose message is a non-empty string"],
    ),
    "a refusal has no body": (
        lambda x: x.correct._replace(body=b"") if x.correct.body else None,
        ["the body of a refusal is not empty"],
    ),
    "a refusal shows the API key": (
        lambda x: error_reply(501, f"for {x.api_key}") if x.correct.status == 501 else None,
        ["no reply shows an API key"],
    ),
    "a refusal shows a traceback": (
        fault_replacing(501, error_reply(501, "Traceback (most recent call last)")),
        ["no reply shows a traceback"],
    ),
}


@cases("fault, sentences", FAULTS)
def test_the_kit_reports_this_fault(fault: Fault, sentences: list[str]) -> None:
    assert set(sentences) <= broken_sentences(fault)


class OriginalTypes(Recorder):
    """A destination that supports the original four types."""

    screen = alias = delete = None  # type: ignore[assignment]


class Crashing(OriginalTypes):
    """A destination that crashes on an unexpected event."""

    def track(self, user_id: Any, event: Any, properties: Any, call: Any) -> Any:
        if event == "😀":
            raise ZeroDivisionError


class Strict(OriginalTypes):
    """A destination that refuses calls without properties."""

    def track(self, user_id: Any, event: Any, properties: Any, call: Any) -> Any:
        if not properties:
            raise receiver.Refusal(400, "Missing properties")


def run_kit(
    destination: receiver.Destination, *options: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the kit as a user does, against a receiver with this destination."""
    run = [sys.executable, "-m", "pytest", "-q", "-m", "conformance", "-p", "no:cacheprovider"]
    run.append("--assert=plain")  # halves the time that pytest takes to start
    with receiver.serve(destination, port=0, quiet=True) as server:
        usual = {"ENDPOINT": server.url, "API_KEY": "segment", "CA": str(CERT)}
        return command(*run, *options, __file__, env={**os.environ, **usual, **variables})


def test_a_run_of_the_kit_ends_with_its_counts_and_status_0() -> None:
    done = run_kit(OriginalTypes())
    assert done.returncode == 0, done.stdout
    lines = done.stdout.strip().splitlines()
    assert re.match("Sending calls to https://127.0.0.1:.* user id conformance-", lines[0])
    assert re.fullmatch(r"\d+ kept, 0 broken, \d+ not checked", lines[-1])
    assert "Not checked (no LIMITED_KEY was given):\n  an API key that does not" in done.stdout


def test_a_broken_MUST_fails_the_run_with_status_1_and_shows_the_request() -> None:  # noqa: N802
    done = run_kit(Crashing(), "-k", "unexpected_event or success")
    assert done.returncode == 1
    assert 'MUST broken: "a track call with an unexpected event is never' in done.stdout
    assert "expected 2xx, 4xx or 501, but got" in done.stdout
    assert '500 to a track call with event "😀"' in done.stdout
    assert '> Authorization: Basic base64("YOUR_API_KEY:")' in done.stdout
    assert basic("segment").split()[1] not in done.stdout
    assert done.stdout.strip().endswith("1 kept, 1 broken, 0 not checked")


@pytest.mark.parametrize(("strict", "status"), [("", 0), ("1", 1)])
def test_a_broken_SHOULD_fails_the_run_only_if_strict(  # noqa: N802
    strict: str, status: int
) -> None:
    done = run_kit(Strict(), "-k", "only_the_required_fields_is_accepted", STRICT=strict)
    assert done.returncode == status
    assert 'SHOULD broken: "a track call with only the required fields' in done.stdout


def test_pytest_exits_with_2_if_the_run_cannot_begin() -> None:
    done = run_kit(OriginalTypes(), API_KEY="other")
    assert done.returncode == 2
    assert "answers 401 to a plain call: check API_KEY" in done.stdout
    assert "0 kept" not in done.stdout


def test_a_marker_expression_with_more_than_conformance_is_refused() -> None:
    done = run_kit(OriginalTypes(), "-m", "conformance and not slow")
    assert done.returncode == 2
    assert "Use -m conformance alone, and -k to select checks" in done.stdout + done.stderr


def test_a_MUST_that_was_cut_short_makes_the_exit_status_2(  # noqa: N802
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def transport(request: KitRequest) -> KitReply:
        raise CutShortError("no time was left")

    check = next(check for check in CHECKS if check.sentence == "a track call is accepted")
    finding = judge(check, PROOF_TARGET, transport)
    monkeypatch.setitem(FINDINGS, check.sentence, finding)
    session: Any = types.SimpleNamespace(exitstatus=pytest.ExitCode.OK)
    Report().pytest_sessionfinish(session)
    assert session.exitstatus == 2


def test_no_request_is_sent_once_the_run_has_no_time_left() -> None:
    transport = NetworkTransport(PROOF_TARGET)
    transport.deadline = time.monotonic() - 1
    with pytest.raises(CutShortError, match="no time was left"):
        transport(build_request(PLAIN, PROOF_TARGET))


def test_the_checks_are_listed_without_an_endpoint() -> None:
    done = run_kit(OriginalTypes(), "--collect-only", ENDPOINT="")
    assert done.returncode == 0
    assert "test_conformance[a_track_call_is_accepted]" in done.stdout


# Variables, and part of the message that ends the run.
STOPS: dict[str, tuple[dict[str, str], str]] = {
    "no address": ({"ENDPOINT": ""}, "ENDPOINT is missing"),
    "another scheme": ({"ENDPOINT": "ftp://x/"}, "ENDPOINT must be an address such as"),
    "a port that is not a number": ({"ENDPOINT": "https://x:y/"}, "ENDPOINT must be an address"),
    "http beyond loopback": (
        {"ENDPOINT": "http://example.com/"},
        "ENDPOINT must begin with https://, except on loopback",
    ),
    "no API key": ({"API_KEY": ""}, "API_KEY is missing"),
    "a missing file": ({"CA": "nowhere.pem"}, "CA: no such file: 'nowhere.pem'"),
    "a file that contains no certificate": (
        {"CA": str(HERE / "Makefile")},
        "Makefile' contains no certificate in PEM format",
    ),
    "an unknown type": ({"CALLS": "track,juggle"}, "CALLS may contain only identify, track, page,"),
    "an unknown API key": ({"API_KEY": "other"}, "answers 401 to a plain call: check API_KEY"),
    "a certificate that is not trusted": ({"CA": ""}, "; set CA, or INSECURE=1"),
}


@cases("variables, text", STOPS)
def test_a_run_that_cannot_begin_says_why(variables: dict[str, str], text: str) -> None:
    with receiver.serve(OriginalTypes(), port=0, quiet=True) as server:
        usual = {"ENDPOINT": server.url, "API_KEY": "segment", "CA": str(CERT)}
        with pytest.raises(pytest.exit.Exception, match=re.escape(text)) as stopped:
            require_accepted_call(target_from({**usual, **variables}))
    assert stopped.value.returncode == 2


def test_a_run_against_another_path_says_to_check_the_path() -> None:
    with receiver.serve(OriginalTypes(), port=0, quiet=True) as server:
        usual = {"ENDPOINT": server.url + "elsewhere", "API_KEY": "segment", "CA": str(CERT)}
        with pytest.raises(pytest.exit.Exception, match="answers 404 .* check the path"):
            require_accepted_call(target_from(usual))


def unused_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def test_a_run_against_a_port_on_which_nothing_listens_says_so() -> None:
    variables = {"ENDPOINT": f"http://127.0.0.1:{unused_port()}/", "API_KEY": "segment"}
    with pytest.raises(pytest.exit.Exception, match="cannot be reached: .* refused"):
        require_accepted_call(target_from(variables))


@contextlib.contextmanager
def raw_endpoint(reply: Callable[[socket.socket], object], until: bytes = b"}") -> Iterator[str]:
    """Run a server on loopback, and yield its address.

    For each connection, it reads until the data ends with `until`, which is usually the end of a
    body, and then calls `reply`. With b"" for `until`, it reads once.
    """
    stopping = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)

        def run() -> None:
            while not stopping.is_set():
                with contextlib.suppress(OSError):
                    sock, _ = listener.accept()
                    threading.Thread(target=handle, args=(sock,), daemon=True).start()

        def handle(sock: socket.socket) -> None:
            with sock, contextlib.suppress(OSError):
                # Closing with unread data would reset the connection, and could lose the reply.
                while (received := sock.recv(65_536)) and not received.endswith(until):
                    pass
                reply(sock)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            stopping.set()
            thread.join()


ONE_KEY = {"api": "kit-key-5f2c"}
OK_REPLY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
ERROR_REPLY = b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n"


def as_https(url: str) -> Target:
    """A target whose https:// URL leads to a server without TLS."""
    url = url.replace("http://", "https://")
    return Target(url, ONE_KEY, context=ssl.create_default_context())


def test_the_kit_reports_an_endpoint_that_serves_plain_http() -> None:
    with raw_endpoint(lambda sock: sock.sendall(OK_REPLY)) as url:
        target = as_https(url)
        with pytest.raises(BrokenError, match="^http://.* answers with 200"):
            check_plain_http(target, NetworkTransport(target))


def test_an_endpoint_that_does_not_answer_plain_http_passes_the_check() -> None:
    with raw_endpoint(lambda sock: None) as url:
        target = as_https(url)
        check_plain_http(target, NetworkTransport(target))


HANDSHAKE = b"\x16\x03\x01"
ALERT = b"\x15\x03\x01\0\2\2\x46"


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_the_kit_reports_an_endpoint_that_speaks_old_tls() -> None:
    with raw_endpoint(lambda sock: sock.sendall(HANDSHAKE), until=b"") as url:
        target = as_https(url)
        with pytest.raises(BrokenError, match=r"TLS 1\.0 was accepted"):
            check_old_tls(target, NetworkTransport(target))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_an_endpoint_that_refuses_old_tls_with_an_alert_passes_the_check() -> None:
    with raw_endpoint(lambda sock: sock.sendall(ALERT), until=b"") as url:
        target = as_https(url)
        check_old_tls(target, NetworkTransport(target))


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_old_tls_is_not_checked_if_nothing_listens() -> None:
    target = as_https(f"http://127.0.0.1:{unused_port()}/")
    with pytest.raises(NotCheckedError, match="cannot connect"):
        check_old_tls(target, NetworkTransport(target))


def test_the_kit_reports_an_endpoint_that_fails_on_the_sixteenth_connection() -> None:
    numbers = itertools.count(1)

    def reply(sock: socket.socket) -> None:
        sock.sendall(OK_REPLY if next(numbers) < 16 else ERROR_REPLY)

    with raw_endpoint(reply) as url:
        target = Target(url, ONE_KEY)
        with pytest.raises(BrokenError, match="500 to a plain call"):
            check_sixteen_connections(target, NetworkTransport(target))


def test_the_kit_reports_an_endpoint_that_closes_without_saying_so() -> None:
    with raw_endpoint(lambda sock: sock.sendall(OK_REPLY)) as url:
        target = Target(url, ONE_KEY)
        with pytest.raises(BrokenError, match="the connection does not work after a plain track"):
            check_connection_stays_open(target, NetworkTransport(target))


def test_the_kit_reports_an_endpoint_that_says_it_closes() -> None:
    reply = OK_REPLY.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n")
    with raw_endpoint(lambda sock: sock.sendall(reply)) as url:
        target = Target(url, ONE_KEY)
        with pytest.raises(BrokenError, match="the connection is closed after a plain track"):
            check_connection_stays_open(target, NetworkTransport(target))


def test_the_kit_reports_an_endpoint_that_serves_one_connection_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REPLY_SECONDS", 0.5)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        target = Target(f"http://127.0.0.1:{server.server_address[1]}/", ONE_KEY)
        try:
            with pytest.raises(BrokenError, match="no reply while another client was connected"):
                check_silent_connection(target, NetworkTransport(target))
        finally:
            server.shutdown()
            thread.join()


def trickle(sock: socket.socket) -> None:
    """Send a byte of a status line now and then, forever."""
    while True:
        sock.sendall(b"x")
        time.sleep(0.2)


def trickle_a_body(sock: socket.socket) -> None:
    """Send a byte of a body now and then, forever."""
    sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    trickle(sock)


def send_an_endless_body(sock: socket.socket) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        sock.sendall(b"x" * 10_000)


@pytest.mark.parametrize("reply", [trickle, trickle_a_body, send_an_endless_body])
def test_a_reply_that_never_ends_does_not_hold_up_the_run(
    reply: Callable[[socket.socket], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "REPLY_LIMIT", 0.7)
    with raw_endpoint(reply) as url:
        target = Target(url, ONE_KEY)
        started = time.monotonic()
        with pytest.raises(NoReplyError, match="did not end in time|is longer than"):
            NetworkTransport(target)(build_request(PLAIN, target))
        assert time.monotonic() - started < 5


def test_the_time_limit_of_a_reply_includes_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = http.client.HTTPConnection.connect

    def connect_slowly(link: http.client.HTTPConnection) -> None:
        connect(link)
        time.sleep(0.8)

    monkeypatch.setattr(http.client.HTTPConnection, "connect", connect_slowly)
    monkeypatch.setattr(sys.modules[__name__], "REPLY_LIMIT", 1)
    with raw_endpoint(trickle) as url:
        target = Target(url, ONE_KEY)
        started = time.monotonic()
        with pytest.raises(NoReplyError, match="did not end in time"):
            NetworkTransport(target)(build_request(PLAIN, target))
        assert time.monotonic() - started < 1.6


def test_a_rate_limit_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [
        b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: 0\r\n\r\n",
        OK_REPLY,
    ]
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    with raw_endpoint(lambda sock: sock.sendall(replies.pop(0))) as url:
        target = Target(url, ONE_KEY)
        assert NetworkTransport(target)(build_request(PLAIN, target)).status == 200
    assert waited == [3.0]


def test_a_rate_limit_that_outlasts_the_run_skips_the_check() -> None:
    reply = b"HTTP/1.1 503 No\r\nRetry-After: 3600\r\nContent-Length: 0\r\n\r\n"
    with raw_endpoint(lambda sock: sock.sendall(reply)) as url:
        target = Target(url, ONE_KEY)
        with pytest.raises(CutShortError, match="asks for a wait of 3600 seconds"):
            NetworkTransport(target)(build_request(PLAIN, target))


def test_no_silent_connection_is_opened_once_the_run_has_no_time_left() -> None:
    transport = NetworkTransport(Target(f"http://127.0.0.1:{unused_port()}/", ONE_KEY))
    transport.deadline = time.monotonic() - 1
    with pytest.raises(CutShortError, match="no time was left"):
        check_silent_connection(transport.target, transport)


def test_after_five_refused_connections_no_more_are_tried() -> None:
    target = Target(f"http://127.0.0.1:{unused_port()}/", ONE_KEY)
    transport = NetworkTransport(target)
    for _ in range(5):
        with pytest.raises(NoReplyError):
            transport(build_request(PLAIN, target))
    with pytest.raises(CutShortError, match="the endpoint refuses connections"):
        transport(build_request(PLAIN, target))


def test_a_key_without_letters_cannot_be_sent_in_another_case() -> None:
    target = Target("https://example.com/", {"api": "0123456789"})
    with pytest.raises(NotCheckedError, match="API_KEY has no letters"):
        build_request({"credentials": "{api_other_case}:"}, target)


def test_the_path_of_the_endpoint_is_shown_even_if_the_api_key_is_a_part_of_it() -> None:
    target = Target("https://example.com/kit-key-5f2c?a=1", ONE_KEY)
    shown_request = show_exchange(build_request(PLAIN, target), None, target)
    assert shown_request.startswith("  > POST /kit-key-5f2c?a=1 HTTP/1.1")


@cases(
    "traceback",
    {
        "Python": b"Traceback (most recent call last):",
        "JavaScript": b"at /srv/app.js:12:7)",
        "Java": b"at com.example.App(App.java:7)",
        "Ruby": b"app.rb:12:in `call'",
        "PHP": b"in index.php on line 3",
        "Go": b"main.go:12 +0x1d",
    },
)
def test_the_kit_recognizes_a_traceback_of_this_language(traceback: bytes) -> None:
    assert TRACEBACK.search(traceback)


def test_control_characters_of_a_reply_are_escaped() -> None:
    assert printable_text(b"a\x1b[31m\r\nb") == "a\\x1b[31m\\x0d\\x0ab"


# ==================================================================================================
# The project
#
# receiver.py needs nothing but Python, and `make certs` makes a certificate for localhost. The
# README is correct: its commands, tables and links, its solutions to the exercises, its WSGI
# application, and its program for PostgreSQL.
# ==================================================================================================

README = (HERE / "README.md").read_text()
# `make test` exports variables such as MAKEFLAGS, which would change what `make` does in a test.
ENVIRONMENT_WITHOUT_MAKE = {
    name: value for name, value in os.environ.items() if not name.startswith("MAKE")
}


def test_the_receiver_imports_nothing_outside_the_standard_library() -> None:
    imported = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).partition(".")[0])
    assert imported <= set(sys.stdlib_module_names)


def test_the_receiver_can_be_imported_without_the_modules_and_signals_of_unix() -> None:
    unix_only = ("fcntl", "resource", "termios", "pwd")
    # None in sys.modules makes an import fail.
    script = f"import sys; sys.modules.update(dict.fromkeys({unix_only!r}))\n"
    script += "import signal; del signal.SIGHUP, signal.SIGUSR1\n"
    script += "import receiver"
    assert command(sys.executable, "-c", script).returncode == 0


def test_make_certs_makes_a_certificate_for_localhost_once(tmp_path: Path) -> None:
    shutil.copy(HERE / "Makefile", tmp_path)
    made = command("make", "certs", cwd=tmp_path, env=ENVIRONMENT_WITHOUT_MAKE)
    assert made.stdout.startswith("Made certs/localhost.pem")
    cert = tmp_path / "certs/localhost.pem"
    text = command("openssl", "x509", "-in", cert, "-noout", "-text").stdout
    assert "DNS:localhost, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1" in text
    assert "prime256v1" in text
    assert (tmp_path / "certs/localhost-key.pem").stat().st_mode & 0o777 == 0o600

    before = cert.read_bytes()
    assert command("make", "certs", cwd=tmp_path, env=ENVIRONMENT_WITHOUT_MAKE).stdout == ""
    assert cert.read_bytes() == before


def test_make_certs_says_so_if_openssl_is_missing(tmp_path: Path) -> None:
    shutil.copy(HERE / "Makefile", tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "make", "mkdir", "test", "true"):
        path = shutil.which(tool)
        assert path, tool
        (tools / tool).symlink_to(path)
    missing = command("make", "certs", cwd=tmp_path, env={"PATH": str(tools)})
    assert missing.returncode != 0
    assert "openssl is missing" in missing.stderr


# ---- The README ----------------------------------------------------------------------------------


class Block(NamedTuple):
    """A fenced block, and its expected output if a `text` block follows."""

    language: str
    text: str
    output: str


def readme_blocks(language: str) -> list[Block]:
    """All blocks of the README in a language."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S)
    blocks = []
    # The last block has no next one: ("", "") takes its place.
    for (name, text), (next_name, next_text) in itertools.pairwise([*found, ("", "")]):
        blocks.append(Block(name, text, next_text if next_name == "text" else ""))
    return [block for block in blocks if block.language == language]


def readme_module(words: str) -> types.ModuleType:
    """The Python block of the README that contains these words, as a module."""
    [block] = [block for block in readme_blocks("python") if words in block.text]
    module = types.ModuleType("from_readme")
    exec(compile(block.text, "README.md", "exec"), module.__dict__)
    return module


def without_variable_parts(text: str) -> str:
    """Output in which HTTP dates and API keys are replaced by an ellipsis."""
    variable = r"\w{3}, \d\d \w{3} \d{4} [\d:]+ GMT|^[\w-]{43}$"
    return re.sub(variable, "…", text.replace("\r", ""), flags=re.M).strip()


def test_every_sh_block_of_the_readme_prints_what_the_readme_shows(tmp_path: Path) -> None:
    command("cp", "-r", "receiver.py", "fixtures", "Makefile", "certs", tmp_path)
    port = str(unused_port())
    start_block, *others = readme_blocks("sh")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**ENVIRONMENT_WITHOUT_MAKE, "PORT": port, "PATH": path}
    usual: dict[str, Any] = {"cwd": tmp_path, "env": environment, "start_new_session": True}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(
            ["sh", "-c", start_block.text], stdout=subprocess.PIPE, stderr=log, text=True, **usual
        )
    # The README shows both outputs: the first line is on standard output, the rest is in the log.
    listening, hint = start_block.output.replace("8443", port).split("\n", 1)
    try:
        assert server.stdout
        assert server.stdout.readline().strip() == listening
        for block in others:
            done = command("sh", "-ec", block.text.replace("8443", port), **usual)
            assert done.returncode == 0, done
            if block.output:
                shown = without_variable_parts(done.stdout)
                assert shown == without_variable_parts(block.output), done
    finally:
        os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does
        server.communicate(timeout=15)
    assert hint.strip() in (tmp_path / "log").read_text()


def test_the_smoke_test_of_the_readme_passes(tmp_path: Path) -> None:
    [block] = [block for block in readme_blocks("python") if "def server(tmp_path)" in block.text]
    (tmp_path / "test_smoke.py").write_text(block.text)
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_smoke.py"]
    done = command(*run, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_the_readme_lists_every_option_as_help_does() -> None:
    text = command(*RECEIVER, "--help", env={**ENVIRONMENT_WITHOUT_MAKE, "COLUMNS": "999"}).stdout
    pattern = r"^  (--[a-z-]+(?: [A-Z:]+)?)\s+(.+?)(?: \(default: (\S+)\))?$"
    options_of_help = re.findall(pattern, text, re.M)
    table = re.findall(r"^\| `(--[^`]+)` \|(?: `([^`]+)`)? \| (.+?) \|$", README, re.M)
    listed = [(option, description, default) for option, default, description in table]
    assert [row for row in options_of_help if row[0] != "--version"] == listed
    assert listed


def test_every_local_link_of_the_readme_leads_somewhere() -> None:
    names = re.findall(r"\[`(\w+)`\]\(receiver\.py\)", README)
    assert len(names) > 15
    assert [name for name in names if not hasattr(receiver, name)] == []
    prose = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
    headings = set()
    for title in re.findall(r"^#+ (.*)$", prose, re.M):
        headings.add("#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-"))
    for link in set(re.findall(r"\]\(([^)]+)\)", prose)):
        assert link.startswith("https:") or link in headings or (HERE / link).exists(), link


def test_every_test_that_the_readme_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", README))
    defined = set(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.M))
    assert named
    assert named - defined == set()


@pytest.mark.parametrize(
    "text",
    [
        "This port speaks HTTPS; use https://",
        "Analytics SDKs must post to Segment, not to this endpoint",
        "This endpoint receives calls that Segment forwards",
        "Unknown API key",
        "API token expired",
        "Log lines dropped",
    ],
)
def test_a_message_that_the_readme_explains_exists(text: str) -> None:
    assert text in README
    assert text in SOURCE


def ladder_of_the_readme() -> dict[int, set[int]]:
    """The status codes of each rung in the table of the README."""
    ladder: dict[int, set[int]] = {}
    for rung, statuses in re.findall(r"^\| (\d+) \| [^|]+ \| ([^|]+) \|", README, re.M):
        ladder.setdefault(int(rung), set()).update(map(int, re.findall(r"\d+", statuses)))
    return ladder


def test_the_ladder_of_the_readme_has_every_refusal_of_the_fixtures() -> None:
    ladder = ladder_of_the_readme()
    assert sorted(ladder) == list(range(1, 12))
    for record in json.loads((FIXTURES / "refused.json").read_text()):
        assert record["status"] in ladder[record["rung"]], record["wrong"]


def test_the_ladder_of_the_readme_says_what_is_retried() -> None:
    retried = {408, 429, *range(500, 600)} - {501, 505}
    rows_of_table = re.findall(r"^\| \d+ \| [^|]+ \| ([\d, ]+) \| (.*) \|$", README, re.M)
    assert len(rows_of_table) > 12
    for statuses, what_segment_does in rows_of_table:
        for status in map(int, statuses.split(", ")):
            assert what_segment_does == ("retries" if status in retried else "drops the call")


# ---- The solutions of the course -----------------------------------------------------------------


SOLUTIONS = os.environ.get("SOLUTIONS", "")
if SOLUTIONS:
    SOLUTIONS = os.path.abspath(SOLUTIONS)  # a test changes the current folder


def solution(name: str) -> Any:
    """An instance of a solution: from the file that SOLUTIONS names, or from the README."""
    module = types.ModuleType("solutions")
    if SOLUTIONS:
        exec(compile(Path(SOLUTIONS).read_text(), SOLUTIONS, "exec"), module.__dict__)
    else:
        module = readme_module("class Mailing(")
    return getattr(module, name)()


def send_calls(
    destination: receiver.Destination, *calls: Mapping[str, Any], settings: Any = None
) -> list[tuple[int, str]]:
    """Send these calls to a destination, and return the status and the message of each reply."""
    encoded = base64.b64encode(json.dumps(settings or {}).encode()).decode()
    found = []
    for call in calls:
        sent = {"type": "identify", "user_id": "u1", **call}
        reply = ask(sent, destination=destination, x_segment_settings=encoded)
        found.append((reply.status, reply.body.get("message", "")))
    return found


IDENTIFY = {"type": "identify"}
ORDER = {"type": "track", "event": "Order Completed", "message_id": "m1"}


@cases(
    "lists, traits, status",
    {
        "no lists yet": (set(), {"list": "news"}, 503),
        "a known list": ({"news"}, {"list": "news"}, 200),
        "an unknown list": ({"news"}, {"list": "other"}, 400),
        "no list": ({"news"}, {}, 400),
        "a list that is an array": ({"news"}, {"list": []}, 400),
    },
)
def test_exercise_1_only_a_temporary_problem_is_answered_with_503(
    lists: set[str], traits: dict[str, Any], status: int
) -> None:
    mailing = solution("Mailing")
    mailing.lists = lists
    assert send_calls(mailing, {"traits": traits})[0][0] == status


def test_exercise_2_a_customer_who_has_not_paid_may_send_identify_but_not_track() -> None:
    paid = solution("Paid")
    paid.unpaid = {"demo"}
    assert [status for status, _ in send_calls(paid, IDENTIFY, ORDER)] == [200, 403]
    paid.unpaid = set()
    assert [status for status, _ in send_calls(paid, ORDER)] == [200]


WORK = {"traits": {"workEmail": "a@example.com"}}
HOME = {"traits": {"email": "a@example.com"}}


@cases(
    "settings, calls, statuses",
    {
        "another trait": ({"emailField": "workEmail"}, [WORK, HOME], [200, 400]),
        "no setting": ({}, [HOME, WORK], [200, 400]),
        "a trait that is not text": ({}, [{"traits": {"email": None}}], [400]),
        "a setting that is not text": ({"emailField": 7}, [HOME], [400]),
    },
)
def test_exercise_3_a_setting_names_the_trait(
    settings: dict[str, Any], calls: list[dict[str, Any]], statuses: list[int]
) -> None:
    found = send_calls(solution("Addresses"), *calls, settings=settings)
    assert [status for status, _ in found] == statuses


@pytest.mark.parametrize("order", [*itertools.permutations(["01", "02", "03"])])
def test_exercise_4_the_newest_plan_wins_in_any_order(order: tuple[str, ...]) -> None:
    plans = solution("Plans")
    calls = [{"traits": {"plan": day}, "timestamp": f"2026-01-{day}"} for day in order]
    send_calls(plans, *calls)
    assert plans.newest["demo", "u1"] == ("2026-01-03T00:00:00.000Z", "03")


def test_exercise_5_a_call_is_synced_to_disk_before_it_is_answered_with_202(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(Path("spool.jsonl").read_text()))
    assert send_calls(solution("Spool"), ORDER) == [(202, "")]
    customer, message_id, call = json.loads(synced[-1])
    assert (customer, message_id, call["event"]) == ("demo", "m1", "Order Completed")


def test_exercise_6_two_equal_orders_count_as_two_but_retries_and_other_events_do_not() -> None:
    orders = solution("Orders")
    other_event = {**ORDER, "event": "Other", "message_id": "m3"}
    send_calls(orders, ORDER, {**ORDER, "message_id": "m2"}, ORDER, other_event)
    assert len(orders.seen) == 2


def test_exercise_6_a_forgotten_user_comes_back_only_with_a_newer_call() -> None:
    found = send_calls(
        solution("Forgetful"),
        {"type": "delete", "timestamp": "2026-01-02"},
        {"timestamp": "2026-01-01"},
        {"timestamp": "2026-01-03"},
        {"user_id": "u2", "timestamp": "2026-01-01"},
    )
    assert [status for status, _ in found] == [200, 410, 200, 200]


def test_the_solution_of_lesson_7_passes() -> None:
    module = readme_module("def test_a_refusal_leaves_the_connection_usable")
    module.test_a_refusal_leaves_the_connection_usable()


# ---- The example of a destination ----------------------------------------------------------------


def test_the_contacts_of_the_readme_answer_400_to_a_missing_email() -> None:
    contacts = readme_module("class Contacts(").Contacts()
    expected = [(400, "Missing email address"), (400, "Missing email address"), (200, "")]
    traits = [{}, {"email": 7}, {"email": "a@example.com"}]
    assert send_calls(contacts, *({"traits": value} for value in traits)) == expected


# ---- Behind a WSGI server ------------------------------------------------------------------------


def wsgi_environ(record: Record) -> dict[str, Any]:
    """A record of the fixtures as the environment of a WSGI server."""
    request_line, *lines = record.head.split("\r\n")
    method, target, _ = request_line.split(" ")
    path, _, query = target.partition("?")
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "SCRIPT_NAME": ""}
    environ["PATH_INFO"] = unquote(path, "latin-1")
    environ["QUERY_STRING"] = query
    for line in lines:
        name, _, value = line.partition(": ")
        key = name.upper().replace("-", "_")
        if key not in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            key = f"HTTP_{key}"
        environ[key] = value
    wsgiref.util.setup_testing_defaults(environ)
    environ["wsgi.input"] = io.BytesIO(record.body)
    return environ


def call_wsgi(application: Any, environ: dict[str, Any]) -> ReceivedReply:
    """The reply of a WSGI application, under the validator of wsgiref."""
    started: list[Any] = []

    def start_response(status: str, headers: Any, *_: Any) -> Callable[[bytes], object]:
        started.extend([status, headers])
        return lambda data: None

    body = wsgiref.validate.validator(application)(environ, start_response)
    data = b"".join(body)
    body.close()  # type: ignore[attr-defined]
    return ReceivedReply(int(started[0].split(" ")[0]), dict(started[1]), data)


# Left out: targets that are not a path, and heads that a WSGI server refuses by itself; but
# some servers pass on a Transfer-Encoding.
WSGI_RECORDS = {
    name: record
    for name, record in {**REFUSED, **ACCEPTED}.items()
    if re.match(r"\w+ /[^ #]* HTTP", record.head)
    and (record.rung != 1 or "Transfer-Encoding" in record.head)
}


@cases("record", WSGI_RECORDS)
@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
def test_the_wsgi_application_of_the_readme_gives_the_same_replies(record: Record) -> None:
    module = readme_module("def application_for(")
    application = module.application_for(FixtureDestination(), str(FIXTURES / "keys.json"))
    reply = call_wsgi(application, wsgi_environ(record))
    expected = ask_record(record, FixtureDestination())
    assert reply.status == expected.status
    assert json.loads(reply.body or b"{}") == expected.body
    for name, value in expected.headers.items():
        assert reply.headers[name] == value


def test_the_wsgi_application_accepts_an_empty_content_length() -> None:
    module = readme_module("def application_for(")
    application = module.application_for(Recorder(), str(FIXTURES / "keys.json"))
    environ: dict[str, Any] = {"SCRIPT_NAME": "", "PATH_INFO": "/health", "QUERY_STRING": ""}
    environ["CONTENT_LENGTH"] = ""
    wsgiref.util.setup_testing_defaults(environ)
    assert call_wsgi(application, environ).status == 200


def test_the_wsgi_application_refuses_a_body_that_ends_early() -> None:
    module = readme_module("def application_for(")
    application = module.application_for(Recorder(), str(FIXTURES / "keys.json"))
    record = ACCEPTED["a plain call"]
    environ = wsgi_environ(record._replace(body=record.body[:-1]))
    assert call_wsgi(application, environ).status == 400


# ---- PostgreSQL ----------------------------------------------------------------------------------
#
# The program postgres.py in the README, on a real PostgreSQL server.

psycopg: Any = importlib.import_module("psycopg") if importlib.util.find_spec("psycopg") else None
INITDB_PATTERN = "/usr/lib/postgresql/*/bin/initdb"
INITDB = shutil.which("initdb") or max(glob.glob(INITDB_PATTERN), default=None)
NOBODY = 65534  # PostgreSQL refuses to run as root
BEFORE_DELETE = "2026-01-15T09:00:00.000Z"
AT_DELETE = "2026-01-15T11:00:00.000Z"
AFTER_DELETE = "2026-01-15T12:00:00.000Z"


class Cluster:
    """A PostgreSQL server in a separate folder, which can be stopped and started."""

    def __init__(self, folder: Path, module: Any) -> None:
        self.folder = folder
        self.module = module  # postgres.py
        self.url = f"host={folder} user=postgres dbname=postgres"
        self.run_as: dict[str, Any] = {}
        if os.getuid() == 0:
            self.run_as = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
            os.chown(folder, NOBODY, NOBODY)
        self.programs = Path(str(INITDB)).parent
        words = [str(INITDB), f"--pgdata={folder / 'data'}", "--username=postgres", "--auth=trust"]
        words += ["--encoding=UTF8", "--locale=C", "--no-sync"]
        subprocess.run(words, check=True, capture_output=True, cwd="/", **self.run_as)
        self.start()

    def start(self) -> None:
        words = [str(self.programs / "postgres"), "-D", str(self.folder / "data")]
        words += ["-k", str(self.folder), "--listen_addresses=", "--deadlock_timeout=100ms"]
        self.popen = subprocess.Popen(
            words,
            stderr=subprocess.DEVNULL,
            cwd="/",
            **self.run_as,
        )
        wait_until(self.is_ready)

    def is_ready(self) -> bool:
        with contextlib.suppress(psycopg.OperationalError):
            return bool(self.query("select true"))
        return False

    def stop(self, number: signal.Signals = signal.SIGQUIT) -> None:
        """Stop the server. SIGQUIT shuts it down at once, as a crash would."""
        self.popen.send_signal(number)
        self.popen.wait(20)

    def connect(self) -> Any:
        return psycopg.connect(self.url, connect_timeout=5)

    def query(self, query: str, *values: object) -> list[Any]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(query, values or None)
            return cursor.fetchall() if cursor.description else []

    def message_ids(self) -> list[str]:
        return [row[0] for row in self.query("select message_id from calls order by 1")]

    def backends(self) -> list[int]:
        """The ids of the server's processes that serve the receivers' connections."""
        query = """select pid from pg_stat_activity
            where backend_type = 'client backend' and pid <> pg_backend_pid()"""
        return [row[0] for row in self.query(query)]


@pytest.fixture(scope="module")
def postgresql() -> Iterator[Cluster]:
    """A PostgreSQL server, for the destination in the README."""
    if psycopg is None or INITDB is None:
        pytest.skip("needs psycopg, and initdb, which is a part of PostgreSQL")
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:  # for a short socket path
        cluster = Cluster(Path(folder), readme_module("class Postgres("))
        yield cluster
        cluster.stop()


@pytest.fixture
def database(postgresql: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The server, with the table dropped."""
    monkeypatch.setenv("DATABASE_URL", postgresql.url)
    postgresql.query("drop table if exists calls")
    return postgresql


@pytest.fixture
def destinations(database: Cluster) -> Iterator[list[Any]]:
    """Two destinations, which do not know of each other."""
    pair = [database.module.Postgres() for _ in range(2)]
    yield pair
    for each in pair:
        each.shut()


def pg_call(
    message_id: str, kind: str = "track", timestamp: str = BEFORE_DELETE, **fields: Any
) -> receiver.Call:
    raw = {"type": kind, "user_id": "u1", "event": "E", "message_id": message_id}
    raw |= {"timestamp": timestamp, **fields}
    size = len(json.dumps(raw))
    return receiver.parse_call(raw, "demo", {}, size, receiver.utc_now)


def post_to(url: str, **fields: Any) -> int:
    """The status code of the reply to a track call."""
    call = {"type": "track", "user_id": "u1", "event": "E", **fields}
    reply = requests.post(url, json=call, auth=("segment", ""), verify=str(CERT), timeout=20)
    return reply.status_code


def refused_write(destination: Any, *calls: receiver.Call) -> tuple[int, float]:
    """The status with which a batch is refused, and the seconds until then."""
    started = time.monotonic()
    with pytest.raises(receiver.Refusal) as refused:
        destination.write(calls)
    return refused.value.status, time.monotonic() - started


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Call functions at the same moment, and return their results."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


@contextlib.contextmanager
def exclusive_lock(database: Cluster) -> Iterator[Any]:
    """Hold the lock that a batch with a delete takes, so that no other batch can proceed."""
    with database.connect() as connection:
        connection.execute(database.module.LOCK_ALONE)
        yield connection


def waits_for_lock(database: Cluster) -> bool:
    query = "select 1 from pg_locks where locktype = 'advisory' and not granted"
    return bool(database.query(query))


# ---- PostgreSQL: what is stored ------------------------------------------------------------------


def test_a_call_is_stored_as_it_was_sent(database: Cluster, destinations: list[Any]) -> None:
    properties = {"text": "a\0b\u20ac", "double": 1e-7, "integer": 10**30, "deep": [[{}]]}
    sent = pg_call("m1", anonymous_id="a1", properties=properties)
    assert destinations[0].write([sent]) == ["stored"]
    row = database.query(
        "select customer, type, user_id, anonymous_id, timestamp, call::text from calls"
    )[0]
    assert row[:4] == ("demo", "track", "u1", "a1")
    assert row[4] == datetime(2026, 1, 15, 9, tzinfo=UTC)
    assert json.loads(row[5]) == sent.raw


def test_the_earliest_and_latest_possible_timestamps_are_stored(
    database: Cluster, destinations: list[Any]
) -> None:
    calls = [
        pg_call("m1", timestamp="0001-01-01"),
        pg_call("m2", timestamp="9999-12-31T23:59:59.999Z"),
    ]
    assert destinations[0].write(calls) == ["stored", "stored"]
    stored = database.query("select (timestamp at time zone 'UTC')::text from calls order by 1")
    assert stored == [("0001-01-01 00:00:00",), ("9999-12-31 23:59:59.999",)]


def test_a_duplicate_is_recognized_within_a_batch_and_across_receivers(
    database: Cluster, destinations: list[Any]
) -> None:
    assert destinations[0].write([pg_call("m1"), pg_call("m1"), pg_call("m2")]) == [
        "stored",
        "duplicate",
        "stored",
    ]
    assert destinations[1].write([pg_call("m2"), pg_call("m3")]) == ["duplicate", "stored"]
    assert database.message_ids() == ["m1", "m2", "m3"]


def test_two_receivers_that_get_the_same_calls_at_once_store_them_once(
    database: Cluster, destinations: list[Any]
) -> None:
    first, second = destinations
    for n in range(30):
        calls = [pg_call(f"{n}-{i}") for i in range(10)]
        # The second receiver gets them in the opposite order, which also provokes deadlocks.
        outcomes = together(
            functools.partial(first.write, calls), functools.partial(second.write, calls[::-1])
        )
        for one, other in zip(outcomes[0], outcomes[1][::-1], strict=True):
            assert {one, other} == {"stored", "duplicate"}


def test_two_receivers_that_create_the_table_at_once_both_store_their_call(
    database: Cluster, destinations: list[Any]
) -> None:
    first, second = destinations
    for n in range(10):
        database.query("drop table if exists calls")
        outcomes = together(
            functools.partial(first.write, [pg_call(f"a{n}")]),
            functools.partial(second.write, [pg_call(f"b{n}")]),
        )
        assert outcomes == [["stored"], ["stored"]]


# ---- PostgreSQL: deletes -------------------------------------------------------------------------


def test_a_delete_removes_older_calls_wherever_they_are_in_its_batch(
    database: Cluster, destinations: list[Any]
) -> None:
    batch = [
        (pg_call("before"), "stored"),
        (pg_call("other user", user_id="u2"), "stored"),
        (pg_call("d1", "delete", AT_DELETE), "stored"),
        (pg_call("late"), "forgotten"),
        (pg_call("d1", "delete", AT_DELETE), "duplicate"),
        (pg_call("after", timestamp=AFTER_DELETE), "stored"),
        (pg_call("before"), "forgotten"),
    ]
    calls, expected = zip(*batch, strict=True)
    assert destinations[0].write(calls) == list(expected)
    assert database.message_ids() == ["after", "d1", "other user"]


def test_a_delete_is_stored_without_its_traits(database: Cluster, destinations: list[Any]) -> None:
    destinations[0].write([pg_call("d1", "delete", traits={"email": "secret"})])
    assert database.message_ids() == ["d1"]
    assert database.query("select 1 from calls where call::text like '%secret%'") == []


def test_a_delete_dated_in_the_future_counts_as_sent_now(destinations: list[Any]) -> None:
    destinations[0].write([pg_call("d1", "delete", "2099-01-01")])
    between_now_and_then = pg_call("m1", timestamp="2090-01-01")
    assert destinations[0].write([between_now_and_then]) == ["stored"]


@pytest.mark.parametrize("seed", range(20))
def test_any_batch_has_the_same_outcomes_as_in_the_default_store(
    seed: int, database: Cluster, destinations: list[Any], tmp_path: Path
) -> None:
    choose = random.Random(seed)
    store = FileStore(tmp_path / "calls.db")
    for _ in range(4):
        calls = [
            pg_call(
                f"m{choose.randrange(30)}",
                choose.choice(["track", "track", "identify", "delete"]),
                f"2026-01-15T{choose.randrange(10, 20)}:00:00.000Z",
                user_id=choose.choice(["u1", "u2"]),
            )
            for _ in range(choose.randrange(1, 15))
        ]
        assert destinations[0].write(calls) == store.write(calls)
    in_postgresql = database.query(
        "select message_id, type, call::text from calls order by message_id"
    )
    in_sqlite = store.find("select message_id, type, call from calls order by message_id")
    assert in_postgresql == in_sqlite
    store.close()


def test_a_delete_waits_for_a_batch_that_another_receiver_is_about_to_commit(
    database: Cluster, destinations: list[Any]
) -> None:
    destinations[0].write([pg_call("m0", user_id="u2")])  # connects, and creates the table
    with ThreadPoolExecutor(1) as pool:
        with database.connect() as other:
            other.execute(database.module.LOCK)
            other.execute(database.module.STORE, receiver.call_row(pg_call("old")))
            deleting = pool.submit(destinations[0].write, [pg_call("d1", "delete", AT_DELETE)])
            wait_until(lambda: waits_for_lock(database))
            assert not deleting.done()
        assert deleting.result() == ["stored"]
    assert database.message_ids() == ["d1", "m0"]


def test_a_batch_waits_for_a_delete_that_another_receiver_is_about_to_commit(
    database: Cluster, destinations: list[Any]
) -> None:
    destinations[0].write([pg_call("m0", user_id="u2")])  # connects, and creates the table
    with ThreadPoolExecutor(1) as pool:
        with exclusive_lock(database) as other:
            other.execute(
                database.module.STORE, receiver.call_row(pg_call("d1", "delete", AT_DELETE))
            )
            storing = pool.submit(destinations[0].write, [pg_call("old")])
            wait_until(lambda: waits_for_lock(database))
            assert not storing.done()
        assert storing.result() == ["forgotten"]


# ---- PostgreSQL: calls that can never be stored --------------------------------------------------


@pytest.mark.parametrize("field", ["message_id", "user_id"])
def test_a_call_with_an_id_too_long_for_an_index_is_refused_and_the_rest_of_its_batch_stored(
    field: str, database: Cluster
) -> None:
    # Random letters, because PostgreSQL would compress repeated ones.
    too_long = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz", k=9000))
    with receiver.serve(database.module.Postgres(), port=0, quiet=True) as running:
        assert post_to(running.url, message_id="first") == 200  # connects, and creates the table
        with ThreadPoolExecutor(8) as pool:
            with exclusive_lock(database):
                blocked = pool.submit(post_to, running.url, message_id="m0")
                wait_until(lambda: waits_for_lock(database))
                good = [pool.submit(post_to, running.url, message_id=f"m{n}") for n in range(1, 6)]
                bad = pool.submit(post_to, running.url, **{"message_id": "bad", field: too_long})
                destination: Any = running.endpoint.destination
                # The bad call and the five good ones must be in one batch. The writer takes a batch
                # by replacing the list `_queue`. So if this is still the same list, and has six
                # calls, none of them has been taken.
                queue_before = destination._queue
                wait_until(lambda: len(destination._queue) == 6)
                assert destination._queue is queue_before
            assert [each.result() for each in [blocked, *good]] == [200] * 6
            assert bad.result() == 400
    assert database.message_ids() == ["first", "m0", "m1", "m2", "m3", "m4", "m5"]


# ---- PostgreSQL: outages -------------------------------------------------------------------------

IN_TIME = 4.5  # seconds; less than Segment waits


def test_calls_get_503_while_the_database_is_down_and_are_stored_when_it_is_back(
    database: Cluster, destinations: list[Any]
) -> None:
    first, second = destinations
    first.write([pg_call("m1")])  # connects; `second` has no connection yet
    database.stop()
    try:
        # Two rounds: in the first, the destination `first` still believes that it is connected.
        for destination in [first, second, first, second]:
            status, seconds = refused_write(destination, pg_call("m2"))
            assert status == 503
            assert seconds < IN_TIME
    finally:
        database.start()
    assert first.write([pg_call("m2")]) == ["stored"]
    assert second.write([pg_call("m2")]) == ["duplicate"]


def test_after_a_restart_of_the_database_not_even_the_first_batch_is_refused(
    database: Cluster, destinations: list[Any]
) -> None:
    destinations[0].write([pg_call("m1")])
    database.stop()
    database.start()
    assert destinations[0].write([pg_call("m1"), pg_call("m2")]) == ["duplicate", "stored"]


@pytest.mark.parametrize("stop_signal", [signal.SIGQUIT, signal.SIGINT, signal.SIGKILL])
def test_a_restart_in_the_middle_of_a_batch_neither_loses_nor_duplicates_calls(
    stop_signal: signal.Signals, database: Cluster, destinations: list[Any]
) -> None:
    destinations[0].write([pg_call("m0")])
    calls = [pg_call(f"m{n}") for n in range(1, 50)]
    with ThreadPoolExecutor(1) as pool:
        other = database.connect()
        other.execute("lock table calls in share mode")  # the batch will begin, but cannot insert
        storing = pool.submit(destinations[0].write, calls)
        wait_until(lambda: database.query("select 1 from pg_locks where not granted"))
        database.stop(stop_signal)
        if stop_signal == signal.SIGKILL:
            # Wait until its child processes have noticed, and have freed the shared memory.
            wait_until(lambda: not processes_in(database.folder))
        with contextlib.suppress(receiver.Refusal):
            storing.result()
        other.close()
        database.start()
    assert len(database.message_ids()) in (1, 50)  # all or nothing
    assert set(destinations[0].write(calls)) <= {"stored", "duplicate"}
    assert database.message_ids() == sorted(f"m{n}" for n in range(50))


def processes_in(folder: Path) -> list[str]:
    """The processes whose current folder is this one, or below it."""
    found = []
    for path in glob.glob("/proc/[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if os.readlink(path).startswith(str(folder)):
                found.append(path)
    return found


def test_a_call_on_a_connection_that_hangs_is_refused_in_time_and_the_next_one_is_stored(
    database: Cluster, destinations: list[Any]
) -> None:
    destinations[0].write([pg_call("m1")])
    (backend,) = database.backends()
    os.kill(backend, signal.SIGSTOP)
    try:
        status, seconds = refused_write(destinations[0], pg_call("m2"))
        assert status == 503
        assert seconds < IN_TIME
        assert destinations[0].write([pg_call("m3")]) == ["stored"]
    finally:
        os.kill(backend, signal.SIGCONT)


def test_if_a_lock_is_not_released_a_call_is_refused_with_503_in_time(
    database: Cluster, destinations: list[Any]
) -> None:
    destinations[0].write([pg_call("m1")])
    with exclusive_lock(database):
        status, seconds = refused_write(destinations[0], pg_call("m2"))
    assert status == 503
    assert seconds < IN_TIME
    assert destinations[0].write([pg_call("m2")]) == ["stored"]


def test_if_the_database_is_read_only_a_call_is_refused_with_503(
    database: Cluster, destinations: list[Any]
) -> None:
    # One destination creates the table. The other must not be connected yet, because the setting
    # applies only to new sessions.
    destinations[1].write([pg_call("m1")])
    database.query("alter database postgres set default_transaction_read_only = on")
    try:
        assert refused_write(destinations[0], pg_call("m2"))[0] == 503
    finally:
        with psycopg.connect(database.url, autocommit=True) as connection:
            connection.execute("set default_transaction_read_only = off")
            connection.execute("alter database postgres reset default_transaction_read_only")
    assert destinations[0].write([pg_call("m2")]) == ["stored"]


@pytest.mark.parametrize("url", ["host=/nowhere", "port=no", "host=127.0.0.1 port=1"])
def test_if_database_url_leads_nowhere_a_call_is_refused_with_503(
    url: str, database: Cluster, destinations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    assert refused_write(destinations[0], pg_call("m1"), pg_call("m2"))[0] == 503


def test_if_the_server_accepts_a_connection_and_says_nothing_a_call_is_refused_in_time(
    database: Cluster, destinations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("DATABASE_URL", f"host=127.0.0.1 port={silent.getsockname()[1]}")
        status, seconds = refused_write(destinations[0], pg_call("m1"))
    assert status == 503
    assert seconds < IN_TIME


# ---- PostgreSQL: the program ---------------------------------------------------------------------


@contextlib.contextmanager
def postgres_process(folder: Path, port: int) -> Iterator[RunningReceiver]:
    """The program postgres.py of the README, in a separate process."""
    [block] = [block for block in readme_blocks("python") if "class Postgres(" in block.text]
    with run_program(folder, block.text, "--reuse-port", "--port", port) as process:
        yield process


@pytest.mark.skipif(not importlib.util.find_spec("psycopg"), reason="needs psycopg")
def test_the_help_of_postgres_py_needs_no_database(tmp_path: Path) -> None:
    [block] = [block for block in readme_blocks("python") if "class Postgres(" in block.text]
    (tmp_path / "postgres.py").write_text(block.text)
    environment = {**os.environ, "PYTHONPATH": str(HERE), "DATABASE_URL": "port=no"}
    shown = command(sys.executable, "postgres.py", "--help", cwd=tmp_path, env=environment)
    assert shown.returncode == 0
    assert "--reuse-port" in shown.stdout


def test_two_receivers_on_one_port_share_the_database(database: Cluster, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with postgres_process(tmp_path / "one", 0) as one:
        port = urlsplit(one.url).port or 0
        with postgres_process(tmp_path / "two", port) as two:

            def send(number: int) -> int:  # two numbers share each message_id
                return post_to(one.url, message_id=f"m{number // 2}")

            with ThreadPoolExecutor(8) as executor:
                assert set(executor.map(send, range(200))) == {200}
            assert (one.stop(), two.stop()) == (0, 0)
            assert " 200 " in one.log
            assert " 200 " in two.log
            assert (one.log + two.log).count(" duplicate ") == 100
    assert len(database.message_ids()) == 100
