"""Answer OpenAI-style requests with a fraction of the KV cache: rows of all lengths in one step, admitted by bytes."""

__all__: list[str] = []
