"""Result files of efficientllm-bench are read whole, or refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_up import LAPTOP

from efficientllm.devices.results import BenchOptions, Measurement, Run, summarize
from efficientllm.runtime.base.errors import UsageError

DAMAGES: list[tuple[str, Any]] = [
    ("results", {}),
    ("options", []),
    ("measured_at", 5),
    ("device.cpu", 5),
    ("device.ram_bytes", "many"),
    ("results.0", []),
    ("results.0.artefact", None),
    ("results.0.manifest", None),
    ("results.0.speeds", []),
    ("results.0.speeds.tg64", "fast"),
    ("results.0.speeds.tg64.median", float("nan")),
    ("results.0.speeds.tg64.median", 0),
    ("results.0.file_bytes", 0),
    ("results.0.file_bytes", "large"),
    ("results.0.num_parameters", -1),
    ("results.0.clock_mhz", [0, 0]),
]


@pytest.mark.parametrize(("place", "value"), DAMAGES, ids=[f"{place} {value}" for place, value in DAMAGES])
def test_reader_refuses_damaged_result_in_one_line(place: str, value: Any, tmp_path: Path) -> None:
    measured = Measurement(speeds={"pp128": [800.0], "tg64": [100.0, 110.0]}, threads=2)
    path = tmp_path / "laptop.json"
    Run(LAPTOP, BenchOptions(), [summarize("m", "0" * 64, "llama.cpp", 100, {}, [measured])]).write(path)
    assert Run.read(path).results[0].speeds["tg64"].median == 105
    values = json.loads(path.read_text())
    *parents, last = (int(part) if part.isdigit() else part for part in place.split("."))
    inner = values
    for part in parents:
        inner = inner[part]
    inner[last] = value
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match=rf"^{path} is damaged \([^\n]*$"):
        Run.read(path)


@pytest.mark.parametrize(("text", "message"), [("{}", "is not a result of"), ("[" * 100_000, "cannot be read as JSON")])
def test_reader_refuses_other_files_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(UsageError, match=message):
        Run.read(tmp_path / "other.json")
