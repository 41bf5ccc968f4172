"""A 64-bit ARM board on this machine: the sshd of a Debian for arm64, every program of it run by qemu-user."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from board import Board, serving

ROOT = os.environ.get("EFFICIENTLLM_ARM64_ROOT", "")
"""What `make arm64-root` writes; `make test-arm64` says where. Entering it takes root's rights."""

ENTER = """mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" &&
exec chroot "$1" /usr/sbin/sshd -D -e -f /board/sshd_config"""
"""In a mount namespace of its own, so that nothing stays mounted."""


@contextmanager
def arm64_board(folder: Path) -> Iterator[Board]:
    """`home` is /root in the other Debian; the ssh command of `client` reaches it as host "board"."""
    made, root = Board(folder), Path(ROOT)
    made.home = root / "root"
    shutil.rmtree(made.store, ignore_errors=True)
    inside = root / "board"
    shutil.rmtree(inside, ignore_errors=True)
    inside.mkdir(mode=0o700)
    (root / "run/sshd").mkdir(exist_ok=True)
    for name in ("host", "user.pub"):
        shutil.copy(folder / name, inside / name)
    settings = ""
    certificates = os.environ.get("PIP_CERT", "")
    if certificates:  # of a proxy of this machine's
        shutil.copy(certificates, inside / "certificates")
        settings = "SetEnv PIP_CERT=/board/certificates SSL_CERT_FILE=/board/certificates\n"
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    (inside / "sshd_config").write_text(
        f"Port {made.port}\nListenAddress 127.0.0.1\nHostKey /board/host\nPidFile none\nStrictModes no\n"
        f"AuthorizedKeysFile /board/user.pub\nPasswordAuthentication no\nUsePAM no\n{settings}"
    )
    with serving(made, ["unshare", "--mount", "sh", "-c", ENTER, "sh", ROOT], seconds=60):
        yield made
