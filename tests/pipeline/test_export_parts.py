"""Parts that a config asks for, by name or by table, from Python."""

import pytest
import torch
from torch import nn

import torchferry as ferry
from torchferry.core.errors import ConfigError
from torchferry.partitioning import find_policy, policies, register_policy
from torchferry.pipeline.config import PartitionSection, read_section
from torchferry.pipeline.parts import export_parts
from torchferry.pipeline.steps import Steps
from torchferry.rewrite import FUNCTION_REWRITER

TWO_STAGE = [{"save_file": "first.onnx", "end": "0:output"}, {"save_file": "second.onnx", "start": ["0:output"]}]


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(policies, "_POLICIES", {})


@pytest.fixture
def exported():
    return ferry.export(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()).eval(), torch.rand(2, 4))


def cut(exported, folder, config, **more):
    section = read_section(PartitionSection, config, "a test")
    return export_parts(exported, section, folder / "whole.onnx", torch.rand(2, 4), ferry.Target(), Steps(), **more)


def test_a_policy_is_found_by_its_name(exported, tmp_path):
    register_policy("zoo", "two_stage", TWO_STAGE)
    report = cut(exported, tmp_path, {"type": "two_stage"})
    assert report.passed
    assert {path.name for path in tmp_path.iterdir()} == {"first.onnx", "second.onnx"}
    assert [c.name.partition("/")[0] for c in report.comparisons] == ["first", "second", "joined"]


def test_the_parts_given_go_before_the_policy(exported, tmp_path):
    register_policy("zoo", "two_stage", TWO_STAGE)
    cut(exported, tmp_path, {"type": "two_stage", "partition_cfg": [{"save_file": "mine.onnx"}]})
    assert {path.name for path in tmp_path.iterdir()} == {"mine.onnx"}


def test_policies_of_several_codebases(exported, tmp_path):
    register_policy("zoo", "two_stage", TWO_STAGE)
    register_policy("other", "two_stage", [{"save_file": "other.onnx"}])
    with pytest.raises(ConfigError, match="of several codebases: 'zoo', 'other'"):
        cut(exported, tmp_path, {"type": "two_stage"})
    assert find_policy("two_stage", "zoo") == tuple(TWO_STAGE)
    cut(exported, tmp_path, {"type": "two_stage"}, codebase="other")
    assert {path.name for path in tmp_path.iterdir()} == {"other.onnx"}


def test_a_policy_that_nobody_registered():
    with pytest.raises(ConfigError, match="there is no partition 'two_stage'") as caught:
        find_policy("two_stage")
    assert caught.value.hint == "known: nothing"
    register_policy("zoo", "single_stage", TWO_STAGE)
    for codebase, hint in ((None, "did you mean 'single_stage'"), ("zoo", "did you mean"), ("other", "known: nothing")):
        with pytest.raises(ConfigError, match="there is no partition 'two_stage'") as caught:
            find_policy("two_stage", codebase)
        assert hint in caught.value.hint


def test_a_policy_with_a_wrong_key_names_it(exported, tmp_path):
    register_policy("zoo", "two_stage", [{"stat": "0:output"}])
    with pytest.raises(ConfigError, match=r"two_stage: unknown key 'stat' \(did you mean 'start'"):
        cut(exported, tmp_path, {"type": "two_stage"})


def test_nothing_is_written_where_a_part_differs(exported, tmp_path):
    wrong = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()).eval()
    source = ferry.Source(wrong, torch.rand(2, 4))
    report = cut(exported, tmp_path, {"partition_cfg": TWO_STAGE}, source=source)
    assert {finding.code for finding in report.findings} == {"boundary-differs"}
    assert not list(tmp_path.iterdir())


def test_outputs_that_a_rewriter_changes_on_purpose_are_compared_with_the_rewritten_model(tmp_path, monkeypatch):
    monkeypatch.setattr(FUNCTION_REWRITER, "_records", [])
    FUNCTION_REWRITER.register_rewriter("torch.relu", changes_outputs=True)(lambda x: x + 7)

    class Shifted(nn.Module):
        def forward(self, x):
            return torch.relu(ferry.mark_tensors("doubled", x * 2)).sum(0)

    source = ferry.Source(Shifted().eval(), torch.rand(2, 4))
    exported = ferry.export(source, apply_marks=True)
    assert exported.outputs_changed_by
    report = cut(exported, tmp_path, {"partition_cfg": [{"end": "doubled:output"}], "rest": True}, source=source)
    assert report.passed, report
    (output,) = exported.signature.output_names
    compared = [c.name for c in report.comparisons if " at " in c.name]
    assert compared == ["mul at doubled[0]:output.0", f"{output} at output of the model"]


def test_axes_of_tensors_that_a_part_does_not_have(exported, tmp_path):
    part = {"save_file": "a.onnx", "dynamic_axes": {"boxes": {"0": "batch"}, "input": [0, 7]}}
    report = cut(exported, tmp_path, {"partition_cfg": [part]})
    assert report.passed
    assert [f.message.partition("': ")[2] for f in report.findings] == [
        "it has no tensor 'boxes', only input, sigmoid",
        "its axis 0 is fixed in input: float32[2, 4]",
        "its axis 7 is fixed in input: float32[2, 4]",
    ]
