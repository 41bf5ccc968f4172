"""Names of this machine for itself. Imports nothing of the web."""

from __future__ import annotations

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1", "[::1]")
"""As flags and browsers write them."""
