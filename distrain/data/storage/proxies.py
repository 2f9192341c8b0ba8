"""Proxies of the environment (HTTP_PROXY and its like), and what does not need one."""

import socket
from ipaddress import ip_address
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener, getproxies


def must_bypass_proxies(url: str) -> bool:
    """Return True if the environment has proxies, and a URL must not go through them.

    True for this machine and for addresses of private networks, such as those of a
    cluster: a proxy is for the way out, and would not find them. NO_PROXY need not
    name them.
    """
    host = urlsplit(url).hostname
    if host is None or not getproxies():
        return False
    try:
        answers = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        # Not known here. A name without a dot is of this network.
        return "." not in host
    return any(not ip_address(address[0]).is_global for *_, address in answers)


def read_url(url: str, *, timeout_seconds: float) -> bytes:
    """Return what a server answers; see `must_bypass_proxies`. Raises OSError."""
    handlers = [ProxyHandler({})] if must_bypass_proxies(url) else []
    with build_opener(*handlers).open(url, timeout=timeout_seconds) as response:
        body: bytes = response.read()
    return body
