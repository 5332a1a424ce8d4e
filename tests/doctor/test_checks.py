"""From facts to findings: each check says ok, and names what is wrong and what to do."""

from typing import Any

import pytest

from rayrlhf.doctor import checks, findings
from rayrlhf.doctor.checks import GIB
from rayrlhf.doctor.findings import Finding, fail, ok, warn

HERE = {"python": "3.11.7", "torch": "2.13.0+cpu", "vllm": "0.32.0"}
LOCK = {"torch": "2.13.0", "vllm": "0.32.0", "numpy": "2"}


def statuses(found: list[Finding]) -> list[tuple[str, ...]]:
    return [(each.status, *each.nodes) for each in found]


def test_a_finding_that_is_not_ok_has_a_fix() -> None:
    with pytest.raises(AssertionError):
        Finding("fail", "disk", "full")


def test_lines_name_the_nodes_that_are_meant() -> None:
    assert findings.line(ok("clock", "within 0.01 s", "a"), 1) == "ok    clock       within 0.01 s"
    assert "all 2 nodes: within" in findings.line(ok("clock", "within 0.01 s", "a", "b"), 2)
    text = findings.line(fail("disk", "full", "free some", "b"), 2)
    assert text.splitlines()[0] == "fail  disk        b: full"
    assert text.splitlines()[1].strip() == "fix: free some"
    many = ok("code", "x", *map(str, range(12)))
    assert "7 and 4 more: x" in findings.line(many, 64)


def test_equal_findings_of_several_nodes_are_one() -> None:
    found = findings.merged([ok("a", "1", "x"), warn("a", "2", "f", "y"), ok("a", "1", "z")])
    assert found == [ok("a", "1", "x", "z"), warn("a", "2", "f", "y")]
    assert findings.counts(found) == {"ok": 1, "warn": 1, "fail": 0}


def test_versions() -> None:
    good = checks.versions({"a": HERE}, HERE, LOCK, "cpu")
    assert statuses(good) == [("ok", "a"), ("ok",)]
    other = {"a": HERE, "b": {**HERE, "torch": "2.12.0", "vllm": None}}
    found = checks.versions(other, HERE, LOCK, "cpu")
    assert statuses(found) == [("ok", "a"), ("fail", "b"), ("ok",)]
    assert found[1].value == "torch 2.12.0, here 2.13.0+cpu; vllm missing, here 0.32.0"
    assert found[1].fix.endswith("pip install --no-deps -r requirements/cpu.txt")


def test_the_driver_is_held_against_the_lock() -> None:
    older = {**HERE, "torch": "2.12.0"}
    found = checks.versions({"a": older}, older, LOCK, "cpu")
    assert statuses(found) == [("ok", "a"), ("warn",)]
    assert found[1].value == "torch 2.12.0, locked 2.13.0"
    without = {**HERE, "vllm": None}
    assert statuses(checks.versions({"a": without}, without, LOCK, "cpu"))[1] == ("fail",)
    assert statuses(checks.versions({"a": HERE}, HERE, {}, "cpu")) == [("ok", "a")]


def test_the_lock_of_this_checkout_is_read() -> None:
    for kind in ("cpu", "gpu"):
        lock = checks.locked(kind)
        assert {"ray", "torch", "vllm", "transformers", "deepspeed", "pyarrow"} <= set(lock)
        assert lock["vllm"] == "0.32.0"


def test_code() -> None:
    same, other = {"hash": "1", "place": "/p"}, {"hash": "2", "place": "/q"}
    found = checks.code({"a": same, "b": other}, same)
    assert statuses(found) == [("ok", "a"), ("fail", "b")]
    assert found[1].value == "/q is 2, here 1"


@pytest.mark.parametrize(
    ("skew", "unsure", "status"),
    [
        (0.001, 0.002, "ok"),
        (-0.9, 0.0, "ok"),
        (2.0, 0.1, "warn"),
        (-2.0, 1.5, "ok"),
        (90, 1, "fail"),
    ],
)
def test_clock(skew: float, unsure: float, status: str) -> None:
    (found,) = checks.clock({"a": (skew, unsure)})
    assert found.status == status
    if status != "ok":
        assert "ahead of" in found.value and "chrony" in found.fix


def memory(**changes: int) -> dict[str, int]:
    whole = {"total": 100 * GIB, "used": 10 * GIB, "shm_total": 50 * GIB, "shm_free": 40 * GIB}
    return whole | changes


@pytest.mark.parametrize(
    ("changes", "expected", "said"),
    [
        ({}, ["ok", "ok"], "10 of 100 GiB in use"),
        ({"used": 90 * GIB}, ["warn", "ok"], "90 of 100"),
        ({"used": 96 * GIB}, ["fail", "ok"], "96 of 100"),
        ({"shm_total": 64 * 2**20, "shm_free": 0}, ["ok", "fail"], "10 of 100"),
        ({"shm_total": 20 * GIB}, ["ok", "warn"], "10 of 100"),
    ],
)
def test_memory(changes: dict[str, int], expected: list[str], said: str) -> None:
    found = checks.memory({"a": memory(**changes)}, {"a": 30 * GIB})
    assert [each.status for each in found] == expected
    assert said in found[0].value
    assert all("--shm-size" in each.fix for each in found if each.check == "shm" and each.fix)


def disk(**changes: Any) -> dict[str, Any]:
    return {"place": "/d", "total": 1000 * GIB, "free": 500 * GIB, "speed": 1e9} | changes


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({}, "ok", "500 of 1000 GiB free, over 1 GB/s written"),
        ({"speed": 234e6}, "ok", "over 200 MB/s"),
        ({"speed": 9e6}, "warn", "9 MB/s"),
        ({"free": 10 * GIB, "total": 100 * GIB}, "warn", "10 of 100"),
        ({"free": GIB // 2, "total": 5 * GIB}, "fail", "0 of 5"),
        ({"free": 40 * GIB}, "fail", "40 of 1000"),  # 96% full
        ({"error": "Permission denied"}, "fail", "cannot be written: Permission denied"),
    ],
)
def test_disk(changes: dict[str, Any], status: str, said: str) -> None:
    (found,) = checks.disk({"a": disk(**changes)}, "run_dir")
    assert (found.status, found.nodes) == (status, ("a",))
    assert said in found.value


def test_a_run_dir_that_is_not_shared_or_not_writable() -> None:
    made: dict[str, Any] = {"made": []}
    good = checks.shared({"a": made, "b": made}, {"a": [], "b": []}, "/r")
    assert statuses(good) == [("ok", "a"), ("ok", "b")]
    apart = checks.shared({"a": made, "b": made}, {"a": ["b"], "b": ["a"]}, "/r")
    assert statuses(apart) == [("fail", "a"), ("fail", "b")]
    assert apart[0].value == "/r: does not see what b wrote"
    closed = checks.shared({"a": made, "b": {"error": "Read-only file system"}}, {"a": []}, "/r")
    assert statuses(closed) == [("fail", "b"), ("ok", "a")]


def test_paths() -> None:
    named = {"model.path": "/m", "sft.train": "/s"}
    found = checks.paths({"a": [], "b": ["/s"]}, named)
    assert statuses(found) == [("ok", "a"), ("fail", "b")]
    assert found[1].value == "cannot be read: sft.train=/s"


def at(own: str = "10.0.0.1", **interfaces: str) -> dict[str, Any]:
    return {"interfaces": {"lo": "127.0.0.1", **interfaces}, "chosen": {}, "own": own}


@pytest.mark.parametrize(
    ("address", "place", "num_hosts", "status", "fix"),
    [
        ("10.0.0.1", at(eth0="10.0.0.1"), 2, "ok", ""),
        ("127.0.0.1", at(eth0="10.0.0.1"), 1, "ok", ""),
        (
            "127.0.0.1",
            at(eth0="10.0.0.1"),
            2,
            "fail",
            "--node-ip-address=10.0.0.1 there, and export",
        ),
        ("172.17.0.1", at(docker0="172.17.0.1", ens5="10.1.1.1"), 2, "fail", "SOCKET_IFNAME=ens5"),
        ("172.17.0.2", at(eth0="172.17.0.2"), 2, "fail", "--network=host"),
        ("10.0.0.1", at("127.0.1.1", eth0="10.0.0.1"), 2, "warn", "GLOO_SOCKET_IFNAME=eth0"),
        (
            "10.0.0.1",
            at(eth0="10.0.0.1") | {"chosen": {"NCCL_SOCKET_IFNAME": "ib0"}},
            2,
            "fail",
            "one of lo, eth0",
        ),
        (
            "10.0.0.1",
            at("127.0.1.1", eth0="10.0.0.1") | {"chosen": {"GLOO_SOCKET_IFNAME": "eth"}},
            2,
            "ok",
            "",
        ),
        (
            "10.0.0.1",
            at(eth0="10.0.0.1") | {"chosen": {"NCCL_SOCKET_IFNAME": "^docker"}},
            2,
            "ok",
            "",
        ),
    ],
)
def test_addresses(
    address: str, place: dict[str, Any], num_hosts: int, status: str, fix: str
) -> None:
    (found,) = checks.addresses({"a": place}, {"a": address}, num_hosts)
    assert found.status == status
    assert fix in found.fix


def test_network() -> None:
    good = checks.network({("a", "b"): 2e9, ("b", "a"): 1e9})
    assert [each.value for each in good] == ["b to a 1.0 GB/s, the slowest of 2 links"]
    found = checks.network({("a", "b"): 5e6, ("b", "a"): "Connection refused"})
    assert statuses(found) == [("warn", "a"), ("fail", "b")]
    assert found[0].value == "to b: 5 MB/s" and found[1].value == "to a: Connection refused"


def test_collective() -> None:
    right = {"is_right": True, "seconds": 0.1}
    (good,) = checks.collective({"a": [right, right], "b": [right]}, "gloo")
    assert good.value == "gloo: the sum over 3 ranks is right"
    broken = {"a": [right], "b": [right, {"is_right": False}], "c": [{"error": "timed out"}]}
    found = checks.collective(broken, "nccl")
    assert statuses(found) == [("fail", "b"), ("fail", "c")]
    assert found[0].value == "nccl: wrong sum" and "timed out" in found[1].value
    assert "SOCKET_IFNAME" in found[1].fix


def test_builds_and_engines() -> None:
    assert checks.builds({"a": {"compiler": "g++ 12"}})[0].status == "ok"
    (found,) = checks.builds({"a": {"error": "No such file or directory: 'ninja'"}})
    assert found.status == "fail" and "g++ python3-dev ninja" in found.fix
    good = {"num_tokens": 4, "load_s": 7.2, "generate_s": 0.1}
    assert checks.engine({"a": good})[0].value == "vLLM: 4 tokens, loaded in 7 s"
    (slow,) = checks.engine({"a": {"error": "not done after 240 s"}})
    assert slow.status == "fail" and "not done after 240 s" in slow.value


def test_ports() -> None:
    wanted = {"a": {8000: "Serve", 8265: "dashboard"}}
    (free,) = checks.ports({"a": {}}, wanted)
    assert free.value == "8000 (Serve), 8265 (dashboard) free"
    (own,) = checks.ports({"a": {8265: "ray::Dashboard (pid 3)"}}, wanted)
    assert own.value == "8000 (Serve) free; 8265 (dashboard) is Ray's own"
    taken = {"a": {8000: "nginx (pid 7)", 8265: "jupyter (pid 8)"}}
    found = checks.ports(taken, wanted)
    assert statuses(found) == [("fail", "a"), ("warn", "a")]
    assert found[0].value == "8000 (Serve) is taken by nginx (pid 7)"
    assert "label.port=8001" in found[0].fix and "--dashboard-port" in found[1].fix


def test_nodes_that_died_or_are_silent_are_named() -> None:
    found = checks.nodes(["a"], {"b": "health check failed"}, {"c": "not within 30 s"})
    assert statuses(found) == [("ok",), ("fail", "b"), ("fail", "c")]
    assert found[1].value == "died: health check failed"
