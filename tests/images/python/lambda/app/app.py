"""A Lambda function that does what its event asks for."""

import json
import os
import socket
import time

if os.environ.get("FAIL_INIT"):
    raise RuntimeError("no such sensor")

# Left by an extension that was there before.
SPIED = os.path.exists("/tmp/spy")


def flood(request_id, size):
    """Answers without a length, past what any answer may have."""
    host, port = os.environ["AWS_LAMBDA_RUNTIME_API"].split(":")
    api = socket.create_connection((host, int(port)))
    path = f"/2018-06-01/runtime/invocation/{request_id}/response"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    try:
        api.sendall(head.encode())
        for _ in range(size // 65536):
            api.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
    except OSError:
        pass


def handler(event, context):
    do = event.get("do") if isinstance(event, dict) else None
    if do == "fail":
        raise ValueError("bad reading")
    if do == "exit":
        os._exit(9)
    if do == "sleep":
        time.sleep(float(event["seconds"]))
    if do == "large":
        return "x" * int(event["bytes"])
    if do == "flood":
        flood(context.aws_request_id, int(event["bytes"]))
    if do == "pid":
        return os.getpid()
    if do == "print":
        print("hello from inside")
    return {
        "event": event,
        "name": context.function_name,
        "memory": context.memory_limit_in_mb,
        "id": context.aws_request_id,
        "left": context.get_remaining_time_in_millis() > 0,
        "subject": context.client_context.custom.get("subject") if context.client_context else None,
        "handler": os.environ["_HANDLER"],
        "spied": SPIED,
        "trace": os.environ.get("_X_AMZN_TRACE_ID"),
    }
