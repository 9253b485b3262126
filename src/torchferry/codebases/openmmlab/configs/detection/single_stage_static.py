# A detector with one head, for pictures of one size; a config that inherits this sets onnx_config.input_shape.
codebase_config = dict(type="mmdet", task="ObjectDetection")
onnx_config = dict(input_names=["input"], output_names=["dets", "labels"], save_file="end2end.onnx")
