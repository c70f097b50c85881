"""Chat templates of real models, each with a small tokenizer that has its special tokens.

The templates are written anew, for chats without tools, after chat_template in the tokenizer_config.json of the models named;
their text is that of the originals, with and without a system message, where these take one. `eos` is the tokenizer's and
`also_ends` are the other ends in generation_config.json.
"""

import copy
from typing import NamedTuple

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast


class Family(NamedTuple):
    template: str
    end: str  # of a turn
    eos: str
    bos: str | None = None
    special: tuple[str, ...] = ()
    plain: tuple[str, ...] = ()  # added tokens that are not special
    strips: tuple[str, ...] = ()  # special tokens that take the white space behind them
    also_ends: tuple[str, ...] = ()


def _chatml(default: str = "", between: str = "\\n", after: str = "\\n", turn: str = "m.content") -> str:
    system = f"{{{{ '<|im_start|>system\\n{default}<|im_end|>\\n' }}}}" if default else ""
    return (
        f"{{% if messages[0].role != 'system' %}}{system}{{% endif %}}{{% for m in messages %}}"
        f"{{{{ '<|im_start|>' + m.role + '{between}' + {turn} + '<|im_end|>{after}' }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant{between}' }}}}{{% endif %}}"
    )


_ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% endfor %}"
)
_GEMMA_TURNS = (
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + "
    "(first if loop.first else '') + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen 3: the last answer has a thinking block, an empty one where neither its content nor its reasoning_content has one.
_QWEN3_TURN = (
    "(m.content if not (m.role == 'assistant' and loop.last) else "
    "'<think>\\n' + (m.reasoning_content.strip('\\n') if m.reasoning_content is string else m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else '') + "
    "'\\n</think>\\n\\n' + m.content.split('</think>')[-1].lstrip('\\n'))"
)

_LLAMA_TURNS = (
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_LLAMA_SPECIAL = ("<|end_of_text|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>")

FAMILIES = {
    # meta-llama/Meta-Llama-3-8B-Instruct
    "llama-3": Family(
        "{{ bos_token }}{% for m in messages %}" + _LLAMA_TURNS,
        end="<|eot_id|>",
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        special=_LLAMA_SPECIAL,
        also_ends=("<|end_of_text|>",),
    ),
    # meta-llama/Llama-3.2-1B-Instruct; 3.1 and 3.3 have the same without a clock
    "llama-3.2": Family(
        "{{ bos_token }}{% set first = messages[0].role == 'system' %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' + "
        "strftime_now('%d %b %Y') + '\\n\\n' + (messages[0].content | trim if first else '') + '<|eot_id|>' }}"
        "{% for m in messages[(1 if first else 0):] %}" + _LLAMA_TURNS,
        end="<|eot_id|>",
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        special=_LLAMA_SPECIAL,
        also_ends=("<|end_of_text|>", "<|eom_id|>"),
    ),
    # Qwen/Qwen2.5-7B-Instruct
    "qwen2.5": Family(
        _chatml("You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        end="<|im_end|>",
        eos="<|im_end|>",
        special=_CHATML,
        also_ends=("<|endoftext|>",),
    ),
    # Qwen/Qwen3-0.6B
    "qwen3": Family(
        _chatml(turn=_QWEN3_TURN),
        end="<|im_end|>",
        eos="<|im_end|>",
        special=_CHATML,
        plain=("<think>", "</think>"),
        also_ends=("<|endoftext|>",),
    ),
    # mistralai/Mistral-7B-Instruct-v0.3
    "mistral": Family(
        "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
        "{% set messages = messages[1:] if system else messages %}"
        + _ALTERNATES
        + "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (system + '\\n\\n' if loop.last and system else '') + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        end="</s>",
        eos="</s>",
        bos="<s>",
        special=("[INST]", "[/INST]"),
    ),
    # microsoft/Phi-3-mini-4k-instruct
    "phi-3": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}",
        end="<|end|>",
        eos="<|endoftext|>",
        bos="<s>",
        strips=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        also_ends=("<|end|>", "<|assistant|>"),
    ),
    # microsoft/Phi-4-mini-instruct
    "phi-4-mini": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
        end="<|end|>",
        eos="<|endoftext|>",
        bos="<|endoftext|>",
        strips=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        also_ends=("<|end|>", "<|endoftext|>"),
    ),
    # microsoft/phi-4
    "phi-4": Family(
        _chatml(between="<|im_sep|>", after=""),
        end="<|im_end|>",
        eos="<|im_end|>",
        bos="<|endoftext|>",
        special=(*_CHATML, "<|im_sep|>"),
        also_ends=("<|endoftext|>",),
    ),
    # google/gemma-2-2b-it
    "gemma-2": Family(
        "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + _ALTERNATES
        + _GEMMA_TURNS,
        end="<end_of_turn>",
        eos="<eos>",
        bos="<bos>",
        special=("<start_of_turn>", "<end_of_turn>"),
        plain=("\n\n", "<table>"),
        also_ends=("<end_of_turn>",),
    ),
    # google/gemma-3-1b-it
    "gemma-3": Family(
        "{{ bos_token }}{% set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}"
        "{% set messages = messages[1:] if first else messages %}" + _ALTERNATES + _GEMMA_TURNS,
        end="<end_of_turn>",
        eos="<eos>",
        bos="<bos>",
        special=("<start_of_turn>", "<end_of_turn>"),
        plain=("\n\n", "<table>"),
        also_ends=("<end_of_turn>",),
    ),
    # HuggingFaceTB/SmolLM2-135M-Instruct
    "smollm2": Family(
        _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        end="<|im_end|>",
        eos="<|im_end|>",
        bos="<|im_start|>",
        special=_CHATML,
    ),
    # The same with the end of sequence that a conversion (from GGUF, say) may leave it with.
    "smollm2, other eos": Family(
        _chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        end="<|im_end|>",
        eos="<|endoftext|>",
        bos="<|im_start|>",
        special=_CHATML,
    ),
    # deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
    "deepseek-r1": Family(
        "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}{% for m in messages %}"
        "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}"
        "{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
        end="<｜end▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        plain=("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"),
    ),
}


def tokenizer_of(name: str, plain: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """`plain` with the special tokens and the chat template of this family, and no others' beside <pad>."""
    family, made = FAMILIES[name], copy.deepcopy(plain)
    special = [token for token in (family.bos, family.eos, *family.special) if token]
    made.add_tokens(
        [AddedToken(t, special=True, normalized=False) for t in dict.fromkeys(special)], special_tokens=True
    )
    made.add_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=True) for t in family.strips], special_tokens=True
    )
    made.add_tokens([AddedToken(t, special=False, normalized=False) for t in family.plain])
    made.eos_token, made.bos_token, made.chat_template = family.eos, family.bos, family.template
    return made
