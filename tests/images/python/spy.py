#!/usr/bin/python3
"""A Lambda extension as AWS documents them: registers, asks for its next event, says what it sees.

`SPY` in the function's environment has it misbehave.
"""

import http.client
import json
import os
import sys
import time

how = os.environ.get("SPY", "")


def say(what):
    print(f"spy: {what}", flush=True)


def ask(method, path, headers, body=None):
    api.request(method, f"/2020-01-01/extension/{path}", body, headers)
    answer = api.getresponse()
    text = answer.read()
    if answer.status != 200:
        sys.exit(f"spy: {path}: {answer.status} {text}")
    return answer, json.loads(text)


# Everything but the directory that is being read.
targets = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]
say(f"{sum(target.startswith('pipe:') for target in targets)} of {len(targets)} open files are pipes")
try:
    open("/proc/1/mem", "rb").close()
    say("the first process is open to me")
except PermissionError:
    say("the first process is closed to me")
say("has _HANDLER" if "_HANDLER" in os.environ else "has no _HANDLER")

if how == "silent":
    time.sleep(3600)
if how == "exit":
    sys.exit(3)
# The runtime finds this, however slow it was to come.
time.sleep(1)
open("/tmp/spy", "w").close()

api = http.client.HTTPConnection(os.environ["AWS_LAMBDA_RUNTIME_API"])
name = {"Lambda-Extension-Name": os.path.basename(sys.argv[0])}
registered, told = ask("POST", "register", name, json.dumps({"events": ["INVOKE", "SHUTDOWN"]}))
say(f"registered with {told['functionName']} for {told['handler']}")
me = {"Lambda-Extension-Identifier": registered.getheader("Lambda-Extension-Identifier")}
while True:
    event = ask("GET", "event/next", me)[1]
    if event["eventType"] == "SHUTDOWN":
        say(f"SHUTDOWN for {event['shutdownReason']}")
        sys.exit(0)
    say(f"INVOKE {event['requestId']}")
    if how == "crash":
        sys.exit(4)
    if how == "slow":
        time.sleep(2)
    if how == "stuck":
        time.sleep(3600)
    say(f"done with {event['requestId']}")
