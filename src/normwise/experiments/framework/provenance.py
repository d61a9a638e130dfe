"""Where numbers come from: the machine, the versions, the commit and the data. What a study says of itself, it says from here."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_CHECKOUT = Path(__file__).resolve().parents[4]


def versions(protocol: str) -> tuple[str, str]:
    """Of normwise, with the number of a study's protocol, and of torch: part of every run's settings, so that a kept run of other
    versions is run again."""
    from normwise import __version__

    return f"{__version__}+{protocol}", torch.__version__


def machine() -> dict[str, Any]:
    """What runs were done on, with which code, and when. ``commit`` is None outside of a checkout, and ends in ``-dirty`` where files of
    it were changed."""
    from normwise import __version__

    return {
        "cpu": _cpu(), "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version(),
        "normwise": __version__, "commit": _commit(), "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }  # fmt: skip


def installed(*packages: str) -> dict[str, str]:
    """Versions of those of these packages that are installed."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def data_name(data: Path | str | None) -> str:
    """What may stand in a table: never where a folder lies."""
    if data is None:
        return "bundled data"
    return str(data) if str(data).startswith("hf:") else Path(data).name


def describe(data: Any) -> dict[str, Any]:
    """Of images: name, sizes of the parts, and the fingerprint of every pixel and label."""
    return {
        "name": data.name, "train": len(data.train), "validation": len(data.validation), "test": len(data.test),
        "shape": list(data.shape), "classes": data.classes, "own_test_part": data.own_test,
        "train_available": data.available, "fingerprint": data.key,
    }  # fmt: skip


def where(machine: Any) -> str:
    """One machine in words."""
    gpu = f"{machine['gpu']}, " if "gpu" in machine else ""
    return f"{gpu}{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}, {machine['date'][:10]}"


def _commit() -> str | None:
    if not (_CHECKOUT / ".git").exists():    # an installed package: a repository further up is somebody else's
        return None
    with suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=_CHECKOUT, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return told.stdout.strip() or None
    return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
