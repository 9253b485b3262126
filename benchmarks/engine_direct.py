"""A worker for ``engines.py`` that uses an engine directly, without Torchferry's session around it."""

from typing import Any

from torchferry.pipeline.bench_worker import Opened, Server


class OnnxRuntime(Opened):
    """``onnxruntime.InferenceSession``."""

    def __init__(self, file: str, inputs: dict[str, Any], threads: int) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        self.session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.feeds = inputs
        self.version = ort.__version__

    def run(self) -> Any:
        """Run."""
        return self.session.run(None, self.feeds)

    def outputs(self, given: Any) -> Any:
        """Give the outputs."""
        return list(given)


class OpenVino(Opened):
    """``openvino.CompiledModel``."""

    def __init__(self, file: str, inputs: dict[str, Any], threads: int) -> None:
        import openvino

        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self.model = openvino.Core().compile_model(file, "CPU", options)
        self.feeds = dict(enumerate(inputs.values()))
        self.version = openvino.__version__

    def run(self) -> Any:
        """Run."""
        return self.model(self.feeds)

    def outputs(self, given: Any) -> Any:
        """Give the outputs."""
        return [given[place] for place in range(len(self.model.outputs))]


def opened(spec: dict[str, Any], inputs: dict[str, Any], threads: int) -> Opened:
    """Open a file."""
    return {"onnxruntime": OnnxRuntime, "openvino": OpenVino}[spec["engine"]](spec["file"], inputs, threads)


if __name__ == "__main__":
    Server(opened).serve()
