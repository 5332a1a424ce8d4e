"""The cluster file for plain machines keeps to Ray's own schema, and starts what it should."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.local.config import prepare_local
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.cluster.schemas import ROOT, Object

FILE = ROOT / "cluster" / "vm" / "machines.yaml"


@pytest.fixture
def config() -> Object:
    found: Object = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return found


def test_it_keeps_to_the_schema(config: Object) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "setup_comands": []}, schema)


def test_ray_up_takes_it(config: Object) -> None:
    whole = prepare_config(copy.deepcopy(config))
    validate_config(whole)
    # Every machine that is named is started, and no other.
    workers = len(config["provider"]["worker_ips"])
    assert whole["max_workers"] == workers
    assert whole["available_node_types"]["local.cluster.node"]["min_workers"] == workers
    assert prepare_local.__module__  # the provider that the file names


def test_every_machine_has_the_token_and_the_code(config: Object) -> None:
    mounts = config["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert mounts["~/rayrlhf"] == "."
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        stop, start = config[name]
        assert stop.endswith("ray stop")
        assert "RAY_AUTH_MODE=token" in start
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    for command in config["setup_commands"]:
        for word in command.replace(";", " ").split():
            if word.startswith("requirements/"):
                assert (ROOT / word).is_file()
