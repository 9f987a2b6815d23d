#!/usr/bin/env python3
"""A name server for the smoke test: whatever it is asked, the answer is 127.0.0.1.

Answers A on UDP port 53 of loopback, and says that there is no AAAA. In a network namespace of
its own, so no machine's port is taken.
"""
import socket

server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("127.0.0.1", 53))
while True:
    query, client = server.recvfrom(512)
    end = query.index(0, 12) + 5  # the name, its zero, type and class
    address = query[end - 4:end - 2] == b"\0\1"
    answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4\x7f\0\0\1" if address else b""
    head = query[:2] + b"\x81\x80\0\1" + (b"\0\1" if address else b"\0\0") + b"\0\0\0\0"
    server.sendto(head + query[12:end] + answer, client)
