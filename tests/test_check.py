"""`ship check`: what it says loads does load, what it stops does not, and no folder harms who asks about it."""

import json
import os
import pickle
import shlex
import shutil
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from signing import sign
from torch import Tensor
from transformers import AutoModelForCausalLM

from loramox.adapter.export import ShippingConfig, extrapolate
from loramox.cli import main
from loramox.errors import AdapterError, ModelError, SettingsError
from loramox.extras.check.check import check, stopped
from loramox.extras.check.servers import SERVERS, Adapter, Finding, judge

CONFIG, WEIGHTS, PROVENANCE = "adapter_config.json", "adapter_model.safetensors", "provenance.json"
OTHERS = list(SERVERS)[1:]
ALL = list(SERVERS)
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"

Damage = Callable[[Path], Any]


@pytest.fixture
def adapter(trained: Path, tmp_path: Path) -> Path:
    """A shipped adapter of rank 8, to be damaged."""
    return shutil.copytree(trained / "forget-adapter", tmp_path / "adapter")


def config(file: str = CONFIG, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    return lambda folder: (unsigned(change)(folder), sign(folder))


def unsigned(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = load_file(folder / WEIGHTS)
        changed = change(content)
        save_file(changed if isinstance(changed, dict) else content, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def at_rank(rank: int) -> Damage:
    """Padded with zeros, or cut, to a rank."""

    def change(content: dict[str, Tensor]) -> None:
        for key, tensor in content.items():
            fitted = torch.zeros((rank, tensor.shape[1]) if "lora_A" in key else (tensor.shape[0], rank))
            both = tuple(slice(min(a, b)) for a, b in zip(fitted.shape, tensor.shape, strict=True))
            fitted[both] = tensor[both]
            content[key] = fitted

    return both(tensors(change), config(r=rank, lora_alpha=rank), config(PROVENANCE, rank=rank))


def renamed(old: str, new: str) -> Damage:
    return tensors(lambda content: {key.replace(old, new): tensor for key, tensor in content.items()})


def loads_in_peft(folder: Path, base: Path) -> bool:
    """Whether PEFT takes the folder, finds every weight that it looks for, leaves out none that is there, and all is finite."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
        there = load_file(folder / WEIGHTS)
        with torch.no_grad():
            finite = bool(model(input_ids=torch.arange(2, 14)[None]).logits.isfinite().all())
    except Exception:
        return False
    same = there.keys() <= loaded.keys() and all(torch.equal(t.float(), loaded[k].float()) for k, t in there.items())
    return same and finite and not any("missing adapter keys" in str(w.message) for w in caught)


def said(findings: list[Finding], verdict: str) -> str:
    return "\n".join(f"{f.server}: {f.what} | {f.remedy}" for f in findings if f.verdict == verdict)


def test_what_loramox_ships_loads_everywhere(trained: Path, pico: Callable[[str], Path]) -> None:
    folder = trained / "forget-adapter"
    for base in (None, str(pico("llama"))):
        findings = check(folder, base)
        assert not stopped(findings, SERVERS)
        assert [f.server for f in findings if f.verdict == "ok"] == list(SERVERS)
    assert loads_in_peft(folder, pico("llama"))


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gpt_neox"])
def test_layers_of_every_make_are_found_in_the_base(kind: str, pico: Callable[[str], Path], tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(pico(kind))
    made = LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, made)
    adapted.peft_config["default"].init_lora_weights = True
    adapted.save_pretrained(tmp_path)
    findings = check(tmp_path, str(pico(kind)), ["peft", "vllm"])
    assert not stopped(findings, ["peft", "vllm"]), findings
    assert loads_in_peft(tmp_path, pico(kind))
    shutil.copytree(tmp_path, tmp_path / "other", ignore=shutil.ignore_patterns("other"))
    other = check(tmp_path / "other", str(pico("llama" if kind == "gpt2" else "gpt2")), ["peft"])
    assert stopped(other, ["peft"]) == ["peft"]


# name: (damage, the servers that it stops, a word of what is said, how: "peft" when PEFT is right to take or not to take
# it, "refused" when it is dangerous or useless though PEFT would take it)
RULES: dict[str, tuple[Damage, list[str], str, str]] = {
    "no config": (lambda f: (f / CONFIG).unlink(), ALL, "there is no adapter_config.json", "peft"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ALL, "there is no adapter_model.safetensors", "peft"),
    "another method": (config(peft_type="LOHA"), ALL, "peft_type is LOHA", "peft"),
    "no method": (config(peft_type=...), ALL, "peft_type is None", "peft"),
    "another rank": (config(r=16), ALL, "is [8, 128], and it expects [16, 128]", "peft"),
    "a layer too many": (renamed("layers.1.", "layers.7."), ALL, "it leaves out 14 tensors such as", "peft"),
    "another prefix": (renamed("base_model.model.", ""), ALL, "it leaves out 28 tensors such as model", "peft"),
    "adapter's name in keys": (renamed(".weight", ".default.weight"), ALL, "it leaves out 28 tensors such as", "peft"),
    "half a layer": (
        tensors(lambda c: c.pop(f"{LAYER}.lora_B.weight")),
        ALL,
        "1 tensors that it looks for are not there",
        "peft",
    ),
    "not targeted": (config(target_modules=["v_proj"]), ALL, "tensors such as", "peft"),
    "targeted, not there": (
        tensors(lambda c: {k: t for k, t in c.items() if "layers.1.mlp.up_proj" not in k}),
        ALL,
        "tensors that it looks for are not there",
        "peft",
    ),
    "another width": (
        tensors(lambda c: c.update({f"{LAYER}.lora_A.weight": torch.ones(8, 65)})),
        ALL,
        "is [8, 65], and it expects [8, 64]",
        "peft",
    ),
    "no matrix": (
        tensors(lambda c: c.update({f"{LAYER}.lora_A.weight": torch.ones(8)})),
        ALL,
        "is [8], and it expects [8, 64]",
        "peft",
    ),
    "NaN": (tensors(lambda c: c[f"{LAYER}.lora_B.weight"].fill_(torch.nan)), ALL, "NaN or infinity", "peft"),
    "infinity": (
        tensors(lambda c: c[f"{LAYER}.lora_A.weight"][3:4, 60:].fill_(torch.inf)),
        ALL,
        "NaN or infinity",
        "refused",
    ),
    "integers": (
        tensors(lambda c: c.update({f"{LAYER}.lora_A.weight": torch.ones(8, 64, dtype=torch.int8)})),
        ALL,
        "of type I8",
        "refused",
    ),
    "of a classifier": (config(task_type="SEQ_CLS"), ALL, "task_type is SEQ_CLS", "refused"),
    "imports code": (config(auto_mapping={"parent_library": "antigravity"}), ALL, "Python code to import", "refused"),
    "imports more code": (config(megatron_config={"a": 1}), ALL, "Python code to import", "refused"),
    "no dropout": (config(lora_dropout=7), ALL, "dropout probability has to be between 0 and 1", "peft"),
    "an unknown start": (config(init_lora_weights="magic"), ALL, "init_lora_weights is magic", "peft"),
    "a setting that needs another": (config(layers_pattern="x"), ALL, "PEFT refuses adapter_config.json", "peft"),
    "a pattern": (config(target_modules=r".*(q|v)_proj"), ALL, "is the pattern", "refused"),
    "another pattern": (config(exclude_modules="(a+)+$"), ALL, "exclude_modules has the pattern", "refused"),
    "a path": (config(corda_config={"cache_file": "/etc/x"}), ALL, "has the path /etc/x", "refused"),
    "a path up": (config(loftq_config={"x": "a/../../b"}), ALL, "has the path a/../../b", "refused"),
    "a base further up": (config(base_model_name_or_path="../../x"), ALL, "climbs out of its folder", "refused"),
    "other weights": (
        lambda f: config(PROVENANCE, base=json.loads((f / PROVENANCE).read_text())["base"] | {"weights": "0" * 64})(f),
        ALL,
        "a base with other weights",
        "refused",
    ),
    "changed weights": (
        unsigned(lambda c: {k: 2 * t for k, t in c.items()}),
        ALL,
        "is not the file that provenance.json was written for",
        "refused",
    ),
    "as trained": (config(PROVENANCE, kind="trained"), ALL, "it is the adapter as it was trained", "refused"),
    "as 0.1 trained": (config(PROVENANCE, kind="memorization"), ALL, "it is the adapter as it was trained", "refused"),
    "bias": (config(bias="lora_only"), OTHERS, "bias is lora_only", "peft"),
    "DoRA": (
        both(
            config(use_dora=True),
            tensors(
                lambda c: c.update(
                    {
                        k.replace("lora_B.weight", "lora_magnitude_vector"): torch.ones(t.shape[0])
                        for k, t in [*c.items()]
                        if "lora_B" in k
                    }
                )
            ),
        ),
        OTHERS,
        "use_dora is True",
        "peft",
    ),
    "rsLoRA": (config(use_rslora=True), ["sglang", "llama.cpp", "ollama"], "use_rslora is True", "peft"),
    "alpha_pattern": (config(alpha_pattern={"q_proj": 4}), OTHERS, "one scale for all layers", "peft"),
    "rank_pattern": (
        both(
            config(rank_pattern={"layers.0.self_attn.q_proj": 2}),
            tensors(
                lambda c: c.update(
                    {
                        f"{LAYER}.lora_A.weight": c[f"{LAYER}.lora_A.weight"][:2].clone(),
                        f"{LAYER}.lora_B.weight": c[f"{LAYER}.lora_B.weight"][:, :2].clone(),
                    }
                )
            ),
        ),
        OTHERS,
        "one rank for all layers",
        "peft",
    ),
    "the head": (
        both(
            tensors(
                lambda c: c.update(
                    {
                        "base_model.model.lm_head.lora_A.weight": torch.ones(8, 64),
                        "base_model.model.lm_head.lora_B.weight": torch.ones(320, 8),
                    }
                )
            ),
            lambda f: config(target_modules=[*json.loads((f / CONFIG).read_text())["target_modules"], "lm_head"])(f),
        ),
        OTHERS,
        "embeddings or the output head",
        "peft",
    ),
    "a saved layer": (
        both(
            config(modules_to_save=["lm_head"]),
            tensors(lambda c: c.update({"base_model.model.lm_head.weight": torch.ones(320, 64)})),
        ),
        OTHERS,
        "modules_to_save",
        "peft",
    ),
    "a saved layer that is not there": (
        config(modules_to_save=["lm_head"]),
        ALL,
        "tensors that it looks for are not there",
        "peft",
    ),
    "rank 520": (at_rank(520), ["vllm"], "rank 520 is above 512", "peft"),
    "alpha 0": (config(lora_alpha=0), ["llama.cpp", "ollama"], "lora_alpha is 0", "peft"),
    "beside another": (
        config(PROVENANCE, tuned_adapter={"path": "mine"}),
        ["vllm", "sglang", "ollama"],
        "does nothing useful without it",
        "peft",
    ),
    "quantized base": (config(base_model_name_or_path="unsloth/llama-3-8b-bnb-4bit"), OTHERS, "a quantized", "peft"),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_stops_the_servers_that_it_is_about_and_peft_agrees(
    name: str, adapter: Path, pico: Callable[[str], Path]
) -> None:
    damage, expected, what, how = RULES[name]
    damage(adapter)
    findings = check(adapter, str(pico("llama")))
    assert stopped(findings, SERVERS) == expected, findings
    assert what in said(findings, "stop")
    assert all(f.remedy for f in findings)
    if how == "peft":
        assert loads_in_peft(adapter, pico("llama")) == ("peft" not in expected)
    for server in SERVERS:
        assert stopped(check(adapter, str(pico("llama")), [server]), [server]) == [server] * (server in expected)


NOTES: dict[str, tuple[Damage, str]] = {
    "rank 32": (at_rank(32), "its flag --max-lora-rank 32 raises it"),
    "rank 24": (at_rank(24), "rank 24 is none of vLLM's; it loads padded to 32, under its flag --max-lora-rank 32"),
    "alpha": (config(lora_alpha=16), "a scale of 2, not 1"),
    "no name": (config(base_model_name_or_path=None), "does not name its base model"),
    "a path": (config(), "by a path that only one machine has"),
    "no revision": (config(base_model_name_or_path="nobody/nothing"), "without a revision"),
    "no provenance": (lambda f: (f / PROVENANCE).unlink(), "no provenance.json"),
    "changed": (config(PROVENANCE, rank=4), "one was changed afterwards"),
    "config.json": (lambda f: (f / "config.json").write_text("{}"), "there is a config.json"),
    "nothing": (tensors(lambda c: {k: t * ("lora_A" in k) for k, t in c.items()}), "every lora_B is 0"),
}


@pytest.mark.parametrize("name", NOTES)
def test_what_stops_no_server_is_a_note(name: str, adapter: Path, pico: Callable[[str], Path]) -> None:
    damage, what = NOTES[name]
    damage(adapter)
    findings = check(adapter, str(pico("llama")))
    assert not stopped(findings, SERVERS)
    assert what in said(findings, "note")
    assert loads_in_peft(adapter, pico("llama"))


def test_the_remedy_is_a_command_that_cures_it(trained: Path, adapter: Path, pico: Callable[[str], Path]) -> None:
    at_rank(520)(adapter)
    stop = next(f for f in check(adapter, str(pico("llama"))) if f.server == "vllm" and f.verdict == "stop")
    program, *words = stop.remedy.split()
    assert program == "loramox"
    assert words[:2] == ["extrapolate", str(trained / "trained")]
    main([word.replace("NEW_FOLDER", str(adapter.parent / "cured")) for word in words])
    assert not stopped(check(adapter.parent / "cured"), SERVERS)
    assert json.loads((adapter.parent / "cured" / CONFIG).read_text())["r"] == 512


@pytest.mark.parametrize("alpha", [2.0, None])
def test_the_remedy_makes_the_same_adapter_again(
    alpha: float | None, trained: Path, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    """From a checkpoint, for a base in another folder, by a method that has an alpha and by one that has a scale."""
    run = shutil.copytree(trained, tmp_path / "a run") / "trained"
    settings = json.loads((run / PROVENANCE).read_text())["settings"] | {"output_dir": str(run)}
    config(PROVENANCE, alpha=alpha, settings=settings)(run)
    base, checkpoint = shutil.copytree(pico("llama"), tmp_path / "a base"), min(run.glob("checkpoint-*"))
    made, again = tmp_path / "made", tmp_path / "again"
    extrapolate(checkpoint, made, alpha and 3.0, ShippingConfig(base=str(base)), scale=1.0 if alpha else 0.5)
    before = (made / WEIGHTS).read_bytes()
    config(PROVENANCE, rank=4)(made)
    (note,) = (f for f in check(made) if "one was changed afterwards" in f.what)
    program, *words = shlex.split(note.remedy)
    assert program == "loramox"
    main([word.replace("NEW_FOLDER", str(again)) for word in words])
    assert (again / WEIGHTS).read_bytes() == before
    assert (again / CONFIG).read_bytes() == (made / CONFIG).read_bytes()


def test_a_remedy_that_is_another_base_names_only_that_one() -> None:
    provenance = {"settings": {"output_dir": "run/trained", "model": "a"}, "base": {"model": "b-4bit"}}
    read = Adapter("forget-adapter", {"base_model_name_or_path": "b-4bit"}, {}, provenance, None, None)
    remedies = {f.remedy for f in judge(read) if "a quantized model" in f.what}
    assert remedies == {"loramox extrapolate run/trained --base MODEL_OF_16_BITS --out NEW_FOLDER"}


def test_a_base_on_the_hub_is_served_at_the_revision_that_the_adapter_was_made_for(tmp_path: Path) -> None:
    named = {"r": 8, "lora_alpha": 8, "base_model_name_or_path": "owner/name"}

    def words(server: str, base: str, **more: Any) -> list[str]:
        made = SERVERS[server](Adapter("adapter", named | more, {}, {}, base, None))
        return shlex.split(made, comments=True)

    for server, flag in (("vllm", "serve"), ("sglang", "--model-path")):
        line = words(server, "owner/name", revision="v 1")
        assert line[line.index(flag) + 1 :][:3] == ["owner/name", "--revision", "v 1"]
        assert "--revision" not in words(server, "owner/name")
        assert "--revision" not in words(server, "owner/other", revision="v1")
        here = {"base_model_name_or_path": str(tmp_path), "revision": "v1"}
        assert "--revision" not in words(server, str(tmp_path), **here)


def test_without_the_base_shapes_are_not_compared_and_it_says_so(adapter: Path) -> None:
    config(base_model_name_or_path="nobody/nothing")(adapter)
    findings = check(adapter)
    assert "shapes are not compared" in said(findings, "note")
    assert not stopped(findings, SERVERS)


def test_a_base_in_the_hubs_cache_is_compared_without_asking_the_hub(
    adapter: Path, pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub is asked")

    config(base_model_name_or_path="nobody/nothing", revision="0" * 40)(adapter)
    cached = str(pico("llama") / "config.json")
    monkeypatch.setattr("loramox.extras.check.check.try_to_load_from_cache", lambda *_, **__: cached)
    monkeypatch.setattr("loramox.model.config.cached_file", asked)
    assert not stopped(check(adapter), SERVERS)
    config(PROVENANCE, base={"shape": "another"})(adapter)
    assert "made on a base with other shape than nobody/nothing has" in said(check(adapter), "stop")


def test_ollama_gets_the_gguf_and_not_the_folder_whose_a_of_q_and_k_it_would_reorder(
    adapter: Path, pico: Callable[[str], Path]
) -> None:
    (ok,) = (f for f in check(adapter, str(pico("llama")), ["ollama"]) if f.verdict == "ok")
    assert ok.remedy.startswith("loramox ship gguf --adapter")
    assert "ADAPTER ./forget.gguf" in ok.remedy


@pytest.mark.parametrize("kind", ["gpt2", "gemma"])
def test_what_ship_gguf_does_not_convert_does_not_load_in_llama_cpp_or_ollama(kind: str) -> None:
    read = Adapter("forget-adapter", {"r": 8, "lora_alpha": 8}, {}, {}, None, kind)
    assert [f.server for f in judge(read) if f.verdict == "stop"] == ["llama.cpp", "ollama"]


def test_a_strangers_text_reaches_the_terminal_harmless(adapter: Path) -> None:
    bad = "x; reboot \x1b[2J"
    config(base_model_name_or_path="\x1b[31mred\u202e $(reboot)\n[bold]x", revision=bad)(adapter)
    origin = {"settings": {"output_dir": bad, "model": "m"}, "base": {"model": bad}, "checkpoint": bad}
    config(PROVENANCE, **origin, rank=3, alpha=10**400, scale=10**400)(adapter)
    for finding in check(adapter):
        text = finding.what + finding.remedy
        assert text.isprintable()
        assert not finding.remedy.startswith("loramox extrapolate x")
        assert "reboot" not in shlex.split(finding.remedy, comments=True)


def test_wrong_usage_is_an_error_and_not_a_finding(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is no folder"):
        check(tmp_path / "nowhere")
    with pytest.raises(SettingsError, match="--for tgi is not among peft, vllm"):
        check(adapter, None, ["tgi"])
    with pytest.raises(ModelError, match="--base"):
        check(adapter, str(tmp_path))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 0),
        (["--for", "vllm,peft"], 0),
        (["--for", "tgi"], 2),
        (["--base", "nowhere/at/all"], 2),
        (["--nonsense"], 2),
    ],
)
def test_the_exit_code_says_how_it_went(words: list[str], code: int, adapter: Path) -> None:
    if code == 0:
        return main(["ship", "check", str(adapter), *words])
    with pytest.raises(SystemExit) as caught:
        main(["ship", "check", str(adapter), *words])
    assert caught.value.code == code


def test_the_command_prints_what_stops_it(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(use_rslora=True)(adapter)
    main(["ship", "check", str(adapter), "--for", "peft,vllm"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["ship", "check", str(adapter)])
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "stop" in out
    assert "use_rslora" in out
    assert "loramox extrapolate" in out


def header(text: str | bytes, body: bytes = b"", length: int | None = None, holes: int = 0) -> Damage:
    """A safetensors file by hand: the header, its length (true unless given), what follows, and bytes that take no room."""

    def damage(folder: Path) -> None:
        data = text.encode() if isinstance(text, str) else text
        with (folder / WEIGHTS).open("wb") as file:
            file.write(struct.pack("<Q", len(data) if length is None else length) + data + body)
            file.truncate(file.tell() + holes)

    return damage


def one(shape: list[int], start: int, end: int, dtype: str = "F32", key: str = f"{LAYER}.lora_A.weight") -> str:
    return f'"{key}":' + json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})


def file(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def instead(make: Damage, name: str = WEIGHTS) -> Damage:
    """Something else in the place of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return damage


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os._exit, (66,))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("data.pkl", pickle.dumps(Bomb()))


def base_of(layers: Any) -> Damage:
    def damage(folder: Path) -> None:
        name = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
        made = json.loads((Path(name) / "config.json").read_text()) | {"num_hidden_layers": layers}
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text(json.dumps(made))
        config(base_model_name_or_path=str(folder / "base"))(folder)

    return damage


def deep_folders(folder: Path) -> None:
    (folder / "/".join("d" * 300)).mkdir(parents=True)


HOSTILE: dict[str, Damage] = {
    "header of 2^62": header("{}", length=2**62),
    "header of a gigabyte": header(b"{" + b" " * 99, length=2**30, holes=2**30),
    "header of 90 MB": header(b"{" + b" " * (90 << 20) + b"}"),
    "overlapping": header("{" + one([2], 0, 8) + "," + one([2], 4, 12, key="b") + "}", bytes(12)),
    "with a hole": header("{" + one([1], 0, 4) + "," + one([1], 8, 12, key="b") + "}", bytes(12)),
    "out of the file": header("{" + one([8, 64], 0, 2048) + "}", bytes(8)),
    "something after it": header("{" + one([1], 0, 4) + "}", bytes(4000)),
    "another type": header("{" + one([1], 0, 8) + "}", bytes(8)),
    "unknown type": header("{" + one([1], 0, 4, "PICKLE") + "}", bytes(4)),
    "negative": header("{" + one([-1], 0, 4) + "}", bytes(4)),
    "10^9 values that are not there": header("{" + one([8, 125_000_000], 0, 4_000_000_000) + "}"),
    "10^9 values in a hole": header("{" + one([8, 125_000_000], 0, 4 * 10**9) + "}", holes=4 * 10**9),
    "10^24 values": header("{" + one([10**12, 10**12], 0, 0) + "}"),
    "10^9 values of nothing": header("{" + one([0, 10**9], 0, 0) + "}"),
    "twice the same": header("{" + one([1], 0, 4) + "," + one([1], 0, 4) + "}", bytes(4)),
    "nested header": header('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "header of no JSON": header("{" * 100),
    "header in no text": header(b"\xff\xfe" * 50),
    "empty": file(WEIGHTS, b""),
    "seven bytes": file(WEIGHTS, b"1234567"),
    "100,000 tensors": header("{" + ",".join(one([], 0, 0, key=f"{i}") for i in range(100_000)) + "}"),
    "a name of many parts": header(
        "{" + one([1, 1], 0, 4, key=f"base_model.model.{'a.' * 10**6}lora_A.weight") + "}", bytes(4)
    ),
    "many ranks": header(
        "{"
        + ",".join(one([i, 0], 0, 0, key=f"base_model.model.{'a.' * 40}{i}.v_proj.lora_A.weight") for i in range(9999))
        + "}"
    ),
    "nested config": file(CONFIG, b'{"r":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "nested deeply, but not too deeply": config(loftq_config=json.loads("[" * 400 + "]" * 400)),
    "NaN in config": file(CONFIG, b'{"peft_type": "LORA", "r": 8, "lora_alpha": NaN}'),
    "config of 50 MB": file(CONFIG, b'{"a":"' + b"x" * (50 << 20) + b'"}'),
    "config twice": file(CONFIG, b'{"r": 8, "r": 16}'),
    "config is a list": file(CONFIG, b"[]"),
    "config of long numbers": file(CONFIG, b'{"r": ' + b"1" * 100_000 + b"}"),
    "config in no text": file(CONFIG, b"\xff\x00\xff"),
    "r is huge": config(r=10**9),
    "r is true": config(r=True),
    "r is text": config(r="8"),
    "alpha is huge": config(lora_alpha=10**400),
    "alpha is a list": config(lora_alpha=[1]),
    "base is a list": config(base_model_name_or_path=["a"]),
    "base is long": config(base_model_name_or_path="x" * 5000),
    "base has a zero byte": config(base_model_name_or_path="a\0b"),
    "targets are numbers": config(target_modules=[1]),
    "targets are nothing": config(target_modules=None),
    "targets are many": config(target_modules=[f"{i}.v_proj" for i in range(60_000)]),
    "targets are paths": config(target_modules=["../../x"]),
    "revision climbs": config(revision="../../x"),
    "pattern is a list": config(rank_pattern=["a"]),
    "nested provenance": file(PROVENANCE, b"[" * 100_000),
    "pickle": file("adapter_model.bin", pickle.dumps(Bomb())),
    "pickle by another name": file("notes.txt", pickle.dumps(Bomb())),
    "pickle as safetensors": file(WEIGHTS, pickle.dumps(Bomb())),
    "zip as safetensors": instead(zipped),
    "a .pt in a folder": both(lambda f: (f / "x").mkdir(), file("x/y.pt", b"harmless")),
    "link out": instead(lambda path: path.symlink_to("/etc/hostname")),
    "link to itself": instead(lambda path: path.symlink_to(path)),
    "link to a folder": lambda folder: (folder / "x").symlink_to("/"),
    "endless device": instead(lambda path: path.symlink_to("/dev/zero"), CONFIG),
    "pipe": instead(os.mkfifo),
    "folder for a file": instead(Path.mkdir),
    "a thousand files": lambda folder: [(folder / f"{i}").touch() for i in range(1001)],
    "deep folders": both(deep_folders, file("adapter_model.bin", b"")),
    "base of 10^9 layers": both(base_of(10**9), header("{" + one([9, 64], 0, 2304) + "}", bytes(2304))),
}


def watched(folder: Path) -> tuple[list[Finding], float, float]:
    """What is found, in how many seconds, and how many megabytes it took at its peak."""

    def memory(what: str) -> float:
        return int(Path("/proc/self/status").read_text().split(what + ":")[1].split()[0]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, start = memory("VmRSS"), time.perf_counter()
    findings = check(folder)
    return findings, time.perf_counter() - start, memory("VmHWM") - before


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_judged_in_bounded_memory_and_time(name: str, adapter: Path) -> None:
    HOSTILE[name](adapter)
    findings, seconds, megabytes = watched(adapter)
    assert stopped(findings, SERVERS) == ALL, findings
    assert len(findings) < 50
    assert seconds < 5
    assert megabytes < 150


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_a_large_file_is_read_in_bounded_memory(adapter: Path) -> None:
    """On a base that is not here, so that it is read to the end: 240 MB, of a file that takes no room."""
    config(base_model_name_or_path="nobody/nothing")(adapter)
    module = json.loads((adapter / CONFIG).read_text())["target_modules"][0]
    wide, size = 3_750_000, 120_000_000
    a, b = (f"base_model.model.{module}.lora_{part}.weight" for part in "AB")
    header("{" + one([8, wide], 0, size, key=a) + "," + one([wide, 8], size, 2 * size, key=b) + "}", holes=2 * size)(
        adapter
    )
    sign(adapter)
    findings, seconds, megabytes = watched(adapter)
    assert not stopped(findings, SERVERS)
    assert "every lora_B is 0" in said(findings, "note")
    assert seconds < 20
    assert megabytes < 150


def test_a_base_that_brings_code_is_not_asked_for_it(adapter: Path) -> None:
    named = json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"]
    for changes in (
        {"auto_map": {"AutoConfig": "evil.py--C"}, "model_type": "evil"},
        {"attn_implementation": "evil/kernel"},
    ):
        shutil.rmtree(adapter / "base", ignore_errors=True)
        base_of(2)(adapter)
        config("base/config.json", **changes)(adapter)
        (adapter / "base" / "evil.py").write_text("raise SystemExit(66)")
        findings = check(adapter)
        assert not stopped(findings, SERVERS), findings
        assert ("shapes are not compared" in said(findings, "note")) == ("auto_map" in changes)
        config(base_model_name_or_path=named)(adapter)


def test_damage_anywhere_in_the_files_is_never_an_error(adapter: Path, pico: Callable[[str], Path]) -> None:
    """Bytes turned at random: a finding or none, never an exception, and what is said to load in PEFT does."""
    torch.manual_seed(0)
    whole = {name: (adapter / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    for i in range(240):
        name = (CONFIG, WEIGHTS)[i % 2]
        data = bytearray(whole[name])
        for at in torch.randint(0, min(len(data), 2500), (1 + i % 3,)).tolist():
            data[at] = int(torch.randint(0, 256, ())) if i % 4 < 2 else b'0123456789-"'[int(torch.randint(0, 12, ()))]
        (adapter / name).write_bytes(data)
        findings = check(adapter, str(pico("llama")))
        if not stopped(findings, ["peft"]):
            assert loads_in_peft(adapter, pico("llama")), (i, bytes(data[:3000]), findings)
        (adapter / name).write_bytes(whole[name])
