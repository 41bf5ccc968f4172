"""Model shapes, tensors and classes, and reading and writing model folders. The export package imports this one."""
