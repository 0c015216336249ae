"""Which step a model call belongs to, and which call of the step it is.

Nothing depends on parity. The sources, best first:

1. `session.step(index)`: the sampler says so.
2. `session.call(name)`: calls have names; a name that comes again begins the next step.
3. t that is on the host (a number, or a tensor on the CPU): equal t belongs to one step. The first
   step of a generation shows how many calls a step has; t that goes back to where the generation
   began is a new generation, whatever became of the last one.
4. Counting: where t is on a device, it is read in the first generation only; afterwards the number
   that was found there holds. What was assumed is checked when the session closes, from t of the last
   two generations, which stays on the device until then.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastcache.backends.constants import capturing
from fastcache.errors import SessionError

Key = int | str  # of a call within its step: its number, or its name
HostTime = float | tuple[float, ...]


@dataclass(frozen=True)
class Arrival:
    """What a model call is: `call` of `step`; `first`: no other call of the step was before it; `opens`: it
    is the first one of a generation.
    """

    step: int
    call: Key
    first: bool
    opens: bool


@dataclass(frozen=True)
class Time:
    """t of one model call: its value where that is on the host, else the tensor."""

    host: HostTime | None = None
    device: Tensor | None = None
    version: int | None = None  # of the tensor when the model got it; None where PyTorch keeps none

    @staticmethod
    def of(t: Any) -> "Time":
        """t as the model got it. Never waits for a device."""
        if isinstance(t, Tensor):
            if t.device.type != "cpu" or type(t) not in (Tensor, torch.nn.Parameter):
                return Time(device=t.detach(), version=None if t.is_inference() else t._version)
            return Time(_number_of(t.detach().flatten().tolist()))
        try:
            plain = t.tolist() if hasattr(t, "tolist") else t  # NumPy's arrays and numbers
            return Time(
                _number_of([float(value) for value in plain] if hasattr(plain, "__iter__") else [plain])
            )
        except (TypeError, ValueError):
            return Time()

    def equals(self, other: "Time", *, may_read: bool) -> bool | None:
        """Whether both are one time; None if that is not known without waiting for a device."""
        if self.host is not None and other.host is not None:
            return self.host == other.host
        if self.device is None or other.device is None:
            return None
        if self._is_memory_of(other):
            return True
        if not may_read:
            return None
        if self.version is not None and self.device._version != self.version:
            return None  # it was written since: what it was is gone
        return self.device.shape == other.device.shape and bool(torch.equal(self.device, other.device))

    def _is_memory_of(self, other: "Time") -> bool:
        """True if both are one tensor that nobody wrote in between (the halves of guidance share theirs)."""
        a, b = self.device, other.device
        if a is None or b is None or a.is_meta or self.version is None or self.version != other.version:
            return False
        return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


class Calls:
    """The place of every model call in the generations of a session."""

    def __init__(self, declared: int | None) -> None:
        self._declared = declared
        self._found: int | None = None  # calls per step, seen in this generation
        self._assumed: int | None = None  # seen in an earlier one, for t that is not on the host
        self._before: list[HostTime] = []  # t of the steps of the generation that ended last by itself
        self._log = TimeLog()
        self._num_steps = 1
        self.generations = 0
        self.doubt: str | None = None  # what makes it doubtful that calls were told apart rightly
        self.restarted = 0  # generations that were given up, seen by t
        self._step = 0
        self._made: list[Key] = []  # calls of this step
        self._times: list[HostTime] = []  # t of the steps of this generation
        self._opened: Time | None = None  # t of the first call of this step
        self._begun = self._jumped = False
        self._restart()

    # -- what is known now ------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The step of the last call, or of the next one if that step has had all of its calls."""
        return self._step

    @property
    def underway(self) -> bool:
        """True if a generation has begun and is not over."""
        return self._begun and not self._may_be_over()

    @property
    def steps_made(self) -> int:
        """Steps of this generation that have had a call."""
        return self._step + bool(self._made)

    @property
    def per_step(self) -> int | None:
        """Calls per step, None while that is not known."""
        return self._declared or self._found

    @property
    def found_by_itself(self) -> bool:
        """True if the number of calls per step was not declared."""
        return self._declared is None

    # -- what the user says -------------------------------------------------------------------

    def plan(self, num_steps: int) -> None:
        """The number of steps of the coming generations; the next call opens one."""
        self._num_steps = num_steps
        self.forget()

    def forget(self, *, failed: bool = False) -> None:
        """The next call opens a generation, of which nothing is known. failed: a call raised."""
        if not failed:
            self._complete_if_done()
        self._before = []
        self._restart()

    def jump(self, step: int) -> None:
        """The next call belongs to `step`; if that step is under way, it goes on."""
        if not (self._made and self._step == step):
            if step == 0 and self._begun:  # a generation begins anew
                self._restart()
            self._step, self._made = step, []
        self._jumped = True

    # -- calls -------------------------------------------------------------------------------------

    def arrive(self, t: Any, name: str | None) -> Arrival:
        """The place of a call, as it begins. SessionError if it cannot be told."""
        time = Time.of(t)
        opens = not self._begun
        if self._made:
            opens = self._next_step_if(self._ends_step(time, name)) or opens
        if self._is_back_at_start(time):
            self.restarted += 1
            opens = True
            self._restart()
        if not self._made:
            self._open_step(time, opens)
        key: Key = len(self._made) if name is None else name
        self._made.append(key)
        self._begun = True
        return Arrival(self._step, key, len(self._made) == 1, opens)

    def leave(self) -> bool:
        """The call is over. True if the generation is, too."""
        if self.per_step is not None and len(self._made) >= self.per_step and isinstance(self._made[-1], int):
            return self._next_step_if(True)
        return False

    def close(self) -> None:
        """The session ends: a last step whose calls were not counted is over now."""
        self._complete_if_done()

    def check(self) -> None:
        """SessionError if calls were probably not told apart rightly. Reads t of the last generations."""
        for times in self._log.read():
            place = first_return(times)
            if place is not None and self.doubt is None:
                self.doubt = _went_back(place, times[place - 1], times[place])
        if self.doubt is not None:
            raise SessionError(self.doubt)

    # -- inside ------------------------------------------------------------------------------------

    def _restart(self) -> None:
        self._step = 0
        self._made, self._times, self._opened = [], [], None
        self._begun = self._jumped = False
        if self._found is not None:
            self._assumed = self._found
        self._found = None
        self._log.begin()

    def _ends_step(self, time: Time, name: str | None) -> bool:
        """Whether this call is the first one of the next step."""
        may_read = name is None and self._may_read()
        same = None if self._opened is None else self._opened.equals(time, may_read=may_read)
        if name is not None:
            return name in self._made or same is False
        if self.per_step is None:
            if same is None and self._assumed is not None:
                self._found = self._assumed
            elif same is None:
                raise SessionError(
                    "t: the number of calls per step cannot be told from it; pass calls_per_step"
                    " (1, or 2 if guidance calls the model twice)"
                )
            elif not same:
                self._found = len(self._made)
        if self.per_step is None:
            return False
        if len(self._made) >= self.per_step:
            return True
        if same is False and not self._at_start(time):
            raise SessionError(
                f"calls_per_step: step {self._step} was to have {self.per_step} calls with equal t, as the"
                f" first step of the generation had, but after {len(self._made)} of them t went from"
                f" {_shown(self._opened)} to {_shown(time)}. If steps have different numbers of calls (a"
                " guidance interval), name the calls: with session.call('cond'): model(...)"
            )
        return False

    def _may_read(self) -> bool:
        return self._declared is None and self._assumed is None and self._found is None

    def _next_step_if(self, ends: bool) -> bool:
        """Go on to the next step; True if that is the first one of a new generation."""
        if not ends:
            return False
        self._step, self._made, self._opened = self._step + 1, [], None
        if self._step < self._num_steps:
            return False
        self._complete()
        return True

    def _may_be_over(self) -> bool:
        """True in a last step that has had calls, whose number is known only when another step begins."""
        counted = self.per_step is not None and all(isinstance(key, int) for key in self._made)
        return self._step == self._num_steps - 1 and bool(self._made) and not counted

    def _complete_if_done(self) -> None:
        if self._begun and self._may_be_over():
            self._complete()

    def _complete(self) -> None:
        self.generations += 1
        self._before = [] if self._jumped else self._times
        self._restart()

    def _open_step(self, time: Time, opens: bool) -> None:
        """Note t of a step, and look whether it goes on as t of a generation does."""
        if opens and not self._jumped and self._goes_on(time):
            many = len(self._before)
            raise SessionError(
                f"num_steps: the plan has {self._num_steps} steps, but after {many} of them the sampler"
                f" goes on, from t {self._before[-1]:g} to {time.host:g}: this generation has more. Pass"
                " the number of model evaluations (timesteps that the model is called with), or call"
                " session.begin() where a generation begins"
            )
        self._opened = time
        if self._jumped:
            return
        if time.host is not None:
            self._times.append(time.host)
            place = first_return(self._times, last_only=True)
            if place is not None and self.doubt is None:
                self.doubt = _went_back(place, self._times[place - 1], self._times[place])
        elif time.device is not None:
            self._log.note(time.device)

    def _goes_on(self, time: Time) -> bool:
        """Whether t goes on beyond the end of the generation that just ended by count."""
        way = direction(self._before)
        last = self._before[-1] if self._before else None
        if not way or not isinstance(time.host, float) or not isinstance(last, float):
            return False
        return (time.host - last) * way > 0

    def _at_start(self, time: Time) -> bool:
        """Whether t is where this generation began, or beyond it, and has been elsewhere since."""
        way = direction(self._times) or direction(self._before)
        if self._jumped or not self._times or not way:
            return False
        first, last = self._times[0], self._times[-1]
        if not isinstance(first, float) or not isinstance(time.host, float):
            return time.host == first and last != first
        return (time.host - first) * way <= 0 and time.host != last

    def _is_back_at_start(self, time: Time) -> bool:
        return self.steps_made > 0 and time.host is not None and self._at_start(time)


class TimeLog:
    """t of the steps of the last two generations, where it is on a device: one small copy a step."""

    def __init__(self) -> None:
        self._now: list[Tensor] = []
        self._last: list[Tensor] = []

    def note(self, t: Tensor) -> None:
        """A step begins at t."""
        if t.numel() and not t.is_meta and not capturing(t.device):
            self._now.append(t.reshape(-1)[:1].clone())

    def begin(self) -> None:
        """A generation begins."""
        if self._now:
            self._last, self._now = self._now, []

    def read(self) -> list[list[float]]:
        """t of the last two generations. Waits for the device."""
        found = [torch.cat(times).double().tolist() for times in (self._last, self._now) if times]
        self._last, self._now = [], []
        return found


def direction(times: Sequence[HostTime]) -> int:
    """1 if times rise, -1 if they fall, by the first two that differ; 0 if none do."""
    numbers = [time for time in times if isinstance(time, float)]
    later = next((time for time in numbers if time != numbers[0]), None)
    return 0 if later is None else (1 if later > numbers[0] else -1)


def first_return(times: Sequence[HostTime], *, last_only: bool = False) -> int | None:
    """The first place at which t goes back past two or more steps, as when a new generation begins.

    Samplers of higher order step back by one evaluation; no more than that.
    """
    way = direction(times)
    if not way or not all(isinstance(time, float) for time in times):
        return None
    for place in (len(times) - 1,) if last_only else range(1, len(times)):
        passed = sum((earlier - times[place]) * way > 0 for earlier in times[:place])  # type: ignore[operator]
        if passed >= 2:
            return place
    return None


def _went_back(place: int, before: HostTime, after: HostTime) -> str:
    return (
        f"session: at step {place} of a generation t went back from {before:g} to {after:g}, so an earlier"
        " generation was probably interrupted, and outputs since are wrong. Call session.reset() when a"
        " generation is given up, or session.begin() where one begins; if the sampler goes back on purpose,"
        " say which step it makes with session.step(index)"
    )


def _number_of(values: list[float]) -> HostTime | None:
    if not values:
        return None
    first = float(values[0])
    return first if all(value == first for value in values) else tuple(map(float, values))


def _shown(time: Time | None) -> str:
    return "?" if time is None or time.host is None else str(time.host)
