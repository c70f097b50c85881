"""Forgetting switched and dialled on a loaded PEFT model, for everyone or row by row."""

import math
from collections.abc import Sequence
from types import TracebackType

from peft import PeftModel
from peft.tuners.lora import LoraLayer

from loramox.errors import AdapterError, SettingsError

BASE = "__base__"  # PEFT's name for no adapter, in a batch of mixed rows


class ForgetSwitch:
    """Turns a forget adapter on a loaded PEFT model on and off, and sets its strength; 1 is what was shipped.

    Each of `on()`, `off()` and `at(strength)` lasts until the next, or, used as a context manager, until the block ends:

        switch = ForgetSwitch(model)
        switch.off()                # for good: bit-identical to the base model
        with switch.at(0.5): ...    # half as strong in here, off again afterwards

    No other adapter on the model is touched. Switching off suppresses the forgetting; the base model knows everything.

    Raises `AdapterError` when the model has no such LoRA adapter, or when it is merged into the weights.
    """

    def __init__(self, model: PeftModel, adapter: str = "default") -> None:
        self.adapter = adapter
        self._layers = [m for m in model.modules() if isinstance(m, LoraLayer) and adapter in m.lora_A]
        if not self._layers:
            there = ", ".join(getattr(model, "peft_config", {})) or "none"
            raise AdapterError(
                f"the model has no LoRA adapter '{adapter}' (it has: {there}). Load it with PeftModel.from_pretrained"
            )
        self._refuse_merged()

    @property
    def strength(self) -> float:
        """How strong the adapter is now, in units of what was shipped; 0 when it is off."""
        return 0.0 if self._layers[0].disable_adapters else self._own_strength()

    def on(self) -> "_Until":
        """As strong as it was shipped."""
        return self.at(1.0)

    def off(self) -> "_Until":
        """No change to the base model at all: its layers are not computed with."""
        return self.at(0.0)

    def at(self, strength: float) -> "_Until":
        """`strength` times what was shipped: between 0 and 1 weaker, beyond it stronger.

        Raises `SettingsError` for a strength that is negative (it would bring the rows back) or not finite.
        """
        if not math.isfinite(strength) or strength < 0:
            raise SettingsError(
                f"strength {strength} makes no forget model. Expected 0 (off), 1 (as shipped), or any positive number"
            )
        self._refuse_merged()
        before = self._own_strength()
        self._set(strength)
        return _Until(self, before)

    def rows(self, forget: Sequence[bool]) -> list[str]:
        """`adapter_names` for a batch in which only some rows forget, bit-exact per row, in `forward` and `generate`:

            model.generate(**batch, adapter_names=switch.rows([True, False]))

        Rows that do not forget get the base model, without any other adapter. PEFT takes this in eval mode only.
        """
        return [self.adapter if each else BASE for each in forget]

    def _set(self, strength: float) -> None:
        for layer in self._layers:
            # An active one keeps its place: the order of the sum over adapters decides its last bit.
            active = [name for name in layer.active_adapters if strength or name != self.adapter]
            if strength and self.adapter not in active:
                active.append(self.adapter)
            # PEFT marks what it activates as trainable and freezes the rest; which of them train is not ours to change.
            trainable = [(p, p.requires_grad) for p in layer.parameters()]
            layer.set_adapter(active)
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)
            layer.set_scale(self.adapter, strength or 1.0)

    def _own_strength(self) -> float:
        """The adapter's strength apart from PEFT's `disable_adapter()`, which is a switch over all adapters."""
        layer = self._layers[0]
        active = self.adapter in layer.active_adapters
        return layer.scaling[self.adapter] / self._shipped_scale(layer) if active else 0.0

    def _refuse_merged(self) -> None:
        if any(self.adapter in layer.merged_adapters for layer in self._layers):
            raise AdapterError(
                f"adapter '{self.adapter}' is merged into the weights and cannot be switched. Call unmerge_adapter() first"
            )

    def _shipped_scale(self, layer: LoraLayer) -> float:
        root = math.sqrt(layer.r[self.adapter]) if layer.use_rslora.get(self.adapter) else layer.r[self.adapter]
        return layer.lora_alpha[self.adapter] / root


class _Until:
    """What a change of strength returns: on leaving a `with` block, the strength is what it was before."""

    def __init__(self, switch: ForgetSwitch, before: float) -> None:
        self._switch, self._before = switch, before

    def __enter__(self) -> ForgetSwitch:
        return self._switch

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._switch._set(self._before)
