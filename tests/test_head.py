"""Chunked losses against plain ones, and the head against the model's own logits."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from loramox.data.encode import IGNORED
from loramox.data.pairs import answer_positions
from loramox.errors import ModelError
from loramox.model.head import (
    AnswerStates,
    Head,
    _Fp32Product,
    answer_states,
    mean_over_rows,
    multiplies_into_fp32,
    per_token,
    tokens_at_once,
)
from loramox.train.losses import cross_entropy, kl_divergence, log_prob

HIDDEN, VOCABULARY = 8, 12
SHAPES = ["llama", "qwen3", "mistral", "phi", "gemma", "gpt_neox", "gpt2"]


class Output(nn.Module):
    """As much of a model as a head needs: an output layer, with a bias."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        torch.manual_seed(0)
        self.output = nn.Linear(HIDDEN, VOCABULARY, dtype=dtype)
        self.base_model = nn.Identity()

    def get_decoder(self) -> nn.Module:
        return self.base_model

    def get_output_embeddings(self) -> nn.Module:
        return self.output


def states(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, HIDDEN, generator=random).to(dtype).requires_grad_()


def value_and_gradients(model: Output, hidden: list[Tensor], *others: Tensor, function: Callable) -> list[Tensor]:
    values = per_token(function, Head(model), hidden, *others)
    # Unequal weights, so that a chunk in the wrong place shows.
    weights = torch.arange(1, len(values) + 1, dtype=torch.float32)
    return [values, *torch.autograd.grad((values * weights).sum(), hidden)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens_a_chunk", [1, 2, 3, 6, 7, 100])
@pytest.mark.parametrize("count", [1, 7])
def test_chunked_losses_have_the_values_and_gradients_of_plain_ones(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tokens_a_chunk: int, count: int
) -> None:
    model = Output(dtype)
    hidden, known = states(count, dtype, 1), states(count, dtype, 2)
    targets = torch.arange(count) % VOCABULARY

    def tempered(logits: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(logits, y, 6.0)

    cases = [([hidden], (targets,), tempered), ([known, hidden], (), kl_divergence)]
    plain = [value_and_gradients(model, h, *o, function=f) for h, o, f in cases]
    monkeypatch.setattr("loramox.model.head.CHUNK_ELEMENTS", tokens_a_chunk * VOCABULARY)
    chunked = [value_and_gradients(model, h, *o, function=f) for h, o, f in cases]
    # The gradients of chunks are summed in another order, and in 16 bits each sum is rounded to 8 bits.
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-1}
    for expected, found in zip(plain, chunked, strict=True):
        assert torch.equal(found[0], expected[0]) or torch.allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
        assert found[0].dtype == torch.float32
        for one, other in zip(expected[1:], found[1:], strict=True):
            assert one.dtype == other.dtype == dtype
            assert torch.allclose(one, other, **tolerance)


def test_a_second_column_of_detached_logits_changes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hidden, targets = Output(torch.float32), states(7, torch.float32, 1), torch.arange(7)
    monkeypatch.setattr("loramox.model.head.CHUNK_ELEMENTS", 3 * VOCABULARY)

    def both(logits: Tensor, y: Tensor) -> Tensor:
        return torch.stack([cross_entropy(logits, y, 6.0), log_prob(logits.detach(), y)], dim=1)

    alone = value_and_gradients(model, [hidden], targets, function=lambda z, y: cross_entropy(z, y, 6.0))
    loss, log_p = per_token(both, Head(model), [hidden], targets).T
    weights = torch.arange(1, 8, dtype=torch.float32)
    (gradient,) = torch.autograd.grad((loss * weights * (1 + log_p.detach())).sum(), hidden)
    assert torch.equal(loss, alone[0])
    assert torch.allclose(log_p, log_prob(model.output(hidden), targets), rtol=1e-5, atol=1e-6)
    scaled = alone[1] * (1 + log_p.detach())[:, None]
    assert torch.allclose(gradient, scaled, rtol=1e-5, atol=1e-6)


def test_a_chunk_never_has_more_logits_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramox.model.head.CHUNK_ELEMENTS", 3 * VOCABULARY + 1)
    seen: list[int] = []

    def count(logits: Tensor) -> Tensor:
        seen.append(len(logits))
        return logits.sum(-1)

    with torch.no_grad():
        per_token(count, Head(Output(torch.float32)), [states(8, torch.float32, 0)])
    assert seen == [3, 3, 2]


def test_a_vocabulary_above_the_chunk_size_still_goes_one_token_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramox.model.head.CHUNK_ELEMENTS", 1)
    values = per_token(lambda z: z.sum(-1), Head(Output(torch.float32)), [states(3, torch.float32, 0)])
    assert values.shape == (3,)


@pytest.mark.parametrize("vocabulary", [12, 32_000, 128_256, 262_144, 10**9])
def test_a_chunk_fits_the_heap_on_a_cpu_and_pays_for_reading_the_head_on_a_gpu(vocabulary: int) -> None:
    assert 1 <= tokens_at_once(vocabulary, "cpu") <= max(1, 9_000_000 // vocabulary)
    assert tokens_at_once(vocabulary, "cuda") == max(256, tokens_at_once(vocabulary, "cpu"))


def bias_free(dtype: torch.dtype) -> Output:
    model = Output(dtype)
    model.output = nn.Linear(HIDDEN, VOCABULARY, bias=False, dtype=dtype)
    return model.requires_grad_(False)


def test_logits_of_16_bit_factors_are_not_rounded_to_16_bits_where_the_device_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:  # as CUDA has it
        assert a.dtype == b.dtype == torch.bfloat16
        return a.to(out_dtype) @ b.to(out_dtype)

    monkeypatch.setattr("loramox.model.head.multiplies_into_fp32", lambda hidden: hidden.dtype == torch.bfloat16)
    monkeypatch.setattr(torch, "mm", product)
    model, hidden = bias_free(torch.bfloat16), states(5, torch.bfloat16, 0)
    exact = hidden.detach().float().requires_grad_()
    expected = exact @ model.output.weight.float().T
    logits = Head(model)(hidden)
    assert torch.allclose(logits, expected, rtol=1e-6)
    assert not torch.equal(logits, logits.bfloat16().float())
    weights = torch.arange(logits.numel()).reshape(logits.shape) % 7 - 3.0
    (gradient,) = torch.autograd.grad((logits * weights).sum(), hidden)
    (by_hand,) = torch.autograd.grad((expected * weights).sum(), exact)
    assert gradient.dtype == torch.bfloat16
    assert torch.allclose(gradient.float(), by_hand, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_takes_the_product_of_the_head(dtype: torch.dtype) -> None:
    """Tensors without contents that say they are on one: torch checks types and shapes as it would there."""
    with FakeTensorMode(), torch.no_grad():
        hidden, weight = (torch.empty(rows, HIDDEN, dtype=dtype, device="cuda") for rows in (5, VOCABULARY))
        logits = _Fp32Product.apply(hidden, weight)
        assert multiplies_into_fp32(hidden) == (torch.version.hip is None)
        assert not multiplies_into_fp32(hidden.float())
    assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", torch.float32, (5, VOCABULARY))
    assert not multiplies_into_fp32(torch.empty(5, HIDDEN, dtype=dtype))


def test_no_answer_token_gives_no_value_and_no_gradient() -> None:
    model, hidden = Output(torch.float32), states(0, torch.float32, 0)
    values, *gradients = value_and_gradients(model, [hidden], torch.zeros(0, dtype=torch.long), function=cross_entropy)
    assert values.shape == (0,)
    assert all((g == 0).all() for g in gradients)


def test_logits_are_fp32_whatever_the_models_type_and_the_head_is_no_child_of_its_own() -> None:
    head = Head(Output(torch.bfloat16))
    assert head(states(2, torch.float32, 0)).dtype == torch.float32
    assert list(head.parameters()) == []


def test_mean_over_rows_is_the_mean_of_each_rows_own_tokens_by_hand() -> None:
    at = AnswerStates(torch.empty(5, 0), torch.empty(5), row_of=torch.tensor([0, 0, 0, 2, 2]), rows=3)
    means = mean_over_rows(torch.tensor([1.0, 2.0, 6.0, 10.0, 20.0]), at)
    assert means[[0, 2]].tolist() == [3.0, 15.0]
    # A row without an answer has no mean: not 0, which would pass for a row known by heart.
    assert means[1].isnan()


def batch(lengths: list[int], answers: list[int], width: int, vocabulary: int = 320) -> dict[str, Any]:
    """Rows of random tokens, padded on the right to `width`; the last `answers` tokens of each are its answer."""
    random = torch.Generator().manual_seed(0)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, (length, answer) in enumerate(zip(lengths, answers, strict=True)):
        ids[row, :length] = torch.randint(2, vocabulary, (length,), generator=random)
        labels[row, length - answer : length] = ids[row, length - answer : length]
        mask[row, :length] = 1
    answers_at = [answer_positions({"labels": row}) for row in labels.tolist()]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "answers": answers_at}


def gemma2() -> nn.Module:
    """A pico Gemma 2, whose logits pass through a soft cap, low enough here to be felt."""
    config = AutoConfig.for_model(
        "gemma2",
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        hidden_size=64,
        intermediate_size=128,
        vocab_size=320,
        max_position_embeddings=128,
        final_logit_softcapping=0.5,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def by_the_model(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """log p of each answer token from the logits of the whole batch, as transformers computes a loss."""
    with torch.no_grad():
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()
    labels = inputs["labels"][:, 1:]
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return -losses[labels != IGNORED]


def by_the_head(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, AnswerStates]:
    with torch.no_grad():
        found = answer_states(model, model, inputs)
        return per_token(log_prob, Head(model), [found.hidden], found.targets), found


def opt() -> nn.Module:
    """A pico OPT, whose forward pass does not call its base model."""
    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 128,
    }
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model("opt", **sizes, vocab_size=320, max_position_embeddings=128)
    )


@pytest.mark.parametrize("kind", [*SHAPES, "gemma2", "opt"])
def test_the_head_gives_the_log_probabilities_of_the_models_own_logits(pico: Callable[[str], Path], kind: str) -> None:
    more = {"gemma2": gemma2, "opt": opt}
    model = more[kind]() if kind in more else AutoModelForCausalLM.from_pretrained(pico(kind))
    model.eval()
    output = model.get_output_embeddings()
    output.weight.data *= 20  # random weights give logits near 0, where a soft cap does nothing
    if output.bias is not None:
        output.bias.data.normal_()
    inputs = batch([9, 6, 2], [4, 5, 1], width=9)
    found, at = by_the_head(model, inputs)
    assert torch.allclose(found, by_the_model(model, inputs), rtol=1e-5, atol=1e-5)
    assert at.row_of.tolist() == [0] * 4 + [1] * 5 + [2]
    assert at.targets.tolist() == inputs["labels"][inputs["labels"] != IGNORED].tolist()


def test_some_architecture_in_these_tests_has_a_bias_in_its_head(pico: Callable[[str], Path]) -> None:
    assert AutoModelForCausalLM.from_pretrained(pico("phi")).get_output_embeddings().bias is not None


def test_the_hook_is_gone_after_the_pass_even_when_it_fails(pico: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    inputs = batch([5], [2], width=5)
    answer_states(model, model, inputs)
    with pytest.raises(IndexError):
        answer_states(model, model, inputs | {"input_ids": inputs["input_ids"] + 10_000})
    assert not model.base_model._forward_hooks


@pytest.mark.parametrize("kind", SHAPES)
def test_padding_never_changes_a_rows_loss(pico: Callable[[str], Path], kind: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico(kind)).eval()
    losses = []
    for width in (9, 10, 30):
        values, at = by_the_head(model, batch([9, 6, 3], [4, 3, 2], width))
        losses.append(mean_over_rows(values, at))
    alone, at = by_the_head(model, batch([9], [4], width=9))
    assert torch.allclose(losses[1], losses[0], atol=1e-5)
    assert torch.allclose(losses[2], losses[0], atol=1e-5)
    assert torch.allclose(mean_over_rows(alone, at), losses[0][:1], atol=1e-5)


def test_a_first_token_is_never_an_answer_as_nothing_predicts_it(pico: Callable[[str], Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico("llama"))
    _, at = by_the_head(model, batch([4], [4], width=4))
    assert len(at.targets) == 3


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("cohere", "logit_scale", 0.0625),
        ("granite", "logits_scaling", 8.0),
        ("recurrent_gemma", "logits_soft_cap", 30.0),
        ("xlstm", "output_logit_soft_cap", 30.0),
    ],
)
def test_an_architecture_that_changes_its_logits_otherwise_is_refused_by_name(
    kind: str, field: str, value: float
) -> None:
    # The config is the architecture's own, so that a renamed field would show here.
    config = AutoConfig.for_model(kind)
    assert hasattr(config, field)
    model = Output(torch.float32)
    model.config = AutoConfig.for_model(kind, **{field: value})
    with pytest.raises(ModelError, match=rf"Output changes its logits.*{field} in config.json.*Use an architecture"):
        Head(model)


def test_weights_between_the_layers_and_the_output_layer_are_refused_by_name() -> None:
    """Hidden states are given to the output layer as they are: ModernBERT has a dense layer and a norm before it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("modernbert-decoder", num_hidden_layers=1))
    with pytest.raises(
        ModelError, match=r"between its layers and its output layer \(lm_head\.dense\.weight.*Use an architecture"
    ):
        Head(model)


def test_a_scale_of_one_is_no_reason_to_refuse() -> None:
    model = Output(torch.float32)
    model.config = AutoConfig.for_model("granite", logits_scaling=1.0)
    Head(model)


@pytest.mark.parametrize(
    "change",
    [lambda logits: 2 * logits, lambda logits: torch.tanh(logits), lambda logits: logits.roll(1, -1)],
    ids=["scaled", "capped", "permuted"],
)
def test_logits_that_the_head_does_not_make_are_refused_in_the_first_pass_whatever_their_reason(
    pico: Callable[[str], Path], change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As remote code may do, and architectures of tomorrow."""
    model, inputs = AutoModelForCausalLM.from_pretrained(pico("llama")), batch([5], [2], width=5)
    model.lm_head.weight.data *= 20
    own = type(model).forward

    def changed(self: nn.Module, *args, **kwargs) -> SimpleNamespace:
        return SimpleNamespace(logits=change(own(self, *args, **kwargs).logits))

    monkeypatch.setattr(type(model), "forward", changed)
    with pytest.raises(
        ModelError, match=r"LlamaForCausalLM makes other logits of its last hidden states.*Use an architecture"
    ):
        answer_states(model, model, inputs)


def test_logits_are_compared_once_a_model(pico: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr("loramox.model.head._compare", lambda *_: compared.append(1))
    model, inputs = AutoModelForCausalLM.from_pretrained(pico("llama")), batch([5], [2], width=5)
    for _ in range(2):
        answer_states(model, model, inputs)
    assert compared == [1]
