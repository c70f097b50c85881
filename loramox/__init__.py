"""loramox: unlearning for language models with a LoRA adapter (MOX, arXiv 2602.06441)."""

import importlib
import warnings
from typing import Any

# Where each public name lives; imported on first use, so that `import loramox` costs nothing.
_HOME_OF = {
    "Columns": "loramox.data.rows",
    "Data": "loramox.data.rows",
    "ForgetSwitch": "loramox.adapter.switch",
    "LoramoxError": "loramox.errors",
    "ReferenceConfig": "loramox.model.lora",
    "RunConfig": "loramox.run",
    "ShippingConfig": "loramox.adapter.export",
    "Tokenisation": "loramox.data.encode",
    "UnlearnConfig": "loramox.train.config",
    "UnlearnTrainer": "loramox.train.trainer",
    "add_lora": "loramox.model.lora",
    "encode": "loramox.data.encode",
    "load_reference": "loramox.model.load",
    "read_rows": "loramox.data.rows",
    "unlearn": "loramox.unlearning",
}
# Names of loramox 0.1, until 0.3.
_RENAMED = {
    "BaselineConfig": "UnlearnConfig",
    "BaselineTrainer": "UnlearnTrainer",
    "MemorizeConfig": "UnlearnConfig",
    "MemorizeTrainer": "UnlearnTrainer",
}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name in _RENAMED:
        warnings.warn(f"loramox.{name} is now loramox.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        return __getattr__(_RENAMED[name])
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("loramox")
    raise AttributeError(f"module 'loramox' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
