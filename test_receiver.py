# SPDX-License-Identifier: MIT
"""What the receiver promises, sentence by sentence, in the order of receiver.py.

First the protocol without a network, then the store on real files, then the server: a process, TLS, sockets, and what an
open port and a bad day do to it. Then the conformance kit, for any endpoint, and last what the README says.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import http.client
import itertools
import json
import os
import random
import re
import resource
import secrets
import selectors
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
import warnings
from asyncio import CancelledError
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import pytest
import requests

import receiver

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
REFUSED = json.loads((FIXTURES / "refused.json").read_text())
SAMPLES = {kind: json.loads((FIXTURES / f"{kind}.json").read_text()) for kind in ("identify", "track", "page", "group")}
KEYS = receiver.parse_keys((FIXTURES / "keys.json").read_text())
NOW = "2026-01-15T12:00:00.000Z"
TRACK = {"type": "track", "user_id": "u1", "event": "Signed Up"}


with warnings.catch_warnings():  # pytest learns of marks from a file that this project does without
    warnings.simplefilter("ignore")
    slow = pytest.mark.slow

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # as outside of `make test`


def basic(key: str) -> str:
    """The Authorization header for a key."""
    return "Basic " + base64.b64encode(f"{key}:".encode()).decode()


# ---- 1. The protocol, without a network ------------------------------------------------------------------------------


class Recorder(receiver.Destination):
    """A destination that knows all types of call and remembers what it was given."""

    def __init__(self, outcome=None):
        self.outcome, self.calls = outcome, []

    def _take(self, *arguments):
        self.calls.append(arguments)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    identify = track = page = group = delete = screen = alias = _take


def ask(body=TRACK, method="POST", target="/", destination=None, keys=KEYS, maintenance=False, drop=(), **headers):
    """The reply to a request, by the pure function; underscores in header names stand for hyphens."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    named = {"authorization": basic("segment"), "content-type": "application/json"}
    named.update((name.replace("_", "-"), value) for name, value in headers.items())
    for name in drop:
        del named[name]
    endpoint = receiver.Endpoint(destination or Recorder(), keys, maintenance=maintenance)
    length = int(named.pop("length", len(data)))
    return receiver.answer(receiver.Request(method, target, named, None if length < 0 else length, lambda: data), endpoint, lambda: NOW)


def call_of(**fields):
    """The call that a destination is given for these fields."""
    recorder = Recorder()
    reply = ask({**TRACK, **fields}, destination=recorder)
    assert reply.status == 200, reply
    return recorder.calls[0][-1]


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_sample_call_of_each_type_is_accepted_with_an_empty_body(kind):
    recorder = Recorder()
    reply = ask(SAMPLES[kind], destination=recorder)
    assert (reply.status, reply.body, reply.error) == (200, {}, None)
    assert recorder.calls[0][-1].raw == SAMPLES[kind]


# Rung by rung: what makes a request fail there and nowhere else, and the status.
RUNGS = [
    ("path", {"target": "/elsewhere"}, 404),
    ("method", {"method": "PUT"}, 405),
    ("maintenance", {"maintenance": True}, 503),
    ("authorization", {"authorization": basic("unknown")}, 401),
    ("length", {"length": -1}, 411),
    ("size", {"length": 524_289}, 413),
    ("content type", {"content_type": "text/plain"}, 415),
    ("body", {"body": b'{"type": "juggle", '}, 400),
    ("settings", {"x_segment_settings": "?"}, 400),
    ("type", {"body": {"type": "juggle"}}, 501),
    ("permission", {"authorization": basic("segment-identify-only")}, 403),
    ("fields", {"body": {"type": "track", "user_id": "u1"}}, 400),
    ("handler", {"destination": Recorder(receiver.Refusal(409, "Taken"))}, 409),
]


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(RUNGS, 2)), ids=lambda rung: rung[0])
def test_the_earlier_rung_answers(first, second):
    (_, wrong, status), (_, also_wrong, _) = first, second
    assert ask(**{**also_wrong, **wrong}).status == status
    assert ask(**wrong).status == status


@pytest.mark.parametrize("record", REFUSED, ids=lambda record: record["wrong"])
def test_a_refused_request_names_the_culprit_and_reaches_no_destination(record):
    request, store = record["request"], Recorder()
    del_alias = type("NoAlias", (Recorder,), {"alias": None, "screen": None})
    store = del_alias()
    body = base64.b64decode(request["body_base64"]) if "body_base64" in request else request.get("body", "").encode()
    headers = {name.lower(): value for name, value in request["headers"].items()}
    length = headers.pop("content-length", None)
    sent = receiver.Request(request["method"], request["path"], headers, None if length is None else int(length), lambda: body)
    reply = receiver.answer(sent, receiver.Endpoint(store, KEYS), lambda: NOW)
    assert (reply.status, reply.body, store.calls) == (record["status"], {"message": record["message"]}, [])


def test_the_query_is_no_part_of_the_path():
    assert ask(target="/?source=web").status == 200


def test_health_answers_get_and_head_and_503_in_maintenance():
    for method in ("GET", "HEAD"):
        assert ask(target="/health", method=method).body == {"status": "ok"}
        assert ask(target="/health?x", method=method, maintenance=True).status == 503
    assert ask(target="/health").fields["Allow"] == "GET, HEAD"


def test_some_statuses_come_with_the_header_that_they_need():
    assert ask(method="GET").fields == {"Allow": "POST"}
    assert ask(drop=["authorization"]).fields["WWW-Authenticate"].startswith("Basic ")
    assert ask(maintenance=True).fields == {"Retry-After": "5"}
    assert ask(destination=Recorder(receiver.Refusal(503, "Away"))).fields == {"Retry-After": "5"}


# Who is calling


def test_the_scheme_is_basic_in_any_case_and_a_key_may_be_any_text():
    keys = {hashlib.sha256("schlüssel 1".encode()).hexdigest(): receiver.Key("Küche")}
    credentials = base64.b64encode("schlüssel 1:".encode()).decode()
    for scheme in ("Basic", "basic", "BASIC", "Basic "):
        assert ask(keys=keys, authorization=f"{scheme} {credentials}").customer == "Küche"


def test_a_key_expires_at_the_moment_it_says():
    digest = hashlib.sha256(b"segment").hexdigest()
    for expires, status in ((NOW, 401), ("2026-01-15T12:00:00.001Z", 200), ("2026-01-15T11:59:59.999Z", 401), (None, 200)):
        reply = ask(keys={digest: receiver.Key("demo", None, expires)})
        assert reply.status == status
        assert reply.body == ({} if status == 200 else {"message": "API token expired"})


KEY = {"customer": "Acme", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("entries", "culprit"),
    [
        ({}, "not a JSON array"),
        ([KEY, 7], "entry 2"),
        ([{"sha256": "0" * 64}], "entry 1.*customer"),
        ([{**KEY, "customer": ""}], "entry 1.*customer"),
        ([{**KEY, "customer": 7}], "entry 1.*customer"),
        ([{"customer": "Acme"}], "entry 1.*sha256"),
        ([{**KEY, "sha256": "0" * 63}], "entry 1.*sha256"),
        ([{**KEY, "sha256": "G" * 64}], "entry 1.*sha256"),
        ([{**KEY, "sha256": None}], "entry 1.*sha256"),
        ([{**KEY, "calls": "identify"}], "entry 1.*calls"),
        ([{**KEY, "calls": ["identify", "tarck"]}], "entry 1.*calls"),
        ([{**KEY, "expires": "tomorrow"}], "entry 1.*expires is not an ISO 8601 time"),
        ([{**KEY, "expires": ""}], "entry 1.*an ISO 8601 time"),
        ([{**KEY, "expires": 2027}], "entry 1.*an ISO 8601 time"),
        ([{**KEY, "expirs": "2027-01-01"}], "entry 1.*expirs"),
        ([KEY, KEY], "entry 2.*sha256"),
    ],
)
def test_a_wrong_entry_of_the_keys_file_is_an_error_that_names_it(entries, culprit):
    with pytest.raises(ValueError, match=culprit):
        receiver.parse_keys(json.dumps(entries))


def test_the_keys_file_is_read_as_it_is_written():
    text = json.dumps([KEY, {**KEY, "sha256": "1" * 64, "calls": ["track"], "expires": "2027-01-01T01:00:00+01:00"}])
    assert receiver.parse_keys(text) == {
        "0" * 64: receiver.Key("Acme", None, None),
        "1" * 64: receiver.Key("Acme", frozenset(["track"]), "2027-01-01T00:00:00.000Z"),
    }


# What they sent: the body


@pytest.mark.parametrize(
    "content_type",
    ["application/json", "Application/JSON", "application/json; charset=utf-8", 'application/json;charset="UTF-8"', "application/vnd.segment+json"],
)
def test_json_is_taken_under_each_of_its_names(content_type):
    assert ask(content_type=content_type).status == 200


@pytest.mark.parametrize("content_type", ["text/plain", "json", "", "application/jsonp", "application/+json", "text/vnd.x+json", "application/json; charset=latin-1"])
def test_no_other_content_type_is_taken(content_type):
    assert ask(content_type=content_type).status == 415


def test_no_content_type_and_an_encoding_of_identity_are_json():
    assert ask(drop=["content-type"], content_encoding="Identity").status == 200


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (' \t\r\n{"a" : [1 , 2 ]}\n', {"a": [1, 2]}),
        ('{"a": 12345678901234567890123}', {"a": 12345678901234567890123}),
        ('{"a": -0.0, "b": 1E2, "c": 1.7976931348623157e308}', {"a": 0.0, "b": 100.0, "c": 1.7976931348623157e308}),
        ('{"a": ' + "9" * 308 + "}", {"a": int("9" * 308)}),
        (r'{"a": "\ud83d\ude00 \u0000 \/ \"", "é": "日本"}', {"a": '😀 \0 / "', "é": "日本"}),
        ('{"a": {"a": {}}, "b": [[], {}], "c": null, "d": true}', {"a": {"a": {}}, "b": [[], {}], "c": None, "d": True}),
        ('{"a": ' + "[" * 499 + "]" * 499 + "}", None),
        ('{"a": "' + "[" * 5000 + '"}', {"a": "[" * 5000}),
        ('{"a": 1, "a": 2}', {"a": 2}),
        ('{"' + "k" * 100_000 + '": 1}', {"k" * 100_000: 1}),
    ],
    ids=lambda text: str(text)[:30],
)
def test_the_whole_of_json_is_read(text, value):
    read = receiver.parse_object(text.encode(), "It")
    assert value is None or read == value
    assert json.dumps(read)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "{} {}", "{'a': 1}", '{"a": 1,}', '{"a": 01}', '{"a": .5}', '{"a": +1}', '{"a": 0x1}', '{"a": NaN}', '{"a": -Infinity}',
        '{"a": Infinity}', '{"a": 1e400}', '{"a": -1e400}', '{"a": ' + "9" * 309 + "}", '{"a": ' + "9" * 5000 + "}", '{"a": "\t"}',
        r'{"a": "\ud800"}', r'{"\udc00": 1}', r'{"a": "\x41"}', "\ufeff{}", "\u00a0{}", "[]", '"a"', "1", "null", "true",
        '{"a": ' + "[" * 500 + "]" * 500 + "}", "[" * 10_000, '{"a":' * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "// no\n{}",
    ],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_nothing_beyond_json_is_read(text):
    assert ask(text.encode()).status == 400


def test_no_text_but_utf_8_is_read():
    for data in (b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}', b'{"a": "\xc0\xaf"}', '{"a": 1}'.encode("utf-16"), '{"a": 1}'.encode("utf-32-le")):
        assert ask(data).status == 400


@pytest.mark.parametrize(
    ("key", "name"),
    [
        *[(key, "user_id") for key in ("userId", "UserID", "UserId", "user-id", "User Id", "user_id", "User-ID", "USER_ID", "user_Id")],
        ("HTMLParser", "html_parser"), ("parseHTML", "parse_html"), ("address1", "address1"), ("utm2Source", "utm2_source"),
        ("ABC1", "abc1"), ("A", "a"), ("aB", "a_b"), ("iOSVersion", "i_os_version"), ("", ""), ("_id", "_id"), ("$set", "$set"),
        ("utm.source", "utm.source"), ("größeMax", "größe_max"), ("ÜberÉtat", "über_état"), ("名前", "名前"), ("ID", "id"),
    ],
)  # fmt: skip
def test_a_key_is_brought_to_snake_case(key, name):
    assert receiver.snake_case(key) == name
    assert receiver.snake_case(name) == name


def test_every_key_at_every_depth_is_brought_to_snake_case_and_no_value_is_touched():
    sent = {"firstName": "camelCase", "deepList": [{"innerKey": ["leafValue", {"lastKey": None}]}], "x" * 70 + "Y": 1}
    assert receiver.parse_object(json.dumps(sent).encode(), "It") == {
        "first_name": "camelCase", "deep_list": [{"inner_key": ["leafValue", {"last_key": None}]}], "x" * 70 + "_y": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ({"userId": 1, "user_id": 2}, {"userId": 1, "user_id": 2}),
        ({"user_id": 2, "userId": 1, "UserID": 3}, {"user_id": 2, "userId": 1, "UserID": 3}),
        ({"userId": 1, "UserID": 2, "plan": 3}, {"user_id": 1, "UserID": 2, "plan": 3}),
    ],
)
def test_where_two_keys_become_one_nothing_is_lost(sent, kept):
    assert receiver.parse_object(json.dumps(sent).encode(), "It") == kept


def test_a_flood_of_keys_neither_breaks_nor_fills_anything():
    for style in ("key{}", "keyNumber{}", "k" * 100 + "{}"):
        body = json.dumps({style.format(n): n for n in range(4_500)}).encode()
        assert len(receiver.parse_object(body, "It")) == 4_500
    assert len(receiver.KNOWN) < 10_000 and receiver.remembered.cache_info().currsize <= 4096
    assert max(map(len, receiver.KNOWN)) <= 64


def test_the_customers_settings_come_with_the_call():
    recorder = Recorder()
    published = "eyJjdXN0b21TZXR0aW5nT25lIjoiY3VzdG9tIHNldHRpbmcgdmFsdWUifQ=="
    ask(destination=recorder, x_segment_settings=published)
    assert recorder.calls[0][-1].settings == {"custom_setting_one": "custom setting value"}
    assert call_of().settings == {}


# What they sent: the call


def test_what_is_absent_or_null_or_an_empty_id_is_filled_in():
    call = call_of(user_id="", anonymous_id="a1", message_id="", properties=None, traits=None, timestamp=None, context=None)
    assert (call.user_id, call.anonymous_id, call.properties, call.traits, call.context) == (None, "a1", {}, {}, {})
    assert (call.timestamp, call.sent_at, call.version, call.name) == (NOW, None, None, None)
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", call.message_id)
    assert call.message_id != call_of(message_id=None).message_id
    call.traits["mine"] = 1
    assert call_of().traits == {}


def test_a_call_has_the_fields_that_were_sent():
    sent = SAMPLES["track"]
    call = call_of(**sent)
    for field, value in sent.items():
        assert getattr(call, field) == value
    assert (call.customer, call.raw) == ("demo", sent)


def test_a_field_that_nobody_knows_is_kept_as_it_came():
    assert call_of(colour={"r": 1}).raw["colour"] == {"r": 1}


def test_an_id_sent_as_a_whole_number_is_its_decimal_text():
    call = call_of(user_id=7, anonymous_id=0, message_id=12345678901234567890)
    assert (call.user_id, call.anonymous_id, call.message_id) == ("7", "0", "12345678901234567890")


def test_a_call_is_dated_by_timestamp_else_by_the_clients_clock_else_by_when_it_was_sent_else_now():
    times = {"timestamp": "2026-01-01", "original_timestamp": "2026-01-02", "sent_at": "2026-01-03"}
    for day in ("01", "02", "03"):
        assert call_of(**times).timestamp == f"2026-01-{day}T00:00:00.000Z"
        times.pop(next(iter(times)))
    assert call_of().timestamp == NOW
    assert call_of(original_timestamp="long ago", sent_at="2026-01-03").timestamp == "2026-01-03T00:00:00.000Z"
    assert call_of(original_timestamp=5).timestamp == NOW


@pytest.mark.parametrize(
    ("time", "utc"),
    [
        ("2026-01-15T00:30:08.276Z", "2026-01-15T00:30:08.276Z"), ("2026-01-15T00:30:08Z", "2026-01-15T00:30:08.000Z"),
        ("2026-01-15T00:30:08.276999Z", "2026-01-15T00:30:08.276Z"), ("2026-01-15T01:30:08+02:00", "2026-01-14T23:30:08.000Z"),
        ("2026-01-15T00:30:08", "2026-01-15T00:30:08.000Z"), ("2026-01-15 00:30", "2026-01-15T00:30:00.000Z"),
        ("2026-01-15", "2026-01-15T00:00:00.000Z"), ("20260115T003008Z", "2026-01-15T00:30:08.000Z"),
        ("2026-W03-4T00:30:08.276Z", "2026-01-15T00:30:08.276Z"), ("0999-01-01T00:00:00Z", "0999-01-01T00:00:00.000Z"),
    ],
)  # fmt: skip
def test_a_time_is_brought_to_utc_with_milliseconds(time, utc):
    assert call_of(timestamp=time).timestamp == utc


@pytest.mark.parametrize(
    "time",
    ["", "now", "2026", "2026-13-01", "2026-02-30T00:00:00.000Z", "15/01/2026", "2026-01-15X00:00:00", "2026-01-15T25:00:00Z", " 2026-01-15",
     "0001-01-01T00:00:00+01:00", "2026-01-15T00:30:08.276Z\n", "٢٠٢٦-01-15", 7, True, {}, ["2026-01-15"]],
)  # fmt: skip
def test_what_is_no_time_is_refused(time):
    assert ask({**TRACK, "timestamp": time}).body == {"message": "The field timestamp is not an ISO 8601 time"}
    assert ask({**TRACK, "sent_at": time}).body == {"message": "The field sent_at is not an ISO 8601 time"}


def test_only_the_fields_of_its_row_are_checked_and_a_page_needs_no_name():
    assert ask({"type": "identify", "user_id": "u1", "event": 7, "name": [], "group_id": {}}).status == 200
    assert ask({"type": "page", "anonymous_id": "a1"}).status == 200


# What to do with it


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("identify", ["u", {"t": 1}]), ("track", ["u", "e", {"p": 1}]), ("page", ["u", "n", {"p": 1}]), ("group", ["u", "g", {"t": 1}]),
     ("delete", ["u"]), ("screen", ["u", "n", {"p": 1}]), ("alias", ["u", "b"])],
)  # fmt: skip
def test_a_handler_is_given_what_the_table_says(kind, arguments):
    recorder = Recorder()
    fields = {"event": "e", "name": "n", "group_id": "g", "previous_id": "b", "traits": {"t": 1}, "properties": {"p": 1}}
    assert ask({"type": kind, "user_id": "u", **fields}, destination=recorder).status == 200
    assert list(recorder.calls[0][:-1]) == arguments and recorder.calls[0][-1].type == kind


def test_a_destination_supports_the_calls_whose_methods_it_defines_and_no_other_attribute_is_a_call():
    class OnlyTrack(receiver.Destination):
        secret = print

        def track(self, user_id, event, properties, call):
            pass

    assert ask(destination=OnlyTrack()).status == 200
    for kind in ("identify", "alias", "secret", "close", "__init__", "__class__", ""):
        assert ask({"type": kind, "user_id": "u"}, destination=OnlyTrack()).status == 501


@pytest.mark.parametrize(("outcome", "status"), [(None, 200), (200, 200), (202, 202), (receiver.HTTPStatus.ACCEPTED, 202)])
def test_a_handlers_outcome_is_the_status_and_success_has_no_body(outcome, status):
    reply = ask(destination=Recorder(outcome))
    assert (reply.status, reply.body, reply.duplicate) == (status, {}, False)


@pytest.mark.parametrize("outcome", [ZeroDivisionError("secret"), OSError(), "secret", 404, False])
def test_a_fault_of_ours_is_a_500_that_tells_nothing(outcome):
    reply = ask(destination=Recorder(outcome))
    assert (reply.status, reply.body) == (500, {"message": "Internal error"})
    assert isinstance(reply.error, Exception)


def test_a_handlers_refusal_is_answered_as_it_says():
    reply = ask(destination=Recorder(receiver.Refusal(422, "Missing email address")))
    assert (reply.status, reply.body, reply.error) == (422, {"message": "Missing email address"}, None)
    for status in (200, 399, 600):
        with pytest.raises(ValueError, match="400 to 599"):
            receiver.Refusal(status, "No")


def test_what_a_message_quotes_is_cut_and_escaped():
    message = ask({"type": "x\n\x1b" * 1000, "user_id": "u"}).body["message"]
    assert len(message) < 130 and message.isprintable()


# ---- 2. The default destination, on real files -----------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    """A store on a new file."""
    made = receiver.Store(str(tmp_path / "calls.db"))
    made.path = tmp_path / "calls.db"
    yield made
    made.close()


def save(store, kind="identify", customer="demo", user_id="u1", **fields):
    """Send a call through the protocol into a store; what the store answered."""
    endpoint = receiver.Endpoint(store, {hashlib.sha256(customer.encode()).hexdigest(): receiver.Key(customer)})
    body = json.dumps({"type": kind, "user_id": user_id, **fields}).encode()
    request = receiver.Request("POST", "/", {"authorization": basic(customer)}, len(body), lambda: body)
    reply = receiver.answer(request, endpoint, receiver.utc_now)
    assert reply.status in (200, 503), reply
    return reply


def rows(path, query, *values):
    """What a query finds."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        return db.execute(query, values).fetchall()


def test_a_call_is_one_row_with_its_own_fields(store):
    save(store, "track", event="Ordered", anonymous_id="a1", message_id="m1", timestamp="2026-01-15T01:00:00+01:00", properties={"n": 1.10})
    [(*row, received_at, call)] = rows(
        store.path, "select customer, message_id, type, user_id, anonymous_id, timestamp, received_at, call from calls"
    )
    assert row == ["demo", "m1", "track", "u1", "a1", "2026-01-15T00:00:00.000Z"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", received_at) and abs(time.time() - _seconds(received_at)) < 5
    assert json.loads(call)["properties"] == {"n": 1.1}


def _seconds(text):
    return receiver.datetime.fromisoformat(text).timestamp()


def test_a_message_id_seen_before_is_stored_once_and_called_a_duplicate(store):
    first, again, other = (save(store, "track", event="e", message_id=m) for m in ("m1", "m1", "m2"))
    assert (first.duplicate, again.duplicate, other.duplicate) == (False, True, False)
    assert rows(store.path, "select count(*) from calls") == [(2,)]


def test_a_call_without_a_message_id_is_new_every_time_and_the_same_call_of_two_customers_is_two(store):
    for _ in range(2):
        assert not save(store, "track", event="e").duplicate
    for customer in ("demo", "acme"):
        assert not save(store, "track", event="e", customer=customer, message_id="m1").duplicate
    assert rows(store.path, "select customer, count(*) from calls group by customer order by 1") == [("acme", 1), ("demo", 3)]


IDENTIFIES = [
    {"timestamp": "2026-01-01T00:00:00Z", "traits": {"plan": "free", "seats": 1, "name": "Ann", "tags": {"a": 1, "b": 2}}},
    {"timestamp": "2026-01-02T00:00:00Z", "traits": {"plan": "team", "email": "ann@example.com", "tags": {"c": 3}}},
    {"timestamp": "2026-01-03T00:00:00Z", "traits": {"plan": "gold", "name": None}},
]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_users_are_the_same_whatever_the_order_of_arrival(store, order):
    for number in order:
        save(store, **IDENTIFIES[number])
    [(traits, first, last)] = rows(store.path, "select traits, first_seen, last_seen from users where user_id = 'u1'")
    assert json.loads(traits) == {"plan": "gold", "seats": 1, "name": None, "tags": {"c": 3}, "email": "ann@example.com"}
    assert (first, last) == ("2026-01-01T00:00:00.000Z", "2026-01-03T00:00:00.000Z")


def test_of_traits_with_equal_timestamps_the_last_received_wins(store):
    for plan in ("c", "a", "b"):
        save(store, timestamp=NOW, traits={"plan": plan})
    assert rows(store.path, "select traits from users") == [('{"plan":"b"}',)]


def test_everyone_with_a_user_id_is_a_user_and_customers_are_kept_apart(store):
    save(store, "track", user_id="u2", event="e", timestamp=NOW)
    save(store, "page", user_id=None, anonymous_id="a1")
    save(store, customer="acme", traits={"of": "acme"}, timestamp=NOW)
    save(store, traits={"of": "demo"}, timestamp=NOW)
    assert rows(store.path, "select customer, user_id, traits from users order by 1, 2") == [
        ("acme", "u1", '{"of":"acme"}'), ("demo", "u1", '{"of":"demo"}'), ("demo", "u2", "{}"),
    ]  # fmt: skip


TRAITS = {
    "float": 0.30000000000000004, "big": 12345678901234567890, "true": True, "false": False, "null": None, "text": 'é"q\\', "list": [1, {"a": None}],
    "b.1": 1, "dot.ted": 2, "br[0]": 3, "": 4, "quote\"d": {"a": [True]}, "quoted\"2": "t", "q\"3": False, "nul": "a\0b", "json": '{"a": 1}', "🙂": "🙂",
}  # fmt: skip


def test_traits_come_out_of_the_views_as_they_went_in(store):
    save(store, traits=TRAITS)
    save(store, "group", group_id="g1", traits=TRAITS)
    for view in ("identifies", "users", "groups", "accounts"):
        assert json.loads(rows(store.path, f"select traits from {view}")[0][0]) == TRAITS, view


def test_accounts_count_distinct_users_and_merge_traits_by_timestamp(store):
    save(store, "group", group_id="g1", traits={"size": 2, "name": "new"}, timestamp="2026-01-02")
    save(store, "group", group_id="g1", traits={"size": 1, "kind": "old"}, timestamp="2026-01-01")
    save(store, "group", user_id="u2", group_id="g1", timestamp="2026-01-03")
    save(store, "group", user_id="u2", group_id=5)
    save(store, "group", customer="acme", group_id="g1", traits={"name": "other"})
    [(traits, *others)] = rows(store.path, "select traits, members, first_seen, last_seen from accounts where customer = 'demo' and group_id = 'g1'")
    assert json.loads(traits) == {"size": 2, "name": "new", "kind": "old"}
    assert others == [2, "2026-01-01T00:00:00.000Z", "2026-01-03T00:00:00.000Z"]
    assert rows(store.path, "select members from accounts where group_id = '5'") == [(1,)]


def test_each_type_has_a_view_with_a_row_a_call(store):
    save(store, message_id="i", traits={"a": 1})
    save(store, "track", message_id="t", event="e", properties={"p": 1}, context={"ip": "::1"})
    save(store, "page", message_id="p", name="n")
    save(store, "group", message_id="g", group_id="g1")
    assert rows(store.path, "select message_id, user_id, traits from identifies") == [("i", "u1", '{"a":1}')]
    assert rows(store.path, "select message_id, event, properties, context from tracks") == [("t", "e", '{"p":1}', '{"ip":"::1"}')]
    assert rows(store.path, "select message_id, name, properties from pages") == [("p", "n", "{}")]
    assert rows(store.path, "select message_id, group_id, traits from groups") == [("g", "g1", "{}")]


@pytest.mark.parametrize(("customers", "fulfilled"), [(9, 0), (10, 1)])
def test_private_beta_is_fulfilled_by_ten_customers(store, customers, fulfilled):
    for number in range(customers):
        save(store, "track", customer=f"c{number}", event="e")
    assert rows(store.path, "select customers, events, fulfilled from private_beta") == [(customers, customers, fulfilled)]


def test_delete_removes_everything_of_that_user_of_that_customer(store):
    secret = "gone-with-the-wind"
    save(store, "track", event=secret)
    save(store, traits={"secret": secret})
    save(store, customer="acme")
    save(store, user_id="u2")
    save(store, "delete")
    assert rows(store.path, "select customer, user_id from calls order by 1") == [("acme", "u1"), ("demo", "u2")]
    store.close()
    assert secret.encode() not in store.path.read_bytes()


def test_a_store_finds_again_what_it_has_kept(tmp_path):
    for _ in range(2):
        store = receiver.Store(str(tmp_path / "calls.db"))
        save(store, "track", event="e", message_id="m1")
        store.close()
    assert rows(tmp_path / "calls.db", "select count(*) from calls") == [(1,)]


def _foreign(path):
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript("create table calls (customer, message_id); insert into calls values (1, 2); pragma user_version = 1")


def _newer(path):
    receiver.Store(str(path)).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("pragma user_version = 2")


@pytest.mark.parametrize("make", [_foreign, _newer, lambda path: path.write_text("Dear diary, " * 99), lambda path: path.write_text("x")])
def test_a_file_that_is_no_database_of_ours_is_refused_and_never_touched(tmp_path, make):
    path = tmp_path / "calls.db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(receiver.ConfigurationError, match=re.escape(str(path))):
        receiver.Store(str(path))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_one_users_traits_are_found_by_an_index(store):
    [plan, *_] = rows(store.path, "explain query plan select traits from users where customer = 'demo' and user_id = 'u1'")[1:]
    assert "calls_by_user (user_id=? AND customer=?)" in plan[3]
    plans = rows(store.path, "explain query plan select traits from accounts where customer = 'demo' and group_id = 'g1'")
    assert not any(plan[3].startswith("SCAN calls") or plan[3] == "SCAN c" for plan in plans)


# ---- 3. The server: a process, TLS, sockets --------------------------------------------------------------------------


class Process:
    """A receiver started as a process on a free port with a database of its own; a context manager that ends it."""

    def __init__(self, folder, *options, database=None, cwd=HERE, wait=True):
        self.database = Path(database or folder / "calls.db")
        self.log_path = folder / f"log-{time.monotonic_ns()}"
        command = [sys.executable, str(HERE / "receiver.py"), "--port", "0", "--database", str(self.database), *map(str, options)]
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=log, text=True)
        self.said = self.process.stdout.readline() if wait else ""
        self.url = self.said.split()[-1] if self.said else ""
        self.port = int(re.search(r":(\d+)/", self.url)[1]) if self.url else 0
        self.cert = str(HERE / "certs/localhost.pem")

    @property
    def log(self):
        return self.log_path.read_text()

    def logs(self, pattern, seconds=10):
        """Wait until the log has a line like this."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.log, re.M)):
            assert time.monotonic() < deadline, f"no {pattern!r} in the log:\n{self.log[-2000:]}"
            time.sleep(0.01)
        return found

    def post(self, call=TRACK, key="segment", **options):
        return requests.post(self.url, json=call, auth=(key, ""), verify=self.cert, timeout=20, **options)

    def stop(self, number=signal.SIGTERM):
        """End it; the exit status."""
        self.process.send_signal(number)
        status = self.process.wait(15)
        self.process.stdout.close()
        return status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.stop(signal.SIGKILL)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One receiver for all tests that leave it as it was."""
    with Process(tmp_path_factory.mktemp("running"), "--timeout", "2", "--max-body", "524288") as process:
        yield process


class Wire:
    """A TLS connection that sends the bytes that it is given, and reads replies one by one."""

    def __init__(self, server, context=None):
        self.plain = socket.create_connection(("127.0.0.1", server.port), timeout=15)
        self.tls = (context or ssl.create_default_context(cafile=server.cert)).wrap_socket(self.plain, server_hostname="localhost")
        self.buffer = b""

    def send(self, data):
        self.tls.sendall(data)
        return self

    def more(self):
        try:
            got = self.tls.recv(65_536)
        except (ssl.SSLError, ConnectionError):
            got = b""
        self.buffer += got
        return got

    def reply(self, head_only=False):
        """The next reply as (status, headers, body); None if there is none."""
        while b"\r\n\r\n" not in self.buffer:
            if not self.more():
                return None
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (text.partition(": ") for text in lines)}
        length = 0 if head_only else int(headers.get("content-length", 0))
        while len(self.buffer) < length:
            if not self.more():
                raise AssertionError("the reply was cut in half")
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return int(line.split(" ")[1]), headers, body

    def closed(self):
        """Whether the connection ended without another byte."""
        return not self.buffer and not self.more()

    def close(self):
        self.tls.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def head(*lines, method="POST", target="/", version="HTTP/1.1", host="Host: localhost", key="segment", length=None):
    """A head as bytes."""
    usual = [f"Authorization: {basic(key)}"] if key else []
    usual += [f"Content-Length: {length}"] if length is not None else []
    return "\r\n".join([f"{method} {target} {version}", *([host] if host else []), *usual, *lines, "", ""]).encode("latin-1")


def posting(call=TRACK, *lines, **how):
    """A whole request as bytes."""
    body = call if isinstance(call, bytes) else json.dumps(call).encode()
    return head("Content-Type: application/json", *lines, length=len(body), **how) + body


def test_it_says_where_it_listens_on_one_line_and_how_to_go_on(running):
    assert re.fullmatch(r"Listening on https://127\.0\.0\.1:\d+/\n", running.said)
    running.logs("demo keys")
    curl = running.logs(r"^ +(curl .*)$")[1]
    shown = subprocess.run(curl, shell=True, cwd=HERE, capture_output=True, text=True, timeout=20)
    assert shown.stdout.startswith("HTTP/1.1 200 OK"), shown
    query = running.logs(r"^ +(sqlite3 .*)$")[1]
    assert rows(running.database, re.search("'(.*)'", query)[1])[0][1:] == ("track", "user-4711")


def test_requests_are_answered_over_tls(running):
    reply = running.post()
    assert (reply.status_code, reply.content) == (200, b"")
    assert re.fullmatch(r"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", reply.headers["Date"])
    reply = running.post({"type": "juggle", "user_id": "u1"})
    assert (reply.status_code, reply.json(), reply.headers["Content-Type"]) == (
        501, {"message": "Calls of type 'juggle' are not supported"}, "application/json",
    )  # fmt: skip


def refused_bytes(record):
    """A refused-request record as the bytes that make it."""
    request = record["request"]
    body = base64.b64decode(request["body_base64"]) if "body_base64" in request else request.get("body", "").encode()
    lines = [f"{name}: {value}" for name, value in request["headers"].items()]
    return head(*lines, method=request["method"], target=request["path"], key=None) + body


def stored(process):
    """How many calls are stored."""
    return rows(process.database, "select count(*) from calls")[0][0]


@pytest.mark.parametrize("record", REFUSED, ids=lambda record: record["wrong"])
def test_a_refused_request_is_answered_and_leaves_the_connection_usable_and_nothing_stored(running, record):
    before = stored(running)
    with Wire(running) as wire:
        status, headers, body = wire.send(refused_bytes(record)).reply()
        assert (status, json.loads(body)) == (record["status"], {"message": record["message"]})
        assert headers["content-type"] == "application/json"
        if status == 413:
            assert headers["connection"] == "close" and wire.closed()
        else:
            assert wire.send(posting()).reply()[0] == 200
    assert stored(running) == before + (status != 413)


def test_fifty_requests_on_one_connection_with_refusals_among_them(running):
    with requests.Session() as session:
        session.auth = ("segment", "")
        port = None
        for number in range(50):
            wrong = number % 3 == 2
            reply = session.post(running.url, data=b"{" * 1000 if wrong else json.dumps(TRACK), stream=True, verify=running.cert, timeout=20)
            used = reply.raw.connection.sock.getsockname()[1] if reply.raw.connection else port
            assert reply.status_code == (400 if wrong else 200) and (reply.content or not wrong) and port in (None, used)
            port = used


def test_health_and_head_over_the_wire(running):
    with Wire(running) as wire:
        assert wire.send(head(method="GET", target="/health", key=None)).reply()[2] == b'{"status": "ok"}'
        status, headers, _ = wire.send(head(method="HEAD", target="/health", key=None)).reply(head_only=True)
        assert (status, headers["content-length"]) == (200, "16")
        assert wire.send(head(method="HEAD", key=None)).reply(head_only=True)[0] == 405
        assert wire.send(posting()).reply()[0] == 200


def test_the_log_has_one_line_a_request(running):
    user = "log-probe"
    for _ in range(2):
        running.post({**TRACK, "user_id": user, "event": "Two Words", "message_id": "log-1"})
    running.post({"type": "page\n\x1b[31m", "user_id": user, "name": "Forged\n2026"}, key="segment")
    running.post({**TRACK, "user_id": user}, key="segment-identify-only")
    running.logs("403 track limited log-probe 'Signed Up'")
    lines = [line for line in running.log.splitlines() if user in line]
    time_and = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
    for line, expected in zip(lines, (
        r"200 track demo log-probe 'Two Words' \d+\.\d ms ?",
        r"200 track demo log-probe 'Two Words' duplicate \d+\.\d ms ?",
        r"501 'page\\n\\x1b\[31m' demo log-probe 'Forged\\n2026' \d+\.\d ms Calls of type .* are not supported",
        r"403 track limited log-probe 'Signed Up' \d+\.\d ms This API key may not send calls of type 'track'",
    ), strict=True):  # fmt: skip
        assert re.fullmatch(time_and + expected, line), line
    assert "\x1b" not in running.log


def test_no_api_key_is_found_in_log_keys_file_or_reply(tmp_path):
    keys = tmp_path / "keys.json"
    made = add_key("Acme", "--api-keys", keys)
    key = made.stdout.strip()
    with Process(tmp_path, "--api-keys", keys, "--verbose") as process:
        replies = [process.post(key=key), process.post(key=key + "x"), process.post({"type": "x"}, key=key)]
        with Wire(process) as wire:
            replies.append(wire.send(head(f"Authorization : {basic(key)}", key=None)).reply())
        process.stop()
        secrets_of_it = (key, basic(key).split()[1])
        texts = [process.log, keys.read_text(), *(str(getattr(reply, "text", reply)) for reply in replies)]
    assert [reply.status_code for reply in replies[:3]] == [200, 401, 501]
    assert not [text for text in texts for secret in secrets_of_it if secret in text]


# Rung 1: the head


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (head(method="GE T"), 400), (head(target="/a b"), 400), (b"POST  / HTTP/1.1\r\nHost: x\r\n\r\n", 400), (b" POST / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"POST / HTTP/1.1 \r\nHost: x\r\n\r\n", 400), (b"POST /\r\nHost: x\r\n\r\n", 400), (b"GET /\r\n\r\n", 400), (head(target="/\xe9"), 400),
        (head(method="G@T"), 400), (head(version="http/1.1"), 400), (head(version="HTTP/1.10"), 400), (head(version="HTTP/0.9"), 505),
        (head(version="HTTP/2.0"), 505), (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505), (b"POST\t/\tHTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (head(target="/" + "a" * 8192), 414), (b"POST /" + b"a" * 9000, 414), (head(*["X: y"] * 100), 431), (head("X: " + "y" * 65_536), 431),
        (b"POST / HTTP/1.1\r\nX: " + b"y" * 65_600, 431), (head("X: a\r\n folded"), 400), (head("X: a\r\n\tfolded"), 400), (head("X : a"), 400),
        (head(" X: a"), 400), (head("X"), 400), (head(": a"), 400), (head("X: a\0b"), 400), (head("X: a\rb"), 400), (head("X: a\x7fb"), 400), (head("X: \x1b[31m"), 400),
        (head("X(y): a"), 400), (head("X\xe9: a"), 400), (head("X\xa0: a"), 400), (b"POST / HTTP/1.1\nHost: x\n\n", 400), (b"POST / HTTP/1.1\r\nHost: x\n", 400),
        (b"POST / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", 400), (head(host=None), 400), (head("Host: localhost"), 400), (head("host: other"), 400),
        (head("Content-Length: 5", length=5), 400), (head("Content-Length: 6", length=5), 400), (head(length="+5"), 400), (head(length="-5"), 400), (head(length="5, 5"), 400),
        (head(length="0x5"), 400), (head(length="5 5"), 400), (head(length=""), 400), (head(length="٥".encode().decode("latin-1")), 400), (head(length="1_0"), 400),
        (head("Transfer-Encoding: chunked", length=5), 400), (head("Transfer-Encoding: identity", length=0), 400), (head("Transfer-encoding:\tchunked", "Content-length: 3"), 400),
        (head("Content-Type: application/json", "Content-Type: application/json"), 400), (head(f"authorization: {basic('segment')}"), 400),
        (head("Transfer-Encoding: chunked"), 411), (head("Transfer-Encoding: xchunked"), 411),
    ],
    ids=lambda data: str(data)[:60],
)  # fmt: skip
def test_a_head_that_can_be_read_in_two_ways_is_refused_and_nothing_behind_it_is_executed(running, data, status):
    before = stored(running)
    with Wire(running) as wire:
        wire.send(data + (b"0\r\n\r\n" + posting() if b"\r\n" in data else b""))
        got, headers, body = wire.reply()
        assert (got, headers["connection"]) == (status, "close")
        assert json.loads(body)["message"]
        assert wire.closed()
    assert stored(running) == before


@pytest.mark.parametrize(
    ("data", "closes"),
    [
        (posting(), False), (b"\r\n" + posting(), False), (posting(TRACK, "Connection: keep-alive"), False), (posting(TRACK, "connection: Close"), True),
        (posting(TRACK, "Connection: x, close"), True), (posting(TRACK, "Connection: keep-alive", "Connection: close"), True), (posting(version="HTTP/1.0"), True),
        (posting(TRACK, "Connection: Keep-Alive", version="HTTP/1.0"), False), (posting(version="HTTP/1.0", host=None), True), (posting(version="HTTP/1.2"), False),
        (posting(TRACK, "X-Odd:", "x-odd:\t a\xe9\t ", "!#$%&'*+-.^_`|~: ok"), False), (posting(host="Host:"), False), (posting(target="/?" + "a" * 8190), False),
        (head("Content-Type: application/json", length="00" + str(len(json.dumps(TRACK)))) + json.dumps(TRACK).encode(), False), (posting(TRACK, *["X: y"] * 96), False),
    ],
    ids=lambda data: str(data)[:60],
)  # fmt: skip
def test_a_clean_head_is_taken_and_close_is_honoured(running, data, closes):
    with Wire(running) as wire:
        status, headers, _ = wire.send(data).reply()
        assert (status, headers["connection"]) == (200, "close" if closes else "keep-alive")
        assert wire.closed() if closes else wire.send(posting()).reply()[0] == 200


def test_bytes_split_anywhere_change_nothing_and_pipelined_requests_are_answered_in_order(running):
    stream = posting() + posting({"type": "juggle", "user_id": "u"}) + posting(b"[]") + head(method="GET", target="/health", length=0) + posting()
    expected = [200, 501, 400, 200, 200]
    for size in (len(stream), 100, 7, 1):
        with Wire(running) as wire:
            for start in range(0, len(stream), size):
                wire.send(stream[start : start + size])
            assert [wire.reply()[0] for _ in expected] == expected


def test_expect_100_continue_is_answered_only_when_the_body_is_wanted(running):
    body = json.dumps(TRACK).encode()
    expecting = head("Expect: 100-Continue", length=len(body))
    with Wire(running) as wire:
        assert wire.send(expecting).reply()[0] == 100
        assert wire.send(body).reply()[0] == 200
        assert wire.send(head("Expect: 100-continue", length=5, key="unknown")).reply()[0] == 401
        assert wire.closed()
    with Wire(running) as wire:  # an HTTP/1.0 client cannot expect
        wire.send(head("Expect: 100-continue", "Connection: keep-alive", length=len(body), version="HTTP/1.0") + body)
        assert wire.reply()[0] == 200


def test_a_body_that_is_too_long_is_refused_in_a_way_that_lets_the_client_read_the_reply(running):
    with Wire(running) as wire:
        wire.send(head(length=10_000_000))
        with contextlib.suppress(OSError):
            wire.send(b"x" * 2_000_000)
        assert wire.reply()[0] == 413
        assert wire.closed()


def test_what_does_not_come_in_time_is_408_and_silence_is_closed_without_a_word(running):
    started = time.monotonic()
    wires = [Wire(running) for _ in range(4)]
    wires[1].send(head(length=10)[:-3])
    wires[2].send(head(length=10) + b'{"a":')
    wires[3].send(posting()).reply()
    wires[3].send(b"POST")
    assert wires[0].closed() and time.monotonic() - started > 1.5
    replies = [wire.reply() for wire in wires[1:]]
    assert [(reply[0], reply[1]["connection"]) for reply in replies] == [(408, "close")] * 3
    assert [json.loads(reply[2])["message"].split(" did")[0] for reply in replies] == ["The head", "The body", "The head"]
    assert time.monotonic() - started < 4
    for wire in wires:
        wire.close()


def test_a_request_that_ends_early_is_400(running):
    for data in (posting()[:-1], posting()[:20]):
        with Wire(running) as wire:
            wire.send(data).plain = None
            socket.socket.shutdown(wire.tls, socket.SHUT_WR)
            assert wire.reply()[0] == 400


# The command line


def add_key(customer, *options):
    """Run --add-key; the finished process."""
    command = [sys.executable, str(HERE / "receiver.py"), "--add-key", customer, *map(str, options)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=20)


def test_add_key_makes_a_key_that_works_at_once_and_keeps_only_its_digest(tmp_path):
    keys = tmp_path / "keys.json"
    first = add_key("Acme", "--api-keys", keys)
    assert (first.returncode, len(first.stdout.split())) == (0, 1)
    assert keys.stat().st_mode & 0o777 == 0o600
    with Process(tmp_path, "--api-keys", keys) as process:
        assert process.post(key=first.stdout.strip()).status_code == 200
        second = add_key("Limited", "--api-keys", keys, "--calls", "identify,group", "--expires", "2999-01-01")
        process.logs("2 keys read")
        assert process.post(key=second.stdout.strip()).status_code == 403
        assert process.post(SAMPLES["group"], key=second.stdout.strip()).status_code == 200
        keys.write_text("[{]")
        process.logs(r"The keys stay as they were: .*keys\.json: ")
        assert process.post(key=first.stdout.strip()).status_code == 200
        keys.write_text("[]")
        process.logs("0 keys read")
        assert process.post(key=first.stdout.strip()).status_code == 401
        keys.unlink()
        process.logs("The keys stay as they were: .*No such file")


WRONG = {
    "a port": ["--port", "65536"], "no port": ["--port", "http"], "a path": ["--path", "segment"], "the health path": ["--path", "/health"],
    "a path with a query": ["--path", "/?a"], "an address": ["--bind", "localhorst"], "an option": ["--prot", "1"], "an argument": ["start"],
    "a timeout": ["--timeout", "0"], "no timeout": ["--timeout", "nan"], "a body": ["--max-body", "0"], "connections": ["--max-connections", "0"], "both volumes": ["--quiet", "--verbose"],
    "a missing certificate": ["--tls-cert", "nowhere.pem"], "a certificate": ["--tls-cert", "README.md"], "another's key": ["--tls-key", "fixtures/keys.json"],
    "missing keys": ["--api-keys", "nowhere.json"], "keys": ["--api-keys", "fixtures/track.json"], "a database": ["--database", "README.md"],
    "a database's folder": ["--database", "nowhere/calls.db"], "a folder as a database": ["--database", "."], "a destination": ["--destination", "nowhere:Nothing"],
    "a destination's class": ["--destination", "json:JSONDecoder"], "no class": ["--destination", "json"], "demo keys for the world": ["--bind", "0.0.0.0"],
    "calls without a key": ["--calls", "track"], "a call": ["--add-key", "A", "--calls", "tarck"], "a date": ["--add-key", "A", "--expires", "soon"],
    "no customer": ["--add-key", ""], "add to no keys": ["--add-key", "A", "--api-keys", "README.md"], "add nowhere": ["--add-key", "A", "--api-keys", "nowhere/keys.json"],
}  # fmt: skip


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
def test_a_mistake_is_one_line_that_names_it_and_exit_2(tmp_path, options):
    rest = [] if {"--add-key", "--database"} & set(options) else ["--database", str(tmp_path / "calls.db")]
    before = (FIXTURES / "keys.json").read_text()
    command = [sys.executable, "receiver.py", *(["--port", "0"] if "--port" not in options else []), *rest, *options]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert re.fullmatch(r"receiver\.py: .+\n", done.stderr), done.stderr
    assert any(word.strip("-").lower() in done.stderr.lower() for word in options[-2:])
    assert (FIXTURES / "keys.json").read_text() == before


def test_a_port_that_is_taken_is_named(running):
    done = subprocess.run([sys.executable, "receiver.py", "--port", str(running.port), "--database", ":memory:"], cwd=HERE, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and re.fullmatch(rf"receiver\.py: .*{running.port}.*in use.*\n", done.stderr)


def test_beyond_loopback_it_starts_with_keys_of_its_own_and_takes_no_demo_key_later(tmp_path):
    keys = tmp_path / "keys.json"
    add_key("Acme", "--api-keys", keys)
    with Process(tmp_path, "--api-keys", keys, "--bind", "0.0.0.0") as process:
        assert process.url.startswith("https://0.0.0.0:")
        assert "demo key" not in process.log
        keys.write_text((FIXTURES / "keys.json").read_text())
        process.logs("The keys stay as they were: .*demo key")
        assert requests.post(f"https://localhost:{process.port}/", json=TRACK, auth=("segment", ""), verify=process.cert, timeout=9).status_code == 401


def test_it_listens_on_ipv6_and_another_path(tmp_path):
    with Process(tmp_path, "--bind", "::1", "--path", "/segment/v1") as process:
        assert re.fullmatch(r"https://\[::1\]:\d+/segment/v1", process.url)
        assert process.post().status_code == 200
        assert requests.post(process.url + "/", json=TRACK, verify=process.cert, timeout=9).status_code == 404


def test_quiet_logs_no_line_for_2xx_and_verbose_logs_the_call_indented(tmp_path):
    for option in ("--quiet", "--verbose"):
        with Process(tmp_path, option) as process:
            process.post()
            process.post(key="unknown")
            process.logs(" 401 - - - - .*not known")
            assert bool(re.search(" 200 track", process.log)) is (option == "--verbose")
            assert ('\n    "event": "Signed Up"' in process.log) is (option == "--verbose")


def test_a_destination_of_ones_own_gets_the_running_program_not_a_second_copy(tmp_path):
    (tmp_path / "own.py").write_text(
        "import receiver, sys\n\n\nclass Contacts(receiver.Destination):\n    def identify(self, user_id, traits, call):\n"
        "        assert receiver is sys.modules['__main__']\n        if 'email' not in traits:\n"
        "            raise receiver.Refusal(400, 'Missing email address')\n        if traits['email'] == 'crash':\n            1 / 0\n"
        "        return 202\n"
    )
    files = [part for name in ("tls-cert", "tls-key", "api-keys") for part in (f"--{name}", HERE / receiver.parse_options({}).__dict__[name.replace("-", "_")])]
    with Process(tmp_path, "--destination", "own:Contacts", *files, cwd=tmp_path) as process:
        replies = [process.post({"type": "identify", "user_id": "u", "traits": traits}) for traits in ({}, {"email": "a@b.c"}, {"email": "crash"})]
        assert [reply.status_code for reply in replies] == [400, 202, 500]
        assert replies[0].json() == {"message": "Missing email address"}
        assert replies[2].json() == {"message": "Internal error"}
        assert process.post().status_code == 501
        assert "ZeroDivisionError" in process.log and not process.database.exists()


def test_maintenance_is_503_with_retry_after_until_a_signal_ends_it(tmp_path):
    with Process(tmp_path, "--maintenance") as process:
        reply = process.post()
        assert (reply.status_code, reply.json(), reply.headers["Retry-After"]) == (503, {"message": "Down for maintenance"}, "5")
        process.process.send_signal(signal.SIGUSR1)
        process.logs("Maintenance is off")
        assert process.post().status_code == 200
        process.process.send_signal(signal.SIGUSR1)
        process.logs("Maintenance is on")
        assert requests.get(process.url + "health", verify=process.cert, timeout=9).status_code == 503


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_exit_0_and_an_idle_connection_does_not_hold_it_up(tmp_path, number):
    with Process(tmp_path) as process, Wire(process) as wire:
        assert wire.send(posting()).reply()[0] == 200
        started = time.monotonic()
        assert process.stop(number) == 0
        assert time.monotonic() - started < 3 and wire.closed()


# From Python


class Contacts(receiver.Destination):
    """The example of the documentation."""

    def identify(self, user_id, traits, call):
        """Refuse a contact without an email address."""
        if "email" not in traits:
            raise receiver.Refusal(400, "Missing email address")


def test_serve_is_a_real_endpoint_in_a_thread_until_the_context_ends():
    with receiver.serve(Contacts(), port=0, path="/in", max_body=200) as server:
        for traits, status in (({}, 400), ({"email": "a@b.c"}, 200), ({"email": "a" * 200}, 413)):
            call = {"type": "identify", "user_id": "u", "traits": traits}
            assert requests.post(server.url, json=call, auth=("segment", ""), verify=server.tls_cert, timeout=9).status_code == status
        url, verify = server.url, server.tls_cert
    with pytest.raises(requests.ConnectionError):
        requests.post(url, verify=verify, timeout=9)
    assert not [thread for thread in threading.enumerate() if thread is not threading.main_thread()]


def test_serve_names_an_option_that_cannot_be(tmp_path):
    for options, culprit in (({"port": 70_000}, "port"), ({"colour": 1}, "colour"), ({"api_keys": tmp_path / "none"}, "none"), ({"tls_cert": "none"}, "none")):
        with pytest.raises(receiver.ConfigurationError, match=culprit):
            receiver.serve(Contacts(), **{"port": 0, **options})


def wsgi_answer(application, record):
    """What a WSGI callable answers to a refused-request record, under wsgiref's validator."""
    import io
    import wsgiref.util
    import wsgiref.validate

    request = record["request"]
    body = base64.b64decode(request["body_base64"]) if "body_base64" in request else request.get("body", "").encode()
    environ = {"REQUEST_METHOD": request["method"], "PATH_INFO": request["path"], "wsgi.input": io.BytesIO(body), "QUERY_STRING": "", "SCRIPT_NAME": ""}
    wsgiref.util.setup_testing_defaults(environ)
    for name, value in request["headers"].items():
        plain = name.upper().replace("-", "_")
        environ[plain if plain in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{plain}"] = value
    started = []

    def start_response(status, headers, exc_info=None):
        started.append((int(status.split(" ", 1)[0]), dict(headers)))
        return lambda data: None

    answer = wsgiref.validate.validator(application)(environ, start_response)
    text = b"".join(answer)
    answer.close()
    return *started[0], text


@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
def test_wsgi_gives_the_servers_answers(tmp_path):
    application = receiver.wsgi(database=tmp_path / "calls.db")
    for record in REFUSED:
        status, headers, text = wsgi_answer(application, record)
        assert (status, json.loads(text)) == (record["status"], {"message": record["message"]}), record
        assert headers["Content-Length"] == str(len(text)) and (status == 401) == ("WWW-Authenticate" in headers)
    body = json.dumps(TRACK)
    taken = {"method": "POST", "path": "/", "headers": {"Authorization": basic("segment"), "Content-Length": str(len(body))}, "body": body}
    assert wsgi_answer(application, {"request": taken})[::2] == (200, b"")
    assert rows(tmp_path / "calls.db", "select type, user_id from calls") == [("track", "u1")]
    assert wsgi_answer(application, {"request": {**taken, "headers": {**taken["headers"], "Content-Length": "500"}}})[0] == 400
    with pytest.raises(receiver.Refusal, match="not plain digits"):
        receiver.parse_environ({"REQUEST_METHOD": "POST", "CONTENT_LENGTH": "5x"})


# The project


def test_certificates_are_made_for_localhost_with_a_private_key_and_not_again(tmp_path):
    subprocess.run(["cp", "Makefile", tmp_path], cwd=HERE, check=True)
    made = subprocess.run(["make", "certs"], cwd=tmp_path, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout
    cert, key = tmp_path / "certs/localhost.pem", tmp_path / "certs/localhost-key.pem"
    assert made.startswith("Made certs/localhost.pem") and key.stat().st_mode & 0o777 == 0o600
    text = subprocess.run(["openssl", "x509", "-in", cert, "-noout", "-text"], capture_output=True, text=True, check=True).stdout
    assert "DNS:localhost, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1" in text and "prime256v1" in text
    before = cert.read_bytes()
    assert subprocess.run(["make", "certs"], cwd=tmp_path, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout == ""
    assert cert.read_bytes() == before
    cert.unlink()
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "make", "mkdir", "test", "true"):
        with contextlib.suppress(FileExistsError):
            (tools / tool).symlink_to(f"/bin/{tool}" if os.path.exists(f"/bin/{tool}") else f"/usr/bin/{tool}")
    missing = subprocess.run(["make", "certs"], cwd=tmp_path, capture_output=True, text=True, env={"PATH": str(tools)})
    assert missing.returncode and "openssl is missing" in missing.stderr


def test_the_receiver_imports_nothing_outside_the_standard_library():
    imported = re.findall(r"^(?:import|from) (\w+)", (HERE / "receiver.py").read_text(), re.M)
    assert set(imported) <= set(sys.stdlib_module_names)


# ---- An open port and a bad day --------------------------------------------------------------------------------------

SECRET, CALL = "a-key-that-is-in-no-log", json.dumps(TRACK).encode()
RESET = (socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a close with this option is a reset


def vitals(process):
    """Of a process: open files, threads, resident megabytes."""
    with open(f"/proc/{process.process.pid}/status") as status:
        found = dict(re.findall(r"^(Threads|VmRSS):\s+(\d+)", status.read(), re.M))
    return len(os.listdir(f"/proc/{process.process.pid}/fd")), int(found["Threads"]), int(found["VmRSS"]) >> 10


def until(condition, seconds=10):
    """Wait for what has no event of its own, as the threads of another process."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this did not come in time"
        time.sleep(0.02)


def ids(process):
    """The message ids that are stored."""
    return [found for (found,) in rows(process.database, "select message_id from calls")]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A receiver that takes every attack that it should not even feel; the last test looks at what is left of it."""
    keys = tmp_path_factory.mktemp("target") / "keys.json"
    keys.write_text(json.dumps([{"customer": "demo", "sha256": hashlib.sha256(SECRET.encode()).hexdigest()}]))
    with Process(keys.parent, "--timeout", "2", "--max-body", 2**21, "--api-keys", keys) as process:
        assert process.post(key=SECRET).status_code == 200
        until(lambda: vitals(process)[1] <= 3)
        process.baseline = vitals(process)[:2]
        yield process


class Load:
    """Clients that send calls as fast as they are answered, until the receiver goes or the context ends."""

    def __init__(self, process, name, clients, most=10**9):
        self.process, self.most, self.enough = process, most, threading.Event()
        self.sent, self.stored, self.others, self.seconds = set(), set(), [], []
        self.threads = [threading.Thread(target=self.client, args=(f"{name}-{number}-",)) for number in range(clients)]
        for thread in self.threads:
            thread.start()

    def client(self, name):
        """Send until it is enough."""
        with contextlib.suppress(OSError), Wire(self.process) as wire:
            for message_id in (f"{name}{number}" for number in range(self.most)):
                started = time.monotonic()
                self.sent.add(message_id)
                reply = wire.send(posting({**TRACK, "message_id": message_id})).reply()
                self.seconds.append(time.monotonic() - started)
                self.stored.add(message_id) if reply and reply[0] == 200 else self.others.append(reply or wire.buffer)
                if self.enough.is_set() or not reply or reply[1]["connection"] == "close":
                    break

    def wait(self):
        for thread in self.threads:
            thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.enough.set()
        self.wait()


@slow
def test_a_swarm_of_stuck_clients_leaves_a_normal_ones_p99_under_a_second_and_is_gone_after_the_timeout(tmp_path):
    with Process(tmp_path, "--timeout", "3") as process, selectors.DefaultSelector() as selector:
        with Load(process, "first", 1, 1) as load:
            load.wait()
        until(lambda: vitals(process)[1] <= 3)
        baseline, context = vitals(process)[:2], ssl.create_default_context(cafile=process.cert)
        begins = {"body": head(key="segment", length=5000) + b'{"type"', "trickle": b"POST /"}
        got, begun, ended = {}, {}, {}
        for kind in ["handshake"] * 100 + ["body"] * 100 + ["trickle"] * 300:
            started, plain = time.monotonic(), kind == "handshake"
            sock = socket.create_connection(("127.0.0.1", process.port)) if plain else Wire(process, context).tls
            sock.send(b"\x16\x03\x01\x02" if plain else begins[kind])
            sock.setblocking(False)
            got[sock], begun[sock] = b"", started
            selector.register(sock, selectors.EVENT_READ, kind)
        assert vitals(process)[1] > 500
        with Load(process, "normal", 1) as load:
            while selector.get_map() and time.monotonic() - started < 9:
                for key in selector.get_map().values():
                    with contextlib.suppress(OSError):
                        key.fileobj.send(b"a" if key.data == "trickle" else b"")
                for sock in [key.fileobj for key, _ in selector.select(0.1)]:
                    with contextlib.suppress(ssl.SSLWantReadError, BlockingIOError):
                        data = b""
                        with contextlib.suppress(ConnectionError):
                            data = sock.recv(65_536)
                        got[sock] += data
                        if not data:
                            ended[sock] = time.monotonic() - begun[sock]
                            selector.unregister(sock)
                            sock.close()
        assert sum(data.startswith(b"HTTP/1.1 408 ") for data in got.values()) == 400 and max(ended.values()) < 6
        assert len(load.stored) > 100 and not load.others and sorted(load.seconds)[-len(load.seconds) // 100] < 1
        until(lambda: vitals(process)[:2] == baseline)


def test_beyond_max_connections_who_has_been_idle_longest_makes_room_and_who_is_new_does_not(tmp_path):
    with Process(tmp_path, "--max-connections", "3") as process, contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(process)) for _ in range(2)]
        for wire in wires[1], wires[0]:
            assert wire.send(posting()).reply()[0] == 200
        wires.append(stack.enter_context(Wire(process)))  # this one says nothing yet, and has the nearest deadline
        assert stack.enter_context(Wire(process)).send(posting()).reply()[0] == 200
        assert [wires[number].send(posting()).reply()[0] for number in (2, 0)] == [200, 200] and wires[1].closed()


def test_beyond_max_connections_a_new_one_waits_if_none_is_idle(tmp_path):
    with Process(tmp_path, "--max-connections", "2") as process, Wire(process) as first, Wire(process) as second:
        for wire in first, second:  # each waits for its body, as the server knows
            assert wire.send(head("Expect: 100-continue", length=len(CALL))).reply()[0] == 100
        with Load(process, "third", 1, 1) as third:
            third.threads[0].join(0.5)
            assert third.threads[0].is_alive()
            assert first.send(CALL).reply()[0] == 200
        assert len(third.stored) == 1 and second.send(CALL).reply()[0] == 200


@slow
def test_a_client_that_pipelines_thousands_and_reads_no_reply_is_gone_after_the_timeout(target):
    plain, context = socket.socket(), ssl.create_default_context(cafile=target.cert)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    plain.settimeout(8)
    plain.connect(("127.0.0.1", target.port))
    with context.wrap_socket(plain, server_hostname="localhost") as tls, pytest.raises(OSError) as caught:
        for _ in range(1000):
            tls.sendall(head(target="/" + "x" * 70, length=0) * 100)
    assert not isinstance(caught.value, TimeoutError) and target.post(key=SECRET).status_code == 200


@slow
def test_after_kill_9_under_load_every_acknowledged_call_is_there_once_and_sending_all_again_changes_nothing(tmp_path):
    sent, acknowledged, chance = set(), set(), random.Random(9)
    for life in range(6):
        with Process(tmp_path) as process, Load(process, life, 6) as load:
            enough = chance.randrange(1, 400)
            until(lambda load=load, enough=enough: len(load.stored) > enough)
            process.process.kill()
        sent, acknowledged = sent | load.sent, acknowledged | load.stored
        assert not any(load.others)
    with Process(tmp_path) as process, Wire(process) as wire:
        found = sorted(ids(process))
        assert len(found) == len(set(found)) and acknowledged <= set(found) <= sent
        assert rows(process.database, "pragma integrity_check") == [("ok",)]
        wire.send(b"".join(posting({**TRACK, "message_id": name}) for name in found * 2))
        assert {wire.reply()[0] for _ in found * 2} == {200} and sorted(ids(process)) == found


class Double(sqlite3.Connection):
    """A connection that tells how it commits, and becomes read-only when told to."""

    events, readonly = [], False  # noqa: RUF012

    def execute(self, sql, *values):
        super().execute(f"pragma query_only = {int(self.readonly)}")
        cursor = super().execute(sql, *values)
        if sql == "commit":
            names = ("synchronous", "journal_mode")
            self.events.append([super(Double, self).execute(f"pragma {name}").fetchone()[0] for name in names])
        return cursor


@pytest.fixture
def doubled(tmp_path, monkeypatch):
    """A receiver in this process whose database is a double."""
    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Double))
    with receiver.serve(database=tmp_path / "calls.db", port=0) as server:
        server.port, server.cert, server.database = server.server_address[1], server.tls_cert, tmp_path / "calls.db"
        yield server


def test_a_reply_comes_after_a_commit_that_syncs(doubled, monkeypatch):
    send = ssl.SSLSocket.send

    def told(self, data, *flags):
        Double.events.extend([["reply"]] if bytes(data).startswith(b"HTTP/1.1 ") else [])
        return send(self, data, *flags)

    with Wire(doubled) as wire:
        monkeypatch.setattr(ssl.SSLSocket, "send", told)
        Double.events.clear()
        assert [wire.send(posting()).reply()[0] for _ in range(3)] == [200] * 3
        assert Double.events == [[2, "wal"], ["reply"]] * 3  # 2 is FULL: each commit is synced


@slow
def test_two_receivers_on_one_new_database_lose_and_double_nothing(tmp_path):
    first, second = (Process(tmp_path, wait=False) for _ in range(2))
    with first, second:
        for process in first, second:
            process.port = int(re.search(r":(\d+)/", process.process.stdout.readline())[1])
        loads = [Load(first, "same", 3, 100), Load(second, "same", 3, 100), Load(second, "own", 2, 100)]
        for load in loads:
            load.wait()
        assert not sum((load.others for load in loads), [])
        assert sorted(ids(first)) == sorted(set.union(*(load.stored for load in loads))) and len(ids(first)) == 500


@contextlib.contextmanager
def faulty(fault, process):
    """While this lasts the database cannot be written."""
    with contextlib.closing(sqlite3.connect(process.database, isolation_level=None)) as db:
        if fault == "read-only":
            Double.readonly = True
        elif fault == "full":
            pid, most = process.process.pid, os.path.getsize(f"{process.database}-wal")
            before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (most, before[1]))
        else:
            db.execute("begin immediate")
        yield
        Double.readonly = False
        if fault == "full":
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@slow
@pytest.mark.parametrize("fault", ["full", "locked", "read-only"])
def test_a_database_that_cannot_be_written_is_503_within_5_seconds_and_then_all_is_well_again(tmp_path, request, fault):
    with contextlib.ExitStack() as stack:
        local = fault == "read-only"
        process = request.getfixturevalue("doubled") if local else stack.enter_context(Process(tmp_path))
        wires = [stack.enter_context(Wire(process)) for _ in range(10)]
        assert wires[0].send(posting()).reply()[0] == 200
        seen, calls = [], [posting({**TRACK, "message_id": f"m{number}"}) for number in range(10)]

        def ask(wire, call):
            started = time.monotonic()
            reply = wire.send(call).reply()
            seen.append((reply[0], reply[1].get("retry-after"), time.monotonic() - started < 5))

        with faulty(fault, process):
            timers = [threading.Timer(n / 5, ask, job) for n, job in enumerate(zip(wires, calls, strict=True))]
            for step in threading.Thread.start, threading.Thread.join:
                for timer in timers:
                    step(timer)
            assert seen == [(503, "5", True)] * 10 and stored(process) == 1
        assert [wire.send(call).reply()[0] for wire, call in zip(wires, calls, strict=True)] == [200] * 10
        assert stored(process) == 11


def test_an_error_in_one_call_of_a_shared_transaction_does_not_fail_its_neighbours(tmp_path):
    trigger = "create trigger t before insert on calls when new.user_id = 'u6' begin select raise(abort, 'no'); end"
    with Process(tmp_path) as process, contextlib.ExitStack() as stack:
        wires = [stack.enter_context(Wire(process)) for _ in range(12)]
        rows(process.database, trigger)
        with faulty("locked", process):  # so that all but the first wait, and then share a transaction
            for number, wire in enumerate(wires):
                wire.send(posting({**TRACK, "user_id": f"u{number}"}))
            time.sleep(0.3)
        assert [wire.reply()[0] for wire in wires] == [200] * 6 + [500] + [200] * 5 and stored(process) == 11


@pytest.mark.parametrize("broken", [b"[" * 100_000, b'[{"customer": "\xff"}]', b"null", None], ids=lambda b: str(b)[:9])
def test_a_keys_file_that_became_broken_or_unreadable_leaves_the_last_good_keys_in_force(tmp_path, broken):
    keys, good, kept = tmp_path / "keys.json", (FIXTURES / "keys.json").read_bytes(), "The keys stay as they were"
    keys.write_bytes(good)
    with Process(tmp_path, "--api-keys", keys) as process:
        keys.unlink()
        keys.mkdir() if broken is None else keys.write_bytes(broken)
        process.logs(kept, 3)
        assert process.post().status_code == 200
        process.process.send_signal(signal.SIGHUP)
        process.logs(rf"{kept}[\s\S]*{kept}", 3)
        keys.rename(tmp_path / "broken")
        keys.write_bytes(good)
        process.logs("3 keys read")
        assert process.post().status_code == 200


class Clumsy(receiver.Destination):
    """A destination that does what it should not."""

    begun, go = threading.Event(), threading.Event()

    def track(self, user_id, event, properties, call):
        if event == "late":
            self.begun.set()
            self.go.wait(9)
        elif event == "forge":
            raise receiver.Refusal(400, f"No such user: {user_id}")
        else:
            raise {"off": CancelledError("hush"), "exit": SystemExit(1), "bytes": receiver.Refusal(400, b"x")}[event]


CLUMSINESS = {"off": 500, "exit": 500, "bytes": 400, "forge": None, "late": 200}


@pytest.mark.parametrize(("event", "status"), CLUMSINESS.items())
def test_whatever_a_destination_does_is_a_line_in_the_log_and_forges_none(caplog, event, status):
    with receiver.serve(Clumsy(), port=0) as server:
        server.port, server.cert = server.server_address[1], server.tls_cert
        with Wire(server) as wire:
            wire.send(posting({**TRACK, "event": event, "user_id": "u\r\nForged: 1\x1b"}))
            if event == "late":  # and its client does not wait for the reply
                assert Clumsy.begun.wait(5)
                wire.tls.setsockopt(*RESET)
                wire.close()
                Clumsy.go.set()
            else:
                reply = wire.reply()
                assert reply[0] == (status or reply[0]) and "forged" not in reply[1] and b"hush" not in reply[2]
        until(lambda: re.search(rf" {status or '[45]00'} track demo .* {event} ", caplog.text), 3)
        assert not re.search("^Forged|\x1b", caplog.text, re.M)


@slow
def test_sigterm_under_load_cuts_no_reply_loses_no_200_and_exits_0_within_10_seconds(tmp_path):
    for life in range(3):
        with Process(tmp_path) as process, Wire(process) as stuck, Load(process, life, 8) as load:
            stuck.send(posting()[:-1] if life == 1 else b"")
            until(lambda load=load: len(load.stored) > 200)
            started = time.monotonic()
            assert process.stop() == 0 and time.monotonic() - started < 10
            assert stuck.reply()[0] == 503 if life == 1 else stuck.closed()
        assert {other[0] for other in load.others if other} <= {503}
        assert load.stored <= set(ids(process)) and "Traceback" not in process.log


def test_sighup_gives_new_connections_the_new_certificate_and_a_broken_one_leaves_the_old_in_force(tmp_path):
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=localhost -addext"
    for name in "one", "two", "three":
        files = ["subjectAltName=DNS:localhost", "-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.pem"]
        subprocess.run([*command.split(), *files], check=True, capture_output=True)
    one, two, three = ((tmp_path / f"{name}.pem").read_text() for name in ("one", "two", "three"))
    with Process(tmp_path, "--tls-cert", tmp_path / "one.pem", "--tls-key", tmp_path / "one.key") as process:
        process.cert = tmp_path / "one.pem"
        with Wire(process) as old:
            process.cert = tmp_path / "two.pem"
            shutil.copy(tmp_path / "two.key", tmp_path / "one.key")
            for number, text in enumerate((two, "", "junk", one, three), -1):
                (tmp_path / "one.pem").write_text(text)
                process.process.send_signal(signal.SIGHUP)
                kept = rf"(The certificate stays as it was[\s\S]*){{{number + 1}}}"
                process.logs("Certificate read" if number < 0 else kept)
                with Wire(process) as new:
                    assert new.send(posting()).reply()[0] == old.send(posting()).reply()[0] == 200
        assert "Traceback" not in process.log


def track(properties):
    """A track call with these properties, given as JSON text."""
    body = f'{{"type": "track", "user_id": "u", "event": "e", "properties": {properties}}}'.encode()
    return posting(body, key=SECRET)


def object_of(parts, times):
    """An object whose keys are all that can be put together of these parts."""
    return track("{" + ",".join(f'"{"".join(key)}":0' for key in itertools.product(parts, repeat=times)) + "}")


def headed(*lines):
    """A valid call with these header lines."""
    return head(*lines, key=SECRET, length=len(CALL)) + CALL


MEDIA = "Content-Type: application/json"
HEAVY = {
    "arrays 10,000 deep": (track("[" * 10_000 + "]" * 10_000), 400),
    "objects 10,000 deep": (track('{"a":' * 10_000 + "1" + "}" * 10_000), 400),
    "arrays without an end": (track("[" * 1_000_000), 400),
    "100,000 keys": (object_of("0123456789", 5), 200),
    "hash-flooding keys": (object_of(("Ez", "FY"), 15), 200),
    "keys that become one": (object_of(("a-", "a ", "a_", "A"), 8), 200),
    "one key 100,000 times": (track("{" + '"a":0,' * 100_000 + '"a":0}'), 200),
    "capitals": (track('{"' + "aB" * 500_000 + '": 1}'), 200),
    "escapes": (track('{"a": "' + r"\u0000" * 160_000 + '"}'), 200),
    "half a surrogate": (track('{"a": "' + r"\ud83d\ude00" * 80_000 + r'\ud83d"}'), 400),
    "long numbers": (track('{"a": [' + ("9" * 300 + ",") * 3000 + "1]}"), 200),
    "a long fraction": (track('{"a": 0.' + "1" * 1_000_000 + "}"), 200),
    "a long integer": (track('{"a": ' + "1" * 1_000_000 + "}"), 400),
    "a charset with a number": (headed(f"{MEDIA}; charset*{'0' * 5000}=utf-8"), None),
    "a charset with a language": (headed(f"{MEDIA}; charset*=x'y'%ff"), None),
    "many parameters": (headed(MEDIA + "; a=b" * 9000), None),
    "an open quotation": (headed(f'{MEDIA}; "' + ";" * 60_000), None),
    "many encodings": (headed("Content-Encoding: " + "x," * 30_000), 415),
    "deep settings": (headed("X-Segment-Settings: " + base64.b64encode(b"[" * 40_000).decode()), 400),
    "many wishes": (headed("Connection: " + "," * 60_000), 200),
    "many expectations": (headed("Expect: " + "100-continue," * 4000), 200),
}


@pytest.mark.parametrize(("request_", "status"), HEAVY.values(), ids=HEAVY)
def test_a_heavy_body_or_header_is_answered_as_the_grammar_says_within_2_seconds_never_5xx(target, request_, status):
    with Wire(target) as wire:
        started = time.monotonic()
        assert wire.send(request_).reply()[0] in ((status,) if status else (200, 400, 415))
        assert time.monotonic() - started < (2 if status else 1)


ODD = ["a\0b", "\0", "'); drop table calls; --", '"', "\u202e\x1b[31m\r\nForged", "x" * 100_000, "🙂\uffff", "%s%n"]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
def test_whatever_text_an_id_or_name_is_it_is_stored_as_it_came_and_forges_no_line(target, value):
    sent = dict.fromkeys(("user_id", "anonymous_id", "message_id", "group_id", "event"), value)
    sent |= {"type": "group", "traits": {"t": value}}
    assert target.post(sent, key=SECRET).status_code == 200
    [found] = rows(target.database, "select user_id, anonymous_id, call from calls where message_id = ?", value)
    assert found[:2] == (value, value) and json.loads(found[2]) == sent
    assert not re.search("^Forged|\x1b", target.log, re.M)


def test_verbose_does_not_multiply_a_call_that_is_deep_and_wide(tmp_path):
    wide = functools.reduce(lambda inner, _: [inner], range(480), [1] * 30_000)
    with Process(tmp_path, "--verbose") as process, Wire(process) as wire:
        for call in {**TRACK, "properties": {"a": wide}}, TRACK:  # after the second the first is logged
            assert wire.send(posting(call)).reply()[0] == 200
        assert len(process.log) < 1_000_000 and vitals(process)[2] < 150


VALID = [headed(), headed("Connection: keep-alive", "X-Segment-Settings: e30="), head(method="GET", target="/health")]
PARTS = b"\r\n|\n|\r|\0| |:|\t|9|\xff|HTTP/1.0|Host: x\r\n|Content-Length: 3\r\n".split(b"|")
PARTS += b'Transfer-Encoding: chunked\r\n|Expect: 100-continue\r\n|[|"|{|\\ud800|1e999|\r\n\r\n|'.split(b"|")


def mutated(chance):
    """A valid request with a few bytes of it, or of its body only, gone, changed or added."""
    whole = chance.random() < 0.6
    data = bytearray(chance.choice(VALID) if whole else CALL)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(data))
        data[at : at + chance.choice((0, 0, 1, 1, 2, 30))] = chance.choice((chance.choice(PARTS), chance.randbytes(2)))
    return bytes(data) if whole else posting(bytes(data), key=SECRET)


@slow
def test_any_mutation_of_a_request_is_answered_with_no_fault_of_ours_and_no_wait(target):
    chance, seen, context = random.Random(4), [], ssl.create_default_context(cafile=target.cert)
    for _ in range(5000):
        with contextlib.suppress(receiver.Refusal):
            receiver.parse_head(mutated(chance).partition(b"\r\n\r\n")[0].decode("latin-1") + "\r\n", bytes)
    for _ in range(1500):
        with Wire(target, context) as wire:
            data, started = mutated(chance) + mutated(chance), time.monotonic()
            wire.send(data)
            socket.socket.shutdown(wire.tls, socket.SHUT_WR)
            seen.extend(status for status, *_ in iter(wire.reply, None))
            assert not wire.buffer and time.monotonic() - started < 1.5, data
    assert len(seen) > 1500 and set(seen) <= {100, 200, 400, 401, 404, 405, 411, 413, 415, 431, 501, 505}


OLD = [("TLSv1", "ALL"), ("TLSv1_1", "ALL"), ("TLSv1_2", "kRSA"), ("TLSv1_2", "ECDHE+SHA"), ("TLSv1_2", "aNULL")]


@pytest.mark.parametrize(("version", "ciphers"), OLD)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_neither_old_versions_nor_ciphers_without_forward_secrecy_are_spoken(target, version, ciphers):
    context = ssl.create_default_context(cafile=target.cert)
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion[version]
    with pytest.raises(OSError):
        Wire(target, context)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_what_is_spoken_has_forward_secrecy_and_http_1_1_and_neither_compression_nor_renegotiation(target, version):
    context = ssl.create_default_context(cafile=target.cert)
    context.options &= ~ssl.OP_NO_COMPRESSION
    context.maximum_version = ssl.TLSVersion[version]
    context.set_alpn_protocols(["h2", "http/1.1"])
    with Wire(target, context) as wire:
        assert wire.tls.version().replace(".", "_") == version and wire.tls.cipher()[0].startswith(("ECDHE-", "TLS_"))
        assert (wire.tls.selected_alpn_protocol(), wire.tls.compression()) == ("http/1.1", None)
    command = ["openssl", "s_client", "-tls1_2", "-connect", f"127.0.0.1:{target.port}"]
    assert "no renegotiation" in subprocess.run(command, input="R\n", capture_output=True, text=True, timeout=10).stderr


NOISE = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", headed(), b"\0" * 300, random.Random(5).randbytes(3000)]
NOISE += [b"SSH-2.0-x\r\n", b"\x80\x2e\x01\0\2", b"\x16\x03\x01\xff\xff" + b"x" * 70_000, b"\x15\x03\x03\0\2\2\x28"]


@pytest.mark.parametrize("noise", NOISE, ids=lambda data: str(data)[:20])
def test_noise_on_the_port_is_closed_quietly_with_one_line_in_the_log(target, noise):
    before = len(target.log)
    with socket.create_connection(("127.0.0.1", target.port), timeout=10) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(noise)
        sock.shutdown(socket.SHUT_WR)
        assert b"HTTP" not in b"".join(iter(lambda: sock.recv(9999), b""))
    until(lambda: len(target.log) > before)
    assert re.fullmatch(r".*Connection with.*\n", target.log[before:])


def test_who_resets_before_or_in_the_handshake_leaves_no_traceback(target):
    for number in range(300):
        with socket.create_connection(("127.0.0.1", target.port)) as sock:
            sock.send(b"\x16\x03\x01"[: number % 3])
            sock.setsockopt(*RESET)
    assert target.post(key=SECRET).status_code == 200 and "Traceback" not in target.log


def test_at_the_end_nothing_has_leaked_and_the_log_has_neither_a_traceback_nor_a_key(target):
    until(lambda: vitals(target)[:2] == target.baseline)
    assert vitals(target)[2] < 150 and rows(target.database, "pragma integrity_check") == [("ok",)]
    assert target.post(key=SECRET).status_code == 200 and target.stop() == 0
    assert not re.search(f"Traceback|{SECRET}|{basic(SECRET)[6:22]}", target.log)


# ---- The conformance kit ---------------------------------------------------------------------------------------------
#
# What is checked is an address with its API keys, nothing of receiver.py. A check is a function of it, named as the
# sentence that it checks; its docstring is the section that says so. MUST is what the first published page states,
# SHOULD what later revisions, HTTP and experience add. A check returns (kept), fails (broken), or skips (not checked).

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
        """Host and port."""
        if time.monotonic() > self.until:
            pytest.skip("the endpoint is out of reach, or so slow that no time was left")
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or 443

    def connection(self) -> http.client.HTTPSConnection:
        """A connection that opens when it is first used."""
        return http.client.HTTPSConnection(*self.address(), timeout=self.patience, context=self.context)


def target_from(environ: Mapping[str, str]) -> Target:
    """The endpoint that the variables name. If they do not, the run ends and says what it needs."""
    url, key, ca, named = (environ.get(name, "") for name in ("ENDPOINT", "API_KEY", "CA", "CALLS"))
    calls = tuple(named.split(",")) if named else tuple(OWN_FIELDS)
    if not (url.startswith("https://") and key and {*calls} <= {*OWN_FIELDS} and Path(ca or __file__).is_file()):
        needs = "ENDPOINT=https://host/path and API_KEY=key; if given, CA=file.pem and CALLS=identify,track,page,group"
        pytest.exit(f'Set {needs}: README.md, "Test your own endpoint"', 2)
    context = ssl.create_default_context(cafile=ca or None)
    if environ.get("INSECURE"):
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    keys = {"api": key, "limited": environ.get("LIMITED_KEY", ""), "expired": environ.get("EXPIRED_KEY", "")}
    return Target(url, keys, context, calls)


class Exchange(NamedTuple):
    """A request and its reply."""

    status: int  # 0: there was no reply
    headers: Message
    body: bytes
    report: str  # both as text, API keys masked
    leaks: bool  # an API key stands in the reply

    def json(self) -> Any:
        """What the body says; ... if it is not JSON."""
        try:
            return json.loads(self.body)
        except ValueError:
            return ...


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
    status, told, got = 0, Message(), b""
    try:
        link.request(method, path, body, sent)
        reply = link.getresponse()
        status, told, got = reply.status, reply.headers, reply.read()
        answer = f"HTTP/1.1 {status} {reply.reason}\n{told}{got.decode(errors='replace')}"
    except (OSError, http.client.HTTPException) as error:
        status, answer = 0, f"No reply: {str(error) or 'the connection was closed'}"
    if not connection:
        link.close()
    keys = {login.strip(":"), encoded, *target.keys.values()} - {""}
    forms = sorted({form for key in keys for form in (key, quote(key), json.dumps(key)[1:-1])}, key=len, reverse=True)
    report = "".join(
        f"\n  {mark} {line[:1_000]}" for mark, text in ((">", asked), ("<", answer))
        for line in re.sub("|".join(map(re.escape, forms)), "***", text)[:4_000].splitlines()
    )  # fmt: skip
    return Exchange(status, told, got, report, any(len(form) > 7 and form in answer for form in forms))


def expect(exchange: Exchange, due: list[str]) -> None:
    """Broken unless the status is one of those that are due."""
    if not any(re.fullmatch(status.replace("x", r"\d"), str(exchange.status)) for status in due):
        got = exchange.status or "Nothing"
        pytest.fail(f"{got} was answered, not {' or '.join(due)}{exchange.report}", pytrace=False)


def each(name: str, *values: Any, **rest: Any) -> list[dict[str, Any]]:
    """Requests that differ in one argument of send()."""
    return [{name: value, **rest} for value in values]


# The checks that are requests: section, sentence, the faults that it must find, requests. What is due stands in the
# sentence, "accepted" or statuses, or else is a function of the exchange.

MUST, SHOULD = "MUST", "SHOULD"
LOGINS = each("headers", *({"Authorization": "Basic" + value} for value in (" ???", "", " Og", " //8=")))
RAW = f'{{"type":"track","event":"Raw","message_id":"{RUN}-raw","user_id":'.encode()
REFUSALS: list[dict[str, Any]] = [
    {"headers": {"Authorization": None}}, {"login": UNKNOWN + ":"}, {"body": b'{"type": '}, {"type": "juggle"},
]  # fmt: skip
ODD = [
    *REFUSALS, *LOGINS, *each("body", b"[" * 9_000 + b"]" * 9_000, RAW + b"9" * 5_000 + b"}"),
    *each("body", b"", b"null", b'"track"', b"\xef\xbb\xbf{}", b"\xff", RAW + rb'"\ud800"}'),
    *each("type", "constructor", "__class__", "toString", "", None, 7, [], {}),
    *each("user_id", RUN + "\0", {"a": 1}, [], 1.5, True, RUN * 500), *each("message_id", {}, 7), *each("event", {}, 7),
    *each("traits", None, 7, "x", []), *each("properties", None, 7, "x", []), *each("context", None, 7, "x", []),
    *each("timestamp", "yesterday", "9999-99-99T99:99:99Z", 0, None, {}), *each("group_id", {}), *each("__proto__", {}),
    *each("headers", {"X-Segment-Settings": "?"}, {"Content-Encoding": "gzip"}, {"Content-Type": "text/plain"}),
]  # fmt: skip
TRACE = rb"Traceback \(|\.\w+:\d+:\d+\)|\.java:\d+\)|\.rb:\d+:in|\.php(:| on line )\d+|goroutine \d"
ROWS: dict[str, list[tuple[Any, ...]]] = {
    MUST: [
        *(("Request Body", f"a call of type {kind} is accepted", f"{kind}=400" * (kind != "group"),
         each("kind", kind)) for kind in OWN_FIELDS),
        ("Formatting", "text beyond ASCII is accepted", "not ASCII=400", each("context", {"locale": "Zażółć 日本 😀"})),
        ("Direct Integration", "a replay of years ago is accepted", "old=400",
         each("timestamp", "2012-02-29T23:59:59.999Z")),
        ("Status Code", "success is answered 200 or 202", "success=204", [{}],
         lambda it: it.status in (200, 202) or it.status > 299),
        ("Authorization", "a request without an API key is answered 401", "no key=200; no key=403", REFUSALS[:1]),
        ("Authorization", "another scheme than Basic is answered 401", "scheme=200", each("scheme", "Bearer")),
        ("Status Code", "malformed credentials are answered 401", "malformed=200; malformed=500", LOGINS),
        ("Status Code", "an unknown API key is answered 401", "unknown=200",
         each("login", UNKNOWN + ":", ":", ":{api}", "{api}x:")),
        ("Status Code", "an expired API key is answered 401", "expired=200", each("login", "{expired}:")),
        ("Status Code", "a key without the permission is answered 403", "limited=200", each("login", "{limited}:")),
        ("Status Code", "an empty body is answered 400", "empty=200", each("body", b"")),
        ("Status Code", "a body that is not JSON is answered 400", "not JSON=200; not JSON=500; not JSON=999",
         each("body", b'{"type": ', b"{'type': 'track'}", b"type=track&user_id=u", b"{} {}")),
        ("Status Code", "JSON that is no object is answered 400", "no object=200",
         each("body", b"[]", b'"track"', b"7", b"null")),
        ("Status Code", "a type that nobody knows is answered 501", "type=400", each("type", "juggle")),
        ("Status Code", "whatever is sent is answered and never 5xx but 501",
         "unhashable=500; inherited=500; odd user=500", ODD, lambda it: 0 < it.status < 500 or it.status == 501),
        ("Response Body", "the body of a refusal is empty or JSON with a message",
         'refusal={"error": "No"}; refusal={"message": ""}; refusal=No', REFUSALS,
         lambda it: it.status < 400 or not it.body or (isinstance(it.json(), dict) and it.json().get("message"))),
        ("Response Body", "the body of a refusal is empty or typed as JSON", "typed=text/html", REFUSALS,
         lambda it: it.status < 400 or not it.body or it.headers.get_content_type() == "application/json"),
    ],
    SHOULD: [
        ("Formatting, later", "keys in camelCase are accepted", "camel=400", each("camel", True)),
        ("Spec, common fields", "an anonymous call is accepted", "anonymous=400", each("user_id", None, ...)),
        ("Spec, common fields", "a field that nobody knows is accepted", "colour=400", each("colour", {"red": [1]})),
        ("Spec, limits", "a call of 32 KB is accepted", "long=413", each("context", {"title": "x" * 32_000})),
        ("Retries, later", "the same call is accepted twice", "again=409", each("message_id", *[RUN + "-twice"] * 2)),
        ("RFC 9110 §11.1", "the scheme in small letters is accepted", "small=401", each("scheme", "basic")),
        ("RFC 9110 §8.3", "a Content-Type with a charset is accepted", "charset=415",
         each("headers", {"Content-Type": "application/json; charset=utf-8"})),
        ("Response Body", "the body of a success is empty or JSON", "body=OK", [{}],
         lambda it: it.status > 299 or not it.body or it.json() is not ...),
        ("Authorization", "credentials without a colon are answered 401", "no colon=200", each("login", "{api}")),
        ("Authorization", "a password beside the API key is answered 401", "password=200", each("login", "{api}:x")),
        ("RFC 9110 §11.6", "a reply of 401 has WWW-Authenticate", "no challenge=1", REFUSALS[:2],
         lambda it: it.status != 401 or "WWW-Authenticate" in it.headers),
        ("RFC 8259 §8.1", "a body that is not UTF-8 is answered 400", "not UTF-8=200",
         each("body", RAW + b'"\xe9"}')),
        ("RFC 8259 §6", "a number that JSON does not have is answered 400", "NaN=200",
         each("context", {"n": float("nan")})),
        ("Status Code", "a call without a type is answered 400", "no type=200", each("type", ..., None, 7)),
        ("Spec, common fields", "a call of no user is answered 400", "no user=200",
         each("user_id", ..., anonymous_id=...) + each("user_id", None, anonymous_id=None)),
        ("Request Body", "a track without an event is answered 400", "no event=200",
         each("event", ..., None, kind="track")),
        ("Request Body", "a group without its id is answered 400", "no group=200",
         each("group_id", ..., None, kind="group")),
        ("Request Body", "traits that are no object are answered 400", "traits=200",
         each("traits", "x", [], kind="identify")),
        ("Request Body", "properties that are no object are answered 400", "properties=200",
         each("properties", "x", [], kind="track")),
        ("Spec, common fields", "a timestamp that is no time is answered 400", "time=200",
         each("timestamp", "yesterday")),
        ("Accepting Segment Data", "another method is answered 405 or 404", "method=200",
         each("method", "GET", "PUT", "DELETE")),
        ("Response Body", "a refusal says why", "refusal=", REFUSALS, lambda it: it.status < 400 or it.body),
        ("experience", "no reply shows an API key", 'refusal={"message": "Not {login}"}', REFUSALS,
         lambda it: not it.leaks),
        ("experience", "no reply shows a traceback", 'refusal={"message": "Traceback (most"}', REFUSALS,
         lambda it: not re.search(TRACE, it.body)),
    ],
}  # fmt: skip
Check = Callable[[Target], None]
LEVELS: dict[Check, str] = {}
FAULTS: list[tuple[str, str, Check]] = []  # name and value of each, and the check that must find it


def mark(level: str, faults: str) -> Callable[[Check], Check]:
    """Register a check as MUST or SHOULD, with the faults that it finds."""

    def register(check: Check) -> Check:
        LEVELS[check] = level
        FAULTS.extend((*fault.split("=", 1), check) for fault in faults.split("; ") if fault)  # type: ignore[misc]
        return check

    return register


@mark(MUST, "certificate=1")
def the_certificate_is_valid_for_the_host(target: Target) -> None:
    """Accepting Segment Data"""
    try:
        with contextlib.closing(target.connection()) as link:
            link.connect()
    except OSError as error:
        pytest.fail(f"{target.url}: {error}", pytrace=False)
    if target.context.verify_mode == ssl.CERT_NONE:
        pytest.skip("INSECURE is set")


@mark(SHOULD, "silent=1")
def an_answer_comes_within_5_seconds(target: Target) -> None:
    """Retries, later"""
    expect(send(target), ["xxx"])


@mark(SHOULD, "one by one=1")
def sixteen_connections_at_once_are_answered_within_5_seconds(target: Target) -> None:
    """Retries, later"""
    with ThreadPoolExecutor(16) as pool, contextlib.ExitStack() as stack:
        links = [stack.enter_context(contextlib.closing(target.connection())) for _ in range(16)]
        for exchange in list(pool.map(lambda link: send(target, connection=link), links)):
            expect(exchange, ["xxx"])


FIRST = tuple(LEVELS)  # each of these runs alone


@mark(MUST, "plain=1")
def plain_http_is_not_served(target: Target) -> None:
    """Accepting Segment Data"""
    host, port = target.address()
    for also in {port, 80 if port == 443 else port}:
        with contextlib.closing(http.client.HTTPConnection(host, also, timeout=target.patience)) as link:
            exchange = send(target, connection=link, login=UNKNOWN + ":")  # no real key goes out in the clear
        if exchange.status == 401 or 200 <= exchange.status < 300:
            pytest.fail(f"On port {also}, without TLS:{exchange.report}", pytrace=False)


@mark(SHOULD, "old TLS=1")
def tls_1_0_and_1_1_are_refused(target: Target) -> None:
    """RFC 8996"""
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
                pytest.fail(f"{version.name} was offered and taken", pytrace=False)


@mark(SHOULD, "closes=200; closes=400; unread=1")
def a_connection_outlives_a_call_and_a_refusal(target: Target) -> None:
    """Headers, later"""
    for case in each("method", "POST") + REFUSALS:
        with contextlib.closing(target.connection()) as link:
            first = send(target, connection=link, **case)
            link.auto_open = 0  # http.client would open it again without a word
            second = send(target, connection=link)
        if first.status and not 200 <= second.status < 300:
            pytest.fail(f"The second request failed:{first.report}{second.report}", pytrace=False)


def row_check(section: str, sentence: str, cases: list[dict[str, Any]], kept: Any = None) -> Check:
    """The check that a row stands for."""

    def check(target: Target) -> None:
        for case in cases:
            exchange = send(target, **case)
            if not kept:
                expect(exchange, re.findall(r"\d\d\d", sentence) or ["2xx"])
            elif not kept(exchange):
                pytest.fail("Here it does not hold:" + exchange.report, pytrace=False)

    check.__name__, check.__doc__ = sentence.replace(" ", "_"), section
    return check


for level, table in ROWS.items():
    for section, sentence, faults, *due in table:
        mark(level, faults)(row_check(section, sentence, *due))

# The run and its report.

Outcome = BaseException | None  # nothing: kept; pytest's Failed: broken; pytest's Skipped: not checked
FINDINGS: dict[Check, Outcome] = {}


def judge(check: Check, target: Target) -> Outcome:
    """What comes of a check."""
    try:
        check(target)
        return None
    except pytest.skip.Exception as reason:
        return pytest.skip.Exception(f"Not checked: {says(check)}: {reason}")
    except pytest.fail.Exception as reason:
        told = f"{LEVELS[check]} broken: {says(check)} ({check.__doc__})\n{reason}"
        return pytest.fail.Exception(told, pytrace=False)


def says(check: Check) -> str:
    """The sentence."""
    return check.__name__.replace("_", " ")


def judge_all(target: Target) -> dict[Check, Outcome]:
    """What comes of every check. Nothing is sent after 30 seconds."""
    target, found = target._replace(until=time.monotonic() + 30), {}
    for check in FIRST:
        found[check] = judge(check, target)
        if isinstance(found[check], pytest.fail.Exception) and check is not FIRST[-1]:
            target = target._replace(until=0)  # out of reach
    with ThreadPoolExecutor(8) as pool:
        return found | dict(pool.map(lambda check: (check, judge(check, target)), [*LEVELS][len(FIRST):]))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make each check a test. Here a module without conftest.py gets hold of pytest's configuration."""
    if "check" in metafunc.fixturenames:
        metafunc.config.addinivalue_line("markers", "conformance: check the endpoint that ENDPOINT and API_KEY name")
        checks = [pytest.param(check, id=check.__name__, marks=pytest.mark.conformance) for check in LEVELS]
        metafunc.parametrize("check", checks)
        if metafunc.config.getoption("markexpr") == "conformance":
            metafunc.config.pluginmanager.register(Report())


class Report:
    """What pytest does not show by itself."""

    def pytest_report_collectionfinish(self) -> str:
        """Say what will be sent where."""
        return f"Calls go to {target_from(os.environ).url} with user id {RUN}, and message ids that begin so"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show the SHOULD that are broken, what was not checked and why, and the sum."""
        fail, skip = pytest.fail.Exception, pytest.skip.Exception
        for check, outcome in FINDINGS.items():
            if isinstance(outcome, skip) or (outcome and LEVELS[check] == SHOULD):
                terminalreporter.write_line(f"{outcome}\n" if isinstance(outcome, fail) else str(outcome))
        kinds = [type(outcome) for outcome in FINDINGS.values()]
        counts = f"{kinds.count(type(None))} kept, {kinds.count(fail)} broken, {kinds.count(skip)} not checked"
        terminalreporter.write_line(counts if kinds else "Nothing was checked")


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> dict[Check, Outcome]:
    """What comes of the checks at the endpoint that the variables name, or at the project's own."""
    if request.config.getoption("markexpr") == "conformance":
        target = target_from(os.environ)
    else:
        running = request.getfixturevalue("running")
        keys = {"api": "segment", "limited": "segment-identify-only", "expired": "segment-expired"}
        target = Target(running.url, keys, ssl.create_default_context(cafile=running.cert))
    FINDINGS.update(judge_all(target))
    return FINDINGS


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_at_the_endpoint(check: Check, findings: dict[Check, Outcome], request: pytest.FixtureRequest) -> None:
    """An endpoint of others is not failed for what is only wise; our own is."""
    outcome, others = findings[check], request.config.getoption("markexpr") == "conformance"
    if isinstance(outcome, pytest.fail.Exception) and LEVELS[check] == SHOULD and others:
        pytest.xfail(str(outcome))
    if outcome:
        raise outcome


# The proof that the kit bites: a tiny endpoint with one fault at a time.

FAULTY_KEYS = {"api": "kit-key-5f2c", "limited": "kit-limited-77d0", "expired": "kit-expired-0a91"}


NEVER = "whatever is sent is answered and never 5xx but 501"


class Faulty(BaseHTTPRequestHandler):
    """A tiny endpoint that keeps every sentence, but for the faults of its server."""

    protocol_version, wbufsize, disable_nagle_algorithm = "HTTP/1.1", -1, True
    server: FaultyServer

    def do_POST(self) -> None:  # noqa: N802
        """Answer as is due, or as the fault says."""
        faults = self.server.faults
        unread = "unread" in faults and "Authorization" not in self.headers
        body = self.rfile.read(-1 if "silent" in faults else 0 if unread else int(self.headers["Content-Length"]))
        said = {name: faults.get(name, due) for name, (applies, due) in self.objections(body).items() if applies}
        status = next(filter(None, said.values()), faults.get("success", 200))
        self.close_connection = status == 999  # dead, without a word
        if self.close_connection:
            return
        reply = faults.get("body", "") if status < 300 else faults.get("refusal", '{"message": "No"}')
        reply = reply.replace("{login}", self.headers.get("Authorization", ""))
        self.send_response(status)
        fields = {"Content-Length": str(len(reply)), "Content-Type": faults.get("typed", "application/json")}
        fields |= {"WWW-Authenticate": "Basic"} if "no challenge" not in faults else {}
        fields |= {"Connection": "close"} if status >= faults.get("closes", 999) else {}
        for field in fields.items():
            self.send_header(*field)
        self.end_headers()
        self.wfile.write(reply.encode())

    do_GET = do_PUT = do_DELETE = do_POST  # noqa: N815

    def objections(self, body: bytes) -> dict[str, tuple[object, int]]:
        """What could be objected to a request: whether it applies, and the status that is due; 0 if it is all right."""
        scheme, _, encoded = self.headers.get("Authorization", "").partition(" ")
        key, colon, password, text, call = "", "", "?", body.decode(errors="replace"), None
        with contextlib.suppress(ValueError):
            key, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        snake = re.sub(r'[A-Z](?=\w*":)', lambda found: "_" + found[0].lower(), text)
        with contextlib.suppress(ValueError, RecursionError):
            call = json.loads(snake)
        is_object, call = isinstance(call, dict), call if isinstance(call, dict) else {"type": call}
        kind, user, again = call.get("type"), call.get("user_id"), call.get("message_id") == RUN + "-twice"
        self.server.seen += again
        return {
            "method": (self.command != "POST", 405), "no key": (not scheme, 401),
            "scheme": (scheme.lower() != "basic", 401), "small": (scheme == "basic", 0),
            "malformed": (password == "?" or not key + colon, 401), "no colon": (not colon, 401),
            "unknown": (key not in FAULTY_KEYS.values(), 401), "password": (password, 401),
            "expired": (key == FAULTY_KEYS["expired"], 401), "charset": ("charset" in self.headers["Content-Type"], 0),
            "empty": (not body, 400), "long": (len(body) > 32_000, 0), "not UTF-8": ("\ufffd" in text, 400),
            "NaN": ("NaN" in text, 400), "not JSON": (kind is None and not is_object and text != "null", 400),
            "no object": (not is_object, 400), "not ASCII": (not body.isascii(), 0), "camel": (snake != text, 0),
            "unhashable": (isinstance(kind, list), 0), "inherited": (kind == "constructor", 0),
            "no type": (not isinstance(kind, str), 400), "type": (str(kind) not in OWN_FIELDS, 501),
            str(kind): (True, 0), "limited": (key == FAULTY_KEYS["limited"] and kind != "identify", 403),
            "colour": ("colour" in call, 0), "no user": (not user and not call.get("anonymous_id"), 400),
            "anonymous": (not user, 0), "odd user": (isinstance(user, dict), 0),
            "no event": (kind == "track" and not call.get("event"), 400),
            "no group": (kind == "group" and not call.get("group_id"), 400),
            "again": (again and self.server.seen > 1, 0),
            "traits": (not isinstance(call.get("traits", {}), dict), 400),
            "old": ("2012-" in str(call.get("timestamp")), 0),
            "properties": (not isinstance(call.get("properties", {}), dict), 400),
            "time": (call.get("timestamp") == "yesterday", 400),
        }  # fmt: skip

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class FaultyServer(ThreadingHTTPServer):
    """It serves over TLS on a free port until the context ends; some faults are its own."""

    request_queue_size = 64

    def __init__(self, faults: Mapping[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Faulty)
        self.faults, self.seen, self.context = faults, 0, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(HERE / "certs/localhost.pem", HERE / "certs/localhost-key.pem")
        if "old TLS" in faults:
            self.context.minimum_version = ssl.TLSVersion.TLSv1
            self.context.set_ciphers("ALL:@SECLEVEL=0")
        self.url = f"https://localhost:{self.server_port}/"
        threading.Thread(target=self.serve_forever, args=(0.01,)).start()

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection."""
        link, address = super().get_request()
        if "plain" not in self.faults or link.recv(1, socket.MSG_PEEK) != b"P":
            link = self.context.wrap_socket(link, server_side=True, do_handshake_on_connect=False)
        return link, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection."""
        server = HTTPServer if "one by one" in self.faults else ThreadingHTTPServer
        server.process_request(self, request, client_address)

    def handle_error(self, *_: object) -> None:
        """Say nothing."""

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


def judged_with(fault: str, value: str) -> tuple[list[str], str]:
    """The sentences that an endpoint with this fault breaks, and all that is said about it."""
    with FaultyServer({fault: int(value) if value.isdigit() else value}) as server:
        context = ssl.create_default_context(cafile=None if fault == "certificate" else HERE / "certs/localhost.pem")
        patience = 1.5 if fault in ("silent", "one by one") else 5.0
        found = judge_all(Target(server.url, FAULTY_KEYS, context, patience=patience))
    broken = [says(check) for check, outcome in found.items() if isinstance(outcome, pytest.fail.Exception)]
    return broken, "\n".join(str(outcome) for outcome in found.values() if outcome)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
@pytest.mark.parametrize(("fault", "value", "check_for_it"), FAULTS, ids=lambda part: getattr(part, "__name__", part))
def test_a_fault_breaks_the_sentence_that_names_it_and_no_other(fault: str, value: str, check_for_it: Check) -> None:
    """A crash is also what is never due, whatever is sent."""
    broken, told = judged_with(fault, value)
    crash = [NEVER] if value in ("500", "999") else []
    assert sorted(broken) == sorted({says(check_for_it), *crash}), told
    for key in FAULTY_KEYS.values():
        assert key not in told and base64.b64encode(f"{key}:".encode()).decode() not in told


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
def test_without_a_fault_every_sentence_is_kept() -> None:
    assert judged_with("none", "") == ([], "")


@pytest.mark.parametrize(("faults", "status", "line"), [
    ({"no key": 200, "small": 401}, 1, r"\n48 kept, 2 broken, 0 not checked\n"),
    ({"small": 401}, 0, r"\n> Authorization: basic \*\*\*\n(.*\n)+\n49 kept, 1 broken, 0 not checked\n"),
    (None, 2, "Set ENDPOINT=https://host/path and API_KEY=key"),
])  # fmt: skip
def test_only_a_must_that_is_broken_fails_the_run(faults: dict[str, Any] | None, status: int, line: str) -> None:
    """The SHOULD are in the report all the same, and a run without an endpoint says what it needs."""
    with FaultyServer(faults or {}) as server:
        named = {f"{name.upper()}_KEY": key for name, key in FAULTY_KEYS.items()}
        named |= {"CA": str(HERE / "certs/localhost.pem"), "ENDPOINT": server.url if faults else ""}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "conformance", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env={**os.environ, **named}, capture_output=True, text=True, timeout=60)
    assert done.returncode == status and re.search(line, done.stdout.replace("  > ", "> ")), done.stdout
    assert not any(key in done.stdout + done.stderr for key in FAULTY_KEYS.values())


# ---- The README ------------------------------------------------------------------------------------------------------

README = (HERE / "README.md").read_text()


def readme_blocks(language):
    """The fenced blocks in one language, each with the block of text after it that shows its output."""
    blocks = [*re.findall(r"^```(\w+)\n(.*?)^```$", README, re.M | re.S), ("", "")]
    pairs = [(*block, shown if kind == "text" else None) for block, (kind, shown) in itertools.pairwise(blocks)]
    return [(text, shown) for name, text, shown in pairs if name == language]


def readme_module(name):
    """The block of Python that has this class, as a module."""
    [text] = [text for text, _ in readme_blocks("python") if f"class {name}(" in text]
    module = types.ModuleType(name)
    exec(compile(text, "README.md", "exec"), module.__dict__)
    return module


def alike(text):
    """Output without what is another every time: the Date header and API keys."""
    return re.sub(r"\w{3}, \d\d \w{3} \d{4} [\d:]+ GMT|^[\w-]{43}$", "…", text.replace("\r", ""), flags=re.M).strip()


def test_every_command_of_the_readme_works_as_printed_and_shows_what_is_shown(tmp_path):
    subprocess.run(["cp", "-r", "receiver.py", "fixtures", "Makefile", "certs", tmp_path], cwd=HERE, check=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    (run, greeting), *commands = [(text.replace("8443", port), shown) for text, shown in readme_blocks("sh")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    options = {"cwd": tmp_path, "env": {**ENVIRONMENT, "PORT": port, "PATH": path}, "text": True}
    with open(tmp_path / "log", "w") as log:
        options |= {"start_new_session": True}
        server = subprocess.Popen(["sh", "-c", run], stdout=subprocess.PIPE, stderr=log, **options)
    first, rest = greeting.replace("8443", port).split("\n", 1)
    try:
        assert server.stdout.readline().strip() == first
        for command, shown in commands:
            done = subprocess.run(["sh", "-ec", command], capture_output=True, timeout=60, **options)
            assert done.returncode == 0, done
            assert shown is None or alike(done.stdout) == alike(shown), command
    finally:
        os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does
        server.communicate(timeout=15)
    assert rest.strip() in (tmp_path / "log").read_text()


def test_help_and_readme_name_the_same_options_with_the_same_defaults():
    command = [sys.executable, "receiver.py", "--help"]
    text = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=20, check=True).stdout
    table = README.partition("## Options")[2].partition("## ")[0]
    assert set(re.findall(r"--[a-z][a-z-]+", text)) - {"--help"} == set(re.findall(r"--[a-z][a-z-]+", table))
    helped = re.findall(r"^ +(--[a-z-]+) (?:(?!^ +-).)*?\(([^\s()]+)\)$", text, re.M | re.S)
    assert helped == re.findall(r"^\| `(--[a-z-]+)[^|]* \| `?([^|` ]+)`? \|", table, re.M)


def test_every_link_of_the_readme_leads_to_a_function_a_heading_or_a_file():
    functions = re.findall(r"\[`(\w+)`\]\(receiver\.py\)", README)
    assert len(functions) > 15 and not [name for name in functions if not hasattr(receiver, name)]
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S), re.M)
    headings = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    for link in set(re.findall(r"\]\(([^)]+)\)", README)):
        assert link.startswith("https:") or link[1:] in headings or (HERE / link).exists(), link


def answers(destination, *calls, settings=None):
    """What a destination answers to these calls through the whole protocol: (status, message), or (status,)."""
    encode = lambda text: base64.b64encode(text.encode()).decode()  # noqa: E731
    headers = {"authorization": "Basic " + encode("segment:"), "x-segment-settings": encode(json.dumps(settings or {}))}
    endpoint = receiver.Endpoint(destination, receiver.parse_keys((HERE / "fixtures/keys.json").read_text()))
    replies = []
    for call in calls:
        data = json.dumps({"type": "identify", "user_id": "u1", **call}).encode()
        request = receiver.Request("POST", "/", headers, len(data), lambda data=data: data)
        replies.append(receiver.answer(request, endpoint, lambda: "2026-01-15T12:00:00.000Z"))
    return [(reply.status, *reply.body.values()) for reply in replies]


OK, LIST = (200,), {"traits": {"list": "news"}}
ORDER = {"type": "track", "event": "Order Completed", "message_id": "m1"}
WORK, HOME = {"traits": {"workEmail": "a@b.c"}}, {"traits": {"email": "a@b.c"}}
FORGOTTEN = [{"type": "delete", "timestamp": "2026-01-02"}, {"timestamp": "2026-01-01"}, {"timestamp": "2026-01-03"}]
SOLUTIONS = [
    ("Mailing", {"lists": set()}, {}, [LIST], [(503, "The lists are not loaded yet")]),
    ("Mailing", {"lists": {"news"}}, {}, [LIST, {}], [OK, (404, "There is no such list")]),
    ("Paid", {}, {}, [ORDER, {}], [(403, "Your plan does not include track calls"), OK]),
    ("Addresses", {}, {"emailField": "workEmail"}, [WORK, HOME], [OK, (400, "Missing work_email")]),
    ("Addresses", {}, {}, [HOME, WORK], [OK, (400, "Missing email")]),
    ("Contacts", {}, {}, [HOME, {}], [OK, (400, "Missing email address")]),
    ("Contacts", {}, {}, [{"timestamp": "noon"}], [(400, "The field timestamp is not an ISO 8601 time")]),
    ("Forgetful", {}, {}, [*FORGOTTEN, {"user_id": "u2"}], [OK, (410, "This user asked to be forgotten"), OK, OK]),
]


@pytest.mark.parametrize(("name", "state", "settings", "calls", "expected"), SOLUTIONS)
def test_a_solution_answers_as_its_exercise_says(name, state, settings, calls, expected):
    destination = getattr(readme_module(name), name)()
    destination.__dict__.update(state)
    assert answers(destination, *calls, settings=settings) == expected


def test_a_solution_keeps_what_its_exercise_says(tmp_path, monkeypatch):
    calls = [{"traits": {"plan": day}, "timestamp": f"2026-01-{day}"} for day in ("01", "02", "03")]
    for order in (calls, calls[::-1], calls[1:] + calls[:1]):
        answers(plans := readme_module("Plans").Plans(), *order)
        assert plans.newest["demo", "u1"][1] == "03"
    orders = readme_module("Orders").Orders()
    assert answers(orders, ORDER, {**ORDER, "message_id": "m2"}, ORDER) == [OK] * 3 and len(orders.seen) == 2
    monkeypatch.chdir(tmp_path)
    assert answers(readme_module("Spool").Spool(), ORDER) == [(202,)]
    assert json.loads(Path("spool.jsonl").read_text())[:2] == ["demo", "m1"]


def run_postgresql(tool, *arguments):
    """Run a tool of PostgreSQL, which refuses to run as root. Skips, and says why, where it is not found."""
    if not all(map(shutil.which, ("setpriv", tool))):
        pytest.skip(f"setpriv or {tool}, of PostgreSQL, is not found on the path")
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    options = {"cwd": "/tmp", "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 60}
    subprocess.run([*nobody, shutil.which(tool), *arguments], check=True, **options)


def test_the_postgresql_destination_stores_once_and_answers_503_while_it_is_away(tmp_path, monkeypatch):
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
