"""Which addresses the service may be sent to: what users name in input URLs and webhooks must not reach inwards.

A URL is taken apart once, here; what is connected to is an address that was checked, never a name that is looked up
a second time (`pinned.py`). Every address that a name has must be public, since which one is used is up to chance.

The forbidden networks are those that IANA's special-purpose registries call not globally reachable, and the
transition mechanisms (6to4, NAT64, Teredo) that carry an IPv4 address inside of an IPv6 one.
"""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from mutoscope.settings import Settings

IP = ipaddress.IPv4Address | ipaddress.IPv6Address
MAX_URL = 2048
RESOLVE_TIMEOUT_S = 10.0

FORBIDDEN_V4 = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",
        "169.254.0.0/16",  # link-local: cloud metadata
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # AMT
        "192.88.99.0/24",  # 6to4 relay
        "192.168.0.0/16",
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarking
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
    )
)
GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
"""Everything else is loopback, link-local, unique local, multicast, discard, NAT64, SRv6, or not given out yet."""
FORBIDDEN_V6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments: Teredo, benchmarking, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)

_NUMERIC_LABEL = re.compile(r"(0x[0-9a-f]*|[0-9]+)\.?$", re.IGNORECASE)
_HOST = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*$")
_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")

Resolver = Callable[[str, int], Sequence[str]]
"""Name and port to addresses; raises OSError."""


class Refused(Exception):
    """An address that is not to be contacted. `reason` is a sentence without the URL, to put after one."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unresolved(Refused):
    """The name has no address, or nobody answered what it is: may be better later."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What may be contacted: `schemes`, and hosts or networks that are named although they are private.

    A named host may also be reached by http, if `http_to_named` says so: for webhooks in development.
    """

    schemes: tuple[str, ...] = ("https",)
    names: frozenset[str] = frozenset()
    networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()
    http_to_named: bool = False
    http_setting: str = ""  # what allows http, for messages


@dataclass(frozen=True, kw_only=True)
class Target:
    """A URL in parts, ready to be sent: the host in ASCII, the path with its query."""

    url: str
    scheme: str
    host: str
    port: int
    path: bytes
    host_header: str

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.host_header}"


def input_policy(settings: Settings) -> Policy:
    """For media that users name by URL."""
    names, networks = _named(settings.allow_private_hosts)
    schemes = ("https", "http") if settings.allow_http_inputs else ("https",)
    return Policy(schemes=schemes, names=names, networks=networks, http_setting="allow_http_inputs")


def webhook_policy(settings: Settings) -> Policy:
    """For webhooks: https, and http to the hosts that `allow_private_hosts` names."""
    names, networks = _named(settings.allow_private_hosts)
    return Policy(names=names, networks=networks, http_to_named=True, http_setting="allow_private_hosts")


def parse(url: str, policy: Policy) -> Target:
    """Take a URL apart and refuse what can be refused without asking the network.

    Raises:
        Refused: not a URL of an allowed scheme, userinfo, a disguised IP address, a private address in digits.
    """
    if len(url) > MAX_URL:
        raise Refused(f"has {len(url)} characters, at most {MAX_URL} expected")
    if _UNSAFE.search(url):
        raise Refused("contains a space, a control character or a backslash")
    try:
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii").lower().rstrip(".")
        port = parsed.port
    except (httpx.InvalidURL, UnicodeError, ValueError) as e:
        raise Refused("is not a valid URL") from e
    if not host:
        raise Refused("names no host")
    if "@" in re.split("[/?#]", url.partition("//")[2], maxsplit=1)[0]:
        raise Refused("contains a user name or password")
    literal = _literal(host)
    if literal is not None:
        host = str(literal)
    named = _is_named(host, literal, policy)
    if parsed.scheme not in policy.schemes and not (
        parsed.scheme == "http" and policy.http_to_named and named
    ):
        raise Refused(_scheme_reason(parsed.scheme, host, policy))
    default_port = 443 if parsed.scheme == "https" else 80
    port = default_port if port is None else port
    if not 0 < port < 65536 or (port < 1024 and port not in (80, 443) and not named):
        raise Refused(f"names port {port}; 80, 443 or one from 1024 up expected")
    if literal is not None and not named:
        _check_address(literal)
    in_brackets = f"[{host}]" if ":" in host else host
    return Target(
        url=url,
        scheme=parsed.scheme,
        host=host,
        port=port,
        path=parsed.raw_path,
        host_header=in_brackets if port == default_port else f"{in_brackets}:{port}",
    )


def resolve(target: Target, policy: Policy, resolver: Resolver | None = None) -> tuple[str, ...]:
    """The addresses of a target, all of them checked.

    Raises:
        Unresolved: the name has no address, or the resolver does not answer in time.
        Refused: one of the addresses is not public.
    """
    try:
        found = (resolver or system_resolver)(target.host, target.port)
    except (OSError, UnicodeError) as e:
        raise Unresolved(f"its host {target.host} could not be looked up ({e})") from e
    if not found:
        raise Unresolved(f"its host {target.host} has no address")
    for text in found:
        try:
            address = canonical(ipaddress.ip_address(text))
        except ValueError as e:
            raise Refused(f"its host {target.host} has an address that is none ({text})") from e
        if not _is_named(target.host, address, policy):
            _check_address(address, target.host)
    return tuple(dict.fromkeys(found))


def canonical(address: IP) -> IP:
    """An IPv4 address in IPv6 clothes (::ffff:127.0.0.1) is that IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_public(address: IP) -> bool:
    """Whether anybody may be sent there."""
    address = canonical(address)
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in FORBIDDEN_V4)
    if address.scope_id is not None or address not in GLOBAL_V6:
        return False
    return not any(address in network for network in FORBIDDEN_V6)


def system_resolver(host: str, port: int, timeout_s: float = RESOLVE_TIMEOUT_S) -> Sequence[str]:
    """`getaddrinfo`, which knows no time limit of its own: it is left behind when it takes too long."""
    answer: queue.SimpleQueue[list[str] | OSError | UnicodeError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        except (OSError, UnicodeError) as e:
            answer.put(e)
        else:
            answer.put([str(sockaddr[0]) for *_, sockaddr in found])

    threading.Thread(target=ask, name="resolve", daemon=True).start()
    try:
        result = answer.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {timeout_s:g} s") from None
    if isinstance(result, BaseException):
        raise result
    return result


def _literal(host: str) -> IP | None:
    """The host as an IP address, if it is one; forms that only some programs take for one are refused."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        return canonical(ipaddress.ip_address(bare))
    except ValueError:
        pass
    if ":" in bare:
        raise Refused("names an IPv6 address that is not valid")
    if _NUMERIC_LABEL.search(bare.rsplit(".", 1)[-1]):
        raise Refused("names an IP address in another form than four decimal numbers")
    if not _HOST.match(bare):
        raise Refused("names a host that is not valid")
    return None


def _is_named(host: str, address: IP | None, policy: Policy) -> bool:
    if host in policy.names:
        return True
    return address is not None and any(
        address.version == network.version and address in network for network in policy.networks
    )


def _check_address(address: IP, host: str = "") -> None:
    if not is_public(address):
        where = f"its host {host} is at" if host else "names"
        raise Refused(
            f"{where} a private or reserved address; the setting allow_private_hosts can allow it by name or network"
        )


def _scheme_reason(scheme: str, host: str, policy: Policy) -> str:
    expected = " or ".join(f"{s}://" for s in policy.schemes)
    if scheme != "http":
        return f"has the scheme {scheme or 'none'!r}, {expected} expected"
    how = f"naming {host} in the setting" if policy.http_to_named else "the setting"
    return f"is http, {expected} expected; {how} {policy.http_setting} allows it"


def _named(
    entries: Sequence[str],
) -> tuple[frozenset[str], tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]]:
    names, networks = set(), []
    for entry in entries:
        try:
            networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
        except ValueError:
            names.add(entry.lower().rstrip("."))
    return frozenset(names), tuple(networks)
