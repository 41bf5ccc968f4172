"""Start a real Home Assistant whose conversation agent is a served model, with the virtual devices of its demo.

    build/home-assistant/bin/python research/home/host.py serve --url http://127.0.0.1:8000 --model home
    build/home-assistant/bin/python research/home/host.py ask --url http://127.0.0.1:8000 "Turn on the kitchen lights"
    build/home-assistant/bin/python research/home/host.py record research/home/assist.json

`serve` prints the address and runs until it is interrupted. `ask` sends requests and prints the answers and the states
that changed. `record` writes what Home Assistant sends to a model: its prompt, its tools and its results. The module
runs in the environment of Home Assistant (`make home-assistant`), with its aiohttp.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

START_SECONDS = 300
"""Home Assistant installs the packages of its integrations at the first start."""

USER = {"name": "Home", "username": "home", "password": "home", "language": "en"}

CONFIGURATION = """
homeassistant:
  name: Home
  unit_system: metric
api:
assist_pipeline:
config:
conversation:
frontend:
http:
  server_host: 127.0.0.1
  server_port: {port}
demo:
kitchen_sink:
input_boolean:
  guest_mode:
    name: Guest Mode
script:
  good_night:
    alias: Good Night
    sequence: []
scene:
  - name: Movie Time
    entities: {{}}
logger:
  default: warning
"""

DEMOS = ("demo", "kitchen_sink")
"""Integrations with virtual devices."""

EXPOSED = ("button", "calendar", "lawn_mower", "lock", "script", "siren", "valve")
"""Domains whose entities a user must expose to Assist by hand."""

AREAS = {
    "Kitchen": ("light.kitchen_lights", "cover.kitchen_window", "lock.kitchen_door"),
    "Bedroom": ("light.bed_light", "media_player.bedroom"),
    "Living Room": ("light.ceiling_lights", "fan.living_room_fan", "cover.living_room_window", "climate.ecobee"),
}
"""{area: entities of the demo in it}. Those that a release lacks are left out."""


@dataclass(frozen=True)
class Answer:
    """Answer of Home Assistant to a request, with the states that changed."""

    speech: str
    conversation_id: str
    changed: dict[str, tuple[str, str]]
    """{entity: states before and after}."""


async def wait_until(look: Callable[[], Awaitable[Any]], failure: str) -> Any:
    """Return the first true result of `look`. Raises RuntimeError with the text of the failure after START_SECONDS."""
    for _ in range(START_SECONDS * 2):
        if found := await look():
            return found
        await asyncio.sleep(0.5)
    raise RuntimeError(f"{failure} within {START_SECONDS} s")


class Home:
    """A running Home Assistant, used through its own HTTP and websocket API."""

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self.session, self.address = session, address
        self.agent = "conversation.home_assistant"
        self._headers: dict[str, str] = {}
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._number = 0

    async def post(self, path: str, body: Any = None, **options: Any) -> Any:
        """Return the JSON answer of a POST request. Raises RuntimeError with Home Assistant's text."""
        async with self.session.post(self.address + path, json=body, headers=self._headers, **options) as answer:
            if answer.status >= 400:
                raise RuntimeError(f"{path}: {answer.status} {await answer.text()}")
            return await answer.json()

    async def send(self, kind: str, **values: Any) -> Any:
        """Return the result of a websocket command."""
        assert self._socket is not None
        self._number += 1
        await self._socket.send_json({"id": self._number, "type": kind, **values})
        while True:
            answer = await self._socket.receive_json()
            if answer.get("id") == self._number and answer["type"] == "result":
                if not answer["success"]:
                    raise RuntimeError(f"{kind}: {answer['error']['message']}")
                return answer["result"]

    async def answers(self, process: subprocess.Popen[bytes]) -> bool:
        """Return whether it can be used. Raises RuntimeError if its process ended."""
        if process.poll() is not None:
            raise RuntimeError(f"Home Assistant ended with exit code {process.returncode}")
        with contextlib.suppress(aiohttp.ClientError):
            async with self.session.get(f"{self.address}/api/onboarding") as answer:
                return answer.status == 200
        return False

    async def sign_in(self) -> None:
        """Create the only user, sign in, and finish the steps of the first start."""
        client = {"client_id": f"{self.address}/"}
        code = (await self.post("/api/onboarding/users", {**USER, **client}))["auth_code"]
        form = {"grant_type": "authorization_code", "code": code, **client}
        async with self.session.post(f"{self.address}/auth/token", data=form) as answer:
            token = (await answer.json())["access_token"]
        self._headers = {"Authorization": f"Bearer {token}"}
        for step in ("core_config", "analytics"):
            await self.post(f"/api/onboarding/{step}", {})
        await self.post("/api/onboarding/integration", {**client, "redirect_uri": client["client_id"]})
        self._socket = await self.session.ws_connect(f"{self.address}/api/websocket", max_msg_size=0)
        await self._socket.receive_json()
        await self._socket.send_json({"type": "auth", "access_token": token})
        assert (await self._socket.receive_json())["type"] == "auth_ok"

    async def has_its_demos(self) -> bool:
        """Return whether all entities are there. Raises RuntimeError if a demo failed, until the next start."""
        states = {entry["domain"]: entry["state"] for entry in await self.send("config_entries/get")}
        if (await self.send("get_config"))["state"] != "RUNNING":
            return False
        if "setup_error" in [states.get(domain) for domain in DEMOS]:
            raise RuntimeError("Home Assistant could not load its demo; start it again")
        return all(states.get(domain) == "loaded" for domain in DEMOS)

    async def arrange(self) -> None:
        """Put the demo's entities into the areas of the first start, and expose all kinds to Assist."""
        await wait_until(self.has_its_demos, "Home Assistant's demo did not load")  # on a busy machine, it loads last
        known = {entry["entity_id"] for entry in await self.send("config/entity_registry/list")}
        areas = {area["name"]: area["area_id"] for area in await self.send("config/area_registry/list")}
        for name, entities in AREAS.items():
            for entity in known.intersection(entities):
                await self.send("config/entity_registry/update", entity_id=entity, area_id=areas[name])
        hidden = [name for name in await self.states() if name.startswith(tuple(f"{each}." for each in EXPOSED))]
        await self.send(
            "homeassistant/expose_entity", assistants=["conversation"], entity_ids=hidden, should_expose=True
        )

    async def use_model(self, url: str, model: str) -> None:
        """Add the Ollama integration and a conversation agent that may control the home, and make it the default."""
        flow = await self.post("/api/config/config_entries/flow", {"handler": "ollama"})
        made = await self.post(f"/api/config/config_entries/flow/{flow['flow_id']}", {"url": url})
        if made["type"] != "create_entry":
            raise RuntimeError(f"Home Assistant cannot use {url}: {made.get('errors')}")
        path = "/api/config/config_entries/subentries/flow"
        flow = await self.post(path, {"handler": [made["result"]["entry_id"], "conversation"]})
        async with self.session.get(f"{url}/api/tags") as answer:
            listed = [each["model"] for each in (await answer.json())["models"]]
        model = next((name for name in listed if name.partition(":")[0] == model), model)
        options = {"name": "Model", "model": model, "llm_hass_api": ["assist"], "num_ctx": 8192}
        made = await self.post(f"{path}/{flow['flow_id']}", options)
        if made["type"] != "create_entry":
            raise RuntimeError(f"Home Assistant cannot use the model {model}: {made.get('reason', made.get('errors'))}")

        async def others() -> list[str]:
            agents = (await self.send("conversation/agent/list"))["agents"]
            return [agent["id"] for agent in agents if agent["id"] != self.agent]

        (self.agent,) = await wait_until(others, "Home Assistant shows no conversation agent of the model")
        pipeline = (await self.send("assist_pipeline/pipeline/list"))["pipelines"][0]
        changed = {**pipeline, "pipeline_id": pipeline["id"], "conversation_engine": self.agent}
        changed.pop("id")
        await self.send("assist_pipeline/pipeline/update", **changed)

    async def states(self) -> dict[str, str]:
        """Return the state of every entity, with the attributes that a request changes."""
        shown = ("brightness", "current_position", "percentage", "temperature", "volume_level", "rgb_color")
        found = {}
        for each in await self.send("get_states"):
            values = [
                f"{name} {each['attributes'][name]}" for name in shown if each["attributes"].get(name) is not None
            ]
            found[each["entity_id"]] = ", ".join([each["state"], *values])
        return found

    async def say(self, text: str, conversation_id: str | None = None) -> Answer:
        """Send a request to the agent and return its answer with the states that changed."""
        before = await self.states()
        body = {"text": text, "agent_id": self.agent, "language": "en"}
        if conversation_id is not None:
            body["conversation_id"] = conversation_id
        answer = await self.post("/api/conversation/process", body)
        after = await self.states()
        ignored = ("binary_sensor.", "conversation.", "event.", "image_processing.", "sensor.")
        changed = {
            name: (before.get(name, ""), state)
            for name, state in after.items()
            if before.get(name) != state and not name.startswith(ignored)
        }
        return Answer(answer["response"]["speech"]["plain"]["speech"], answer["conversation_id"], changed)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.asynccontextmanager
async def running_home(port: int = 0, log: Path | None = None) -> AsyncIterator[Home]:
    """Start Home Assistant with the demo's devices in a temporary folder, and stop it at the end.

    `log` gets what it prints. Raises RuntimeError if it does not start.
    """
    port = port or free_port()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "configuration.yaml").write_text(CONFIGURATION.format(port=port), encoding="utf-8")
        output = log.open("wb") if log else subprocess.DEVNULL
        process = subprocess.Popen(
            [sys.executable, "-m", "homeassistant", "--config", folder], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            async with aiohttp.ClientSession() as session:
                home = Home(session, f"http://127.0.0.1:{port}")
                await wait_until(lambda: home.answers(process), "Home Assistant did not start")
                await home.sign_in()
                await home.arrange()
                yield home
        finally:
            process.terminate()
            process.wait()


async def serve(url: str, model: str, port: int) -> None:
    """Run until Ctrl-C or SIGTERM."""
    async with running_home(port) as home:
        await home.use_model(url, model)
        print(f"Home Assistant: {home.address} (user {USER['username']}, password {USER['password']})", flush=True)
        print("Open it, choose Assist, and type a request. Ctrl-C ends it.", flush=True)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        await ended.wait()


async def ask(url: str, model: str, requests: Sequence[str]) -> None:
    """Send requests of one conversation and print the answers and the changed states."""
    async with running_home() as home:
        await home.use_model(url, model)
        conversation = None
        for request in requests:
            answer = await home.say(request, conversation)
            conversation = answer.conversation_id
            print(f"{request}\n  {answer.speech}")
            for entity, (before, after) in answer.changed.items():
                print(f"  {entity}: {before} -> {after}")


class Recorder:
    """Answers as an Ollama server with the calls that it is given, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.calls: list[dict[str, Any]] = []

    async def list_models(self, _: web.Request) -> web.Response:
        return web.json_response({"models": [{"model": "recorder", "name": "recorder"}]})

    async def chat(self, request: web.Request) -> web.Response:
        self.requests.append(await request.json())
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if self.calls:
            message["tool_calls"] = [{"function": self.calls.pop(0)}]
        else:
            message["content"] = "Done."
        answer = {"model": "recorder", "created_at": "2026-01-01T00:00:00Z", "message": message}
        return web.json_response({**answer, "done": True, "done_reason": "stop"})

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/api/tags", self.list_models)
        app.router.add_post("/api/chat", self.chat)
        return app


RECORDED_CALLS: Sequence[tuple[str, dict[str, Any]]] = (
    ("HassTurnOn", {"name": "Kitchen Lights", "domain": ["light"]}),
    ("HassTurnOn", {"name": "Nothing"}),
    ("HassTurnOn", {"name": "Kitchen Lights", "domain": ["lock"]}),
    ("HassSetVolume", {"volume_level": 1000, "name": "Bedroom"}),
    ("HassListAddItem", {"item": "milk", "name": "No List"}),
    ("GetDateTime", {}),
    ("GetLiveContext", {}),
)
"""Calls whose results are recorded."""


async def record(path: Path) -> None:
    """Write version, prompt, tools and results of calls as JSON."""
    recorder = Recorder()
    runner = web.AppRunner(recorder.app())
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    results = []
    async with running_home() as home:
        await home.use_model(f"http://127.0.0.1:{port}", "recorder")
        version = (await home.send("get_config"))["version"]
        for name, arguments in RECORDED_CALLS:
            recorder.calls = [{"name": name, "arguments": arguments}]
            await home.say("Turn on the kitchen lights")
            result = recorder.requests[-1]["messages"][-1]
            assert result["role"] == "tool", result
            results.append({"name": name, "arguments": arguments, "content": result["content"]})
    await runner.cleanup()
    first = recorder.requests[0]
    found = {"version": version, "prompt": first["messages"][0]["content"], "tools": first["tools"], "results": results}
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Home Assistant {version}: {len(first['tools'])} tools")


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description="Start a real Home Assistant with virtual devices.")
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve", help="run it until Ctrl-C")
    asking = commands.add_parser("ask", help="send requests and print what changed")
    recording = commands.add_parser("record", help="write what Home Assistant sends to a model")
    for each in (serving, asking):
        each.add_argument("--url", default="http://127.0.0.1:8000", help="address of the model's server [%(default)s]")
        each.add_argument("--model", default="home", help="name of the model there [%(default)s]")
    serving.add_argument("--port", type=int, default=8123, help="port of Home Assistant [8123]")
    asking.add_argument("requests", nargs="+")
    recording.add_argument("path", type=Path)
    options = vars(parser.parse_args())
    command = {"serve": serve, "ask": ask, "record": record}[options.pop("command")]
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(command(**options))


if __name__ == "__main__":
    main()
