"""With this folder on PYTHONPATH no Python leaves the machine; who tries is written to $TRIED."""

import os
import socket
import traceback


def near(address):
    """Whether an address, or the name of a host, is on this machine."""
    if not isinstance(address, tuple):  # a Unix socket is a path
        return True
    host = address[0].decode() if isinstance(address[0], bytes) else str(address[0])
    return host in ("", "None", "localhost", "::1", "0.0.0.0", "::") or host.startswith("127.")


def guarded(function, find):
    """The function, for addresses near by only. `find` tells the address from the arguments."""

    def call(*args, **more):
        address = find(*args, **more)
        if near(address):
            return function(*args, **more)
        with open(os.environ["TRIED"], "a", encoding="utf-8") as file:
            file.write(f"{address}\n{''.join(traceback.format_stack())}\n")
        raise OSError(f"no network in this test: {address}")

    return call


for name in ("connect", "connect_ex"):
    original = getattr(socket.socket, name)
    setattr(socket.socket, name, guarded(original, lambda self, address: address))
socket.socket.sendto = guarded(socket.socket.sendto, lambda self, data, *rest: rest[-1])
for name in ("getaddrinfo", "gethostbyname"):
    original = getattr(socket, name)
    setattr(socket, name, guarded(original, lambda host, *rest, **more: (host,)))
