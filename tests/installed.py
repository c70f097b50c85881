"""What the wheel of `make package` has to have. Run by the Python of the environment that it is installed in."""

import importlib
import sys
from importlib.resources import files
from pathlib import Path

import loramox

assert Path(loramox.__file__).is_relative_to(sys.prefix), f"{loramox.__file__} is not of the wheel"
for name in loramox.__all__:
    getattr(loramox, name)
for extra in ("check.check", "gguf", "hub", "ledger.requests", "merge.job", "plan.job", "report", "serve"):
    importlib.import_module(f"loramox.extras.{extra}")
for path in ("py.typed", "train/refusals.txt", "extras/report/page.html.j2", "extras/report/page.css"):
    assert (files(loramox) / path).is_file(), f"{path} is not in the wheel"
print(f"loramox {loramox.__version__}: the wheel is whole")
