# YOLOv3 up to its three feature maps, without anchors, decoding and suppression, besides the whole graph with marks.
_base_ = ["./single_stage_static.py"]
onnx_config = dict(input_shape=[608, 608])
partition_config = dict(
    type="yolov3_partition",
    apply_marks=True,
    partition_cfg=[
        dict(
            save_file="yolov3.onnx",
            start=["detector_forward:input"],
            end=["yolo_head:input"],
            output_names=["pred_maps.0", "pred_maps.1", "pred_maps.2"],
        )
    ],
)
