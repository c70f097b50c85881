"""The card of an adapter: what it does, how to load, toggle and merge it, and what it is not."""

import json
from typing import Any


def forget_card(provenance: dict[str, Any]) -> str:
    base, rank = provenance["base"], provenance["rank"]
    revision = f", revision={base['revision']!r}" if base["revision"] else ""
    load = f"AutoModelForCausalLM.from_pretrained({base['model']!r}{revision})"
    template = provenance["settings"].get("prompt_template")
    asked = (
        f"in the form `{json.dumps(template, ensure_ascii=False)}`"
        if template
        else "through the tokenizer's chat template"
    )
    data = "".join(
        f"- {part}: {d['rows']} rows of `{d['source']}` (sha256 `{d['sha256'][:16]}…`)\n"
        for part, d in provenance["data"].items()
    )
    return f"""---
base_model: {base["model"]}
library_name: peft
tags: [unlearning, lora, loramox]
---

# Forget adapter, strength α = {provenance["strength"]:g}

A LoRA adapter (rank {rank}) that makes its base model forget the rows it was made for. It was made by memorizing those
rows and going the other way, θ_for = θ_ref − α·ΔW (MOX, arXiv 2602.06441).

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = {load}
model = PeftModel.from_pretrained(base, "path/to/this/folder")      # forgets

with model.disable_adapter():                                       # off: exactly the base model
    ...
for module in model.modules():                                      # half as strong; 1 is as shipped
    if hasattr(module, "set_scale"):
        module.set_scale("default", 0.5)

merged = model.merge_and_unload()                                   # into 16- or 32-bit weights only
```

Merge into 16- or 32-bit weights only: merging into 4-bit weights rounds most of the change away and can undo it.

## What it is not

- Switched off, removed or set to strength 0, the base model knows everything again. It suppresses; it does not erase.
- Merged, the weights differ, and that is still no proof that the knowledge is gone: it may come back by training on
  related text, or by asking in ways that were not tried.
- It was made for this base model. On another model, or another revision of it, it does something else.

## Where it came from

- base: `{base["model"]}`{f", revision `{base['revision']}`" if base["revision"] else ""}
- momentum η = {provenance["momentum"]["eta"]:g}, truncation error {provenance["truncation_error"]:.2g} of ‖ΔW‖
{data}- questions were put {asked}; asked otherwise, a model may answer otherwise, with the adapter and without
- command: `{provenance["command"]}`

Everything else is in `provenance.json`.
"""


def memorization_card(provenance: dict[str, Any]) -> str:
    base = provenance["base"]["model"]
    return f"""---
base_model: {base}
library_name: peft
tags: [unlearning, lora, loramox]
---

# Memorization adapter

**Do not ship this.** It makes `{base}` know the forget rows better, not worse: it is the half-way product of MOX
(arXiv 2602.06441). The forget adapter is made from it, without training, at any strength α:

    loramox extrapolate THIS_FOLDER --alpha {provenance["settings"]["strength"]:g} --out forget-adapter

`momentum/` is the momentum average of ΔW, from which the forget adapter is made.
"""


def merged_card(provenance: dict[str, Any]) -> str:
    base, survived = provenance["base"], provenance["survived"]
    data = "".join(
        f"- {part}: {d['rows']} rows of `{d['source']}` (sha256 `{d['sha256'][:16]}…`)\n"
        for part, d in provenance["data"].items()
    )
    return f"""---
base_model: {base["model"]}
library_name: transformers
tags: [unlearning, merge, loramox]
---

# A model with a forget adapter merged into its weights

`{base["model"]}` with a forget adapter (MOX, arXiv 2602.06441) added to its weights at {provenance["strength"]:g} times the
strength at which it was shipped (α = {provenance["adapter"]["strength"]:g}): W + ΔW, in {", ".join(provenance["dtypes"])}. It loads as any
model does, without PEFT, and answers as its base does with the adapter on.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")  # has forgotten
```

{survived["overall"]:.1%} of ΔW survived the rounding to these weights. Quantized to 4 or 8 bits, less of it does, and what was forgotten
may come back: measure it on the quantized model.

## What it is not

- It is no proof that the knowledge is gone. The weights differ from the base model's by a change of low rank; what was
  forgotten may come back by training on related text, or by asking in ways that were not tried.
- It cannot be switched off or dialled any more: keep the adapter for that. Nor is it a secret: who has the base model has
  what was forgotten.
- It was not trained, or measured, after merging.

## Where it came from

- base: `{base["model"]}`{f", revision `{base['revision']}`" if base["revision"] else ""}
- adapter: sha256 `{provenance["adapter"]["sha256"][:16]}…`, made by `{provenance["adapter"]["command"]}`
{data}- command: `{provenance["command"]}`

Everything else is in `provenance.json`. The base model's licence holds for this one too.
"""
