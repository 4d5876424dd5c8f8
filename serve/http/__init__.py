"""The endpoints: models, chat, speech, transcriptions, operations; their bodies, streams and errors."""
