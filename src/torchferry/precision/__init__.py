"""L3: what FP16 does to a model, and how to keep it in range; the public face is `torchferry.fp16`."""
