"""The card of a model with a forget adapter merged into its weights, and what is left of the adapter in them."""

from typing import Any

from loramox.adapter.card import data_lines
from loramox.adapter.markdown import code, front_matter, line


def merged_card(provenance: dict[str, Any]) -> str:
    base, alpha = provenance["base"], provenance["adapter"]["alpha"]
    kind = provenance.get("quantization")
    few_bits = (
        f"Quantized to {kind} after the merge."
        if kind
        else "Quantized to 4 or 8 bits, less of it does, and what was forgotten may come back: `loramox ship merge --quantize nf4` "
        "measures it."
    )
    return f"""{front_matter(base["model"], "transformers", ["unlearning", "merge", "loramox"])}
# A model with a forget adapter merged into its weights

{code(base["model"])} with a forget adapter ({line(provenance["adapter"]["method"])}) added to its weights at scale {provenance["scale"]:g}, 1
being as shipped{f" (alpha = {alpha:g})" if alpha else ""}: W + ΔW, in {", ".join(provenance["dtypes"])}. It loads as any
model does, without PEFT, and answers as its base does with the adapter on.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")  # has forgotten
```

In these weights {what_survived(provenance)}. {few_bits}

## What it is not

- It is no proof that the knowledge is gone. The weights differ from the base model's by a change of low rank; what was
  forgotten may come back by training on related text, or by asking in ways that were not tried.
- It cannot be switched off or dialled any more: keep the adapter for that. Nor is it a secret: who has the base model has
  what was forgotten.
- It was not trained{"" if provenance.get("forgetting") else ", or measured,"} after merging.

## Where it came from

- base: {code(base["model"])}{f", revision {code(base['revision'])}" if base["revision"] else ""}
- adapter: sha256 {code(provenance["adapter"]["sha256"][:16] + "…")}, made by {code(provenance["adapter"]["command"])}
{data_lines(provenance)}- command: {code(provenance["command"])}

Everything else is in `provenance.json`. The base model's licence holds for this one too.
"""


def what_survived(provenance: dict[str, Any]) -> str:
    """What is left of ΔW in a merged model's weights, and of the forgetting where it was measured, in words."""
    survived = provenance["survived"]
    if "quantization" not in provenance:
        return f"{survived['overall']:.1%} of ΔW survived the rounding"
    forgetting = provenance.get("forgetting")
    share = forgetting and forgetting["share"]
    measured = f"{share:.1%} of the forgetting is left; " if share is not None else ""
    asked = "" if forgetting else ". Whether what was forgotten stays so was not measured (--forget, --retain)"
    return (
        f"{measured}{survived['overall']:.1%} of the change by which they differ from the quantized base is ΔW, and the rest is "
        f"rounding ({survived['share']:.1%} of ΔW is there on average){asked}"
    )
