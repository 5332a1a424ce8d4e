"""An application of Ray Serve on an address of this machine: opened, watched, closed."""

import errno
import socket
import time
from collections.abc import Mapping

from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import DeploymentStatusOverview

from rayrlhf import console, session
from rayrlhf.config import RecipeError

LOOK_EVERY_S = 5.0
"""Seconds between two looks at the state of the application."""
PORT_S = 30.0
"""How long a port that is still in use is waited for: that of a server killed just now."""
LOGS = "what its processes wrote is below /tmp/ray/session_latest/logs on their node"


def wait_for_port(section: str, host: str, port: int) -> None:
    """Return when the port is free; raises RecipeError, which names `section`, if it stays in use.

    Where a cluster's Serve may listen there already, it takes the application.
    """
    until = time.monotonic() + PORT_S
    while True:
        try:
            with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
                return
        except OSError as error:
            place = f"{section}.host={host}, {section}.port={port}"
            if error.errno != errno.EADDRINUSE:
                raise RecipeError(
                    f"{place}: cannot listen there ({error.strerror}): set {section}.host to an "
                    "address of this machine, such as 127.0.0.1, and another port"
                ) from None
            if not session.is_local():
                return
            if time.monotonic() > until:
                raise RecipeError(
                    f"{place}: another program listens there: stop it, or set {section}.port to "
                    "another one"
                ) from None
            time.sleep(0.5)


def listen(application: serve.Application, name: str, host: str, port: int) -> None:
    """Run an application, named `name`, and return when it answers.

    Raises RuntimeError with the reason when a part of it does not start.
    """
    serve.start(
        proxy_location="HeadOnly" if session.is_local() else "EveryNode",
        http_options={"host": host, "port": port},
    )
    at = _get_global_client().http_config
    if (at.host, at.port) != (host, port):
        raise RecipeError(
            f"host={host}, port={port}: Serve of this cluster listens on {at.host}:{at.port} "
            "already: set host and port to these, or end it with `serve shutdown`"
        )
    try:
        serve.run(application, name=name, route_prefix="/")
    except RuntimeError as error:
        said = reasons({k: v.message for k, v in _deployments(name).items()})
        raise RuntimeError(f"{error} {said or 'no deployment says why'}; {LOGS}") from error


def _deployments(name: str) -> Mapping[str, DeploymentStatusOverview]:
    application = serve.status().applications.get(name)
    return {} if application is None else application.deployments


def reasons(messages: Mapping[str, str]) -> str:
    """Return the last line of each deployment's traceback that says something."""
    found = []
    for name, message in messages.items():
        lines = [line.strip() for line in message.splitlines() if line.strip()]
        said = [line for line in lines if not line.startswith("For further information")]
        if said:
            found.append(f"{name}: {said[-1][:500]}")
    return "; ".join(found)


def url(host: str, port: int) -> str:
    """Return where the application answers."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def watch(command: str, what: str, name: str) -> None:
    """Wait for Ctrl-C, and say when the application goes down or comes back."""
    before = "RUNNING"
    while True:
        time.sleep(LOOK_EVERY_S)
        state = serve.status().applications[name].status.value
        if state != before:
            console.warn(f"{command:>9} {what} is {state}")
            before = state


def close(name: str) -> None:
    """End the application, and Serve where it is this command's own."""
    if session.is_local():
        serve.shutdown()
    else:
        serve.delete(name)
