"""What the routes share, carried by the app and never by a module."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from nybble.api.lifecycle import Lifecycle, Loaded
from nybble.api.metrics import Metrics
from nybble.config import ServeConfig
from nybble.errors import ModelNotFound


@dataclass(frozen=True, slots=True)
class Service:
    config: ServeConfig
    lifecycle: Lifecycle
    metrics: Metrics

    def ready(self) -> Loaded:
        """Raises `NotReady` or `ShuttingDown` unless requests are welcome."""
        self.lifecycle.check()
        assert self.lifecycle.loaded is not None
        return self.lifecycle.loaded


def service_of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def check_model(loaded: Loaded, name: str | None) -> str:
    """The name to answer with. A request without one gets the model there is."""
    if name is None:
        return loaded.names[0]
    if name not in loaded.names:
        raise ModelNotFound(
            f"The model {name[:100]!r} does not exist; there is {loaded.names[0]!r}.", param="model"
        )
    return name
