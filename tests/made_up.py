"""A device whose measurements the test makes up."""

from __future__ import annotations

from typing import Any

from efficientllm.devices.results import BenchOptions, DeviceInfo, Measurement
from efficientllm.runtime.base.errors import DeviceError
from efficientllm.runtime.engines.artefact import Artefact

LAPTOP = DeviceInfo("local", "Linux 6", "x86_64", "a CPU", 2, 8_000_000_000)


class FakeDevice:
    """Gives measurements made up by the test, and drops out where it is told to."""

    def __init__(self, *measurements: Measurement | None) -> None:
        self.measurements, self.temperatures = list(measurements), [50.0, 40.0, 36.0]

    def describe(self) -> DeviceInfo:
        return LAPTOP

    def prepare(self, artefacts: list[Artefact], options: BenchOptions) -> None:
        pass

    def temperature_celsius(self) -> float | None:
        return self.temperatures.pop(0) if self.temperatures else None

    def measure(self, artefact: Artefact, options: BenchOptions) -> Measurement:
        measurement = self.measurements.pop(0)
        if measurement is None:
            raise DeviceError("gone")
        return measurement

    def close(self) -> None:
        pass


def speed(value: float, **more: Any) -> Measurement:
    return Measurement({"tg4": [value, value + 1, value + 2]}, peak_rss_bytes=1000, **more)
