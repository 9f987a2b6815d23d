"""Invokes functions with AWS's SDK: URL SECRET, calls as JSON on stdin, what came of each on stdout.

A call: {"name", "payload"} and, when it matters, "type", "qualifier", "log", "stream".
"""

import base64
import json
import sys

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

url, secret = sys.argv[1:]
client = boto3.client(
    "lambda",
    endpoint_url=url,
    region_name="eu-central-1",
    aws_access_key_id="admin",
    aws_secret_access_key=secret,
    config=Config(retries={"total_max_attempts": 1}, read_timeout=120),
)


def text(data):
    return data.decode("utf-8", "replace")


def call(asked):
    wanted = {"FunctionName": asked["name"], "Payload": asked["payload"].encode()}
    for ours, theirs in (("type", "InvocationType"), ("qualifier", "Qualifier"), ("log", "LogType")):
        if ours in asked:
            wanted[theirs] = asked[ours]
    if asked.get("context"):
        wanted["ClientContext"] = base64.b64encode(asked["context"].encode()).decode()
    try:
        if asked.get("stream"):
            answer = client.invoke_with_response_stream(**wanted)
            chunks, end = [], None
            for event in answer["EventStream"]:
                if "PayloadChunk" in event:
                    chunks.append(text(event["PayloadChunk"]["Payload"]))
                else:
                    end = event["InvokeComplete"]
            return {
                "status": answer["StatusCode"],
                "version": answer.get("ExecutedVersion"),
                "chunks": len(chunks),
                "payload": "".join(chunks),
                "error": end.get("ErrorCode"),
                "details": end.get("ErrorDetails"),
                "log": text(base64.b64decode(end.get("LogResult", ""))),
            }
        answer = client.invoke(**wanted)
        return {
            "status": answer["StatusCode"],
            "version": answer.get("ExecutedVersion"),
            "payload": text(answer["Payload"].read()),
            "error": answer.get("FunctionError"),
            "log": text(base64.b64decode(answer.get("LogResult", ""))),
            "id": answer["ResponseMetadata"].get("RequestId"),
        }
    except ClientError as error:
        return {
            "status": error.response["ResponseMetadata"]["HTTPStatusCode"],
            "code": error.response["Error"]["Code"],
            "message": error.response["Error"]["Message"],
        }


print(json.dumps([call(asked) for asked in json.load(sys.stdin)]))
