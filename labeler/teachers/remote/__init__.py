"""A teacher behind an OpenAI-compatible vLLM server; the only code that imports aiohttp."""
