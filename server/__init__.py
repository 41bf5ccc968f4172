"""An HTTP server with OpenAI's API over the engines of the runtime."""
