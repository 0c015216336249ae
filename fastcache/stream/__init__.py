"""The residual stream: updates are queued, and one launch applies them all."""

from fastcache.stream.deferred import Deferred
from fastcache.stream.residual_stream import ResidualStream, Term

__all__ = ["Deferred", "ResidualStream", "Term"]
