"""Let several threads share a model: one block or call at a time, while all others wait.

A `with` block of `ForgetSwitch` takes a turn, and so does each call of the model (forward or generate). A call inside a block is
part of the block's turn, also from threads and tasks that the block started with its context (asyncio.to_thread, a thread pool
of FastAPI). Turns belong to the model, so that all switches on it share them.
"""

import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, SupportsIndex

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from loramox.errors import AdapterError

LONG = 60  # seconds of waiting, after which there is a warning
_ATTRIBUTE = "_loramox_turns"

# The turns that this flow of control is inside of, of any model. Tasks inherit it, new threads start empty.
_INSIDE: ContextVar[tuple["Turn", ...]] = ContextVar("loramox_turns", default=())


class Turn:
    """A turn at a model, until `end`; or from then on, for good, when it is not entered as a block."""

    def __init__(self, turns: "Turns") -> None:
        self._turns = turns
        self.thread = threading.get_ident()
        self.entered = False
        self.undo: Callable[[], None] | None = None  # what ends with the turn
        self.owed: list[Callable[[], None]] = []  # the same of outer turns that ended before this one

    def __enter__(self) -> "Turn":
        self._turns.enter(self)
        _INSIDE.set((*_INSIDE.get(), self))
        return self

    def __exit__(self, *_: object) -> None:
        # Not ContextVar.reset, which refuses another context: a generator may end in another thread than it began in.
        _INSIDE.set(tuple(turn for turn in _INSIDE.get() if turn is not self))
        self._turns.end(self)

    def keep(self) -> None:
        """End it, unless it is entered, without undoing what was done in it."""
        if not self.entered:
            self._turns.end(self, undo=False)


class Turns:
    """All turns at one model, the innermost last."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stack: list[Turn] = []

    def __reduce__(self) -> tuple[type["Turns"], tuple[()]]:
        return Turns, ()  # a copy of the model has turns of its own

    def take(self) -> Turn:
        """Wait until the model is free, or only in the hands of the block that this call is inside of.

        Raises:
            AdapterError: another task of this thread has it, which cannot go on while this one waits.
        """
        inside = _INSIDE.get()
        with self._changed:
            while self._stack and self._stack[-1] not in inside:
                self._wait_for(self._stack[-1])
            turn = Turn(self)
            self._stack.append(turn)
        return turn

    def _wait_for(self, last: Turn) -> None:
        here = last.thread == threading.get_ident()
        if not here and self._changed.wait(LONG):
            return
        if not last.entered:  # what on(), off() or at() returned is in a variable: no block
            self.end(last, undo=False)
        elif here:
            raise AdapterError(
                "another task of this thread is inside of a `with` block of the model's ForgetSwitch and was suspended there, by await or "
                "yield. Neither can go on while one waits: put the block and its calls into one function without await, and run that in a "
                "thread (await asyncio.to_thread(answer))"
            )
        else:
            warnings.warn(
                f"waiting for {LONG} seconds for another thread's call or ForgetSwitch block. A thread that was started inside of a "
                "block and calls the model waits for the block's end: open the block in the thread that calls the model",
                stacklevel=4,
            )

    def enter(self, turn: Turn) -> None:
        """Make it a block. Raises `AdapterError` when it has ended."""
        with self._changed:
            if turn not in self._stack:
                raise AdapterError(
                    "what on(), off() or at() returns is good for one `with` block, opened at once: write `with switch.at(scale):`"
                )
            turn.entered = True

    def end(self, turn: Turn, undo: bool = True) -> None:
        """End it and undo its change. Where inner turns go on, the last of them does that."""
        with self._changed:
            if turn not in self._stack:
                return
            place = self._stack.index(turn)
            changes = [turn.undo] if undo and turn.undo else []
            changes += turn.owed
            turn.undo, turn.owed = None, []  # contexts of tasks may keep the turn for long
            try:
                if turn is not self._stack[-1]:
                    self._stack[place + 1].owed += changes
                else:
                    for change in changes:
                        change()
            finally:
                self._stack.remove(turn)
                self._changed.notify_all()


def turns_at(model: nn.Module) -> Turns:
    """The turns at a model, after making every call of it take one."""
    called = list(_called(model))
    turns = called[-1].__dict__.setdefault(_ATTRIBUTE, Turns())
    for module in called:
        module.__dict__[_ATTRIBUTE] = turns
        if not hasattr(type(module), "takes_turns"):
            module.__class__ = _taking_turns(type(module))  # type: ignore[arg-type]
    return turns


def _called(model: nn.Module) -> Iterator[nn.Module]:
    """The modules by which users call it: PEFT's wrapper, its tuner, and last the base model in it."""
    yield model
    if isinstance(model, PeftModel):
        yield model.base_model
        yield model.get_base_model()


@functools.cache
def _taking_turns(kind: type[nn.Module]) -> type[nn.Module]:
    """The class, with each call in a turn. Not by hooks: they cannot hold a `generate` as a whole."""

    class Taking(kind):
        takes_turns = True

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return _in_turn(self, super().__call__, args, kwargs)

        def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
            make, (_, *more), *state = super().__reduce_ex__(protocol)
            return make, (kind, *more), *state  # the copy is of the plain class, until there is a switch on it

    if hasattr(kind, "generate"):

        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            return _in_turn(self, super(Taking, self).generate, args, kwargs)

        Taking.generate = functools.wraps(kind.generate)(generate)
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(Taking, name, getattr(kind, name))
    return Taking


def _in_turn(model: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with getattr(model, _ATTRIBUTE).take():
        names = kwargs.get("adapter_names")
        return call(*args, **kwargs) if names is None else _row_by_row(model, names, call, args, kwargs)


def _row_by_row(model: nn.Module, names: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A mixed-batch call of PEFT, which leaves its hooks on the layers when it fails, and ignores the names while all is off."""
    modules = list(model.modules())
    layers = [module for module in modules if isinstance(module, LoraLayer)]
    if any(name != "__base__" for name in names) and not any(
        m.active_adapters and not m.disable_adapters for m in layers
    ):
        raise AdapterError(
            "adapter_names asks for an adapter in some rows, and all adapters are off, so that PEFT would answer every row from the base "
            "model. Switch it on for the call: with switch.on():"
        )
    before = [set(module._forward_pre_hooks) for module in modules]
    try:
        return call(*args, **kwargs)
    except BaseException:
        for module, hooks in zip(modules, before, strict=True):
            for left in module._forward_pre_hooks.keys() - hooks:
                del module._forward_pre_hooks[left]
                module._forward_pre_hooks_with_kwargs.pop(left, None)
        raise
