"""Which sandboxes this machine has, for tests that need one."""

import shutil
import subprocess

_PROBES = {
    "bubblewrap": ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"],
    "unshare": ["unshare", "--user", "--map-root-user", "--mount", "true"],
}


def has_sandbox(tool: str) -> bool:
    """Return whether the system lets this tool make namespaces."""
    probe = _PROBES[tool]
    return shutil.which(probe[0]) is not None and subprocess.run(probe, check=False).returncode == 0
