"""Nothing mixes the model's device with the CPU: what a GPU would refuse is refused here, where there is none."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.utils.backend_registration as registration

SCRIPT = Path(__file__).with_name("pretended_device.py")

pytestmark = pytest.mark.skipif(
    not hasattr(registration, "_setup_privateuseone_for_python_backend"),
    reason="needs a torch in which a device can be written in Python",
)


def test_training_and_asking_on_another_device_give_what_they_give_on_the_cpu(
    pico: Callable[[str], Path], rows: tuple[Path, Path], tmp_path: Path
) -> None:
    devices = ("cpu", "pretended")
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, device, pico("llama"), *rows, tmp_path / device / "made.json"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for device in devices
    ]
    for process in started:
        _, said = process.communicate()
        assert process.returncode == 0, said[-3000:]
    here, there = (json.loads((tmp_path / device / "made.json").read_text()) for device in devices)
    assert (here["on"], there["on"]) == (["cpu"], ["pretended"])
    assert len(here["log"]) > 3
    for one, other in zip(here["log"], there["log"], strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-6)
    for one, other in zip(here["records"], there["records"], strict=True):
        assert other["log_p"] == pytest.approx(one["log_p"], rel=1e-4, abs=1e-4)
        assert other["said"] == one["said"]
