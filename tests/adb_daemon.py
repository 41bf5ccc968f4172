"""A phone for the real adb client: speaks adb's transport protocol on loopback, runs what is pushed under qemu-user.

The protocol is that of AOSP's packages/modules/adb (protocol.txt, SYNC.TXT, shell_protocol.h): messages of six 32-bit
words and a payload; streams opened by service name; here `shell,v2,raw:COMMAND` and `sync:`.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import threading
from pathlib import Path

CNXN, AUTH, OPEN, OKAY, CLSE, WRTE = (
    int.from_bytes(name, "little") for name in (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"CLSE", b"WRTE")
)
VERSION, MAX_PAYLOAD = 0x01000001, 64 * 1024
BANNER = b"device::ro.product.name=fake;ro.product.model=Pixel_8;ro.product.device=fake;features=shell_v2,cmd"
STDOUT, STDERR, EXIT = 1, 2, 3
PROPERTIES = {
    "ro.product.manufacturer": "Google",
    "ro.product.model": "Pixel 8",
    "ro.product.cpu.abi": "arm64-v8a",
    "ro.soc.model": "Tensor G3",
    "ro.build.version.release": "16",
}


class AdbDaemon:
    """Listens on a free port; `root` is the phone's /data/local/tmp."""

    def __init__(self, root: Path, authorized: bool = True, **properties: str) -> None:
        self.root, self.authorized = root, authorized
        self.pushed: list[str] = []
        self.corrupt_next = False
        """Whether to flip a byte of the next pushed file."""
        self.interpreter = "qemu-aarch64-static"
        """What runs pushed programs."""
        self.sys = root / ".sys"
        """The phone's /sys."""
        self._commands = root / ".bin"
        self._commands.mkdir(parents=True)
        known = PROPERTIES | properties
        cases = "".join(f"{name}) echo '{value}' ;;\n" for name, value in known.items())
        getprop = self._commands / "getprop"
        getprop.write_text(f'#!/bin/sh\ncase "$1" in\n{cases}*) echo ;;\nesac\n')
        getprop.chmod(0o755)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=Transport(self, connection).serve, daemon=True).start()

    def shell(self, command: str) -> subprocess.CompletedProcess[bytes]:
        """Run a line with the phone's paths in place and aarch64 programs under the emulator."""
        line = command.replace("/data/local/tmp", str(self.root)).replace("/sys/", f"{self.sys}/")
        programs = "|".join(re.escape(path) for path in self.pushed) or "^$"
        line = re.sub(rf"^({programs})(?= )", rf"{self.interpreter} \1", line, flags=re.MULTILINE)
        environment = os.environ | {"PATH": f"{self._commands}:{os.environ['PATH']}"}
        done = subprocess.run(["sh", "-c", line], capture_output=True, check=False, env=environment)
        done.stdout = done.stdout.replace(str(self.sys).encode(), b"/sys")
        return done

    def receive(self, path: str, content: bytes, mode: int) -> None:
        target = self.root / path.removeprefix("/data/local/tmp/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.corrupt_next:
            content, self.corrupt_next = bytes([content[0] ^ 1]) + content[1:], False
        target.write_bytes(content)
        target.chmod(mode & 0o777)
        self.pushed.append(str(target).removesuffix(".part"))


class Transport:
    """One connection of an adb server."""

    def __init__(self, daemon: AdbDaemon, connection: socket.socket) -> None:
        self.daemon, self.connection = daemon, connection
        self.sending = threading.Lock()
        self.streams: dict[int, Stream] = {}

    def serve(self) -> None:
        try:
            while True:
                command, first, second, payload = self._message()
                self._handle(command, first, second, payload)
        except (OSError, EOFError):
            self.connection.close()

    def _handle(self, command: int, first: int, second: int, payload: bytes) -> None:
        if command in (CNXN, AUTH) and not self.daemon.authorized:
            self.send(AUTH, 1, 0, bytes(20))  # a token that no key is accepted for
        elif command == CNXN:
            self.send(CNXN, VERSION, MAX_PAYLOAD, BANNER)
        elif command == OPEN:
            stream = Stream(self, len(self.streams) + 1, first, payload.rstrip(b"\0").decode())
            self.streams[stream.identity] = stream
            self.send(OKAY, stream.identity, first)
            threading.Thread(target=stream.run, daemon=True).start()
        elif command == WRTE:
            self.send(OKAY, second, first)
            self.streams[second].feed(payload)
        elif command == OKAY:
            self.streams[second].acknowledged.release()
        elif command == CLSE and second in self.streams:
            self.streams[second].feed(None)

    def send(self, command: int, first: int, second: int, payload: bytes = b"") -> None:
        header = struct.pack(
            "<6I", command, first, second, len(payload), sum(payload) & 0xFFFFFFFF, command ^ 0xFFFFFFFF
        )
        with self.sending:
            self.connection.sendall(header + payload)

    def _message(self) -> tuple[int, int, int, bytes]:
        command, first, second, length, _, _ = struct.unpack("<6I", self._exactly(24))
        return command, first, second, self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.connection.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data


class Stream:
    """One open service."""

    def __init__(self, transport: Transport, identity: int, peer: int, service: str) -> None:
        self.transport, self.identity, self.peer, self.service = transport, identity, peer, service
        self.acknowledged = threading.Semaphore(0)
        self._arrived = threading.Condition()
        self._data, self._ended = bytearray(), False

    def feed(self, payload: bytes | None) -> None:
        with self._arrived:
            if payload is None:
                self._ended = True
            else:
                self._data += payload
            self._arrived.notify_all()
        if payload is None:
            self.acknowledged.release()

    def run(self) -> None:
        try:
            if self.service.startswith("shell"):
                self._shell(self.service.partition(":")[2])
            elif self.service == "sync:":
                self._sync()
        except (OSError, EOFError):
            pass
        self.transport.send(CLSE, self.identity, self.peer)

    def _read(self, count: int) -> bytes:
        with self._arrived:
            while len(self._data) < count:
                if self._ended:
                    raise EOFError
                self._arrived.wait()
            data = bytes(self._data[:count])
            del self._data[:count]
        return data

    def _write(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_PAYLOAD):
            self.transport.send(WRTE, self.identity, self.peer, data[start : start + MAX_PAYLOAD])
            self.acknowledged.acquire()

    def _shell(self, command: str) -> None:
        done = self.transport.daemon.shell(command)
        for kind, data in ((STDOUT, done.stdout), (STDERR, done.stderr)):
            if data:
                self._write(struct.pack("<BI", kind, len(data)) + data)
        self._write(struct.pack("<BIB", EXIT, 1, done.returncode & 0xFF))

    def _sync(self) -> None:
        while True:
            request, length = self._read(4), struct.unpack("<I", self._read(4))[0]
            if request == b"QUIT":
                return
            argument = self._read(length).decode()
            if request == b"STAT":
                self._write(b"STAT" + struct.pack("<3I", *self._stat(argument)))
            elif request == b"SEND":
                path, _, mode = argument.rpartition(",")
                content = bytearray()
                while (chunk := self._read(4)) == b"DATA":
                    content += self._read(struct.unpack("<I", self._read(4))[0])
                assert chunk == b"DONE"
                self._read(4)  # modification time
                self.transport.daemon.receive(path, bytes(content), int(mode))
                self._write(b"OKAY" + struct.pack("<I", 0))

    def _stat(self, path: str) -> tuple[int, int, int]:
        target = self.transport.daemon.root / path.removeprefix("/data/local/tmp/")
        if not target.exists():
            return 0, 0, 0
        status = target.stat()
        return status.st_mode, status.st_size, int(status.st_mtime)
