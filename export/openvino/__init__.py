"""`--target openvino`: folders for OpenVINO GenAI."""
