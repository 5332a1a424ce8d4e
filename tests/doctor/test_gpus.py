"""What nvidia-smi says: a healthy node, and each thing that can be wrong with one."""

from typing import Any

import pytest

from rayrlhf.doctor.gpus import count, gpus

DEVICE = """
<gpu id="00000000:{bus}:00.0">
  <product_name>NVIDIA H100 80GB HBM3</product_name>
  <fb_memory_usage><total>81559 MiB</total><used>{used} MiB</used></fb_memory_usage>
  <ecc_errors>
    <volatile>
      <sram_correctable>9</sram_correctable>
      <sram_uncorrectable_parity>0</sram_uncorrectable_parity>
      <sram_uncorrectable_secded>{sram}</sram_uncorrectable_secded>
      <dram_uncorrectable>{dram}</dram_uncorrectable>
    </volatile>
    <aggregate><dram_uncorrectable>7</dram_uncorrectable></aggregate>
  </ecc_errors>
  <remapped_rows>
    <remapped_row_pending>{pending}</remapped_row_pending>
    <remapped_row_failure>{failure}</remapped_row_failure>
  </remapped_rows>
  <clocks_event_reasons>
    <clocks_event_reason_gpu_idle>Active</clocks_event_reason_gpu_idle>
    <clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>
    <clocks_event_reason_hw_thermal_slowdown>{thermal}</clocks_event_reason_hw_thermal_slowdown>
    <clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
  </clocks_event_reasons>
  <processes><process_info><pid>4711</pid></process_info></processes>
</gpu>"""
PEERS = """ \tGPU0\tGPU1
 GPU0\tX\tOK
 GPU1\tOK\tX

Legend:
  X    = Self
  OK   = Status Ok
"""


def smi(cuda: str = "13.0", **changes: Any) -> str:
    """Return the XML of two GPUs, of which the second has `changes`."""
    well = {
        "used": 520,
        "sram": 0,
        "dram": 0,
        "pending": "No",
        "failure": "No",
        "thermal": "Not Active",
    }
    devices = DEVICE.format(bus=1, **well) + DEVICE.format(bus=2, **well | changes)
    return (
        "<nvidia_smi_log><driver_version>580.65</driver_version>"
        f"<cuda_version>{cuda}</cuda_version><attached_gpus>2</attached_gpus>{devices}"
        "</nvidia_smi_log>"
    )


def node(text: str | None = None, **changes: Any) -> dict[str, dict[str, Any]]:
    return {"a": {"smi": text or smi(), "peers": PEERS, "cuda": "13.0"} | changes}


def test_a_healthy_node() -> None:
    assert count(smi()) == 2
    (found,) = gpus(node(), {"a": 2})
    assert (found.status, found.value) == ("ok", "2 x NVIDIA H100 80GB HBM3, driver 580.65")


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"dram": 2, "sram": 1}, "fail", "GPU 1: 3 uncorrected memory errors"),
        ({"dram": "N/A"}, None, ""),
        ({"failure": "Yes"}, "fail", "GPU 1: no spare memory rows left"),
        ({"pending": "Yes"}, "warn", "GPU 1: a memory row waits"),
        ({"thermal": "Active"}, "warn", "GPU 1: slowed down (hw_thermal_slowdown)"),
        ({"used": 40960}, "warn", "GPU 1: 40 GiB in use by pid 4711"),
    ],
)
def test_what_is_wrong_with_a_gpu(changes: dict[str, Any], status: str | None, said: str) -> None:
    found = [each for each in gpus(node(smi(**changes)), {"a": 2}) if each.status != "ok"]
    assert [each.status for each in found] == ([status] if status else [])
    assert all(each.value.startswith(said) for each in found)


@pytest.mark.parametrize(
    ("facts", "registered", "status", "said"),
    [
        (node(smi(cuda="12.8")), 2, "fail", "the driver is for CUDA 12.8, torch for CUDA 13.0"),
        (node(cuda=None), 2, "warn", "torch is a build for CPUs"),
        (node(cuda="12.6"), 2, None, ""),
        (node(), 1, "warn", "2 there, Ray counts 1"),
        (node(peers=PEERS.replace("OK\tX", "CNS\tX").replace("X\tOK", "X\tCNS")), 2, "warn",
         "no peer access: GPU0-GPU1 (CNS)"),
        ({"a": {"smi": None, "peers": None, "cuda": "13.0"}}, 2, "fail", "Ray counts 2, but"),
        ({"a": {"smi": None, "peers": None, "cuda": None, "error": "timed out"}}, 0, "fail",
         "nvidia-smi: timed out"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_node(
    facts: dict[str, dict[str, Any]], registered: int, status: str | None, said: str
) -> None:
    found = [each for each in gpus(facts, {"a": registered}) if each.status != "ok"]
    assert [each.status for each in found] == ([status] if status else [])
    assert all(each.value.startswith(said) for each in found)


def test_no_gpu_anywhere_is_one_line() -> None:
    without = {"smi": None, "peers": None, "cuda": None}
    (found,) = gpus({"a": without, "b": without}, {"a": 0, "b": 0})
    assert (found.status, found.value) == ("ok", "none on any node: everything runs on CPUs")
    mixed = gpus({**node(), "b": without}, {"a": 2, "b": 0})
    assert [(each.nodes, each.status) for each in mixed] == [(("a",), "ok"), (("b",), "ok")]
