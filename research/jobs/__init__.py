"""Jobs: generators of training and test examples for one narrow task."""
