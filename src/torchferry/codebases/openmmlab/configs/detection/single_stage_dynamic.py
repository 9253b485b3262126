# A detector with one head, for pictures of any size, in batches of any size.
_base_ = ["./single_stage_static.py"]
onnx_config = dict(dynamic_axes=dict(input={0: "batch", 2: "height", 3: "width"}))
