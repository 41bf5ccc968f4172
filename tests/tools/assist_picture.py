"""Take the picture of docs/home-assistant.md: a conversation with a served model on Home Assistant's own page.

python tests/tools/assist_picture.py build/quickstart/home
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from chromium import chromium

from research.home.client import served
from research.home.demo import ENVIRONMENT, HOST

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "images" / "home-assistant.png"
REQUESTS = (
    "Turn on the bed light",
    "set it to 40 percent",
    "Did I lock the front door?",
    "close the living room window and turn on the ceiling fan",
    "Turn on the sauna heater",
)


def take_picture(page: Any, address: str) -> None:
    """Sign in, open Assist, send the requests, and take the picture."""
    page.goto(f"{address}/?conversation=1")
    page.locator("input[name=username]").fill("home")
    page.locator("input[name=password]").fill("home")
    page.locator("input[name=password]").press("Enter")
    field = page.locator("ha-assist-chat input")
    field.wait_for(timeout=120_000)
    answers = page.locator("ha-assist-chat .message.hass")  # the first one is a greeting
    for number, request in enumerate(REQUESTS, 1):
        field.fill(request)
        field.press("Enter")
        answers.nth(number).get_by_text(".").first.wait_for(timeout=60_000)
    page.screenshot(path=PICTURE)


def main() -> None:
    """Serve the model, start Home Assistant, and take the picture."""
    with served(Path(sys.argv[1])) as client:
        command = [str(ENVIRONMENT), str(HOST), "serve", "--url", client.url, "--port", "8123"]
        home = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert home.stdout is not None
            address = home.stdout.readline().split()[2]
            with chromium() as browser:
                take_picture(browser.new_page(viewport={"width": 900, "height": 820}), address)
        finally:
            home.terminate()
            home.wait()


if __name__ == "__main__":
    main()
