# SPDX-License-Identifier: MIT
"""What the receiver promises, sentence by sentence, in the order of receiver.py.

First the protocol without a network, then the store on real files, then the server: a process, TLS, sockets.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

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


def readme_blocks(language):
    """The fenced blocks of the README in one language, each with the block of text after it that shows its output."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", (HERE / "README.md").read_text(), re.M | re.S)
    following = [*blocks[1:], ("", "")]
    return [(text, shown if kind == "text" else None) for (name, text), (kind, shown) in zip(blocks, following, strict=True) if name == language]


def test_the_readmes_commands_work_as_printed(tmp_path):
    for name in ("receiver.py", "fixtures", "Makefile", "certs"):
        subprocess.run(["cp", "-r", name, tmp_path], cwd=HERE, check=True)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    (run, greeting), *commands = readme_blocks("sh")
    environment = {**ENVIRONMENT, "PORT": port, "PYTHON": sys.executable}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(run, shell=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
    try:
        assert server.stdout.readline() == greeting.splitlines(True)[0].replace("8443", port)
        for command, shown in commands:
            command = command.replace("8443", port).replace("python3", sys.executable)
            done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, done
            if shown is not None:
                alike = [re.sub(r"\w{3}, \d\d \w{3} [\d: ]+GMT", "DATE", text).replace("\r", "").strip() for text in (done.stdout, shown)]
                assert alike[0] == alike[1]
        sent = subprocess.run(["make", "send"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        assert re.fullmatch(r"identify +200\ntrack +200\npage +200\ngroup +200\n", sent.stdout), sent
    finally:
        os.killpg(server.pid, signal.SIGINT)  # as Ctrl-C does
        server.wait(15)
        server.stdout.close()
    assert "".join(greeting.splitlines(True)[1:]).replace("8443", port).strip() in (tmp_path / "log").read_text()


def test_the_readmes_destination_works(tmp_path):
    [(text, _)] = readme_blocks("python")
    (tmp_path / "contacts.py").write_text(text)
    files = [part for name in ("tls_cert", "tls_key", "api_keys") for part in ("--" + name.replace("_", "-"), HERE / getattr(receiver.parse_options({}), name))]
    with Process(tmp_path, "--destination", "contacts:Contacts", *files, cwd=tmp_path) as process:
        assert process.post({"type": "identify", "user_id": "u1"}).json() == {"message": "Missing email address"}
        assert process.post(SAMPLES["identify"]).status_code == 200


def test_help_and_readme_name_the_same_options():
    done = subprocess.run([sys.executable, "receiver.py", "--help"], cwd=HERE, capture_output=True, text=True, timeout=20)
    options = set(re.findall(r"--[a-z-]+", done.stdout)) - {"--help"}
    table = (HERE / "README.md").read_text().partition("## Options")[2].partition("## A destination")[0]
    assert options == set(re.findall(r"--[a-z-]+", table)) - {"---"}
