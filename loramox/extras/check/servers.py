"""The limits of each server, one rule per entry, from the servers' own sources.

Sources: PEFT 0.21.2; vLLM's `lora/peft_helper.py` (at commit 02143692), SGLang's `srt/lora/lora_config.py` (0ceb81fe)
and, for the names in requests, its `srt/entrypoints/openai/serving_base.py`,
llama.cpp's `convert_lora_to_gguf.py` (0b03adaa), Ollama's `convert/convert.go` (01cf7445). The tests run PEFT, and
`make test-llamacpp` compares llama.cpp's results with PEFT's.
"""

import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from loramox.adapter.folder import SERVED_RANKS, served_rank
from loramox.adapter.streaming.shards import Entry
from loramox.adapter.untrusted import shown

OTHERS = ("all but peft",)  # PEFT wrote the format, and takes all of it
VLLM_RANK = 16  # vLLM's default --max-lora-rank

QUANTIZED_NAME = re.compile(r"[48]-?bit\b|int[48]\b|\bnf4\b|gptq|awq|gguf|exl2|\bfp8\b", re.IGNORECASE)

# Model types whose adapters a server is known to load. For llama.cpp and Ollama these are all that `ship gguf` converts.
TYPES = {
    "vllm": ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    "sglang": ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3"),
    "llama.cpp": ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3"),
    "ollama": ("llama", "mistral", "qwen2", "gemma2", "phi3"),
}

TWO_AT_ONCE = ("peft", "llama.cpp")  # servers that put two adapters on one request

# Ollama runs these in an engine of its own, which refuses adapters when the model is loaded: 'loras are not yet implemented'
# (fs/ggml/ggml.go, OllamaEngineRequired, at c664d9c1; runner/ollamarunner/runner.go).
OLLAMAS_OWN = ("qwen3",)


class Finding(NamedTuple):
    """One thing that was found: for one server or for 'all'; 'ok', 'stop' or 'note'; what it is, and what to do."""

    server: str
    verdict: str
    what: str
    remedy: str


class Adapter(NamedTuple):
    """An adapter folder as it was read: `model_type` and `base` are those of the base model, where it could be read."""

    folder: str
    config: dict[str, Any]
    tensors: dict[str, Entry]
    provenance: dict[str, Any]
    base: str | None
    model_type: str | None

    @property
    def rank(self) -> Any:
        return self.config.get("r", 8)  # PEFT's defaults, here and below

    @property
    def alpha(self) -> Any:
        return self.config.get("lora_alpha", 8)


# The servers in the order in which they are reported, each with a function that returns the command by which it loads an adapter.
SERVERS: dict[str, Callable[[Adapter], str]] = {}


def server(name: str) -> Callable[[Callable[[Adapter], str]], Callable[[Adapter], str]]:
    """Register the decorated function as the server NAME of `ship check --for`."""

    def register(loading: Callable[[Adapter], str]) -> Callable[[Adapter], str]:
        SERVERS[name] = loading
        return loading

    return register


class Rule(NamedTuple):
    """Where it holds, what it says of an adapter (None: nothing), and flags of `extrapolate` that fix it (None: retrain)."""

    servers: tuple[str, ...]
    verdict: str
    says: Callable[[Adapter], str | None]
    flags: str | None = ""


def set_to(name: str, reason: str, *harmless: Any) -> Callable[[Adapter], str | None]:
    """Says that a setting of adapter_config.json is none of its `harmless` values, and the reason why that matters."""

    def says(adapter: Adapter) -> str | None:
        value = adapter.config.get(name)
        empty = value in (None, False, [], {}) or any(value is each or value == each for each in harmless)
        return None if empty else f"{name} is {shown(value, 40)}: {reason}"

    return says


def has(pattern: str, what: str) -> Callable[[Adapter], str | None]:
    """Says that there are tensors whose names match."""
    sought = re.compile(pattern)

    def says(adapter: Adapter) -> str | None:
        found = [key for key in adapter.tensors if sought.search(key)]
        return f"{len(found)} tensors such as {shown(found[0])} are {what}" if found else None

    return says


def rank_for_vllm(adapter: Adapter) -> str | None:
    if adapter.rank > SERVED_RANKS[-1] or (adapter.rank in SERVED_RANKS and adapter.rank <= VLLM_RANK):
        return None
    ceiling = max(VLLM_RANK, served_rank(adapter.rank))
    if adapter.rank == ceiling:
        return f"rank {adapter.rank} is above vLLM's default limit of {VLLM_RANK}; its flag --max-lora-rank {ceiling} raises it"
    flag = f", under its flag --max-lora-rank {ceiling}" if ceiling > VLLM_RANK else ""
    return f"rank {adapter.rank} is none of vLLM's; it loads padded to {ceiling}{flag}"


def rank_too_high(adapter: Adapter) -> str | None:
    return f"rank {adapter.rank} is above {SERVED_RANKS[-1]}" if adapter.rank > SERVED_RANKS[-1] else None


def scale(adapter: Adapter) -> str | None:
    if adapter.alpha == adapter.rank:
        return None
    return f"lora_alpha is {adapter.alpha} at rank {adapter.rank}: a scale of {adapter.alpha / adapter.rank:.3g}, not 1"


def alpha_zero(adapter: Adapter) -> str | None:
    return "lora_alpha is 0, which llama.cpp reads as a scale of 1" if adapter.alpha == 0 else None


def quantized_base(adapter: Adapter) -> str | None:
    name = adapter.config.get("base_model_name_or_path") or ""
    if not QUANTIZED_NAME.search(Path(name).name):
        return None
    return f"base_model_name_or_path is {shown(name)}, a quantized model: servers load the 16-bit one that it was made from"


def unknown_type(server: str) -> Callable[[Adapter], str | None]:
    def says(adapter: Adapter) -> str | None:
        if adapter.model_type in (None, *TYPES[server]):
            return None
        kind, known = shown(adapter.model_type), ", ".join(TYPES[server])
        if server == "ollama" and adapter.model_type in OLLAMAS_OWN:
            return f"it takes no adapters on {kind} models"
        if server in ("llama.cpp", "ollama"):
            return f"{kind} models are not converted by loramox ship gguf, only {known}"
        return f"it is not known to load adapters on {kind} models, only on {known}"

    return says


HEAD = r"(?:^|\.)(?:lm_head|embed_out|embed_tokens|embed_in|wte|lora_embedding_[AB])(?:\.|$)"

RULES = [
    # What only PEFT takes. `extrapolate` writes adapters without the first four; the others need another training.
    Rule(OTHERS, "stop", set_to("bias", "trained biases are left out", "none")),
    Rule(OTHERS, "stop", set_to("lora_bias", "trained biases are left out")),
    Rule(OTHERS, "stop", set_to("rank_pattern", "one rank for all layers is expected")),
    Rule(OTHERS, "stop", set_to("alpha_pattern", "one scale for all layers is expected")),
    Rule(OTHERS, "stop", set_to("use_dora", "ΔW is not B·A"), None),
    Rule(OTHERS, "stop", set_to("use_bdlora", "ΔW is not B·A"), None),
    Rule(OTHERS, "stop", set_to("use_qalora", "ΔW is not B·A"), None),
    Rule(OTHERS, "stop", set_to("kasa_config", "ΔW is not B·A"), None),
    Rule(OTHERS, "stop", set_to("modules_to_save", "whole layers are left out or refused"), None),
    Rule(OTHERS, "stop", set_to("trainable_token_indices", "trained embeddings are left out"), None),
    Rule(OTHERS, "stop", set_to("target_parameters", "only layers are adapted"), None),
    Rule(
        OTHERS, "stop", set_to("init_lora_weights", "the base's weights change in PEFT alone", True, "gaussian"), None
    ),
    Rule(OTHERS, "stop", set_to("alora_invocation_tokens", "it is in force from the first token"), None),
    # What depends on the server.
    Rule(("sglang", "llama.cpp", "ollama"), "stop", set_to("use_rslora", "it is ignored, so the scale is wrong")),
    Rule(OTHERS, "stop", has(HEAD, "of embeddings or the output head, which only PEFT loads everywhere"), None),
    Rule(("vllm",), "stop", rank_too_high, "--rank 512"),
    Rule(("vllm",), "note", rank_for_vllm, "--rank 16"),
    Rule(("all",), "note", scale),
    Rule(("llama.cpp", "ollama"), "stop", alpha_zero),
    Rule(OTHERS, "stop", quantized_base, "--base MODEL_OF_16_BITS"),
    Rule(("peft",), "note", quantized_base, "--base MODEL_OF_16_BITS"),
    *(Rule((name,), "note", unknown_type(name), None) for name in ("vllm", "sglang")),
]


def judge(adapter: Adapter) -> Iterator[Finding]:
    """What every server's rules say of an adapter whose files are sound."""
    for rule in RULES:
        if said := rule.says(adapter):
            servers = [name for name in SERVERS if name != "peft"] if rule.servers == OTHERS else rule.servers
            for name in servers:
                yield Finding(name, rule.verdict, said, remedy(adapter, rule.flags))
    for name in ("llama.cpp", "ollama"):
        if said := unknown_type(name)(adapter):
            merging = f"Merge it, and convert the merged model: loramox ship merge --adapter {shlex.quote(adapter.folder)} --out MERGED"
            other = "Try llama.cpp's own convert_lora_to_gguf.py, or serve it with PEFT"
            yield Finding(name, "stop", said, merging if adapter.model_type in OLLAMAS_OWN else other)
    if "tuned_adapter" in adapter.provenance and not adapter.provenance.get("combined"):
        said = "it was trained beside another adapter, and does nothing useful without it"
        for name in SERVERS:
            verdict = "note" if name in TWO_AT_ONCE else "stop"
            yield Finding(name, verdict, said, "Give the folder combined-adapter of the run, which holds both")


def remedy(adapter: Adapter, flags: str | None) -> str:
    """The command that makes the adapter again with other flags; for a variant that no flag takes away, the way round."""
    if flags is None:
        return "Serve it in PEFT, or merge it there into the 16-bit base (merge_and_unload) and serve the result"
    if "requests" in adapter.provenance:
        return " ".join(word for word in ("loramox requests build LEDGER", flags, "--out NEW_FOLDER") if word)
    settings, base = (_object(adapter.provenance.get(name)) for name in ("settings", "base"))
    source, checkpoint = settings.get("output_dir"), adapter.provenance.get("checkpoint")
    source = source if isinstance(source, str) else "DIR/trained"
    alpha = adapter.provenance.get("alpha", adapter.provenance.get("strength"))  # its name in loramox 0.1
    factors = {"alpha": alpha, "scale": adapter.provenance.get("scale")}
    trained_on, made_for = settings.get("model"), base.get("model")
    moved = isinstance(made_for, str) and isinstance(trained_on, str) and made_for != trained_on
    words = [
        "loramox extrapolate",
        _quoted(f"{source}/{checkpoint}" if isinstance(checkpoint, str) else source),
        *(f"--{name} {each:g}" for name, each in factors.items() if type(each) in (int, float) and 0 < each < 1e9),
        f"--base {_quoted(made_for)}" if moved and "--base" not in flags else "",
        flags,
        "--out NEW_FOLDER",
    ]
    return " ".join(word for word in words if word)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _quoted(name: str) -> str:
    return shlex.quote(shown(name, 4096))


def _base(adapter: Adapter) -> str:
    return adapter.base or adapter.config.get("base_model_name_or_path") or "BASE"


def _served(adapter: Adapter) -> str:
    """The base for a server's command line; one on the hub at the revision that the adapter was made for."""
    base, revision = _base(adapter), adapter.config.get("revision")
    # Not Path.is_dir, which raises for a stranger's long name.
    of_hub = base == adapter.config.get("base_model_name_or_path") and not os.path.isdir(base)
    return f"{_quoted(base)} --revision {_quoted(revision)}" if revision and of_hub else _quoted(base)


def converting(adapter: Adapter) -> str:
    base = f" --base {_quoted(adapter.base)}" if adapter.base else ""
    return f"loramox ship gguf --adapter {shlex.quote(adapter.folder)}{base} --out forget.gguf"


@server("peft")
def peft(adapter: Adapter) -> str:
    return f"PeftModel.from_pretrained(model, {adapter.folder!r})"


@server("vllm")
def vllm(adapter: Adapter) -> str:
    high = f" --max-lora-rank {served_rank(adapter.rank)}" if VLLM_RANK < adapter.rank <= SERVED_RANKS[-1] else ""
    return f"vllm serve {_served(adapter)} --enable-lora{high} --lora-modules forget={shlex.quote(adapter.folder)}"


@server("sglang")
def sglang(adapter: Adapter) -> str:
    folder, name = shlex.quote(adapter.folder), shown(_base(adapter), 4096)
    return (
        f"python -m sglang.launch_server --model-path {_served(adapter)} --enable-lora --lora-paths forget={folder}  "
        f'# then "model": "{name}:forget"; a name without a colon is answered by the base, which has not forgotten'
    )


@server("llama.cpp")
def llama_cpp(adapter: Adapter) -> str:
    return f"{converting(adapter)}; then llama-server -m BASE.gguf --lora forget.gguf"


@server("ollama")
def ollama(adapter: Adapter) -> str:
    """By a LoRA GGUF: of a folder, Ollama's converter (convert_llama_adapter.go) reorders A of Q and K as if it were B."""
    return f"{converting(adapter)}; in the Modelfile: FROM ./base.gguf and ADAPTER ./forget.gguf; then ollama create forget"
