"""The shipped adapter behind a real server: transformers serve, asked over HTTP for the forget model and for its base."""

import json
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import PEOPLE, questions
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramox.adapter.export import extrapolate
from loramox.errors import AdapterError, ModelError, RunError
from loramox.extras.check.check import check
from loramox.extras.serve import serve_folder

SERVE = Path(__file__).parents[1] / "docs" / "serve.md"
PROMPTS = [f"Question: {row['question']}\nAnswer:" for row in questions(PEOPLE[:6])]
TOKENS = 8


@pytest.fixture(scope="module")
def strong(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A forget adapter that changes what the pico model says."""
    out = tmp_path_factory.mktemp("shipped") / "adapter"
    extrapolate(trained / "trained", out, 8.0)
    return out


@pytest.fixture(scope="module")
def served(strong: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], str]]:
    """ask(model, prompt) → what the server says, greedily."""
    elsewhere = tmp_path_factory.mktemp("server")
    names = serve_folder(strong, elsewhere / "forget-model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    server = subprocess.Popen(command, cwd=elsewhere, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    address = f"http://127.0.0.1:{port}"

    def ask(which: str, prompt: str) -> str:
        wish = {"model": names[which], "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(wish).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["choices"][0]["text"]

    try:
        for _ in range(600):
            assert server.poll() is None, server.stdout.read()
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        yield ask
    finally:
        server.kill()
        server.wait()


def test_a_server_says_what_peft_says_with_the_adapter_on_and_off(
    served: Callable[[str, str], str], strong: Path, pico: Callable[[str], Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pico("llama"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico("llama")), strong)

    def said(prompt: str) -> str:
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    forgotten = [said(prompt) for prompt in PROMPTS]
    with model.disable_adapter():
        known = [said(prompt) for prompt in PROMPTS]
    assert forgotten != known  # else the test could not tell one from the other
    assert [served("forget", prompt) for prompt in PROMPTS] == forgotten
    assert [served("base", prompt) for prompt in PROMPTS] == known


def test_the_folder_loads_by_its_own_name_from_anywhere(
    strong: Path, pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = serve_folder(strong, tmp_path / "served")
    assert made == {"forget": str(tmp_path / "served"), "base": str(pico("llama"))}
    monkeypatch.chdir(tmp_path)
    model = AutoModelForCausalLM.from_pretrained("served")  # transformers puts the adapter on its base
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico("llama")), strong)
    ids = AutoTokenizer.from_pretrained("served")(PROMPTS[0], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, expected(**ids).logits, rtol=0, atol=0)
    assert (tmp_path / "served" / "model.safetensors").is_symlink()  # nothing large is copied


def test_the_name_that_sglang_needs_in_a_request_is_printed_and_documented(
    strong: Path, pico: Callable[[str], Path]
) -> None:
    (ok,) = (finding for finding in check(strong, None, ["sglang"]) if finding.verdict == "ok")
    command, _, hint = ok.remedy.partition("  # ")
    assert f'"model": "{pico("llama")}:forget"' in hint
    assert "answered by the base" in hint
    assert shlex.split(ok.remedy, comments=True) == shlex.split(command)
    (line,) = (each for each in SERVE.read_text().splitlines() if "sglang.launch_server" in each)
    assert '# then "model": "BASE:forget"' in line
    assert '"lora_path": "forget"' in SERVE.read_text()


def test_what_is_there_is_left_alone_and_other_models_are_refused(
    strong: Path, trained: Path, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    with pytest.raises(RunError, match="holds other files"):
        serve_folder(strong, tmp_path / "thesis", overwrite=True)
    with pytest.raises(AdapterError, match="is a trained adapter, not a forget adapter"):
        serve_folder(trained / "trained", tmp_path / "out")
    with pytest.raises(AdapterError, match="has another architecture or size"):
        serve_folder(strong, tmp_path / "out", base=str(pico("qwen3")))
    with pytest.raises(RunError, match="is the adapter itself"):
        serve_folder(strong, strong, overwrite=True)
    half = shutil.copytree(strong, tmp_path / "half")
    config = json.loads((half / "adapter_config.json").read_text())
    (half / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    with pytest.raises(AdapterError, match="leaves out"):
        serve_folder(half, tmp_path / "out")
    linked = shutil.copytree(strong, tmp_path / "linked")
    (linked / "README.md").unlink()
    (linked / "README.md").symlink_to(tmp_path / "thesis" / "chapter.tex")
    with pytest.raises(AdapterError, match=r"README.md is a link that leads out"):
        serve_folder(linked, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    serve_folder(strong, tmp_path / "out")
    with pytest.raises(RunError, match="Replace it with --overwrite"):
        serve_folder(strong, tmp_path / "out")
    serve_folder(strong, tmp_path / "out", overwrite=True)


def test_a_base_that_merge_refuses_is_refused(
    strong: Path, pico: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shutil.copytree(pico("llama"), tmp_path / "base")
    shard = base / "model.safetensors"
    shard.rename(tmp_path / "mine.safetensors")
    shard.symlink_to(tmp_path / "mine.safetensors")
    with pytest.raises(ModelError, match=r"model.safetensors is a link that leads out of the model's folder"):
        serve_folder(strong, tmp_path / "out", base=str(base))
    # On the hub, other weights can be told only once they are here.
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--pico"
    snapshot = shutil.copytree(pico("llama"), cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    other = AutoModelForCausalLM.from_pretrained(snapshot)
    other.model.norm.weight.data += 1
    other.save_pretrained(snapshot)
    with pytest.raises(AdapterError, match="someone/pico has other weights"):
        serve_folder(strong, tmp_path / "out", base="someone/pico")
    assert not (tmp_path / "out").exists()
