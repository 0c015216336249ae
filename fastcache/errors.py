"""Errors of the plan and session layers. Each message says what to do."""


class FastCacheError(RuntimeError):
    """Base of the errors that FastCache raises on its own account."""


class ScheduleError(FastCacheError):
    """A plan or schedule does not fit the model, the number of steps or this version."""


class HostError(FastCacheError):
    """The model is not one that can be accelerated, or it was changed while it was."""


class SessionError(FastCacheError):
    """A session was used in a way that would give wrong results."""
