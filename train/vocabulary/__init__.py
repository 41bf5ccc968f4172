"""A model's vocabulary as something that can be made smaller: its tokens, its tokenizer, and text in two of them."""
