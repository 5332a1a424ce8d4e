"""What nvidia-smi says, into findings."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from typing import Any

from rayrlhf.doctor.findings import Finding, fail, ok, warn

USED_BYTES = 2**30
"""More in use is somebody's; a driver alone takes a few hundred MiB."""
SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown", "sw_thermal_slowdown")


def gpus(facts: Mapping[str, Mapping[str, Any]], registered: Mapping[str, float]) -> list[Finding]:
    """Judge the GPUs of each node; `registered` is how many Ray counts there."""
    if not any(own["smi"] or own.get("error") for own in facts.values()):
        without = [node for node in facts if registered.get(node, 0)]
        if not without:
            return [ok("gpu", "none on any node: everything runs on CPUs")]
    found: list[Finding] = []
    for node, own in facts.items():
        if own.get("error"):
            fix = "nvidia-smi has to answer there: reload the driver, or reboot the node"
            found.append(fail("gpu", f"nvidia-smi: {own['error']}", fix, node))
        elif own["smi"]:
            found += _of_node(node, own, registered.get(node, 0))
        elif registered.get(node, 0):
            value = f"Ray counts {registered[node]:g}, but there is no nvidia-smi"
            fix = "install the driver, run the container with --gpus=all, or start Ray without GPUs"
            found.append(fail("gpu", value, fix, node))
        else:
            found.append(ok("gpu", "none", node))
    return found


def count(smi: str | None) -> int:
    """Return how many GPUs nvidia-smi lists."""
    return len(ElementTree.fromstring(smi).findall("gpu")) if smi else 0


def _of_node(node: str, own: Mapping[str, Any], registered: float) -> list[Finding]:
    root = ElementTree.fromstring(own["smi"])
    devices = root.findall("gpu")
    found = [
        *_cuda(node, root.findtext("cuda_version", ""), own["cuda"]),
        *_peers(node, own["peers"] or ""),
    ]
    if registered != len(devices):
        value = f"{len(devices)} there, Ray counts {registered:g}"
        fix = f"ray start --num-gpus={len(devices)}, or check CUDA_VISIBLE_DEVICES"
        found.append(warn("gpu", value, fix, node))
    for index, device in enumerate(devices):
        found += _of_device(node, f"GPU {index}", device)
    if not any(each.status == "fail" for each in found):
        names = sorted({device.findtext("product_name", "GPU") for device in devices})
        driver = root.findtext("driver_version", "?")
        found.append(ok("gpu", f"{len(devices)} x {', '.join(names)}, driver {driver}", node))
    return found


def _of_device(node: str, name: str, device: ElementTree.Element) -> list[Finding]:
    found = []
    errors = _uncorrected(device)
    if errors:
        value = f"{name}: {errors} uncorrected memory errors since the last reboot"
        found.append(fail("gpu", value, "drain the node and reset the GPU: nvidia-smi -r", node))
    remapped = device.find("remapped_rows")
    if remapped is not None and remapped.findtext("remapped_row_failure") == "Yes":
        found.append(fail("gpu", f"{name}: no spare memory rows left", "replace the GPU", node))
    elif remapped is not None and remapped.findtext("remapped_row_pending") == "Yes":
        fix = "drain the node and reset the GPU: nvidia-smi -r"
        found.append(warn("gpu", f"{name}: a memory row waits for a reset", fix, node))
    slow = [
        each.tag.partition("reason_")[2] or each.tag
        for each in device.iter()
        if each.tag.endswith(SLOWDOWNS) and each.text == "Active"
    ]
    if slow:
        value = f"{name}: slowed down ({', '.join(slow)})"
        found.append(
            warn("gpu", value, "check its cooling and power: nvidia-smi -q -d PERFORMANCE", node)
        )
    used = _mebibytes(device.findtext("fb_memory_usage/used", "0 MiB"))
    if used > USED_BYTES:
        pids = [each.text or "?" for each in device.findall("processes/process_info/pid")]
        value = f"{name}: {used / 2**30:.0f} GiB in use by pid {', '.join(pids) or 'unknown'}"
        found.append(warn("gpu", value, "end what else runs there, or run beside it", node))
    return found


def _uncorrected(device: ElementTree.Element) -> int:
    """Sum the uncorrected errors since the last reboot; their names differ by architecture."""
    volatile = device.find("ecc_errors/volatile")
    numbers = [
        int(each.text or 0)
        for each in (volatile.iter() if volatile is not None else ())
        if "uncorrectable" in each.tag and (each.text or "").isdigit()
    ]
    double = device.findtext("ecc_errors/volatile/double_bit/total", "")
    return sum(numbers) + (int(double) if double.isdigit() else 0)


def _mebibytes(text: str) -> int:
    match = re.match(r"(\d+) MiB", text)
    return int(match[1]) * 2**20 if match else 0


def _cuda(node: str, driver: str, torch: str | None) -> list[Finding]:
    """A driver runs what was built for its major version of CUDA or an earlier one."""
    if torch is None:
        fix = "pip install --no-deps -r requirements/gpu.txt there"
        return [warn("gpu", "torch is a build for CPUs, and this machine has a GPU", fix, node)]
    if not driver or int(driver.partition(".")[0]) >= int(torch.partition(".")[0]):
        return []
    value = f"the driver is for CUDA {driver}, torch for CUDA {torch}"
    return [fail("gpu", value, f"install a driver for CUDA {torch} or later there", node)]


def _peers(node: str, table: str) -> list[Finding]:
    """Read `nvidia-smi topo -p2p r`: a row of OK, or why not, per GPU."""
    apart = []
    for row in table.splitlines():
        cells = row.split()
        if len(cells) > 2 and re.fullmatch(r"GPU\d+", cells[0]) and not cells[1].startswith("GPU"):
            apart += [
                f"{cells[0]}-GPU{other} ({state})"
                for other, state in enumerate(cells[1:])
                if state not in ("X", "OK") and int(cells[0][3:]) < other
            ]
    if not apart:
        return []
    fix = "tensor parallelism goes through host memory there: enable P2P (no ACS, IOMMU off)"
    return [warn("gpu", f"no peer access: {', '.join(apart[:4])}", fix, node)]
