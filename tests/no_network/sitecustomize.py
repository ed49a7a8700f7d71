"""No network but this machine's own: on PYTHONPATH, every Python that starts has this hook, and what it refuses is written down."""

import os
import socket
import sys

HERE = ("", "localhost", "0.0.0.0", "::", "::1", socket.gethostname())


def _outside(host) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    return isinstance(host, str) and host not in HERE and not host.startswith(("127.", "::ffff:127."))


def _refuse(event: str, args: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1]
        if not isinstance(address, tuple) or not _outside(address[0]):
            return  # a Unix socket, or loopback
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        address = args[0]
        if not _outside(address):
            return
    else:
        return
    if log := os.environ.get("LLAVA_NB_NETWORK_LOG"):
        with open(log, "a") as f:
            f.write(f"{event} {address!r}\n")
    raise PermissionError(f"the network is off in tests: {event} {address!r}")


sys.addaudithook(_refuse)
