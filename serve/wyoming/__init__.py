"""The Wyoming protocol, as Home Assistant and its satellites speak it over TCP."""
