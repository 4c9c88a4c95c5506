"""Which addresses belong to the public internet, on every Python alike.

``ipaddress`` learns of special ranges release by release, and takes all of IPv6 that it does not
know for global. So its word is one condition here, and the ranges below are another.
"""

import ipaddress

_NOT_GLOBAL_V4 = tuple(
    ipaddress.IPv4Network(range_)
    for range_ in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",  # a service inside Azure, at an address that looks public
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
# All that has been given out. Outside lie site-local, link-local and unique local addresses, local
# NAT64, and IPv4 addresses that are compatible or translated.
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_GLOBAL_V6 = tuple(
    ipaddress.IPv6Network(range_)
    for range_ in (
        "2001::/23",  # protocols, Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3ffe::/16",
        "3fff::/20",
    )
)


def is_global(address: str) -> bool:
    """Tell whether an address belongs to the public internet.

    Of an address with another inside, the inner one counts.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv4Address):
        return ip.is_global and not any(ip in network for network in _NOT_GLOBAL_V4)
    if ip.scope_id is not None:  # which is local by its nature
        return False
    if ip.ipv4_mapped is not None:
        return is_global(str(ip.ipv4_mapped))
    if ip in _NAT64:
        return is_global(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return (
        ip.is_global and ip in _GLOBAL_V6 and not any(ip in network for network in _NOT_GLOBAL_V6)
    )
