"""Media in requests, read within limits, and sound in replies, in the formats that clients ask for."""
