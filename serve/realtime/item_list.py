"""The conversation's items as clients know them, and which message of the runtime's each is."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..http.api_errors import ApiError
from .given_content import Given


def new_id(kind: str) -> str:
    """An id that nothing else has."""
    return f"{kind}_{secrets.token_hex(10)}"


@dataclass
class Item:
    """One item.

    Attributes:
        fields: of its JSON, without id, object and status.
        runtime_id: of the message in ``OmniSession.items``; None if that has forgotten it.
        given: kept only where sessions are saved.
    """

    id: str
    fields: dict[str, Any]
    status: str = "completed"
    runtime_id: str | None = None
    given: Given | None = None

    def described(self) -> dict[str, Any]:
        """As clients read it."""
        return {"id": self.id, "object": "realtime.item", "status": self.status, **self.fields}


@dataclass
class ItemList:
    """All items, in order."""

    _items: list[Item] = field(default_factory=list)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def find(self, id: str, code: str) -> Item:
        """The item of that id.

        Raises:
            ApiError: there is none; with this code.
        """
        found = self.get(id)
        if found is None:
            raise ApiError(400, code, f"there is no item {id!r:.100} in the conversation", param="item_id")
        return found

    def get(self, id: str) -> Item | None:
        """The item of that id, if there is one."""
        return next((item for item in self._items if item.id == id), None)

    @property
    def last_id(self) -> str | None:
        """Of the last item."""
        return self._items[-1].id if self._items else None

    def insert(self, item: Item, after: str | None) -> str | None:
        """Put an item in.

        Args:
            after: id of the item that it follows, ``root`` for the beginning, None for the end.

        Returns:
            The id of what it follows.

        Raises:
            ApiError: there is no such item, or one of that id already.
        """
        if self.get(item.id) is not None:
            raise ApiError(400, "item_create_duplicate_item_id", f"there is an item {item.id!r:.100} already")
        at = len(self._items)
        if after == "root":
            at = 0
        elif after is not None:
            at = self._items.index(self.find(after, "item_create_invalid_item_id")) + 1
        self._items.insert(at, item)
        return self._items[at - 1].id if at else None

    def before(self, item: Item) -> str | None:
        """Id of the item that stands before this one."""
        at = self._items.index(item) if item in self._items else 0
        return self._items[at - 1].id if at else None

    def next_runtime_id(self, item: Item) -> str | None:
        """The runtime's id of the first message behind an item."""
        behind = self._items[self._items.index(item) + 1 :]
        return next((other.runtime_id for other in behind if other.runtime_id is not None), None)

    def remove(self, item: Item) -> bool:
        """Take an item out; whether no other item is the same message of the runtime's."""
        self._items.remove(item)
        return all(other.runtime_id != item.runtime_id for other in self._items)

    def forget(self, runtime_ids: list[str]) -> list[str]:
        """The runtime has dropped these messages; ids of their items."""
        forgotten = [item for item in self._items if item.runtime_id in runtime_ids]
        for item in forgotten:
            item.runtime_id = item.given = None
        return [item.id for item in forgotten]
