"""What clients send and are answered, in OpenAI's JSON."""
