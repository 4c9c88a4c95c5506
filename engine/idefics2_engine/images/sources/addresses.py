"""Recognition of public internet addresses, independent of the Python version.

The special ranges in ``ipaddress`` differ between releases of Python, and it counts unknown IPv6
ranges as global. An address must therefore also satisfy the ranges below.
"""

import ipaddress

_NOT_GLOBAL_V4 = tuple(
    ipaddress.IPv4Network(range_)
    for range_ in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        # Azure has an internal service at this public address
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# All global unicast addresses so far are in this range. Site-local, link-local and unique local
# addresses, local NAT64, and IPv4-compatible and IPv4-translated addresses are outside it.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_GLOBAL_V6 = tuple(
    ipaddress.IPv6Network(range_)
    for range_ in (
        # This range is reserved for IETF protocols such as Teredo
        "2001::/23",
        "2001:db8::/32",
        # 6to4 addresses embed IPv4 addresses
        "2002::/16",
        "3ffe::/16",
        "3fff::/20",
    )
)


def is_global(address: str) -> bool:
    """Return whether an IP address is on the public internet.

    An IPv4-mapped or NAT64 address is judged by the IPv4 address that it embeds. Text that is not
    an IP address returns ``False``.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not any(ip in network for network in _NOT_GLOBAL_V4)
    # An address with a scope is local
    if ip.scope_id is not None:
        return False
    if ip.ipv4_mapped is not None:
        return is_global(str(ip.ipv4_mapped))
    if ip in _NAT64:
        return is_global(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return (
        ip.is_global and ip in _GLOBAL_V6 and not any(ip in network for network in _NOT_GLOBAL_V6)
    )
