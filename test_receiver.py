# SPDX-License-Identifier: MIT
"""What the receiver promises, sentence by sentence, in the order of receiver.py.

First the protocol without a network, then the store on real files, then the server: TLS, sockets, and what an open port
and a bad day do to them. Then the other ways in, the command line, the conformance kit, and what the project promises.
"""

from __future__ import annotations

import ast
import base64
import builtins
import contextlib
import fcntl
import functools
import hashlib
import http.client
import io
import itertools
import json
import os
import random
import re
import resource
import secrets
import shutil
import signal
import socket
import socketserver
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import quote, unquote, urlsplit

import pytest
import requests

import receiver

# ======================================================================================================================
# What all tests share
#
# A request as bytes, and as the one function of the protocol takes it; a receiver in a process of its own, and a TLS
# connection that sends it what it is given. Nothing has a fixed port, and nothing is left running.
# ======================================================================================================================

os.environ["TZ"] = "Asia/Tokyo"  # far from UTC, which everything has to be in wherever the machine stands
time.tzset()
HERE = Path(__file__).parent
FIXTURES, CERT, CERT_KEY = HERE / "fixtures", HERE / "certs/localhost.pem", HERE / "certs/localhost-key.pem"
RECEIVER = (sys.executable, HERE / "receiver.py")
SAMPLES = {kind: json.loads((FIXTURES / f"{kind}.json").read_text()) for kind in ("identify", "track", "page", "group")}
KEYS = receiver.parse_keys((FIXTURES / "keys.json").read_text())
NOW = "2026-01-15T12:00:00.000Z"
TRACK = {"type": "track", "user_id": "u1", "event": "Signed Up"}
TRACK_JSON = json.dumps(TRACK).encode()
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a close with this option is a reset


def basic(key: str) -> str:
    return "Basic " + base64.b64encode(f"{key}:".encode()).decode()


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def request(
    call: Any = TRACK, *lines: str, method: str = "POST", target: str = "/", version: str = "HTTP/1.1",
    host: str | None = "Host: localhost", key: str | None = "segment", length: object = None,
) -> bytes:  # fmt: skip
    """A request as bytes: with a call, or a body in bytes, and its length; or if that is None a head alone."""
    body = b"" if call is None else call if isinstance(call, bytes) else json.dumps(call).encode()
    length = len(body) if length is None and call is not None else length
    usual = [host, key and f"Authorization: {basic(key)}", None if length is None else f"Content-Length: {length}"]
    head = [f"{method} {target} {version}", *(line for line in usual if line is not None), *lines, "", ""]
    return "\r\n".join(head).encode("latin-1") + body


def sentences(names: str, table: list[Any]) -> pytest.MarkDecorator:
    """Parametrize with a table where each row begins with a sentence, which becomes the name of its test."""
    return pytest.mark.parametrize(names, [pytest.param(*row[1:], id=row[0]) for row in table])


def recorded(file: str) -> pytest.MarkDecorator:
    """Parametrize with the requests in a file of the fixtures, each with what is said of it."""
    table = []
    for record in json.loads((FIXTURES / file).read_text()):
        sent = record["request"]
        body = sent.get("body", "").encode() or base64.b64decode(sent.get("body_base64", ""))
        headers = {name.lower(): value for name, value in sent["headers"].items()}
        case = types.SimpleNamespace(**{**sent, **record, "body": body, "headers": headers})
        table.append((next(iter(record.values())), case))
    return sentences("case", table)


head = functools.partial(request, None)
each_refused, each_accepted = recorded("refused.json"), recorded("accepted.json")


class Recorder(receiver.Destination):
    """A destination that knows all types of call, remembers what it was given, and answers as it was told."""

    def __init__(self, outcome: Any = None) -> None:
        self.outcome, self.calls = outcome, list[tuple[Any, ...]]()

    def _take(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome() if callable(self.outcome) else self.outcome

    identify = track = page = group = delete = screen = alias = _take


def ask(
    body: Any = TRACK, method: str = "POST", target: str = "/", destination: receiver.Destination | None = None,
    keys: Mapping[str, receiver.Key] = KEYS, maintenance: bool = False, **headers: str | None,
) -> receiver.Reply:  # fmt: skip
    """The reply to a request without a network; underscores in a header's name are hyphens, and None leaves it out."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"authorization": basic("segment"), "content-length": str(len(data))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}  # type: ignore[misc]
    sent = {name: value for name, value in named.items() if value is not None}
    length = receiver.parse_length(sent.get("content-length"))
    endpoint = receiver.Endpoint(destination or Recorder(), keys)
    endpoint = endpoint._replace(maintenance=True) if maintenance else endpoint
    return receiver.answer(receiver.Request(method, target, sent, length, lambda: data), endpoint, lambda: NOW)


def given(call: Any = TRACK, **asked: Any) -> Any:
    """What a destination is given for a call: the handler's arguments, and the call itself as the last."""
    recorder = Recorder()
    assert ask(call, destination=recorder, **asked)[:3] == (200, {}, {})
    return recorder.calls[0]


def rows(path: Path, query: str, *values: object) -> list[Any]:
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query, values).fetchall()


def until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """Wait for what has no event of its own, as what another process does; what it is then."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "this did not come in time"
        time.sleep(0.01)
    return found


def command(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in the project's folder."""
    usual = {"cwd": HERE, "capture_output": True, "text": True, "timeout": 60}
    return subprocess.run(list(map(str, words)), **{**usual, **options})


TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
LOG_LINE = re.compile("|".join([  # all that stands in a log after the greeting: what goes on below a line is indented
    rf"{TIME} \d{{3}}( (\S+|'.*'|\".*\"|[\[{{].*[\]}}])){{4}}( duplicate)? \d+\.\d ms( .+)?",
    "    .*", "[{}]", rf"{TIME} {{",
    rf"{TIME} \d+ keys read from \S+\.json", rf"{TIME} The keys stay as they were: \S+\.json.+",
    rf"{TIME} Certificate read from \S+\.pem", rf"{TIME} The certificate stays as it was: \S+\.pem, \S+\.key: .+\)",
    rf"{TIME} Maintenance is (on|off)", rf"{TIME} Connection with 127\.0\.0\.1: .+",
    rf"{TIME} \d+ calls could not be stored: (database is locked|database or disk is full|disk I/O error)",
]))  # fmt: skip


class Process(contextlib.AbstractContextManager["Process"]):
    """A receiver in a process of its own, on a free port and with a database of its own, until the context ends."""

    def __init__(self, folder: Path, *options: object, cwd: Path = HERE, log_path: Path | None = None) -> None:
        self.database, self.log_path = folder / "calls.db", log_path or folder / f"log-{time.monotonic_ns()}"
        self.tls_cert = str(CERT)
        words = [*map(str, [*RECEIVER, "--port", 0, "--database", self.database, *options])]
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(words, cwd=cwd, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout
        self.said = self.process.stdout.readline()
        self.url = self.said.removeprefix("Listening on ").strip()

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def logs(self, pattern: str, seconds: float = 10) -> Any:
        """Wait until its log has this, and return the match."""
        return until(lambda: re.search(pattern, self.log, re.M), seconds)

    def so_far(self) -> int:
        """The length of its log once all lines about requests until now are there, as they may be a moment late."""
        user = f"mark-{time.monotonic_ns()}"
        post(self, {**TRACK, "user_id": user})
        self.logs(user)
        return len(self.log)

    def ids(self) -> list[str]:
        return [message_id for (message_id,) in rows(self.database, "select message_id from calls")]

    def vitals(self) -> tuple[int, int, int]:
        """Open files, threads, resident megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = dict(re.findall(r"^(Threads|VmRSS):\s+(\d+)", status, re.M))
        return len(os.listdir(f"/proc/{self.process.pid}/fd")), int(found["Threads"]), int(found["VmRSS"]) >> 10

    def rest(self) -> None:
        """Take one call, so that all files are open, and remember how many files and threads it needs at rest."""
        assert post(self).status_code == 200
        until(lambda: self.vitals()[1] <= 3)
        self.at_rest = self.vitals()[:2]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it; its exit status. On its standard output was nothing but the one line."""
        self.process.send_signal(number)
        assert self.process.communicate(timeout=15)[0] == ""
        return self.process.returncode

    def __exit__(self, failed: object, *_: object) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)
        lines = self.log.split("\n")[:-1] if self.log_path.is_file() and not failed else []
        greeting = next((number for number, line in enumerate(lines) if re.match(TIME, line)), len(lines))
        assert not [line for line in lines[greeting:] if not LOG_LINE.fullmatch(line)]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One receiver for all that leaves it as it was, and for every attack that it should not even feel."""
    with Process(tmp_path_factory.mktemp("running"), "--timeout", "2") as process:
        process.rest()
        yield process
        assert process.stop() == 0


def post(server: receiver.Server | Process, call: Any = TRACK, key: str = "segment", url: str = "") -> Any:
    return requests.post(url or server.url, json=call, auth=(key, ""), verify=server.tls_cert, timeout=20)


def connect(server: receiver.Server | Process) -> socket.socket:
    parts = urlsplit(server.url)
    return socket.create_connection((parts.hostname, parts.port), 15)


class Answer(NamedTuple):
    """A reply; its status is 0 if there was none."""

    status: int = 0
    headers: Mapping[str, str] = {}
    body: bytes = b""


class Wire(contextlib.AbstractContextManager["Wire"]):
    """A TLS connection that sends the bytes that it is given, and reads replies one by one."""

    def __init__(self, server: receiver.Server | Process, context: ssl.SSLContext | None = None) -> None:
        context = context or ssl.create_default_context(cafile=server.tls_cert)
        self.tls = context.wrap_socket(connect(server), server_hostname="localhost")
        self.buffer = b""

    def send(self, data: bytes) -> Wire:
        self.tls.sendall(data)
        return self

    def end(self) -> Wire:
        """Send no more, without TLS's goodbye."""
        socket.socket.shutdown(self.tls, socket.SHUT_WR)
        return self

    def reset(self) -> None:
        self.tls.setsockopt(*RESET)
        self.tls.close()

    def more(self) -> bytes:
        """Receive; nothing if the connection has ended."""
        got = b""
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            got = self.tls.recv(65_536)
        self.buffer += got
        return got

    def reply(self, head_only: bool = False) -> Answer:
        """The next reply, whole; if the connection ends before, none, and what there was of it stays in the buffer."""
        while True:
            top, end, rest = self.buffer.partition(b"\r\n\r\n")
            line, *lines = top.decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (text.partition(": ") for text in lines)}
            length = 0 if head_only or not end else int(headers.get("content-length", 0))
            if end and len(rest) >= length:
                assert line.startswith("HTTP/1.1 "), line
                self.buffer = rest[length:]
                return Answer(int(line.split(" ")[1]), headers, rest[:length])
            if not self.more():
                return Answer()

    def status(self, data: bytes) -> int:
        return self.send(data).reply().status

    def closed(self) -> bool:
        """Whether the connection has ended without another byte."""
        return not self.buffer and not self.more()

    def __exit__(self, *_: object) -> None:
        self.tls.close()


class Load(contextlib.AbstractContextManager["Load"]):
    """Clients that send calls as fast as they are answered, until the receiver goes or the context ends."""

    def __init__(self, server: receiver.Server | Process, name: object, clients: int, most: int = 10**9) -> None:
        self.server, self.most, self.enough = server, most, threading.Event()
        self.sent, self.stored, self.others, self.seconds = set[str](), set[str](), list[Any](), list[float]()
        self.pool = ThreadPoolExecutor(clients)
        self.clients = [self.pool.submit(self.client, f"{name}-{number}-") for number in range(clients)]

    def client(self, name: str) -> None:
        with contextlib.suppress(OSError), Wire(self.server) as wire:
            for message_id in (f"{name}{number}" for number in range(self.most)):
                started = time.monotonic()
                self.sent.add(message_id)
                reply = wire.send(request({**TRACK, "message_id": message_id})).reply()
                self.seconds.append(time.monotonic() - started)
                if reply.status == 200:
                    self.stored.add(message_id)
                else:
                    self.others.append(reply.status or wire.buffer)
                if self.enough.is_set() or reply.headers.get("connection") != "keep-alive":
                    break

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        self.pool.shutdown()


# ======================================================================================================================
# 1. The protocol
#
# What is answered to which request, without a network: every sentence of PROTOCOL.md's tables and every rung of the
# ladder in DESIGN.md but the first, which is the server's. All this is one function, answer(), and what it calls.
# ======================================================================================================================

# What the protocol part uses of the standard library, and no more.
PURE = {"base64", "hashlib", "json", "math", "re", "uuid", "datetime.UTC", "datetime.datetime"}
PURE |= {"contextlib.suppress", "functools.lru_cache", "itertools.accumulate", "types.SimpleNamespace", "typing.Any"}
PURE |= {"typing.NamedTuple", "collections.abc.Callable", "collections.abc.Mapping"}


def test_the_protocol_part_does_no_input_or_output_and_looks_at_no_clock() -> None:
    text = (HERE / "receiver.py").read_text()
    part = text[text.index("\n# 1. The protocol\n") : text.index("\n# 2. The default destination\n")]
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    origins = {alias.name: f"{getattr(node, 'module', '')}.{alias.name}" for node in imports for alias in node.names}
    inside = [*ast.walk(ast.parse(part))]
    used = {node.id for node in inside if isinstance(node, ast.Name)}
    own = {node.id for node in inside if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {str(node.name) for node in inside if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler)}
    own |= {node.arg for node in inside if isinstance(node, ast.arg)}
    assert {origins[name].strip(".") for name in used if name in origins} == PURE
    assert used <= own | origins.keys() | {*vars(builtins)}
    assert not used & {"open", "print", "input", "exec", "eval", "compile", "__import__", "breakpoint"}
    assert not [node for node in inside if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not {node.attr for node in inside if isinstance(node, ast.Attribute)} & {"now", "utcnow", "today", "open"}


# The ladder, and the table of statuses: what makes a request fail at a rung and nowhere before it, and the status.
LADDER: list[tuple[str, dict[str, Any], int]] = [
    ("another path", {"target": "/elsewhere"}, 404),
    ("another method", {"method": "PUT"}, 405),
    ("down for maintenance", {"maintenance": True}, 503),
    ("the API key is malformed", {"authorization": "Basic ???"}, 401),
    ("the API key is expired", {"authorization": basic("segment-expired")}, 401),
    ("the API key is no longer valid", {"authorization": basic("revoked")}, 401),
    ("no Content-Length", {"content_length": None}, 411),
    ("over max-body", {"content_length": "524289"}, 413),
    ("another Content-Type", {"content_type": "text/plain"}, 415),
    ("another Content-Encoding", {"content_encoding": "gzip"}, 415),
    ("malformed", {"body": b'{"type": "juggle", '}, 400),
    ("malformed settings", {"x_segment_settings": "?"}, 400),
    ("a call type that you do not support", {"body": {"type": "juggle"}}, 501),
    ("the key is valid, its permissions are not enough", {"authorization": basic("segment-identify-only")}, 403),
    ("an error that is the client's", {"body": {"type": "track", "user_id": "u1"}}, 400),
    ("not accepting for now", {"destination": Recorder(receiver.Refusal(503, "The lists are being loaded"))}, 503),
    ("internal error", {"destination": Recorder(ZeroDivisionError("secret"))}, 500),
    ("accepted, not processed yet", {"destination": Recorder(HTTPStatus.ACCEPTED)}, 202),
    ("accepted and processed", {}, 200),
]  # fmt: skip


@sentences("asked, status", LADDER)
def test_what_to_answer_when_with_a_message_if_it_is_no_success(asked: dict[str, Any], status: int) -> None:
    reply = ask(**asked)
    assert (reply.status, [*reply.body]) == (status, [] if status < 300 else ["message"]) and not reply.duplicate
    assert isinstance(reply.error, Exception) == (status == 500) and "secret" not in reply.body.get("message", "")
    assert [*reply.fields] == {401: ["WWW-Authenticate"], 405: ["Allow"], 503: ["Retry-After"]}.get(status, [])


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(LADDER, 2)], ids=lambda rung: rung[0])
def test_the_earlier_rung_of_the_ladder_answers(first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    assert ask(**{**second[1], **first[1]}).status == first[2]


ABSENT: dict[str, Any] = {"authorization": None, "content-length": None}


@each_accepted
def test_every_accepted_request_is_200_and_gives_the_destination_this_call(case: Any) -> None:
    destination = Recorder()
    assert ask(case.body, case.method, case.path, destination, **ABSENT | case.headers)[:3] == (200, {}, {})
    assert {field: getattr(destination.calls[0][-1], field) for field in case.call} == case.call


@each_refused
def test_every_refusal_names_the_culprit_reaches_no_destination_and_is_not_sent_again(case: Any) -> None:
    destination = type("OfTheRecords", (Recorder,), {"alias": None, "screen": None})()
    reply = ask(case.body, case.method, case.path, destination, **ABSENT | case.headers)
    assert (reply.status, reply.body, destination.calls) == (case.status, {"message": case.message}, [])
    assert reply.status == 501 or (400 <= reply.status < 500 and reply.status not in (408, 429))


def key_of(customer: str, key: str = "segment", expires: str | None = None) -> dict[str, receiver.Key]:
    return {digest(key): receiver.Key(customer, None, expires)}


class Own(receiver.Refusal):
    """A refusal of its own kind, which sets what it is given and no more."""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)


LOGIN = {"WWW-Authenticate": 'Basic realm="Segment calls", charset="UTF-8"'}
SOONER, LATER, EXPIRED = "2026-01-15T11:59:59.999Z", "2026-01-15T12:00:00.001Z", {"message": "API token expired"}
JSON_TYPES = [
    None, "application/json", "Application/JSON", "application/vnd.segment+json", "application/vnd.x.v2+JSON",
    "application/json; charset=utf-8", 'application/json;charset="UTF-8"', "application/json ; Charset=Utf-8",
    "application/json; version=1", 'application/json; v="a; charset=x, b"; charset=utf-8', "application/json;",
]  # fmt: skip
OTHER_TYPES = [
    "", "json", "text/json", "application/jsonp", "application/+json", "text/vnd.x+json", "application/json, x/y",
    "application/json; charset=latin-1", 'application/json; charset="latin-1"', 'application/json; v="a',
    "application/json; charset=utf-8; charset=utf-16", "application/json; charset", "application/json v=1",
]  # fmt: skip
QUOTED = {"x" * 78: "'" + "x" * 78 + "'", "x" * 79: "'" + "x" * 78 + "…", "\x1b" * 999: "'" + r"\x1b" * 19 + r"\x…"}


# What is asked, and the beginning of the reply: status, body, header fields, customer.
@sentences("asked, reply", [
    *(("the path is compared exactly as sent", {"target": target}, (404,))
      for target in ("/x", "/%2F", "*", "", "https://localhost/")),
    ("the query string aside", {"target": "/?source=web"}, (200,)),
    *(("/health answers GET and HEAD: 200", {"target": "/health?x", "method": method, "authorization": None},
       (200, {"status": "ok"})) for method in ("GET", "HEAD")),
    *(("or 503 in maintenance", {"target": "/health", "method": method, "maintenance": True}, (503,))
      for method in ("GET", "HEAD")),
    *((f"405 with Allow: {only}, also for methods nobody has heard of", {"method": "BREW", "target": path},
       (405, {"message": f"The method 'BREW' is not allowed, only {only}"}, {"Allow": only}, ""))
      for path, only in (("/", "POST"), ("/health", "GET, HEAD"))),
    ("503 with Retry-After", {"maintenance": True}, (503, {"message": "Down for maintenance"}, {"Retry-After": "5"})),
    ("401 with WWW-Authenticate: Basic", {"authorization": None},
     (401, {"message": "The Authorization header is missing"}, LOGIN, "")),
    *(("basic in any case is the same, and a key may be any text",
       {"keys": key_of("Küche", "_schlüssel"), "authorization": scheme + basic("_schlüssel").removeprefix("Basic")},
       (200, {}, {}, "Küche")) for scheme in ("Basic", "basic", "BASIC", "Basic ")),
    ("a key has expired at the moment it says", {"keys": key_of("demo", expires=NOW)}, (401, EXPIRED)),
    ("and after it", {"keys": key_of("demo", expires=SOONER)}, (401, EXPIRED)),
    ("and not before", {"keys": key_of("demo", expires=LATER)}, (200, {})),
    ("a body of max-body bytes is taken", {"body": TRACK_JSON.ljust(524_288)}, (200,)),
    *(("content type is JSON under any of its names, parameters aside", {"content_type": media}, (200,))
      for media in JSON_TYPES),
    *(("neither application/json nor application/*+json, or a charset other than UTF-8", {"content_type": media},
       (415,)) for media in OTHER_TYPES),
    ("content encoding is identity in any case", {"content_encoding": "Identity"}, (200,)),
    *(("what a message quotes is cut and escaped", {"body": {"type": text, "user_id": "u"}},
       (501, {"message": f"Calls of type {shown} are not supported"})) for text, shown in QUOTED.items()),
    ("a field that the call's row needs is missing", {"body": {"type": "alias", "user_id": "u", "previous_id": ""}},
     (400, {"message": "The field previous_id is missing"})),
    *(("a method returns nothing for 200, or 202", {"destination": Recorder(outcome)}, (outcome or 200, {}))
      for outcome in (None, 200, 202)),
    ("raises Refusal to refuse", {"destination": Recorder(receiver.Refusal(422, "No"))}, (422, {"message": "No"})),
    *(("or one of its own, which knows only what it set", {"destination": Recorder(Own(**given))}, reply)
      for given, reply in (({}, (500, {"message": "Internal error"})), ({"status": "422"}, (422,)),
                           ({"message": {1}}, (500, {"message": "{1}"})))),
    ("a status is a whole number", {"destination": Recorder(200.0)}, (200, {})),
    *(("anything else is 500", {"destination": Recorder(outcome)}, (500, {"message": "Internal error"}))
      for outcome in (OSError(), "x", 404, False, 201)),
])  # fmt: skip
def test_what_is_answered(asked: dict[str, Any], reply: tuple[Any, ...]) -> None:
    answered = ask(**asked)
    assert answered[: len(reply)] == reply and isinstance(answered.status, int)


# ---- What they sent: the body (rungs 6 and 7) ------------------------------------------------------------------------

ARRAYS, OBJECTS = ("[" * 499 + "]" * 499, '{"a":' * 499 + "0" + "}" * 499)


@sentences("text, value", [
    ("blanks", ' \t\r\n{"a" : [1 , 2 ]}\n', {"a": [1, 2]}),
    ("whole numbers", '{"a": [12345678901234567890123, -7, -0]}', {"a": [12345678901234567890123, -7, 0]}),
    ("doubles", '{"a": [-0.0, 1E2, 1.7976931348623157e308]}', {"a": [0.0, 100.0, 1.7976931348623157e308]}),
    ("308 digits", '{"a": ' + "9" * 308 + "}", {"a": int("9" * 308)}),
    ("escapes", r'{"a": "\ud83d\ude00 \u0000 \/ \"", "é": "日本"}', {"a": '😀 \0 / "', "é": "日本"}),
    ("all kinds", '{"a": {"a": {}}, "b": [[], {}, null, true]}', {"a": {"a": {}}, "b": [[], {}, None, True]}),
    ("brackets in a string", '{"a": "' + "[" * 5000 + r'\"["}', {"a": "[" * 5000 + '"['}),
    ("many arrays", '{"a": [' + "[], " * 600 + "[]]}", {"a": [[]] * 601}),
    ("arrays and objects may be 500 deep", f'{{"b": [], "a": {ARRAYS}}}', {"b": [], "a": json.loads(ARRAYS)}),
    ("objects too", f'{{"b": [], "a": {OBJECTS}}}', {"b": [], "a": json.loads(OBJECTS)}),
    ("of two names alike the last counts", '{"a": 1, "a": 2}', {"a": 2}),
    ("a long name", '{"' + "k" * 100_000 + '": 1}', {"k" * 100_000: 1}),
    ("every key at every depth in snake_case, and values are never touched",
     '{"firstName": "camelCase", "deepList": [{"innerKey": ["leafValue", {"lastKey": null}]}], "' + "x" * 70 + 'Y": 1}',
     {"first_name": "camelCase", "deep_list": [{"inner_key": ["leafValue", {"last_key": None}]}], "x" * 70 + "_y": 1}),
    ("if two keys would become the same, nothing is lost", '{"aB": 1, "a_b": 2}', {"aB": 1, "a_b": 2}),
    ("the one that was snake_case keeps the name", '{"a_b": 2, "aB": 1, "A-B": 3}', {"a_b": 2, "aB": 1, "A-B": 3}),
    ("even of capitals without small letters", '{"a_𝐂": 1, "A𝐂": 2, "a𝐂": 3}', {"a_𝐂": 1, "A𝐂": 2, "a𝐂": 3}),
    ("of two that were not, the first gets it", '{"aB": 1, "A-b": 2, "c": 3}', {"a_b": 1, "A-b": 2, "c": 3}),
])  # fmt: skip
def test_the_whole_of_json_is_read(text: str, value: object) -> None:
    for _ in "at first", "and when its keys are known":
        assert receiver.parse_object(text.encode(), "It") == value


@pytest.mark.parametrize("text", [
    "", "{", "{} {}", "{}X", "{'a': 1}", '{"a": 1,}', '{"a": 01}', '{"a": .5}', '{"a": +1}', '{"a": 0x1}', '{"a": NaN}',
    '{"a": -Infinity}', '{"a": Infinity}', '{"a": 1e400}', '{"a": -1e400}', '{"a": ' + "9" * 309 + "}",
    '{"a": ' + "9" * 5000 + "}", '{"a": "\t"}', r'{"a": "\ud800"}', r'{"\udc00": 1}', r'{"a": "\x41"}', "\ufeff{}",
    "\u00a0{}", "[]", '"a"', "1", "null", "true", "// no\n{}", f'{{"b": [], "a": [{ARRAYS}]}}', f'{{"a": [{OBJECTS}]}}',
    b'"\xff"', b'{"a": "\xed\xa0\x80"}', b'{"a": "\xc0\xaf"}', '{"a": 1}'.encode("utf-16"), b"{\0}\0",
], ids=lambda text: repr(text)[:30])  # fmt: skip
def test_nothing_beyond_an_object_of_json_by_rfc_8259_in_utf_8_is_read(text: str | bytes) -> None:
    reply = ask(text.encode() if isinstance(text, str) else text)
    assert reply.status == 400 and re.match("The body is (not JSON|not a JSON|nested)", reply.body["message"])


# The names of DESIGN.md, "snake_case", and each turn that the rule can take.
@pytest.mark.parametrize(("key", "name"), [
    *((key, "user_id") for key in ("userId", "UserID", "UserId", "user-id", "User Id", "user_id", "USER_ID")),
    ("HTMLParser", "html_parser"), ("parseHTML", "parse_html"), ("address1", "address1"), ("utm2Source", "utm2_source"),
    ("ABC1", "abc1"), ("A", "a"), ("aB", "a_b"), ("fooXBar", "foo_x_bar"), ("", ""), ("_id", "_id"), ("ID", "id"),
    ("user_Id", "user_id"), ("User-ID", "user_id"), ("$set", "$set"), ("utm.source", "utm.source"), ("名前", "名前"),
    ("iOSVersion", "i_os_version"), ("größeMax", "größe_max"), ("ÜberÉtat", "über_état"), ("XMLHttp", "xml_http"),
])  # fmt: skip
def test_a_key_is_brought_to_snake_case(key: str, name: str) -> None:
    assert receiver.snake_case(key) == name == receiver.snake_case(name)


def test_a_flood_of_keys_fills_no_memory() -> None:
    long = receiver.remembered.cache_info().misses
    for style in ("k" * 100 + "{}", "K" * 100 + "{}", "key{}", "key_{}", "other{}", "keyNumber{}"):
        body = json.dumps({style.format(n): n for n in range(4_500)}).encode()
        assert len(receiver.parse_object(body, "It")) == 4_500
        assert len(style) < 100 or receiver.remembered.cache_info().misses == long
    assert len(receiver.KNOWN) <= 4096 and receiver.remembered.cache_info().currsize <= 4096
    assert max(map(len, receiver.KNOWN)) <= 64


# ---- What they sent: the call (rungs 8 to 10) ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sample_call_of_each_type_is_accepted_with_its_fields_as_attributes_and_whole_as_raw(kind: str) -> None:
    call = given(SAMPLES[kind])[-1]
    assert {field: getattr(call, field) for field in SAMPLES[kind]} == SAMPLES[kind] == call.raw


def test_x_segment_settings_is_base64_of_a_json_object_with_the_customers_other_settings() -> None:
    sent = "eyJjdXN0b21TZXR0aW5nT25lIjoiY3VzdG9tIHNldHRpbmcgdmFsdWUifQ=="
    assert given(x_segment_settings=sent)[-1].settings == {"custom_setting_one": "custom setting value"}


def test_an_absent_object_is_one_of_its_own() -> None:
    given()[-1].traits["mine"] = 1
    assert given()[-1].traits == {}


def test_message_id_defaults_to_a_fresh_uuid() -> None:
    made = [given({**TRACK, **absent})[-1].message_id for absent in ({}, {"message_id": None}, {"message_id": ""})]
    assert len({*made}) == 3 and all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text) for text in made)


DAY = {number: f"2026-01-0{number}T00:00:00.000Z" for number in (1, 2, 3)}
TIMES = {
    "2026-01-15T00:30:08.276Z": "2026-01-15T00:30:08.276Z", "2026-01-15T00:30:08Z": "2026-01-15T00:30:08.000Z",
    "2026-01-15T00:30:08.276999Z": "2026-01-15T00:30:08.276Z", "2026-01-15T00:30:08": "2026-01-15T00:30:08.000Z",
    "2026-01-15T01:30:08+02:00": "2026-01-14T23:30:08.000Z", "2026-01-15 00:30": "2026-01-15T00:30:00.000Z",
    "2026-01-15": "2026-01-15T00:00:00.000Z", "20260115T003008Z": "2026-01-15T00:30:08.000Z",
    "2026-W03-4T00:30:08.276Z": "2026-01-15T00:30:08.276Z", "0999-01-01T00:00:00Z": "0999-01-01T00:00:00.000Z",
}  # fmt: skip
WRONG: dict[str, list[Any]] = {
    "a string or a whole number": [True, 1.5, [], {}], "a string": [True, 7, [], {}], "an object": [True, 7, "x", []],
    "an ISO 8601 time": [
        "", "now", "2026", "2026-13-01", "2026-02-30T00:00:00.000Z", "15/01/2026", "2026-01-15X00:00:00", " 2026-01-15",
        "2026-01-15T24:00:00Z", "0001-01-01T00:00:00+01:00", f"{NOW}\n", "٢٠٢٦-01-15", 7, True, {}, [NOW], "2026-0115",
        "2026-01-15T12:3000", "2026-01-15T12:00:00+24:00", "2026-01-15T12:00:00+01:60", "2026-W034", "2026-W54-1",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("what", "field", "kinds"), [
    *(("a string or a whole number", field, receiver.CALLS) for field in ("user_id", "anonymous_id", "message_id")),
    ("a string or a whole number", "group_id", ["group"]), ("a string or a whole number", "previous_id", ["alias"]),
    ("a string", "event", ["track"]), ("a string", "name", ["page", "screen"]),
    *(("an object", field, receiver.CALLS) for field in ("traits", "properties", "context")),
    *(("an ISO 8601 time", field, receiver.CALLS) for field in ("timestamp", "sent_at")),
])  # fmt: skip
def test_a_field_of_the_wrong_kind_is_refused_where_its_row_has_it(what: str, field: str, kinds: list[str]) -> None:
    fields = {"user_id": "u1", "event": "e", "group_id": "g", "previous_id": "p"}
    for kind, value in itertools.product(receiver.CALLS, WRONG[what]):
        refusal = (400, {"message": f"The field {field} is not {what}"})
        assert ask({**fields, "type": kind, field: value})[:2] == (refusal if kind in kinds else (200, {}))


@sentences("sent, field, value", [
    *(("a time in ISO 8601 is brought to UTC, and one without a zone is in UTC", {field: sent}, field, utc)
      for field in ("timestamp", "sent_at") for sent, utc in TIMES.items()),
    ("timestamp", {"timestamp": DAY[1], "original_timestamp": DAY[2], "sent_at": DAY[3]}, "timestamp", DAY[1]),
    ("else original_timestamp", {"original_timestamp": "2026-01-02", "sent_at": DAY[3]}, "timestamp", DAY[2]),
    ("else sent_at", {"original_timestamp": "long ago", "sent_at": "2026-01-03"}, "timestamp", DAY[3]),
    ("else now", {"original_timestamp": 5}, "timestamp", NOW),
    *(("an id sent as a whole number is its decimal text", {field: number}, field, str(number))
      for field in ("user_id", "anonymous_id", "message_id") for number in (0, -7, 12345678901234567890)),
    ("an empty id is absent", {"user_id": "", "anonymous_id": "a1"}, "user_id", None),
    *(("null is the same as absent", {field: None}, field, default) for field, default in (
        ("traits", {}), ("properties", {}), ("context", {}), ("timestamp", NOW), ("sent_at", None), ("version", None),
    )),
    ("a field of another row is looked at by nobody", {"name": [7]}, "name", None),
    ("and stays in raw as it came", {"name": [7]}, "raw", {**TRACK, "name": [7]}),
    ("a field that nobody knows is kept as it came", {"colour": {"r": 1}}, "raw", {**TRACK, "colour": {"r": 1}}),
    ("and is none of ours", {"customer": "x"}, "customer", "demo"),
    ("nor of the customer's other settings", {"settings": "x"}, "settings", {}),
    ("nor the whole", {"raw": "x"}, "raw", {**TRACK, "raw": "x"}),
])  # fmt: skip
def test_what_becomes_of_a_field(sent: dict[str, Any], field: str, value: object) -> None:
    assert getattr(given({**TRACK, **sent})[-1], field) == value


# ---- What to do with it: the destination (rungs 8 and 11) ------------------------------------------------------------


@pytest.mark.parametrize(("kind", "arguments"), [
    ("identify", ("u", {"t": 1})), ("track", ("u", "e", {"p": 1})), ("page", ("u", "n", {"p": 1})), ("delete", ("u",)),
    ("group", ("u", "g", {"t": 1})), ("screen", ("u", "n", {"p": 1})), ("alias", ("u", "b")),
])  # fmt: skip
def test_a_handlers_arguments_are_those_of_the_table_and_the_whole_call_last(kind: str, arguments: tuple[Any]) -> None:
    fields = {"user_id": "u", "event": "e", "name": "n", "group_id": "g", "previous_id": "b", "traits": {"t": 1}}
    *found, call = given({"type": kind, **fields, "properties": {"p": 1}})
    assert (*found, call.type) == (*arguments, kind)


def test_a_destination_supports_the_calls_whose_methods_it_defines_and_every_other_type_is_501() -> None:
    class OnlyTrack(receiver.Destination):
        secret = print

        def track(self, user_id: str, event: str, properties: dict[str, Any], call: receiver.Call) -> None:
            assert (user_id, event, properties, call.type) == ("u1", "Signed Up", {}, "track")

    assert ask(destination=OnlyTrack()).status == 200
    for kind in ("identify", "alias", "secret", "close", "__init__", "__class__", ""):
        assert ask({"type": kind, "user_id": "u"}, destination=OnlyTrack()).status == 501
    assert {kind for kind in receiver.CALLS if hasattr(receiver.Store, kind)} == {*SAMPLES, "delete"}


def test_a_refusals_status_is_from_400_to_599_and_a_method_returns_nothing_or_200_or_202() -> None:
    assert str(ask(destination=Recorder(201)).error).endswith(" returned 201, which is not None, 200 or 202")
    assert [receiver.Refusal(status, "No").status for status in (400, 599)] == [400, 599]
    for status in (200, 399, 600):
        with pytest.raises(ValueError, match=f"^a refusal's status is from 400 to 599, not {status}$"):
            receiver.Refusal(status, "No")


# ======================================================================================================================
# 2. The default destination
#
# What is kept of the calls, and when: the views of DESIGN.md's database, whatever the order of arrival, and that a 200
# is a promise. Most of it needs a file and no network; what a crash may do to it needs processes that are killed.
# ======================================================================================================================


class FileStore(receiver.Store):
    """A store that knows its file and what it does, takes calls through the protocol, and lets itself be asked."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.path, self.statements = path, list[str]()
        self._db.set_trace_callback(self.statements.append)

    def save(self, kind: str = "identify", user_id: Any = "u1", customer: str = "demo", **fields: Any) -> Any:
        return ask({"type": kind, "user_id": user_id, **fields}, destination=self, keys=key_of(customer))

    def rows(self, query: str) -> list[Any]:
        """What it finds to select."""
        return rows(self.path, "select " + query)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStore]:
    made = FileStore(tmp_path / "calls.db")
    yield made
    made.close()


# ---- The table of calls, the views, and the file ---------------------------------------------------------------------

TRACKED, ACME = {"kind": "track", "event": "e"}, {"customer": "acme"}
GROUPED = {"kind": "group", "group_id": "g1"}
FIRST_DAY, SECOND_DAY, THIRD_DAY = ({"timestamp": DAY[number]} for number in (1, 2, 3))
IDENTIFIES: list[Any] = [
    {**FIRST_DAY, "traits": {"plan": "free", "seats": 1, "name": "Ann", "tags": {"a": 1, "b": 2}}},
    {**SECOND_DAY, "traits": {"plan": "team", "email": "ann@example.com", "tags": {"c": 3}}},
    {**THIRD_DAY, "traits": {"plan": "gold", "name": None}},
]
MERGED = {"plan": "gold", "seats": 1, "name": None, "tags": {"c": 3}, "email": "ann@example.com"}
TRAITS = {
    "float": 0.30000000000000004, "big": 12345678901234567890, "true": True, "false": False, "null": None,
    "text": 'é"q\\', "list": [1, {"a": None}], "b.1": 1, "dot.ted": 2, "br[0]": 3, "": 4, "quote\"d": {"a": [True]},
    "quoted\"2": "t", "q\"3": False, "q\"4": None, "nul": "a\0b", "json": '{"a": 1}', "🙂": "🙂",
}  # fmt: skip


# The calls that come, a query, and what it finds; JSON as what it says.
@sentences("calls, query, expected", [
    ("at least once: a message_id seen before is 200 and stored once",
     [{**TRACKED, "message_id": "m1"}, {**GROUPED, "message_id": "m1"}, {**TRACKED, "message_id": "m2"}],
     "message_id, type from calls", [["m1", "track"], ["m2", "track"]]),
    ("a call without a message_id is a new call every time", [TRACKED] * 2, "count(*) from calls", [[2]]),
    ("the same call from two customers is two rows",
     [{**TRACKED, "message_id": "m1"}, {**TRACKED, **ACME, "message_id": "m1"}],
     "customer, message_id from calls order by 1", [["acme", "m1"], ["demo", "m1"]]),
    ("delete removes everything kept of that user of that customer",
     [TRACKED, {}, {"customer": "acme"}, {"user_id": "u2"}, {"kind": "delete"}],
     "customer, user_id from calls order by 1", [["acme", "u1"], ["demo", "u2"]]),
    ("identifies has one row a call", [{"traits": {"a": 1}}, TRACKED],
     "user_id, traits from identifies", [["u1", {"a": 1}]]),
    ("tracks", [{**TRACKED, "properties": {"p": 1}, "context": {"ip": "::1"}}, GROUPED],
     "event, properties, context from tracks", [["e", {"p": 1}, {"ip": "::1"}]]),
    ("pages", [{"kind": "page", "name": "n", "properties": None, "context": None}, TRACKED],
     "name, properties, context from pages", [["n", {}, {}]]),
    ("null is the same as absent for traits as a whole", [{"traits": {"a": 1}}, {"traits": None}],
     "traits from identifies order by rowid", [[{"a": 1}], [{}]]),
    ("and sets none of them", [{"traits": {"a": 1}}, {"traits": None}], "traits from users", [[{"a": 1}]]),
    ("a group_id that is a whole number is its decimal text",
     [{"kind": "group", "group_id": number} for number in (7, 12345678901234567890, 12345678901234567891)],
     "typeof(group_id), group_id from accounts order by 2",
     [["text", "12345678901234567890"], ["text", "12345678901234567891"], ["text", "7"]]),
    ("groups", [GROUPED, TRACKED], "group_id, traits from groups", [["g1", {}]]),
    *(("any order: users are the same in any order of arrival", [*order],
       "user_id, traits, first_seen, last_seen from users", [["u1", MERGED, DAY[1], DAY[3]]])
      for order in itertools.permutations(IDENTIFIES)),
    ("of equals, the last received", [{**FIRST_DAY, "traits": {"plan": plan}} for plan in "cab"],
     "traits from users", [[{"plan": "b"}]]),
    ("everyone with a user_id in any call is a user, and customers are kept apart",
     [{**TRACKED, "user_id": "u2"}, {"kind": "page", "user_id": None, "anonymous_id": "a1"},
      {**ACME, "traits": {"of": "acme"}}, {"traits": {"of": "demo"}}],
     "customer, user_id, traits from users order by 1, 2",
     [["acme", "u1", {"of": "acme"}], ["demo", "u1", {"of": "demo"}], ["demo", "u2", {}]]),
    ("accounts merge traits by timestamp, and members counts distinct users",
     [{**GROUPED, **SECOND_DAY, "traits": {"size": 2, "name": "new"}},
      {**GROUPED, **FIRST_DAY, "traits": {"size": 1, "kind": "old"}}, {**GROUPED, **THIRD_DAY, "user_id": "u2"},
      {**GROUPED, "group_id": 5}, {**GROUPED, **ACME, "traits": {"name": "other"}}],
     "group_id, traits, members, first_seen, last_seen from accounts where customer = 'demo' and group_id <> '5'",
     [["g1", {"size": 2, "name": "new", "kind": "old"}, 2, DAY[1], DAY[3]]]),
    ("a group_id that is a number is found as text", [{**GROUPED, "group_id": 5}],
     "members from accounts where group_id = '5'", [[1]]),
    *(("traits come out of the views as they went in", [{"traits": TRAITS}, {**GROUPED, "traits": TRAITS}],
       f"traits from {view}", [[TRAITS]]) for view in ("identifies", "users", "groups", "accounts")),
])  # fmt: skip
def test_what_is_kept_of_the_calls(store: FileStore, calls: list[Any], query: str, expected: list[Any]) -> None:
    assert {store.save(**call).status for call in calls} == {200}
    found = [[json.loads(value) if str(value)[0] == "{" else value for value in row] for row in store.rows(query)]
    assert found == expected


def test_a_call_is_one_row_of_calls_with_times_in_utc_that_sort_as_text(store: FileStore) -> None:
    fields: dict[str, Any] = {"anonymous_id": "a1", "message_id": "m1", "properties": {"n": 1.10}, "madeUp": [1]}
    fields |= {"event": "Ordered", "timestamp": "2026-01-15T01:00:00+01:00"}
    assert [store.save("track", **fields).duplicate for _ in range(2)] == [False, True]
    columns = "customer, message_id, type, user_id, anonymous_id, timestamp, received_at, call"
    [(*row, received_at, call)] = store.rows(f"{columns} from calls")
    assert row == ["demo", "m1", "track", "u1", "a1", "2026-01-15T00:00:00.000Z"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", received_at)
    assert abs(time.time() - datetime.fromisoformat(received_at).timestamp()) < 5
    assert json.loads(call)["properties"] == {"n": 1.1} and json.loads(call)["made_up"] == [1]


def test_who_is_deleted_is_in_no_unused_page(store: FileStore) -> None:
    for call in ({"traits": {"secret": "gone-with-the-wind"}}, {"kind": "delete"}):
        store.save(**call)
    store.close()
    assert [*store.path.parent.iterdir()] == [store.path] and b"gone-with-the-wind" not in store.path.read_bytes()


@pytest.mark.parametrize(("view", "index"), [
    ("users where {}user_id = 'x'", "calls_by_user (user_id=?"),
    ("accounts where {}group_id = 'x'", "calls_by_group (<expr>=?"),
])  # fmt: skip
def test_users_and_accounts_are_found_by_id_alone_through_an_index(store: FileStore, view: str, index: str) -> None:
    for condition in ("", "customer = 'demo' and "):
        plan = rows(store.path, f"explain query plan select traits, last_seen from {view.format(condition)}")
        steps = [step for *_, step in plan if re.match(r"(SCAN|SEARCH) (calls|c|o|USING)\b", step)]
        assert len(steps) == 2 and all(index in step for step in steps), plan


@pytest.mark.parametrize(("customers", "events", "fulfilled"), [(9, 20, 0), (9, 21, 1), (10, 10, 1)])
def test_private_beta_is_fulfilled_by_10_customers_or_more_than_20_million_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, customers: int, events: int, fulfilled: int
) -> None:
    assert receiver.SCHEMA.count(" 20000000 ") == 1
    monkeypatch.setattr(receiver, "SCHEMA", receiver.SCHEMA.replace(" 20000000 ", " 20 "))  # as if they were millions
    store = FileStore(tmp_path / "calls.db")
    for number in range(events):
        store.save("track", customer=f"c{number % customers}", event="e")
    store.close()
    assert store.rows("* from private_beta") == [(customers, events, fulfilled)]


@sentences("make", [
    ("even one with a table of that name", lambda path: sqlite3.connect(path).executescript(
        "create table calls (a, b); insert into calls values (1, 2); pragma user_version = 1").connection.close()),
    ("or of another schema version", lambda path: receiver.open_database(path).execute(
        "pragma user_version = 2").connection.close()),
    ("a text", lambda path: path.write_text("Dear diary")),
    ("a folder", Path.mkdir),
    ("a log of calls without the database that it belongs to", lambda path: Path(f"{path}-wal").write_bytes(b"WAL")),
])  # fmt: skip
def test_a_file_that_is_no_database_of_ours_is_refused_and_never_touched(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "calls.db"
    make(path)
    before = {file: file.is_file() and file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(receiver.ConfigurationError, match=re.escape(str(path))):
        receiver.Store(str(path))
    assert {file: file.is_file() and file.read_bytes() for file in tmp_path.iterdir()} == before != {}


# ---- 200 is a promise ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """While this lasts another connection is writing the database."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("begin immediate")
        yield


def test_what_is_answered_200_has_been_synced_to_disk_in_wal_mode(store: FileStore) -> None:
    for number in range(1, 4):
        assert store.save().status == 200 and store.statements.count("commit") == number
    assert store._db.execute("pragma journal_mode").fetchone() == ("wal",)
    assert store._db.execute("pragma synchronous").fetchone() == (2,)  # FULL: each commit is synced


def test_many_calls_waiting_at_once_share_one_transaction_and_an_error_in_one_is_its_own(store: FileStore) -> None:
    trigger = "create trigger t before insert on calls when new.user_id = 'u6' begin select raise(abort, 'no'); end"
    rows(store.path, trigger)
    with ThreadPoolExecutor(12) as pool:
        with locked(store.path):
            replies = [pool.submit(store.save, user_id="u0")]
            until(lambda: "begin immediate" in store.statements)
            replies += [pool.submit(store.save, user_id=f"u{number}") for number in range(1, 12)]
            until(lambda: store._waiting.qsize() == 11)
        assert [reply.result().status for reply in replies] == [200] * 6 + [500] + [200] * 5
    assert store.statements.count("commit") == 2 and store.rows("count(*) from calls") == [(11,)]


def test_a_store_whose_file_was_moved_or_replaced_is_503_as_what_it_wrote_would_be_lost(
    store: FileStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert store.save().status == 200
    away = store.path.rename(store.path.with_name("away"))
    assert store.save()[:2] == (503, {"message": "The call could not be stored for now"})
    store.path.write_bytes(b"")
    assert store.save().status == 503
    away.rename(store.path)
    assert store.save().status == 200 and store.rows("count(*) from calls") == [(2,)]
    assert f"1 calls could not be stored: {store.path} is not the file that was opened at the start\n" in caplog.text


def test_a_call_that_waits_for_too_long_is_503_and_may_still_be_stored(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2 * receiver.LOCK_WAIT < receiver.ANSWER_WAIT < 5
    with monkeypatch.context() as patch, locked(store.path):
        patch.setattr(receiver, "ANSWER_WAIT", 0.1)
        assert store.save(message_id="m1")[:2] == (503, {"message": "The call could not be stored in time"})
    until(lambda: store.rows("message_id from calls"))
    assert store.save(message_id="m1").duplicate


def test_a_database_that_is_read_only_for_a_while_is_503_with_retry_after_meanwhile(store: FileStore) -> None:
    for readonly, status, fields in ((0, 200, {}), (1, 503, {"Retry-After": "5"}), (0, 200, {})):
        store._db.execute(f"pragma query_only = {readonly}")
        assert store.save()[::2][:2] == (status, fields)


@contextlib.contextmanager
def full(process: Process) -> Iterator[None]:
    """While this lasts no file of this process can grow, as on a full disk."""
    pid, most = process.process.pid, os.path.getsize(f"{process.database}-wal")
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("fault", ["full", "locked"])
def test_a_store_that_cannot_write_now_is_503_within_5_seconds_and_then_all_is_well(tmp_path: Path, fault: str) -> None:
    with Process(tmp_path) as process, contextlib.ExitStack() as stack, ThreadPoolExecutor(10) as pool:
        wires = [stack.enter_context(Wire(process)) for _ in range(10)]
        assert wires[0].status(request()) == 200

        def timed(number: int, delay: float = 0) -> tuple[int, str | None, bool]:
            time.sleep(delay)
            started = time.monotonic()
            reply = wires[number].send(request({**TRACK, "message_id": f"m{number}"})).reply()
            return reply.status, reply.headers.get("retry-after"), time.monotonic() - started < 5

        with full(process) if fault == "full" else locked(process.database):
            seen = pool.map(timed, range(10), [number / 5 for number in range(10)])  # so that some wait for two commits
            assert [*seen] == [(503, "5", True)] * 10 and len(process.ids()) == 1
        assert {timed(number)[0] for number in range(10)} == {200} and len(process.ids()) == 11


def test_after_kill_9_every_call_answered_200_is_there_once_and_sending_all_again_is_no_change(tmp_path: Path) -> None:
    sent, acknowledged, chance = set[str](), set[str](), random.Random(9)
    for life in range(6):
        with Process(tmp_path) as process, Load(process, life, 6) as load:
            enough = chance.randrange(1, 400)
            until(lambda load=load, enough=enough: len(load.stored) > enough)  # type: ignore[misc]
            process.stop(signal.SIGKILL)
        sent, acknowledged = sent | load.sent, acknowledged | load.stored
        assert not any(load.others)
    with Process(tmp_path) as process, Wire(process) as wire:
        found = sorted(process.ids())
        assert len(found) == len(set(found)) and acknowledged <= set(found) <= sent
        assert rows(process.database, "pragma integrity_check") == [("ok",)]
        again = b"".join(request({**TRACK, "message_id": name}) for name in found * 2)
        assert wire.send(again) and {wire.reply().status for _ in found * 2} == {200}
        assert sorted(process.ids()) == found


def test_who_starts_while_another_makes_the_database_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    class Watched(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql.startswith("begin"):
                begun.set()
            return super().execute(sql, *values)

    with ThreadPoolExecutor(1) as pool, contextlib.closing(sqlite3.connect(tmp_path / "calls.db")) as other:
        other.execute("begin immediate")
        monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Watched))
        opened = pool.submit(receiver.open_database, str(tmp_path / "calls.db"))
        assert begun.wait(10)
        for statement in receiver.SCHEMA.split(";"):
            other.execute(statement)
        other.commit()
        opened.result().close()


def test_two_receivers_on_one_new_database_lose_and_double_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as stack:
        first, second = map(stack.enter_context, pool.map(lambda _: Process(tmp_path), range(2)))
        loads = [Load(first, "same", 3, 100), Load(second, "same", 3, 100), Load(second, "own", 2, 100)]
        wait([client for load in loads for client in load.clients])
        stored = set[str]().union(*(load.stored for load in loads))
        assert not sum((load.others for load in loads), [])
        assert sorted(first.ids()) == sorted(stored) and len(stored) == 500


# ======================================================================================================================
# 3. The server
#
# The same over real TLS, against receivers in processes of their own. First the head, which is rung 1 of the ladder,
# then what becomes of a connection, the log, keys and certificates that change, and what a bad day does to all this.
# ======================================================================================================================

# ---- The head of a request (rung 1) ----------------------------------------------------------------------------------

CHUNKED, MEDIA = "Transfer-Encoding: chunked", "Content-Type: application/json"
TABLE = ("User-Agent: Segment.io/1.0", "Accept: */*", "Cache-Control: no-cache", "X-Segment-Settings: e30=")


def head_of(size: int) -> bytes:
    """A call whose head has this many bytes before the empty line."""
    return request(TRACK, "X: " + "y" * (size - request(TRACK, "X: ").index(b"\r\n\r\n")))


REQUEST_LINE = "400 The request line is not a method, a target and HTTP/1.1, with single blanks"
FIELD_LINE = "400 Header line [134] is not a name, a colon and a value"


# What the reply says to each of these heads: its status and its message.
@sentences("says, heads", [
    ("stray blanks, or none, in the request line", REQUEST_LINE, [
        head(method="GE T"), head(target="/a b"), b"POST  / HTTP/1.1\r\nHost: x\r\n\r\n", head(version="HTTP/1.1 "),
        b" POST / HTTP/1.1\r\nHost: x\r\n\r\n", b"POST\t/\tHTTP/1.1\r\nHost: x\r\n\r\n", b"GET /\r\n\r\n",
    ]),
    ("a request line that is none", REQUEST_LINE, [
        head(target="/\xe9"), head(method="G@T"), head(version="http/1.1"), head(version="HTTP/1.10"), b"\0\r\n\r\n",
    ]),
    ("another version than HTTP/1.x", "505 Only HTTP/1.1 and HTTP/1.0 are spoken here", [
        head(version="HTTP/0.9"), head(version="HTTP/2.0"), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]),
    ("a target over 8 KiB", "414 The target is longer than 8192 bytes", [
        head(target="/" + "a" * 8192), b"POST /" + b"a" * 9000,
    ]),
    ("over 100 fields", "431 There are more than 100 header fields", [head(*["X: y"] * 99)]),
    ("over 64 KiB in all", "431 The head is longer than 65536 bytes", [
        head_of(65_537), b"POST / HTTP/1.1\r\nX: " + b"y" * 65_600,
    ]),
    ("a bare LF", "400 A line of the head does not end in CR LF", [b"POST / HTTP/1.1\nHost: x\n\n"]),
    ("a bare LF after a field", FIELD_LINE, [
        b"POST / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", b"POST / HTTP/1.1\r\nHost: x\n",
    ]),
    ("obsolete folding", FIELD_LINE, [head("X: a\r\n folded"), head("X: a\r\n\tfolded")]),
    ("a space before the colon", FIELD_LINE, [head("X : a"), head("X\xa0: a")]),
    ("control characters", FIELD_LINE, [head("X: a\0b"), head("X: a\rb"), head("X: a\x7fb"), head("X: \x1b[31m")]),
    ("an illegal field name", FIELD_LINE, [head("X"), head(": a"), head(" X: a"), head("X(y): a"), head("X\xe9: a")]),
    ("a missing Host in HTTP/1.1", "400 The Host header is missing", [head(host=None)]),
    ("a second Host", "400 The header 'host' is there twice", [head("Host: localhost"), head("host: other")]),
    ("a second Content-Length", "400 The header 'content-length' is there twice", [
        head("Content-Length: 5", length=5), head("Content-Length: 6", length=5),
    ]),
    ("a second Content-Type", "400 The header 'content-type' is there twice", [head(MEDIA, MEDIA.lower())]),
    ("a second Authorization", "400 The header 'authorization' is there twice", [
        head(f"authorization: {basic('segment')}"),
    ]),
    ("a Content-Length that is not plain digits", "400 The Content-Length '.*' is not plain digits", [
        head(length=length) for length in ("+5", "-5", "5, 5", "0x5", "5 5", "", "1_0", "5.0", "\xd9\xa5", "\xb2")
    ]),
    ("any Transfer-Encoding beside a Content-Length", "400 There are both a Transfer-Encoding and a Content-Length", [
        request(TRACK, CHUNKED), head("Transfer-Encoding: identity", length=0), head(CHUNKED, "Content-length:\t3"),
    ]),
    ("a Transfer-Encoding without Content-Length", "411 The Content-Length header is missing", [
        head(CHUNKED), head("Transfer-Encoding: xchunked"),
    ]),
])  # fmt: skip
def test_a_head_that_is_not_clean_is_refused_and_closes(running: Process, says: str, heads: list[bytes]) -> None:
    before = running.ids()
    for data in heads:
        with Wire(running) as wire:
            reply = wire.send(data + (b"0\r\n\r\n" + request() if b"\r\n" in data else b"")).reply()
            assert re.fullmatch(says, f"{reply.status} {json.loads(reply.body)['message']}"), data[:80]
            assert (reply.headers["connection"], reply.headers["content-type"]) == ("close", "application/json")
            assert wire.closed()
    assert running.ids() == before  # what stood behind it was not executed


# Whether the connection closes, and what is sent on one each: a request that is answered 200, or steps and statuses.
@sentences("closes, talks", [
    ("the headers of the table", False, [request(TRACK, *TABLE, MEDIA)]),
    ("keep-alive", False, [request(TRACK, "Connection: Keep-Alive"), request(version="HTTP/1.2")]),
    ("close anywhere in Connection", True, [
        request(TRACK, "connection: Close"), request(TRACK, "Connection: x, close"),
        request(TRACK, "Connection: keep-alive", "Connection: close"),
    ]),
    ("HTTP/1.0", True, [request(version="HTTP/1.0"), request(version="HTTP/1.0", host=None)]),
    ("HTTP/1.0 that asks for keep-alive", False, [request(TRACK, "Connection: Keep-Alive", version="HTTP/1.0")]),
    ("an empty line before", False, [b"\r\n" + request()]),
    ("fields of odd names and values", False, [
        request(TRACK, "X-Odd:", "x-odd:\t a\xe9\t ", "!#$%&'*+-.^_`|~: ok"), request(host="Host:"),
    ]),
    ("a target of 8 KiB", False, [request(target="/?" + "a" * 8190)]),
    ("100 fields", False, [request(TRACK, *["X: y"] * 97)]),
    ("64 KiB in all", False, [head_of(65_536)]),
    ("a length with zeros before it", False, [request(length=f"00{len(TRACK_JSON)}")]),
    ("Expect: 100-continue is answered only once the rungs so far are passed", False, [
        [(head("Expect: 100-Continue", length=len(TRACK_JSON)), 100), (TRACK_JSON, 200)],
    ]),
    ("after a refused Expect nobody knows whether a body follows", True, [
        [(head("Expect: 100-continue", length=5, key="unknown"), 401)],
        [(head("Expect: 100-continue", length=600_000), 413)],
        [(head("Expect: 100-continue", length=5, target="/x"), 404)],
    ]),
    ("HTTP/1.0 cannot expect", True, [request(TRACK, "Expect: 100-continue", version="HTTP/1.0")]),
    ("a body over max-body closes in a way that still lets the client read the reply", True, [
        [(head(length=10_000_000) + b"x" * 2_000_000, 413)],
    ]),
])  # fmt: skip
def test_a_clean_head_is_taken_and_closes_if_it_says_so(running: Process, closes: bool, talks: list[Any]) -> None:
    for talk in talks:
        with Wire(running) as wire:
            for sent, status in talk if isinstance(talk, list) else [(talk, 200)]:
                reply = wire.send(sent).reply()
                assert reply.status == status and (status >= 400) == bool(reply.body), sent[:80]
            assert reply.headers["connection"] == ("close" if closes else "keep-alive")
            assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", reply.headers["date"])
            assert wire.closed() if closes else wire.status(request()) == 200


# ---- One connection --------------------------------------------------------------------------------------------------


@each_refused
def test_a_refused_request_stores_nothing_and_leaves_the_connection_usable(running: Process, case: Any) -> None:
    before = running.ids()
    lines = [f"{name}: {value}" for name, value in case.headers.items()]
    with Wire(running) as wire:
        reply = wire.send(head(*lines, method=case.method, target=case.path, key=None) + case.body).reply()
        assert (reply.status, json.loads(reply.body)) == (case.status, {"message": case.message})
        assert reply.headers["content-type"] == "application/json" and running.ids() == before
        if case.status == 413:
            assert reply.headers["connection"] == "close" and wire.closed()
        else:
            assert wire.status(request()) == 200


def test_a_reply_to_head_has_no_body(running: Process) -> None:
    with Wire(running) as wire:
        assert wire.send(head(method="GET", target="/health", key=None)).reply().body == b'{"status": "ok"}'
        reply = wire.send(head(method="HEAD", target="/health", key=None)).reply(head_only=True)
        assert (reply.status, reply.headers["content-length"]) == (200, "16")
        assert wire.send(head(method="HEAD", key=None)).reply(head_only=True).status == 405
        assert wire.status(request()) == 200


def test_bytes_split_anywhere_change_nothing_and_pipelined_requests_are_answered_in_order(running: Process) -> None:
    health = head(method="GET", target="/health", length=0)
    stream = request() + request({"type": "juggle", "user_id": "u"}) + request(b"[]") + health + request()
    for size in (len(stream), 100, 7, 1):
        with Wire(running) as wire:
            for start in range(0, len(stream), size):
                wire.send(stream[start : start + size])
            assert [wire.reply().status for _ in range(5)] == [200, 501, 400, 200, 200]


def test_what_does_not_come_whole_in_time_is_408_and_mere_silence_is_closed_without_a_word(running: Process) -> None:
    with contextlib.ExitStack() as stack:
        silent, late_head, late_body, second = wires = [stack.enter_context(Wire(running)) for _ in range(4)]
        started = time.monotonic()
        late_head.send(head(length=10)[:-3])
        late_body.send(head(length=10) + b'{"a":')
        assert second.status(request()) == 200
        second.send(b"POST")
        assert silent.closed() and 1.5 < time.monotonic() - started < 4
        for wire, what in zip(wires[1:], ("The head", "The body", "The head"), strict=True):
            reply = wire.reply()
            assert (reply.status, reply.headers["connection"]) == (408, "close") and time.monotonic() - started < 4
            assert json.loads(reply.body) == {"message": f"{what} did not come within 2 seconds"}


def test_keep_alive_is_the_seconds_of_silence_between_requests(tmp_path: Path) -> None:
    with Process(tmp_path, "--timeout", "9", "--keep-alive", "0.6") as process, Wire(process) as wire:
        for _ in range(2):
            assert wire.status(request()) == 200
            started = time.monotonic()
            time.sleep(0.3)
        assert wire.closed() and 0.5 < time.monotonic() - started < 3


def test_a_request_that_ends_early_is_400(running: Process) -> None:
    for data, what in ((request()[:-1], "The body"), (request()[:20], "The head")):
        with Wire(running) as wire:
            reply = wire.send(data).end().reply()
            assert (reply.status, json.loads(reply.body)) == (400, {"message": f"{what} ended early"})


def test_a_client_that_resets_in_the_middle_of_a_body_is_one_line_400_and_no_traceback(running: Process) -> None:
    before, wire = running.so_far(), Wire(running)
    assert wire.status(head("Expect: 100-continue", length=len(TRACK_JSON))) == 100  # now it waits for the body
    wire.send(TRACK_JSON[:9]).reset()
    until(lambda: running.log[before:].endswith("\n"))
    assert re.fullmatch(r"\S+ 400 - demo - - \S+ ms The body ended early\n", running.log[before:])


# ---- The log ---------------------------------------------------------------------------------------------------------

FORGED = "x\r\nForged: 1\x1b"


@pytest.mark.parametrize(("word", "shown"), [
    ("u1", "u1"), ("", "-"), (None, "-"), (7, "7"), ("two words", "'two words'"), ("\x1b", r"'\x1b'"), ([], "-"),
    ("x" * 80, "x" * 80), ("x" * 81, "'" + "x" * 78 + "…"), (["x"], "['x']"),
])  # fmt: skip
def test_a_word_of_the_log_is_as_it_came_if_it_is_short_and_forges_nothing(word: Any, shown: str) -> None:
    assert receiver.plain(word) == shown


def test_the_log_has_one_line_a_request_with_no_control_character_from_outside(running: Process) -> None:
    user, before = "log-probe", running.so_far()
    for _ in range(2):
        post(running, {**TRACK, "user_id": user, "event": "Two Words", "message_id": "log-1"})
    post(running, {"type": "page\n\x1b[31m", "user_id": user, "name": "Forged\n2026"})
    post(running, {**TRACK, "user_id": user}, key="segment-identify-only")
    post(running, {"type": "page", "anonymous_id": user}, key="unknown")
    with Wire(running) as wire:
        assert wire.status(head("X : \x1b")) == 400
    until(lambda: running.log.count("\n", before) == 6)
    for line, expected in zip(running.log[before:].splitlines(), (
        r"200 track demo log-probe 'Two Words' \d+\.\d ms",
        r"200 track demo log-probe 'Two Words' duplicate \d+\.\d ms",
        r"501 'page\\n\\x1b\[31m' demo log-probe 'Forged\\n2026' \d+\.\d ms Calls of type .* are not supported",
        r"403 track limited log-probe 'Signed Up' \d+\.\d ms This API key may not send calls of type 'track'",
        r"401 - - - - \d+\.\d ms The API key is not known",
        r"400 - - - - \d+\.\d ms Header line 3 is not a name, a colon and a value",
    ), strict=True):  # fmt: skip
        assert re.fullmatch(f"{TIME} {expected}", line), line
        assert abs(datetime.fromisoformat(line[:24]) - datetime.now(UTC)).total_seconds() < 60


def test_under_load_each_request_is_one_whole_line_of_the_log(tmp_path: Path) -> None:
    with Process(tmp_path) as process:
        with Load(process, "logged", 32, 100) as load:
            wait(load.clients)
        assert process.stop() == 0 and len(load.stored) == 3200
        assert len(re.findall(rf"^{TIME} 200 track demo u1 'Signed Up' \d+\.\d ms$", process.log, re.M)) == 3200


def test_quiet_logs_no_line_for_what_was_answered_2xx_and_verbose_adds_each_call_indented(tmp_path: Path) -> None:
    for option in ("--quiet", "--verbose"):
        with Process(tmp_path, option) as process:
            assert (post(process).status_code, post(process, key="unknown").status_code) == (200, 401)
            process.logs(" 401 - - - - .*not known")
            assert (" 200 track demo u1 " in process.log) is (option == "--verbose")
            assert ('\n    "event": "Signed Up"' in process.log) is (option == "--verbose")


def test_verbose_does_not_multiply_a_call_that_is_deep_and_wide(tmp_path: Path) -> None:
    wide = functools.reduce(lambda inner, _: [inner], range(480), list[Any]([1] * 30_000))
    with Process(tmp_path, "--verbose") as process, Wire(process) as wire:
        for call in {**TRACK, "properties": {"a": wide}}, TRACK:  # after the second the first is logged
            assert wire.status(request(call)) == 200
        assert len(process.log) < 1_000_000 and process.vitals()[2] < 150


def test_a_log_that_is_full_stops_nothing(tmp_path: Path) -> None:
    with Process(tmp_path, log_path=Path("/dev/full")) as process, Wire(process) as wire:
        assert {wire.send(request()).reply().status for _ in range(500)} == {200}


def test_no_api_key_is_found_in_keys_file_log_or_reply(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    key = add_key("Acme", "--api-keys", keys).stdout.strip()
    with Process(tmp_path, "--api-keys", keys, "--verbose") as process:
        replies = [post(process, key=key), post(process, key=key + "x"), post(process, {"type": "x"}, key=key)]
        assert [reply.status_code for reply in replies] == [200, 401, 501]
        with Wire(process) as wire:
            odd = wire.send(head(f"Authorization : {basic(key)}", key=None)).reply()
        assert odd.status == 400 and process.stop() == 0
        texts = [process.log, keys.read_text(), str(odd), *(f"{reply.headers}{reply.text}" for reply in replies)]
    assert not [text for text in texts for secret in (key, basic(key).split()[1]) if secret in text]


@pytest.mark.parametrize(("outcome", "status"), [
    (GeneratorExit("x"), 500), (SystemExit(1), 500), (ValueError(FORGED), 500), (receiver.Refusal(400, FORGED), 400),
    (receiver.Refusal(400, "x" * 1_000_000), 400),
])  # fmt: skip
def test_whatever_a_destination_raises_is_answered_and_a_line_in_the_log_and_forges_none(
    caplog: pytest.LogCaptureFixture, outcome: Exception, status: int
) -> None:
    with receiver.serve(Recorder(outcome), port=0) as server, Wire(server) as wire:
        reply = wire.send(request({**TRACK, "user_id": FORGED})).reply()
        assert reply.status == status and "forged" not in reply.headers and (status == 400 or b"x" not in reply.body)
    assert re.search(rf"^WARNING .* {status} track demo .* 'Signed Up' ", caplog.text, re.M)
    assert not re.search("^Forged|\x1b|.{2000}", caplog.text, re.M)
    assert status == 400 or re.search(r"^    Traceback .*:\n      File ", caplog.text, re.M)


def test_a_destination_may_change_what_it_was_given(caplog: pytest.LogCaptureFixture) -> None:
    def spoil() -> None:
        call = keeper.calls[-1][-1]
        call.raw["_id"], call.raw, call.customer = object(), None, None

    keeper = Recorder(spoil)
    with receiver.serve(keeper, port=0, verbose=True) as server:
        assert post(server).status_code == 200
    assert re.search(r"200 track demo u1 'Signed Up' ", caplog.text) and '\n    "_id": "<object' in caplog.text
    assert {record.name for record in caplog.records} == {"receiver"}


def test_a_call_whose_client_did_not_wait_for_the_reply_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    go = threading.Event()
    late = Recorder(lambda: go.wait(9) and None)
    with receiver.serve(late, port=0) as server, Wire(server) as wire:
        sent = time.monotonic()
        assert wire.send(request()) and until(lambda: late.calls)
        taken = time.monotonic()
        wire.reset()
        until(lambda: time.monotonic() > taken + 0.05)
        go.set()
    line = re.search(r"^INFO .* 200 track demo u1 'Signed Up' (\S+) ms$", caplog.text, re.M)
    assert line and 50 <= float(line[1]) <= (time.monotonic() - sent) * 1000
    assert "Traceback" not in caplog.text


# ---- The keys file, and maintenance ----------------------------------------------------------------------------------

ENTRY = {"customer": "Acme", "sha256": "0" * 64}


def test_the_keys_file_of_the_fixtures_holds_the_three_demo_keys() -> None:
    lapsed, limited = ("lapsed", None, "2020-01-01T00:00:00.000Z"), ("limited", frozenset(["identify"]), None)
    demo = {"segment": ("demo", None, None), "segment-expired": lapsed, "segment-identify-only": limited}
    assert {digest(key): entry for key, entry in demo.items()} == KEYS and KEYS.keys() == receiver.DEMO_KEYS


def test_an_entry_of_the_keys_file_has_a_customer_and_a_digest_and_perhaps_calls_and_expires() -> None:
    more = {"sha256": "1" * 64, "calls": [*receiver.CALLS], "expires": "2027-01-01T01:00:00+01:00"}
    assert receiver.parse_keys(json.dumps([ENTRY, {**ENTRY, **more}])) == {
        "0" * 64: ("Acme", None, None), "1" * 64: ("Acme", frozenset(receiver.CALLS), "2027-01-01T00:00:00.000Z"),
    }  # fmt: skip


@pytest.mark.parametrize(("entries", "culprit"), [
    ({}, "it is not a JSON array"), ([ENTRY, 7], "entry 2: .*int"),
    ([ENTRY, ENTRY], "entry 2: this sha256 was there before"),
    ([{"sha256": "0" * 64}], "entry 1: .*'customer'"), ([{"customer": "Acme"}], "entry 1: .*'sha256'"),
    ([{**ENTRY, "expirs": "2027-01-01"}], "entry 1: .*'expirs'.*"),
    *(([{**ENTRY, member: wrong}], f"entry 1: {member} is not {what}") for member, what, values in (
        ("customer", "a name", ["", 7, None, "A\nB", "\ud800"]), ("expires", "an ISO 8601 time", ["soon", "", 2027]),
        ("sha256", "64 hexadecimal digits in small letters", ["0" * 63, "0" * 65, "G" * 64, "A" * 64, None]),
        ("calls", f"an array of {', '.join(receiver.CALLS)}", ["identify", ["identify", "tarck"], [7], 7]),
    ) for wrong in values),
])  # fmt: skip
def test_a_wrong_entry_or_member_of_the_keys_file_is_an_error_that_names_it(entries: Any, culprit: str) -> None:
    with pytest.raises(ValueError, match=f"^{culprit}$"):
        receiver.parse_keys(json.dumps(entries))


def test_keys_that_could_not_be_read_are_read_as_soon_as_they_can_be(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    shutil.copy(FIXTURES / "keys.json", keys)
    with Process(tmp_path, "--api-keys", keys) as process:
        limit = functools.partial(resource.prlimit, process.process.pid, resource.RLIMIT_NOFILE)
        usual = limit()
        limit((3, usual[1]))  # no file can be opened
        keys.write_text("[]")
        process.logs("The keys stay as they were: .*Too many open files")
        time.sleep(0.5)  # some more attempts, of which nothing is to be seen
        limit(usual)
        process.logs("0 keys read")
        assert post(process).status_code == 401 and process.log.count("Too many open files") == 1


def test_keys_that_were_broken_are_read_again_even_if_the_file_seems_to_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "keys.json"
    shutil.copy(FIXTURES / "keys.json", keys)
    monkeypatch.setattr(receiver, "look", lambda *_: [1, 1])  # as where its time moves in steps
    kept = receiver.Receiver(Recorder(), receiver.parse_options({"api_keys": keys}))
    kept.seen = [0, 0]
    for text, number in (("[", 3), ("[]", 0)):
        keys.write_text(text)
        kept.reload_keys()
        assert len(kept.endpoint.keys) == number


@sentences("broken", [
    ("no entry", b"[{]"), ("too deep", b"[" * 100_000), ("not UTF-8", b'[{"customer": "\xff"}]'),
    ("no array", b"null"), ("a folder", Path.mkdir), ("not there", None),
])  # fmt: skip
def test_if_the_new_text_of_the_keys_file_is_broken_the_old_keys_stay(tmp_path: Path, broken: Any) -> None:
    keys, good, kept = tmp_path / "keys.json", (FIXTURES / "keys.json").read_bytes(), "The keys stay as they were"
    keys.write_bytes(good)
    with Process(tmp_path, "--api-keys", keys) as process:
        keys.unlink()
        if broken:
            keys.write_bytes(broken) if isinstance(broken, bytes) else broken(keys)
        process.logs(kept, 3)
        assert post(process).status_code == 200
        process.process.send_signal(signal.SIGHUP)
        process.logs(rf"{kept}[\s\S]*{kept}", 3)
        if broken:
            keys.rename(tmp_path / "broken")
        keys.write_bytes(good)
        process.logs("3 keys read")
        assert post(process).status_code == 200
        keys.write_text("[]")
        process.logs("0 keys read")
        assert post(process).status_code == 401


def test_maintenance_is_503_with_retry_after_and_sigusr1_toggles_it(tmp_path: Path) -> None:
    with Process(tmp_path, "--maintenance") as process:
        reply = post(process)
        assert (reply.status_code, reply.json()) == (503, {"message": "Down for maintenance"})
        assert reply.headers["Retry-After"] == "5"
        for state, status in (("off", 200), ("on", 503)):
            process.process.send_signal(signal.SIGUSR1)
            process.logs(f"Maintenance is {state}")
            assert post(process).status_code == status
        assert post(process, url=process.url + "health").status_code == 405
        assert requests.get(process.url + "health", verify=process.tls_cert, timeout=9).status_code == 503


def test_maintenance_is_not_undone_by_keys_that_are_read_at_that_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver.serve(Recorder(), port=0) as server, ThreadPoolExecutor(1) as pool:
        toggled, read_keys = list[Any](), server.receiver.read_keys

        def read_slowly() -> dict[str, receiver.Key]:
            toggled.append(pool.submit(server.receiver.toggle_maintenance))
            wait(toggled, 0.2)
            return read_keys()

        monkeypatch.setattr(server.receiver, "read_keys", read_slowly)
        server.reload()
        assert toggled[0].result() is None and server.receiver.endpoint.maintenance


# ---- All connections -------------------------------------------------------------------------------------------------


def test_beyond_max_connections_the_one_idle_longest_makes_room_and_not_a_new_one(tmp_path: Path) -> None:
    with Process(tmp_path, "--max-connections", "3") as process, contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(process)) for _ in range(2)]
        for wire in wires[1], wires[0]:
            assert wire.status(request()) == 200
        wires.append(stack.enter_context(Wire(process)))  # this one says nothing yet, and has the nearest deadline
        assert stack.enter_context(Wire(process)).status(request()) == 200
        assert [wires[number].status(request()) for number in (2, 0)] == [200, 200] and wires[1].closed()


def test_beyond_max_connections_new_ones_wait_if_none_is_idle(tmp_path: Path) -> None:
    with Process(tmp_path, "--max-connections", "2") as process, Wire(process) as first, Wire(process) as second:
        for wire in first, second:  # each waits for its body, as the server knows
            assert wire.status(head("Expect: 100-continue", length=len(TRACK_JSON))) == 100
        with Load(process, "third", 1, 1) as third:
            assert not wait(third.clients, 0.5).done and first.status(TRACK_JSON) == 200
        assert len(third.stored) == 1 and second.status(TRACK_JSON) == 200


def test_as_many_files_may_be_open_as_the_machine_lets_it(tmp_path: Path) -> None:
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (usual[1] // 2, usual[1]))  # which it inherits
    try:
        with Process(tmp_path) as process:
            assert resource.prlimit(process.process.pid, resource.RLIMIT_NOFILE) == (usual[1], usual[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_and_sigint_exit_0_and_who_is_idle_does_not_hold_it_up(tmp_path: Path, number: signal.Signals) -> None:
    with Process(tmp_path) as process, Wire(process) as idle, Wire(process) as silent:
        assert idle.status(request()) == 200
        started = time.monotonic()
        assert process.stop(number) == 0 and time.monotonic() - started < 3
        assert idle.closed() and silent.closed()


@pytest.mark.parametrize("stuck", [False, True])
def test_sigterm_finishes_what_is_in_flight_loses_no_200_and_exits_0_in_10_s(tmp_path: Path, stuck: bool) -> None:
    with Process(tmp_path) as process, Wire(process) as wire, Load(process, "load", 8) as load:
        wire.send(request()[:-1] if stuck else b"")
        until(lambda: len(load.stored) > 200)
        started = time.monotonic()
        assert process.stop() == 0 and time.monotonic() - started < 10
        assert wire.reply()[::2] == ((503, b'{"message": "Shutting down"}') if stuck else (0, b""))
    assert {other for other in load.others if other} <= {503}
    assert load.stored <= {*process.ids()} and "Traceback" not in process.log


# ---- TLS -------------------------------------------------------------------------------------------------------------


def test_sighup_loads_the_certificate_again_without_dropping_a_connection_unless_it_is_broken(tmp_path: Path) -> None:
    openssl = "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"
    for name in "one", "two", "three":
        files = ["-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.pem"]
        command(*openssl, "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", *files, check=True)
    one, two, three = ((tmp_path / f"{name}.pem").read_text() for name in ("one", "two", "three"))
    with Process(tmp_path, "--tls-cert", tmp_path / "one.pem", "--tls-key", tmp_path / "one.key") as process:
        process.tls_cert = str(tmp_path / "one.pem")
        with Wire(process) as old:
            process.tls_cert = str(tmp_path / "two.pem")
            shutil.copy(tmp_path / "two.key", tmp_path / "one.key")
            for number, text in enumerate((two, "", "junk", one, three)):
                (tmp_path / "one.pem").write_text(text)
                process.process.send_signal(signal.SIGHUP)
                process.logs(rf"(The certificate stays as it was[\s\S]*){{{number}}}" if number else "Certificate read")
                with Wire(process) as new:
                    assert new.status(request()) == old.status(request()) == 200
        assert "Traceback" not in process.log


@pytest.mark.parametrize(("version", "ciphers", "spoken"), [
    ("TLSv1", "ALL", False), ("TLSv1_1", "ALL", False), ("TLSv1_2", "kRSA", False), ("TLSv1_2", "ECDHE+SHA", False),
    ("TLSv1_2", "aNULL", False), ("TLSv1_2", "ALL", True), ("TLSv1_3", "ALL", True),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tls_1_2_and_1_3_are_spoken_with_forward_secrecy_and_no_compression_and_nothing_older(
    running: Process, version: str, ciphers: str, spoken: bool
) -> None:
    context = ssl.create_default_context(cafile=running.tls_cert)
    context.options &= ~ssl.OP_NO_COMPRESSION
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion[version]
    with contextlib.nullcontext() if spoken else pytest.raises(OSError), Wire(running, context) as wire:
        assert str(wire.tls.version()).replace(".", "_") == version
        assert str(wire.tls.cipher()).startswith(("('ECDHE-", "('TLS_"))
        assert (wire.tls.selected_alpn_protocol(), wire.tls.compression()) == ("http/1.1", None)


def test_there_is_no_renegotiation(running: Process) -> None:
    shown = command("openssl", "s_client", "-tls1_2", "-connect", urlsplit(running.url).netloc, input="R\n", timeout=10)
    assert "no renegotiation" in shown.stderr


# ---- An open port and a bad day --------------------------------------------------------------------------------------


def test_who_is_stuck_or_trickles_is_gone_after_the_timeout_and_a_normal_one_never_waits(tmp_path: Path) -> None:
    begins = {"handshake": b"\x16\x03\x01\x02", "body": head(length=5000) + b'{"type"', "trickle": b"POST /"}
    with Process(tmp_path, "--timeout", "3") as process, ThreadPoolExecutor(500) as pool:
        process.rest()
        context = ssl.create_default_context(cafile=process.tls_cert)

        def answered(kind: str) -> tuple[bytes, float]:
            started = time.monotonic()
            with connect(process) if kind == "handshake" else Wire(process, context).tls as sock:
                sock.sendall(begins[kind])
                sock.settimeout(0.2)
                while time.monotonic() - started < 9:
                    with contextlib.suppress(TimeoutError):
                        return sock.recv(65_536), time.monotonic() - started
                    sock.send(b"a" if kind == "trickle" else b"")
            return b"", time.monotonic() - started

        clients = [pool.submit(answered, kind) for kind in ["handshake"] * 100 + ["body"] * 100 + ["trickle"] * 300]
        until(lambda: process.vitals()[1] > 500, 3)
        with Load(process, "normal", 1) as load:
            replies, seconds = zip(*(client.result() for client in clients), strict=True)
        assert sum(reply.startswith(b"HTTP/1.1 408 ") for reply in replies) == 400 and max(seconds) < 6
        assert len(load.stored) > 100 and not load.others and sorted(load.seconds)[-len(load.seconds) // 100] < 1
        until(lambda: process.vitals()[:2] == process.at_rest)


def test_a_client_that_pipelines_thousands_and_reads_no_reply_is_gone_after_the_timeout(running: Process) -> None:
    with Wire(running) as wire:
        ends = f":{urlsplit(running.url).port:04X} 0100007F:{wire.tls.getsockname()[1]:04X} "

        def unread() -> int | None:
            """How many bytes the server has not read, as its kernel tells; None if the connection is gone."""
            found = re.search(rf"{ends}\S+ \w+:(\w+)", Path("/proc/net/tcp").read_text())
            return int(found[1], 16) if found else None

        assert wire.status(request()) == 200
        while not unread():  # until it is stuck, as its replies fill all buffers on the way
            wire.send(head(target="/" + "x" * 70, length=0) * 50)
            with contextlib.suppress(AssertionError):
                until(lambda: not unread(), 0.3)
        until(lambda: unread() is None, 8)  # and the kernel does not keep the replies
    assert post(running).status_code == 200


def track(properties: str) -> bytes:
    return request(f'{{"type": "track", "user_id": "u", "event": "e", "properties": {properties}}}'.encode())


def object_of(parts: tuple[str, ...] | str, times: int) -> bytes:
    """A track call with an object whose keys are all that can be put together of these parts."""
    return track("{" + ",".join(f'"{"".join(key)}":0' for key in itertools.product(parts, repeat=times)) + "}")


@sentences("status, data", [
    ("arrays 10,000 deep", 400, track("[" * 10_000 + "]" * 10_000)),
    ("objects 10,000 deep", 400, track('{"a":' * 10_000 + "1" + "}" * 10_000)),
    ("arrays without an end", 400, track("[" * 500_000)),
    ("50,000 keys", 200, object_of("0123456789abcde", 4)),
    ("hash-flooding keys", 200, object_of(("Ez", "FY"), 13)),
    ("keys that become one", 200, object_of(("a-", "a ", "a_", "A"), 7)),
    ("one key 80,000 times", 200, track("{" + '"a":0,' * 80_000 + '"a":0}')),
    ("capitals", 200, track('{"' + "aB" * 250_000 + '": 1}')),
    ("escapes", 200, track('{"a": "' + r"\u0000" * 80_000 + '"}')),
    ("half a surrogate", 400, track('{"a": "' + r"\ud83d\ude00" * 40_000 + r'\ud83d"}')),
    ("long numbers", 200, track('{"a": [' + ("9" * 300 + ",") * 1700 + "1]}")),
    ("a long fraction", 200, track('{"a": 0.' + "1" * 500_000 + "}")),
    ("a long integer", 400, track('{"a": ' + "1" * 500_000 + "}")),
    ("a charset with a number", None, request(TRACK, f"{MEDIA}; charset*{'0' * 5000}=utf-8")),
    ("a charset with a language", None, request(TRACK, f"{MEDIA}; charset*=x'y'%ff")),
    ("many parameters", None, request(TRACK, MEDIA + "; a=b" * 9000)),
    ("an open quotation", 415, request(TRACK, f'{MEDIA}; "' + ";" * 60_000)),
    ("many encodings", 415, request(TRACK, "Content-Encoding: " + "x," * 30_000)),
    ("deep settings", 400, request(TRACK, "X-Segment-Settings: " + base64.b64encode(b"[" * 40_000).decode())),
    ("many wishes", 200, request(TRACK, "Connection: " + "," * 60_000)),
    ("blanks in a header", 200, request(TRACK, "X: a" + " " * 60_000 + "b")),
    ("blanks before what no header may have", 400, request(TRACK, "X:" + " " * 60_000 + "\1")),
    ("many expectations", 200, request(TRACK, "Expect: " + "100-continue," * 4000)),
])  # fmt: skip
def test_a_heavy_body_or_head_is_answered_within_a_second_never_5xx(running: Process, status: Any, data: bytes) -> None:
    with Wire(running) as wire:
        started = time.monotonic()
        assert wire.status(data) in ((status,) if status else (200, 415)) and time.monotonic() - started < 1


@pytest.mark.parametrize("value", [
    "a\0b", "\0", "'); drop table calls; --", '"', "\u202e\x1b[m\r\nForged", "x" * 80_000, "🙂\uffff", "%s",
], ids=lambda value: repr(value)[:20])  # fmt: skip
def test_any_text_in_an_id_or_name_is_stored_as_it_came_and_forges_no_line(running: Process, value: str) -> None:
    sent: dict[str, Any] = dict.fromkeys(("user_id", "anonymous_id", "message_id", "group_id", "event"), value)
    sent |= {"type": "group", "traits": {"t": value}}
    assert post(running, sent).status_code == 200
    [found] = rows(running.database, "select user_id, anonymous_id, call from calls where message_id = ?", value)
    assert found[:2] == (value, value) and json.loads(found[2]) == sent
    assert not re.search("^Forged|\x1b", running.log, re.M)


VALID = [request(), request(TRACK, "Connection: keep-alive", *TABLE), head(method="GET", target="/health")]
PARTS = b"\r\n|\n|\r|\0| |:|\t|9|\xff|HTTP/1.0|Host: x\r\n|Content-Length: 3\r\n".split(b"|")
PARTS += b'Transfer-Encoding: chunked\r\n|Expect: 100-continue\r\n|[|"|{|\\ud800|1e999|\r\n\r\n|'.split(b"|")


def mutated(chance: random.Random) -> bytes:
    """A valid request with a few bytes of it, or of its body only, gone, changed or added."""
    whole = chance.random() < 0.6
    data = bytearray(chance.choice(VALID) if whole else TRACK_JSON)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(data))
        data[at : at + chance.choice((0, 0, 1, 1, 2, 30))] = chance.choice((chance.choice(PARTS), chance.randbytes(2)))
    return bytes(data) if whole else request(bytes(data))


def test_any_mutation_of_a_request_is_answered_with_no_fault_of_ours_and_no_wait(running: Process) -> None:
    chance, seen, context = random.Random(4), list[int](), ssl.create_default_context(cafile=running.tls_cert)
    for _ in range(5000):
        with contextlib.suppress(receiver.Refusal):
            receiver.parse_head(mutated(chance).partition(b"\r\n\r\n")[0].decode("latin-1") + "\r\n", bytes)
    for _ in range(1500):
        with Wire(running, context) as wire:
            data, started = mutated(chance) + mutated(chance), time.monotonic()
            wire.send(data).end()
            seen += itertools.takewhile(bool, (wire.reply().status for _ in itertools.count()))
            assert not wire.buffer and time.monotonic() - started < 1.5, data
    assert len(seen) > 1500 and {*seen} <= {100, 200, 400, 401, 404, 405, 411, 413, 415, 431, 501, 505}


@pytest.mark.parametrize("noise", [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", request(), b"\0" * 300, random.Random(5).randbytes(3000), b"SSH-2.0-x\r\n",
    b"\x80\x2e\x01\0\2", b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"\x15\x03\x03\0\2\2\x28",
], ids=lambda data: str(data)[:20])  # fmt: skip
def test_noise_on_the_port_is_closed_quietly_with_one_line_in_the_log(running: Process, noise: bytes) -> None:
    before = running.so_far()
    with connect(running) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(noise)
        sock.shutdown(socket.SHUT_WR)
        assert b"HTTP" not in b"".join(iter(lambda: sock.recv(9999), b""))
    until(lambda: len(running.log) > before)
    assert re.fullmatch(r"\S+Z Connection with 127\.0\.0\.1: .+\n", running.log[before:])


def test_who_resets_before_or_in_the_handshake_leaves_no_traceback(running: Process) -> None:
    for number in range(300):
        with connect(running) as sock:
            sock.send(b"\x16\x03\x01"[: number % 3])
            sock.setsockopt(*RESET)
    assert post(running).status_code == 200 and "Traceback" not in running.log


def test_after_all_this_nothing_has_leaked_and_the_log_has_neither_a_traceback_nor_a_key(running: Process) -> None:
    until(lambda: running.vitals()[:2] == running.at_rest)
    assert running.vitals()[2] < 150 and rows(running.database, "pragma integrity_check") == [("ok",)]
    assert post(running).status_code == 200
    assert not re.search(f"Traceback|{basic('segment').split()[1]}", running.log)


# ======================================================================================================================
# 4. Other ways in
#
# A destination of one's own, in the program, in a test, and behind any WSGI server: the examples of DESIGN.md, "From
# Python". All of them give the answers that the server gives.
# ======================================================================================================================

CONTACTS = """
import receiver, sys

class Contacts(receiver.Destination):
    def identify(self, user_id, traits, call):
        assert receiver is sys.modules["__main__"]
        if "email" not in traits:
            raise receiver.Refusal(400, "Missing email address")
        return 202 // len(traits["email"])
"""


def test_destination_is_a_class_in_the_current_directory_that_gets_the_running_program(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(CONTACTS)
    files = ["--tls-cert", CERT, "--tls-key", CERT_KEY, "--api-keys", FIXTURES / "keys.json"]
    with Process(tmp_path, "--destination", "own:Contacts", *files, cwd=tmp_path) as process:
        process.logs("^Calls go to own:Contacts.$")
        for traits, status, message in (
            ({}, 400, "Missing email address"), ({"email": "@"}, 202, None), ({"email": ""}, 500, "Internal error"),
        ):  # fmt: skip
            reply = post(process, {"type": "identify", "user_id": "u", "traits": traits})
            assert (reply.status_code, reply.json() if message else None) == (status, message and {"message": message})
        assert post(process).status_code == 501
        process.logs("ZeroDivisionError")
        assert not process.database.exists()


def test_serve_is_a_real_endpoint_in_a_thread_with_the_options_of_the_command_line_until_the_context_ends() -> None:
    call = {"type": "identify", "user_id": "u", "traits": {"email": "a@b.c"}}
    with receiver.serve(Recorder(), port=0, path="/in", max_body=200) as server:
        assert server.url.endswith("/in") and post(server, call).status_code == 200
        assert post(server, {**call, "context": {"title": "x" * 200}}).status_code == 413
    with pytest.raises(requests.ConnectionError):
        post(server, call)
    assert threading.enumerate() == [threading.main_thread()]


def test_serve_on_port_0_takes_any_free_port() -> None:
    with receiver.serve(Recorder(), port=0) as one, receiver.serve(Recorder(), port=0) as other:
        assert len({8443, urlsplit(one.url).port, urlsplit(other.url).port}) == 3


def test_a_mistake_is_told_in_one_line_whatever_is_quoted_in_it() -> None:
    assert str(receiver.ConfigurationError("destination x: two\nlines\x1b[31m")) == "destination x: two lines [31m"


def test_serve_names_an_option_that_cannot_be_used(tmp_path: Path) -> None:
    with receiver.serve(Recorder(), port=0) as server:
        taken = {"port": urlsplit(server.url).port}
        with pytest.raises(receiver.ConfigurationError, match=f"cannot listen on .*{taken['port']}.*in use"):
            receiver.serve(Recorder(), **taken)
        wrong = {"port": 70_000, "colour": 1, "api_keys": tmp_path / "none", "tls_cert": "none", "timeout": "soon"}
        for name, value in wrong.items():
            with pytest.raises(receiver.ConfigurationError, match=f"{name.replace('_', '-')}|{value}"):
                receiver.serve(Recorder(), **{"port": 0, name: value})


def wsgi_answer(application: Any, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
    """What a WSGI callable answers, under wsgiref's validator."""
    path, _, query = path.partition("?")
    environ: dict[str, Any] = {"REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": unquote(path)}
    environ["QUERY_STRING"] = query
    for name, value in headers.items():
        own = name.lower() in ("content-type", "content-length")
        environ["HTTP_" * (not own) + name.upper().replace("-", "_")] = value
    wsgiref.util.setup_testing_defaults(environ)
    started = list[Any]()

    def start_response(*reply: Any) -> Callable[[bytes], object]:
        started.extend(reply)
        return lambda data: None

    answer: Any = wsgiref.validate.validator(application)({**environ, "wsgi.input": io.BytesIO(body)}, start_response)
    with contextlib.closing(answer):
        return Answer(int(started[0].split(" ")[0]), dict(started[1]), b"".join(answer))


@each_refused
@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
def test_wsgi_gives_the_servers_own_answers(case: Any) -> None:
    application = receiver.wsgi(type("OfTheRecords", (Recorder,), {"alias": None, "screen": None})())
    status, headers, body = wsgi_answer(application, case.method, case.path, case.headers, case.body)
    assert (status, json.loads(body)) == (case.status, {"message": case.message})
    assert headers["Content-Length"] == str(len(body)) and (status == 401) == ("WWW-Authenticate" in headers)


def test_wsgi_stores_what_it_is_given_whole(tmp_path: Path) -> None:
    application = receiver.wsgi(database=tmp_path / "calls.db")
    for length, status in ((len(TRACK_JSON), 200), (len(TRACK_JSON) + 1, 400)):
        headers = {"Authorization": basic("segment"), "Content-Length": str(length)}
        assert wsgi_answer(application, "POST", "/", headers, TRACK_JSON)[0] == status
    assert wsgi_answer(application, "HEAD", "/health", {}, b"")[::2] == (200, b"")
    assert rows(tmp_path / "calls.db", "select type, user_id from calls") == [("track", "u1")]
    gone = {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": "5", "wsgi.input": socket.socket().makefile("rb")}
    with pytest.raises(receiver.Refusal, match="The body ended early"):  # of a client that has gone
        receiver.parse_environ(gone).read()
    with pytest.raises(receiver.Refusal, match="not plain digits"):  # which wsgiref's validator does not let pass
        receiver.parse_environ({"REQUEST_METHOD": "POST", "CONTENT_LENGTH": "5x"})


# ======================================================================================================================
# 5. The command line
#
# What it says when it is ready, the options that no test above needs, and every mistake in them: one line, exit 2. Then
# the keys that it makes.
# ======================================================================================================================


def test_it_prints_one_line_listening_on_and_how_to_go_on_with_commands_that_work_as_pasted(running: Process) -> None:
    assert re.fullmatch(r"Listening on https://127\.0\.0\.1:\d+/\n", running.said)
    running.logs("^Warning: fixtures/keys.json holds demo keys")
    shown = command("sh", "-c", running.logs(r"^ +(curl .*)$")[1])
    assert shown.stdout.startswith("HTTP/1.1 200 OK"), shown
    shown = command("sh", "-c", running.logs(r"^ +(sqlite3 .*)$")[1])
    assert shown.stdout.split("\n")[0].endswith("|track|user-4711"), shown


def test_it_listens_on_ipv6_and_another_path(tmp_path: Path) -> None:
    with Process(tmp_path, "--bind", "::1", "--path", "/X-Segment/v1") as process:
        assert re.fullmatch(r"https://\[::1\]:\d+/X-Segment/v1", process.url)
        assert (post(process).status_code, post(process, url=process.url + "/").status_code) == (200, 404)


def test_beyond_loopback_it_starts_with_keys_of_its_own_and_takes_no_demo_key_later(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    add_key("Acme", "--api-keys", keys)
    with Process(tmp_path, "--api-keys", keys, "--bind", "0.0.0.0") as process:
        assert process.url.startswith("https://0.0.0.0:") and "demo key" not in process.log
        url = process.logs(r"-u YOUR_API_KEY: (https://localhost:\d+/)")[1]
        shutil.copy(FIXTURES / "keys.json", keys)
        process.logs("The keys stay as they were: .*demo key")
        assert post(process, url=url).status_code == 401


NO_PATH = "is not a slash and visible ASCII without [?] and #, or is /health"
PUBLIC = "to listen on 0.0.0.0, make keys of your own with --add-key CUSTOMER --api-keys FILE"
ALONE = "--calls and --expires go with --add-key"


# The command line, and what the one line says about it.
@pytest.mark.parametrize(("line", "says"), [
    ("--port 65536", "argument --port: 65536 is not from 0 to 65535"), ("--port http", "argument --port: .*'http'"),
    ("--port", "argument --port: expected one argument"), ("--bind localhorst", "argument --bind: .*'localhorst'"),
    *((f"--path {path}", f"argument --path: '{re.escape(path)}' {NO_PATH}")
      for path in ("segment", "/health", "/?", "/#", "/é")),
    *((f"--{option} {value}", f"argument --{option}: {value} is not from {limits}") for option, value, limits in (
        ("timeout", "0", "0.1 to 86400"), ("timeout", "nan", "0.1 to 86400"), ("keep-alive", "86401", "0.1 to 86400"),
        ("max-body", "0", "1 to 536870912"), ("max-connections", "100001", "1 to 100000"),
    )),
    *((line, f"unrecognized arguments: {line}") for line in ("--prot 1", "--verb", "start")),
    ("--quiet --verbose", "argument --verbose: not allowed with argument --quiet"),
    ("--api-keys nowhere.json", "nowhere.json: .*No such file.*"), ("--api-keys .", r"\.: .*Is a directory.*"),
    ("--api-keys fixtures/track.json", "fixtures/track.json: it is not a JSON array"),
    ("--tls-cert nowhere.pem", "nowhere.pem, certs/localhost-key.pem: .*; `make certs` makes a self-signed pair"),
    ("--tls-key fixtures/keys.json", r"certs/localhost.pem, fixtures/keys.json: .*\(_ssl.*\)"),
    ("--tls-cert README.md", r"README.md, certs/localhost-key.pem: .*\(_ssl.*\)"),
    ("--database README.md", "README.md: this is not a database of calls"), ("--database .", r"\.: .*directory.*"),
    ("--database nowhere/calls.db", "nowhere/calls.db: unable to open database file"),
    ("--destination json", "destination json: TypeError: .*"),
    ("--destination nowhere:Nothing", "destination nowhere:Nothing: ModuleNotFoundError: .*"),
    ("--destination json:JSONDecoder", "destination .*: TypeError: this is no subclass of receiver.Destination"),
    ("--bind 0.0.0.0", f"fixtures/keys.json holds a demo key, which everybody knows: {PUBLIC}"),
    ("--calls track", ALONE), ("--expires 2999-01-01", ALONE),
    ("--add-key A --calls tarck", f"fixtures/keys.json: entry 4: calls is not an array of {', '.join(receiver.CALLS)}"),
    ("--add-key A --expires soon", "fixtures/keys.json: entry 4: expires is not an ISO 8601 time"),
    ("--add-key=", "fixtures/keys.json: entry 4: customer is not a name"),
    ("--add-key A --api-keys README.md", "README.md: Expecting value.*"),
    ("--add-key A --api-keys nowhere/k.json", "nowhere/k.json: .*No such file.*"),
])  # fmt: skip
def test_every_mistake_is_one_line_on_standard_error_and_exit_2(tmp_path: Path, line: str, says: str) -> None:
    usual, before = ["--port=0", f"--database={tmp_path / 'calls.db'}"], (FIXTURES / "keys.json").read_bytes()
    done = command(*RECEIVER, *([] if line.startswith("--add-key") else usual), *line.split())
    assert (done.returncode, done.stdout) == (2, "") and re.fullmatch(rf"receiver\.py: {says}\n", done.stderr), done
    assert (FIXTURES / "keys.json").read_bytes() == before


def add_key(customer: str, *options: object) -> subprocess.CompletedProcess[str]:
    return command(*RECEIVER, "--add-key", customer, *options)


def test_add_key_prints_a_random_key_once_and_writes_its_entry_with_mode_0600(tmp_path: Path) -> None:
    keys = tmp_path / "keys" / "keys.json"
    keys.parent.mkdir()
    first = add_key("Acme", "--api-keys", keys)
    assert first.returncode == 0 and re.fullmatch(r"[\w-]{43}\n", first.stdout) and first.stdout not in first.stderr
    assert first.stderr == f"A key for Acme was added to {keys}; it is shown this once only.\n"
    inode, key = keys.stat().st_ino, first.stdout.strip()
    with Process(tmp_path, "--api-keys", keys) as process:
        assert post(process, key=key).status_code == 200
        options = ["--api-keys", keys, "--calls", "identify,group", "--expires", "2999-01-01"]
        limited = add_key("Limited", *options).stdout.strip()
        process.logs("2 keys read")
        assert post(process, key=limited).status_code == 403
        assert post(process, SAMPLES["group"], key=limited).status_code == 200
    more = {"calls": ["identify", "group"], "expires": "2999-01-01"}
    one, two = json.loads(keys.read_text())
    assert one == {"customer": "Acme", "sha256": digest(key)}
    assert two == {"customer": "Limited", "sha256": digest(limited), **more}
    status = keys.stat()  # replaced in one step, with nothing left beside it
    assert status.st_mode & 0o777 == 0o600 and status.st_ino != inode and [*keys.parent.iterdir()] == [keys]


def test_keys_that_are_added_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    keys, folder = tmp_path / "keys.json", os.open(tmp_path, os.O_RDONLY)
    with ThreadPoolExecutor(4) as pool:
        fcntl.flock(folder, fcntl.LOCK_EX)
        added = [pool.submit(add_key, f"c{number}", "--api-keys", keys) for number in range(4)]
        assert not wait(added, 1).done and not keys.exists()  # each waits for its turn
        os.close(folder)
        digests = {digest(done.result().stdout.strip()) for done in added}
    assert receiver.parse_keys(keys.read_text()).keys() == digests and len(digests) == 4


# ======================================================================================================================
# 6. The conformance kit
#
# What is checked is an address with its API keys, nothing of receiver.py. A check is a row of a table: a sentence, and
# the section that says so. MUST is what the first published page states, SHOULD what later revisions, HTTP and
# experience add. A check returns (kept), fails (broken), or skips (not checked).
# ======================================================================================================================

RUN = "conformance-" + secrets.token_hex(4)  # the user id of every call, and the beginning of every message id
UNKNOWN = "unknown-" + secrets.token_hex(8)  # a key that nobody has
NUMBER = itertools.count(1)
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "identify": {"traits": {"first_name": "Ada", "address": {"postal_code": "NW1"}}},
    "track": {"event": "Endpoint Checked", "properties": {"order_id": "A-1", "revenue": 84.9, "coupon": None}},
    "page": {"name": "Home", "properties": {"url": "https://example.com/"}},
    "group": {"group_id": RUN + "-group", "traits": {"name": "Example & Co", "employees": 14}},
}


class Target(NamedTuple):
    """The endpoint that is checked."""

    url: str
    keys: Mapping[str, str]  # "api", and perhaps "expired" and "limited", which may not send the last of the calls
    context: ssl.SSLContext  # which certificates to trust
    calls: tuple[str, ...] = tuple(OWN_FIELDS)
    patience: float = 5.0  # seconds that the sender waits for an answer
    until: float = float("inf")  # on the monotonic clock: nothing is sent later

    def __repr__(self) -> str:
        return self.url  # so that no traceback shows a key

    def address(self) -> tuple[str, int]:
        if time.monotonic() > self.until:
            pytest.skip("the endpoint is out of reach, or so slow that no time was left")
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 443

    def connection(self) -> http.client.HTTPSConnection:
        """A connection that opens when it is first used."""
        return http.client.HTTPSConnection(*self.address(), timeout=self.patience, context=self.context)


def target_from(environ: Mapping[str, str]) -> Target:
    """The endpoint that the variables name. If they do not, the run ends and says why."""
    url, key, ca, named = (environ.get(name, "") for name in ("ENDPOINT", "API_KEY", "CA", "CALLS"))
    calls = tuple(named.replace(" ", "").split(",")) if named else tuple(OWN_FIELDS)
    mistakes = {
        "ENDPOINT is not an address that begins with https://": not url.startswith("https://"),
        "API_KEY is missing": not key,
        "CA is not a file": not Path(ca or __file__).is_file(),
        f"CALLS is not of {', '.join(OWN_FIELDS)}": not {*calls} <= {*OWN_FIELDS},
    }
    for mistake in (text for text, made in mistakes.items() if made):
        pytest.exit(f'{mistake}: README.md, "Test your own endpoint"', 2)
    context = ssl.create_default_context(cafile=ca or None)
    if environ.get("INSECURE"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    keys = {"api": key, "limited": environ.get("LIMITED_KEY", ""), "expired": environ.get("EXPIRED_KEY", "")}
    return Target(url, keys, context, calls)


class Exchange(NamedTuple):
    """A request and its reply."""

    status: int  # 0: there was no reply
    headers: http.client.HTTPMessage
    body: bytes
    report: str  # both as text, API keys masked
    leaks: bool  # an API key stands in the reply
    said: Any  # in JSON; ... if it is none


def call_body(kind: str, camel: bool, fields: Mapping[str, Any]) -> bytes:
    """A call as Segment sends it, with these fields; ... leaves one out."""
    now = datetime.now(UTC).isoformat()
    call = {
        "type": kind, "user_id": RUN, "anonymous_id": RUN + "-anonymous", "message_id": f"{RUN}-{next(NUMBER)}",
        **OWN_FIELDS[kind], "context": {"ip": "203.0.113.9", "library": {"name": "kit"}}, "integrations": {},
        "timestamp": now, "sent_at": now, "received_at": now, "original_timestamp": now, "version": 2, **fields,
    }  # fmt: skip
    text = json.dumps({name: value for name, value in call.items() if value is not ...}, ensure_ascii=False)
    return (re.sub(r'_([a-z])(?=\w*":)', lambda found: found[1].upper(), text) if camel else text).encode()


def send(
    target: Target, *, kind: str = "", camel: bool = False, body: bytes | None = None, method: str = "POST",
    scheme: str = "Basic", login: str = "{api}:", headers: Mapping[str, str | None] | None = None,
    connection: http.client.HTTPConnection | None = None, **fields: Any,
) -> Exchange:  # fmt: skip
    """Send a call of this kind, else the last of the calls; or this body. Return that and the reply."""
    if kind and kind not in target.calls:
        pytest.skip(f"{kind} is not in CALLS")
    if missing := [name for name in re.findall(r"{(\w+)}", login) if not target.keys.get(name)]:
        pytest.skip(f"no {missing[0].upper()}_KEY was given")
    body = call_body(kind or target.calls[-1], camel, fields) if body is None else body
    link, parts = connection or target.connection(), urlsplit(target.url)
    login = login.format_map(target.keys)
    encoded = base64.b64encode(login.encode()).decode()
    path = (parts.path or "/") + ("?" + parts.query if parts.query else "")
    given = {
        "Host": parts.netloc, "Authorization": f"{scheme} {encoded}", "Content-Type": "application/json",
        "Content-Length": str(len(body)), "User-Agent": "Segment.io/1.0", "Accept": "*/*", "Cache-Control": "no-cache",
        "X-Segment-Settings": "e30=", **(headers or {}),
    }  # fmt: skip
    sent = {name: value for name, value in given.items() if value is not None}
    asked = "\n".join([f"{method} {path} HTTP/1.1", *map(": ".join, sent.items()), "", body.decode(errors="replace")])
    status, told, got, said = 0, http.client.HTTPMessage(), b"", ...
    try:
        link.request(method, path, body, sent)
        reply = link.getresponse()
        status, told, got = reply.status, reply.headers, reply.read()
        answer = f"HTTP/1.1 {status} {reply.reason}\n{told}{got.decode(errors='replace')}"
    except (OSError, http.client.HTTPException) as error:
        status, answer = 0, f"No reply: {str(error) or 'the connection was closed'}"
    with contextlib.suppress(ValueError):
        said = json.loads(got)
    if not connection:
        link.close()
    keys = {login.strip(":"), encoded, *target.keys.values()} - {""}
    forms = sorted({form for key in keys for form in (key, quote(key), json.dumps(key)[1:-1])}, key=len, reverse=True)
    report = "".join(
        f"\n  {mark} {line[:1_000]}" for mark, text in ((">", asked), ("<", answer))
        for line in re.sub("|".join(map(re.escape, forms)), "***", text)[:4_000].splitlines()
    )  # fmt: skip
    return Exchange(status, told, got, report, any(len(form) > 7 and form in answer for form in forms), said)


def each(name: str, *values: Any, **rest: Any) -> list[dict[str, Any]]:
    """Requests that differ in one argument of send()."""
    return [{name: value, **rest} for value in values]


# ---- The checks ------------------------------------------------------------------------------------------------------

MUST, SHOULD, NEVER = "MUST", "SHOULD", "whatever is sent is answered and never 5xx but 501"
LOGINS = each("headers", *({"Authorization": "Basic" + value} for value in (" ???", "", " Og", " //8=")))
RAW = f'{{"type":"track","event":"Raw","message_id":"{RUN}-raw","user_id":'.encode()
REFUSALS: list[dict[str, Any]] = [
    {"headers": {"Authorization": None}}, {"login": UNKNOWN + ":"}, {"body": b'{"type": '}, {"type": "juggle"},
]  # fmt: skip
ANYTHING = [
    *REFUSALS, *LOGINS, *each("body", b"[" * 9_000 + b"]" * 9_000, RAW + b"9" * 5_000 + b"}"),
    *each("body", b"", b"null", b'"track"', b"\xef\xbb\xbf{}", b"\xff", RAW + rb'"\ud800"}'),
    *each("type", "constructor", "__class__", "toString", "", None, 7, [], {}),
    *each("user_id", RUN + "\0", {"a": 1}, [], 1.5, True, RUN * 500), *each("message_id", {}, 7), *each("event", {}, 7),
    *each("traits", None, 7, "x", []), *each("properties", None, 7, "x", []), *each("context", None, 7, "x", []),
    *each("timestamp", "yesterday", "9999-99-99T99:99:99Z", 0, None, {}), *each("group_id", {}), *each("__proto__", {}),
    *each("headers", {"X-Segment-Settings": "?"}, {"Content-Encoding": "gzip"}, {"Content-Type": "text/plain"}),
]  # fmt: skip
Outcome = BaseException | None  # of a check: None is kept, pytest's Failed is broken, pytest's Skipped is not checked
TRACE = rb"Traceback \(|\.\w+:\d+:\d+\)|\.java:\d+\)|\.rb:\d+:in|\.php(:| on line )\d+|goroutine \d"


def broken(told: str) -> NoReturn:
    """What a check comes to where its sentence does not hold."""
    pytest.fail(told, pytrace=False)


def verify(target: Target) -> None:
    try:
        with contextlib.closing(target.connection()) as link:
            link.connect()
    except OSError as error:
        broken(f"{target.url}: {error}")
    if target.context.verify_mode == ssl.CERT_NONE:
        pytest.skip("INSECURE is set")


def sixteen(target: Target) -> None:
    with ThreadPoolExecutor(16) as pool, contextlib.ExitStack() as stack:
        links = [stack.enter_context(contextlib.closing(target.connection())) for _ in range(16)]
        for exchange in list(pool.map(lambda link: send(target, connection=link), links)):
            if not exchange.status:
                broken("Nothing was answered" + exchange.report)


def without_tls(target: Target) -> None:
    host, port = target.address()
    for also in {port, 80 if port == 443 else port}:
        with contextlib.closing(http.client.HTTPConnection(host, also, timeout=target.patience)) as link:
            exchange = send(target, connection=link, login=UNKNOWN + ":")  # no real key goes out in the clear
        if exchange.status == 401 or 200 <= exchange.status < 300:
            broken(f"On port {also}, without TLS:{exchange.report}")


def old_tls(target: Target) -> None:
    for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
        context, hello = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ssl.MemoryBIO()
        try:
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = context.maximum_version = version
            with contextlib.suppress(ssl.SSLWantReadError):
                context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname=target.address()[0]).do_handshake()
        except (ssl.SSLError, ValueError):
            pytest.skip(f"OpenSSL on this side cannot offer {version.name}")
        # The offer goes out by hand, so that the endpoint alone decides: a handshake record takes it, an alert not.
        with contextlib.suppress(OSError), socket.create_connection(target.address(), target.patience) as link:
            link.sendall(hello.read())
            if link.recv(1) == b"\x16":
                broken(f"{version.name} was offered and taken")


def outlive(target: Target) -> None:
    for case in [{}, *REFUSALS]:
        with contextlib.closing(target.connection()) as link:
            first = send(target, connection=link, **case)
            link.auto_open = 0  # http.client would open it again without a word
            second = send(target, connection=link)
        if first.status and not 200 <= second.status < 300:
            broken(f"The second request failed:{first.report}{second.report}")


class Check(NamedTuple):
    """A sentence, and the requests, or the function, that check it. What is due is in the sentence, or is `kept`."""

    level: str
    section: str
    sentence: str
    faults: str  # those that it must find, each with its value: see Faulty
    cases: Any
    kept: Callable[[Exchange], object] | None = None

    def judge(self, target: Target) -> Outcome:
        due = re.findall(r"\b\d\d\d\b", self.sentence) or ["2xx"]
        try:
            cases = self.cases(target) if callable(self.cases) else self.cases
            for exchange in (send(target, **case) for case in cases or ()):
                if self.kept and not self.kept(exchange):
                    broken("Here it does not hold:" + exchange.report)
                if not self.kept and not {str(exchange.status), f"{exchange.status // 100}xx"} & {*due}:
                    broken(f"{exchange.status or 'Nothing'} was answered, not {' or '.join(due)}{exchange.report}")
        except pytest.skip.Exception as reason:
            return pytest.skip.Exception(f"Not checked: {self.sentence}: {reason}")
        except pytest.fail.Exception as reason:
            told = f"{self.level} broken: {self.sentence} ({self.section})\n{reason}"
            return pytest.fail.Exception(told, pytrace=False)
        return None


ROWS: list[tuple[Any, ...]] = [
    # The first three run alone. If the first or the second is broken, the endpoint is out of reach.
    (MUST, "Accepting Segment Data", "the certificate is valid for the host", "certificate=1", verify),
    (SHOULD, "Retries, later", "an answer comes within 5 seconds", "silent=1", [{}], lambda it: it.status),
    (SHOULD, "Retries, later", "sixteen connections at once are answered within 5 seconds", "one by one=1", sixteen),
    (MUST, "Accepting Segment Data", "plain HTTP is not served", "plain HTTP=1", without_tls),
    (SHOULD, "RFC 8996", "TLS 1.0 and 1.1 are refused", "old TLS=1", old_tls),
    (SHOULD, "Headers, later", "a connection outlives a call and a refusal", "closes=200; closes=400; unread=1",
     outlive),
    *((MUST, "Request Body", f"a call of type {kind} is accepted", f'"type": "{kind}"=400' * (kind != "group"),
       each("kind", kind)) for kind in OWN_FIELDS),
    (MUST, "Formatting", "text beyond ASCII is accepted", "日本=400", each("context", {"locale": "Zażółć 日本 😀"})),
    (MUST, "Direct Integration", "a replay of years ago is accepted", "2012-02-29=400",
     each("timestamp", "2012-02-29T23:59:59.999Z")),
    (MUST, "Status Code", "success is answered 200 or 202", "\n200=204", [{}],
     lambda it: it.status in (200, 202) or it.status > 299),
    (MUST, "Authorization", "a request without an API key is answered 401",
     "header is missing=200; header is missing=403", REFUSALS[:1]),
    (MUST, "Authorization", "another scheme than Basic is answered 401", "The scheme=200", each("scheme", "Bearer")),
    (MUST, "Status Code", "malformed credentials are answered 401", "not base64=200; not base64=500", LOGINS),
    (MUST, "Status Code", "an unknown API key is answered 401", "not known=200",
     each("login", UNKNOWN + ":", ":", ":{api}", "{api}x:")),
    (MUST, "Status Code", "an expired API key is answered 401", "token expired=200", each("login", "{expired}:")),
    (MUST, "Status Code", "a key without the permission is answered 403", "may not=200", each("login", "{limited}:")),
    (MUST, "Status Code", "an empty body is answered 400", "Length: 0=200", each("body", b"")),
    (MUST, "Status Code", "a body that is not JSON is answered 400", "column 9 =200; column 9 =500; column 9 =999",
     each("body", b'{"type": ', b"{'type': 'track'}", b"type=track&user_id=u", b"{} {}")),
    (MUST, "Status Code", "JSON that is no object is answered 400", "not a JSON object=200",
     each("body", b"[]", b'"track"', b"7", b"null")),
    (MUST, "Status Code", "a type that nobody knows is answered 501", "not supported=400", each("type", "juggle")),
    (MUST, "Status Code", NEVER, r'"type": \[\]=500; constructor=500; "user_id": \{=500', ANYTHING,
     lambda it: 0 < it.status < 500 or it.status == 501),
    (MUST, "Response Body", "the body of a refusal is empty or JSON with a message",
     'refusal={"error": "No"}; refusal={"message": ""}; refusal=No', REFUSALS,
     lambda it: it.status < 400 or not it.body or (isinstance(it.said, dict) and it.said.get("message"))),
    (MUST, "Response Body", "the body of a refusal is empty or typed as JSON", "typed=text/html", REFUSALS,
     lambda it: it.status < 400 or not it.body or it.headers.get_content_type() == "application/json"),
    (SHOULD, "Formatting, later", "keys in camelCase are accepted", "userId=400", each("camel", True)),
    (SHOULD, "Spec, common fields", "an anonymous call is accepted", '"user_id": null=400', each("user_id", None, ...)),
    (SHOULD, "Spec, common fields", "a field that nobody knows is accepted", "colour=400", each("colour", {"r": [1]})),
    (SHOULD, "Spec, limits", "a call of 32 KB is accepted", "x{32000}=413", each("context", {"title": "x" * 32_000})),
    (SHOULD, "Retries, later", "the same call is accepted twice", "duplicate=409",
     each("message_id", RUN + "-twice", RUN + "-twice")),
    (SHOULD, "RFC 9110 §11.1", "the scheme in small letters is accepted", ": basic=401", each("scheme", "basic")),
    (SHOULD, "RFC 9110 §8.3", "a Content-Type with a charset is accepted", "charset=415",
     each("headers", {"Content-Type": "application/json; charset=utf-8"})),
    (SHOULD, "Response Body", "the body of a success is empty or JSON", "body=OK", [{}],
     lambda it: it.status > 299 or not it.body or it.said is not ...),
    (SHOULD, "Authorization", "credentials without a colon are answered 401", r"Basic \S.*no colon=200",
     each("login", "{api}")),
    (SHOULD, "Authorization", "a password beside the API key is answered 401", "Basic a2l0.*The password=200",
     each("login", "{api}:x")),  # a2l0 is "kit" in base64
    (SHOULD, "RFC 9110 §11.6", "a reply of 401 has WWW-Authenticate", "no challenge=1", REFUSALS[:2],
     lambda it: it.status != 401 or "WWW-Authenticate" in it.headers),
    (SHOULD, "RFC 8259 §8.1", "a body that is not UTF-8 is answered 400", "0xe9=200", each("body", RAW + b'"\xe9"}')),
    (SHOULD, "RFC 8259 §6", "a number that JSON does not have is answered 400", "NaN=200",
     each("context", {"n": float("nan")})),
    (SHOULD, "Status Code", "a call without a type is answered 400", "field type is=200", each("type", ..., None, 7)),
    (SHOULD, "Spec, common fields", "a call of no user is answered 400", "both missing=200",
     [{"user_id": ..., "anonymous_id": ...}, {"user_id": None, "anonymous_id": None}]),
    (SHOULD, "Request Body", "a track without an event is answered 400", "event is missing=200",
     each("event", ..., None, kind="track")),
    (SHOULD, "Request Body", "a group without its id is answered 400", "group_id is missing=200",
     each("group_id", ..., None, kind="group")),
    (SHOULD, "Request Body", "traits that are no object are answered 400", "traits is not=200",
     each("traits", "x", [], kind="identify")),
    (SHOULD, "Request Body", "properties that are no object are answered 400", "properties is not=200",
     each("properties", "x", [], kind="track")),
    (SHOULD, "Spec, common fields", "a timestamp that is no time is answered 400", "timestamp is not=200",
     each("timestamp", "yesterday")),
    (SHOULD, "Accepting Segment Data", "another method is answered 405 or 404", "not allowed=200",
     each("method", "GET", "PUT", "DELETE")),
    (SHOULD, "Response Body", "a refusal says why", "refusal=", REFUSALS, lambda it: it.status < 400 or it.body),
    (SHOULD, "experience", "no reply shows an API key", 'refusal={"message": "Not {login}"}', REFUSALS,
     lambda it: not it.leaks),
    (SHOULD, "experience", "no reply shows a traceback", 'refusal={"message": "Traceback (most"}', REFUSALS,
     lambda it: not re.search(TRACE, it.body)),
]  # fmt: skip
CHECKS = [Check(*row) for row in ROWS]

# ---- The run and its report ------------------------------------------------------------------------------------------

FINDINGS: dict[str, Outcome] = {}  # by sentence


def judge_all(target: Target) -> dict[str, Outcome]:
    """What comes of every check. Nothing is sent after 30 seconds."""
    target, found = target._replace(until=time.monotonic() + 30), list[Outcome]()
    for check in CHECKS[:3]:
        if any(isinstance(outcome, pytest.fail.Exception) for outcome in found):
            target = target._replace(until=0)  # out of reach
        found.append(check.judge(target))
    with ThreadPoolExecutor(8) as pool:
        found += pool.map(lambda check: check.judge(target), CHECKS[3:])
    return {check.sentence: outcome for check, outcome in zip(CHECKS, found, strict=True)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make each check a test. Here a module without conftest.py gets hold of pytest's configuration."""
    if "check" in metafunc.fixturenames:
        metafunc.config.addinivalue_line("markers", "conformance: check the endpoint that ENDPOINT and API_KEY name")
        names = [check.sentence.replace(" ", "_") for check in CHECKS]
        checks = [pytest.param(check, marks=pytest.mark.conformance) for check in CHECKS]
        metafunc.parametrize("check", checks, ids=names)
        if metafunc.config.getoption("markexpr") == "conformance":
            metafunc.config.pluginmanager.register(Report())


class Report:
    """What pytest does not show by itself."""

    def pytest_report_collectionfinish(self) -> str:
        return f"Calls go to {target_from(os.environ).url} with user id {RUN}, and message ids that begin so"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show the SHOULD that are broken, what was not checked and why, and the sum."""
        fail, skip = pytest.fail.Exception, pytest.skip.Exception
        for check in CHECKS:
            outcome = FINDINGS.get(check.sentence)
            if isinstance(outcome, skip) or (outcome and check.level == SHOULD):
                terminalreporter.write_line(f"{outcome}\n" if isinstance(outcome, fail) else str(outcome))
        kinds = [type(outcome) for outcome in FINDINGS.values()]
        counts = f"{kinds.count(type(None))} kept, {kinds.count(fail)} broken, {kinds.count(skip)} not checked"
        terminalreporter.write_line(counts if kinds else "Nothing was checked")


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_at_the_endpoint(check: Check, request: pytest.FixtureRequest) -> None:
    """At the endpoint that the variables name, which is not failed for what is only wise, or at our own, which is."""
    others = request.config.getoption("markexpr") == "conformance"
    if not FINDINGS and others:
        target = target_from(os.environ)
        first = send(target)
        if first.status in (0, 401):  # then nothing else can be learned
            pytest.exit(f"{target} {'refuses API_KEY' if first.status else 'does not answer'}:{first.report}", 2)
        FINDINGS.update(judge_all(target))
    elif not FINDINGS:
        running = request.getfixturevalue("running")
        keys = {"api": "segment", "limited": "segment-identify-only", "expired": "segment-expired"}
        FINDINGS.update(judge_all(Target(running.url, keys, ssl.create_default_context(cafile=running.tls_cert))))
    outcome = FINDINGS[check.sentence]
    if isinstance(outcome, pytest.fail.Exception) and check.level == SHOULD and others:
        pytest.xfail(str(outcome))
    if outcome:
        raise outcome


# ---- The proof that the kit bites: the receiver with one fault at a time ---------------------------------------------

FAULTY_KEYS = {"api": "kit-key-5f2c", "limited": "kit-limited-77d0", "expired": "kit-expired-0a91"}
FAULTY_RING = {digest("kit-limited-77d0"): receiver.Key("kit", frozenset(["identify"]))}
FAULTY_RING |= key_of("kit", "kit-key-5f2c") | key_of("kit", "kit-expired-0a91", SOONER)


class Faulty(receiver.Connection):
    """A connection with faults. A number is the status for whatever has the pattern in it, or in its due reply."""

    faults: Mapping[str, Any]

    def setup(self) -> None:
        if "plain HTTP" in self.faults and self.request.recv(1, socket.MSG_PEEK) == b"P":
            self.request.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        super().setup()

    def read_head(self) -> str:
        self.text = super().read_head()
        return self.text

    def read_body(self) -> bytes:
        body = super().read_body()
        self.text += body.decode(errors="replace")
        return body

    def send(self, reply: receiver.Reply) -> None:
        faults, text = self.faults, f"{self.text}\n{reply.status} {reply.body}{' duplicate' * reply.duplicate}"
        found = [value for fault, value in faults.items() if isinstance(value, int) and re.search(fault, text, re.S)]
        status = found[0] if found else reply.status
        self.unread *= "unread" not in faults
        self.close_connection |= status >= faults.get("closes", 999)  # 999: dead, without a word
        if status == 999 or "silent" in faults:
            return
        body = faults.get("body", "") if status < 300 else faults.get("refusal", '{"message": "No"}')
        body = body.replace("{login}", "".join(re.findall(r"Basic (\S+)", self.text)))
        lines = [f"HTTP/1.1 {status} {receiver.REASONS[status]}", f"Content-Length: {len(body)}"]
        lines += [f"Content-Type: {faults.get('typed', 'application/json')}"]
        lines += ["WWW-Authenticate: Basic"] * ("no challenge" not in faults)
        lines += ["Connection: close"] * self.close_connection
        self.tls.sendall("\r\n".join([*lines, "", body]).encode())


@contextlib.contextmanager
def serve_with(faults: Mapping[str, Any]) -> Iterator[receiver.Server]:
    with receiver.serve(receiver.Store(":memory:"), port=0) as server:
        server.receiver.endpoint = server.receiver.endpoint._replace(keys=FAULTY_RING)
        server.RequestHandlerClass = type("WithThese", (Faulty,), {"faults": faults})
        if "one by one" in faults:
            server.__dict__["process_request"] = functools.partial(socketserver.TCPServer.process_request, server)
        if "old TLS" in faults:
            server.context.minimum_version = ssl.TLSVersion.TLSv1
            server.context.set_ciphers("ALL:@SECLEVEL=0")
        yield server


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@sentences("sentence, fault, value", [
    (f"{check.sentence}: {fault}", check.sentence, *fault.split("="))
    for check in CHECKS for fault in filter(None, check.faults.split("; "))
])  # fmt: skip
def test_a_fault_breaks_the_sentence_that_names_it_and_no_other(sentence: str, fault: str, value: str) -> None:
    patience = 1.5 if fault in ("silent", "one by one") else 5.0
    context = ssl.create_default_context(cafile=None if fault == "certificate" else CERT)
    with serve_with({fault: int(value) if value.isdigit() else value}) as server:
        found = judge_all(Target(server.url, FAULTY_KEYS, context, patience=patience))
    told = "\n".join(str(outcome) for outcome in found.values() if outcome)
    crash = {NEVER} if value in ("500", "999") else set()  # which is never due, whatever is sent
    broken = {name for name, outcome in found.items() if isinstance(outcome, pytest.fail.Exception)}
    assert broken == {sentence} | crash, told
    assert not [key for key in FAULTY_KEYS.values() if key in told or basic(key).split()[1] in told]


@pytest.mark.parametrize(("faults", "named", "status", "line"), [
    ({"header is missing": 200, ": basic": 401}, {}, 1, r"\n48 kept, 2 broken, 0 not checked\n"),
    ({": basic": 401}, {}, 0, r"\n> Authorization: basic \*\*\*\n(.*\n)+\n49 kept, 1 broken, 0 not checked\n"),
    ({}, {"CALLS": "identify, page", "LIMITED_KEY": ""}, 0, r"\nNot checked: .*: no LIMITED_KEY was given\n"),
    ({}, {"ENDPOINT": "http://localhost/"}, 2, "ENDPOINT is not an address that begins with https://: README.md"),
    ({}, {"API_KEY": ""}, 2, "API_KEY is missing: "), ({}, {"CA": "nowhere.pem"}, 2, "CA is not a file: "),
    ({}, {"CALLS": "track,juggle"}, 2, "CALLS is not of identify, track, page, group: "),
    ({}, {"API_KEY": "another"}, 2, r"https://\S+ refuses API_KEY:\n(.*\n)+.*< HTTP/1.1 401"),
    ({}, {"CA": ""}, 2, r"https://\S+ does not answer:\n(.*\n)+.*< No reply: .*CERTIFICATE_VERIFY_FAILED"),
])  # fmt: skip
def test_only_a_must_that_is_broken_fails_the_run_and_a_mistake_in_a_variable_ends_it(
    faults: dict[str, Any], named: dict[str, str], status: int, line: str
) -> None:
    """The SHOULD are in the report all the same."""
    with serve_with(faults) as server:
        usual = {f"{name.upper()}_KEY": key for name, key in FAULTY_KEYS.items()}
        usual |= {"CA": str(CERT), "ENDPOINT": server.url}
        pytest_run = (sys.executable, "-m", "pytest", "-q", "-m", "conformance", "-p", "no:cacheprovider", __file__)
        done = command(*pytest_run, env={**os.environ, **usual, **named})
    assert done.returncode == status and re.search(line, done.stdout.replace("  > ", "> ")), done.stdout
    assert not any(key in done.stdout + done.stderr for key in FAULTY_KEYS.values())


# ======================================================================================================================
# 7. The project
#
# receiver.py needs nothing but Python. The certificate is made as it should be. The README's commands work as printed,
# its table of options and its links are true, and the solutions in its course do what their exercises say.
# ======================================================================================================================

README = (HERE / "README.md").read_text()
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # as outside of make


def test_the_receiver_imports_nothing_outside_the_standard_library() -> None:
    imported = re.findall(r"^(?:import|from) (\w+)", (HERE / "receiver.py").read_text(), re.M)
    assert {*imported} <= {*sys.stdlib_module_names}


def test_it_can_be_imported_where_there_is_no_unix() -> None:
    without = "import sys; sys.modules.update(dict.fromkeys(('fcntl', 'resource', 'termios', 'pwd'))); import receiver"
    assert command(sys.executable, "-c", without).returncode == 0


def test_make_certs_makes_a_certificate_for_localhost_with_a_private_key_and_not_again(tmp_path: Path) -> None:
    shutil.copy(HERE / "Makefile", tmp_path)
    make = functools.partial(command, "make", "certs", cwd=tmp_path)
    cert, key, tools = tmp_path / "certs/localhost.pem", tmp_path / "certs/localhost-key.pem", tmp_path / "bin"
    assert make(env=ENVIRONMENT).stdout.startswith("Made certs/localhost.pem")
    text, before = command("openssl", "x509", "-in", cert, "-noout", "-text").stdout, cert.read_bytes()
    assert "DNS:localhost, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1" in text and "prime256v1" in text
    assert key.stat().st_mode & 0o777 == 0o600
    assert make(env=ENVIRONMENT).stdout == "" and cert.read_bytes() == before
    cert.unlink()
    tools.mkdir()
    for tool in filter(shutil.which, ("sh", "make", "mkdir", "test", "true")):
        (tools / tool).symlink_to(shutil.which(tool) or "")
    missing = make(env={"PATH": str(tools)})
    assert missing.returncode and "openssl is missing" in missing.stderr


def readme_blocks(language: str) -> list[tuple[str, str]]:
    """The fenced blocks in one language, each with the block of text after it that shows its output, or nothing."""
    blocks = [*re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S), ("", "")]
    pairs = [(name, text, shown * (kind == "text")) for (name, text), (kind, shown) in itertools.pairwise(blocks)]
    return [(text, shown) for name, text, shown in pairs if name == language]


def readme_module(name: str) -> Any:
    """The block of Python that has this class, as a module."""
    [text] = [text for text, _ in readme_blocks("python") if f"class {name}(" in text]
    module = types.ModuleType(name)
    exec(compile(text, "README.md", "exec"), module.__dict__)
    return module


def alike(text: str) -> str:
    """Output without what is another every time: the Date header and API keys."""
    return re.sub(r"\w{3}, \d\d \w{3} \d{4} [\d:]+ GMT|^[\w-]{43}$", "…", text.replace("\r", ""), flags=re.M).strip()


def test_every_command_of_the_readme_works_as_printed_and_shows_what_is_shown(tmp_path: Path) -> None:
    command("cp", "-r", "receiver.py", "fixtures", "Makefile", "certs", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    (run, greeting), *commands = [(text.replace("8443", port), shown) for text, shown in readme_blocks("sh")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    usual: Any = {"cwd": tmp_path, "env": {**ENVIRONMENT, "PORT": port, "PATH": path}, "start_new_session": True}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(["sh", "-c", run], stdout=subprocess.PIPE, stderr=log, text=True, **usual)
    first, rest = greeting.replace("8443", port).split("\n", 1)
    try:
        assert server.stdout and server.stdout.readline().strip() == first
        for text, shown in commands:
            done = command("sh", "-ec", text, **usual)
            assert done.returncode == 0 and (not shown or alike(done.stdout) == alike(shown)), done
    finally:
        os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does
        server.communicate(timeout=15)
    assert rest.strip() in (tmp_path / "log").read_text()


def test_help_and_readme_say_the_same_of_the_same_options() -> None:
    text = command(*RECEIVER, "--help", env={**ENVIRONMENT, "COLUMNS": "999"}).stdout
    assert text.startswith("usage: receiver.py [-h] [--bind ADDRESS] ") and " [--quiet | --verbose] " in text
    assert "\nReceive Segment's calls over HTTPS and store them.\n" in text
    helped = re.findall(r"^  (--[a-z-]+(?: [A-Z:]+)?)\s+(.+?)(?: \((\S+)\))?$", text, re.M)
    table = re.findall(r"^\| `(--[^`]+)` \|(?: `([^`]+)`)? \| ([^|;]+?)(?:;[^|]*)? \|$", README, re.M)
    assert helped == [(option, what, default) for option, default, what in table] and len(helped) == 18


def test_every_link_of_the_readme_leads_to_a_function_a_heading_or_a_file() -> None:
    functions = re.findall(r"\[`(\w+)`\]\(receiver\.py\)", README)
    assert len(functions) > 15 and not [name for name in functions if not hasattr(receiver, name)]
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), re.M)
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in {*re.findall(r"\]\(([^)]+)\)", README)}:
        assert link.startswith("https:") or link[1:] in headings or (HERE / link).exists(), link


def answers(destination: receiver.Destination, *calls: dict[str, Any], settings: Any = None) -> list[Any]:
    """What a destination answers to these calls through the whole protocol: (status, message), or (status,)."""
    encoded = base64.b64encode(json.dumps(settings or {}).encode()).decode()
    sent = [{"type": "identify", "user_id": "u1", **call} for call in calls]
    replies = [ask(call, destination=destination, x_segment_settings=encoded) for call in sent]
    return [(reply.status, *reply.body.values()) for reply in replies]


OK, LIST = (200,), {"traits": {"list": "news"}}
ORDER = {"type": "track", "event": "Order Completed", "message_id": "m1"}
WORK, HOME = {"traits": {"workEmail": "a@b.c"}}, {"traits": {"email": "a@b.c"}}
FORGOTTEN = [{"type": "delete", "timestamp": "2026-01-02"}, {"timestamp": "2026-01-01"}, {"timestamp": "2026-01-03"}]


@pytest.mark.parametrize(("name", "state", "settings", "calls", "due"), [
    ("Mailing", {"lists": set()}, {}, [LIST], [(503, "The lists are not loaded yet")]),
    ("Mailing", {"lists": {"news"}}, {}, [LIST, {}], [OK, (404, "There is no such list")]),
    ("Paid", {}, {}, [ORDER, {}], [(403, "Your plan does not include track calls"), OK]),
    ("Addresses", {}, {"emailField": "workEmail"}, [WORK, HOME], [OK, (400, "Missing work_email")]),
    ("Addresses", {}, {}, [HOME, WORK], [OK, (400, "Missing email")]),
    ("Contacts", {}, {}, [HOME, {}], [OK, (400, "Missing email address")]),
    ("Contacts", {}, {}, [{"timestamp": "noon"}], [(400, "The field timestamp is not an ISO 8601 time")]),
    ("Forgetful", {}, {}, [*FORGOTTEN, {"user_id": "u2"}], [OK, (410, "This user asked to be forgotten"), OK, OK]),
])  # fmt: skip
def test_a_solution_answers_as_its_exercise_says(name: str, state: Any, settings: Any, calls: Any, due: Any) -> None:
    destination = getattr(readme_module(name), name)()
    destination.__dict__.update(state)
    assert answers(destination, *calls, settings=settings) == due


def test_a_solution_keeps_what_its_exercise_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [{"traits": {"plan": day}, "timestamp": f"2026-01-{day}"} for day in ("01", "02", "03")]
    for order in (calls, calls[::-1], calls[1:] + calls[:1]):
        answers(plans := readme_module("Plans").Plans(), *order)
        assert plans.newest["demo", "u1"][1] == "03"
    orders = readme_module("Orders").Orders()
    assert answers(orders, ORDER, {**ORDER, "message_id": "m2"}, ORDER) == [OK] * 3 and len(orders.seen) == 2
    monkeypatch.chdir(tmp_path)
    assert answers(readme_module("Spool").Spool(), ORDER) == [(202,)]
    assert json.loads(Path("spool.jsonl").read_text())[:2] == ["demo", "m1"]


def run_postgresql(tool: str, *arguments: str) -> None:
    """Run a tool of PostgreSQL, which refuses to run as root. Skips, and says why, where it is not found."""
    if not all(map(shutil.which, ("setpriv", tool))):
        pytest.skip(f"setpriv or {tool}, of PostgreSQL, is not found on the path")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    silent = {"capture_output": False, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command(*nobody, shutil.which(tool), *arguments, cwd="/tmp", check=True, **silent)


def test_the_postgresql_destination_stores_once_and_answers_503_while_it_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg_pool", reason="psycopg and psycopg_pool are not installed")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # as the path of a socket must be short
        os.chmod(folder, 0o777)
        data, psql = ["-D", f"{folder}/data", "-w"], ["-h", folder, "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-c"]
        run_postgresql("initdb", *data[:2], "-A", "trust", "-U", "postgres", "--no-sync")
        run_postgresql("pg_ctl", *data, "-l", f"{folder}/log", "-o", f"-c listen_addresses= -k {folder}", "start")
        try:
            run_postgresql("psql", *psql, readme_blocks("sql")[0][0])
            monkeypatch.setenv("DATABASE_URL", f"postgresql://postgres@/postgres?host={folder}")
            monkeypatch.chdir(tmp_path)
            Path("keys.json").write_text("[]")
            destination = readme_module("Postgres").destination
            with destination.pool as pool:
                other, forget = {**ORDER, "user_id": "u2", "message_id": "m2"}, {"type": "delete", "user_id": "u2"}
                assert answers(destination, ORDER, ORDER, other, forget) == [OK] * 4
                assert answers(destination, {**ORDER, "message_id": "a\0b"})[0][0] == 400
                with pool.connection() as db:
                    assert db.execute("select customer, message_id from calls").fetchall() == [("demo", "m1")]
                run_postgresql("pg_ctl", *data, "-m", "immediate", "stop")
                assert answers(destination, other) == [(503, "The database is away")]
        finally:
            with contextlib.suppress(subprocess.CalledProcessError):  # where it has stopped already
                run_postgresql("pg_ctl", *data, "-m", "immediate", "stop")
