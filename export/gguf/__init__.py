"""`--target gguf`: files for llama.cpp."""
