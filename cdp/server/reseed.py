"""Standbys that have to compare their disks with the store before they follow again.

ordered by          an operator ('cdp compare --reseed'), an agent that knows more than this store holds (an older
                    copy of it was restored), 'cdp store restore'
durable             a row of the store's settings, before anything else; the cursor goes with it
the standby learns  from the feed ("restart"), from its cursor (none), from a cursor that is refused
done                when it says that its disks hold no known state: that is how a seed begins
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from cdp.server.errors import ReseedOrdered

if TYPE_CHECKING:
    from cdp.store import Store

CONSUMER: Final = "standby"
_PREFIX: Final = "reseed/"


class Reseeds:
    """From any thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending = {
            uuid.UUID(key.removeprefix(_PREFIX)) for key in store.settings.items() if key.startswith(_PREFIX)
        }

    def order(self, machine: uuid.UUID, why: str) -> None:
        self._store.settings.put(f"{_PREFIX}{machine}", why.encode())
        self._pending.add(machine)
        self._store.remove_cursor(machine, CONSUMER)

    def pending(self, machine: uuid.UUID) -> bool:
        return machine in self._pending

    def check(self, machine: uuid.UUID) -> None:
        """Raise ``ReseedOrdered`` while the standby may not say where it stands."""
        if machine in self._pending:
            raise ReseedOrdered(
                "The standby's disks have to be compared with the store first.",
                remedy="The standby does so by itself.",
                machine=str(machine),
            )

    def begun(self, machine: uuid.UUID) -> None:
        """The standby compares: it has given up what it knew."""
        if machine in self._pending:
            self._store.settings.delete(f"{_PREFIX}{machine}")
            self._pending.discard(machine)
