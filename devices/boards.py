"""Known boards and phones: what the maker says about them, to annotate results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Board:
    """One device as sold."""

    name: str
    soc: str
    cores: str
    ram: str
    """Sizes it is sold with."""


BOARDS = {
    "Raspberry Pi 5": Board("Raspberry Pi 5", "Broadcom BCM2712", "4x Cortex-A76 2.4 GHz", "2/4/8/16 GB"),
    "Raspberry Pi 500": Board("Raspberry Pi 500", "Broadcom BCM2712", "4x Cortex-A76 2.4 GHz", "8 GB"),
    "Raspberry Pi Compute Module 5": Board(
        "Raspberry Pi Compute Module 5", "Broadcom BCM2712", "4x Cortex-A76 2.4 GHz", "2/4/8/16 GB"
    ),
    "Raspberry Pi 4": Board("Raspberry Pi 4 Model B", "Broadcom BCM2711", "4x Cortex-A72 1.5-1.8 GHz", "1/2/4/8 GB"),
    "Raspberry Pi 400": Board("Raspberry Pi 400", "Broadcom BCM2711", "4x Cortex-A72 1.8 GHz", "4 GB"),
    "Raspberry Pi 3": Board("Raspberry Pi 3", "Broadcom BCM2837", "4x Cortex-A53 1.2-1.4 GHz", "1 GB"),
    "Raspberry Pi Zero 2": Board("Raspberry Pi Zero 2 W", "Broadcom RP3A0", "4x Cortex-A53 1.0 GHz", "512 MB"),
    "Orange Pi 5": Board("Orange Pi 5", "Rockchip RK3588S", "4x Cortex-A76 + 4x Cortex-A55", "4/8/16 GB"),
    "Radxa ROCK 5B": Board("Radxa ROCK 5B", "Rockchip RK3588", "4x Cortex-A76 + 4x Cortex-A55", "4/8/16/32 GB"),
    "NVIDIA Jetson Orin Nano": Board("Jetson Orin Nano", "NVIDIA Orin", "6x Cortex-A78AE", "4/8 GB"),
    "Google Pixel 8": Board("Pixel 8", "Google Tensor G3", "1x X3 + 4x A715 + 4x A510", "8 GB"),
    "Google Pixel 8 Pro": Board("Pixel 8 Pro", "Google Tensor G3", "1x X3 + 4x A715 + 4x A510", "12 GB"),
    "Google Pixel 9": Board("Pixel 9", "Google Tensor G4", "1x X4 + 3x A720 + 4x A520", "12 GB"),
    "Google Pixel 7": Board("Pixel 7", "Google Tensor G2", "2x X1 + 2x A78 + 4x A55", "8 GB"),
    "samsung SM-S921": Board("Galaxy S24", "Snapdragon 8 Gen 3 or Exynos 2400", "8 or 10", "8 GB"),
    "samsung SM-S928": Board("Galaxy S24 Ultra", "Snapdragon 8 Gen 3", "1x X4 + 5x A720 + 2x A520", "12 GB"),
    "samsung SM-S911": Board("Galaxy S23", "Snapdragon 8 Gen 2", "1x X3 + 2x A715 + 2x A710 + 3x A510", "8 GB"),
    "samsung SM-A546": Board("Galaxy A54", "Exynos 1380", "4x A78 + 4x A55", "6/8 GB"),
    "OnePlus CPH2581": Board("OnePlus 12", "Snapdragon 8 Gen 3", "1x X4 + 5x A720 + 2x A520", "12/16 GB"),
    "Xiaomi 23127PN0CG": Board("Xiaomi 14", "Snapdragon 8 Gen 3", "1x X4 + 5x A720 + 2x A520", "12/16 GB"),
}
"""What a device's own model text begins with -> what it is."""


def look_up(model: str) -> dict[str, Any]:
    """The entry with the longest key that `model` begins with; {} where there is none."""
    matches = [key for key in BOARDS if model.startswith(key)]
    return asdict(BOARDS[max(matches, key=len)]) if matches else {}
