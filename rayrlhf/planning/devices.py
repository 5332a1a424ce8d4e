"""Accelerators and clusters: what they hold, how fast they are, what an hour of them costs.

Peaks are those of the data sheets, dense, of the SXM form: A100 80 GB, H100 80 GB, H200, B200; L4.
`link` is NVLink to all others of the node together, one way; `network` the usual adapter of a GPU
(400 Gb/s for Hopper and Blackwell, 200 Gb/s for Ampere); the host's link PCIe 4 or 5, of which two
thirds are taken. `--price` overrides prices, which differ by a factor of three between providers.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rayrlhf.config import RecipeError

GIB = 2**30
CPU = "CPU"


@dataclass(frozen=True)
class Device:
    """One accelerator, or one core of a CPU, which has no memory of its own."""

    name: str
    memory: float
    """Bytes that programs can have; of a CPU core 0, since the node's is shared."""
    bfloat16: float
    """FLOP/s, as for the next two: what the data sheet says, dense."""
    float32: float
    bandwidth: float
    """Bytes/s of its memory."""
    link: float
    """Bytes/s to the node's other devices."""
    network: float
    """Bytes/s to other nodes."""
    host_link: float
    """Bytes/s to the memory of the host."""
    host_memory: float
    """Bytes of the host's memory per device, as nodes with eight are usually sold."""
    price: float
    """US dollars an hour."""
    price_source: str
    """Where the price is from, and of when."""

    @property
    def is_gpu(self) -> bool:
        """Whether it is an accelerator."""
        return self.name != CPU


_INDEX = "median of 37 providers, aimultiple.com/gpu-index, 2026-05-20"
_GUIDE = "middle of specialised providers, mercatus-ai.com/blog/cloud-gpu-pricing, 2026-05"
_GUESS = "an assumption of this table, from no list: set --price"
DEVICES = {
    device.name: device
    for device in (
        Device(
            "A100", 79.2 * GIB, 312e12, 19.5e12, 2.04e12, 3e11, 25e9, 20e9, 128 * GIB, 1.30, _GUIDE
        ),
        Device(
            "H100", 79.2 * GIB, 989e12, 67e12, 3.35e12, 4.5e11, 50e9, 40e9, 256 * GIB, 2.95, _INDEX
        ),
        Device(
            "H200", 139.8 * GIB, 989e12, 67e12, 4.8e12, 4.5e11, 50e9, 40e9, 256 * GIB, 4.0, _GUIDE
        ),
        Device(
            "B200", 178.3 * GIB, 2250e12, 80e12, 8e12, 9e11, 50e9, 40e9, 256 * GIB, 5.50, _GUESS
        ),
        Device("L4", 22.0 * GIB, 121e12, 30e12, 3e11, 16e9, 3e9, 16e9, 48 * GIB, 0.80, _GUESS),
        # A server's core with AVX-512: measured on an EPYC (Zen 4), 110 GFLOP/s in float32.
        Device(CPU, 0.0, 190e9, 110e9, 1e10, 1e10, 1e9, 1e10, 4 * GIB, 0.05, _GUESS),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Equal nodes."""

    num_nodes: int
    per_node: int
    """Devices of each node."""
    device: Device
    host_memory: float
    """Bytes of each node's memory."""
    num_cpus: float
    """Logical CPUs of each node."""
    says: str = ""
    """How the person named it."""

    @property
    def num_devices(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.per_node

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return self.num_devices if self.device.is_gpu else 0

    @property
    def price(self) -> float:
        """US dollars an hour of all devices."""
        return self.num_devices * self.device.price

    @property
    def nodes(self) -> list[dict[str, float]]:
        """The resources of each node, as Ray registers them."""
        gpus = {"GPU": float(self.per_node)} if self.device.is_gpu else {}
        return [{"CPU": self.num_cpus, **gpus} for _ in range(self.num_nodes)]

    def priced(self, price: float | None) -> "Cluster":
        """Return the same cluster at `price` dollars per device and hour; None keeps it."""
        if price is None:
            return self
        return replace(self, device=replace(self.device, price=price, price_source="--price"))


def parse_cluster(text: str) -> Cluster:
    """Return the cluster `NODESxDEVICESxDEVICE`, such as 8x8xH100; raises RecipeError."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([A-Za-z0-9]+)", text)
    device = DEVICES.get(match[3].upper()) if match else None
    if match is None or device is None:
        raise RecipeError(
            f"--cluster={text}: a cluster is nodes x devices of each x device, such as 8x8xH100, "
            f"with one of {', '.join(DEVICES)}"
        )
    nodes, per_node = int(match[1]), int(match[2])
    # Nodes with eight GPUs have 96 to 208 logical CPUs; a core of a CPU is a device itself.
    cpus = per_node * (16.0 if device.is_gpu else 1.0)
    return Cluster(nodes, per_node, device, per_node * device.host_memory, cpus, text)


def this_machine() -> Cluster:
    """Return this machine as a cluster of one node: its cores and its memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Cluster(1, cores or 1, DEVICES[CPU], float(memory), float(cores or 1), "this machine")


def of_nodes(address: str, nodes: Sequence[Mapping[str, float]]) -> Cluster:
    """Return the cluster of what Ray's nodes have registered: as many as its largest are like.

    A node with GPUs has a resource `accelerator_type:H100`, by which the device is known. Raises
    RecipeError for a GPU that the table lacks.
    """
    most = max(nodes, key=lambda node: (node.get("GPU", 0), node.get("CPU", 0)))
    like = [
        node
        for node in nodes
        if node.get("GPU", 0) == most.get("GPU", 0)
        and node.get("CPU", 0) >= most.get("CPU", 0) / 2  # a head often takes no work
    ]
    memory = float(min(node.get("memory", 0) + node.get("object_store_memory", 0) for node in like))
    cpus = float(min(node.get("CPU", 0) for node in like))
    if not most.get("GPU"):
        return Cluster(len(like), max(1, int(cpus)), DEVICES[CPU], memory, cpus, address)
    kinds = [name.partition(":")[2] for name in most if name.startswith("accelerator_type:")]
    found = [name for name in DEVICES if any(name in kind.upper().split("-") for kind in kinds)]
    if not found:
        raise RecipeError(
            f"--address={address}: its GPUs are {', '.join(kinds) or 'of an unknown kind'}, and "
            f"plan knows {', '.join(DEVICES)}: name the like with --cluster"
        )
    return Cluster(len(like), int(most["GPU"]), DEVICES[found[0]], memory, cpus, address)


def has_bfloat16(device: Device) -> bool:
    """Tell whether `precision: auto` takes bfloat16 there: GPUs, and this machine's CPU if it can.

    What Linux says of the CPU is what torch asks it, without importing torch.
    """
    if device.is_gpu:
        return True
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
