"""Replacing `forward` on module instances, innermost, and restoring it exactly."""

import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from fastcache.errors import HostError

_ABSENT = object()


class InstalledForward:
    """Stands in for `module.forward`. Copies of the module get the original back."""

    def __init__(self, module: nn.Module, original: Callable[..., Any], call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.module, self.original, self._call = module, original, call
        self.active = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:  # someone still holds this after the session closed
            return self.original(*args, **kwargs)
        return self._call(self.original, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        clone = memo.get(id(self.module))
        function = getattr(self.original, "__func__", None)
        if clone is not None and function is not None:
            return types.MethodType(function, clone)
        return copy.deepcopy(self.original, memo)

    def __reduce__(self):
        raise TypeError("an accelerated model cannot be pickled: leave the accelerate() context first")


class Installation:
    """Where one module's innermost forward lives, and what was there before.

    accelerate keeps the wrapped forward in `module._old_forward`, diffusers' HookRegistry in the
    first hook's function reference: their hooks stay outside ours and go on working.
    """

    def __init__(self, name: str, module: nn.Module, call: Callable[..., Any]) -> None:
        self.name, self.module = name, module
        self._holder, self._attribute, original = _innermost(name, module)
        self._before = self._holder.__dict__.get(self._attribute, _ABSENT)
        self.forward = InstalledForward(module, original, call)
        setattr(self._holder, self._attribute, self.forward)

    def where(self) -> tuple[Any, str] | None:
        """(holder, attribute) where our forward is now, None if someone removed it."""
        return next(
            (
                (holder, attribute)
                for holder, attribute, value in _places(self.module)
                if value is self.forward
            ),
            None,
        )

    def restore(self) -> None:
        """Put the original back exactly; hooks that were added outside meanwhile stay."""
        self.forward.active = False
        found = self.where()
        if found is None:
            culprit = self.module.__dict__.get("forward", type(self.module).forward)
            raise HostError(
                f"{self.name or 'model'}.forward was replaced by {_describe(culprit)} while the model was"
                " accelerated; remove hooks and wrappers in reverse order (the session is closed, its"
                " features are freed, and FastCache's stand-in now calls the original)"
            )
        holder, attribute = found
        if (
            holder is self.module
            and attribute == "forward"
            and (self._before is _ABSENT or self._holder is not holder)
        ):
            del self.module.__dict__["forward"]
        else:
            before = self._before if self._before is not _ABSENT else self.forward.original
            setattr(holder, attribute, before)


def restore_all(installed: list[Installation]) -> None:
    """Restore and forget every installation, the last one first; the first failure is raised when all were
    tried.
    """
    failures = []
    while installed:
        try:
            installed.pop().restore()
        except Exception as failure:
            failures.append(failure)
    if failures:
        raise failures[0]


def installed_in(module: nn.Module) -> InstalledForward | None:
    """The FastCache forward that a module carries, if any."""
    return next((value for _, _, value in _places(module) if isinstance(value, InstalledForward)), None)


def _places(module: nn.Module) -> Iterator[tuple[Any, str, Any]]:
    """Every (holder, attribute, value) that may keep a module's forward, outermost first."""
    if "forward" in module.__dict__:
        yield module, "forward", module.__dict__["forward"]
    if "_old_forward" in module.__dict__:
        yield module, "_old_forward", module.__dict__["_old_forward"]
    registry = module.__dict__.get("_diffusers_hook")
    for reference in reversed(getattr(registry, "_fn_refs", [])):
        for attribute in ("original_forward", "forward"):
            value = getattr(reference, attribute, None)
            if value is not None:
                yield reference, attribute, value


def _innermost(name: str, module: nn.Module) -> tuple[Any, str, Callable]:
    """Where the module's own forward is kept: behind every hook that wraps it."""
    places = list(_places(module))
    if not places:
        return module, "forward", module.forward
    for holder, attribute, value in reversed(places):
        if getattr(value, "__func__", None) is type(module).forward:
            return holder, attribute, value
    if len(places) == 1:
        return places[0]
    raise HostError(
        f"{name or 'model'}: cannot tell which of its wrapped forwards is its own"
        f" ({', '.join(_describe(value) for _, _, value in places)}); accelerate it before adding hooks"
    )


def _describe(value: Any) -> str:
    module = getattr(value, "__module__", type(value).__module__)
    return f"{module}.{getattr(value, '__qualname__', type(value).__qualname__)}"
