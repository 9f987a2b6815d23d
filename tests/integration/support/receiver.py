"""Takes batches of CloudEvents over HTTPS, as somebody else would write it: the standard
library's server, and the CloudEvents SDK to read each event. What it answers 2xx it has
written down and synced first.

receiver.py PORT CERT KEY LOG RULES

RULES is a JSON file, read for each request:
  status         answer everything so (default 200)
  retry_after    with that
  refuse         {text: status}: a batch that holds the text is answered so
  hang_up        [text]: the connection is closed on a batch that holds the text
  authorization  what the header must be, or 401
"""

import gzip
import http.server
import json
import os
import ssl
import sys

from cloudevents.core.bindings.http import HTTPMessage, from_structured_event

port, cert, key, log, rules_file = int(sys.argv[1]), *sys.argv[2:6]
out = open(log, "ab", buffering=0)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    requests = 0

    def do_POST(self):
        with open(rules_file) as file:
            rules = json.load(file)
        Handler.requests += 1
        body = self.rfile.read(int(self.headers["content-length"]))
        assert self.headers["content-encoding"] == "gzip"
        assert self.headers["content-type"].startswith("application/cloudevents-batch+json")
        text = gzip.decompress(body).decode()
        if any(bad in text for bad in rules.get("hang_up", [])):
            self.close_connection = True
            return
        wanted = rules.get("authorization")
        if wanted and self.headers["authorization"] != wanted:
            return self.answer(401, rules)
        for bad, status in rules.get("refuse", {}).items():
            if bad in text:
                return self.answer(status, rules)
        status = rules.get("status", 200)
        if 200 <= status < 300:
            for event in json.loads(text):
                one = HTTPMessage({"content-type": "application/cloudevents+json"}, json.dumps(event).encode())
                read = from_structured_event(one)
                assert read.get_id() == event["id"] and read.get_type() == event["type"]
                record = {"path": self.path, "event": event, "connection": self.client_address[1]}
                out.write((json.dumps(record) + "\n").encode())
            os.fdatasync(out.fileno())
        self.answer(status, rules)

    def answer(self, status, rules):
        self.send_response(status)
        if "retry_after" in rules:
            self.send_header("retry-after", str(rules["retry_after"]))
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        sys.stderr.write("%s\n" % (arguments,))


context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(cert, key)
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
