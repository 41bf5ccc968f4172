"""A real Home Assistant sends what the home-control job was made from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from research.home.chats import rendered
from research.home.demo import ENVIRONMENT, HOST
from research.home.homes import RECORDED

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not ENVIRONMENT.exists(), reason="no Home Assistant (make build/home-assistant/.installed)"),
]


def in_order(tools: Any) -> Any:
    """Sort what differs from start to start: the tools themselves, choices and required arguments."""
    ordered = json.loads(
        json.dumps(tools),
        object_hook=lambda each: {**each, **{key: sorted(each.get(key, ())) for key in ("enum", "required")}},
    )
    return sorted(ordered, key=lambda tool: tool["function"]["name"])


def test_home_assistant_sends_the_recorded_requests(tmp_path: Path) -> None:
    path = tmp_path / "assist.json"
    subprocess.run([str(ENVIRONMENT), str(HOST), "record", str(path)], check=True, timeout=400)
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["version"] == RECORDED["version"]
    assert found["prompt"] == RECORDED["prompt"]
    assert in_order(found["tools"]) == in_order(RECORDED["tools"])
    kinds = [
        ["error" if '"error"' in each["content"] else each["name"] for each in run["results"]]
        for run in (found, RECORDED)
    ]
    assert kinds[0] == kinds[1]
    lines = rendered(
        [{"role": "system", "content": found["prompt"]}, {"role": "user", "content": "Turn on the bed light"}]
    )
    assert "= light: Bed Light @ Bedroom\n" in lines
