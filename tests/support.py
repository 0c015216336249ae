"""What several test files share: which backends run here."""
import fastcache


def available_backends(device: str) -> list[str]:
    """Backends that can run on this device, the definition last."""
    order = fastcache.backends.ORDER[device]
    return [name for name in order if fastcache.backends_status()[name].available]
