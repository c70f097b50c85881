"""Switch and scale a forget adapter on a loaded PEFT model, for all rows or row by row."""

import math
import warnings
from collections.abc import Sequence

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from loramox.adapter.turns import Turn, turns_at
from loramox.errors import AdapterError, SettingsError
from loramox.model.lora import what_trains_as_before

BASE = "__base__"  # PEFT's name for no adapter, in a batch of mixed rows


class ForgetSwitch:
    """Turns a forget adapter on a loaded PEFT model on and off, and sets its scale; 1 is as shipped.

    Each of `on()`, `off()` and `at(scale)` lasts until the next, or, used as a context manager, until the block ends:

        switch = ForgetSwitch(model)
        switch.off()                # for good: bit-identical to the base model
        with switch.at(0.5): ...    # half the shipped change in here, off again afterwards

    No other adapter on the model is touched. Switching off suppresses the forgetting; the base model knows everything.

    Threads may share the model: while one is in a block or a call of the model, calls and switches in others wait. A call outside
    of a block is at the scale that was last set without one. In asyncio, leave a block before you await: a task that would wait
    for another task of its own thread gets an `AdapterError`.

    Args:
        model: a PEFT model with the forget adapter on it.
        adapter: the adapter's name on that model.

    Raises:
        AdapterError: the model has no such LoRA adapter, or it is merged into the weights.
    """

    def __init__(self, model: PeftModel, adapter: str = "default") -> None:
        self.adapter = adapter
        self._lora = [m for m in model.modules() if isinstance(m, LoraLayer)]
        self._layers = [layer for layer in self._lora if adapter in layer.lora_A]
        if not self._layers:
            there = ", ".join(getattr(model, "peft_config", {})) or "none"
            raise AdapterError(
                f"the model has no LoRA adapter '{adapter}' (it has: {there}). Load it with PeftModel.from_pretrained"
            )
        self._check_layers()
        self._turns = turns_at(model)

    @property
    def scale(self) -> float:
        """The scale that the adapter has now: 1 as shipped, 0 when it is off. Another thread's block is waited for.

        Raises `AdapterError` when its layers are at different scales, as after PEFT's `set_scale` on some of them, and when it is
        merged or deleted.
        """
        with self._turns.take():
            self._check_layers()
            scales = [self._scale_of(layer) for layer in self._layers]
        low, high = min(scales), max(scales)
        if not math.isclose(low, high):
            raise AdapterError(
                f"the layers of adapter '{self.adapter}' are at different scales, {low:g} to {high:g}: some were set by hand, so the adapter "
                "has no single scale. Set all of them with ForgetSwitch.at(scale)"
            )
        return scales[0]

    @property
    def strength(self) -> float:
        """`scale` under its name of loramox 0.1, until 0.3."""
        warnings.warn("ForgetSwitch.strength is now ForgetSwitch.scale", DeprecationWarning, stacklevel=2)
        return self.scale

    def on(self) -> "_Until":
        """The adapter as it was shipped."""
        return self.at(1.0)

    def off(self) -> "_Until":
        """No change to the base model at all: the adapter is not computed."""
        return self.at(0.0)

    def at(self, scale: float) -> "_Until":
        """`scale` times the shipped change: below 1 it forgets less, above 1 more.

        Raises `SettingsError` for a scale that is negative (it would bring the rows back) or not finite.
        """
        if not math.isfinite(scale) or scale < 0:
            raise SettingsError(
                f"scale {scale} makes no forget model. Expected 0 (off), 1 (as shipped), or any positive number"
            )
        turn = self._turns.take()
        try:
            self._check_layers()
            before = self._state()
            turn.undo = lambda: self._set(before)
            # Not PEFT's `set_scale`, which rounds twice: read back, the scale is then the one that was set.
            self._set([(scale > 0, (scale or 1.0) * self._shipped_scaling(layer)) for layer in self._layers])
        except BaseException:
            self._turns.end(turn)
            raise
        return _Until(self, turn)

    def rows(self, forget: Sequence[bool]) -> list[str]:
        """`adapter_names` for a batch in which only some rows forget, bit-exact per row, in `forward` and `generate`:

            model.generate(**batch, adapter_names=switch.rows([True, False]))

        Rows that do not forget get the base model. PEFT takes this in eval mode only, and puts one adapter on a row.

        Raises `AdapterError` while another adapter is active, which no row would get.
        """
        others = {name for layer in self._lora for name in layer.active_adapters} - {self.adapter}
        if others:
            raise AdapterError(
                f"the adapter {min(others)} is active too, and PEFT puts only one adapter on a row of a batch. Ask the rows that forget and the "
                "others in batches of their own"
            )
        return [self.adapter if each else BASE for each in forget]

    def _state(self) -> list[tuple[bool, float]]:
        """Of each layer, whether the adapter is active in it, and the factor on B·A, as PEFT stores it."""
        return [(self.adapter in layer.active_adapters, layer.scaling[self.adapter]) for layer in self._layers]

    def _set(self, state: list[tuple[bool, float]]) -> None:
        for layer, (on, scaling) in zip(self._layers, state, strict=True):
            # An active one keeps its place: the order of the sum over adapters decides its last bit.
            active = [name for name in layer.active_adapters if on or name != self.adapter]
            if on and self.adapter not in active:
                active.append(self.adapter)
            with what_trains_as_before(layer):
                layer.set_adapter(active)
            layer.scaling[self.adapter] = scaling

    def _scale_of(self, layer: LoraLayer) -> float:
        on = self.adapter in layer.active_adapters and not layer.disable_adapters
        return layer.scaling[self.adapter] / self._shipped_scaling(layer) if on else 0.0

    def _check_layers(self) -> None:
        """Raises `AdapterError` when the adapter cannot be switched."""
        if not all(self.adapter in layer.lora_A for layer in self._layers):
            raise AdapterError(
                f"adapter '{self.adapter}' is no longer on all of its layers: it was deleted. Load it again, and make a new ForgetSwitch"
            )
        if any(self.adapter in layer.merged_adapters for layer in self._layers):
            raise AdapterError(
                f"adapter '{self.adapter}' is merged into the weights and cannot be switched. Call unmerge_adapter() first"
            )

    def _shipped_scaling(self, layer: LoraLayer) -> float:
        root = math.sqrt(layer.r[self.adapter]) if layer.use_rslora.get(self.adapter) else layer.r[self.adapter]
        return layer.lora_alpha[self.adapter] / root


class _Until:
    """What a change of scale returns: on leaving a `with` block, every layer is as it was before.

    Until a block is opened, or this object is dropped, the model is in the hands of whoever made the change: else another thread
    could call it between `at(scale)` and the begin of the block.
    """

    def __init__(self, switch: ForgetSwitch, turn: Turn) -> None:
        self._switch, self._turn = switch, turn

    def __enter__(self) -> ForgetSwitch:
        self._turn.__enter__()
        return self._switch

    def __exit__(self, *error: object) -> None:
        self._turn.__exit__(*error)

    def __del__(self) -> None:
        self._turn.keep()
