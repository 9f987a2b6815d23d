"""A Lambda function that does what its event asks for."""

import json
import os
import time

if os.environ.get("FAIL_INIT"):
    raise RuntimeError("no such sensor")


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
    }
