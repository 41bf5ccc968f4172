"""`efficientllm-report`: results of several devices on one page."""

from __future__ import annotations

import dataclasses
import html
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import CHROMIUM, chromium

from efficientllm.devices import report_cli, report_page
from efficientllm.devices.results import BenchOptions, DeviceInfo, Measurement, Run, summarize
from efficientllm.runtime.base.command import run_command

PI = DeviceInfo("ssh://pi", "Linux 6.6", "aarch64", "Cortex-A76", 4, 8_000_000_000, board="Raspberry Pi 5")
LAPTOP = DeviceInfo("local", "Linux 6.1", "x86_64", "A <fast> processor", 2, 0)


def result(name: str, decode: list[float], size: int, kl: float | None, joules: list[float] | None = None) -> Any:
    manifest: dict[str, Any] = {}
    if name.startswith("pruned"):
        manifest["training"] = {"quality": {"texts": {"all texts": {"ratio": 1.5}}}}
    if kl is not None:
        manifest["verification"] = {"exact": {"mean_kl": 0.0}, "quantized": {"mean_kl": kl}}
    measured = Measurement(
        speeds={"pp128": [800.0], "tg64@d512": [1.0], "tg64": decode}, threads=2, joules_per_token=joules
    )
    return summarize(name, "0" * 64, "llama.cpp", size, manifest, [measured])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs as efficientllm-bench writes them, in a folder of their own."""
    (tmp_path / "json").mkdir()
    slow = result("source-q8_0", [100.0, 110.0, 120.0], 145_000_000, 0.001)
    fast = result("pruned-q8_0", [150.0, 165.0, 180.0], 123_000_000, 0.002, joules=[0.4])
    unknown = result("foreign.gguf", [9.0], 90_000_000, None)
    Run(LAPTOP, BenchOptions(), [slow, fast], "2026-11-01T10:00:00+00:00", "0.1.0").write(tmp_path / "json/laptop.json")
    Run(PI, BenchOptions(), [unknown]).write(tmp_path / "json/pi.json")
    return tmp_path


def page_of(folder: Path) -> str:
    results = [str(folder / "json" / name) for name in ("laptop.json", "pi.json")]
    assert run_command(report_cli.body, [*results, "--html", str(folder / "page.html")]) == 0
    return (folder / "page.html").read_text()


def test_the_terminal_shows_every_artefact_and_the_headline(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page_of(folder)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("source-q8_0", "pruned-q8_0", "foreign.gguf", "Raspberry Pi 5"))
    headline = (
        "pruned-q8_0 decodes 165 tokens a second on A <fast> processor, 123.0 MB: 1.50 times as fast as source-q8_0"
    )
    cost = (
        "The cost: its checkpoint has 1.50 times the perplexity of its source and the file has a mean KL of 0.002 from "
        "its checkpoint."
    )
    assert f"{headline}, at 0.85 of its bytes. {cost}" in printed


def test_the_page_is_whole_in_itself_and_links_to_the_json(folder: Path) -> None:
    page = page_of(folder)
    assert "A &lt;fast&gt; processor" in page
    assert "<fast>" not in page
    links = set(re.findall(r'href="([^"]+)"', page))
    assert links == {"json/laptop.json", "json/pi.json"}
    assert all((folder / link).is_file() for link in links)
    assert ">first token ms</button>" not in page  # no run has a value
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", page)


def test_energy_quality_and_date_have_their_columns(folder: Path) -> None:
    page_of(folder)
    runs = [(Run.read(folder / "json" / name), Path(name)) for name in ("laptop.json", "pi.json")]
    rows = [report_page.cells(each) for each in report_page.entries(runs)]
    source, pruned, foreign = rows
    assert source["J/token"].text == "-"
    assert source["J/token"].order is None
    assert (pruned["J/token"].text, pruned["J/token"].spread) == ("0.40", "")
    assert (pruned["decode t/s"].text, pruned["decode t/s"].spread) == ("165", "158-172")
    assert pruned["mean KL"].order == 0.002
    assert source["nats lost"].order == 0.001  # nothing but its file
    assert pruned["nats lost"].order == pytest.approx(math.log(1.5) + 0.002)
    assert foreign["nats lost"].text == "-"
    assert source["decode t/s"].order == 110.0
    assert (source["measured"].text, foreign["measured"].text) == ("2026-11-01", "-")


def test_no_emulator_makes_the_headline(folder: Path) -> None:
    emulated = dataclasses.replace(PI, emulated=True, virtual="qemu-user")
    quick = result("quick", [999.0], 1_000, 0.0)
    found = report_page.entries([(Run(emulated, BenchOptions(), [quick]), None)])
    assert report_page.headline(found) == "No decode speed of a real device."
    assert found[0].device == "EMULATED Raspberry Pi 5"


def test_what_is_no_result_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "other.json").write_text("{}")
    assert run_command(report_cli.body, [str(folder / "other.json")]) == 2
    assert "is not a result of efficientllm-bench" in capsys.readouterr().err


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
def test_a_damaged_result_is_one_line(folder: Path, place: str, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "json" / "laptop.json"
    values = json.loads(path.read_text())
    *parents, last = (int(part) if part.isdigit() else part for part in place.split("."))
    inner = values
    for part in parents:
        inner = inner[part]
    inner[last] = value
    path.write_text(json.dumps(values))
    assert run_command(report_cli.body, [str(path), "--html", str(folder / "page.html")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {path} is damaged (")


@pytest.mark.parametrize("manifest", [{"verification": []}, {"training": [1]}, {"verification": {"quantized": [1]}}])
def test_a_manifest_of_another_kind_tells_nothing(folder: Path, manifest: dict[str, Any]) -> None:
    path = folder / "json" / "laptop.json"
    values = json.loads(path.read_text())
    values["results"][0]["manifest"] = manifest
    path.write_text(json.dumps(values))
    assert "pruned-q8_0 decodes 165" in html.unescape(page_of(folder))


def test_what_cannot_be_read_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "deep.json"
    path.write_text("[" * 100_000)
    assert run_command(report_cli.body, [str(path)]) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err


def test_a_page_does_not_take_the_place_of_what_it_is_drawn_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "json" / "laptop.json"
    before = path.read_bytes()
    assert run_command(report_cli.body, [str(path), "--html", str(path)]) == 2
    assert "which is read; name another file" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_a_page_replaces_nothing_but_a_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_path, page, mine = folder / "json" / "laptop.json", folder / "twice.html", folder / "mine.html"
    for _ in range(2):
        assert run_command(report_cli.body, [str(json_path), "--html", str(page)]) == 0
    mine.write_text("<html>precious</html>")
    capsys.readouterr()
    assert run_command(report_cli.body, [str(json_path), "--html", str(mine)]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: --html {mine} was not written by this command; name another file\n"
    assert not shown.out
    assert mine.read_text() == "<html>precious</html>"


def test_a_folder_that_cannot_be_written_is_named_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(report_cli.body, [str(folder / "json" / "laptop.json"), "--html", "/proc/x.html"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: --html /proc/x.html: /proc cannot be written; name a file elsewhere\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with chromium() as browser:
        yield browser


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_the_table_sorts_and_fits(folder: Path, browser: Any, width: int, scheme: str) -> None:
    page_of(folder)
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto((folder / "page.html").as_uri())

    def order() -> list[str]:
        return [html.unescape(text) for text in page.locator("#results tbody td:first-child").all_text_contents()]

    page.click("th:has-text('decode t/s') button")
    assert order() == ["pruned-q8_0", "source-q8_0", "foreign.gguf"]
    page.click("th:has-text('decode t/s') button")
    assert order() == ["foreign.gguf", "source-q8_0", "pruned-q8_0"]
    page.click("th:has-text('J/token') button")
    assert order()[0] == "pruned-q8_0"  # what is not known comes last
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    context.close()
