"""A board for the real ssh client: Debian's sshd on loopback, with a home folder and keys of the tests' own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from serving import free_port

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


class Board:
    """`home` is the board's home folder, `client` the ssh command that reaches it as host "board"."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.port = folder, folder / "home", free_port()
        self.home.mkdir()
        for name in ("host", "user"):
            key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
            subprocess.run(key, check=True, capture_output=True)
        cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))  # pip keeps the engine's wheel there
        self.write(
            "sshd_config",
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nPidFile none\nStrictModes no\n"
            f"AuthorizedKeysFile {folder}/user.pub\nPasswordAuthentication no\nUsePAM no\n"
            f"ForceCommand cd {self.home} && HOME={self.home} PIP_CACHE_DIR={cache}/pip "
            'exec sh -c "$SSH_ORIGINAL_COMMAND"\n',
        )
        self.configure(self.port)
        self.client = f"ssh -F {folder}/ssh_config"

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o600)

    def configure(self, port: int, more: str = "") -> None:
        self.write(
            "ssh_config",
            f"Host board\nHostName 127.0.0.1\nPort {port}\nIdentityFile {self.folder}/user\nIdentitiesOnly yes\n"
            f"UserKnownHostsFile {self.folder}/known\nStrictHostKeyChecking accept-new\nLogLevel ERROR\n{more}",
        )

    @property
    def store(self) -> Path:
        return self.home / ".cache/efficientllm-bench"


@contextmanager
def serving(made: Board, command: list[str], seconds: float = 20) -> Iterator[None]:
    """While `command` serves the board, which takes connections within so many seconds."""
    log_file = made.folder / "sshd.log"
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, stderr=log)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                socket.create_connection(("127.0.0.1", made.port), 1).close()
                break
            except OSError:
                assert server.poll() is None, log_file.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield
    finally:
        server.terminate()
        server.wait()


@contextmanager
def board(folder: Path) -> Iterator[Board]:
    made = Board(folder)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    with serving(made, [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]):
        yield made


class DroppingProxy:
    """Forwards connections to `port`; the first is cut after `limit` bytes towards the board, with 0 none."""

    def __init__(self, port: int, limit: int) -> None:
        self._target, self._limit, self.dropped = port, limit, 0
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._open += [near, far]
            limit = 0 if self.dropped else self._limit
            threading.Thread(target=self._forward, args=(near, far, limit), daemon=True).start()
            threading.Thread(target=self._forward, args=(far, near, 0), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, limit: int) -> None:
        count = 0
        try:
            while data := source.recv(4096):
                count += len(data)
                if limit and count > limit:
                    self.dropped += 1
                    break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Cut the connections that are open."""
        self.dropped += 1
        for opened in self._open:
            with suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for opened in (self._listener, *self._open):
            opened.close()
