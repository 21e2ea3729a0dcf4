#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A receiver for Segment's Direct destination protocol, in one file of standard-library Python.

Segment collects calls (identify, track, page, group) from the websites, apps and servers of its
customers, and forwards each call to your endpoint in an HTTPS request:

    POST / HTTP/1.1
    Host: segment.example.com
    Authorization: Basic c2VnbWVudDo=
    Content-Type: application/json
    Content-Length: 76

    {"type": "track", "user_id": "u1", "event": "Signed Up", "message_id": "m1"}

Each customer who uses your service has an API key that you issued. The credentials in the
Authorization header are this key, a colon and an empty password, encoded in base64; here, they
encode `segment:`. Segment's documentation writes the names in the JSON object in snake_case, but
Segment also sends other casings. In this file, the sender is whatever program sends these requests;
it need not be Segment.

Segment acts on the status code of the reply, for which it waits five to ten seconds:

    200 and 202                                delivered; Segment keeps no copy
    408, 429, 5xx except 501 and 505           retried for about four hours
    no reply in time                           retried for about four hours
    501, 505, 4xx except 408 and 429           dropped for good

202 means that the call is stored, but not yet processed. Never redirect, because Segment does not
follow redirects. Send no body with a 200 or 202. The body of an error reply may be a JSON object
with the Content-Type application/json; Segment ignores a body of any other type. It shows the
object's `message` to the customer:

    {"message": "Missing user_id or anonymous_id"}

A receiver therefore has these duties:

- Store a call before you acknowledge it: from then on, yours is the only copy.
- Expect the same call twice, because a reply can get lost. The second call has the same message_id.
  Answer it with 200 again, but do not process it again.
- Expect calls out of order, because retried calls arrive late. The newer of two calls is the one
  with the later timestamp.
- For a problem that will pass, such as a database that is down, answer 503. A 4xx would lose the
  call.
- When a user asks to be forgotten, Segment sends a call of the type `delete`. Erase what you have
  stored about that user.

`make run` starts the receiver, which stores the calls in an SQLite database. To handle them in your
own code instead, define a destination, a class with a method for each type of call:

    class Contacts(receiver.Destination):
        def identify(self, user_id, traits, call):
            if "email" not in traits:
                raise receiver.Refusal(400, "Missing email address")
            save_contact(user_id, traits)  # before the call is acknowledged

Run it in a test (unless you supply other keys, the public demo key `segment` is valid):

    with receiver.serve(Contacts(), port=0) as server:  # a real HTTPS endpoint
        requests.post(server.url, json=..., auth=("segment", ""), verify=server.tls_cert)

Or run it as a program that parses command-line options and serves until it is stopped (the demo key
is valid by default there, too):

    receiver.main(Contacts())
"""

from __future__ import annotations

import _thread
import argparse
import base64
import contextlib
import errno
import hashlib
import ipaddress
import json
import logging
import math
import os
import queue
import re
import secrets
import shlex
import signal
import socket
import sqlite3
import ssl
import stat
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import formatdate
from enum import StrEnum
from functools import lru_cache, wraps
from http import HTTPStatus
from itertools import accumulate
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer
from traceback import format_exception
from typing import Any, BinaryIO, NamedTuple, NoReturn

__version__ = "2.0"

# ==================================================================================================
# Part 1. The protocol
#
# This part decides how each request is answered. It opens no sockets or files, and starts no
# threads. Its callers pass in functions that read the body and tell the time.
#
# To implement the protocol in another language, translate this part, together with `parse_head`
# from Part 3 and the functions that it calls. Then test the result with the requests in
# fixtures/accepted.json and fixtures/refused.json. README.md explains their format.
# ==================================================================================================

# ---- Requests, replies and refusals --------------------------------------------------------------

HEALTH_PATH = "/health"  # for load balancers and monitors; not part of Segment's protocol

# Headers that accompany every reply with the given status code.
STATUS_HEADERS = {
    401: {"WWW-Authenticate": 'Basic realm="Segment calls", charset="UTF-8"'},  # RFC 7617 §2
    503: {"Retry-After": "5"},  # seconds, RFC 9110 §10.2.3
}

Clock = Callable[[], str]  # returns the current time in UTC, in the form 2026-01-15T09:41:07.250Z


class Request(NamedTuple):
    """A request whose head has been checked by `parse_head`, and whose body has not been read."""

    method: str
    target: str  # path and query, as sent
    headers: Mapping[str, str]  # names in lower case, values stripped; without Content-Length
    length: int | None  # the Content-Length in bytes; None if the header is missing
    # Reads the body; call it once. Raises Refusal 400 if the client disconnects before it has sent
    # the whole body, 408 if it is too slow, and 503 if the server needs the connection or stops.
    read: Callable[[], bytes]


class Reply(NamedTuple):
    """The reply to a request, and what the log says about the request."""

    status: int
    body: Mapping[str, str] = {}  # sent as a JSON object; an empty body is not sent
    headers: Mapping[str, str] = {}
    customer: str = ""  # the owner of the API key, once known
    raw: Mapping[str, Any] = {}  # all members of the body, once it has been parsed; see Call.raw
    outcome: str = ""  # what the destination did with the call, such as "duplicate"
    error: Exception | None = None  # the unexpected exception that caused a 500, if any


class Refusal(Exception):  # noqa: N818 - a normal answer, not an error in the program
    """Raised to refuse a request, with a status code, a message, and perhaps headers.

    The status code alone decides whether the sender retries the call or drops it; the customer
    reads the message. For a temporary problem, use 503; a 400 would lose the call. For a call that
    can never succeed, use 400; a 503 would have it retried for hours.
    """

    # Defaults for a subclass whose constructor does not call `Refusal.__init__`. If the status is
    # still 0, which is invalid, `error_reply` treats the exception as an internal error.
    status = 0
    message = "Internal error"
    headers: Mapping[str, str] = {}

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        """Set the status code, the message, and any headers of the reply.

        Raises ValueError if the status code is not from 400 to 599, or if a header contains
        anything but printable ASCII. A line break, for example, could be used to forge headers.
        """
        if not 400 <= status <= 599:
            raise ValueError(f"status must be from 400 to 599, not {status}")
        for name, value in (headers or {}).items():
            text = ": ".join((name, value))  # raises TypeError unless both are strings
            if not (text.isascii() and text.isprintable()):
                raise ValueError(f"headers must be printable ASCII, not {short_repr(text)}")
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.headers = headers or {}


@dataclass
class Endpoint:
    """What determines a reply, besides the request and the time.

    The attributes may be reassigned at any time, for example to start maintenance.
    """

    destination: Destination
    keys: Mapping[str, Key]  # indexed by the SHA-256 digest of each API key, in hexadecimal
    path: str = "/"
    max_body: int = 524_288  # bytes
    maintenance: bool = False


def short_repr(value: object) -> str:
    """Return the repr of a value, cut to 80 characters, for use in a message or in the log.

    If repr() fails, because the value raises an exception or is nested too deeply, return the name
    of its type.
    """
    try:
        text = repr(value)
    except Exception:
        return f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:79] + "…"


# ---- The ladder ----------------------------------------------------------------------------------


def answer(request: Request, endpoint: Endpoint, now: Clock) -> Reply:
    """Return the reply to a request.

    The protocol is a ladder: each rung either refuses the request or passes it on to the next. If a
    request has two faults, the order of the rungs decides which one is reported. The functions that
    implement the rungs follow in the same order; rung 1, which parses the head of the request, is
    `parse_head` in Part 3. The health check needs no API key, so it is answered before rung 5.

    Every Exception becomes a reply: a Refusal becomes the reply that it asks for; any other becomes
    a 500. Only exceptions that do not derive from Exception, such as KeyboardInterrupt, propagate.
    """
    headers = request.headers
    # Set before the `try`, because the log shows them even if the request is refused.
    customer = ""
    raw: dict[str, Any] = {}
    try:
        path = parse_path(request.target, endpoint.path)  # rung 2: 404
        check_method(request.method, path)  # rung 3: 405
        check_maintenance(endpoint.maintenance)  # rung 4: 503
        if path == HEALTH_PATH:
            return Reply(200, {"status": "ok"})

        key = find_key(headers.get("authorization", ""), endpoint.keys)  # rung 5: 401
        customer = key.customer
        check_expiry(key, now)

        check_body_headers(request, endpoint.max_body)  # rung 6: 411, 413, 415

        body = request.read()  # rung 7: 400, 408, 503
        raw = parse_body(body)
        settings = parse_settings(headers.get("x-segment-settings", ""))

        handler = find_handler(raw, endpoint.destination)  # rung 8: 400, 501
        check_permission(key, raw["type"])  # rung 9: 403
        call = parse_call(raw, customer, settings, len(body), now)  # rung 10: 400
        status = dispatch(handler, call)  # rung 11: 200, 202, 500, or the handler's refusal
        return Reply(status, customer=customer, raw=raw, outcome=call.outcome)
    except Exception as error:
        reply = error_reply(error)
        return reply._replace(customer=customer, raw=raw)


def error_reply(error: Exception) -> Reply:
    """Return the reply that a Refusal asks for.

    Any other exception, or a Refusal with invalid attributes, becomes a 500 without details.
    """
    internal_error = Reply(500, {"message": "Internal error"}, error=error)
    if not isinstance(error, Refusal):
        return internal_error
    try:
        # A subclass may have set its attributes to anything. Making a plain Refusal checks them.
        refusal = Refusal(error.status, str(error.message), error.headers)
    except Exception:
        return internal_error
    # Drop the traceback. A handler may raise the same Refusal object many times; each time, the
    # object's traceback would grow, and keep one more call in memory.
    error.__traceback__ = None
    headers = {**STATUS_HEADERS.get(refusal.status, {}), **refusal.headers}
    status = int(refusal.status)  # it may be an HTTPStatus
    return Reply(status, {"message": refusal.message}, headers)


# ---- Rungs 2 to 4: the path, the method, maintenance ---------------------------------------------


def parse_path(target: str, endpoint_path: str) -> str:
    """Return the path of a request target.

    Raises Refusal 404 if it is neither the endpoint's path nor HEALTH_PATH.
    """
    path = target.partition("?")[0]
    if path in (endpoint_path, HEALTH_PATH):
        return path
    message = f"Path {short_repr(path)} not found; use {short_repr(endpoint_path)}"
    if path.startswith("/v1/"):  # the API to which analytics SDKs post
        message += ". Analytics SDKs must post to Segment, not to this endpoint"
    raise Refusal(404, message)


def check_method(method: str, path: str) -> None:
    """Raise Refusal 405 unless the path supports the method.

    Unknown methods get a 405, too: a 501 would mean that the type of call is not supported.
    """
    allowed = ["GET", "HEAD"] if path == HEALTH_PATH else ["POST"]
    if method in allowed:
        return
    shown = method[:80]  # safe as it is: `parse_head` accepts only letters, digits and symbols
    message = f"Method {shown} is not allowed; use {' or '.join(allowed)}"
    if method == "GET":  # somebody opened the address in a browser
        message += ". This endpoint receives calls that Segment forwards"
    raise Refusal(405, message, {"Allow": ", ".join(allowed)})


def check_maintenance(maintenance: bool) -> None:
    """Raise Refusal 503 during maintenance. The sender will retry."""
    if maintenance:
        raise Refusal(503, "Down for maintenance")


# ---- Rung 5: the API key -------------------------------------------------------------------------


class Key(NamedTuple):
    """What is known about an API key: whose it is, what it permits, and until when.

    The API key itself is not stored.
    """

    customer: str
    calls: frozenset[str] | None = None  # the types of call that it permits; None permits all
    expires: str | None = None  # in the form that a Clock returns (see `parse_key`); None: never


def find_key(authorization: str, keys: Mapping[str, Key]) -> Key:
    """Return what `keys` says about the API key in an Authorization header.

    Raises Refusal 401 if the header is missing or malformed, or if the API key is unknown; a
    revoked key counts as unknown. `keys` is indexed by digest: see `key_digest`.
    """
    digest = key_digest(authorization)  # raises Refusal if the header is missing or malformed
    key = keys.get(digest)
    if key is None:
        raise Refusal(401, "Unknown API key")
    return key


def key_digest(authorization: str, /) -> str:  # for the "/", see "Speed" below
    """Return the SHA-256 digest of the API key in an Authorization header, in hexadecimal.

    The header consists of `Basic` and the credentials: the API key, a colon and an empty password,
    encoded in base64 (RFC 7617 §2). Raises Refusal 401 if it is missing or has any other form.

    Only digests are stored, so a stolen keys file reveals no API key. A plain SHA-256 is enough for
    keys that are long and random, as those made by `add_key` are; passwords would need a slow,
    salted hash.
    """
    if not authorization:
        raise Refusal(401, "Missing Authorization header")
    scheme, _, credentials = authorization.partition(" ")
    if scheme.lower() != "basic":
        raise Refusal(401, "Authorization must use the Basic scheme")
    try:
        decoded = decode_base64(credentials.lstrip(" ")).decode()
    except UnicodeDecodeError:  # a kind of ValueError, so it comes first
        raise Refusal(401, "Authorization must contain credentials in UTF-8") from None
    except ValueError:
        raise Refusal(401, "Authorization must contain credentials in base64") from None
    api_key, colon, password = decoded.partition(":")
    if not colon:
        raise Refusal(401, "Authorization must contain a colon after the API key")
    if password:
        raise Refusal(401, "Password must be empty; the API key is the username")
    return hashlib.sha256(api_key.encode()).hexdigest()


def decode_base64(text: str) -> bytes:
    """Decode base64 (RFC 4648 §4). Raises ValueError if the text is not in canonical form.

    Depending on its version, Python's decoder also accepts excess padding and non-zero trailing
    bits. Re-encoding the result and comparing that with the text rejects both in every version.
    """
    decoded = base64.b64decode(text, validate=True)
    if base64.b64encode(decoded).decode() != text:
        raise ValueError("not the canonical encoding")
    return decoded


def check_expiry(key: Key, now: Clock) -> None:
    """Raise Refusal 401 if the key has expired."""
    if key.expires is not None and key.expires <= now():
        raise Refusal(401, "API token expired")  # the message that Segment's documentation gives


# ---- Rung 6: the headers that describe the body --------------------------------------------------

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 §5.6.2

# application/json (RFC 8259 §11), or a vendor's type such as application/vnd.example+json (RFC 6839
# §3.1), followed by any parameters. A semicolon without a parameter is allowed (RFC 9110 §5.6.6),
# and a charset must be UTF-8. The possessive quantifiers, written `*+`, never backtrack, so a long
# header cannot keep the matcher busy.
JSON_TYPE = re.compile(
    rf"""
    application/ (?: {TOKEN} \+ )? json
    (?:
        [ \t]* ; [ \t]*
        (?:
            charset= (?: utf-?8 | "utf-?8" )
            | (?! charset= ) {TOKEN} = (?: {TOKEN} | "(?: [^"\\] | \\. )*+" )
        )?
    )*+
    [ \t]*
    """,
    re.VERBOSE | re.IGNORECASE | re.ASCII,
)


def check_body_headers(request: Request, max_body: int) -> None:
    """Raise Refusal unless the headers announce a JSON body of an acceptable length.

    The status is 411 if there is no Content-Length (as with a chunked body), 413 if the body is too
    long, and 415 if its Content-Type is not JSON in UTF-8, or its Content-Encoding is not identity.
    A missing Content-Type counts as application/json.
    """
    if request.length is None:
        message = "Missing Content-Length header"
        if "transfer-encoding" in request.headers:
            message += "; Transfer-Encoding is not supported"
        raise Refusal(411, message)
    if request.length > max_body:
        raise Refusal(413, f"Body must be at most {max_body} bytes long")
    media_type = request.headers.get("content-type", "application/json")
    if not JSON_TYPE.fullmatch(media_type):
        shown = short_repr(media_type)
        raise Refusal(415, f"Content-Type must be application/json in UTF-8, not {shown}")
    coding = request.headers.get("content-encoding", "identity")
    if coding.lower() != "identity":
        message = f"Content-Encoding must be identity, not {short_repr(coding)}"
        raise Refusal(415, message, {"Accept-Encoding": "identity"})  # RFC 9110 §15.5.16


# ---- Rung 7: the body, and the settings ----------------------------------------------------------

# The maximum nesting depth of arrays and objects. The JSON parsers of Python, SQLite and PostgreSQL
# can handle this depth. Each of them fails at some greater depth, from about one thousand levels to
# several thousand; in a thread with a small stack, Python's parser even crashes the process.
MAX_DEPTH = 500

# Analytics SDKs post batches to Segment. Segment forwards single calls, because one status code
# could not say which calls of a batch to retry.
BATCH_MESSAGE = "Body must be one call, not a batch"


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the call in a body.

    Keys at every depth are converted to snake_case. At the top level, the protocol's fields are
    recognized regardless of case and separators. The fields are checked later, by `parse_call`.
    Raises Refusal 400 if `parse_json` does, or if the body is not an object.
    """
    raw = parse_json(body, "Body")
    if isinstance(raw, list):
        raise Refusal(400, BATCH_MESSAGE)
    if not isinstance(raw, dict):
        raise Refusal(400, "Body must be a JSON object")
    return recognize_fields(raw)


def parse_settings(encoded: str) -> dict[str, Any]:
    """Return what the customer has entered at Segment for this receiver, besides the API key.

    These settings arrive in the header X-Segment-Settings, as a JSON object that is encoded in
    base64. Its keys are converted to snake_case. No header, an empty one, `null` and `[]` all mean
    that there are no settings. Raises Refusal 400 for anything else that is not an object.
    """
    if not encoded:
        return {}
    try:
        data = decode_base64(encoded)
    except ValueError:
        raise Refusal(400, "X-Segment-Settings must be in base64") from None
    settings = parse_json(data, "X-Segment-Settings")
    if settings is None or settings == []:
        return {}
    if not isinstance(settings, dict):
        raise Refusal(400, "X-Segment-Settings must be a JSON object")
    return settings


def parse_json(data: bytes, label: str) -> Any:
    """Return a JSON value (RFC 8259, in UTF-8) with its keys converted to snake_case.

    Objects keep their members in the order in which they were sent. If a key is repeated, its last
    value counts. A number without a fraction or exponent is an exact integer; any other number is a
    double.

    Raises Refusal 400, with a message that begins with the label, if the data is not JSON, or if it
    contains something that other programs could not store or would misread: a byte-order mark at
    the beginning, a number that overflows a double, an unpaired surrogate, or nesting deeper than
    MAX_DEPTH.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Refusal(400, f"{label} must be in UTF-8") from None
    if not text.strip(" \t\r\n"):
        raise Refusal(400, f"{label} must not be empty")
    if text.startswith("\ufeff"):
        raise Refusal(400, f"{label} must not begin with a byte-order mark")
    # Counting brackets is quick, and spares nearly every body the exact check.
    if text.count("[") + text.count("{") > MAX_DEPTH and nesting_depth(text) > MAX_DEPTH:
        raise Refusal(400, f"{label} must not be nested more than {MAX_DEPTH} levels deep")
    try:
        value = DECODER.decode(text)
        if "\\" in text:  # only an escape can produce a surrogate
            check_surrogates(value)
    except json.JSONDecodeError as error:
        # The exact position depends on the parser; another implementation need not reproduce it.
        position = error.pos + 1
        raise Refusal(400, f"{label} must be JSON: syntax error at character {position}") from None
    except ValueError as error:
        # One of the functions below has raised it. Its message names what was found.
        raise Refusal(400, f"{label} must not contain {error}") from None
    return value


# Matches a part of a JSON text that does not affect the nesting depth: a whole string, including
# any brackets in it (or the rest of the text, if the string is never closed); or a run of
# characters other than brackets and quotation marks. The possessive quantifiers never backtrack,
# so even invalid JSON takes only linear time.
NOT_NESTING = re.compile(r'"(?:[^"\\]|\\.)*+"?|[^\[\]{}"]++', re.DOTALL)


def nesting_depth(text: str) -> int:
    """Return the nesting depth of a JSON text.

    If the text is not valid JSON, the result is at least the depth that a parser reaches before it
    finds the error.
    """
    brackets = NOT_NESTING.sub("", text)
    steps = (1 if bracket in "[{" else -1 for bracket in brackets)
    return max(accumulate(steps, initial=0))


def check_surrogates(value: Any) -> None:
    """Raise ValueError if a string in a JSON value contains an unpaired surrogate.

    Neither `encode` nor a database accepts one.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("an unpaired surrogate") from None


def parse_double(text: str) -> float:
    """Return a number as a double. Raises ValueError if it overflows."""
    value = float(text)
    if math.isinf(value):
        shown = text if len(text) <= 20 else f"{text[:20]}…"
        raise ValueError(f"a number that is out of range: {shown}")
    return value


def parse_integer(text: str) -> int:
    """Return an exact integer. Raises ValueError if it would overflow a double.

    Many JSON parsers read every number as a double, and would turn such an integer into Infinity.
    """
    if len(text) >= 309:  # the largest double has 309 digits; a shorter number always fits
        parse_double(text)  # raises ValueError if the number overflows
    return int(text)


def refuse_constant(text: str) -> NoReturn:
    """Raise ValueError for NaN and Infinity, which Python's parser accepts."""
    raise ValueError(text)


def snake_keys(members: dict[str, Any], /) -> dict[str, Any]:
    """Return an object with its keys in snake_case.

    If several keys would get the same name, the one that already has that name keeps it, or else
    the first one gets it. The others stay as they were sent, so nothing is lost.
    """
    taken = set(members)
    renamed = {}
    for key, value in members.items():
        name = snake_case(key)
        if name in taken:
            name = key  # either it is in snake_case already, or its new name is taken
        taken.add(name)
        renamed[name] = value
    return renamed


def snake_case(key: str, /) -> str:
    """Return a key in snake_case: `userId`, `UserID`, `user-id` and `User Id` become `user_id`.

    A capital letter starts a new word if it follows a lower-case letter or a digit, or if it
    follows a capital and precedes a lower-case letter, as the P in `HTMLParser` does. A hyphen or a
    space becomes an underscore. Letters and digits are those of Unicode, as `str.isupper`,
    `str.islower` and `str.isdigit` recognize them.
    """
    result = ""
    # Each character with its neighbors; zip stops at the end of the key.
    for before, char, after in zip(" " + key, key, key[1:] + " ", strict=False):
        follows_lower_or_digit = before.islower() or before.isdigit()
        is_between_upper_and_lower = before.isupper() and after.islower()
        if char in " -":
            result += "_"
        elif char.isupper() and (follows_lower_or_digit or is_between_upper_and_lower):
            result += "_" + char
        else:
            result += char
    return result.lower()


def make_decoder(object_hook: Callable[[dict[str, Any]], Any]) -> json.JSONDecoder:
    """Return a JSON decoder that passes each object through the hook."""
    return json.JSONDecoder(
        object_hook=object_hook,
        parse_int=parse_integer,
        parse_float=parse_double,
        parse_constant=refuse_constant,
    )


DECODER = make_decoder(snake_keys)


def recognize_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Rename the fields of a call to the protocol's names, in place, and return the call.

    `snake_keys` does not change spellings such as `userid`. They are recognized by ignoring case,
    underscores, hyphens and spaces.

    A member with another spelling is renamed if no member has the protocol's name yet, or if the
    value under that name is null; the renamed member then replaces the null. Otherwise, the
    member keeps its key. So the protocol's own spelling takes precedence, then the first of the
    others, and a null never hides a value. A renamed member moves to the end, or takes the position
    of the null that it replaces.
    """
    # The keys of FIELD_CHECKS, below, are the protocol's names for the fields.
    other_keys = [key for key in raw if key not in FIELD_CHECKS]
    for key in other_keys:
        name = FIELD_BY_SQUASHED_NAME.get(squash(key))
        if name and raw.get(name) is None:
            raw[name] = raw.pop(key)
    return raw


def squash(key: str) -> str:
    """Return a key in lower case, without underscores, hyphens or spaces."""
    return key.replace("_", "").replace("-", "").replace(" ", "").lower()


# ---- Rungs 8 and 9: the type of call -------------------------------------------------------------


class CallType(NamedTuple):
    """What one type of call passes to its handler, and which field it must have."""

    # The fields that the handler receives, in this order, followed by the Call itself.
    arguments: tuple[str, ...]

    # A field that must be present and not empty, or "" if there is none. In addition, every call
    # must have a user_id or an anonymous_id.
    required: str = ""


CALL_TYPES = {
    "identify": CallType(("user_id", "traits")),  # who is this?
    "track": CallType(("user_id", "event", "properties"), "event"),  # what are they doing?
    "page": CallType(("user_id", "name", "properties")),  # where are they doing it?
    "group": CallType(("user_id", "group_id", "traits"), "group_id"),  # what are they part of?
    # Later revisions of the protocol added these types.
    "delete": CallType(("user_id",), "user_id"),  # who wants to be forgotten?
    "screen": CallType(("user_id", "name", "properties")),  # where in the app are they doing it?
    "alias": CallType(("user_id", "previous_id"), "previous_id"),  # who were they before?
}


class Destination:
    """The base class of destinations, which handle calls.

    A subclass supports each type of call for which it defines a method. The method is called with
    the arguments in CALL_TYPES and then the Call itself, for example
    `identify(user_id, traits, call)`; the user_id is None for an anonymous visitor. If the method
    returns None or 200, the call is answered with 200; if it returns 202 (HTTPStatus.ACCEPTED), the
    call is answered with 202. To refuse the call, it raises Refusal. Any other result or exception
    is logged, and answered with 500.

    Methods run in several threads at once; guard shared state.
    """

    failed = False  # true if the destination can no longer work; `main` then ends the process

    def close(self) -> None:
        """Release what the destination holds. The server calls this once, when it stops."""


def find_handler(raw: Mapping[str, Any], destination: Destination) -> Callable[..., Any]:
    """Return the destination's method for a call.

    Raises Refusal 400 if the type is missing or not a string, and 501 if it is not supported.
    """
    call_type = raw.get("type")
    if call_type is None and "batch" in raw:
        raise Refusal(400, BATCH_MESSAGE)
    if call_type is None:
        raise Refusal(400, "Missing type")
    if not isinstance(call_type, str):
        raise Refusal(400, "type must be a string")
    # Other attributes of the destination, such as `close`, are not handlers.
    handler = getattr(destination, call_type, None) if call_type in CALL_TYPES else None
    if handler is None:
        raise Refusal(501, f"Unsupported type {short_repr(call_type)}")
    return handler  # type: ignore[no-any-return]


def check_permission(key: Key, call_type: str) -> None:
    """Raise Refusal 403 if the API key may not send calls of this type."""
    if key.calls is not None and call_type not in key.calls:
        raise Refusal(403, f"This API key does not permit calls of type {call_type}")


# ---- Rung 10: the fields -------------------------------------------------------------------------
#
# A 400 loses the call for good. So an invalid field leads to a refusal only if ignoring it would
# leave the meaning of the call unclear or wrong. Four fields matter less: if context, sent_at,
# received_at or original_timestamp is invalid, it is ignored, and stays in `raw`. They are listed
# in IGNORED_IF_INVALID, below. Two fields, integrations and version, may have any value.


class Call:
    """One call, made by `parse_call` from the fields that it has checked.

    A field keeps its default, which is {} for traits, properties and context, unless the call gives
    it a value. Null, an empty id and an empty time count as missing. A field that this type of call
    does not use is ignored. So is an invalid value of a field in IGNORED_IF_INVALID. The message_id
    and the timestamp are always filled in.

    Times are text in UTC, in the form 2026-01-15T09:41:07.250Z; sorting this text sorts the times.
    """

    # Not a dataclass, because setting only those fields that are present takes less time.

    type: str  # a key of CALL_TYPES
    user_id: str | None = None  # the customer's id for the user
    anonymous_id: str | None = None  # the id of a visitor; this or user_id is always present
    event: str | None = None  # track: what the user did
    name: str | None = None  # page: the name of the page; screen: the name of the screen
    group_id: str | None = None  # group: the customer's id for the group
    previous_id: str | None = None  # alias: the user's former id
    traits: dict[str, Any]  # identify: facts about the user; group: facts about the group
    properties: dict[str, Any]  # track, page and screen: details
    context: dict[str, Any]  # IP address, user agent, library, campaign, ...
    integrations: Any = None  # which Segment destinations get the call; not used here
    message_id: str = ""  # unique per call; the same in a retry only if the sender gave one
    timestamp: str = ""  # the best estimate of when it happened; order calls by this
    sent_at: str | None = None  # when the website, app or server sent it to Segment
    received_at: str | None = None  # when Segment received it
    original_timestamp: str | None = None  # when it happened, by the clock of the device or server
    version: Any = None  # of the Segment Spec

    customer: str  # the one whose API key was used
    settings: dict[str, Any]  # from X-Segment-Settings
    raw: dict[str, Any]  # the whole call, with its keys converted and its values as they were sent
    size: int  # of the body, in bytes
    outcome: str = ""  # a word for the log; a destination that accepts the call may set it

    def __init__(
        self,
        call_type: str,
        raw: dict[str, Any],
        customer: str,
        settings: dict[str, Any],
        size: int,
    ) -> None:
        """Make a call with these values, and with the defaults for all other fields."""
        self.type = call_type
        self.traits = {}
        self.properties = {}
        self.context = {}
        self.customer = customer
        self.settings = settings
        self.raw = raw
        self.size = size


def parse_call(
    raw: dict[str, Any], customer: str, settings: dict[str, Any], size: int, now: Clock
) -> Call:
    """Check the fields of `raw`, and return them as a Call.

    The caller has checked that `raw["type"]` is supported. `settings` is the result of
    `parse_settings`, and `size` is the length of the body in bytes. A missing timestamp is replaced
    by the original_timestamp, or else the sent_at, or else the current time; a missing message_id
    is replaced by a random one.

    The docstring of Call says which fields count as missing, and which are ignored. Raises Refusal
    400 if any other field is invalid, or if a required one is missing. The message reports one
    fault only: the first invalid field in `raw`, or else what is missing.
    """
    call = Call(raw["type"], raw, customer, settings, size)
    checks = CHECKS_BY_TYPE[call.type]
    for name, value in raw.items():
        if value is None or name not in checks:
            continue
        try:
            checked_value = checks[name](value)  # as it is stored in the Call
        except ValueError as error:
            if name in IGNORED_IF_INVALID:
                continue
            raise Refusal(400, f"{name} {error}") from None  # such as "user_id must be …"
        if checked_value is not None:  # an empty id or time counts as missing
            setattr(call, name, checked_value)

    check_required(call)
    if not call.timestamp:
        call.timestamp = call.original_timestamp or call.sent_at or now()
    if not call.message_id:
        # Without the sender's own id, a retry cannot be recognized: it counts as a new call.
        call.message_id = str(uuid.uuid4())
    return call


def check_required(call: Call) -> None:
    """Raise Refusal 400 unless the call has its required field, and a user_id or anonymous_id."""
    required = CALL_TYPES[call.type].required
    if required and not getattr(call, required):
        raise Refusal(400, f"Missing {required}")
    if call.user_id is None and call.anonymous_id is None:
        raise Refusal(400, "Missing user_id or anonymous_id")


# The following functions, up to `parse_time`, return the value of a field as it is stored in the
# Call. For an invalid value, they raise a ValueError whose message follows the field's name, as in
# "user_id must be …".


def check_id(value: Any) -> str | None:
    """Return an id as text, or None if it is empty. An integer becomes its decimal digits."""
    if isinstance(value, str):
        if "\0" in value:  # some databases cut text at NUL, which could make two ids equal
            raise ValueError("must not contain NUL")
        return value or None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise ValueError("must be a string or an integer")


def check_string(value: Any) -> str:
    """Return the value, which must be a string."""
    if isinstance(value, str):
        return value
    raise ValueError("must be a string")


def check_object(value: Any) -> dict[str, Any]:
    """Return an object. [] counts as {}, because PHP encodes an empty associative array as []."""
    if isinstance(value, dict):
        return value
    if value == []:
        return {}
    raise ValueError("must be an object")


def check_time(value: Any) -> str | None:
    """Return a time in UTC, or None if it is empty."""
    return None if value == "" else parse_time(value)


def accept_anything(value: Any) -> Any:
    """Return the value as it is."""
    return value


# A date such as 2026-01-15, optionally followed by a time, which may in turn be followed by a zone.
# These are the common forms of ISO 8601; a space may replace the T. `datetime.fromisoformat` alone
# would not do, because the forms that it accepts depend on the version of Python.
ISO_8601 = re.compile(
    r"""
    \d{4}-\d\d-\d\d
    (?:
        [Tt ] (?:[01]\d|2[0-3]) : [0-5]\d (?: : [0-5]\d (?: [.,]\d+ )? )?
        (?: [Zz] | [+-] (?:[01]\d|2[0-3]) (?: :? [0-5]\d )? )?
    )?
    """,
    re.VERBOSE | re.ASCII,
)

# The form that parse_time returns, and that Segment usually sends.
UTC_TIME = re.compile(r"\d{4}-\d\d-\d\dT(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d\.\d{3}Z", re.ASCII)


def parse_time(value: Any) -> str:
    """Return a time as text in UTC, cut to milliseconds.

    A date alone means midnight, and a time without a zone is taken to be in UTC. Raises ValueError
    if the value is not a string that matches ISO_8601, if the date does not exist, or if the time
    in UTC is not in the years 1 to 9999.
    """
    message = "must be an ISO 8601 time such as 2026-01-15T09:41:07Z"
    if not isinstance(value, str):
        raise ValueError(message)
    is_in_final_form = UTC_TIME.fullmatch(value)  # the usual case; matching ISO_8601 is slower
    if not is_in_final_form and not ISO_8601.fullmatch(value):
        raise ValueError(message)
    try:
        # `fromisoformat` refuses dates that do not exist, such as 2026-02-30. It would also refuse
        # a lower-case z, which RFC 3339 allows.
        moment = datetime.fromisoformat(value.upper())
        if is_in_final_form:
            return value
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(message) from None
    return moment.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


# The fields of a call, each with the function that checks it. If the function returns None, the
# Call keeps its default.
FIELD_CHECKS: dict[str, Callable[[Any], Any]] = {
    "type": check_string,
    "user_id": check_id,
    "anonymous_id": check_id,
    "event": check_string,
    "name": check_string,
    "group_id": check_id,
    "previous_id": check_id,
    "traits": check_object,
    "properties": check_object,
    "context": check_object,
    "integrations": accept_anything,
    "message_id": check_id,
    "timestamp": check_time,
    "sent_at": check_time,
    "received_at": check_time,
    "original_timestamp": check_time,
    "version": accept_anything,
}
IGNORED_IF_INVALID = {"context", "sent_at", "received_at", "original_timestamp"}
FIELD_BY_SQUASHED_NAME = {squash(name): name for name in FIELD_CHECKS}

# Fields that only some types use: all arguments of handlers except user_id, which every type uses.
# For calls of the other types, such a field is not checked, and the Call has its default value.
TYPE_SPECIFIC_FIELDS = {name for spec in CALL_TYPES.values() for name in spec.arguments} - {
    "user_id"
}

# For each type of call, the checks of the fields that it uses.
CHECKS_BY_TYPE = {
    call_type: {
        name: check
        for name, check in FIELD_CHECKS.items()
        if name not in TYPE_SPECIFIC_FIELDS or name in spec.arguments
    }
    for call_type, spec in CALL_TYPES.items()
}


# ---- Rung 11: the destination --------------------------------------------------------------------


def dispatch(handler: Callable[..., Any], call: Call) -> int:
    """Call a handler, and return the status code: its result, or 200 if the result is None.

    Raises TypeError if the result is not None, 200 or 202. The handler's exceptions propagate.
    """
    arguments = [getattr(call, name) for name in CALL_TYPES[call.type].arguments]
    result = handler(*arguments, call)
    if result is None:
        return 200
    if result not in (200, 202):
        raise TypeError(f"a handler must return None, 200 or 202, not {short_repr(result)}")
    return int(result)


# ---- Speed ---------------------------------------------------------------------------------------
#
# Most requests use one of a few API keys, and their JSON objects use the same few hundred names.
# This section caches the digests of the API keys, and the names in snake_case. Deleting it would
# not change any reply.
#
# It replaces `key_digest` and `snake_case` with cached versions, and `snake_keys` with a version
# that returns an object as it is if all its keys are known to be in snake_case. The replacements
# accept only positional arguments, so the originals are declared with `/` to do the same. Their
# callers need no change, because Python looks up a global name at each call. But `DECODER` is made
# again, because the first one holds the old `snake_keys`.

MAX_CACHED_LENGTH = 100  # characters; longer texts could fill the memory
MAX_CACHED_TEXTS = 4096


class ShortTextCache(dict[str, str]):
    """A cache of a function's results for short texts, which is emptied when it is full.

    Unlike `functools.lru_cache`, it leaves out long texts. Threads may use it at the same time: at
    worst, a result is computed twice. The cache of `key_digest` holds Authorization headers, and
    with them API keys, but only in memory; they are never written to a file.
    """

    def __init__(self, function: Callable[[str], str]) -> None:
        """Cache the results of this function."""
        self.function = function

    def __missing__(self, text: str) -> str:
        """Compute a result that is not in the cache."""
        result = self.function(text)
        if len(text) <= MAX_CACHED_LENGTH:
            if len(self) >= MAX_CACHED_TEXTS:
                self.clear()
            self[text] = result
        return result


# `__getitem__` calls `__missing__` for a text that is not in the cache.
key_digest = ShortTextCache(key_digest).__getitem__
snake_case = ShortTextCache(snake_case).__getitem__


def skip_if_snake_case(
    convert: Callable[[dict[str, Any]], dict[str, Any]],
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Wrap `snake_keys`, so that it skips objects that need no conversion.

    An object is returned as it is if all its keys are known to be in snake_case. A key in
    snake_case becomes known when it is first seen, unless it is too long.
    """
    known_snake_case: set[str] = set()

    def convert_if_needed(members: dict[str, Any], /) -> dict[str, Any]:
        if known_snake_case.issuperset(members):
            return members
        for key in members:
            if len(key) <= MAX_CACHED_LENGTH and snake_case(key) == key:
                if len(known_snake_case) >= MAX_CACHED_TEXTS:
                    known_snake_case.clear()
                known_snake_case.add(key)
        return convert(members)

    return convert_if_needed


snake_keys = skip_if_snake_case(snake_keys)
DECODER = make_decoder(snake_keys)


# ==================================================================================================
# Part 2. Storing calls
#
# A reply of 200 is a promise that the call will not be lost. `GroupCommit` stores waiting calls
# together, so that keeping this promise costs little time, whatever the database. `Store` is the
# default destination, with all calls in one SQLite table.
# ==================================================================================================

log = logging.getLogger("receiver")

STORE_TIMEOUT = 4.5  # seconds; Segment waits at least five seconds for a reply
MAX_WAITING_CALLS = 1000
MAX_WAITING_BYTES = 16_000_000


class ConfigurationError(ValueError):
    """Raised if an option or a file cannot be used, or if SQLite is too old."""

    def __init__(self, message: str) -> None:
        """Set the message: one line, with anything that is not printable replaced by spaces."""
        super().__init__("".join(c if c.isprintable() else " " for c in message))


class Outcome(StrEnum):
    """What a GroupCommit did with a call. In every case, the call is acknowledged with 200."""

    stored = "stored"
    duplicate = "duplicate"  # not stored again: the customer has sent this message_id before
    forgotten = "forgotten"  # not stored: its user was deleted at or after the time of the call


class QueuedCall(NamedTuple):
    """A call that waits to be stored, and the queue through which its result is returned."""

    call: Call
    deadline: float  # monotonic time after which nobody waits for the result
    result_queue: queue.SimpleQueue[Outcome | Exception]


class GroupCommit(Destination):
    """A destination that stores all waiting calls together, as one batch in one transaction.

    Syncing to a disk or crossing a network costs about the same for one call as for fifty. So the
    threads that handle connections only queue their calls, and a single thread, the writer, stores
    them in batches.

    A subclass implements `write`, and may implement `open`, which connects to a database, and its
    counterpart `shut`, which disconnects. The writer calls all three. Do not confuse `shut` with
    `close`, which the server calls to end the writer.

    If the subclass has a constructor, it must call `super().__init__()`. Connect in `open` and not
    in the constructor, so that the receiver starts even if the database is down.

    GroupCommit supports identify, track, page, group and delete. To support another type, add a
    method for it:

        def screen(self, user_id, name, properties, call):
            self.submit(call)
    """

    def __init__(self) -> None:
        """Prepare the queue. The first call that is submitted starts the writer."""
        self._is_open = False  # used by the writer only
        self._writer = threading.Thread(target=self._run, name="writer", daemon=True)
        # Guards the attributes below, and `failed`, which Destination defines. It is notified when
        # a call is queued, and when `_closing` is set.
        self._changed = threading.Condition()
        self._queue: list[QueuedCall] = []
        self._queued_bytes = 0
        self._closing = False

    def write(self, calls: Sequence[Call]) -> Sequence[Outcome | Refusal]:
        """Store these calls in order, make them durable, and return the outcome of each.

        A Refusal in place of an outcome refuses that call alone. Raising a Refusal refuses the
        whole batch: raise one with status 503 if the database cannot be reached.

        After any other exception, a batch of several calls is written again, one call at a time, so
        that one bad call does not make the others fail. If `write` raises such an exception for a
        batch of one call, that call is answered with 500. Roll back the transaction before any
        exception leaves this method.
        """
        raise NotImplementedError

    def open(self) -> None:
        """Connect to the database, before the first `write`.

        If this raises a Refusal, the waiting calls are refused with it; after any other exception,
        they are refused with 503. Either way, the next batch tries again. Once this has succeeded,
        it is not called again, so `write` must reconnect if the connection is lost.
        """

    def shut(self) -> None:
        """Disconnect from the database, after the last `write`.

        This is called only if `open` has succeeded. It is not called if an exception such as
        SystemExit has ended the writer.
        """

    def submit(self, call: Call) -> None:
        """Hand a call to the writer, wait until it is stored, and set `call.outcome`.

        Raises Refusal 503 if the call cannot be queued, or if storing it takes longer than
        STORE_TIMEOUT, in which case it may still be stored. Raises a Refusal if `open` or `write`
        has refused the call; any other exception that `write` has raised for it propagates.
        """
        queued = QueuedCall(call, time.monotonic() + STORE_TIMEOUT, queue.SimpleQueue())
        self._enqueue(queued)
        try:
            result = queued.result_queue.get(timeout=STORE_TIMEOUT)
        except queue.Empty:
            raise Refusal(503, "The call could not be stored in time") from None

        if isinstance(result, Refusal):
            # The calls of a batch may share one Refusal. Each thread raises a copy, because raising
            # an exception changes its traceback.
            raise Refusal(result.status, result.message, result.headers)
        if isinstance(result, Exception):
            raise result
        call.outcome = Outcome(result)  # raises ValueError if the result is not an outcome

    def _enqueue(self, queued: QueuedCall) -> None:
        """Add a call to the queue, and start the writer if it has not been started yet.

        Raises Refusal 503 if the queue is full, if the destination has been closed, or if the
        writer has failed or cannot be started.
        """
        with self._changed:
            if self._closing:
                raise Refusal(503, "Shutting down")
            if self.failed:
                raise Refusal(503, "The call cannot be stored at the moment")
            length = len(self._queue)
            total_bytes = self._queued_bytes + queued.call.size
            # An empty queue accepts a call of any size.
            if length >= MAX_WAITING_CALLS or (length > 0 and total_bytes > MAX_WAITING_BYTES):
                raise Refusal(503, "Too many calls are waiting to be stored")
            has_been_started = self._writer.ident is not None
            if not has_been_started:
                try:
                    self._writer.start()
                except RuntimeError:  # no more threads can be started
                    raise Refusal(503, "The call cannot be stored at the moment") from None
            self._queue.append(queued)
            self._queued_bytes = total_bytes
            self._changed.notify()

    def _handle(self, *arguments: Any) -> None:
        """Handle a call of any type: the Call itself is the last argument."""
        self.submit(arguments[-1])

    identify = track = page = group = delete = _handle

    def close(self) -> None:
        """Refuse new calls, and wait until the writer has stored the queued calls and ended.

        The wait takes at most STORE_TIMEOUT; after that, the writer may still be running.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._writer.is_alive():
            self._writer.join(STORE_TIMEOUT)

    def _run(self) -> None:
        """Run the writer until `close` is called and no calls are waiting; then disconnect.

        Sets `failed` if the writer ends before `close` is called.
        """
        try:
            while self._write_next_batch():
                pass
            if self._is_open:
                self.shut()
        except Exception:
            log.exception("The writer has ended with an error")
        finally:
            with self._changed:
                self.failed = not self._closing

    def _write_next_batch(self) -> bool:
        """Wait for calls, and write those whose time has not run out.

        Returns False if no calls were waiting, which happens only after `close`. This is a separate
        method so that its variables, and with them the batch, are freed before the writer waits
        again.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing)
            all_queued = self._queue
            self._queue = []
            self._queued_bytes = 0
        batch = [queued for queued in all_queued if time.monotonic() < queued.deadline]
        if batch:
            for queued, result in zip(batch, self._write_batch(batch), strict=True):
                queued.result_queue.put(result)
        return bool(all_queued)

    def _write_batch(self, batch: list[QueuedCall]) -> Sequence[Outcome | Exception]:
        """Write a batch, and return the result of each call, which may be an exception."""
        if not self._is_open:
            refusal = self._try_to_open()
            if refusal:
                return [refusal] * len(batch)
        try:
            outcomes = list(self.write([queued.call for queued in batch]))
        except Refusal as error:
            # Drop the traceback. `write` may raise the same Refusal object many times; each time,
            # its traceback would grow, and keep one more batch in memory.
            return [error.with_traceback(None)] * len(batch)
        except Exception as error:
            return [error] if len(batch) == 1 else self._write_one_by_one(batch)
        if len(outcomes) != len(batch):
            message = f"write returned {len(outcomes)} outcomes for {len(batch)} calls"
            # Each call gets its own exception, because `submit` raises it without copying it.
            return [TypeError(message) for _ in batch]
        return outcomes

    def _write_one_by_one(self, batch: list[QueuedCall]) -> list[Outcome | Exception]:
        """Write each call of a failed batch alone, unless its time has run out."""
        results: list[Outcome | Exception] = []
        for queued in batch:
            if time.monotonic() < queued.deadline:
                results += self._write_batch([queued])
            else:  # nobody reads this result, but every call must have one
                results.append(Refusal(503, "The call could not be stored in time"))
        return results

    def _try_to_open(self) -> Refusal | None:
        """Call `open`. If it fails, return the Refusal for the calls of the batch."""
        try:
            self.open()
        except Refusal as refusal:
            return refusal.with_traceback(None)  # as in `_write_batch`
        except Exception:
            log.exception("The destination could not be opened")
            return Refusal(503, "The call cannot be stored at the moment")
        self._is_open = True
        return None


# ---- The schema of the database ------------------------------------------------------------------

APPLICATION_ID = 0x5365676D  # "Segm", in the header of every database file of this program
SCHEMA_VERSION = 2

# The group_id of a call as text. `->>` would round an integer of more than 63 bits; `->` does not.
GROUP_ID = """case json_type(call, '$.group_id')
        when 'integer' then call -> '$.group_id'
        else call ->> '$.group_id'
    end"""


def merged_traits(condition: str) -> str:
    """Return SQL for the merged traits of a user (view `users`) or a group (view `accounts`).

    The traits are one JSON object. Each trait takes its value, which may be null, from the newest
    call that contains it; of equally new calls, the one received last counts. A trait whose name
    contains NUL is left out, because SQLite would truncate the name.

    The SQL is a subquery. The enclosing query must give the alias `owner` to the table or view that
    it selects from. The condition selects the calls that belong to the current row of `owner`, and
    refers to the table `calls` as `c`.
    """
    return rf"""(
    -- Without `materialized`, SQLite would sort a copy of the whole call for each trait.
    with trait_values as materialized (
        select
            trait.key as name,
            -- `->` gives the JSON of a trait exactly as it was stored, but finds nothing if the
            -- name contains a quotation mark. In that case, fall back on the value from json_each,
            -- although this can round a fractional or very large number, and cuts a string at NUL.
            coalesce(
                c.call -> trait.fullkey,
                case
                    when trait.type in ('object', 'array') then trait.value
                    -- Here, `trait.value` is 1, 0 or null in SQL; `trait.type` is the JSON text.
                    when trait.type in ('true', 'false', 'null') then trait.type
                    else json_quote(trait.value)
                end
            ) as value,
            c.timestamp as timestamp,
            c.rowid as arrival
        from calls as c, json_each(c.call, '$.traits') as trait
        where {condition}
            and trait.key is not null -- if `traits` is null, json_each gives a row without a key
            -- Leave out names that contain NUL, which `fullkey` writes as \u0000. A name can also
            -- contain these six characters themselves. `fullkey` doubles their backslash, so the
            -- result, \\u0000, still contains \u0000. Removing each \\ first prevents this false
            -- match.
            and instr(replace(trait.fullkey, '\\', ''), '\u0000') = 0
    )
    select json_group_object(name, json(value)) from (
        select name, value, row_number() over (
            partition by name order by timestamp desc, arrival desc
        ) as position -- 1 is the newest
        from trait_values
    ) where position = 1
)"""


USER_TRAITS = merged_traits(
    "c.user_id = owner.user_id and c.customer = owner.customer and c.type = 'identify'"
)
# GROUP_ID uses the column `call` without an alias; in this condition, that means c.call.
ACCOUNT_TRAITS = merged_traits(
    f"{GROUP_ID} = owner.group_id and c.customer = owner.customer and c.type = 'group'"
)


def object_column(name: str) -> str:
    """Return SQL for a column with this field of the call, or {} if that is not an object."""
    return f"""case json_type(call, '$.{name}')
        when 'object' then call -> '$.{name}'
        else '{{}}'
    end as {name}"""


COMMON_COLUMNS = f"""customer, message_id, user_id, anonymous_id, timestamp, received_at,
    {object_column("context")}"""
TRAITS_COLUMN = object_column("traits")
PROPERTIES_COLUMN = object_column("properties")

# `open_database` splits this text at each semicolon that ends a line.
SCHEMA = f"""
create table calls (
    customer text not null,
    message_id text not null,
    type text not null,
    user_id text,
    anonymous_id text,
    timestamp text not null, -- Call.timestamp; for a delete, no later than received_at
    received_at text not null, -- when it was stored here (received_at in the JSON is Segment's)
    call text not null, -- the call as JSON, with its keys in snake_case
    primary key (customer, message_id)
);
create index calls_by_user on calls (user_id, customer, type, timestamp);
create index calls_by_group on calls ({GROUP_ID}, customer, timestamp, user_id)
    where type = 'group';

create view identifies as
    select {COMMON_COLUMNS}, {TRAITS_COLUMN}
    from calls where type = 'identify';
create view tracks as
    select {COMMON_COLUMNS}, call ->> '$.event' as event, {PROPERTIES_COLUMN}
    from calls where type = 'track';
create view pages as
    select {COMMON_COLUMNS}, call ->> '$.name' as name, {PROPERTIES_COLUMN}
    from calls where type = 'page';
create view groups as
    select {COMMON_COLUMNS}, {GROUP_ID} as group_id, {TRAITS_COLUMN}
    from calls where type = 'group';

create view users as
    select customer, user_id, {USER_TRAITS} as traits,
        min(timestamp) as first_seen, max(timestamp) as last_seen
    from calls as owner where user_id is not null and type <> 'delete'
    group by user_id, customer;
create view accounts as
    select customer, group_id, {ACCOUNT_TRAITS} as traits, count(distinct user_id) as members,
        min(timestamp) as first_seen, max(timestamp) as last_seen
    from groups as owner
    group by group_id, customer;

-- Segment keeps a destination in private beta until it has at least 10 customers, or has received
-- more than 20 million events. This view counts the customers and the events, which are calls of
-- any type except delete, and shows whether either condition is fulfilled.
create view private_beta as
    select count(distinct customer) as customers, count(*) as events,
        count(distinct customer) >= 10 or count(*) > 20000000 as fulfilled
    from calls where type <> 'delete';

pragma application_id = {APPLICATION_ID};
pragma user_version = {SCHEMA_VERSION};
"""

# A call is not stored if its user was deleted at or after the time of the call, or if it is a
# duplicate.
INSERT_CALL = """
    insert into calls
    select :customer, :message_id, :type, :user_id, :anonymous_id, :timestamp, :received_at, :call
    where not exists (
        select 1 from calls
        where customer = :customer and user_id = :user_id and type = 'delete'
            and timestamp >= :timestamp
    )
    on conflict (customer, message_id) do nothing"""
SELECT_CALL = "select 1 from calls where customer = :customer and message_id = :message_id"
DELETE_USER = """
    delete from calls
    where customer = :customer and user_id = :user_id and type <> 'delete'
        and timestamp <= :timestamp"""

# The fields of a `delete` call that are stored. Other fields could contain personal data.
STORED_FIELDS_OF_DELETE = [
    "type",
    "user_id",
    "anonymous_id",
    "message_id",
    "timestamp",
    "original_timestamp",
    "sent_at",
    "received_at",
]


# ---- The default destination ---------------------------------------------------------------------

# Seconds to wait for another program that has locked the database. Two such waits may hold up a
# call, one for the batch before it and one for its own batch, so this must be less than half of
# STORE_TIMEOUT.
LOCK_TIMEOUT = 2.0

# Once the write-ahead log (WAL) has this many pages of 4 KiB, SQLite copies it into the database.
# If a long-running reader makes the WAL grow larger, SQLite truncates it to this size later.
WAL_PAGES = 4000
WAL_BYTES = WAL_PAGES * 4096

to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def call_row(call: Call) -> dict[str, str | None]:
    """Return the row that stores a call: a mapping from column names to values.

    For a `delete` call, only the type, the ids and the times are stored. A timestamp in the future
    would cause new calls about the user to be discarded until then, so the column `timestamp` gets
    the current time instead.
    """
    received_at = utc_now()
    timestamp = call.timestamp
    stored = call.raw
    if call.type == "delete":
        timestamp = min(timestamp, received_at)
        fields = {name: getattr(call, name) for name in STORED_FIELDS_OF_DELETE}
        stored = {name: value for name, value in fields.items() if value}
    return {
        "customer": call.customer,
        "message_id": call.message_id,
        "type": call.type,
        "user_id": call.user_id,
        "anonymous_id": call.anonymous_id,
        "timestamp": timestamp,
        "received_at": received_at,
        "call": to_json(stored),
    }


class Store(GroupCommit):
    """The default destination: calls become rows in an SQLite database.

    A row is synced to disk before its call is acknowledged. A duplicate is acknowledged, but not
    stored. A delete takes effect as of its timestamp, or as of the current time if its timestamp is
    in the future. It removes the user's calls with a timestamp up to and including that time,
    except for deletes. If a call with such a timestamp arrives later, it is acknowledged, but not
    stored.
    """

    def __init__(self, path: str | os.PathLike[str] = "calls.db") -> None:
        """Open the database, or create it with mode 0600.

        This happens here and not in `open`, so that a mistake is reported when the receiver starts.
        Raises ConfigurationError if the database cannot be used; an existing file is then left
        unchanged.
        """
        super().__init__()
        name = os.fspath(path)
        try:
            self._db = open_database(name)
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ConfigurationError(f"{name}: {reason}") from None
        self._path = os.path.abspath(name)
        self._wal_path = f"{os.path.realpath(name)}-wal"  # SQLite resolves symbolic links, too
        self._file_ids = self._current_file_ids()
        self._truncate_pending = True  # an earlier run may have left deleted data in the WAL

    def write(self, calls: Sequence[Call]) -> Sequence[Outcome | Refusal]:
        """Store these calls in one transaction, and return their outcomes.

        Raises Refusal 503 if the database file or its WAL has been deleted or replaced, and after
        any OperationalError, for example if the database is locked, full or read-only. Other SQLite
        errors propagate.
        """
        try:
            with self._db:  # commits at the end, or rolls back after an exception
                self._db.execute("begin immediate")
                if self._current_file_ids() != self._file_ids:
                    raise OSError("the file or its WAL was deleted or replaced")
                outcomes = [self._store(call) for call in calls]
        except (OSError, sqlite3.OperationalError) as error:
            log.error("Cannot store %d call(s) in %s: %s", len(calls), self._path, error)
            raise Refusal(503, "The call cannot be stored at the moment") from None
        if self._truncate_pending:
            self._truncate_wal()
        return outcomes

    def close(self) -> None:
        """Store the calls that are still waiting, and close the database.

        The database is not closed in `shut`, because only the writer calls that, and the writer
        never runs if no call arrives.
        """
        super().close()
        if not self._writer.is_alive():  # while the writer hangs, closing would hang, too
            self._db.close()

    def _current_file_ids(self) -> list[tuple[int, int] | None]:
        """Return the identities of the database file and its WAL.

        SQLite does not notice if one of them is deleted, and keeps writing to the deleted file.
        """
        return [file_identity(self._path), file_identity(self._wal_path)]

    def _store(self, call: Call) -> Outcome:
        """Insert a call, and return its outcome. A delete also removes the calls it applies to."""
        row = call_row(call)
        if self._db.execute(INSERT_CALL, row).rowcount:
            if call.type == "delete":
                self._db.execute(DELETE_USER, row)
                self._truncate_pending = True
            return Outcome.stored
        known = self._db.execute(SELECT_CALL, row).fetchone()
        return Outcome.duplicate if known else Outcome.forgotten

    def _truncate_wal(self) -> None:
        """Remove deleted data from the WAL, unless a reader is still using it.

        Waiting for the reader would hold up calls. Instead, `write` tries again after each batch
        until this succeeds. If no further batch follows, SQLite removes the WAL when the last
        connection to the database is closed. If the program ends without closing its connection,
        the first batch of the next run truncates the WAL.
        """
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("pragma busy_timeout = 0")
            busy = self._db.execute("pragma wal_checkpoint(truncate)").fetchone()[0]
            self._truncate_pending = bool(busy)
        self._db.execute(f"pragma busy_timeout = {int(LOCK_TIMEOUT * 1000)}")


def open_database(path: str) -> sqlite3.Connection:
    """Return a connection to the database, which is created if it does not exist.

    Raises ConfigurationError if `check_database_file` does, or if SQLite is too old. Raises OSError
    or sqlite3.Error if the file cannot be opened.
    """
    if sqlite3.sqlite_version_info < (3, 38):
        raise ConfigurationError(f"SQLite must be 3.38 or newer, not {sqlite3.sqlite_version}")
    check_database_file(path)
    # If the file is missing, create it here, because SQLite would create it with mode 0644.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.close(descriptor)
    db = sqlite3.connect(
        os.path.abspath(path),  # so that even :memory: is the name of a file
        timeout=LOCK_TIMEOUT,
        isolation_level=None,  # transactions begin only where the code says `begin`
        check_same_thread=False,  # the writer uses the connection, and another thread closes it
    )
    try:
        # Create the schema before switching to WAL mode. Otherwise, it would be only in the WAL at
        # first, and after a crash, the file's header would not identify this program.
        with db:
            db.execute("begin immediate")  # if another receiver is doing the same, wait for it
            schema_version = db.execute("pragma user_version").fetchone()[0]
            if schema_version == 0:
                for statement in SCHEMA.split(";\n"):
                    db.execute(statement)
        db.execute("pragma journal_mode = wal")
        db.execute("pragma synchronous = full")  # a commit returns once it is on disk
        db.execute("pragma fullfsync = on")  # macOS would otherwise sync only to the drive's cache
        db.execute("pragma secure_delete = on")  # overwrite deleted rows with zeros
        db.execute(f"pragma wal_autocheckpoint = {WAL_PAGES}")
        db.execute(f"pragma journal_size_limit = {WAL_BYTES}")
        db.execute("pragma user_version")  # any read creates the WAL, if there is none
    except sqlite3.Error:
        db.close()
        raise
    return db


def check_database_file(path: str) -> None:
    """Raise ConfigurationError unless the path can be used for a database of calls.

    The path may name a database of calls with the current schema. It may also name a file that is
    missing or empty, unless there is a WAL beside it. This reads the file's header directly,
    because merely opening a file with SQLite can change it. Raises OSError if the file cannot be
    read.
    """
    if not path:
        raise ConfigurationError("the name of the database must not be empty")
    if not os.path.exists(path):
        check_folder(path)
        check_no_wal(path)
        return
    check_regular_file(path)
    with open(path, "rb") as file:
        header = file.read(100)
    if not header:
        check_no_wal(path)
        return

    # For these offsets, see https://sqlite.org/fileformat2.html#the_database_header.
    application_id = int.from_bytes(header[68:72], "big")
    user_version = int.from_bytes(header[60:64], "big")
    if not header.startswith(b"SQLite format 3\0") or application_id != APPLICATION_ID:
        raise ConfigurationError(f"{path}: not a database of calls")
    if user_version != SCHEMA_VERSION:
        message = f"its schema is version {user_version}, but must be {SCHEMA_VERSION}"
        raise ConfigurationError(f"{path}: {message}")


def check_no_wal(path: str) -> None:
    """Raise ConfigurationError if a missing or empty database has a WAL.

    SQLite would delete the WAL, and the calls in it would be lost.
    """
    wal = f"{os.path.realpath(path)}-wal"  # SQLite resolves symbolic links, too
    if os.path.exists(wal):
        message = f"{wal} exists, but {path} is missing or empty"
        raise ConfigurationError(f"{message}; restore {path}, or move the -wal file away")


# ---- Files and time ------------------------------------------------------------------------------

MAX_FILE = 100_000_000  # bytes; room for some 700,000 API keys


def file_identity(path: str) -> tuple[int, int] | None:
    """Return the device and inode of a file, or None if it cannot be accessed."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def read_regular_file(path: str) -> bytes:
    """Return the content of a regular file.

    The file is opened without blocking and checked afterwards, so that not even a FIFO that
    replaces the file at the last moment can block the caller. Raises ConfigurationError if the
    path does not name a regular file, or if the file is longer than MAX_FILE, and OSError if it
    cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(f"{path}: not a regular file")
        if status.st_size > MAX_FILE:
            raise ConfigurationError(f"{path}: must be at most {MAX_FILE} bytes long")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def check_regular_file(path: str) -> None:
    """Raise ConfigurationError unless the path names a regular file.

    Call this before a library opens the file, because opening a FIFO would block forever.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise ConfigurationError(f"{path}: not a regular file")


def check_folder(path: str) -> None:
    """Raise ConfigurationError if the folder that is to contain this file does not exist."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ConfigurationError(f"{path}: there is no folder {folder}")


@lru_cache(maxsize=1)
def format_utc(unix_time: int) -> str:
    """Return a time as 2026-01-15T09:41:07. Cached, because many log lines share a second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_time))


def utc_now() -> str:
    """Return the current time in UTC, as 2026-01-15T09:41:07.250Z."""
    milliseconds = time.time_ns() // 1_000_000
    return f"{format_utc(milliseconds // 1000)}.{milliseconds % 1000:03d}Z"


# ==================================================================================================
# Part 3. The server
#
# HTTP/1.1 and 1.0 over TLS, built on `socketserver` and `ssl`. The accept thread accepts
# connections, and each connection then runs in a separate thread. Connections use blocking sockets,
# which is simple and fast. Instead of a timeout for each read, every connection has a deadline.
# Once it has passed, the accept thread hangs up, even if bytes are still trickling in.
# ==================================================================================================

# The errno values for a shortage of resources, in this process or in the system. It may be
# temporary, so it is always worth trying again.
SHORTAGE_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

# ---- Rung 1: the head of a request ---------------------------------------------------------------
#
# The first rung of the ladder; see `answer`.
#
# If two programs disagree about where a request ends, one request can be smuggled inside another.
# Python's own parser, in `http.server`, accepts requests that other parsers read differently. So
# this section follows RFC 9112 strictly in everything that decides where a request ends. It refuses
# whatever does not conform, and the connection closes. It does not check what the receiver never
# uses, such as the value of the Host header.

MAX_TARGET = 8192  # bytes
MAX_HEAD = 65_536  # bytes
MAX_HEADERS = 100

REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])")  # RFC 9112 §3
ABSOLUTE_FORM = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#]+")  # RFC 9112 §3.2.2
HEADER_LINE = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)")  # RFC 9112 §5, without folding
BARE_LF = re.compile(rb"(?<!\r)\n")  # RFC 9112 §2.2

# Headers that must not be repeated, because two programs could pick different values. A repeated
# Content-Type is accepted if the values are identical.
SINGLETON_HEADERS = {"host", "content-length", "content-type", "authorization"}


class Head(NamedTuple):
    """The request line and headers of a request."""

    method: str
    target: str
    headers: Mapping[str, str]  # names in lower case, values stripped; without Content-Length
    keep_alive: bool  # whether another request may follow on the connection
    expects_continue: bool  # whether the client waits for "100 Continue" before it sends the body
    length: int | None  # the Content-Length in bytes; None if the header is missing


def parse_head(head: str, /) -> Head:
    """Parse the head of a request, decoded as Latin-1, without the empty line that ends it.

    Raises Refusal 400 if it is malformed, 414 if the target is too long, 431 if there are too many
    headers, and 505 if the version of HTTP is not supported.
    """
    request_line, *header_lines = head.split("\r\n")
    parts = REQUEST_LINE.fullmatch(request_line)
    if not parts:
        raise Refusal(400, "Malformed request line")
    method, target, major, minor = parts.groups()
    if len(target) > MAX_TARGET:
        raise Refusal(414, f"Request target must be at most {MAX_TARGET} bytes long")
    if major != "1":  # 1.2, if it ever exists, is compatible with 1.1 (RFC 9110 §2.5)
        raise Refusal(505, "HTTP version must be 1.1 or 1.0")

    headers = parse_headers(header_lines)
    is_http_1_0 = minor == "0"
    if "host" not in headers and not is_http_1_0:
        raise Refusal(400, "Missing Host header")
    length = parse_length(headers.pop("content-length", None))
    # Transfer codings are not supported; `check_body_headers` refuses them with a 411.
    has_transfer_coding = "transfer-encoding" in headers
    if length is not None and has_transfer_coding:  # the classic way to smuggle a request
        raise Refusal(400, "Transfer-Encoding and Content-Length must not be combined")

    connection = headers.get("connection", "").lower()
    options = [option.strip(" \t") for option in connection.split(",")]
    wants_keep_alive = "keep-alive" in options or not is_http_1_0
    # In these cases, the bytes that follow on the connection might not be an HTTP request. After a
    # POST without a Content-Length, they may be a body whose length the client did not give.
    is_last_request = (
        method == "CONNECT"
        or "upgrade" in headers
        or has_transfer_coding
        or (method == "POST" and length is None)
    )
    return Head(
        method=method,
        target=origin_form(target),
        headers=headers,
        keep_alive=wants_keep_alive and "close" not in options and not is_last_request,
        expects_continue=headers.get("expect", "").lower() == "100-continue" and not is_http_1_0,
        length=length,
    )


def parse_headers(lines: list[str]) -> dict[str, str]:
    """Return a mapping from lower-case names to values.

    Repeated headers are joined (RFC 9110 §5.3), unless they are SINGLETON_HEADERS. Raises Refusal
    400 if a line is malformed or one of the SINGLETON_HEADERS is repeated (except a Content-Type
    with the same value), and Refusal 431 if there are too many lines.
    """
    if len(lines) > MAX_HEADERS:
        raise Refusal(431, f"Request must have at most {MAX_HEADERS} header lines")
    headers: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        parts = HEADER_LINE.fullmatch(line)
        if not parts:
            raise Refusal(400, f"Malformed header line {number}")
        name = parts[1].lower()
        value = parts[2].strip(" \t")
        if name in headers:
            if name == "content-type" and value == headers[name]:
                continue  # some senders repeat it; an identical value does no harm
            if name in SINGLETON_HEADERS:
                raise Refusal(400, f"Repeated {name} header")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


def parse_length(text: str | None) -> int | None:
    """Return a Content-Length in bytes (RFC 9110 §8.6), or None if the header is missing.

    Leading zeros are ignored. Only the first 19 of the remaining digits are used; a number that
    long exceeds every limit anyway. Raises Refusal 400 if the text does not consist of digits.
    """
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):  # int() would accept a sign and underscores
        raise Refusal(
            400, f"Content-Length must be an integer without a sign, not {short_repr(text)}"
        )
    digits = text.lstrip("0")[:19]  # int() raises ValueError for thousands of digits
    return int(digits or "0")


def origin_form(target: str) -> str:
    """Reduce a target in absolute form to its path and query; return others unchanged."""
    absolute = ABSOLUTE_FORM.match(target)
    if not absolute:
        return target
    rest = target[absolute.end() :]
    return rest if rest.startswith("/") else f"/{rest}"


# ---- Speed ---------------------------------------------------------------------------------------
#
# Requests that a sender makes with one API key usually have heads that differ only in their
# Content-Length. So this section caches recently parsed heads. The key of the cache is the text of
# the head, with its Content-Length replaced by 0. A hit saves more than half of the time it takes
# to parse a head. Deleting this section would not change any reply. Requests share the cached
# headers, so do not modify them.

MAX_CACHED_HEADS = 1024
MAX_CACHED_HEAD_LENGTH = 2000  # bytes


def with_head_cache(parse: Callable[[str], Head]) -> Callable[[str], Head]:
    """Wrap `parse_head` in a cache that ignores the Content-Length."""
    parse_once = lru_cache(MAX_CACHED_HEADS)(parse)

    @wraps(parse)
    def parse_with_cache(head: str, /) -> Head:
        before, name, after = head.partition("\r\nContent-Length: ")
        digits, line_end, rest = after.partition("\r\n")
        # Cache only a head that is short, to limit the memory, and that has the Content-Length in
        # the usual form, with at most nine digits.
        if (
            len(head) > MAX_CACHED_HEAD_LENGTH
            or len(digits) > 9
            or not (digits.isascii() and digits.isdigit())
        ):
            return parse(head)
        cached = parse_once(f"{before}{name}0{line_end}{rest}")
        return cached._replace(length=int(digits))

    return parse_with_cache


parse_head = with_head_cache(parse_head)


# ---- One connection ------------------------------------------------------------------------------

RECEIVE_SIZE = 16_384  # bytes; a TLS record holds at most this many
LINGER = 2.0  # seconds: the time for a last reply after `hang_up`, and for reading in `drain`
PLAIN_HTTP = re.compile(rb"[A-Z]+ ")  # the start of most plain HTTP, but never of TLS
REASON_PHRASES = {status.value: status.phrase for status in HTTPStatus}


@lru_cache(maxsize=1)
def http_date(second: int) -> str:
    """Format a Unix time for the Date header (RFC 9110 §6.6.1)."""
    return formatdate(second, usegmt=True)


class Connection(BaseRequestHandler):
    """One connection, from the TLS handshake to the last reply, handled in a separate thread.

    `socketserver` calls `setup`, `handle` and `finish`, in this order. By `request`, it means the
    socket of the connection.

    Other threads use the attributes that are marked as shared; see the table in the section "All
    connections". Once the deadline of a connection has passed, the accept thread hangs up on it.
    From then on, the connection ignores all input, but it can still send a last reply. The deadline
    depends on what the connection is doing (`timeout` and `keep_alive` are options of the server):

        handshake and first request             `timeout` after the connection was accepted
        waiting for another request             `keep_alive` after the previous request
        receiving a later request               `timeout` after its first byte
        running the handler                     none; the request is complete
        sending the reply, discarding a body    `timeout` after the reply was made
        after `hang_up`                         LINGER after that
        in `drain`                              2 * LINGER after it began
    """

    server: Server

    def setup(self) -> None:
        """Prepare the connection, and make it known to the server.

        May raise OSError if the client has already disconnected.
        """
        self.accepted_at = time.monotonic()  # shared
        self.deadline = self.accepted_at + self.server.options.timeout  # shared
        self.idle_since: float | None = None  # shared; when it began to wait for another request
        self.has_received_head = False  # shared; whether a complete head has ever arrived
        self.has_replied = False
        self.hung_up = False  # shared; whether the server has shut down reading
        self.evicted = False  # shared; whether the server has hung up to make room

        self.close_connection = False  # whether to close it after the current request
        self.method = ""  # of the current request, once it is known
        self.buffer = bytearray()  # received, but not yet processed
        self.body_left = 0  # bytes of the current body that are not yet processed
        self.expects_continue = False

        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        # Without this, the kernel would try for many minutes to send a reply to a dead client.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = int(self.server.options.timeout * 1000)
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        self.tls = self.server.tls_context.wrap_socket(
            self.request, server_side=True, do_handshake_on_connect=False
        )
        self.server.connections.add(self)
        if self.server.stopping:  # `stop` may have missed this connection
            self.hang_up()

    def handle(self) -> None:
        """Do the TLS handshake, and then handle one request after another.

        A client that evidently speaks plain HTTP is refused. Raises OSError if the handshake fails.
        """
        try:
            # Calling a method of the plain class, such as `socket.socket.recv`, bypasses TLS.
            first_bytes = socket.socket.recv(self.tls, 8, socket.MSG_PEEK)
            if PLAIN_HTTP.match(first_bytes):
                self.refuse_plain_http(first_bytes)
                return
            if not first_bytes:
                return  # the client has disconnected, or the server has hung up
            self.tls.do_handshake()
        except OSError:
            if self.hung_up:
                return  # no reply is possible, and no log line is needed
            raise
        with contextlib.suppress(OSError):  # a broken connection ends the loop
            while not self.close_connection:
                self.handle_request()

    def finish(self) -> None:
        """Close the connection gracefully, and make the server forget it, whatever happens."""
        try:
            self.drain()
        finally:
            self.server.connections.discard(self)
            self.tls.close()

    # -- Requests --

    def handle_request(self) -> None:
        """Handle one request. Raises OSError if the connection breaks."""
        self.close_connection = True  # until a head says otherwise
        if not self.wait_for_request():
            return
        started = time.monotonic()
        reply = self.make_reply()
        if self.evicted and not self.has_received_head:
            return  # evicted before its first head was complete: no reply and no log line

        self.server.log_request(reply, time.monotonic() - started)
        self.close_connection = self.close_connection or self.must_close()
        self.set_deadline(self.server.options.timeout)
        self.send(reply)
        if not self.close_connection:
            self.discard_body()
        self.has_replied = True
        self.set_deadline(self.server.options.keep_alive)

    def wait_for_request(self) -> bool:
        """Wait for the first bytes of a request. Return False if the connection ends instead."""
        if not self.buffer:
            if self.has_replied:
                self.idle_since = time.monotonic()
            self.buffer += self.tls.recv(RECEIVE_SIZE)
            self.idle_since = None
        if self.has_replied:  # the deadline of the first request was set in setup()
            self.set_deadline(self.server.options.timeout)
        return bool(self.buffer) and not self.hung_up

    def make_reply(self) -> Reply:
        """Read a request, and return the reply to it."""
        self.method = ""
        try:
            request = self.read_request()
        except Refusal as refusal:
            # Even if the head is incomplete, the reply to a HEAD request must not have a body.
            if not self.method and self.buffer.startswith(b"HEAD "):
                self.method = "HEAD"
            return error_reply(refusal)
        return answer(request, self.server.endpoint, utc_now)

    def must_close(self) -> bool:
        """Return whether the connection must close after the reply, whatever the head says."""
        # A client that waits for "100 Continue", and gets this reply instead, may send the body or
        # the next request.
        next_bytes_are_unknown = self.expects_continue and self.body_left > 0
        too_long_to_discard = self.body_left > self.server.options.max_body
        if next_bytes_are_unknown or too_long_to_discard:
            return True
        return self.hung_up or self.server.stopping

    def read_request(self) -> Request:
        """Return the next request, with its body unread, and remember what its head announces.

        Raises Refusal if the head is malformed, or does not arrive.
        """
        text = self.read_head()
        self.has_received_head = True
        # Set before the head is parsed, because the reply to a HEAD request must not have a body,
        # even if `parse_head` refuses the request.
        self.method = text.partition(" ")[0]
        head = parse_head(text)
        self.close_connection = not head.keep_alive
        self.body_left = head.length or 0
        self.expects_continue = head.expects_continue
        return Request(head.method, head.target, head.headers, head.length, self.read_body)

    def read_head(self) -> str:
        """Return the head of a request.

        Until the head is complete, `check_partial_head` checks what has arrived. Raises Refusal if
        this check fails, if the head is too long, or if it does not arrive.
        """
        resume_at = 0  # where the search for the end of the head resumes
        while (end := self.buffer.find(b"\r\n\r\n", resume_at)) < 0:
            check_partial_head(self.buffer, resume_at)
            # The last 3 bytes may be the start of CR LF CR LF.
            resume_at = max(0, len(self.buffer) - 3)
            self.receive("Request head")
        if end > MAX_HEAD:
            raise Refusal(431, f"Request head must be at most {MAX_HEAD} bytes long")
        head = self.buffer[:end].decode("latin-1")
        del self.buffer[: end + 4]
        return head.removeprefix("\r\n")  # one empty line may come first (RFC 9112 §2.2)

    def read_body(self) -> bytes:
        """Return the body, and remove the deadline, because the client has done its part.

        Raises Refusal if the body does not arrive: see `receive`.
        """
        if self.expects_continue and self.body_left and not self.buffer:
            with contextlib.suppress(OSError):  # if the connection is broken, receive() reports it
                self.tls.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(self.buffer) < self.body_left:
            self.receive("Body")
        body = bytes(self.buffer[: self.body_left])
        del self.buffer[: self.body_left]
        self.body_left = 0
        self.set_deadline(math.inf)
        return body

    def discard_body(self) -> None:
        """Discard what is left of the body, as it arrives, so that the next request can be read."""
        while self.body_left:
            if not self.buffer:
                self.buffer += self.tls.recv(RECEIVE_SIZE)
                if not self.buffer:
                    self.close_connection = True
                    return
            dropped = min(self.body_left, len(self.buffer))
            del self.buffer[:dropped]
            self.body_left -= dropped

    def receive(self, label: str) -> None:
        """Add received bytes to the buffer.

        If the connection ends instead, raises Refusal 408 (the deadline has passed), 503 (the
        server is stopping, or has evicted the connection to make room) or 400 (the client has
        disconnected). For 408 and 400, the message begins with the label.
        """
        received = b""
        with contextlib.suppress(OSError):
            received = self.tls.recv(RECEIVE_SIZE)
        if received and not self.hung_up:  # bytes that arrive after hanging up are too late
            self.buffer += received
            return
        self.close_connection = True
        if self.server.stopping:
            raise Refusal(503, "Shutting down")
        if self.evicted:
            # If no head has ever arrived, `handle_request` does not send this.
            raise Refusal(503, "Too many connections")
        if self.hung_up:
            seconds = self.server.options.timeout
            raise Refusal(408, f"{label} did not arrive within {seconds:g} seconds")
        raise Refusal(400, f"{label} ended early")

    # -- Replies --

    def send(self, reply: Reply) -> None:
        """Send a reply."""
        message = render_message(reply, self.close_connection, self.method == "HEAD")
        while message:  # SSLSocket.sendall() would add measurable overhead
            message = message[self.tls.send(message) :]

    def refuse_plain_http(self, first_bytes: bytes) -> None:
        """Tell a client that speaks plain HTTP to use HTTPS."""
        reply = error_reply(Refusal(400, "This port speaks HTTPS; use https://"))
        self.server.log_request(reply, 0)
        message = render_message(reply, close=True, head_only=first_bytes.startswith(b"HEAD "))
        socket.socket.sendall(self.tls, message)

    def drain(self) -> None:
        """Let the client read the last reply before the connection closes.

        Closing with unread input sends a reset, which could destroy the reply before the client has
        read it. So shut down the sending side, and read until the client closes, too. This takes at
        most 2 * LINGER seconds, because the last read starts within LINGER seconds of the call, and
        each read times out after LINGER seconds. The exception is `unwrap`, which a client can keep
        busy for longer; see below.
        """
        end = time.monotonic() + LINGER
        # OpenSSL handles some TLS records by itself. A flood of them would keep `unwrap` busy until
        # the accept thread hangs up.
        self.deadline = time.monotonic() + 2 * LINGER
        self.tls.settimeout(LINGER)
        # ValueError means that the socket was already disconnected when TLS was set up.
        with contextlib.suppress(OSError, ValueError):
            self.tls.unwrap()  # sends close_notify, and waits for that of the client
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.tls, socket.SHUT_WR)
            while time.monotonic() < end and socket.socket.recv(self.tls, RECEIVE_SIZE):
                pass

    # -- Deadlines --

    def is_interruptible(self) -> bool:
        """Return whether the server may hang up at once. Called by other threads.

        It may do so while the connection waits for another request, or until its first head is
        complete. In both cases, the client can simply connect again.
        """
        return self.idle_since is not None or not self.has_received_head

    def set_deadline(self, seconds: float) -> None:
        """Set the deadline to this many seconds from now, or LINGER if the server has hung up."""
        self.deadline = time.monotonic() + seconds
        # Checked after the assignment, which may just have replaced the deadline set by `hang_up`.
        if self.hung_up:
            self.deadline = time.monotonic() + LINGER

    def hang_up(self) -> None:
        """Make the thread of this connection end. Called by other threads, and by `setup`.

        The first call shuts down reading, which wakes up the thread. That thread then has LINGER
        seconds for a last reply. If it has not finished by then, the accept thread calls this
        again, which shuts down writing as well. (During `stop`, there is no second call, because
        the accept thread has already ended.) Both calls bypass TLS, because two threads must not
        use the TLS object at the same time.
        """
        how = socket.SHUT_RDWR if self.hung_up else socket.SHUT_RD
        self.hung_up = True
        self.deadline = time.monotonic() + LINGER
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.tls, how)


def check_partial_head(buffer: bytearray, resume_at: int) -> None:
    """Raise Refusal if an incomplete head has a bare line feed (400) or is too long (414, 431).

    A client that ends its lines with bare line feeds never sends the end of a head, so it must be
    told early. The search for line feeds starts at `resume_at`; earlier bytes were searched before.
    """
    if BARE_LF.search(buffer, resume_at):  # the lookbehind sees a CR before `resume_at`
        raise Refusal(400, "Malformed line; every line must end in CR LF")
    if len(buffer) > MAX_HEAD + 3:  # 3 bytes may belong to the CR LF CR LF that ends the head
        raise Refusal(431, f"Request head must be at most {MAX_HEAD} bytes long")
    longest_request_line = MAX_TARGET + 99  # 99 bytes are ample for the method and the version
    if len(buffer) > longest_request_line and b"\r\n" not in buffer:
        raise Refusal(414, f"Request target must be at most {MAX_TARGET} bytes long")


def render(reply: Reply) -> tuple[str, Mapping[str, str], bytes]:
    """Return the status (such as "200 OK"), the headers, and the body of a reply."""
    status = f"{reply.status} {REASON_PHRASES.get(reply.status, '')}"
    if not reply.body:
        return status, reply.headers, b""
    headers = {**reply.headers, "Content-Type": "application/json"}
    return status, headers, json.dumps(reply.body).encode()


def render_message(reply: Reply, close: bool, head_only: bool) -> bytes:
    """Return a reply as an HTTP message; with `head_only`, only the head of that message."""
    status, headers, body = render(reply)
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    connection = "close" if close else "keep-alive"
    head = (
        f"HTTP/1.1 {status}\r\nDate: {http_date(int(time.time()))}\r\n{lines}"
        f"Connection: {connection}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() if head_only else head.encode() + body


# ---- The keys file -------------------------------------------------------------------------------

DEMO_KEYS = ["segment", "segment-expired", "segment-identify-only"]
DEMO_DIGESTS = {hashlib.sha256(api_key.encode()).hexdigest() for api_key in DEMO_KEYS}


class Keyring:
    """The API keys in a keys file. `refresh` reads the file again if it has changed."""

    def __init__(self, path: str, allow_demo_keys: bool = True) -> None:
        """Read the file.

        Raises ConfigurationError if the file cannot be used, or if it contains a demo key and
        `allow_demo_keys` is false. The demo keys are public, so do not allow them on an address
        that others can reach.
        """
        self.path = path
        self.allow_demo_keys = allow_demo_keys
        self._stamp = file_stamp(path)  # taken before reading, so that no change is missed
        self.keys: Mapping[str, Key] = self._read()  # by digest; replaced as a whole

    def refresh(self, force: bool = False) -> None:
        """Read the file again if it has changed, or if `force` is true.

        If it cannot be used, log the reason, and keep the current keys. It is then not read again
        until it changes, unless the reason is a shortage of resources.
        """
        stamp = file_stamp(self.path)
        if stamp == self._stamp and not force:
            return
        self._stamp = stamp
        try:
            self.keys = self._read()
        except ConfigurationError as error:
            log.error("Keeping the previous keys: %s", error)
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in SHORTAGE_ERRNOS:
                self._stamp = ()  # no readable file has this stamp, so the next call tries again
        else:
            log.warning("Reloaded %s (keys: %d)", self.path, len(self.keys))

    def _read(self) -> dict[str, Key]:
        """Return the keys in the file, or raise ConfigurationError: see `__init__`."""
        _, keys = read_keys_file(self.path)
        has_demo_key = any(digest in keys for digest in DEMO_DIGESTS)
        if has_demo_key and not self.allow_demo_keys:
            raise ConfigurationError(
                f"{self.path} contains a demo key, which is public: use a loopback address for"
                " --bind, or make your own keys with --add-key CUSTOMER --api-keys FILE"
            )
        return keys


def file_stamp(path: str) -> tuple[int, ...]:
    """Return metadata that shows whether a file has changed, or () if it cannot be examined."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_keys_file(path: str) -> tuple[list[Any], dict[str, Key]]:
    """Return the entries of a keys file, and the keys that they describe, by digest.

    Raises ConfigurationError if the file cannot be used.
    """
    try:
        entries = parse_entries(read_regular_file(path))
        return entries, parse_keys(entries)
    except ConfigurationError:  # it is a ValueError, too, but already names the file
        raise
    except OSError as error:
        # Keyring.refresh examines the cause.
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def parse_keys(entries: list[Any]) -> dict[str, Key]:
    """Return the keys that these entries describe, indexed by digest.

    Raises ValueError, naming the entry by its number, if an entry is invalid or repeats a digest.
    """
    keys: dict[str, Key] = {}
    for number, entry in enumerate(entries, 1):
        try:
            digest, key = parse_key(entry)
            if digest in keys:
                raise ValueError("sha256 must not be repeated")
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from None
        keys[digest] = key
    return keys


def parse_entries(data: bytes) -> list[Any]:
    """Return the entries in the content of a keys file. Raises ValueError."""
    try:
        entries = json.loads(data)
    except json.JSONDecodeError as error:
        message = f"must be JSON: syntax error at line {error.lineno}, column {error.colno}"
        raise ValueError(message) from None
    except (ValueError, RecursionError):  # not UTF-8, or nested too deeply
        raise ValueError("must be JSON") from None
    if not isinstance(entries, list):
        raise ValueError("must be a JSON array")
    return entries


def parse_key(entry: Any) -> tuple[str, Key]:
    """Return one entry of a keys file as a digest and a key. Raises ValueError."""
    if not isinstance(entry, dict):
        raise ValueError("must be an object")
    if unknown := sorted(entry.keys() - {"customer", "sha256", "calls", "expires"}):
        raise ValueError(f"unknown member {short_repr(unknown[0])}")

    customer = entry.get("customer")
    if not isinstance(customer, str) or not customer or not customer.isprintable():
        raise ValueError("customer must be a non-empty string of printable characters")
    digest = entry.get("sha256")
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError("sha256 must be 64 hexadecimal digits in lower case")
    calls = optional_member(entry, "calls", parse_call_types)
    expires = optional_member(entry, "expires", parse_time)
    return digest, Key(customer, calls, expires)


def optional_member(entry: Mapping[str, Any], name: str, parse: Callable[[Any], Any]) -> Any:
    """Return a member of an entry, parsed, or None if it is missing or null. Raises ValueError."""
    value = entry.get(name)
    if value is None:
        return None
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{name} {error}") from None


def parse_call_types(names: Any) -> frozenset[str]:
    """Convert an array of call types to a set.

    Raises ValueError. Its message lacks a subject; the caller puts the name of the member first, as
    in "calls must be an array".
    """
    if not isinstance(names, list):
        raise ValueError("must be an array")
    for name in names:
        if not isinstance(name, str) or name not in CALL_TYPES:
            known = ", ".join(CALL_TYPES)
            raise ValueError(f"must contain only types of call ({known}), not {short_repr(name)}")
    return frozenset(names)


# ---- The log -------------------------------------------------------------------------------------

LOG_INTERVAL = 0.1  # seconds between two writes
MAX_LOG_BUFFER = 4_000_000  # characters


class LogBuffer(logging.Handler):
    """Buffers the log; a separate thread writes it to standard error.

    This way, standard error never delays a request. If the program that reads it stalls, the log is
    delayed, and lines beyond MAX_LOG_BUFFER are dropped. If writing fails, for example because the
    disk is full, the lines are dropped without a retry.

    The server logs requests with `write`, because a logging record for each request would halve the
    number of calls per second. Other messages go through the logger `receiver`. The function `run`
    in Part 4 attaches the LogBuffer to that logger as a handler; a program that calls `serve`
    attaches handlers of its choice.
    """

    def __init__(self) -> None:
        """Start the thread. If there is no standard error, the log is discarded."""
        super().__init__()
        self._guard = threading.Lock()  # guards _texts, _length and _dropped
        self._texts: list[str] = []
        self._length = 0
        self._dropped = 0
        self._closing = threading.Event()
        self._stream: BinaryIO | None = None
        # Standard error may be closed, or may have been replaced by something that is not a file.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            # Unbuffered, because a buffered stream, such as sys.stderr, keeps text that it failed
            # to write, and tries again later.
            self._stream = open(os.dup(sys.stderr.fileno()), "wb", buffering=0)  # noqa: SIM115
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Add complete lines to the log. If the buffer is full, they are dropped and counted."""
        with self._guard:
            if self._length + len(text) > MAX_LOG_BUFFER:
                self._dropped += text.count("\n")
                return
            self._texts.append(text)
            self._length += len(text)

    def emit(self, record: logging.LogRecord) -> None:
        """Add a logging record to the log. All its lines but the first are indented."""
        lines = self.format(record).splitlines()
        self.write(f"{utc_now()} " + "\n    ".join(map(printable, lines)) + "\n")

    def close(self) -> None:
        """Make the thread write out the buffer, and then end. Waits for at most a second."""
        self._closing.set()
        self._thread.join(1)
        super().close()

    def _run(self) -> None:
        """Write out the buffer every LOG_INTERVAL, and once more after `close`."""
        while not self._closing.wait(LOG_INTERVAL):
            self._write_out()
        self._write_out()
        if self._stream:
            self._stream.close()

    def _write_out(self) -> None:
        """Write out and empty the buffer, and then say how many lines were dropped.

        Lines that cannot be written count as dropped, and are included in a later notice.
        """
        with self._guard:
            lines = "".join(self._texts)
            dropped = self._dropped
            self._texts = []
            self._length = 0
            self._dropped = 0

        unwritten = self._write_to_stream(lines)
        dropped += unwritten.count(b"\n")
        if not dropped:
            return
        notice = f"{utc_now()} Log lines dropped: {dropped}\n"
        # After a failed write, do not even try to write the notice.
        if unwritten or self._write_to_stream(notice):
            with self._guard:
                self._dropped += dropped  # for a later notice

    def _write_to_stream(self, text: str) -> bytes:
        """Write text to standard error, and return what could not be written.

        If there is no standard error, discard the text.
        """
        data = text.encode(errors="backslashreplace")
        while data and self._stream:
            try:
                written = self._stream.write(data)
            except OSError:  # for example, because the disk is full
                return data
            if written is not None:
                data = data[written:]
                continue
            # The stream is non-blocking, and full at the moment.
            if self._closing.is_set():
                return data
            time.sleep(LOG_INTERVAL)
        return b""


def log_entry(reply: Reply, seconds: float, verbose: bool) -> str:
    """Return the log entry for a request, without the timestamp, which the caller puts in front.

    The first line has this form, in which "-" stands for a missing value:

        STATUS TYPE CUSTOMER USER EVENT-OR-NAME [OUTCOME] DURATION [MESSAGE]
        200 track demo u1 'Signed Up' duplicate 0.6 ms
        400 track demo u1 - 0.2 ms Missing event

    The outcome `stored` is left out, and only an error reply has a message. After an internal
    error, its traceback follows in indented lines. If `verbose` is true, so does the content of the
    call. Everything from outside is escaped, so that it cannot forge lines.
    """
    raw = reply.raw  # empty if the body was not parsed; its values may be of any type
    user = raw.get("user_id")
    if user is None or user == "":  # but 0 is a valid id
        user = raw.get("anonymous_id")

    words = [
        str(reply.status),
        log_word(raw.get("type")),
        log_word(reply.customer),
        log_word(user),
        log_word(raw.get("event") or raw.get("name")),
    ]
    if reply.outcome and reply.outcome != Outcome.stored:
        words.append(log_word(reply.outcome))
    words.append(f"{seconds * 1000:.1f} ms")
    if message := reply.body.get("message"):
        words.append(printable(message[:1000]))  # a destination may give a message of any length

    lines = [" ".join(words)]
    if reply.error:
        trace = "".join(format_exception(reply.error)).splitlines()
        lines += [f"    {printable(line)}" for line in trace]
    if verbose and raw:
        lines += [f"    {log_word(name)}: {json_or_repr(value)}" for name, value in raw.items()]
    return "\n".join(lines) + "\n"


def log_word(value: object) -> str:
    """Return a value as it is shown in a log line.

    None and empty text become "-". Text of up to 80 printable characters, without spaces or
    quotation marks, remains as it is. Anything else is shown as its repr, cut to 80 characters.
    """
    if value is None or value == "":
        return "-"
    if not isinstance(value, str) or len(value) > 80 or re.search("[ '\"]", value):
        return short_repr(value)
    return value if value.isprintable() else short_repr(value)


def printable(text: str) -> str:
    """Return a line of text, or its repr if any character is not printable."""
    return text if text.isprintable() else repr(text)


def json_or_repr(value: object) -> str:
    """Return a value as JSON in ASCII, or its repr if JSON cannot express it.

    A destination may have put anything into a call. Both forms escape control characters.
    """
    try:
        return json.dumps(value, default=short_repr)
    except (TypeError, ValueError, RecursionError):
        return short_repr(value)


# ---- All connections -----------------------------------------------------------------------------
#
# The main thread, the accept thread, the connection threads and the writer of a GroupCommit share
# the state in this table. Every write is a single assignment or a single change to a set; in
# CPython, both are atomic. A reader may act on an old value for a moment. Where that could do harm,
# the table says why it does not.
#
#   attribute                    written by                  read by
#   ---------------------------  --------------------------  --------------------------------------
#   Server.connections           connection threads          accept thread and stop(), which use a
#                                                            copy; a connection that stop() misses
#                                                            hangs up by itself
#   Server.tls_context           accept thread               connection threads, once each
#   Server.reload_requested      main and accept thread      accept thread
#   Server.stopping              stop()                      stop(), accept and connection threads
#   Server.on_failure            main thread                 accept thread; if that fails before
#                                                            on_failure is set, Server.failed tells
#                                                            the main thread
#   Server.failed                accept thread               main thread
#   Destination.failed           writer of a GroupCommit     accept and connection threads
#   Keyring.keys                 accept thread               accept and main thread
#   Endpoint.keys                accept thread               connection threads
#   Endpoint.maintenance         main thread                 connection threads
#   Connection.deadline          its thread and hang_up()    accept thread: it may hang up on a
#                                                            request just as its last bytes arrive;
#                                                            then the sender retries
#   Connection.idle_since and    its thread                  accept thread and stop(): they may hang
#     .has_received_head                                     up on a connection that has just become
#                                                            busy; then the sender retries
#   Connection.accepted_at       its thread, once            accept thread
#   Connection.hung_up           accept thread, stop(), and  its thread, accept thread and stop()
#                                its thread in setup()
#   Connection.evicted           accept thread               its thread
#
# The table omits what is safe by itself: GroupCommit and LogBuffer, which have locks, and
# `connection_slots`, which is a semaphore.

MIN_EVICTION_AGE = 1.0  # seconds that a new connection has for its head before it may be evicted
SHUTDOWN_GRACE = 2.0  # seconds for requests in flight
REPLY_GRACE = 0.5  # seconds for the last replies after that


class Server(ThreadingTCPServer):
    """A running receiver.

    `url` is its address. `tls_cert` is the path of its certificate; if that is self-signed, clients
    need the file to verify it. `failed` says whether it has stopped serving because of an error. A
    Server is a context manager: leaving the `with` block calls `stop`.
    """

    allow_reuse_address = True
    request_queue_size = 1024

    def __init__(self, destination: Destination | None, options: argparse.Namespace) -> None:
        """Read the certificate and the keys, listen, and start serving in background threads.

        Without a destination, calls are stored in `options.database`. Raises ConfigurationError if
        an option, or a file that it names, cannot be used.
        """
        self.options = options
        self.connections: set[Connection] = set()
        self.connection_slots = threading.Semaphore(options.max_connections)
        self.shortage_logged = False
        self.next_deadline_check = 0.0  # monotonic time
        self.next_keys_check = 0.0  # monotonic time
        self.reload_requested = False
        self.stopping = False
        self.failed = False
        self.on_failure: Callable[[], None] = lambda: None  # called when `failed` is set

        self.tls_cert = os.path.abspath(options.tls_cert)
        self.tls_context = make_tls_context(options)
        self.keyring = Keyring(options.api_keys, allow_demo_keys=options.bind.is_loopback)

        # Listen first, so that no database is created if the port is taken.
        self._listen()
        try:
            if destination is None:
                destination = Store(options.database)
        except ConfigurationError:
            self.server_close()
            raise

        self.endpoint = Endpoint(
            destination, self.keyring.keys, options.path, options.max_body, options.maintenance
        )
        self.log_buffer = LogBuffer()
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def _listen(self) -> None:
        """Open the listening socket. Raises ConfigurationError if that is not possible."""
        bind = self.options.bind
        port = self.options.port
        if self.options.reuse_port and not hasattr(socket, "SO_REUSEPORT"):
            raise ConfigurationError("argument --reuse-port: not supported by this platform")
        self.allow_reuse_port = self.options.reuse_port
        self.address_family = socket.AF_INET6 if bind.version == 6 else socket.AF_INET
        try:
            super().__init__((str(bind), port), Connection)  # creates the socket, and listens
        except OSError as error:
            message = f"cannot listen on {bind} port {port}: {error.strerror}"
            raise ConfigurationError(message) from None
        # Non-blocking, because a client may disconnect after the socket has become readable;
        # accept() would then wait for the next client.
        self.socket.setblocking(False)
        self.url = f"https://{url_host(bind)}:{self.server_address[1]}{self.options.path}"

    def _accept(self) -> None:
        """Accept connections until `stop` is called. Runs in the accept thread.

        If an exception ends the loop earlier, this method sets `failed`, stops listening, and calls
        `on_failure`.
        """
        try:
            self.serve_forever(poll_interval=0.1)
        except Exception:
            log.critical("The receiver has failed", exc_info=True)
        finally:
            if not self.stopping:
                self.failed = True
                self.server_close()
                self.on_failure()

    # -- Accepting --
    #
    # `socketserver` calls get_request, process_request and close_request. By a request, it means
    # the socket of a connection.

    def get_request(self) -> tuple[socket.socket, Any]:
        """Take a connection slot and accept a connection. `close_request` releases the slot.

        Raises BlockingIOError if no slot is free, or if no connection can be accepted. Then
        `socketserver` tries again in the next round of its loop.
        """
        if not self._take_slot():
            raise BlockingIOError
        try:
            return super().get_request()
        except (OSError, MemoryError) as error:
            self.connection_slots.release()
            if isinstance(error, MemoryError) or error.errno in SHORTAGE_ERRNOS:
                self.make_room(error)
            raise BlockingIOError from None

    def _take_slot(self) -> bool:
        """Take a connection slot, and return whether that was possible.

        If all slots are taken, evict a connection, and wait for a slot.
        """
        if self.connection_slots.acquire(blocking=False):
            return True
        evicted = self.evict_connection()
        # The thread of the evicted connection needs a moment to end. If no connection could be
        # evicted, perhaps one ends by itself.
        return self.connection_slots.acquire(timeout=1.0 if evicted else 0.1)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection. If that fails, make room, and try once more.

        If the second attempt fails, too, close the connection.
        """
        try:
            self.start_thread(request, client_address)
        except (RuntimeError, MemoryError) as error:
            self.make_room(error)
            try:
                self.start_thread(request, client_address)
            except (RuntimeError, MemoryError):
                self.shutdown_request(request)

    def start_thread(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection. Raises RuntimeError or MemoryError if that fails.

        This does not use threading.Thread: its `start` waits for the new thread to report that it
        is running, and would wait forever if that thread ran out of memory first.
        """
        _thread.start_new_thread(self.process_request_thread, (request, client_address))
        self.shortage_logged = False

    def close_request(self, request: Any) -> None:
        """Close a connection, and release its slot even if that fails."""
        try:
            super().close_request(request)
        finally:
            self.connection_slots.release()

    def evict_connection(self) -> bool:
        """Hang up on the connection that is least useful. Return whether there was one."""
        connection = least_useful(list(self.connections), time.monotonic())
        if connection is None:
            return False
        connection.evicted = True
        connection.hang_up()
        return True

    def make_room(self, error: BaseException) -> None:
        """Evict a connection and pause, because threads, memory or descriptors have run out.

        Logs the error once, and then not again until a thread has been started.
        """
        if not self.shortage_logged:
            log.error("Cannot accept more connections: %s", str(error) or "out of memory")
        self.shortage_logged = True
        self.evict_connection()
        time.sleep(0.1)  # retrying at once would keep the processor busy

    # -- Housekeeping --

    def service_actions(self) -> None:
        """Enforce deadlines, and read the keys again if they have changed.

        After `reload`, read the keys and the certificate again. The accept thread calls this in
        every round of its loop. Raises RuntimeError, which ends that thread, if the destination has
        failed.
        """
        if self.endpoint.destination.failed:
            raise RuntimeError("the destination has failed")
        now = time.monotonic()
        if now >= self.next_deadline_check:
            self.next_deadline_check = now + 0.1
            for connection in list(self.connections):
                if connection.deadline < now:
                    connection.hang_up()
        if self.reload_requested:
            self.reload_requested = False
            self.refresh_keys(force=True)
            self.refresh_certificate()
        elif now >= self.next_keys_check:
            self.next_keys_check = now + 1
            self.refresh_keys()

    def refresh_keys(self, force: bool = False) -> None:
        """Refresh the keyring, and give its keys to the endpoint."""
        self.keyring.refresh(force)
        self.endpoint.keys = self.keyring.keys

    def refresh_certificate(self) -> None:
        """Read the certificate and its key again. If they cannot be used, keep the current ones."""
        try:
            self.tls_context = make_tls_context(self.options)
        except ConfigurationError as error:
            log.error("Keeping the previous certificate: %s", error)
        else:
            log.warning("Reloaded the certificate from %s", self.options.tls_cert)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a client's error in one line, and an error of this program with its traceback."""
        error = sys.exception()
        is_internal = not isinstance(error, OSError)
        log.warning("Connection from %s failed: %s", client_address[0], error, exc_info=is_internal)

    def log_request(self, reply: Reply, seconds: float) -> None:
        """Log a request; with --quiet, only if it was refused or failed."""
        if reply.status >= 400 or not self.options.quiet:
            self.log_buffer.write(f"{utc_now()} {log_entry(reply, seconds, self.options.verbose)}")

    def toggle_maintenance(self) -> None:
        """Start or end maintenance."""
        self.endpoint.maintenance = not self.endpoint.maintenance
        is_on = self.endpoint.maintenance
        log.warning("Maintenance is %s", "on: requests are answered with 503" if is_on else "off")

    def reload(self) -> None:
        """Have the accept thread read the keys and the certificate again."""
        self.reload_requested = True

    # -- Stopping --

    def stop(self) -> None:
        """Stop accepting connections, finish the requests in flight, and close the destination.

        Idle connections end at once. So do those whose first head is incomplete; if part of it has
        arrived, they are answered with 503. After SHUTDOWN_GRACE, any request that is still
        incomplete is answered with 503. After a further REPLY_GRACE, the destination is closed even
        if handlers are still running. Further calls of this method do nothing.
        """
        if self.stopping:
            return
        self.stopping = True
        self.shutdown()  # waits until the accept thread has left its loop
        self.server_close()
        self._end_connections(SHUTDOWN_GRACE, Connection.is_interruptible)
        self._end_connections(REPLY_GRACE, lambda connection: True)
        try:
            self.endpoint.destination.close()
        except Exception:
            log.exception("The destination could not be closed")
        self.log_buffer.close()

    def _end_connections(self, seconds: float, may_hang_up: Callable[[Connection], bool]) -> None:
        """Wait until no connection is left, but for at most `seconds`.

        Meanwhile, hang up on each connection as soon as `may_hang_up` is true for it.
        """
        end = time.monotonic() + seconds
        while self.connections and time.monotonic() < end:
            for connection in list(self.connections):
                if not connection.hung_up and may_hang_up(connection):
                    connection.hang_up()
            time.sleep(0.01)  # short compared with the time limits

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()


def least_useful(connections: list[Connection], now: float) -> Connection | None:
    """Return the connection to evict, or None.

    It is the one that has been idle longest. If none is idle, it is the oldest of those that have
    not sent a complete head, unless even that one is younger than MIN_EVICTION_AGE.
    """
    idle: list[tuple[float, Connection]] = []
    without_head: list[tuple[float, Connection]] = []
    for connection in connections:
        idle_since = connection.idle_since  # read once, because its thread may change it
        if connection.hung_up:
            continue
        if idle_since is not None:
            idle.append((idle_since, connection))
        elif not connection.has_received_head and now - connection.accepted_at > MIN_EVICTION_AGE:
            without_head.append((connection.accepted_at, connection))
    oldest = min(idle or without_head, key=lambda candidate: candidate[0], default=None)
    return oldest[1] if oldest else None


def url_host(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """Return the host for a URL that reaches this address from this machine."""
    if address.is_unspecified:
        return "localhost"
    return f"[{address}]" if address.version == 6 else str(address)


def make_tls_context(options: argparse.Namespace) -> ssl.SSLContext:
    """Return a context for TLS 1.2 and 1.3 that accepts only ciphers with forward secrecy.

    Raises ConfigurationError if the certificate or its private key cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # This is for TLS 1.2. All ciphers of TLS 1.3 have forward secrecy.
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION  # renegotiating could keep the processor busy
    # Let clients disconnect without close_notify. That cannot hide a truncated body, because
    # Content-Length reveals it. OpenSSL 1.1 always permits it, and does not have this option.
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    load_certificate(context, options.tls_cert, options.tls_key)
    return context


# The reasons that OpenSSL may give when a private key does not belong to the certificate.
KEY_MISMATCH_REASONS = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}


def load_certificate(context: ssl.SSLContext, cert_path: str, key_path: str) -> None:
    """Load a certificate and its private key into a context.

    Raises ConfigurationError, with the name of the file, if one of them cannot be used.
    """
    for path in (cert_path, key_path):
        if not os.path.exists(path):
            hint = "`make certs` creates certs/localhost.pem and its key"
            raise ConfigurationError(f"{path}: No such file or directory; {hint}")
        check_regular_file(path)
        if not os.access(path, os.R_OK):  # load_cert_chain would not say which file it is
            raise ConfigurationError(f"{path}: Permission denied")
    try:
        # If no password is passed and the key is encrypted, OpenSSL prompts for one.
        context.load_cert_chain(cert_path, key_path, password="")
    except OSError as error:  # an SSLError is an OSError, too
        if isinstance(error, ssl.SSLError) and error.reason in KEY_MISMATCH_REASONS:
            reason = "the private key does not belong to the certificate"
        elif isinstance(error, ssl.SSLError) or not error.strerror:
            reason = "must be a PEM certificate and its unencrypted private key"
        else:
            reason = error.strerror
        raise ConfigurationError(f"{cert_path}, {key_path}: {reason}") from None


# ==================================================================================================
# Part 4. Entry points
#
# `serve` starts a receiver inside a program. `main` is a command-line program: it has all the
# options of `serve`, and a few more.
# ==================================================================================================


def serve(destination: Destination | None = None, **options: Any) -> Server:
    """Start a receiver in background threads, and return it.

    The result is a context manager: leaving its `with` block stops the receiver.

    The options are those of the command line except --help, --version, --add-key, --calls and
    --expires. They are written as keyword arguments: `max_body=1000` for `--max-body 1000`, and
    `quiet=True` for `--quiet`. Without a destination, calls are stored in the SQLite file that the
    option `database` names; if there is a destination, this option does not exist. The receiver
    closes the destination when it stops.

    Requests are logged to standard error, and other messages to the logger `receiver`. If an
    unexpected error ends the thread that accepts connections, the receiver stops listening, and
    sets its attribute `failed` to true. Raises ConfigurationError if an option or the destination
    cannot be used.
    """
    check_destination(destination)
    return Server(destination, options_from_keywords(options, destination))


def main(destination: Destination | None = None) -> None:
    """Run as a command-line program, which either serves until it is stopped or adds an API key.

    Exits with status 2 after a ConfigurationError, which is printed, and with 1 if the receiver
    fails.
    """
    parser = make_parser(destination)
    add_command_options(parser)
    try:
        check_destination(destination)
        options = parser.parse_args()
        if options.add_key is not None:
            add_key(options)
            return
        if options.calls is not None or options.expires is not None:
            raise ConfigurationError("--calls and --expires need --add-key")
        status = run(destination, with_default_keys(options))
    except ConfigurationError as error:
        print_note(f"{parser.prog}: {error}")
        status = 2
    if status:
        sys.exit(status)


def check_destination(destination: object) -> None:
    """Raise ConfigurationError unless this is a Destination or None."""
    if destination is not None and not isinstance(destination, Destination):
        shown = short_repr(destination)
        hint = "; did you forget ()?" if isinstance(destination, type) else ""
        raise ConfigurationError(f"destination must be a Destination, not {shown}{hint}")


# ---- Options -------------------------------------------------------------------------------------

DEMO_KEYS_FILE = "fixtures/keys.json"


def project_file(name: str) -> str:
    """Return the path of a file whose name is relative to the directory of receiver.py.

    If the file is below the current directory, the result is relative to that directory. Otherwise
    it is absolute.
    """
    path = Path(__file__).resolve().parent / name
    # The file may be elsewhere (ValueError), or the current directory may not exist (OSError).
    with contextlib.suppress(ValueError, OSError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


class Parser(argparse.ArgumentParser):
    """A parser that raises ConfigurationError instead of exiting after an error."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigurationError."""
        raise ConfigurationError(message)


def make_parser(destination: Destination | None) -> Parser:
    """Return a parser for the server options."""
    if destination is None:
        description = "Receive Segment's calls over HTTPS, and store them."
    else:
        description = (
            f"Receive Segment's calls over HTTPS, and pass them to {type(destination).__name__}."
        )
    parser = Parser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--bind",
        metavar="ADDRESS",
        type=parse_address,
        default="127.0.0.1",
        help="IPv4 or IPv6 address to listen on (default: %(default)s)",
    )
    add(
        "--port",
        type=number_between(int, 0, 65_535),
        default=8443,
        help="port to listen on; 0 takes any free port (default: %(default)s)",
    )
    add(
        "--path",
        type=parse_endpoint_path,
        default="/",
        help="path of the endpoint; requests must have exactly this path (default: %(default)s)",
    )
    add(
        "--reuse-port",
        action="store_true",
        help="let several receivers listen on one port and share its connections",
    )
    add(
        "--tls-cert",
        metavar="FILE",
        default=project_file("certs/localhost.pem"),
        help="certificate and its chain, read again after SIGHUP (default: %(default)s)",
    )
    add(
        "--tls-key",
        metavar="FILE",
        default=project_file("certs/localhost-key.pem"),
        help="private key of the certificate, read again after SIGHUP (default: %(default)s)",
    )
    # The default is filled in later, by with_default_keys. If it were given here, --add-key without
    # --api-keys would add to the demo keys.
    default_keys_path = project_file(DEMO_KEYS_FILE).replace("%", "%%")  # argparse expands %
    add(
        "--api-keys",
        metavar="FILE",
        help="JSON file with the digests of the API keys, read again when it changes"
        f" (default: {default_keys_path})",
    )
    if destination is None:
        add(
            "--database",
            metavar="FILE",
            default="calls.db",
            help="SQLite database for the calls (default: %(default)s)",
        )
    add(
        "--max-body",
        metavar="BYTES",
        type=number_between(int, 1, 2**29),
        default=524_288,
        help="longest request body to accept (default: %(default)s)",
    )
    add(
        "--timeout",
        metavar="SECONDS",
        type=number_between(float, 0.1, 86_400),
        default=10,
        help="time limit for receiving a whole request (default: %(default)s)",
    )
    add(
        "--keep-alive",
        metavar="SECONDS",
        type=number_between(float, 0.1, 86_400),
        default=75,
        help="how long a connection may be idle between requests (default: %(default)s)",
    )
    add(
        "--max-connections",
        metavar="N",
        type=number_between(int, 1, 100_000),
        default=1000,
        help="maximum number of open connections (default: %(default)s)",
    )
    add(
        "--maintenance",
        action="store_true",
        help="start in maintenance mode: answer requests with 503; SIGUSR1 toggles it",
    )
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="do not log requests that succeeded")
    volume.add_argument("--verbose", action="store_true", help="also log the content of calls")
    return parser


def add_command_options(parser: Parser) -> None:
    """Add the options that exist only on the command line."""
    add = parser.add_argument
    add(
        "--add-key",
        metavar="CUSTOMER",
        help="make an API key for CUSTOMER, add its digest to the file given by --api-keys"
        " (required here), print the key, and exit",
    )
    add(
        "--calls",
        metavar="TYPES",
        type=parse_calls_option,
        help="with --add-key: the types of call that the key permits, for example identify,track"
        " (default: all)",
    )
    add(
        "--expires",
        metavar="DATE",
        type=parse_expires_option,
        help="with --add-key: when the key expires, for example 2027-01-01 (at 00:00 UTC) or"
        " 2027-01-01T18:00Z (default: never)",
    )
    add("--version", action="version", version=f"%(prog)s {__version__}")


def options_from_keywords(
    keywords: Mapping[str, Any], destination: Destination | None
) -> argparse.Namespace:
    """Parse keyword arguments as though they were options on the command line.

    None stands for an option that was not given. An option that takes no value on the command line,
    such as --quiet, is given as True or False. Raises ConfigurationError if an option is unknown,
    or if its value is invalid.
    """
    parser = make_parser(destination)
    defaults = vars(parser.parse_args([]))  # maps the name of each option to its default
    words = []
    for name, value in keywords.items():
        if name not in defaults:
            raise ConfigurationError(f"unknown option {short_repr(name)}")
        if value is None:
            continue
        is_flag = isinstance(defaults[name], bool)
        if is_flag and not isinstance(value, bool):
            raise ConfigurationError(f"{name} must be True or False, not {short_repr(value)}")
        option = "--" + name.replace("_", "-")
        if not is_flag:
            words.append(f"{option}={value}")
        elif value:  # False means leaving out the option
            words.append(option)
    return with_default_keys(parser.parse_args(words))


def with_default_keys(options: argparse.Namespace) -> argparse.Namespace:
    """Set `options.api_keys` to the file of demo keys if it is None, and return `options`."""
    if options.api_keys is None:
        options.api_keys = project_file(DEMO_KEYS_FILE)
    return options


def parse_address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse an IP address. Raises ArgumentTypeError if the text is not an IP address."""
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        message = f"must be an IPv4 or IPv6 address, not {short_repr(text)}"
        raise argparse.ArgumentTypeError(message) from None


def number_between(
    kind: type[int] | type[float], minimum: float, maximum: float
) -> Callable[[str], float]:
    """Return a parser for numbers in this range. It raises ArgumentTypeError for anything else."""
    noun = "an integer" if kind is int else "a number"

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if minimum <= value <= maximum:
                return value
        message = f"must be {noun} from {minimum} to {maximum}, not {short_repr(text)}"
        raise argparse.ArgumentTypeError(message)

    return parse


def parse_endpoint_path(text: str) -> str:
    """Return the path of an endpoint.

    Raises ArgumentTypeError if it cannot be the path of a request, or if it is HEALTH_PATH.
    """
    if not re.fullmatch(r"/[!-~]*", text) or "?" in text or "#" in text:
        rule = "must start with a slash and contain only visible ASCII characters except ? and #"
        raise argparse.ArgumentTypeError(f"{short_repr(text)} {rule}")
    if text == HEALTH_PATH:
        message = f"must not be {HEALTH_PATH}, which is the path of the health check"
        raise argparse.ArgumentTypeError(message)
    return text


def parse_calls_option(text: str) -> list[str] | None:
    """Return the types of call in a comma-separated list, or None for `all`.

    Raises ArgumentTypeError if one of them is unknown.
    """
    if text == "all":
        return None
    names = [name.strip() for name in text.split(",")]
    try:
        parse_call_types(names)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return names


def parse_expires_option(text: str) -> str | None:
    """Return a time unchanged, after checking it, or None for `never`.

    Raises ArgumentTypeError if it is not a date or time.
    """
    if text == "never":
        return None
    try:
        parse_time(text)
    except ValueError:
        examples = "2027-01-01 or 2027-01-01T18:00Z"
        message = f"must be a date or time such as {examples}, not {short_repr(text)}"
        raise argparse.ArgumentTypeError(message) from None
    return text


# ---- Serving until SIGTERM or SIGINT -------------------------------------------------------------

FORCED_EXIT_AFTER = 9.5  # seconds; systemd, Docker and Kubernetes kill after 10 or more by default


def run(destination: Destination | None, options: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT.

    Without a destination, calls are stored in `options.database`. On SIGHUP, the server reads the
    certificate and its private key again, and also the API keys, even if their file has not
    changed. On SIGUSR1, it starts or ends maintenance.

    Returns the exit status, which is 1 if the server has failed, and otherwise 0. Raises
    ConfigurationError if an option, or a file that it names, cannot be used.
    """
    # Block the signals here and in all threads that start later, so that only sigwait gets them.
    # Threads that the destination's constructor has already started might leave them unblocked. If
    # such a thread receives one, redirect_signal passes it on.
    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with contextlib.suppress(ValueError):  # Python allows this only in the main thread
        for number in signals:
            signal.signal(number, redirect_signal)
    raise_file_limit(options.max_connections)
    avoid_preemption()
    server = Server(destination, options)
    # The log buffer is also a logging handler: have the logger's messages written there, and only
    # there.
    log.addHandler(server.log_buffer)
    log.propagate = False
    try:
        announce(server)
        handle_signals(server, signals)
        status = 1 if server.failed else 0
        stop_within_time_limit(server, status)
    finally:
        log.removeHandler(server.log_buffer)
        log.propagate = True
    return status


def handle_signals(server: Server, signals: set[signal.Signals]) -> None:
    """Do what these signals ask for, until SIGTERM or SIGINT arrives, or until the server fails."""
    server.on_failure = lambda: os.kill(os.getpid(), signal.SIGTERM)  # ends sigwait
    while not server.failed:  # it may have failed before `on_failure` was set
        received = signal.sigwait(signals)
        if received == signal.SIGHUP:
            server.reload()
        elif received == signal.SIGUSR1:
            server.toggle_maintenance()
        else:
            return


def redirect_signal(number: int, _: object) -> None:
    """Send a signal to the main thread, where sigwait gets it.

    If another thread receives the signal, Python still calls this handler in the main thread, so
    raising the signal again sends it there. Without a handler, the signal would end the process.
    """
    signal.raise_signal(number)


def stop_within_time_limit(server: Server, status: int) -> None:
    """Stop the server. If that takes too long, end the process with this status."""
    timer = threading.Timer(FORCED_EXIT_AFTER, force_exit, [server, status])
    timer.daemon = True
    with contextlib.suppress(RuntimeError):  # if no thread can be started, there is no time limit
        timer.start()
    server.stop()
    timer.cancel()


def force_exit(server: Server, status: int) -> None:
    """End the process with this status, because stopping has taken too long."""
    server.log_buffer.write(
        f"{utc_now()} Stopping has taken too long; ending the process by force\n"
    )
    time.sleep(2 * LOG_INTERVAL)  # gives the log thread time to write the message
    os._exit(status)


def raise_file_limit(max_connections: int) -> None:
    """Try to raise the limit on open files, so that it suffices for this many connections."""
    import resource  # not at the top of the file, because only Unix has it, and only `run` needs it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = max_connections + 100  # one for each connection, and some for everything else
    if soft != resource.RLIM_INFINITY and soft < wanted:
        if hard != resource.RLIM_INFINITY:
            wanted = min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def avoid_preemption() -> None:
    """Keep the thread that holds the GIL from being preempted by one that has just woken up.

    By default, the kernel may run a newly woken thread at once, although that thread can do nothing
    but wait for the GIL. SCHED_BATCH prevents this. Threads that are started later inherit it.
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # not permitted in some containers
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def announce(server: Server) -> None:
    """Print the line that says where the server listens, and log the startup hint.

    The server keeps running if standard output is closed or cannot be written to.
    """
    bind = server.options.bind
    line = f"Listening on {server.url}"
    if bind.is_unspecified:
        addresses = "every IPv4 address" if bind.version == 4 else "every address"
        line += f" (--bind {bind} means {addresses} of this machine)"
    with contextlib.suppress(OSError):
        write_to_stdout(line)
    server.log_buffer.write(startup_hint(server))


def write_to_stdout(line: str) -> None:
    """Write a line to standard output. Raises OSError if that is not possible.

    This bypasses the buffer of `sys.stdout`. Text that cannot be written would stay in the buffer,
    and cause an error at exit.
    """
    try:
        descriptor = sys.stdout.fileno()
    except (AttributeError, ValueError):  # it is None or closed
        raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from None
    os.write(descriptor, f"{line}\n".encode())


def print_note(line: str) -> None:
    """Print a line to standard error, unless that is closed."""
    if sys.stderr is not None:  # if it were None, print() would use standard output instead
        print(line, file=sys.stderr)


def startup_hint(server: Server) -> str:
    """Return a hint about what to do next, for somebody who started the server by hand."""
    options = server.options
    lines = [""]
    if options.maintenance:
        lines.append("Maintenance is on: requests are answered with 503. To end it:")
        lines.append(f"    kill -USR1 {os.getpid()}")
    sample_path = find_sample_call(server.endpoint.destination)
    if sample_path:
        lines.append("Send a call from another terminal, in the same folder:")
        lines.append(f"    {curl_command(server, sample_path)}")
    if hasattr(options, "database"):  # the option exists only if no destination was given
        query = "select received_at, type, user_id from calls order by rowid desc limit 9"
        lines.append(f"Calls are stored in {options.database}. Show the latest:")
        lines.append("    " + shlex.join(["sqlite3", options.database, query]))
    else:
        lines.append(f"Calls go to {type(server.endpoint.destination).__name__}.")
    lines += key_hint(server)
    return "\n".join(lines) + "\n\n"


def key_hint(server: Server) -> list[str]:
    """Return lines that warn about demo keys, or that there are no keys; no lines otherwise."""
    path = server.options.api_keys
    add_key_command = f"    python3 {shlex.quote(sys.argv[0])} --add-key CUSTOMER --api-keys"
    if not server.keyring.keys:
        return [
            f"Warning: {path} contains no API keys, so every call is lost.",
            "Add a key:",
            f"{add_key_command} {shlex.quote(path)}",
        ]
    if not any(digest in server.keyring.keys for digest in DEMO_DIGESTS):
        return []
    return [
        f"Warning: {path} contains demo keys, which are public.",
        "Make a key of your own, in a new file:",
        f"{add_key_command} FILE",
        "Then stop the receiver with Ctrl-C, and start it with that file:",
        f"    {shlex.join(['python3', *sys.argv, '--api-keys', 'FILE'])}",
    ]


def find_sample_call(destination: Destination) -> str:
    """Return the path of a sample call that the destination supports, or "" if there is none."""
    for call_type in ("track", "identify", "page", "group"):
        path = project_file(f"fixtures/{call_type}.json")
        if getattr(destination, call_type, None) and os.path.exists(path):
            return path
    return ""


def curl_command(server: Server, sample_path: str) -> str:
    """Return a shell command that posts a sample call to this server."""
    accepts_demo_key = hashlib.sha256(b"segment").hexdigest() in server.keyring.keys
    login = "segment:" if accepts_demo_key else "YOUR_API_KEY:"
    command = ["curl", "-i", "--cacert", server.options.tls_cert, "-u", login, server.url]
    command += ["-H", "Content-Type: application/json", "-d", f"@{sample_path}"]
    return shlex.join(command)


# ---- Adding an API key ---------------------------------------------------------------------------


def add_key(options: argparse.Namespace) -> None:
    """Make an API key, add its digest to the keys file, and print the key.

    The key itself is not stored. Standard output gets the key and nothing else; a note goes to
    standard error. Raises ConfigurationError if an option or the keys file cannot be used, or if
    the key cannot be printed. In the last case, its entry is already in the file.
    """
    path = options.api_keys
    if not path:
        raise ConfigurationError("--add-key needs --api-keys FILE, the file to add the key to")
    api_key = secrets.token_urlsafe(32)
    digest = hashlib.sha256(api_key.encode()).hexdigest()
    entry = {"customer": options.add_key, "sha256": digest}
    if options.calls is not None:
        entry["calls"] = options.calls
    if options.expires is not None:
        entry["expires"] = options.expires
    try:
        parse_key(entry)
    except ValueError as error:  # only the customer can still be invalid
        raise ConfigurationError(f"argument --add-key: {error}") from None

    try:
        append_entry(path, entry)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None
    try:
        write_to_stdout(api_key)
    except OSError as error:
        reason = f"the key could not be printed ({error.strerror})"
        raise ConfigurationError(f"{reason}; remove its entry, the last one in {path}") from None
    added = f"Added the digest of a key for {options.add_key} to {path}."
    print_note(f"{added} The key itself is not stored, so save it now.")


def append_entry(path: str, entry: Mapping[str, Any]) -> None:
    """Add an entry to a keys file, which is created with mode 0600 if it does not exist.

    The file is replaced atomically; its owner, group and mode are kept. If two programs add an
    entry at the same time, one of the entries may be lost. Raises ConfigurationError if the
    existing file cannot be used, or if there is no folder for a new one, and OSError if the file
    cannot be written; in every case, an existing file is unchanged.
    """
    entries: list[Any] = []
    old_stat = None
    if os.path.exists(path):
        old_stat = os.stat(path)
        entries, _ = read_keys_file(path)
    else:
        check_folder(path)
    entries.append(entry)
    joined = ",\n  ".join([json.dumps(each, ensure_ascii=False) for each in entries])
    text = f"[\n  {joined}\n]\n"  # one entry on each line

    target = os.path.realpath(path)  # if the path is a symbolic link, replace what it points to
    directory = os.path.dirname(target)
    # `tempfile` creates files with mode 0600.
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=directory, delete=False) as file:
        try:
            file.write(text)
            file.flush()
            if old_stat is not None:
                # The receiver may run as another user, and must still be able to read the file.
                os.chmod(file.name, stat.S_IMODE(old_stat.st_mode))
                os.chown(file.name, old_stat.st_uid, old_stat.st_gid)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


if __name__ == "__main__":
    main()
