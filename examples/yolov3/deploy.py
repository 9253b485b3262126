# YOLOv3 for ONNX Runtime: the whole detector with its marks, and the part up to its head as a file of its own.
#
#   torchferry export examples/yolov3/deploy.py mmdet::yolo/yolov3_d53_8xb8-ms-608-273e_coco.py none PICTURE.png \
#       --work-dir out/yolov3
_base_ = ["torchferry::detection/yolov3_partition_static.py"]

backend_config = dict(type="onnxruntime")
