"""The ledger of requests: what is built, what revoking leaves, what is refused, and what `verify` finds."""

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramox import (
    Columns,
    Data,
    ReferenceConfig,
    RunConfig,
    ShippingConfig,
    Tokenisation,
    UnlearnConfig,
    encode,
    read_rows,
)
from loramox.adapter.export import extrapolate
from loramox.adapter.factors import read_factors
from loramox.adapter.provenance import read_provenance
from loramox.cli import main
from loramox.cli.requests import _defaults
from loramox.data.row import fingerprint
from loramox.data.rows import write_rows
from loramox.errors import AdapterError, LoramoxError, RowsError, RunError, SettingsError
from loramox.extras.ledger.build import build
from loramox.extras.ledger.ledger import ROWS, Entry, _digest, read_ledger
from loramox.extras.ledger.leftovers import left_over
from loramox.extras.ledger.refresh import refresh
from loramox.extras.ledger.requests import RequestConfig, add, revoke
from loramox.extras.ledger.verify import verify
from loramox.files import sha256_of
from loramox.model.algebra import Factors
from loramox.model.load import load_reference
from loramox.model.lora import add_lora, current_factors
from loramox.train.earlier import EARLIER, put_on
from loramox.unlearning import train

SHIPPED = ("adapter_model.safetensors", "adapter_config.json")
FLOAT32 = ShippingConfig(ship_dtype="float32")
TRAINING = {
    "use_cpu": True,
    "num_train_epochs": 2,
    "learning_rate": 2e-2,
    "warmup_steps": 0,
    "alpha": 2.0,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class World:
    """A pico model, its rows in files, and the settings that its ledgers begin with."""

    def __init__(self, model: Path, rows: Path, folder: Path) -> None:
        self.model, self.rows, self.folder = model, rows, folder

    def add(self, ledger: Path, name: str | None, forget: str | None = None, **more: Any) -> Entry:
        protect = more.pop("protect", True)
        reference = {"quantization": "none", "r": 4, "lora_alpha": 8}
        reference |= {k: more.pop(k) for k in ("r", "model", "shared_subspace") if k in more}
        data = {"forget": str(self.rows / f"{forget or name}.jsonl"), "retain": str(self.rows / "retain.jsonl")}
        data |= {k: more.pop(k) for k in ("retain", "drop_overlap") if k in more}
        request = RequestConfig(str(ledger), name, protect, more.pop("resume", False))
        model = reference.pop("model", str(self.model))
        how = Tokenisation(more.pop("prompt_template", None))
        return add(
            request, ReferenceConfig(model, **reference), Data(**data), UnlearnConfig(**TRAINING | more), None, how
        )


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def world(pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> World:
    """a, b, c: two forget rows each; retain: ten."""
    folder = tmp_path_factory.mktemp("world")
    records = [json.loads(line) for file in rows for line in file.read_text().splitlines()]
    for name, part in {"a": records[:2], "b": records[2:4], "c": records[4:6], "retain": records[6:]}.items():
        write(folder / f"{name}.jsonl", part)
    return World(pico("llama"), folder, folder)


@pytest.fixture(scope="module")
def three(world: World) -> Path:
    """A ledger with a, b and c, each trained on top of those before it. Tests copy it before they write to it."""
    ledger = world.folder / "three"
    for name in "abc":
        world.add(ledger, name)
    return ledger


@pytest.fixture
def ledger(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "ledger"))


def built(ledger: Path, out: Path, **shipping: Any) -> list[bytes]:
    build(ledger, out, ShippingConfig(**{"ship_dtype": "float32"} | shipping), overwrite=True)
    return [(out / name).read_bytes() for name in SHIPPED]


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    return {name: f.delta() for name, f in read_factors(folder)[0].items()}


def test_each_request_is_trained_on_top_of_those_in_force_and_its_rows_are_held_for_the_owner_alone(
    three: Path, world: World
) -> None:
    entries = read_ledger(three).entries
    assert [(e.id, e.on_top_of, e.rows, e.alpha) for e in entries] == [
        ("a", {}, 2, 2.0),
        ("b", {"a": "a"}, 2, 2.0),
        ("c", {"a": "a", "b": "b"}, 2, 2.0),
    ]
    for entry in entries:
        folder = three / "requests" / entry.id
        assert stat.S_IMODE((folder / ROWS).stat().st_mode) == 0o600
        assert fingerprint(read_rows(str(folder / ROWS))) == entry.sha256
        assert set(entry.files) == {f.name for f in folder.iterdir()} == {*SHIPPED, "provenance.json", "README.md", "run.json", ROWS}  # fmt: skip
    assert json.loads((three / "requests/c/run.json").read_text())["data"]["protected"]["rows"] == 4
    assert not (three / "staging").exists()
    assert verify(three) == ([], [])


def test_what_is_on_while_a_request_is_trained_is_what_is_built_of_those_in_force(
    ledger: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(ledger, tmp_path / "built", FLOAT32)
    seen = {}

    def watch(model: PeftModel, change: dict[str, Factors], real=put_on) -> None:
        real(model, change)
        seen.update({name: factors.delta() for name, factors in current_factors(model, EARLIER).items()})

    monkeypatch.setattr("loramox.unlearning.put_on", watch)
    write(tmp_path / "d.jsonl", [{"question": "Who is new?", "answer": "Zed is new."}])
    world.add(ledger, "d", str(tmp_path / "d"))
    built = deltas(tmp_path / "built")
    assert seen.keys() == built.keys()
    for name, delta in built.items():
        assert torch.allclose(seen[name], delta, atol=1e-6)


def test_rows_in_force_are_held_in_the_form_in_which_they_were_forgotten(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []
    ledger = tmp_path / "ledger"
    world.add(ledger, "a", prompt_template="Q: {prompt}\nA:")

    def seen(*args: Any, **datasets: Any) -> None:
        tokenizer = datasets["processing_class"]
        held.extend(tokenizer.decode(example["input_ids"]) for example in datasets["protected_dataset"])
        raise RunError("enough")

    monkeypatch.setattr("loramox.unlearning.UnlearnTrainer", seen)
    with pytest.raises(RunError, match="enough"):
        world.add(ledger, "b")
    assert len(held) == 2
    assert all(text.startswith("Q: Where does") for text in held)


def test_requests_keep_their_retain_rows_together(world: World, tmp_path: Path) -> None:
    """The KL of the retain rows under the sum of both is lower when the second is trained on top of the first."""
    base = AutoModelForCausalLM.from_pretrained(world.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.model)
    rows = encode(read_rows(str(world.rows / "retain.jsonl")), tokenizer, Tokenisation(), 128)

    def kl(protect: bool) -> float:
        for name in "ab":
            settings = {"protect": protect, "method": "mox_static", "kl_at": "shipped", "temperature": 3.0}
            settings |= {"retain_weight": 5.0, "num_train_epochs": 12}
            world.add(tmp_path / f"{protect}", name, **settings)
        build(tmp_path / f"{protect}", tmp_path / f"{protect}-built", FLOAT32)
        model = PeftModel.from_pretrained(base, str(tmp_path / f"{protect}-built"))
        found = []
        for row in rows:
            ids, answer = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != -100
            with torch.no_grad():
                now = model(ids).logits[0, :-1][answer].log_softmax(-1)
                with model.disable_adapter():
                    known = model(ids).logits[0, :-1][answer].log_softmax(-1)
            found.append((known.exp() * (known - now)).sum(-1).mean().item())
        model.unload()
        return sum(found) / len(found)

    assert kl(protect=True) < 0.7 * kl(protect=False)


def test_a_ledger_of_one_request_builds_what_unlearn_ships(world: World, tmp_path: Path) -> None:
    world.add(tmp_path / "ledger", "a")
    build(tmp_path / "ledger", tmp_path / "built", FLOAT32)
    data = Data(str(world.rows / "a.jsonl"), str(world.rows / "retain.jsonl"))
    reference = ReferenceConfig(str(world.model), quantization="none", r=4, lora_alpha=8)
    train(RunConfig(str(tmp_path / "run")), reference, data, UnlearnConfig(**TRAINING))
    extrapolate(tmp_path / "run/trained", tmp_path / "alone", shipping=FLOAT32)
    one, other = deltas(tmp_path / "built"), deltas(tmp_path / "alone")
    assert read_factors(tmp_path / "built")[1].r == read_factors(tmp_path / "alone")[1].r == 8
    for name, delta in other.items():
        assert delta.norm() > 1e-3
        assert torch.allclose(one[name], delta, atol=1e-6 * delta.norm().item())


def test_the_adapter_for_all_is_the_sum_of_all_and_loads_in_plain_peft(ledger: Path, tmp_path: Path) -> None:
    made = build(ledger, tmp_path / "all", FLOAT32)
    parts = [deltas(ledger / "requests" / name) for name in "abc"]
    for name, delta in deltas(tmp_path / "all").items():
        assert torch.allclose(delta, -2 * sum(part[name] for part in parts), atol=1e-5)
    assert made["rank"] == 32  # 3 times 8, on the list of what servers take
    assert made["truncation_error"] == 0
    assert [(r["id"], r["alpha"], r["error"]) for r in made["requests"]] == [("a", 2, 0), ("b", 2, 0), ("c", 2, 0)]
    assert read_provenance(tmp_path / "all", "forget") == json.loads(json.dumps(made))
    assert "| b | 2 |" in (tmp_path / "all" / "README.md").read_text()
    base = AutoModelForCausalLM.from_pretrained(read_ledger(ledger).base["model"])
    model, ids = PeftModel.from_pretrained(base, str(tmp_path / "all")), torch.arange(8)[None]
    with model.disable_adapter():
        before = model(ids).logits
    assert (model(ids).logits - before).abs().max() > 1e-3


def test_a_chosen_rank_states_the_error_that_it_causes_each(ledger: Path, tmp_path: Path) -> None:
    made = build(ledger, tmp_path / "small", ShippingConfig(rank=8, ship_dtype="float32"))
    whole, small = ({}, {})
    for name in (*"abc",):
        for layer, delta in deltas(ledger / "requests" / name).items():
            whole[layer] = whole.get(layer, 0) - 2 * delta
    small = deltas(tmp_path / "small")
    lost = torch.stack([(whole[layer] - small[layer]).norm() for layer in whole]).norm()
    assert made["truncation_error"] == pytest.approx((lost / torch.stack([w.norm() for w in whole.values()]).norm()).item(), rel=1e-4)  # fmt: skip
    assert all(0 < r["error"] < 1 for r in made["requests"])


def test_without_protection_the_order_of_arrival_changes_nothing_and_revoking_is_exact_at_once(
    world: World, tmp_path: Path
) -> None:
    abc, ca = tmp_path / "abc", tmp_path / "ca"
    for ledger, names in ((abc, "abc"), (ca, "ca")):
        for name in names:
            world.add(ledger, name, protect=False)
    shutil.copytree(abc, tmp_path / "revoked")
    assert revoke(tmp_path / "revoked", "b") == []
    assert refresh(tmp_path / "revoked") == []
    assert built(tmp_path / "revoked", tmp_path / "one") == built(ca, tmp_path / "other")
    world.add(ca, "b", protect=False)
    for rank in (None, 8):
        assert built(abc, tmp_path / "one", rank=rank) == built(ca, tmp_path / "other", rank=rank)


def test_after_a_refresh_the_ledger_builds_what_it_would_had_the_revoked_request_never_been_there(
    ledger: Path, world: World, tmp_path: Path
) -> None:
    for name in "bc":
        world.add(tmp_path / "never", name)
    assert revoke(ledger, "a") == ["b", "c"]
    with pytest.raises(RunError, match=r"b \(on top of a\); c \(on top of a, b\).*requests refresh"):
        build(ledger, tmp_path / "out", FLOAT32)
    assert not (tmp_path / "out").exists()
    assert refresh(ledger) == ["b", "c"]
    assert built(ledger, tmp_path / "out") == built(tmp_path / "never", tmp_path / "other")
    assert [(e.id, e.on_top_of, e.in_force) for e in read_ledger(ledger).entries] == [
        ("a", {}, False),
        ("b", {}, True),
        ("c", {"b": "b~2"}, True),
    ]
    assert verify(ledger) == ([], [])
    assert sorted(f.name for f in (ledger / "requests").iterdir()) == ["a", "b~2", "c~2"]


def test_a_request_whose_retain_rows_the_reference_writes_is_refreshed_as_if_the_revoked_one_had_never_been_there(
    world: World, tmp_path: Path
) -> None:
    auto = {"retain": "auto", "auto_retain": 4, "num_train_epochs": 1}
    entries = [world.add(tmp_path / "auto", name, **auto) for name in "ab"]
    assert [e.retain["source"] for e in entries] == ["auto", "auto"]
    for entry in entries:
        folder = tmp_path / "auto" / "requests" / entry.folder
        written = read_rows(str(folder / "retain-auto.jsonl"))
        assert 0 < len(written) == entry.retain["rows"] <= 4
        assert fingerprint(written) == entry.retain["sha256"]
    world.add(tmp_path / "never", "b", **auto)
    revoke(tmp_path / "auto", "a")
    assert refresh(tmp_path / "auto") == ["b"]
    assert built(tmp_path / "auto", tmp_path / "out") == built(tmp_path / "never", tmp_path / "other")
    assert verify(tmp_path / "auto") == ([], [])


def test_what_holds_rows_is_the_owners_alone_from_its_first_byte(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With permissions that are never copied from one file to another, as long as a copy is not complete."""
    monkeypatch.setattr("shutil.copymode", lambda *_, **__: None)
    entry = world.add(tmp_path / "ledger", "a", retain="auto", auto_retain=4, num_train_epochs=1)
    folder = tmp_path / "ledger" / "requests" / entry.folder
    found = {name: stat.S_IMODE((folder / name).stat().st_mode) for name in ("run.json", "retain-auto.jsonl", ROWS)}
    assert set(found.values()) == {0o600}, found


def test_a_request_has_the_alpha_that_its_target_chose(world: World, tmp_path: Path) -> None:
    entry = world.add(tmp_path / "just", "a", forget_to=0.5, num_train_epochs=1)  # random weights meet it at once
    assert entry.alpha == read_ledger(tmp_path / "just").entries[0].alpha == 0.5
    assert build(tmp_path / "just", tmp_path / "out", FLOAT32)["requests"][0]["alpha"] == 0.5


def test_a_request_on_top_of_one_that_was_trained_again_is_trained_again_too(ledger: Path) -> None:
    index = read_ledger(ledger)
    a, b, c = index.entries
    a.revoked, b.folder, b.on_top_of = "now", "b~2", {}
    c.on_top_of = {"b": "b"}
    assert index.stale() == {"c": ["b"]}  # as a refresh that was killed after b leaves it
    b.on_top_of = {"a": "a"}
    assert index.stale() == {"b": ["a"], "c": ["b"]}
    b.on_top_of, c.on_top_of = {}, {"b": "b~2"}
    assert index.stale() == {}


def test_nothing_is_trained_on_top_of_what_must_be_refreshed(ledger: Path, world: World, tmp_path: Path) -> None:
    revoke(ledger, "a")
    write(tmp_path / "d.jsonl", [{"question": "Who is new?", "answer": "Zed is new."}])
    with pytest.raises(RunError, match=r"b \(on top of a\).*requests refresh"):
        world.add(ledger, "d", str(tmp_path / "d"))


def test_revoking_the_last_request_leaves_what_was_there_before_it(ledger: Path, world: World, tmp_path: Path) -> None:
    before = built(ledger, tmp_path / "out")
    write(tmp_path / "d.jsonl", [{"question": "Who is new?", "answer": "Zed is new."}])
    world.add(ledger, "d", str(tmp_path / "d"))
    assert built(ledger, tmp_path / "out") != before
    assert revoke(ledger, "d") == []
    assert revoke(ledger, "d") == []
    assert built(ledger, tmp_path / "out") == before


def test_requests_in_a_shared_subspace_add_up_at_the_rank_of_one(world: World, tmp_path: Path) -> None:
    for name in "abc":
        world.add(tmp_path / "ledger", name, shared_subspace=True, r=8)
    entries = read_ledger(tmp_path / "ledger").entries
    parts = [read_factors(tmp_path / "ledger/requests" / e.folder)[0] for e in entries]
    made = build(tmp_path / "ledger", tmp_path / "all", FLOAT32)
    assert made["rank"] == 8
    assert [e.truncation_error for e in entries] == [0, 0, 0]
    for name, (A, B) in read_factors(tmp_path / "all")[0].items():
        assert torch.equal(A, parts[0][name].A)
        assert torch.equal(A, parts[2][name].A)
        assert torch.allclose(B, -2 * sum(part[name].B for part in parts), atol=1e-6)
        assert B.norm() > 1e-3
    with pytest.raises(SettingsError, match=r"shared_subspace is False; all requests in .* have True"):
        world.add(tmp_path / "ledger", "d", "a", r=8)


def test_the_subspace_depends_on_the_base_and_the_layer_alone(world: World, pico: Callable[[str], Path]) -> None:
    def drawn(model: Path, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        reference = ReferenceConfig(str(model), quantization="none", r=8, shared_subspace=True)
        adapted = add_lora(load_reference(reference), reference)
        trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
        assert trained
        assert all("lora_B" in name for name in trained)
        return {name: factors.A for name, factors in current_factors(adapted).items()}

    one, again, other = drawn(world.model, 0), drawn(world.model, 1), drawn(pico("qwen3"), 0)
    assert all(torch.equal(one[name], again[name]) for name in one)
    q, k = (one[f"model.layers.0.self_attn.{part}_proj"] for part in "qk")
    assert not torch.equal(q, k)
    assert not torch.equal(q, other["model.layers.0.self_attn.q_proj"])
    assert q.abs().max() <= 64**-0.5
    assert q.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.1)  # as PEFT draws it


def test_what_does_not_fit_the_ledger_is_refused_before_anything_is_trained(
    ledger: Path, world: World, pico: Callable[[str], Path], tmp_path: Path
) -> None:
    new = write(tmp_path / "new.jsonl", [{"question": "Who is new?", "answer": "Zed is new."}]).removesuffix(".jsonl")
    other = shutil.copytree(world.model, tmp_path / "other")
    weights = AutoModelForCausalLM.from_pretrained(other)
    torch.nn.init.normal_(weights.lm_head.weight)
    weights.save_pretrained(other)
    overlap = tmp_path / "overlap.jsonl"
    overlap.write_bytes((world.rows / "retain.jsonl").read_bytes() + (world.rows / "b.jsonl").read_bytes())
    refused: list[tuple[type[LoramoxError], str, dict[str, Any]]] = [
        (AdapterError, "has other weights", {"model": str(other)}),
        (AdapterError, "has another architecture", {"model": str(pico("gpt2"))}),
        (SettingsError, "r is 8; all requests in .* have 4", {"r": 8}),
        (SettingsError, "--method npo does not fit.*Give --method mox, mox_static", {"method": "npo", "alpha": None}),
        (SettingsError, "--method task_vector does not fit.*--method mox, mox_static", {"method": "task_vector"}),
        (SettingsError, "protect is False; all requests in .* have True", {"protect": False}),
        (RunError, "a request 'a' already; it is in force", {"name": "A"}),
        (SettingsError, "id is '../x'; --id needs", {"name": "../x"}),
        (RowsError, r"2 of 2 rows of .*b.jsonl are in request b already", {"forget": "b"}),
        (RowsError, r"2 of 12 rows of .*overlap.jsonl are also in .*requests/b", {"retain": str(overlap)}),
        (RowsError, "does not exist", {"forget": str(tmp_path / "nothing")}),
    ]
    before = {f: f.read_bytes() for f in ledger.rglob("*") if f.is_file()}
    for kind, message, more in refused:
        name = more.pop("name", "d")
        with pytest.raises(kind, match=message):
            world.add(ledger, name, more.pop("forget", new), **more)
    assert {f: f.read_bytes() for f in ledger.rglob("*") if f.is_file()} == before


def test_what_cannot_be_built_is_refused(ledger: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no ledger"):
        build(tmp_path, tmp_path / "out")
    with pytest.raises(RunError, match="is in the ledger"):
        build(ledger, ledger / "out")
    with pytest.raises(RunError, match=r"has no request 'x'\. It has: a, b, c"):
        revoke(ledger, "x")
    for name in "abc":
        revoke(ledger, name)
    with pytest.raises(RunError, match="no request in force"):
        build(ledger, tmp_path / "out")


def test_an_id_may_be_left_out_and_a_revoked_one_stays_taken(ledger: Path, world: World) -> None:
    revoke(ledger, "c")
    with pytest.raises(RunError, match="'c' already; it is revoked, and its id stays taken"):
        world.add(ledger, "c")
    assert world.add(ledger, None, "c").id == "request-4"


def test_a_refresh_needs_the_base_and_the_retain_rows_as_they_were(
    ledger: Path, world: World, pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    revoke(ledger, "a")
    other = read_ledger(ledger).base | {"weights": "0" * 64}
    with monkeypatch.context() as patched:
        patched.setattr("loramox.extras.ledger.refresh.identify", lambda *_: other)
        with pytest.raises(AdapterError, match="has other weights"):
            refresh(ledger)
    with pytest.raises(AdapterError, match="has another architecture"):
        refresh(ledger, model=str(pico("gpt2")))
    retain = world.rows / "retain.jsonl"
    as_it_was = retain.read_text()
    try:
        retain.write_text(as_it_was + '{"question": "Q?", "answer": "A."}\n')
        with pytest.raises(RowsError, match="has changed since request b was entered"):
            refresh(ledger)
    finally:
        retain.write_text(as_it_was)


def test_a_refresh_needs_the_refusals_as_they_were_and_ships_as_trained_what_was_entered_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, refusals = tmp_path / "ledger", tmp_path / "refusals.txt"
    refusals.write_text("I cannot say.\n")
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        entry = world.add(ledger, name, num_train_epochs=1, instead="refuse", refusals="refusals.txt", forget_to=0)
        assert entry.alpha == read_ledger(ledger).settings["alpha"]
    revoke(ledger, "a")
    monkeypatch.chdir("/")
    refusals.write_text("Nobody knows.\n")
    with pytest.raises(RowsError, match=r"refusals\.txt has other refusals than when request b was entered"):
        refresh(ledger)
    refusals.write_text("I cannot say.\n")
    assert refresh(ledger) == ["b"]
    assert read_ledger(ledger).entry("b").alpha == entry.alpha


def test_what_a_request_with_generated_rows_leaves_behind_is_known_and_removed(world: World, tmp_path: Path) -> None:
    entry = world.add(tmp_path / "auto", "a", retain="auto", auto_retain=4, num_train_epochs=1)
    ledger = read_ledger(tmp_path / "auto")
    assert (ledger.folder(entry) / "retain-auto.jsonl").exists()
    ledger.entries.clear()  # as a process leaves it that is killed before it enters the request
    assert left_over(ledger) == [tmp_path / "auto" / "requests" / "a"]


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a changed byte in an adapter": (lambda path: flip(path / "requests/b/adapter_model.safetensors"), "was changed since request b"),
    "a changed row": (lambda path: flip(path / "requests/a" / ROWS), "was changed since request a"),
    "a missing file": (lambda path: (path / "requests/c/run.json").unlink(), "run.json is missing"),
    "a link in a file's place": (lambda path: relink(path / "requests/c/run.json"), "run.json is missing"),
    "a strange file": (lambda path: (path / "requests/a/notes.txt").write_text("hello"), "notes.txt is not the ledger's"),
    "a strange file on top": (lambda path: (path / "more.bin").write_text("hello"), "more.bin is not the ledger's"),
    "an edited ledger.json": (lambda path: edit(path / "ledger.json", "alpha", '"alpha": 2.0', '"alpha": 9.0'), "do not fit its digest"),
    "half of ledger.json": (lambda path: (path / "ledger.json").write_text('{"base":'), "ledger.json is damaged"),
    "another program's ledger.json": (lambda path: (path / "ledger.json").write_text("[]"), "ledger.json is damaged"),
}  # fmt: skip


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def relink(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("moved")


def edit(path: Path, name: str, old: str, new: str) -> None:
    text = path.read_text()
    assert name in text
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("spoilt", SPOILT)
def test_verify_finds_what_was_changed(spoilt: str, ledger: Path, capsys: pytest.CaptureFixture) -> None:
    spoil, message = SPOILT[spoilt]
    spoil(ledger)
    faults, left_over = verify(ledger)
    assert any(message in fault for fault in faults)
    assert not left_over
    with pytest.raises(SystemExit) as stopped:
        main(["requests", "verify", str(ledger)])
    assert stopped.value.code == 1
    assert "changed" in capsys.readouterr().out


def test_nothing_is_built_from_changed_files(ledger: Path, tmp_path: Path) -> None:
    flip(ledger / "requests/b/adapter_model.safetensors")
    with pytest.raises(AdapterError, match="was changed since request b was entered"):
        build(ledger, tmp_path / "out")
    edit(ledger / "ledger.json", "digest", '"revoked": null', '"revoked": "now"')
    with pytest.raises(RunError, match=r"ledger.json is damaged, or was changed by hand"):
        build(ledger, tmp_path / "out")


def test_a_second_writer_gets_one_error_at_once_and_readers_none(ledger: Path, world: World, tmp_path: Path) -> None:
    before = (ledger / "ledger.json").read_bytes()
    with FileLock(ledger / ".lock"):
        for write_to in (lambda: revoke(ledger, "a"), lambda: refresh(ledger), lambda: world.add(ledger, "d")):
            with pytest.raises(RunError, match="is in use by another process"):
                write_to()
        assert verify(ledger) == ([], [])
        build(ledger, tmp_path / "out")
    assert (ledger / "ledger.json").read_bytes() == before
    assert revoke(ledger, "a") == ["b", "c"]


@pytest.mark.parametrize(
    ("records", "columns"),
    [
        ([{"question": "Q?", "answer": " A\u2028\n."}], {}),
        ([{"prompt": "Q? ", "completion": "A."}], {}),
        ([{"frage": "Q?", "antwort": "A.", "statt": "B."}], {"prompt_column": "frage", "answer_column": "antwort", "wanted_column": "statt"}),
        ([{"messages": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]}], {}),
        ([{"chat": [{"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}]}], {"messages_column": "chat"}),
        ([{"text": "A long text."}], {}),
        ([{"body": "A long text.", "question": "Q?"}], {"text_column": "body"}),
        ([{"prompt": "Q?", "completion": "A."}], {"prompt_column": "prompt", "answer_column": "completion"}),
        ([{"prompt": [{"role": "user", "content": "Q?"}], "completion": [{"role": "assistant", "content": "A."}]}], {"prompt_column": "prompt", "answer_column": "completion"}),
        ([{"frage": "Q?", "antwort": ["A.", "B."], "text": "T"}], {"prompt_column": "frage", "answer_column": "antwort", "text_column": "text"}),
    ],
)  # fmt: skip
def test_the_copy_of_the_rows_reads_back_as_the_same_rows(
    records: list[dict[str, Any]], columns: dict[str, str], tmp_path: Path
) -> None:
    rows = read_rows(write(tmp_path / "in.jsonl", records), Columns(**columns))
    write_rows(tmp_path / "out.jsonl", rows, Columns(**columns))
    again = read_rows(str(tmp_path / "out.jsonl"), Columns(**columns))
    assert [(r.prompt, r.right_answers, r.wanted, r.verbatim) for r in again] == [
        (r.prompt, r.right_answers, r.wanted, r.verbatim) for r in rows
    ]


def test_the_command_line_goes_from_rows_to_an_adapter(world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:  # fmt: skip
    ledger = str(tmp_path / "ledger")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in TRAINING.items() if k != "alpha"))
    rows = ["--retain", str(world.rows / "retain.jsonl"), "--forget"]
    first = ["--model", str(world.model), "--r", "4", "--quantization", "none", "--alpha", "2"]
    main(["requests", "add", ledger, str(recipe), *first, *rows, str(world.rows / "a.jsonl")])
    # The model, the rank, the method and alpha come from the ledger, unless given.
    main(["requests", "add", ledger, str(recipe), *rows, str(world.rows / "b.jsonl"), "--id", "second", "--alpha", "3"])
    assert [(e.id, e.alpha) for e in read_ledger(Path(ledger)).entries] == [("request-1", 2.0), ("second", 3.0)]
    assert {name: read_ledger(Path(ledger)).settings[name] for name in ("r", "method", "alpha")} == {
        "r": 4,
        "method": "mox",
        "alpha": 2.0,
    }
    main(["requests", "list", ledger])
    main(["requests", "show", ledger, "second"])
    main(["requests", "verify", ledger])
    main(["requests", "build", ledger, "--out", str(tmp_path / "out")])
    assert read_provenance(tmp_path / "out", "forget")["rank"] == 16
    capsys.readouterr()
    main(["requests", "revoke", ledger, "request-1"])
    assert "loramox requests refresh" in capsys.readouterr().out
    main(["requests", "refresh", ledger])
    main(["requests", "build", ledger, "--out", str(tmp_path / "out"), "--overwrite"])
    assert [r["id"] for r in read_provenance(tmp_path / "out", "forget")["requests"]] == ["second"]
    assert "held for each request alone" not in capsys.readouterr().out
    for name in "ab":
        words = ["requests", "add", f"{ledger}-2", str(recipe), *first, *rows, str(world.rows / f"{name}.jsonl")]
        main([*words, "--protect", "false"])
    main(["requests", "build", f"{ledger}-2", "--out", str(tmp_path / "out"), "--overwrite"])
    assert "held for each request alone" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["requests", "add", ledger, *rows, str(world.rows / "c.jsonl"), "--r", "8"])
    assert "r is 8; all requests in" in capsys.readouterr().err


def test_a_later_request_has_the_alpha_of_the_first_unless_it_has_another_method(three: Path) -> None:
    assert {"--method=mox", "--alpha=2.0"} <= set(_defaults(str(three), set()))
    assert "--alpha=2.0" not in _defaults(str(three), {"method"})


@pytest.fixture
def by_0_1(ledger: Path) -> Path:
    """The ledger as loramox 0.1 would have written it: `strength` for alpha, and settings of its own in each request."""
    index = json.loads((ledger / "ledger.json").read_text())
    del index["digest"], index["settings"]["method"]
    index["settings"]["strength"] = index["settings"].pop("alpha")
    for entry in index["entries"]:
        entry["strength"] = entry.pop("alpha")
        path = ledger / "requests" / entry["folder"] / "run.json"
        record = json.loads(path.read_text())
        del record["alpha"], record["settings"]["alpha"], record["settings"]["method"]
        record["settings"] |= {"strength": 2.0, "objective": "npo", "kl_weight": 1.0}
        path.write_text(json.dumps(record))
        entry["files"]["run.json"] = sha256_of(path)
    (ledger / "ledger.json").write_text(json.dumps(index | {"digest": _digest(index)}))
    return ledger


def test_a_ledger_of_0_1_is_read_verified_and_built_as_it_was(by_0_1: Path, three: Path, tmp_path: Path) -> None:
    found = read_ledger(by_0_1)
    assert [entry.alpha for entry in found.entries] == [2.0, 2.0, 2.0]
    assert found.settings["alpha"] == 2.0
    assert verify(by_0_1) == ([], [])
    assert built(by_0_1, tmp_path / "one") == built(three, tmp_path / "other")


def test_a_request_of_0_1_is_revoked_but_not_trained_again(by_0_1: Path) -> None:
    assert revoke(by_0_1, "a") == ["b", "c"]
    assert [entry.alpha for entry in read_ledger(by_0_1).entries] == [2.0, 2.0, 2.0]  # as it is written now
    with pytest.raises(RunError, match=r"request b was trained by loramox 0\.1.*Revoke it and add it again"):
        refresh(by_0_1)
