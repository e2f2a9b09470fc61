"""What comes with a call from the server."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from journal.errors import BadRequest

ArgsT = TypeVar("ArgsT", bound=msgspec.Struct)


def parsed(raw: dict[str, Any], kind: type[ArgsT]) -> ArgsT:
    """Raises ``BadRequest``."""
    try:
        return msgspec.convert(raw, kind)
    except (msgspec.ValidationError, ValueError) as error:
        raise BadRequest(
            f"The arguments of a call make no sense: {error}.",
            remedy="Server and standby have different versions: build the PE again with 'cdp pe build'.",
        ) from error
