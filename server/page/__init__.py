"""What browsers show: the chat page and the reference of the endpoint."""
