"""Models of requests and answers in OpenAI's JSON."""
