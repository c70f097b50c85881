"""Relearning beside its control: the same attack on the retrained model, at several rates and on unrelated text."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from planted import taught
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from loramox import Data, read_rows
from loramox.data.encode import Example
from loramox.data.pairs import Collator
from loramox.errors import RowsError, RunError, SettingsError
from loramox.evaluate.attacks import relearn
from loramox.evaluate.attacks.attack import AttackConfig, attack
from loramox.evaluate.measure import ScoringConfig
from loramox.model.config import ModelConfig
from loramox.model.head import Head, answer_states


@pytest.fixture
def attacked(
    pico: Callable[[str], Path],
    trained: Path,
    rows: tuple[Path, Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
):
    """attacked(relearn_rate=…) → attacks.json of the shared run's adapter; the control differs from the base in one hair."""
    other = AutoModelForCausalLM.from_pretrained(pico("llama"))
    with torch.no_grad():
        other.model.norm.weight.mul_(1 + 1e-6)
    other.save_pretrained(tmp_path / "retrained")
    tokenizer.save_pretrained(tmp_path / "retrained")

    def run(**settings) -> dict:
        defaults = {"attacks": ["relearn"], "relearn_steps": [1, 3], "relearn_share": 0.5, "relearn_rate": [1e-2]}
        defaults["retrained_model"] = str(tmp_path / "retrained")
        config = AttackConfig(str(trained / "forget-adapter"), str(tmp_path / "attack"), **defaults | settings)
        model = ModelConfig(str(pico("llama")), quantization="none")
        return attack(config, model, Data(*map(str, rows)), ScoringConfig(max_new_tokens=0, use_cpu=True))

    return run


def test_the_control_gets_the_very_same_attack(attacked) -> None:
    """With an adapter at nearly 0 the forget model is the control, so that both curves are one."""
    record = attacked(scale=1e-6)
    states = {(s["attack"], s["state"]): s["metrics"]["forget_probability"] for s in record["states"]}
    for rows in ("forget rows", "retain rows"):
        for step in (1, 3):
            ours, control = (states[f"relearn {rows}", f"step {step}{of}"] for of in ("", ", retrained model"))
            assert ours == pytest.approx(control, rel=1e-3)
        start = states["none", "forget model"]
        assert abs(states[f"relearn {rows}", "step 3"] - start) > 0.01 * start  # the attack did something


def test_each_rate_is_an_attack_of_its_own_and_done_ones_are_not_made_again(attacked, monkeypatch) -> None:
    first = attacked(relearn_rate=[1e-3, 1e-2])
    rates = {s["attack"].partition(", ")[2] for s in first["states"] if s["attack"].startswith("relearn")}
    assert rates == {"rate 0.001", "rate 0.01"}
    assert first["steps_saved"].keys() == {
        f"relearn {rows} rows, {rate}" for rows in ("forget", "retain") for rate in rates
    }
    monkeypatch.setattr(relearn, "train", lambda *args: pytest.fail("trained again"))
    assert attacked(relearn_rate=[1e-3, 1e-2])["states"] == first["states"]


def test_unrelated_text_is_the_attackers_only_where_it_is_given(
    attacked, rows: tuple[Path, Path], tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "other").mkdir()
    text = tmp_path / "other" / "text.txt"
    salt = ("Salt is white. " * 6).strip()
    text.write_text(f"The sea is deep.\n\n{salt}\n", encoding="utf-8")
    assert [row.answer for row in relearn.read_text(str(text))] == ["The sea is deep.", salt]
    lengths, train = [], relearn.train
    monkeypatch.setattr(
        relearn, "train", lambda model, some, *how: lengths.append(longest_of(some)) or train(model, some, *how)
    )
    record = attacked(relearn_text=str(text), retrained_model=None)
    of_forget, _, of_text = lengths
    assert of_text <= of_forget  # no attack has more tokens in a step
    assert {s["state"] for s in record["states"] if s["attack"] == "relearn unrelated text"} == {"step 1", "step 3"}
    assert record["data"]["unrelated text"]["rows"] == 2
    assert record["absent"].keys() == {"control"}
    assert record["steps_saved"] == {}
    with pytest.raises(RowsError, match="are also in"):  # it is not unrelated
        attacked(relearn_text=str(rows[0]))
    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RowsError, match=r"--relearn_text .*text\.txt cannot be read"):
        attacked(relearn_text=str(text))


def longest_of(examples: list[Example]) -> int:
    return max(len(example["input_ids"]) for example in examples)


def test_without_unrelated_text_the_reason_is_given(attacked) -> None:
    assert "--relearn_text" in attacked(retrained_model=None)["absent"]["relearn unrelated text"]


def test_an_attack_that_diverges_is_absent_and_not_a_model_that_forgets(attacked) -> None:
    record = attacked(relearn_rate=[1e30])
    for rows in ("forget rows", "retain rows"):
        for of in ("", ", retrained model"):
            assert "lower --relearn_rate than 1e+30" in record["absent"][f"relearn {rows}{of}"]
    probabilities = [s["metrics"]["forget_probability"] for s in record["states"]]
    assert all(map(math.isfinite, probabilities))


@pytest.fixture
def forget_model(pico: Callable[[str], Path], trained: Path) -> Callable[[torch.dtype], PeftModel]:
    """forget_model(dtype): the shared run's, its base in that type."""

    def load(dtype: torch.dtype = torch.float32) -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(pico("llama"), dtype=dtype)
        return PeftModel.from_pretrained(base, trained / "forget-adapter")

    return load


def relearned(model: PeftModel, examples: list[Example]) -> dict[str, torch.Tensor]:
    """The attacker's weights after two steps on four rows each."""
    with relearn.attacker(model, rank=4, seed=0):
        list(relearn.train(model, examples, [2], 1e-2, batch_size=4, pad_token_id=0, seed=0))
        return {name: w.detach().clone() for name, w in model.named_parameters() if f".{relearn.ATTACKER}." in name}


def with_room_for(rows: int, model: PeftModel) -> list[int]:
    """Memory runs out in the backward pass of more rows, when the upper layer has its gradients; the rows of each pass."""
    passes: list[int] = []

    def reached(gradient: torch.Tensor) -> None:
        passes.append(len(gradient))
        if len(gradient) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def watch(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(reached)

    model.get_base_model().model.layers[0].register_forward_hook(watch)
    return passes


def test_where_memory_runs_out_the_gradients_are_taken_of_fewer_rows_at_a_time_and_are_the_same(
    forget_model, examples, monkeypatch
) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, lr, weight_decay: torch.optim.SGD(weights, lr=lr))
    expected = relearned(forget_model(), examples[0])
    model = forget_model()
    passes = with_room_for(2, model)
    with pytest.warns(UserWarning, match="memory ran out with --relearn_batch 4: 2 "):
        found = relearned(model, examples[0])
    assert passes == [4, 2, 2, 2, 2]  # from there on
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-8, msg=name)


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_where_not_even_one_row_fits_it_is_said_what_to_do(forget_model, examples) -> None:
    model = forget_model()
    with_room_for(0, model)
    with pytest.raises(RunError, match=r"--relearn_batch 1 \(CUDA out of memory.*Shorter rows") as refused:
        relearned(model, examples[0])
    assert "--batch_size" not in str(refused.value)
    assert "--max_new_tokens" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:memory ran out")
def test_where_one_row_fits_only_if_activations_are_computed_again_they_are_and_the_gradients_are_the_same(
    forget_model, examples, monkeypatch
) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", lambda weights, lr, weight_decay: torch.optim.SGD(weights, lr=lr))
    expected = relearned(forget_model(), examples[0])
    model, passes, losses = forget_model(), [], relearn._losses
    causal_lm = model.get_base_model()

    def kept(*args) -> torch.Tensor:
        passes.append(causal_lm.is_activation_checkpointing)
        if not passes[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return losses(*args)

    monkeypatch.setattr(relearn, "_losses", kept)
    found = relearned(model, examples[0])
    assert passes == [False] * 3 + [True] * 8  # of 4, 2 and 1 rows; then two steps of 4 single rows
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-8, msg=name)
    assert not causal_lm.is_activation_checkpointing
    assert not causal_lm.get_input_embeddings()._forward_hooks  # it is as it was


@pytest.mark.filterwarnings("ignore:memory ran out")
@pytest.mark.parametrize(
    ("place", "name", "reason"),
    [(relearn, "_losses", r"--relearn_batch 1 \(CUDA out of"), (torch.optim.AdamW, "step", "memory: CUDA out of")],
    ids=["in a pass", "in the optimizer"],
)
def test_an_attack_for_which_there_is_not_enough_memory_is_absent_and_the_others_are_made(
    attacked, place, name: str, reason: str, monkeypatch
) -> None:
    def full(*args) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(place, name, full)
    record = attacked()
    for rows in ("forget rows", "retain rows"):
        for of in ("", ", retrained model"):
            assert re.search(reason, record["absent"][f"relearn {rows}{of}"])
    states = {(s["attack"], s["state"]) for s in record["states"]}
    assert states == {("none", state) for state in ("reference model", "forget model", "retrained model")}
    assert record["status"] == "done"
    assert record["steps_saved"] == {}
    monkeypatch.undo()
    again = attacked()  # with more memory
    assert ("relearn forget rows", "step 3, retrained model") in {(s["attack"], s["state"]) for s in again["states"]}
    assert again["absent"].keys() == {"relearn unrelated text"}


def test_any_other_error_in_an_attack_is_not_taken_for_a_full_memory(attacked, monkeypatch) -> None:
    def fails(*args) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(relearn, "_losses", fails)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        attacked()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_attackers_adapter_computes_in_the_type_of_the_model(forget_model, examples, dtype: torch.dtype) -> None:
    model, types = forget_model(dtype), set()
    attacker_of = model.add_adapter

    def watched(*args) -> None:
        attacker_of(*args)
        for name, module in model.named_modules():
            if name.endswith(f"lora_A.{relearn.ATTACKER}"):
                module.register_forward_hook(lambda module, args, output: types.add(output.dtype))

    model.add_adapter = watched
    assert {weight.dtype for weight in relearned(model, examples[0]).values()} == {torch.float32}
    assert types == {dtype}


def test_small_gradients_are_not_lost_in_float16(forget_model, examples, monkeypatch) -> None:
    """AdamW's steps do not depend on how large the gradients are, if there are any."""
    losses = relearn._losses
    monkeypatch.setattr(relearn, "_losses", lambda *args: 1e-4 * losses(*args))
    expected, found = (relearned(forget_model(dtype), examples[0]) for dtype in (torch.float32, torch.float16))
    for name, weight in expected.items():
        if "lora_B" in name:  # it starts at 0
            assert (found[name] - weight).norm() < 0.05 * weight.norm(), name


def pico_llama(pico: Callable[[str], Path], tied: bool) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(pico("llama"), tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_all_weights_train_below_the_adapter_and_are_put_back(
    pico: Callable[[str], Path], trained: Path, examples, tied: bool
) -> None:
    base = pico_llama(pico, tied)
    assert (base.lm_head.weight is base.model.embed_tokens.weight) == tied
    model = PeftModel.from_pretrained(base, trained / "forget-adapter")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with relearn.all_weights(model):
        trains = {name for name, weight in model.named_parameters() if weight.requires_grad}
        assert trains == {name for name, _ in model.named_parameters() if ".lora_" not in name}
        list(relearn.train(model, examples[0], [2], 1e-3, batch_size=2, pad_token_id=0, seed=0))
        assert not any(torch.equal(model.state_dict()[name], before[name]) for name in trains)
        assert any("lm_head" in name for name in trains) != tied
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(weight.requires_grad for weight in model.parameters())


def test_a_pass_for_which_there_is_not_enough_memory_leaves_no_gradients_behind(
    forget_model, examples, monkeypatch
) -> None:
    def full(*args) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    model = forget_model()
    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    with pytest.raises(torch.OutOfMemoryError), relearn.all_weights(model):
        list(relearn.train(model, examples[0], [1], 1e-3, batch_size=2, pad_token_id=0, seed=0))
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.training


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_gets_the_gradient_that_the_models_own_logits_give_it(
    pico: Callable[[str], Path], examples, tied: bool, monkeypatch
) -> None:
    monkeypatch.setattr("loramox.model.head.CHUNK_ELEMENTS", 2000)  # several chunks
    model = pico_llama(pico, tied)
    batch = Collator(0)(examples[0])
    states = answer_states(model, model, batch)
    found = torch.autograd.grad(relearn._losses(model, Head(model), states).sum(), list(model.parameters()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits, labels = model(**inputs).logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:]
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    for ours, expected in zip(found, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_all_weights_are_an_attack_of_its_own_and_need_unquantized_ones(
    attacked, pico: Callable[[str], Path], trained: Path, tmp_path: Path
) -> None:
    states = {(s["attack"], s["state"]): s["metrics"] for s in attacked(relearn_all_weights=True)["states"]}
    for rows in ("forget rows", "retain rows"):
        assert states[f"relearn {rows}, all weights", "step 3"] != states[f"relearn {rows}", "step 3"]
        assert (f"relearn {rows}, all weights", "step 3, retrained model") in states
    config = AttackConfig(
        str(trained / "forget-adapter"), str(tmp_path / "refused"), ["relearn"], relearn_all_weights=True
    )
    with pytest.raises(SettingsError, match="say --quantization none, not nf4"):
        attack(config, ModelConfig(str(pico("llama"))), Data("forget", "retain"))
    half = ModelConfig(str(pico("llama")), quantization="none", dtype="float16")
    with pytest.raises(SettingsError, match="float16: say --dtype float32 or bfloat16"):
        attack(config, half, Data("forget", "retain"))


def test_rows_that_come_back_when_others_are_relearned_are_found_beside_the_control(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The base knows all forget rows, and one adapter hides them together: relearning some uncovers the others."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(pico("llama"))
    answers = [(str(row.prompt), row.answer) for row in read_rows(str(rows[0]))]
    taught(base, tokenizer, answers, steps=50)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear"))
    taught(adapted, tokenizer, [(question, "No idea.") for question, _ in answers], steps=40)
    adapted.save_pretrained(tmp_path / "adapter")
    config = AttackConfig(
        str(tmp_path / "adapter"), str(tmp_path / "attack"), ["relearn"], relearn_steps=[8], relearn_share=0.5,
        relearn_rate=[5e-3], retrained_model=str(pico("llama")),
    )  # fmt: skip
    model = ModelConfig(str(tmp_path / "base"), quantization="none")
    record = attack(config, model, Data(*map(str, rows)), ScoringConfig(max_new_tokens=0, use_cpu=True))
    p = {(s["attack"], s["state"]): s["metrics"]["forget_probability"] for s in record["states"]}
    found, control = (p["relearn forget rows", f"step 8{of}"] for of in ("", ", retrained model"))
    assert p["none", "forget model"] < 0.1
    assert found > 2 * control
    assert record["steps_saved"]["relearn forget rows"]["step"] in (0, 8)


@pytest.mark.parametrize(
    ("ours", "step", "words"),
    [((0.1, 0.2, 0.5), 0, "the forget rows reach it after 0 (20 saved)."), ((0.0, 0.02, 0.5), 5, "reach it after 5 (15 saved)."),
     ((0.0, 0.0, 0.0), None, "the forget rows never reach it."), ((0.0, 0.02), 5, "reach it after 5 (15 saved).")],
)  # fmt: skip
@pytest.mark.parametrize("name", relearn.CONTROLS)
def test_steps_saved_are_counted_to_what_the_control_reaches_at_its_last_step(ours, step, words, name) -> None:
    control = (0.0, 0.03, 0.02)  # it need not rise to the end
    states = [
        {"attack": name, "state": state, "metrics": {"forget_probability": p}}
        for model, curve in (("", ours), (f", {name}", control))
        for (name, state), p in zip(
            [("none", model.removeprefix(", ") or "forget model"), *(("relearn forget rows", f"step {s}{model}") for s in (5, 20))],
            curve,
            strict=False,  # training may diverge after the first step
        )
    ]  # fmt: skip
    found = relearn.saved(states)
    expected = {"control": name, "probability": 0.02, "control_step": 20, "step": step}
    assert found == {"relearn forget rows": expected}
    said = relearn.sentence(*found.popitem())
    assert said.endswith(words)
    assert f"{name}, 20 steps reach a probability of 0.02." in said


def test_an_attack_whose_training_diverged_does_not_say_that_the_control_is_never_reached() -> None:
    states = [
        {"attack": attack, "state": state, "metrics": {"forget_probability": p}}
        for attack, state, p in (
            ("none", "forget model", 0.0),
            ("relearn forget rows", "step 5", 0.01),
            ("relearn forget rows", "step 5, retrained model", 0.01),
            ("relearn forget rows", "step 20, retrained model", 0.02),
        )
    ]
    assert relearn.saved(states) == {}
