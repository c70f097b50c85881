"""ship: check, merge or convert a forget adapter for serving."""

import json
import shlex
import sys

from loramox.cli.arguments import plain_parser, run_step, say, settings_of, upload


def ship(words: list[str]) -> None:
    run_step("ship", {"check": _check, "merge": _merge, "gguf": _gguf, "serve-folder": _serve_folder}, words)


def _check(words: list[str]) -> None:
    from loramox.extras.check.check import check, stopped
    from loramox.extras.check.servers import SERVERS
    from loramox.extras.check.show import show_findings

    trust = ". The folder is not trusted: nothing in it is run. Exits with 0 when it loads on every server in --for, with 1 when it does not"
    parser = plain_parser("ship check", trust)
    parser.add_argument("adapter", metavar="ADAPTER", help="Folder of the adapter.")
    parser.add_argument("--base", help="Folder or hub id of its base model. Default: the one it names, if it is here.")
    parser.add_argument(
        "--for", dest="servers", default=",".join(SERVERS), help=f"Servers to check, of {', '.join(SERVERS)}."
    )
    given = parser.parse_args(words)
    servers = [name.strip() for name in given.servers.split(",")]
    findings = check(given.adapter, given.base, servers)
    show_findings(findings, servers)
    if stopped(findings, servers):
        sys.exit(1)


def _merge(words: list[str]) -> None:
    from loramox.adapter.merged_card import what_survived
    from loramox.evaluate.show import show_states
    from loramox.extras.hub import PushConfig
    from loramox.extras.merge.job import ForgettingConfig, merge
    from loramox.extras.merge.merge import MergeConfig

    config, rows, pushing = settings_of("ship merge", words, MergeConfig, ForgettingConfig, PushConfig)
    made = merge(config, rows)
    if "forgetting" in made:
        show_states(made["forgetting"]["states"])
    say(
        f"[bold]{config.out}[/] is the merged model; {what_survived(made)}",
        f"Load it: AutoModelForCausalLM.from_pretrained({config.out!r}). It can no longer be switched off, and is no proof of erasure",
    )
    upload(config.out, pushing)


def _gguf(words: list[str]) -> None:
    from loramox.extras.gguf import GgufConfig, for_ollama, to_gguf
    from loramox.extras.hub import PushConfig

    config, pushing = settings_of("ship gguf", words, GgufConfig, PushConfig)
    model_type, layers = to_gguf(**vars(config))
    out = shlex.quote(config.out)
    say(
        f"[bold]{config.out}[/] is the LoRA GGUF of {layers} layers",
        f"llama.cpp: llama-server -m BASE.gguf --lora {out}",
        r'and in a request: "lora": \[{"id": 0, "scale": 0.5}], where 1 is as shipped and 0 is the base model',
        for_ollama(model_type, config.out),
    )
    upload(config.out, pushing)


def _serve_folder(words: list[str]) -> None:
    from loramox.extras.serve import serve_folder

    parser = plain_parser("ship serve-folder", ": the adapter, and links to the files of its base")
    parser.add_argument("--adapter", required=True, help="Folder of the forget adapter.")
    parser.add_argument("--out", required=True, help="Folder to write; its name is the model's name in requests.")
    parser.add_argument("--base", help="Folder or hub id of the base model, if it has moved since training.")
    parser.add_argument("--overwrite", action="store_true", help="Replace the forget adapter in that folder.")
    given = parser.parse_args(words)
    names = serve_folder(given.adapter, given.out, given.base, given.overwrite)
    body = json.dumps({"model": names["forget"], "prompt": "…", "max_tokens": 20, "temperature": 0}, ensure_ascii=False)
    say(
        f"[bold]{given.out}[/] is laid out. Start the server in the folder you are in: transformers serve",
        f"In requests the model {names['forget']} is the forget model, and {names['base']} is the base:",
        f"curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}",
    )
