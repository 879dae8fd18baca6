"""The documented recipe with TRL's own trainers: plain and streamed, with LoRA and without."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

for name in ("trl", "peft"):
    if importlib.util.find_spec(name) is None:  # looked for, not imported: only the recipe's own process needs them
        pytest.skip(f"needs {name}: pip install 'undertow[trl]'", allow_module_level=True)


@pytest.mark.slow
def test_trls_trainers_train_alike_when_streamed(tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "undertow.examples.trl_recipes"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    lines = done.stdout.splitlines()
    assert lines[-1] == "the same"
    for trainer in ("SFT", "DPO", "GRPO"):
        for adapters in ("", "LoRA"):
            assert any(line.startswith(trainer) and adapters in line for line in lines), (trainer, adapters, lines)
