"""An OpenAI-style endpoint over the runtime's engines."""
