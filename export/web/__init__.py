"""`--target web`: a static folder that a browser opens and chats with, offline after the first visit."""
