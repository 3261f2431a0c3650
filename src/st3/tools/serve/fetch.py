"""Fetch an image from a public web address; only where the operator has allowed it."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urlsplit

from st3.tools.serve.errors import refused

PARAM = "messages.image_url"


def fetch(url: str, limit: int, timeout: float, *, private: bool = False) -> bytes:
    """The body behind ``url``, of at most ``limit`` bytes, within ``timeout`` seconds.

    The name is looked up once, the address is checked, and that address is connected to: a name
    that changes in between changes nothing. Redirects are not followed.

    Args:
        private: whether loopback and private addresses may be asked as well.

    Raises:
        ServeError: 400 with the reason.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise refused(f"this is not a URL: {error}", PARAM) from error
    if not host or parts.username is not None or parts.password is not None:
        raise refused("an image URL names a host, and no user", PARAM)
    secure = parts.scheme.lower() == "https"
    port = port or (443 if secure else 80)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if any(ord(c) <= 32 or ord(c) > 126 for c in target):
        raise refused("this URL has characters that must be escaped", PARAM)
    ends = time.monotonic() + timeout
    try:
        address = _address(host, port, private)
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
        connection.sock = socket.create_connection((address, port), timeout)
        if secure:
            context = ssl.create_default_context()
            connection.sock = context.wrap_socket(connection.sock, server_hostname=host)
        try:
            connection.request("GET", target, headers={"Accept": "image/*"})
            response = connection.getresponse()
            if response.status != 200:
                raise refused(f"fetching the image gave status {response.status}", PARAM)
            return _read(response, limit, ends)
        finally:
            connection.close()
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        raise refused(f"the image cannot be fetched: {type(error).__name__}", PARAM) from error


def _address(host: str, port: int, private: bool) -> str:
    """An address of ``host``; all of them must be public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        ip = ipaddress.ip_address(address.partition("%")[0])
        mapped = getattr(ip, "ipv4_mapped", None) or ip
        if not private and (not mapped.is_global or mapped.is_multicast):
            raise refused("images are fetched from public addresses only", PARAM)
    return addresses[0]


def _read(response: http.client.HTTPResponse, limit: int, ends: float) -> bytes:
    data = bytearray()
    while chunk := response.read(1 << 16):
        data += chunk
        if len(data) > limit:
            raise refused(f"the image is larger than {limit} bytes", PARAM, "image_too_large")
        if time.monotonic() > ends:
            raise refused("fetching the image took too long", PARAM)
    return bytes(data)
