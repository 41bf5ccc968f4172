"""`--target web`: a static folder with a chat page that works offline after the first visit."""
