"""What an area hands to the runner: the calls to be timed for one case, or the reason why there are none."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import flashtile

Call = Callable[[], object]
Overrides = Mapping[str, Any]  # fields of an area's configuration (flashtile.config) to force


class NotAvailable(Exception):
    """The case cannot be run here; the message says why."""


@dataclass(frozen=True)
class Workload:
    """Calls over the same inputs. ours: row name -> call, first of them "flashtile"; rivals: likewise, by peer."""

    ours: dict[str, Call]
    rivals: dict[str, Call] = field(default_factory=dict)


def public(name: str) -> Any:
    """A public name of flashtile. NotAvailable if it is not built yet."""
    found = getattr(flashtile, name, None)
    if found is None:
        raise NotAvailable(f"flashtile.{name} is not built yet")
    return found


def plan_with(wrapper: Any, overrides: Overrides, *args: Any, **kwargs: Any) -> None:
    """wrapper.plan(...), then again with some fields of the chosen Config replaced."""
    wrapper.plan(*args, **kwargs)
    if overrides:
        wrapper._config = replace(wrapper._plan.config, **overrides)
        wrapper.plan(*args, **kwargs)
