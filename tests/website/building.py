"""The site, built as make docs builds it, where there is no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NO_NETWORK = ["unshare", "--map-root-user", "--net"]
NOWHERE = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")


def build_site(checkout: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """The site of a checkout in a folder: by a process that has no network where the system lets it have none."""
    is_possible = subprocess.run([*NO_NETWORK, "true"], stderr=subprocess.DEVNULL).returncode == 0
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, **NOWHERE, "NO_MKDOCS_2_WARNING": "1"}
    isolated = [*NO_NETWORK, *command] if is_possible else command
    return subprocess.run(isolated, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
