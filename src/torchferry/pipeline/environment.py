"""What is installed here and what it can do, for a bug report; nothing heavy is imported in this process."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry import __version__, backends
from torchferry.core.errors import TorchferryError

if TYPE_CHECKING:
    from collections.abc import Mapping

_CPUINFO = Path("/proc/cpuinfo")
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
# Instructions by which engines choose their kernels.
_FLAGS = (
    "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni",
    "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve", "sme",
)  # fmt: skip
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD")
_OPENMMLAB = ("mmengine", "mmcv", "mmcv-lite", "mmdet", "mmocr", "mmsegmentation", "mmpretrain", "mmagic", "mmpose",
    "mmdet3d", "mmrotate", "mmaction2")  # fmt: skip
_ENGINE_SECONDS = 30
_GPU_SECONDS = 5
_LEFT_OUT = ("test", "openmmlab")  # extras


@dataclass(frozen=True)
class EngineState:
    """One engine of the table.

    Attributes:
        name: Its name.
        version: If it is installed.
        usable: True if it can compile here.
        runs: True if it can run here too.
        reason: Why it cannot, or what is broken.
        precisions: What it computes in here.
        max_opset: The newest opset that it reads.
        dynamic_shapes: True if one compiled engine runs at many sizes.
        general: True if it takes any graph.
    """

    name: str
    version: str | None = None
    usable: bool = False
    runs: bool = False
    reason: str = ""
    precisions: tuple[str, ...] = ()
    max_opset: int | None = None
    dynamic_shapes: bool | None = None
    general: bool | None = None

    def __str__(self) -> str:
        version = self.version or ""
        if not self.usable:
            return f"{version}: {self.reason}" if version else self.reason
        sizes = "dynamic shapes" if self.dynamic_shapes else "fixed shapes"
        parts = [f"{version}: {', '.join(self.precisions)}", f"opset up to {self.max_opset}", sizes]
        parts += [] if self.general else ["some graphs only"]
        parts += [self.reason] if self.reason else []
        return "; ".join(parts)


@dataclass(frozen=True)
class Environment:
    """This machine and what is installed on it.

    Attributes:
        versions: Of Torchferry, Python and the system.
        machine: Processor, cores, instructions, memory.
        packages: By distribution its version, or None where it is not installed.
        engines: Every engine of the table.
        codebases: Libraries of OpenMMLab that are installed.
        gpus: As NVIDIA's own tool lists them, or a line that says why it does not.
        variables: Those set that change how engines run.
    """

    versions: Mapping[str, str]
    machine: Mapping[str, str]
    packages: Mapping[str, str | None]
    engines: tuple[EngineState, ...]
    codebases: Mapping[str, str]
    gpus: tuple[str, ...]
    variables: Mapping[str, str]

    def to_text(self) -> str:
        """Render as one page to paste."""
        packages = {name: version or "not installed" for name, version in self.packages.items()}
        engines = {engine.name: str(engine) for engine in self.engines}
        sections = {
            "": self.versions,
            "machine": self.machine,
            "gpu": dict.fromkeys(self.gpus, ""),
            "engines": engines,
            "packages": packages,
            "openmmlab": self.codebases or {"none": ""},
            "variables": self.variables,
        }
        lines = []
        for title, values in sections.items():
            lines += [title] if title and values else []
            width = max(map(len, values), default=0)
            indent = "  " if title else ""
            lines += [f"{indent}{name:{width}}  {value}".rstrip() for name, value in values.items()]
        return "\n".join(lines)


def environment() -> Environment:
    """Look at this machine; engines are loaded in processes of their own, so that a broken one shows as such."""
    probes = {name: _start_probe(name) for name in backends.names()}
    gpu = _start_gpus()
    versions = {"torchferry": __version__, "python": platform.python_version(), "platform": platform.platform()}
    packages = {name: _version(name) for name in _requirements()}
    codebases = {name: version for name in _OPENMMLAB if (version := _version(name))}
    return Environment(
        versions={**versions, "executable": sys.executable},
        machine=machine(),
        packages=packages,
        engines=tuple(_probed(name, process) for name, process in probes.items()),
        codebases=codebases,
        gpus=_gpus(gpu),
        variables={name: os.environ[name] for name in _VARIABLES if name in os.environ},
    )


def machine() -> dict[str, str]:
    """Return the processor, its cores and instructions, memory, and how busy the machine is."""
    info = _table(_CPUINFO)
    found = info.get("model name") or info.get("Processor") or platform.processor() or platform.machine()
    flags = (info.get("flags") or info.get("Features") or "").split()
    known = [name for name in _FLAGS if name in flags]
    values = {"cpu": found, "cores": f"{usable_cores()} of {os.cpu_count()}"}
    if known:
        values["instructions"] = " ".join(known)
    memory = _table(_MEMINFO)
    if "MemTotal" in memory:
        values["memory"] = f"{_gib(memory['MemTotal'])} GiB, {_gib(memory.get('MemAvailable', '0'))} available"
    limit = _memory_limit()
    if limit:
        values["memory limit"] = f"{limit / 2**30:.1f} GiB"
    if hasattr(os, "getloadavg"):
        values["load"] = f"{os.getloadavg()[0]:.1f}"
    return values


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux; elsewhere a process may use every core
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _table(path: Path) -> dict[str, str]:
    """Read ``name: value`` lines, the first of each name; empty where there is no such file."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    table: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            table.setdefault(name.strip(), value.strip())
    return table


def _gib(kib: str) -> str:
    return f"{int(kib.split(maxsplit=1)[0]) / 2**20:.1f}"


def _memory_limit() -> int | None:
    """Return the limit of the container, if there is one."""
    try:
        text = (_CGROUP / "memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _requirements() -> list[str]:
    """Return the distributions that Torchferry and its extras name, engines apart."""
    try:
        listed = importlib.metadata.requires("torchferry") or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        return []
    names: dict[str, None] = {}
    for line in listed:
        extra = re.search(r"extra == ['\"](\w[\w-]*)['\"]", line)
        name = re.match(r"[\w.-]+", line)
        if name and not (extra and extra[1] in _LEFT_OUT) and name[0] not in ("torchferry", *backends.names()):
            names[name[0]] = None
    return sorted(names)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _start_probe(name: str) -> subprocess.Popen[str]:
    return subprocess.Popen(  # noqa: S603 - our own Python
        [sys.executable, "-m", "torchferry.pipeline.environment", name],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def _probed(name: str, process: subprocess.Popen[str]) -> EngineState:
    """Return what a probe found; one that dies or hangs says so about its engine."""
    try:
        out, error = process.communicate(timeout=_ENGINE_SECONDS)
    except subprocess.TimeoutExpired:
        return EngineState(name, reason=f"broken: loading it takes more than {_ENGINE_SECONDS} s")
    finally:
        process.kill()
        process.wait()
    try:
        values: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = "".join(f": {line}" for line in error.strip().splitlines()[-1:])
        return EngineState(name, reason=f"broken: loading it ends the process with status {process.returncode}{last}")
    return EngineState(**{**values, "precisions": tuple(values["precisions"])})


def probe(name: str) -> EngineState:
    """Load an engine in this process and return what it says of itself."""
    version = None
    try:
        backend = backends.get(name)
        available = backend.availability()
        version = available.version
        if not available.ok:
            return EngineState(name, version, reason=available.reason)
        backend.load()
        able = backend.capabilities()
    except Exception as exc:  # noqa: BLE001 - a broken installation may raise anything
        cause = exc.__cause__ if isinstance(exc, TorchferryError) and exc.__cause__ else exc
        first = (str(cause).strip().splitlines() or [""])[0]
        return EngineState(name, version, reason=f"broken: {type(cause).__name__}: {first}")
    return EngineState(
        name=name,
        version=version,
        usable=True,
        runs=available.can_run,
        reason=available.reason,
        precisions=able.precisions,
        max_opset=able.max_opset,
        dynamic_shapes=able.dynamic_shapes,
        general=able.general,
    )


def _start_gpus() -> subprocess.Popen[str] | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    fields = "name,memory.total,driver_version,compute_cap"
    return subprocess.Popen(  # noqa: S603 - NVIDIA's own tool
        [tool, f"--query-gpu={fields}", "--format=csv,noheader"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def _gpus(process: subprocess.Popen[str] | None) -> tuple[str, ...]:
    if process is None:
        return ("none that nvidia-smi would show: it is not installed",)
    try:
        out, _ = process.communicate(timeout=_GPU_SECONDS)
    except subprocess.TimeoutExpired:
        return (f"nvidia-smi does not answer within {_GPU_SECONDS} s",)
    finally:
        process.kill()
        process.wait()
    lines = tuple(line.strip() for line in out.splitlines() if line.strip())
    return lines if process.returncode == 0 else (f"nvidia-smi: {' '.join(lines)}",)


if __name__ == "__main__":
    import dataclasses

    print(json.dumps(dataclasses.asdict(probe(sys.argv[1]))))  # noqa: T201 - what the other process reads
