"""`loramox ship check`: whether an untrusted adapter folder loads, server by server, and the obstacles."""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import PretrainedConfig

from loramox.adapter.folder import CONFIG, PROVENANCE, WEIGHTS
from loramox.adapter.layers import Layers
from loramox.adapter.untrusted import Refused, read_header, read_object, regular_files, shown
from loramox.errors import AdapterError, ModelError, SettingsError
from loramox.extras.check.servers import SERVERS, Adapter, Finding, judge, remedy
from loramox.extras.check.tensors import LOST, by_peft, lora_config, of_types, of_values
from loramox.files import sha256_of
from loramox.model.config import ModelConfig, identify, read_config

TRAINED = ("trained", "memorization")  # kinds of what training writes, the second in loramox 0.1
MOST_TARGETS = 10_000

# Settings that make PEFT import Python code by name.
IMPORTS = ("auto_mapping", "megatron_config")

# Settings whose text PEFT matches as regular expressions, which can be made to take for ever.
PATTERNS = ("rank_pattern", "alpha_pattern", "layers_pattern", "exclude_modules", "modules_to_save")
STARTS = re.compile(r"gaussian|eva|olora|pissa|pissa_niter_\d{1,3}|corda|loftq|orthogonal|lora_ga")
PLAIN = re.compile(r"[\w.-]+")


def check(adapter: str | Path, base: str | None = None, servers: Sequence[str] | None = None) -> list[Finding]:
    """What was found in an adapter folder: findings for 'all' servers, and for each asked one (by default: all) a last 'ok' if it
    loads there.

    Shapes are compared to those of `base`, by default the model that the adapter names, if it is on this machine: by its
    config.json alone. Nothing is run or downloaded, but for the config.json of a hub id given as `base`. What is dangerous to
    read is a 'stop' for all and not read further. Reading takes memory for a few million values and time for the size of the
    files.
    """
    folder, servers = Path(adapter), list(SERVERS) if servers is None else servers
    if not folder.is_dir():
        raise AdapterError(f"{shown(folder)} is no folder. Give an adapter folder, such as DIR/forget-adapter")
    if not (folder / CONFIG).exists() and (folder / "forget-adapter").is_dir():
        raise AdapterError(
            f"{shown(folder)} is the folder of a whole run. Give the adapter in it: {shown(folder / 'forget-adapter')}"
        )
    if unknown := [server for server in servers if server not in SERVERS]:
        raise SettingsError(f"--for {', '.join(unknown)} is not among {', '.join(SERVERS)}")
    files, refused = regular_files(folder)
    findings = [_stop(error) for error in refused]
    config, provenance = (_read(files, name, findings) for name in (CONFIG, PROVENANCE))
    if provenance is not None and provenance.get("kind") in TRAINED:
        return [_trained(folder)]
    tensors = _read(files, WEIGHTS, findings)
    findings += _files(files, config, tensors, refused)
    if config is not None:
        findings += list(_config(config)) or _peft(config)
    if config is None or tensors is None or _stops(findings):
        return [f for f in findings if f.server in ("all", *servers)]
    named, here, model_config, doubts = _base(config, base)
    model_type = getattr(model_config, "model_type", None)
    read = Adapter(str(folder), config, tensors, provenance or {}, named, model_type)
    findings += [*doubts, *of_types(read), *_origin(read)]
    if model_config is not None and here is not None:
        findings += _same_base(read, here, model_config)
    if not _stops(findings):
        findings += by_peft(read, model_config)
    if not _stops(findings):  # else shapes, and so sizes, may be any
        findings += [*of_values(read, files[WEIGHTS]), *_changed(read, files[WEIGHTS])]
    findings = [f for f in [*findings, *judge(read)] if f.server in ("all", *servers)]
    bad = stopped(findings, servers)
    return findings + [Finding(name, "ok", "loads", SERVERS[name](read)) for name in servers if name not in bad]


def _stops(findings: list[Finding]) -> bool:
    return any(f.server == "all" and f.verdict == "stop" for f in findings)


def stopped(findings: Sequence[Finding], servers: Sequence[str]) -> list[str]:
    by = {f.server for f in findings if f.verdict == "stop"}
    return [server for server in servers if {server, "all"} & by]


def _stop(error: Refused) -> Finding:
    return Finding("all", "stop", f"refused: {error.what}", error.remedy)


def _read(files: dict[str, Path], name: str, findings: list[Finding]) -> Any:
    """The JSON object or the tensors' header in a file; None when it is not there, or refused."""
    try:
        reader = read_header if name == WEIGHTS else read_object
        return reader(files[name]) if name in files else None
    except Refused as error:
        findings.append(_stop(error))
        return None


def _trained(folder: Path) -> Finding:
    what = "refused: it is the adapter as it was trained, ΔW, and not the forget adapter, which is made from it"
    source = folder.parent if folder.name == "momentum" else folder
    return Finding("all", "stop", what, f"loramox extrapolate {shlex.quote(str(source))} --out NEW_FOLDER")


def _files(files: dict[str, Path], config: Any, tensors: Any, refused: list[Refused]) -> Iterator[Finding]:
    """What is missing, and what should not be there."""
    for name, content in ((CONFIG, config), (WEIGHTS, tensors)):
        if content is None and name not in files and not any(r.what.startswith(name) for r in refused):
            yield Finding("all", "stop", f"there is no {name}", LOST)
    if "config.json" in files:
        what = "there is a config.json, so that AutoModelForCausalLM takes the folder for a whole model and fails"
        yield Finding("peft", "note", what, "Delete config.json")


def _config(config: dict[str, Any]) -> Iterator[Finding]:
    """What in adapter_config.json no server takes, or is dangerous."""

    def refuse(what: str, do: str = LOST) -> Finding:
        return Finding("all", "stop", f"refused: {what}", do)

    if config.get("peft_type") != "LORA":
        yield refuse(f"peft_type is {shown(config.get('peft_type'))}, not LORA")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        yield refuse(f"task_type is {shown(config['task_type'])}, not CAUSAL_LM")
    for name in IMPORTS:
        if config.get(name):
            yield refuse(f"{name} names Python code to import", f"Take {name} out of {CONFIG}")
    name, start = config.get("base_model_name_or_path"), config.get("init_lora_weights", True)
    if name is not None and not (isinstance(name, str) and len(name) < 1000 and "\0" not in name):
        yield refuse(f"base_model_name_or_path is {shown(name)}, not a name")
    if config.get("revision") is not None and not isinstance(config["revision"], str):
        yield refuse(f"revision is {shown(config['revision'])}, not a name")
    if not (isinstance(start, bool) or (isinstance(start, str) and STARTS.fullmatch(start))):
        yield refuse(f"init_lora_weights is {shown(start)}, which PEFT does not know")
    targets = config.get("target_modules")
    if isinstance(targets, str):
        what = f"target_modules is the pattern {shown(targets)}: a stranger's pattern can take for ever to match"
        yield refuse(what, f"Write the adapted layers' names into {CONFIG} as a list")
    elif isinstance(targets, list) and len(targets) > MOST_TARGETS:
        yield refuse(f"target_modules has {len(targets):,} names, more than any model has layers")
    if config.get("layer_replication"):  # its ranges can ask for layers without end
        yield refuse("layer_replication makes another model of the base")
    for setting in PATTERNS:
        if odd := [text for text in _texts(config.get(setting)) if not PLAIN.fullmatch(text)]:
            yield refuse(f"{setting} has the pattern {shown(odd[0])}, which can take for ever to match")
    if tricks := [text for text in _texts({**config, "base_model_name_or_path": None}) if _leads_away(text)]:
        yield refuse(f"{CONFIG} has the path {shown(tricks[0])}", f"Take it out of {CONFIG}")
    if isinstance(name, str) and ".." in re.split(r"[/\\]", name):
        yield refuse(
            f"base_model_name_or_path is {shown(name)}, which climbs out of its folder", "Name the base itself"
        )


def _peft(config: dict[str, Any]) -> Iterator[Finding]:
    """What PEFT's own config class says of the settings; it checks them, and does nothing else."""
    try:
        Layers(lora_config(config), Path())
    except Exception as error:  # whatever comes of values of wrong types
        yield Finding("all", "stop", f"PEFT refuses {CONFIG}: {shown(error)}", LOST)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from _texts(part)


def _leads_away(text: str) -> bool:
    return text.startswith(("/", "~", "\\", "file:")) or ".." in re.split(r"[/\\]", text) or text[1:3] in (":\\", ":/")


def _base(
    config: dict[str, Any], given: str | None
) -> tuple[str | None, ModelConfig | None, PretrainedConfig | None, list[Finding]]:
    """The base's name, where it was read, its config, and doubts about them.

    One that the adapter alone names is read only if it is on this machine, from its folder or from the hub's cache.
    """
    named = config.get("base_model_name_or_path")
    doubts = []
    if not named:
        do = "Write it into adapter_config.json, or give --base to whatever asks for it"
        doubts.append(Finding("all", "note", "the adapter does not name its base model", do))
    elif _leads_away(named):
        what = f"the adapter names its base by a path that only one machine has: {shown(named)}"
        doubts.append(Finding("all", "note", what, "loramox extrapolate DIR/trained --base HUB_ID --out NEW_FOLDER"))
    elif not config.get("revision") and not Path(named).is_dir():
        what = f"the adapter names {shown(named)} without a revision, and the hub's may change"
        doubts.append(Finding("all", "note", what, "Train with --revision COMMIT"))
    if given is not None:
        read = ModelConfig(given, config.get("revision") if given == named else None)
        try:
            return given, read, _bounded(read), doubts
        except Refused as error:
            raise ModelError(str(error)) from error
    here = _on_this_machine(named, config.get("revision")) if named else None
    why = "the base model is not on this machine"
    if here is not None:
        try:
            return named, ModelConfig(here), _bounded(ModelConfig(here)), doubts
        except (ModelError, Refused) as error:
            why = f"the base model has no config that can be used: {shown(error, 300)}"
    do = "Give the base: loramox ship check ADAPTER --base FOLDER_OR_HUB_ID"
    return named, None, None, [*doubts, Finding("all", "note", f"shapes are not compared, as {why}", do)]


def _on_this_machine(name: str, revision: str | None) -> str | None:
    if (Path(name) / "config.json").is_file():
        return name
    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return str(Path(found).parent) if isinstance(found, str) else None


def _bounded(base: ModelConfig) -> PretrainedConfig:
    """The config of a base model, of which a skeleton can be built in bounded time, and without running what it names.

    `read_config` refuses one of too many layers.
    """
    if (Path(base.model) / "config.json").is_file():
        read_object(Path(base.model) / "config.json")
    config = read_config(base, flag="--base")
    config._attn_implementation = "eager"  # a config may name one on the hub, that is Python code
    return config


def _same_base(read: Adapter, base: ModelConfig, config: PretrainedConfig) -> Iterator[Finding]:
    """Provenance names a sample of the weights that the adapter was made on."""
    made_for, here = read.provenance.get("base"), identify(base, config)
    for part in ("shape", "weights") if isinstance(made_for, dict) else ():
        if None not in (made_for.get(part), here[part]) and made_for[part] != here[part]:
            what = f"provenance.json says that it was made on a base with other {part} than {shown(read.base)} has"
            yield Finding(
                "all", "stop", what, "A forget adapter works on its own base alone: give that one, or train again"
            )
            return


def _origin(read: Adapter) -> Iterator[Finding]:
    """What provenance.json says that the rest of the folder does not."""
    kind, rank = read.provenance.get("kind"), read.provenance.get("rank")
    if not read.provenance:
        what = "there is no provenance.json, so whether the base has the right weights cannot be told"
        yield Finding("all", "note", what, "Adapters that loramox ships have one")
    elif kind == "forget" and rank != read.rank:
        what = f"provenance.json says rank {shown(rank)}, adapter_config.json {read.rank}: one was changed afterwards"
        yield Finding("all", "note", what, remedy(read, ""))


def _changed(read: Adapter, weights: Path) -> Iterator[Finding]:
    known = read.provenance.get("sha256")
    if isinstance(known, str) and known != sha256_of(weights):
        what = f"{WEIGHTS} is not the file that provenance.json was written for: it was changed or damaged afterwards"
        yield Finding("all", "stop", what, remedy(read, ""))
