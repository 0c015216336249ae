"""Components of blocks (attn1, ff, ...) of any model, and taking over their forward."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcache.engine.installation import Installation, installed_in, restore_all
from fastcache.engine.session import refuse_tracing
from fastcache.errors import HostError, SessionError

Call = Callable[["Component", Callable, tuple, dict[str, Any]], Any]


@dataclass(frozen=True)
class Component:
    """One module whose output can be cached. full_name: its path; index: the path element before its name."""

    full_name: str
    name: str
    index: str
    module: nn.Module


@dataclass(frozen=True)
class Stored:
    """An output kept by reference, and the versions of its tensors, by which a later write is noticed."""

    output: Any
    versions: tuple[int | None, ...]

    @staticmethod
    def of(output: Any) -> "Stored":
        """Keep an output: a tensor, or any nest of tuples, lists and dicts of them."""
        return Stored(output, _versions(output))

    def intact(self) -> bool:
        """False if a tensor of it was written since. Tensors of inference mode do not tell."""
        return _versions(self.output) == self.versions


def find_components(
    model: nn.Module, block_classes: type | Sequence[type], names: Iterable[str]
) -> list[Component]:
    """The modules `names` of every block of `block_classes`, in the model's order.

    Raises HostError if the model has no such block, or a name is in none of them.
    """
    classes = (block_classes,) if isinstance(block_classes, type) else tuple(block_classes)
    names = list(names)
    blocks = [(path, module) for path, module in model.named_modules() if isinstance(module, classes)]
    found = [
        Component(f"{path}.{name}" if path else name, name, path.rpartition(".")[2], child)
        for path, block in blocks
        for name in names
        if isinstance(child := getattr(block, name, None), nn.Module)
    ]
    absent = [name for name in names if all(component.name != name for component in found)]
    if not blocks:
        raise HostError(
            f"block_classes: {type(model).__name__} has no {' or '.join(kind.__name__ for kind in classes)};"
            f" its modules are {', '.join(sorted({type(module).__name__ for module in model.modules()}))}"
        )
    if absent or not names:
        children = sorted({name for _, block in blocks for name, _ in block.named_children()})
        raise HostError(
            f"components_to_wrap: expected names of {', '.join(children)}, got {', '.join(absent) or 'none'}"
        )
    return found


class Wrapping:
    """The forwards of components, and of the model around them, while they are taken over."""

    def __init__(
        self, model: nn.Module, components: Sequence[Component], call: Call, failed: Callable[[], None]
    ) -> None:
        self._installed: list[Installation] = []
        taken = next(
            (
                name
                for name, module in (("the model", model), *((c.full_name, c.module) for c in components))
                if installed_in(module) is not None
            ),
            None,
        )
        if taken is not None:
            raise SessionError(
                f"model: {taken} is cached already by another FastCache session or helper; disable that one"
                " first"
            )

        def guarded(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if torch.compiler.is_compiling():
                refuse_tracing()
            try:
                return original(*args, **kwargs)
            except BaseException:
                failed()
                raise

        try:
            self._installed.append(Installation("", model, guarded))
            for component in components:
                self._installed.append(
                    Installation(component.full_name, component.module, _bound(call, component))
                )
        except BaseException:
            self.restore()
            raise

    @property
    def originals(self) -> list[Callable[..., Any]]:
        """The components' own forwards, in their order."""
        return [installation.forward.original for installation in self._installed[1:]]

    def restore(self) -> None:
        """Put every forward back; the first failure is raised when all were tried."""
        restore_all(self._installed)


def input_form(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
    """Shape, dtype and device of the first tensor that a component is given."""
    first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    return None if first is None else (tuple(first.shape), first.dtype, first.device)


def _bound(call: Call, component: Component) -> Callable[..., Any]:
    def bound(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            refuse_tracing()
        return call(component, original, args, kwargs)

    return bound


def _versions(output: Any) -> tuple[int | None, ...]:
    tensors = [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return tuple(None if tensor.is_inference() else tensor._version for tensor in tensors)
