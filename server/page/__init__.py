"""Pages for browsers: the chat page and the reference of the API."""
