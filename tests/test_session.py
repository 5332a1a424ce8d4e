"""What is missing on a cluster is named before any actor starts."""

import pytest

from rayrlhf.session import shortage

SMALL = {"CPU": 2.0, "memory": 1e9}
GPUS = {"CPU": 16.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("bundles", "nodes", "says"),
    [
        ([{"CPU": 1.0}] * 2, [SMALL], None),
        ([{"CPU": 0.25, "GPU": 0.0}] * 5, [SMALL], None),
        ([{"CPU": 1.0}] * 3, [SMALL], "3 CPU asked for, 2 registered on 1 node"),
        ([{"CPU": 1.0, "GPU": 1.0}], [SMALL], "1 GPU asked for, 0 registered"),
        ([{"GPU": 1.0}] * 16, [GPUS, GPUS], None),
        ([{"GPU": 1.0}] * 17, [GPUS, GPUS], "17 GPU asked for, 16 registered on 2 node"),
        ([{"CPU": 3.0}], [SMALL, SMALL], "no node has that much CPU left"),
        ([{"GPU": 5.0}, {"GPU": 5.0}, {"GPU": 5.0}], [GPUS, GPUS], "asks for 5 GPU on one node"),
        ([{"GPU": 3.0, "CPU": 1.0}] * 4, [GPUS, GPUS], None),
    ],
)
def test_shortage(
    bundles: list[dict[str, float]], nodes: list[dict[str, float]], says: str | None
) -> None:
    found = shortage(bundles, nodes)
    if says is None:
        assert found is None
    else:
        assert found is not None
        assert says in found
        assert "lower resources" in found


def test_shortage_does_not_touch_the_nodes() -> None:
    nodes = [dict(GPUS)]
    shortage([{"GPU": 2.0}], nodes)
    assert nodes == [GPUS]
