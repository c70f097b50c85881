"""One model in several threads and tasks: each gets the answer of its own scale, or a clear error, never another's answer."""

import asyncio
import copy
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from loramox import ForgetSwitch, ReferenceConfig, load_reference
from loramox.adapter import turns
from loramox.errors import AdapterError

IDS = torch.arange(2, 38).reshape(3, 12) * 7 % 320
SCALES = (0.0, 0.5, 1.0, 2.0)


@pytest.fixture
def model(pico: Callable[[str], Path], trained: Path) -> PeftModel:
    base = load_reference(ReferenceConfig(str(pico("llama")), quantization="none"))
    return PeftModel.from_pretrained(base, trained / "forget-adapter").eval()


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads take turns at every chance."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS, **more) -> Tensor:
    return model(input_ids=ids, **more).logits


def said(model: nn.Module, ids: Tensor = IDS, **more) -> Tensor:
    """The scores of four generated tokens."""
    length = {"max_new_tokens": 4, "do_sample": more.pop("do_sample", False), "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), output_scores=True, return_dict_in_generate=True, **length, **more
    )  # fmt: skip
    return torch.stack(made.scores)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in model.modules())


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("ask", [logits, said])
def test_each_of_several_threads_gets_the_answers_of_its_own_scale(ask: Callable, model: PeftModel) -> None:
    switches = ForgetSwitch(model), ForgetSwitch(model)
    expected = {}
    for scale in SCALES:
        with switches[0].at(scale):
            expected[scale] = ask(model)
    expected["plain"] = expected[1.0]
    names = switches[0].rows([True, False, True])
    expected["mixed"] = ask(model, adapter_names=names)
    assert len({float(e.double().sum()) for e in expected.values()}) == len(expected) - 1

    def answer(index: int, how: float | str) -> Tensor:
        if how == "plain":
            return ask(model if index % 2 else model.get_base_model())
        if how == "mixed":
            return ask(model, adapter_names=names)
        with switches[index % 2].at(how):
            return ask(model)

    def answers(index: int) -> list[tuple[float | str, Tensor]]:
        order = [*expected][index:] + [*expected][:index]
        return [(how, answer(index, how)) for _ in range(4) for how in order]

    with ThreadPoolExecutor(6) as pool:
        found = [each for some in pool.map(answers, range(6)) for each in some]
    assert len(found) == 6 * 4 * 6
    assert [how for how, given in found if not torch.equal(given, expected[how])] == []
    assert switches[0].scale == 1


def test_what_one_thread_sets_for_good_waits_for_the_block_of_another_and_then_holds_for_all(model: PeftModel) -> None:
    switch = ForgetSwitch(model)
    with switch.off():
        base = logits(model)
    seen = []

    def other() -> None:
        seen.append(switch.scale)
        switch.off()
        seen.append(switch.scale)

    thread = threading.Thread(target=other)
    with switch.at(0.5):
        thread.start()
        time.sleep(0.1)
        assert seen == []
        assert switch.scale == 0.5
    thread.join(10)
    assert seen == [1, 0]
    assert switch.scale == 0
    assert torch.equal(logits(model), base)


def fail(*_: object) -> None:
    raise torch.OutOfMemoryError("pretended")


@pytest.mark.parametrize("error", ["in forward", "in generate", "out of memory"])
def test_a_mixed_batch_call_that_fails_leaves_no_hook_and_calls_after_it_are_at_their_scale(
    error: str, model: PeftModel
) -> None:
    switch = ForgetSwitch(model)
    on, before = logits(model), hooks(model)
    names = switch.rows([True, False, True])
    if error == "in forward":
        with pytest.raises(ValueError, match="adapter_names"):
            logits(model, IDS[:2], adapter_names=names)
    elif error == "in generate":
        with pytest.raises(ValueError, match="adapter_names"):
            said(model, adapter_names=names, num_return_sequences=2, do_sample=True)
    else:
        broken = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(fail)
        for ask in (logits, said):
            with pytest.raises(torch.OutOfMemoryError, match="pretended"):
                ask(model, adapter_names=names)
        broken.remove()
    assert hooks(model) == before
    assert torch.equal(logits(model), on)
    torch.testing.assert_close(logits(model, IDS[:2]), on[:2])
    assert switch.scale == 1


def test_rows_that_shall_forget_are_refused_while_the_adapter_is_off(model: PeftModel) -> None:
    """PEFT ignores the names then."""
    switch = ForgetSwitch(model)
    with switch.off():
        off = logits(model)
        with pytest.raises(AdapterError, match=r"all adapters are off.*with switch\.on"):
            logits(model, adapter_names=switch.rows([True, False, True]))
        assert torch.equal(logits(model, adapter_names=switch.rows([False] * 3)), off)


def test_tasks_that_would_wait_for_each_other_in_one_thread_are_refused(model: PeftModel) -> None:
    switch = ForgetSwitch(model)

    async def suspended(ready: asyncio.Event, go_on: asyncio.Event) -> Tensor:
        with switch.off():
            ready.set()
            await go_on.wait()
            return logits(model)

    async def main() -> Tensor:
        ready, go_on = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(suspended(ready, go_on))
        await ready.wait()
        for call in (lambda: logits(model), switch.on, lambda: switch.scale, lambda: said(model)):
            with pytest.raises(AdapterError, match=r"another task of this thread.*to_thread"):
                call()
        go_on.set()
        return await task

    base = asyncio.run(main())
    assert switch.scale == 1
    with switch.off():
        assert torch.equal(logits(model), base)


def test_blocks_of_tasks_that_run_in_threads_are_each_at_their_scale(model: PeftModel) -> None:
    switch, expected = ForgetSwitch(model), {}
    for scale in SCALES:
        with switch.at(scale):
            expected[scale] = logits(model)

    def answer(scale: float) -> Tensor:
        with switch.at(scale):
            return logits(model)

    async def main() -> list[Tensor]:
        with switch.at(0.5):  # a thread that is given the block's context is inside of it, and may open another
            inside = await asyncio.to_thread(logits, model)
            nested = await asyncio.gather(*(asyncio.to_thread(answer, scale) for scale in SCALES))
            after = await asyncio.to_thread(logits, model)
        return [inside, *nested, after]

    inside, *nested, after = asyncio.run(main())
    for scale, given in zip((0.5, *SCALES, 0.5), (inside, *nested, after), strict=True):
        assert torch.equal(given, expected[scale])
    assert switch.scale == 1


def test_a_block_that_ends_before_one_inside_of_it_changes_nothing_there_and_the_scale_comes_back(
    model: PeftModel,
) -> None:
    switch, seen = ForgetSwitch(model), []

    async def main() -> None:
        ready, go_on = threading.Event(), threading.Event()

        def inner() -> None:
            with switch.at(2):
                ready.set()
                go_on.wait(10)
                seen.append(switch.scale)

        with switch.at(0.5):
            task = asyncio.create_task(asyncio.to_thread(inner))
            while not ready.is_set():
                await asyncio.sleep(0.01)
        go_on.set()
        await task

    asyncio.run(main())
    assert seen == [2]
    assert switch.scale == 1


def test_what_is_set_for_good_and_kept_in_a_variable_does_not_hold_up_other_threads(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LONG", 0.1)
    switch = ForgetSwitch(model)
    kept = switch.at(0.5)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: switch.scale).result(10) == 0.5
    assert switch.scale == 0.5
    with pytest.raises(AdapterError, match=r"with switch\.at"), kept:
        pass
    assert switch.scale == 0.5


def test_a_long_wait_for_another_thread_is_a_warning_that_names_the_usual_mistake(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "LONG", 0.05)
    switch, expected = ForgetSwitch(model), logits(model)
    with ThreadPoolExecutor(1) as pool:
        with switch.off():
            answer = pool.submit(logits, model)
            with pytest.warns(UserWarning, match="open the block in the thread that calls"):
                time.sleep(0.2)
        assert torch.equal(answer.result(10), expected)


def test_a_stream_whose_steps_run_in_different_threads_ends_its_block(model: PeftModel) -> None:
    switch = ForgetSwitch(model)

    def stream() -> Iterator[float]:
        with switch.at(0.5):
            yield 1
            yield 2

    async def main() -> list[float | None]:
        steps = stream()
        return [await asyncio.to_thread(next, steps, None) for _ in range(3)]

    assert asyncio.run(main()) == [1, 2, None]
    assert switch.scale == 1


def test_a_copy_is_a_model_of_its_own(model: PeftModel) -> None:
    before = type(model), type(model.get_base_model())
    switch = ForgetSwitch(model)
    with switch.off():
        other = copy.deepcopy(model)
        assert (type(other), type(other.get_base_model())) == before
        assert isinstance(model, PeftModel)
        assert type(model.get_base_model()).__name__ == LlamaForCausalLM.__name__
        there = ForgetSwitch(other)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: there.scale).result(10) == 0  # it does not wait for the block here
        there.on()
        assert switch.scale == 0


def test_a_deleted_adapter_is_refused(model: PeftModel) -> None:
    switch = ForgetSwitch(model)
    model.delete_adapter("default")
    for use in (switch.on, lambda: switch.scale):
        with pytest.raises(AdapterError, match="it was deleted"):
            use()
    assert not any("default" in m.lora_A for m in model.modules() if isinstance(m, LoraLayer))
