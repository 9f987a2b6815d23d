"""A Fission environment for Python, written after fission/environments python/server.py: the same
routes, the same way to find a function, the same file that it leaves in USERFUNCVOL."""

import importlib
import importlib.machinery
import importlib.util
import json
import os
import sys

from flask import Flask, abort, request

app = Flask(__name__)
state = os.path.join(os.environ.get("USERFUNCVOL", "/userfunc"), "state.json")
userfunc = None


def load_file(path):
    loader = importlib.machinery.SourceFileLoader("mod", path)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("mod", loader))
    loader.exec_module(module)
    return module


def load(told):
    module, _, function = told["functionName"].rpartition(".")
    if os.path.isdir(told["filepath"]):
        sys.path.append(told["filepath"])
        found = importlib.import_module(module or "main")
    else:
        found = load_file(told["filepath"])
    return getattr(found, function or "main")


@app.get("/healthz")
def healthz():
    return ""


@app.post("/specialize")
def specialize():
    global userfunc
    userfunc = load_file("/userfunc/user").main
    return ""


@app.post("/v2/specialize")
def specialize_v2():
    global userfunc
    told = request.get_json()
    userfunc = load(told)
    with open(state, "w") as file:
        json.dump(told, file)
    return ""


@app.route("/", methods=["GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE"])
@app.route("/<path:_>", methods=["GET", "POST", "PUT", "HEAD", "OPTIONS", "DELETE"])
def call(_=None):
    return userfunc() if userfunc else abort(500)


app.run(host="0.0.0.0", port=int(os.environ.get("RUNTIME_PORT", "8888")))
