"""`--target litert`: one file for LiteRT-LM, Google's runtime for language models on phones and desktops."""
