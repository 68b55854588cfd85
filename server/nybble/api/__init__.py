"""The HTTP surface: OpenAI-style routes, streaming, authentication, metrics."""
