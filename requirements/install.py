"""Makes .venv from the lock and installs the project into it in place; does nothing when that is up to date.

Needs nothing but the Python that runs it. Every file, wherever it comes from, is checked against its hash.
"""

import hashlib
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements"
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
INPUTS = [REQUIREMENTS / "torch.txt", REQUIREMENTS / "lock.txt", ROOT / "pyproject.toml", Path(__file__)]
PYTORCH_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    """Exits with a message where the machine does not fit the lock or pip fails."""
    check_machine()
    fingerprint = hashlib.sha256(b"".join(path.read_bytes() for path in INPUTS)).hexdigest()
    if STAMP.exists() and STAMP.read_text() == fingerprint:
        return
    make_venv()
    install_torch()
    say("the other locked packages, from this machine's pip sources")
    if not pip_install("--require-hashes", "-r", str(REQUIREMENTS / "lock.txt")):
        sys.exit("error: a locked package could not be installed; pip says above which, and why")
    say("selfguide itself, in place")
    if not pip_install("--no-build-isolation", "--editable", str(ROOT)):
        sys.exit("error: selfguide could not be installed; pip says above why")
    STAMP.write_text(fingerprint)
    say(f"done: {VENV / 'bin' / 'selfguide'}")


def check_machine() -> None:
    found = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"error: the lock is for Python 3.11, not {found}; try make PYTHON=/path/to/python3.11 install")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit(f"error: the lock is for Linux on x86-64, not {found}; pyproject.toml has the unlocked ranges")


def make_venv() -> None:
    say(f"a virtual environment in {VENV}")
    # What an interpreter that has since moved or changed left behind cannot be mended in place.
    probe = [str(VENV_PYTHON), "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 11))"]
    usable = VENV_PYTHON.exists() and subprocess.run(probe, check=False).returncode == 0
    command = [sys.executable, "-m", "venv", *([] if usable else ["--clear"]), str(VENV)]
    if subprocess.run(command, check=False).returncode:
        sys.exit(f"error: {sys.executable} could not make {VENV}; it says above why")


def install_torch() -> None:
    """Registries carry the CUDA build of torch; the CPU build may have to come from PyTorch's own index."""
    requirement = ("--require-hashes", "-r", str(REQUIREMENTS / "torch.txt"))
    say("torch for CPUs, from this machine's pip sources")
    if pip_install(*requirement):
        return
    say(f"torch was not to be had there; now from {PYTORCH_INDEX}")
    if not pip_install("--index-url", PYTORCH_INDEX, *requirement):
        sys.exit(
            "error: torch could be had neither from this machine's pip sources nor from PyTorch's index; "
            "put the wheel that requirements/torch.txt names into a folder and set PIP_FIND_LINKS to it"
        )


def pip_install(*args: str) -> bool:
    """`--no-deps`, as the lock is complete; what requirements/overrides.txt names is left out on purpose."""
    command = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", *args]
    return subprocess.run(command, check=False).returncode == 0


def say(message: str) -> None:
    print(f"install: {message}", flush=True)


if __name__ == "__main__":
    main()
