"""Names of events and fields as different clients know them."""

from __future__ import annotations

from typing import Literal

Dialect = Literal["ga", "beta"]
