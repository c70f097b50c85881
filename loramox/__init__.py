"""loramox: unlearning for language models with a LoRA adapter (MOX, arXiv 2602.06441)."""

import importlib
from typing import Any

# Where each public name lives; imported on first use, so that `import loramox` costs nothing. The verbs `memorize` and
# `extrapolate` are functions in the rooms of the same names: from loramox.memorize import memorize.
_HOMES = {
    "loramox.batches": ("Tokenisation", "encode"),
    "loramox.errors": ("LoramoxError",),
    "loramox.extrapolate": ("ShippingConfig",),
    "loramox.main_job": ("unlearn",),
    "loramox.memorize": ("BaselineConfig", "BaselineTrainer", "MemorizeConfig", "MemorizeTrainer"),
    "loramox.reference": ("ReferenceConfig", "add_lora", "load_reference"),
    "loramox.rows": ("Columns", "Data", "read_rows"),
    "loramox.run": ("RunConfig",),
    "loramox.ship": ("ForgetSwitch",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("loramox")
    raise AttributeError(f"module 'loramox' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
