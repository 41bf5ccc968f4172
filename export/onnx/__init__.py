"""`--target onnx`: folders for onnxruntime, onnxruntime-genai and onnxruntime-web."""
