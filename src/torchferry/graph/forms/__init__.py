"""The form of one node: what ONNX allows in it, opset by opset, and how the same is written for another opset."""
