"""The stages' work fits their seconds, and everything that they name exists."""

import fnmatch
import itertools

import pytest
import torch

from adapterkern.activations import ACTIVATIONS
from adapterkern.backends import NAMES
from adapterkern.backends.base import NORM_FEATURES
from adapterkern.backends.cuda import launch_config as cuda
from adapterkern.bench.cases import MODES as CASE_MODES
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.providers import PROVIDERS
from adapterkern.parity import grid
from benchmarks import model_level, models
from benchmarks.__main__ import BACKENDS, MODES
from benchmarks.gpu import stages, workload
from benchmarks.gpu.measuring import END_SECONDS
from benchmarks.gpu.pack import ROOT

STAGES = {name: stages.steps(name) for name in stages.NAMES}
STEPS = [(name, step) for name, found in STAGES.items() for step in found]
MEASURED = [(name, step) for name, step in STEPS if isinstance(step, stages.Measure)]
TASKS = [task for _, step in MEASURED for task in step.tasks]


def str_of(value):
    return getattr(value, "name", value)


SPECS = {spec.name: spec for spec in models.SPECS}


@pytest.mark.parametrize("stage", STAGES)
def test_the_steps_of_a_stage_fit_its_seconds(stage):
    limits = [step.limit for step in STAGES[stage] if not getattr(step, "needs_build", False)]
    assert 0.8 * stages.SECONDS < sum(limits) <= stages.SECONDS - stages.CLOSING_SECONDS


@pytest.mark.parametrize(
    ("stage", "step"), MEASURED, ids=lambda value: getattr(value, "name", value)
)
def test_the_tasks_of_a_step_fit_its_limit(stage, step):
    assert sum(task.seconds for task in step.tasks) + END_SECONDS <= step.limit
    assert step.tasks


@pytest.mark.parametrize("stage", STAGES)
def test_names_within_a_stage_are_different(stage):
    names = [step.name for step in STAGES[stage]]
    assert len(names) == len(set(names))
    tasks = [t.name for s in STAGES[stage] if isinstance(s, stages.Measure) for t in s.tasks]
    again = [name for name in tasks if tasks.count(name) > 1]
    if stage == "verify":  # those that are compiled too come twice: first the numbers at all
        again = [name for name in again if not name.startswith(("forward-", "step-"))]
    assert again == []


def test_adapter_tasks_name_cases_and_providers_that_exist():
    adapters = [task for task in TASKS if task.request["do"] == "adapter"]
    assert len(adapters) > 60
    for task in adapters:
        case = BenchCase(**task.request["case"])
        assert task.name.startswith(str(case))
        assert set(task.request["baselines"]) <= set(PROVIDERS)
        assert {"single" if case.adapters else "plain", "limit"} <= set(task.request["baselines"])
        kinds = {case.kind} & set().union(*(PROVIDERS[n].kinds for n in task.request["baselines"]))
        assert kinds == {case.kind}


def test_many_adapters_are_verified_and_reported():
    """What the goals are judged by, popular and unpopular adapters, and steps."""

    def found(stage):
        (step,) = (s for s in STAGES[stage] if s.name == "many adapters")
        return {task.name for task in step.tasks}

    assert found("verify") == {
        "forward-bf16-gelu-T2048-H1024-R64-A16",
        "forward-bf16-gelu-T64-H4096-R64-A64",
        "step-bf16-gelu-T2048-H1024-R64-A16",
    }
    assert found("verify") < found("report")
    assert {name.partition("-H")[2] for name in found("report")} >= {
        "1024-R64-A16_none", "1024-R64-A16_zipf", "4096-R64-A16",
    }  # fmt: skip
    (tests,) = (s for s in STAGES["verify"] if s.name == "gpu tests")
    assert "tests/test_gpu_many.py" in tests.commands["gpu tests"]


def test_model_tasks_name_models_that_exist():
    chosen = [task.request for task in TASKS if task.request["do"] == "model"]
    assert len(chosen) >= 15
    for request in chosen:
        assert request["mode"] in SPECS[request["spec"]].modes
        assert request["execution"] in model_level.EXECUTIONS


def test_every_task_is_one_that_the_worker_knows():
    known = {"calibrate", "calibrate again", "adapter", "model", "host"}
    assert {task.request["do"] for task in TASKS} == known


def test_right_comes_before_fast():
    names = [step.name for step in STAGES["verify"]]
    first = next(n for n, s in enumerate(STAGES["verify"]) if isinstance(s, stages.Measure))
    assert names[:first] == [
        *("machine", "card", "build"),
        *("parity cuda", "parity triton", "gpu tests"),
    ]
    for found in STAGES.values():
        assert [step.name for step in found[:3]] == ["machine", "card", "build"]


def test_shards_take_every_case_once():
    (shards,) = (s for s in STAGES["verify"] if s.name == "parity cuda")
    asked = [words[words.index("--shard") + 1] for words in shards.commands.values()]
    assert asked == [f"{index}/14" for index in range(1, 15)]


def test_files_that_commands_name_exist():
    for _, step in STEPS:
        assert getattr(step, "commands", True), f"{step.name} has no command"
        for words in getattr(step, "commands", {}).values():
            paths = [w for w in words if w.startswith(("tests/", "benchmarks/"))]
            assert all((ROOT / path).exists() for path in paths), paths


@pytest.mark.parametrize("stage", STAGES)
def test_a_dry_stage_has_the_same_steps_and_needs_no_gpu(stage):
    dry = stages.steps(stage, dry=True)
    assert [step.name for step in dry] == [step.name for step in STAGES[stage]]
    for step in dry:
        words = list(itertools.chain(*getattr(step, "commands", {}).values()))
        assert len(getattr(step, "commands", {})) <= 2
        if "check" in words and not step.gpu:
            assert {"--device", "cpu", "--quick"} <= set(words)


def test_a_diagnosis_runs_the_cases_and_the_kernel_that_it_was_given():
    wanted = stages.Wanted("triton", ("bf16-a", "fp32-b"), "bottleneck_fwd_kernel", tokens=300)
    found = {step.name: step for step in stages.steps("diagnose", wanted)}
    words = found["cases"].commands["named cases"]
    assert words[words.index("--backend") + 1] == "triton"
    assert [w for w in words if w in ("bf16-a", "fp32-b")] == ["bf16-a", "fp32-b"]
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert list(found[tool].commands) == [f"{tool} triton bf16-a", f"{tool} triton fp32-b"]
        assert found[tool].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert found["profile"].gpu
    profile = found["profile"].commands["profile"]
    assert profile[:3] == ("ncu", "--clock-control", "none")
    assert "regex:bottleneck_fwd_kernel" in profile
    assert profile[profile.index("--tokens") + 1] == "300"
    metrics = profile[profile.index("--metrics") + 1]
    for part in ("dram__bytes_read", "hit_rate", "wavefronts_mem_shared", "stalled_membar"):
        assert part in metrics


def test_a_diagnosis_of_nothing_in_particular_is_of_every_form():
    for step in stages.steps("diagnose", stages.Wanted("triton"))[3:]:
        for words in step.commands.values():
            assert words[words.index("--backend") + 1] == "triton"
            named = [w for w in words if w.startswith("bf16-*")]
            assert named or step.name == "profile"  # never the whole grid in one process


def test_the_command_line_offers_what_a_diagnosis_can_be_of():
    assert {*BACKENDS, "reference"} == set(NAMES)
    assert MODES == CASE_MODES


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="known: verify, report, tune, diagnose"):
        stages.steps("all")


KERNEL_DTYPES = {torch.float32, torch.float16, torch.bfloat16}


def matching(pattern):
    """Return the one case of the GPU's grid that a pattern means."""
    cases = grid(KERNEL_DTYPES, ACTIVATIONS, features=NORM_FEATURES)
    (case,) = [c for c in cases if fnmatch.fnmatch(str(c), pattern)]
    return case


def cuda_form(tokens, hidden, bottleneck, half):
    whole = half and hidden % 8 == 0 and bottleneck % 8 == 0
    problem = cuda.Problem(tokens, hidden, bottleneck, half, beside=0 if whole else None)
    plan = cuda.token_plan(problem, cuda.Device(132, 227 * 1024, warpgroups=True))
    if plan.resident_clusters:
        return "resident"
    if plan.slices.number == 0:
        return "rows"
    return f"clusters of {plan.cluster_tokens} tokens" if plan.num_clusters else "split"


def form_of(case):
    sizes = case.shape[0], case.hidden_size, case.bottleneck_size
    return cuda_form(*sizes, half=case.dtype.itemsize == 2)


def test_the_named_cases_run_every_cuda_form_once():
    for name, pattern in workload.FORMS.items():
        assert name == form_of(matching(pattern))
    sizes = itertools.product(
        (1, 37, 300, 2048, 16384), (64, 1024, 4096), (8, 49, 64, 192), (True, False)
    )
    assert set(workload.FORMS) == {cuda_form(*s) for s in sizes}


def test_the_sanitizers_see_every_cuda_form_each_arithmetic_and_mixed_dtypes():
    cases = [matching(pattern) for _, pattern in workload.MEMCHECKED]
    assert len(cases) == 13
    assert {backend for backend, _ in workload.MEMCHECKED} == {"cuda"}
    assert {form_of(case) for case in cases} == set(workload.FORMS)
    assert {str(case)[:4] for case in cases} == {"bf16", "fp16", "fp32", "tf32"}
    assert any(case.parameter_dtype for case in cases)
    assert any(case.nonfinite for case in cases)
