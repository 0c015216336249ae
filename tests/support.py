"""What several test files share: which backends run here."""

import fastcache
from fastcache import backends


def available_backends(device: str, operator: str = "residual_update") -> list[str]:
    """Backends that can run an operator on this device, the definition last."""
    order = backends.ORDER[device]
    return [
        name
        for name in order
        if fastcache.backends_status()[name].available and operator in backends.IMPLEMENTS[name]
    ]
