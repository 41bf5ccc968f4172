"""`--target android`, `--target ios`: folders that an app developer opens and copies from."""
