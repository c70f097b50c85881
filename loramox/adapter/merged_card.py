"""The card of a merged model, with the share of the adapter that survived the merge."""

from typing import Any

from loramox.adapter.card import data_lines
from loramox.adapter.markdown import code, front_matter, line

NOT_LOWERED = "in 16 bits the adapter does not make the forget rows' answers less likely, so how much of the forgetting is left was not measured"


def merged_card(provenance: dict[str, Any]) -> str:
    base, alpha = provenance["base"], provenance["adapter"]["alpha"]
    kind = provenance.get("quantization")
    few_bits = (
        f"Quantized to {kind} after the merge."
        if kind
        else "If you quantize to 4 or 8 bits, less of ΔW survives, and forgotten rows may come back: `loramox ship merge --quantize nf4` "
        "measures this."
    )
    return f"""{front_matter(base["model"], "transformers", ["unlearning", "merge", "loramox"])}
# A model with a forget adapter merged into its weights

{code(base["model"])} with a forget adapter ({line(provenance["adapter"]["method"])}) added to its weights at scale {provenance["scale"]:g}:
W + ΔW, in {", ".join(provenance["dtypes"])}. Scale 1 is as shipped{f" (alpha = {alpha:g})" if alpha else ""}. The model loads without PEFT,
and answers like its base with the adapter on.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")  # has forgotten
```

In these weights {what_survived(provenance)}. {few_bits}

## What it is not

- It is no proof that the knowledge is gone. The weights differ from the base model's by a low-rank change. The knowledge may
  come back through training on related text, or through questions that nobody tried.
- It can no longer be switched off or scaled: keep the adapter for that.
- It keeps no secret: anyone who has the base model has the forgotten rows.
- It was not trained{", or measured," if _share(provenance) is None else ""} after merging.

## Where it came from

- base: {code(base["model"])}{f", revision {code(base['revision'])}" if base["revision"] else ""}
- adapter: sha256 {code(provenance["adapter"]["sha256"][:16] + "…")}, made by {code(provenance["adapter"]["command"])}
{data_lines(provenance)}- command: {code(provenance["command"])}

Everything else is in `provenance.json`. The base model's licence holds for this one too.
"""


def what_survived(provenance: dict[str, Any]) -> str:
    """The share of ΔW that is left in a merged model's weights, and of the forgetting if it was measured, in words."""
    survived = provenance["survived"]
    if "quantization" not in provenance:
        return f"{survived['overall']:.1%} of ΔW survived the rounding"
    share = _share(provenance)
    measured = f"{share:.1%} of the forgetting is left; " if share is not None else ""
    if share is not None:
        asked = ""
    elif provenance.get("forgetting"):
        asked = f"; {NOT_LOWERED}"
    else:
        asked = ". Whether the model still forgets was not measured (--forget, --retain)"
    return (
        f"{measured}{survived['overall']:.1%} of the difference from the quantized base is ΔW, and the rest is rounding (on average, "
        f"{survived['share']:.1%} of ΔW is left){asked}"
    )


def _share(provenance: dict[str, Any]) -> float | None:
    """How much of the forgetting is left; None if that was not measured."""
    return (provenance.get("forgetting") or {}).get("share")
