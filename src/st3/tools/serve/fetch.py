"""Fetch an image from a public web address; only where the operator has allowed it."""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import httpx

from st3.tools.serve.errors import refused

PARAM = "messages.image_url"

# Of IPv6 only what is routed globally is asked (RFC 4291), and of that no tunnel to an IPv4
# address (6to4, Teredo). NAT64, IPv4-compatible and site-local addresses lie outside of it.
_ROUTED = ipaddress.ip_network("2000::/3")
_TUNNELS = (ipaddress.ip_network("2002::/16"), ipaddress.ip_network("2001::/32"))
_RELAY = ipaddress.ip_network("192.88.99.0/24")  # to 6to4


def fetch(url: str, limit: int, timeout: float, *, private: bool = False) -> bytes:
    """:func:`fetch_async` for callers without an event loop."""
    return asyncio.run(fetch_async(url, limit, timeout, private=private))


async def fetch_async(url: str, limit: int, timeout: float, *, private: bool = False) -> bytes:
    """The body behind ``url``, of at most ``limit`` bytes, within ``timeout`` seconds in all.

    The name is looked up once, its addresses are checked, and one of them is connected to: a name
    that changes in between changes nothing. Redirects are not followed, proxies not used.

    Args:
        private: whether loopback and private addresses may be asked as well.

    Raises:
        ServeError: 400 with the reason.
    """
    try:
        target = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise refused("this is not a URL", PARAM) from error
    if target.scheme not in ("http", "https") or not target.host or target.userinfo:
        raise refused("an image URL is of http or https, and names a host and no user", PARAM)
    try:
        async with asyncio.timeout(timeout):
            return await _get(target, limit, private)
    except TimeoutError as error:
        raise refused("fetching the image took too long", PARAM) from error
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        raise refused(f"the image cannot be fetched: {type(error).__name__}", PARAM) from error


async def _get(target: httpx.URL, limit: int, private: bool) -> bytes:
    host = target.raw_host.decode("ascii")
    port = target.port or (443 if target.scheme == "https" else 80)
    loop = asyncio.get_running_loop()
    address = await loop.run_in_executor(_resolvers(), _address, host, port, private)
    # The certificate is checked against the name (TLS "server name"), not the address.
    headers = {"Host": target.netloc.decode("ascii"), "Accept": "image/*",
               "Accept-Encoding": "identity"}  # fmt: skip
    async with (
        httpx.AsyncClient(verify=_tls(), trust_env=False, timeout=None) as client,
        client.stream(
            "GET", target.copy_with(host=address), headers=headers, follow_redirects=False,
            extensions={"sni_hostname": host},
        ) as response,
    ):  # fmt: skip
        if response.status_code != 200:
            raise refused(f"fetching the image gave status {response.status_code}", PARAM)
        data = bytearray()
        async for chunk in response.aiter_raw(1 << 16):
            data += chunk
            if len(data) > limit:
                raise refused(f"the image is larger than {limit} bytes", PARAM, "image_too_large")
        return bytes(data)


def _address(host: str, port: int, private: bool) -> str:
    """An address of ``host``; all of them must be public."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not private and not all(map(_public, addresses)):
        raise refused("images are fetched from public addresses only", PARAM)
    return addresses[0]


def _public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            routed = ip in _ROUTED and not any(ip in tunnel for tunnel in _TUNNELS)
            return routed and ip.is_global and not ip.is_multicast
        ip = ip.ipv4_mapped
    return ip.is_global and not ip.is_multicast and ip not in _RELAY


@functools.cache
def _resolvers() -> ThreadPoolExecutor:
    """Looking a name up cannot be called off: names that hang hold up other names, nothing else."""
    return ThreadPoolExecutor(8, thread_name_prefix="st3-resolve")


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
