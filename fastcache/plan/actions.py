"""What is done with one branch at one step."""

import enum
from dataclasses import dataclass
from functools import lru_cache

from fastcache.errors import ScheduleError


class Kind(enum.Enum):
    """Where a branch's feature comes from at a step."""

    COMPUTE = "C"  # computed on all tokens, and stored
    REUSE = "R"  # the stored one
    REFRESH = "P"  # the stored one, after some tokens were recomputed into it
    FORECAST = "F"  # a linear combination of the last order + 1 stored ones


@dataclass(frozen=True, slots=True)
class Action:
    """One cell of the plan. `tokens` per sample of a REFRESH, `order` of a FORECAST."""

    kind: Kind
    tokens: int | None = None
    order: int | None = None

    def __post_init__(self) -> None:
        if (self.tokens is not None) != (self.kind is Kind.REFRESH) or (self.tokens or 0) < 0:
            raise ScheduleError(
                f"tokens: a REFRESH, and only a REFRESH, has a number of tokens >= 0, got {self.kind.name}"
                f" with {self.tokens}"
            )
        if (self.order is not None) != (self.kind is Kind.FORECAST) or (self.order or 0) < 0:
            raise ScheduleError(
                f"order: a FORECAST, and only a FORECAST, has an order >= 0, got {self.kind.name} with"
                f" {self.order}"
            )

    @property
    def fresh_tokens(self) -> int:
        """Tokens per sample that are recomputed into the stored feature: none but in a REFRESH."""
        return self.tokens or 0

    @property
    def code(self) -> str:
        """Short text form: C, R, P<tokens> or F<order>."""
        number = self.tokens if self.kind is Kind.REFRESH else self.order
        return self.kind.value + ("" if number is None else str(number))

    @staticmethod
    def from_code(code: str) -> "Action":
        """Inverse of `code`; ScheduleError for anything else."""
        try:
            kind = Kind(code[:1])
            number = int(code[1:]) if code[1:] else None
            if number is not None and kind in (Kind.COMPUTE, Kind.REUSE):
                raise ValueError(code)
        except ValueError:
            raise ScheduleError(f"action: expected C, R, P<tokens> or F<order>, got {code!r}") from None
        return Action(
            kind,
            tokens=number if kind is Kind.REFRESH else None,
            order=number if kind is Kind.FORECAST else None,
        )


COMPUTE = Action(Kind.COMPUTE)
REUSE = Action(Kind.REUSE)


@lru_cache(4096)
def refresh(tokens: int) -> Action:
    """Recompute `tokens` tokens per sample into the stored feature, and use it."""
    return Action(Kind.REFRESH, tokens=tokens)


def forecast(order: int) -> Action:
    """Use a combination of the last order + 1 stored features."""
    return Action(Kind.FORECAST, order=order)
