"""Sends CloudEvents in each mode, made by the SDK: send_events.py URL TYPE."""

import json
import sys
import urllib.request

from cloudevents.core.bindings.http import to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

url, kind = sys.argv[1:3]


def event(name):
    attributes = {"id": name, "source": "/sdk", "type": kind, "datacontenttype": "application/json"}
    return CloudEvent(attributes=attributes, data={"mode": name})


def send(headers, body):
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    with urllib.request.urlopen(request) as answer:
        print(answer.status)


for message in (to_binary_event(event("binary")), to_structured_event(event("structured"))):
    send(dict(message.headers), message.body)
batch = [json.loads(to_structured_event(event(name)).body) for name in ("batch-1", "batch-2")]
send({"content-type": "application/cloudevents-batch+json"}, json.dumps(batch).encode())
