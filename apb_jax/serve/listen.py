"""The listening socket."""

from __future__ import annotations

import socket

from apb_jax.errors import UserError
from apb_jax.files import reason, shown


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; the port is taken from here on."""
    if not host.strip():
        raise UserError("--host is empty, which would be every address; nearest legal choice: 127.0.0.1 (or 0.0.0.0)")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches Nagle's algorithm off: a reply's body would wait 40 ms for the client's
    # delayed acknowledgement of its head.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(256)
    except (OSError, UnicodeError) as error:  # a name that is too long for DNS
        made.close()
        raise UserError(
            f"--host {shown(host, 60)} --port {port}: {reason(error)}; nearest legal choice: --port 0, any free one"
        ) from error
    return made
