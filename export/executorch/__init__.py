"""`--target executorch`: programs for ExecuTorch's LLM runner."""
