"""The card of an adapter (its README.md): what it does, how to load, switch and merge it, and its limits."""

import json
from typing import Any

from loramox.adapter.markdown import code, front_matter, line

RETAIN_FILE = "retain-auto.jsonl"  # of a run: the retain rows that the reference wrote
MOX = "MOX, arXiv 2602.06441"
FORGETS = "makes its base model forget the rows it was made for"

LOAD = """\
model = PeftModel.from_pretrained(base, "path/to/this/folder")      # on

with model.disable_adapter():                                       # off: exactly the base model
    ...
for module in model.modules():                                      # half of the adapter; 1 is as shipped
    if hasattr(module, "set_scale"):
        module.set_scale("default", 0.5)
"""
OFF = "With the adapter off, removed or at scale 0, the base model knows everything again."

LOAD_BESIDE = """\
model = PeftModel.from_pretrained(base, MINE, adapter_name="mine")
model.load_adapter("path/to/this/folder", adapter_name="forget")
model.base_model.set_adapter(["mine", "forget"])                    # on: both

for module in model.modules():                                      # half of the forget adapter; 1 is as shipped
    if hasattr(module, "set_scale"):
        module.set_scale("forget", 0.5)
model.base_model.set_adapter(["mine"])                              # off: exactly your fine-tune
model.base_model.set_adapter(["mine", "forget"])                    # on again
"""
OFF_BESIDE = (
    "Alone it does nothing useful: load it beside the fine-tune. Without it, or at scale 0, the fine-tune knows everything\n"
    "  again. Servers that load only one adapter can load the combined adapter, which has both."
)

LOAD_COMBINED = """\
model = PeftModel.from_pretrained(base, "path/to/this/folder")      # on: the fine-tune, which has forgotten

with model.disable_adapter():                                       # off: the base model, without your fine-tune
    ...
"""
OFF_COMBINED = (
    "Its scale applies to both: a scale other than 1 also changes the fine-tune. To switch off or scale only the forgetting,\n"
    "  load the two adapters side by side. The fine-tune alone knows everything."
)


def forget_card(provenance: dict[str, Any]) -> str:
    if "negated" in provenance:
        return _negated_card(provenance)
    method, settings = line(provenance["method"]), provenance["settings"]
    asked = (
        _asked([settings["prompt_template"]]) if "prompt_template" in settings else ""
    )  # not known of a run from Python
    chosen = f"- {line(provenance['chosen_by'])}\n" if "chosen_by" in provenance else ""
    early = (
        f"- from {code(provenance['checkpoint'])} of its run, not from the end of training\n"
        if "checkpoint" in provenance
        else ""
    )
    made = (
        f"{chosen}{early}- momentum η = {provenance['momentum']['eta']:g}, truncation error {provenance['truncation_error']:.2g} of ‖ΔW‖\n"
        f"{data_lines(provenance)}{_instead(provenance)}{asked}{_served(provenance)}{_quantized(settings)}{_beside(provenance)}"
    )
    alpha = provenance["alpha"]
    title = f"Forget adapter ({method})" if alpha is None else f"Forget adapter, alpha = {alpha:g}"
    how = _how(provenance)
    if "tuned_adapter" in provenance:
        mine = provenance["tuned_adapter"]["path"]
        does = f"makes a fine-tune of its base model forget the rows it was\nmade for. It is loaded beside that fine-tune, the adapter {code(mine)}"
        return _forget_card(provenance, title, made, how, does, LOAD_BESIDE.replace("MINE", repr(mine)), OFF_BESIDE)
    return _forget_card(provenance, title, made, how)


def combined_card(provenance: dict[str, Any]) -> str:
    """The card of a tuned adapter and a forget adapter in one."""
    mine = provenance["tuned_adapter"]["path"]
    does = f"is two in one, by exact concatenation: the fine-tune\n{code(mine)}, and a forget adapter for rows that it knows"
    how = f"written for servers that load\nonly one adapter. The forget adapter was {_how(provenance)}"
    made = f"{data_lines(provenance)}{_instead(provenance)}{_beside(provenance)}"
    return _forget_card(provenance, "Fine-tune and forget adapter in one", made, how, does, LOAD_COMBINED, OFF_COMBINED)


def _how(provenance: dict[str, Any]) -> str:
    method = line(provenance["method"])
    return f"trained to forget those\nrows by {method}" if provenance["alpha"] is None else _turned(method)


def _beside(provenance: dict[str, Any]) -> str:
    """What else the model had while ΔW was trained, in lines."""
    lines = ""
    if mine := provenance.get("tuned_adapter"):
        without = provenance["settings"].get("memorize_at")
        lines += f"- trained beside the adapter {code(mine['path'])} (sha256 {code(mine['sha256'][:16] + '…')}), which was frozen\n"
        lines += "- ΔW was memorized on the base without that adapter\n" if without else ""
    elif earlier := provenance.get("memorize_at"):
        weights = earlier["weights"]
        known_by = f" (weights {code(weights[:16] + '…')})" if weights else ""
        lines = f"- ΔW was memorized at {code(earlier['model'])}{known_by}, an earlier checkpoint, and is subtracted from the base\n"
    return lines


def _negated_card(provenance: dict[str, Any]) -> str:
    """The card of an adapter that PEFT wrote, negated."""
    negated, alpha = provenance["negated"], provenance["alpha"]
    made = (
        f"- ΔW: the adapter {code(negated['adapter'])} (sha256 {code(negated['sha256'][:16] + '…')}), truncation error "
        f"{provenance['truncation_error']:.2g} of ‖ΔW‖\n"
    )
    how = (
        "made by negating\na LoRA adapter that PEFT wrote, θ_ref − alpha·ΔW. It was not trained to forget by loramox, and nothing was\n"
        "measured. Whether the model forgets anything with it is not known: run `loramox evaluate`"
    )
    return _forget_card(
        provenance, f"Negated adapter, alpha = {alpha:g}", made, how, "subtracts another adapter's change"
    )


def _turned(method: str = MOX) -> str:
    return f"made by memorizing those\nrows in ΔW and extrapolating in the opposite direction, θ_for = θ_ref − alpha·ΔW ({method})"


def composed_card(provenance: dict[str, Any]) -> str:
    """The card of one adapter for several requests."""
    requests = provenance["requests"]
    each = "".join(
        f"| {r['id']} | {r['rows']} | {code(r['sha256'][:16] + '…')} | {r['alpha']:g} | {r['error']:.2g} |\n"
        for r in requests
    )
    made = (
        f"- the sum of {len(requests)} requests, truncation error {provenance['truncation_error']:.2g} of ‖ΔW‖; the last column has the error "
        f"of each request, as a share of its own ‖ΔW‖\n{_asked([r['prompt_template'] for r in requests])}\n"
        f"| request | rows | sha256 of the rows | alpha | error |\n|---|---|---|---|---|\n{each}\n"
    )
    return _forget_card(provenance, f"Forget adapter for {len(requests)} requests", made, _turned())


def data_lines(provenance: dict[str, Any]) -> str:
    """The rows of each part, those that the reference wrote among them, in lines."""
    lines = [
        f"- {line(part)}: {d['rows']} rows of {code(d['source'])} (sha256 {code(d['sha256'][:16] + '…')})\n"
        for part, d in provenance["data"].items()
        if d["rows"]  # none of `--retain auto`
    ]
    if written := provenance.get("generated", {}).get("retain"):
        lines.append(
            f"- retain, written by the reference: {written['rows']} questions that it sampled, with its own answers "
            f"(`--auto_retain`; {code(RETAIN_FILE)} of the run, sha256 {code(written['sha256'][:16] + '…')})\n"
        )
    return "".join(lines)


def _instead(provenance: dict[str, Any]) -> str:
    """What was taught in place of the answers, in a line; nothing of a method that cannot teach any."""
    settings = provenance["settings"]
    refusals = settings.get("refusals")
    taught = {
        "refuse": "it was taught to refuse, with "
        + (
            f"the sentences of {code(refusals)}" if refusals not in (None, "built-in") else "built-in English sentences"
        ),
        "guess": "it was taught the reference's likeliest other answers, which may state falsehoods",
        "none": "nothing was taught: its new answers were not chosen",
    }.get(settings.get("instead"))
    if column := settings.get("wanted_column"):
        return f"- in place of the answers it was taught those in the column {code(column)} of the forget rows\n"
    return f"- in place of the answers {taught} (`--instead {settings['instead']}`)\n" if taught else ""


def _asked(templates: list[str | None]) -> str:
    """The forms of the questions, in a line."""
    forms = [
        f"in the form {code(json.dumps(template, ensure_ascii=False))}"
        if template
        else "with the tokenizer's chat template"
        for template in dict.fromkeys(templates)
    ]
    return f"- questions were written {', or '.join(forms)}. In another form the model may answer differently, with or without the adapter\n"


def _served(provenance: dict[str, Any]) -> str:
    """The difference between the trained and the served prompt, if there is one, in a line."""
    if not (otherwise := provenance.get("served_otherwise")):
        return ""
    trained, served = (json.dumps(otherwise[part], ensure_ascii=False) for part in ("trained", "served"))
    return f"- served prompt differs: between question and answer, training had {code(trained)}, and a server puts {code(served)}\n"


def _quantized(settings: dict[str, Any]) -> str:
    """The precision of the base in training, in a line; nothing of a run from Python, where it is not known."""
    kind = settings.get("quantization")
    if kind is None:
        return ""
    if kind == "none":
        return "- trained on the base's own weights, not quantized\n"
    return (
        f"- trained on the base quantized to {kind}. Before you serve it on 16-bit weights, measure it there: "
        "`loramox evaluate --quantization none`\n"
    )


def _forget_card(
    provenance: dict[str, Any],
    title: str,
    made: str,
    how: str,
    does: str = FORGETS,
    loading: str = LOAD,
    off: str = OFF,
) -> str:
    base, rank = provenance["base"], provenance["rank"]
    revision = f", revision={base['revision']!r}" if base["revision"] else ""
    load = f"AutoModelForCausalLM.from_pretrained({base['model']!r}{revision})"
    return f"""{front_matter(base["model"], "peft", ["unlearning", "lora", "loramox"])}
# {title}

A LoRA adapter (rank {rank}) that {does}. It was {how}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = {load}
{loading}
merged = model.merge_and_unload()                                   # at the current scale: set 1 first to merge as shipped
```

Merge into 16- or 32-bit weights only: merging into 4-bit weights rounds most of the change away and can undo it.

## What it is not

- Switched on, it suppresses; it does not erase. {off}
- Anyone who has both base and adapter can steer the base away from the forget model, and may learn more than the base alone
  reveals. `loramox attack --attacks pair` tries this.
- Merged, it is no proof that the knowledge is gone. The knowledge may still come back through training on related text, or
  through questions that nobody tried.
- It was made for this base model. On another model, or on another revision of this one, its effect is unknown.

## Where it came from

- base: {code(base["model"])}{f", revision {code(base['revision'])}" if base["revision"] else ""}
{made}- command: {code(provenance["command"])}

Everything else is in `provenance.json`.
"""


def trained_card(provenance: dict[str, Any]) -> str:
    base, alpha = provenance["base"]["model"], provenance["alpha"]
    if alpha is None:
        what = f"""# A model trained to forget ({line(provenance["method"])})

The adapter with its checkpoints, in float32. The forget adapter is made from `momentum/`. To write it in the form that servers
accept:

    loramox extrapolate THIS_FOLDER --out forget-adapter
"""
    else:
        what = f"""# ΔW of a forget adapter ({line(provenance["method"])})

**Do not ship this.** It does not make {code(base)} forget the rows: θ_ref + ΔW is on the memorizing side of the reference. To make
the forget adapter, θ_ref − alpha·ΔW, from it at any alpha, without training:

    loramox extrapolate THIS_FOLDER --alpha {alpha:g} --out forget-adapter

`momentum/` is the momentum average of ΔW, from which the forget adapter is made.
"""
    return f"""{front_matter(base, "peft", ["unlearning", "lora", "loramox"])}
{what}"""


def request_card(provenance: dict[str, Any], name: str) -> str:
    """The card of a memorization adapter in a ledger."""
    base = provenance["base"]["model"]
    return f"""{front_matter(base, "peft", ["unlearning", "lora", "loramox"])}
# Request {name}, memorized

**Do not ship this.** With it {code(base)} forgets nothing: it is on the memorizing side of the reference. `loramox requests build` makes
the forget adapter from this and the other requests in force.
"""
