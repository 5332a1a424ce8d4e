"""Facts of all nodes into findings: pure functions, but for the lock beside the package.

`facts` maps the name of a node to what it measured.
"""

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rayrlhf
from rayrlhf.doctor.findings import Finding, fail, first_names, ok, warn

Facts = Mapping[str, Mapping[str, Any]]
GIB = 2**30
SKEW_WARN_S, SKEW_FAIL_S = 1.0, 60.0
MEMORY_WARN, MEMORY_FAIL = 0.85, 0.95
"""Part in use; at the second Ray kills workers (its memory_usage_threshold)."""
SHM_BYTES = 512 * 2**20
"""Less holds no bucket of weights; Docker gives 64 MiB unless told otherwise."""
DISK_WARN_BYTES, DISK_FAIL_BYTES = 20 * GIB, GIB
DISK_FULL = 0.95
"""Ray writes no objects to a disk that is fuller (its local_fs_capacity_threshold)."""
SLOW_DISK = 50e6
"""Bytes per second: a checkpoint of 1B parameters, 16 bytes each, takes five minutes."""
SLOW_NETWORK = 100e6
"""Bytes per second, about 1 Gbit/s."""
INSTALL = "pip install --no-deps -r requirements/{}.txt"


def locked(kind: str) -> dict[str, str]:
    """Return what requirements/KIND.txt pins; empty where the package lies without its locks."""
    lock = Path(rayrlhf.__file__).parents[1] / "requirements" / f"{kind}.txt"
    if not lock.is_file():
        return {}
    pins = re.findall(r"^([\w.-]+)==([^\s;#]+)", lock.read_text(encoding="utf-8"), re.M)
    return {name.removesuffix("-cpu"): version for name, version in pins}


def versions(
    facts: Facts, here: Mapping[str, str | None], lock: Mapping[str, str], kind: str
) -> list[Finding]:
    """Compare every node with the driver (`here`), and the driver with the lock."""
    install = INSTALL.format(kind)
    found = []
    for node, theirs in facts.items():
        wrong = [
            f"{name} {version or 'missing'}, here {here.get(name)}"
            for name, version in theirs.items()
            if version != here.get(name)
        ]
        if wrong:
            found.append(fail("versions", "; ".join(wrong), f"on that node: {install}", node))
        else:
            found.append(ok("versions", ", ".join(f"{n} {v}" for n, v in here.items()), node))
    missing = [name for name, version in here.items() if version is None]
    if missing:
        found.append(fail("lock", f"{', '.join(missing)} not installed", install))
    other = [
        f"{name} {version}, locked {lock[name]}"
        for name, version in here.items()
        if version is not None and name in lock and _public(version) != _public(lock[name])
    ]
    if other:
        found.append(warn("lock", "; ".join(other), f"what was tested together: {install}"))
    elif lock and not missing:
        found.append(ok("lock", f"as in requirements/{kind}.txt"))
    return found


def _public(version: str) -> str:
    return version.partition("+")[0]


def code(facts: Facts, here: Mapping[str, str]) -> list[Finding]:
    """Compare the package of every node with the driver's."""
    return [
        ok("code", f"rayrlhf {own['hash']}", node)
        if own["hash"] == here["hash"]
        else fail(
            "code",
            f"{own['place']} is {own['hash']}, here {here['hash']}",
            "install the same copy there, or submit with --working-dir . from a checkout",
            node,
        )
        for node, own in facts.items()
    ]


def clock(skews: Mapping[str, tuple[float, float]]) -> list[Finding]:
    """Judge (seconds ahead of the driver, uncertainty of that) of each node."""
    found = []
    fix = "start a time service there: systemctl enable --now systemd-timesyncd, or chrony"
    for node, (skew, unsure) in skews.items():
        value = f"{abs(skew):.3f} s {'ahead of' if skew > 0 else 'behind'} the driver"
        if abs(skew) - unsure > SKEW_FAIL_S:
            found.append(fail("clock", value, fix, node))
        elif abs(skew) - unsure > SKEW_WARN_S:
            found.append(warn("clock", value, fix, node))
        else:
            found.append(ok("clock", f"within {_rounded_up(abs(skew) + unsure)} s", node))
    return found


def _rounded_up(seconds: float) -> float:
    return next(step for step in (0.01, 0.1, 1.0, 10.0, 100.0, 1e9) if seconds <= step)


def memory(facts: Facts, stores: Mapping[str, float]) -> list[Finding]:
    """Judge memory and /dev/shm; `stores` are the bytes of each node's object store."""
    found = []
    for node, own in facts.items():
        used, store = own["used"] / own["total"], stores.get(node, 0)
        value = f"{own['used'] / GIB:.0f} of {own['total'] / GIB:.0f} GiB in use"
        fix = "end what else runs there; Ray kills workers above 95%"
        if used >= MEMORY_FAIL:
            found.append(fail("memory", value, fix, node))
        elif used >= MEMORY_WARN:
            found.append(warn("memory", value, fix, node))
        else:
            found.append(ok("memory", value, node))
        shm = (
            f"{own['shm_free'] / GIB:.1f} GiB of /dev/shm free, object store {store / GIB:.1f} GiB"
        )
        larger = "docker run --shm-size=10g; in Kubernetes an emptyDir of medium Memory at /dev/shm"
        if own["shm_total"] < SHM_BYTES:
            found.append(fail("shm", shm, larger, node))
        elif own["shm_total"] < store:
            found.append(warn("shm", f"{shm}, which Ray then puts on a disk", larger, node))
        else:
            found.append(ok("shm", shm, node))
    return found


def disk(facts: Facts, purpose: str) -> list[Finding]:
    """Judge the disk that is used for `purpose`."""
    found = []
    for node, own in facts.items():
        room = f"{own['free'] / GIB:.0f} of {own['total'] / GIB:.0f} GiB free"
        value = f"{own['place']} ({purpose}): {room}"
        full = 1 - own["free"] / max(own["total"], 1) > DISK_FULL
        if own.get("error"):
            fix = f"make {own['place']} writable for the user of Ray's workers"
            found.append(fail("disk", f"{value}, cannot be written: {own['error']}", fix, node))
        elif own["free"] < DISK_FAIL_BYTES or full:
            fix = "free space there; Ray writes no objects to a disk that is 95% full"
            found.append(fail("disk", value, fix, node))
        elif own["free"] < DISK_WARN_BYTES:
            fix = "free space there, or set another run_dir"
            found.append(warn("disk", value, fix, node))
        elif own["speed"] < SLOW_DISK:
            fix = "checkpoints will take minutes: set run_dir to a faster file system"
            found.append(warn("disk", f"{value}, {own['speed'] / 1e6:.0f} MB/s written", fix, node))
        else:
            found.append(ok("disk", f"{value}, {_about(own['speed'])}/s written", node))
    return found


def _about(speed: float) -> str:
    """Round down to two digits at most: nodes that are about as fast say the same."""
    unit, name = (1e9, "GB") if speed >= 1e9 else (1e6, "MB")
    digits = 10 ** max(0, len(str(int(speed / unit))) - 1)
    return f"over {int(speed / unit) // digits * digits} {name}"


def shared(written: Facts, missing: Mapping[str, Sequence[str]], folder: str) -> list[Finding]:
    """Judge which nodes could write to `run_dir`, and whose files which other nodes lack."""
    found = []
    for node, own in written.items():
        if own.get("error"):
            fix = "make it writable for the user of Ray's workers, or set another run_dir"
            found.append(fail("run_dir", f"{folder}: {own['error']}", fix, node))
    for node, others in missing.items():
        if others:
            value = f"{folder}: does not see what {', '.join(others)} wrote"
            fix = "mount one file system at that path on every node, or set run_dir to one"
            found.append(fail("run_dir", value, fix, node))
    bad = {node for each in found for node in each.nodes}
    found += [
        ok("run_dir", f"{folder} is written and read", node) for node in written if node not in bad
    ]
    return found


def paths(unreadable: Mapping[str, Sequence[str]], named: Mapping[str, str]) -> list[Finding]:
    """Judge which of the recipe's paths (`named`, by key) each node cannot read."""
    found = []
    for node, wrong in unreadable.items():
        keys = [f"{key}={path}" for key, path in named.items() if path in wrong]
        if keys:
            fix = "copy it there, or name a path on a file system that every node sees"
            found.append(fail("paths", f"cannot be read: {', '.join(keys)}", fix, node))
        else:
            found.append(ok("paths", f"{len(named)} of the recipe can be read", node))
    return found


def addresses(facts: Facts, own: Mapping[str, str], num_hosts: int) -> list[Finding]:
    """Judge the address of each node (`own`): others have to reach it."""
    found = []
    for node, place in facts.items():
        address, names = own[node], place["interfaces"]
        name = next((n for n, each in names.items() if each == address), "")
        value = f"{address} on {name or 'no interface of this name space'}"
        fix = _address_fix(address, name, names) if num_hosts > 1 else ""
        if fix:
            found.append(fail("address", value, fix, node))
            continue
        chosen = {
            variable: each
            for variable, each in place["chosen"].items()
            if not _names_one_of(each, names)
        }
        if chosen:
            said = ", ".join(f"{variable}={each}" for variable, each in chosen.items())
            fix = f"set it to one of {', '.join(names)}, or unset it"
            found.append(fail("address", f"{value}; {said} is none of its interfaces", fix, node))
        elif (
            num_hosts > 1
            and _is_loopback(place["own"])
            and "GLOO_SOCKET_IFNAME" not in place["chosen"]
        ):
            value += f"; the host's own name is {place['own']}, which gloo takes"
            fix = f"export GLOO_SOCKET_IFNAME={name}, or correct /etc/hosts there"
            found.append(warn("address", value, fix, node))
        else:
            found.append(ok("address", value, node))
    return found


def _address_fix(address: str, name: str, names: Mapping[str, str]) -> str:
    """Return how to leave an address that other machines cannot reach; empty for a good one."""
    better = [
        (each, at)
        for each, at in names.items()
        if not _is_loopback(at) and not _is_bridge(each, at)
    ]
    if not _is_loopback(address) and not _is_bridge(name, address):
        return ""
    if not better:
        return "the node has no address that others reach: run its container with --network=host"
    interface, at = better[0]
    return (
        f"ray start --node-ip-address={at} there, and export NCCL_SOCKET_IFNAME={interface} "
        f"GLOO_SOCKET_IFNAME={interface}"
    )


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _is_bridge(name: str, address: str) -> bool:
    """Tell whether an address is one of Docker's, which only its own machine reaches."""
    if name.startswith(("docker", "br-", "virbr", "cni")):
        return True
    return ipaddress.ip_address(address) in ipaddress.ip_network("172.17.0.0/16")


def _names_one_of(chosen: str, names: Mapping[str, str]) -> bool:
    """Tell whether a list of prefixes fits an interface, as NCCL reads it (`=` exact, `^` not)."""
    negated, exact = chosen.startswith("^"), chosen.lstrip("^").startswith("=")
    words = chosen.lstrip("^=").split(",")
    fits = [n for n in names if any(n == w if exact else n.startswith(w) for w in words)]
    return len(fits) < len(names) if negated else bool(fits)


def network(speeds: Mapping[tuple[str, str], float | str]) -> list[Finding]:
    """Judge bytes per second from one node to the next, or why nothing arrived."""
    found = []
    fast = {}
    for (source, target), speed in speeds.items():
        if isinstance(speed, str):
            fix = f"open all ports between the nodes, and check the address of {target}"
            found.append(fail("network", f"to {target}: {speed}", fix, source))
        elif speed < SLOW_NETWORK:
            fix = "weights and gradients go this way: use a faster interface (--node-ip-address)"
            found.append(warn("network", f"to {target}: {speed / 1e6:.0f} MB/s", fix, source))
        else:
            fast[source, target] = speed
    if fast:
        low = min(fast, key=lambda pair: fast[pair])
        value = f"{' to '.join(low)} {fast[low] / 1e9:.1f} GB/s, the slowest of {len(fast)} links"
        found.append(ok("network", value))
    return found


def collective(results: Mapping[str, Sequence[Mapping[str, Any]]], backend: str) -> list[Finding]:
    """Judge what every rank of an all-reduce found."""
    found = []
    fix = (
        "open all ports between the nodes; choose the interface with GLOO_SOCKET_IFNAME and "
        "NCCL_SOCKET_IFNAME; NCCL_DEBUG=INFO says more"
    )
    for node, ranks in results.items():
        errors = [str(rank["error"]) for rank in ranks if "error" in rank]
        if errors:
            found.append(fail("collective", f"{backend}: {errors[0]}", fix, node))
        elif not all(rank["is_right"] for rank in ranks):
            out = "take the node out of the cluster, and test its memory and its GPUs"
            found.append(fail("collective", f"{backend}: wrong sum", out, node))
    if not found:
        number = sum(len(ranks) for ranks in results.values())
        found.append(ok("collective", f"{backend}: the sum over {number} ranks is right"))
    return found


def builds(results: Facts) -> list[Finding]:
    """Judge a trial build: what DeepSpeed compiles needs a compiler, Python's headers and ninja."""
    found = []
    for node, own in results.items():
        if "error" in own:
            fix = "apt-get install g++ python3-dev ninja-build (or pip install ninja)"
            found.append(fail("build", str(own["error"]), fix, node))
        else:
            found.append(ok("build", f"{own['compiler']}, ninja", node))
    return found


def engine(results: Facts) -> list[Finding]:
    """Judge the start of an engine."""
    found = []
    for node, own in results.items():
        if "error" in own:
            fix = "`rayrlhf` rolls out with vLLM: reinstall it there, " + INSTALL.format(
                "cpu or gpu"
            )
            found.append(fail("engine", f"vLLM: {own['error']}", fix, node))
        else:
            value = f"vLLM: {own['num_tokens']} tokens, loaded in {own['load_s']:.0f} s"
            found.append(ok("engine", value, node))
    return found


def ports(
    taken: Mapping[str, Mapping[int, str]], wanted: Mapping[str, Mapping[int, str]]
) -> list[Finding]:
    """Judge who has the ports that are wanted on each node ({port: what for})."""
    found = []
    for node, purposes in wanted.items():
        free = [f"{port} ({what})" for port, what in purposes.items() if port not in taken[node]]
        own = []
        for port, who in taken[node].items():
            what = purposes[port]
            if any(word in who for word in RAYS_OWN):
                own.append(f"{port} ({what}) is Ray's own")
                continue
            fix = f"end it, or give {what} another port: {OTHER_PORT[what]}"
            kind = fail if what in ("Serve", "endpoint") else warn
            found.append(kind("ports", f"{port} ({what}) is taken by {who}", fix, node))
        if free or own:
            value = "; ".join([*([f"{', '.join(free)} free"] if free else []), *own])
            found.append(ok("ports", value, node))
    return found


RAYS_OWN = ("gcs_server", "ray::", "ray/dashboard", "haproxy")
"""In the command lines of Ray's processes."""
OTHER_PORT = {
    "Serve": "label.port=8001",
    "endpoint": "serve.port=8001",
    "dashboard": "ray start --dashboard-port=8266",
    "Ray": "ray start --port=6380",
}


def nodes(
    alive: Sequence[str], dead: Mapping[str, str], silent: Mapping[str, str]
) -> list[Finding]:
    """Name the nodes that are there, those that died and those that do not answer."""
    found = [ok("nodes", f"{len(alive)} alive: {first_names(alive)}")] if alive else []
    for node, reason in dead.items():
        fix = "see its raylet's log, and start it again: ray start --address=..."
        found.append(fail("nodes", f"died: {reason}", fix, node))
    for node, reason in silent.items():
        fix = "a copy of rayrlhf and a reachable raylet there; see `ray status`, or start it again"
        found.append(fail("nodes", f"does not answer: {reason}", fix, node))
    return found
