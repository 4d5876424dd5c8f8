"""What clients ask for about items: create, retrieve, delete."""

from __future__ import annotations

from omniport.runtime import OmniSession

from ..service import Service
from .given_content import Written
from .item_content import fields_of, read_item
from .item_list import Item, ItemList, new_id
from .responses.reply_maker import Compute
from .wire import client_events as sent
from .wire.outbox import Outbox
from .wire.wire_sound import WireFormat


class ItemRequests:
    """Keeps the items that clients know and the runtime's messages alike."""

    def __init__(
        self, service: Service, session: OmniSession, outbox: Outbox, items: ItemList, compute: Compute
    ) -> None:
        self._service, self._session, self._outbox, self._items = service, session, outbox, items
        self._compute = compute

    def tell(self, item: Item, previous: str | None) -> None:
        """There is another item, complete."""
        self._outbox.put("conversation.item.added", item=item.described(), previous_item_id=previous)
        self._outbox.put("conversation.item.done", item=item.described(), previous_item_id=previous)

    async def create(self, event: sent.ItemCreate, format: WireFormat) -> None:
        """``format``: of sound in it."""
        message = await read_item(event.item, format, self._service)
        given = event.item.get("id")
        item = Item(given if isinstance(given, str) and given else new_id("item"), fields_of(event.item))
        item.given = None if self._service.store is None else Written(event.item, format)
        previous = self._items.insert(item, event.previous_item_id)
        before = self._items.next_runtime_id(item)
        try:
            added = await self._compute(lambda: self._session.items.append(message, before=before))
        except BaseException:
            self._items.remove(item)
            raise
        item.runtime_id = added.id
        self.tell(item, previous)

    async def retrieve(self, event: sent.ItemRetrieve) -> None:
        """As it is now."""
        item = self._items.find(event.item_id, "item_retrieve_invalid_item_id")
        self._outbox.put("conversation.item.retrieved", item=item.described())

    async def delete(self, event: sent.ItemDelete) -> None:
        """From the conversation, too."""
        item = self._items.find(event.item_id, "item_delete_invalid_item_id")
        if self._items.remove(item) and item.runtime_id is not None:
            await self._compute(self._session.items.delete, item.runtime_id)
        self._outbox.put("conversation.item.deleted", item_id=item.id)
