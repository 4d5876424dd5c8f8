"""OpenAI's Realtime protocol over a WebSocket: sound and text in, speech out, interruptions."""
