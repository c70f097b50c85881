"""ship: bring a forget adapter to those who serve it."""

import argparse
import shlex
import sys

from loramox.cli.arguments import VERBS, parse, say, settings_of


def ship(words: list[str]) -> None:
    steps = {"check": _check, "merge": _merge, "gguf": _gguf}
    parser = argparse.ArgumentParser(prog="loramox ship", description=VERBS["ship"])
    parser.add_argument("step", choices=steps, metavar="STEP", help=", ".join(steps))
    steps[parser.parse_args(words[:1]).step](words[1:])


def _check(words: list[str]) -> None:
    from loramox.ship.check import check, stopped
    from loramox.ship.servers import SERVERS
    from loramox.ship.show import show_findings

    parser = argparse.ArgumentParser(
        prog="loramox ship check",
        description="Read an adapter folder as a stranger would, and say for each server whether it loads there. "
        "Exits with 0 when it loads on all that are asked, with 1 when one is stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="Folder of the adapter.")
    parser.add_argument("--base", help="Folder or hub id of its base model. Default: the one it names, if it is here.")
    parser.add_argument(
        "--for", dest="servers", default=",".join(SERVERS), help=f"Servers to ask, of {', '.join(SERVERS)}."
    )
    given = parser.parse_args(words)
    servers = [name.strip() for name in given.servers.split(",")]
    findings = check(given.adapter, given.base, servers)
    show_findings(findings, servers)
    if stopped(findings, servers):
        sys.exit(1)


def _merge(words: list[str]) -> None:
    from loramox.ship.merge import MergeConfig, merge

    (config,) = settings_of("ship merge", words, MergeConfig)
    made = merge(**vars(config))
    say(
        f"[bold]{config.out}[/] is the merged model; {made['survived']['overall']:.1%} of ΔW survived the rounding",
        f"Load it: AutoModelForCausalLM.from_pretrained({config.out!r}). It has no switch any more, and is no proof of erasure",
    )


def _gguf(words: list[str]) -> None:
    from transformers import HfArgumentParser

    from loramox.ship.gguf import GgufConfig, modelfile, to_gguf

    parser = HfArgumentParser(
        GgufConfig,
        prog="loramox ship gguf",
        description="Write an adapter as a LoRA GGUF, which llama.cpp and Ollama load beside the GGUF of its base model.",
        usage="loramox ship gguf --adapter A --out FILE.gguf [--setting value …]",
        allow_abbrev=False,
    )
    (config,) = parse(parser, words)
    layers = to_gguf(**vars(config))
    out = shlex.quote(config.out)
    say(
        f"[bold]{config.out}[/] is the LoRA GGUF of {layers} layers",
        f"llama.cpp: llama-server -m BASE.gguf --lora {out}",
        r'and in a request: "lora": \[{"id": 0, "scale": 0.5}], where 1 is as shipped, and 0 the base model',
        "Ollama, in a Modelfile, then ollama create forget:",
        *(f"    {line}" for line in modelfile(config.out).splitlines()),
    )
