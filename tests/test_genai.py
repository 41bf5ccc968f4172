"""Stock onnxruntime-genai runs our irregular folders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from exporting import EXACT, TOKENS

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")


LOGITS = """
import json, sys
import numpy as np
import onnxruntime_genai as genai
model, end = genai.Model(sys.argv[1]), 2
rows = []
for prompts in json.loads(sys.argv[2]):
    length = max(map(len, prompts))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length + 1, batch_size=len(prompts))
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt + [end] * (length - len(prompt)) for prompt in prompts], np.int32))
    rows.append(np.array(generator.get_logits()).reshape(len(prompts), -1)[-1].tolist())
print(json.dumps(rows))
"""


def test_stock_genai_takes_a_batch_of_unequal_prompts(exported: Callable[..., Path]) -> None:
    """The second prompt of a padded batch has the logits that it has alone."""
    batches = [[TOKENS, TOKENS[:9]], [TOKENS[:9]]]
    command = [sys.executable, "-c", LOGITS, str(exported("onnx", *EXACT[:2])), json.dumps(batches)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    padded, alone = np.array(json.loads(done.stdout.splitlines()[-1]))
    assert np.abs(padded - alone).max() < 1e-4
