"""A server for a bundle: the HTTP of OpenAI's clients, with operations and metrics, over the runtime alone."""
