#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""A receiver for Segment's Direct destination protocol, in one file of standard library Python.

Segment collects what its customers' users do, as calls (identify, track, page, group), and forwards each to an endpoint
of yours in an HTTPS request, its keys in snake_case, though for some customers in another casing:

    POST / HTTP/1.1
    Host: segment.example.com
    Authorization: Basic c2VnbWVudDo=
    Content-Type: application/json
    Content-Length: 76

    {"type": "track", "user_id": "u1", "event": "Signed Up", "message_id": "m1"}

The credentials are the API key that you gave the customer, a colon, and no password: here `segment:`. Segment acts on
the status of your answer. 200 (done) and 202 (will be done), with an empty body: delivered, and forgotten there. 408,
429, every 5xx but 501 and 505, and no answer within about 5 seconds: sent again, for about four hours. 501 (a type that
is not supported), 505, and all other 4xx, such as 400 (malformed), 401 (key) and 403 (permissions): dropped for good,
and `{"message": "why"}` in the reply's body, if typed application/json, is shown to the customer. So the same call may
come twice, calls come in any order, and a call that was answered 200 or 202 must never be lost.

Start it with `make run`, or use it from Python:

    class Contacts(receiver.Destination):
        def identify(self, user_id, traits, call):
            if "email" not in traits:
                raise receiver.Refusal(400, "Missing email address")    # other types of call are answered 501

    with receiver.serve(Contacts(), port=0) as server:    # a real HTTPS endpoint, in a thread
        requests.post(server.url, json=..., auth=("segment", ""), verify=server.tls_cert)

    application = receiver.wsgi(Contacts())               # the same behind any WSGI server
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import ipaddress
import json
import logging
import math
import os
import pkgutil
import queue
import re
import secrets
import signal
import socket
import sqlite3
import ssl
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from itertools import accumulate
from pathlib import Path
from socketserver import ThreadingTCPServer
from traceback import format_exception
from types import SimpleNamespace
from typing import Any, BinaryIO, NamedTuple, NoReturn

# ======================================================================================================================
# 1. The protocol
#
# What is answered to which request, and why: pure functions and small immutable values. Nothing here opens a socket, a
# file or a thread, or looks at a clock that it was not handed. The rungs that docstrings name are those of the ladder
# at its end, answer(). A port to another language needs this part, and fixtures/ (refused.json, accepted.json) to test
# it. The wording of messages is free; and what is remembered (lru_cache, KNOWN) saves time and changes no answer.
# ======================================================================================================================

# ---- What can be refused ---------------------------------------------------------------------------------------------

Clock = Callable[[], str]  # the time now, as utc() writes it

# Header fields that a status always comes with: how to log in (RFC 7617 §2), and after how many seconds to try again.
ALSO = {401: {"WWW-Authenticate": 'Basic realm="Segment calls", charset="UTF-8"'}, 503: {"Retry-After": "5"}}


class Reply(NamedTuple):
    """What is answered, and for the log what it was about."""

    status: int
    body: Mapping[str, str] = {}  # sent as application/json; if empty there is none
    fields: Mapping[str, str] = {}  # header fields of its own
    customer: str = ""  # whose key it was, once that is known
    raw: Mapping[str, Any] = {}  # the call in snake_case, once that is known
    duplicate: bool = False  # the call was taken before
    error: BaseException | None = None  # the fault of ours behind a 500, for the log only


class Refusal(Exception):  # noqa: N818 - the protocol's own word
    """A request is not accepted: the status to answer, 400 to 599, and the message that the customer will read.

    The status alone decides whether the sender drops the call or sends it again. So a fault of ours that will pass is
    never a 4xx that loses the call, and a call that can never succeed is never a 5xx but 501.
    """

    status, message = 500, "Internal error"  # of a subclass whose __init__ sets nothing else

    def __init__(self, status: int, message: str) -> None:
        if not 400 <= status <= 599:
            raise ValueError(f"a refusal's status is from 400 to 599, not {status}")
        super().__init__(status, message)
        self.status, self.message = status, message

    def reply(self) -> Reply:
        """The reply that says so."""
        return Reply(int(self.status), {"message": str(self.message)}, ALSO.get(self.status, {}))


def require(condition: object, status: int, message: str, culprit: object = None) -> None:
    """Refuse unless the condition holds. A %s in the message stands for the culprit."""
    if not condition:
        raise Refusal(status, message.replace("%s", quoted(culprit)))


def quoted(value: object) -> str:
    """Show something from outside so that it can neither flood nor forge what it is put into."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"


# ---- Who is calling --------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """What an API key opens. No file holds the key itself: it is found by its SHA-256 digest."""

    customer: str
    calls: frozenset[str] | None = None  # the types of call that it may send; None: all; empty: none
    expires: str | None = None  # as utc() writes it: at that moment it has expired


def authenticate(authorization: str, keys: Mapping[str, Key], now: Clock) -> Key:
    """The key that an Authorization header names, if it is known and has not expired (rung 5)."""
    key = keys.get(digest_of(authorization))
    if key is None:
        raise Refusal(401, "The API key is not known")
    require(key.expires is None or now() < key.expires, 401, "API token expired")
    return key


@lru_cache(maxsize=256)
def digest_of(authorization: str) -> str:
    """The digest of the API key in an Authorization header: a username, a colon, no password (RFC 7617 §2).

    The base64 is that of RFC 4648 §4, with its padding and without white space.
    """
    scheme, _, encoded = authorization.partition(" ")
    require(scheme, 401, "The Authorization header is missing")
    require(scheme.lower() == "basic", 401, "The scheme of the Authorization header is not Basic")
    try:
        api_key, colon, password = base64.b64decode(encoded.lstrip(" "), validate=True).decode().partition(":")
    except ValueError as error:
        coding = "UTF-8" if isinstance(error, UnicodeDecodeError) else "base64"
        raise Refusal(401, f"The credentials in the Authorization header are not {coding}") from None
    require(colon, 401, "The credentials in the Authorization header have no colon after the API key")
    require(not password, 401, "The password in the Authorization header is not empty: the API key is the username")
    return hashlib.sha256(api_key.encode()).hexdigest()


# ---- What they sent: the body ----------------------------------------------------------------------------------------

TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 §5.6.2
PARAMETER = rf'charset=(?:utf-8|"utf-8")|(?!charset=){TOKEN}=(?:{TOKEN}|"[^"]*")'  # §5.6.6
# application/json or a vendor's application/*+json (RFC 6839 §3.1), with any parameters, but of charsets only UTF-8.
# (*+ takes what * would, but does not try again in other ways, which could take minutes.)
JSON_TYPE = re.compile(rf"application/(?:{TOKEN}\+)?json(?:[ \t]*;[ \t]*(?:{PARAMETER})?)*+[ \t]*", re.I | re.A)
is_json = lru_cache(maxsize=64)(JSON_TYPE.fullmatch)


def parse_double(text: str) -> float:
    """A number as a double. ValueError if none can hold it, and for what Python knows beyond JSON, as NaN."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{quoted(text)} is not a number that fits a double")
    return value


def parse_whole(text: str) -> int:
    """A whole number, exact. ValueError if it is so large that it would overflow in whoever reads it as a double."""
    if len(text) > 308:
        parse_double(text)
    return int(text)


def snake_case(key: str) -> str:
    """A key in snake_case: `userId`, `UserID`, `user-id`, `User Id` and `user_id` are all `user_id`.

    A capital starts a word after a small letter or a digit, and as the last of a run before a small letter
    (`HTMLParser`: `html_parser`). A hyphen or a space is an underscore. What is a capital beyond ASCII, Unicode says.
    """
    words = ""
    for before, letter, after in zip(" " + key, key, key[1:] + " ", strict=False):
        starts = before.islower() or before.isdigit() or (before.isupper() and after.islower())
        if letter in " -" or (letter.isupper() and starts):
            words += "_"
        words += letter.strip(" -")
    return words.lower()


remembered = lru_cache(maxsize=4096)(snake_case)
KNOWN: set[str] = set()  # keys that came in snake_case before; few and short, so that nobody can fill the memory


def snake_keys(sent: dict[str, Any]) -> dict[str, Any]:
    """One object with its keys in snake_case.

    Where two keys would become one, that which is in snake_case already gets the name, else the first as sent; the
    other stays as it came, so that nothing is lost.
    """
    if KNOWN.issuperset(sent):
        return sent
    names = {key: remembered(key) if len(key) <= 64 else snake_case(key) for key in sent}
    if len(KNOWN) + len(names) <= 4096:
        KNOWN.update(key for key, name in names.items() if key == name and len(key) <= 64)
    renamed, taken = {}, set(sent)
    for key, name in names.items():
        renamed[key if name in taken else name] = sent[key]
        taken.add(name)
    return renamed


DECODER = json.JSONDecoder(
    object_hook=snake_keys, parse_int=parse_whole, parse_float=parse_double, parse_constant=parse_double
)
MAX_DEPTH = 500  # arrays and objects in each other: what the JSON parsers of Python and SQLite are sure to read


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object in UTF-8, RFC 8259 and no more, with every key at every depth in snake_case (rung 7).

    Of two keys alike the last counts. A number without a fraction and an exponent is whole, and exact; any other is a
    double. A byte-order mark is refused, and so is half of a surrogate pair.
    """
    try:
        text = data.decode().strip(" \t\r\n")  # RFC 8259 §2
        value, end = DECODER.raw_decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
        if "\\" in text:  # an escape can name half of a surrogate pair, which no database takes, nor encode()
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"{what} is not JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"{what} is not a JSON object")
    # The cheapest first; each level takes two characters at least.
    if len(text) > 2 * MAX_DEPTH and text.count("{") + text.count("[") > MAX_DEPTH and depth(text) > MAX_DEPTH:
        raise Refusal(400, f"{what} is nested more than {MAX_DEPTH} deep")
    return value


def depth(text: str) -> int:
    """How many arrays and objects are in each other in a JSON text, the outermost included."""
    brackets = re.sub(r'"(\\.|[^"\\])*"|[^\[\]{}]', "", text)
    return max(accumulate(1 if bracket in "[{" else -1 for bracket in brackets))


def parse_settings(encoded: str | None) -> dict[str, Any]:
    """What the customer has set besides the API key, in X-Segment-Settings: base64 of a JSON object (rung 7)."""
    try:
        return {} if encoded is None else parse_object(base64.b64decode(encoded, validate=True), "X-Segment-Settings")
    except ValueError:
        raise Refusal(400, "X-Segment-Settings is not base64") from None


# ---- What they sent: the call ----------------------------------------------------------------------------------------

# The types of call, and what the handler of each is given: the original four, then later ones.
CALLS: dict[str, tuple[str, ...]] = {
    "identify": ("user_id", "traits"),  # who is this?
    "track": ("user_id", "event", "properties"),  # what are they doing?
    "page": ("user_id", "name", "properties"),  # where are they doing it?
    "group": ("user_id", "group_id", "traits"),  # what group are they part of?
    "delete": ("user_id",),  # who asks to be forgotten?
    "screen": ("user_id", "name", "properties"),  # where in an app are they doing it?
    "alias": ("user_id", "previous_id"),  # who were they before?
}
NEEDED = {"track": "event", "group": "group_id", "delete": "user_id", "alias": "previous_id"}  # beside an id of a user


def an_id(value: Any) -> str | None:
    """An id as text: a whole number (1.0 and True are none) as digits; None if empty. ValueError: what it is not."""
    if type(value) is int:
        return str(value)
    if isinstance(value, str):
        return value or None
    raise ValueError("not a string or a whole number")


def a_string(value: Any) -> str:
    """A string as it is."""
    if isinstance(value, str):
        return value
    raise ValueError("not a string")


def an_object(value: Any) -> dict[str, Any]:
    """An object as it is."""
    if isinstance(value, dict):
        return value
    raise ValueError("not an object")


DATE, HOUR = r"\d{4}(-\d\d-\d\d|\d{4}|-W\d\d-\d|W\d{3})", r"([01]\d|2[0-3])"
TIME, ZONE = rf"{HOUR}(:?[0-5]\d(:?[0-5]\d([.,]\d+)?)?)?", rf"(Z|[+-]{HOUR}(:?[0-5]\d)?)"
ISO_8601 = re.compile(f"{DATE}([T ]{TIME}{ZONE}?)?", re.A)  # Python alone would take more, and more with each version
UTC_TEXT = re.compile(rf"\d{{4}}-\d\d-\d\dT{HOUR}:[0-5]\d:[0-5]\d\.\d{{3}}Z", re.A)  # the usual one, and quicker


def utc(value: Any) -> str:
    """An ISO 8601 time in UTC, cut to milliseconds, with Z: as text it sorts by time. One without a zone is in UTC.

    It is a day of the calendar, or of a week, in the years 1 to 9999, alone or with a time; each of the two has all its
    separators or none. ValueError if it is something else.
    """
    try:
        if UTC_TEXT.fullmatch(value) and datetime.fromisoformat(value):
            return str(value)
        moment = datetime.fromisoformat(value if ISO_8601.fullmatch(value) else "")
        moment = moment.astimezone(UTC) if moment.tzinfo else moment
        return moment.isoformat(timespec="milliseconds")[:23] + "Z"
    except (TypeError, ValueError, OverflowError):
        raise ValueError("not an ISO 8601 time") from None


# The fields of a call, and what is made of each, in whichever type of call it is there; None: it stays as it came.
FIELDS: dict[str, Callable[[Any], Any] | None] = {
    "type": None,
    "user_id": an_id,  # the customer's id of the user
    "anonymous_id": an_id,  # stands in for it; one of the two is there
    "event": a_string,  # track
    "name": a_string,  # page and screen
    "group_id": an_id,  # group
    "previous_id": an_id,  # alias
    "traits": an_object,  # identify: of the user; group: of the group
    "properties": an_object,  # track, page and screen
    "context": an_object,  # ip, user agent, library, campaign, ...
    "message_id": an_id,  # unique per call, the same on a retry or a replay; made here if it came without
    "timestamp": utc,  # when it happened: the time to order by
    "sent_at": utc,  # when it left the client
    "original_timestamp": None,  # what the client's clock said when it happened
    "received_at": None,  # when Segment got it (that of the database is when we did)
    "integrations": None,  # which other destinations got it
    "version": None,  # of the Spec
}
# But these are looked at only in the types of call that have them in their row: a stray name refuses no track call.
OF_SOME = {"event", "name", "group_id", "previous_id"}
CHECKS = {
    kind: {field: check for field, check in FIELDS.items() if field in row or field not in OF_SOME}
    for kind, row in CALLS.items()
}
ABSENT = dict.fromkeys(FIELDS)


class Call(SimpleNamespace):
    """One call, checked. Every one of FIELDS is an attribute, None if it is absent, null or of other types of call.

    But `traits`, `properties` and `context` are {} if absent or null. `customer` is whose key it came with, `settings`
    is what X-Segment-Settings says, and `raw` the whole object in snake_case.
    """

    duplicate = False  # a destination sets this where the call came before, and the log will say so


def make_call(raw: dict[str, Any], customer: str, settings: dict[str, Any], now: Clock) -> Call:
    """The call with each field of the right kind, and what may be absent filled in (rung 10).

    It is dated by its timestamp, else by what the client's own clock said, if that is a time at all, else by when it
    was sent, else now.
    """
    checks = CHECKS[raw["type"]]
    fields: dict[str, Any] = {**ABSENT, "traits": {}, "properties": {}, "context": {}}
    fields |= {"customer": customer, "settings": settings, "raw": raw}
    try:
        for field, value in raw.items():
            if value is not None and field in checks:
                check = checks[field]
                fields[field] = check(value) if check else value
    except ValueError as error:
        raise Refusal(400, f"The field {field} is {error}") from None
    require(fields["user_id"] or fields["anonymous_id"], 400, "The fields user_id and anonymous_id are both missing")
    needed = NEEDED.get(raw["type"])
    if needed and not fields[needed]:
        raise Refusal(400, f"The field {needed} is missing")
    if fields["timestamp"] is None:
        with suppress(ValueError):
            fields["timestamp"] = utc(fields["original_timestamp"])
    fields["timestamp"] = fields["timestamp"] or fields["sent_at"] or now()
    fields["message_id"] = fields["message_id"] or str(uuid.uuid4())
    return Call(**fields)


# ---- What to do with it ----------------------------------------------------------------------------------------------


class Destination:
    """Where calls go. A subclass supports the types of call that it has methods for, the handlers.

    Each gets the fields of its row in CALLS and then the whole call: `identify(user_id, traits, call)`. It returns
    nothing for 200, or HTTPStatus.ACCEPTED for 202; it raises Refusal to refuse; any other exception is a 500. Threads
    call it at the same time.
    """

    def close(self) -> None:
        """Called once, after the last call."""


def dispatch(handler: Callable[..., Any], call: Call) -> int:
    """The status that the handler answers (rung 11): 200 for nothing, or 200 or 202. TypeError if it is another."""
    outcome = handler(*[getattr(call, field) for field in CALLS[call.type]], call)
    if outcome not in (None, 200, 202):
        raise TypeError(f"{handler} returned {outcome!r}, which is not None, 200 or 202")
    return int(outcome or 200)


# ---- The ladder ------------------------------------------------------------------------------------------------------

HEALTH = "/health"  # for load balancers and monitors; it is no part of Segment's protocol


class Request(NamedTuple):
    """A request whose head is clean HTTP/1.x.

    That is rung 1, and the server's business: 400 if it has two readings or none, 414 or 431 if it is too long, 505 if
    it is of another version, 408 if it does not come whole in time.
    """

    method: str
    target: str  # path and query as sent
    headers: Mapping[str, str]  # names in lower case, values without blanks around them; an empty one is not absent
    length: int | None  # what Content-Length says, in bytes
    read: Callable[[], bytes]  # reads the body, once at most; Refusal 408 if it is late, 400 if it ends early


class Endpoint(NamedTuple):
    """What an answer depends on beside the request."""

    destination: Destination
    keys: Mapping[str, Key]  # by digest
    path: str = "/"
    max_body: int = 524_288  # bytes
    maintenance: bool = False


def answer(request: Request, endpoint: Endpoint, now: Clock) -> Reply:
    """The protocol: the reply to a request. Every rung of this ladder refuses the request or passes it on.

    Their order decides which of two faults is told: no key, nothing about bodies; a type that nobody supports (501)
    before one that this key may not send (403).
    """
    method, headers, customer, raw = request.method, request.headers, "", dict[str, Any]()
    try:
        path = request.target.partition("?")[0]  # rung 2
        require(path in (endpoint.path, HEALTH), 404, "There is nothing at %s", path)
        only = "GET, HEAD" if path == HEALTH else "POST"  # rung 3
        if method not in only.split(", "):
            return Reply(405, {"message": f"The method {quoted(method)} is not allowed, only {only}"}, {"Allow": only})
        require(not endpoint.maintenance, 503, "Down for maintenance")  # rung 4
        if path == HEALTH:
            return Reply(200, {"status": "ok"})
        key = authenticate(headers.get("authorization", ""), endpoint.keys, now)  # rung 5: 401
        customer = key.customer
        if request.length is None:  # rung 6; a chunked body comes without it
            raise Refusal(411, "The Content-Length header is missing")
        require(request.length <= endpoint.max_body, 413, "The body is longer than %s bytes", endpoint.max_body)
        media = headers.get("content-type", "application/json")
        require(is_json(media), 415, "The Content-Type %s is not application/json in UTF-8", media)
        coding = headers.get("content-encoding", "identity")
        require(coding.lower() == "identity", 415, "The Content-Encoding %s is not identity", coding)
        raw = parse_object(request.read(), "The body")  # rung 7: 408, 400
        settings = parse_settings(headers.get("x-segment-settings"))
        kind = raw.get("type")  # rung 8
        require(kind is not None, 400, "The field type is missing")
        require(isinstance(kind, str), 400, "The field type is not a string")
        handler = getattr(endpoint.destination, kind, None) if kind in CALLS else None
        if handler is None:
            raise Refusal(501, f"Calls of type {quoted(kind)} are not supported")
        require(key.calls is None or kind in key.calls, 403, "This API key may not send calls of type %s", kind)  # 9
        call = make_call(raw, customer, settings, now)  # rung 10: 400
        return Reply(dispatch(handler, call), customer=customer, raw=raw, duplicate=call.duplicate)  # rung 11
    except Refusal as refusal:
        return refusal.reply()._replace(customer=customer, raw=raw)
    except BaseException as error:  # a fault of ours, whatever it is, of which the outside learns nothing
        return Reply(500, {"message": "Internal error"}, {}, customer, raw, error=error)


# ======================================================================================================================
# 2. The default destination
#
# Every call in one SQLite table, synced to disk before it is acknowledged. Whatever else one wants to know is a view on
# that table: so nothing is lost, and in which order calls arrive never matters.
# ======================================================================================================================

# The traits of one user or account o: each from the newest of their calls c that sets it, be it to null, and of equals
# from the last received. `->` gives a trait's own JSON, exact to the last digit, but not if its name has a quotation
# mark. (Traits that are null as a whole have a row without a key.)
TRAITS = """(select json_group_object(trait, json(value)) from (
        select t.key as trait, row_number() over (partition by t.key order by c.timestamp desc, c.rowid desc) as age,
            coalesce(c.call -> t.fullkey, case when t.type in ('object', 'array') then t.value
                when t.type in ('true', 'false', 'null') then t.type else json_quote(t.value) end) as value
        from calls c, json_each(c.call, '$.traits') t
        where t.key is not null and c.customer = o.customer and {theirs}) where age = 1)"""
GROUP_ID = "case json_type(call, '$.group_id') when 'integer' then call -> '$.group_id' else call ->> '$.group_id' end"
CONTEXT, OWN_TRAITS, PROPERTIES = (
    f"coalesce(nullif(call -> '$.{name}', 'null'), '{{}}') as {name}" for name in ("context", "traits", "properties")
)
COMMON = f"customer, message_id, user_id, anonymous_id, timestamp, received_at, {CONTEXT}"
FIRST_LAST = "min(timestamp) as first_seen, max(timestamp) as last_seen"

APPLICATION_ID, SCHEMA_VERSION = 0x5365676D, 1  # "Segm": in the header of the database files that are ours
# received_at is when this receiver got a call; private_beta is Segment's condition for listing a destination publicly.
SCHEMA = f"""
create table calls (customer text not null, message_id text not null, type text not null, user_id text,
    anonymous_id text, timestamp text not null, received_at text not null, call text not null,
    primary key (customer, message_id));
create index calls_by_user on calls (user_id, customer, type, timestamp);
create index calls_by_group on calls ({GROUP_ID}, customer, timestamp, user_id) where type = 'group';
create view identifies as select {COMMON}, {OWN_TRAITS} from calls where type = 'identify';
create view tracks as select {COMMON}, call ->> '$.event' as event, {PROPERTIES} from calls where type = 'track';
create view pages as select {COMMON}, call ->> '$.name' as name, {PROPERTIES} from calls where type = 'page';
create view groups as select {COMMON}, {GROUP_ID} as group_id, {OWN_TRAITS} from calls where type = 'group';
create view users as select customer, user_id,
    {TRAITS.format(theirs="c.user_id = o.user_id and c.type = 'identify'")} as traits, {FIRST_LAST}
    from calls o where user_id is not null group by user_id, customer;
create view accounts as select customer, group_id,
    {TRAITS.format(theirs=f"{GROUP_ID} = o.group_id and c.type = 'group'")} as traits,
    count(distinct user_id) as members, {FIRST_LAST} from groups o group by group_id, customer;
create view private_beta as select count(distinct customer) as customers, count(*) as events,
    count(distinct customer) >= 10 or count(*) > 20000000 as fulfilled from calls;
pragma application_id = {APPLICATION_ID};
pragma user_version = {SCHEMA_VERSION}"""
SAVE = """insert into calls values (:customer, :message_id, :type, :user_id, :anonymous_id, :timestamp,
    strftime('%Y-%m-%dT%H:%M:%fZ', 'now'), :call) on conflict (customer, message_id) do nothing"""
FORGET = "delete from calls where customer = :customer and user_id = :user_id"

SAME_FILE = "st_dev", "st_ino"  # both are the same as long as a path leads to the same file
# Seconds to wait for a lock that another program has, and for a call to be stored. The second is over twice the first,
# as the calls before it may wait for the lock too, and less than the 5 that the sender waits.
LOCK_WAIT, ANSWER_WAIT = 2.0, 4.5
AS_TEXT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# A statement that waits to be written, its values, and whom to tell how many rows it changed, or which error it was.
Change = tuple[str, Mapping[str, Any], Callable[[int | Exception], None]]

log = logging.getLogger("receiver")


class ConfigurationError(ValueError):
    """An option, or a file that it names, cannot be used; the message is one line that says which and why."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(letter if letter.isprintable() else " " for letter in message))


class Store(Destination):
    """Keeps each call in an SQLite file, once by customer and message_id; screen and alias it does not support.

    What it has taken is on disk. Syncing is what costs, so the calls that wait at the same moment share a transaction,
    which one thread writes.
    """

    def __init__(self, path: str = "calls.db") -> None:
        """ConfigurationError if the file is no database of ours, which is then left as it is."""
        try:
            self._db = open_database(path)
        except (OSError, sqlite3.Error) as error:
            raise ConfigurationError(f"{path}: {error}") from None
        self._path = os.path.abspath(path)
        self._file = look(self._path, *SAME_FILE)
        self._waiting: queue.SimpleQueue[Change | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, daemon=True)
        self._writer.start()

    def _keep(self, *fields: Any) -> None:
        call: Call = fields[-1]
        call.duplicate = not self._change(SAVE, {**vars(call), "call": AS_TEXT(call.raw)})

    identify = track = page = group = _keep

    def delete(self, user_id: str, call: Call) -> None:
        """Forget everything of this user of this customer."""
        self._change(FORGET, vars(call))

    def _change(self, statement: str, values: Mapping[str, Any]) -> int:
        """How many rows a statement changed, once that is on disk. Refusal 503 if it cannot be now."""
        answers: queue.SimpleQueue[int | Exception] = queue.SimpleQueue()
        self._waiting.put((statement, values, answers.put))
        try:
            outcome = answers.get(timeout=ANSWER_WAIT)
        except queue.Empty:  # if it still is stored, its retry is a duplicate
            raise Refusal(503, "The call could not be stored in time") from None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _write(self) -> None:
        """Write what waits, one transaction after another, until close()."""
        batch: list[Change | None] = []
        while None not in batch:  # that is what close() puts
            batch = [self._waiting.get()]
            while not self._waiting.empty():  # this ends: each thread waits for one change at the most
                batch.append(self._waiting.get())
            self._commit([change for change in batch if change])
        self._db.close()

    def _commit(self, batch: list[Change]) -> None:
        """Write these changes in one transaction and tell each what came of it. An error in one is its own."""
        outcomes: list[int | Exception] = []
        try:
            self._db.execute("begin immediate")
            if look(self._path, *SAME_FILE) != self._file:  # deleted or replaced: what is written now would be lost
                raise FileNotFoundError(f"{self._path} is not the file that was opened at the start")
            for statement, values, _ in batch:
                try:
                    outcomes.append(self._db.execute(statement, values).rowcount)
                except (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError, ValueError) as error:
                    outcomes.append(error)  # of this change alone, as if a text is too large for SQLite
            self._db.execute("commit")
        except Exception as error:  # whatever it is, the next transaction may succeed
            log.error("%d calls could not be stored: %s", len(batch), error)
            outcomes = [Refusal(503, "The call could not be stored for now") for _ in batch]
            with suppress(sqlite3.Error):
                self._db.execute("rollback")
        for (_, _, tell), outcome in zip(batch, outcomes, strict=True):
            tell(outcome)

    def close(self) -> None:
        """Write what was taken, and close the file."""
        self._waiting.put(None)
        self._writer.join(ANSWER_WAIT)


def look(path: str, *fields: str) -> list[int]:
    """These fields of a file's status, as os.stat() names them; none if there is no file, as for one in memory."""
    with suppress(OSError):
        status = os.stat(path)
        return [getattr(status, field) for field in fields]
    return []


def open_database(path: str) -> sqlite3.Connection:
    """A connection to the database, which is made if it is not there. ConfigurationError if it is not ours."""
    header = b""
    with suppress(FileNotFoundError), open(path, "rb") as file:
        header = file.read(100)  # by hand, as SQLite would change some files by only opening them
    if not header and os.path.exists(f"{path}-wal"):  # SQLite would delete it, and the calls that are in it alone
        raise ConfigurationError(f"{path}-wal is there, but not the {path} that it belongs to: move both, or none")
    if header and (header[:16] != b"SQLite format 3\0" or int.from_bytes(header[68:72]) != APPLICATION_ID):
        raise ConfigurationError(f"{path}: this is not a database of calls")
    if header and int.from_bytes(header[60:64]) != SCHEMA_VERSION:
        raise ConfigurationError(f"{path}: this database is of another version of the schema than {SCHEMA_VERSION}")
    db = sqlite3.connect(path, timeout=LOCK_WAIT, isolation_level=None, check_same_thread=False)
    try:
        # The schema comes before WAL mode, so that after a crash in between the file still says whose it is.
        db.execute("begin immediate")
        if db.execute("pragma user_version").fetchone() == (0,):
            for statement in SCHEMA.split(";"):
                db.execute(statement)
        db.execute("commit")
        db.execute("pragma journal_mode = wal")
        db.execute("pragma synchronous = full")  # a commit returns when it is on disk
        db.execute("pragma secure_delete = on")  # who is forgotten is in no unused page
        db.execute("pragma wal_autocheckpoint = 4000")  # pages: to copy them to the file by the thousand is cheaper
    except sqlite3.Error:
        db.close()
        raise
    return db


# ======================================================================================================================
# 3. The server
#
# HTTP/1.1 over TLS, on http.server and ssl, with a thread for each connection. Sockets block, as that is fastest; each
# connection has a deadline instead, past which the server's own thread hangs up, so that no client takes for ever.
# ======================================================================================================================

# ---- Rung 1: the head of a request -----------------------------------------------------------------------------------
#
# The parser of http.server takes much that another program on the way reads differently, which is how requests are
# smuggled. So this is the grammar of RFC 9112 and no more, and whatever it does not know ends the connection.

MAX_TARGET, MAX_HEAD, MAX_FIELDS = 8192, 65_536, 100
request_line = lru_cache(maxsize=64)(re.compile(rf"({TOKEN}) ([!-~]+) HTTP/([0-9])\.([0-9])").fullmatch)  # §3
FIELD_LINE = re.compile(rf"({TOKEN}):([\t -~\x80-\xff]*)")  # §5, without the obsolete folding of §5.2
BARE_LF = re.compile(rb"(?<!\r)\n")  # §2.2
ONLY_ONCE = {"host", "content-length", "content-type", "authorization"}  # where two would be two readings


def parse_head(head: str, read: Callable[[], bytes]) -> tuple[Request, bool]:
    """The request with this head, and whether the connection persists. Refusal if there are two readings, or none."""
    line, *lines = head.split("\r\n")
    parts = request_line(line)
    if not parts:
        raise Refusal(400, "The request line is not a method, a target and HTTP/1.1, with single blanks")
    method, target, major, minor = parts.groups()
    require(len(target) <= MAX_TARGET, 414, "The target is longer than %s bytes", MAX_TARGET)
    require(major == "1", 505, "Only HTTP/1.1 and HTTP/1.0 are spoken here")
    headers = parse_fields(lines)
    require(minor == "0" or "host" in headers, 400, "The Host header is missing")  # §3.2
    length = parse_length(headers.get("content-length"))
    chunked = "transfer-encoding" in headers
    require(length is None or not chunked, 400, "There are both a Transfer-Encoding and a Content-Length")  # §6.1
    if minor == "0":
        headers.pop("expect", None)  # RFC 9110 §10.1.1
    wishes = headers.get("connection", "").lower()
    persists = "close" not in wishes and (minor != "0" or "keep-alive" in wishes) and not chunked  # §9.3
    return Request(method, target, headers, length, read), persists


def parse_fields(lines: list[str]) -> dict[str, str]:
    """The header fields by names in lower case; the values of one name are joined by commas (RFC 9110 §5.3)."""
    require(len(lines) <= MAX_FIELDS, 431, "There are more than %s header fields", MAX_FIELDS)
    headers: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        field = parse_field(line)
        if field is None:
            raise Refusal(400, f"Header line {number} is not a name, a colon and a value")
        name, value = field
        if name in headers:
            require(name not in ONLY_ONCE, 400, "The header %s is there twice", name)
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return headers


@lru_cache(maxsize=64)  # few, as each may be as long as a head
def parse_field(line: str) -> tuple[str, str] | None:
    """The name, in lower case, and the value in a line of the head; None if it is not that."""
    parts = FIELD_LINE.fullmatch(line)  # blanks included: to try all ways to leave them out could take minutes
    return parts and (parts[1].lower(), parts[2].strip(" \t"))


def parse_length(text: str | None) -> int | None:
    """A Content-Length in bytes (RFC 9110 §8.6)."""
    if text is None:
        return None
    require(text.isascii() and text.isdigit(), 400, "The Content-Length %s is not plain digits", text)
    return int(text) if len(text) < 20 else sys.maxsize  # too long anyway, and int() takes no thousands of digits


# ---- One connection --------------------------------------------------------------------------------------------------

CHUNK = 16_384  # bytes: the most that one record of TLS holds
LINGER = 2.0  # seconds that a client has to read the last reply
REASONS = {status.value: status.phrase for status in HTTPStatus}


@lru_cache(maxsize=1)
def dates(second: int) -> tuple[str, str]:
    """A second as the Date of a reply has it (RFC 9110 §6.6.1), and as utc() does but for the milliseconds."""
    return formatdate(second, usegmt=True), time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def utc_now() -> str:
    """The time now, as utc() writes it."""
    milliseconds = time.time_ns() // 1_000_000
    return f"{dates(milliseconds // 1000)[1]}.{milliseconds % 1000:03d}Z"


class Connection(BaseHTTPRequestHandler):
    """One client's connection in a thread of its own, from the handshake to the last reply.

    Of BaseHTTPRequestHandler it keeps the loop; reading and writing are its own, to be strict and quick.
    """

    server: Server

    def setup(self) -> None:
        """Prepare TLS; the handshake comes once the server knows this connection and its deadline."""
        self.deadline = time.monotonic() + self.server.options.timeout  # when the server hangs up
        self.idle_since = math.inf  # since when it waits for a request to begin, if it does
        self.served = self.hung_up = False  # has had a request; the server has hung up
        self.buffer = bytearray()  # what was received and not yet read
        self.unread, self.expects = 0, False  # bytes of the body still to read; the client wants a "100 Continue"
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # else Linux keeps replies that nobody reads, megabytes, for minutes
            patience = int(self.server.options.timeout * 1000)  # milliseconds
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience)
        self.tls = self.server.context.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
        self.server.connections.add(self)

    def handle(self) -> None:
        """The handshake, and then one request after another."""
        self.tls.do_handshake()
        with suppress(OSError):  # the client is gone
            super().handle()

    def handle_one_request(self) -> None:
        """One request and its reply; then close_connection says whether it was the last."""
        self.close_connection, options = True, self.server.options
        if not self.buffer:
            self.idle_since = time.monotonic()
            self.buffer += self.tls.recv(CHUNK)
        self.idle_since = math.inf
        if not self.buffer:
            return  # the client has gone, or was silent for too long
        if self.served:  # the deadline of the first request began before the handshake
            self.deadline = time.monotonic() + options.timeout
        self.command = ""  # a head that is refused has none
        reply = self.server.receiver.reply(self.read_request)
        # The connection ends too where nobody knows whether a refused body comes, and where it is too long to skip.
        if self.server.stopping or self.hung_up or (self.unread and (self.expects or self.unread > options.max_body)):
            self.close_connection = True
        self.deadline = time.monotonic() + options.timeout
        self.send(reply)
        if self.unread and not self.close_connection:
            with suppress(Refusal):
                self.read_body()  # of a refused request, to get past it
        self.served, self.deadline = True, time.monotonic() + options.keep_alive

    def read_request(self) -> Request:
        """The request, its body not read yet. Refusal if it is none."""
        request, persists = parse_head(self.read_head(), self.read_body)
        self.close_connection = not persists
        self.command, self.unread = request.method, request.length or 0
        self.expects = request.headers.get("expect", "").lower() == "100-continue"
        return request

    def receive(self, what: str) -> None:
        """Add what comes next to the buffer, in the middle of a request. Refusal if nothing does."""
        before = len(self.buffer)
        with suppress(OSError):  # the client is gone
            self.buffer += self.tls.recv(CHUNK)
        if self.hung_up or len(self.buffer) == before:
            self.close_connection = True
            require(not self.server.stopping, 503, "Shutting down")
            require(not self.hung_up, 408, f"{what} did not come within {self.server.options.timeout:g} seconds")
            raise Refusal(400, f"{what} ended early")

    def read_head(self) -> str:
        """The head, up to the empty line that ends it. Refusal if it does not come whole."""
        # What is wrong is refused at once, not when the rest is late; and no byte is looked at twice, however few come.
        looked = 0
        while (end := self.buffer.find(b"\r\n\r\n", looked)) < 0 or end > MAX_HEAD:
            require(not BARE_LF.search(self.buffer, looked), 400, "A line of the head does not end in CR LF")
            require(len(self.buffer) <= MAX_HEAD, 431, "The head is longer than %s bytes", MAX_HEAD)
            in_line = len(self.buffer) > MAX_TARGET + 99 and b"\r\n" not in self.buffer  # 99: method and version
            require(not in_line, 414, "The target is longer than %s bytes", MAX_TARGET)
            looked = max(0, len(self.buffer) - 3)
            self.receive("The head")
        head = self.buffer[:end].decode("latin-1")
        del self.buffer[: end + 4]
        return head.removeprefix("\r\n")  # an empty line before a request (RFC 9112 §2.2)

    def read_body(self) -> bytes:
        """The body. The deadline is over then: what follows is our own work."""
        if self.expects and self.unread and not self.buffer:
            with suppress(OSError):
                self.tls.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(self.buffer) < self.unread:
            self.receive("The body")
        body = bytes(self.buffer[: self.unread])
        del self.buffer[: self.unread]
        self.unread, self.deadline = 0, math.inf
        return body

    def send(self, reply: Reply) -> None:
        """Send a reply, in one write if the connection takes it."""
        status, fields, body = rendered(reply)
        lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()]) if fields else ""
        head = (
            f"HTTP/1.1 {status}\r\nDate: {dates(int(time.time()))[0]}\r\n{lines}"
            f"Connection: {'close' if self.close_connection else 'keep-alive'}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        data = head.encode() + (body if self.command != "HEAD" else b"")
        while data:  # sendall() costs more than this loop
            data = data[self.tls.send(data) :]

    def hang_up(self) -> None:
        """End the reading, from the thread of the server; a reply can still go out. Called again, end all of it.

        It is the plain socket's shutdown, as that of SSLSocket would end the encryption that the other thread uses.
        """
        how = socket.SHUT_RDWR if self.hung_up else socket.SHUT_RD
        self.hung_up, self.deadline = True, time.monotonic() + LINGER
        with suppress(OSError):
            socket.socket.shutdown(self.tls, how)

    def finish(self) -> None:
        """Close, but let the client read the last reply before: a close on unread bytes is a reset, and may undo it."""
        end = time.monotonic() + LINGER
        self.tls.settimeout(LINGER)
        with suppress(OSError, ValueError):
            self.tls.unwrap()  # TLS's goodbye
        with suppress(OSError):
            socket.socket.shutdown(self.tls, socket.SHUT_WR)
            while time.monotonic() < end and socket.socket.recv(self.tls, CHUNK):
                pass
        self.server.connections.discard(self)
        self.tls.close()


def rendered(reply: Reply) -> tuple[str, Mapping[str, str], bytes]:
    """A reply as HTTP has it: the status with its reason, its own header fields, and the body."""
    body = json.dumps(reply.body).encode() if reply.body else b""
    fields = {**reply.fields, "Content-Type": "application/json"} if body else reply.fields
    return f"{reply.status} {REASONS.get(reply.status, '')}", fields, body


def plain(word: object) -> str:
    """A word of a log line: as it is if it is one printable word, else escaped; a hyphen if there is none."""
    if isinstance(word, str) and len(word) <= 80 and word.isprintable() and " " not in word:
        return word or "-"
    return quoted(word) if word else "-"


# ---- An endpoint in service, and its keys file -----------------------------------------------------------------------

DEMO_KEYS = {hashlib.sha256(key).hexdigest() for key in (b"segment", b"segment-expired", b"segment-identify-only")}
CHANGES = "st_ctime_ns", "st_ino"  # one of the two is another whenever a file's text is


def parse_keys(text: str) -> dict[str, Key]:
    """The text of a keys file as keys by digest. ValueError names the entry that is wrong."""
    entries, keys = json.loads(text), dict[str, Key]()
    if not isinstance(entries, list):
        raise ValueError("it is not a JSON array")
    for number, entry in enumerate(entries, 1):
        try:
            digest, key = parse_key(**entry)  # Python itself refuses a member that is missing or that nobody knows
        except (TypeError, ValueError) as error:
            raise ValueError(f"entry {number}: {error}") from None
        if digest in keys:
            raise ValueError(f"entry {number}: this sha256 was there before")
        keys[digest] = key
    return keys


def parse_key(customer: str, sha256: str, calls: list[str] | None = None, expires: Any = None) -> tuple[str, Key]:
    """One entry of a keys file. TypeError or ValueError says what is wrong with it."""
    if not (isinstance(customer, str) and customer and customer.isprintable()):
        raise ValueError("customer is not a name")
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError("sha256 is not 64 hexadecimal digits in small letters")
    if calls is not None and not (isinstance(calls, list) and CALLS.keys() >= set(calls)):
        raise ValueError(f"calls is not an array of {', '.join(CALLS)}")
    try:
        expires = None if expires is None else utc(expires)
    except ValueError as error:
        raise ValueError(f"expires is {error}") from None
    return sha256, Key(customer, None if calls is None else frozenset(calls), expires)


class Receiver:
    """An endpoint in service: what the server and the WSGI callable share."""

    def __init__(self, destination: Destination | None, options: argparse.Namespace) -> None:
        """ConfigurationError if what the options name cannot be used."""
        log.setLevel(logging.WARNING if options.quiet else logging.DEBUG if options.verbose else logging.INFO)
        self.options = options
        self.seen = look(options.api_keys, *CHANGES)  # before it is read, so that no change goes unseen
        self.trouble = ""  # with the keys file, when it was last read
        self.changing = threading.Lock()  # held by who puts another endpoint in place of the one in force
        # Where lines about requests go, which the server flushes; without it they are log records, each of which costs
        # half of a request. It takes bytes, as a text stream that threads share can lose lines, and show what else is
        # in memory (CPython's issue 118138).
        self.lines: BinaryIO | None = None
        keys = self.read_keys()
        if destination is None:
            destination = load_destination(options.destination) if options.destination else Store(options.database)
        self.endpoint = Endpoint(destination, keys, options.path, options.max_body, options.maintenance)

    def read_keys(self) -> dict[str, Key]:
        """The keys. ConfigurationError if the file is broken, or opens a public address to everybody."""
        path, bind = self.options.api_keys, self.options.bind
        try:
            keys = parse_keys(Path(path).read_text("utf-8"))
        except Exception as error:  # whatever it is: the thread that accepts connections must not end of it
            raise ConfigurationError(f"{path}: {error}") from None
        if DEMO_KEYS & keys.keys() and not bind.is_loopback:
            how = "make keys of your own with --add-key CUSTOMER --api-keys FILE"
            raise ConfigurationError(f"{path} holds a demo key, which everybody knows: to listen on {bind}, {how}")
        return keys

    def reload_keys(self, always: bool = False) -> None:
        """Read the keys again if the file has changed; if that fails those that are in force stay."""
        with self.changing:
            seen, self.seen = self.seen, look(self.options.api_keys, *CHANGES)
            if seen == self.seen and not always:
                return
            try:
                self.endpoint = self.endpoint._replace(keys=self.read_keys())
                self.trouble = ""
                log.warning("%d keys read from %s", len(self.endpoint.keys), self.options.api_keys)
            except ConfigurationError as error:
                if always or str(error) != self.trouble:  # once
                    log.error("The keys stay as they were: %s", error)
                self.trouble, self.seen = str(error), []  # try again soon: a key that was taken out must not stay valid

    def reply(self, read_request: Callable[[], Request]) -> Reply:
        """The reply to a request that is still to be read; it is then a line in the log."""
        started = time.monotonic()
        try:
            reply = answer(read_request(), self.endpoint, utc_now)
        except Refusal as refusal:
            reply = refusal.reply()
        self.log(reply, started)
        return reply

    def log(self, reply: Reply, started: float) -> None:
        """One line about a request: what was answered, to which call of whom, how long it took, and why not 2xx."""
        if reply.status < 400 and self.options.quiet:
            return
        raw, why, took = reply.raw, reply.body.get("message", "")[:1000], (time.monotonic() - started) * 1000
        user, what = raw.get("user_id") or raw.get("anonymous_id"), raw.get("event") or raw.get("name")
        about = f"{plain(raw.get('type'))} {plain(reply.customer)} {plain(user)} {plain(what)}"
        text = f"{reply.status} {about}{' duplicate' if reply.duplicate else ''} {took:.1f} ms"
        if why:
            text += f" {why if why.isprintable() else quoted(why)}"
        if reply.error:  # indented and escaped, as its message may quote what came from outside
            trace = "".join(format_exception(reply.error)).splitlines()
            text += "".join(f"\n    {line if line.isprintable() else repr(line)}" for line in trace)
        if self.lines:
            with suppress(OSError):  # a log that is full stops nothing
                self.lines.write(f"{utc_now()} {text}\n".encode())
        else:
            log.log(logging.INFO if reply.status < 400 else logging.WARNING, "%s", text)
        if raw and self.options.verbose:
            members = (f"    {json.dumps(name)}: {json.dumps(value, default=repr)}" for name, value in raw.items())
            log.debug("{\n%s\n}", ",\n".join(members))

    def toggle_maintenance(self) -> None:
        """Stop taking calls, or take them again."""
        with self.changing:
            self.endpoint = self.endpoint._replace(maintenance=not self.endpoint.maintenance)
        log.warning("Maintenance is %s", "on" if self.endpoint.maintenance else "off")


# ---- All connections -------------------------------------------------------------------------------------------------


class Server(ThreadingTCPServer):
    """A listening socket and its connections, in threads: `url`, `tls_cert` to verify it by, and `stop()`."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 1024

    def __init__(self, destination: Destination | None, options: argparse.Namespace) -> None:
        """ConfigurationError if what the options name cannot be used."""
        self.options, self.tls_cert, self.context = options, options.tls_cert, tls_context(options)
        self.receiver = Receiver(destination, options)
        self.connections: set[Connection] = set()
        self.places = threading.Semaphore(options.max_connections)
        self.stopping, self.next_look, bind = False, 0.0, options.bind
        self.address_family = socket.AF_INET6 if bind.version == 6 else socket.AF_INET
        try:
            super().__init__((str(bind), options.port), Connection)
        except OSError as error:
            self.receiver.endpoint.destination.close()
            raise ConfigurationError(f"cannot listen on {bind}, port {options.port}: {error}") from None
        self.socket.setblocking(False)  # so that a client who goes before it is accepted does not hold up the others
        host = f"[{bind}]" if bind.version == 6 else bind
        self.url = f"https://{host}:{self.server_address[1]}{options.path}"
        threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True).start()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection, if it has a place or the longest idle one can make room; OSError if not now."""
        if not self.places.acquire(blocking=False):
            patience = 0.1
            idle = min(list(self.connections), key=lambda connection: connection.idle_since, default=None)
            if idle and idle.idle_since < math.inf:
                idle.hang_up()
                patience = 1  # let it go before another has to
            if not self.places.acquire(timeout=patience):
                raise BlockingIOError
        try:
            return super().get_request()
        except OSError:
            self.places.release()
            time.sleep(0.01)  # when file descriptors have run out, trying at once again would take the whole core
            raise

    def close_request(self, request: Any) -> None:
        """Give back the place of a connection that is over."""
        super().close_request(request)
        self.places.release()

    def service_actions(self) -> None:
        """Look for a changed keys file and for connections past their deadline; called several times a second."""
        now = time.monotonic()
        if now > self.next_look:
            self.next_look = now + 0.1
            self.receiver.reload_keys()
            if self.receiver.lines:
                with suppress(OSError):
                    self.receiver.lines.flush()
            for connection in list(self.connections):  # a copy, as other threads change the set
                if connection.deadline < now:
                    connection.hang_up()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log in one line what the client did to the connection, and with its traceback what we did."""
        error = sys.exception()
        log.warning("Connection with %s: %s", client_address[0], error, exc_info=not isinstance(error, OSError))

    def reload(self) -> None:
        """Read keys and certificate again. Connections go on; a broken file leaves the old one in force."""
        self.receiver.reload_keys(always=True)
        try:
            self.context = tls_context(self.options)
            log.warning("Certificate read from %s", self.tls_cert)
        except ConfigurationError as error:
            log.error("The certificate stays as it was: %s", error)

    def stop(self) -> None:
        """Accept no more, finish what is in flight, in 5 seconds at the most, and then close the destination."""
        self.stopping, end = True, time.monotonic() + ANSWER_WAIT
        self.shutdown()
        self.server_close()
        while self.connections and time.monotonic() < end + 0.5:  # the last of it is for saying 503
            for connection in list(self.connections):
                if not connection.hung_up and (connection.idle_since < math.inf or time.monotonic() > end):
                    connection.hang_up()
            time.sleep(0.01)
        self.receiver.endpoint.destination.close()

    def __exit__(self, *_: object) -> None:
        self.stop()


def tls_context(options: argparse.Namespace) -> ssl.SSLContext:
    """TLS 1.2 and 1.3, with forward secrecy only. ConfigurationError if the certificate or its key cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")  # for 1.2; all of 1.3 are like that
    context.set_alpn_protocols(["http/1.1"])
    # Who leaves without TLS's goodbye can still be answered, as Content-Length tells whether all has come.
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_IGNORE_UNEXPECTED_EOF
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key, password="")  # "": do not ask at the terminal
    except OSError as error:
        hint = "; `make certs` makes a self-signed pair" if isinstance(error, FileNotFoundError) else ""
        raise ConfigurationError(f"{options.tls_cert}, {options.tls_key}: {error}{hint}") from None
    return context


# ======================================================================================================================
# 4. Other ways in
#
# The same endpoint from Python: in a thread, as tests want it, and behind any WSGI server.
# ======================================================================================================================


def serve(destination: Destination | None = None, **options: Any) -> Server:
    """Start an HTTPS endpoint in threads; leaving it as a context stops it.

    The options are those of the command line, with underscores for hyphens. ConfigurationError if one cannot be used.
    """
    return Server(destination, parse_options(options))


def wsgi(destination: Destination | None = None, **options: Any) -> Callable[..., Iterable[bytes]]:
    """A WSGI callable (PEP 3333) that gives the same answers; the options are those that do not concern connections.

    The grammar of the head, TLS and timeouts are the business of the WSGI server. Make it in the process that serves,
    as no Store survives a fork. ConfigurationError as in serve().
    """
    receiver = Receiver(destination, parse_options(options))

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        receiver.reload_keys()
        status, fields, body = rendered(receiver.reply(lambda: parse_environ(environ)))
        # The Content-Type of an empty body is for wsgiref's validator, which wants one.
        always = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        start_response(status, list({**fields, **always}.items()))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    return application


def parse_environ(environ: dict[str, Any]) -> Request:
    """The request in a WSGI environment. Refusal if its Content-Length is not a number."""
    headers = {name[5:].replace("_", "-").lower(): value for name, value in environ.items() if name.startswith("HTTP_")}
    if environ.get("CONTENT_TYPE"):
        headers["content-type"] = environ["CONTENT_TYPE"]
    length = parse_length(environ.get("CONTENT_LENGTH") or None)

    def read() -> bytes:
        body = b""
        with suppress(OSError):  # the client is gone
            body = environ["wsgi.input"].read(length)
        require(len(body) == length, 400, "The body ended early")
        return body

    path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")  # decoded: a ? in it was %3F
    return Request(environ["REQUEST_METHOD"], path.replace("?", "%3F"), headers, length, read)


def load_destination(name: str) -> Destination:
    """An instance of MODULE:CLASS, from the import path or the current folder. ConfigurationError if there is none."""
    sys.modules.setdefault("receiver", sys.modules[__name__])  # for its `import receiver`: this program, no second copy
    sys.path.insert(0, os.getcwd())
    try:
        made = pkgutil.resolve_name(name)()
        if not isinstance(made, Destination):
            raise TypeError("this is no subclass of receiver.Destination")
    except Exception as error:
        raise ConfigurationError(f"destination {name}: {type(error).__name__}: {error}") from error
    return made


# ======================================================================================================================
# 5. The command line
#
# Options, signals, the greeting, and the making of keys. Every mistake is one line and exit status 2.
# ======================================================================================================================


class Parser(argparse.ArgumentParser):
    """argparse, where a mistake is an exception, and so one line."""

    def error(self, message: str) -> NoReturn:
        """Raise ConfigurationError."""
        raise ConfigurationError(message)


def from_to(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    """A reader of numbers from the least to the most."""

    def number(text: str) -> float:
        if not least <= (value := kind(text)) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
        return value

    return number


def endpoint_path(text: str) -> str:
    """A path that a request line can name, and that is not that of the health check."""
    if not re.fullmatch(r"/[!-~]*", text) or set(text) & set("?#") or text == HEALTH:
        raise argparse.ArgumentTypeError(f"{text!r} is not a slash and visible ASCII without ? and #, or is {HEALTH}")
    return text


def options_parser() -> Parser:
    """The options, each with its default; serve() and wsgi() take theirs from here too."""
    parser = Parser("receiver.py", description="Receive Segment's calls over HTTPS and store them.", allow_abbrev=False)
    add, seconds = parser.add_argument, from_to(float, 0.1, 86_400)
    add("--bind", metavar="ADDRESS", type=ipaddress.ip_address, default="127.0.0.1", help="IPv4 or IPv6 (%(default)s)")
    add("--port", type=from_to(int, 0, 65_535), default=8443, help="0 takes any free port (%(default)s)")
    add("--path", type=endpoint_path, default="/", help="the endpoint, compared exactly as sent (%(default)s)")
    add("--tls-cert", metavar="FILE", default="certs/localhost.pem", help="certificate and its chain (%(default)s)")
    add("--tls-key", metavar="FILE", default="certs/localhost-key.pem", help="its private key (%(default)s)")
    add("--api-keys", metavar="FILE", default="fixtures/keys.json", help="read again on change (%(default)s)")
    add("--database", metavar="FILE", default="calls.db", help="where calls are stored, SQLite (%(default)s)")
    add("--destination", metavar="MODULE:CLASS", help="where calls go instead")
    add("--max-body", metavar="BYTES", type=from_to(int, 1, 2**29), default=524_288, help="longest body (%(default)s)")
    add("--timeout", metavar="SECONDS", type=seconds, default=10, help="for a request to arrive whole (%(default)s)")
    add("--keep-alive", metavar="SECONDS", type=seconds, default=75, help="of silence between requests (%(default)s)")
    add("--max-connections", metavar="N", type=from_to(int, 1, 100_000), default=1000, help="at a time (%(default)s)")
    add("--maintenance", action="store_true", help="start in maintenance, answering 503, until SIGUSR1")
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("--quiet", action="store_true", help="log no line for what was answered 2xx")
    volume.add_argument("--verbose", action="store_true", help="log each call too")
    add("--add-key", metavar="CUSTOMER", help="make an API key, print it, add its digest to the keys file, and end")
    calls = "with --add-key: the only types of call it may send, as identify,track"
    add("--calls", metavar="TYPES", type=lambda text: text.split(","), help=calls)
    add("--expires", metavar="DATE", help="with --add-key: when it ends, in ISO 8601, as 2027-01-01")
    return parser


def parse_options(given: Mapping[str, Any]) -> argparse.Namespace:
    """Options given by name, read as the command line reads them. ConfigurationError if one cannot be used."""
    words = []
    for name, value in given.items():
        if value is not None and value is not False:  # not `in`, as 0 is equal to False
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
    return options_parser().parse_args(words)


def main() -> None:
    """Run the command line: serve until a signal says stop, or add a key."""
    try:
        options = options_parser().parse_args()
        if options.add_key is None and (options.calls, options.expires) != (None, None):
            raise ConfigurationError("--calls and --expires go with --add-key")
        run(options) if options.add_key is None else add_key(options)
    except ConfigurationError as error:
        print(f"receiver.py: {error}", file=sys.stderr)
        sys.exit(2)


def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM or SIGINT. SIGHUP reads keys and certificate again, SIGUSR1 toggles maintenance."""
    import resource  # here, so that serve() and wsgi() need no Unix

    signals = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # they wait for sigwait; all threads inherit this
    logging.Formatter.converter = time.gmtime
    logging.basicConfig(format="%(asctime)s.%(msecs)03dZ %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")
    if hasattr(os, "SCHED_BATCH"):  # so that threads that wake do not interrupt the one that has Python's lock
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    with suppress(OSError, ValueError):  # each connection is an open file: let --max-connections be the limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    with Server(None, options) as server:
        server.receiver.lines = sys.stderr.buffer
        print(f"Listening on {server.url}", flush=True)
        with suppress(OSError):
            print(greeting(server), file=sys.stderr, flush=True)
        while (number := signal.sigwait(signals)) in (signal.SIGHUP, signal.SIGUSR1):
            server.reload() if number == signal.SIGHUP else server.receiver.toggle_maintenance()


def greeting(server: Server) -> str:
    """What to do next, for who has started the server by hand."""
    options, demo = server.options, DEMO_KEYS & server.receiver.endpoint.keys.keys()
    url = server.url.replace(str(options.bind), "localhost") if options.bind.is_unspecified else server.url
    curl = f"curl -i --cacert {options.tls_cert} -u {'segment' if demo else 'YOUR_API_KEY'}: {url}"
    curl += " -H 'Content-Type: application/json' -d @fixtures/track.json"
    query = "select received_at, type, user_id from calls order by rowid desc limit 9"
    text = f"\nSend a call from another terminal:\n    {curl}\n"
    if options.destination:
        text += f"Calls go to {options.destination}.\n"
    else:
        text += f"Calls are stored in {options.database}. See the latest:\n    sqlite3 {options.database} '{query}'\n"
    if demo:
        text += f"Warning: {options.api_keys} holds demo keys, which everybody knows. Make your own with --add-key.\n"
    return text


def add_key(options: argparse.Namespace) -> None:
    """Make an API key and print it, this once only; put its digest into the keys file, replaced in one step."""
    api_key, path = secrets.token_urlsafe(32), os.path.realpath(options.api_keys)
    entry = {"customer": options.add_key, "sha256": hashlib.sha256(api_key.encode()).hexdigest()}
    entry |= {name: value for name in ("calls", "expires") if (value := getattr(options, name)) is not None}
    try:
        if os.name == "posix":  # of two at once one waits until the other's process has ended, so that none is undone
            import fcntl

            fcntl.flock(os.open(os.path.dirname(path), os.O_RDONLY), fcntl.LOCK_EX)
        entries = [*(json.loads(Path(path).read_text("utf-8")) if os.path.exists(path) else []), entry]
        parse_keys(json.dumps(entries))
        with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(path), delete=False) as file:  # its mode is 0600
            file.write("[\n  " + ",\n  ".join(map(json.dumps, entries)) + "\n]\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ConfigurationError(f"{options.api_keys}: {error}") from None
    print(api_key)
    print(f"A key for {options.add_key} was added to {options.api_keys}; it is shown this once only.", file=sys.stderr)


if __name__ == "__main__":
    main()
